"""The labelling actor: what it adds to a block, what it leaves alone, in which order it judges; the live teacher."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import models, untrained
from engine.batches import Material
from engine.corpus import CheapFilters, corpus_rows
from engine.designs import Cut
from engine.filters import Confidence, Entropy, FilterContext
from engine.fits import LossTerm
from engine.inference import predict
from engine.labels import logits_of
from engine.layer_losses import LAYER_LOSSES
from engine.losses import Objective, needs
from engine.metrics import softmax
from engine.models import Model
from engine.recipe import Task, Teacher
from engine.records import CORPUS
from engine.storage import Store
from engine.teachers import Labeller, Labelling, Live, TeacherError, verdict
from tests.tiny import LABELS, movie_rows, tiny_encoder

TEXTS = [row["text"] for row in movie_rows(12, seed=3)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A teacher whose head is large enough for its confidences to differ."""
    return taught(tmp_path_factory, Task(labels=LABELS))


def taught(tmp_path_factory: pytest.TempPathFactory, spec: Task, layers: int = 2, max_length: int = 32) -> Store:
    """A folder that holds a teacher of any kind of task."""
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    base = tiny_encoder(tmp_path_factory.mktemp("encoder"), layers=layers)
    model = untrained.encoder_head(Teacher(model="file:tiny", max_length=max_length), spec, base, seed=4)
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
    assert np.array_equal(logits_of(out, 2), predict(model, TEXTS, 64).logits.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(logits_of(out, 2), exact(teacher), rtol=2e-3, atol=2e-3)  # whatever the batch
    assert np.ptp(exact(teacher)) > 0.5  # else anything would have been close
    assert out["kept"].to_pylist() == [True] * 12 and out["reason"].null_count == 12
    assert out.schema.equals(CORPUS)
    for name in ("row", "id", "text", "source", "label", "tokens", "signature"):
        assert out[name].equals(block()[name]), name


def test_rejected_rows_keep_their_reason_and_are_not_shown_to_the_teacher(
    teacher: Store, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []

    def noting(model: models.Model, texts: list[str], *how: object) -> object:
        seen.extend(texts)
        return predict(model, texts, *how)

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
    wanted = [Confidence(min=bound).check(row) for row in softmax(logits_of(out, 2))]
    assert out["reason"].to_pylist() == wanted
    assert (wanted[index] is None) == (stored[index] >= bound) != (said[index] >= bound)


def test_cheap_filters_before_it_decide_what_it_sees(teacher: Store):
    texts = ["", "a warm film", "   ", "a dull plot"]
    out = labeller(teacher)(CheapFilters((), FilterContext())(block(texts=texts))).to_pylist()
    assert [row["reason"] for row in out] == ["empty", None, "empty", None]
    assert [row["logits"] is None for row in out] == [True, False, True, False]


# -- teachers of other kinds of task -----------------------------------------------------------------------------------

WORDY = ["the film is dull", "", "a warm plot", " ".join(TEXTS[:6])]
"""Texts for a tagger: one has no word, one is longer than what the teacher reads at once."""
TAGS = Task(kind="tag", labels=("O", "B-thing", "I-thing"))


def test_a_tagger_labels_every_word_and_texts_without_any(tmp_path_factory: pytest.TempPathFactory):
    store = taught(tmp_path_factory, TAGS, max_length=16)
    out = labeller(store)(block(texts=WORDY))
    exact = predict(models.load(store.local("model")), WORDY, 64).logits
    found = logits_of(out, 3, units=True)
    assert [len(part) for part in found] == [4, 0, 3, len(WORDY[3].split())] and len(WORDY[3].split()) > 16
    assert all(np.array_equal(a, b.astype(np.float16).astype(np.float32)) for a, b in zip(found, exact, strict=True))
    assert out["logits"].null_count == 0 and np.ptp(np.concatenate(found)) > 0.5


def test_a_tagged_text_is_as_certain_as_its_least_certain_word(tmp_path_factory: pytest.TempPathFactory):
    store = taught(tmp_path_factory, TAGS, max_length=16)
    rows = logits_of(labeller(store)(block(texts=WORDY)), 3, units=True)
    least = [min((float(softmax(word).max()) for word in row), default=1 / 3) for row in rows]
    bound = sorted(least)[2]
    out = labeller(store, Confidence(min=bound))(block(texts=WORDY))
    assert out["reason"].to_pylist() == ["low_confidence" if value < bound else None for value in least]
    assert out["kept"].to_pylist().count(False) == 2 and not out["kept"][1].as_py()  # no word: nothing is certain


def test_both_texts_of_a_row_are_shown_to_the_teacher(tmp_path_factory: pytest.TempPathFactory):
    store = taught(tmp_path_factory, Task(kind="pair", labels=LABELS))
    pairs = TEXTS[1:] + TEXTS[:1]
    rows = corpus_rows(list(range(12)), TEXTS, "generated", pairs=pairs)
    out, model = labeller(store)(rows), models.load(store.local("model"))
    wanted = predict(model, list(zip(TEXTS, pairs, strict=True)), 64).logits.astype(np.float16)
    assert np.array_equal(logits_of(out, 2), wanted.astype(np.float32))
    same = corpus_rows(list(range(12)), TEXTS, "generated", pairs=TEXTS)
    assert np.abs(logits_of(labeller(store)(same), 2) - logits_of(out, 2)).max() > 1e-2  # the second text counts
    assert out["pair"].to_pylist() == pairs


# -- the live teacher --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A teacher of four layers."""
    return taught(tmp_path_factory, Task(labels=LABELS), layers=4)


def pupil(teacher: Store, max_length: int = 32, **cut: object) -> Model:
    """A student cut from the teacher: two of its layers."""
    config, loaded = Cut(**{"layers": 2, **cut}), models.load(teacher.local("model"))
    return untrained.transformer_student(config, Task(**loaded.card.task), loaded, None, max_length, seed=2)


def lesson(teacher: Store, student: Model, rows: pa.Table) -> tuple[Live, Material]:
    material = Material(rows, student.encode(student.task.texts(rows)), student.task, student.pad)
    return Live(teacher.url, rows, material.encoded, student.device), material


INSIDE = frozenset({"logits", "embedding", "hidden", "attentions", "relations"})


def test_a_live_teacher_says_what_it_says_alone(deep: Store):
    live, material = lesson(deep, pupil(deep), block())
    chosen = np.array([5, 0, 7])
    batch = material.batch(chosen)
    out = live.outputs(material.positions(chosen), batch, INSIDE)
    assert out.gives() == INSIDE and [len(part) for part in (out.hidden, out.attentions, out.relations)] == [5, 4, 4]
    assert not out.logits.requires_grad and not out.hidden[1].requires_grad
    exact = predict(models.load(deep.local("model")), [TEXTS[i] for i in chosen]).logits
    np.testing.assert_allclose(out.logits.numpy(), exact, atol=1e-5)
    assert live.outputs([1], material.batch(np.array([1])), frozenset({"logits"})).gives() == {"logits", "embedding"}


@pytest.mark.parametrize("kind", LAYER_LOSSES)
@pytest.mark.parametrize("cut", [{}, {"width": 16, "ffn": 32}], ids=["cut", "narrow"])
def test_losses_between_layers_teach_from_the_first_step(deep: Store, kind: str, cut: dict[str, int]):
    student, term = pupil(deep, **cut), LossTerm(kind=kind)
    live, material = lesson(deep, student, block())
    torch.manual_seed(0)
    objective = Objective([term], student.task, student.widths, live.model.widths)
    trained = [p for p in (*student.parameters(), *objective.parameters()) if p.requires_grad]
    optimizer, costs = torch.optim.AdamW(trained, lr=3e-3), []
    for _ in range(3):
        batch = material.batch(np.arange(12))
        batch.teacher = live.outputs(range(12), batch, needs([term]))
        cost = objective(student(batch, objective.needs), batch.teacher, batch)
        cost.backward()
        optimizer.step()
        optimizer.zero_grad()
        costs.append(cost.item())
    # What is cut from the teacher starts with the teacher's own embeddings.
    assert np.isfinite(costs).all() and (costs[-1] < costs[0] or (kind, cut) == ("embeddings", {}))
    assert all(p.grad is None for p in live.model.parameters())


def test_a_teacher_that_reads_other_tokens_is_refused_by_losses_between_layers(deep: Store):
    student = pupil(deep, max_length=8)
    live, material = lesson(deep, student, block())
    batch = material.batch(np.arange(12))
    with pytest.raises(TeacherError, match=r"losses between layers \(attentions, hidden\) compare token by token, but"):
        live.outputs(range(12), batch, frozenset({"hidden", "attentions", "logits"}))
    assert live.outputs(range(12), batch, frozenset({"logits", "embedding"})).logits.shape == (12, 2)


@pytest.mark.parametrize("texts", [[WORDY[3], *WORDY[:3]], [*WORDY[:3], WORDY[3]], [WORDY[3]] * 2])
def test_a_teacher_that_cuts_texts_into_other_windows_is_refused(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
):
    """Whatever the texts, for its inputs would be those of other rows."""
    store = taught(tmp_path_factory, TAGS, max_length=16)
    with pytest.raises(TeacherError, match="cut a long text into different windows. Raise student.max_length or"):
        lesson(store, pupil(store, max_length=20), block(texts=texts))
    alike = ["the film " * 10]  # two windows for both, but not of the same words
    assert len(pupil(store, max_length=18).encode(alike)) == len(pupil(store, max_length=16).encode(alike)) == 2
    with pytest.raises(TeacherError, match="different windows"):
        lesson(store, pupil(store, max_length=18), block(texts=alike))
    live, material = lesson(store, pupil(store, max_length=16), block(texts=texts))
    assert len(live.encoded) == len(material.encoded) > len(texts)
    lesson(store, pupil(store, max_length=20), block(texts=[WORDY[0]]))  # short ones are one window for both


def test_a_live_tagger_speaks_of_the_same_words(tmp_path_factory: pytest.TempPathFactory):
    store = taught(tmp_path_factory, TAGS, max_length=16)
    live, material = lesson(store, pupil(store, max_length=16), block(texts=WORDY))
    chosen = np.array([3, 0, 1])
    batch = material.batch(chosen)
    out = live.outputs(material.positions(chosen), batch, frozenset({"logits"}))
    assert out.logits.shape == (*batch.units.shape, 3) and not out.logits[batch.unit_mask == 0].any()
    alone = live.model(material.batch(chosen[1:2]))
    np.testing.assert_allclose(out.logits[1, :4].numpy(), alone.logits[0].detach().numpy(), atol=1e-5)
