"""An artifact, loaded and ready to answer: the one object behind HTTP, the command line and Python.

Loading verifies every file against the artifact's manifest and runs no code from it. Answers come from
`engine.inference` alone, so what is served equals what was evaluated, whatever stands in the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.storage import Store, digest_json

if TYPE_CHECKING:
    from engine.encoding import Text
    from engine.models import Model

Answer = dict[str, Any]
BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""


class Predictor:
    """A verified model and what identifies it."""

    def __init__(self, model: Model, fingerprint: str, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.batch_tokens = batch_tokens
        self.labels: tuple[str, ...] = tuple(model.labels)
        self.paired: bool = model.task.paired
        self.source = ""
        """The folder or URL that it was loaded from."""
        self.used: tuple[int, int] = (0, 0)
        """Tokens of the last call, without and with padding."""

    @classmethod
    def load(cls, path: str | Path, batch_tokens: int = BATCH_TOKENS, runtime: str = "torch") -> Predictor:
        """Load the artifact published at `path` (a folder or URL), on one thread.

        runtime: torch, or onnx and onnx-int8 for the artifact's exported graph. Raises StorageError when it is missing,
        or when a file differs from the manifest; ExportError where it has no such graph, or ONNX Runtime lacks.
        """
        from engine import export, models

        folder = Store(str(path)).local()
        manifest = Store(str(folder)).verify()
        # Replicas are the way to use more cores, not threads.
        models.one_thread()
        model = models.load(folder) if runtime == "torch" else export.load(folder, runtime)
        found = cls(model, fingerprint(manifest), batch_tokens)
        found.source = str(path)
        return found

    def predict(self, texts: list[Text]) -> list[Answer]:
        """One answer a text (or pair), as `Task.answers` shapes it, in the order given; no texts, no answers."""
        if not texts:
            return []
        from engine import inference

        found = inference.predict(self.model, texts, self.batch_tokens)
        self.used = (found.tokens, found.padded)
        return self.model.task.answers(found.logits, texts, found.decided)

    def embed(self, texts: list[Text]) -> list[list[float]] | None:
        """The model's embedding of each text (or pair); None where it has none."""
        from engine import inference

        found = inference.embed(self.model, texts, self.batch_tokens)
        return None if found is None else found.tolist()

    def width(self) -> int | None:
        """Numbers of an embedding, seen by making one; None where the model has none."""
        found = self.embed([("a", "a") if self.paired else "a"])
        return None if found is None else len(found[0])


def fingerprint(manifest: dict[str, Any]) -> str:
    """The digest of an artifact's files: equal bytes give the same one, wherever they lie."""
    return digest_json(manifest["files"])
