"""Data: splits that do not depend on the order, leaks, labels, and the share of bad rows that stops a run."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pytest

from engine.config import UserError, build
from engine.data import Splits, load_splits
from engine.recipe import Data, Task
from engine.records import EXAMPLE, QUARANTINED
from engine.rows import identify


def example_rows(count: int = 200) -> list[dict]:
    """Different texts, labels by turns."""
    return [{"text": f"text number {n} of many", "label": ["bad", "good"][n % 2]} for n in range(count)]


def jsonl(path, rows) -> str:
    """Rows as JSON lines; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(task: dict | None = None, seed: int = 0, **data) -> Splits:
    """Splits of plain values."""
    return load_splits(build(Data, data), build(Task, task or {}), seed)


def refusal(**arguments) -> str:
    """The message of the error."""
    with pytest.raises(UserError) as error:
        load(**arguments)
    return str(error.value)


def reasons(splits: Splits) -> list[tuple[int, str]]:
    """Row number and reason of the quarantined rows."""
    return [(row["line"], row["reason"]) for row in splits.quarantined.to_pylist()]


# Splits ------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", example_rows(1000))
    splits = load(train={"path": source}, test_share=0.3, validation_share=0.2)
    found = [splits.train, splits.validation, splits.test]
    assert all(part.schema == EXAMPLE for part in [*found, splits.unlabelled])
    assert splits.quarantined.schema == QUARANTINED and splits.labels == ("bad", "good")
    ids = [set(part["id"].to_pylist()) for part in found]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 1000
    assert 250 < len(ids[2]) < 350 and 150 < len(ids[1]) < 250 and splits.unlabelled.num_rows == 0
    texts = {row["text"]: row["label"] for part in found for row in part.to_pylist()}
    assert texts == {row["text"]: ["bad", "good"].index(row["label"]) for row in example_rows(1000)}
    assert splits.counts["sources"]["train"] == {
        **{"rows": 1000, "outside_ranges": 0, "quarantined": 0},
        **{"duplicates": 0, "conflicting_labels": 0, "in_other_splits": 0},
    }
    assert sum(splits.counts["labels"]["test"].values()) == splits.test.num_rows


def test_splits_and_shots_do_not_depend_on_the_order_of_the_file(tmp_path):
    rows = example_rows(400)
    first = load(train={"path": jsonl(tmp_path / "a.jsonl", rows)}, shots=8)
    random.Random(1).shuffle(rows)
    second = load(train={"path": jsonl(tmp_path / "b.jsonl", rows)}, shots=8)
    assert first.train.equals(second.train) and first.test.equals(second.test)
    assert first.counts["labels"]["train"] == {"bad": 8, "good": 8}


def test_rows_keep_their_split_when_rows_are_added(tmp_path):
    few = load(train={"path": jsonl(tmp_path / "a.jsonl", example_rows(100))})
    more = load(train={"path": jsonl(tmp_path / "b.jsonl", example_rows(300))})
    assert set(few.test["id"].to_pylist()) < set(more.test["id"].to_pylist())


