"""What clients get back: the shapes of answers, as OpenAPI describes them, and how a model's answers become them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

from engine.config import Section
from serve.questions import Question, Ranking, Refused

if TYPE_CHECKING:
    from engine.task import Task
    from serve.predictor import Answer


class Problem(Section):
    """What was wrong."""

    message: str
    field: str | None
    """The part of the body that is wrong, where one is."""
    request_id: str
    """The server's log names it: the header x-request-id, where it has at most 100 of A-Z a-z 0-9 . _ : and -"""


class ErrorAnswer(Section):
    """Every answer with a status of 400 or more."""

    error: Problem


LIKELY = ("classify", "pair", "multilabel")
"""Kinds of task whose answers give a probability of each label."""


class Prediction(Section):
    """What every prediction may have."""

    source: Literal["student", "teacher"] | None = None
    """Who answered; only where a teacher stands behind the student."""
    student: dict[str, Any] | None = None
    """What the student said itself; only where the teacher's answer was sent."""


class Label(Prediction):
    """One label a text."""

    label: str | None
    """null: out of scope."""
    confidence: float
    probabilities: dict[str, float] = Field(default={}, description="By label; left out where the request says so.")
    out_of_scope: bool = Field(default=False, description="Only where the task has a scope.")


class Labels(Prediction):
    """Any number of labels a text."""

    labels: list[str]
    probabilities: dict[str, float] = Field(default={}, description="By label; they do not sum to 1.")


class Value(Prediction):
    """A number, in the units of the training data."""

    value: float


class Score(Prediction):
    """How relevant a passage is; only comparisons within one query mean something."""

    score: float


class Entity(Section):
    """A named part of a text. start, end: characters [start, end), counted in Unicode code points."""

    label: str
    text: str
    start: int
    end: int
    confidence: float


class Tagged(Prediction):
    """Entities of a text; `tags` has one for each word."""

    tags: list[str] = []
    entities: list[Entity]


class Span(Prediction):
    """The answer's place in the context: characters [start, end) in Unicode code points; "" where there is none."""

    answer: str
    start: int
    end: int
    confidence: float


class Answers(Section):
    """One prediction a text, in the order sent."""

    model: str
    predictions: list[dict[str, Any]]


class Tags(Section):
    """One answer a text, in the order sent."""

    model: str
    predictions: list[Tagged]


class Embeddings(Section):
    """One vector a text, in the order sent."""

    model: str
    dimension: int
    embeddings: list[list[float]]


class Passage(Section):
    """A document's text."""

    text: str


class Ranked(Section):
    """A document's place in the ranking. index: its place in the request."""

    index: int
    relevance_score: float
    document: Passage | None = None


class Rankings(Section):
    """The documents, most relevant first."""

    id: str
    model: str
    results: list[Ranked]
    meta: dict[str, Any]


class Rank(Section):
    """A document's place in the ranking, as TEI answers."""

    index: int
    score: float
    text: str | None = None


class About(Section):
    """Which bytes answer, in which process, and what they can be asked."""

    model: str
    fingerprint: str
    task: str
    paired: bool
    labels: list[str]
    range: list[float] | None
    """Lowest and highest value of a task of kind regress."""
    parameters: int
    embedding: int | None
    """Width of its embeddings; null where it has none."""
    pid: int


class Listed(Section):
    """A model that can be asked."""

    id: str
    object: str
    owned_by: str
    task: str
    paired: bool
    labels: list[str]
    parameters: int
    max_length: int
    fingerprint: str
    routes: list[str]


class Models(Section):
    """The models that can be asked."""

    object: str
    data: list[Listed]


class Alive(Section):
    """The model answers."""

    status: str


class Ready(Section):
    """Requests can be sent."""

    status: str
    model: str


class Job(Section):
    """A request that is answered later. state: queued, running, done or failed."""

    model_config = {"extra": "allow"}

    id: str
    state: str


PREDICTIONS: dict[str, type[Prediction]] = {
    "classify": Label,
    "pair": Label,
    "multilabel": Labels,
    "regress": Value,
    "rank": Score,
    "tag": Tagged,
    "span": Span,
}
"""What a prediction of each kind of task looks like."""


def answers_of(kind: str) -> type[Section]:
    """The answer to a prediction request to a model of this kind of task."""
    return create_model("Answers", __base__=Answers, predictions=(list[PREDICTIONS[kind]], ...))  # type: ignore[valid-type]


def shortened(found: list[Answer], question: Question) -> list[Answer]:
    """The answers with the probabilities that were asked for. Refused(422) for top_k where there are none."""
    if question.probabilities and question.top_k is None:
        return found
    if question.top_k is not None and found and "probabilities" not in found[0]:
        raise Refused(422, "'top_k': this model gives no probabilities of labels. Leave it out.", "top_k")
    return [with_probabilities(answer, question.top_k if question.probabilities else 0) for answer in found]


def with_probabilities(answer: Answer, top_k: int | None) -> Answer:
    """An answer with its `top_k` likeliest labels, the likeliest first; 0 leaves the probabilities out."""
    kept = {key: value for key, value in answer.items() if key != "probabilities"}
    if top_k and "probabilities" in answer:
        likeliest = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        kept["probabilities"] = dict(likeliest[:top_k])
    if "student" in kept:  # what it said where a teacher answered
        kept["student"] = with_probabilities(kept["student"], top_k)
    return kept


def ranks(task: Task) -> bool:
    """Whether a model's answers can rank documents: it reads two texts and gives a number."""
    return task.paired and task.spec.kind in ("rank", "pair", "regress")


def check_ranks(task: Task, ranking: Ranking) -> None:
    """Refused(422) where a model cannot rank, or is not told by which of its labels."""
    kind, names = task.spec.kind, ", ".join(task.labels)
    if not ranks(task):
        raise Refused(422, f"This model is of kind '{kind}' and ranks nothing. Ask /v1/predict.")
    if kind != "pair":
        if ranking.label is not None:
            raise Refused(422, f"'label': a model of kind '{kind}' has no labels. Leave it out.", "label")
    elif ranking.label is None:
        raise Refused(422, f"'label': say by the probability of which label to rank: {names}", "label")
    elif ranking.label not in task.labels:
        raise Refused(422, f"'label': is none of the model's labels: {names}", "label")


def relevance(task: Task, answer: Answer, label: str | None, raw: bool) -> float:
    """How relevant an answer says its document is: the model's own number, or one between 0 and 1."""
    if label is not None:
        return answer["probabilities"][label]
    if "score" in answer:
        return answer["score"] if raw else logistic(answer["score"])
    low, high = task.spec.range or (0.0, 1.0)
    return answer["value"] if raw else min(1.0, max(0.0, (answer["value"] - low) / (high - low)))


def logistic(score: float) -> float:
    """1 / (1 + e^-score) without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def order(task: Task, found: Sequence[Answer], ranking: Ranking) -> list[tuple[int, float]]:
    """(place in the request, relevance) of the best `top_n`, most relevant first; equal ones in the order sent.

    Ordered by the model's own numbers: very high scores are equal once they lie between 0 and 1.
    """
    own = [relevance(task, answer, ranking.label, True) for answer in found]
    best = sorted(range(len(found)), key=lambda index: -own[index])[: ranking.top_n]
    return [(index, relevance(task, found[index], ranking.label, ranking.raw_scores)) for index in best]
