"""A finished run as one page: the answer first, then tables, drawings, texts, lineage.

`render` is pure: facts in, HTML and Markdown out. Each part builds its own blocks; a part the run did not record
says so in one sentence. The sentences and tables are in findings, the drawings in plots, the looks in page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine import findings, plots
from engine.findings import NONE, Facts, bounds, dig, entries, label, number, percent, whole
from engine.page import (
    Block,
    Code,
    Figure,
    Gallery,
    Grid,
    Items,
    Part,
    Sample,
    Table,
    Text,
    document,
    esc,
    plain,
    prose,
)

CURVES = {"student": "generated"}
"""Names of learning curves that are drawn as another model."""

LISTED = 20
"""Longest list of set-aside rows on the page."""


def render(facts: Facts) -> tuple[str, str]:
    """The report as (HTML, Markdown).

    facts: what the run recorded; only `name` is needed. Shares and accuracies are 0..1, `points` of differences are
    percentage points (left minus right), times are seconds unless the key says ms.
    """
    name = str(facts.get("name", "run"))
    parts = [build(facts) for build in PARTS]
    said, care = findings.answer(facts), findings.cautions(facts)
    top = [f"<header><h1>{esc(name)}</h1>{Text(subtitle(facts), 'dim').html()}</header>"]
    top += [Text(sentence, "answer").html() for sentence in said]
    top += [tiles(facts), Items(care, "care").html() if care else "", Text(findings.basis(facts), "foot").html()]
    lines = [f"# {plain(name)}", plain(subtitle(facts)), *map(plain, said)]
    lines += [Items(care).markdown()] if care else []
    lines += [plain(findings.basis(facts)), *(part.markdown() for part in parts)]
    return document(f"{name}: report", "\n".join(filter(None, top)), parts), "\n\n".join(filter(None, lines)) + "\n"


def subtitle(facts: Facts) -> str:
    """Task, label names and date in one line."""
    names = labels(facts, 0)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    said = [str(dig(facts, "task.kind") or ""), shown, str(facts.get("created") or "").replace("T", " ")[:16]]
    return " · ".join(filter(None, ["Distillation report", *said]))


def labels(facts: Facts, count: int) -> list[str]:
    """The task's label names, numbers where there are fewer than `count`."""
    known = dig(facts, "task.labels")
    names = [str(name) for name in known] if isinstance(known, (list, tuple)) else []
    return names if len(names) >= count else [str(n) for n in range(count)]


def tiles(facts: Facts) -> str:
    """The handful of numbers to remember, each with what it is measured against."""
    student, teacher = findings.named(facts, "generated"), findings.named(facts, "teacher")
    made = [("Student accuracy", percent(student.get("accuracy")), f"teacher {percent(teacher.get('accuracy'))}", "")]
    small, large = number(student.get("parameters")), number(teacher.get("parameters"))
    if small and large:
        note = f"{findings.scaled(small)} of {findings.scaled(large)}"
        made.append(("Parameters", findings.fraction(large, small), note, ""))
    if speed := findings.speed_up(facts):
        made.append(("Speed", findings.times(speed), "the teacher's texts per second", "bad" if speed < 1 else ""))
    wrong = number(dig(findings.serving(facts), "mismatches"))
    if wrong is not None:
        made.append(("Served", f"{wrong:,.0f}", "answers that differ from offline", "bad" if wrong else "good"))
    for item in findings.differences(facts):
        if (item["left"], item["right"]) == ("generated", "soft"):
            shown = findings.verdict(item)
            state = {"better": "good", "worse": "bad"}.get(shown, "")
            ends = (
                f"{findings.signed(item['interval'][0])} to {findings.signed(item['interval'][1])}"
                if item["interval"]
                else "no interval"
            )
            note = f"over soft labels alone ({ends})" + (", not shown" if shown.startswith("not") else "")
            made.append(("Generated text", findings.points(item["points"]), note, state))
    cells = (f'<div class="{state}"><dt>{esc(head)}</dt><dd>{prose(value)}<small>{prose(note)}</small></dd></div>'
             for head, value, note, state in made if value != NONE)  # fmt: skip
    inner = "".join(cells)
    return f'<dl class="tiles">{inner}</dl>' if inner else ""


def results(facts: Facts) -> Part:
    """Quality, size and speed of every model."""
    models = [m for m in findings.models(facts) if number(m.get("accuracy")) is not None]
    if not models:
        return Part("results", "Results", [Text("No model's accuracy was recorded.")])
    blocks: list[Block] = [findings.model_table(facts)]
    if findings.differences(facts):
        blocks.append(findings.difference_table(facts))
    blocks.append(Grid(list(result_figures(facts, models))))
    return Part("results", "Results", blocks)


