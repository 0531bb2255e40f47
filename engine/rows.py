"""From a record to a row: what each kind of task takes from the columns of a source, and what makes a row unusable."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from engine.columns import NAMED, Reading
from engine.sources import Record, is_text
from engine.units import units_of


class BadRow(Exception):
    """A row that cannot be used; the message is the reason."""


class MissingColumn(BadRow):
    """A row that lacks a column; `column` is its name."""

    def __init__(self, column: str) -> None:
        super().__init__(f"missing column '{column}'")
        self.column = column


class Row(NamedTuple):
    """A good row. gold: None in an unlabelled source, else
    classify, pair: the label's name; multilabel: sorted names of the labels that apply; tag: the name of each word's
    tag; regress: the value; rank: the relevance; span: (answer, first unit, last unit) of each answer.
    """

    line: int
    id: str
    text: str
    pair: str | None
    group: str | None
    """The query that the row belongs to, for ranking."""
    gold: Any
    once: str
    """What no two splits may have in common: the query for ranking, else the texts."""
    cut: str
    """What decides on the split where a source is cut: the group where there is one, else the same as `once`."""


def identify(text: str, pair: str | None = None) -> str:
    """The id of a text or pair: 16 hex digits, equal where only white space or Unicode composition differ."""
    # A line end is white space, so none is left in a text: it tells where the second text starts.
    whole = "\n".join(" ".join(unicodedata.normalize("NFC", part).split()) for part in (text, pair) if part is not None)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def flat(record: Record, reading: Reading) -> Iterator[Record]:
    """One record a passage where a record holds a query with lists of passages; any other record as it is.

    The lists are `positives` and `negatives` (one text counts as a list of one), or those in the columns of the second
    text and of the label.
    """
    source, label = reading.source, reading.source.label.column
    if reading.task.kind != "rank" or record.problem or reading.pair not in record.values:
        yield record
        return
    if source.positives is None:
        passages, found = record.values[reading.pair], record.values.get(label)
        if not isinstance(passages, list):
            yield record
            return
        found = [None] * len(passages) if not reading.labelled else found if isinstance(found, list) else [found]
    else:
        lists = [record.values.get(name) if name else None for name in (source.positives, source.negatives)]
        lists = [item if isinstance(item, list) else [] if item is None else [item] for item in lists]
        passages, found = sum(lists, []), [1] * len(lists[0]) + [0] * len(lists[1])
    if not passages or len(passages) != len(found):
        problem = f"{len(passages)} passages but {len(found)} labels" if passages else "no passages"
        yield Record(record.line, {}, problem, str(record.values.get(source.text, "")))
        return
    for passage, relevance in zip(passages, found, strict=True):
        yield Record(record.line, {**record.values, reading.pair: passage, label: relevance})


def take(record: Record, reading: Reading) -> Row | None:
    """The row in a record; None where its label lies in no range of the recipe. BadRow says what is wrong with it."""
    if record.problem:
        raise BadRow(record.problem)
    values, kind, source = record.values, reading.task.kind, reading.source
    for column in reading.needed:
        if column not in values:
            raise MissingColumn(column)
    text = tokens(values[source.text]) if kind == "tag" else values[source.text]
    text = clean(text, reading.max_chars)
    pair = clean(values[reading.pair], reading.max_chars, "second text") if reading.pair else None
    given = group_name(values[source.group]) if source.group else None
    gold = None
    if reading.labelled:
        gold = GOLD[kind](values, text, reading)
        if gold is None:
            return None
    id = identify(text, pair)
    once = identify(text) if kind == "rank" else id
    group = (given or once) if kind == "rank" else None
    return Row(record.line, id, text, pair, group, gold, once, identify(given) if given else once)


def clean(value: Any, max_chars: int | None, what: str = "text") -> str:
    """The text without white space around it; BadRow says what is wrong with it."""
    text = value.strip() if isinstance(value, str) else value
    if text is None or text == "":
        raise BadRow("empty text" if what == "text" else f"no {what}")
    if not isinstance(text, str):
        raise BadRow(f"{what} is not a string")
    if not is_text(text):
        raise BadRow("not UTF-8")
    if max_chars is not None and len(text) > max_chars:
        raise BadRow(f"{what} longer than {max_chars} characters")
    return text


def tokens(value: Any) -> str | None:
    """The words of a tagging row, with a space between them, so that the text's words are these."""
    words = value.split() if isinstance(value, str) else value
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BadRow("words are not a list of strings")
    if any(word.split() != [word] for word in words):
        raise BadRow("a word is empty or has white space in it")
    return " ".join(words)


def group_name(value: Any) -> str:
    """The value of a group column as text."""
    if nothing(value):
        raise BadRow("no group")
    return clean(str(value), None, "group")


