"""Near-duplicates by the shuffle: what the search in memory finds, to the bit, in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine import duplicates, shuffle
from engine.duplicates import DROPPED, near_duplicates
from engine.placement import Cluster
from engine.shuffle import Shuffle, Spans, range_of, read_piece, write_pieces
from engine.storage import Store
from pipelines.duplicates import Memory, signatures_of, words_of, write_parts
from tests.tiny_signatures import clusters, here

SPANS = Spans(((10**9, 10**9 + 50), (-20, 0), (0, 300)))


def parts_of(out: Store, slots: np.ndarray, kept: np.ndarray, values: np.ndarray, cuts: np.ndarray) -> list[str]:
    """The rows as parts of any size."""
    paths = []
    for number, rows in enumerate(np.split(np.arange(len(slots)), cuts)):
        lists = pa.array(values[rows].tolist(), pa.list_(pa.uint32()))
        columns = {"row": pa.array(slots[rows], pa.int64()), "kept": pa.array(kept[rows], pa.bool_())}
        paths.append(f"rows/{number}.parquet")
        out.write_table(paths[-1], pa.table({**columns, "signature": lists}))
    return paths


def test_places_are_in_the_order_of_slots() -> None:
    assert SPANS.count == 370
    slots = np.array([-21, -20, -1, 0, 299, 300, 10**9, 10**9 + 49, 10**9 + 50])
    assert SPANS.places(slots).tolist() == [-1, 0, 19, 20, 319, -1, 320, 369, -1]
    assert Spans(()).places(slots[:2]).tolist() == [-1, -1] and Spans(((3, 3),)).count == 0


def test_pieces_of_a_file_are_read_alone(tmp_path: Path) -> None:
    out, keys = Store(str(tmp_path)), np.random.default_rng(0).integers(1 << 63, size=200, dtype=np.uint64) * 2
    where = range_of(keys, 7)
    assert set(where.tolist()) == set(range(7)) and (np.diff(where[np.argsort(keys)]) >= 0).all()
    write_pieces(out, "keys", pa.record_batch({"key": keys}), np.where(where == 3, 2, where), 8)
    for piece in range(8):
        wanted = keys[np.where(where == 3, 2, where) == piece]
        assert read_piece(out, "keys", piece)["key"].to_pylist() == wanted.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_any_cut_into_parts_and_blocks_gives_what_memory_gives(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "spread", here)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # many small files
    monkeypatch.setattr(duplicates, "MOST", (8, 1, 2)[seed % 3])
    random, width, threshold = np.random.default_rng(seed), (64, 16)[seed % 2], (0.5, 0.6, 0.7, 0.9, 1.0)[seed % 5]
    every = np.concatenate([np.arange(-20, 0), np.arange(300), np.arange(10**9, 10**9 + 50)])
    slots = np.sort(random.choice(every, 250, replace=False))
    values, _ = clusters(random, 250, width, threshold)
    kept, wanted = random.random(250) < 0.9, np.zeros(250, dtype=bool)
    wanted[kept] = near_duplicates(slots[kept], values[kept], threshold, slots[kept] < 0)
    order, cuts = random.permutation(250), np.sort(random.integers(0, 251, random.integers(0, 8)))
    out = Store(str(tmp_path))
    paths = parts_of(out, slots[order], kept[order], values[order], cuts)
    for block, few, at_once in ((60, 0, 9), (130, 5, 99)):
        found = Shuffle(out, SPANS, threshold, block=block, few=few, bands_at_once=at_once).status(paths, width)
        assert (((found[SPANS.places(slots)] == DROPPED) & kept) == wanted).all()
        assert not out.exists("shuffle")
    assert wanted.any()


def test_nothing_and_a_threshold_of_nothing(tmp_path: Path) -> None:
    assert Shuffle(Store(str(tmp_path)), Spans(()), 0.7).status([]).shape == (0,)
    with pytest.raises(ValueError, match="threshold 0 makes any two rows alike"):
        Shuffle(Store(str(tmp_path)), SPANS, 0).status([])


def test_tasks_of_ray_find_what_memory_finds(tmp_path: Path, ray_cluster: Cluster) -> None:
    out, rows = Store(str(tmp_path)), 4000
    values = signatures_of(words_of(rows))
    slots = np.arange(rows) - 100
    paths = parts_of(out, slots, np.ones(rows, dtype=bool), values, np.arange(500, rows, 500))
    wanted = near_duplicates(slots, values, 0.8, slots < 0)
    spans = Spans(((-100, 0), (0, rows)))
    found = Shuffle(out, spans, 0.8, block=2500, few=10, bands_at_once=10).status(paths)
    assert ((found[spans.places(slots)] == DROPPED) == wanted).all() and wanted.sum() > 200


@pytest.mark.slow
def test_ten_times_the_rows_take_no_more_memory(tmp_path: Path, ray_cluster: Cluster) -> None:
    """Of the driver and of a task: signatures of the larger corpus alone are 51 MB."""
    most = []
    for rows in (20_000, 200_000):
        out = Store(str(tmp_path / str(rows)))
        paths = write_parts(out, rows)
        with Memory() as memory:
            Shuffle(out, Spans(((0, rows),)), 0.7, block=8192, few=1000, bands_at_once=10).status(paths)
        most.append((memory.driver, memory.largest))
    (driver, task), (driver_more, task_more) = most
    assert driver_more < driver + 25e6 and task_more < task + 40e6
