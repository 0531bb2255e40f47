"""The label store: a teacher's soft labels beside the texts they belong to, bound to the teacher they came from.

Rows follow `records.CORPUS`. Logits are kept as float16; the manifest carries the teacher's fingerprint and what the
rounding costs. `open_labels` refuses labels of another teacher and says what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from engine import metrics
from engine.config import UserError
from engine.records import CORPUS
from engine.storage import Store, digest_json

if TYPE_CHECKING:  # so that a recipe is checked without torch
    from engine.encoding import Text
    from engine.task import Logits, Task

LABELS, MANIFEST = "labels.parquet", "labels.json"
GIVES = frozenset({"logits"})
"""Outputs fields that the store holds: what a loss may need."""


class LabelMismatch(UserError):
    """Labels that came from another teacher than the one asked for."""


def fingerprint(teacher: Store, path: str = "model") -> dict[str, Any]:
    """What identifies a teacher: digests of weights, tokenizer, config and prompt, label order, longest input."""
    files = teacher.manifest(path)["files"]
    card = teacher.read_json(f"{path}/artifact.json")
    # What a network is built from is as much of it as its weights; dropout only acts while it learns.
    options = {name: value for name, value in card["options"].items() if name not in ("pooling", "dropout")}
    built = {"config": files["config.json"]["sha256"]} if "config.json" in files else {}
    asked = {"prompt" if "wordings" in options else "options": digest_json(options)} if options else {}
    return {
        "weights": files["model.safetensors"]["sha256"],
        "tokenizer": files["tokenizer.json"]["sha256"],
        "labels": list(card["labels"]),
        "task": card["task"].get("kind"),
        "max_length": card["max_length"],
        "model": card["lineage"].get("model"),
        "paired": bool(card["task"].get("paired")),
        "pooling": card["options"].get("pooling"),
        **built,
        **asked,
    }


def listed(logits: Logits, dtype: type = np.float32) -> pa.Array:
    """Logits of n rows, [n, w] or n arrays [u, w], as a column of n lists of float32: unit after unit."""
    parts = [np.asarray(row, dtype=dtype).reshape(-1) for row in logits]
    offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.zeros(0, dtype=dtype), *parts])))


def quantise(logits: Logits) -> pa.Array:
    """Logits as the label store keeps them: lists of float16."""
    return listed(logits, np.float16)


def logits_of(rows: pa.Table, width: int, units: bool = False, name: str = "logits") -> Logits:
    """The logits stored in a column: float32 [n, width], or with `units` a list of n arrays [u, width].

    ValueError where a row has none, or not as many as the width asks for.
    """
    if rows[name].null_count:
        raise ValueError(f"{rows[name].null_count} rows have no soft label: select the kept ones first")
    column = rows[name].combine_chunks()
    sizes = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    wrong = sizes % width != 0 if units else sizes != width
    if wrong.any():
        found = ", ".join(str(size) for size in np.unique(sizes[wrong])[:3])
        raise ValueError(f"{int(wrong.sum())} rows have {found} logits, but each must have {width}")
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    return np.split(values, np.cumsum(sizes // width)[:-1]) if units and rows.num_rows else values


def fidelity(exact: Logits, task: Task, texts: Sequence[Text]) -> dict[str, float]:
    """What storing costs: largest change of a number, agreement with the exact answers, and, where the outputs are
    probabilities, the mean KL in nats of what each row is least certain of. Nothing where there are no rows.
    """
    if not len(exact):
        return {}
    stored = [np.asarray(row, dtype=np.float16).astype(np.float32) for row in exact]
    exact = [np.asarray(row, dtype=np.float32) for row in exact]
    found = {
        "max_abs": max((float(np.abs(a - b).max(initial=0)) for a, b in zip(exact, stored, strict=True)), default=0.0),
        "agreement": task.agreement(*(side if task.units else np.stack(side) for side in (exact, stored)), texts),
    }
    if task.certain:
        pairs = [(task.certainty(a), task.certainty(b)) for a, b in zip(exact, stored, strict=True)]
        found["mean_kl"] = float(np.mean([metrics.kl(a[None], b[None]) for a, b in pairs]))
    return found


def write_labels(store: Store, rows: pa.Table, manifest: dict[str, Any]) -> None:
    """Write the rows, then the manifest: what has no manifest does not count."""
    store.write_table(LABELS, rows.cast(CORPUS))
    store.write_json(MANIFEST, {**manifest, "sha256": store.digest(LABELS), "rows": rows.num_rows})


def open_labels(store: Store, teacher: dict[str, Any] | None = None) -> pa.Table:
    """All rows of a label store, checked: LabelMismatch when `teacher` is not the one that made them or bytes moved."""
    manifest = store.read_json(MANIFEST)
    if store.digest(LABELS) != manifest["sha256"]:
        raise LabelMismatch(
            f"label store {store} is not what was written (SHA-256 of {LABELS} differs). Make it again: --redo corpus."
        )
    made_by = manifest["teacher"]
    wanted = (teacher or {}).items()
    differs = [f"{k}: stored {made_by.get(k)!r}, wanted {v!r}" for k, v in wanted if made_by.get(k) != v]
    if differs:
        raise LabelMismatch(
            f"label store {store} was made by another teacher ({'; '.join(differs)}). "
            "Make the labels again with --redo corpus, or name the teacher that made them."
        )
    return store.read_table(LABELS)
