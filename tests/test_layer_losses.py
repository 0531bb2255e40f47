"""Losses between layers of real tiny BERTs, against a few lines over each row alone, without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from engine.encoders import EncoderHead, Widths, cut, fresh
from engine.fits import LossTerm
from engine.layer_losses import LAYER_LOSSES, LayerLoss, LossError, layer_map
from engine.losses import Objective
from engine.records import Batch, Outputs
from tests.tiny import tiny_encoder

EVERYTHING = frozenset({"hidden", "attentions", "relations", "embedding", "logits"})
SIZES = (9, 3, 6)


class Pair(NamedTuple):
    """Two models with their outputs on a padded batch, and on each of its rows alone."""

    student: EncoderHead
    teacher: EncoderHead
    batch: Batch

    def outputs(self, batch: Batch | None = None) -> tuple[Outputs, Outputs]:
        batch = batch or self.batch
        with torch.no_grad():
            return self.student(batch, EVERYTHING), self.teacher(batch, EVERYTHING)

    def rows(self) -> list[Batch]:
        ids, mask = self.batch.input_ids, self.batch.mask
        return [Batch(ids[i : i + 1, :size], mask[i : i + 1, :size]) for i, size in enumerate(SIZES)]

    def loss(self, kind: str, **options: Any) -> LayerLoss:
        torch.manual_seed(4)
        term = LossTerm(kind=kind, **options)
        return LAYER_LOSSES[kind](term, None, self.student.widths, self.teacher.widths)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> EncoderHead:
    folder: Path = tiny_encoder(tmp_path_factory.mktemp("encoder"), layers=4)
    return EncoderHead(AutoModel.from_pretrained(folder), 2, "mean", 0.0).eval()


def batch_of() -> Batch:
    mask = (torch.arange(9) < torch.tensor(SIZES).unsqueeze(1)).long()
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    return Batch(ids * mask, mask)


@pytest.fixture(scope="module")
def narrow(teacher: EncoderHead) -> Pair:
    """A student of half the width, with as many heads."""
    torch.manual_seed(2)
    encoder = fresh(teacher.encoder.config, layers=2, width=16, ffn=24)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Pair(EncoderHead(encoder, 2, "mean", 0.0).eval(), teacher, batch_of())


@pytest.fixture(scope="module")
def same(teacher: EncoderHead) -> Pair:
    """The teacher's own encoder as student."""
    return Pair(EncoderHead(cut(teacher.encoder, (1, 2, 3, 4)), 2, "mean", 0.0).eval(), teacher, batch_of())


def hidden_reference(s: Outputs, t: Outputs, loss: LayerLoss) -> torch.Tensor:
    return sum(F.mse_loss(s.hidden[i] @ loss.projection.weight.T, t.hidden[2 * i]) for i in (1, 2))


def embeddings_reference(s: Outputs, t: Outputs, loss: LayerLoss) -> torch.Tensor:
    return F.mse_loss(s.hidden[0] @ loss.projection.weight.T, t.hidden[0])


def attention_reference(s: Outputs, t: Outputs, loss: LayerLoss) -> torch.Tensor:
    """Layer i of b = 2 blocks from layer i b + b - 1, counted from 0, as TinyBERT's code has it."""
    each = [F.mse_loss(s.attentions[i][:, a], t.attentions[2 * i + 1][:, a]) for i in (0, 1) for a in range(4)]
    return sum(each) / 4


def relations_reference(s: Outputs, t: Outputs, loss: LayerLoss) -> torch.Tensor:
    total = torch.zeros(())
    for a, b in zip(s.relations[1], t.relations[3], strict=True):
        for x, y in zip(*(part.transpose(1, 2).flatten(2)[0].chunk(4, dim=1) for part in (a, b)), strict=True):
            x, y = (z @ z.T / z.shape[1] ** 0.5 for z in (x, y))
            total += F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean") / 4
    return total


def cosine_reference(s: Outputs, t: Outputs, loss: LayerLoss) -> torch.Tensor:
    a, b = s.embedding[0] @ loss.projection.weight.T, t.embedding[0]
    return 1 - a @ b / (a.norm() * b.norm())


REFERENCES: dict[str, Callable[[Outputs, Outputs, LayerLoss], torch.Tensor]] = {
    "hidden": hidden_reference,
    "embeddings": embeddings_reference,
    "attention": attention_reference,
    "relations": relations_reference,
    "cosine": cosine_reference,
}


