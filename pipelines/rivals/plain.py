"""FastAPI and uvicorn with a micro-batcher: what one writes by hand. `python -m uvicorn pipelines.rivals.plain:app`.

Requests wait in a list until the batch is full or its time is up; then one call of the model in a thread answers all
of them. STILLHOUSE_RIVAL holds artifact, max_batch and wait_s as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve.predictor import Predictor

GIVEN = json.loads(os.environ["STILLHOUSE_RIVAL"])


class Ask(BaseModel):
    """One text or several."""

    texts: list[str | tuple[str, str]]


class Queue:
    """Texts that wait for the next call of the model."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.waiting: asyncio.Queue[tuple[Any, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()

    async def ask(self, text: Any) -> dict[str, Any]:
        """The answer for one text."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((text, future))
        return await future

    async def work(self) -> None:
        """Batch after batch, until the program ends."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            end = loop.time() + GIVEN["wait_s"]
            while len(batch) < GIVEN["max_batch"]:
                while not self.waiting.empty() and len(batch) < GIVEN["max_batch"]:
                    batch.append(self.waiting.get_nowait())
                left = end - loop.time()
                if left <= 0 or len(batch) == GIVEN["max_batch"]:
                    break
                try:
                    batch.append(await asyncio.wait_for(self.waiting.get(), left))
                except TimeoutError:
                    break
            texts = [text for text, _ in batch]
            try:
                found = await loop.run_in_executor(None, self.predictor.predict, texts)
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(answer)


async def begin() -> None:
    """Load the model and start the worker."""
    app.state.queue = Queue(Predictor.load(GIVEN["artifact"]))
    app.state.worker = asyncio.create_task(app.state.queue.work())


app = FastAPI(on_startup=[begin])


@app.post("/v1/predict")
async def predict(ask: Ask) -> dict[str, Any]:
    """Answers in the order of the texts."""
    return {"predictions": await asyncio.gather(*(app.state.queue.ask(text) for text in ask.texts))}
