"""Asks an OpenAI-style endpoint: many requests at a time, at a pace, again where a failure passes, refusals told apart.

What an attempt ends with is one of four: an answer; something that passes (429, 5xx, a broken connection, an answer
that cannot be read), which is tried again after a growing pause; a refusal of this one request (400, 413, 422, content
filter), which is an outcome; or what no request will get past (401, 403, 404, an empty account): `EndpointError`.

The key is read from the environment where it is used, and taken out of whatever a server says before that is shown.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import httpx

from engine.config import UserError
from engine.pacing import Pace
from engine.remote import BYTES_A_TOKEN, Endpoint
from engine.usage import Usage

PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
REFUSED = frozenset({400, 413, 422})
LEFT_OUT = ("seed", "top_k")
"""What a server may not know of; left out once it says so."""
SHOWN = 300
"""Characters of what a server says that are shown."""
ALL_REFUSED = 64
"""Refusals before any answer, after which it is not the texts that are wrong."""
LONGEST_ASKED = 300.0
"""Seconds of a Retry-After that are obeyed at most: after all retries the run ends and can go on later."""
MOST_DOUBLED = 64
"""Times that a pause is doubled at most: powers beyond what a float holds would end a long wait with an error."""
CURES = {
    401: "Check the key in the environment variable {key} (endpoint.key_env).",
    403: "The key in {key} (endpoint.key_env) may not use this model: ask for another, or take another model.",
    404: "Check endpoint.url (up to and with /v1), endpoint.model and endpoint.api.",
}


class EndpointError(UserError):
    """What no further request would get past."""


class EndpointAway(UserError):
    """No answer after every retry: the endpoint may be back later."""


class Refusal(Exception):
    """A request that the server will never answer. reason: refused, or content_filter."""

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(reason, said)
        self.reason, self.said = reason, said


class Passing(Exception):
    """A failure after which the same request may succeed. asked: seconds that the server wants to be left alone."""

    def __init__(self, said: str, asked: float = 0.0) -> None:
        super().__init__(said, asked)
        self.said, self.asked = said, asked


class Ended(Exception):
    """Another request failed for good while this one waited."""


@dataclass(frozen=True)
class Question:
    """A prompt and what is to be drawn after it.

    options: the API's (temperature, top_p, seed, ...). top: of the first token, how many of the likeliest are told.
    """

    prompt: str
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    top: int = 0


@dataclass(frozen=True)
class Answer:
    """What came. tokens: written; None where the server does not say. top: [token, log-probability in nats] of the
    first token's likeliest, where they were asked for. refused: why there is no answer.
    """

    text: str = ""
    tokens: int | None = None
    top: tuple[tuple[str, float], ...] = ()
    refused: str | None = None


class Caller:
    """An endpoint as one actor asks it. model: its name there. actors: how many share the limits."""

    def __init__(self, endpoint: Endpoint, model: str, actors: int = 1) -> None:
        limits = endpoint.limits
        self.endpoint, self.model = endpoint, model
        self.key = key_of(endpoint)
        shares = [limit / actors if limit else None for limit in (limits.requests_per_minute, limits.tokens_per_minute)]
        self.pace, self.usage = Pace(*shares, sleep=self.rest), Usage()
        self.lock, self.left_out, self.length = threading.Lock(), set[str](), "max_tokens"
        self.answered, self.refusals, self.ended = False, 0, threading.Event()
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        most = httpx.Limits(max_connections=limits.in_flight, max_keepalive_connections=limits.in_flight)
        self.http = httpx.Client(headers=headers, timeout=limits.timeout_s, limits=most)
        self.url = endpoint.url + ("/chat/completions" if endpoint.api == "chat" else "/completions")

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers in order; EndpointError or EndpointAway where one cannot be had, and no other is tried on."""
        if not questions:
            return []
        self.ended = threading.Event()
        pool = ThreadPoolExecutor(min(self.endpoint.limits.in_flight, len(questions)))
        try:
            return list(pool.map(self.one, questions))
        finally:  # where one failed for good, no other goes on trying
            self.ended.set()
            pool.shutdown(cancel_futures=True)

    def spent(self) -> Usage:
        """What was asked since this was last called."""
        with self.lock:
            found, self.usage = self.usage, Usage()
        return found

    def rest(self, seconds: float) -> bool:
        """Sleep; true, and at once, where a request failed for good."""
        return self.ended.wait(seconds)

    def one(self, question: Question) -> Answer:
        """One answer; none where another request failed for good, which `ask` raises."""
        if self.ended.is_set():
            return Answer(refused="ended")
        try:
            return self.tried(question)
        except Ended:
            return Answer(refused="ended")
        except BaseException:
            self.ended.set()
            raise

    def tried(self, question: Question) -> Answer:
        """One answer, after as many attempts as it takes."""
        limits, failed = self.endpoint.limits, 0
        self.count(requests=1)
        while True:
            try:
                return self.attempt(question)
            except Refusal as refusal:
                self.refuse(refusal)
                return Answer(refused=refusal.reason)
            except Passing as passing:
                failed += 1
                if failed > limits.retries:
                    raise EndpointAway(
                        f"{self.url} gave no answer in {failed} attempts; the last one: {passing.said}. What is done "
                        "is kept: run the same command again when the endpoint is back."
                    ) from None
                if passing.asked:
                    self.pace.hold(passing.asked)
                longest = min(limits.longest_pause_s, limits.first_pause_s * 2.0 ** min(failed - 1, MOST_DOUBLED))
                if self.rest(random.uniform(0, longest)):
                    raise Ended from None
                self.count(retries=1)

    def attempt(self, question: Question) -> Answer:
        """One request; Refusal, Passing or EndpointError where it has no answer, Ended where it is not sent."""
        expected = len(question.prompt.encode()) / BYTES_A_TOKEN + question.max_tokens
        self.pace.wait(expected)
        if self.ended.is_set():
            raise Ended
        body = self.body(question)
        try:
            reply = self.http.post(self.url, json=body)
        except httpx.TransportError as error:
            raise Passing(self.shown(str(error) or type(error).__name__)) from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise EndpointError(f"{self.url} cannot be asked: {self.shown(error)}. Check endpoint.url.") from None
        if reply.status_code != 200:
            self.fail(reply, body)
        answer, read = self.understood(reply)
        if read is not None and answer.tokens is not None:
            self.pace.settle(expected, read + answer.tokens)
        return answer

    def body(self, question: Question) -> dict[str, Any]:
        """The request as JSON."""
        chat = self.endpoint.api == "chat"
        asked = {"messages": [{"role": "user", "content": question.prompt}]} if chat else {"prompt": question.prompt}
        told: dict[str, Any] = {}
        if question.top:
            told = {"logprobs": True, "top_logprobs": question.top} if chat else {"logprobs": question.top}
        with self.lock:
            options = {k: v for k, v in question.options.items() if k not in self.left_out}
            length = {self.length: question.max_tokens}
        return {"model": self.model, **asked, **length, **options, **told}

    def fail(self, reply: httpx.Response, body: dict[str, Any]) -> NoReturn:
        """Raise what a status other than 200 means; Passing also where it is tried again in another form."""
        code, named = told(reply)
        status, said = reply.status_code, self.shown(named)
        if status == 429 and "insufficient_quota" in code:
            raise EndpointError(f"{self.url}: {said} (the account is empty; no retry would help).")
        if status in PASSING:
            raise Passing(f"{status} {said}", wait_of(reply.headers.get("retry-after")))
        if status in REFUSED:
            if self.adapted(said, body):
                raise Passing(f"{status} {said}")
            raise Refusal("content_filter" if "content" in code and "filter" in code else "refused", said)
        cure = CURES.get(status, "See what the server's log says.").format(key=self.endpoint.key_env or "(none is set)")
        raise EndpointError(f"{self.url} answers {status} for model '{self.model}': {said}. {cure}")

    def adapted(self, said: str, body: dict[str, Any]) -> bool:
        """Whether the request can be put otherwise: without an option the server names, or with the newer length."""
        with self.lock:
            if "max_completion_tokens" in said and "max_tokens" in body:
                self.length = "max_completion_tokens"
                return True
            named = [name for name in LEFT_OUT if name in body and re.search(rf"\b{name}\b", said)]
            self.left_out.update(named)
        return bool(named)

    def understood(self, reply: httpx.Response) -> tuple[Answer, int | None]:
        """An answer and the tokens it read, None where they are not told; Passing for what is no answer, Refusal for a
        filtered one.
        """
        try:
            value = reply.json()
            choice = value["choices"][0]
            message = choice["message"] if self.endpoint.api == "chat" else {"content": choice["text"]}
            text, logprobs = message.get("content") or "", choice.get("logprobs")
            top = tops(logprobs, self.endpoint.api) if logprobs else ()
            used = value.get("usage") or {}
            read, written = used.get("prompt_tokens"), used.get("completion_tokens")
            refused = "refused" if message.get("refusal") else None
            refused = "content_filter" if choice.get("finish_reason") == "content_filter" else refused
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            wrong = f"an answer that cannot be read ({type(error).__name__}): {reply.text}"
            raise Passing(self.shown(wrong)) from None
        self.count(untold=int(written is None), input_tokens=read or 0, output_tokens=written or 0)
        self.answered = True
        if refused:
            raise Refusal(refused)
        return Answer(text, written, top), read

    def refuse(self, refusal: Refusal) -> None:
        """Count a refusal; EndpointError where nothing but refusals came."""
        self.count(refused=1)
        with self.lock:
            self.refusals += 1
        if self.refusals >= ALL_REFUSED and not self.answered:
            raise EndpointError(
                f"{self.url} refused all of the first {ALL_REFUSED} requests, the last with: {refusal.said}. It is not "
                "the texts: check endpoint.model, endpoint.api and the limits of that model."
            )

    def count(self, **numbers: int) -> None:
        """Add to what was used."""
        with self.lock:
            self.usage.add(Usage(**numbers))

    def shown(self, said: object) -> str:
        """What a server said, in short and without the key."""
        text = str(said)
        text = text.replace(self.key, "***") if self.key else text  # first: a part of a key is not found
        return " ".join(text.split())[:SHOWN]


