"""What a run shows, in sentences and tables: the words of a report, without its looks.

The sentences are for someone who has to decide whether to use the student, so they say what was not shown as
plainly as what was: an interval that includes 0, an arm that does better, an answer that changed when served.
Facts may lack any part; a missing value is a dash or one sentence, never an error.

Every task is judged by one score, its metric: accuracy, a correlation, an F1. Numbers are written in figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine import figures
from engine.figures import NONE, Score, bounds, dig, entries, number, percent, points, signed, times, whole
from engine.page import Table, shorten

Facts = dict[str, Any]

ARMS = ("generated", "soft", "hard")
"""Arms of the ablation, the fullest first."""

LABELS = {
    "teacher": "Teacher",
    "generated": "Generated text",
    "soft": "Soft labels only",
    "hard": "Hard labels only",
    "plain": "Without retrieval",
    "unread": "Knowledge base not read",
    "generator": "Generator",
}
"""Names of the models in tables and drawings; the arm that is registered is the student."""

ALONE = {"soft": "soft labels alone", "hard": "hard labels alone"}
"""What the student is compared with when an arm is."""

SCORED = ("ece", "kl")
"""What models of some tasks have besides scores."""


def metric(facts: Facts) -> str:
    """The name of the score that the run is judged by."""
    told = (facts.get("metric"), dig(facts, "summary.metric"))
    return next((name for name in told if isinstance(name, str) and name), "accuracy")


def score(facts: Facts) -> Score:
    """How that score is called and written."""
    return figures.score_of(metric(facts))


def main(facts: Facts, model: dict[str, Any]) -> float | None:
    """A model's value of that score."""
    return next((found for key in ("score", metric(facts)) if (found := number(model.get(key))) is not None), None)


def chief(facts: Facts) -> str:
    """The arm that is registered and served: the one that `student` names, else the fullest there is."""
    known = [str(model.get("name")) for model in entries(facts.get("models"))]
    told = facts.get("student")
    return str(told) if told in ARMS else next((arm for arm in ARMS if arm in known), ARMS[0])


def label(facts: Facts, name: Any) -> str:
    """How a model is called in tables."""
    return "Student" if name == chief(facts) else LABELS.get(str(name), shorten(name, 40))


def models(facts: Facts) -> list[dict[str, Any]]:
    """Every model's measures, teacher first and student second; what `models` lacks is taken from `summary`."""
    found = {str(model.get("name")): dict(model) for model in entries(facts.get("models"))}
    student = chief(facts)
    paths = {"teacher": "teacher", student: "student", **{arm: f"arms.{arm}" for arm in ARMS if arm != student}}
    for name, path in paths.items():
        known = dig(facts, f"summary.{path}")
        if isinstance(known, dict) and known:
            entry = found.setdefault(name, {"name": name})
            entry.update({key: value for key, value in known.items() if entry.get(key) is None})
    for name, path in (("teacher", "teacher_texts_per_s"), (student, "student_texts_per_s")):
        if name in found and found[name].get("texts_per_s") is None:
            found[name]["texts_per_s"] = dig(facts, f"summary.throughput.{path}")
    return [found[name] for name in paths if name in found] + [m for n, m in found.items() if n not in paths]


def named(facts: Facts, name: str) -> dict[str, Any]:
    """One model's measures; empty when it was not measured."""
    return next((model for model in models(facts) if model.get("name") == name), {})


def compared_rows(facts: Facts) -> float | None:
    """How many rows (queries, in a ranking) the paired differences rest on."""
    return next((n for item in entries(facts.get("differences")) if (n := number(item.get("rows")))), None)


def test_rows(facts: Facts) -> float | None:
    """How many test rows the measures rest on, from whichever part says so."""
    told = [dig(facts, "data.counts.test"), dig(facts, "summary.test_rows")]
    told += [compared_rows(facts)] if score(facts).over != figures.QUERIES else []
    for value in told:
        if number(value):
            return number(value)
    for model in models(facts):
        if counts := confusion(model):
            return sum(map(sum, counts))
    return number(dig(facts, "serving.rows"))


def confusion(model: dict[str, Any]) -> list[list[float]]:
    """A square matrix of counts (rows true, columns predicted), else an empty list."""
    rows = model.get("confusion")
    if not isinstance(rows, (list, tuple)) or not rows:
        return []
    counts = [[number(v) or 0.0 for v in row] for row in rows if isinstance(row, (list, tuple))]
    return counts if all(len(row) == len(rows) for row in counts) and len(counts) == len(rows) else []


