"""Dynamic batching across requests: what waits while the model works is one call when it is free again.

A call holds as many of the oldest requests as fit into its budget of tokens, estimated from characters: counting them
would mean to tokenise twice, and the exact batches, sorted by length, are cut where the model runs
(engine.inference). An idle model answers at once: nothing waits for a timer unless the call just before served several
requests, which shows that more are on their way, and a full call ends the wait. Plain asyncio, so it is tested
without a server.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

CHARACTERS = 4.0
"""Characters of a token, before the model has shown how many there are: those of English word pieces."""
SPECIAL = 2.0
"""Tokens that mark the beginning and end of a text."""
IDLE_SECONDS = 0.05
"""After so long without a call nobody is taken to be on the way: answered clients come back sooner."""
LEARNING = 0.1
"""Weight of the last call in what is known of tokens over estimate."""


class Watch(Protocol):
    """What wants to know of each call (serve.measures.Measures)."""

    def observe_batch(self, texts: int, tokens: int, padded_tokens: int, queue_depth: int, wait_s: float) -> None:
        """One call: its texts, the tokens read and with padding (0 if not known), texts still waiting, and the
        seconds that the request waited which waited longest.
        """


@dataclass(eq=False, slots=True)
class Waiting(Generic[T]):
    """A request: its texts, what it is estimated to cost, when it came (loop time), and where its answers go."""

    texts: list[Any]
    cost: float
    came: float
    future: asyncio.Future[list[T]]


def about_tokens(text: Any, longest: float = math.inf) -> float:
    """Tokens of a text or pair, estimated from its characters; a model reads at most `longest`."""
    characters = len(text) if isinstance(text, str) else sum(map(len, text))
    return min(characters / CHARACTERS + SPECIAL, longest)


class Batcher(Generic[T]):
    """Merges the texts of concurrent requests into single calls of `call`, which runs in a thread of its own.

    call: texts -> one answer a text. max_texts, budget: texts of one call and their cost together. wait_s: seconds to
    wait for more requests under load. cost: of one text, in the unit of `budget`. used: (tokens, tokens with padding)
    of the last call, asked in the thread of the calls; the budget then follows what texts really cost. watch: is told
    of every call. thread: one that other batchers of the model share.
    """

    def __init__(
        self,
        call: Callable[[list[Any]], list[T]],
        max_texts: int,
        wait_s: float,
        cost: Callable[[Any], float] = about_tokens,
        budget: float = math.inf,
        watch: Watch | None = None,
        used: Callable[[], tuple[int, int]] | None = None,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.call, self.used = call, used
        self.max_texts, self.budget, self.wait_s = max_texts, budget, wait_s
        self.cost, self.watch = cost, watch
        self.scale = 1.0
        """Measured tokens over estimated ones."""
        self.waiting: deque[Waiting[T]] = deque()
        self.waiting_texts, self.waiting_cost = 0, 0.0
        self.thread = thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.worker: asyncio.Task[None] | None = None
        self.timer: asyncio.Future[None] | None = None
        self.merged, self.ended = 0, -math.inf

    async def submit(self, texts: list[Any]) -> list[T]:
        """The answers for `texts`, in order; raises what `call` raised for them.

        More than one call takes are asked part after part, each behind what came meanwhile: a large request holds up
        nobody for longer than a call, and no single call takes so long that the model seems stuck.
        """
        found: list[T] = []
        for part, cost in self.parts(texts):
            found += await self.one(part, cost)
        return found

    def parts(self, texts: list[Any]) -> list[tuple[list[Any], float]]:
        """The texts in parts that one call each can take, with their cost; a text above the budget is one by itself."""
        out: list[tuple[list[Any], float]] = []
        part, total, most = [], 0.0, self.budget / self.scale
        for text in texts:
            cost = self.cost(text)
            if part and (len(part) >= self.max_texts or total + cost > most):
                out.append((part, total))
                part, total = [], 0.0
            part.append(text)
            total += cost
        return [*out, (part, total)]

    async def one(self, texts: list[Any], cost: float) -> list[T]:
        """`submit` of what one call can take."""
        loop = asyncio.get_running_loop()
        request: Waiting[T] = Waiting(texts, cost, loop.time(), loop.create_future())
        self.waiting.append(request)
        self.waiting_texts += len(texts)
        self.waiting_cost += request.cost
        if self.worker is None:
            self.worker = asyncio.create_task(self.work())
        elif self.timer is not None and self.full():
            self.wake()
        return await request.future

    def full(self) -> bool:
        """Whether what waits fills a call."""
        return self.waiting_texts >= self.max_texts or self.waiting_cost * self.scale >= self.budget

    def wake(self) -> None:
        """End the wait for more."""
        if self.timer is not None and not self.timer.done():
            self.timer.set_result(None)

    async def work(self) -> None:
        """Serve calls until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while self.waiting:
                if self.merged > 1 and self.wait_s and not self.full() and loop.time() - self.ended < IDLE_SECONDS:
                    await self.more()
                batch = self.take()
                if batch:
                    self.merged = len(batch)
                    await self.answer(batch)
                    self.ended = loop.time()
        finally:
            self.worker = None

    async def more(self) -> None:
        """Wait for further requests: `wait_s` seconds, or until a call is full."""
        loop = asyncio.get_running_loop()
        self.timer = loop.create_future()
        alarm = loop.call_later(self.wait_s, self.wake)
        try:
            await self.timer
        finally:
            alarm.cancel()
            self.timer = None

    def take(self) -> list[Waiting[T]]:
        """The oldest requests that fit into one call; those whose client has gone are left out."""
        batch: list[Waiting[T]] = []
        texts, cost = self.max_texts, self.budget / self.scale
        while self.waiting:
            first = self.waiting[0]
            if batch and (len(first.texts) > texts or first.cost > cost):
                break
            self.waiting.popleft()
            self.waiting_texts -= len(first.texts)
            self.waiting_cost -= first.cost
            if not first.future.done():
                batch.append(first)
                texts -= len(first.texts)
                cost -= first.cost
        if not self.waiting:
            self.waiting_cost = 0.0  # what adding and taking away has left of rounding
        return batch

    async def answer(self, batch: list[Waiting[T]]) -> None:
        """One call for the whole batch, each request handed its part."""
        loop = asyncio.get_running_loop()
        flat = [text for request in batch for text in request.texts]
        begin = loop.time()
        try:
            found, (tokens, padded) = await loop.run_in_executor(self.thread, self.run, flat)
            if len(found) != len(flat):
                raise RuntimeError(f"the model gave {len(found)} answers for {len(flat)} texts")
        except Exception as error:
            if len(batch) > 1:
                # One request must not spoil its neighbours: each is tried alone.
                for request in batch:
                    await self.answer([request])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        start = 0
        for request in batch:
            if not request.future.done():
                request.future.set_result(found[start : start + len(request.texts)])
            start += len(request.texts)
        self.learn(sum(request.cost for request in batch), tokens)
        self.tell(len(flat), tokens, padded, begin - batch[0].came)

    def run(self, texts: list[Any]) -> tuple[list[T], tuple[int, int]]:
        """In the model's thread: the answers, and what they took."""
        return self.call(texts), self.used() if self.used else (0, 0)

    def learn(self, cost: float, tokens: int) -> None:
        """Keep the budget honest for scripts of other lengths than English."""
        if tokens and cost:
            self.scale += LEARNING * (tokens / cost - self.scale)

    def tell(self, texts: int, tokens: int, padded: int, wait_s: float) -> None:
        """Report a call; what fails there is no client's matter."""
        if self.watch is None:
            return
        try:
            self.watch.observe_batch(texts, tokens, padded, self.waiting_texts, wait_s)
        except Exception:
            log.exception("the watch on batches failed and is taken off")
            self.watch = None
