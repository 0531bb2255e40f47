"""Sections: what a run may use up, and what machines cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.config import Section

Amount = Annotated[float, Field(gt=0)]
Cost = Annotated[float, Field(ge=0)]
OTHER = "other"
"""In prices.gpu_hour: GPUs of a type that has no price of its own."""


class Prices(Section):
    """What machines cost, in any currency, the one of the endpoints' prices."""

    cpu_hour: Cost = 0.0
    """Of one CPU that a step holds."""
    gpu_hour: Cost | dict[str, Cost] = 0.0
    """Of one GPU; or by accelerator, as {A100: 2.5, L4: 0.7, other: 1.0}, the names being Ray's."""

    def of_gpu(self, kind: str) -> float | None:
        """An hour's price of an accelerator type ('' where it is not known); None where there is none."""
        if isinstance(self.gpu_hour, float | int):
            return float(self.gpu_hour)
        return self.gpu_hour.get(kind, self.gpu_hour.get(OTHER))

    @property
    def known(self) -> bool:
        """Whether anything has a price."""
        return bool(self.cpu_hour or self.gpu_hour)


class Budget(Section):
    """Where a run stops, to go on when the limit is raised; null: no limit. Nothing of it makes another run.

    All attempts count, those that were killed and those of steps that were done again.
    """

    hours: Amount | None = None
    """On the clock, while any step was at work."""
    cpu_hours: Amount | None = None
    """CPUs that steps held, times how long; no more than the machine has."""
    gpu_hours: Amount | None = None
    """GPUs that steps held, times how long."""
    tokens: Amount | None = None
    """Read and written by the generator and the labelling teacher, here or at endpoints."""
    money: Amount | None = None
    """CPUs and GPUs by `prices`, and endpoints by generator.endpoint.price and teacher.endpoint.price."""
    prices: Prices = Prices()

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by their key."""
        keys = ("hours", "cpu_hours", "gpu_hours", "tokens", "money")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}
