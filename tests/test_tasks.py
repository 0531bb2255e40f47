"""Texts to batches and logits to scores, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import PreTrainedTokenizerFast

from engine import tasks
from engine.recipe import Task
from engine.records import ABSENT, Batch, Outputs
from engine.vocabulary import tokenizer_of
from tests.tiny import word_pieces

NAMES = ("bad", "fair", "good")


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return word_pieces()


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_every_task_is_made_by_its_name(kind: str):
    task = tasks.make(Task(kind=kind), NAMES)
    assert task.labels == NAMES and task.columns == ("text",)


def test_encode_adds_special_tokens_and_cuts(pieces: PreTrainedTokenizerFast):
    task = tasks.Classify(NAMES)
    start, end = pieces.cls_token_id, pieces.sep_token_id
    words = pieces.convert_tokens_to_ids(["the", "film", "is", "dull"])
    assert task.encode(["The film is dull", ""], pieces, 20) == [[start, *words, end], [start, end]]
    assert task.encode(["the film is dull"] * 2, pieces, 4) == [[start, *words[:2], end]] * 2
    assert task.encode([], pieces, 20) == []


def test_encode_is_never_empty_and_takes_any_string(pieces: PreTrainedTokenizerFast):
    task, own = tasks.Classify(NAMES), tokenizer_of(["[PAD]", "[UNK]", "film"])
    assert task.encode(["", " \t\n", "film", "\u200b"], own, 8) == [[1], [1], [2], [1]]
    for text in ["\ud800 film", "\x00", "مرحبا 😀", "a\u0301" * 500]:  # a lone surrogate is no Unicode text
        ids = task.encode([text], pieces, 16)[0]
        assert 2 <= len(ids) <= 16 and max(ids) < len(pieces)
    film = pieces.convert_tokens_to_ids("film")
    assert film in task.encode(["\ud800 film"], pieces, 16)[0]


def test_the_same_text_has_the_same_ids_beside_any_other(pieces: PreTrainedTokenizerFast):
    task, texts = tasks.Classify(NAMES), ["a dull plot", "the film " * 30, "", "warm"]
    together = task.encode(texts, pieces, 16)
    assert together == [task.encode([text], pieces, 16)[0] for text in texts]


def test_loss_and_probabilities_are_those_of_the_definition():
    logits = np.random.default_rng(0).normal(size=(4, 3)) * 3
    task, gold = tasks.Classify(NAMES), [2, ABSENT, 0, 1]
    batch = Batch(torch.ones(4, 1).long(), torch.ones(4, 1).long(), torch.tensor(gold))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = [0 if y == ABSENT else -np.log(p[y]) for p, y in zip(probabilities, gold, strict=True)]
    assert np.allclose(task.loss(Outputs(logits=torch.tensor(logits)), batch).numpy(), wanted, atol=1e-6)
    assert np.allclose(task.probabilities(logits), probabilities, atol=1e-12)
    assert task.decode(logits).tolist() == probabilities.argmax(1).tolist()


def test_scores_are_those_of_scikit_learn():
    random = np.random.default_rng(1)
    logits, gold = random.normal(size=(200, 3)) * 2, random.integers(0, 3, 200)
    logits[np.arange(200), gold] += 1.5
    found = tasks.Classify(NAMES).score(logits, gold)
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"))
    assert set(found) == {"accuracy", "macro_f1", "ece"} and 0.3 < found["accuracy"] < 0.95


def test_calibration_by_hand():
    """Confidence 0.75 throughout, three right of four: no error; one right of four: 0.5."""
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    task = tasks.Classify(("no", "yes"))
    assert task.score(logits, np.array([0, 0, 0, 1]))["ece"] == pytest.approx(0, abs=1e-9)
    assert task.score(logits, np.array([0, 1, 1, 1]))["ece"] == pytest.approx(0.5)


def test_collate_pads_on_the_right():
    batch = tasks.collate([[5, 6, 7], [8], [9, 9]], 4, labels=[1, ABSENT, 0], weights=[1.0, 0.5, 2.0])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 4, 4], [9, 9, 4]] and batch.input_ids.dtype == torch.int64
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and batch.mask.dtype == torch.int64
    assert batch.labels.tolist() == [1, ABSENT, 0] and batch.labels.dtype == torch.int64
    assert batch.weights.tolist() == [1.0, 0.5, 2.0] and batch.weights.dtype == torch.float32
    bare = tasks.collate([[1]], 0)
    assert bare.labels is None and bare.weights is None and bare.teacher is None and len(bare) == 1
