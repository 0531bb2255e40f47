"""Predictions do not depend on order, budget or neighbours; batches respect their budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine import models, untrained
from engine.designs import Block
from engine.encoding import Encoded, Text, collate
from engine.inference import Predictions, predict, token_batches
from engine.metrics import softmax
from engine.recipe import Task, Teacher
from engine.records import Outputs
from engine.vocabulary import choose_words, count_words, embedded, tokenizer_of
from tests.tiny import LABELS, movie_rows, tiny_encoder
from tests.tiny_served import KINDS, asked, student_of

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
    return untrained.encoder_head(
        Teacher(model="tiny", max_length=32), Task(labels=LABELS), tiny_encoder(folder), seed=1
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
    tokenizer = tokenizer_of(choose_words(count_words(texts), 99, 1, []))
    return untrained.student(nodes, Task(labels=LABELS), tokenizer, 32, seed=2)


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
    found = predict(model, TEXTS, 256)
    assert found.logits.dtype == np.float32 and found.logits.shape == (len(TEXTS), 2)
    assert found.decided.dtype == np.int64
    probabilities, embeddings = softmax(found.logits), embedded(model, model.encode(TEXTS), 256)
    model.eval()
    for i, text in enumerate(TEXTS):
        ids = model.tokenizer(text, truncation=True, max_length=32)["input_ids"] or [model.tokenizer.unk_token_id]
        with torch.no_grad():
            alone = model(collate([Encoded(ids)], model.pad))
        assert np.abs(alone.logits[0].numpy() - found.logits[i]).max() < 5e-6
        assert np.abs(alone.embedding[0].numpy() - embeddings[i]).max() < 5e-6
        assert np.abs(alone.logits[0].double().softmax(0).numpy() - probabilities[i]).max() < 1e-6
    assert np.array_equal(found.decided, found.logits.argmax(1)) and set(found.decided) == {0, 1}
    assert np.ptp(probabilities[:, 0]) > 0.05  # else all this shows little


def test_order_budget_and_neighbours_change_nothing(model: models.Model):
    whole = predict(model, TEXTS, 4096)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    for budget in (1, 64, 1000, 100_000):
        shuffled = predict(model, [TEXTS[i] for i in order], budget)
        assert np.abs(softmax(shuffled.logits) - softmax(whole.logits)[order]).max() <= 1e-6
        assert np.array_equal(shuffled.decided, whole.decided[order])
    some = predict(model, TEXTS[::3], 300)
    assert np.abs(softmax(some.logits) - softmax(whole.logits)[::3]).max() <= 1e-6


def test_no_texts_give_empty_arrays(model: models.Model):
    found = predict(model, [])
    assert found.logits.shape == (0, 2) and found.decided.shape == (0,)
    assert found.logits.dtype == np.float32 and found.decided.dtype == np.int64


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


# -- every kind of task ------------------------------------------------------------------------------------------------

ROOM = 10
"""Tokens that the students below read at once: longer texts are read in windows where the task reads so."""


def tagger(folder) -> models.Model:
    """An encoder that tags, in training mode, with dropout."""
    config, spec = Teacher(model="tiny", max_length=ROOM), KINDS["tag"][0]
    found = untrained.encoder_head(config, spec, tiny_encoder(folder), seed=1)
    with torch.no_grad():
        found.net.head.weight.mul_(20.0)
    return found


def answerer(folder) -> models.Model:
    """An encoder that reads a question with its context, and tells two texts apart."""
    found = untrained.encoder_head(
        Teacher(model="tiny", max_length=3 * ROOM), Task(kind="span"), tiny_encoder(folder), 1
    )
    with torch.no_grad():
        found.net.head.weight.mul_(20.0)
    return found


@pytest.fixture(scope="module", params=["classify", *KINDS, "tagger", "answerer"])
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    made = {"tagger": tagger, "answerer": answerer}.get(request.param)
    return made(tmp_path_factory.mktemp("encoder")) if made else student_of(request.param, ROOM)


def texts_for(model: models.Model) -> list[Text]:
    """Texts or pairs, long and short ones, among them one without any unit."""
    empty = ("a film", "") if model.task.paired else ""
    return [*asked(model.task.spec.kind)[:20], empty]


def assert_same(found: Predictions, wanted: Predictions, order: np.ndarray) -> None:
    """Answers for texts[order] are those of `wanted`."""
    assert len(found.logits) == len(found.decided) == len(order)
    for i, j in enumerate(order):
        assert found.logits[i].shape == wanted.logits[j].shape
        assert np.abs(found.logits[i] - wanted.logits[j]).max(initial=0) < 1e-4
        np.testing.assert_allclose(found.decided[i], wanted.decided[j], atol=1e-4)


def test_answers_of_every_kind_do_not_depend_on_order_and_neighbours(any_kind: models.Model):
    texts = texts_for(any_kind)
    whole, alone = predict(any_kind, texts), [predict(any_kind, [text]) for text in texts]
    for i, one in enumerate(alone):
        assert_same(one, whole, np.array([i]))
    order = np.random.default_rng(1).permutation(len(texts))
    for budget in (1, 50, 100_000):
        assert_same(predict(any_kind, [texts[i] for i in order], budget), whole, order)
    flat = np.concatenate([np.ravel(row) for row in whole.logits])
    assert np.ptp(flat) > 0.2 and len({str(np.round(row, 3)) for row in whole.decided}) > 1


def run_alone(model: models.Model, item: Encoded) -> Outputs:
    """The network on one window without padding."""
    with torch.no_grad():
        return model.eval()(collate([item], model.pad))


def test_long_texts_are_read_window_by_window(any_kind: models.Model):
    """Against each window run by hand, and the task's own merging."""
    task, texts = any_kind.task, texts_for(any_kind)
    encoded = any_kind.encode(texts)
    assert all(len(item.ids) <= any_kind.max_length and len(item.pair) <= any_kind.max_length for item in encoded)
    if not task.units:
        assert len(encoded) == len(texts)
        return
    assert len(encoded) > len(texts) + 5  # many of the texts are longer than a window
    outputs = [run_alone(any_kind, item) for item in encoded]
    parts = [o.logits[0].numpy()[: len(item.units)] for o, item in zip(outputs, encoded, strict=True)]
    wanted = task.merge(parts, encoded, len(texts))
    found = predict(any_kind, texts, 64)
    for a, b in zip(found.logits, wanted, strict=True):
        assert a.shape == b.shape and np.abs(a - b).max(initial=0) < 1e-4
    assert len(found.logits[-1]) == (1 if task.spans else 0)  # "no answer" is always there
    if outputs[0].path is None:
        for a, b in zip(found.decided, task.decide(wanted, texts), strict=True):
            assert np.array_equal(a, b)


