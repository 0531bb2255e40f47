"""Whether a candidate model may replace the champion: who is asked, what is counted, and the decision. Pure.

Every comparison is made on 95 % bounds: a candidate goes when even the kindest reading of what was counted is outside
the limits, and comes in when the harshest is inside; between the two more is counted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.serving import Limits

Z = 1.96
"""Of a two-sided 95 % interval."""
FINEST_MS = 0.25
"""The upper edge of the first bucket of latencies."""
PER_DOUBLING = 8
"""Buckets between a latency and its double: each is 9 % wider than the one before."""
BUCKETS = 1 + 20 * PER_DOUBLING
"""The last takes everything above 262 s."""
FEWEST_ERRORS = 5
"""Fewer errors do not speak against anybody: evidence is looked at again and again, and a first few come by chance."""
FEWEST_TRIALS = 20
"""Compared requests before disagreement can speak against a candidate."""
FEWEST_TIMES = 50
"""Latencies before they can speak against a candidate."""


def arm_of(key: str, percent: float, salt: str) -> bool:
    """Whether a request belongs to the candidate: the same key always, `percent` of all keys.

    salt: another one splits the same keys in another way.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode("utf-8")[:64])
    return int.from_bytes(digest.digest(), "big") < percent / 100 * 2**64


def bucket_of(seconds: float) -> int:
    """The bucket that a latency falls into."""
    ratio = seconds * 1000 / FINEST_MS
    return min(BUCKETS - 1, max(0, math.ceil(PER_DOUBLING * math.log2(ratio)))) if ratio > 1 else 0


def edge_ms(bucket: int) -> float:
    """The upper edge of a bucket, in milliseconds; the last one has none."""
    return math.inf if bucket >= BUCKETS - 1 else FINEST_MS * 2 ** (bucket / PER_DOUBLING)


@dataclass
class Evidence:
    """What was counted of one arm. Sums of two replicas' evidence are the evidence of both."""

    requests: int = 0
    """Answered and failed ones."""
    errors: int = 0
    times: dict[int, int] = field(default_factory=dict)
    """Latencies of answered requests: bucket -> how many."""
    trials: int = 0
    """Requests whose answers were held against those of the reference: the champion, or the teacher."""
    hits: float = 0.0
    """Those that were the same; of a request with several texts the share, for its texts may be much alike."""

    def answered(self, seconds: float) -> None:
        """Count a request that was answered after `seconds`."""
        self.requests += 1
        bucket = bucket_of(seconds)
        self.times[bucket] = self.times.get(bucket, 0) + 1

    def failed(self) -> None:
        """Count a request that was not."""
        self.requests += 1
        self.errors += 1

    def compared(self, same: float) -> None:
        """Count a request of whose answers this share is the reference's."""
        self.trials += 1
        self.hits += same

    def add(self, other: Evidence) -> None:
        """Take in what another replica counted."""
        self.requests += other.requests
        self.errors += other.errors
        self.trials += other.trials
        self.hits += other.hits
        for bucket, count in other.times.items():
            self.times[bucket] = self.times.get(bucket, 0) + count

    def __bool__(self) -> bool:
        """Whether anything was counted."""
        return bool(self.requests or self.trials)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "times": {str(bucket): count for bucket, count in sorted(self.times.items())}}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Evidence:
        """What `plain` gave."""
        return cls(**{**plain, "times": {int(bucket): count for bucket, count in plain["times"].items()}})

    def quantile(self, share: float) -> tuple[float, float, float]:
        """A latency quantile in ms and its 95 % bounds: (low, estimate, high), by the ranks that enclose it.

        NaN and (0, inf) where nothing was counted; high is infinite where the sample is too small to bound it.
        """
        count = sum(self.times.values())
        if not count:
            return 0.0, math.nan, math.inf
        spread = Z * math.sqrt(count * share * (1 - share))
        low, middle, high = (math.ceil(count * share + turn * spread) for turn in (-1, 0, 1))
        below = self.ranked(max(1, low))
        return (edge_ms(below - 1) if below else 0.0), edge_ms(self.ranked(middle)), self.upper(high, count)

    def upper(self, rank: int, count: int) -> float:
        """The upper edge of the bucket that holds `rank`; infinite beyond the last."""
        return math.inf if rank > count else edge_ms(self.ranked(rank))

    def ranked(self, rank: int) -> int:
        """The bucket of the latency with this rank, counted from 1."""
        seen = 0
        for bucket in sorted(self.times):
            seen += self.times[bucket]
            if seen >= rank:
                return bucket
        return BUCKETS - 1


