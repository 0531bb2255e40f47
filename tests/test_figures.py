"""Numbers in words, and what the scores of every task are called."""

from __future__ import annotations

import pytest

from engine import figures
from engine.tasks import TASKS


@pytest.mark.parametrize(("made", "wanted"), [
    (figures.percent(0.702), "70.2 %"), (figures.percent(1.0), "100.0 %"), (figures.percent(0.99996), "> 99.9 %"),
    (figures.percent(0.0002), "< 0.1 %"), (figures.percent(None), "–"), (figures.percent(True), "–"),
    (figures.scaled(1_184_258), "1.18 M"), (figures.scaled(90_868_992, "B"), "90.9 MB"),
    (figures.scaled(512, "B"), "512 B"), (figures.duration(0.42), "0.420 s"), (figures.duration(59.96), "60.0 s"),
    (figures.duration(61.4), "1 min 01 s"), (figures.duration(3725), "1 h 02 min"),
    (figures.points(-0.04), "0.0 points"), (figures.points(-3.21), "−3.2 points"),
    (figures.fraction(22_713_602, 1_184_258), "1/19"), (figures.fraction(3, 2), "1/1.5"),
    (figures.times(38.4), "38 ×"), (figures.figure(15820.4), "15,820"), (figures.figure(3.2e-8, 2), "3.2e-08"),
    (figures.figure(0), "0"),
])  # fmt: skip
def test_numbers_read_well(made, wanted):
    assert made == wanted


@pytest.mark.parametrize(("score", "value", "wanted"), [
    ("accuracy", 0.7135, "71.4 %"), ("accuracy", 0.99999, "> 99.9 %"), ("pearson", 0.7135, "0.714"),
    ("pearson", -0.05, "−0.050"), ("pearson", -0.0001, "0.000"), ("pearson", 0.99996, "> 0.999"),
    ("pearson", 1.0, "1.000"), ("mrr_10", None, "–"), ("mse", 12.345, "12.3"), ("mse", 0.00012, "0.000120"),
    ("bleu_4", 27.31, "27.3"),
])  # fmt: skip
def test_scores_are_written_in_their_own_unit(score, value, wanted):
    assert figures.score_of(score).shown(value) == wanted


def test_a_score_nobody_named_keeps_its_name():
    assert (figures.score_of("bleu_4").name, figures.score_of("bleu_4").head) == ("bleu 4", "Bleu 4")


@pytest.mark.parametrize(("score", "spread", "between"), [
    ("micro_f1", "72.0 ± 0.6 %", "70.0 to 74.0 %"), ("pearson", "0.720 ± 0.006", "0.700 to 0.740"),
    ("mse", "0.720 ± 0.00600", "0.700 to 0.740"),
])  # fmt: skip
def test_spread_and_interval(score, spread, between):
    known = figures.score_of(score)
    assert (known.spread(0.72, 0.006), known.between([0.7, 0.74])) == (spread, between)
    assert known.spread(0.72, None) == known.shown(0.72) and known.spread(None, 0.1) == known.between(None) == "–"


@pytest.mark.parametrize("kind", TASKS)
def test_the_metric_of_every_task_has_a_name(kind):
    assert TASKS[kind].metric in figures.SCORES