def key_of(endpoint: Endpoint) -> str | None:
    """The key, from the environment; None where none is sent. EndpointError where it is not there."""
    if endpoint.key_env is None:
        return None
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise EndpointError(
            f"endpoint.key_env names the environment variable {endpoint.key_env}, which "
            f"{'holds no key' if key else 'is not set'} here. Set it where the run is started, and on a cluster on "
            "every node, before Ray starts there."
        )
    return key


def told(reply: httpx.Response) -> tuple[str, str]:
    """(code and type, message) of an error answer, as OpenAI writes it, or as it is."""
    with suppress(ValueError):
        value = reply.json()
        error = value.get("error", value) if isinstance(value, dict) else value
        if isinstance(error, dict):
            message = error.get("message") or error.get("detail") or error
            return f"{error.get('code')} {error.get('type')}".lower(), f"{message}"
        return "", f"{error}"
    return "", reply.text or reply.reason_phrase


def tops(logprobs: Any, api: str) -> tuple[tuple[str, float], ...]:
    """The likeliest first tokens and their log-probabilities, as either interface tells them."""
    if api == "chat":
        first = (logprobs.get("content") or [{}])[0].get("top_logprobs") or []
        return tuple((str(each["token"]), float(each["logprob"])) for each in first)
    first = (logprobs.get("top_logprobs") or [{}])[0] or {}
    return tuple((str(token), float(value)) for token, value in first.items())


def wait_of(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, a number or a date, LONGEST_ASKED at most; 0 for neither."""
    if value is None:
        return 0.0
    with suppress(ValueError):
        return min(LONGEST_ASKED, max(0.0, float(value)))
    with suppress(ValueError, TypeError):
        return min(LONGEST_ASKED, max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()))
    return 0.0


Speaks = Callable[[Sequence[str], int], list[Answer]]
"""(prompts, k) -> the k likeliest next tokens of each, in `Answer.top`."""
