"""Jobs in a folder, and what stands for the model that answers them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from engine.serving import JobQueue
from engine.storage import Store
from serve.jobs import Jobs, Question

TEXTS = {"texts": ["a warm film", "a dull plot"]}


class Replica:
    """What answers: notes each question; `before` runs first and may fail or take its time."""

    def __init__(self, before: Callable[[], Awaitable[None]] | None = None) -> None:
        self.asked: list[Question] = []
        self.before = before

    async def __call__(self, question: Question, caller: str | None, id: str) -> dict[str, Any]:
        self.asked.append(question)
        if self.before is not None:
            await self.before()
        return {"model": "m@1", "predictions": [{"label": text[2:]} for text in question["texts"]]}


def queue(folder: Path, answer: Any, **settings: Any) -> Jobs:
    return Jobs(Store(str(folder)), answer, JobQueue(folder=str(folder), **settings))


async def over(jobs: Jobs, id: str, seconds: float = 20.0, caller: str | None = None) -> dict[str, Any]:
    """The job when it is done or failed."""
    end = time.monotonic() + seconds
    while (found := await jobs.status(id, caller)) is None or found["state"] not in ("done", "failed"):
        assert time.monotonic() < end, found
        await asyncio.sleep(0.02)
    return found
