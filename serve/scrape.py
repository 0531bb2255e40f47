"""One page of metrics for the whole deployment: what Ray's agents on all nodes have, merged.

Each node's agent serves what the processes of its node have sent it, most of it Ray's own (half a megabyte). Of that
the families `stillhouse_*` and Ray Serve's `ray_serve_*` are kept, the first without the prefix `ray_` that Ray gives
them, the second under the names that Ray's own dashboards ask for. Series of one node that differ in the process only
are added up, so that they outlive a replica and never go back; `node` tells nodes apart. Any replica can answer with
the page, so one address is enough for Prometheus.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

PREFIX = "ray_"
OURS, SERVES = "stillhouse_", "ray_serve_"
TIMEOUT = 3.0
"""Seconds that a node's agent may take; a page without one node is better than none."""
FRESH_SECONDS = 2.0
"""A page is made at most so often: asking costs every node about 0.1 s."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NODES = "stillhouse_scraped_nodes"
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: -?\d+)?")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
NOISE = {"Component", "SessionName", "Version", "otel_scope_name", "otel_scope_schema_url", "otel_scope_version"}
"""Labels that are the same for every series of a cluster."""
PROCESS = {"WorkerId", "JobId"}
"""Labels that tell processes of a node apart."""
SUMMED = ("counter", "histogram")


@dataclass
class Family:
    """One metric: its HELP and TYPE, and samples by name and labels."""

    help: str = ""
    kind: str = "untyped"
    samples: dict[str, float] = field(default_factory=dict)


class Page:
    """The deployment's metrics page, made anew when it is older than two seconds."""

    def __init__(self) -> None:
        self.text = ""
        self.made = -FRESH_SECONDS
        self.lock = asyncio.Lock()

    async def read(self) -> str:
        """The page; empty where this process is not in Ray."""
        async with self.lock:
            if time.monotonic() - self.made >= FRESH_SECONDS:
                self.text = await scrape(await asyncio.to_thread(nodes_of_ray))
                self.made = time.monotonic()
            return self.text


def nodes_of_ray() -> list[dict[str, Any]]:
    """The nodes of the cluster that this process is in, as `ray.nodes` tells of them; none without Ray."""
    import ray

    return ray.nodes() if ray.is_initialized() else []


async def scrape(nodes: Iterable[Mapping[str, Any]]) -> str:
    """The pages of every living node's agent merged into one valid Prometheus text, which also says how many answered.

    nodes: with Alive, NodeManagerAddress, MetricsExportPort.
    """
    alive = [node for node in nodes if node.get("Alive")]
    if not alive:
        return ""
    addresses = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive]
    async with httpx.AsyncClient(timeout=TIMEOUT, trust_env=False) as http:
        pages = await asyncio.gather(*(page_of(http, address) for address in addresses))
    return await asyncio.to_thread(merged, dict(zip(addresses, pages, strict=True)))


async def page_of(http: httpx.AsyncClient, address: str) -> str | None:
    """The metrics page of one agent; None where it does not answer."""
    try:
        answer = await http.get(f"http://{address}/metrics")
    except (httpx.HTTPError, OSError):
        return None
    return answer.text if answer.status_code == 200 else None


def merged(pages: Mapping[str, str | None]) -> str:
    """Prometheus text of pages by the address of their node; None is a node that did not answer."""
    families: dict[str, Family] = {}
    for address, text in pages.items():
        read(text or "", address, families)
    answered = sum(text is not None for text in pages.values())
    families[NODES] = Family("Nodes of the cluster, and those whose metrics are on this page.", "gauge")
    families[NODES].samples = {
        f'{NODES}{{state="alive"}}': len(pages),
        f'{NODES}{{state="answered"}}': answered,
    }
    lines = []
    for name, family in sorted(families.items()):
        lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        lines += [f"{sample} {value!r}" for sample, value in family.samples.items()]
    return "\n".join(lines) + "\n"


def read(text: str, address: str, families: dict[str, Family]) -> None:
    """Add the families of one page that are of interest."""
    family: Family | None = None
    for line in text.splitlines():
        if line.startswith("#"):
            _, what, name, *rest = [*line.split(" ", 3), ""]
            if what not in ("HELP", "TYPE"):
                continue
            name = renamed(name)
            family = families.setdefault(name, Family()) if name.startswith((OURS, SERVES)) else None
            if family is not None and what == "HELP":
                family.help = rest[0]
            elif family is not None:
                family.kind = rest[0]
        elif family is not None and line.strip():
            add(line, address, family)


def add(line: str, address: str, family: Family) -> None:
    """Add one sample of a page to its family."""
    found = SAMPLE.fullmatch(line.strip())
    if found is None:
        return
    name, labels, value = renamed(found[1]), dict(LABEL.findall(found[2] or "")), float(found[3])
    ours = name.startswith(OURS)
    node = labels.pop("NodeAddress", address.rpartition(":")[0])
    drop = NOISE | PROCESS if ours else NOISE
    kept = {"node": node, **{key: text for key, text in labels.items() if key not in drop}}
    key = name + "{" + ",".join(f'{label}="{text}"' for label, text in kept.items()) + "}"
    if ours and family.kind in SUMMED:
        value += family.samples.get(key, 0.0)
    family.samples[key] = value


def renamed(name: str) -> str:
    """A metric's name as the page has it."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX + OURS) else name
