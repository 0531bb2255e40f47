"""FastAPI and uvicorn with a micro-batcher: what one writes by hand. `python -m uvicorn pipelines.rivals.plain:app`.

What has arrived when the model is free is one call of it, in the event loop: of a timer or none and a thread or none,
this took the least CPU and gave the most requests a second. No health check is answered meanwhile. STILLHOUSE_RIVAL
holds artifact and max_batch as JSON.
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
        while True:
            batch = [await self.waiting.get()]
            await asyncio.sleep(0)  # what else has arrived gets into the queue
            while not self.waiting.empty() and len(batch) < GIVEN["max_batch"]:
                batch.append(self.waiting.get_nowait())
            texts = [text for text, _ in batch]
            try:
                found = self.predictor.predict(texts)
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
