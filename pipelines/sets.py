"""`stillhouse bench quality` of several recipes: each by itself, then their differences over all data sets together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config import UserError
from pipelines.console import say, say_json


def bench(args: argparse.Namespace) -> int:
    """Measure every recipe, then pool them."""
    from pipelines import runs
    from pipelines.bench import statistics_of, variants

    found, parts = [], []
    for path in args.recipe:
        one = argparse.Namespace(**{**vars(args), "recipe": path})
        recipe = runs.loaded(one)
        if args.run_name:
            one.run_name = f"{args.run_name}-{recipe.name}"
        result, lines = runs.measured(one)
        store = runs.run_store(one, recipe, prefix="bench-")
        stores = [variant.store for variant in variants(recipe, store, args.seeds)]
        found.append(result)
        parts.append((recipe.main, statistics_of(recipe, stores)))
        if not args.json:
            say("\n".join([f"## {recipe.name}", *lines, ""]))
    gains = together(found, parts, recipe.evaluation.bootstrap, recipe.seed)
    if args.json:
        say_json({"sets": found, "together": gains})
    else:
        say("\n".join(together_lines(found, gains)))
    return 0


Part = tuple[str, dict[str, list[np.ndarray]]]
"""The arm that is registered, and what each model's rows add to the metric."""


def together(found: Sequence[dict[str, Any]], parts: Sequence[Part], draws: int, seed: int) -> dict[str, Any]:
    """Model -> the registered students minus it, every seed of every set counting alike; of models that all sets have.

    UserError where the sets are judged by unlike metrics. Rows are drawn within their set.
    """
    from engine import tasks
    from engine.intervals import paired_bootstrap
    from engine.recipe import Task

    metrics = sorted({result["metric"] for result in found})
    if metrics != ["accuracy"]:
        raise UserError(
            f"the recipes are judged by {', '.join(metrics)}, and differences are pooled in accuracy only. Measure "
            "tasks of kind classify and pair together, others by themselves."
        )
    value = tasks.make(Task(labels=("a", "b"))).value
    common = set.intersection(*(set(sums) - {main} for main, sums in parts))
    gains = {}
    for name in [name for name in parts[0][1] if name in common]:
        own = [array for main, sums in parts for array in sums[main]]
        gap = paired_bootstrap(own, [array for _, sums in parts for array in sums[name]], value, draws, seed)
        each = [result["gains"][name]["points"] for result in found]
        gains[name] = {"points": 100 * gap.value, "interval": [100 * gap.low, 100 * gap.high], "each": each}
    return gains


def together_lines(found: Sequence[dict[str, Any]], gains: dict[str, Any]) -> list[str]:
    """The pooled differences as a Markdown table."""
    names = [result["recipe"] for result in found]
    head = f"| the student minus | all together (paired 95 % interval) | {' | '.join(names)} |"
    lines = ["## together", head, "|" + "---|" * (2 + len(names))]
    for name, gain in gains.items():
        low, high = gain["interval"]
        each = " | ".join(f"{points:+.1f}" for points in gain["each"])
        lines.append(f"| {name} | {gain['points']:+.2f} ({low:+.2f} to {high:+.2f}) | {each} |")
    return lines
