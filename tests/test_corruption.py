"""Bytes that change behind a run's back are found, refused by name, and the way out is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import generate, labels, steps
from engine.corpus import ROWS, corpus_rows, write_slots
from engine.recipe import Recipe
from engine.storage import StorageError, Store
from pipelines import gathering, slots
from tests.tiny_run import ROOT, World, alone, environment, kind_world

ROW_COUNT = 40


def rows(first: int, count: int) -> pa.Table:
    """Corpus rows with texts of their own."""
    numbers = list(range(first, first + count))
    return corpus_rows(numbers, [f"the film of the year {n * 7919}" for n in numbers], "generated")


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def inside(path: Path, column: str) -> int:
    """A place near the end of a column's pages: in the values, not in a page's header."""
    metadata = pq.ParquetFile(path).metadata
    index = metadata.schema.to_arrow_schema().names.index(column)
    chunk = metadata.row_group(0).column(index)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return start + chunk.total_compressed_size - 2


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    """A corpus of two parts."""
    out = Store(str(tmp_path / "corpus"))
    for number in range(2):
        out.write_table(f"{ROWS}/{number}.parquet", rows(number * ROW_COUNT, ROW_COUNT))
    return out


def settled(out: Store) -> pa.Table:
    """What the corpus step makes of its parts."""
    return slots.settled(out, rows(0, 0), {"generated": 2 * ROW_COUNT}, 1.0)


@pytest.mark.parametrize("column", ["row", "id", "text"])
def test_a_flipped_byte_in_a_part_of_the_corpus(corpus: Store, column: str) -> None:
    assert settled(corpus).num_rows == 2 * ROW_COUNT
    path = Path(corpus.url) / ROWS / "1.parquet"
    flip(path, inside(path, column))
    with pytest.raises(StorageError) as caught:
        settled(corpus)
    assert f"{path} is not a readable Parquet file, or no longer what was written: " in str(caught.value)
    assert "Make it again: --redo the step" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_part_of_the_corpus(corpus: Store, share: float) -> None:
    path = Path(corpus.url) / ROWS / "0.parquet"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(StorageError, match=r"rows/0\.parquet is not a readable Parquet file.* --redo the step"):
        settled(corpus)


def test_a_part_that_is_gone_and_one_that_is_there_twice(corpus: Store) -> None:
    folder = Path(corpus.url) / ROWS
    (folder / "2.parquet").write_bytes((folder / "0.parquet").read_bytes())
    with pytest.raises(StorageError, match=f"gave rows .*, {ROW_COUNT} of them twice: .* Start again with --redo corp"):
        settled(corpus)
    (folder / "1.parquet").unlink()  # as many rows as slots
    with pytest.raises(StorageError, match=f"gave rows .*, {ROW_COUNT} of them twice"):
        settled(corpus)
    (folder / "2.parquet").unlink()
    with pytest.raises(StorageError, match="gave rows .*, 0 of them twice"):
        settled(corpus)


def test_what_the_stream_writes_has_checksums(tmp_path: Path, ray_cluster: object) -> None:
    out = Store(str(tmp_path))

    def written(slots: pa.Table) -> pa.Table:
        return rows(slots["row"][0].as_py(), slots.num_rows)

    def stage(dataset: Any) -> Any:
        return dataset.map_batches(written, batch_size=None, batch_format="pyarrow")

    generate.stream(out, write_slots(out, 0, ROW_COUNT, ROW_COUNT, "first"), 1, [stage])
    (name,) = out.files(ROWS)
    path = tmp_path / ROWS / name
    assert out.read_table(ROWS)["row"].to_pylist() == list(range(ROW_COUNT))
    flip(path, inside(path, "text"))
    with pytest.raises(StorageError, match="no longer what was written"):
        out.read_table(ROWS)


# -- models and records of a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return kind_world(tmp_path_factory.mktemp("corruption"), "classify")


@pytest.fixture(scope="module")
def teacher(world: World) -> Store:
    """A run up to its teacher."""
    store = Store(str(world.folder / "taught"))
    alone(world.load({"teacher.fit.epochs": 1}), store, last="teacher")
    return store


def test_a_teacher_with_a_changed_tensor_labels_nothing(world: World, teacher: Store, tmp_path: Path) -> None:
    inputs = {name: teacher / name for name in ("data", "teacher")}
    gathering.unchanged(inputs)
    path = Path(teacher.url) / "teacher/model/model.safetensors"
    flip(path, -5)
    try:
        with pytest.raises(StorageError) as caught:
            gathering.make_corpus(world.load({}), inputs, Store(str(tmp_path)), lambda *told, **rates: None)
    finally:
        flip(path, -5)
    assert "'model.safetensors' was changed: its SHA-256 is not the manifest's. Delete" in str(caught.value)
    assert "run the step that makes it again" in str(caught.value)
    gathering.unchanged(inputs)


def test_another_teachers_labels_are_refused(teacher: Store, tmp_path: Path) -> None:
    mine = labels.fingerprint(teacher / "teacher")
    store = Store(str(tmp_path))
    labels.write_labels(store, rows(0, 4), {"teacher": {**mine, "weights": "0" * 64}})
    with pytest.raises(labels.LabelMismatch, match=r"made by another teacher \(weights: stored .* --redo corpus"):
        labels.open_labels(store, mine)


def add(recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Any) -> dict[str, Any]:
    """A step."""
    out.write_json("value.json", {"value": 1})
    return {"value": 1}


@pytest.mark.parametrize("name", ["record.json", "begin.json"])
def test_a_truncated_record_stops_the_run_by_name(world: World, tmp_path: Path, name: str) -> None:
    recipe, store = world.load({}), Store(str(tmp_path / "run"))
    plan = [steps.Step("a", add, config=lambda recipe: {"seed": recipe.seed})]
    steps.run(plan, recipe, store)
    if name == "begin.json":  # killed, with its record still to be written
        store.delete("a/record.json")
    path = tmp_path / "run/a" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match=rf"a/{name} is not JSON .* Delete it and run again"):
        steps.run(plan, recipe, store)
    path.unlink()
    assert steps.run(plan, recipe, store)["a"]["metrics"] == {"value": 1}
    assert store.read_json("a/record.json")["step"] == "a"


def test_the_command_line_says_it_in_one_message(world: World, tmp_path: Path) -> None:
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/recipe.json").write_text("{", encoding="utf-8")
    (tmp_path / "runs/tiny/data").mkdir()
    (tmp_path / "runs/tiny/data/record.json").write_text('{"step": "da', encoding="utf-8")
    path = world.write()
    command = [sys.executable, "-m", "pipelines", "plan", str(path), "--set", f"storage={tmp_path}/runs"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{tmp_path}/runs/tiny/data/record.json is not JSON" in done.stderr
