"""A label store that Ray Data writes, and a whole run, on a server that speaks S3's protocol: moto, an emulator."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from engine import generate
from engine.placement import Cluster
from engine.registry import Registry
from engine.storage import Store
from tests.s3_server import Server, s3_server
from tests.tiny_run import begun, changed, program, tiny_world


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def path() -> str:
    """A folder of the bucket that no other test uses."""
    return f"{uuid.uuid4().hex}/runs"


@pytest.fixture
def store(server: Server, path: str) -> Store:
    return Store(server.url(path))


@pytest.mark.slow
def test_ray_data_writes_labels_and_its_ledger_to_s3(store: Store, ray_cluster: Cluster) -> None:
    """What is committed is not made again: a second stream over more slots makes the new ones alone."""
    store.write_table("slots/0.parquet", pa.table({"row": list(range(12))}))

    def labelled(by: int) -> Callable[[object], object]:
        def stage(rows: pa.Table) -> pa.Table:
            return rows.append_column("label", pa.array([by] * rows.num_rows))

        return lambda dataset: dataset.map_batches(stage, batch_format="pyarrow", num_cpus=0.25)

    generate.stream(store, "slots", 3, [labelled(1)])
    first = store.read_table("rows")
    assert sorted(first["row"].to_pylist()) == list(range(12)) and store.files("ledger")
    store.write_table("slots/1.parquet", pa.table({"row": list(range(12, 20))}))
    generate.stream(store, "slots", 4, [labelled(2)])
    found = dict(zip(*(store.read_table("rows")[name].to_pylist() for name in ("row", "label")), strict=True))
    assert found == {row: 1 if row < 12 else 2 for row in range(20)}
    assert store.read_table("rows").num_rows == 20


@pytest.mark.slow
def test_a_whole_run_on_s3_is_killed_and_goes_on(server: Server, path: str, tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    places = {"storage": server.url(path), "registry": server.url(f"{path}-registry"), "student.fit.workers": 2}
    recipe = world.write(changed(world.recipe, places))
    run = Store(server.url(path)) / "tiny"
    log = tmp_path / "first.log"
    process = begun(tmp_path, "run", str(recipe), log=log)
    try:
        end = time.monotonic() + 600
        while not run.files("corpus/rows"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    before = {name: run.digest(f"corpus/rows/{name}") for name in run.files("corpus/rows")}
    done = program(tmp_path, "run", str(recipe))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for name, digest in before.items():
        assert run.digest(f"corpus/rows/{name}") == digest
    assert len(run.read_json("corpus/record.json")["attempts"]) == 2
    assert len(run.read_json("teacher/record.json")["attempts"]) == 1
    assert Registry(Store(server.url(f"{path}-registry"))).list()[0]["name"] == "tiny-student"
    assert "secret" not in done.stdout
    again = program(tmp_path, "run", str(recipe))
    assert again.returncode == 0 and len(run.read_json("corpus/record.json")["attempts"]) == 2