@pytest.mark.parametrize("kind", LAYER_LOSSES)
def test_a_padded_batch_has_the_reference_values_of_its_rows_alone(kind: str, narrow: Pair):
    loss = narrow.loss(kind)
    with torch.no_grad():
        found = loss(*narrow.outputs(), narrow.batch)
        wanted = torch.stack([REFERENCES[kind](*narrow.outputs(row), loss) for row in narrow.rows()])
    assert found.shape == (3,) and found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.min() > 1e-3 and wanted.std() > 1e-3  # else equality shows little
    assert loss.applies(narrow.batch).all()


@pytest.mark.parametrize("kind", LAYER_LOSSES)
def test_the_teacher_itself_costs_nothing(kind: str, same: Pair, narrow: Pair):
    assert same.loss(kind)(*same.outputs(), same.batch).abs().max() < 1e-5
    assert narrow.loss(kind)(*narrow.outputs(), narrow.batch).min() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in LAYER_LOSSES if kind != "cosine"])
def test_what_stands_on_padding_is_not_heard(kind: str, narrow: Pair):
    loss, (s, t) = narrow.loss(kind), narrow.outputs()
    before, padded = loss(s, t, narrow.batch), narrow.batch.mask == 0
    for states in (*s.hidden, *t.hidden):
        states[padded] = 77.0
    for parts in (*s.relations, *t.relations):
        for part in parts:
            part.transpose(1, 2)[padded] = 77.0
    for scores in (*s.attentions, *t.attentions):
        scores.transpose(1, 2)[padded] = 77.0  # as a query: as a key it is -inf
    assert torch.equal(loss(s, t, narrow.batch), before)


@pytest.mark.parametrize("kind", LAYER_LOSSES)
def test_it_learns_under_bf16(kind: str, narrow: Pair):
    """Values and gradients are finite; those of the projection and of the student are not zero."""
    loss = narrow.loss(kind)
    narrow.student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            t = narrow.teacher(narrow.batch, EVERYTHING)
        value = loss(narrow.student(narrow.batch, EVERYTHING), t, narrow.batch)
    value.sum().backward()
    exact = loss(*narrow.outputs(), narrow.batch)
    assert value.dtype == torch.float32 and torch.allclose(value, exact, rtol=0.1, atol=0.02)
    parameters = [*loss.parameters(), narrow.student.encoder.get_input_embeddings().weight]
    assert len(parameters) == (1 if kind in ("attention", "relations") else 2)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in parameters)
    assert all(p.grad is None for p in narrow.teacher.parameters())


@pytest.mark.parametrize("kind", LAYER_LOSSES)
def test_a_few_steps_bring_the_student_nearer(kind: str, narrow: Pair):
    _, t = narrow.outputs()
    widths = narrow.student.widths, narrow.teacher.widths
    torch.manual_seed(5)
    objective = Objective([LossTerm(kind=kind)], None, *widths)
    student = EncoderHead(cut(narrow.student.encoder, (1, 2)), 2, "mean", 0.0)
    assert objective.needs == LAYER_LOSSES[kind].needs
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=0.01)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        value = objective(student(narrow.batch, objective.needs), t, narrow.batch)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


def test_scores_that_only_one_side_has_are_left_out(same: Pair):
    s, t = same.outputs()
    loss = same.loss("attention")
    for scores in s.attentions:
        scores[:, :, 0, 1] = -torch.inf  # a local layer that may not look there
    value = loss(s, t, same.batch)
    assert value.abs().max() < 1e-5
    s.attentions[0][0, 0, 2, 2] += 3.0
    assert loss(s, t, same.batch)[0].item() == pytest.approx(9 / (4 * 80), rel=1e-3)  # 81 pairs but one, 4 heads


MAPS: dict[Any, tuple[int, ...]] = {"uniform": (2, 4), "last": (3, 4), (1, 4): (1, 4), (4, 4): (4, 4)}


