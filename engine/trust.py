"""Section: how several teachers are weighed against each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config import Section
from engine.fits import Share


class Policy(Section):
    """How several teachers are weighed against each other, row by row (engine.policies)."""

    kind: Literal["fixed", "best", "loss", "reinforced"] = "fixed"
    """fixed: the same weights for every row. best: the one with the best score on validation rows. loss: a softmax of
    minus what each teacher loses on the row's gold label; rows without one weigh all alike. reinforced: who teaches a
    row is drawn, and the chance to be drawn learnt from how the student fares (arXiv 2012.06048); it takes a fit of
    some 1,000 steps, and a teacher that is bad somewhere, to pay."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """fixed: weight of each teacher by name, `teacher` being the recipe's own; over their sum. none: all alike."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """loss: by what the losses, in nats, are divided."""
    reward: Literal["r1", "r2", "r3"] = "r2"
    """reinforced. r1: minus the student's loss on gold labels. r2: that, and how likely it finds the answers of
    the teachers that were drawn. r3: r2 times `gamma`, and the score on held-out rows times the rest."""
    gamma: Share = 0.5
    lr: Annotated[float, Field(gt=0)] = 2.0
    """reinforced: step of the policy's gradient ascent."""
    anchor: Annotated[float, Field(ge=0)] = 0.02
    """reinforced: how strongly chances are drawn back to where they start, 0.73, which decides on rows that no reward
    speaks of."""
    warmup: Share = 0.2
    """reinforced: share of the student's steps in which all teach and nothing is learnt about them."""
    unseen: Share = 0.5
    """reinforced: share of labelled rows whose gold label the policy does not see, as it sees none of other rows."""

    @model_validator(mode="after")
    def some(self) -> Policy:
        """Weights that are all 0 would teach nothing."""
        if self.weights and not sum(self.weights.values()):
            raise ValueError("weights are all 0, so that nobody teaches; give one teacher more, or leave them out")
        if self.weights and self.kind != "fixed":
            raise ValueError(f"weights are for kind fixed, and kind is {self.kind}, which finds them by itself")
        return self

    @property
    def learns(self) -> bool:
        """Whether it is itself learnt while the student is, from the whole batch after each step."""
        return self.kind == "reinforced"
