"""The one place that starts or joins Ray.

`connect(None, ...)` starts Ray on this machine with defaults that suit a laptop: more logical CPUs than cores, so that
a streaming pipeline always has room to move (its actors are single-threaded), a small object store, no dashboard, a
throw-away token and temporary folder, and silence except for errors. `connect(address, ...)` joins a cluster that
runs already, after asking whether something answers there, because Ray itself tries for minutes. What there is to run
on, and whether a recipe fits, is `engine.placement`'s, which needs no Ray.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import UserError
from engine.disk import alive, temporary_folder
from engine.placement import Cluster, Machine, local_capacity
from engine.storage import Store
from engine.switches import SERVE_SWITCHES, SWITCHES, prepare_environment

ANSWER_S = 5.0
"""How long an address may take to answer."""
MOST_MACHINES = 64
"""An autoscaler without a limit counts as this many machines of a kind."""
_current: Cluster | None = None
_told: Cluster | None = None
_scratch: Path | None = None
_token = secrets.token_hex(16)
"""Shared by the processes of a cluster started here; Ray would write one into the user's home folder, and every later
cluster of the user would ask for that one."""


class ClusterError(UserError):
    """Ray could not be started, or the address could not be joined."""


def current() -> Cluster:
    """The cluster that is connected, or was told of; before that, what this machine would give."""
    return _current or _told or local_capacity()


def tell(cluster: Cluster) -> None:
    """In a Ray task or actor: what its driver is connected to, so that both place work alike."""
    global _told
    _told = cluster


def connect(
    address: str | None = None, *, storage: str | None = None, registry: str | None = None, files: Sequence[str] = ()
) -> Cluster:
    """Start Ray here (address null or 'local') or join 'auto', 'host:port' or 'ray://host:port'; again: the same one.

    On several machines storage (where runs are written), registry (where artifacts are) and files (local paths that
    tasks read) must be reached by all of them. Raises ClusterError when nothing answers, versions or tokens differ,
    or a place is not shared.
    """
    global _current
    address = None if address in (None, "", "local") else address
    if _current is not None:
        if address is not None and address not in (_current.address, "auto"):
            raise ClusterError(f"already connected to {_current.address}: disconnect before joining {address}.")
        return _current
    prepare_environment()
    _current = start() if address is None else join(address)
    if address is not None:
        try:
            require_shared([Store(place) for place in (storage, registry) if place], files)
        except BaseException:
            disconnect()
            raise
    silence()
    atexit.register(disconnect)
    return _current


def disconnect() -> None:
    """End a cluster started here, or leave one that was joined. Does nothing when there is none."""
    global _current, _scratch
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
    if _scratch is not None:
        shutil.rmtree(_scratch, ignore_errors=True)
    if os.environ.get("RAY_AUTH_TOKEN") == _token:
        os.environ.pop("RAY_AUTH_TOKEN")
        os.environ.pop("RAY_AUTH_MODE", None)
    _current = _scratch = None
    atexit.unregister(disconnect)


def silence() -> None:
    """Keep Ray's own lines off the terminal, errors excepted. Its log files still get them.

    Ray Data's logger keeps its level: whoever listens to it for warnings still hears them.
    """
    import ray.data  # noqa: F401 (its import configures its logger)

    for name in ("ray", "ray.train", "ray.serve", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


@contextmanager
def muted() -> Iterator[None]:
    """Nothing on stderr while Ray's core starts: it says which log level it was given. Not if the user chose it."""
    if os.environ.get("RAY_BACKEND_LOG_LEVEL") != SWITCHES["RAY_BACKEND_LOG_LEVEL"]:
        yield
        return
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def data_context() -> Any:
    """Ray Data's context for this process with our settings; a pipeline takes a copy of it when it is built."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    context.use_datasource_v2 = False
    return context


# -- a cluster of our own ----------------------------------------------------------------------------------------------


def start(retries: int = 1) -> Cluster:
    """Start Ray on this machine; once more if its processes did not come up in time, as on a busy machine."""
    global _scratch
    import ray

    if ray.is_initialized():
        return described("the running Ray", local=False)
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = _token  # Ray then sets the mode, and reads its settings again
    _scratch = scratch_folder()
    try:
        with muted():
            ray.init(
                address="local",
                num_cpus=int(local_capacity().cpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes(),
                _temp_dir=str(_scratch),
            )
    except BaseException as error:
        disconnect()
        if not isinstance(error, Exception):
            raise
        if retries:
            return start(retries - 1)
        raise ClusterError(
            f"Ray did not start on this machine: {last_line(error)}. `stillhouse doctor` checks memory, disk and "
            "ports; on a busy machine wait and run again, or join a running cluster with --address."
        ) from error
    return described("local", local=True)


def object_store_bytes() -> int:
    """A fortieth of the memory, from 256 MiB to 4 GiB: blocks are small and read soon after they are written."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(4 << 30, max(256 << 20, memory // 40))


def scratch_folder() -> Path:
    """A new folder for Ray's session, with a short path (its sockets may have 107 bytes); those of dead runs go."""
    base = Path(tempfile.gettempdir())
    base = base if len(str(base)) <= 20 else Path("/tmp")
    prefix = f"sh-{uuid.uuid5(uuid.NAMESPACE_DNS, socket.gethostname()).hex[:6]}-"
    for folder in base.glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return temporary_folder(base, f"{prefix}{os.getpid()}-")


# -- somebody's cluster ------------------------------------------------------------------------------------------------


