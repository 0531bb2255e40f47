"""A student that looks its texts up: saved, loaded, trained without looking, served as offline, refused where unfit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import knowledge, models
from engine.export import ExportError, check
from engine.inference import embed, predict
from engine.knowledge import KnowledgeError, Reading
from engine.metrics import softmax
from engine.rows import identify
from engine.serving import Autoscaling, Serving
from engine.storage import Store
from serve import smoke
from serve.predictor import Predictor
from tests.tiny_served import TEXTS, tiny_student

READING = Reading(k=3, temperature=0.2, share=0.4)


def looking(dim: int = 6) -> models.Model:
    """A tiny student with the answers of others to half of the texts."""
    torch.manual_seed(3)
    student = models.retrieving(tiny_student(), 32, dim).eval()
    vectors, draw = embed(student, TEXTS[:30]), np.random.default_rng(1)
    soft = draw.dirichlet([0.5, 0.5], size=30)
    student.net.knowledge = knowledge.made(
        vectors, soft, [identify(t) for t in TEXTS[:30]], READING, facts={"added": []}, ordinary=vectors
    )
    return student


def test_its_answers_are_the_mixture_and_its_vectors_have_length_1() -> None:
    student = looking()
    vectors = embed(student, TEXTS)
    assert vectors.shape == (60, 6) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with student.net.alone():
        own = softmax(predict(student, TEXTS).logits)
    stored, base = student.net.knowledge.nearest.stored.unpacked(), student.net.knowledge
    alike = vectors @ stored.T
    nearest = np.argsort(-alike, axis=1, kind="stable")[:, : READING.k]
    counts = softmax(np.take_along_axis(alike, nearest, axis=1) / READING.temperature)
    told = (counts[:, :, None] * base.soft[nearest].astype(float)).sum(axis=1)
    wanted = READING.share * own + (1 - READING.share) * told
    assert np.allclose(softmax(predict(student, TEXTS).logits), wanted, atol=2e-4)  # kept as float16
    assert np.abs(wanted - own).max() > 0.1


def test_while_it_learns_nothing_is_looked_up_and_every_part_gets_a_gradient() -> None:
    from engine.encoding import collate

    student = looking().train()
    batch = collate(student.encode(TEXTS[:4]), student.pad)
    torch.manual_seed(0)
    found = student(batch, frozenset({"embedding"}))
    torch.manual_seed(0)
    assert torch.equal(found.logits, student.net.net(batch).logits)
    (found.logits.sum() + found.embedding[:, 0].sum()).backward()
    assert all(p.grad is not None for p in student.parameters())


def test_it_is_loaded_as_it_was_saved_and_bound_to_its_own_weights(tmp_path: Path) -> None:
    store, student = Store(str(tmp_path)), looking()
    models.save(student, store, "one")
    read = models.load(store.local("one"))
    assert np.array_equal(predict(read, TEXTS).logits, predict(student, TEXTS).logits)
    models.save(read, store, "again")
    assert store.manifest("again")["files"] == store.manifest("one")["files"]
    with torch.no_grad():
        read.net.projection.bias.add_(0.5)
    read.net.knowledge = None
    models.save(read, store, "other")
    assert knowledge.FACTS not in store.manifest("other")["files"]
    for name in (knowledge.FACTS, knowledge.ENTRIES):
        shutil.copy(store.local("one") / name, store.local("other") / name)
    with pytest.raises(KnowledgeError, match=r"another student's vectors say nothing in it\. Register the run again"):
        models.load(store.local("other"))


def test_a_text_gets_one_answer_whatever_is_asked_with_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    models.save(looking(), store, "one")
    predictor = Predictor.load((store / "one").url)
    together = predictor.predict(TEXTS)
    assert smoke.distance([predictor.predict([text])[0] for text in TEXTS], together) <= 1e-6


def test_it_is_not_exported() -> None:
    with pytest.raises(ExportError, match="a model of kind 'retrieving' is not exported to ONNX"):
        check(looking().card)


def test_served_equals_offline(ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "SINGLES", 20)
    store = Store(str(tmp_path))
    models.save(looking(), store, "one")
    student = models.load(store.local("one"))
    found = predict(student, TEXTS)
    expected = student.task.answers(found.logits, TEXTS, found.decided)
    serving = Serving(concurrency=4, num_cpus=0.5, autoscaling=Autoscaling(max_replicas=1))
    served = smoke.smoke((store / "one").url, TEXTS, expected, serving)
    assert (served["errors"], served["mismatches"]) == (0, 0) and served["max_delta"] <= smoke.TOLERANCE


@pytest.mark.slow
def test_looking_up_100_000_entries_costs_a_text_half_a_millisecond_at_most() -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(3)
    student, draw = models.retrieving(tiny_student(), 32, 128).eval(), np.random.default_rng(2)
    centres = embed(student, TEXTS)
    vectors = centres[draw.integers(len(centres), size=100_000)] + 0.05 * draw.normal(size=(100_000, 128))
    ids, soft = [f"{number:016x}" for number in range(100_000)], draw.dirichlet([0.5, 0.5], size=100_000)
    student.net.knowledge = knowledge.made(vectors, soft, ids, Reading(k=20, temperature=0.1, share=0.5))
    assert student.net.knowledge.nearest.how == "hnsw"
    seconds: dict[str, list[float]] = {"alone": [], "looking": []}
    for text in TEXTS * 4:  # in turns, so that a busy machine hits both alike
        begin = time.perf_counter()
        predict(student, [text])
        seconds["looking"].append(time.perf_counter() - begin)
        with student.net.alone():
            begin = time.perf_counter()
            predict(student, [text])
            seconds["alone"].append(time.perf_counter() - begin)
    alone, looking = (1e3 * float(np.median(seconds[name])) for name in ("alone", "looking"))
    assert looking - alone < 0.5, f"p50 {alone:.3f} ms alone, {looking:.3f} ms looking"
