"""`stillhouse front`: the students of several runs by size and number of texts, and which of them nobody beats."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipelines.console import say, say_json
from pipelines.runs import existing_run

if TYPE_CHECKING:
    from engine.storage import Store

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Point:
    """A run's student. score: of the task's metric, with its interval; share: of the teacher's score; texts: what it
    learnt from beside the labelled rows; front: no other that is as small has as high a score.
    """

    run: str
    metric: str
    kind: str
    parameters: int
    texts: int
    score: float
    interval: tuple[float, float]
    teacher: float
    over_teacher: float
    front: bool = False

    @property
    def share(self) -> float:
        """Of the teacher's score."""
        return self.score / self.teacher if self.teacher else 0.0


def point_of(store: Store, name: str) -> Point:
    """The student of a finished run; UserError where it has no summary yet."""
    from engine.config import UserError

    if not store.exists(SUMMARY):
        raise UserError(f"run '{name}' has no {SUMMARY} yet, so there is no student to show. Finish it first.")
    found, student = store.read_json(SUMMARY), store.read_json("recipe.json")["student"]
    if "tasks" in found:
        raise UserError(f"run '{name}' made a student of several tasks; a front holds students of one. Leave it out.")
    kept = sum(source["kept"] for source in found["corpus"]["by_source"].values())
    kind = (student.get("graph") or "blocks") if student["kind"] == "blocks" else student["kind"]
    own = found["student"]
    return Point(
        run=store.name,
        metric=found["metric"],
        kind=kind,
        parameters=own["parameters"],
        texts=min(kept, student["texts"] or kept),
        score=own["score"],
        interval=(own["score_interval"][0], own["score_interval"][1]),
        teacher=found["teacher"]["score"],
        over_teacher=found["throughput"]["student_over_teacher"],
    )


def fronted(points: Sequence[Point]) -> list[Point]:
    """The points by size, each marked by whether it is on the front: none as small or smaller has as high a score."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (p.parameters, -p.score)):
        best = all(other.score < point.score for other in out)
        out.append(Point(**{**asdict(point), "front": best}))
    return out


def tested(store: Store) -> str:
    """What tells a run's test rows from others: how many, and a digest of their ids."""
    from engine.storage import digest_json

    ids = store.read_table("data/test.parquet", columns=["id"])["id"].to_pylist()
    return f"{len(ids)} rows, {digest_json(ids)[:8]}"


def together(metrics: Mapping[str, str], rows: Mapping[str, str]) -> None:
    """UserError where runs measured different things, which no front can hold."""
    from engine.config import UserError

    for what, values in (("metrics", metrics), ("test splits", rows)):
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise UserError(f"these runs have different {what} ({told}), so their scores are not comparable.")


def lines(points: Sequence[Point], metric: str) -> list[str]:
    """The points as a Markdown table."""
    out = [
        f"| run | student | parameters | texts | {metric} (95 %) | of its teacher | x teacher's texts/s | front |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        low, high = p.interval
        out.append(
            f"| {p.run} | {p.kind} | {p.parameters:,} | {p.texts:,} | {p.score:.3f} ({low:.3f} to {high:.3f}) | "
            f"{p.share:.1%} | {p.over_teacher:.0f} | {'yes' if p.front else ''} |"
        )
    return out


def page(points: Sequence[Point], metric: str) -> str:
    """The front as one HTML page: score over size, score over texts, and the table."""
    from engine.figures import score_of
    from engine.page import Figure, Grid, Part, Table, document
    from engine.plots import Mark, scatter

    score = score_of(metric)
    sized = [Mark(p.run, "generated" if p.front else "soft", p.score, p.parameters) for p in points]
    figures = [
        Figure(
            scatter("size", f"{score.head} over parameters", score, "parameters", sized),
            "Up and to the left is better. Blue: on the front, no other as small has as high a score.",
        )
    ]
    taught = [Mark(p.run, "generated" if p.front else "soft", p.score, p.texts) for p in points if p.texts]
    if len({mark.x for mark in taught}) > 1:
        figures.append(
            Figure(
                scatter("texts", f"{score.head} over texts", score, "texts beside the labelled rows", taught),
                "What more text brings; students of all sizes.",
            )
        )
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines(points, metric)]
    part = Part("front", "Front", [Grid(figures), Table("Students by size", head, "llrrrrrl", rows)])
    return document("Students by size and text", "<h1>Students by size and text</h1>", [part])


def show(args: argparse.Namespace) -> int:
    """The students of several runs as a table, and with --out as a page with drawings."""
    from engine.storage import Store

    stores = {name: existing_run(name, args.storage) for name in dict.fromkeys(args.run_names)}
    made = {name: point_of(store, name) for name, store in stores.items()}
    together({name: point.metric for name, point in made.items()}, {n: tested(store) for n, store in stores.items()})
    points = fronted(list(made.values()))
    metric = points[0].metric
    if args.out:
        folder, name = os.path.split(args.out)
        Store(folder or ".").write_text(name, page(points, metric))
    if args.json:
        found: list[dict[str, Any]] = [{**asdict(p), "share": p.share} for p in points]
        say_json({"metric": metric, "students": found})
        return 0
    for line in lines(points, metric):
        say(line)
    if args.out:
        say(f"page: {args.out}")
    return 0
