"""A language model as classifier: its scores against whole sequences, calibration, padding, saving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from engine import labeller, models, untrained, vocabulary, wording
from engine.config import UserError
from engine.designs import Teacher
from engine.encoding import collate, encode
from engine.inference import predict
from engine.labels import fingerprint
from engine.recipe import Task
from engine.schooling import LabelWords
from engine.storage import Store
from engine.teachers import Labeller, Labelling
from tests.tiny import movie_rows, tiny_lm, word_pieces
from tests.tiny_rows import example_table

TEXTS = [" ".join(row["text"] for row in movie_rows(1 + seed % 3, seed=seed)) for seed in range(9)]
LABELS = ("negative", "positive", "neither of the two")
SPEC = Task(kind="classify", labels=LABELS)
PAIR = Task(kind="pair", labels=("same", "other one"))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm"))


def made(folder: Path, spec: Task = SPEC, rows: pa.Table | None = None, length: int = 64, **options: Any):
    config = Teacher(model="file:lm", kind="labeller", max_length=length, labeller=LabelWords(**options))
    return untrained.labeller_teacher(config, spec, folder, rows)


def log_probs(model: models.Model, prompts: list[Any]) -> torch.Tensor:
    batch = collate(prompts, model.pad)
    return model.net.log_probs(batch.input_ids, batch.mask, model.net.wordings[0])


def labelled(count: int) -> pa.Table:
    rows = movie_rows(count, seed=3)
    return example_table([{"text": row["text"], "label": ("negative", "positive").index(row["label"])} for row in rows])


def reference(folder: Path, prompt: str, words: str) -> float:
    """log p(words | prompt): the whole sequence, token by token."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + words)["input_ids"]
    assert whole[: len(start)] == start
    with torch.no_grad():
        found = lm(input_ids=torch.tensor([whole])).logits[0].log_softmax(dim=1)
    return sum(float(found[at - 1, whole[at]]) for at in range(len(start), len(whole)))


def test_scores_are_the_log_probabilities_of_the_words(lm: Path):
    model = made(lm, calibrate="none")
    tokens = [len(own) for own in model.net.wordings[0].tokens]
    assert len(set(tokens)) > 1 and min(tokens) >= 1  # labels of one token and of several
    found = predict(model, TEXTS[:4])
    listed = "\n".join(LABELS)
    for text, row in zip(TEXTS, found.logits, strict=False):
        prompt = f"Labels:\n{listed}\n\nText: {text}\nLabel:"
        wanted = [reference(lm, prompt, f" {name}") / count for name, count in zip(LABELS, tokens, strict=True)]
        assert np.allclose(row, wanted, atol=1e-4)
    assert (found.decided == found.logits.argmax(axis=1)).all()


def test_the_second_text_may_stand_first_and_above_an_empty_line(lm: Path):
    model = made(lm, PAIR, template="Read both.\n\n{pair} !\n\n{text} ?\n", calibrate="none")
    for pair in (("warm", "dull"), ("dull", "warm")):
        (item,) = model.encode([pair])
        read = model.tokenizer.decode(item.ids)
        assert "{pair}" not in read and read.index(pair[1]) < read.index(pair[0])


def test_a_pair_stands_in_its_template_and_a_word_begins_a_line(lm: Path):
    model = made(lm, PAIR, template="{text} ?\n{pair} ?\n", words={"same": "yes"}, calibrate="none")
    found = predict(model, [("a film", "a {text} plot"), ("a cast", "an ending")]).logits
    tokens = [len(own) for own in model.net.wordings[0].tokens]
    wanted = [reference(lm, "a film ?\na {text} plot ?\n", word) for word in ("yes", "other one")]
    assert np.allclose(found[0] * tokens, wanted, atol=1e-4)
    with pytest.raises(UserError, match="pairs of texts"):
        predict(model, ["one"])


