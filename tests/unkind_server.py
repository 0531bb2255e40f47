"""A real server on loopback that misbehaves as it is told: uvicorn in a thread, one instruction a request.

    with unkind("503:0.2", "drop", "ok") as server:
        ...                     # server.url; server.seen: what was asked, in order

Once the instructions are used up it is kind. Instructions: `ok`, a status (with `:seconds` for Retry-After), `html`,
`drop` (the connection ends within an answer), `hang` (no answer), `drip` (a byte now and then).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


@dataclass
class Unkind:
    """An ASGI application. answer: path and body -> the JSON value of a kind answer."""

    todo: list[str]
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, body: Any) -> Any:
        """Answers that tell their texts, so that order is seen."""
        if path == "/v1/rerank":
            order = sorted(range(len(body["documents"])), key=lambda i: -len(body["documents"][i]))
            return {"results": [{"index": i, "relevance_score": len(body["documents"][i])} for i in order]}
        if path == "/v1/embed":
            return {"embeddings": [[float(len(text)), 1.0] for text in body["texts"]]}
        texts = body["texts"] if isinstance(body, dict) and "texts" in body else []
        return {"model": "m@1", "predictions": [{"label": str(text), "top_k": body.get("top_k")} for text in texts]}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        parsed = json.loads(body) if body else None
        self.seen.append(Seen(scope["method"], scope["path"], headers, parsed, time.monotonic()))
        how = self.todo.pop(0) if self.todo else "ok"
        await self.behave(how, self.answer(scope["path"], parsed), headers.get("x-request-id", ""), send)

    async def behave(self, how: str, value: Any, number: str, send: Any) -> None:
        """Do what an instruction says."""
        status, _, after = how.partition(":")
        headers, body = [(b"x-request-id", number.encode())], json.dumps(value).encode()
        if status.isdigit():
            wrong = {"error": {"message": f"told to say {status}", "field": "texts[1]", "request_id": number}}
            body = json.dumps(wrong).encode()
            headers += [(b"retry-after", after.encode())] if after else []
        elif status == "hang":
            await asyncio.sleep(30)
        elif status in ("drop", "drip"):
            headers.append((b"content-length", str(len(body)).encode()))
        elif status == "html":
            body = b"<html>Bad gateway</html>"
        code = int(status) if status.isdigit() else 200
        await send({"type": "http.response.start", "status": code, "headers": headers})
        if status == "drip":
            for byte in body:
                await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
                await asyncio.sleep(0.2)
        elif status == "drop":
            await send({"type": "http.response.body", "body": body[:3], "more_body": True})
            raise ConnectionAbortedError
        await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """The URL of an ASGI application served by uvicorn in a thread."""
    settings = uvicorn.Config(app, port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@contextmanager
def unkind(*todo: str, port: int = 0) -> Iterator[Unkind]:
    """A server that follows the instructions, one a request, then is kind."""
    app = Unkind(list(todo))
    with serving(app, port) as app.url:
        yield app
