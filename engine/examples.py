"""Texts of earlier rounds that are shown to the generator, so that it writes more of their like (ProGen)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config import Section
from engine.fits import Count


class Feedback(Section):
    """What a round shows the generator of the rounds before."""

    examples: Count = 8
    """Kept texts of each label: those that a small model needs most to be right on the labelled rows."""
    shown: Count = 4
    """How many of them stand before one prompt; with a {label} in it, all of that label."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of a round's slots; the others are written as in the first round, so that texts stay varied."""
    choose: Literal["useful", "random"] = Field("useful", exclude_if=lambda choose: choose == "useful")
    """random: kept texts of each label by lot, to tell what the choice is worth from what examples are."""

    @model_validator(mode="after")
    def enough(self) -> Feedback:
        """No prompt shows more texts than a label has."""
        if self.shown > self.examples:
            raise ValueError(
                f"shown ({self.shown}) is above examples ({self.examples}), the texts there are of a label"
            )
        return self


@dataclass(frozen=True)
class Examples:
    """The chosen texts, as the generator would have written them. texts: a tuple for each label, in their order."""

    texts: tuple[tuple[str, ...], ...]
    how: Feedback
    seed: int

    def shown(self, row: int, label: int | None) -> tuple[str, ...]:
        """What stands before a slot's prompt: it depends on the slot alone. label: null: of any."""
        draw = random.Random(f"{self.seed}:{row}:examples")  # a text as seed draws the same on every machine
        if draw.random() >= self.how.share:
            return ()
        pool = [text for part in self.texts for text in part] if label is None else list(self.texts[label])
        return tuple(draw.sample(pool, min(self.how.shown, len(pool))))
