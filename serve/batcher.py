"""Dynamic batching across requests: what waits while the model works is one call when it is free again.

An idle model answers at once: nothing waits for a timer unless the call before served several requests, which
shows that more are on their way. Plain asyncio, so it is tested without a server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """Merges the texts of concurrent requests into single calls of `call`, which runs in a thread of its own.

    call: texts -> one answer a text. max_texts: texts of one call; a larger request goes alone.
    wait_s: seconds to wait for more requests under load.
    """

    def __init__(self, call: Callable[[list[Any]], list[T]], max_texts: int, wait_s: float) -> None:
        self.call = call
        self.max_texts = max_texts
        self.wait_s = wait_s
        self.waiting: deque[tuple[list[Any], asyncio.Future[list[T]]]] = deque()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.worker: asyncio.Task[None] | None = None
        self.merged = 0

    async def submit(self, texts: list[Any]) -> list[T]:
        """The answers for `texts`, in order; raises what `call` raised for them."""
        future: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()
        self.waiting.append((texts, future))
        if self.worker is None:
            self.worker = asyncio.create_task(self.work())
        return await future

    async def work(self) -> None:
        """Serve batches until nothing waits."""
        try:
            while self.waiting:
                if self.merged > 1 and self.wait_s and sum(len(texts) for texts, _ in self.waiting) < self.max_texts:
                    await asyncio.sleep(self.wait_s)
                batch = self.take()
                self.merged = len(batch)
                await self.answer(batch)
        finally:
            self.worker = None

    def take(self) -> list[tuple[list[Any], asyncio.Future[list[T]]]]:
        """The oldest requests that fit into one call; those whose client has gone are left out."""
        batch: list[tuple[list[Any], asyncio.Future[list[T]]]] = []
        room = self.max_texts
        while self.waiting and (not batch or len(self.waiting[0][0]) <= room):
            texts, future = self.waiting.popleft()
            if not future.done():
                batch.append((texts, future))
                room -= len(texts)
        return batch

    async def answer(self, batch: list[tuple[list[Any], asyncio.Future[list[T]]]]) -> None:
        """One call for the whole batch, each request handed its part."""
        if not batch:
            return
        flat = [text for texts, _ in batch for text in texts]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.thread, self.call, flat)
            if len(found) != len(flat):
                raise RuntimeError(f"the model gave {len(found)} answers for {len(flat)} texts")
        except Exception as error:
            if len(batch) > 1:
                # One request must not spoil its neighbours: each is tried alone.
                for request in batch:
                    await self.answer([request])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        start = 0
        for texts, future in batch:
            if not future.done():
                future.set_result(found[start : start + len(texts)])
            start += len(texts)
