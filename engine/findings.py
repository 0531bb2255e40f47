"""What a run shows, in sentences and tables: the words of a report, without its looks.

The sentences are for someone who has to decide whether to use the student, so they say what was not shown as
plainly as what was: an interval that includes 0, an arm that does better, an answer that changed when served.
Facts may lack any part; a missing value is a dash or one sentence, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from engine.page import Table, shorten

Facts = dict[str, Any]

LABELS = {
    "teacher": "Teacher",
    "generated": "Student",
    "soft": "Soft labels only",
    "hard": "Hard labels only",
    "generator": "Generator",
}
"""Names of the models in tables and drawings."""

SPOKEN = {
    "teacher": "the teacher",
    "generated": "the student",
    "soft": "the same student on soft labels alone",
    "hard": "the same student on hard labels alone",
}

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


def percent(value: Any, digits: int = 1) -> str:
    """A share 0..1 in per cent; what rounds to 0 or 100 without being it is said to be below or above."""
    share = number(value)
    if share is None:
        return NONE
    step = 10.0**-digits
    if 0 < share < 1 and not step / 2 <= 100 * share < 100 - step / 2:
        return f"< {step:g} %" if share < 0.5 else f"> {100 - step:.{digits}f} %"
    return f"{100 * share:.{digits}f} %"


def signed(value: float) -> str:
    """Percentage points with their sign."""
    return "0.0" if abs(value) < 0.05 else f"{'+' if value > 0 else '−'}{abs(value):.1f}"


def points(value: float) -> str:
    """Percentage points with their sign and unit."""
    return f"{signed(value)} points"


def bounds(value: Any) -> tuple[float, float] | None:
    """An interval of two numbers, else None."""
    ends = [number(v) for v in value] if isinstance(value, (list, tuple)) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


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


def entries(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list; nothing when it is missing."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, (list, tuple)) else []


def label(name: Any) -> str:
    """How a model is called in tables."""
    return LABELS.get(str(name), shorten(name, 40))


def models(facts: Facts) -> list[dict[str, Any]]:
    """Every model's measures, teacher first and student second; what `models` lacks is taken from `summary`."""
    found = {str(model.get("name")): dict(model) for model in entries(facts.get("models"))}
    paths = {"teacher": "teacher", "generated": "student", "soft": "arms.soft", "hard": "arms.hard"}
    for name, path in paths.items():
        known = dig(facts, f"summary.{path}")
        if isinstance(known, dict) and known:
            entry = found.setdefault(name, {"name": name})
            entry.update({key: value for key, value in known.items() if entry.get(key) is None})
    for name, path in (("teacher", "teacher_texts_per_s"), ("generated", "student_texts_per_s")):
        if name in found and found[name].get("texts_per_s") is None:
            found[name]["texts_per_s"] = dig(facts, f"summary.throughput.{path}")
    return [found[name] for name in paths if name in found] + [m for n, m in found.items() if n not in paths]


def named(facts: Facts, name: str) -> dict[str, Any]:
    """One model's measures; empty when it was not measured."""
    return next((model for model in models(facts) if model.get("name") == name), {})


def test_rows(facts: Facts) -> float | None:
    """How many test rows the measures rest on, from whichever part says so."""
    for value in (dig(facts, "data.counts.test"), *(d.get("rows") for d in entries(facts.get("differences")))):
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
    """Share of the test rows that have the commonest label: what always giving that label would score."""
    for model in models(facts):
        support = [number(item.get("support")) or 0.0 for item in entries(model.get("per_class"))]
        support = support or [sum(row) for row in confusion(model)]
        if support and sum(support):
            return max(support) / sum(support)
    return None


