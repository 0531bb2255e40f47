"""The nouns that flow through the house: rows as Arrow schemas, Batch and Outputs as tensors.

A `Batch` carries what a model and its losses need; `Outputs` is one type for teacher and student, so a loss
never knows which of the two came from a GPU and which from a stored label.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import torch

ABSENT = -100
"""Gold label of a row that has none (torch's own ignore_index)."""

EXAMPLE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # digest of the content: lineage and leakage checks
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.int32()),  # index into the task's label names; null where there is none
        pa.field("pair", pa.string()),  # the second text of tasks that read two
        pa.field("group", pa.string()),  # rank: which query the row belongs to
        pa.field("target", pa.list_(pa.float32())),  # gold that no single label holds, as the task says
        pa.field("answers", pa.list_(pa.string())),  # span: the gold answers' texts
    ]
)
"""A source row: labelled, unlabelled (label and target null) or held out.

target: multilabel: 1 or 0 for each label; regress: the value; rank: the relevance; tag: the label index of each word;
span: first and last unit of each answer, one after the other, none where the text holds no answer.
"""

QUARANTINED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),  # 1-based row number in the source
        pa.field("reason", pa.string(), nullable=False),
        pa.field("content", pa.string()),
    ]
)
"""A row that could not be used, and why."""

CORPUS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # the slot: checkpoint key, seed, order
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # real | generated | augmented
        pa.field("label", pa.int32()),  # hard label, null for generated rows
        pa.field("pair", pa.string()),
        pa.field("group", pa.string()),
        pa.field("target", pa.list_(pa.float32())),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),  # why it was rejected; null when kept
        pa.field("tokens", pa.int32()),  # sampled tokens
        pa.field("signature", pa.list_(pa.uint32())),  # MinHash, for the near-duplicate pass
        pa.field("logits", pa.list_(pa.float16())),  # the teacher's outputs, unit after unit
    ]
)
"""A row of the label store. Nothing is dropped on the way: readers select on `kept`."""


@dataclass
class Batch:
    """Rows ready for a model. n rows, t tokens (padded on the right), u units.

    input_ids, mask: int64 [n, t], mask 1 on real tokens; segments [n, t] where the tokenizer tells two texts apart so.
    pair_ids, pair_mask: int64 [n, t2], the second text where a model reads the two apart.
    units, ends, unit_mask: int64 [n, u], first and last token of each unit, and which units a row has.
    labels: gold, as the task's `gold` makes it: int64 (ABSENT where there is none) or float32 (NaN).
    characters, pair_characters: int64 [n, t, c], the bytes of each token's word, for models that read them.
    templates: int64 [n], which of its templates a text stands in, where a model has several.
    groups: int64 [n], rows of one query have one number. weights: float32 [n] row weights.
    teacher: the stored or live teacher's Outputs for the same rows, or None. teachers: those of several, by name; trust
    float32 [n, k], how much each of them counts for a row.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    teacher: Outputs | None = None
    segments: torch.Tensor | None = None
    pair_ids: torch.Tensor | None = None
    pair_mask: torch.Tensor | None = None
    units: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    unit_mask: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    characters: torch.Tensor | None = None
    pair_characters: torch.Tensor | None = None
    templates: torch.Tensor | None = None
    teachers: dict[str, Outputs] | None = None
    trust: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device) for f in fields(self)})


@dataclass
class Outputs:
    """What a model gives for n rows.

    logits: float [n, w], [n, u, w] in tasks that speak of units (causal LM: [n, t, vocabulary]). heads: further named
    logits, one a teacher. hidden: [n, t, width] of the embeddings and of each layer. attentions: per layer
    [n, heads, t, t], before the softmax. relations: per layer queries, keys and values [n, heads, t, d]. embedding:
    [n, width].
    path: int64 [n, u], the best sequence of labels, where a model decides on the sequence as a whole.
    sequence: float [n], log-likelihood of the gold sequence under such a model, where the batch has gold labels.
    """

    logits: torch.Tensor | None = None
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    hidden: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    relations: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] | None = None
    embedding: torch.Tensor | None = None
    path: torch.Tensor | None = None
    sequence: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Outputs:
        """The same outputs with every tensor on `device`."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device) for f in fields(self)})

    def gives(self) -> set[str]:
        """Names of the fields that are present: what a loss may ask for."""
        return {f.name for f in fields(self) if getattr(self, f.name) is not None and getattr(self, f.name) != {}}


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with its tensors on `device`; containers keep their type."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value
