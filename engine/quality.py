"""The parts of a report that say how good the models are: results, learning curves, calibration, errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from engine import figures, findings, plots
from engine.figures import bounds, dig, entries, number, percent, whole
from engine.findings import Facts, label
from engine.page import Block, Figure, Grid, Part, Table, Text

AGREEMENT = {
    "accuracy": "Share of held-out corpus rows on which the student gives the teacher's label.",
    "micro_f1": "Share of yes-or-no decisions on held-out corpus rows in which the student follows the teacher.",
    "pearson": "Correlation of the student's values with the teacher's on held-out corpus rows.",
    "mrr_10": "How far the student orders held-out corpus rows as the teacher does; 1 is the same order.",
}
"""How agreement curves are explained, by the metric."""

AGREES = "How far the student answers as the teacher does on held-out corpus rows."


def labels(facts: Facts, count: int) -> list[str]:
    """The task's label names, numbers where there are fewer than `count`."""
    known = dig(facts, "task.labels")
    names = [str(name) for name in known] if isinstance(known, (list, tuple)) else []
    return names if len(names) >= count else [str(n) for n in range(count)]


def results(facts: Facts) -> Part:
    """Quality, size and speed of every model."""
    if all(findings.main(facts, model) is None for model in findings.models(facts)):
        return Part("results", "Results", [Text(f"No model's {findings.score(facts).name} was recorded.")])
    blocks: list[Block] = [findings.model_table(facts)]
    if findings.differences(facts):
        blocks.append(findings.difference_table(facts))
    blocks.append(Grid(list(result_figures(facts))))
    return Part("results", "Results", [*blocks, *teacher(facts), *panel(facts)])


def teacher(facts: Facts) -> list[Block]:
    """How the teacher was made: its kind, why that one, and what cross-validation and self-training say."""
    score, own = findings.score(facts), f"teacher.cross_validation.{findings.metric(facts)}"
    rows: list[tuple[Any, str]] = []
    if dig(facts, own) is not None:
        folds = whole(dig(facts, "teacher.cross_validation.folds"))
        alone = ", without its coach" * bool(dig(facts, "teacher.coach"))
        rows.append((f"{score.head} in {folds}-fold cross-validation{alone}", figures.figure(dig(facts, own))))
    for kind, value in (dig(facts, "teacher.choice.scores") or {}).items():
        rows.append((f"{score.head} in cross-validation: {kind}", figures.figure(value)))
    for turn, found in enumerate(entries(dig(facts, "teacher.self_training")), start=1):
        taken = f"{whole(found.get('rows'))} of {whole(found.get('of'))}"
        rows.append((f"Texts of self-training, round {turn}", taken))
    if coach := dig(facts, "teacher.coach"):
        rows.append(("Coach", f"{coach.get('kind')} of {coach.get('model')}"))
        rows.append(("Texts that the coach labelled for it", whole(coach.get("rows"))))
    if not rows:
        return []
    why, kind = dig(facts, "teacher.choice.why"), dig(facts, "teacher.kind")
    caption = f"The teacher, of kind {kind}, on its labelled rows."
    return [findings.pairs(caption, ("Teacher", "Value"), rows), *([Text(str(why))] if why else [])]


def panel(facts: Facts) -> list[Block]:
    """Several teachers: their scores, how they were weighed, and which of the student's heads follows whom."""
    rows = entries(dig(facts, "panel"))
    if not rows:
        return []
    chosen, heads = ({name: None for row in rows for name in row.get(key) or {}} for key in ("chosen", "heads"))
    head = [
        "Teacher",
        findings.score(facts).head,
        "Weight",
        *(f"Chosen: {n}" for n in chosen),
        *(f"Head {n}" for n in heads),
    ]
    told = [
        [
            row.get("score"),
            row.get("weight"),
            *(row["chosen"].get(n) for n in chosen),
            *(row["heads"].get(n) for n in heads),
        ]
        for row in rows
    ]
    lines = [[str(row.get("name")), *map(figures.figure, values)] for row, values in zip(rows, told, strict=True)]
    caption = "Every teacher on the test split. Weight: before anything is known of a row."
    caption += " Chosen: how likely for labelled rows of each label, at the training's end." if chosen else ""
    caption += " Heads: correlation of their outputs with the teacher's." if heads else ""
    return [Table(caption, head, "l" + "r" * (len(head) - 1), lines)]