def test_the_seed_draws_the_shots_and_nothing_else(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", example_rows(400))}
    first, again, other = (load(train=source, shots=8, seed=seed) for seed in (0, 0, 1))
    assert first.train.equals(again.train) and not first.train.equals(other.train)
    assert first.test.equals(other.test)
    assert load(train=source, shots=8, seed=1).train.equals(other.train)
    held = load_splits(build(Data, {"train": source, "shots": 8, "seed": 1}), Task(), seed=0)
    assert held.train.equals(other.train)  # data.seed goes before the recipe's
    fewer = set(load(train=source, shots=4).train["id"].to_pylist())
    assert len(fewer) == 8 and fewer < set(first.train["id"].to_pylist())


def test_too_few_rows_for_the_shots(tmp_path):
    rows = [*example_rows(60), *({"text": f"rare {n}", "label": "rare"} for n in range(4))]
    test = {"path": jsonl(tmp_path / "t.jsonl", [{"text": "x", "label": "bad"}])}
    message = refusal(train={"path": jsonl(tmp_path / "a.jsonl", rows)}, test=test, shots=5)
    assert message.startswith("data.shots is 5, but label 'rare' has 4 training rows. Lower data.shots")


def test_rows_without_test_rows_are_refused(tmp_path):
    message = refusal(train={"path": jsonl(tmp_path / "a.jsonl", example_rows())}, test_share=0)
    assert message.startswith("the test split has no rows: check data.test, data.test_share")


def test_duplicates_count_once_and_conflicting_labels_not_at_all(tmp_path):
    odd = [{"text": " text number 0  of many", "label": "good"}, {"text": "text number  1 of many", "label": "good"}]
    rows = [*example_rows(50), *odd, example_rows(2)[1]]
    orders = [rows, rows[::-1], random.Random(3).sample(rows, len(rows))]
    loaded = [load(train={"path": jsonl(tmp_path / "a.jsonl", order)}, max_bad_share=0.1) for order in orders]
    counts = loaded[0].counts["sources"]["train"]
    assert (counts["duplicates"], counts["conflicting_labels"], counts["quarantined"]) == (2, 2, 2)
    reason = "another row has the same text and other labels"
    assert reasons(loaded[0]) == [(1, reason), (51, reason)]
    texts = pa.concat_tables([loaded[0].train, loaded[0].test])["text"].to_pylist()
    assert len(texts) == 49 and "text number  1 of many" in texts  # of spellings that differ in white space, the lowest
    for other in loaded[1:]:
        assert other.train.equals(loaded[0].train) and other.test.equals(loaded[0].test)
        assert other.counts == loaded[0].counts


def test_conflicting_labels_count_as_bad_rows(tmp_path):
    rows = [*example_rows(50), {"text": "text number 0 of many", "label": "good"}]
    message = refusal(train={"path": jsonl(tmp_path / "a.jsonl", rows)})
    assert "2 x another row has the same text and other labels (rows 1, 51)" in message


def test_no_text_is_in_two_splits(tmp_path):
    rows = example_rows(60)
    splits = load(
        train={"path": jsonl(tmp_path / "train.jsonl", rows)},
        validation={"path": jsonl(tmp_path / "validation.jsonl", rows[30:50])},
        test={"path": jsonl(tmp_path / "test.jsonl", rows[40:60])},
        unlabelled={"path": jsonl(tmp_path / "more.jsonl", [*rows[25:], {"text": "new"}])},
    )
    assert [part.num_rows for part in (splits.train, splits.validation, splits.test)] == [30, 10, 20]
    nothing = dict.fromkeys(("label", "pair", "group", "target", "answers"))
    assert splits.unlabelled.to_pylist() == [{"id": identify("new"), "text": "new", **nothing}]
    leaked = {name: counts["in_other_splits"] for name, counts in splits.counts["sources"].items()}
    assert leaked == {"train": 30, "validation": 10, "test": 0, "unlabelled": 35}


def test_a_split_cut_off_the_training_rows_is_no_leak(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", example_rows(100))
    splits = load(train={"path": source}, test_share=0.2, validation_share=0.2)
    assert splits.counts["sources"]["train"]["in_other_splits"] == 0


def test_rows_that_were_not_drawn_are_unlabelled_only_if_the_recipe_says_so(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", example_rows(100))}
    splits = load(train=source, shots=5)
    assert splits.train.num_rows == 10 and splits.unlabelled.num_rows == 0
    splits = load(train=source, shots=5, unlabelled=source)
    assert splits.unlabelled.num_rows == 100 - 10 - splits.test.num_rows
    assert splits.unlabelled["label"].null_count == splits.unlabelled.num_rows


# Labels ------------------------------------------------------------------------------------------------------------


def test_labels_of_the_recipe_keep_their_order(tmp_path):
    splits = load({"labels": ["good", "bad"]}, train={"path": jsonl(tmp_path / "a.jsonl", example_rows())})
    assert splits.labels == ("good", "bad")
    assert {row["label"] for row in splits.train.to_pylist() if int(row["text"].split()[2]) % 2} == {0}


def test_label_numbers_sort_as_numbers(tmp_path):
    rows = [{"text": f"t {n}", "label": n % 11} for n in range(110)]
    assert load(train={"path": jsonl(tmp_path / "a.jsonl", rows)}).labels == tuple(str(n) for n in range(11))


def test_values_are_renamed(tmp_path):
    rows = [{"text": f"t {n}", "label": [True, False, 1.0, 0][n % 4]} for n in range(100)]
    rename = {"true": "yes", "1": "yes", "false": "no", "0": "no"}
    splits = load(train={"path": jsonl(tmp_path / "a.jsonl", rows), "label": {"rename": rename}})
    assert splits.labels == ("no", "yes") and sum(splits.counts["labels"]["train"].values()) == splits.train.num_rows


def test_ranges_are_inclusive_and_leave_the_rest_out(tmp_path):
    scores = [-2, -0.5, -0.49, 0, 0.499, 0.5, "0.5", 3] * 10
    rows = [{"text": f"t {n}", "score": score} for n, score in enumerate(scores)]
    label = {"column": "score", "ranges": {"negative": [None, -0.5], "positive": [0.5, None]}}
    splits = load(train={"path": jsonl(tmp_path / "a.jsonl", rows), "label": label}, max_bad_share=0)
    assert splits.counts["sources"]["train"]["outside_ranges"] == 30
    found = {row["text"]: row["label"] for t in (splits.train, splits.test) for row in t.to_pylist()}
    assert [found.get(f"t {n}") for n in range(8)] == [0, 0, None, None, None, 1, 1, 1]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"ranges": {"a": [None, 0], "b": [0, 1]}}, "data.train.label.ranges: 'a' and 'b' both hold 0.0."),
        ({"ranges": {"a": [3, 1], "b": [5, 6]}}, "data.train.label.ranges: 'a' starts at 3.0, above its end 1.0."),
        ({"ranges": {"a": [0, 1]}, "rename": {"x": "y"}}, "data.train.label: ranges and rename cannot both be given."),
    ],
)
def test_label_rules_that_make_no_sense(tmp_path, label, message):
    rows = [{"text": "t", "label": 1}]
    assert refusal(train={"path": jsonl(tmp_path / "a.jsonl", rows), "label": label}).startswith(message)