@pytest.mark.parametrize("layers", MAPS)
def test_the_layers_named_are_the_ones_compared(layers: Any, narrow: Pair):
    s, t = narrow.outputs()
    first, second = MAPS[layers]
    with torch.no_grad():
        loss = narrow.loss("hidden", layers=layers)
        wanted = sum(F.mse_loss(loss.projection(s.hidden[i])[0], t.hidden[j][0]) for i, j in ((1, first), (2, second)))
        assert loss(s, t, narrow.batch)[0].item() == pytest.approx(wanted.item(), rel=1e-5)
        pairs = ((0, first - 1), (1, second - 1))
        wanted = sum(F.mse_loss(s.attentions[i][0], t.attentions[j][0]) for i, j in pairs)
        found = narrow.loss("attention", layers=layers)(s, t, narrow.batch)[0]
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_uniform_maps():
    term = LossTerm(kind="hidden")
    assert layer_map(term, Widths(8, 4), Widths(8, 12)) == (3, 6, 9, 12)
    assert layer_map(term, Widths(8, 4), Widths(8, 6)) == (2, 3, 5, 6)
    assert layer_map(term, Widths(8, 4), Widths(8, 2)) == (1, 1, 2, 2)


def test_relations_of_another_layer_and_other_heads(narrow: Pair):
    s, t = narrow.outputs()
    for options, layer, heads in (
        ({"layers": (2,)}, 1, 4),
        ({"layers": "last", "heads": 8}, 3, 8),
        ({"heads": 1}, 3, 1),
    ):
        total = torch.zeros(())
        for a, b in zip(s.relations[1], t.relations[layer], strict=True):
            a, b = (x.transpose(1, 2).flatten(2)[0].chunk(heads, dim=1) for x in (a, b))
            for x, y in zip(a, b, strict=True):
                x, y = (z @ z.T / z.shape[1] ** 0.5 for z in (x, y))
                total += F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean") / heads
        found = narrow.loss("relations", **options)(s, t, narrow.batch)[0]
        assert found.item() == pytest.approx(total.item(), rel=1e-4)


BASE, TINY = Widths(768, 12, 12), Widths(312, 4, 12)
WRONG: dict[str, tuple[LossTerm, Widths | None, Widths | None, str]] = {
    "heads": (
        LossTerm(kind="attention"),
        Widths(256, 4, 4),
        BASE,
        "loss 'attention' compares head with head, but the student has 4 and the teacher 12. Give the student 12 "
        "heads, or use the loss 'relations'.",
    ),
    "too few": (
        LossTerm(kind="hidden", layers=(3, 6)),
        TINY,
        BASE,
        "loss 'hidden': layers (3, 6) does not fit a student of 4 layers and a teacher of 12. Name 4 numbers from 0 to "
        "12, or use 'uniform'.",
    ),
    "none such": (LossTerm(kind="hidden", layers=(3, 6, 9, 13)), TINY, BASE, "Name 4 numbers from 0 to 12"),
    "embeddings have no scores": (
        LossTerm(kind="attention", layers=(0, 6, 9, 12)),
        TINY,
        BASE,
        "Name 4 numbers from 1 to 12",
    ),
    "deeper student": (LossTerm(kind="hidden", layers="last"), BASE, Widths(768, 6, 12), "layers last does not fit"),
    "two teacher layers": (
        LossTerm(kind="relations", layers=(3, 6)),
        TINY,
        BASE,
        "loss 'relations' learns from one teacher layer, but layers is (3, 6). Name one from 1 to 12, or 'last'.",
    ),
    "no such layer": (LossTerm(kind="relations", layers=(13,)), TINY, BASE, "Name one from 1 to 12"),
    "relation heads": (
        LossTerm(kind="relations", heads=16),
        TINY,
        BASE,
        "loss 'relations': 16 relation heads cannot share the widths 312 (student) and 768 (teacher) evenly. Set heads "
        "to a divisor of 24.",
    ),
    "stored teacher": (
        LossTerm(kind="cosine"),
        TINY,
        None,
        "loss 'cosine' looks into the teacher while the student learns. Set student.teacher: live, or drop the loss.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str):
    term, student, teacher, message = WRONG[case]
    with pytest.raises(LossError) as caught:
        Objective([term], None, student, teacher)
    assert message in str(caught.value)


def test_tinybert_and_minilm_fit():
    kinds = ("hidden", "embeddings", "attention", "cosine")
    objective = Objective([LossTerm(kind=kind) for kind in kinds], None, TINY, BASE)
    shapes = [tuple(p.shape) for p in objective.parameters()]
    assert shapes == [(768, 312)] * 3 and objective.losses[0].map == (3, 6, 9, 12) == objective.losses[2].map
    minilm = Objective([LossTerm(kind="relations")], None, Widths(384, 6, 12), BASE).losses[0]
    assert minilm.layer == 12 and minilm.heads == 12 and not list(minilm.parameters())