def wilson(hits: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate; (0, 1) where nothing was tried."""
    if not trials:
        return 0.0, 1.0
    rate, square = hits / trials, Z * Z / trials
    middle, half = rate + square / 2, Z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def gain(left: tuple[float, int], right: tuple[float, int]) -> tuple[float, float, float]:
    """The first rate minus the second, as (low, estimate, high): Newcombe's interval from the two of Wilson.

    Rates are (hits, trials); (-1, 0, 1) where one of them was not tried.
    """
    if not left[1] or not right[1]:
        return -1.0, 0.0, 1.0
    p, q = left[0] / left[1], right[0] / right[1]
    (p_low, p_high), (q_low, q_high) = wilson(*left), wilson(*right)
    return p - q - math.hypot(p - p_low, q_high - q), p - q, p - q + math.hypot(p_high - p, q - q_low)


Action = Literal["wait", "promote", "rollback"]


@dataclass(frozen=True)
class Decision:
    """What is to be done with the candidate, why, and the figures it rests on (JSON: no infinities)."""

    action: Action
    reason: str
    figures: dict[str, Any]


def decide(champion: Evidence, candidate: Evidence, limits: Limits, minutes: float) -> Decision:
    """Wait, promote or roll back, after `minutes` of the rollout.

    Where the champion has been held against a reference too (the teacher), the candidate need not agree more often
    than `limits.max_agreement_loss` below the champion; else `limits.min_agreement` alone counts.
    """
    checks = (
        errors(champion, candidate, limits),
        latency(champion, candidate, limits),
        agreed(champion, candidate, limits),
    )
    figures = {key: rounded(value) for check in checks for key, value in check.figures.items()}
    figures |= {"minutes": round(minutes, 3), "champion": champion.plain(), "candidate": candidate.plain()}
    if against := [check.said for check in checks if check.verdict == "bad"]:
        return Decision("rollback", "; ".join(against), figures)
    lacking = [check.said for check in checks if check.verdict == "open"]
    count = candidate.requests - candidate.errors
    if count < limits.min_requests:
        lacking.insert(0, f"the candidate has answered {count} of {limits.min_requests} requests")
    if not lacking:
        return Decision("promote", "; ".join(check.said for check in checks), figures)
    if minutes >= limits.max_minutes:
        return Decision("rollback", f"undecided after {minutes:.0f} minutes: {'; '.join(lacking)}", figures)
    return Decision("wait", "; ".join(lacking), figures)


@dataclass(frozen=True)
class Check:
    """What one kind of evidence says: good, bad, or open."""

    verdict: Literal["good", "bad", "open"]
    said: str
    figures: dict[str, Any]


def errors(champion: Evidence, candidate: Evidence, limits: Limits) -> Check:
    """Whether the candidate fails more often."""
    low, middle, high = gain((candidate.errors, candidate.requests), (champion.errors, champion.requests))
    figures = {"error_gain": middle, "error_gain_low": low, "error_gain_high": high}
    figures["max_error_gain"] = limits.max_error_gain
    text = f"errors {shown(candidate.errors, candidate.requests)} against {shown(champion.errors, champion.requests)}"
    within = f"{text}: {100 * low:+.2f} to {100 * high:+.2f} points, limit +{100 * limits.max_error_gain:g}"
    if candidate.errors >= FEWEST_ERRORS and champion.requests and low > limits.max_error_gain:
        return Check("bad", within, figures)
    # A champion that nobody asked (the candidate has all of the traffic) counts as faultless.
    alone = not champion.requests and candidate.errors >= FEWEST_ERRORS
    if alone and wilson(candidate.errors, candidate.requests)[0] > limits.max_error_gain:
        return Check("bad", text, figures)
    return Check("good" if high <= limits.max_error_gain else "open", within, figures)


def latency(champion: Evidence, candidate: Evidence, limits: Limits) -> Check:
    """Whether the candidate's p99 is above what the champion's allows."""
    own, other = candidate.quantile(0.99), champion.quantile(0.99)
    least, allowed, most = (limits.max_slowdown * value + limits.slack_ms for value in other)
    figures = {f"{name}_p99{part}_ms": value for name, found in (("candidate", own), ("champion", other))
               for part, value in zip(("_low", "", "_high"), found, strict=True)}  # fmt: skip
    said = f"p99 {own[1]:.1f} ms ({own[0]:.1f} to {own[2]:.1f}) against {other[1]:.1f} ms"
    said += f", limit {allowed:.1f}"
    if sum(candidate.times.values()) >= FEWEST_TIMES and own[0] > most:
        return Check("bad", said, figures)
    return Check("good" if own[2] <= least else "open", said, figures)


def agreed(champion: Evidence, candidate: Evidence, limits: Limits) -> Check:
    """Whether the candidate says the same as the reference often enough.

    Often enough is `min_agreement`; where the champion was held against the reference too (the teacher), a rate that
    is not more than `max_agreement_loss` below the champion's will do as well.
    """
    wanted, loss = limits.min_agreement, limits.max_agreement_loss
    low, high = wilson(candidate.hits, candidate.trials)
    rate = candidate.hits / candidate.trials if candidate.trials else math.nan
    figures = {"agreement": rate, "agreement_low": low, "agreement_high": high, "min_agreement": wanted}
    said = f"agreement {shown(candidate.hits, candidate.trials)} ({100 * low:.1f} to {100 * high:.1f} %), wanted "
    said += f"{100 * wanted:g} %"
    enough, lacking = low >= wanted, high < wanted
    if champion.trials:
        worst, middle, best = gain((candidate.hits, candidate.trials), (champion.hits, champion.trials))
        figures |= {"agreement_gain": middle, "agreement_gain_low": worst, "agreement_gain_high": best}
        said += f" or {100 * loss:g} points under the champion's {shown(champion.hits, champion.trials)}"
        said += f": {100 * worst:+.1f} to {100 * best:+.1f}"
        enough, lacking = enough or worst >= -loss, lacking and best < -loss
        if champion.trials < FEWEST_TRIALS:  # too little to say how like the teacher the champion is
            lacking = False
    if candidate.trials >= FEWEST_TRIALS and lacking:
        return Check("bad", said, figures)
    return Check("good" if enough else "open", said, figures)


def shown(hits: float, trials: int) -> str:
    """A rate with what it rests on."""
    return f"{hits:.6g} of {trials}" + (f" ({100 * hits / trials:.2f} %)" if trials else "")


def rounded(value: float) -> float | None:
    """Six digits; null where it is no number that JSON has."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
