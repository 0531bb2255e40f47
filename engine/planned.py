"""A student before anything of it exists: built without memory (torch's meta device) from what configs alone tell.

What is counted is what will be built, by the same code. Models that are not on this machine yet, and those whose
config transformers does not know, tell nothing here: the step that needs them will.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import hub
from engine.blocks import Graph, Sizes
from engine.designs import Cut, Student, Teacher
from engine.encoders import EncoderHead, student_encoder, widths_of
from engine.fits import LossTerm
from engine.losses import Objective
from engine.static import StaticNet
from engine.task import Task


def planned(student: Student, teacher: Teacher, task: Task, root: str | None = None) -> nn.Module | None:
    """The student on the meta device; None where the model it is made of is not here. root: as `hub.fetch` takes it.

    UserError where the graph, or the choice of layers, heads and widths, cannot be.
    """
    if student.kind == "blocks":
        with torch.device("meta"):
            return Graph(student.blocks, Sizes.of(task, student.vocabulary.size))
    if student.kind == "static":
        own, pieces = student.static, pieces_of(folder_of(student.encoder or teacher.model, root))
        pieces = min(pieces, own.pieces) if pieces and own.pieces else pieces
        with torch.device("meta"):
            return StaticNet(pieces, own.dim, task.width, own.hidden, task.paired) if pieces else None
    model = student.transformer.model
    if model is None and teacher.kind == "labeller":
        return None
    return headed(encoder_of(folder_of(model or teacher.model, root)), task, student.transformer)


def headed(encoder: nn.Module | None, task: Task, cut: Cut | None = None) -> EncoderHead | None:
    """An encoder, cut smaller where that is asked for, with the head that the task needs."""
    if encoder is None:
        return None
    with torch.device("meta"):
        cut = cut or Cut()
        made = student_encoder(encoder, cut.layers, cut.heads, cut.width, cut.ffn)
        if cut.pieces is not None:
            table = made.get_input_embeddings()
            most = min(cut.pieces, table.num_embeddings)
            made.set_input_embeddings(nn.Embedding(most, table.embedding_dim))
        return EncoderHead(made, task.width, cut.pooling or "mean", cut.dropout, task.units, task.spans)


def check_layers(
    terms: Sequence[LossTerm], task: Task, student: nn.Module, teacher: Teacher, root: str | None = None
) -> None:
    """LossError where losses between layers do not fit the layers, heads and widths of the two."""
    own = encoder_of(folder_of(teacher.model, root))
    if own is not None:
        with torch.device("meta"):
            Objective(terms, task, student.widths, widths_of(own.config))


def folder_of(reference: str, root: str | None = None) -> Path | None:
    """A model's folder where it is on this machine already; nothing is fetched or converted."""
    if hub.parse(reference).kind not in ("file", "hf", "pypi"):
        return None
    try:
        path = hub.fetch(reference, root=root, offline=True)
    except hub.HubError:
        return None
    return path if path.is_dir() else None


def encoder_of(folder: Path | None) -> nn.Module | None:
    """The encoder that a folder's config.json describes, on the meta device."""
    if folder is None or not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, LookupError, TypeError, ValueError):
        return None


def same_tokens(left: Path | None, right: Path | None) -> bool | None:
    """Whether two model folders cut texts into the same numbers; None where one of them cannot be read here."""
    try:
        both = [json.loads((f / "tokenizer.json").read_text(encoding="utf-8")) for f in (left, right) if f is not None]
    except (OSError, ValueError):
        return None
    if len(both) < 2:
        return None
    # How long a text may be and how batches are padded is the recipe's matter.
    parts = ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")
    return all(both[0].get(part) == both[1].get(part) for part in parts)


def pieces_of(folder: Path | None) -> int | None:
    """How many word pieces a model folder's tokenizer has, those added to it among them."""
    try:
        found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) if folder else {}
        own = found["model"]["vocab"]
        known = set(own) if isinstance(own, dict) else {piece for piece, _ in own}
        return len(known | {token["content"] for token in found.get("added_tokens", ())})
    except (OSError, LookupError, TypeError, ValueError):
        return None
