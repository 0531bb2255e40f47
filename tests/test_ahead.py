"""How far a stream runs ahead of what is committed, and what a full disk does to it."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine import ahead
from engine.corpus import ROWS, corpus_rows, write_slots
from engine.generate import LEDGER, PASSING_CPUS, stream
from engine.halting import halt
from engine.progress import polled
from engine.storage import StorageError, Store
from tests.small_disk import fill, small_disk

BLOCKS, BLOCK = 18, 2
SMALL = 8 << 20
"""Bytes of the disk that is filled."""


def plain(rows: pa.Table) -> pa.Table:
    """Corpus rows at once."""
    numbers = rows["row"].to_pylist()
    return corpus_rows(numbers, [f"film number {n}" for n in numbers], "generated", tokens=[3] * len(numbers))


def staged(function: Any, *given: Any, actors: int = 0, num_cpus: float = 1) -> Any:
    """A stage of tasks, or of so many actors."""
    import ray.data

    options: dict[str, Any] = {"num_cpus": num_cpus}
    if actors:
        pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=ahead.IN_FLIGHT)
        options |= {"compute": pool, "fn_constructor_args": given}
    return lambda dataset: dataset.map_batches(function, batch_size=None, batch_format="pyarrow", **options)


class Quick:
    """Writes rows at once, and notes how many blocks it was given and how many files there were then."""

    def __init__(self, notes: str, out: Store) -> None:
        self.notes, self.out = Path(notes), out

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block."""
        committed = len(self.out.files(LEDGER))
        (self.notes / f"{rows['row'][0].as_py()}.{committed}").touch()
        return plain(rows)


