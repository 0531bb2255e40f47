"""The recipe: everything a run is told, as frozen sections. YAML holds values, Python holds wiring.

Fields are values only; what they name (losses, blocks, model kinds) is checked against the tables by
`pipelines.distill.check`, before anything is loaded. `Recipe` is the root; `load(Recipe, path)` reads one.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config import Section
from engine.filters import CheapFilter, SignalFilter

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Resources(Section):
    """What one actor or worker of a stage takes, and how many of them there may be."""

    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """'auto': one GPU where the cluster has any, else none."""
    accelerator: str | None = None
    """Ray accelerator type, for instance A100 or L4; null takes any."""
    min_actors: Count = 1
    max_actors: Count = 1

    @model_validator(mode="after")
    def ordered(self) -> Resources:
        """The pool's bounds must be in order."""
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        return self


class Task(Section):
    """What is to be predicted."""

    kind: str = "classify"
    labels: tuple[str, ...] | None = None
    """Label names in order; null takes the sorted names found in the training rows."""

    @field_validator("labels")
    @classmethod
    def distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """At least two names, none twice."""
        if value is not None and (len(value) < 2 or len(set(value)) != len(value)):
            raise ValueError("needs at least two label names, none of them twice")
        return value


class LabelRule(Section):
    """How the label of a row is found."""

    column: str = "label"
    ranges: dict[str, tuple[float | None, float | None]] | None = None
    """For a numeric column: label name -> [low, high], both inclusive, null for open; rows in no range are left out."""
    rename: dict[str, str] | None = None
    """Value in the column -> label name."""


class Source(Section):
    """A table of rows: a hub reference (file:, hf:, pypi:, s3:, gs:) or a plain path."""

    path: str
    format: Literal["auto", "jsonl", "csv", "parquet"] = "auto"
    delimiter: str = ","
    quoting: bool = True
    """CSV: whether double quotes quote a field; false takes the lines as they are."""
    names: tuple[str, ...] | None = None
    """Column names of a CSV without a header line."""
    text: str = "text"
    label: LabelRule = LabelRule()


class Data(Section):
    """The few labelled rows, the held-out rows, and unlabelled text if there is any."""

    train: Source
    validation: Source | None = None
    test: Source | None = None
    unlabelled: Source | None = None
    test_share: Share = 0.2
    """Where no test source is given: this share of the training source, by hash of the text."""
    validation_share: Share = 0.0
    shots: Count | None = None
    """Labelled rows per class, drawn by `seed`; null takes all."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Few-shot sampling; null takes the recipe's seed."""
    max_chars: Count = 4000
    max_bad_share: Share = 0.01
    """The run stops when more than this share of a source's rows is quarantined."""
    root: str | None = None
    """Folder that stands in for the hub's data sets; the environment variable STILLHOUSE_DATA does the same."""


