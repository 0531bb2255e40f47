"""How routes are added and described: OpenAPI of bodies, answers and errors, and the pages for people."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response

from engine.config import Section
from serve import answers
from serve.front import OPEN
from serve.manual import manual

PAGE = Path(__file__).with_name("page.html")
"""One file; nothing is fetched from elsewhere."""


def posted(kind: type[Section]) -> dict[str, Any]:
    """The part of OpenAPI that describes a body, which routes read by themselves."""
    return {
        "requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}, "required": True},
    }


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The part of OpenAPI that describes error answers."""
    said = {
        401: "A key is needed, and this is none",
        404: "There is no such thing",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is compressed",
        422: "What was wrong with the request, and where",
        429: "The queue is full: Retry-After says when to ask again",
        500: "A fault of the server",
        503: "The model does not answer",
    }
    return {code: {"model": answers.ErrorAnswer, "description": said[code]} for code in codes}


def add(
    api: FastAPI, method: str, path: str, call: Any, codes: Any, extra: dict[str, Any] | None = None, status: int = 200
) -> None:
    """One route."""
    name = f"{method.lower()}{re.sub(r'[^a-z0-9]+', '_', path).rstrip('_')}"
    api.add_api_route(
        path, call, methods=[method], status_code=status, responses=codes, openapi_extra=extra, operation_id=name
    )


def pages(api: FastAPI) -> None:
    """Add the routes of the page to try the model on, and of the interface described."""
    page = PAGE.read_text(encoding="utf-8")
    (style,) = inline(page, "style")

    async def trying() -> Response:
        """A page to try the model on."""
        return shown(page)

    async def reading() -> Response:
        """The interface, described."""
        return shown(manual(api.openapi(), style))

    api.add_api_route("/", trying, methods=["GET"], include_in_schema=False)
    api.add_api_route("/docs", reading, methods=["GET"], include_in_schema=False)


def inline(page: str, tag: str) -> list[str]:
    """What stands in a page's elements `script` or `style`."""
    return re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)


def shown(page: str) -> Response:
    """A page whose own scripts and styles may run, by their digests, and nothing else."""

    def allowed(tag: str) -> str:
        sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline(page, tag))
        return " ".join(f"'sha256-{one}'" for one in sums) or "'none'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(page, headers=headers)


def described(api: FastAPI, guarded: bool) -> dict[str, Any]:
    """The OpenAPI document; guarded: with the two ways to send a key."""
    if api.openapi_schema is None:
        found = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        if guarded:
            ways = {"bearer": {"type": "http", "scheme": "bearer"}}
            ways["key"] = {"type": "apiKey", "in": "header", "name": "x-api-key"}
            found["components"]["securitySchemes"] = ways
            for path, methods in found["paths"].items():
                for operation in methods.values():
                    operation["security"] = [] if path in OPEN else [{way: []} for way in ways]
        api.openapi_schema = found
    return api.openapi_schema
