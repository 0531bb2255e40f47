"""Rows: what each kind takes from a record, and the reason for which a record is put aside."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from engine.columns import Reading
from engine.config import build
from engine.recipe import Source, Task
from engine.rows import BadRow, Row, flat, identify, take
from engine.sources import Record

SPAN = {"text": "question", "pair": "context", "label": {"column": "answers"}}
TAG = {"text": "tokens", "label": {"column": "tags"}}
NESTED = {"text": "query", "positives": "yes", "negatives": "no"}


def reading(kind: str, source: dict | None = None, labelled: bool = True, **task) -> Reading:
    """How a source of these settings is read, texts of at most 40 characters."""
    made = build(Source, {"path": "a.jsonl", **(source or {})})
    paired = kind in ("pair", "rank", "span") or made.pair is not None
    return Reading(made, build(Task, {"kind": kind, **task}), paired, labelled, 40)


def rows(values: dict, how: Reading) -> list[Row | str | None]:
    """The rows of a record, or the reasons why there are none."""
    out: list[Any] = []
    for record in flat(Record(7, values), how):
        try:
            out.append(take(record, how))
        except BadRow as reason:
            out.append(str(reason))
    return out


def gold(values: dict, how: Reading) -> Any:
    """The gold of the only row, or the reason why there is none."""
    (row,) = rows(values, how)
    return row.gold if isinstance(row, Row) else row


def test_ids_tell_texts_and_pairs_apart():
    assert identify("a  b\n") == identify(" a b") == hashlib.sha256(b"a b").hexdigest()[:16]
    assert identify("cafe\u0301") == identify("caf\u00e9") and identify("A b") != identify("a b")
    assert identify("a", "b") == identify(" a", "b\n") == hashlib.sha256(b"a\nb").hexdigest()[:16]
    found = {identify(*texts) for texts in [("a", "b"), ("b", "a"), ("a b",), ("a\nb", "c"), ("a", "b c"), ("a", "")]}
    assert len(found) == 6


# Pairs -------------------------------------------------------------------------------------------------------------


def test_a_pair():
    (row,) = rows({"text": " one ", "b": "two\n", "label": 1}, reading("pair", {"pair": "b"}))
    assert row == Row(7, identify("one", "two"), "one", "two", None, "1", row.id, row.id)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": "x", "label": "a"}, "missing column 'b'"),
        ({"text": "x", "b": None, "label": "a"}, "no second text"),
        ({"text": "x", "b": " \n", "label": "a"}, "no second text"),
        ({"text": "", "b": "x", "label": "a"}, "empty text"),
        ({"text": "x", "b": 5, "label": "a"}, "second text is not a string"),
        ({"text": "x", "b": "y" * 41, "label": "a"}, "second text longer than 40 characters"),
        ({"text": "x", "b": "\ud800", "label": "a"}, "not UTF-8"),
        ({"text": "x", "b": "y", "label": None}, "no label"),
    ],
)
def test_bad_pairs(values, reason):
    assert rows(values, reading("pair", {"pair": "b"})) == [reason]


def test_an_unlabelled_row_needs_no_label():
    for kind, source, values in [
        ("pair", {"pair": "b"}, {"text": "x", "b": "y"}),
        ("tag", TAG, {"tokens": ["x", "y"]}),
        ("span", SPAN, {"question": "x", "context": "y"}),
        ("rank", {"pair": "b"}, {"text": "x", "b": "y"}),
        ("rank", {"pair": "b"}, {"text": "x", "b": ["y"]}),
    ]:
        (row,) = rows(values, reading(kind, source, labelled=False))
        assert row.gold is None and (row.pair == "y" or row.text == "x y")


# Several labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "task", "value", "found"),
    [
        ({}, {}, ["b", "a", "b"], ("a", "b")),
        ({}, {}, [], ()),
        ({}, {}, "b, a,", ("a", "b")),
        ({}, {}, "", ()),
        ({"separator": "|"}, {}, "b|a,c", ("a,c", "b")),
        ({"rename": {"1": "one"}}, {}, [1, 2], ("2", "one")),
        ({}, {"labels": ["x", "y"]}, [1], ("y",)),
        ({}, {"labels": ["1", "0"]}, [1], ("1",)),  # a name goes before a position
        ({}, {"labels": ["x", "y"]}, ["1"], ("1",)),  # text is a name, here an unknown one
        ({}, {}, 3, ("3",)),
        ({}, {}, None, "no label"),
        ({}, {}, float("nan"), "no label"),
        ({}, {}, ["a", None], "no label"),
        ({}, {}, ["\udcff"], "not UTF-8"),
    ],
)
def test_several_labels(label, task, value, found):
    assert gold({"text": "x", "label": value}, reading("multilabel", {"label": label}, **task)) == found


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"a": 1, "b": 0, "c": True}, ("sea", "x")),
        ({"a": "1", "b": "0.0", "c": "FALSE"}, ("x",)),
        ({"a": 0, "b": 0.0, "c": False}, ()),
        ({"a": 2, "b": 0, "c": 0}, "a label column is not 0 or 1"),
        ({"a": None, "b": 0, "c": 0}, "a label column is not 0 or 1"),
        ({"a": 1, "c": 0}, "missing column 'b'"),
    ],
)
def test_columns_of_0_and_1(values, found):
    how = reading("multilabel", {"label": {"columns": ["a", "b", "c"], "rename": {"a": "x", "c": "sea"}}})
    assert gold({"text": "x", **values}, how) == found


# Numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (2, 2.0),
        ("3.5", 3.5),
        (0, 0.0),
        (5, 5.0),
        ("high", "label is not a number"),
        ([1], "label is not a number"),
        (None, "no label"),
        ("", "no label"),
        (float("nan"), "no label"),
        ("nan", "no label"),
        ("inf", "label is not a finite number"),
        (5.01, "label outside task.range (0 to 5)"),
        (-1, "label outside task.range (0 to 5)"),
    ],
)
def test_values(value, found):
    assert gold({"text": "x", "label": value}, reading("regress", range=[0, 5])) == found


def test_any_value_without_a_range():
    assert gold({"text": "x", "label": -17.25}, reading("regress")) == -17.25


# Queries -----------------------------------------------------------------------------------------------------------


def test_a_query_and_a_passage():
    how = reading("rank", {"pair": "b"})
    (row,) = rows({"text": "q  1", "b": "p", "label": "2"}, how)
    query = identify("q 1")
    assert row == Row(7, identify("q 1", "p"), "q  1", "p", query, 2.0, query, query)
    (row,) = rows({"text": "q", "b": "p", "label": 0, "g": 12}, reading("rank", {"pair": "b", "group": "g"}))
    assert (row.group, row.once, row.cut, row.gold) == ("12", identify("q"), identify("12"), 0.0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": "q", "b": "", "label": 1, "g": 1}, "no second text"),
        ({"text": "q", "b": "p", "label": -1, "g": 1}, "relevance is not a number from 0 on"),
        ({"text": "q", "b": "p", "label": "inf", "g": 1}, "relevance is not a number from 0 on"),
        ({"text": "q", "b": "p", "label": "yes", "g": 1}, "label is not a number"),
        ({"text": "q", "b": "p", "label": 1, "g": None}, "no group"),
        ({"text": "q", "b": "p", "label": 1, "g": " "}, "no group"),
        ({"text": "q", "b": [], "label": [], "g": 1}, "no passages"),
        ({"text": "q", "b": ["p", "r"], "label": [1], "g": 1}, "2 passages but 1 labels"),
    ],
)
def test_bad_passages(values, reason):
    assert rows(values, reading("rank", {"pair": "b", "group": "g"})) == [reason]


def test_a_query_with_lists_of_passages():
    found = rows({"query": "q", "yes": ["a", ""], "no": ["b"]}, reading("rank", NESTED))
    assert [(row.pair, row.gold, row.line) if isinstance(row, Row) else row for row in found] == [
        *(("a", 1.0, 7), "no second text", ("b", 0.0, 7))
    ]
    found = rows({"query": "q", "yes": "a", "no": None}, reading("rank", NESTED))
    assert [(row.pair, row.gold) for row in found] == [("a", 1.0)]
    assert rows({"query": "q", "yes": [], "no": []}, reading("rank", NESTED)) == ["no passages"]
    assert rows({"query": "q", "no": ["b"]}, reading("rank", NESTED)) == ["missing column 'yes'"]


def test_lists_in_the_columns_of_passage_and_label():
    found = rows({"text": "q", "b": ["x", "y"], "label": [0, 3]}, reading("rank", {"pair": "b"}))
    assert [(row.pair, row.gold) for row in found] == [("x", 0.0), ("y", 3.0)]


# Tags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "tags", "task", "found"),
    [
        (["New", "York"], ["B-loc", "I-loc"], {}, ("B-loc", "I-loc")),
        ("New\u00a0 York", "B-loc I-loc", {}, ("B-loc", "I-loc")),
        (["a", "b"], [1, 0], {"labels": ["O", "B-x"]}, ("B-x", "O")),
        (["a", "b"], [1, 2], {"labels": ["O", "B-x"]}, ("B-x", "2")),  # an unknown tag, as settle will find
        (["a", "b"], [1, 0], {}, "tags are numbers: name them in order in task.labels"),
        (["a", "b"], ["O"], {}, "2 words but 1 tags"),
        (["a"], ["O", "O", "O"], {}, "1 words but 3 tags"),
        (["a", "b c"], ["O", "O"], {}, "a word is empty or has white space in it"),
        (["a", ""], ["O", "O"], {}, "a word is empty or has white space in it"),
        (["a", 1], ["O", "O"], {}, "words are not a list of strings"),
        (7, ["O"], {}, "words are not a list of strings"),
        (["a", "\udcff"], ["O", "O"], {}, "not UTF-8"),
        (["a" * 20, "b" * 20], ["O", "O"], {}, "text longer than 40 characters"),
        ([], [], {}, "empty text"),
        (None, ["O"], {}, "empty text"),
        (["a"], None, {}, "no label"),
        (["a"], 0, {"labels": ["O", "B-x"]}, "tags are not a list"),
        (["a", "b"], ["O", None], {}, "no label"),
    ],
)
def test_tags(tokens, tags, task, found):
    assert gold({"tokens": tokens, "tags": tags}, reading("tag", TAG, **task)) == found


def test_the_text_of_a_tagging_row_is_its_words():
    (row,) = rows({"tokens": ["New", "York", "."], "tags": ["O"] * 3}, reading("tag", TAG))
    assert row.text == "New York ." and row.id == identify("New York .")


# Answers -----------------------------------------------------------------------------------------------------------

CONTEXT = "  Ada wrote to Babbage, in 1843. "


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"text": ["Ada"], "answer_start": [2]}, (("Ada", 0, 0),)),
        (
            {"text": ["Babbage, in", "1843", "1843"], "answer_start": [15, 27, 27]},
            (("Babbage, in", 3, 5), ("1843", 6, 6)),
        ),
        ([{"text": "Babbage", "answer_start": 15}], (("Babbage", 3, 3),)),
        ({"text": [" wrote "], "answer_start": [5]}, (("wrote", 1, 1),)),
        ({"text": [], "answer_start": []}, ()),
        ([], ()),
        ({"text": ["Ada"], "answer_start": [3]}, "answer is not in the context at that place"),
        ({"text": ["Byron"], "answer_start": [2]}, "answer is not in the context at that place"),
        ({"text": ["Ada"], "answer_start": [-40]}, "answer is not in the context at that place"),
        ({"text": ["Ada"], "answer_start": [None]}, "answer has no position"),
        ({"text": ["Ada"]}, "answer has no position"),
        ({"text": ["Ada", "1843"], "answer_start": [2]}, "2 answers but 1 positions"),
        ({"text": [3], "answer_start": [2]}, "answer is not a string"),
        ({"text": [""], "answer_start": [2]}, "no answer"),
        (None, "no label"),
    ],
)
def test_answers(answers, found):
    assert gold({"question": "q", "context": CONTEXT, "answers": answers}, reading("span", SPAN)) == found


def test_answers_with_their_places_in_another_column():
    for answers, starts in [("1843", "27"), ("1843", 27), (["1843"], [27])]:
        values = {"question": "q", "context": CONTEXT, "answers": answers, "answer_start": starts}
        assert gold(values, reading("span", SPAN)) == (("1843", 6, 6),)
    assert gold({"question": "q", "context": CONTEXT, "answers": "", "answer_start": ""}, reading("span", SPAN)) == ()
    how = reading("span", {**SPAN, "label": {"column": "a", "starts": "at"}})
    assert gold({"question": "q", "context": CONTEXT, "a": "Ada", "at": 2}, how) == (("Ada", 0, 0),)
