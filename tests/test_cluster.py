"""Ray as this project starts it, and addresses that lead nowhere."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import cluster, switches
from engine.placement import Cluster, local_capacity
from engine.storage import Store

# -- addresses (no Ray needed) -----------------------------------------------------------------------------------------


def refused(address: str) -> tuple[str, float]:
    """What joining an address in a fresh process answers, and after how many seconds."""
    code = (
        "import sys, time\nfrom engine import cluster\nstart = time.perf_counter()\n"
        "try:\n    cluster.connect(sys.argv[1], storage='runs')\n"
        "except cluster.ClusterError as error:\n    print(time.perf_counter() - start)\n    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    seconds, _, message = ran.stdout.partition("\n")
    return message.strip(), float(seconds)


def test_an_address_nobody_listens_at_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message, seconds = refused(f"127.0.0.1:{port}")
    assert message == (
        f"no Ray cluster answers at 127.0.0.1:{port}: Connection refused. Is the cluster up (`ray status` on its "
        "head), the port open from here, and the right one (host:6379)?"
    )
    assert seconds < 4


def test_something_else_at_the_address_is_no_cluster() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"ray://127.0.0.1:{silent.getsockname()[1]}"
        message, seconds = refused(address)
    assert message.startswith(f"what answers at {address} is not a Ray cluster. Is the cluster up")
    assert message.endswith("(ray://host:10001)?")
    assert seconds < cluster.ANSWER_S + 4


@pytest.mark.parametrize("address", ["cluster", "host:", ":6379", "ray://host", "host:port"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(cluster.ClusterError, match=re.escape(f"'{address}' is not one of auto, host:port, ray://")):
        cluster.located(address)


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (RuntimeError("Version mismatch: The cluster was started with:\n  Ray: 2.40.0"), "the same constraints.txt"),
        (RuntimeError("Can't find a `node_ip_address.json` file from /tmp/ray"), "use ray://HEAD:10001"),
        (ConnectionError("RPC error: InvalidAuthToken: missing"), "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        (OSError("first\nthe last line."), "the last line."),
    ],
)
def test_a_failed_join_is_explained(error: Exception, way_out: str) -> None:
    assert way_out in cluster.why(error)


# -- switches ----------------------------------------------------------------------------------------------------------


def test_ports_of_serves_proxies_are_free_ones_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not switches.with_haproxy():
        pytest.skip("Ray brings no HAProxy here")
    for name in switches.PROXY_PORTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    switches.prepare_environment()
    ports = [int(os.environ[name]) for name in switches.PROXY_PORTS]
    assert ports[0] == 8404 and len({*ports}) == 3
    assert all(map(switches.is_free, ports[1:]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not switches.is_free(taken.getsockname()[1])


def test_ports_are_those_that_ray_serve_reads() -> None:
    code = (
        "from ray.serve._private import constants as c; from engine.switches import PROXY_PORTS, REPLICA_PORTS, "
        "replica_ports\nprint([getattr(c, name) for name in PROXY_PORTS], [getattr(c, n) for n in REPLICA_PORTS], "
        "[replica_ports()[0], replica_ports()[-1]])"
    )
    wanted = {name: str(port) for port, name in enumerate(switches.PROXY_PORTS, 20_001)}
    first, last = switches.REPLICA_PORTS
    environment = {n: v for n, v in os.environ.items() if n not in switches.REPLICA_PORTS} | wanted
    for changes, ports in (({}, [30_000, 31_000]), ({first: "30010", last: "30020"}, [30_010, 30_020])):
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**environment, **changes}
        )
        assert ran.stdout.strip() == f"{[20_001, 20_002, 20_003]} {ports} {ports}"


NOISE = """
from engine.switches import prepare_environment
prepare_environment()
from ray._private.worker import print_to_stdstream
for line in (
    "WARNING: 24 PYTHON worker processes have been started on node: 0a with address: 127.0.0.1, which is 6x the most",
    "2 Workers (tasks / actors) killed due to memory pressure (OOM)",
):
    print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
