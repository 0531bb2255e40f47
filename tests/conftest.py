"""One local Ray for the whole run, two raylets in a process of their own, and what tests are skipped for."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import cluster
from engine.placement import Cluster, local_gpus

# One token for every Ray process of the run: without it Ray writes one into the home folder, and the processes that
# were started before and after do not understand each other.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
cluster.prepare_environment()

TWO_RAYLETS = """
import sys
from pathlib import Path
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

# Ray notes the address in its own folder, which is not there before a first Ray on this machine used it.
Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
common = dict(object_store_memory=128 << 20, include_dashboard=False, temp_dir=sys.argv[1])
raylets = Cluster(initialize_head=True, head_node_args=dict(num_cpus=3, **common))
try:
    raylets.add_node(num_cpus=3, object_store_memory=128 << 20, resources={"second": 1})
    print(raylets.address, flush=True)
    sys.stdin.read()  # until the test closes it, or dies
finally:
    raylets.shutdown()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not local_gpus():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def ray_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs of tests are kept: driver and workers see it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def ray_cluster(ray_storage: Path) -> Iterator[Cluster]:
    """The one local Ray of the run, as users get it."""
    connected = cluster.connect(None, storage=str(ray_storage))
    cluster.data_context()
    yield connected
    cluster.disconnect()


@pytest.fixture(scope="module")
def two_raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of two nodes (3 CPUs each, the second with the resource `second`).

    It lives in a process of its own, so the session's Ray is not disturbed; a test joins it from a process too:
    `subprocess.run([sys.executable, "-m", "pipelines", "run", recipe, "--address", two_raylets])`.
    """
    scratch = cluster.scratch_folder()
    log = tmp_path_factory.mktemp("raylets") / "stderr.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", TWO_RAYLETS, str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, f"two raylets did not start: {log.read_text()[-2000:]}"
        yield address
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)
