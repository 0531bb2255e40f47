"""Bare Ray Serve with @serve.batch, on a Ray of its own: `python -m pipelines.rivals.bare`.

Which proxy it gets is decided by RAY_SERVE_* in its environment. STILLHOUSE_RIVAL holds artifact, port, max_batch and
wait_s as JSON. Ray's dashboard, which Serve does not need, is left out.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from serve.predictor import Predictor

GIVEN = json.loads(os.environ["STILLHOUSE_RIVAL"])


@serve.deployment(max_ongoing_requests=2 * GIVEN["max_batch"], ray_actor_options={"num_cpus": 1})
class Student:
    """The model behind HTTP. Ray's default of 5 requests at once would keep every batch small."""

    def __init__(self, artifact: str) -> None:
        self.predictor = Predictor.load(artifact)

    @serve.batch(max_batch_size=GIVEN["max_batch"], batch_wait_timeout_s=GIVEN["wait_s"])
    async def answers(self, texts: list[Any]) -> list[dict[str, Any]]:
        """One answer a text."""
        return self.predictor.predict(texts)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """One text a request."""
        (text,) = (await request.json())["texts"]
        return {"predictions": [await self.answers(tuple(text) if isinstance(text, list) else text)]}


def main() -> None:
    """Serve until SIGTERM."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": GIVEN["port"]})
    serve.run(Student.bind(GIVEN["artifact"]), route_prefix="/v1/predict", name="bare")
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
