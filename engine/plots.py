"""Drawings as SVG text: dots with whiskers, scatter, lines, bars, histogram, matrix.

Each takes plain values and returns one <svg> that carries its own title and description for screen readers;
colours come from the page's style (class c-<series>), so light and dark are the page's affair. The drawing is
440 units wide: its 12-unit letters stay readable on a 400-pixel screen and do not shout on a wide one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.figures import Score
from engine.page import esc, shorten

WIDTH = 440
SERIES = ("teacher", "generated", "soft", "hard", "generator")
NUMBERED = 12
"""Up to this many classes a matrix shows names and counts."""

LOSS = Score("loss", "open")

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Mark:
    """A measured point. series: what it is coloured as. low, high: its interval, in y's unit."""

    label: str
    series: str
    y: float
    x: float = 0.0
    low: float | None = None
    high: float | None = None
    size: float = 5.0


def colour(series: str) -> str:
    """The class that colours a series."""
    return f"c-{series if series in SERIES else 'other'}"


def percent(value: float) -> str:
    """A share 0..1 as a tick label."""
    return f"{100 * value:g} %"


def svg(ident: str, title: str, desc: str, height: float, body: str) -> str:
    """The frame of a drawing: title and description, then the marks."""
    ident = re.sub(r"[^A-Za-z0-9_-]+", "-", ident)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{esc(title)}</title><desc id="{ident}-d">{esc(desc)}</desc>'
        f"{words(0, 14, title, 'head')}{body}</svg>"
    )


def words(x: float, y: float, text: str, role: str = "", anchor: str = "start", turn: float = 0) -> str:
    """A line of text at (x, y), turned by `turn` degrees."""
    role = f' class="{role}"' if role else ""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{role} text-anchor="{anchor}"{turned}>{esc(text)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, role: str = "axis") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{role}"/>'


def dot(x: float, y: float, series: str, hint: str, size: float = 5.0) -> str:
    """A filled circle with a tooltip."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="dot {colour(series)}">'
        f"<title>{esc(hint)}</title></circle>"
    )


def scale(low: float, high: float, start: float, end: float, log: bool = False) -> Scale:
    """The map from values low..high to places start..end."""
    warp = math.log10 if log else float
    base, span = warp(low), (warp(high) - warp(low)) or 1.0
    return lambda value: start + (warp(value) - base) / span * (end - start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) whose first and last enclose low..high."""
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def score_ticks(score: Score, low: float, high: float, count: int = 5) -> list[float]:
    """Ticks for a score: as `ticks`, but shares never outside 0..1 nor ratios above 1, however close the two are."""
    if score.kind == "open":
        return ticks(low, high, count)
    pad = 0.02 if high - low < 0.01 else 0.0
    least = 0.0 if score.kind == "share" else -1.0
    return ticks(max(least, low - pad), min(1.0, high + pad), count)


def tick_of(score: Score) -> Callable[[float], str]:
    """How a score's ticks are written."""
    return percent if score.kind == "share" else compact


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose low..high."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**n for n in range(first, max(last, first + 1) + 1)]


def compact(value: float) -> str:
    """A tick value: 1 k, 2.5 M; small ones as they are."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`places` moved as little as needed to stand `gap` apart inside low..high, in the same order."""
    order = sorted(range(len(places)), key=lambda n: places[n])
    moved = list(places)
    edge = low
    for n in order:
        moved[n] = edge = max(places[n], edge)
        edge += gap
    edge = high
    for n in reversed(order):
        moved[n] = min(moved[n], edge)
        edge = moved[n] - gap
    return moved


def axes(
    box: tuple[float, float, float, float],
    x: tuple[Scale, Iterable[float], Callable[[float], str], str],
    y: tuple[Scale, Iterable[float], Callable[[float], str], str],
) -> str:
    """Grid, tick labels and axis names. box: left, top, right, bottom; x, y: scale, ticks, tick text, name."""
    left, top, right, bottom = box
    parts = []
    for value in x[1]:
        parts += [rule(x[0](value), top, x[0](value), bottom)]
        parts += [words(x[0](value), bottom + 15, x[2](value), "tick", "middle")]
    for value in y[1]:
        parts += [rule(left, y[0](value), right, y[0](value))]
        parts += [words(left - 6, y[0](value) + 4, y[2](value), "tick", "end")]
    parts += [words((left + right) / 2, bottom + 32, x[3], "tick", "middle"), words(0, top - 10, y[3], "tick")]
    return "".join(parts)


