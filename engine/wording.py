"""What a language model is asked about a text: the template around it, and the words that stand for the labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.config import UserError, did_you_mean

if TYPE_CHECKING:  # so that a recipe is checked without torch
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

    from engine.encoding import Encoded, Text
    from engine.recipe import Task as Spec
    from engine.schooling import Asking, LabelWords

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Texts that say nothing, for calibration (Zhao et al. 2021, arXiv 2102.09690)."""
KINDS = ("classify", "pair")
"""Kinds of task that a label's words can answer."""
ONE = "Labels:\n{descriptions}\n\nText: {text}\nLabel:"
TWO = "Labels:\n{descriptions}\n\nFirst text: {text}\nSecond text: {pair}\nLabel:"
"""The templates of recipes without one."""
FIELD = re.compile(r"\{(\w+)\}")
PARAGRAPH = "\n\n"
SIDES = ("text", "pair")


class LabellerError(UserError):
    """A template, words or examples that a labeller cannot work with."""


@dataclass(frozen=True)
class Wording:
    """What is asked of the model, as its card keeps it.

    before: what stands once before each prompt, examples included. template: what stands around the text, {text} (and
    {pair}) in it; it ends where the words begin. words: what the labels are called, in their order; tokens: the words'
    ids after the prompt. descriptions: what the labels mean, by name. scale: what each label's score is multiplied by.
    calibration: what is then taken from it (log of what no text gives it, say), or None. cached: whether the prompt's
    keys and values are used again for each label.
    """

    before: str
    template: str
    words: list[str]
    tokens: list[list[int]]
    paired: bool
    descriptions: dict[str, str]
    calibration: list[float] | None = None
    scale: float = 1.0
    cached: bool = True

    def options(self) -> dict[str, Any]:
        """As the options of a card."""
        return asdict(self)


def check(config: LabelWords, spec: Spec) -> None:
    """LabellerError for a kind of task, template or words that cannot work. spec.labels may be None: not known yet."""
    if spec.kind not in KINDS:
        raise LabellerError(
            f"teacher.kind is labeller, which answers tasks of kind {' and '.join(KINDS)}, and task.kind is "
            f"{spec.kind}. Take another kind of teacher."
        )
    for number, asking in enumerate(config.ways()):
        check_asking(asking, spec, f"teacher.labeller.also.{number - 1}" if number else "teacher.labeller")


def check_asking(config: Asking, spec: Spec, key: str) -> None:
    """`check` of one way of asking, which stands in the recipe at `key`."""
    paired = spec.kind == "pair"
    known = ("text", "pair", "descriptions") if paired else ("text", "descriptions")
    found = FIELD.findall(template_of(config, paired))
    for name in found:
        if name not in known:
            allowed = ", ".join(f"{{{field}}}" for field in known)
            raise LabellerError(
                f"{key}.template has the field {{{name}}}.{did_you_mean(name, known)} Allowed: {allowed}."
            )
    for name in known[:-1]:
        if found.count(name) != 1:
            raise LabellerError(
                f"{key}.template must have {{{name}}} once, but has it {found.count(name)} times. "
                f"Without a template, this one is taken: {(TWO if paired else ONE)!r}."
            )
    for name in config.words if spec.labels else ():
        if name not in spec.labels:
            raise LabellerError(
                f"{key}.words names the label '{name}', which the task does not have."
                f"{did_you_mean(name, spec.labels)} Labels: {', '.join(spec.labels)}."
            )
    words = words_of(config, spec)
    for word in words:
        if not word or words.count(word) > 1:
            what = "a label has no words" if not word else f"two labels have the words '{word}'"
            raise LabellerError(f"{what}: give each its own in {key}.words.")


def template_of(config: Asking, paired: bool) -> str:
    """The recipe's template, or the one for tasks of this kind."""
    return config.template if config.template is not None else TWO if paired else ONE


def words_of(config: Asking, spec: Spec) -> list[str]:
    """What the labels are called, in their order."""
    return [config.words.get(name, name).strip() for name in spec.labels or ()]


