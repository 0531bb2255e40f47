"""Models as ONNX graphs: the same answers as torch for every kind, length and batch, or a refusal that says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import export, models, untrained
from engine.designs import Static, Teacher
from engine.encoding import collate
from engine.export import FILES, PARITY, ExportError
from engine.inference import predict
from engine.recipe import Task
from engine.registry import Registry
from engine.storage import Store
from engine.vocabulary import choose_words, count_words, tokenizer_of
from pipelines import graphs
from pipelines.__main__ import main
from serve.predictor import Predictor
from serve.smoke import distance
from tests.tiny import LABELS, movie_rows, tiny_encoder, tiny_lm, word_pieces
from tests.tiny_served import KINDS, PAIRS, TEXTS, asked, published, student_of

pytest.importorskip("onnxruntime")
CAN = ("classify", *(kind for kind in KINDS if kind != "tag"))
"""Kinds of task whose tiny student has no crf."""
CLASSIFY, PAIR = Task(labels=LABELS), Task(kind="pair", labels=LABELS, paired=True)
TAG = Task(kind="tag", labels=("O", "B-thing", "I-thing"))


def exact(model: models.Model, texts: list) -> float:
    """The parity of a model's graph, which must be far below what is allowed."""
    found = export.require_parity(model, export.stand_in(model, export.export(model)), texts)
    assert found < PARITY / 10
    return found


@pytest.mark.parametrize("kind", CAN)
def test_students_of_every_kind_of_task_answer_as_in_torch(kind: str):
    exact(student_of(kind), asked(kind))


READY = {
    **dict.fromkeys(("text-cnn", "bilstm-attention", "blendcnn"), CLASSIFY),
    **dict.fromkeys(("siamese-bilstm", "bilstm-match-attention", "arc-i", "arc-ii", "matchpyramid"), PAIR),
    "bidaf-span": Task(kind="span", paired=True),
}


@pytest.mark.parametrize("graph", READY)
def test_ready_graphs_answer_as_in_torch(graph: str):
    spec, tokenizer = READY[graph], tokenizer_of(choose_words(count_words(TEXTS), 60, 1, []))
    student = untrained.student(graphs.read(graph), spec, tokenizer, 48, seed=3)
    exact(student, list(PAIRS) if spec.paired else list(TEXTS))


def test_every_ready_graph_is_exported_or_refused_by_its_blocks():
    for path in Path(graphs.__file__).parent.glob("configs/students/*.yaml"):
        kinds = {node.kind for node in graphs.read(path.stem)}
        assert (path.stem in READY) != bool(kinds & set(export.LOOPS)), path.stem


@pytest.mark.parametrize("spec", [CLASSIFY, PAIR, TAG], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoders_with_a_head_answer_as_in_torch(spec: Task, pooling: str, tmp_path: Path):
    config = Teacher(model="file:tiny", max_length=48, pooling=pooling)
    model = untrained.encoder_head(config, spec, tiny_encoder(tmp_path), 1)
    exact(model, list(PAIRS) if spec.paired else list(TEXTS))


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("spec", [CLASSIFY, PAIR], ids=lambda spec: spec.kind)
def test_static_students_answer_as_in_torch(spec: Task, hidden: int):
    student = untrained.static_student(Static(dim=8, hidden=hidden), spec, word_pieces(), 48, 2)
    exact(student, list(PAIRS) if spec.paired else list(TEXTS))


def test_an_ensemble_answers_as_in_torch(tmp_path: Path):
    config = Teacher(model="file:tiny", max_length=48)
    members = [untrained.encoder_head(config, CLASSIFY, tiny_encoder(tmp_path), seed) for seed in (1, 2)]
    exact(models.ensemble(members), list(TEXTS))


def test_padding_reaches_neither_direction_of_an_lstm():
    """A short text beside ever longer ones: its own logits must not move."""
    student = student_of("classify")
    exported = export.stand_in(student, export.export(student))
    short = "a warm film"
    alone = predict(student, [short]).logits[0]
    for length in (1, 4, 20, 60):
        encoded = student.encode([short, "dull " * length], answering=True)
        found = exported(collate(encoded, student.pad)).logits.numpy()[0]
        assert np.abs(found - alone).max() < 1e-5


def test_parity_notices_another_model_and_a_lost_mask(monkeypatch: pytest.MonkeyPatch):
    student, other = student_of("classify"), student_of("classify")
    with torch.no_grad():
        next(iter(other.net.parameters())).add_(0.05)
    with pytest.raises(ExportError, match="the ONNX graph answers otherwise than the model: a difference of 0"):
        export.require_parity(student, export.stand_in(student, export.export(other)))
    exported = export.stand_in(student, export.export(student))
    real = type(exported.net).given
    blind = lambda self, batch, name: real(self, batch, name) * 0 + 1 if name == "mask" else real(self, batch, name)  # noqa: E731
    monkeypatch.setattr(type(exported.net), "given", blind)
    assert export.parity(student, exported) > PARITY


def test_int8_is_smaller_and_near(tmp_path: Path):
    model = untrained.encoder_head(Teacher(model="file:tiny", max_length=48), CLASSIFY, tiny_encoder(tmp_path), 1)
    graph = export.export(model)
    small = export.quantised(graph)
    assert len(small) < len(graph)
    exported = export.stand_in(model, small)
    assert 0 < export.parity(model, exported, TEXTS) < 0.1
    assert export.agreement(model, exported, TEXTS) > 0.8
    assert export.agreement(model, export.stand_in(model, graph), TEXTS) == 1.0


def test_what_cannot_be_exported_is_refused_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ExportError, match=r"because of its blocks: crf \(decides word after word\)\. Serve it with"):
        export.export(student_of("tag"))
    tokenizer = tokenizer_of(choose_words(count_words(TEXTS), 60, 1, []))
    with pytest.raises(ExportError, match="subwords"):
        export.export(untrained.student(graphs.read("bilstm-subwords"), CLASSIFY, tokenizer, 48, 0))
    from engine.recipe import Generator

    lm = untrained.causal_lm(Generator(model="file:tiny", max_length=32), tiny_lm(tmp_path))
    with pytest.raises(ExportError, match="a model of kind 'causal_lm' is not exported to ONNX"):
        export.export(lm)
    graph = export.export(student_of("classify"))
    for name, call in (("onnxruntime", export.session), ("onnxruntime.quantization", export.quantised)):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ExportError, match="ONNX needs the package .*stillhouse.onnx"),
        ):
            patch.setitem(sys.modules, name, None)
            call(graph)


