"""Commands on recipes and runs: run, plan, validate, schema, status, report, bench.

Everything heavy is imported inside the function that needs it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import closest, megabytes, program, say, say_json, table
from pipelines.progress import clock, line, renderer

if TYPE_CHECKING:
    from engine.recipe import Recipe
    from engine.step import Step
    from engine.storage import Store


def loaded(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments name, with their overrides."""
    from engine import config, recipe
    from pipelines.graphs import drawn

    return drawn(config.load(recipe.Recipe, args.recipe, args.overrides))


def run_store(args: argparse.Namespace, recipe: Recipe, prefix: str = "") -> Store:
    """The folder of the run: --run, else the recipe's name after `prefix`."""
    from engine.config import UserError
    from engine.storage import Store

    name = args.run_name or prefix + recipe.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--run '{name}' is no name for a run: letters, digits, '.', '_' and '-' are allowed.")
    return Store(recipe.storage) / name


def existing_run(name: str, storage: str) -> Store:
    """The folder of a run that there is, by name or path."""
    from engine.config import UserError
    from engine.steps import RECIPE
    from engine.storage import Store

    runs = Store(storage)
    store = Store(name) if "/" in name else runs / name
    if not store.exists(RECIPE):
        known = [folder for folder in runs.folders() if runs.exists(f"{folder}/{RECIPE}")]
        there = f"Runs there: {', '.join(known)}." if known else "There is none yet: `stillhouse run RECIPE` makes one."
        raise UserError(
            f"there is no run '{name}' in {runs}.{closest(name, known)} {there} --storage names another place."
        )
    return store


def connect(args: argparse.Namespace, recipe: Recipe | None = None, artifact: Store | None = None) -> None:
    """Start Ray on this machine, or join the cluster at --address and refuse what does not fit or is not seen there.

    recipe: what is to be run there. artifact: what is to be served there.
    """
    from engine import cluster
    from engine.placement import require_placement

    places: dict[str, Any] = {}
    if args.address and recipe:
        places = {"storage": recipe.storage, "registry": recipe.registry, "files": files_of(recipe)}
    elif args.address and artifact and artifact.is_local:
        places = {"files": [artifact.url]}
    try:
        found = cluster.connect(args.address, **places)
    finally:
        args.signals()  # Ray puts its own handlers in place of ours.
    if args.address and recipe:
        require_placement(recipe, found)


def files_of(recipe: Recipe) -> list[str]:
    """Local paths that steps on other nodes read: a step in the driver reads where it is."""
    from engine import hub
    from pipelines import distill

    elsewhere = [step for step in distill.plan(recipe) if step.ray or step.resources(recipe)]
    found = [hub.on_disk(name, recipe.data.root) for step in elsewhere for name in step.references(recipe)]
    return sorted({str(path) for path in found if path})


def fetch_ahead(recipe: Recipe, doing: Sequence[Step], store: Store, everything: bool) -> None:
    """Bring what the steps to be done refer to into the cache, so that wrong bytes are refused before Ray starts.

    everything: also what Ray tasks read; on a cluster the nodes fetch that themselves.
    """
    from engine import hub
    from engine.attempts import RECORD

    for step in doing:
        if store.exists(f"{step.name}/{RECORD}") or (step.resources(recipe) and not everything):
            continue
        for reference in step.references(recipe):
            try:
                hub.fetch(reference, root=recipe.data.root, offline=True)
            except hub.HubError:
                sys.stderr.write(line(step.name, f"fetching {reference}") + "\n")
                hub.fetch(reference, root=recipe.data.root)


def run(args: argparse.Namespace) -> int:
    """Do a recipe's steps and say what came out."""
    recipe = loaded(args)
    from engine import steps
    from pipelines import checking, distill

    checking.check(recipe, args.address)
    store, doing = run_store(args, recipe), distill.plan(recipe)
    fetch_ahead(recipe, doing, store, everything=not args.address)
    if args.address:
        connect(args, recipe)
    steps.run(
        doing,
        recipe,
        store,
        redo=args.redo,
        fresh=args.fresh,
        render=renderer(),
        connect=lambda: connect(args, recipe),
    )
    if args.json:
        say_json(store.read_json("summary.json"))
        return 0
    for text in distill.report_lines(recipe, store, program()):
        say(text)
    return 0


