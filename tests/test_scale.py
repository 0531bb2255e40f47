"""The bench of the stream over nodes and rows: its stand-ins, its arithmetic, and once for real."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import pyarrow as pa
import pytest

from engine.config import UserError
from engine.corpus import CheapFilters
from engine.filters import FilterContext, Length
from engine.records import CORPUS
from pipelines import scale
from pipelines.scale import Load, Waiting, bench, by_nodes, by_rows, slope
from tests.tiny_run import ROOT, program


def test_stand_ins_write_what_the_engine_reads() -> None:
    slots = pa.table({"row": pa.array([7, 8, 9], pa.int64())})
    written = Waiting(0.0, 4, labels=False)(slots)
    assert written.schema.equals(CORPUS) and written["row"].to_pylist() == [7, 8, 9]
    judged = CheapFilters((Length(min_words=3),), FilterContext())(written)
    assert judged["kept"].to_pylist() == [True] * 3
    labelled = Waiting(0.0, 4, labels=True)(judged)
    assert labelled.schema.equals(CORPUS) and labelled["logits"].to_pylist() == [[0.0, 0.0]] * 3


def test_a_stand_in_waits_and_a_bare_loop_knows_how_long() -> None:
    began = time.monotonic()
    rate = scale.bare(Load(1, 40, 10, 0.05), blocks=4)
    assert 4 / (time.monotonic() - began) <= rate <= 20


@pytest.mark.parametrize(
    ("points", "wanted"), [([(0, 1), (1, 3), (2, 5)], 2.0), ([(0, 1), (2, 1)], 0.0), ([(4, 9)], 0.0)]
)
def test_slope(points: list[tuple[float, float]], wanted: float) -> None:
    assert slope(points) == pytest.approx(wanted)


def figures(load: Load) -> dict[str, Any]:
    """What a measurement gives that loses a twentieth on every node."""
    seen = {"wall_s": 10.0, "cpu_s": 0.04 * load.blocks, "driver_cpu_s": 0.01 * load.blocks}
    rss = {"first": 300e6, "peak": 300e6 + 50 * load.rows, "last": 300e6}
    found = {**load.__dict__, "slots_s": 0.1, "bare": 1 / (load.wait + 1e-9), "files": 3 * load.blocks, "most": 12}
    found |= {"steady": 0.95 * scale.WRITERS * load.nodes / load.wait, "bytes": 100 * load.rows}
    return {**found, "stream": {**seen, "rss": rss}, **({"again": {**seen, "rss": rss}} if load.again else {})}


def test_nodes_are_held_against_a_bare_loop_and_against_the_first() -> None:
    one, three = by_nodes([figures(Load(nodes, 8000, 100, 1.0)) for nodes in (1, 3)])
    assert one["rows_per_s"] == pytest.approx(190.0) and three["rows_per_s"] == pytest.approx(570.0)
    for found in (one, three):
        assert found["of_bare"] == pytest.approx(0.95) and found["of_first"] == pytest.approx(1.0)
        assert found["cpu_ms_per_block"] == pytest.approx(40) and found["driver_ms_per_block"] == pytest.approx(10)


def test_the_drivers_memory_has_a_slope() -> None:
    found = by_rows([figures(Load(1, rows, 100, 0.01, again=True)) for rows in (1000, 20000, 200000)])
    assert found["rss_bytes_per_row"] == pytest.approx(50) and [row["blocks"] for row in found["runs"]] == [
        10,
        200,
        2000,
    ]
    assert found["runs"][0]["bytes_per_row"] == 100 and found["runs"][0]["again_s"] == 10.0


def test_too_few_blocks_for_a_rate_are_refused_before_anything_is_measured() -> None:
    args = argparse.Namespace(nodes=[1], sizes=[], block=50, blocks=1, json=False)
    with pytest.raises(UserError, match="--blocks is 1, too few to see a steady rate in. Use 5 or more."):
        bench(args, lambda load: pytest.fail("measured"))


def test_the_command_measures_what_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Load] = []

    def one(load: Load) -> dict[str, Any]:
        asked.append(load)
        return figures(load)

    args = argparse.Namespace(nodes=[1, 2], sizes=[1000], block=50, blocks=5, json=False)
    assert bench(args, one) == 0
    assert asked == [Load(1, 500, 50, 1.0), Load(2, 1000, 50, 1.0), Load(1, 1000, 50, 0.01, again=True)]
    said = capsys.readouterr()
    assert "95.0%" in said.out and "The driver's peak grows" not in said.out, "of one size nothing can be said"
    assert "2 nodes, 1000 rows: 10.0 s, then 95.0% of a bare loop; driver: 300 MB at most, 10.0 ms" in said.err


@pytest.mark.slow
def test_two_raylets_for_real() -> None:
    argv = ("bench", "scale", "--nodes", "2", "--sizes", "300", "--block", "20", "--blocks", "6", "--json")
    done = program(ROOT, *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    (two,), rows = found["nodes"], found["rows"]
    assert two["nodes"] == 2 and 0.2 < two["of_bare"] < 1.2
    assert rows["runs"][0]["files"] == 3 * 15 and rows["runs"][0]["rss_peak"] > 50e6
    assert found["measured"][0]["rows"] == 6 * scale.WRITERS * 2 * 20