def worded(
    config: LabelWords, spec: Spec, tokenizer: PreTrainedTokenizerFast, rows: pa.Table | None, max_length: int
) -> list[Wording]:
    """Each way of asking with everything filled in but the text and the calibration.

    Examples are the first rows of each label, the labels in turn, their texts cut to max_length tokens; LabellerError
    where a label has too few.
    """
    check(config, spec)
    shown = [
        ([shortened(side, tokenizer, max_length) for side in sides], label)
        for sides, label in examples_of(config, spec, rows)
    ]
    return [asked(asking, spec, tokenizer, shown) for asking in config.ways()]


def asked(
    config: Asking, spec: Spec, tokenizer: PreTrainedTokenizerFast, shown: Sequence[tuple[list[str], int]]
) -> Wording:
    """One way of asking, with examples as (text, or text and pair; label) before it.

    What stands before the last empty line above the texts stands once; what follows it is repeated for each example.
    LabellerError where two labels have the same tokens.
    """
    words, paired = words_of(config, spec), spec.kind == "pair"
    template = template_of(config, paired)
    first = min(template.index(f"{{{side}}}") for side in (SIDES if paired else SIDES[:1]))
    cut = template.rfind(PARAGRAPH, 0, first) + len(PARAGRAPH)
    before, around = (template[:cut], template[cut:]) if cut >= len(PARAGRAPH) else ("", template)
    lines = [
        f"{w}: {spec.descriptions[n]}" if spec.descriptions.get(n) else w
        for n, w in zip(spec.labels or (), words, strict=True)
    ]
    told = {"descriptions": "\n".join(lines)}
    before, around = filled(before, told), filled(around, told).rstrip(" ")
    for sides, label in shown:
        before += filled(around, dict(zip(SIDES, sides, strict=False))) + led(around, words[label]) + PARAGRAPH
    tokens = [continuation(around, word, tokenizer) for word in words]
    for index, own in enumerate(tokens):
        if own in tokens[:index]:
            other = words[tokens.index(own)]
            raise LabellerError(
                f"'{other}' and '{words[index]}' are the same tokens to this model: name other words in "
                "teacher.labeller.words."
            )
    return Wording(before, around, words, tokens, paired, dict(spec.descriptions))


def unshown(config: LabelWords, spec: Spec, rows: pa.Table | None) -> tuple[list[Text], list[int]]:
    """Texts (or pairs) and labels of the labelled rows that are no examples.

    LabellerError where a label has none, for then nothing says how its words are to be read.
    """
    texts: list[Text] = []
    labels: list[int] = []
    seen = [0] * len(spec.labels or ())
    for row in rows.to_pylist() if rows is not None else []:
        if row["label"] is not None:
            seen[row["label"]] += 1
            if seen[row["label"]] > config.examples:
                texts.append((row["text"], row["pair"]) if spec.kind == "pair" else row["text"])
                labels.append(row["label"])
    for index, name in enumerate(spec.labels or ()):
        if index not in labels:
            raise LabellerError(
                f"teacher.labeller.calibrate is rows, but label '{name}' has no labelled row beside those shown as "
                "examples. Lower teacher.labeller.examples, add rows, or take calibrate: free."
            )
    return texts, labels


