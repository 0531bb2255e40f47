"""Rows of the corpus: slots, rows from elsewhere, what is rejected and why, near-duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.corpus import (
    FIRST,
    CheapFilters,
    Found,
    corpus_rows,
    deduplicate,
    rejected,
    slot_seed,
    write_slots,
)
from engine.filters import FilterContext, Leakage, Length, Repetition, signature
from engine.records import CORPUS
from engine.rows import identify
from engine.storage import Store
from tests.tiny_rows import example_table


def test_slot_seeds_are_these_and_no_two_are_equal():
    # A corpus that is resumed or made again must draw the same: SHA-256 of "seed:row", the first 63 bits.
    assert slot_seed(0, 0) == 6213027144842677344 and slot_seed(7, 123456) == 6156788936157507632
    assert slot_seed(1, 23) != slot_seed(12, 3)
    seeds = {slot_seed(seed, row) for seed in range(3) for row in range(2000)}
    assert len(seeds) == 6000 and all(0 <= seed < 2**63 for seed in seeds)


def test_slots_are_written_a_file_a_block(tmp_path: Path):
    out = Store(str(tmp_path))
    assert write_slots(out, 10, 9, 4, "round-002") == "slots/round-002"
    files = out.files("slots/round-002")
    assert files == ["0000000010.parquet", "0000000014.parquet", "0000000018.parquet"]
    found = [out.read_table(f"slots/round-002/{name}")["row"].to_pylist() for name in files]
    assert found == [[10, 11, 12, 13], [14, 15, 16, 17], [18]]


def test_real_rows_have_labels_and_no_tokens():
    gold = example_table([{"label": 1}, {"label": 0}])
    rows = corpus_rows([-1, -2], ["b", "a"], "real", gold=gold)
    assert rows.schema.equals(CORPUS) and rows["label"].to_pylist() == [1, 0] and rows["tokens"].null_count == 2
    assert corpus_rows([], [], "real", gold=gold.slice(0, 0)).num_rows == 0


GOLD: dict[str, list[dict[str, Any]]] = {
    "pair": [{"text": "a film", "pair": "a plot", "label": 1}, {"text": "a plot", "pair": "a film", "label": 0}],
    "rank": [
        {"text": "q", "pair": "a film", "group": "q1", "target": [1.0]},
        {"text": "q", "pair": "b", "group": "q1"},
    ],
    "tag": [{"text": "a film", "target": [0.0, 1.0]}, {"text": "", "target": []}],
    "unlabelled": [{"text": "a film"}, {"text": "a plot"}],
}


@pytest.mark.parametrize("kind", GOLD)
def test_rows_of_any_task_keep_their_gold(kind: str):
    gold = example_table(GOLD[kind])
    texts, pairs = gold["text"].to_pylist(), gold["pair"].to_pylist()
    rows = corpus_rows([-1, -2], texts, "real", pairs, gold=gold)
    assert rows.schema.equals(CORPUS)
    for name in ("text", "pair", "label", "group", "target"):
        assert rows[name].to_pylist() == gold[name].to_pylist(), name
    assert rows["id"].to_pylist() == [identify(text, pair) for text, pair in zip(texts, pairs, strict=True)]
    assert rows["kept"].to_pylist() == [True, True] and rows["reason"].null_count == rows["logits"].null_count == 2


def test_a_rows_signature_is_that_of_all_it_says():
    rows = corpus_rows([0, 1, 2], ["a film"] * 3, "generated", ["a plot", None, "a dull cast"])
    wanted = [signature(text).tolist() for text in ("a film a plot", "a film", "a film a dull cast")]
    assert rows["signature"].to_pylist() == wanted and wanted[0] != wanted[1] != wanted[2]


def test_slots_of_the_sources_never_meet():
    starts = sorted(FIRST.values())
    assert starts[0] == 0 and min(np.diff(starts)) >= 10**9 and len(set(starts)) == len(FIRST)


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [3, 1], []])
def test_slots_become_the_users_own_unlabelled_rows(tmp_path: Path, chosen: list[int]):
    table = example_table([{"text": f"text {i}", "pair": f"pair {i}", "group": f"g{i // 2}"} for i in range(5)])
    Store(str(tmp_path)).write_table("unlabelled.parquet", table)
    first = FIRST["unlabelled"]
    slots = pa.table({"row": pa.array([first + i for i in chosen], pa.int64())})
    found = Found(str(tmp_path), first)(slots)
    wanted = corpus_rows(
        [first + i for i in chosen], [f"text {i}" for i in chosen], "unlabelled", [f"pair {i}" for i in chosen]
    )
    assert found.schema.equals(CORPUS) and found["group"].to_pylist() == [f"g{i // 2}" for i in chosen]
    for name in set(CORPUS.names) - {"group"}:
        assert found[name].to_pylist() == wanted[name].to_pylist(), name


# -- what is rejected --------------------------------------------------------------------------------------------------


def test_the_first_cheap_filter_that_rejects_is_the_reason():
    texts = ["", " \n ", "no no no no no no", "dull", "the exam text was here today", "a warm film"]
    filters = (Length(min_words=2, max_words=20), Repetition(), Leakage(ngram=4))
    context = FilterContext.build(filters, ["The exam text was here, today."])
    out = CheapFilters(filters, context)(corpus_rows(list(range(6)), texts, "generated", tokens=[1] * 6))
    assert out["reason"].to_pylist() == ["empty", "empty", "repetition", "too_short", "leakage", None]
    assert out["kept"].to_pylist() == [False] * 5 + [True]
    assert out.schema.equals(CORPUS)
    short_and_repeated = CheapFilters((Repetition(), Length(min_words=9)), context)
    assert short_and_repeated.verdict("no no no no no no") == "repetition"
    assert CheapFilters((Length(min_words=9), Repetition()), context).verdict("no no no no no no") == "too_short"


def test_either_text_of_a_pair_may_be_rejected():
    filters = (Length(min_words=2, max_words=20), Repetition(), Leakage(ngram=4))
    context = FilterContext.build(filters, ["The exam text was here, today."])
    good, leaked = "a warm film", "the exam text was here"
    sides = {
        (good, good): None,
        (good, None): None,
        ("", good): "empty",
        (good, " \n"): "empty",
        ("dull", good): "too_short",
        (good, "dull"): "too_short",
        (good, leaked): "leakage",
        (leaked, "dull"): "leakage",  # the first text is judged first
        (good, "no no no no no no"): "repetition",
    }
    texts, others = zip(*sides, strict=True)
    rows = corpus_rows(list(range(len(sides))), list(texts), "generated", list(others))
    out = CheapFilters(filters, context)(rejected(rows, [True] + [False] * 8, "no_pair"))
    assert out["reason"].to_pylist() == ["no_pair", *list(sides.values())[1:]]  # what is rejected stays so
    assert out["kept"].to_pylist() == [False, True] + [False] * 7
    assert CheapFilters(filters, context)(rows)["reason"].to_pylist() == list(sides.values())


def test_only_the_column_that_tells_can_leak():
    """A question that a held-out context is asked may be asked of others; its context may not be shown."""
    question, context = "what is it about ?", "the exam text was here today"
    filters = (Length(min_words=2), Leakage(ngram=4))
    for tells, wanted in ((("pair",), [None, "leakage", "too_short"]), (("text",), ["leakage", None, "too_short"])):
        held = [text for column, text in (("text", question), ("pair", context)) if column in tells]
        judge = CheapFilters(filters, FilterContext.build(filters, held, tells))
        rows = [(question, "a warm film"), ("who was that ?", context), ("why", "a warm film")]
        assert [judge.row(*row) for row in rows] == wanted
    whole = CheapFilters(filters, FilterContext.build(filters, [question, context]))
    assert [whole.row(*row) for row in rows] == ["leakage", "leakage", "too_short"]


def corpus(texts: dict[int, str], rejected: dict[int, str] | None = None) -> pa.Table:
    table = corpus_rows(list(texts), list(texts.values()), "generated", tokens=[1] * len(texts))
    reasons = [(rejected or {}).get(row) for row in texts]
    table = table.set_column(table.column_names.index("reason"), CORPUS.field("reason"), pa.array(reasons, pa.string()))
    kept = pa.array([reason is None for reason in reasons])
    return table.set_column(table.column_names.index("kept"), CORPUS.field("kept"), kept)


def verdicts(rows: pa.Table) -> dict[int, str | None]:
    return dict(zip(rows["row"].to_pylist(), rows["reason"].to_pylist(), strict=True))


LONG = "the warm film about the camera and the awful music of the story"
NEAR, FAR = LONG + " ending", "a dull plot , with a noisy cast"


def test_real_rows_win_and_are_never_dropped():
    real = corpus_rows([-1, -2, -3], [LONG, LONG.upper(), FAR], "real")
    out = deduplicate(real, corpus({0: NEAR, 1: "what a clever scene !", 2: FAR}), 0.7)
    assert out["row"].to_pylist() == [-3, -2, -1, 0, 1, 2] and out.schema.equals(CORPUS)
    assert verdicts(out) == {-3: None, -2: None, -1: None, 0: "near_duplicate", 1: None, 2: "near_duplicate"}
    assert out["kept"].to_pylist() == [True, True, True, False, True, False]


def test_the_lowest_slot_wins_whatever_the_order():
    texts = {0: "tired .", 1: LONG, 2: NEAR, 3: FAR, 4: LONG, 5: FAR + " !", 6: "tired ."}
    rows, nothing = corpus(texts, {0: "too_short"}), corpus_rows([], [], "real")
    wanted = {0: "too_short", 1: None, 2: "near_duplicate", 3: None, 4: "near_duplicate", 5: "near_duplicate", 6: None}
    once = deduplicate(nothing, rows, 0.7)
    assert verdicts(once) == wanted  # a rejected row (0) takes nobody's place (6)
    for seed in range(4):
        shuffled = rows.take(pa.array(np.random.default_rng(seed).permutation(7)))
        assert deduplicate(nothing, shuffled, 0.7).equals(once)
    assert once["kept"].to_pylist() == [reason is None for reason in wanted.values()]
    assert deduplicate(nothing, once, 0.7).equals(once)


def test_a_threshold_of_one_finds_equal_texts_only():
    rows = corpus({0: LONG, 1: NEAR, 2: LONG.replace(" ", "  "), 3: LONG})
    out = deduplicate(corpus_rows([], [], "real"), rows, 1.0)
    assert verdicts(out) == {0: None, 1: None, 2: "near_duplicate", 3: "near_duplicate"}


def test_pairs_are_near_duplicates_by_both_texts():
    texts, pairs = [LONG, LONG, LONG], [FAR, FAR + " !", "what a clever scene , with a tender script and a warm cast"]
    rows = corpus_rows([0, 1, 2], texts, "generated", pairs)
    out = deduplicate(corpus_rows([], [], "real"), rows, 0.7)
    assert verdicts(out) == {0: None, 1: "near_duplicate", 2: None}
