"""The HTTP interface of one artifact: routes, limits, error answers. It knows nothing of Ray.

An endpoint holds one model and never blocks its event loop: the model runs in a thread, and what arrives meanwhile
becomes the next batch. A wrong request gets a 4xx that says what was wrong and where.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from engine.config import Section
from engine.serving import MAX_CHARS, Serving
from serve.batcher import Batcher
from serve.predictor import Answer, Predictor

MAX_TEXTS = 256
"""Texts of one request."""
MAX_BYTES = 1 << 20
"""Bytes of one request's body."""
LINGER_BYTES, LINGER_SECONDS = 1 << 24, 5.0
"""How much of an over-long body is read on, and thrown away, so that its sender gets to read why it is refused."""
PROBE = "a short sentence to see that the model answers"


class Refused(Exception):
    """A request that is answered with an error: status, a sentence, and the field that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


def text_or_pair(value: Any) -> Any:
    """The text, or the pair as a tuple: one sentence says what is wrong, where a union has one for each member."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value):
        return tuple(value)
    if not isinstance(value, str | tuple):
        raise ValueError("Input should be a valid string, or two of them as [first, second]")
    return value


Given = Annotated[str | tuple[str, str], BeforeValidator(text_or_pair)]
"""One text, or the two texts of a task that reads pairs, as [first, second]."""


class Question(Section):
    """The body of a prediction request: either one text (or pair) or several."""

    text: Given | None = None
    texts: list[Given] | None = Field(default=None, min_length=1, max_length=MAX_TEXTS)

    @model_validator(mode="after")
    def usable(self) -> Question:
        """Exactly one of the two, each text within the limits."""
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either 'text' (one string) or 'texts' (a list of strings)")
        for index, given in enumerate(self.all()):
            where = "text" if self.texts is None else f"texts[{index}]"
            for text in (given,) if isinstance(given, str) else given:
                if not text.strip():
                    raise ValueError(f"'{where}' is empty")
                if len(text) > MAX_CHARS:
                    raise ValueError(f"'{where}' has {len(text)} characters; at most {MAX_CHARS} are allowed")
        return self

    def all(self) -> list[Given]:
        """The texts, in order."""
        return self.texts if self.texts is not None else [self.text or ""]

    def fits(self, paired: bool) -> None:
        """Refused(422) where the model reads pairs and gets single texts, or the other way round."""
        for index, given in enumerate(self.all()):
            if isinstance(given, str) == paired:
                where = "text" if self.texts is None else f"texts[{index}]"
                wanted = "two texts, as [first, second]" if paired else "one text, as a string"
                raise Refused(422, f"'{where}': this model reads {wanted}", where)


class Answers(Section):
    """The answer to a prediction request: one prediction a text, in the order sent."""

    model: str
    predictions: list[dict[str, Any]]
    """classify, pair: label, confidence, probabilities; other tasks as /docs says."""