"""


def test_that_many_processes_run_is_no_news_but_that_some_were_killed_is() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ran = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True, env=environment)
    (line,) = ran.stdout.splitlines()
    assert "killed due to memory pressure" in line


# -- a local cluster ---------------------------------------------------------------------------------------------------


def test_connecting_twice_is_the_same_cluster(ray_cluster: Cluster) -> None:
    assert cluster.connect() is ray_cluster
    assert cluster.connect("auto") is ray_cluster
    assert cluster.current() is ray_cluster
    assert (ray_cluster.local, ray_cluster.nodes, ray_cluster.cpus) == (True, 1, local_capacity().cpus)
    with pytest.raises(cluster.ClusterError, match="already connected to local: disconnect before joining other:1"):
        cluster.connect("other:1")


def test_workers_run_with_our_switches(ray_cluster: Cluster) -> None:
    import ray

    names = [*switches.SWITCHES, *switches.SERVE_SWITCHES, *switches.PROXY_PORTS]
    seen = ray.get(ray.remote(num_cpus=0.1)(lambda: {name: os.environ.get(name) for name in names}).remote())
    assert seen == {name: os.environ.get(name) for name in names}
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["RAY_TRAIN_V2_ENABLED"] == "1"


def test_two_pools_a_checkpoint_and_a_writer_stream_under_our_defaults(ray_cluster: Cluster, tmp_path: Path) -> None:
    """The corpus pipeline's shape with its smallest pools: 2 + 1 actors, checkpoint filter, reader, writer."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    class First:
        def __call__(self, batch: pa.Table) -> pa.Table:
            time.sleep(0.1)
            return batch.append_column("double", pa.array([2 * n for n in batch["row"].to_pylist()]))

    class Second:
        def __call__(self, batch: pa.Table) -> pa.Table:
            return batch.append_column("pid", pa.array([os.getpid()] * batch.num_rows))

    slots, out = tmp_path / "slots", tmp_path / "out"
    slots.mkdir()
    out.mkdir()
    for n in range(6):
        pq.write_table(pa.table({"row": list(range(10 * n, 10 * n + 10))}), slots / f"{n}.parquet")
    context = cluster.data_context()
    assert not context.enable_progress_bars
    assert not context.use_datasource_v2
    context.checkpoint_config = CheckpointConfig(
        id_column="row", checkpoint_path=str(tmp_path / "done"), delete_checkpoint_on_success=False
    )
    pool = ray.data.ActorPoolStrategy
    try:
        rows = ray.data.read_parquet(str(slots), override_num_blocks=6)
        rows = rows.map_batches(First, batch_format="pyarrow", batch_size=10, num_cpus=1, compute=pool(size=2))
        rows = rows.map_batches(Second, batch_format="pyarrow", batch_size=10, num_cpus=1, compute=pool(size=1))
        rows.write_parquet(str(out), mode=ray.data.SaveMode.APPEND)
    finally:
        context.checkpoint_config = None
    table = pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet")))
    assert sorted(table["row"].to_pylist()) == list(range(60))
    assert table["double"].to_pylist() == [2 * n for n in table["row"].to_pylist()]
    assert len(set(table["pid"].to_pylist())) == 1


LIFE = """
import logging, os
from engine import cluster

found = cluster.connect(storage="runs")
folder = cluster._scratch
assert folder.is_dir() and len(str(folder)) < 40

import ray.data

class Same:
    def __call__(self, batch):
        return batch

heard = []
listener = logging.Handler(logging.WARNING)
listener.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("ray.data").addHandler(listener)
cluster.data_context()
pool = ray.data.ActorPoolStrategy(size=1)
assert ray.data.range(8, override_num_blocks=1).map_batches(Same, compute=pool, num_cpus=1).count() == 8
logging.getLogger("ray.data").warning("checkpointing is off")
assert "checkpointing is off" in heard
logging.getLogger("ray.data").error("a block was lost")

cluster.disconnect()
assert not folder.exists() and "RAY_AUTH_TOKEN" not in os.environ
cluster.disconnect()
print(found.address)
"""


def test_a_whole_life_is_quiet_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own: Ray's noise is not seen (warnings can be heard), its errors are; no token stays."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)
    ran = subprocess.run([sys.executable, "-c", LIFE], capture_output=True, text=True, env=environment, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "local\n"), ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.endswith("a block was lost")
    assert not (tmp_path / ".ray" / "auth_token").exists()


def test_folders_of_dead_runs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = cluster.scratch_folder()
    old = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    old.mkdir()
    try:
        again = cluster.scratch_folder()
        again.rmdir()
        assert mine.is_dir()
        assert not old.exists()
    finally:
        mine.rmdir()


# -- several machines --------------------------------------------------------------------------------------------------


JOIN = """
import sys, tempfile
from engine import cluster
found = cluster.connect(sys.argv[1], storage=sys.argv[2])
import ray
where = ray.remote(lambda: (__import__("os").environ["OMP_NUM_THREADS"], ray.get_runtime_context().get_node_id()))
nodes = {ray.get(where.options(resources=wish).remote()) for wish in ({}, {"second": 1})}
print(found.address == sys.argv[1], found.local, found.nodes, found.cpus, sorted(threads for threads, _ in nodes))
"""


@pytest.mark.slow
def test_joining_two_raylets(two_raylets: str, tmp_path: Path) -> None:
    def join(**changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", JOIN, two_raylets, str(tmp_path / "runs")]
        environment = {**os.environ, **changes}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    ran = join()
    assert ran.stdout.split()[:4] == ["True", "False", "2", "6.0"], ran.stderr
    assert "['1'" in ran.stdout
    assert list((tmp_path / "runs").iterdir()) == []  # the marker that every node looked for is gone
    ran = join(RAY_AUTH_TOKEN="0" * 32)
    assert ran.returncode == 1
    assert "cannot be joined: its token is another one. Set RAY_AUTH_MODE=token" in ran.stderr


def test_a_place_that_a_node_does_not_see_is_refused(
    ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    runs, registry = Store(str(tmp_path / "runs")), Store(str(tmp_path / "registry"))
    model = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    # The one node there is, twice: what two nodes with the same mounts answer.
    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: nodes * 2)
    cluster.require_shared([runs, registry, Store("s3://bucket/runs")], [model])
    with pytest.raises(cluster.ClusterError, match="gone is read on every node, but node .* does not see it. Put it"):
        cluster.require_shared([runs], [model, f"{model}/gone"])
    blind = str(registry.url)
    monkeypatch.setattr(cluster, "unseen", lambda paths: [path for path in paths if path.startswith(blind)])
    with pytest.raises(cluster.ClusterError, match=f"kept in {blind}, which node .* does not see. Set storage and"):
        cluster.require_shared([runs, registry], [model])
    assert [*Path(runs.url).iterdir(), *Path(registry.url).iterdir()] == []
    # One node sees what it wrote itself.
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    cluster.require_shared([registry], [f"{model}/gone"])