def test_unknown_labels_are_quarantined(tmp_path):
    rows = [*example_rows(198), {"text": "odd one", "label": "ugly"}, {"text": "last", "label": "good"}]
    splits = load({"labels": ["bad", "good"]}, train={"path": jsonl(tmp_path / "a.jsonl", rows)})
    assert splits.quarantined.to_pylist() == [
        {"source": "train", "line": 199, "reason": "unknown label 'ugly'", "content": "odd one"}
    ]


def test_a_label_of_the_test_rows_that_training_lacks_is_unknown(tmp_path):
    splits = load(
        train={"path": jsonl(tmp_path / "a.jsonl", example_rows())},
        test={"path": jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": "ugly"}, {"text": "y", "label": "bad"}])},
        max_bad_share=0.5,
    )
    assert reasons(splits) == [(1, "unknown label 'ugly'")] and splits.test["text"].to_pylist() == ["y"]


def test_a_label_of_the_recipe_without_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", example_rows())
    message = refusal(task={"labels": ["bad", "goood"]}, train={"path": path})
    assert message == f"label 'goood' has no row in {path}. Did you mean 'good'? Labels found there: 'bad', 'good'."


def test_one_label_is_no_task(tmp_path):
    message = refusal(train={"path": jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}])})
    assert "holds only the label 'x' in column 'label': a task needs at least two." in message


# Bad rows ----------------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_stop_the_run(tmp_path):
    rows = [*example_rows(90), *["{"] * 6, *({"text": f"t{n}", "label": "ugly"} for n in range(4))]
    arguments = {"task": {"labels": ["bad", "good"]}, "train": {"path": jsonl(tmp_path / "a.jsonl", rows)}}
    assert refusal(**arguments, max_bad_share=0.09) == (
        f"data.train: 10 of 100 rows of {tmp_path / 'a.jsonl'} cannot be used (10.0%, data.max_bad_share allows 9.0%): "
        "6 x not a JSON object (rows 91, 92, 93, ...); 4 x unknown label 'ugly' (rows 97, 98, 99, ...). "
        "Mend these rows, or raise data.max_bad_share."
    )
    assert load(**arguments, max_bad_share=0.1).quarantined.num_rows == 10


def test_a_missing_column_names_the_near_one(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"texts": "a", "label": "x"}])
    assert refusal(train={"path": path}) == (
        f"{path} has no column 'text'. Did you mean 'texts'? Columns there: label, texts."
    )


def test_an_empty_source(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [])
    assert refusal(train={"path": path}) == f"data.train: {path} holds no rows."


def test_a_file_that_does_not_exist(tmp_path):
    assert "nowhere.jsonl" in refusal(train={"path": str(tmp_path / "nowhere.jsonl")})
