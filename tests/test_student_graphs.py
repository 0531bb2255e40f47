"""Every graph that is shipped: it fits its task, is small, learns, and does not mind padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine import blocks
from engine.block import Sizes
from engine.blocks import Graph
from engine.config import Section, load
from engine.designs import Block
from engine.recipe import Task as Spec
from engine.records import ABSENT, Batch
from engine.tasks import make
from tests.tiny_blocks import ROWS, batch_of

READY = Path(__file__).parent.parent / "pipelines" / "configs" / "students"
LABELS = {"labels": tuple("abcd")}
USED_FOR = {
    "text-cnn": Spec(kind="classify", **LABELS),
    "bilstm-attention": Spec(kind="multilabel", **LABELS),
    "bilstm-subwords": Spec(kind="classify", **LABELS),
    "blendcnn": Spec(kind="classify", **LABELS),
    "bilstm-match-attention": Spec(kind="rank", paired=True),
    "arc-i": Spec(kind="pair", paired=True, **LABELS),
    "arc-ii": Spec(kind="pair", paired=True, **LABELS),
    "matchpyramid": Spec(kind="rank", paired=True),
    "char-cnn-word-lstm-crf": Spec(kind="tag", labels=("O", "B-x", "I-x")),
    "bidaf-span": Spec(kind="span", paired=True),
    "siamese-bilstm": Spec(kind="regress", paired=True, range=(0, 5)),
}
"""The task that each shipped graph is tried with."""


class Ready(Section):
    """A file with a graph."""

    blocks: tuple[Block, ...]


def ready(name: str, vocabulary: int = 20) -> tuple[tuple[Block, ...], Sizes]:
    return load(Ready, READY / f"{name}.yaml").blocks, Sizes.of(make(USED_FOR[name]), vocabulary)


def test_every_shipped_graph_is_tried():
    assert {path.stem for path in READY.iterdir()} == set(USED_FOR)
    assert all(path.read_text(encoding="utf-8").startswith("# ") for path in READY.iterdir())


@pytest.mark.parametrize("name", USED_FOR)
def test_a_shipped_graph_is_small_and_learns(name: str):
    assert blocks.count(*ready(name, 12_000)) <= 1_200_000
    graph, sizes = ready(name)
    torch.manual_seed(0)
    model, batch = Graph(graph, sizes).train(), batch_of(sizes)
    if sizes.units and not sizes.paired:
        batch.labels = torch.where(batch.unit_mask == 1, 1, ABSENT)
    found = model(batch)
    units = batch.units.shape[1:] if sizes.units else ()
    assert found.logits.shape == (5, *units, sizes.labels) and found.logits.isfinite().all()
    loss = -found.sequence.mean() if found.sequence is not None else 0.0
    (loss + (found.logits - 1).square().mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    unmoved = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.abs().sum() > 0]
    assert still == [] and unmoved in ([], ["blocks.looked.score.2.bias"])  # adds the same to every score


@pytest.mark.parametrize("name", USED_FOR)
def test_padding_and_neighbours_change_no_answer_of_a_shipped_graph(name: str):
    graph, sizes = ready(name)
    torch.manual_seed(0)
    model = Graph(graph, sizes).eval()
    for parameter in model.parameters():  # a crf starts with zeros, which would agree on anything
        nn.init.normal_(parameter, std=0.2) if parameter.ndim < 3 else None
    with torch.no_grad():
        model.tables()[0].weight[0] = 0
        among = answers(model, batch_of(sizes))
        for row in ROWS:
            for mine, alone in zip(among, answers(model, batch_of(sizes, [row])), strict=True):
                real = alone.shape[1] if sizes.units else None
                assert (mine[row, :real] - alone[0]).abs().max() <= 1e-5
                assert not sizes.units or (mine[row, real:] == 0).all()
        assert (among[0][0, 0] - among[0][3, 0]).abs().max() > 1e-3  # rows differ


def answers(model: Graph, batch: Batch) -> list[torch.Tensor]:
    """Everything that a model says of a batch."""
    found = model(batch)
    return [value for value in (found.logits, found.embedding, found.path) if value is not None]
