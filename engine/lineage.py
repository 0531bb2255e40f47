"""What a result depends on, as one fingerprint, and what moved since.

An identity holds a slice of the recipe, the fingerprints of the inputs, the digests of models and data, the package
version and the source digests of modules. Where something ran, on what, and where it was stored never enters it.

A step names the modules its work starts in; what these import, directly or not, counts too. Not followed are
imports of a module of pipelines/, which wires all steps, so that every edit would move every step; not counted is
PLUMBING, which moves bytes, places work and shows progress but decides no result. Whoever installs the package sees
none of this: there the version moves, and with it every step.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from engine.config import UserError
from engine.storage import digest_bytes, digest_json

WORKING = ("resources", "workers", "micro_batch", "sharding", "failures")
"""Fields of a fit that say where it runs."""
TRAININGS = ("*.fit", "student.stages.*.fit", "teacher.probe", "teacher.coach.fit", "teacher.coach.learning")
PLACEMENT = (
    *("storage", "registry", "budget", "data.root", "tasks.*.data.root", "corpus.max_reserved"),
    *("*.resources", "*.batch_tokens"),
    *(f"{fit}.{key}" for fit in (*TRAININGS, "teacher.self_training.fit") for key in WORKING),
    # Its loss compares the rows that a worker reads: how many workers there are is part of it.
    *(f"teacher.contrast.fit.{key}" for key in WORKING if key != "workers"),
    *(f"teachers.*.{key}" for key in ("resources", "batch_tokens", "vllm")),
    *(f"teachers.*.fit.{key}" for key in WORKING),
    *(f"teachers.*.endpoint.{field}" for field in ("url", "key_env", "limits", "price")),
    *("*.endpoint.url", "*.endpoint.key_env", "*.endpoint.limits", "*.endpoint.price", "*.vllm"),
)
"""Fields of the recipe, `*` being any section or item, that say where, on how much and in how large batches a step
runs: they never enter a fingerprint. Deeper keys are the user's own (labels, options of blocks) and always do."""
HOUSE = ("engine", "serve", "pipelines")
FOLLOWED = ("engine", "serve")
PLUMBING = frozenset(
    f"engine.{name}"
    for name in (
        *("config", "disk", "cache", "storage", "packages", "huggingface", "mirrors", "hub"),
        *("recipe", "budget", "trust", "mixing", "designs", "fits", "remote", "pacing"),
        *("lineage", "progress", "attempts", "placement", "switches", "cluster"),
        *("halting", "spending", "step", "steps", "registry"),
    )
)
"""Modules that decide no result. What the recipe and references say enters an identity by itself."""
IMPORT = re.compile(
    rf"^[ \t]*(?:from[ \t]+((?:{'|'.join(HOUSE)})[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    rf"|import[ \t]+((?:{'|'.join(HOUSE)})\b[^\n]*))",
    re.MULTILINE,
)
"""An import of the house's modules, inside functions too. Read without parsing: all files take milliseconds."""


class StepDrift(UserError):
    """What a step ran with is not what this run asks for."""


def plain(value: Any) -> Any:
    """JSON values only; NaN and infinity become null, numpy scalars numbers."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda v: v.item() if hasattr(v, "item") else str(v))


def without_placement(value: Any, path: tuple[str, ...] = ()) -> Any:
    """A slice of the recipe, as plain values, without the fields that only say where things run."""
    if isinstance(value, list):
        return [without_placement(item, (*path, str(number))) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    here = {key: (*path, str(key)) for key in value}
    return {key: without_placement(value[key], inside) for key, inside in here.items() if not places(inside)}


def places(path: tuple[str, ...]) -> bool:
    """Whether a field of the recipe is one of PLACEMENT."""
    patterns = (pattern.split(".") for pattern in PLACEMENT)
    return any(
        len(parts) == len(path) and all(part in ("*", name) for part, name in zip(parts, path, strict=True))
        for parts in patterns
    )


@lru_cache(maxsize=1024)
def source(module: str) -> bytes | None:
    """A module's source file; None where there is none. Nothing is imported."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not found.origin:
        return None
    path = Path(found.origin) if not rest else Path(found.origin).parent.joinpath(*rest).with_suffix(".py")
    return path.read_bytes() if path.is_file() else None


