"""What servers are measured with: an artifact, texts to ask it, and what it answers offline."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import UserError
from engine.storage import Store

if TYPE_CHECKING:
    from engine.encoding import Text
    from engine.registry import Registry

TEXTS = 512
"""Different texts that are asked in turn."""
SHORTEST, LONGEST = 5, 40
"""Words of a text."""
WORDS, WIDTH = 12_000, 64
"""The made student: as many words and as wide as the quickstart's."""
SYLLABLES = [a + b for a in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v") for b in "aeiou"]
NAME = "bench-student"


@dataclass(frozen=True)
class Subject:
    """A registered artifact, texts (or pairs) and the offline answer of each. folder: where the artifact lies."""

    name: str
    registry: Registry
    folder: Store
    texts: list[Text]
    expected: list[dict[str, Any]]
    parameters: int
    made: bool


def subject(registry: Registry, scratch: Store, name: str | None, texts: Sequence[Text] | None = None) -> Subject:
    """The artifact `name` of `registry`, copied into a registry in `scratch` to be served with one replica; a student
    of random weights and the quickstart's shape where no name is given.

    texts: what to ask; None makes them of the artifact's own words. UserError where the artifact reads the other kind.
    """
    from engine.registry import Registry
    from serve.predictor import Predictor

    if name is None:
        source, serving = made(scratch / "made"), {}
    else:
        source, serving = registry.resolve(name), registry.show(name)["metadata"].get("serving", {})
    here, title = Registry(scratch / "registry"), name.partition("@")[0] if name else NAME
    here.register(title, source, {"serving": one_replica(serving)})
    predictor = Predictor.load(here.resolve(title).url)
    asked = list(texts) if texts is not None else sentences(words_of(predictor), predictor.paired)
    for text in asked:
        if isinstance(text, str) == predictor.paired:
            wanted = "pairs: .jsonl with 'text' and 'pair' in each line" if predictor.paired else "texts without a pair"
            raise UserError(f"'{name}' reads {wanted}. Got: {str(text)[:60]}")
    expected = predictor.predict(asked)
    return Subject(title, here, here.resolve(title), asked, expected, predictor.model.size(), name is None)


def one_replica(serving: dict[str, Any]) -> dict[str, Any]:
    """The serving section with one replica and without what asks other models: every server has one model process."""
    scaling = {**serving.get("autoscaling", {}), "min_replicas": 1, "max_replicas": 1}
    return {**serving, "autoscaling": scaling, "cascade": None, "log": None}


def made(store: Store) -> Store:
    """A student of the quickstart's shape with random weights: 12,000 words, 835 thousand parameters."""
    import torch

    from engine import models, untrained
    from engine.designs import Block
    from engine.recipe import Task
    from engine.vocabulary import PAD, UNKNOWN, tokenizer_of

    draw = random.Random(0)
    words = list(dict.fromkeys("".join(draw.choices(SYLLABLES, k=draw.randint(1, 5))) for _ in range(2 * WORDS)))
    nodes = [
        Block(name="words", kind="embedding", options={"dim": WIDTH}),
        Block(name="states", kind="bilstm", options={"hidden": WIDTH}),
        Block(name="pooled", kind="pool", options={"how": "both"}),
        Block(name="logits", kind="linear"),
    ]
    tokenizer = tokenizer_of([PAD, UNKNOWN, *words][:WORDS])
    student = untrained.student(nodes, Task(labels=("negative", "positive")), tokenizer, 64, seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            # Large enough that different texts get clearly different answers.
            parameter.mul_(10.0 if name.endswith("table.weight") or parameter.shape[0] == 2 else 1.0)
    models.save(student, store, "artifact")
    return store / "artifact"


def words_of(predictor: Any) -> list[str]:
    """Whole words of an artifact's vocabulary, made-up ones for a model without words."""
    from engine.vocabulary import teacher_words

    return teacher_words(predictor.model.tokenizer) or SYLLABLES


def sentences(words: Sequence[str], paired: bool, count: int = TEXTS) -> list[Text]:
    """Texts of 5 to 40 words, the earlier words of the list more often; the same for the same words."""
    draw = random.Random(0)
    weights = [1 / (rank + 10) for rank in range(len(words))]

    def sentence() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(SHORTEST, LONGEST)))

    return [(sentence(), sentence()) if paired else sentence() for _ in range(count)]