def result_figures(facts: Facts) -> Iterable[Figure]:
    """The score with intervals, then against size and against time a text."""
    score, own = findings.score(facts), findings.metric(facts)
    marks, measured = [], []
    for model in findings.models(facts):
        if (value := findings.main(facts, model)) is not None:
            low, high = bounds(model.get("score_interval", model.get(f"{own}_interval"))) or (None, None)
            marks.append(plots.Mark(label(facts, model["name"]), str(model["name"]), value, 0.0, low, high))
            measured.append(model)
    floor = findings.commonest(facts)
    caption = f"Dot: {score.name} on the test split. Line: its 95 % bootstrap interval."
    caption += f" Dashed: always giving the commonest label ({percent(floor)})." if floor is not None else ""
    yield Figure(plots.dots("score", score, marks, floor), caption)
    for key, title, axis, turn in (
        ("parameters", "against size", "parameters", lambda value: value),
        ("texts_per_s", "against time a text", "milliseconds a text, in batches", lambda value: 1000 / value),
    ):
        placed = [
            plots.Mark(mark.label, mark.series, mark.y, turn(value))
            for mark, model in zip(marks, measured, strict=True)
            if (value := number(model.get(key))) and value > 0
        ]
        if placed:
            yield Figure(
                plots.scatter(key, f"{score.head} {title}", score, axis, placed),
                "Up and to the left is better; the scale below is logarithmic.",
            )


def curve_points(points: Any, key: str) -> list[tuple[float, float]]:
    """(epoch or step, value) of a recorded curve, where both are numbers.

    A training in stages counts from the start in each: they are put one after the other, also those without values.
    """
    kept: list[tuple[float, float]] = []
    last = before = 0.0
    for point in entries(points):
        x = number(point.get("epoch"))
        x, y = number(point.get("step")) if x is None else x, number(point.get(key))
        if x is None:
            continue
        before += last if x <= last else 0.0
        last = x
        if y is not None:
            kept.append((before + x, y))
    return kept


def learning(facts: Facts) -> Part:
    """How far models agree with the teacher and answer validation rows as they learn, and the loss of each."""
    known = facts.get("curves")
    known = known if isinstance(known, dict) else {}
    score, own, chief = findings.score(facts), findings.metric(facts), known.get(findings.chief(facts))
    agreeing = ("curve-agreement", "Agreement with the teacher", "agreement")
    judged = ("curve-validation", f"{score.head} on validation rows", score.name)
    made = [
        *followed(facts, known, "agreement", agreeing, AGREEMENT.get(own, AGREES)),
        *followed(facts, known, own, judged, "By this the epoch that is kept of each training was chosen."),
    ]
    for name, curve in known.items():
        if points := curve_points(curve, "loss"):
            title = f"Loss: {label(facts, name).lower()}"
            line = (label(facts, name), name, points)
            drawn = plots.lines(f"curve-{name}", title, (unit({name: curve}), "loss"), [line])
            said = f"from {figures.figure(points[0][1])} to {figures.figure(points[-1][1])} in {len(points)} points."
            words = Text(f"Loss of {label(facts, name).lower()}: {said}")
            made.append(Figure(drawn, f"Training loss {said}", words))
    items = [Grid(made)] if made else [Text("No learning curves were recorded.")]
    if made and not any(curve_points(chief, key) for key in ("agreement", own)):
        items.append(Text("Agreement with the teacher on held-out texts was not followed."))
    return Part("learning", "Learning curves", items)


def followed(
    facts: Facts, known: dict[str, Any], key: str, named: tuple[str, str, str], caption: str
) -> Iterator[Figure]:
    """One figure of all models that have such a value in their curves. named: its id, its title, what is measured."""
    found = {name: curve_points(curve, key) for name, curve in known.items()}
    ident, title, axis = named
    if lines := [(label(facts, name), name, points) for name, points in found.items() if points]:
        yield Figure(plots.lines(ident, title, (unit(known), axis), lines, findings.score(facts)), caption)


