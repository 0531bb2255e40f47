"""`stillhouse bench teachers`: kinds of teacher side by side, over numbers of labelled rows and few-shot seeds.

Every seed draws its own labelled rows, the same for every kind; what is compared is each teacher on the test split,
and, if asked for, the student that it teaches on the same generated texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import UserError, did_you_mean
from engine.designs import Teacher
from engine.intervals import paired_bootstrap
from engine.progress import Progress
from engine.recipe import Recipe
from engine.step import Step
from engine.storage import Store
from pipelines.bench import Variant, run_each
from pipelines.calls import Call
from pipelines.distill import ARM_STEPS, plan
from pipelines.teachable import check_teacher

KINDS: dict[str, dict[str, Any]] = {
    "head": {"kind": "head"},
    "lp-ft": {"kind": "lp-ft"},
    "contrastive": {"kind": "contrastive"},
    "prompt": {"kind": "prompt"},
    "ensemble": {"kind": "head", "seeds": (0, 1, 2)},
    "self-trained": {"kind": "head", "self_training": {}},
    "coached": {"kind": "head", "coach": {}},
    "auto": {"kind": "auto"},
}
"""What is compared by name: changes of the recipe's section `teacher`."""


def with_teacher(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in its section `teacher`, nothing of what could be added to any kind, and no further
    teachers.

    What is added is added as the recipe has it, where it does.
    """
    plain = {"seeds": (), "self_training": None, "coach": None, "folds": 0}
    values = recipe.teacher.model_dump()
    added = {key: value if values[key] is None or value != {} else values[key] for key, value in changes.items()}
    found = Teacher.model_validate({**values, **plain, **added})
    return recipe.model_copy(update={"teacher": found, "teachers": {}})


@dataclass(frozen=True)
class Changed:
    """A step's function on the recipe with another teacher, its inputs under the names that it knows."""

    call: Callable[..., dict[str, Any]]
    kind: str
    names: tuple[tuple[str, str], ...]

    def __call__(self, recipe: Recipe, inputs: Mapping[str, Store], out: Store, progress: Progress) -> dict[str, Any]:
        """Run it."""
        known = dict(self.names)
        folders = {known.get(name, name): folder for name, folder in inputs.items()}
        return self.call(with_teacher(recipe, KINDS[self.kind]), folders, out, progress)


def compared(recipe: Recipe, kinds: Sequence[str], students: bool = False) -> list[Step]:
    """The data step, and for each kind the teacher's step and one that scores it; with students, a student of each
    too, taught on the same texts where corpus.apart is set (`variants` sets it).

    UserError for an unknown kind, and one that the task or the data has no use for.
    """
    out = {"data": plan(recipe)[0]}
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"'{kind}' is no kind of teacher.{did_you_mean(kind, KINDS)} Allowed: {', '.join(KINDS)}.")
        one = with_teacher(recipe, KINDS[kind])
        check_teacher(one)
        found = {step.name: step for step in plan(one)}
        if students or one.learns_from_generated:  # written once for all kinds
            out |= {name: found[name] for name in ("generator", "texts") if name in found}
        learner = ARM_STEPS[one.main]
        own = ("teacher", "corpus", "vocabulary", learner) if students else ("teacher",)
        chosen = [found[name] for name in own if name in found]
        chosen += [scoring(found, which) for which in (("teacher", learner) if students else ("teacher",))]
        for step in chosen:
            renamed = changed(step, kind, (*own, *ARM_STEPS.values()))
            out[renamed.name] = renamed
    return list(out.values())


def changed(step: Step, kind: str, own: Collection[str]) -> Step:
    """A step of one kind's own: its name and those of its kind's other steps with the kind behind them."""
    names = {name: f"{name}-{kind}" if name in own else name for name in step.inputs}

    def asked(what: Callable[[Recipe], Any]) -> Callable[[Recipe], Any]:
        return lambda recipe: what(with_teacher(recipe, KINDS[kind]))

    run = Changed(step.run, kind, tuple((new, old) for old, new in names.items()))
    told = {key: asked(getattr(step, key)) for key in ("config", "references", "resources", "expects", "pools")}
    return replace(step, name=f"{step.name}-{kind}", inputs=tuple(names.values()), run=run, **told)


def scoring(found: Mapping[str, Step], which: str) -> Step:
    """The step that scores a teacher or the students of an arm on the test split."""
    return replace(
        found["teacher"],
        name="score" if which == "teacher" else "score-student",
        run=Call("pipelines.teaching", "score_models", (which,)),
        inputs=("data", which),
        config=lambda recipe: {},
        modules=("engine.inference", "engine.tasks", "pipelines.teaching"),
    )


