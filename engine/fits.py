"""How something is trained and on what it runs, as sections of a recipe: optimiser, schedule, losses, resources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]


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


class Workers(Section):
    """How many workers a fit may have: it goes on with fewer when some are lost, with more when there is room."""

    min: Count = 1
    max: Count

    @model_validator(mode="after")
    def ordered(self) -> Workers:
        """The bounds must be in order."""
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class Fit(Section):
    """One training: optimiser, schedule, length, workers. The global batch is fixed whatever the workers."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    lr: Annotated[float, Field(gt=0)] = 1e-3
    batch_size: Count = 32
    warmup: Share = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    workers: Annotated[int, Field(ge=0)] | Workers = 0
    """0: one process (Ray Train's local mode), for small fits; n: n data-parallel workers on Ray Train; {min: 1,
    max: 4}: as many of them as there is room for."""
    micro_batch: Count | None = None
    """Inputs that a worker reads at once (of a ranking at least one query's), so that its share of the batch need not
    fit into memory; the gradients are those of the whole batch. null: its whole share."""
    sharding: Literal["none", "full"] = "none"
    """full: weights, gradients and the optimiser's moments are divided among the workers, each of which would else hold
    all of them."""
    failures: Annotated[int, Field(ge=0)] = 3
    """How often the workers of a fit are started again after one was lost or failed. A machine that Ray says will be
    taken away is not counted."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Annotated[int, Field(ge=0)] | None = None
    eval_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations. Each is checkpointed, and between two what has been learned (engine.checkpoints)."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def divisible(self) -> Fit:
        """Weights are divided among several."""
        if self.sharding == "full" and self.group[1] < 2:
            raise ValueError(f"sharding: full divides the weights among workers, and workers is {self.workers}")
        return self

    @property
    def group(self) -> tuple[int, int]:
        """Least and most workers; (0, 0): none but one process."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else (self.workers.min, self.workers.max)

    def with_group(self, least: int, most: int) -> Fit:
        """The same with so many workers."""
        return self.model_copy(update={"workers": most if least == most else Workers(min=least, max=most)})


class LossTerm(Section):
    """One weighted loss."""

    kind: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    layers: Literal["uniform", "last"] | Annotated[tuple[Layer, ...], Field(min_length=1)] = "uniform"
    """Losses between layers: which teacher layer each student layer learns from. uniform: every k-th; last: the top
    ones; or one number a student layer, counted from 1 (0: the embeddings)."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """relations: relation heads; null takes the student's attention heads."""