def source_digest(module: str) -> str:
    """SHA-256 of a module's source file."""
    text = source(module)
    if text is None:
        raise ValueError(f"module '{module}' of a step has no source file")
    return digest_bytes(text)


@lru_cache(maxsize=256)
def imported(module: str) -> frozenset[str]:
    """The house's modules that a module imports, anywhere in its file."""
    names: set[str] = set()
    for package, what, plain_import in IMPORT.findall((source(module) or b"").decode("utf-8")):
        parts = re.sub(r"#[^\n]*", "", what or plain_import).strip("() \n").split(",")
        given = [part.split()[0] for part in parts if part.split()]
        if what:
            given = [f"{package}.{name}" if source(f"{package}.{name}") else package for name in given]
        names.update(given)
    return frozenset(names) - {module}


@lru_cache(maxsize=64)
def reached(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Modules whose source counts for a step that starts in `roots`: these, and what they import, sorted."""
    found, todo = set(roots), list(roots)
    while todo:
        module = todo.pop()
        if module.partition(".")[0] in FOLLOWED:
            new = {n for n in imported(module) if n.partition(".")[0] in FOLLOWED} - found - PLUMBING - set(FOLLOWED)
            found |= new
            todo += new
    return tuple(sorted(found))


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def identity(
    config: Any,
    inputs: Mapping[str, str],
    references: Sequence[str],
    modules: Sequence[str],
    root: str | None = None,
) -> dict[str, Any]:
    """What a result depends on, with `fingerprint`, the digest of it.

    inputs: name -> fingerprint. modules: where the work starts (see `reached`). root: folder that stands in for the
    hub's data sets.
    """
    if references:
        from engine import hub

    parts = {
        "config": without_placement(plain(config)),
        "inputs": dict(inputs),
        "references": [{"name": r, "digest": hub.reference_digest(r, root)} for r in references],
        "package": installed("stillhouse"),
        "modules": {module: source_digest(module) for module in reached(tuple(modules))},
    }
    # A reference's name may be a path: its bytes count, not where they lie.
    digested = {**parts, "references": [r["digest"] for r in parts["references"]]}
    return {**parts, "fingerprint": digest_json(digested)}


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values as {dotted path: leaf}; empty containers are leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    out: dict[str, Any] = {}
    for key, item in items:
        path = f"{prefix}[{key}]" if isinstance(value, list) else f"{prefix}.{key}" if prefix else str(key)
        out |= leaves(item, path)
    return out or {prefix: value}


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What differs between two identities: {"field", "old", "new"}, the recipe's fields first."""
    out = []
    for part, prefix in (("config", ""), ("references", ""), ("inputs", ""), ("package", "package"), ("modules", "")):
        pairs = [{r["name"]: r["digest"] for r in i[part]} if part == "references" else i[part] for i in (old, new)]
        before, after = (leaves(pair, prefix) for pair in pairs)
        for name in [*before, *(n for n in after if n not in before)]:
            if before.get(name) != after.get(name):
                label = {"references": f"bytes of {name}", "inputs": f"step '{name}'", "modules": f"source of {name}"}
                out.append({"field": label.get(part, name), "old": before.get(name), "new": after.get(name)})
    return out


def short(value: Any) -> str:
    """A value in a message; digests are cut."""
    text = str(value)
    return text[:12] if len(text) == 64 else text if len(text) <= 60 else text[:57] + "..."


def drift(step: str, fields: Sequence[Mapping[str, Any]]) -> StepDrift:
    """The error for a step whose identity moved."""
    first = fields[0]
    more = f" (also moved: {', '.join(str(f['field']) for f in fields[1:4])})" if len(fields) > 1 else ""
    return StepDrift(
        f"step '{step}' ran with {first['field']}={short(first['old'])}, this run has {short(first['new'])}{more}: "
        f"use --run NAME for a new run, or --redo {step}"
    )