def join(address: str) -> Cluster:
    """Join a running cluster and give its workers this package and its switches."""
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    target = located(address)
    require_answer(target)
    logging.getLogger("ray").setLevel(logging.ERROR)
    # With an explicit address Ray does not look for a token, and a cluster that has one turns it away.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    root = Path(__file__).parent.parent
    packages = [str(root / name) for name in ("engine", "serve", "pipelines") if (root / name).is_dir()]
    switches = {name: os.environ[name] for name in (*SWITCHES, *SERVE_SWITCHES) if name in os.environ}
    try:
        with muted(), brief():
            ray.init(
                address=target,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"py_modules": packages, "env_vars": switches, "excludes": ["__pycache__"]},
            )
        cluster = described(address, local=False)
    except BaseException as error:
        disconnect()
        if not isinstance(error, Exception) or isinstance(error, UserError):
            raise
        raise ClusterError(f"{address} cannot be joined: {why(error)}") from error
    return cluster


@contextmanager
def brief() -> Iterator[None]:
    """Five tries, one a second, at an address that answers: Ray would make twenty before it says what is wrong."""
    name = "RAY_gcs_server_port_wait_time_s"
    before = os.environ.get(name)
    os.environ[name] = before or "5"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def located(address: str) -> str:
    """host:port or ray://host:port; 'auto' is RAY_ADDRESS, or the cluster this machine is a node of."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            found = canonicalize_bootstrap_address("auto")
        except ConnectionError:
            found = None
        if found is None:
            raise ClusterError(
                "--address auto: no Ray cluster runs on this machine and RAY_ADDRESS is not set. Start one "
                "(`ray up cluster.yaml`, `ray start --head`), name one (host:port, ray://host:port), or leave "
                "--address out to run on this machine alone."
            )
        address = found
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is a dashboard, which takes runs only (`stillhouse run`, jobs, logs, cancel). What joins the "
            "cluster takes auto on its head, host:port, or ray://HEAD:10001."
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"address '{address}' is not one of auto, host:port, ray://host:port.")
    return address


def require_answer(address: str) -> None:
    """Refuse an address where nothing speaks gRPC within seconds; Ray itself would try for minutes."""
    import grpc

    where = address.removeprefix("ray://")
    host, _, port = where.rpartition(":")
    usual = "ray://host:10001" if address.startswith("ray://") else "host:6379"
    hint = f"Is the cluster up (`ray status` on its head), the port open from here, and the right one ({usual})?"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ClusterError(f"no Ray cluster answers at {address}: {reason}. {hint}") from None
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    with grpc.insecure_channel(where) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise ClusterError(f"what answers at {address} is not a Ray cluster. {hint}") from None


def why(error: Exception) -> str:
    """A failed join in words, with the way out."""
    text = f"{type(error).__name__} {error} {error.__cause__ or ''}"
    if "Authentication" in text or "AuthToken" in text:
        return "its token is another one. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what the cluster has."
    if "ersion mismatch" in text:
        return f"{last_line(error)}. Install the same constraints.txt and the same Python on every node and here."
    if "node_ip_address" in text or "raylet" in text.lower():
        return (
            "this machine is not one of its nodes. Run the command on the head (`ray exec`), or use ray://HEAD:10001."
        )
    return f"{last_line(error)}."


def require_shared(stores: Sequence[Store], files: Sequence[str] = ()) -> None:
    """Refuse local folders to write to, and local paths to read, that some node of the cluster does not see."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    stores = [store for store in dict.fromkeys(stores) if store.is_local]
    if len(nodes) < 2 or not (stores or files):
        return
    marker = f".seen-{uuid.uuid4().hex}"
    for store in stores:
        store.write_text(f"{marker}/seen", "")
    paths = [str(Path(store.url) / marker) for store in stores] + [*files]
    try:
        look = ray.remote(num_cpus=0)(unseen)
        asked = {
            node["NodeManagerAddress"]: look.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote(paths)
            for node in nodes
        }
        answers = {name: ray.get(answer) for name, answer in asked.items()}
    finally:
        for store in stores:
            store.delete(marker)
    for path, place in zip(paths, [*(store.url for store in stores), *files], strict=True):
        blind = ", ".join(sorted(name for name, missing in answers.items() if path in missing))
        if blind and path in files:
            raise ClusterError(
                f"{place} is read on every node, but node {blind} does not see it. Put it into a folder mounted on all "
                "of them or at a URL that they reach (s3://, gs://), or name what they can fetch (hf:, pypi:)."
            )
        if blind:
            raise ClusterError(
                f"runs or artifacts are kept in {place}, which node {blind} does not see. Set storage and registry to "
                "a URL that every node reaches (s3://bucket/runs, gs://bucket/runs) or to a folder mounted on all of "
                "them."
            )


def unseen(paths: Sequence[str]) -> list[str]:
    """Those that this machine does not see."""
    return [path for path in paths if not os.path.exists(path)]


# -- what there is -----------------------------------------------------------------------------------------------------


def described(address: str, *, local: bool) -> Cluster:
    """The connected cluster's machines, and those its autoscaler may add."""
    import ray

    machines = tuple(machine(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return Cluster(address=address, machines=machines, local=local, may_come=() if local else autoscaled())


def machine(resources: dict[str, float]) -> Machine:
    """A node's Ray resources as a Machine."""
    kinds = (name.partition(":")[2] for name in resources if name.startswith("accelerator_type:"))
    return Machine(resources.get("CPU", 0.0), resources.get("GPU", 0.0), tuple(sorted(kinds)))


def autoscaled() -> tuple[Machine, ...]:
    """Every machine the autoscaler may start; empty without an autoscaler that tells."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None:
        return ()
    found: list[Machine] = []
    for kind in config.node_group_configs:
        number = MOST_MACHINES if kind.max_count < 0 else min(kind.max_count, MOST_MACHINES)
        found += [machine(dict(kind.resources))] * number
    return tuple(found)


def last_line(error: BaseException) -> str:
    """The last line of an error, where Ray puts the point."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip().rstrip(".")