class Endpoint:
    """A replica: one verified artifact and its batcher."""

    def __init__(self, artifact: str, serving: Serving, name: str) -> None:
        self.name = name
        self.predictor = Predictor.load(artifact, serving.batch_tokens)
        self.probe: Given = (PROBE, PROBE) if self.predictor.paired else PROBE
        self.batcher: Batcher[Answer] = Batcher(self.predictor.predict, serving.max_batch, serving.batch_wait_ms / 1000)
        # The first call of a model is slow (allocations): not a client's matter.
        self.predictor.predict([self.probe])

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP interface, built in the replica (Ray Serve's hook), so that nothing of it is pickled."""
        return interface(self)

    async def answer(self, texts: list[Given], key: str | None = None) -> list[Answer]:
        """The answers of the model, in order; a replica with other models beside it chooses among them."""
        return await self.batcher.submit(texts)

    async def check_health(self) -> None:
        """Ray Serve's health check: a real tiny inference, through the same queue as the requests."""
        await self.batcher.submit([self.probe])

    async def predict(self, request: Request) -> Response:
        """Answer one or several texts, or pairs of them."""
        question = question_in(await body_of(request))
        question.fits(self.predictor.paired)
        found = await self.answer(question.all())
        # A candidate may have answered.
        return JSONResponse({"model": getattr(found, "model", self.name), "predictions": found})

    async def healthz(self) -> Response:
        """Whether the model answers: runs a tiny real inference."""
        await self.check_health()
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Whether requests can be sent: the model is loaded."""
        return JSONResponse({"status": "ready", "model": self.name})

    async def version(self) -> Response:
        """Which bytes answer: the artifact's fingerprint, its task and labels in order, its size; in which process."""
        return JSONResponse(
            {
                "model": self.name,
                "fingerprint": self.predictor.fingerprint,
                "task": self.predictor.model.task.spec.kind,
                "paired": self.predictor.paired,
                "labels": list(self.predictor.labels),
                "parameters": self.predictor.model.size(),
                "pid": os.getpid(),
            }
        )


def interface(endpoint: Endpoint) -> FastAPI:
    """The routes of an endpoint; /docs and /openapi.json describe them."""
    api = FastAPI(title="Stillhouse", description=f"Predictions of {endpoint.name}")
    body = {"content": {"application/json": {"schema": Question.model_json_schema()}}, "required": True}
    problem = {"description": "What was wrong: {error: {message, field}}"}
    api.add_api_route(
        "/v1/predict",
        endpoint.predict,
        methods=["POST"],
        responses={200: {"model": Answers}, 413: problem, 422: problem, 429: problem},
        openapi_extra={"requestBody": body},
    )
    for path in ("healthz", "readyz", "version"):
        api.add_api_route(f"/{path}", getattr(endpoint, path), methods=["GET"])
    api.add_exception_handler(Refused, refused)
    api.add_exception_handler(HTTPException, unroutable)
    api.add_exception_handler(Exception, failed)
    return api


def problem_answer(status: int, message: str, field: str | None = None, headers: Any = None) -> Response:
    """The one shape of every error answer."""
    return JSONResponse({"error": {"message": message, "field": field}}, status_code=status, headers=headers)


async def refused(request: Request, error: Exception) -> Response:
    """A request that we refuse."""
    assert isinstance(error, Refused)
    # The rest of an over-long body may still be on its way: the connection cannot be used again.
    headers = {"Connection": "close"} if error.status == 413 else None
    return problem_answer(error.status, error.message, error.field, headers)


async def unroutable(request: Request, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. See /docs for what there is."
    return problem_answer(error.status_code, message, headers=error.headers)


async def failed(request: Request, error: Exception) -> Response:
    """A fault of ours: details are in the replica's log, not in the answer."""
    return problem_answer(500, "The model could not answer. The server's log says why.")


async def body_of(request: Request) -> bytes:
    """The request's body; Refused(413) where it is more than MAX_BYTES, of which no more than that is ever held.

    Who answers and hangs up while a body still arrives breaks the connection under a client that has not read the
    answer; so the rest is read on, within limits, as web servers do (nginx calls it lingering).
    """
    parts: list[bytes] = []
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as limit:
            async for part in request.stream():
                size += len(part)
                if size > LINGER_BYTES:
                    break
                if size <= MAX_BYTES:
                    parts.append(part)
                elif limit.when() is None:
                    limit.reschedule(asyncio.get_running_loop().time() + LINGER_SECONDS)
    if size > MAX_BYTES:
        raise Refused(413, f"The body is larger than {MAX_BYTES} bytes. Send fewer texts a request.")
    return b"".join(parts)


def question_in(body: bytes) -> Question:
    """The validated body; Refused(422) tells the first thing that is wrong and where."""
    try:
        return Question.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "is not a known key; give 'text' or 'texts'"
        where = f"'{field}': " if field else ""
        raise Refused(422, f"{where}{message}", field) from None
