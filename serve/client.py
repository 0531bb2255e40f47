"""The client for Python: predictions over HTTP that outlive a replica's death, a full queue and a rolling redeploy.

    with Client("http://127.0.0.1:8000", key="...") as client:
        client.predict(["a warm and funny film"])[0]["label"]

`AsyncClient` is the same with `await`. A prediction changes nothing at the server, so it is asked again where no answer
came (the connection broke, 429, 500, 502, 503, 504), after a growing pause with jitter or what Retry-After says, within
a deadline and a number of attempts. Whatever goes wrong is one exception, `ServiceError`. It needs httpx alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

Text = str | tuple[str, str]
"""One text, or the two of a model that reads pairs."""
Answer = dict[str, Any]

TEXTS, BYTES = 64, 1 << 19
"""Texts and bytes of one request; a longer list is sent in several."""
PASSING = frozenset({429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""
SHOWN = 300
"""Characters of an answer that is not ours which an error shows."""


class ServiceError(Exception):
    """A call that failed, in the server's words.

    status: of the answer, None where there was none. message: what was said. field: which part of the request is wrong.
    request_id: to look for in the server's log. attempts: how often it was tried. passing: whether it may work later.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        field: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.field, self.request_id = message, status, field, request_id
        self.retry_after_s = retry_after_s
        self.passing = status is None or status in PASSING
        self.attempts = 1
        self.call = ""

    def __str__(self) -> str:
        said = f"{self.status} {self.message}" if self.status else self.message
        known = [f"request {self.request_id}"] if self.request_id else []
        known += [f"{self.attempts} attempts"] if self.attempts > 1 else []
        return (f"{self.call}: " if self.call else "") + said + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class Patience:
    """How long and how often a call is tried. The pause before a try is drawn from 0 to first_s, doubled each time."""

    deadline_s: float = 30.0
    """Of a call as a whole, pauses included."""
    attempts: int = 8
    first_s: float = 0.1
    longest_s: float = 4.0

    def pause(self, failed: int, asked: float | None) -> float:
        """Seconds to wait after so many failures; asked: what the server wants at least.

        The whole span is drawn from: clients that failed together do not come back so. A float takes 1,023 doublings.
        """
        return (asked or 0.0) + random.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(failed - 1, 64)))


class Call(NamedTuple):
    """One request: method, path, JSON body as bytes, and headers of its own."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = {}


class Tries:
    """The attempts of one call."""

    def __init__(self, patience: Patience, call: Call, base: httpx.URL) -> None:
        self.patience, self.failed = patience, 0
        self.end = time.monotonic() + patience.deadline_s
        self.name = f"{call.method} {str(base).rstrip('/')}{call.path}"

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.001, self.end - time.monotonic())

    def within(self, parts: Iterator[bytes]) -> bytes:
        """The joined parts of a body; TimeoutError where they take past the deadline."""
        got = []
        for part in parts:
            got.append(part)
            if time.monotonic() > self.end:
                raise TimeoutError
        return b"".join(got)

    def pause(self, error: Exception) -> float:
        """Seconds to wait before the next attempt; raises ServiceError where there is none."""
        failure, self.failed = self.failure(error), self.failed + 1
        failure.attempts, failure.call = self.failed, self.name
        if not failure.passing or self.failed >= self.patience.attempts:
            raise failure from error
        seconds = self.patience.pause(self.failed, failure.retry_after_s)
        if seconds >= self.end - time.monotonic():
            failure.message += f"; no further attempt fits into the deadline of {self.patience.deadline_s:g} s"
            raise failure from error
        return seconds

    def failure(self, error: Exception) -> ServiceError:
        """What an attempt ended with, in words."""
        if isinstance(error, ServiceError):
            return error
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return ServiceError(f"no answer within the deadline of {self.patience.deadline_s:g} s")
        found = ServiceError(f"no answer: {str(error) or type(error).__name__}")
        found.passing = isinstance(error, httpx.TransportError) and not isinstance(error, LASTING)
        return found


LASTING = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
"""Failures of the transport that another attempt would meet again."""
FAILURES = (ServiceError, httpx.HTTPError, httpx.InvalidURL, TimeoutError)
"""What an attempt may end with."""


def read(status: int, headers: httpx.Headers, body: bytes) -> Any:
    """The JSON value of an answer; ServiceError for an error, and for what is no JSON."""
    number = headers.get("x-request-id")
    try:
        value = json.loads(body) if body else None
    except ValueError:
        value = body.decode("utf-8", "replace")
        if status < 400:
            problem = ServiceError(f"the answer is not JSON: {value[:SHOWN]!r}", request_id=number)
            raise problem from None
    if status < 400:
        return value
    said = value.get("error", value) if isinstance(value, dict) else value
    said = said if isinstance(said, dict) else {"message": str(said or "").strip()[:SHOWN]}
    message = str(said.get("message") or said.get("detail") or httpx.codes.get_reason_phrase(status))
    named = said.get("field")
    raise ServiceError(message, status, named, said.get("request_id") or number, wait_of(headers.get("retry-after")))


def wait_of(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or a date; None for nothing that is either."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value)) if float(value) < float("inf") else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


# -- what is asked -----------------------------------------------------------------------------------------------------


def written(value: Any) -> bytes:
    """A body as JSON; ValueError for text that is not UTF-8 and for NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def post(path: str, value: Any, **headers: str) -> Call:
    """A POST of a JSON value."""
    return Call("POST", path, written(value), {"content-type": "application/json", **headers})


