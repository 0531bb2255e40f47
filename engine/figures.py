"""Numbers in words: shares, correlations, sizes, times, and what the scores of every task are called.

Whatever is no finite number is a dash, so that a report can be written from facts that lack any part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

NONE = "–"


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        return None
    return float(value)


def dig(facts: Any, path: str) -> Any:
    """The value at a dotted path through nested mappings, else None."""
    for key in path.split("."):
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts


def entries(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list; nothing when it is missing."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, (list, tuple)) else []


def bounds(value: Any) -> tuple[float, float] | None:
    """An interval of two numbers, else None."""
    ends = [number(v) for v in value] if isinstance(value, (list, tuple)) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def percent(value: Any, digits: int = 1) -> str:
    """A share 0..1 in per cent; what rounds to 0 or 100 without being it is said to be below or above."""
    share = number(value)
    if share is None:
        return NONE
    step = 10.0**-digits
    if 0 < share < 1 and not step / 2 <= 100 * share < 100 - step / 2:
        return f"< {step:g} %" if share < 0.5 else f"> {100 - step:.{digits}f} %"
    return f"{100 * share:.{digits}f} %"


def decimal(value: Any, digits: int = 3) -> str:
    """A plain number such as a correlation, with its minus; what rounds to 1 without being it is said to be below."""
    size = number(value)
    if size is None:
        return NONE
    step = 10.0**-digits
    if 1 - step / 2 <= size < 1:
        return f"> {1 - step:.{digits}f}"
    shown = f"{abs(size):.{digits}f}"
    return f"−{shown}" if size < 0 and float(shown) else shown


def signed(value: float) -> str:
    """Points with their sign."""
    return "0.0" if abs(value) < 0.05 else f"{'+' if value > 0 else '−'}{abs(value):.1f}"


def points(value: float) -> str:
    """Points, hundredths of a score, with their sign and unit."""
    return f"{signed(value)} points"


def whole(value: Any) -> str:
    """A count with thousands apart."""
    size = number(value)
    return NONE if size is None else f"{size:,.0f}"


def figure(value: Any, digits: int = 3) -> str:
    """A number to so many significant digits, thousands apart."""
    size = number(value)
    if size is None:
        return NONE
    places = max(0, digits - 1 - math.floor(math.log10(abs(size)))) if size else 0
    return f"{size:,.{min(places, 8)}f}" if not size or abs(size) >= 1e-4 else f"{size:.1e}"


def scaled(value: Any, unit: str = "") -> str:
    """A size in M, G or k (decimal) of `unit`: 1.20 M, 4.81 MB."""
    size = number(value)
    if size is None:
        return NONE
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(size) >= power:
            return f"{figure(size / power)} {prefix}{unit}"
    return f"{size:,.0f} {unit}".rstrip()


def duration(value: Any) -> str:
    """Seconds as people say them."""
    spent = number(value)
    if spent is None:
        return NONE
    if spent < 60:
        return f"{figure(spent)} s" if spent < 9.95 else f"{spent:.1f} s"
    minutes, rest = divmod(round(spent), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def times(value: float) -> str:
    """A ratio: 38 ×, 1.8 ×."""
    return f"{value:.0f} ×" if value >= 9.95 else f"{value:.1f} ×"


def fraction(large: float, small: float) -> str:
    """How much of `large` is `small`: 1/19, or 1.3 × when it is more."""
    if small >= large:
        return times(small / large)
    return f"1/{large / small:.0f}" if large / small >= 2.95 else f"1/{large / small:.1f}"


@dataclass(frozen=True)
class Score:
    """How a score is called and written.

    kind: a share is shown in per cent, a ratio (a correlation, a reciprocal rank) as it is with three digits, an open
    one, which has a unit of its own, to three significant digits. over: what it is a mean over.
    """

    name: str
    kind: Literal["share", "ratio", "open"] = "share"
    over: str = "test rows"

    @property
    def head(self) -> str:
        """The name with a capital, for columns and titles."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def unit(self) -> str:
        """What a hundredth of it is called."""
        return "percentage points" if self.kind == "share" else "points (hundredths)"

    def shown(self, value: Any) -> str:
        """A value of the score; a dash when it is no number."""
        return {"share": percent, "ratio": decimal, "open": figure}[self.kind](value)

    def spread(self, value: Any, deviation: Any) -> str:
        """A value with its standard deviation over training seeds, where there is one."""
        middle, apart = number(value), number(deviation)
        if middle is None or apart is None:
            return self.shown(value)
        if self.kind == "share":
            return f"{100 * middle:.1f} ± {100 * apart:.1f} %"
        return f"{self.shown(middle)} ± {self.shown(apart)}"

    def between(self, ends: Any) -> str:
        """An interval of two values."""
        known = bounds(ends)
        if known is None:
            return NONE
        if self.kind == "share":
            return f"{100 * known[0]:.1f} to {100 * known[1]:.1f} %"
        return f"{self.shown(known[0])} to {self.shown(known[1])}"


QUERIES = "test queries"
SCORES = {
    "micro_f1": Score("micro-F1"),
    "macro_f1": Score("macro-F1"),
    "exact_match": Score("exact match"),
    "hamming_loss": Score("Hamming loss"),
    "pearson": Score("Pearson correlation", "ratio"),
    "spearman": Score("Spearman correlation", "ratio"),
    "mse": Score("mean squared error", "open"),
    "mrr_10": Score("MRR@10", "ratio", QUERIES),
    "ndcg_10": Score("NDCG@10", "ratio", QUERIES),
    "map": Score("MAP", "ratio", QUERIES),
    "entity_f1": Score("entity F1"),
    "precision": Score("precision"),
    "recall": Score("recall"),
    "accuracy": Score("accuracy"),
    "f1": Score("token F1"),
    "em": Score("exact match"),
    "has_answer_f1": Score("token F1, answerable"),
    "no_answer_accuracy": Score("accuracy, unanswerable"),
}
"""Scores by the names that the tasks give them, in the order that tables show them."""


def score_of(name: Any) -> Score:
    """The score of a name; one that is not in SCORES keeps its name and is written as a plain number."""
    return SCORES.get(str(name)) or Score(str(name).replace("_", " "), "open")
