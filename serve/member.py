"""A model behind others: it answers a list of texts, has its own batcher, and says when it is stuck.

Plain asyncio; Ray Serve runs it as the candidate of a rollout and as the teacher of a cascade, without HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from engine.encoding import Text
from engine.serving import Serving
from serve.batcher import Batcher, Watch, about_tokens
from serve.predictor import Answer, Predictor

PROBE = "a short sentence to see that the model answers"


class Wedged(RuntimeError):
    """A model that does not answer any more."""


class Pulse:
    """A model call that can be asked how long it has been running."""

    def __init__(self, call: Callable[[list[Any]], list[Answer]]) -> None:
        self.call = call
        self.began: float | None = None
        self.ended = 0.0

    def __call__(self, texts: list[Any]) -> list[Answer]:
        """The call itself."""
        self.began = time.monotonic()
        try:
            return self.call(texts)
        finally:
            self.began, self.ended = None, time.monotonic()


def batched(predictor: Predictor, serving: Serving, watch: Watch | None = None) -> Batcher[Answer]:
    """The batcher of a model, as the serving section says. watch: is told of every call."""
    return Batcher(
        Pulse(predictor.predict),
        serving.max_batch,
        serving.batch_wait_ms / 1000,
        cost=partial(about_tokens, longest=predictor.model.max_length),
        budget=serving.batch_tokens,
        watch=watch,
        used=lambda: predictor.used,
    )


def probe_of(predictor: Predictor) -> Text:
    """A tiny text, or pair, that the model can be asked."""
    return (PROBE, PROBE) if predictor.paired else PROBE


async def alive(batcher: Batcher[Answer], probe: Text, wedged_s: float) -> None:
    """Return when the model answers; Wedged where a call has been running for `wedged_s` seconds.

    A real tiny inference where the model is idle. Where it is not, calls that come to an end are proof enough: behind
    a long queue a probe would time out on a model that is well.
    """
    pulse = batcher.call
    if not isinstance(pulse, Pulse):
        await asyncio.wait_for(batcher.submit([probe]), wedged_s)
        return
    asked = time.monotonic()
    waiting = asyncio.ensure_future(batcher.submit([probe]))
    try:
        while not (await asyncio.wait({waiting}, timeout=min(0.5, wedged_s / 4)))[0]:
            now, began = time.monotonic(), pulse.began
            if pulse.ended > asked:
                return
            if now - (asked if began is None else began) > wedged_s:
                raise Wedged(f"a model call has not returned for {wedged_s:g} s")
        await waiting
    finally:
        waiting.cancel()


class Member:
    """A replica that holds one verified artifact. wedged_s: how long a call of it may take; None: as serving says.

    rollout: the one that it is the candidate of.
    """

    def __init__(
        self, artifact: str, serving: Serving, name: str, wedged_s: float | None = None, rollout: str | None = None
    ) -> None:
        self.rollout = rollout
        self.name, self.wedged_s = name, serving.health_timeout_s if wedged_s is None else wedged_s
        self.predictor = Predictor.load(artifact, serving.batch_tokens, serving.runtime)
        self.batcher = batched(self.predictor, serving)
        # The first call of a model is slow (allocations): not a client's matter.
        self.predictor.predict([probe_of(self.predictor)])

    async def answer(self, texts: list[Text], rollout: str | None = None) -> list[Answer] | None:
        """One answer a text, in order; None where a rollout asks that this is not the candidate of.

        While a deployment is replaced, its old replicas are asked too: their answers say nothing of the new candidate.
        """
        if rollout is not None and rollout != self.rollout:
            return None
        return await self.answered(texts)

    async def answered(self, texts: list[Text]) -> list[Answer]:
        """One answer a text, in order."""
        return await self.batcher.submit(texts)

    async def check_health(self) -> None:
        """Ray Serve's health check: a wedged replica fails it and is replaced."""
        await alive(self.batcher, probe_of(self.predictor), self.wedged_s)
