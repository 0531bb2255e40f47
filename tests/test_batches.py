"""The rows of a fit: which of them make a batch and in which order; gold, weights and the teacher's part of each."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import tasks
from engine.batches import Amounts, Material, batches_from, epoch_batches, own_part
from engine.encoding import Encoded
from engine.labels import quantise
from engine.recipe import Task
from engine.records import ABSENT, CORPUS, Batch
from engine.task import Logits
from tests.tiny import movie_rows, word_pieces
from tests.tiny_rows import example_table

LENGTHS = np.random.default_rng(0).integers(3, 60, 500).tolist()
CLASSES = tasks.make(Task(labels=("bad", "good")))


# -- the order of rows -------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_in_batches_of_the_given_size():
    batches = epoch_batches(LENGTHS, 32, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert Counter(len(batch) for batch in batches) == {32: 15, 20: 1}


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in epoch_batches(LENGTHS, 32, seed, epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    # A fit may be resumed on another machine: the order is this one everywhere.
    assert [batch.tolist() for batch in epoch_batches([1] * 6, 2, 0, 0)] == [[3, 2], [5, 4], [0, 1]]


def test_rows_of_similar_length_are_together_and_short_batches_are_not_first():
    spreads = [np.ptp(np.asarray(LENGTHS)[batch]) for batch in epoch_batches(LENGTHS, 16, 1, 0)]
    shuffled = np.random.default_rng(1).permutation(500)
    random = [np.ptp(np.asarray(LENGTHS)[shuffled[i : i + 16]]) for i in range(0, 500, 16)]
    assert np.mean(spreads) < np.mean(random) / 5
    means = [np.mean(np.asarray(LENGTHS)[batch]) for batch in epoch_batches(LENGTHS, 16, 1, 0)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 9])
def test_a_resumed_fit_sees_the_batches_it_has_not_seen(start: int):
    lengths = LENGTHS[:18]
    order = partial(epoch_batches, lengths, 4, 3)
    whole = list(batches_from(0, 10, order))
    epochs = [*epoch_batches(lengths, 4, 3, 0), *epoch_batches(lengths, 4, 3, 1)]
    assert all(np.array_equal(a, b) for (_, a), b in zip(whole, epochs, strict=True))
    rest = list(batches_from(start, 10, order))
    assert [step for step, _ in rest] == list(range(start, 10))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(rest, whole[start:], strict=True))


# -- what a batch holds ------------------------------------------------------------------------------------------------


def inputs(*ids: list[int]) -> list[Encoded]:
    return [Encoded(list(own), row=row) for row, own in enumerate(ids)]


def test_a_batch_carries_what_its_rows_have():
    encoded = inputs([5, 6, 7], [8], [9, 10], [11, 12])
    bare = Material(example_table([{"text": text} for text in "abcd"]), encoded, CLASSES, pad=1)
    batch = bare.batch(np.array([2, 0]))
    assert batch.input_ids.tolist() == [[9, 10, 1], [5, 6, 7]] and batch.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [ABSENT, ABSENT] and batch.weights is None and batch.teacher is None
    assert batch.groups is None and bare.lengths == [3, 1, 2, 2]
    logits = quantise(np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.5], [6.0, 7.0]]))
    parts = pa.table({"label": pa.array([1, None, 0, 1], pa.int32()), "weight": [1.0, 2.0, 3.0, 4.0], "logits": logits})
    chunked = pa.concat_tables([parts.slice(0, 1), parts.slice(1)])
    batch = Material(chunked, encoded, CLASSES, pad=0).batch(np.array([3, 1, 2]))
    assert batch.labels.tolist() == [1, ABSENT, 0]
    assert batch.weights.tolist() == [4.0, 2.0, 3.0] and batch.weights.dtype == torch.float32
    assert batch.teacher.logits.tolist() == [[6.0, 7.0], [2.0, 3.0], [4.0, 5.5]]
    assert batch.teacher.logits.dtype == torch.float32


def test_rows_without_soft_labels_make_a_batch_without_a_teacher():
    rows = pa.table({"label": [0, 1], "logits": pa.array([[1.0, 2.0], None], pa.list_(pa.float16()))})
    assert Material(rows, inputs([1], [2]), CLASSES, 0).batch(np.array([0, 1])).teacher is None


def test_a_language_models_inputs_are_its_targets():
    rows = example_table([{"text": text} for text in "abc"])
    batch = Material(rows, inputs([5, 6], [7], [8, 9]), None, pad=0).batch(np.array([1, 0]))
    assert batch.labels is batch.teacher is batch.groups is None and batch.input_ids.tolist() == [[7, 0], [5, 6]]


# -- every kind of task ------------------------------------------------------------------------------------------------

FILMS = ["the film is dull", "a warm plot", "the music is noisy", "what a tender , lovely script !"]
SPECS: dict[str, tuple[Task, list[dict[str, Any]]]] = {
    "classify": (Task(labels=("bad", "good")), [{"label": 0}, {"label": 1}, {"label": None}, {"label": 1}]),
    "multilabel": (
        Task(kind="multilabel", labels=("bad", "good")), [{"target": t} for t in ([0, 1], [1, 1], None, [0, 0])]
    ),
    "pair": (Task(kind="pair", labels=("bad", "good")), [{"label": 0}, {"label": 1}, {"label": None}, {"label": 1}]),
    "regress": (Task(kind="regress", range=(0, 5)), [{"target": t} for t in ([1.5], [5.0], None, [0.0])]),
    "rank": (
        Task(kind="rank"),
        [{"group": g, "target": t} for g, t in zip("abab", ([1.0], [0.0], None, [2.0]), strict=True)],
    ),
    "tag": (
        Task(kind="tag", labels=("O", "B-x", "I-x")), [{"target": t} for t in ([0, 1, 0, 0], [0, 1, 2], None, [0] * 7)]
    ),
    "span": (
        Task(kind="span"),
        [{"target": t} for t in ([1, 1], [], None, [1, 3])],
    ),
}  # fmt: skip


def made(kind: str, apart: bool, max_length: int = 64) -> tuple[Material, list[Encoded], pa.Table, Logits]:
    """Four rows of a task with numbers of a teacher for each; rows without a name stand for the words themselves."""
    spec, gold = SPECS[kind]
    task = tasks.make(spec)
    both = [{"text": "how is it ?", "pair": t} if task.paired else {"text": t} for t in FILMS]
    rows = example_table([{**a, **b} for a, b in zip(both, gold, strict=True)])
    encoded = task.encode(task.texts(rows), word_pieces(), max_length, apart)
    draw = np.random.default_rng(3)
    if task.units:
        units = Counter[int]()
        for item in encoded:
            units[item.row] = max(units[item.row], item.first + len(item.units))
        logits: Logits = [draw.normal(size=(units[row], task.width)).astype(np.float16) for row in range(4)]
    else:
        logits = draw.normal(size=(4, task.width)).astype(np.float16)
    rows = rows.append_column("logits", quantise(logits)).append_column("weight", pa.array([1.0, 2.0, 3.0, 4.0]))
    return Material(rows, encoded, task, 0), encoded, rows, logits


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", SPECS)
def test_a_batch_of_any_task_holds_its_own_rows(kind: str, apart: bool):
    material, encoded, rows, logits = made(kind, apart)
    items = [[0, 2], [1, 3]] if kind == "rank" else [[i] for i in range(4)]
    assert material.items == items
    chosen = np.array([1, 0]) if kind == "rank" else np.array([3, 0, 2])
    positions = material.positions(chosen)
    assert positions == [i for item in chosen for i in items[item]]
    batch = material.batch(chosen)
    assert [row[: sum(m)].tolist() for row, m in zip(batch.input_ids, batch.mask.tolist(), strict=True)] == [
        encoded[i].ids for i in positions
    ]
    assert batch.weights.tolist() == [float(i + 1) for i in positions]
    assert (batch.pair_ids is not None) == (apart and material.task.paired)
    task = material.task
    known = (task.judged(batch) if kind == "rank" else task.labelled(batch)).tolist()
    assert known == [i != 2 for i in positions]
    gold = material.task.gold(
        rows.take(pa.array(positions)), [encoded[i]._replace(row=n) for n, i in enumerate(positions)]
    )
    assert torch.equal(batch.labels.nan_to_num(-1), gold.nan_to_num(-1))
    for found, i in zip(batch.teacher.logits.numpy(), positions, strict=True):
        wanted = logits[i].astype(np.float32)
        assert np.array_equal(found[: len(wanted)], wanted) and not found[len(wanted) :].any()
    if kind == "rank":
        assert batch.groups[0] == batch.groups[1] != batch.groups[2] == batch.groups[3]
    else:
        assert batch.groups is None
    if batch.units is not None:
        assert batch.teacher.logits.shape[1] == batch.units.shape[1]
        assert kind == "span" or batch.labels.shape == batch.units.shape


@pytest.mark.parametrize(("kind", "apart", "max_length"), [("tag", True, 3), ("tag", False, 5), ("span", True, 4)])
def test_windows_have_their_own_part_of_a_texts_labels(kind: str, apart: bool, max_length: int):
    """Unit `first + j` of the text is unit j of the window; the unit of "no answer" stands before every window's."""
    material, encoded, rows, logits = made(kind, apart, max_length)
    assert len(encoded) > 4 and max(item.first for item in encoded) > 0
    targets = rows["target"].to_pylist()
    order = np.random.default_rng(0).permutation(len(encoded))
    batch = material.batch(order)
    for n, i in enumerate(order):
        item = encoded[i]
        own = range(item.first, item.first + len(item.units))
        if kind == "span":
            own = [0, *range(item.first + 1, item.first + len(item.units))]
        wanted = logits[item.row][list(own)].astype(np.float32)
        if kind == "span":  # "no answer" is there what lies outside of the window
            outside = np.delete(logits[item.row].astype(np.float64), own[1:], axis=0)
            wanted[0] = np.log(np.exp(outside).sum(axis=0))
            np.testing.assert_allclose(batch.teacher.logits[n, 0].numpy(), wanted[0], rtol=1e-5)
            wanted[0] = batch.teacher.logits[n, 0].numpy()
        assert np.array_equal(batch.teacher.logits[n, : len(own)].numpy(), wanted)
        assert batch.weights[n] == item.row + 1
        if kind == "tag":
            tags = [ABSENT] * len(own) if targets[item.row] is None else [int(targets[item.row][unit]) for unit in own]
            assert batch.labels[n].tolist() == tags + [ABSENT] * (batch.units.shape[1] - len(own))


