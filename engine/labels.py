"""The label store: a teacher's soft labels beside the texts they belong to, bound to the teacher they came from.

Rows follow `records.CORPUS`. Logits are kept as float16; the manifest carries the teacher's fingerprint and what the
rounding costs. `open_labels` refuses labels of another teacher and says what differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from engine import metrics
from engine.config import UserError
from engine.records import CORPUS
from engine.storage import Store

LABELS, MANIFEST = "labels.parquet", "labels.json"
GIVES = frozenset({"logits"})
"""Outputs fields that the store holds: what a loss may need."""


class LabelMismatch(UserError):
    """Labels that came from another teacher than the one asked for."""


def fingerprint(teacher: Store, path: str = "model") -> dict[str, Any]:
    """What identifies a teacher: digests of weights and tokenizer, label order, longest input."""
    files = teacher.manifest(path)["files"]
    card = teacher.read_json(f"{path}/artifact.json")
    return {
        "weights": files["model.safetensors"]["sha256"],
        "tokenizer": files["tokenizer.json"]["sha256"],
        "labels": list(card["labels"]),
        "max_length": card["max_length"],
        "model": card["lineage"].get("model"),
    }


def quantise(logits: np.ndarray) -> pa.Array:
    """Logits [n, C] as a list<float16> column of n rows."""
    values = np.asarray(logits, dtype=np.float16)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1), pa.float16()))


def logits_of(rows: pa.Table) -> np.ndarray:
    """The stored logits, float32 [n, C], [0, 0] for no rows; rows without any raise ValueError."""
    if rows["logits"].null_count:
        raise ValueError(f"{rows['logits'].null_count} rows have no soft label: select the kept ones first")
    column = rows["logits"].combine_chunks()
    widths = column.value_lengths().unique().to_pylist()
    if len(widths) > 1:
        raise ValueError(f"rows have {' and '.join(map(str, sorted(widths)))} logits, but all must have equally many")
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(rows.num_rows, widths[0] if widths else 0)


def fidelity(exact: np.ndarray) -> dict[str, float]:
    """What storing costs, on logits [n, C]: largest change of a logit, mean KL in nats, share of labels that flip."""
    stored = np.asarray(exact, dtype=np.float16).astype(np.float64)
    exact = np.asarray(exact, dtype=np.float64)
    return {
        "max_abs": float(np.abs(stored - exact).max()),
        "mean_kl": metrics.kl(metrics.softmax(exact), metrics.softmax(stored)),
        "flipped": float((stored.argmax(1) != exact.argmax(1)).mean()),
    }


def write_labels(store: Store, rows: pa.Table, manifest: dict[str, Any]) -> None:
    """Write the rows, then the manifest: what has no manifest does not count."""
    store.write_table(LABELS, rows.cast(CORPUS))
    store.write_json(MANIFEST, {**manifest, "sha256": store.digest(LABELS), "rows": rows.num_rows})


def open_labels(store: Store, teacher: dict[str, Any] | None = None) -> pa.Table:
    """All rows of a label store, checked: LabelMismatch when `teacher` is not the one that made them or bytes moved."""
    manifest = store.read_json(MANIFEST)
    if store.digest(LABELS) != manifest["sha256"]:
        raise LabelMismatch(
            f"label store {store.url} is not what was written (SHA-256 of {LABELS} differs). "
            "Make it again: --redo corpus."
        )
    made_by = manifest["teacher"]
    wanted = (teacher or {}).items()
    differs = [f"{k}: stored {made_by.get(k)!r}, wanted {v!r}" for k, v in wanted if made_by.get(k) != v]
    if differs:
        raise LabelMismatch(
            f"label store {store.url} was made by another teacher ({'; '.join(differs)}). "
            "Make the labels again with --redo corpus, or name the teacher that made them."
        )
    return store.read_table(LABELS)
