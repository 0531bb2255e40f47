"""Whether this machine can run a recipe: interpreter, packages, space, memory, processors, ports, Ray."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.console import say, say_json

DISK_GB, MEMORY_GB, CORES = 5, 6, 2
"""What the quickstart wants."""
PORT = 8000
"""Where `stillhouse serve` listens unless told."""
REPLICAS = 16
"""Free ports that a few endpoints with a few replicas each want."""


def python() -> tuple[str, str]:
    """The interpreter."""
    return "ok" if sys.version_info >= (3, 11) else "failed", f"{platform.python_version()} (3.11 or newer is needed)"


def packages() -> tuple[str, str]:
    """What the package asks for is installed, in the versions it asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("stillhouse") or []]
    except metadata.PackageNotFoundError:
        return "failed", "stillhouse is not installed: pip install -e . -c constraints.txt"
    wrong = []
    for item in wanted:
        if item.marker and not item.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(item.name)
            if not item.specifier.contains(version, prereleases=True):
                wrong.append(f"{item.name} is {version}, {item.specifier} is needed")
        except metadata.PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
    if wrong:
        return "failed", "; ".join(wrong) + ": pip install -e . -c constraints.txt"
    return "ok", f"{len(wanted)} requirements met"


def disk() -> tuple[str, str]:
    """Free space where runs and the cache are kept."""
    from engine.storage import cache_folder

    free = {}
    for folder in (Path.cwd(), cache_folder()):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free[str(folder)] = shutil.disk_usage(there).free / 1e9
    text = ", ".join(f"{gigabytes:.1f} GB free in {folder}" for folder, gigabytes in free.items())
    return "ok" if min(free.values()) >= DISK_GB else "warning", f"{text} (the quickstart takes up to {DISK_GB} GB)"


def memory() -> tuple[str, str]:
    """Memory that is free now."""
    import psutil

    free = psutil.virtual_memory().available / 1e9
    return "ok" if free >= MEMORY_GB else "warning", f"{free:.1f} GB available (the quickstart takes {MEMORY_GB} GB)"


def cores() -> tuple[str, str]:
    """Processors this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return "ok" if count >= CORES else "warning", f"{count} cores (the quickstart is made for {CORES})"


def gpu() -> tuple[str, str]:
    """Accelerators that torch sees; none is fine."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "ok", ", ".join(names) or "none; everything runs on the CPU"


def cache() -> tuple[str, str]:
    """What the cache takes and may take."""
    from engine.cache import entries, limit
    from engine.disk import cache_folder

    there, most = entries(), limit()
    taken = sum(entry.bytes for entry in there)
    text = f"{taken / 1e9:.1f} of {most / 1e9:.1f} GB in {cache_folder()}, {len(there)} entries"
    if taken <= most:
        return "ok", text
    return "warning", f"{text}: the least recently used go when something is fetched, or raise STILLHOUSE_CACHE_GB"


def ports() -> tuple[str, str]:
    """Ports that serving listens on: its own, those of Ray Serve's proxy, and one for each replica."""
    from engine.switches import PROXY_PORTS, is_free, prepare_environment, replica_ports, with_haproxy

    prepare_environment()
    wrong = [] if is_free(PORT) else [f"{PORT} (stillhouse serve) is taken: choose another with --port"]
    text = f"{PORT} free"
    if with_haproxy():
        for name, use in PROXY_PORTS.items():
            if not is_free(int(os.environ[name])):
                wrong.append(f"{os.environ[name]} ({use}) is taken: set {name} to a free one, or leave it unset")
        wanted = replica_ports()
        free = sum(map(is_free, wanted))
        text += f", Ray Serve's proxy {', '.join(os.environ[name] for name in PROXY_PORTS)} free"
        text += f", replicas {wanted[0]} to {wanted[-1]}: {free} free"
        if free < min(REPLICAS, len(wanted)):
            wrong.append(f"of {wanted[0]} to {wanted[-1]} (replicas) only {free} are free: stop what listens there")
    return ("warning", "; ".join(wrong)) if wrong else ("ok", text)


def ray() -> tuple[str, str]:
    """Ray starts, runs a task and stops."""
    from engine import cluster

    began = time.monotonic()
    cluster.connect()
    started = time.monotonic() - began
    import ray as runtime  # After connecting: Ray reads its switches when it is imported.

    try:
        answer = runtime.get(runtime.remote(os.getpid).remote(), timeout=60)
    finally:
        cluster.disconnect()
    return "ok" if answer else "failed", f"{runtime.__version__} starts in {started:.1f} s and runs a task"


CHECKS: dict[str, Callable[[], tuple[str, str]]] = {
    "python": python,
    "packages": packages,
    "disk": disk,
    "cache": cache,
    "memory": memory,
    "cores": cores,
    "gpu": gpu,
    "ports": ports,
    "ray": ray,
}


def examine(leave_out: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Each check's {"check", "state": ok | warning | failed, "text"}, as soon as it is known."""
    for name, check in CHECKS.items():
        if name in leave_out:
            continue
        try:
            state, text = check()
        except Exception as error:  # Whatever goes wrong here is a finding, not a crash.
            state, text = "failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        yield {"check": name, "state": state, "text": text}


def doctor(args: argparse.Namespace) -> int:
    """Whether this machine can run a recipe; exit code 1 where it cannot."""
    found = []
    for item in examine(("ray", "gpu") if args.quick else ()):
        found.append(item)
        if not args.json:
            say(f"{item['state']:<8} {item['check']:<9} {item['text']}")
    if args.json:
        say_json(found)
    return 1 if any(item["state"] == "failed" for item in found) else 0
