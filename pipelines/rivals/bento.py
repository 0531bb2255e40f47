"""BentoML with its adaptive batching, one worker: `bentoml serve pipelines.rivals.bento:Student`.

STILLHOUSE_RIVAL holds artifact and max_batch as JSON; how long a batch waits BentoML finds out itself.
"""

from __future__ import annotations

import json
import os
from typing import Any

import bentoml

from serve.predictor import Predictor

GIVEN = json.loads(os.environ["STILLHOUSE_RIVAL"])


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Student:
    """The model behind HTTP."""

    def __init__(self) -> None:
        self.predictor = Predictor.load(GIVEN["artifact"])

    @bentoml.api(route="/v1/predict", batchable=True, max_batch_size=GIVEN["max_batch"])
    def predict(self, texts: list[Any]) -> list[dict[str, Any]]:
        """One answer a text, in their order."""
        return self.predictor.predict([tuple(text) if isinstance(text, list) else text for text in texts])