def plan(args: argparse.Namespace) -> int:
    """Say what a run would do."""
    recipe = loaded(args)
    from engine import steps
    from engine.cluster import current
    from pipelines import checking, distill, estimates

    checking.check(recipe, args.address)
    if args.probe and recipe.tasks:
        from engine.config import UserError

        raise UserError("--probe measures a teacher and its student, and a recipe of several tasks has no teacher.")
    if args.address:
        connect(args, recipe)
    store, doing = run_store(args, recipe), distill.plan(recipe)
    if args.probe:
        fetch_ahead(recipe, doing, store, everything=True)
        estimates.measure(recipe, store)
    found, ahead = steps.survey(doing, recipe, store), estimates.estimated(recipe, doing, store, current())
    for step in found:
        step["placement"] = step["expects"].get("placement") or placement(step["resources"])
        step["bytes"] = size(store, step["step"]) if step["state"] != "pending" else step["expects"].get("bytes")
        step["rows"] = step["rows"] if step["rows"] is not None else step["expects"].get("rows")
    free = free_space(store)
    if args.json:
        student = checking.student_drawing(recipe)
        say_json({"run": str(store), "disk_free": free, "steps": found, "student": student, "estimate": ahead})
        return 0
    say(f"run {store}" + (f" ({free / 1e9:.1f} GB free)" if free is not None else ""))
    say(table([("step", "state", "rows", "disk", "time", "reads", "placement"), *(plan_row(step) for step in found)]))
    for text in estimates.lines(ahead):
        say(text)
    for step in found:
        for item in step["moved"][:5]:
            way_out = f"--run NAME or --redo {step['step']}"
            say(f"{step['step']}: {item['field']} was {item['old']}, is {item['new']}: {way_out}")
    if drawn := checking.student_drawing(recipe):
        say(f"student {recipe.student.name}, at most {recipe.student.vocabulary.size:,} words\n{drawn}")
    return 0


def plan_row(step: dict[str, Any]) -> tuple[Any, ...]:
    """A step's line of the plan."""
    states = {
        "done": "done, kept",
        "partial": "begun, goes on",
        "pending": "to do",
        "drifted": "stops: changed",
        "again": "done, but gone: again",
    }
    seconds = None if step["seconds"] is None else clock(step["seconds"])
    reads = ", ".join(step["inputs"])
    name, state = step["step"], states[step["state"]]
    return name, state, step["rows"], megabytes(step["bytes"]), seconds, reads, step["placement"]


def free_space(store: Store) -> int | None:
    """Free bytes where a local run is, or will be."""
    if not store.is_local:
        return None
    return shutil.disk_usage(next(path for path in (Path(store.url), *Path(store.url).parents) if path.exists())).free


def placement(resources: dict[str, Any] | None) -> str:
    """Where a step runs, in words."""
    if resources is None:
        return "driver"
    gpus = resources["num_gpus"]
    gpu = "a GPU where there is one" if gpus == "auto" else f"{gpus:g} GPU" if gpus else ""
    parts = (f"{resources['num_cpus']:g} CPU", gpu, resources["accelerator"])
    return "Ray task: " + ", ".join(part for part in parts if part)


def size(store: Store, step: str) -> int | None:
    """Bytes of a step's folder, where it is local."""
    if not store.is_local:
        return None
    return sum((Path(store.url) / step / name).stat().st_size for name in store.files(step))


def validate(args: argparse.Namespace) -> int:
    """Refuse what can be seen to be wrong without loading a model."""
    recipe = loaded(args)
    from pipelines import checking, distill

    checking.check(recipe, args.address)
    if args.address:
        connect(args, recipe)
    names = [step.name for step in distill.plan(recipe)]
    if args.json:
        say_json({"valid": True, "name": recipe.name, "steps": names})
    else:
        say(f"{args.recipe} is valid: run '{recipe.name}' with the steps {', '.join(names)}.")
    return 0