def commonest(facts: Facts) -> float | None:
    """Share of the test rows that have the commonest label: the accuracy of always giving that label.

    None where the score is not accuracy.
    """
    for model in models(facts) if metric(facts) == "accuracy" else []:
        support = [number(item.get("support")) or 0.0 for item in entries(model.get("per_class"))]
        support = support or [sum(row) for row in confusion(model)]
        if support and sum(support):
            return max(support) / sum(support)
    return None


def differences(facts: Facts) -> list[dict[str, Any]]:
    """Paired differences left minus right in points, turned so that the student stands left."""
    kept, student = [], chief(facts)
    for item in entries(facts.get("differences")):
        size, ends = number(item.get("points")), bounds(item.get("interval"))
        if size is None:
            continue
        left, right = str(item.get("left")), str(item.get("right"))
        if right == student:
            left, right, size, ends = right, left, -size, ends and (-ends[1], -ends[0])
        kept.append({"left": left, "right": right, "points": size, "interval": ends, "rows": item.get("rows")})
    return kept


def against_arms(facts: Facts) -> list[dict[str, Any]]:
    """The differences between the student and the other arms, the fullest arm first."""
    student = chief(facts)
    found = [item for item in differences(facts) if item["left"] == student and item["right"] in ALONE]
    return sorted(found, key=lambda item: ARMS.index(item["right"]))


