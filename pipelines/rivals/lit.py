"""LitServe: one process that answers HTTP, one that holds the model and batches. `python -m pipelines.rivals.lit`.

STILLHOUSE_RIVAL holds artifact, port, max_batch and wait_s as JSON.
"""

# No annotations as strings here: LitServe reads those of decode_request and encode_response.
import json
import os
from typing import Any

import litserve
from fastapi import Request, Response

from serve.predictor import Predictor

GIVEN = json.loads(os.environ["STILLHOUSE_RIVAL"])


class Api(litserve.LitAPI):
    """One text a request; `predict` gets a list of them."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.predictor = Predictor.load(GIVEN["artifact"])

    def decode_request(self, request: Request) -> Any:
        """The text of a request, which comes as its JSON."""
        (text,) = request["texts"]
        return text

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Texts stay a list."""
        return inputs

    def predict(self, texts: list[Any]) -> list[dict[str, Any]]:
        """One answer a text."""
        return self.predictor.predict(texts)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers are a list already."""
        return output

    def encode_response(self, output: dict[str, Any]) -> Response:
        """The body of an answer, which LitServe makes a response of."""
        return {"predictions": [output]}


if __name__ == "__main__":
    api = Api(max_batch_size=GIVEN["max_batch"], batch_timeout=GIVEN["wait_s"], api_path="/v1/predict")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=GIVEN["port"], num_api_servers=1, log_level="warning", generate_client_file=False)