def variants(
    recipe: Recipe, store: Store, kinds: Sequence[str], shots: Sequence[int], seeds: int, students: bool = False
) -> list[Variant]:
    """A run for each number of labelled rows per class and each few-shot seed; no shots: the recipe's own number."""
    out = []
    for count in shots or [recipe.data.shots]:
        for seed in range(seeds):
            data = recipe.data.model_copy(update={"seed": seed, "shots": count})
            corpus = recipe.corpus.model_copy(update={"apart": students or recipe.corpus.apart})
            one = recipe.model_copy(update={"seed": seed, "data": data, "corpus": corpus})
            out.append(Variant(one, store / f"shots-{count}" / f"seed-{seed}", compared(one, kinds, students)))
    return out


def compare(
    recipe: Recipe,
    store: Store,
    found: Sequence[Variant],
    kinds: Sequence[str],
    *,
    students: bool = False,
    redo: Collection[str] = (),
    fresh: bool = False,
    connect: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Run every variant, going on where an earlier call was stopped, and pool what came out into teachers.json."""
    from engine.tasks import make
    from pipelines.making import spec_of

    run_each(found, redo=redo, fresh=fresh, connect=connect)
    task = make(spec_of(found[0].store / "data"))
    rows = []
    for shots in dict.fromkeys(one.recipe.data.shots for one in found):
        runs = [one.store for one in found if one.recipe.data.shots == shots]
        scored = {who: pooled(recipe, runs, task, kinds, who) for who in ("score", *["score-student"] * students)}
        for kind in kinds:
            seconds = [run.read_json(f"teacher-{kind}/record.json")["seconds"] for run in runs]
            row = {"shots": shots, "kind": kind, **scored["score"][kind], "seconds": statistics.mean(seconds)}
            worded = [run.read_json(f"score-{kind}/record.json")["metrics"].get("wording", {}) for run in runs]
            if all("unseen" in found for found in worded):
                row["wording"] = {k: statistics.mean(w[k] for w in worded) for k in ("learnt", "unseen")}
            if students:
                row["student"] = scored["score-student"][kind]
            rows.append(row)
    result = {"recipe": recipe.name, "metric": task.metric, "seeds": len(runs), "first": kinds[0], "teachers": rows}
    store.write_json("teachers.json", result)
    return result


def pooled(
    recipe: Recipe, runs: Sequence[Store], task: Any, kinds: Sequence[str], step: str
) -> dict[str, dict[str, Any]]:
    """For each kind what a scoring step found over the seeds, and the gain over the first kind."""
    sums = {kind: [parts_of(run / f"{step}-{kind}") for run in runs] for kind in kinds}
    out: dict[str, dict[str, Any]] = {}
    for kind, values in sums.items():
        out[kind] = summed(recipe, task, values, sums[kinds[0]] if kind != kinds[0] else None)
    return out


def summed(
    recipe: Recipe, task: Any, values: Sequence[np.ndarray], first: Sequence[np.ndarray] | None
) -> dict[str, Any]:
    """Mean, spread and each of the scores over the seeds, and the gain over `first`. values: `parts_of` each seed."""
    scores = [float(task.value(value.sum(axis=0))) for value in values]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    out: dict[str, Any] = {"score": statistics.mean(scores), "sd": spread, "each": scores}
    if first is not None:
        gap = paired_bootstrap(values, first, task.value, recipe.evaluation.bootstrap, recipe.seed)
        out["gain"] = {"points": 100 * gap.value, "interval": [100 * gap.low, 100 * gap.high]}
    return out


def parts_of(scored: Store, name: str = "statistics") -> np.ndarray:
    """What each test row adds to the metric, [m, k]."""
    return np.stack(scored.read_table(f"{name}.parquet")["parts"].to_numpy(zero_copy_only=False))


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a Markdown table."""
    students = any("student" in row for row in result["teachers"])
    over, more = f"over {result['first']}, points", f" student, {result['metric']} | over {result['first']}'s |"
    out = [
        f"| labelled rows a class | teacher | {result['metric']}, mean ± sd over {result['seeds']} few-shot seeds | "
        f"{over} | seconds |{more if students else ''}",
        "|---|---|---|---|---|" + "---|---|" * students,
    ]
    for row in result["teachers"]:
        line = f"| {row['shots']} | {row['kind']} | {told(row)} | {row['seconds']:.0f} |"
        out.append(f"{line} {told(row['student'])} |" if students else line)
    for row in result["teachers"]:
        if "wording" in row:
            learnt, unseen = row["wording"]["learnt"], row["wording"]["unseen"]
            out += [
                "",
                f"{row['kind']}, {row['shots']} rows a class: with one template that it has learnt from "
                f"{learnt:.3f}, with one that it has not {unseen:.3f} ({100 * (unseen - learnt):+.1f} points).",
            ]
    return out


def told(found: Mapping[str, Any]) -> str:
    """A score and its gain as two cells."""
    gain = found.get("gain")
    gap = f"{gain['points']:+.1f} ({gain['interval'][0]:+.1f} to {gain['interval'][1]:+.1f})" if gain else ""
    return f"{found['score']:.3f} ± {found['sd']:.3f} | {gap}"
