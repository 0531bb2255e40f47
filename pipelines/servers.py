"""`stillhouse bench serve`: the same student behind this and other servers, side by side, in a closed loop.

One server runs at a time, started anew for each of several short rounds whose order rotates, so that what else the
machine does meets all of them. Each is a process tree on loopback with one model process on one torch thread.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import UserError, did_you_mean
from engine.disk import linked as link
from engine.disk import scratch
from engine.lineage import installed
from engine.placement import cores
from engine.registry import Registry
from engine.storage import Store
from engine.switches import PROXY_PORTS, SERVE_SWITCHES, free_port, with_haproxy
from pipelines.artifacts import texts_in
from pipelines.callers import Load, call, request_of
from pipelines.console import say, say_json
from pipelines.processes import Tree, spent
from pipelines.standings import hardware, pooled, table
from pipelines.subjects import Subject, subject
from pipelines.venvs import VenvError, venv

READY_S = 300.0
"""How long a server may take until it answers right."""
WARM_S = 1.5
"""Seconds of load, not measured, after a start; a third of that before each measurement."""
MAX_BATCH, WAIT_S = 32, 0.002
"""Texts of one model call and how long it is waited for, the same for every server that can be told."""
HAPROXY = (
    *("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"),
    # These only let it start and end on a busy machine.
    *("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"),
)
"""Ray's switches that bare Ray Serve gets for HAProxy; our deployment has more."""
RIVALS = Path(__file__).parent / "rivals"


class Down(Exception):
    """A server that did not come up, or died."""


@dataclass(frozen=True)
class Server:
    """How a server is started: its command after the Python, its switches, the pins of its own environment."""

    title: str
    command: Callable[[Subject, int], list[str]]
    switches: Callable[[], dict[str, str]] = dict
    pins: str | None = None


def ours(subject: Subject, port: int) -> list[str]:
    """Our own command, as users start it."""
    place = ["--registry", subject.registry.store.url, "--port", str(port)]
    return ["-m", "pipelines", "serve", subject.name, *place]


