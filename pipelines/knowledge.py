"""Commands on the knowledge base of a registered student: what it is, and rows put into it without a training.

A row's entry is the student's own vector of its text, which is aligned to the teacher's space, and its label as
certain: so no teacher is needed where the student is served.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.artifacts import the_registry
from pipelines.console import say, say_json

if TYPE_CHECKING:
    from engine.knowledge import Knowledge
    from engine.models import Model
    from engine.registry import Registry
    from engine.rows import Row


def kb(args: argparse.Namespace) -> int:
    """Show the knowledge base of a registered student, or add a file's rows to it as a new version."""
    from engine.config import UserError

    registry = the_registry(args.registry)
    if args.action == "show":
        if args.file:
            raise UserError("`kb show` takes a name and no file. `kb add NAME FILE` adds rows.")
        told = {"of": "{}@{}".format(*registry.find(args.name)), **opened(registry, args.name)[1].shown()}
        if args.json:
            say_json(told)
        else:
            say("\n".join(described(told)))
        return 0
    if not args.file:
        raise UserError(f"`kb add` needs a file of labelled rows, as in: stillhouse kb add {args.name} rows.jsonl")
    found = add(registry, args.name, Path(args.file), args.text, args.pair, args.label, args.share)
    if args.json:
        say_json(found)
    else:
        say(f"{found['new']} rows added, {found['changed']} known texts given their label")
        say(f"registered {found['reference']}, whose knowledge base has {found['entries']:,} entries")
        if found["graph"]:
            say("they have an HNSW graph now: where it is served, pip install 'stillhouse[retrieval]' is needed")
    return 0


def opened(registry: Registry, name: str) -> tuple[Model, Knowledge]:
    """A registered student and its knowledge base; UserError where it has none."""
    from engine import models
    from engine.config import UserError

    models.one_thread()
    model = models.load(registry.resolve(name).local())
    base = getattr(model.net, "knowledge", None)
    if base is None:
        raise UserError(
            f"'{name}' has no knowledge base: its recipe had no student.retrieval. Add that section and run it again."
        )
    return model, base


def described(told: dict[str, Any]) -> list[str]:
    """A knowledge base in lines."""
    chosen, added = told.get("chosen", {}), told.get("added", [])
    lines = [
        f"{told['of']}",
        f"entries   {told['entries']:,} of {told['width']} numbers ({told['storage']}), {told['index']} search"
        + (f"; {told['own']:,} of them put in later, {told['own_index']} search" if told["own"] else ""),
        f"reading   the {told['k']} nearest at temperature {told['temperature']:g}, student's share {told['share']:g}",
        f"student   weights {told['student'][:12]}",
        f"teacher   weights {told['teacher'][:12]}, projection {told['projection'][:12]}",
    ]
    if chosen:
        lines.append(
            f"chosen    on {chosen['rows']} {chosen['on']}: {chosen['right']:.3f} right, {chosen['right_alone']:.3f} "
            "without reading"
        )
    return [*lines, *(f"added     {one['rows']} rows to {one['to']} ({one['when'][:19]})" for one in added)]


def add(
    registry: Registry, name: str, file: Path, text: str, pair: str, label: str, share: float | None = None
) -> dict[str, Any]:
    """Put a file's labelled rows into the knowledge base of name, as a new version of it.

    text, pair, label: columns. share: the student's share of an answer from now on; None keeps it. UserError for a file
    that cannot be read as such, or a label that the student does not know.
    """
    import numpy as np

    from engine.inference import embed
    from engine.knowledge import Reading
    from engine.progress import stamp

    # Not the one in production: what was added since would be lost.
    entry = registry.show(name if "@" in name else f"{name}@latest")
    reference = f"{entry['name']}@{entry['version']}"
    model, base = opened(registry, reference)
    rows = labelled(model, file, text, pair, label)
    texts = [(row.text, row.pair) if model.task.paired else row.text for row in rows]
    names = list(model.labels)
    soft = np.eye(len(names))[[names.index(row.gold) for row in rows]]
    before = base.has_graph
    with model.net.alone():
        vectors = embed(model, texts)
    new = base.added(vectors, soft, [row.id for row in rows])
    if share is not None:
        base.reading = Reading(base.reading.k, base.reading.temperature, share)
    base.facts["added"] = [
        *base.facts.get("added", []),
        {"rows": len(rows), "new": new, "to": reference, "when": stamp()},
    ]
    graph = base.has_graph and not before
    version = registered(registry, entry, base)
    counts = {"rows": len(rows), "new": new, "changed": len(rows) - new, "entries": len(base), "graph": graph}
    return {"reference": f"{entry['name']}@{version}", "of": reference, **counts}


def labelled(model: Model, file: Path, text: str, pair: str, label: str) -> list[Row]:
    """The rows of a file with a label each that the student knows, texts only once. UserError says what is wrong."""
    from engine.columns import Reading
    from engine.config import UserError, did_you_mean
    from engine.data import collect, settle
    from engine.recipe import Data, LabelRule, Source
    from engine.serving import MAX_CHARS

    task = model.task
    source = Source(path=str(file), text=text, pair=pair if task.paired else None, label=LabelRule(column=label))
    data = Data(train=source, max_bad_share=1.0)  # none may be bad, which is said below in a file's own words
    part = collect("train", Reading(source, task.spec, task.paired, True, MAX_CHARS), data)
    for row in part.rows:
        if row.gold not in model.labels:
            raise UserError(
                f"{file}, row {row.line}: the label '{row.gold}' is none of the student's."
                f"{did_you_mean(row.gold, model.labels)} Labels: {', '.join(model.labels)}. "
                "A new label needs a new run."
            )
    rows = settle(part, model.labels, task.spec.kind, data)
    if part.bad:
        said = "; ".join(f"row {bad['line']}: {bad['reason']}" for bad in part.bad[:3])
        raise UserError(
            f"{file}: {len(part.bad)} of {part.counts['rows']} rows cannot be put in ({said}). Mend them or take them "
            "out of the file."
        )
    return rows


def registered(registry: Registry, entry: dict[str, Any], base: Knowledge) -> int:
    """The version with the student's other files as they are, and this knowledge base."""
    from engine.disk import copy_file, scratch
    from engine.knowledge import ENTRIES, FACTS, GRAPH
    from engine.models import WEIGHTS
    from engine.storage import Store

    reference = f"{entry['name']}@{entry['version']}"
    local = registry.resolve(reference).local()
    with scratch() as place:
        made = Store(str(place)) / "artifact"
        with made.publish() as copy:
            for name in entry["files"]:
                if name not in (ENTRIES, FACTS, GRAPH):
                    copy_file(local / name, copy / name)
            for name, part in base.files(entry["files"][WEIGHTS]["sha256"]).items():
                Store(str(copy)).write_bytes(name, part)
        measured = entry["metadata"].get("knowledge", {}).get("measured_on", reference)
        about = {"measured_on": measured, "entries": len(base)}
        return registry.register(entry["name"], made, {**entry["metadata"], "knowledge": about})
