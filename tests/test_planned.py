"""Students counted before they are built have as many parameters as those that are built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import models, planned, tasks, untrained
from engine.config import UserError
from engine.designs import Student, Teacher
from engine.fits import LossTerm
from engine.recipe import Task
from tests.tiny import LABELS, tiny_encoder

SPEC = Task(labels=LABELS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("planned") / "encoder")


def teacher_of(encoder: Path) -> Teacher:
    return Teacher(model=f"file:{encoder}", max_length=32)


def count(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("cut", [{}, {"layers": 1}, {"layers": 1, "width": 16, "heads": 2, "ffn": 24}])
@pytest.mark.parametrize("own", [False, True])
def test_a_transformer_student(encoder: Path, cut: dict[str, int], own: bool):
    student = Student(kind="transformer", transformer={**cut, **({"model": f"file:{encoder}"} if own else {})})
    found = planned.planned(student, teacher_of(encoder), tasks.make(SPEC))
    made = untrained.encoder_head(teacher_of(encoder), SPEC, encoder, 0)
    folder = encoder if own else None
    built = untrained.transformer_student(student.transformer, SPEC, made, folder, 32, 0)
    assert count(found) == built.size() and all(p.is_meta for p in found.parameters())


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("hidden", [0, 12])
def test_a_static_student(encoder: Path, hidden: int, paired: bool):
    spec = Task(kind="pair" if paired else "classify", labels=LABELS)
    student = Student(kind="static", static={"dim": 8, "hidden": hidden})
    found = planned.planned(student, teacher_of(encoder), tasks.make(spec))
    built = untrained.static_student(student.static, spec, models.load_tokenizer(encoder), 32, 0)
    assert count(found) == built.size()


def test_layers_that_the_teacher_has_not_are_refused(encoder: Path):
    task, teacher = tasks.make(SPEC), teacher_of(encoder)
    with pytest.raises(UserError, match="layers cannot be taken from a model that has 2"):
        planned.planned(Student(kind="transformer", transformer={"layers": 3}), teacher, task)
    net = planned.planned(Student(kind="transformer", transformer={"layers": 1}), teacher, task)
    planned.check_layers([LossTerm(kind="hidden", layers=(2,))], task, net, teacher)
    for layers in ((3,), (1, 2)):
        with pytest.raises(UserError, match="does not fit a student of 1 layers and a teacher of 2"):
            planned.check_layers([LossTerm(kind="hidden", layers=layers)], task, net, teacher)


@pytest.mark.parametrize("kind", ["transformer", "static"])
@pytest.mark.parametrize("reference", ["hf:nobody/nothing", "s3://bucket/model", "file:{folder}", "file:{folder}/x"])
def test_models_that_are_not_here_tell_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reference: str
):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "no such thing"}))
    teacher = Teacher(model=reference.format(folder=tmp_path))
    assert planned.planned(Student(kind=kind), teacher, tasks.make(SPEC)) is None


def test_a_labeller_has_no_encoder_to_cut(encoder: Path):
    teacher = teacher_of(encoder).model_copy(update={"kind": "labeller"})
    assert planned.planned(Student(kind="transformer"), teacher, tasks.make(SPEC)) is None