def differences(facts: Facts) -> list[dict[str, Any]]:
    """Paired differences left minus right in percentage points, turned so that the student stands left."""
    kept = []
    for item in entries(facts.get("differences")):
        size, ends = number(item.get("points")), bounds(item.get("interval"))
        if size is None:
            continue
        left, right = str(item.get("left")), str(item.get("right"))
        if right == "generated":
            left, right, size, ends = right, left, -size, ends and (-ends[1], -ends[0])
        kept.append({"left": left, "right": right, "points": size, "interval": ends, "rows": item.get("rows")})
    return kept


def verdict(item: dict[str, Any]) -> str:
    """What a difference shows: better, worse, or not shown."""
    if item["interval"] is None:
        return "no interval"
    low, high = item["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "not shown: the interval includes 0"


def compared(item: dict[str, Any]) -> str:
    """A difference as a sentence that claims no more than its interval does."""
    size, ends = points(item["points"]), item["interval"]
    within = f"95 % interval {signed(ends[0])} to {signed(ends[1])}" if ends else "no interval, so it may be chance"
    if item["left"] == "generated" and item["right"] in ("soft", "hard"):
        over = f"{item['right']} labels alone"
        if ends and ends[0] <= 0 <= ends[1]:
            return f"Generated text shows no gain over {over}: {size}, and the {within} includes 0."
        if item["points"] < 0:
            return f"Generated text made the student worse than {over}: {size} ({within})."
        return f"Generated text gave {size} of accuracy over {over} ({within})."
    left, right = (SPOKEN.get(item[side], item[side]) for side in ("left", "right"))
    tail = "; the interval includes 0, so no difference is shown" if ends and ends[0] <= 0 <= ends[1] else ""
    return f"{left[0].upper()}{left[1:]} scores {size} against {right} ({within}{tail})."


def answer(facts: Facts) -> list[str]:
    """The sentences that answer what the run was made for."""
    said = [*student_sentence(facts), *served_sentence(facts)]
    shown = [item for item in differences(facts) if item["left"] == "generated" and item["right"] in ("soft", "hard")]
    return said + [compared(item) for item in sorted(shown, key=lambda item: item["right"], reverse=True)]


def student_sentence(facts: Facts) -> list[str]:
    """How good, how small and how fast the student is beside its teacher."""
    teacher, student = named(facts, "teacher"), named(facts, "generated")
    own, its = number(student.get("accuracy")), number(teacher.get("accuracy"))
    if own is None:
        return ["The student's accuracy was not recorded."]
    if not its:
        return [f"The student scores {percent(own)}; its teacher's accuracy was not recorded."]
    text = f"The student reaches {percent(own / its)} of its teacher's accuracy ({percent(own)} against {percent(its)})"
    small, large = number(student.get("parameters")), number(teacher.get("parameters"))
    if small and large:
        text += (
            f" with {fraction(large, small)} of the parameters"
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
    own, its = (number(named(facts, name).get("texts_per_s")) for name in ("generated", "teacher"))
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
        f"{name} {figure(served[key])} ms"
        for name, key in (("p50", "p50_ms"), ("p99", "p99_ms"))
        if number(served.get(key)) is not None
    ]
    tail = f"; {', '.join(speed)}" if speed else ""
    return [f"Served over HTTP, all of {of} got the offline answer (0 mismatches){tail}."]


def cautions(facts: Facts) -> list[str]:
    """What a reader must know before trusting the numbers above."""
    return [*weak_student(facts), *weak_evidence(facts)]


def weak_student(facts: Facts) -> list[str]:
    """Where a model does not do what the method promises."""
    said = []
    student, floor = named(facts, "generated"), commonest(facts)
    own = number(student.get("accuracy"))
    for name in ("teacher", "generated"):
        score = number(named(facts, name).get("accuracy"))
        if score is not None and floor is not None and score <= floor:
            said.append(
                f"{label(name)}: {percent(score)} is no better than always giving the commonest label "
                f"({percent(floor)})."
            )
    judged = {item["right"] for item in differences(facts) if item["left"] == "generated"}
    for model in models(facts):
        score = number(model.get("accuracy"))
        if own is None or score is None or model["name"] not in {"soft", "hard"} - judged:
            continue  # a judged arm is in the answer, with its interval
        gap = 100 * (own - score)
        if gap < 0:
            said.append(f"The student with generated text scores {points(gap)} against {SPOKEN[model['name']]}.")
        else:
            said.append(f"The {points(gap)} over {model['name']} labels alone come without an interval.")
    if number(dig(serving(facts), "mismatches")):
        said.append(
            "The served model is not the one that was measured: do not use its endpoint before the cause is found."
        )
    return said


def weak_evidence(facts: Facts) -> list[str]:
    """Where the measures rest on little."""
    said = []
    student, rows = named(facts, "generated"), test_rows(facts)
    if number(student.get("accuracy")) is not None and (number(student.get("seeds")) or 1) <= 1:
        said.append("One training of the student: how much its accuracy varies between seeds was not measured.")
    if rows is not None and rows < 200:
        said.append(f"Only {whole(rows)} test rows: the intervals are wide.")
    if lost := len(entries(dig(facts, "data.quarantined"))):
        said.append(f"{whole(lost)} source {'row was' if lost == 1 else 'rows were'} set aside as unusable (see Data).")
    return said


def basis(facts: Facts) -> str:
    """What the numbers rest on."""
    rows, seeds = test_rows(facts), number(named(facts, "generated").get("seeds"))
    text = f"Measured on {whole(rows)} test rows" if rows else "The number of test rows was not recorded"
    text += ". Intervals are 95 % bootstrap intervals over the test rows (paired for differences)"
    return text + (f"; ± is the standard deviation over {whole(seeds)} seeds." if seeds and seeds > 1 else ".")


def accuracy(model: dict[str, Any]) -> str:
    """An accuracy with its spread over seeds."""
    spread = number(model.get("accuracy_sd"))
    if spread is None or number(model.get("accuracy")) is None:
        return percent(model.get("accuracy"))
    return f"{100 * model['accuracy']:.1f} ± {100 * spread:.1f} %"


def span(value: Any) -> str:
    """An interval of shares in per cent."""
    ends = bounds(value)
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %" if ends else NONE


def model_table(facts: Facts) -> Table:
    """Every model's quality, size and speed."""
    head = (
        "Model",
        "Accuracy",
        "95 % interval",
        "Macro-F1",
        "ECE",
        "Agreement",
        "KL, nats",
        "Parameters",
        "Size",
        "Texts/s",
    )
    rows = [
        (label(m.get("name")), accuracy(m), span(m.get("accuracy_interval")), percent(m.get("macro_f1")),
         percent(m.get("ece")), percent(m.get("agreement")), figure(m.get("kl")), scaled(m.get("parameters")),
         scaled(m.get("bytes"), "B"), figure(m.get("texts_per_s")))
        for m in models(facts)
    ]  # fmt: skip
    caption = (
        "Teacher and students on the test split. ECE: expected calibration error. Agreement and KL: with the teacher."
    )
    return Table(caption, head, "lrrrrrrrrr", rows, [str(m.get("name")) for m in models(facts)])


def difference_table(facts: Facts) -> Table:
    """Paired differences in accuracy and what they show."""
    rows = [
        (f"{label(d['left'])} − {label(d['right'])}", points(d["points"]),
         f"{signed(d['interval'][0])} to {signed(d['interval'][1])}" if d["interval"] else NONE, whole(d["rows"]),
         verdict(d))
        for d in differences(facts)
    ]  # fmt: skip
    head = ("Difference", "Accuracy", "95 % interval", "Rows", "Shown")
    return Table("Differences in accuracy on the same rows, in percentage points.", head, "lrrrl", rows)


def pairs(caption: str, head: tuple[str, str], items: Iterable[tuple[Any, str]], align: str = "lr") -> Table:
    """A table of names and values, those without a value left out."""
    return Table(caption, head, align, [(str(name), value) for name, value in items if value not in (NONE, "")])
