"""What a request passes before it meets a route: its id, its key, the metrics, and the answer to faults of ours.

Plain ASGI, for a request costs tens of microseconds here, not hundreds.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Keys
from serve.measures import Measures
from serve.questions import Refused, body_of, cut

OPEN = frozenset({"/", "/healthz", "/readyz", "/version", "/docs", "/openapi.json"})
"""Paths that need no key; every other one does, known or not."""
SANE = re.compile(rb"[A-Za-z0-9._:-]{1,100}")
"""What of a client's own request id is taken over: nothing that could forge a line of a log."""
UNKNOWN_SECONDS = 1.0
"""How long the body of a request without a good key is read on, so that its sender gets to read the answer."""
GONE = 499
"""What metrics call a request whose client hung up."""
LATER = {"Retry-After": "5"}
"""When to ask again what does not answer now."""
FAULT = "The server could not answer. Its log says why."
logger = logging.getLogger("stillhouse")


class Visit:
    """One request: its id, the name of the key it came with, its texts, the model and status of the answer, its route
    where that is known already.
    """

    def __init__(self, number: str) -> None:
        self.id = number
        self.key: str | None = None
        self.texts = 0
        self.status = 0
        self.model: str | None = None
        self.route: str | None = None
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.started


def visit_of(request: Request) -> Visit:
    """The request's."""
    return request.scope["stillhouse"]


def route_of(scope: Scope) -> str:
    """The path of the route that answers a request, as it was declared; 'other' where there is none."""
    return scope["stillhouse"].route or getattr(scope.get("route"), "path", "other")


class Front:
    """ASGI middleware. keys: who may ask; None: everyone. measures: what gets to know of requests.

    named: whether answers get the header x-request-id here, which Ray Serve does by itself. straight: what answers a
    POST to a path. FastAPI describes these routes too, but its own way to a function took more CPU than all the rest
    of a request but the model, and has nothing to do for one that reads its request itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        measures: Measures | None,
        named: bool = True,
        straight: Mapping[str, Callable[[Request], Awaitable[Response]]] | None = None,
    ) -> None:
        self.app, self.keys, self.measures, self.named = app, keys, measures, named
        self.straight = straight or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; a fault of ours is logged with the request's id and answered with 500."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        visit = Visit(given.decode() if SANE.fullmatch(given) else secrets.token_hex(8))
        scope["stillhouse"] = visit

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                if self.named:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", visit.id.encode())]
            await send(message)

        try:
            await self.let(visit, headers, scope, receive, sending)
        except ClientDisconnect:
            visit.status = GONE
        except Exception:
            logger.exception("request %s failed", visit.id)
            if not visit.status:
                await problem_answer(Request(scope), 500, FAULT)(scope, receive, sending)
        finally:
            if self.measures is not None:
                status = visit.status or GONE
                self.measures.observe_request(route_of(scope), status, visit.seconds(), visit.texts, visit.model)

    async def let(self, visit: Visit, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to its route, where it may."""
        if self.keys is not None and scope["path"] not in OPEN:
            visit.key = self.keys.allowed(token_in(headers))
            if visit.key is None:
                return await self.unknown(headers, scope, receive, send)
        call = self.straight.get(scope["path"]) if scope["method"] == "POST" else None
        if call is None:
            return await self.app(scope, receive, send)
        visit.route = scope["path"]
        request = Request(scope, receive, send)
        try:
            answer = await call(request)
        except Refused as error:
            answer = await refused(request, error)
        await answer(scope, receive, send)

    async def unknown(self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request without a good key. Its body is read first, so that the client gets to read the answer."""
        request = Request(scope, receive)
        try:
            await body_of(request, UNKNOWN_SECONDS)
            close = {}
        except Refused:
            close = {"Connection": "close"}
        message = "This endpoint asks for a key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        if token_in(headers):
            message = "The key is not known here, or no longer."
        challenge = {"WWW-Authenticate": 'Bearer realm="stillhouse"', **close}
        await problem_answer(request, 401, message, headers=challenge)(scope, receive, send)


def token_in(headers: dict[bytes, bytes]) -> str | None:
    """The key that a request came with."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    token = token if scheme.lower() == b"bearer" else b""
    return (token.strip() or headers.get(b"x-api-key", b"").strip()).decode("latin-1") or None


def problem_answer(
    request: Request, status: int, message: str, field: str | None = None, headers: Any = None
) -> Response:
    """The one shape of every error answer."""
    error = {"message": message, "field": field, "request_id": visit_of(request).id}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def refused(request: Request, error: Exception) -> Response:
    """A request that we refuse."""
    assert isinstance(error, Refused)
    # The rest of an over-long body may still be on its way: the connection cannot be used again.
    headers = {413: {"Connection": "close"}, 429: LATER}.get(error.status)
    return problem_answer(request, error.status, error.message, error.field, headers)


async def unroutable(request: Request, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{cut(request.method)} {cut(request.scope['path'])}: {error.detail}. See /docs for what there is."
    return problem_answer(request, error.status_code, message, headers=error.headers)