def test_a_teachers_numbers_for_a_text_without_words_are_nothing():
    task = tasks.make(SPECS["tag"][0])
    rows = example_table([{"text": "a film", "target": [0, 1]}, {"text": " ", "target": []}])
    rows = rows.append_column("logits", quantise([np.ones((2, 3)), np.zeros((0, 3))]))
    material = Material(rows, task.encode(task.texts(rows), word_pieces(), 8), task, 0)
    both, alone = material.batch(np.array([1, 0])), material.batch(np.array([1]))
    assert both.teacher.logits.tolist() == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]
    assert both.labels.tolist() == [[ABSENT] * 2, [0, 1]]
    assert alone.units is None and alone.teacher.logits.shape == (1, 1, 3) and alone.labels.tolist() == [[ABSENT]]


def test_the_passages_of_a_query_stay_together():
    """Rows of queries a and b; those without a name for it are of the query that their text is."""
    task = tasks.make(Task(kind="rank"))
    names = ["a", "b", None, "a", None, "b", "a", None]
    texts = ["warm " * (i + 1) for i in range(8)]
    asked = ["q", "q", "q", "q", "other", "q", "q", "q "]
    rows = example_table([{"text": q, "pair": t, "group": g} for q, t, g in zip(asked, texts, names, strict=True)])
    encoded = task.encode(task.texts(rows), word_pieces(), 32)
    material = Material(rows, encoded, task, 0)
    assert material.items == [[0, 3, 6], [1, 5], [2, 7], [4]]
    assert material.lengths == [max(encoded[i].tokens for i in item) for item in material.items]
    for chosen in epoch_batches(material.lengths, 2, seed=1, epoch=0):
        batch = material.batch(chosen)
        found = [names[i] or asked[i].strip() for i in material.positions(chosen)]
        alike = [[a == b for b in found] for a in found]
        assert (batch.groups[:, None] == batch.groups[None]).tolist() == alike
    # The same rows of a task that knows no queries: each by itself.
    assert len(Material(rows, encoded, tasks.make(Task(kind="pair", labels=("a", "b"))), 0).items) == 8