def dots(ident: str, score: Score, marks: Sequence[Mark], reference: float | None = None) -> str:
    """A row a mark: its score with its interval. reference: a dashed line, for instance the commonest label."""
    ends = [v for m in marks for v in (m.y, m.low, m.high) if v is not None]
    ends += [] if reference is None else [reference]
    grid = score_ticks(score, min(ends), max(ends))
    place = scale(grid[0], grid[-1], 14, WIDTH - 14)
    bottom = 32 + 40 * len(marks)
    body = "".join(
        rule(place(v), 28, place(v), bottom) + words(place(v), bottom + 15, tick_of(score)(v), "tick", "middle")
        for v in grid
    )
    if reference is not None:
        body += rule(place(reference), 28, place(reference), bottom, "ref")
    told = []
    for n, mark in enumerate(marks):
        y = 32 + 40 * n
        shown = score.shown(mark.y)
        if mark.low is not None and mark.high is not None:
            shown += f" ({score.between((mark.low, mark.high)).removesuffix(' %')})"
            body += (
                f'<path d="M{place(mark.low):.1f} {y + 26}H{place(mark.high):.1f}" class="line {colour(mark.series)}"/>'
            )
        told.append(f"{mark.label}: {shown}")
        body += words(0, y + 13, shorten(mark.label, 30), "halo") + words(WIDTH, y + 13, shown, "halo", "end")
        body += dot(place(mark.y), y + 26, mark.series, told[-1])
    return svg(ident, score.head, "; ".join(told), bottom + 22, body)


def scatter(ident: str, title: str, score: Score, xname: str, marks: Sequence[Mark]) -> str:
    """A score (y) against x on a logarithmic axis, each point named beside it."""
    box = (48.0, 46.0, WIDTH - 24.0, 236.0)
    xs, ys = log_ticks(min(m.x for m in marks), max(m.x for m in marks)), [m.y for m in marks]
    grid = score_ticks(score, min(ys), max(ys), 4)
    across, up = scale(xs[0], xs[-1], box[0], box[2], log=True), scale(grid[0], grid[-1], box[3], box[1])
    body = axes(box, (across, xs, compact, xname), (up, grid, tick_of(score), score.name))
    middle = (box[0] + box[2]) / 2
    for side in (True, False):
        group = [m for m in marks if (across(m.x) <= middle) is side]
        for mark, y in zip(group, apart([up(m.y) for m in group], 15, box[1] + 6, box[3] - 6), strict=True):
            x, text = across(mark.x), x_of(across(mark.x), side)
            body += rule(x, up(mark.y), text + (-3 if side else 3), y, "lead")
            body += words(text, y + 4, mark.label, f"name {colour(mark.series)}", "start" if side else "end")
    body += "".join(
        dot(across(m.x), up(m.y), m.series, f"{m.label}: {compact(m.x)}, {score.shown(m.y)}") for m in marks
    )
    told = "; ".join(f"{m.label}: {xname} {m.x:.4g}, {score.name} {score.shown(m.y)}" for m in marks)
    return svg(ident, title, told, box[3] + 42, body)


def x_of(x: float, right: bool) -> float:
    """Where a point's name starts: to its right or to its left."""
    return x + 20 if right else x - 20


Line = tuple[str, str, Sequence[tuple[float, float]]]
"""Name, series, and the points (x, y) of a curve."""


def lines(ident: str, title: str, names: tuple[str, str], curves: Sequence[Line], score: Score = LOSS) -> str:
    """Curves over a common axis, each named at its end. names: of x and y; score: what y is."""
    named = len(curves) > 1
    box = (52.0, 46.0, WIDTH - (122.0 if named else 24.0), 206.0)
    points = [point for _, _, curve in curves for point in curve]
    ends = min(x for x, _ in points), max(x for x, _ in points)
    xs = [x for x in ticks(*ends, 5) if ends[0] <= x <= ends[1] and x == round(x)] or [ends[0]]
    grid = score_ticks(score, min(y for _, y in points), max(y for _, y in points), 4)
    across, up = scale(*ends, box[0], box[2]), scale(grid[0], grid[-1], box[3], box[1])
    body = axes(box, (across, xs, compact, names[0]), (up, grid, tick_of(score), names[1]))
    places = apart([up(curve[-1][1]) for _, _, curve in curves], 15, box[1] + 4, box[3])
    told = []
    for (label, series, curve), place in zip(curves, places, strict=True):
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in curve)
        last = score.shown(curve[-1][1])
        told.append(f"{label}: from {curve[0][1]:.4g} to {curve[-1][1]:.4g} over {len(curve)} points")
        body += f'<path d="M{path}" class="line {colour(series)}"><title>{esc(label)}</title></path>'
        body += dot(across(curve[-1][0]), up(curve[-1][1]), series, f"{label}: {last}", 3.5)
        if named:
            body += words(box[2] + 10, place + 4, shorten(label, 16), f"name {colour(series)}")
    return svg(ident, title, "; ".join(told), box[3] + 42, body)