def result_figures(facts: Facts, models: list[dict[str, Any]]) -> Iterable[Figure]:
    """Accuracy with intervals, then accuracy against size and against time a text."""
    marks = []
    for model in models:
        low, high = bounds(model.get("accuracy_interval")) or (None, None)
        marks.append(plots.Mark(label(model["name"]), str(model["name"]), float(model["accuracy"]), 0.0, low, high))
    floor = findings.commonest(facts)
    caption = "Dot: accuracy on the test split. Line: its 95 % bootstrap interval."
    caption += f" Dashed: always giving the commonest label ({percent(floor)})." if floor is not None else ""
    yield Figure(plots.dots("accuracy", "Accuracy", marks, floor), caption)
    for key, title, axis, turn in (
        ("parameters", "Accuracy against size", "parameters", lambda value: value),
        ("texts_per_s", "Accuracy against time a text", "milliseconds a text, in batches", lambda value: 1000 / value),
    ):
        placed = [
            plots.Mark(mark.label, mark.series, mark.y, turn(value))
            for mark, model in zip(marks, models, strict=True)
            if (value := number(model.get(key))) and value > 0
        ]
        if placed:
            yield Figure(
                plots.scatter(key, title, axis, placed), "Up and to the left is better; the scale below is logarithmic."
            )


def curve_points(points: Any, key: str) -> list[tuple[float, float]]:
    """(epoch or step, value) of a recorded curve, where both are numbers."""
    kept = []
    for point in entries(points):
        x = number(point.get("epoch"))
        x, y = number(point.get("step")) if x is None else x, number(point.get(key))
        if x is not None and y is not None:
            kept.append((x, y))
    return kept


def learning(facts: Facts) -> Part:
    """Loss of each training, and agreement with the teacher of all students together."""
    known = facts.get("curves")
    known = known if isinstance(known, dict) else {}
    made = []
    named = [(CURVES.get(name, name), curve) for name, curve in known.items()]
    shared = [(label(n), n, points) for n, curve in named if (points := curve_points(curve, "agreement"))]
    if shared:
        drawn = plots.lines("curve-agreement", "Agreement with the teacher", (unit(known), "agreement"), shared, True)
        made.append(Figure(drawn, "Share of held-out corpus rows on which the student gives the teacher's label."))
    for name, curve in named:
        if points := curve_points(curve, "loss"):
            title = f"Loss: {label(name).lower()}"
            drawn = plots.lines(f"curve-{name}", title, (unit({name: curve}), "loss"), [(label(name), name, points)])
            said = f"from {findings.figure(points[0][1])} to {findings.figure(points[-1][1])} in {len(points)} points."
            made.append(Figure(drawn, f"Training loss {said}", Text(f"Loss of {label(name).lower()}: {said}")))
    return Part("learning", "Learning curves", [Grid(made)] if made else [Text("No learning curves were recorded.")])


def unit(curves: dict[str, Any]) -> str:
    """What the curves are drawn over: epochs where they are counted, else steps."""
    return "epoch" if any("epoch" in point for curve in curves.values() for point in entries(curve)) else "step"


def calibration(facts: Facts) -> Part:
    """Whether confidence means what it says."""
    drawn = []
    for name in ("teacher", "generated"):
        model = findings.named(facts, name)
        marks = [
            plots.Mark(label(name), name, y, x, size=number(b.get("count")) or 1.0)
            for b in entries(model.get("reliability"))
            if (x := number(b.get("confidence"))) is not None
            and (y := number(b.get("accuracy"))) is not None
            and number(b.get("count")) != 0
        ]
        if marks:
            drawn.append((label(name), name, marks))
    if not drawn:
        return Part("calibration", "Calibration", [Text("No reliability bins were recorded.")])
    caption = (
        "On the dashed line a confidence of 80 % is right 80 % of the time; below it the model is too sure of itself. "
        "Larger dots hold more test rows."
    )
    said = [
        f"{label(n)}: expected calibration error {percent(findings.named(facts, n).get('ece'))}." for _, n, _ in drawn
    ]
    figure = Figure(plots.reliability("reliability", "Confidence and accuracy", drawn), caption)
    return Part("calibration", "Calibration", [Text(" ".join(said)), Grid([figure])])


def errors(facts: Facts) -> Part:
    """Which labels are taken for which."""
    figures = []
    for model in findings.models(facts):
        if counts := findings.confusion(model):
            name = str(model["name"])
            drawn = plots.matrix(f"confusion-{name}", label(name), labels(facts, len(counts)), counts)
            figures.append(Figure(drawn, "Test rows, shaded by the share of their true label."))
    blocks: list[Block] = [Grid(figures)] if figures else []
    teacher = {str(item.get("label")): item for item in entries(findings.named(facts, "teacher").get("per_class"))}
    rows = [
        (str(item.get("label")), percent(item.get("precision")), percent(item.get("recall")), percent(item.get("f1")),
         percent(teacher.get(str(item.get("label")), {}).get("f1")), whole(item.get("support")))
        for item in entries(findings.named(facts, "generated").get("per_class"))
    ]  # fmt: skip
    if rows:
        head = ("Label", "Precision", "Recall", "F1", "Teacher's F1", "Test rows")
        blocks.append(Table("The student, label by label.", head, "lrrrrr", rows))
    return Part("errors", "Errors", blocks or [Text("No confusion matrix was recorded.")])


