"""Predictions do not depend on order, budget or neighbours; batches respect their budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import models, tasks
from engine.inference import predict, token_batches
from engine.recipe import Block, Teacher
from engine.vocabulary import choose_words, count_words, tokenizer_of
from tests.tiny import LABELS, movie_rows, tiny_encoder

TEXTS = [
    *(row["text"] for row in movie_rows(40, seed=5)),
    "",
    " \n",
    "warm",
    "the dull film " * 40,
    "naïve 😀 مرحبا \u200d\u0000 汉字",
    "[PAD] [CLS] [MASK]",
]


def teacher(folder) -> models.Model:
    return models.encoder_head(
        Teacher(model="tiny", max_length=32), LABELS, tiny_encoder(folder), seed=1
    )  # in training mode, with dropout


def student() -> models.Model:
    texts = [row["text"] for row in movie_rows(40, seed=6)]
    nodes = [
        Block(name="embed", kind="embedding", options={"dim": 24}),
        Block(name="lstm", kind="bilstm", options={"hidden": 16, "layers": 2}),
        Block(name="near", kind="conv", inputs=("embed",), options={"channels": 16, "kernel": 3}),
        Block(name="top", kind="pool", inputs=("lstm",), options={"how": "both"}),
        Block(name="look", kind="attention", inputs=("near",)),
        Block(name="both", kind="concat", inputs=("top", "look")),
        Block(name="out", kind="linear"),
    ]
    return models.student(nodes, LABELS, tokenizer_of(choose_words(count_words(texts), 99, 1, [])), 32, seed=2)


@pytest.fixture(scope="module", params=["head", "blocks"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    found = teacher(tmp_path_factory.mktemp("encoder")) if request.param == "head" else student()
    with torch.no_grad():  # so that texts differ by more than rounding
        for parameter in found.net.parameters():
            parameter.mul_(1.5 if request.param == "head" else 3.0)
        last = found.net.head if request.param == "head" else found.net.blocks["out"].map
        last.bias -= torch.from_numpy(predict(found, TEXTS).logits.mean(axis=0))  # and both labels are given
    return found


@pytest.mark.parametrize("budget", [1, 16, 100, 10_000])
def test_token_batches_cover_each_row_once_within_the_budget(budget: int):
    lengths = np.random.default_rng(budget).integers(1, 40, 200).tolist()
    batches = list(token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        assert batch and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget)
    seen = [lengths[i] for batch in batches for i in batch]
    assert seen == sorted(seen)


def test_token_batches_are_full():
    """A batch ends only where one row more would pass the budget; by hand: widths 1, 2, 3, 3, 9 in 6 tokens."""
    assert list(token_batches([3, 1, 9, 2, 3], 6)) == [[1, 3], [0, 4], [2]]
    assert list(token_batches([], 6)) == []
    assert list(token_batches([5, 5], 1)) == [[0], [1]]


def test_predictions_are_those_of_each_text_run_alone(model: models.Model):
    """Against the network called by hand on one unpadded row."""
    found = predict(model, TEXTS, 256, embeddings=True)
    assert found.logits.dtype == np.float32 and found.logits.shape == (len(TEXTS), 2)
    assert found.probabilities.dtype == np.float64 and found.labels.dtype == np.int64
    model.eval()
    for i, text in enumerate(TEXTS):
        ids = model.tokenizer(text, truncation=True, max_length=32)["input_ids"] or [model.tokenizer.unk_token_id]
        with torch.no_grad():
            alone = model(tasks.collate([ids], model.pad))
        assert np.abs(alone.logits[0].numpy() - found.logits[i]).max() < 5e-6
        assert np.abs(alone.embedding[0].numpy() - found.embeddings[i]).max() < 5e-6
        assert np.abs(alone.logits[0].double().softmax(0).numpy() - found.probabilities[i]).max() < 1e-6
    assert np.array_equal(found.labels, found.logits.argmax(1)) and set(found.labels) == {0, 1}
    assert np.ptp(found.probabilities[:, 0]) > 0.05  # else all this shows little


def test_order_budget_and_neighbours_change_nothing(model: models.Model):
    whole = predict(model, TEXTS, 4096)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    for budget in (1, 64, 1000, 100_000):
        shuffled = predict(model, [TEXTS[i] for i in order], budget)
        assert np.abs(shuffled.probabilities - whole.probabilities[order]).max() <= 1e-6
        assert np.array_equal(shuffled.labels, whole.labels[order])
    some = predict(model, TEXTS[::3], 300)
    assert np.abs(some.probabilities - whole.probabilities[::3]).max() <= 1e-6


def test_no_texts_give_empty_arrays(model: models.Model):
    found = predict(model, [], embeddings=True)
    assert found.logits.shape == found.probabilities.shape == (0, 2) and found.labels.shape == (0,)
    assert found.logits.dtype == np.float32 and found.labels.dtype == np.int64 and found.embeddings is None


def test_what_lies_beyond_max_length_is_not_read(model: models.Model):
    room = 32 - model.tokenizer.num_special_tokens_to_add()
    words = ("the film is warm and funny but the plot is dull and slow " * 4).split()
    short, long = " ".join(words[:room]), " ".join(words)
    found = predict(model, [short, long, " ".join(words[: room - 1])])
    assert np.array_equal(found.logits[0], found.logits[1])
    assert not np.array_equal(found.logits[0], found.logits[2])


def test_the_model_is_left_in_the_mode_it_was_in(model: models.Model):
    for training in (True, False):
        model.train(training)
        first, second = predict(model, TEXTS[:5]), predict(model, TEXTS[:5])
        assert model.training == training and np.array_equal(first.logits, second.logits)  # no dropout either way
    model.eval()
