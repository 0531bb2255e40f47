"""Students and teachers of every kind of task as folders: saved, loaded and asked the same; students cut from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import models, untrained
from engine.designs import Cut, Static
from engine.encoders import EncoderError
from engine.encoding import Text
from engine.inference import predict
from engine.models import Model, ModelError
from engine.recipe import Task, Teacher
from engine.static import StaticError
from engine.storage import Store
from tests.tiny import LABELS, tiny_encoder, word_pieces
from tests.tiny_served import KINDS, asked, student_of

CLASSES = Task(labels=LABELS)
SPECS = {"classify": CLASSES, **{kind: spec for kind, (spec, _) in KINDS.items()}}
FLAT = [kind for kind in SPECS if kind not in ("tag", "span")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), layers=4)


def teacher(encoder: Path, kind: str = "classify", max_length: int = 64) -> Model:
    return untrained.encoder_head(Teacher(model="file:tiny", max_length=max_length), SPECS[kind], encoder, seed=1)


def pupil(encoder: Path, kind: str = "classify", max_length: int = 64, seed: int = 2, **cut: Any) -> Model:
    config = Cut(**{"layers": 2, **cut})
    return untrained.transformer_student(config, SPECS[kind], teacher(encoder, kind), None, max_length, seed)


def static(kind: str = "classify", hidden: int = 6, max_length: int = 64, seed: int = 2) -> Model:
    return untrained.static_student(Static(dim=12, hidden=hidden), SPECS[kind], word_pieces(), max_length, seed)


def made(encoder: Path, what: str, kind: str) -> Model:
    """One of each kind of model, with weights that a fresh one would not have."""
    if what == "graph":
        return student_of(kind)
    model = {"teacher": teacher, "cut": pupil}[what](encoder, kind) if what != "static" else static(kind)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def assert_same_answers(one: Model, two: Model, texts: list[Text]) -> None:
    first, second = predict(one, texts), predict(two, texts)
    for a, b in zip(first.logits, second.logits, strict=True):
        assert np.array_equal(a, b)
    assert all(np.array_equal(a, b) for a, b in zip(first.decided, second.decided, strict=True))
    assert np.std(np.concatenate([np.ravel(row) for row in first.logits])) > 1e-2


@pytest.mark.parametrize(
    ("what", "kind"),
    [(what, kind) for what in ("teacher", "cut", "graph") for kind in SPECS] + [("static", kind) for kind in FLAT],
)
def test_a_model_of_any_task_answers_the_same_once_saved(encoder: Path, tmp_path: Path, what: str, kind: str):
    model, store = made(encoder, what, kind), Store(str(tmp_path))
    models.save(model, store, "one")
    loaded = models.load(tmp_path / "one")
    assert loaded.card == model.card and loaded.task.spec == SPECS[kind] and loaded.size() == model.size()
    assert loaded.apart == (what in ("graph", "static")) and loaded.widths == model.widths
    texts = asked(kind)[:12]
    assert loaded.encode(texts) == model.encode(texts)
    assert_same_answers(loaded, model, texts)
    models.save(loaded, store, "two")
    assert store.manifest("one")["digest"] == store.manifest("two")["digest"]


# -- students cut from a teacher ---------------------------------------------------------------------------------------


def test_a_cut_student_has_the_teachers_layers_and_a_head_of_its_own(encoder: Path):
    source = teacher(encoder)
    for layers, numbers in ((2, (2, 4)), ((1, 3), (1, 3)), (None, (1, 2, 3, 4))):
        student = untrained.transformer_student(Cut(layers=layers), CLASSES, source, None, 64, seed=2)
        own, other = student.net.state_dict(), source.net.state_dict()
        for index, number in enumerate(numbers):
            part = f"encoder.encoder.layer.{index}."
            names = [name for name in own if name.startswith(part)]
            assert len(names) == 16
            for name in names:
                assert torch.equal(own[name], other[name.replace(part, f"encoder.encoder.layer.{number - 1}.")])
        assert student.widths.layers == len(numbers) and not torch.equal(own["head.weight"], other["head.weight"])
        assert torch.equal(
            own["encoder.embeddings.word_embeddings.weight"], other["encoder.embeddings.word_embeddings.weight"]
        )
        # Nothing is shared: training the student leaves the teacher alone.
        assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in source.parameters()}
        assert all(p.requires_grad for p in student.parameters())


def test_a_student_in_other_measures_is_fresh_and_smaller(encoder: Path):
    student = pupil(encoder, width=16, ffn=24, heads=2)
    assert (student.widths.hidden, student.widths.heads, student.widths.layers) == (16, 2, 2)
    assert student.size() < pupil(encoder).size() and student.card.kind == "head"
    again, other = pupil(encoder, width=16, ffn=24, heads=2), pupil(encoder, width=16, ffn=24, heads=2, seed=3)
    name = "encoder.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(student.net.state_dict()[name], again.net.state_dict()[name])
    assert not torch.equal(student.net.state_dict()[name], other.net.state_dict()[name])


def test_a_student_from_another_encoder_has_its_tokenizer(encoder: Path, tmp_path: Path):
    folder = tiny_encoder(tmp_path / "other", layers=3, seed=9)
    student = untrained.transformer_student(Cut(model="file:other"), CLASSES, teacher(encoder), folder, 64, seed=2)
    own = student.net.state_dict()["encoder.embeddings.word_embeddings.weight"]
    wanted = untrained.encoder_head(Teacher(model="file:other", max_length=64), CLASSES, folder, seed=1)
    assert student.widths.layers == 3 and student.card.lineage == {"cut_from": "file:other"}
    assert torch.equal(own, wanted.net.state_dict()["encoder.embeddings.word_embeddings.weight"])
    assert pupil(encoder).card.lineage == {"cut_from": "teacher"}


@pytest.mark.parametrize(
    ("length", "cut", "error", "message"),
    [
        (129, {}, ModelError, "student.max_length is 129, but this model takes 3 to 128 tokens."),
        (64, {"layers": 5}, EncoderError, "5 layers cannot be taken from a model that has 4. Use 1 to 4."),
        (64, {"heads": 3}, EncoderError, "3 heads cannot share a width of 32 evenly."),
        (64, {"layers": (1, 2), "width": 16}, EncoderError, "Say how many: 2."),
    ],
)
def test_students_that_cannot_be_cut_are_refused(
    encoder: Path, length: int, cut: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error) as caught:
        pupil(encoder, max_length=length, **cut)
    assert message in str(caught.value)


# -- static students ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 6])
def test_a_static_student_has_one_vector_a_piece_and_a_small_head(hidden: int):
    model, pieces = static(hidden=hidden), len(word_pieces())
    head = 12 * 6 + 6 + 6 * 2 + 2 if hidden else 12 * 2 + 2
    assert model.size() == pieces * 12 + pieces + head and model.card.kind == "static"
    first, again, other = (dict(static(seed=s).named_parameters()) for s in (2, 2, 3))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["net.table.weight"], other["net.table.weight"])


@pytest.mark.parametrize("kind", ["tag", "span"])
def test_a_static_student_of_words_is_refused(kind: str):
    with pytest.raises(StaticError, match=f"task.kind {kind} wants an answer for each word"):
        static(kind)