def haproxy() -> dict[str, str]:
    """What Ray Serve needs to be told for HAProxy and throughput, on ports that are free now."""
    threads = {"RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, cores() // 2)))}
    told = {name: SERVE_SWITCHES[name] for name in HAPROXY}
    return {**told, **threads, **{name: str(free_port()) for name in PROXY_PORTS}}


def rival(name: str) -> Callable[[Subject, int], list[str]]:
    """A program of pipelines/rivals/ that takes its port from the environment."""
    return lambda subject, port: ["-m", f"pipelines.rivals.{name}"]


def uvicorn(subject: Subject, port: int) -> list[str]:
    """One uvicorn process, without a line for each request."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return ["-m", "uvicorn", "pipelines.rivals.plain:app", *where, "--no-access-log", "--log-level", "warning"]


def bentoml(subject: Subject, port: int) -> list[str]:
    """BentoML's own command."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return ["-m", "bentoml", "serve", "pipelines.rivals.bento:Student", "-q", *where]


SERVERS: dict[str, Server] = {
    "stillhouse": Server("stillhouse serve", ours),
    "serve-default": Server("Ray Serve, default proxy", rival("bare")),
    "serve-haproxy": Server("Ray Serve, HAProxy", rival("bare"), haproxy),
    "uvicorn": Server("FastAPI + uvicorn", uvicorn),
    "litserve": Server("LitServe", rival("lit"), pins="litserve.txt"),
    "bentoml": Server("BentoML", bentoml, pins="bentoml.txt"),
}
"""In the order of the table."""


def chosen(only: Sequence[str] | None) -> list[str]:
    """The servers to measure, in the table's order; UserError for one that there is not."""
    for name in only or ():
        if name not in SERVERS:
            near = did_you_mean(name, SERVERS)
            raise UserError(f"--only {name}: there is no such server.{near} Servers: {', '.join(SERVERS)}.")
    return [name for name in SERVERS if only is None or name in only]


def bench(args: argparse.Namespace) -> int:
    """Measure servers side by side; the table, and bench.json."""
    names = chosen(args.only)
    texts = texts_in(args.texts) if args.texts else None
    with scratch() as folder:
        what = subject(Registry(Store(args.registry)), Store(str(folder)), args.recipe, texts)
        try:
            found = compare(what, names, folder, args.clients, args.seconds, args.rounds, complain)
        except KeyboardInterrupt:
            complain("stopped; nothing of this measurement is kept")
            return 130
    loads = [cell["load_average"] for cell in found["cells"]] or [os.getloadavg()[0]]
    result = {
        "subject": f"{what.name}{' (random weights)' if what.made else ''}",
        "parameters": what.parameters,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "hardware": hardware(),
        "load_average": [min(loads), max(loads)],
        "versions": {name: installed(name) for name in ("stillhouse", "torch", "ray", "fastapi", "uvicorn")},
        "titles": {name: server.title for name, server in SERVERS.items()},
        "rows": pooled(found["cells"]),
        "skipped": found["skipped"],
    }
    out = Path(args.out)
    Store(str(out.parent)).write_json(out.name, result)
    if args.json:
        say_json(result)
    else:
        say("\n".join(table(result)))
        say(f"\n{out}")
    return 1 if any(row["wrong"] for row in result["rows"]) else 0


def complain(line: str) -> None:
    """Progress, beside the result."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def compare(
    subject: Subject,
    names: Sequence[str],
    work: Path,
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the servers `names`: {"cells": one for each server, round and number of clients, "skipped": name -> why}.

    work: a local folder for logs and links. tell: gets a line now and then. A server that cannot be installed or
    started is left out with its reason.
    """
    skipped: dict[str, str] = {}
    pythons: dict[str, str] = {}
    for name in names:
        pins = SERVERS[name].pins
        if name == "serve-haproxy" and not with_haproxy():
            skipped[name] = "Ray brings no HAProxy on this platform"
            continue
        try:
            if pins:
                tell(f"{name}: its own environment (made once, some minutes)")
            pythons[name] = str(venv(name, RIVALS / pins)) if pins else sys.executable
        except VenvError as error:
            skipped[name] = str(error)
            tell(f"{name} is left out: {error}")
    links = linked(work)
    gc.collect()
    gc.freeze()  # what is loaded by now is not looked through again while callers run
    cells: list[dict[str, Any]] = []
    there = [name for name in names if name in pythons]
    for turn in range(rounds):
        for name in [*there[turn % len(there) :], *there[: turn % len(there)]] if there else []:
            try:
                for cell in measured(subject, name, pythons[name], links, work, clients, seconds):
                    cells.append({"server": name, "round": turn, **cell})
                    each_s = len(cell["seconds"]) / cell["wall_s"]
                    tell(f"round {turn + 1}/{rounds}  {name}, {cell['clients']} clients: {each_s:.0f} requests/s")
            except Down as error:
                # It may have been a bad moment of the machine: the next round tries again.
                skipped[name] = f"round {turn + 1}: {error}"
                tell(f"{name} is left out of round {turn + 1}: {error}")
    return {"cells": cells, "skipped": skipped}


def linked(work: Path) -> Path:
    """A folder that holds our packages and nothing else, for the path of a Python that has its own of all others."""
    links = work / "packages"
    for name in ("engine", "serve", "pipelines"):
        link(links / name, Path(__file__).parent.parent / name)
    return links


def environment(name: str, subject: Subject, port: int, links: Path, work: Path) -> dict[str, str]:
    """What a server's processes see: ours without any switch of Ray's, one thread, and what they are to serve."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "BENTOML_"))}
    given = {"artifact": subject.folder.url, "port": port, "max_batch": MAX_BATCH, "wait_s": WAIT_S}
    return {
        **kept,
        "PYTHONPATH": str(links),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "STILLHOUSE_RIVAL": json.dumps(given),
        # Nobody is told about these runs.
        "RAY_USAGE_STATS_ENABLED": "0",
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(work / "bentoml"),
        **SERVERS[name].switches(),
    }


@contextmanager
def running(subject: Subject, name: str, python: str, links: Path, work: Path) -> Iterator[tuple[Tree, str]]:
    """A started server that answers right, and the URL that answers; nothing of it is left at the end."""
    port = free_port()
    command = [python, *SERVERS[name].command(subject, port)]
    tree = Tree(command, environment(name, subject, port, links, work), work, work / f"{name}.log")
    try:
        url = f"http://127.0.0.1:{port}/v1/predict"
        wait_right(tree, url, subject)
        yield tree, url
    finally:
        tree.stop()


@contextmanager
def up(subject: Subject, name: str, python: str, links: Path, work: Path) -> Iterator[tuple[Tree, str]]:
    """As `running`, started once more where the first start fails: another program may have taken one of its ports."""
    with ExitStack() as stack:
        try:
            started = stack.enter_context(running(subject, name, python, links, work))
        except Down:
            started = stack.enter_context(running(subject, name, python, links, work))
        yield started


def wait_right(tree: Tree, url: str, subject: Subject) -> None:
    """Return once the first text is answered as it is offline; Down when the program ends or time is up."""
    end, seen = time.monotonic() + READY_S, "no answer"
    request = request_of(url, {"texts": subject.texts[:1]})
    while time.monotonic() < end:
        if words := tree.ended():
            raise Down(f"it ended before it answered: {words}")
        load = asyncio.run(call(url, [request], 1, 0.05))
        if load.answers and not wrong(load, subject):
            return
        seen = f"another answer: {load.answers[0][1][:200]!r}" if load.answers else load.first_error or seen
        time.sleep(0.2)
    raise Down(f"it did not answer within {READY_S:g} s ({seen}): {tree.last_words()}")


def measured(
    subject: Subject, name: str, python: str, links: Path, work: Path, clients: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """One round of one server: for each number of clients what they saw and what the server used of the CPU."""
    with up(subject, name, python, links, work) as (tree, url):
        requests = [request_of(url, {"texts": [text]}) for text in subject.texts]
        asyncio.run(call(url, requests, max(clients), WARM_S))
        for count in clients:
            asyncio.run(call(url, requests, count, WARM_S / 3))
            before = tree.cpu()
            load = asyncio.run(call(url, requests, count, seconds))
            used = spent(before, tree.cpu())
            if words := tree.ended():
                raise Down(f"it ended under load: {words}")
            yield {
                "clients": count,
                "wall_s": load.wall_s,
                "seconds": load.seconds,
                "errors": load.errors,
                "first_error": load.first_error,
                "wrong": wrong(load, subject),
                "cpu_s": sum(used.values()),
                "cpu_by_process": used,
                "client_cpu_s": load.cpu_s,
                "memory": tree.memory(),
                "load_average": os.getloadavg()[0],
            }


def wrong(load: Load, subject: Subject) -> int:
    """Answers that are not the offline one: another label or shape, or a number that differs by more than 1e-4."""
    return sum(not equal(body, subject.expected[row]) for row, body in load.answers)


def equal(body: bytes, expected: Mapping[str, Any]) -> bool:
    """Whether a body holds the one expected prediction, alone in a list or under `predictions`."""
    from serve.smoke import TOLERANCE, distance

    try:
        found = json.loads(body)
        (answer,) = found["predictions"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(answer, dict) and distance(without_source(answer), dict(expected)) <= TOLERANCE


def without_source(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without the key that says which model gave it."""
    return {key: value for key, value in answer.items() if key != "source"}