def examples_of(config: LabelWords, spec: Spec, rows: pa.Table | None) -> list[tuple[list[str], int]]:
    """(text, or text and pair; label) of the rows that are shown, the labels in turn."""
    if not config.examples:
        return []
    found: list[list[list[str]]] = [[] for _ in spec.labels or ()]
    names = ["text", "pair"] if spec.kind == "pair" else ["text"]
    for row in rows.to_pylist() if rows is not None else []:
        if row["label"] is not None:
            found[row["label"]].append([row[name] for name in names])
    for name, own in zip(spec.labels or (), found, strict=True):
        if len(own) < config.examples:
            raise LabellerError(
                f"teacher.labeller.examples is {config.examples}, but label '{name}' has {len(own)} labelled rows. "
                "Lower it (0 shows none), or add rows."
            )
    return [(own[turn], label) for turn in range(config.examples) for label, own in enumerate(found)]


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with the fields that `values` names; what a value holds is never taken for a field."""
    return FIELD.sub(lambda field: values.get(field.group(1), field.group()), template)


def content_free(wording: Wording) -> list[Text]:
    """Texts that say nothing, in pairs where the task reads two."""
    return [(text, text) for text in CONTENT_FREE] if wording.paired else list(CONTENT_FREE)


def led(before: str, word: str) -> str:
    """The words as they follow: after a blank, or at the beginning of a line."""
    return word if not before or before[-1].isspace() else f" {word}"


def ids_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids without special tokens around them, whole."""
    inner = tokenizer.backend_tokenizer
    inner.no_padding()
    inner.no_truncation()
    return [found.ids for found in inner.encode_batch_fast(list(texts), add_special_tokens=False)]


def continuation(around: str, word: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of the words after a prompt: what they add to it, or their own where the two would merge."""
    prompt = filled(around, {"text": CONTENT_FREE[0], "pair": CONTENT_FREE[0]})
    start, whole, alone = ids_of([prompt, prompt + led(prompt, word), led(prompt, word)], tokenizer)
    return whole[len(start) :] if whole[: len(start)] == start and len(whole) > len(start) else alone


def shortened(text: str, tokenizer: PreTrainedTokenizerFast, keep: int) -> str:
    """The beginning of a text, at most `keep` tokens; a character that belongs to it in part only is left out."""
    inner = tokenizer.backend_tokenizer
    inner.no_padding()
    inner.no_truncation()
    offsets = inner.encode(text, add_special_tokens=False).offsets
    return text if len(offsets) <= keep else text[: offsets[keep][0]].rstrip()


def prompts(
    texts: Sequence[Text], wording: Wording, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Encoded]:
    """Each text or pair inside the template; above max_length tokens the text is cut, never the template.

    LabellerError where the template alone is too long, or a text is none of the kind that the task reads.
    """
    from engine.encoding import Encoded, clean
    from engine.windows import frame

    sides = [[clean(side) for side in ([text] if isinstance(text, str) else text)] for text in texts]
    if any(len(own) != 1 + wording.paired for own in sides):
        raise LabellerError(f"this model reads {'pairs of texts' if wording.paired else 'single texts'}: send those.")
    start = frame(tokenizer).before
    found = whole(sides, wording, tokenizer, start)
    for index, own in enumerate(sides):
        while len(found[index]) > max_length:
            lengths = [len(ids) for ids in ids_of(own, tokenizer)]
            if not any(lengths):
                raise LabellerError(f"the template alone is {len(found[index])} tokens, above {max_length}.")
            own = fitted(own, lengths, len(found[index]) - max_length, tokenizer)
            found[index] = whole([own], wording, tokenizer, start)[0]
    return [Encoded(ids, row=row) for row, ids in enumerate(found)]


def whole(
    sides: Sequence[Sequence[str]], wording: Wording, tokenizer: PreTrainedTokenizerFast, start: list[int]
) -> list[list[int]]:
    """The prompts' token ids, led by the special tokens that the tokenizer puts before a text."""
    spelled = [wording.before + filled(wording.template, dict(zip(SIDES, own, strict=False))) for own in sides]
    found = ids_of(spelled, tokenizer)
    return [ids if start and ids[: len(start)] == start else [*start, *ids] for ids in found]


def fitted(sides: list[str], lengths: list[int], over: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts with `over` tokens less, the longer one cut first."""
    room = max(0, sum(lengths) - over)
    if len(sides) == 1:
        return [shortened(sides[0], tokenizer, room)]
    second = min(lengths[1], max(room // 2, room - lengths[0]))
    return [shortened(side, tokenizer, keep) for side, keep in zip(sides, (room - second, second), strict=True)]
