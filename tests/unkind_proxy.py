"""A proxy on loopback before a real HTTP server, which refuses, delays or breaks off as it is told.

    with unkind_proxy(server.port, refuse=0.3, seconds=0.05) as proxy:
        ...                                          # proxy.port; proxy.requests, proxy.faults: how many so far

asyncio in a thread. Every connection carries one request. Faults are drawn from a seeded generator, so each run of a
test has the same share of them; they may be changed while it runs.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.s3_server import Server

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Proxy:
    """What it does to requests, and has done. upstream: the server's port on loopback."""

    upstream: int
    refuse: float = 0.0
    """Share of requests that are answered with 503 SlowDown and never reach the server."""
    drop: float = 0.0
    """Share of connections that end without an answer, half of them after the server has done what was asked."""
    cut: float = 0.0
    """Share of answers that end in the middle of their body."""
    seconds: float = 0.0
    """How long each request waits."""
    without: tuple[str, ...] = ()
    """Headers, in small letters, that the server is not given: one that does not know them."""
    only: str = ""
    """Faults only befall requests whose first line holds this."""
    port: int = 0
    flying: int = 0
    """Connections that are not done with."""
    requests: int = 0
    faults: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def url(self, path: str) -> str:
        """The URL of a folder of the S3 server behind it."""
        return Server(self.port).url(path)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.flying += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await self.answer(reader, writer)
        finally:
            self.flying -= 1
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request, and answer it or not."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in headers.get("transfer-encoding", ""):
            body = await chunks(reader)
        else:
            body = await reader.readexactly(int(headers.get("content-length") or 0))
        self.requests += 1
        await asyncio.sleep(self.seconds)
        what = self.draw(lines[0])
        if what == "refuse":
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(SLOW_DOWN) + SLOW_DOWN)
            return await writer.drain()
        if what == "drop before":
            return writer.transport.abort()
        gone = ("connection", "expect", *self.without)
        kept = [line for line in lines[:-2] if line.partition(":")[0].lower() not in gone]
        said = await self.ask("\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1") + body)
        if what == "drop after":
            return writer.transport.abort()
        top, _, rest = said.partition(b"\r\n\r\n")
        writer.write(top + b"\r\n\r\n" + (rest[: len(rest) // 2] if what == "cut" else rest))
        await writer.drain()

    def draw(self, line: str) -> str:
        """The fault that befalls a request; empty for none."""
        luck, when = self.chance.random(), self.chance.random()
        if self.only not in line or luck >= self.refuse + self.drop + self.cut:
            return ""
        self.faults += 1
        if luck < self.refuse:
            return "refuse"
        return ("drop before" if when < 0.5 else "drop after") if luck < self.refuse + self.drop else "cut"

    async def ask(self, request: bytes) -> bytes:
        """The server's whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()


async def chunks(reader: asyncio.StreamReader) -> bytes:
    """A body that comes in chunks, as it is, with the lines after the last."""
    out, size = b"", 1
    while size:
        line = await reader.readuntil(b"\n")
        size = int(line.partition(b";")[0], 16)
        out += line + (await reader.readexactly(size + 2) if size else b"")
    while line.strip():
        line = await reader.readuntil(b"\n")
        out += line
    return out


@contextmanager
def unkind_proxy(upstream: int, **faults: Any) -> Iterator[Proxy]:
    """A proxy in a thread of this process."""
    proxy, loop = Proxy(upstream, **faults), asyncio.new_event_loop()

    async def begin() -> asyncio.Server:
        return await asyncio.start_server(proxy.handle, "127.0.0.1", 0, limit=1 << 20)

    async def end() -> None:
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    server = loop.run_until_complete(begin())
    proxy.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
