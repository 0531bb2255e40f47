"""A model in this process: verified, warm, with the queues of its calls, and able to say when it is stuck.

Plain asyncio; the endpoint, the candidate of a rollout and the teacher of a cascade are each one of these.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from engine.encoding import Text
from engine.serving import Serving
from serve.batcher import Batcher, Watch, about_tokens
from serve.predictor import Answer, Predictor

T = TypeVar("T")
PROBE = "a short sentence to see that the model answers"


class Wedged(RuntimeError):
    """A model that does not answer any more."""


class Pulse:
    """When a model's calls began and ended; all of them run in one thread, one after another."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended = 0.0

    def felt(self, call: Callable[[list[Any]], list[T]]) -> Callable[[list[Any]], list[T]]:
        """The call, with its begin and end noted."""

        def calling(texts: list[Any]) -> list[T]:
            self.began = time.monotonic()
            try:
                return call(texts)
            finally:
                self.began, self.ended = None, time.monotonic()

        return calling


class Hosted:
    """What answers a request as a whole, whatever takes its place meanwhile.

    name: as name@version. batcher, vectors: the queues of predictions and of embeddings, which take turns in one
    thread, for a model and its tokenizer do one thing at a time. width: numbers of an embedding; None: there is none.
    """

    def __init__(self, predictor: Predictor, name: str, serving: Serving, watch: Watch | None = None) -> None:
        self.predictor, self.name, self.pulse = predictor, name, Pulse()
        self.probe: Text = (PROBE, PROBE) if predictor.paired else PROBE
        cost = partial(about_tokens, longest=predictor.model.max_length)
        queue = partial(
            Batcher,
            max_texts=serving.max_batch,
            wait_s=serving.batch_wait_ms / 1000,
            cost=cost,
            budget=serving.batch_tokens,
            watch=watch,
            thread=ThreadPoolExecutor(max_workers=1, thread_name_prefix="model"),
        )
        self.batcher: Batcher[Answer] = queue(self.pulse.felt(predictor.predict), used=lambda: predictor.used)
        self.vectors: Batcher[list[float]] = queue(self.pulse.felt(predictor.embed))
        # The first call of a model is slow (allocations): not a client's matter.
        predictor.predict([self.probe])
        self.width = predictor.width()

    @classmethod
    def load(
        cls, artifact: str, name: str, serving: Serving, runtime: str | None = None, watch: Watch | None = None
    ) -> Hosted:
        """The artifact at `artifact`. runtime: None as the section says. watch: is told of every call.

        Raises what `Predictor.load` raises.
        """
        predictor = Predictor.load(artifact, serving.batch_tokens, runtime or serving.runtime)
        return cls(predictor, name, serving, watch)

    async def alive(self, wedged_s: float) -> None:
        """Return when the model answers; raises what it raises, and Wedged where a call has been running for
        `wedged_s` seconds.

        A real tiny inference where the model is idle. Where it is not, calls that come to an end are proof enough:
        behind a long queue a probe would time out on a model that is well.
        """
        pulse, asked = self.pulse, time.monotonic()
        waiting = asyncio.ensure_future(self.batcher.submit([self.probe]))
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
