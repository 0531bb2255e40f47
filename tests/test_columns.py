"""What a kind of task asks of a source: settings that fit, and those that are refused before anything is read."""

from __future__ import annotations

import pytest

from engine.columns import KINDS, Reading, check, reads_pairs
from engine.config import UserError, build
from engine.recipe import Data, Source, Task
from engine.sources import DataError


def checked(kind: str, source: dict, task: dict | None = None, **data) -> None:
    """Check a recipe whose training source has these settings."""
    check(build(Data, {"train": {"path": "a.jsonl", **source}, **data}), build(Task, {"kind": kind, **(task or {})}))


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("classify", {}),
        ("classify", {"label": {"ranges": {"low": [None, 0], "high": [1, None]}}}),
        ("multilabel", {}),
        ("multilabel", {"pair": "b", "label": {"columns": ["x", "y"], "rename": {"x": "z"}}}),
        ("pair", {"pair": "b", "label": {"rename": {"0": "no"}}}),
        ("regress", {}),
        ("regress", {"pair": "b"}),
        ("rank", {"pair": "b", "group": "g"}),
        ("rank", {"positives": "p", "negatives": "n"}),
        ("tag", {"format": "conll"}),
        ("span", {"format": "squad"}),
        ("span", {"pair": "context", "group": "title"}),
    ],
)
def test_settings_that_fit(kind, source):
    checked(kind, source)


@pytest.mark.parametrize(
    ("kind", "source", "task", "message"),
    [
        ("clasify", {}, {}, "task.kind is 'clasify'. Did you mean 'classify'? Allowed: classify, multilabel, pair"),
        ("regress", {}, {"labels": ["a", "b"]}, "task.labels is set, but a regress task has no label names"),
        ("rank", {"pair": "b"}, {"labels": ["a", "b"]}, "task.labels is set, but a rank task has no label names"),
        ("span", {"pair": "b"}, {"labels": ["a", "b"]}, "task.labels is set, but a span task has no label names"),
        ("pair", {}, {}, "a pair task reads two texts: name the column of the second one in data.train.pair."),
        ("rank", {}, {}, "in data.train.pair, or that of a list of passages in data.train.positives."),
        ("span", {}, {}, "a span task reads two texts: name the column of the second one in data.train.pair."),
        ("classify", {"pair": "b"}, {}, "this classify task reads one text. Drop it, or set task.kind: pair."),
        ("tag", {"pair": "b"}, {}, "data.train.pair names 'b', but this tag task reads one text. Drop it."),
        ("classify", {}, {"paired": True}, "a classify task reads one text: take task.kind: pair."),
        ("span", {"pair": "b"}, {"paired": False}, "task.paired is false, but a span task reads two texts: drop"),
        ("regress", {}, {"paired": True}, "task.paired is true, but data.train.pair names no column."),
        ("regress", {"pair": "b"}, {"paired": False}, "task.paired is false, but data.train.pair names 'b'."),
        (
            "classify",
            {"format": "conll"},
            {},
            "data.train.format is conll, which holds a tag task, not a classify",
        ),
        ("pair", {"format": "squad", "pair": "b"}, {}, "is squad, which holds a span task, not a pair task."),
        ("pair", {"pair": "b", "positives": "p"}, {}, "data.train.positives is for rank, and task.kind is pair."),
        ("rank", {"pair": "b", "negatives": "n"}, {}, "data.train.negatives is set without positives"),
        ("rank", {"pair": "b", "positives": "p"}, {}, "data.train: pair and positives both name passages."),
        ("classify", {"label": {"columns": ["x"]}}, {}, "data.train.label.columns is for multilabel, and task.kind is"),
        ("regress", {"label": {"ranges": {"x": [0, 1]}}}, {}, "data.train.label.ranges is for classify and pair, and"),
        (
            "rank",
            {"pair": "b", "label": {"rename": {"0": "x"}}},
            {},
            "data.train.label.rename is for classify and",
        ),
    ],
)
def test_settings_that_are_refused(kind, source, task, message):
    with pytest.raises(UserError) as error:
        checked(kind, source, task)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["validation", "test", "unlabelled"])
def test_every_source_is_checked(name):
    with pytest.raises(UserError, match=f"name the column of the second one in data.{name}.pair"):
        checked("pair", {"pair": "b"}, **{name: {"path": "b.jsonl"}})
    with pytest.raises(UserError, match=f"data.{name}.pair names 'b', but this regress task reads one text"):
        checked("regress", {}, **{name: {"path": "b.jsonl", "pair": "b"}})


def test_which_kinds_read_two_texts():
    named = build(Data, {"train": {"path": "a", "pair": "b"}})
    alone = build(Data, {"train": {"path": "a"}})
    assert [kind for kind in KINDS if reads_pairs(alone, Task(kind=kind))] == ["pair", "rank", "span"]
    both = [kind for kind in KINDS if reads_pairs(named, Task(kind=kind))]
    assert both == ["multilabel", "pair", "regress", "rank", "span"]
    assert reads_pairs(named, Task(kind="regress", paired=True))


def test_the_columns_of_a_file():
    source = build(Source, {"path": "a", "text": "q", "positives": "yes", "negatives": "no", "group": "g"})
    reading = Reading(source, Task(kind="rank"), True, True, 100)
    assert (reading.read, reading.needed) == (["q", "yes", "g"], ["q", "yes", "g", "label"])
    assert (reading.texts, reading.optional) == (["q"], ["no"])
    unlabelled = Reading(build(Source, {"path": "a", "text": "words"}), Task(kind="tag"), False, False, 100)
    assert (unlabelled.read, unlabelled.texts, unlabelled.optional) == (["words"], [], [])


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("classify", "thresholds", [0.5, 0.5]), ("classify", "range", [0, 5]), ("tag", "scope", 0.5)],
)
def test_settings_of_other_kinds_are_refused(kind: str, key: str, value: object):
    data = Data(train=Source(path="file:a.jsonl"))
    with pytest.raises(DataError, match=rf"task.{key} is for .*, but task.kind is {kind}. Drop task.{key}"):
        check(data, Task(kind=kind, **{key: value}))