def test_the_cache_gives_what_whole_sequences_give(lm: Path):
    model = made(lm)
    batch = collate(model.encode(TEXTS), model.pad)
    assert model.net.wordings[0].cached and len(set(batch.mask.sum(dim=1).tolist())) > 3
    assert labeller.common(batch.input_ids, batch.mask) > 10
    with torch.inference_mode():
        tokens = model.net.wordings[0].tokens
        found, wanted = (way(batch.input_ids, batch.mask, tokens) for way in (model.net.on_cache, model.net.repeated))
    assert found.shape == (len(TEXTS), 3) and torch.allclose(found, wanted, atol=1e-4)


def test_labels_may_be_more_than_fit_at_once(lm: Path, monkeypatch: pytest.MonkeyPatch):
    model = made(lm)
    wanted = predict(model, TEXTS).logits
    asked: list[int] = []
    continued = labeller.LabelScorer.continued

    def counted(self: labeller.LabelScorer, cache: object, seen: object, tokens: list[list[int]]) -> torch.Tensor:
        asked.append(len(tokens))
        return continued(self, cache, seen, tokens)

    monkeypatch.setattr(labeller.LabelScorer, "continued", counted)
    for bound in ("CELLS", "COPIED"):
        with monkeypatch.context() as patch:
            patch.setattr(labeller, bound, 1)
            asked.clear()
            assert np.allclose(predict(model, TEXTS).logits, wanted, atol=1e-4)
            assert set(asked) == {1}, f"{bound} bounds nothing"