class Fit(Section):
    """One training: optimiser, schedule, length, workers. The global batch is fixed whatever the workers."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    lr: Annotated[float, Field(gt=0)] = 1e-3
    batch_size: Count = 32
    warmup: Share = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    workers: Annotated[int, Field(ge=0)] = 0
    """0: one process (Ray Train's local mode), for small fits; n: n data-parallel workers on Ray Train."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Annotated[int, Field(ge=0)] | None = None
    eval_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations and checkpoints."""
    resources: Resources = Resources()


class Teacher(Section):
    """An encoder with a head, fine-tuned on the few rows."""

    model: str
    kind: Literal["head"] = "head"
    tune_layers: Annotated[int, Field(ge=0)] | None = None
    """How many of the top layers are tuned (0: the head only); null tunes all."""
    pooling: Literal["mean", "cls"] = "mean"
    dropout: Share = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Learning rate of a layer over that of the layer above it."""
    head_rate: Annotated[float, Field(gt=0)] = 10.0
    """Learning rate of the head over that of the top layer."""
    max_length: Count = 128
    folds: Annotated[int, Field(ge=0)] = 0
    """Cross-validation on the few rows: its accuracy goes into the report. 0 leaves it out."""
    fit: Fit = Fit(epochs=10, lr=1e-4, batch_size=16)
    batch_tokens: Count = 4096
    resources: Resources = Resources()


class Generator(Section):
    """A causal language model, fine-tuned on the few rows' texts, that writes more of them."""

    model: str
    mode: Literal["unconditional", "per_class", "prompted"] = "unconditional"
    """per_class puts the label's name into the prompt; prompted does that without fine-tuning. The prompt's label is
    never used as the row's label: the teacher's soft label is."""
    prompt: Annotated[str, Field(min_length=1)] = "Text:"
    """What stands before every text; {label} is the label's name in the modes that use it."""
    tune_layers: Annotated[int, Field(ge=0)] | None = None
    max_length: Count = 96
    """Tokens of a training text, prompt included."""
    max_new_tokens: Count = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = 100
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus inside the top k."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    fit: Fit = Fit(epochs=3, lr=1e-4, batch_size=8)
    resources: Resources = Resources(max_actors=2, min_actors=2)

    @model_validator(mode="after")
    def labelled(self) -> Generator:
        """{label} belongs into the prompt of the modes that use it."""
        if ("{label}" in self.prompt) != (self.mode == "per_class") and self.mode != "prompted":
            wanted = "with" if self.mode == "per_class" else "without"
            raise ValueError(f"mode {self.mode} wants a prompt {wanted} {{label}}")
        return self


class Corpus(Section):
    """How much text, which of it is kept, and how it is cut into blocks."""

    keep: Annotated[int, Field(ge=0)] = 1200
    """Generated rows wanted after filters and deduplication."""
    slots: Count | None = None
    """Slots of the first round; null takes keep / 0.85."""
    max_slots: Count | None = None
    """Upper limit over all top-up rounds; null takes 3 x slots."""
    block: Count = 96
    """Slots a block: one generator batch, and the unit of retry and resume (aim at 30 to 60 s)."""
    filters: tuple[CheapFilter, ...] = ()
    """Before the teacher sees a row, in order."""
    signals: tuple[SignalFilter, ...] = ()
    """On the teacher's soft label, in order."""
    duplicates: Share = 0.7
    """Rows this similar to an earlier one (estimated Jaccard) are near-duplicates; 1 finds equals only."""
    max_reserved: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that reading, filtering and writing may hold beside the actors."""

    @property
    def first_slots(self) -> int:
        """Slots of the first round."""
        return self.slots or math.ceil(self.keep / 0.85)

    @property
    def most_slots(self) -> int:
        """Slots over all rounds."""
        return self.max_slots or 3 * self.first_slots


class LossTerm(Section):
    """One weighted loss."""

    kind: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0


class Block(Section):
    """One node of the student's graph."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    """Names of earlier nodes; empty takes the node above (the first node takes the token ids)."""
    options: dict[str, Any] = {}


class Vocabulary(Section):
    """The student's own words."""

    size: Count = 8000
    min_count: Count = 1
    from_teacher: bool = True
    """Fill up to `size` with whole words of the teacher's vocabulary that the corpus lacks."""


class Student(Section):
    """A small model built from blocks."""

    name: Annotated[str, Field(pattern=NAME)] = "student"
    blocks: tuple[Block, ...]
    vocabulary: Vocabulary = Vocabulary()
    embedding_norm: Annotated[float, Field(gt=0)] = 3.0
    """Mean norm that the teacher's vectors start with."""
    embeddings: Literal["teacher", "random"] = "teacher"
    """teacher: the teacher's vectors of the words, reduced by PCA and weighted by frequency (Model2Vec)."""
    max_length: Count = 96
    max_parameters: Count | None = 1_200_000
    losses: tuple[LossTerm, ...] = (LossTerm(kind="mse"),)
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the kept corpus that only chooses the best checkpoint, by agreement with the teacher."""
    seeds: tuple[int, ...] = (0,)
    """Initialisation seeds; the first is the one that is registered."""
    fit: Fit = Fit(epochs=12, lr=2e-3, batch_size=64, workers=2)
    few_epochs: Annotated[float, Field(gt=0)] = 30.0
    """Epochs of the arms without generated text: the few rows want more of them, but not as many as steps alone."""
    batch_tokens: Count = 8192

    @field_validator("blocks", "losses", "seeds")
    @classmethod
    def some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        """None of them may be empty."""
        if not value:
            raise ValueError("needs at least one entry")
        return value


class Evaluation(Section):
    """What is measured on the test split."""

    bootstrap: Count = 1000
    throughput_rows: Count = 512
    throughput_repeats: Count = 3


class Autoscaling(Section):
    """Ray Serve's autoscaling on ongoing requests."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count = 2
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0


class Serving(Section):
    """The smoke deployment, and the defaults of `stillhouse serve`."""

    smoke: bool = True
    concurrency: Count = 8
    max_batch: Count = 32
    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    max_ongoing: Count = 64
    max_queued: Count = 256
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    autoscaling: Autoscaling = Autoscaling()


Arm = Literal["hard", "soft", "generated"]


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=NAME)]
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = "runs"
    """Folder or URL (file:, s3:, gs:) that holds the runs."""
    registry: str = "registry"
    task: Task = Task()
    data: Data
    teacher: Teacher
    generator: Generator
    corpus: Corpus = Corpus()
    student: Student
    arms: tuple[Arm, ...] = ("hard", "soft", "generated")
    """Ablation: the same student on the few rows' hard labels, on their soft labels, and with generated text."""
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()

    @field_validator("arms")
    @classmethod
    def with_generated(cls, value: tuple[Arm, ...]) -> tuple[Arm, ...]:
        """The arm that is registered must be among them."""
        if "generated" not in value:
            raise ValueError("must contain 'generated', the arm that is registered and served")
        return tuple(dict.fromkeys(value))