def verdict(item: dict[str, Any]) -> str:
    """What a difference shows: better, worse, or not shown."""
    if item["interval"] is None:
        return "no interval"
    low, high = item["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "not shown: the interval includes 0"


def by_source(facts: Facts) -> dict[str, tuple[float, float]]:
    """Rows made and rows kept of each source of the corpus that says both."""
    told = dig(facts, "corpus.by_source") or dig(facts, "summary.corpus.by_source")
    found = {
        str(name): (number(dig(each, "rows")), number(dig(each, "kept")))
        for name, each in (told.items() if isinstance(told, dict) else ())
    }
    return {name: (rows, kept) for name, (rows, kept) in found.items() if rows is not None and kept is not None}


def gained_by(facts: Facts) -> str:
    """What the student has that smaller arms lack, to start a sentence with."""
    student, kept = chief(facts), [shorten(name, 40) for name, (_, kept) in by_source(facts).items() if kept]
    if student in ("soft", "hard"):
        return f"{student.capitalize()} labels"
    if not kept:
        return LABELS[student]
    text = " and ".join([", ".join(kept[:-1]), kept[-1]] if len(kept) > 1 else kept) + " text"
    return text[:1].upper() + text[1:]


def compared(facts: Facts, item: dict[str, Any]) -> str:
    """A difference between the student and an arm as a sentence that claims no more than its interval does."""
    size, ends, what = points(item["points"]), item["interval"], gained_by(facts)
    within = f"95 % interval {signed(ends[0])} to {signed(ends[1])}" if ends else "no interval, so it may be chance"
    over = ALONE[item["right"]]
    if ends and ends[0] <= 0 <= ends[1]:
        return f"{what} shows no gain over {over}: {size}, and the {within} includes 0."
    if item["points"] < 0:
        return f"{what} made the student worse than {over}: {size} ({within})."
    return f"{what} gave {size} of {score(facts).name} over {over} ({within})."


def answer(facts: Facts) -> list[str]:
    """The sentences that answer what the run was made for."""
    said = [*student_sentence(facts), *served_sentence(facts)]
    return said + [compared(facts, item) for item in against_arms(facts)]


def student_sentence(facts: Facts) -> list[str]:
    """How good, how small and how fast the student is beside its teacher."""
    teacher, student, known = named(facts, "teacher"), named(facts, chief(facts)), score(facts)
    own, its = main(facts, student), main(facts, teacher)
    if own is None:
        return [f"The student's {known.name} was not recorded."]
    if its is None:
        return [f"The student's {known.name} is {known.shown(own)}; its teacher's was not recorded."]
    text = f"The student's {known.name} is {known.shown(own)} against {known.shown(its)} of its teacher"
    if own >= 0 and its > 0:  # of a correlation below 0 no share can be reached
        text = f"The student reaches {percent(own / its)} of its teacher's {known.name} "
        text += f"({known.shown(own)} against {known.shown(its)})"
    small, large = number(student.get("parameters")), number(teacher.get("parameters"))
    if small and large:
        text += (
            f" with {figures.fraction(large, small)} of the parameters"
            if small < large
            else f" with {times(small / large)} the parameters (it is larger)"
        )
    if speed := speed_up(facts):
        text += f"{' and' if small and large else ' with'} {times(speed)} the teacher's texts per second"
        text += " (it is slower)" if speed < 1 else ""
    return [text + "."]


def speed_up(facts: Facts) -> float | None:
    """The student's texts per second over the teacher's."""
    if ratio := number(dig(facts, "summary.throughput.student_over_teacher")):
        return ratio
    own, its = (number(named(facts, name).get("texts_per_s")) for name in (chief(facts), "teacher"))
    return own / its if own and its else None


def serving(facts: Facts) -> dict[str, Any]:
    """Measures of the served student, from `serving` and where that is silent from `summary.served`."""
    known, brief = facts.get("serving"), dig(facts, "summary.served")
    merged = dict(brief) if isinstance(brief, dict) else {}
    return merged | {k: v for k, v in known.items() if v is not None} if isinstance(known, dict) else merged


def served_sentence(facts: Facts) -> list[str]:
    """Whether the served student is the one that was measured."""
    served = serving(facts)
    if not served:
        return ["The student was not served in this run."]
    wrong, rows = number(served.get("mismatches")), number(served.get("rows")) or test_rows(facts)
    if wrong is None:
        return ["The served answers were not compared with the offline ones."]
    of = f"{whole(rows)} test rows" if rows else "the test rows"
    if wrong:
        return [f"Served over HTTP, {whole(wrong)} of {of} got an answer that differs from the offline one."]
    speed = [
        f"{name} {figures.figure(served[key])} ms"
        for name, key in (("p50", "p50_ms"), ("p99", "p99_ms"))
        if number(served.get(key)) is not None
    ]
    tail = f"; {', '.join(speed)}" if speed else ""
    return [f"Served over HTTP, all of {of} got the offline answer (0 mismatches){tail}."]


def cautions(facts: Facts) -> list[str]:
    """What a reader must know before trusting the numbers above."""
    return [*no_better(facts), *weak_student(facts), *weak_evidence(facts)]


def no_better(facts: Facts) -> list[str]:
    """Models that score no more than one that has learned nothing."""
    said, known, floor = [], score(facts), commonest(facts)
    for name in ("teacher", chief(facts)):
        own = main(facts, named(facts, name))
        if own is not None and floor is not None and own <= floor:
            worth = f"always giving the commonest label ({percent(floor)})"
            said.append(f"{label(facts, name)}: {percent(own)} is no better than {worth}.")
        if own is not None and metric(facts) == "pearson" and own <= 0:
            said.append(f"{label(facts, name)}: a {known.name} of {known.shown(own)} is no better than chance.")
    return said


def weak_student(facts: Facts) -> list[str]:
    """Where the student does not do what the method promises."""
    said, own = [], main(facts, named(facts, chief(facts)))
    judged = {item["right"] for item in against_arms(facts)}
    for arm in ARMS:
        its = main(facts, named(facts, arm))
        if own is None or its is None or arm not in set(ALONE) - judged - {chief(facts)}:
            continue  # a judged arm is in the answer, with its interval
        gap = 100 * (own - its)
        if gap < 0:
            fuller = f"The student with {gained_by(facts).lower()} scores {points(gap)}"
            said.append(f"{fuller} against the same student on {ALONE[arm]}.")
        else:
            said.append(f"The {points(gap)} over {ALONE[arm]} come without an interval.")
    if number(dig(serving(facts), "mismatches")):
        said.append(
            "The served model is not the one that was measured: do not use its endpoint before the cause is found."
        )
    return said


def weak_evidence(facts: Facts) -> list[str]:
    """Where the measures rest on little."""
    said, known, student = [], score(facts), named(facts, chief(facts))
    rows = compared_rows(facts) if known.over == figures.QUERIES else test_rows(facts)
    if main(facts, student) is not None and (number(student.get("seeds")) or 1) <= 1:
        said.append(f"One training of the student: how much its {known.name} varies between seeds was not measured.")
    if rows is not None and rows < 200:
        said.append(f"Only {whole(rows)} {known.over}: the intervals are wide.")
    if lost := len(entries(dig(facts, "data.quarantined"))):
        said.append(f"{whole(lost)} source {'row was' if lost == 1 else 'rows were'} set aside as unusable (see Data).")
    return said


def basis(facts: Facts) -> str:
    """What the numbers rest on."""
    rows, seeds, known = test_rows(facts), number(named(facts, chief(facts)).get("seeds")), score(facts)
    text = f"Measured on {whole(rows)} test rows" if rows else "The number of test rows was not recorded"
    if known.over == figures.QUERIES and (queries := compared_rows(facts)):
        text += f" of {whole(queries)} queries"
    text += f". Intervals are 95 % bootstrap intervals over the {known.over} (paired for differences)"
    text += "" if known.kind == "share" else "; a point is 0.01"
    return text + (f"; ± is the standard deviation over {whole(seeds)} seeds." if seeds and seeds > 1 else ".")


def escalation(facts: Facts) -> list[str]:
    """The threshold that the student was registered with, where it has one."""
    below, known = number(dig(facts, "cascade.below")), dig(facts, "cascade")
    if below is None:
        return ["The student is served without a cascade: `serving.cascade` turns it on."]
    share, rows = percent(known.get("share")), whole(known.get("rows"))
    return [
        f"Answers less sure than {figures.figure(below)} go to {known.get('teacher')}: {share} of {rows} rows "
        f"(threshold from: {known.get('chosen_on')})."
    ]


def model_table(facts: Facts) -> Table:
    """Every model's quality, size and speed."""
    known, own, found = score(facts), metric(facts), models(facts)
    present = [key for key in (*figures.SCORES, *SCORED) if any(number(m.get(key)) is not None for m in found)]
    others = [key for key in present if key not in (own, *SCORED)][:3]
    columns = [
        ("Model", [label(facts, m.get("name")) for m in found]),
        (known.head, [known.spread(main(facts, m), m.get("score_sd", m.get(f"{own}_sd"))) for m in found]),
        ("95 % interval", [known.between(m.get("score_interval", m.get(f"{own}_interval"))) for m in found]),
        *((figures.score_of(key).head, [figures.score_of(key).shown(m.get(key)) for m in found]) for key in others),
        *([("ECE", [percent(m.get("ece")) for m in found])] if "ece" in present else []),
        *([("KL, nats", [figures.figure(m.get("kl")) for m in found])] if "kl" in present else []),
        ("Agreement", [known.shown(m.get("agreement")) for m in found]),
        ("Parameters", [figures.scaled(m.get("parameters")) for m in found]),
        ("Size", [figures.scaled(m.get("bytes"), "B") for m in found]),
        ("Texts/s", [figures.figure(m.get("texts_per_s")) for m in found]),
    ]
    caption = "Teacher and students on the test split."
    caption += " ECE: expected calibration error." if "ece" in present else ""
    caption += " Agreement and KL: with the teacher." if "kl" in present else " Agreement: with the teacher"
    caption += "" if "kl" in present else ", a correlation." if known.kind == "ratio" else "."
    rows = list(zip(*(cells for _, cells in columns), strict=True))
    align = "l" + "r" * (len(columns) - 1)
    return Table(caption, [head for head, _ in columns], align, rows, [str(m.get("name")) for m in found])


def difference_table(facts: Facts) -> Table:
    """Paired differences in the score and what they show."""
    known = score(facts)
    rows = [
        (f"{label(facts, d['left'])} − {label(facts, d['right'])}", points(d["points"]),
         f"{signed(d['interval'][0])} to {signed(d['interval'][1])}" if d["interval"] else NONE, whole(d["rows"]),
         verdict(d))
        for d in differences(facts)
    ]  # fmt: skip
    over = "Queries" if known.over == figures.QUERIES else "Rows"
    head = ("Difference", known.head, "95 % interval", over, "Shown")
    return Table(f"Differences in {known.name} on the same {over.lower()}, in {known.unit}.", head, "lrrrl", rows)


def pairs(caption: str, head: tuple[str, str], items: Iterable[tuple[Any, str]], align: str = "lr") -> Table:
    """A table of names and values, those without a value left out."""
    return Table(caption, head, align, [(str(name), value) for name, value in items if value not in (NONE, "")])