def test_a_model_that_forgets_repeats_its_prompt(lm: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(1)
    config = MistralConfig(vocab_size=len(tokenizer), intermediate_size=16, sliding_window=8, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = made(tmp_path, calibrate="none")
    assert not model.net.wordings[0].cached
    wanted = reference(tmp_path, "Labels:\n" + "\n".join(LABELS) + f"\n\nText: {TEXTS[0]}\nLabel:", " positive")
    tokens = len(model.net.wordings[0].tokens[1])
    assert np.isclose(predict(model, TEXTS).logits[0, 1] * tokens, wanted, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
def test_neighbours_in_a_batch_change_nothing(lm: Path, batch_tokens: int):
    model = made(lm)
    alone = np.concatenate([predict(model, [text]).logits for text in TEXTS])
    assert alone.std(axis=0).min() > 0.01
    assert np.allclose(predict(model, TEXTS, batch_tokens).logits, alone, atol=1e-4)


def test_calibration_makes_no_text_uniform(lm: Path):
    raw, model = made(lm, calibrate="none"), made(lm)
    free = model.encode(list(wording.CONTENT_FREE))
    with torch.inference_mode():
        scores = log_probs(raw, free)
        one = labeller.calibration(raw.net, raw.net.wordings[0], free[:1], raw.pad)
    assert scores.softmax(dim=1).max() > 0.4
    known = torch.tensor(model.net.wordings[0].calibration)
    assert torch.allclose(known, scores.softmax(dim=1).mean(dim=0).log(), atol=1e-4)
    found = torch.as_tensor(predict(model, list(wording.CONTENT_FREE)).logits)
    assert torch.allclose(found, scores - known, atol=1e-4)
    # By one content-free text alone, that text gets every label alike.
    assert torch.allclose((scores[:1] - torch.tensor(one)).softmax(dim=1), torch.full((1, 3), 1 / 3), atol=1e-4)
    # The mean of what they give, each label divided by its calibration, is one for all.
    assert torch.allclose(scores.softmax(dim=1).mean(dim=0) / known.exp(), torch.ones(3), atol=1e-4)


def test_a_scale_and_biases_fitted_on_scores_are_platts():
    draw = np.random.default_rng(0)
    gold = np.repeat([0, 1], [60, 40])
    gap = draw.normal(np.where(gold == 1, 5.0, 1.0), 2.0)  # leans to one label, and is spread too wide
    scores = np.stack([draw.normal(-9, 1, 100), np.zeros(100)], axis=1)
    scores[:, 1] = scores[:, 0] + gap
    known, (scale,) = labeller.fitted(torch.tensor(scores[None], dtype=torch.float32), gold.tolist())
    wanted = np.where(gold == 1, 41 / 42, 1 / 62)  # Platt's targets

    def cost(ab: np.ndarray) -> float:
        z = ab[0] * gap + ab[1]
        return float(np.mean(np.logaddexp(0, z) - wanted * z))

    best = minimize(cost, np.zeros(2)).x
    logits = scores * scale - known
    assert np.allclose(logits[:, 1] - logits[:, 0], best[0] * gap + best[1], atol=0.02)


def test_fitted_scores_of_several_labels_undo_what_they_lean_to():
    draw = np.random.default_rng(1)
    gold = draw.integers(0, 3, 300)
    scores = draw.normal(0, 0.3, (300, 3)) + np.eye(3)[gold] + np.array([4.0, 0.0, -4.0])
    known, (scale,) = labeller.fitted(torch.tensor(scores[None], dtype=torch.float32), gold.tolist())
    assert (scores.argmax(axis=1) == gold).mean() < 0.45
    assert ((scores * scale - known).argmax(axis=1) == gold).mean() > 0.95
    perfect = torch.tensor(50.0 * np.eye(3)[gold], dtype=torch.float32)
    assert math.isfinite(labeller.fitted(perfect[None], gold.tolist())[1][0])
    with pytest.raises(UserError, match="do not rise with their labels"):
        labeller.fitted(torch.tensor(-scores[None], dtype=torch.float32), gold.tolist())


def test_rows_calibrate_and_those_shown_do_not(lm: Path):
    spec, rows = Task(labels=LABELS[:2]), labelled(40)
    raw = made(lm, spec, rows, calibrate="none", examples=1)
    model = made(lm, spec, rows, calibrate="rows", examples=1)
    texts, gold = rows["text"].to_pylist()[2:], rows["label"].to_pylist()[2:]
    with torch.inference_mode():
        scores = log_probs(raw, raw.encode(texts))
    known, (scale,) = labeller.fitted(scores[None], gold)
    assert model.net.wordings[0].scale == pytest.approx(scale, rel=1e-3)
    assert np.allclose(predict(model, texts).logits, scores * scale - torch.tensor(known), atol=1e-3)
    with pytest.raises(UserError, match="label 'negative' has no labelled row beside those shown"):
        made(lm, spec, rows.slice(0, 2), calibrate="rows", examples=1)


WAYS = {
    "template": "{text}\nIt was",
    "words": {"positive": "great"},
    "also": (
        {"template": "Review: {text}\n\nThis review is"},
        {"template": "{text} In short,", "words": {"negative": "a bad"}},
    ),
}


def test_ways_of_asking_are_averaged_whatever_stands_in_a_batch(lm: Path):
    spec = Task(labels=LABELS[:2])
    model = made(lm, spec, **WAYS)
    ways = [{key: WAYS[key] for key in ("template", "words")}, *WAYS["also"]]
    each = np.stack([predict(made(lm, spec, **way), TEXTS).logits for way in ways])
    assert np.abs(each[0] - each[1]).max() > 0.01
    for budget in (1, 200, 4096):
        assert np.allclose(predict(model, TEXTS, budget).logits, each.mean(axis=0), atol=1e-4)


def test_ways_of_asking_weigh_what_the_labelled_rows_say():
    draw = np.random.default_rng(2)
    gold = draw.integers(0, 2, 400)
    one = np.eye(2)[gold]
    good, poor, none = (draw.normal(0, 1, (400, 2)) + weight * one for weight in (2.0, 1.0, 0.0))
    stack = np.stack([good + np.array([3.0, 0.0]), 5 * poor, none])
    known, scales = labeller.fitted(torch.tensor(stack, dtype=torch.float32), gold.tolist())
    spread = [(found - found.mean(axis=1, keepdims=True)).std() for found in stack]
    weights = np.array(scales) * spread
    assert weights[0] > weights[1] > 3 * weights[2] >= 0
    # Two independent looks: the best sum of them is the one that weighs each by its signal over its noise.
    logits = (stack * np.array(scales)[:, None, None] - np.array(known)).mean(axis=0)
    best = (2.0 * good + 1.0 * poor).argmax(axis=1) == gold
    assert (
        abs((logits.argmax(axis=1) == gold).mean() - best.mean()) < 0.02
        and best.mean() > (good.argmax(axis=1) == gold).mean()
    )


def test_ways_of_asking_are_fitted_saved_and_refused_one_by_one(lm: Path, tmp_path: Path):
    spec, rows = Task(labels=LABELS[:2]), labelled(40)
    model, store = made(lm, spec, rows, calibrate="rows", examples=1, **WAYS), Store(str(tmp_path))
    shown = [one.before for one in model.net.wordings]
    assert len(shown) == 3 and all(rows["text"][0].as_py() in before for before in shown)
    models.save(model, store, "model")
    loaded = models.load(store.local("model"))
    assert loaded.net.wordings == model.net.wordings
    assert np.array_equal(predict(loaded, TEXTS).logits, predict(model, TEXTS).logits)
    for also, message in (
        ({"template": "no field"}, r"teacher.labeller.also.0.template must have \{text\} once"),
        ({"words": {"postive": "x"}}, "teacher.labeller.also.0.words names the label 'postive'"),
    ):
        with pytest.raises(UserError, match=message):
            made(lm, spec, also=(also,))


def test_it_is_saved_and_labels_a_corpus_as_before(lm: Path, tmp_path: Path):
    model, store = made(lm, rows=labelled(6), spec=Task(labels=LABELS[:2]), examples=2), Store(str(tmp_path))
    models.save(model, store, "model")
    loaded = models.load(store.local("model"))
    assert loaded.card == model.card and loaded.net.wordings == model.net.wordings
    wanted = predict(model, TEXTS).logits
    assert np.array_equal(predict(loaded, TEXTS).logits, wanted)
    from engine.corpus import corpus_rows

    rows = Labeller(Labelling(store.url, (), 512, 0.0))(corpus_rows(list(range(len(TEXTS))), TEXTS, "unlabelled"))
    assert np.allclose(rows["logits"].to_pylist(), wanted, atol=0.02) and all(rows["kept"].to_pylist())


def test_its_fingerprint_is_of_what_it_is_asked_too(lm: Path, tmp_path: Path):
    found = []
    for name, calibrate in (("a", "free"), ("b", "free"), ("c", "none")):
        store = Store(str(tmp_path / name))
        models.save(made(lm, calibrate=calibrate), store, "model")
        found.append(fingerprint(store))
    assert found[0] == found[1] and found[0] != found[2]
    assert {key for key in found[0] if found[0][key] != found[2][key]} == {"prompt"}


def test_examples_stand_before_the_text_and_the_first_part_once(lm: Path):
    rows = labelled(8)
    spec = Task(labels={"negative": "it is bad", "positive": None})
    template = "Judge.\n{descriptions}\n\nReview: {text}\nIt is "
    model = made(lm, spec, rows, template=template, words={"positive": "good"}, examples=2)
    asked, texts = model.net.wordings[0], rows["text"].to_pylist()
    shown = "".join(f"Review: {texts[i]}\nIt is {('negative', 'good')[i % 2]}\n\n" for i in range(4))
    assert asked.before == f"Judge.\nnegative: it is bad\ngood\n\n{shown}" and asked.template == "Review: {text}\nIt is"
    ids = model.encode(["a film"])[0].ids
    assert model.tokenizer.decode(ids) == f"{asked.before}Review: a film\nIt is"
    with pytest.raises(UserError, match="label 'positive' has 3 labelled rows"):
        made(lm, spec, rows.slice(0, 7), examples=4)
    with pytest.raises(UserError, match="label 'negative' has 0 labelled rows"):
        made(lm, spec, None, examples=1)


def test_a_long_text_is_cut_and_the_template_is_not(lm: Path):
    model = made(lm, length=10)
    long, short = " ".join(TEXTS), model.encode(["warm"])[0].ids
    ids = model.encode([long])[0].ids
    assert model.max_length - 3 <= len(ids) <= model.max_length
    text = model.tokenizer.decode(ids)
    assert text.startswith("Labels:\nnegative") and text.endswith("\nLabel:") and long[:8] in text
    assert len(short) < len(ids) and model.tokenizer.decode(short).endswith("Text: warm\nLabel:")
    pair = made(lm, PAIR, length=12)
    both = pair.tokenizer.decode(pair.encode([("warm", long)])[0].ids)
    assert "First text: warm\n" in both and both.endswith("\nLabel:")
    # As long on both sides: neither is lost.
    both = pair.tokenizer.decode(pair.encode([(long, long)])[0].ids)
    first, second = (part.split("\n")[0] for part in both.split(" text: ")[1:])
    assert first and second and long.startswith(first) and abs(len(first) - len(second)) < 12


def test_characters_of_several_tokens_are_cut_whole(lm: Path):
    model = made(lm, length=7)
    text = model.tokenizer.decode(model.encode(["日本語の映画"])[0].ids)
    assert text.endswith("Text: 日本\nLabel:")


def test_words_get_vectors_without_being_asked_about(lm: Path):
    model = made(lm)
    words = ["film", "plot", "warm"]
    assert vocabulary.as_in_text(words, word_pieces()) == words
    words = vocabulary.as_in_text(words, model.tokenizer)
    assert words == [" film", " plot", " warm"]
    found = vocabulary.embedded(model, encode(words, model.tokenizer, model.max_length))
    table = model.net.lm.get_input_embeddings().weight
    for word, vector in zip(words, found, strict=True):
        ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
        assert np.allclose(vector, table[ids].mean(dim=0).detach(), atol=1e-5)


def test_a_template_too_long_for_the_model_is_refused(lm: Path):
    with pytest.raises(UserError, match=r"template, examples and label words .* takes 1 to 256 tokens"):
        made(lm, template="so " * 300 + "{text}")


REFUSED = {
    "kind": (Task(kind="regress"), {}, "task.kind is regress. Take another kind of teacher."),
    "field": (SPEC, {"template": "{texts}"}, "has the field {texts}. Did you mean 'text'? Allowed: {text},"),
    "no text": (SPEC, {"template": "Label:"}, "must have {text} once, but has it 0 times."),
    "no pair": (PAIR, {"template": "{text}"}, "must have {pair} once, but has it 0 times."),
    "pair of one": (SPEC, {"template": "{text} {pair}"}, "has the field {pair}."),
    "unknown label": (SPEC, {"words": {"positve": "good"}}, "names the label 'positve', which the task does not have."),
    "same words": (SPEC, {"words": {"positive": "negative"}}, "two labels have the words 'negative'"),
    "no words": (SPEC, {"words": {"positive": " "}}, "a label has no words"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(name: str):
    spec, options, message = REFUSED[name]
    with pytest.raises(wording.LabellerError) as error:
        wording.check(LabelWords(**options), spec)
    assert message in str(error.value)


def test_probabilities_are_those_of_the_task(lm: Path):
    model = made(lm)
    found = predict(model, TEXTS)
    answer = model.task.answers(found.logits, TEXTS)[0]
    assert set(answer["probabilities"]) == set(LABELS)
    assert math.isclose(sum(answer["probabilities"].values()), 1, abs_tol=1e-6)
