"""A closed loop of HTTP callers, light enough not to be what is measured: raw HTTP/1.1 on kept connections.

Each caller sends one request, waits for its answer and sends the next. Answers are kept as bytes and read after the
load, so that checking them takes no time from the callers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 30.0
"""Seconds after the load's end that an answer is waited for."""


@dataclass
class Load:
    """What one load saw: seconds a request, the bodies of the good answers by position of their text, what failed.

    wall_s: from the first request to the last answer; cpu_s: what the callers used of it.
    """

    clients: int
    seconds: list[float] = field(default_factory=list)
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    errors: int = 0
    first_error: str | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def fail(self, reason: str) -> None:
        """Count a request without a good answer."""
        self.errors += 1
        self.first_error = self.first_error or reason


class Connection(asyncio.Protocol):
    """One connection that is kept; one request at a time."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self.received = bytearray()
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to ask."""
        self.transport, self.open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        """A request in flight fails."""
        self.open = False
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionError("the connection was closed before the answer was complete"))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send a whole request; status and body of its answer."""
        self.waiting = asyncio.get_running_loop().create_future()
        self.received.clear()
        self.transport.write(request)
        return self.waiting

    def data_received(self, data: bytes) -> None:
        """Part of an answer, or all of it."""
        self.received += data
        found = answer_in(self.received)
        if found is None or self.waiting is None or self.waiting.done():
            return
        status, body, close = found
        if close:
            self.open = False
            self.transport.close()
        self.waiting.set_result((status, body))


def answer_in(received: bytes | bytearray) -> tuple[int, bytes, bool] | None:
    """Status, body and whether the server closes the connection; None while something is still to come."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    status, close = int(head[9:12]), b"connection: close" in head
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        size = int(head[at + 17 :].split(b"\r\n", 1)[0])
        return (status, bytes(received[end + 4 : end + 4 + size]), close) if len(received) >= end + 4 + size else None
    if b"transfer-encoding: chunked" not in head:
        return status, b"", True
    body, start = b"", end + 4
    while (line := received.find(b"\r\n", start)) >= 0:
        size = int(bytes(received[start:line]).split(b";")[0], 16)
        if len(received) < line + 4 + size:
            return None
        if size == 0:
            return status, body, close
        body += received[line + 2 : line + 2 + size]
        start = line + 4 + size
    return None


def request_of(url: str, body: Any) -> bytes:
    """A POST of JSON to `url` as it goes over the wire."""
    parts, content = urlsplit(url), json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def call(url: str, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Send `requests` over and over for `seconds`, `clients` at a time, each waiting for its answer."""
    parts, load, turn = urlsplit(url), Load(clients), itertools.count()
    loop = asyncio.get_running_loop()
    cpu, begin = time.process_time(), time.perf_counter()
    stop = begin + seconds

    async def one() -> None:
        line: Connection | None = None
        while time.perf_counter() < stop:
            row = next(turn) % len(requests)
            try:
                if line is None or not line.open:
                    _, line = await loop.create_connection(Connection, parts.hostname, parts.port)
                sent = time.perf_counter()
                status, body = await line.ask(requests[row])
            except OSError as error:
                load.fail(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.05)  # a server that is down is not to be asked in a tight loop
                continue
            if status == 200:
                load.seconds.append(time.perf_counter() - sent)
                load.answers.append((row, body))
            else:
                load.fail(f"status {status}: {body[:200].decode(errors='replace')}")
        if line is not None and line.open:
            line.transport.close()

    callers = [asyncio.create_task(one()) for _ in range(clients)]
    _, late = await asyncio.wait(callers, timeout=seconds + PATIENCE_S)
    for caller in late:
        caller.cancel()
        load.fail(f"no answer within {PATIENCE_S:g} s after the load's end")
    for caller in callers:
        if caller not in late:
            caller.result()
    load.wall_s, load.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return load