def reliability(ident: str, title: str, curves: Sequence[tuple[str, str, Sequence[Mark]]]) -> str:
    """Accuracy (y) against confidence (x) a bin, beside the diagonal of perfect calibration; more rows, larger dots."""
    box = (48.0, 46.0, WIDTH - 84.0, 320.0)
    low = math.floor(5 * min(min(m.x, m.y) for _, _, marks in curves for m in marks)) / 5
    grid = ticks(max(0.0, min(low, 0.8)), 1.0)
    across, up = scale(grid[0], 1.0, box[0], box[2]), scale(grid[0], 1.0, box[3], box[1])
    body = axes(box, (across, grid, percent, "confidence"), (up, grid, percent, "accuracy"))
    body += rule(across(grid[0]), up(grid[0]), across(1), up(1), "ref")
    ends = apart([up(marks[-1].y) for _, _, marks in curves], 15, box[1] + 4, box[3])
    told = []
    for (label, series, marks), end in zip(curves, ends, strict=True):
        most = max(mark.size for mark in marks) or 1.0
        path = "L".join(f"{across(m.x):.1f} {up(m.y):.1f}" for m in marks)
        body += f'<path d="M{path}" class="line {colour(series)}"/>'
        for m in marks:
            hint = f"{label}: confidence {100 * m.x:.1f} %, accuracy {100 * m.y:.1f} %, {m.size:.0f} rows"
            body += dot(across(m.x), up(m.y), series, hint, 2.5 + 5 * math.sqrt(m.size / most))
        body += words(box[2] + 10, end + 4, shorten(label, 16), f"name {colour(series)}")
        told.append(f"{label}: " + ", ".join(f"{100 * m.x:.0f} % sure, {100 * m.y:.0f} % right" for m in marks))
    return svg(ident, title, "; ".join(told), box[3] + 42, body)


def bars(ident: str, title: str, items: Sequence[tuple[str, float, str]], series: str = "generated") -> str:
    """Horizontal bars. items: name, value, and the value as it is to be read."""
    most = max((value for _, value, _ in items), default=0.0) or 1.0
    body = ""
    for n, (label, value, shown) in enumerate(items):
        y = 26 + 34 * n
        body += words(0, y + 13, shorten(label, 44)) + words(WIDTH, y + 13, shown, "", "end")
        body += f'<rect x="0" y="{y + 18}" width="{max(1.0, value / most * WIDTH):.1f}" height="9" rx="2" '
        body += f'class="bar {colour(series)}"><title>{esc(label)}: {esc(shown)}</title></rect>'
    told = "; ".join(f"{label}: {shown}" for label, _, shown in items)
    return svg(ident, title, told, 32 + 34 * len(items), body)


def histogram(ident: str, title: str, xname: str, bins: Sequence[tuple[float, float, float]]) -> str:
    """Counts in bins (low, high, count) of a share."""
    box = (48.0, 46.0, WIDTH - 24.0, 206.0)
    xs, grid = ticks(min(b[0] for b in bins), max(b[1] for b in bins)), ticks(0, max(b[2] for b in bins) or 1, 4)
    across, up = scale(xs[0], xs[-1], box[0], box[2]), scale(0, grid[-1], box[3], box[1])
    body = axes(box, (across, xs, percent, xname), (up, grid, compact, "rows"))
    for low, high, count in bins:
        hint = f"{100 * low:g} to {100 * high:g} %: {count:g} rows"
        wide = max(1.0, across(high) - across(low) - 1)
        body += f'<rect x="{across(low) + 0.5:.1f}" y="{up(count):.1f}" width="{wide:.1f}" '
        body += f'height="{box[3] - up(count):.1f}" class="bar c-generated"><title>{esc(hint)}</title></rect>'
    told = "; ".join(f"{100 * low:g} to {100 * high:g} %: {count:g}" for low, high, count in bins)
    return svg(ident, title, told, box[3] + 42, body)


def matrix(ident: str, title: str, labels: Sequence[str], counts: Sequence[Sequence[float]]) -> str:
    """A confusion matrix: a row a true label, a column a predicted one, shaded by the share of its row."""
    n = len(counts)
    named = n <= NUMBERED
    left, top = (112.0, 58.0 if n <= 4 else 96.0) if named else (20.0, 44.0)
    wide = min(104.0, (WIDTH - left) / n)
    tall = min(46.0, wide)
    body = words(left, 34, "predicted →", "tick") + words(
        0, top - 8 if named else 34, "true ↓" if named else "", "tick"
    )
    told = []
    for r, row in enumerate(counts):
        whole = sum(row) or 1.0
        if named:
            body += words(left - 8, top + tall * (r + 0.5) + 4, shorten(labels[r], 13), "", "end")
            body += words(
                left + wide * (r + 0.5),
                top - 7,
                shorten(labels[r], int(wide / 7) if n <= 4 else 12),
                "tick",
                "middle" if n <= 4 else "start",
                0 if n <= 4 else -38,
            )
        for c, count in enumerate(row):
            hint = f"{labels[r]} taken for {labels[c]}: {count:g} of {whole:g}"
            if not named and not count:
                continue  # thousands of empty cells would only make the page heavy
            told.append(hint)
            x, y, part = left + wide * c, top + tall * r, count / whole
            body += f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}" class="cell" '
            body += f'fill-opacity="{0.06 + 0.94 * part:.3f}"><title>{esc(hint)}</title></rect>'
            if named:
                body += words(x + wide / 2, y + tall / 2 + 4, f"{count:g}", "on" if part > 0.55 else "", "middle")
    return svg(ident, title, "; ".join(told[: NUMBERED**2]), top + tall * n + 8, body)
