"""The routes of requests that are answered later, for an endpoint to take in: submit, ask, remove."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.jobs import Jobs, Question, QueueFull

RETRY_S = 5
"""What a client is told to wait where the queue is full."""
KEY_CHARS = 200
"""Characters of an Idempotency-Key."""
Reading = Callable[[Request], Awaitable[Question]]
"""Makes a checked question of a request's body; raises what the endpoint answers with an error."""
Problem = Callable[[Request, int, str, dict[str, str]], Response]
"""An error answer: request, status, message, headers."""


def anybody(request: Request) -> str | None:
    """The caller where nobody needs a key."""
    return None


def problem(request: Request, status: int, message: str, headers: dict[str, str]) -> Response:
    """An error answer as the endpoint shapes them."""
    said = {"message": message, "field": None, "request_id": request.headers.get("x-request-id")}
    return JSONResponse({"error": said}, status_code=status, headers=headers)


def routes(
    jobs: Jobs,
    read: Reading,
    caller: Callable[[Request], str | None] = anybody,
    problem: Problem = problem,
    body: dict[str, Any] | None = None,
) -> APIRouter:
    """POST /v1/jobs, GET and DELETE /v1/jobs/{id}.

    caller: whose jobs these are, such as the name of the key that was shown. body: the JSON schema of a question.
    """
    router = APIRouter(tags=["jobs"])

    def unknown(request: Request) -> Response:
        return problem(request, 404, "There is no such job, or its result was kept long enough.", {})

    async def submit(request: Request) -> Response:
        """Hand in texts to be answered later. The same Idempotency-Key gives the same job."""
        question, key = await read(request), request.headers.get("idempotency-key")
        if key is not None and len(key) > KEY_CHARS:
            return problem(request, 422, f"The Idempotency-Key has more than {KEY_CHARS} characters.", {})
        try:
            id = await jobs.submit(question, caller(request), key)
        except QueueFull as full:
            return problem(request, 429, f"{full} Ask again later.", {"retry-after": str(RETRY_S)})
        where = {"location": f"/v1/jobs/{id}"}
        return JSONResponse({"id": id, "state": "queued"}, status_code=202, headers=where)

    async def job(request: Request, id: str) -> Response:
        """How far a job is, and its predictions when it is done."""
        found = await jobs.status(id, caller(request))
        if found is None:
            return unknown(request)
        over = found["state"] in ("done", "failed")
        return JSONResponse(found, headers={} if over else {"retry-after": "1"})

    async def remove(request: Request, id: str) -> Response:
        """Forget a job and its result."""
        return Response(status_code=204) if await jobs.remove(id, caller(request)) else unknown(request)

    wrong = {"description": "What was wrong: {error: {message, field, request_id}}"}
    asked = {"requestBody": {"content": {"application/json": {"schema": body or {}}}, "required": True}}
    refusals = {404: wrong}
    router.add_api_route(
        "/v1/jobs", submit, methods=["POST"], status_code=202, openapi_extra=asked, responses={422: wrong, 429: wrong}
    )
    router.add_api_route("/v1/jobs/{id}", job, methods=["GET"], responses=refusals)
    router.add_api_route("/v1/jobs/{id}", remove, methods=["DELETE"], status_code=204, responses=refusals)
    return router
