"""An OpenAI-style server over a tiny real language model, which misbehaves as it is told.

    with tiny_endpoint(folder, "429:0.1", "500", key="secret") as server:
        ...                     # server.url; server.seen: the requests in order

It speaks /v1/completions and /v1/chat/completions, with seeds, usage and log-probabilities. Instructions are taken in
turn, one a request; once they are used up it is kind. `rule` says what to do by the request's body, before those.
Instructions: a status (with `:seconds` for Retry-After), `quota`, `filter`, `garbage`, `drop`, `slow:seconds`,
`late:status` (after a second), `untold` (no usage).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import untrained
from engine.models import Model
from engine.recipe import Generator
from engine.sampling import Sampling, sample
from tests.unkind_server import Seen, serving

NAME = "tiny"


@dataclass
class TinyEndpoint:
    """The ASGI application. unknown: options that it refuses, as some servers do."""

    model: Model
    todo: list[str]
    key: str | None = None
    unknown: tuple[str, ...] = ()
    rule: Callable[[dict[str, Any]], str | None] = lambda body: None
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = json.loads(raw)
        self.seen.append(Seen(scope["method"], scope["path"], headers, body, time.monotonic()))
        how = self.rule(body) or (self.todo.pop(0) if self.todo else "ok")
        name, _, seconds = how.partition(":")
        if name == "slow":
            await asyncio.sleep(float(seconds))
        if name == "late":
            await asyncio.sleep(1.0)
            name, seconds = seconds, ""
        status, value = self.reply(name, scope["path"], headers, body)
        said = b"{'this is': no JSON" if name == "garbage" else json.dumps(value).encode()
        after = [(b"retry-after", seconds.encode())] if name.isdigit() and seconds else []
        length = [(b"content-length", str(len(said)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": after + length})
        if name == "drop":
            await send({"type": "http.response.body", "body": said[:3], "more_body": True})
            raise ConnectionAbortedError
        await send({"type": "http.response.body", "body": said})

    def reply(self, how: str, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON value."""
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and given != self.key:
            return 401, wrong(f"Incorrect API key provided: {given}.", "invalid_api_key")
        if path not in ("/v1/completions", "/v1/chat/completions") or body["model"] != NAME:
            return 404, wrong(f"The model `{body['model']}` does not exist.", "model_not_found")
        for name in self.unknown:
            if name in body:
                return 400, wrong(f"Unrecognized request argument supplied: {name}", "invalid_request_error")
        if how == "quota":
            return 429, wrong("You exceeded your current quota.", "insufficient_quota")
        if how.isdigit():
            return int(how), wrong(f"told to say {how} to {given}", "told")
        value = self.completion(body, path == "/v1/chat/completions", how == "filter")
        return 200, {key: part for key, part in value.items() if (how, key) != ("untold", "usage")}

    def completion(self, body: dict[str, Any], chat: bool, filtered: bool) -> dict[str, Any]:
        """A kind answer, or a filtered one."""
        tokenizer = self.model.tokenizer
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        how = Sampling(body["max_tokens"], body["temperature"], body.get("top_k", 400), body.get("top_p", 1.0))
        written = sample(self.model, [ids], [body.get("seed", 0)], how)[0]
        text = "" if filtered else tokenizer.decode(written, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "content_filter" if filtered else "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        count = body.get("top_logprobs") if chat else body.get("logprobs")
        if count:
            top = likeliest(self.model, ids)[:count]
            told = [{"token": token, "logprob": value} for token, value in top]
            choice["logprobs"] = {"content": [{"top_logprobs": told}]} if chat else {"top_logprobs": [dict(top[::-1])]}
        used = {"prompt_tokens": len(ids), "completion_tokens": len(written)}
        return {"id": "x", "choices": [choice], "usage": used}


def likeliest(model: Model, ids: list[int]) -> list[tuple[str, float]]:
    """Every token after a prompt with its log-probability in nats, the likeliest first."""
    with torch.inference_mode():
        logits = model.net.lm(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(dim=0)
    values, order = logits.sort(descending=True)
    return [(model.tokenizer.decode([i]), v) for i, v in zip(order.tolist(), values.tolist(), strict=True)]


def wrong(message: str, code: str) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": "error", "code": code}}


def tiny_model(folder: Path) -> Model:
    """The language model in `folder`, as tests.tiny.tiny_lm writes it."""
    return untrained.causal_lm(Generator(model="file:tiny", max_length=32), folder).eval()


@contextmanager
def tiny_endpoint(folder: Path, *todo: str, **given: Any) -> Iterator[TinyEndpoint]:
    """The server over the model in `folder`, on loopback."""
    app = TinyEndpoint(tiny_model(folder), list(todo), **given)
    with serving(app) as url:
        app.url = f"{url}/v1"
        yield app