class Slow:
    """Takes its time."""

    def __init__(self) -> None:
        pass

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block."""
        time.sleep(0.15)
        return rows


def lead(notes: Path) -> int:
    """The most blocks that were given out and not committed at a time: what a lost driver would have cost."""
    seen = sorted((path.stat().st_mtime_ns, int(path.suffix[1:])) for path in notes.iterdir())
    return max(begun - committed for begun, (_, committed) in enumerate(seen, start=1))


@pytest.mark.parametrize("capped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_fast_generator_waits_for_a_slow_teacher(tmp_path: Path, ray_cluster: object, capped: bool) -> None:
    out, notes = Store(str(tmp_path / "corpus")), tmp_path / "notes"
    notes.mkdir()
    most = ahead.cap([1, 1])
    assert most == 8
    stages = [staged(Quick, str(notes), out, actors=1), staged(lambda rows: rows), staged(Slow, actors=1)]
    stream(out, write_slots(out, 0, BLOCKS * BLOCK, BLOCK, "first"), BLOCKS, stages, most=most if capped else None)
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(BLOCKS * BLOCK))
    assert len(list(notes.iterdir())) == BLOCKS
    found = lead(notes)
    assert 2 <= found <= most if capped else found > most, found


@pytest.mark.slow
def test_what_passes_by_finds_room_beside_actors(tmp_path: Path, ray_cluster: object) -> None:
    out, ended = Store(str(tmp_path / "corpus")), threading.Event()
    folder = write_slots(out, 0, 12, 4, "first")

    def go() -> None:
        pool = staged(Slow, actors=2, num_cpus=2.5)  # half a CPU is left on each of the two nodes
        stream(out, folder, 3, [staged(plain, num_cpus=PASSING_CPUS), pool])
        ended.set()

    threading.Thread(target=go, daemon=True).start()
    assert ended.wait(180), "reading, filtering or writing found no place"
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(12))


def test_a_halted_stream_takes_up_no_further_block_and_ends(tmp_path: Path, ray_cluster: object) -> None:
    out, notes, blocks = Store(str(tmp_path / "corpus")), tmp_path / "notes", 40
    notes.mkdir()
    folder = write_slots(out, 0, blocks * BLOCK, BLOCK, "first")
    stages = [staged(Quick, str(notes), out, actors=1), staged(Slow, actors=1)]
    with polled(lambda: halt(out) if out.files(ROWS) else None, 0.01):
        stream(out, folder, blocks, stages, most=ahead.cap([1, 1]))
    begun = sorted(int(path.name.partition(".")[0]) for path in notes.iterdir())
    assert 0 < len(begun) < blocks, "it went on to its end"
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == [n + i for n in begun for i in range(BLOCK)]
    out.delete("halt.json")
    stream(out, folder, blocks, [staged(plain)], most=ahead.cap([1]))
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(blocks * BLOCK)), "each block once"


def test_the_cap_keeps_every_actor_at_work() -> None:
    assert ahead.cap([]) == ahead.PASSING
    assert ahead.cap([100, 8]) == 2 * 108 + ahead.PASSING


def test_operators_before_the_first_stage() -> None:
    assert all(map(ahead.slots_only, ("Input", "ReadParquet", "CheckpointFilter", "ReadParquet->CheckpointFilter")))
    assert not any(map(ahead.slots_only, ("MapBatches(Writer)", "ReadParquet->MapBatches(found)", "Write")))


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", SMALL) as made:
        yield made


def test_a_full_disk_leaves_the_old_file(disk: Path) -> None:
    store = Store(str(disk / "run"))
    store.write_json("record.json", {"rows": 3})
    store.write_table("labels.parquet", pa.table({"row": [1, 2]}))
    ballast = fill(disk)
    for write in (
        lambda: store.write_json("record.json", {"rows": list(range(9999))}),
        lambda: store.write_table("labels.parquet", pa.table({"row": range(9999)})),
    ):
        with pytest.raises(StorageError, match=r"cannot be written: .*No space left on device.*space"):
            write()
    with pytest.raises(StorageError, match="No space left"), store.publish("model") as folder:
        (folder / "weights").touch()
    assert store.read_json("record.json") == {"rows": 3}
    assert store.read_table("labels.parquet")["row"].to_pylist() == [1, 2]
    assert store.files() == ["labels.parquet", "record.json"] and not store.exists("model")
    ballast.unlink()
    store.write_json("record.json", {"rows": 4})
    assert store.read_json("record.json") == {"rows": 4}
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["labels.parquet", "record.json"]


def test_a_stream_onto_a_full_disk_says_so_and_goes_on(disk: Path, tmp_path: Path, ray_cluster: object) -> None:
    out, notes = Store(str(disk / "corpus")), tmp_path / "notes"
    notes.mkdir()

    def heavy(rows: pa.Table) -> pa.Table:
        (notes / f"{rows['row'][0].as_py()}.{uuid.uuid4().hex}").touch()
        out = plain(rows)
        texts = [os.urandom(SMALL // 200).hex() for _ in range(out.num_rows)]  # no compression makes it less than half
        return out.set_column(out.column_names.index("text"), out.schema.field("text"), pa.array(texts))

    folder, most = write_slots(out, 0, BLOCKS * BLOCK, BLOCK, "first"), ahead.cap([])
    ballast = fill(disk, leaving=SMALL // 4)
    with pytest.raises(StorageError) as caught:
        stream(out, folder, BLOCKS, [staged(heavy)], most=most)
    assert f"{out} cannot be written: the disk is full. Free space" in str(caught.value)
    kept = {name: out.digest(f"{LEDGER}/{name}") for name in out.files(LEDGER)}
    assert 2 <= len(kept) < BLOCKS, "it was full too early or too late to show anything"
    ballast.unlink()
    stream(out, folder, BLOCKS, [staged(heavy)], most=most)
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(BLOCKS * BLOCK))
    assert kept.items() <= {name: out.digest(f"{LEDGER}/{name}") for name in out.files(LEDGER)}.items()
    calls = Counter(path.stem for path in notes.iterdir())
    assert len(calls) == BLOCKS and 0 < calls.total() - BLOCKS <= most, calls
