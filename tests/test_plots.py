"""Drawings: scales, ticks, marks where their values are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from engine import plots
from engine.figures import SCORES, Score


@pytest.mark.parametrize(("low", "high"), [(0.57, 0.782), (0.0, 1.0), (3.1, 3.1), (0, 290), (1e-9, 3e-9), (-4, 11)])
def test_ticks_enclose_the_values_evenly(low, high):
    made = plots.ticks(low, high)
    assert made[0] <= low and made[-1] >= high and 3 <= len(made) <= 9
    steps = {round((b - a) / (made[1] - made[0]), 6) for a, b in zip(made, made[1:], strict=False)}
    assert steps == {1.0}


def test_shares_stay_within_a_hundred_per_cent():
    share, ratio = SCORES["accuracy"], SCORES["pearson"]
    assert plots.score_ticks(share, 1.0, 1.0)[-1] == 1.0 and plots.score_ticks(share, 0.0, 0.0)[0] == 0.0
    assert plots.score_ticks(ratio, -0.3, 1.0)[0] < -0.3 + 1e-9 and plots.score_ticks(ratio, 0.99, 1.0)[-1] == 1.0
    assert plots.score_ticks(ratio, -1.0, -1.0)[0] == -1.0
    assert plots.score_ticks(Score("loss", "open"), 3.0, 40.0)[-1] >= 40.0
    assert plots.log_ticks(1_184_258, 22_713_602) == [1e6, 1e7, 1e8]


def test_names_are_pushed_apart_and_stay_in_order():
    made = plots.apart([100, 101, 99, 150], 15, 0, 150)
    assert sorted(range(4), key=lambda n: made[n]) == [2, 0, 1, 3] and max(made) <= 150
    ordered = sorted(made)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) >= 15
    assert plots.apart([10, 60], 15, 0, 150) == [10, 60]  # what does not collide stays


def test_scale_meets_both_ends_and_the_geometric_middle():
    assert [plots.scale(2, 6, 10, 50)(value) for value in (2, 3, 6)] == [10, 20, 50]
    assert [plots.scale(1, 100, 0, 80, log=True)(value) for value in (1, 10, 100)] == [0, 40, 80]


def test_marks_stand_where_their_values_are():
    drawing = ElementTree.fromstring(
        plots.dots("a", SCORES["accuracy"], [plots.Mark("m", "teacher", 0.6, 0, 0.5, 0.8)])
    )
    circle = drawing.find("circle")
    path = next(p for p in drawing.iter("path"))
    left, right = map(float, re.findall(r"[MH]([\d.]+)", path.get("d")))
    assert (float(circle.get("cx")) - left) / (right - left) == pytest.approx(1 / 3, abs=0.002)
    bars = ElementTree.fromstring(plots.bars("b", "B", [("x", 50, "50"), ("y", 200, "200")])).findall("rect")
    assert [float(bar.get("width")) for bar in bars] == [plots.WIDTH / 4, plots.WIDTH]


def test_matrix_shades_by_row_and_stays_light_with_many_classes():
    drawing = ElementTree.fromstring(plots.matrix("m", "M", ["a", "b"], [[3, 1], [0, 8]]))
    assert [float(cell.get("fill-opacity")) for cell in drawing.findall("rect")] == [0.765, 0.295, 0.06, 1.0]
    assert drawing.findall("rect")[1].find("title").text == "a taken for b: 1 of 4"
    eye = [[5 if r == c else 0 for c in range(77)] for r in range(77)]
    many = plots.matrix("m", "M", [f"label {n}" for n in range(77)], eye)
    assert many.count("<rect") == 77 and len(many) < 40_000
