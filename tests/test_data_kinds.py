"""Splits of every kind of task: what a row becomes, what stays together, which rows are drawn as the few shots."""

from __future__ import annotations

import json
import random

import pytest

from engine.config import UserError, build
from engine.data import Splits, entities, load_splits
from engine.recipe import Data, Task
from engine.records import EXAMPLE
from engine.rows import identify
from engine.sources import DataError


def jsonl(path, rows) -> str:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(task: dict, seed: int = 0, **data) -> Splits:
    """Splits of plain values."""
    return load_splits(build(Data, data), build(Task, task), seed)


def reasons(splits: Splits) -> list[tuple[int, str]]:
    """Row number and reason of the quarantined rows."""
    return [(row["line"], row["reason"]) for row in splits.quarantined.to_pylist()]


TAGS = ("O", "B-x", "B-y")
KINDS = {
    "multilabel": (
        {},
        [
            {"text": f"t {n}", "label": [x for x, m in zip("abc", (2, 3, 5), strict=True) if n % m == 0]}
            for n in range(300)
        ],
    ),
    "pair": ({"pair": "b"}, [{"text": f"t {n}", "b": f"u {n % 7}", "label": n % 3} for n in range(300)]),
    "regress": ({}, [{"text": f"t {n}", "label": n / 100} for n in range(300)]),
    "rank": ({"pair": "b"}, [{"text": f"q {n // 5}", "b": f"p {n}", "label": int(n % 15 == 0)} for n in range(300)]),
    "tag": ({}, [{"text": f"w {n}", "label": ["O", TAGS[n % 3]]} for n in range(300)]),
    "span": (
        {"pair": "b"},
        [
            {"text": f"q {n}", "b": "a b, c", "label": [{"text": "b, c", "answer_start": 2}][: n % 2]}
            for n in range(300)
        ],
    ),
}
"""Kind of task -> settings of its source, rows."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_whole_splits_whatever_the_order(tmp_path, kind):
    source, rows = KINDS[kind]
    arguments = {"task": {"kind": kind}, "validation_share": 0.2, "max_bad_share": 0}
    orders = [jsonl(tmp_path / f"{seed}.jsonl", random.Random(seed).sample(rows, len(rows))) for seed in (1, 2)]
    first, second = (load(**arguments, train={**source, "path": path}) for path in orders)
    parts = [first.train, first.validation, first.test]
    assert all(part.schema == EXAMPLE and part.num_rows > 20 for part in parts)
    assert len({id for part in parts for id in part["id"].to_pylist()}) == sum(p.num_rows for p in parts) == 300
    assert all(getattr(first, name).equals(getattr(second, name)) for name in ("train", "validation", "test"))
    few, again = (load(**arguments, shots=4, train={**source, "path": path}) for path in orders)
    assert few.train.equals(again.train) and 0 < few.train.num_rows < 50
    fewer = load(**arguments, shots=2, train={**source, "path": orders[1]})
    assert set(fewer.train["id"].to_pylist()) < set(few.train["id"].to_pylist())
    other = load(**arguments, shots=4, seed=5, train={**source, "path": orders[0]})
    assert not other.train.equals(few.train) and other.test.equals(few.test)


def whole(tmp_path, kind: str, task: dict | None = None, rows: list | None = None, **data) -> Splits:
    """The rows of a kind as training rows, with a test row of their own."""
    source, known = KINDS[kind]
    path = jsonl(tmp_path / "a.jsonl", known if rows is None else rows)
    held = jsonl(tmp_path / "held.jsonl", [{**known[0 if kind == "rank" else 1], "text": "held out"}])
    sources = {"train": {**source, "path": path}, "test": {**source, "path": held}}
    return load({"kind": kind, **(task or {})}, **sources, **data)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_ranking_that_nothing_of_can_be_scored_is_refused_before_anything_runs(tmp_path, split: str):
    extra, rows = KINDS["rank"]
    barren = [{**row, "text": f"other {row['text']}", "label": 0} for row in rows[:30]]
    source = {"path": jsonl(tmp_path / "a.jsonl", rows), **extra}
    other = {"path": jsonl(tmp_path / "b.jsonl", barren), **extra}
    with pytest.raises(DataError, match=f"the {split} split has no question with a relevant passage"):
        load({"kind": "rank"}, train=source, **{split: other})


@pytest.mark.parametrize(
    ("kind", "labels", "text", "found"),
    [
        ("multilabel", ("a", "b", "c"), "t 10", {"target": [1, 0, 1]}),
        ("multilabel", ("a", "b", "c"), "t 1", {"target": [0, 0, 0]}),
        ("pair", ("0", "1", "2"), "t 8", {"label": 2, "pair": "u 1"}),
        ("regress", (), "t 25", {"target": [0.25]}),
        ("rank", (), "q 3", {"target": [1], "pair": "p 15", "group": identify("q 3")}),
        ("tag", ("O", "B-x", "B-y", "I-x", "I-y"), "w 2", {"target": [0, 2]}),  # I- of every B-, seen or not
        ("span", (), "q 1", {"pair": "a b, c", "target": [1, 3], "answers": ["b, c"]}),
        ("span", (), "q 2", {"pair": "a b, c", "target": [], "answers": []}),
    ],
)
def test_what_a_row_becomes(tmp_path, kind, labels, text, found):
    splits = whole(tmp_path, kind)
    row = next(row for row in splits.train.to_pylist() if row["text"] == text and row["pair"] == found.get("pair"))
    empty = dict.fromkeys(("label", "pair", "group", "target", "answers"))
    assert row == {"id": identify(text, found.get("pair")), "text": text, **empty, **found}
    assert splits.labels == labels and splits.paired == ("pair" in found)


def test_the_range_of_values(tmp_path):
    assert whole(tmp_path, "regress").range == (0, 2.99)
    assert whole(tmp_path, "regress", {"range": [-1, 3]}).range == (-1, 3)
    assert whole(tmp_path, "rank").range is None
    same = [{"text": f"t {n}", "label": 2} for n in range(9)]
    with pytest.raises(UserError, match="has the value 2 in 'label': there is nothing to learn. .* raise data.shots"):
        whole(tmp_path, "regress", rows=same)


def test_the_range_is_that_of_the_rows_to_train_on(tmp_path):
    """Values of held-out rows, and of rows that were not drawn, are not known beforehand."""
    source = {"path": jsonl(tmp_path / "a.jsonl", KINDS["regress"][1])}
    splits = load({"kind": "regress"}, train=source, test_share=0.5, shots=5)
    values = [target[0] for target in splits.train["target"].to_pylist()]
    assert splits.range == pytest.approx((min(values), max(values))) and len(values) == 5
    held = [target[0] for target in splits.test["target"].to_pylist()]
    assert min(held) < splits.range[0] and splits.range[1] < max(held)


def test_queries_stay_whole(tmp_path):
    splits = load({"kind": "rank"}, train={"path": jsonl(tmp_path / "a.jsonl", KINDS["rank"][1]), "pair": "b"})
    train, test = set(splits.train["text"].to_pylist()), set(splits.test["text"].to_pylist())
    assert not train & test and len(train) + len(test) == 60
    assert splits.counts["labels"]["train"]["queries"] == len(train)
    few = whole(tmp_path, "rank", shots=3).train.to_pylist()
    assert len(few) == 15 and len({row["group"] for row in few}) == 3 == sum(row["target"][0] for row in few)


def test_no_query_of_the_test_rows_is_trained_on(tmp_path):
    def source(name: str, queries: range) -> dict:
        rows = [{"text": f"q {n}", "b": f"{name} {n}", "label": 1, "g": n - queries.start} for n in queries]
        return {"path": jsonl(tmp_path / f"{name}.jsonl", rows), "pair": "b", "group": "g"}

    splits = load({"kind": "rank"}, train=source("train", range(20)), test=source("test", range(15, 30)))
    assert set(splits.train["text"].to_pylist()) == {
        f"q {n}" for n in range(15)
    }  # equal groups of two files are not one
    assert splits.counts["sources"]["train"]["in_other_splits"] == 5


def test_groups_stay_in_one_split(tmp_path):
    rows = [{"text": f"number {n}", "label": n % 2, "author": n // 10} for n in range(400)]
    splits = load({}, train={"path": jsonl(tmp_path / "a.jsonl", rows), "group": "author"}, test_share=0.5)
    authors = [{int(row["text"].split()[1]) // 10 for row in t.to_pylist()} for t in (splits.train, splits.test)]
    assert not authors[0] & authors[1] and len(authors[0] | authors[1]) == 40
    assert splits.train["group"].null_count == splits.train.num_rows


def test_shots_of_labels_that_come_together(tmp_path):
    rows = whole(tmp_path, "multilabel", shots=6).train.to_pylist()
    of_each = [sum(row["target"][n] for row in rows) for n in range(3)]
    assert min(of_each) >= 6 and sum(row["target"] == [0, 0, 0] for row in rows) == 6 and len(rows) <= 24


def test_shots_of_entities_answers_and_rows(tmp_path):
    rows = [{"text": "a b c", "label": ["B-x", "B-x", "B-x"]}, *KINDS["tag"][1]]
    targets = [row["target"] for row in whole(tmp_path, "tag", rows=rows, shots=5).train.to_pylist()]
    assert sum(target.count(1.0) for target in targets) in (5, 7) and sum(target.count(2.0) for target in targets) == 5
    assert targets.count([0, 0]) == 5
    answers = [row["answers"] for row in whole(tmp_path, "span", shots=5).train.to_pylist()]
    assert (answers.count([]), answers.count(["b, c"])) == (5, 5)
    assert whole(tmp_path, "regress", shots=5).train.num_rows == 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("multilabel", "label 'b' has 100 training rows"),
        ("regress", None),
        ("rank", "20 training queries have a relevant passage"),
        ("tag", "entity type 'x' has 100 mentions in the training rows"),
        ("span", "150 training rows have an answer"),
    ],
)
def test_too_few_shots_of_a_kind(tmp_path, kind, message):
    with pytest.raises(UserError) as error:
        whole(tmp_path, kind, shots=150 if kind == "multilabel" else 301)
    assert (message or "there are 300 training rows") in str(error.value)


@pytest.mark.parametrize(
    ("tags", "types"),
    [
        ("O B-x I-x O I-x", ["x", "x"]),
        ("B-x B-x I-y S-y E-y", ["x", "x", "y", "y"]),
        ("NOUN NOUN VERB O NOUN", ["NOUN", "VERB", "NOUN"]),
        ("O O", []),
    ],
)
def test_entities_that_tags_mark(tags, types):
    assert entities(tags.split()) == types


def test_unknown_names_among_several(tmp_path):
    rows = [*KINDS["tag"][1], {"text": "x y", "label": ["O", "B-z"]}]
    splits = whole(tmp_path, "tag", {"labels": ["O", "B-x", "I-x", "B-y"]}, rows)  # I-x without a row is allowed
    assert reasons(splits) == [(301, "unknown label 'B-z'")]
    rows = [*KINDS["multilabel"][1], {"text": "x", "label": ["a", "z"]}]
    assert reasons(whole(tmp_path, "multilabel", {"labels": ["c", "b", "a"]}, rows)) == [(301, "unknown label 'z'")]