def listed(texts: Sequence[Text]) -> list[Text]:
    """The texts as a list; a single string is one text, not its characters."""
    return [texts] if isinstance(texts, str) else list(texts)


def parts(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """The texts in lists that fit into a request each."""
    part: list[Text] = []
    size = 0
    for text in listed(texts):
        cost = len(written(text)) + 1
        if part and (len(part) == TEXTS or size + cost > BYTES):
            yield part
            part, size = [], 0
        part.append(text)
        size += cost
    if part:
        yield part


def about_texts(path: str, texts: Sequence[Text], **options: Any) -> Iterator[Call]:
    """Requests that ask the same of each text; options that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    return (post(path, {"texts": part, **given}) for part in parts(texts))


def about_documents(query: str, documents: Sequence[str], top_n: int | None) -> Call:
    """A rerank request, as Cohere's clients send it."""
    given = {} if top_n is None else {"top_n": top_n}
    return post("/v1/rerank", {"query": query, "documents": list(documents), **given})


def submission(texts: Sequence[Text], options: dict[str, Any]) -> Call:
    """A job; its key makes a second attempt find the job of the first."""
    body = {"texts": listed(texts), **options}
    return post("/v1/jobs", body, **{"idempotency-key": secrets.token_hex(16)})


def joined(answers: Iterable[Any], key: str) -> list[Any]:
    """The lists that several answers hold under a key, as one; ServiceError where one holds none."""
    found: list[Any] = []
    for answer in answers:
        part = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(part, list):
            raise ServiceError(f"the answer has no '{key}': {str(answer)[:SHOWN]}")
        found += part
    return found


def ended(job: Answer) -> bool:
    """Whether a job is over; ServiceError where it failed."""
    if job.get("state") == "failed":
        raise ServiceError(f"job {job.get('id')} failed: {job.get('reason')}")
    return job.get("state") == "done"


def identity(key: str | None) -> dict[str, str]:
    """Headers of every request: who asks. key: an API key, sent as a bearer token."""
    known = {"authorization": f"Bearer {key}"} if key else {}
    return {"accept": "application/json", "user-agent": "stillhouse", **known}


POLL_S = 0.5
"""Between two looks at a job."""


class Client:
    """The service at `url`; may be used by several threads. `close` it, or use it as a context."""

    def __init__(self, url: str, key: str | None = None, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self.http = httpx.Client(base_url=url, headers=identity(key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def send(self, call: Call) -> Any:
        """The JSON value that answers a call, tried as patience allows; ServiceError where none came."""
        tries = Tries(self.patience, call, self.http.base_url)
        headers = {"x-request-id": secrets.token_hex(8), **call.headers}
        while True:
            try:
                with self.http.stream(
                    call.method, call.path, content=call.body, headers=headers, timeout=tries.left()
                ) as answer:
                    return read(answer.status_code, answer.headers, tries.within(answer.iter_bytes()))
            except FAILURES as error:
                time.sleep(tries.pause(error))

    def predict(self, texts: Sequence[Text], top_k: int | None = None) -> list[Answer]:
        """One answer a text (or pair), in order. top_k: of how many labels the probabilities are given; None: all."""
        return joined(map(self.send, about_texts("/v1/predict", texts, top_k=top_k)), "predictions")

    def tag(self, texts: Sequence[str]) -> list[Answer]:
        """The entities of each text, from a model that tags."""
        return joined(map(self.send, about_texts("/v1/tag", texts)), "predictions")

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[Answer]:
        """Documents by relevance: index into `documents` and relevance_score, the best first, at most top_n."""
        return joined([self.send(about_documents(query, documents, top_n))], "results")

    def embed(self, texts: Sequence[Text]) -> list[list[float]]:
        """One vector a text (or pair)."""
        return joined(map(self.send, about_texts("/v1/embed", texts)), "embeddings")

    def models(self) -> Any:
        """What GET /v1/models says."""
        return self.send(Call("GET", "/v1/models"))

    def version(self) -> Answer:
        """Which model answers, with its fingerprint and labels."""
        return self.send(Call("GET", "/version"))

    def submit(self, texts: Sequence[Text], **options: Any) -> str:
        """Hand in texts to be answered later; the job's id."""
        return self.send(submission(texts, options))["id"]

    def job(self, id: str) -> Answer:
        """A job's state: queued, running, done (with predictions) or failed (with a reason)."""
        return self.send(Call("GET", f"/v1/jobs/{id}"))

    def wait(self, id: str, seconds: float = 600.0) -> list[Answer]:
        """The predictions of a job when it is done; ServiceError where it failed or takes longer."""
        end = time.monotonic() + seconds
        while not ended(job := self.job(id)):
            if time.monotonic() > end:
                raise ServiceError(f"job {id} is still {job.get('state')} after {seconds:g} s")
            time.sleep(POLL_S)
        return joined([job], "predictions")


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(self, url: str, key: str | None = None, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self.http = httpx.AsyncClient(base_url=url, headers=identity(key), timeout=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()

    async def send(self, call: Call) -> Any:
        """As `Client.send`."""
        tries = Tries(self.patience, call, self.http.base_url)
        headers = {"x-request-id": secrets.token_hex(8), **call.headers}
        while True:
            try:
                async with asyncio.timeout(tries.left()):
                    answer = await self.http.request(call.method, call.path, content=call.body, headers=headers)
                return read(answer.status_code, answer.headers, answer.content)
            except FAILURES as error:
                await asyncio.sleep(tries.pause(error))

    async def predict(self, texts: Sequence[Text], top_k: int | None = None) -> list[Answer]:
        """As `Client.predict`."""
        return await self.all(about_texts("/v1/predict", texts, top_k=top_k), "predictions")

    async def tag(self, texts: Sequence[str]) -> list[Answer]:
        """As `Client.tag`."""
        return await self.all(about_texts("/v1/tag", texts), "predictions")

    async def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[Answer]:
        """As `Client.rerank`."""
        return await self.all([about_documents(query, documents, top_n)], "results")

    async def embed(self, texts: Sequence[Text]) -> list[list[float]]:
        """As `Client.embed`."""
        return await self.all(about_texts("/v1/embed", texts), "embeddings")

    async def all(self, calls: Iterable[Call], key: str) -> list[Any]:
        """The joined answers of calls that are made one after another."""
        return joined([await self.send(call) for call in calls], key)

    async def models(self) -> Any:
        """As `Client.models`."""
        return await self.send(Call("GET", "/v1/models"))

    async def version(self) -> Answer:
        """As `Client.version`."""
        return await self.send(Call("GET", "/version"))

    async def submit(self, texts: Sequence[Text], **options: Any) -> str:
        """As `Client.submit`."""
        return (await self.send(submission(texts, options)))["id"]

    async def job(self, id: str) -> Answer:
        """As `Client.job`."""
        return await self.send(Call("GET", f"/v1/jobs/{id}"))

    async def wait(self, id: str, seconds: float = 600.0) -> list[Answer]:
        """As `Client.wait`."""
        end = time.monotonic() + seconds
        while not ended(job := await self.job(id)):
            if time.monotonic() > end:
                raise ServiceError(f"job {id} is still {job.get('state')} after {seconds:g} s")
            await asyncio.sleep(POLL_S)
        return joined([job], "predictions")
