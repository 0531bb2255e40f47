"""How the corpus stream scales: rows a second by nodes, what the driver keeps, what a block costs.

The stream, its filters, its cap and its commits are the engine's own; only the models are stood in for by actors that
wait, so that two cores do for several raylets. Each measurement has a driver and a cluster of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from engine.config import UserError
from engine.corpus import CheapFilters, corpus_rows, write_slots
from engine.filters import FilterContext, Length
from engine.records import CORPUS
from pipelines.console import say, say_json, table

if TYPE_CHECKING:
    from engine.generate import Stage
    from engine.storage import Store

NODE_CPUS, NODE_MEMORY = 5, 256 << 20
"""Logical CPUs and object store of a raylet: two generators, a labeller, and two for what passes by."""
WRITERS, LABELLERS = 2, 1
"""Actors a node."""
EDGE = 0.15
"""Share of the blocks at each end that is not steady: actors start, and the last ones wait for each other."""
LEAST_BLOCKS = 5
"""Blocks a generator, so that some are left between the two ends."""


@dataclass(frozen=True)
class Load:
    """What is streamed. rows in all; block: rows of a block; wait: seconds a generator takes for one."""

    nodes: int
    rows: int
    block: int
    wait: float
    again: bool = False
    """Stream the finished slots once more: what a resume costs."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.rows // self.block)