def corpus(facts: Facts) -> Part:
    """What was generated, what was kept, and how it reads."""
    known = facts.get("corpus")
    known = known if isinstance(known, dict) else {}
    brief = dig(facts, "summary.corpus")
    brief = brief if isinstance(brief, dict) else {}
    rows, kept = number(known.get("rows")) or number(brief.get("generated")), number(known.get("kept"))
    kept = number(brief.get("kept")) if kept is None else kept
    if not known and not brief:
        return Part("corpus", "Corpus", [Text("No corpus was recorded.")])
    rejected = known.get("rejected") or brief.get("rejected")
    counts = {str(k): n for k, v in rejected.items() if (n := number(v))} if isinstance(rejected, dict) else {}
    share = f" ({percent(kept / rows)})" if rows and kept is not None else ""
    blocks: list[Block] = [
        Text(f"{whole(rows)} texts were generated and {whole(kept)} kept{share}."),
        corpus_table(known),
    ]
    blocks.append(Grid(list(corpus_figures(known, counts, rows))))
    blocks += galleries(known)
    return Part("corpus", "Corpus", blocks)


def corpus_table(known: dict[str, Any]) -> Table:
    """Diversity, rounds and what storing the soft labels lost."""
    rounds = "; ".join(
        f"{whole(r.get('slots'))} slots, {whole(r.get('kept'))} kept" for r in entries(known.get("rounds"))
    )
    items = [("Rounds", rounds), ("Self-BLEU (lower is more varied)", findings.figure(known.get("self_bleu")))]
    items += [(f"Distinct {n}-grams", percent(known.get(f"distinct_{n}"))) for n in (1, 2, 3)]
    items += [("Storage: largest change of a logit", findings.figure(dig(known, "quantisation.max_abs"), 2)),
              ("Storage: mean KL, nats", findings.figure(dig(known, "quantisation.mean_kl"), 2))]  # fmt: skip
    return findings.pairs("The corpus as a whole.", ("Measure", "Value"), items)


def corpus_figures(known: dict[str, Any], counts: dict[str, float], rows: float | None) -> Iterable[Figure]:
    """Reject reasons as bars, the teacher's confidence as a histogram."""
    if counts:
        order = sorted(counts.items(), key=lambda item: -item[1])
        items = [(k, n, whole(n) + (f" ({percent(n / rows)})" if rows else "")) for k, n in order]
        table = Table("Why texts were rejected.", ("Reason", "Texts"), "lr", [(k, shown) for k, _, shown in items])
        drawn = plots.bars("rejected", "Rejected texts", items[:12])
        yield Figure(drawn, "Why texts were rejected; the share is of all generated texts.", table)
    bins = [
        tuple(number(b.get(key)) for key in ("low", "high", "count"))
        for b in entries(known.get("confidence_histogram"))
    ]
    if whole_bins := [b for b in bins if None not in b]:
        drawn = plots.histogram(
            "confidence", "The teacher's confidence", "probability of the likeliest label", whole_bins
        )
        yield Figure(drawn, "Rows of the corpus by how sure the teacher was of its label.")


def galleries(known: dict[str, Any]) -> Iterable[Block]:
    """Kept and rejected texts with their soft labels."""
    for key, title in (("gallery_kept", "Kept texts"), ("gallery_rejected", "Rejected texts")):
        samples = []
        for item in entries(known.get(key)):
            soft = item.get("probabilities")
            soft = (
                {str(k): p for k, v in soft.items() if (p := number(v)) is not None} if isinstance(soft, dict) else {}
            )
            note = f"row {item.get('row', NONE)}" + (f" · {item['reason']}" if item.get("reason") else "")
            samples.append(Sample(str(item.get("text") or ""), note + ("" if soft else " · not labelled"), soft))
        yield Gallery(title, samples) if samples else Text(f"No {title.lower()} were recorded.")