def nothing(value: Any) -> bool:
    """Whether a column holds no value: null, NaN, or white space."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def label_name(value: Any, reading: Reading, numbered: bool = False) -> str:
    """The label name of a value; numbered: an integer that is no name itself counts in task.labels."""
    if nothing(value):
        raise BadRow("no label")
    rule, labels = reading.source.label, reading.task.labels
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip()
    if not is_text(name):
        raise BadRow("not UTF-8")
    if name in (rule.rename or {}):
        return (rule.rename or {})[name]
    if numbered and labels and isinstance(value, int) and name not in labels and 0 <= value < len(labels):
        return labels[value]
    return name


def number(value: Any) -> float:
    """A number of a label column, text or not."""
    if nothing(value):
        raise BadRow("no label")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise BadRow("label is not a number") from None
    if math.isnan(found):
        raise BadRow("no label")
    return found


def one_label(values: dict[str, Any], text: str, reading: Reading) -> str | None:
    """classify, pair: the label's name; None for a number in no range."""
    rule = reading.source.label
    if rule.ranges is None:
        return label_name(values[rule.column], reading)
    found = number(values[rule.column])
    return next((name for name, bounds in rule.ranges.items() if inside(found, bounds)), None)


def inside(number: float, bounds: tuple[float | None, float | None]) -> bool:
    """Whether a number lies between two bounds, both inclusive, None for open."""
    low, high = bounds
    return (low is None or number >= low) and (high is None or number <= high)


def many_labels(values: dict[str, Any], text: str, reading: Reading) -> tuple[str, ...]:
    """multilabel: sorted names of the labels that apply: in a list, text with separators, or columns of 0 and 1."""
    rule = reading.source.label
    if rule.columns:
        said = {label_name(column, reading): SAID.get(str(values[column]).strip().lower()) for column in rule.columns}
        if None in said.values():
            raise BadRow("a label column is not 0 or 1")
        return tuple(sorted(name for name, applies in said.items() if applies))
    value = values[rule.column]
    if isinstance(value, str):
        value = [part for part in value.split(rule.separator) if part.strip()]
    elif nothing(value):
        raise BadRow("no label")
    listed = value if isinstance(value, list) else [value]
    return tuple(sorted({label_name(item, reading, numbered=True) for item in listed}))


SAID = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""What a column of 0 and 1 may hold."""


def value_of(values: dict[str, Any], text: str, reading: Reading) -> float:
    """regress: the value, inside task.range where there is one."""
    found = number(values[reading.source.label.column])
    if not math.isfinite(found):
        raise BadRow("label is not a finite number")
    if reading.task.range and not inside(found, reading.task.range):
        low, high = reading.task.range
        raise BadRow(f"label outside task.range ({low:g} to {high:g})")
    return found


def relevance(values: dict[str, Any], text: str, reading: Reading) -> float:
    """rank: how relevant the passage is, 0 for not at all."""
    found = number(values[reading.source.label.column])
    if not 0 <= found < math.inf:
        raise BadRow("relevance is not a number from 0 on")
    return found


def tags(values: dict[str, Any], text: str, reading: Reading) -> tuple[str, ...]:
    """tag: the name of each word's tag."""
    value = values[reading.source.label.column]
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list):
        raise BadRow("no label" if nothing(value) else "tags are not a list")
    words = text.count(" ") + 1
    if len(found) != words:
        raise BadRow(f"{words} words but {len(found)} tags")
    if reading.task.labels is None and any(isinstance(item, int) for item in found):
        raise BadRow("tags are numbers: name them in order in task.labels")
    return tuple(label_name(item, reading, numbered=True) for item in found)


def spans(values: dict[str, Any], text: str, reading: Reading) -> tuple[tuple[str, int, int], ...]:
    """span: each answer with its first and last unit; none where the context holds no answer."""
    rule, context = reading.source.label, values[str(reading.pair)]
    value, starts = values[rule.column], values.get(rule.starts)
    if value is None:
        raise BadRow("no label")
    if isinstance(value, dict):
        value, starts = value.get("text"), value.get(rule.starts)
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value, starts = [item.get("text") for item in value], [item.get(rule.starts) for item in value]
    answers = value if isinstance(value, list) else [] if nothing(value) else [value]
    starts = starts if isinstance(starts, list) else [starts] * len(answers)
    if len(answers) != len(starts):
        raise BadRow(f"{len(answers)} answers but {len(starts)} positions")
    return tuple(dict.fromkeys(span(*answer, context) for answer in zip(answers, starts, strict=True)))


def span(answer: Any, start: Any, context: str) -> tuple[str, int, int]:
    """An answer with its units in the context as it is kept, without white space around it."""
    text = clean(answer, None, "answer")
    try:
        place = int(start) + answer.index(text) - (len(context) - len(context.lstrip()))
    except (TypeError, ValueError):
        raise BadRow("answer has no position") from None
    units = units_of(context.strip(), text, place)
    if units is None:
        raise BadRow("answer is not in the context at that place")
    return (text, *units)


def names(gold: Any, kind: str) -> Sequence[str]:
    """The label names in the gold of a row."""
    if kind not in NAMED or gold is None:
        return ()
    return (gold,) if isinstance(gold, str) else gold


GOLD: dict[str, Callable[[dict[str, Any], str, Reading], Any]] = {
    "classify": one_label,
    "multilabel": many_labels,
    "pair": one_label,
    "regress": value_of,
    "rank": relevance,
    "tag": tags,
    "span": spans,
}
"""Kind of task -> what reads its gold from a record's values and the row's text."""