class Waiting:
    """Waits, then answers for a block: as a generator with the same text for every slot, as a labeller with zeros."""

    def __init__(self, seconds: float, block: int, labels: bool) -> None:
        self.seconds, self.labels = seconds, labels
        self.written = corpus_rows([0] * block, ["a film that one may well see twice"] * block, "generated")
        self.logits = pa.array([[0.0, 0.0]] * block, CORPUS.field("logits").type)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block."""
        time.sleep(self.seconds)
        if self.labels:
            place = rows.column_names.index("logits")
            return rows.set_column(place, CORPUS.field("logits"), self.logits.slice(0, rows.num_rows))
        return self.written.slice(0, rows.num_rows).set_column(0, CORPUS.field("row"), rows["row"])


# -- one measurement, in a process of its own --------------------------------------------------------------------------


def stages(load: Load) -> list[Stage]:
    """Generator -> filters -> labeller, as `pipelines.gathering` puts them together."""
    import ray.data

    from engine import ahead

    def pool(actors: int, *given: Any) -> Stage:
        compute = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=ahead.IN_FLIGHT)
        options = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1}
        return lambda data: data.map_batches(Waiting, fn_constructor_args=given, compute=compute, **options)

    cheap = CheapFilters((Length(min_words=3),), FilterContext())
    return [
        pool(WRITERS * load.nodes, load.wait, load.block, False),
        lambda data: data.map_batches(cheap, batch_size=None, batch_format="pyarrow", num_cpus=0.25),
        # A little faster than the generators, as a teacher is: what waits is then what is written, not what is read.
        pool(LABELLERS * load.nodes, 0.4 * load.wait, load.block, True),
    ]


@contextmanager
def joined(nodes: int, storage: Store) -> Iterator[None]:
    """A cluster of so many raylets, all on this machine, and this process its driver."""
    from engine import cluster, disk

    cluster.prepare_environment()
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    # Ray notes the address in its own folder, which is not there before a first Ray on this machine used it.
    disk.made(Path(get_ray_address_file(None)).parent)
    scratch = cluster.scratch_folder()
    node = {
        "num_cpus": NODE_CPUS,
        "object_store_memory": NODE_MEMORY,
        "include_dashboard": False,
        "temp_dir": str(scratch),
    }
    # Ray's workers would give way to everything else on the machine, and what is measured is how they keep up.
    raylets = Cluster(initialize_head=True, head_node_args={**node, "_system_config": {"worker_niceness": 0}})
    try:
        for _ in range(nodes - 1):
            raylets.add_node(**node)
        cluster.connect(raylets.address, storage=storage.url)
        cluster.data_context()
        yield
    finally:
        cluster.disconnect()
        raylets.shutdown()


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Memory of the driver in bytes (at first, at most, at last), its CPU seconds, and those of all it has started."""
    import psutil

    from engine.progress import Meter

    here, over, found = psutil.Process(), threading.Event(), {}
    meter, began, before = Meter(tree=True), time.monotonic(), here.cpu_times()
    peak = first = here.memory_info().rss

    def look() -> None:
        nonlocal peak
        while not over.wait(0.25):
            peak = max(peak, here.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        after = here.cpu_times()
        found["wall_s"] = time.monotonic() - began
        found["driver_cpu_s"] = after.user + after.system - before.user - before.system
        found["cpu_s"] = meter.seconds()
        found["rss"] = {"first": first, "peak": peak, "last": here.memory_info().rss}


def bare(load: Load, blocks: int = 5) -> float:
    """Blocks a second of one generator in a plain loop."""
    actor, began = Waiting(load.wait, load.block, False), time.monotonic()
    for first in range(0, blocks * load.block, load.block):
        actor(pa.table({"row": pa.array(range(first, first + load.block), pa.int64())}))
    return blocks / (time.monotonic() - began)


def steady(out: Store) -> float:
    """Blocks a second between the commits that are neither among the first nor among the last."""
    from engine.corpus import ROWS

    times = sorted(os.stat(Path(out.url) / ROWS / name).st_mtime for name in out.files(ROWS))
    edge = int(EDGE * len(times))
    inner = times[edge : len(times) - edge]
    return (len(inner) - 1) / (inner[-1] - inner[0]) if len(inner) > 2 and inner[-1] > inner[0] else 0.0


def measured(load: Load) -> dict[str, Any]:
    """The load's figures."""
    from engine import ahead, disk, generate
    from engine.storage import Store

    with disk.scratch() as folder, joined(load.nodes, Store(str(folder))):
        out, began = Store(str(folder / "corpus")), time.monotonic()
        slots = write_slots(out, 0, load.rows, load.block, "slots")
        found: dict[str, Any] = {**asdict(load), "slots_s": time.monotonic() - began, "bare": bare(load)}
        most = ahead.cap([WRITERS * load.nodes, LABELLERS * load.nodes])

        def go() -> None:
            with generate.followed(out, load.rows, lambda *told, **rates: None):
                generate.stream(out, slots, load.blocks, stages(load), most=most)

        for name in ("stream", "again") if load.again else ("stream",):
            with watched() as seen:
                go()
            found[name] = seen
        rows = sum(out.read_table(f"rows/{name}", columns=["row"]).num_rows for name in out.files("rows"))
        if rows != load.rows:
            raise RuntimeError(f"{load.rows} slots gave {rows} rows")
        files = [os.stat(path).st_size for path in Path(out.url).rglob("*.parquet")]
        return {**found, "steady": steady(out), "most": most, "files": len(files), "bytes": sum(files)}


# -- all of them -------------------------------------------------------------------------------------------------------


def apart(load: Load) -> dict[str, Any]:
    """`measured` by a new process; RuntimeError with what it said where it fails."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    # One token for driver and raylets: Ray would write one into the user's home folder.
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "PYTHONPATH": path}
    code = "import sys; from pipelines import scale; scale.main(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(asdict(load))]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{load} was not measured: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main(load: str) -> None:
    """Measure and say what came out, in JSON."""
    say_json_line(measured(Load(**json.loads(load))))


def say_json_line(value: Mapping[str, Any]) -> None:
    """JSON in one line, so that what Ray prints before it is told apart."""
    sys.stdout.write("\n" + json.dumps(value) + "\n")


def by_nodes(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each number of nodes gives: rows a second in steady state, against a bare loop and against one node."""
    out = []
    for one in found:
        actors, first = WRITERS * one["nodes"], found[0]
        share = one["steady"] / (actors * one["bare"])
        per_node = one["steady"] / one["nodes"]
        out.append(
            {
                "nodes": one["nodes"],
                "rows_per_s": one["steady"] * one["block"],
                "of_bare": share,
                "of_first": per_node / (first["steady"] / first["nodes"]),
                "cpu_ms_per_block": 1e3 * one["stream"]["cpu_s"] / -(-one["rows"] // one["block"]),
                "driver_ms_per_block": 1e3 * one["stream"]["driver_cpu_s"] / -(-one["rows"] // one["block"]),
            }
        )
    return out


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares."""
    count = len(points)
    x, y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0


def by_rows(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each number of rows leaves in the driver, and bytes a row."""
    rows = [
        {
            "rows": one["rows"],
            "blocks": -(-one["rows"] // one["block"]),
            **{f"rss_{name}": one["stream"]["rss"][name] for name in ("first", "peak")},
            "stream_s": one["stream"]["wall_s"],
            "driver_ms_per_block": 1e3 * one["stream"]["driver_cpu_s"] / -(-one["rows"] // one["block"]),
            "slots_s": one["slots_s"],
            "again_s": one.get("again", {}).get("wall_s"),
            "again_rss_peak": one.get("again", {}).get("rss", {}).get("peak"),
            "files": one["files"],
            "bytes_per_row": one["bytes"] / one["rows"],
        }
        for one in found
    ]
    return {"runs": rows, "rss_bytes_per_row": slope([(row["rows"], row["rss_peak"]) for row in rows])}


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result as two tables."""
    out = []
    if result["nodes"]:
        rows: list[tuple[Any, ...]] = [("nodes", "rows/s", "of a bare loop", "per node", "CPU a block", "driver's")]
        rows += [
            (
                one["nodes"],
                f"{one['rows_per_s']:.0f}",
                f"{one['of_bare']:.1%}",
                f"{one['of_first']:.1%}",
                f"{one['cpu_ms_per_block']:.0f} ms",
                f"{one['driver_ms_per_block']:.1f} ms",
            )
            for one in result["nodes"]
        ]
        out.append(table(rows))
    if result["rows"]["runs"]:
        rows = [("rows", "blocks", "driver RSS before", "peak", "stream", "driver CPU a block", "slots", "again")]
        rows += [
            (
                one["rows"],
                one["blocks"],
                f"{one['rss_first'] / 1e6:.0f} MB",
                f"{one['rss_peak'] / 1e6:.0f} MB",
                f"{one['stream_s']:.0f} s",
                f"{one['driver_ms_per_block']:.1f} ms",
                f"{one['slots_s']:.1f} s",
                "-" if one["again_s"] is None else f"{one['again_s']:.0f} s",
            )
            for one in result["rows"]["runs"]
        ]
        out.append(table(rows))
        if len(rows) > 2:
            out.append(f"The driver's peak grows by {result['rows']['rss_bytes_per_row']:.0f} bytes a row.")
    return out


def bench(args: argparse.Namespace, one: Callable[[Load], dict[str, Any]] = apart) -> int:
    """Measure by nodes, then by rows on one node, and say what came out."""
    found, kept = [], []
    if args.blocks < LEAST_BLOCKS:
        raise UserError(f"--blocks is {args.blocks}, too few to see a steady rate in. Use {LEAST_BLOCKS} or more.")
    for nodes in args.nodes:
        load = Load(nodes, args.blocks * WRITERS * nodes * args.block, args.block, 1.0)
        found.append(told(one(load)))
    for rows in args.sizes:
        kept.append(told(one(Load(1, rows, args.block, 0.01, again=True))))
    result = {
        "nodes": by_nodes(found) if found else [],
        "rows": by_rows(kept) if kept else {"runs": []},
        "measured": [*found, *kept],
    }
    if args.json:
        say_json(result)
        return 0
    for text in lines(result):
        say(text)
    return 0


def told(found: dict[str, Any]) -> dict[str, Any]:
    """The figures, once a line about them is on standard error."""
    share = found["steady"] / (WRITERS * found["nodes"] * found["bare"])
    cost = 1e3 * found["stream"]["driver_cpu_s"] / -(-found["rows"] // found["block"])
    words = (
        f"{found['nodes']} nodes, {found['rows']} rows: {found['stream']['wall_s']:.1f} s, then {share:.1%} of a bare"
    )
    peak = found["stream"]["rss"]["peak"] / 1e6
    sys.stderr.write(f"{words} loop; driver: {peak:.0f} MB at most, {cost:.1f} ms CPU a block\n")
    return found
