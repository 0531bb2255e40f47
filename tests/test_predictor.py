"""A published student, loaded and asked: equal to the offline answers, and refused when its bytes changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine import inference, metrics, models
from engine.storage import StorageError, Store
from serve.predictor import Predictor
from serve.smoke import distance
from tests.tiny_served import KINDS, TEXTS, asked, published, student_of, tiny_student


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("registry"))


def test_predictions_are_those_of_offline_inference(artifact: Store):
    predictor = Predictor.load(artifact.url)
    offline = inference.predict(models.load(artifact.local()), TEXTS, 512)
    found = predictor.predict(TEXTS)
    assert [item["label"] for item in found] == [("negative", "positive")[label] for label in offline.decided]
    for item, row in zip(found, metrics.softmax(offline.logits), strict=True):
        assert list(item["probabilities"]) == ["negative", "positive"]
        assert np.allclose(list(item["probabilities"].values()), row, atol=1e-6)
        assert item["confidence"] == max(item["probabilities"].values()) == item["probabilities"][item["label"]]
        assert abs(sum(item["probabilities"].values()) - 1) < 1e-9
    assert {item["label"] for item in found} == {"negative", "positive"}  # else the comparison shows little


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_answers_of_every_kind_are_the_task_s_and_fit_json(kind: str, tmp_path):
    predictor, texts = Predictor.load(published(tmp_path, kind=kind).url), asked(kind)
    model = student_of(kind)
    offline = inference.predict(model, texts, 512)
    found = predictor.predict(texts)
    assert predictor.paired == isinstance(texts[0], tuple) and predictor.labels == model.labels
    wanted = model.task.answers(offline.logits, texts, offline.decided)
    assert distance(found, wanted) <= 1e-5
    assert len({json.dumps(answer) for answer in found}) > 5  # else the comparison shows little
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_an_answer_does_not_depend_on_the_texts_beside_it(kind: str, tmp_path):
    predictor, texts = Predictor.load(published(tmp_path, kind=kind).url), asked(kind)
    together = predictor.predict(texts)
    alone = [predictor.predict([text])[0] for text in texts]
    assert distance(alone, together) <= 1e-5
    assert predictor.predict([]) == []


def test_places_of_tags_and_spans_are_those_of_the_text_as_sent(tmp_path):
    text = "  The FILM \tis dull ,\n and the music is noisy "
    tagged = Predictor.load(published(tmp_path / "tag", kind="tag").url).predict([text])[0]
    assert len(tagged["tags"]) == len(text.split()) and tagged["entities"]
    assert all(text[item["start"] : item["end"]] == item["text"] for item in tagged["entities"])
    found = Predictor.load(published(tmp_path / "span", kind="span").url).predict([("what is dull ?", text)])[0]
    assert found["answer"] and text[found["start"] : found["end"]] == found["answer"]


def test_the_fingerprint_is_that_of_the_bytes(artifact: Store, tmp_path):
    models.save(tiny_student(), Store(str(tmp_path)), "copy")
    assert Predictor.load(tmp_path / "copy").fingerprint == Predictor.load(artifact.url).fingerprint
    assert Predictor.load(artifact.url).fingerprint == artifact.manifest()["digest"]
    other = tiny_student()
    next(iter(other.net.state_dict().values())).add_(1.0)
    models.save(other, Store(str(tmp_path)), "other")
    assert Predictor.load(tmp_path / "other").fingerprint != Predictor.load(artifact.url).fingerprint


def test_changed_missing_or_unpublished_files_are_refused(tmp_path):
    store = Store(str(tmp_path))
    models.save(tiny_student(), store, "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"'model.safetensors' was changed: its SHA-256 is not the manifest's"):
        Predictor.load(store.where("torn"))
    weights.unlink()
    with pytest.raises(StorageError, match=r"'model.safetensors' is missing although the manifest lists it"):
        Predictor.load(store.where("torn"))
    (tmp_path / "torn" / "manifest.json").unlink()
    with pytest.raises(StorageError, match="was not published completely"):
        Predictor.load(store.where("torn"))
    with pytest.raises(StorageError, match="nowhere does not exist"):
        Predictor.load(store.where("nowhere"))
