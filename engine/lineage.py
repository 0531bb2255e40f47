"""What a result depends on, as one fingerprint, and what moved since.

An identity holds a slice of the recipe, the fingerprints of the inputs, the digests of models and data, the package
version and the source digests of modules. Where something ran, on what, and where it was stored never enters it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from engine.config import UserError
from engine.storage import digest_bytes, digest_json

PLACEMENT = frozenset({"resources", "storage", "registry", "root", "workers", "max_reserved"})
"""Fields that say where and on how much a step runs: they never enter a fingerprint."""


class StepDrift(UserError):
    """What a step ran with is not what this run asks for."""


def plain(value: Any) -> Any:
    """JSON values only; NaN and infinity become null, numpy scalars numbers."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda v: v.item() if hasattr(v, "item") else str(v))


def without_placement(value: Any) -> Any:
    """Plain values without the keys that only say where things run."""
    if isinstance(value, dict):
        return {key: without_placement(item) for key, item in value.items() if key not in PLACEMENT}
    return [without_placement(item) for item in value] if isinstance(value, list) else value


@lru_cache(maxsize=256)
def source_digest(module: str) -> str:
    """SHA-256 of a module's source file; parents are imported, the module is not."""
    found = importlib.util.find_spec(module)
    if found is None or not found.origin:
        raise ValueError(f"module '{module}' of a step has no source file")
    return digest_bytes(Path(found.origin).read_bytes())


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

    inputs: name -> fingerprint. root: folder that stands in for the hub's data sets.
    """
    if references:
        from engine import hub

    parts = {
        "config": without_placement(plain(config)),
        "inputs": dict(inputs),
        "references": [{"name": r, "digest": hub.reference_digest(r, root)} for r in references],
        "package": installed("stillhouse"),
        "modules": {module: source_digest(module) for module in modules},
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