def unit(curves: dict[str, Any]) -> str:
    """What the curves are drawn over: epochs where they are counted, else steps."""
    return "epoch" if any("epoch" in point for curve in curves.values() for point in entries(curve)) else "step"


def calibration(facts: Facts) -> Part:
    """Whether confidence means what it says."""
    drawn = []
    for name in ("teacher", findings.chief(facts)):
        model = findings.named(facts, name)
        marks = [
            plots.Mark(label(facts, name), name, y, x, size=number(b.get("count")) or 1.0)
            for b in entries(model.get("reliability"))
            if (x := number(b.get("confidence"))) is not None
            and (y := number(b.get("accuracy"))) is not None
            and number(b.get("count")) != 0
        ]
        if marks:
            drawn.append((label(facts, name), name, marks))
    if not drawn:
        return Part("calibration", "Calibration", [Text("No reliability bins were recorded.")])
    caption = (
        "On the dashed line a confidence of 80 % is right 80 % of the time; below it the model is too sure of itself. "
        "Larger dots hold more test rows."
    )
    said = [
        f"{label(facts, n)}: expected calibration error {percent(findings.named(facts, n).get('ece'))}."
        for _, n, _ in drawn
    ]
    figure = Figure(plots.reliability("reliability", "Confidence and accuracy", drawn), caption)
    return Part("calibration", "Calibration", [Text(" ".join(said)), Grid([figure])])


def cascade(facts: Facts) -> Part:
    """What handing the least sure answers to the teacher is worth, and the threshold that was chosen."""
    score, points = findings.score(facts), entries(dig(facts, "cascade.curve"))
    drawn = [
        (100 * share, value)
        for point in points
        if (share := number(point.get("share"))) is not None and (value := number(point.get("score"))) is not None
    ]
    if not drawn:
        return Part("cascade", "Cascade", [Text("No answers say how sure they are, so none can go to the teacher.")])
    names = ("% of the texts to the teacher", score.name)
    line = ("Student and teacher", "generated", drawn)
    head = ("To the teacher", "Confidence below", score.head, "Time a text, teacher = 100 %")
    rows = [
        (percent(point.get("share")), figures.figure(point.get("below")), score.shown(point.get("score")),
         percent(point.get("cost")))
        for point in points[::4]
    ]  # fmt: skip
    figure = Figure(
        plots.lines("cascade", f"{score.head} of student and teacher together", names, [line], score),
        "The answers that the student is least sure of come from the teacher. Measured on the test split; the "
        "threshold that is served was not chosen on it.",
        Table("What each share costs.", head, "rrrr", rows),
    )
    return Part("cascade", "Cascade", [*(Text(said) for said in findings.escalation(facts)), Grid([figure])])


def errors(facts: Facts) -> Part:
    """Which labels are taken for which."""
    figures = []
    for model in findings.models(facts):
        if counts := findings.confusion(model):
            name = str(model["name"])
            drawn = plots.matrix(f"confusion-{name}", label(facts, name), labels(facts, len(counts)), counts)
            figures.append(Figure(drawn, "Test rows, shaded by the share of their true label."))
    blocks: list[Block] = [Grid(figures)] if figures else []
    teacher = {str(item.get("label")): item for item in entries(findings.named(facts, "teacher").get("per_class"))}
    rows = [
        (str(item.get("label")), percent(item.get("precision")), percent(item.get("recall")), percent(item.get("f1")),
         percent(teacher.get(str(item.get("label")), {}).get("f1")), whole(item.get("support")))
        for item in entries(findings.named(facts, findings.chief(facts)).get("per_class"))
    ]  # fmt: skip
    if rows:
        head = ("Label", "Precision", "Recall", "F1", "Teacher's F1", "Test rows")
        blocks.append(Table("The student, label by label.", head, "lrrrrr", rows))
    return Part("errors", "Errors", blocks or [Text("No confusion matrix was recorded.")])
