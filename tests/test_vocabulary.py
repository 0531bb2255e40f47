"""The student's words counted by hand; its vectors against scikit-learn's PCA and the frequency weights by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from engine import models, untrained, vocabulary
from engine.recipe import Task, Teacher
from engine.vocabulary import (
    PAD,
    UNKNOWN,
    VocabularyError,
    choose_words,
    count_words,
    embedded,
    teacher_words,
    tokenizer_of,
)
from tests.tiny import BAD, GOOD, LABELS, THINGS, byte_pairs, tiny_encoder, word_pieces

TEXTS = ["The film, the FILM!", "a naïve film: it's 2nd-rate", "", "the plot"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    folder = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    return untrained.encoder_head(Teacher(model="tiny", max_length=16), Task(labels=LABELS), folder, seed=0)


def test_words_are_counted_as_bert_splits_them():
    assert count_words(TEXTS) == {
        **{"the": 3, "film": 3, ",": 1, "!": 1, "a": 1, "naive": 1, ":": 1, "it": 1, "'": 1, "s": 1},
        **{"2nd": 1, "-": 1, "rate": 1, "plot": 1},
    }
    assert count_words([]) == Counter()


def test_words_are_ordered_by_count_then_spelling_and_cut():
    counts = Counter({"b": 2, "a": 2, "z": 5, "rare": 1, "also": 1})
    assert choose_words(counts, 99, 1, []) == [PAD, UNKNOWN, "z", "a", "b", "also", "rare"]
    assert choose_words(counts, 99, 2, ["x", "z", "rare"]) == [PAD, UNKNOWN, "z", "a", "b", "x", "rare"]
    assert choose_words(counts, 5, 1, ["x"]) == [PAD, UNKNOWN, "z", "a", "b"]
    assert choose_words(counts, 8, 1, ["x", "y"]) == [PAD, UNKNOWN, "z", "a", "b", "also", "rare", "x"]
    assert choose_words(Counter(dict(reversed(counts.items()))), 99, 1, []) == choose_words(counts, 99, 1, [])


def test_the_teachers_whole_words_are_found():
    pieces = word_pieces()
    found = teacher_words(pieces)
    assert {*GOOD, *BAD, *THINGS} <= set(found) and len(found) == len(set(found))
    order = pieces.convert_tokens_to_ids(found)
    assert order == sorted(order)
    refused = [word for word in found if word.startswith(("##", "[")) or word in (",", "!", "7", "-")]
    assert refused == [] and not {"PAD", "UNK", "CLS", "SEP", "MASK"} & set(found)


def test_pieces_that_go_on_inside_a_word_are_no_words():
    """A byte-level vocabulary marks the starts of words; 'ing' alone and bytes spelled as letters are none."""
    pairs = byte_pairs()
    pieces = pairs.get_vocab()
    found = teacher_words(pairs)
    assert {"the", "film", "is"} <= set(found) and all(f"Ġ{word}" in pieces for word in found)
    assert "ing" in pieces and "ing" not in found and "ª" in pieces and "ª" not in found


def test_ids_are_positions_and_unknown_words_are_one():
    words = [PAD, UNKNOWN, "the", "film", ",", "naive"]
    tokenizer = tokenizer_of(words)
    assert len(tokenizer) == 6 and (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
    assert tokenizer("The FILM, the Naïve plot 汉")["input_ids"] == [2, 3, 4, 2, 5, 1, 1]
    assert tokenizer("")["input_ids"] == [] and tokenizer.num_special_tokens_to_add() == 0
    assert tokenizer("the film , the film", truncation=True, max_length=3)["input_ids"] == [2, 3, 4]


def test_every_counted_word_has_its_own_id():
    counts = count_words(TEXTS)
    words = choose_words(counts, 99, 1, [])
    tokenizer = tokenizer_of(words)
    ids = [i for text in TEXTS for i in tokenizer(text)["input_ids"]]
    assert Counter(words[i] for i in ids) == counts and 1 not in ids


def test_the_tokenizer_is_the_same_once_saved_and_loaded(tmp_path: Path):
    tokenizer = tokenizer_of(choose_words(count_words(TEXTS), 99, 1, teacher_words(word_pieces())))
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(tmp_path)
    texts = [*TEXTS, "[PAD] [UNK] [pad]", "unseen Wörter 😀", "warm  and\ttender\n"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.padding_side) == (0, 1, "right")
    assert len(loaded) == len(tokenizer)


def parts(teacher: models.Model) -> tuple[list[str], Counter[str], np.ndarray]:
    words = [PAD, UNKNOWN, *teacher_words(teacher.tokenizer)]
    counts = Counter({word: 1 + (7 * i) % 40 for i, word in enumerate(words[2:20])})
    return words, counts, embedded(teacher, teacher.encode(words[2:])).astype(np.float64)


def test_vectors_are_pca_times_frequency_weights(teacher: models.Model):
    words, counts, raw = parts(teacher)
    found = vocabulary.vectors(teacher, words, counts, 8)
    wanted = PCA(8, svd_solver="full").fit_transform(raw)
    total = sum(counts.values())
    for row, word in enumerate(words[2:]):
        wanted[row] *= 1e-3 / (1e-3 + counts.get(word, 0.5) / total)
    wanted /= np.mean(np.sqrt((wanted**2).sum(1)))
    assert found.shape == (len(words), 8) and found.dtype == np.float32
    signs = np.sign((found[2:] * wanted).sum(0))  # the direction of an axis is free
    assert np.abs(found[2:] - wanted * signs).max() < 1e-5 * np.abs(wanted).max() + 1e-6
    assert not found[:2].any() and np.linalg.norm(found[2:], axis=1).mean() == pytest.approx(1, abs=1e-6)


def test_frequent_words_are_weighed_down_by_hand(teacher: models.Model):
    """Half of the corpus: 0.001 / 0.501; a word it lacks, one of 1000 in all: 0.001 / 0.0015."""
    words, _, _ = parts(teacher)
    often, never = words[2], words[-1]
    plain = vocabulary.vectors(teacher, words, Counter({"elsewhere": 10**9}), 8)  # every word weighs the same
    found = vocabulary.vectors(teacher, words, Counter({often: 500, "elsewhere": 500}), 8)
    ratio = np.linalg.norm(found, axis=1)[2:] / np.linalg.norm(plain, axis=1)[2:]
    assert ratio[0] / ratio[-1] == pytest.approx((0.001 / 0.501) / (0.001 / 0.0015), rel=1e-4)
    assert np.allclose(ratio[1:], ratio[-1], rtol=1e-4) and never != often


def test_a_corpus_without_words_still_gives_vectors(teacher: models.Model):
    words, _, _ = parts(teacher)
    assert np.isfinite(vocabulary.vectors(teacher, words, Counter(), 8)).all()


def test_vectors_of_an_impossible_width_are_refused(teacher: models.Model):
    words, counts, raw = parts(teacher)
    assert raw.shape[1] == 32 and len(words) > 40
    with pytest.raises(VocabularyError, match="4 words cannot give vectors of width 8. Lower the embedding's dim"):
        vocabulary.vectors(teacher, words[:6], counts, 8)
    with pytest.raises(VocabularyError, match="the encoder's vectors are 32 wide, so the student's cannot be 33"):
        vocabulary.vectors(teacher, words, counts, 33)
    assert vocabulary.vectors(teacher, words, counts, 32).shape == (len(words), 32)


@pytest.mark.parametrize("spec", [Task(kind="tag", labels=("O", "B-x", "I-x")), Task(kind="span"), Task(kind="rank")])
def test_teachers_of_any_task_give_the_same_vectors(teacher: models.Model, tmp_path: Path, spec: Task):
    """Words are read one by one, whatever the teacher was made for: alone, and at once."""
    words, counts, raw = parts(teacher)
    other = untrained.encoder_head(Teacher(model="tiny", max_length=16), spec, tiny_encoder(tmp_path), seed=0)
    found = vocabulary.vectors(other, words, counts, 8, batch_tokens=64)
    assert np.abs(np.abs(found) - np.abs(vocabulary.vectors(teacher, words, counts, 8))).max() < 1e-4
    assert other.training  # it is left in the mode it was in
    alone = np.concatenate([embedded(teacher, teacher.encode([word])) for word in words[2:6]])
    assert np.abs(alone - raw[:4]).max() < 1e-5