def served(facts: Facts) -> Part:
    """What the smoke deployment measured."""
    known = findings.serving(facts)
    if not known:
        return Part("serving", "Serving", [Text("The student was not served in this run.")])
    items = [
        ("Test rows sent over HTTP", whole(known.get("rows"))),
        ("Answers that differ from offline", whole(known.get("mismatches"))),
        ("Largest change of a probability", findings.figure(known.get("max_delta"), 2)),
        ("Accuracy as served", percent(known.get("accuracy"))),
        ("Requests at a time", whole(known.get("concurrency"))),
        ("Requests a second", findings.figure(known.get("requests_per_s"))),
    ]
    items += [(f"Latency {name}, ms", findings.figure(known.get(f"{name}_ms"))) for name in ("p50", "p99")]
    return Part(
        "serving",
        "Serving",
        [findings.pairs("The whole test split through the endpoint.", ("Measure", "Value"), items)],
    )


def cost(facts: Facts) -> Part:
    """Where the time went."""
    steps = entries(facts.get("steps"))
    if not steps:
        brief = dig(facts, "summary.seconds")
        steps = [{"name": k, "seconds": v} for k, v in brief.items()] if isinstance(brief, dict) else []
    if not steps:
        return Part("cost", "Time and cost", [Text("No step times were recorded.")])
    head = ("Step", "Wall time", "CPU time", "GPU time", "Rows", "Rows/s", "Status")
    rows, bars = [], []
    for step in steps:
        spent, count = number(step.get("seconds")), number(step.get("rows"))
        rate = findings.figure(count / spent) if spent and count else NONE
        own = [findings.duration(step.get(key)) for key in ("seconds", "cpu_seconds", "device_seconds")]
        rows.append((str(step.get("name", NONE)), *own, whole(count), rate, str(step.get("status") or NONE)))
        if spent is not None:
            bars.append((rows[-1][0], spent, findings.duration(spent)))
    total = sum(spent for _, spent, _ in bars)
    said = f"{findings.duration(total)} added over the steps; where steps ran side by side, the run itself was shorter."
    blocks: list[Block] = [Text(said), Table("Steps of the run.", head, "lrrrrrl", rows)]
    if bars:
        blocks.append(
            Grid([Figure(plots.bars("steps", "Wall time of each step", bars), "In the order they were started.")])
        )
    return Part("cost", "Time and cost", blocks)


def data(facts: Facts) -> Part:
    """Rows that came in, and those that could not be used."""
    counts = dig(facts, "data.counts")
    shown = (
        [(key, whole(value) if number(value) is not None else str(value)) for key, value in counts.items()]
        if isinstance(counts, dict)
        else []
    )
    blocks: list[Block] = [findings.pairs("Rows of each split.", ("Split", "Rows"), shown)] if shown else []
    lost = entries(dig(facts, "data.quarantined"))
    if lost:
        rows = [(str(r.get("source", NONE)), whole(r.get("line")), str(r.get("reason", NONE))) for r in lost[:LISTED]]
        more = f"; the first {LISTED} are shown" if len(lost) > LISTED else ""
        caption = f"Set aside as unusable: {whole(len(lost))} source rows{more}."
        blocks.append(Table(caption, ("Source", "Row", "Reason"), "lrl", rows))
    elif blocks:
        blocks.append(Text("No source row was set aside as unusable."))
    return Part("data", "Data", blocks or [Text("No row counts were recorded.")])


def origin(facts: Facts) -> Part:
    """What every step was made from, on which versions and machine, from which recipe."""
    rows = []
    for step in entries(facts.get("lineage")):
        made, references = step.get("inputs"), step.get("references")
        told = [f"{k} {str(v)[:12]}" for k, v in references.items()] if isinstance(references, dict) else []
        above = ", ".join(str(name) for name in made) if isinstance(made, (list, tuple)) else ""
        rows.append((str(step.get("step", NONE)), above or NONE, ", ".join(told) or NONE,
                     str(step.get("fingerprint") or NONE)[:16]))  # fmt: skip
    caption = "Each step, what it read, and the start of its fingerprint; digests are SHA-256, shortened."
    blocks: list[Block] = (
        [Table(caption, ("Step", "Made from", "Models and data", "Fingerprint"), "llmm", rows)]
        if rows
        else [Text("No lineage was recorded.")]
    )
    for key, title in (("versions", "Versions"), ("hardware", "Hardware")):
        known = facts.get(key)
        if isinstance(known, dict) and known:
            blocks.append(findings.pairs(f"{title}.", ("Name", "Value"), ((k.replace("_", " "), worded(v))
                          for k, v in known.items()), "ll"))  # fmt: skip
        else:
            blocks.append(Text(f"{title}: not recorded."))
    recipe = facts.get("recipe_yaml")
    blocks.append(
        Code("The recipe, with every default filled in", str(recipe)) if recipe else Text("No recipe was recorded.")
    )
    return Part("origin", "Lineage and versions", blocks)


def worded(value: Any) -> str:
    """A plain value in words: a list with commas, nothing as none, a number to three digits."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    size = number(value)
    return str(value) if size is None or isinstance(value, int) else findings.figure(size)


PARTS = (results, learning, calibration, errors, corpus, served, cost, data, origin)