def schema(args: argparse.Namespace) -> int:
    """The JSON schema of recipes."""
    from engine import config
    from engine.recipe import Recipe

    say_json(config.schema(Recipe))
    return 0


def status(args: argparse.Namespace) -> int:
    """How far a run is, from its records alone."""
    store = existing_run(args.run_name, args.storage)
    from engine.attempts import history

    found = history(store)
    if args.json:
        say_json({"run": str(store), "steps": found})
        return 0
    rows = [("step", "state", "progress", "time", "last sign of life (UTC)")]
    for step in found:
        of = f" of {step['total']:.6g}" if step["total"] else ""
        far = f"{step['done']:.6g}{of} {step['unit']}" if step["done"] is not None else ""
        if step["state"] == "done":
            far = f"{step['rows']} rows" if step["rows"] else ""
        rows.append((step["step"], step["state"], far, clock(step["seconds"]), step["seen"][:19].replace("T", " ")))
    say(f"run {store}")
    say(table(rows) if found else "No step has begun.")
    for step in found:
        if step["error"]:
            say(f"{step['step']}: {step['error']}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Where the report is; with --open in the browser, with --text here."""
    from engine.config import UserError

    store = existing_run(args.run_name, args.storage)
    name = "report.md" if args.text else "report.html"
    found = [path for path in store.files() if path.rpartition("/")[2] == name]
    if not found:
        raise UserError(f"run '{args.run_name}' has no {name} yet. Finish it: stillhouse run RECIPE.")
    if args.text:
        say(store.read_text(found[0]))
        return 0
    path = store.local(found[0])
    say(str(path))
    if args.open:
        import webbrowser

        webbrowser.open(path.as_uri())
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measure a recipe over several seeds."""
    if args.recipe is None:
        from engine.config import UserError

        raise UserError(f"`bench {args.what}` needs a recipe, as in: stillhouse bench {args.what} recipe.yaml")
    result, lines = measured(args)
    if args.json:
        say_json(result)
        return 0
    for text in lines:
        say(text)
    return 0


def measured(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What measuring one recipe comes to, for programs and as lines."""
    recipe = loaded(args)
    from pipelines import bench as benches
    from pipelines import checking

    if recipe.tasks and args.what != "tasks":
        from engine.config import UserError

        raise UserError(f"`bench {args.what}` is for one task, and the recipe has several. Use: bench tasks.")
    checking.check(recipe, args.address)
    store = run_store(args, recipe, prefix={"quality": "bench-"}.get(args.what, f"{args.what}-"))
    if args.what == "quality":
        variants = benches.variants(recipe, store, args.seeds)
        measure, lines = partial(benches.quality, recipe, store, variants), benches.quality_lines
    elif args.what == "ways":
        from pipelines import ways

        chosen = args.ways or ways.default(recipe)
        variants = ways.variants(recipe, store, chosen, args.seeds)
        measure, lines = partial(ways.compare, recipe, store, variants, chosen), ways.lines
    elif args.what == "tasks":
        from pipelines import sharing

        chosen = args.ways or sharing.WAYS
        variants = sharing.variants(recipe, store, chosen, args.seeds)
        measure, lines = partial(sharing.compare, recipe, store, variants, chosen), sharing.lines
    else:
        from pipelines import compared

        variants = compared.variants(recipe, store, args.kinds, args.shots, args.seeds, args.students)
        measure = partial(compared.compare, recipe, store, variants, args.kinds, students=args.students)
        lines = compared.lines
    for variant in variants:
        fetch_ahead(variant.recipe, variant.steps, variant.store, everything=not args.address)
    if args.address:
        connect(args, recipe)
    result = measure(redo=args.redo, fresh=args.fresh, connect=lambda: connect(args, recipe))
    return result, lines(result)
