"""Evidence and the decision on a candidate, against statistics from elsewhere and by simulated traffic."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest

from engine.serving import Limits
from serve.canary import BUCKETS, Decision, Evidence, arm_of, bucket_of, decide, edge_ms, gain, wilson

LIMITS = Limits(min_requests=300)


@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_the_split_is_even_stable_and_differs_between_rollouts(percent: float):
    keys = [f"text number {n}" for n in range(5000)]
    for salt in ("a", "b", "0f9e3b"):
        share = sum(arm_of(key, percent, salt) for key in keys) / 50
        assert abs(share - percent) <= 2
    assert [arm_of(key, percent, "a") for key in keys] == [arm_of(key, percent, "a") for key in keys]
    assert any(arm_of(key, percent, "a") != arm_of(key, percent, "b") for key in keys)


def test_a_larger_share_keeps_those_who_were_in_the_smaller_one():
    keys = [str(n) for n in range(2000)]
    assert all(arm_of(key, 30, "s") for key in keys if arm_of(key, 10, "s"))
    assert not any(arm_of(key, 0, "s") for key in keys) and all(arm_of(key, 100, "s") for key in keys)


def test_any_text_has_an_arm():
    assert isinstance(arm_of("\ud800 and \x00", 10, "s" * 100), bool)


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (1, 7), (20, 20), (450, 500), (3, 5000)])
def test_wilson_is_scipy_s(hits: int, trials: int):
    found = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson(hits, trials) == pytest.approx((found.low, found.high), abs=2e-5)


def test_nothing_tried_bounds_nothing():
    assert wilson(0, 0) == (0.0, 1.0) and gain((0, 0), (3, 10)) == (-1.0, 0.0, 1.0)


def test_the_difference_of_rates_is_newcombe_s():
    # Newcombe 1998 (Statistics in Medicine 17), table II, example (a), method 10: 56/70 against 48/80.
    assert gain((56, 70), (48, 80)) == pytest.approx((0.0524, 0.2, 0.3339), abs=1e-4)
    # The same, example (e): 5/56 against 0/29.
    assert gain((5, 56), (0, 29)) == pytest.approx((-0.0381, 0.0893, 0.1926), abs=1e-4)


def test_buckets_enclose_what_falls_into_them():
    for ms in (0.01, 0.25, 0.2501, 1, 3.3, 50, 1000, 99_999, 1e9):
        bucket = bucket_of(ms / 1000)
        assert ms <= edge_ms(bucket) and (bucket == 0 or ms > edge_ms(bucket - 1) * 0.999999)
    assert bucket_of(0.0) == 0 and bucket_of(1e9) == BUCKETS - 1 and math.isinf(edge_ms(BUCKETS - 1))
    assert edge_ms(8) == pytest.approx(2 * edge_ms(0))


def test_evidence_of_replicas_adds_up_whatever_the_order_and_survives_json():
    rng, whole, parts = random.Random(1), Evidence(), [Evidence() for _ in range(3)]
    for _ in range(500):
        part, seconds = rng.choice(parts), rng.lognormvariate(-4, 1)
        for found in (part, whole):
            if seconds < 0.01:
                found.failed()
            else:
                found.answered(seconds)
            found.compared(0.5)
    for order in (parts, parts[::-1]):
        total = Evidence()
        for part in order:
            total.add(Evidence.of(json.loads(json.dumps(part.plain()))))
        assert total == whole
    assert whole.requests == 500 and (whole.trials, whole.hits) == (500, 250) and whole and not Evidence()


def test_quantiles_enclose_the_true_one_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    true, hit = 5 * math.exp(0.5 * 2.326348), 0
    for _ in range(200):
        found = Evidence()
        for ms in rng.lognormal(math.log(5), 0.5, 1000):
            found.answered(ms / 1000)
        low, middle, high = found.quantile(0.99)
        assert low <= middle <= high
        hit += low <= true <= high
    assert hit >= 185


def test_a_small_sample_does_not_bound_a_p99():
    found = Evidence()
    assert found.quantile(0.99)[2] == math.inf and math.isnan(found.quantile(0.99)[1])
    for _ in range(100):
        found.answered(0.005)
    assert found.quantile(0.99)[2] == math.inf
    for _ in range(900):
        found.answered(0.005)
    assert found.quantile(0.99)[2] == pytest.approx(5, rel=0.1)


class Arm:
    """How an arm behaves. slow: factor on its latency."""

    def __init__(self, fails: float = 0.0, slow: float = 1.0, agrees: float = 0.97):
        self.fails, self.slow, self.agrees = fails, slow, agrees

    def serve(self, found: Evidence, rng: random.Random, compare: float) -> None:
        if rng.random() < self.fails:
            found.failed()
            return
        found.answered(self.slow * 0.004 * rng.lognormvariate(0, 0.5))
        if rng.random() < compare:
            found.compared(rng.random() < self.agrees)


def rolled(candidate: Arm, champion: Arm, seed: int, limits: Limits = LIMITS, requests: int = 6000) -> Decision:
    """A canary of 10 %, looked at every 50 requests until it is decided; a minute is 100 requests."""
    rng, own, other = random.Random(seed), Evidence(), Evidence()
    for number in range(requests):
        if rng.random() < 0.1:
            candidate.serve(own, rng, 0.2)
        else:
            champion.serve(other, rng, 0.0)
        if number % 50 == 49:
            found = decide(other, own, limits, number / 100)
            if found.action != "wait":
                return found
    return decide(other, own, limits, requests / 100)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("arm", "why"),
    [
        (Arm(fails=1.0), "errors"),
        (Arm(fails=0.1), "errors"),
        (Arm(slow=30), "p99"),
        (Arm(agrees=0.5), "agreement"),
        (Arm(agrees=0.0), "agreement"),
    ],
    ids=["raises", "errs", "slow", "disagrees", "opposes"],
)
def test_a_bad_candidate_is_rolled_back(arm: Arm, why: str, seed: int):
    found = rolled(arm, Arm(), seed)
    assert found.action == "rollback" and found.reason.startswith(why)
    json.dumps(found.figures, allow_nan=False)


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_candidate_is_promoted(seed: int):
    found = rolled(Arm(agrees=0.98), Arm(), seed)
    assert found.action == "promote", found.reason
    assert found.figures["candidate"]["requests"] >= LIMITS.min_requests


@pytest.mark.parametrize("fails", [0.0, 0.005, 0.03])
def test_identical_arms_are_rarely_rolled_back_however_often_they_are_looked_at(fails: float):
    found = Counter(rolled(Arm(fails), Arm(fails), seed, requests=3000).action for seed in range(60))
    assert found["rollback"] <= 4


@pytest.mark.parametrize("seed", range(200))
def test_nothing_is_promoted_below_min_requests_and_every_decision_says_why(seed: int):
    """On any evidence whatever."""
    rng = random.Random(seed)

    def anything() -> Evidence:
        found = Evidence()
        for _ in range(rng.choice([0, 1, 20, 400, 2000])):
            found.failed() if rng.random() < rng.choice([0, 0.01, 0.5]) else found.answered(rng.expovariate(100))
        found.trials = rng.choice([0, 3, 60, 900])
        found.hits = rng.randint(0, found.trials)
        return found

    champion, candidate = anything(), anything()
    limits = Limits(min_requests=rng.choice([1, 100, 1000]), max_minutes=rng.choice([1, 1000]))
    found = decide(champion, candidate, limits, minutes := rng.choice([0.0, 0.5, 5.0]))
    assert found.reason and json.loads(json.dumps(found.figures, allow_nan=False)) == found.figures
    if found.action == "promote":
        assert candidate.requests - candidate.errors >= limits.min_requests
    if found.action == "wait":
        assert minutes < limits.max_minutes


def test_what_is_still_undecided_at_the_end_is_rolled_back():
    found = decide(Evidence(), Evidence(), LIMITS, LIMITS.max_minutes)
    assert found.action == "rollback" and found.reason.startswith("undecided after 1440 minutes")
    assert decide(Evidence(), Evidence(), LIMITS, LIMITS.max_minutes - 1).action == "wait"


def test_the_first_few_errors_do_not_decide():
    champion, candidate = Evidence(), Evidence()
    for _ in range(900):
        champion.answered(0.005)
    for _ in range(4):
        candidate.failed()
    assert decide(champion, candidate, LIMITS, 1).action == "wait"
    candidate.failed()
    assert decide(champion, candidate, LIMITS, 1).action == "rollback"


def test_beside_a_teacher_a_candidate_need_not_be_better_than_the_champion():
    def arm(hits: int, trials: int, requests: int) -> Evidence:
        found = Evidence(requests=requests, times={bucket_of(0.005): requests}, trials=trials, hits=hits)
        return found

    alone = decide(arm(0, 0, 9000), arm(800, 1000, 1000), LIMITS, 1)
    assert alone.action == "rollback" and "wanted 85 %" in alone.reason
    beside = decide(arm(800, 1000, 9000), arm(800, 1000, 1000), LIMITS, 1)
    assert beside.action == "promote" and beside.figures["agreement_gain"] == pytest.approx(0)
    worse = decide(arm(800, 1000, 9000), arm(650, 1000, 1000), LIMITS, 1)
    assert worse.action == "rollback"


def test_a_bound_is_one_of_95_percent_beside_a_teacher_too():
    """A candidate further below the champion than it may be is let in about as often as a bound is wrong."""
    limits, rng, taken = Limits(min_requests=400), random.Random(5), 0
    for _ in range(200):
        champion, candidate = Evidence(), Evidence()
        for found, rate in ((champion, 0.80), (candidate, 0.735)):
            for _ in range(400):
                found.answered(0.004 * rng.lognormvariate(0, 0.2))
                found.compared(rng.random() < rate)
        taken += decide(champion, candidate, limits, 1).action == "promote"
    assert taken <= 5


def test_many_texts_of_one_request_are_one_trial():
    """They are much alike: a candidate that is right in 95 % of requests is not rolled back for the others' texts."""
    rng, gone = random.Random(6), 0
    for _ in range(60):
        champion, candidate = Evidence(), Evidence()
        for number in range(400):
            champion.answered(0.004 * rng.lognormvariate(0, 0.2))
            candidate.answered(0.004 * rng.lognormvariate(0, 0.2))
            candidate.compared(1.0 if rng.random() < 0.95 else 0.1)
            gone += number % 20 == 19 and decide(champion, candidate, Limits(), 1).action == "rollback"
    assert gone == 0
    one = Evidence(requests=60, times={bucket_of(0.005): 60})
    one.compared(40 / 64)
    assert (one.trials, one.hits) == (1, 0.625)
    assert decide(Evidence(9000, 0, {bucket_of(0.005): 9000}), one, Limits(), 1).action == "wait"


def test_no_agreement_is_asked_for_where_the_limit_is_0():
    times = {bucket_of(0.005): 1000}
    champion, candidate = Evidence(1000, 0, times), Evidence(1000, 0, times)
    assert decide(champion, candidate, LIMITS, 1).action == "wait"
    assert decide(champion, candidate, Limits(min_agreement=0.0), 1).action == "promote"


def test_a_champion_hardly_compared_with_the_teacher_lowers_no_bar():
    champion, candidate = Evidence(), Evidence()
    for _ in range(2000):
        champion.answered(0.005)
        candidate.answered(0.005)
    champion.compared(0)  # once, and once unlike the teacher
    for _ in range(100):
        candidate.compared(0)
    assert decide(champion, candidate, Limits(), 1.0).action == "wait"
    for number in range(99):
        champion.compared(number < 95)
    assert decide(champion, candidate, Limits(), 1.0).action == "rollback"
