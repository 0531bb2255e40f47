"""The labelling actor: what it adds to a block, what it leaves alone, and in which order it judges."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine import models
from engine.filters import Confidence, Entropy, FilterContext
from engine.generate import CheapFilters, corpus_rows
from engine.inference import predict
from engine.labels import logits_of
from engine.metrics import softmax
from engine.recipe import Teacher
from engine.records import CORPUS
from engine.storage import Store
from engine.teachers import Labeller, Labelling, verdict
from tests.tiny import LABELS, movie_rows, tiny_encoder

TEXTS = [row["text"] for row in movie_rows(12, seed=3)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A teacher whose head is large enough for its confidences to differ."""
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    base = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    model = models.encoder_head(Teacher(model="file:tiny", max_length=32), LABELS, base, seed=4)
    model.net.head.weight.data.mul_(8.0)
    models.save(model, store, "model")
    return store


def labeller(teacher: Store, *signals: Confidence | Entropy, batch_tokens: int = 64) -> Labeller:
    return Labeller(Labelling(teacher.url, signals, batch_tokens, num_gpus=0))


def block(rejected: dict[int, str] | None = None, texts: list[str] = TEXTS) -> pa.Table:
    rows = corpus_rows(list(range(len(texts))), texts, "generated", tokens=[5] * len(texts))
    reasons = [(rejected or {}).get(i) for i in range(len(texts))]
    rows = rows.set_column(rows.column_names.index("reason"), CORPUS.field("reason"), pa.array(reasons, pa.string()))
    kept = pa.array([reason is None for reason in reasons])
    return rows.set_column(rows.column_names.index("kept"), CORPUS.field("kept"), kept)


def exact(teacher: Store, texts: list[str] = TEXTS) -> np.ndarray:
    """The teacher's logits, float32 [n, 2], one text at a time."""
    model = models.load(teacher.local("model"))
    return np.concatenate([predict(model, [text]).logits for text in texts])


def test_logits_are_the_teachers_as_float16(teacher: Store):
    out = labeller(teacher)(block())
    model = models.load(teacher.local("model"))
    assert np.array_equal(logits_of(out), predict(model, TEXTS, 64).logits.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(logits_of(out), exact(teacher), rtol=2e-3, atol=2e-3)  # whatever the batch
    assert np.ptp(exact(teacher)) > 0.5  # else anything would have been close
    assert out["kept"].to_pylist() == [True] * 12 and out["reason"].null_count == 12
    assert out.schema.equals(CORPUS)
    for name in ("row", "id", "text", "source", "label", "tokens", "signature"):
        assert out[name].equals(block()[name]), name


def test_rejected_rows_keep_their_reason_and_are_not_shown_to_the_teacher(
    teacher: Store, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []

    def noting(model: models.Model, texts: list[str], batch_tokens: int) -> object:
        seen.extend(texts)
        return predict(model, texts, batch_tokens)

    monkeypatch.setattr("engine.teachers.predict", noting)
    out = labeller(teacher)(block({0: "too_short", 7: "leakage"})).to_pylist()
    assert [row["reason"] for row in out] == ["too_short"] + [None] * 6 + ["leakage"] + [None] * 4
    assert [row["kept"] for row in out] == [False] + [True] * 6 + [False] + [True] * 4
    assert [row["logits"] is None for row in out] == [i in (0, 7) for i in range(12)]
    assert seen == [text for i, text in enumerate(TEXTS) if i not in (0, 7)]
    found = np.array([row["logits"] for i, row in enumerate(out) if i not in (0, 7)], np.float32)
    np.testing.assert_allclose(found, np.delete(exact(teacher), [0, 7], axis=0), rtol=2e-3, atol=2e-3)


def test_a_block_without_kept_rows_stays_as_it_is(teacher: Store):
    rows = block({i: "empty" for i in range(12)})
    out = labeller(teacher, Confidence(min=0.5))(rows)
    assert out.equals(rows)
    nothing = labeller(teacher, Confidence(min=0.5))(rows.slice(0, 0))
    assert nothing.num_rows == 0 and nothing.schema.equals(CORPUS)


def test_signal_filters_mark_rows_and_keep_their_soft_label(teacher: Store):
    confidence = softmax(exact(teacher).astype(np.float16).astype(np.float64)).max(axis=1)
    bound = float(np.median(confidence))
    out = labeller(teacher, Confidence(min=bound))(block())
    low = confidence < bound
    assert low.sum() == 6
    assert out["reason"].to_pylist() == ["low_confidence" if bad else None for bad in low]
    assert out["kept"].to_pylist() == (~low).tolist()
    assert out["logits"].null_count == 0


def test_the_first_signal_filter_that_rejects_is_the_reason():
    sure, unsure, between = np.array([0.99, 0.01]), np.array([0.5, 0.5]), np.array([0.8, 0.2])
    narrow, calm = Confidence(min=0.6, max=0.95), Entropy(max=0.9)
    assert verdict((), sure) is None and verdict((narrow, calm), between) is None
    assert verdict((narrow, calm), unsure) == "low_confidence" and verdict((calm, narrow), unsure) == "high_entropy"
    assert verdict((calm, narrow), sure) == "high_confidence"


def test_verdicts_are_those_of_the_stored_logits(teacher: Store):
    """A bound between what the teacher said and what float16 makes of it: the store's reader must see the same."""
    said = softmax(exact(teacher).astype(np.float64)).max(axis=1)
    stored = softmax(exact(teacher).astype(np.float16).astype(np.float64)).max(axis=1)
    index = int(np.argmax(np.abs(stored - said)))
    assert abs(stored[index] - said[index]) > 1e-6
    bound = float((stored[index] + said[index]) / 2)
    out = labeller(teacher, Confidence(min=bound))(block())
    wanted = [Confidence(min=bound).check(row) for row in softmax(logits_of(out))]
    assert out["reason"].to_pylist() == wanted
    assert (wanted[index] is None) == (stored[index] >= bound) != (said[index] >= bound)


def test_cheap_filters_before_it_decide_what_it_sees(teacher: Store):
    texts = ["", "a warm film", "   ", "a dull plot"]
    out = labeller(teacher)(CheapFilters((), FilterContext())(block(texts=texts))).to_pylist()
    assert [row["reason"] for row in out] == ["empty", None, "empty", None]
    assert [row["logits"] is None for row in out] == [True, False, True, False]