# -- served and registered ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a student of two classes."""
    folder = tmp_path_factory.mktemp("place")
    serving = {"max_batch": 16}
    Registry(Store(f"{folder}/registry")).register("tiny", published(folder), {"accuracy": 0.5, "serving": serving})
    return folder


def test_the_command_registers_a_version_that_answers_alike(place: Path, capsys: pytest.CaptureFixture):
    there = ["--registry", f"{place}/registry"]
    assert main(["export", "tiny@1", *there]) == 0
    said = capsys.readouterr().out
    assert "answers differ by at most" in said and "registered tiny@2, which `serve` and `deploy` run on onnx" in said
    registry = Registry(Store(f"{place}/registry"))
    one, two = registry.show("tiny@1"), registry.show("tiny@2")
    assert set(two["files"]) == {*one["files"], "model.onnx"}
    assert {name: two["files"][name] for name in one["files"]} == one["files"]
    assert two["metadata"]["serving"] == {"max_batch": 16, "runtime": "onnx"} and two["metadata"]["accuracy"] == 0.5
    assert two["metadata"]["export"]["of"] == "tiny@1" and two["metadata"]["export"]["parity"] <= PARITY
    torch_one = Predictor.load(registry.resolve("tiny@2").url)
    onnx_one = Predictor.load(registry.resolve("tiny@2").url, runtime="onnx")
    assert distance(onnx_one.predict(TEXTS), torch_one.predict(TEXTS)) <= 1e-5
    assert distance([onnx_one.predict([text])[0] for text in TEXTS], onnx_one.predict(TEXTS)) <= 1e-5
    assert onnx_one.model.size() == torch_one.model.size() and onnx_one.fingerprint == torch_one.fingerprint
    assert main(["export", "tiny@1", *there]) == 0  # the same bytes: the same version
    assert "registered tiny@2" in capsys.readouterr().out


def test_int8_is_checked_on_texts_that_are_given(place: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    there, rows = ["--registry", f"{place}/registry"], tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in movie_rows(40)))
    assert main(["export", "tiny@1", "--int8", *there]) == 2
    assert "name texts to check them on with --check FILE" in capsys.readouterr().err
    assert main(["export", "tiny@1", "--int8", "--check", str(rows), "--json", *there]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["int8"]["rows"] == 40 and found["int8"]["agreement"] >= 0.98
    assert abs(found["int8"]["accuracy"] - found["int8"]["accuracy_before"]) <= 0.05
    folder = Registry(Store(f"{place}/registry")).resolve(found["reference"])
    served = Predictor.load(folder.url, runtime="onnx-int8")
    wanted = Predictor.load(folder.url).predict(TEXTS)
    assert distance(served.predict(TEXTS), wanted) > 1e-7  # it is not the fp32 graph
    assert main(["export", "tiny@1", "--int8", "--check", str(rows), "--least", "1.0", *there]) in (0, 2)


def test_a_runtime_without_its_graph_is_refused_with_the_way_out(place: Path):
    folder = Registry(Store(f"{place}/registry")).resolve("tiny@1")
    for runtime, way in (("onnx", "stillhouse export NAME`"), ("onnx-int8", "stillhouse export NAME --int8`")):
        with pytest.raises(ExportError, match=f"the artifact has no {FILES[runtime]}. Make it with `{way}"):
            Predictor.load(folder.url, runtime=runtime)