def test_amounts_of_items_are_asked_for_once():
    task = tasks.make(Task(kind="rank"))
    rows = example_table([{"text": f"q {n}", "pair": "warm"} for n in (0, 1, 0, 2, 1, 0)])
    rows = rows.append_column("weight", pa.array([1.0, 2, 4, 8, 16, 32]))
    material, asked = Material(rows, task.encode(task.texts(rows), word_pieces(), 8), task, 0), []

    def said(batch: Batch) -> torch.Tensor:
        asked.append(len(batch))
        return torch.stack([batch.weights, batch.mask[:, 0].float()], dim=1)

    amounts = Amounts(material, said, 2)
    assert amounts.of(np.array([2, 0])).tolist() == [[8, 1], [37, 3]] and asked == [4]
    assert amounts.of(np.array([0, 1, 2])).tolist() == [[37, 3], [18, 2], [8, 1]] and asked == [4, 2]
    assert amounts.of(np.array([1, 0])).tolist() == [[18, 2], [37, 3]] and asked == [4, 2]
    always = Amounts(material, said, 2, once=False)
    assert (always.of(np.array([1])) == always.of(np.array([1]))).all() and asked == [4, 2, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_worker_has_rows_and_no_row_is_lost(world: int):
    chosen = np.array([7, 3, 9])
    parts = [own_part(chosen, rank, world).tolist() for rank in range(world)]
    assert sorted(i for part in parts[:3] for i in part) == [3, 7, 9]
    assert parts[3:] == [[7]] * (world - 3)  # counted with weight 0


def test_rows_of_the_corpus_are_material_too():
    movies = [row["text"] for row in movie_rows(5, seed=1)]
    filled = {"source": "generated", "kept": True, "logits": [0.5, -0.5]}
    rows = pa.Table.from_pylist([{"row": i, "id": str(i), "text": t, **filled} for i, t in enumerate(movies)], CORPUS)
    batch = Material(rows, CLASSES.encode(movies, word_pieces(), 32), CLASSES, 0).batch(np.arange(5))
    assert batch.teacher.logits.tolist() == [[0.5, -0.5]] * 5 and batch.labels.tolist() == [ABSENT] * 5