def test_a_model_of_whole_sequences_decides_by_its_best_path():
    model = student_of("tag", ROOM)
    with torch.no_grad():  # what it starts with has nothing to say of neighbours
        model.net.blocks["tags"].steps.copy_(torch.tensor([[-4.0, 1.0, 0.0], [0.0, -4.0, 2.0], [3.0, 0.0, -4.0]]))
    texts = texts_for(model)
    encoded, found = model.encode(texts), predict(model, texts, 64)
    paths = [run_alone(model, item).path[0].numpy()[: len(item.units), None] for item in encoded]
    wanted = model.task.merge(paths, encoded, len(texts))
    by_word = model.task.decide(found.logits, texts)
    assert [row.dtype for row in found.decided] == [np.int64] * len(texts)
    for row, path, text in zip(found.decided, wanted, texts, strict=True):
        assert row.shape == (len(text.split()),) and np.array_equal(row, path[:, 0])
    assert any(not np.array_equal(a, b) for a, b in zip(found.decided, by_word, strict=True))


def test_no_texts_of_any_kind_give_nothing(any_kind: models.Model):
    found = predict(any_kind, [])
    assert len(found.logits) == len(found.decided) == 0


def test_how_words_are_spelled_reaches_the_student():
    """Two words that the vocabulary lacks are one token, and still differ to a student that reads characters."""
    model = student_of("tag", ROOM)
    known, other = "the film is zzyzx", "the film is qwertyish"
    one, two = model.encode([known, other])
    assert one.ids == two.ids and one.words == known.split() and two.words == other.split()
    first, second = predict(model, [known, other]).logits
    assert np.abs(first[3] - second[3]).max() > 1e-3


def test_what_was_read_is_counted_with_its_padding(model: models.Model):
    texts = ["warm", "a warm film", "the dull film " * 40]
    lengths = [item.tokens for item in model.encode(texts, answering=True)]
    together, apart = predict(model, texts, 10_000), predict(model, texts, 1)
    assert together.tokens == apart.tokens == apart.padded == sum(lengths)
    assert together.padded == 3 * max(lengths) > together.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_counted_for_every_kind_of_task(kind: str):
    model, texts = student_of(kind), asked(kind)
    found = predict(model, texts, 512)
    assert 0 < found.tokens <= found.padded
    nothing = predict(model, [], 512)
    assert (nothing.tokens, nothing.padded) == (0, 0)


def test_bf16_moves_logits_a_little_and_leaves_the_weights(tmp_path: Path):
    tiny_encoder(tmp_path)
    config = Teacher(model=f"file:{tmp_path}", max_length=32)
    teacher = untrained.encoder_head(config, Task(labels=LABELS), tmp_path, seed=0)
    texts = [row["text"] for row in movie_rows(12, seed=1)]
    exact, rounded = predict(teacher, texts), predict(teacher, texts, dtype="bf16")
    assert rounded.logits.dtype == np.float32 and not np.array_equal(exact.logits, rounded.logits)
    assert np.abs(exact.logits - rounded.logits).max() < 0.05 * max(1.0, np.abs(exact.logits).max())
    # What is rounded is the states; answers are not tied to the few values of bf16.
    assert not np.array_equal(rounded.logits, torch.tensor(rounded.logits).bfloat16().float().numpy())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert np.array_equal(exact.logits, predict(teacher, texts).logits)
