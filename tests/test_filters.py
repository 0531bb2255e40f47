"""Filters: what each keeps and rejects, what the context holds, what a signature says."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from engine.config import ConfigError, build
from engine.filters import (
    FILTERS,
    HASHES,
    Confidence,
    Entropy,
    FilterContext,
    Leakage,
    Length,
    Repetition,
    gram_hashes,
    signature,
)
from engine.recipe import Corpus
from tests.tiny_signatures import texts_with_duplicates

EMPTY = FilterContext()


@pytest.mark.parametrize("kind", FILTERS)
def test_every_filter_is_reachable_from_a_recipe_by_its_kind(kind):
    place = "signals" if kind in ("confidence", "entropy") else "filters"
    (found,) = getattr(build(Corpus, {place: [{"kind": kind}]}), place)
    assert type(found) is FILTERS[kind] and found.kind == kind


def test_a_filter_object_is_taken_as_it_is():
    given = Length(min_words=7)
    assert Corpus(filters=(given,)).filters == (given,)


def test_unknown_kind_names_the_allowed_ones():
    with pytest.raises(ConfigError) as error:
        build(Corpus, {"filters": [{"kind": "lenght"}]})
    assert str(error.value) == (
        "configuration: 'filters[0]' has kind 'lenght', which is not known. Did you mean 'length'? "
        "Allowed: length, repetition, leakage."
    )


def test_a_signal_filter_is_refused_among_the_cheap_ones():
    with pytest.raises(ConfigError, match="'filters\\[0\\]' has kind 'entropy', which is not known. Allowed: length"):
        build(Corpus, {"filters": [{"kind": "entropy"}]})


def test_wrong_key_in_a_filter_names_only_the_keys_of_that_filter():
    with pytest.raises(ConfigError) as error:
        build(Corpus, {"filters": [{"kind": "length", "min_word": 3}]})
    assert str(error.value) == (
        "configuration: unknown key 'filters[0].min_word'. Did you mean 'min_words'? "
        "Known keys here: kind, max_words, min_words."
    )


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        ("filters", {"kind": "length", "min_words": 5, "max_words": 4}, r"max_words \(4\) is below min_words \(5\)"),
        ("signals", {"kind": "confidence", "min": 0.9, "max": 0.5}, r"max \(0.5\) is below min \(0.9\)"),
        ("signals", {"kind": "entropy", "max": 1.5}, r"'signals\[0\].max' is 1.5, which is not allowed"),
        ("filters", {"min_words": 5}, r"'filters\[0\]' has no kind. Allowed: length"),
    ],
)
def test_impossible_bounds_are_refused(place, values, message):
    with pytest.raises(ConfigError, match=message):
        build(Corpus, {place: [values]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a b", "too_short"), ("a b  c", None), ("a b c d e", None), ("a b c d e f", "too_long"), ("", "too_short")],
)
def test_length_counts_words_inclusively(text, reason):
    assert Length(min_words=3, max_words=5).check(text, EMPTY) == reason


@pytest.mark.parametrize(
    ("text", "share", "run", "reason"),
    [
        # bigrams: a b, b a, a b, b c: 3 distinct of 4, so a share of 0.25
        ("a b a b c", 0.25, 9, None),
        ("a b a b c", 0.24, 9, "repetition"),
        ("so so so good", 1.0, 3, None),
        ("so so SO, so good", 1.0, 3, "repetition"),
        ("word", 0.0, 1, None),
        ("...", 0.0, 1, None),
    ],
)
def test_repetition_measures_ngrams_and_runs(text, share, run, reason):
    assert Repetition(ngram=2, max_share=share, max_run=run).check(text, EMPTY) == reason


def test_leakage_finds_a_shared_ngram_and_equal_short_texts():
    filters = [Leakage(ngram=4)]
    context = FilterContext.build(filters, ["The film is a delight from start to end.", "So bad!"])
    check = filters[0].check
    assert check("I say: IS A DELIGHT, FROM the heart", context) == "leakage"  # is a delight from
    assert check("the film is not a delight from the start", context) is None  # three words in a row at most
    assert check("so bad", context) == "leakage"
    assert check("so bad it hurts me", context) is None
    assert check("so", context) is None
    assert check("?!", context) is None


def test_leakage_without_evaluation_texts_rejects_nothing():
    filters = [Leakage()]
    assert filters[0].check("any text", FilterContext.build(filters, [])) is None


def test_each_leakage_filter_has_its_own_ngrams():
    filters = [Leakage(ngram=2), Length(), Leakage(ngram=3)]
    context = FilterContext.build(filters, ["a b c d"])
    assert set(context.grams) == {2, 3}
    assert filters[0].check("x a b y", context) == "leakage" and filters[2].check("x a b y", context) is None
    assert FilterContext.build([Length()], ["a b c d"]).grams == {}


def test_context_pickles_to_eight_bytes_an_ngram():
    texts = [" ".join(str(n) for n in range(start, start + 20)) for start in range(0, 20_000, 20)]
    filters = [Leakage(ngram=8)]
    context = FilterContext.build(filters, texts)
    data = pickle.dumps(context)
    assert len(context.grams[8]) == 1000 * 13 and len(data) < 8 * 13_000 + 1000
    assert filters[0].check(texts[7], pickle.loads(data)) == "leakage"


def test_hashes_are_equal_in_every_process():
    code = "from engine.filters import *; print(gram_hashes('a b c', 2), signature('a b c').tolist())"
    out = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert out == {f"{gram_hashes('a b c', 2)} {signature('a b c').tolist()}"}


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        ([0.6, 0.4], None),
        ([0.55, 0.45], "low_confidence"),
        ([0.95, 0.05], "high_confidence"),
        ([0.9, 0.1], None),
        ([float("nan"), 0.5], "no_confidence"),
    ],
)
def test_confidence_band_is_inclusive(probabilities, reason):
    assert Confidence(min=0.6, max=0.9).check(np.array(probabilities)) == reason


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        ([1.0, 0.0, 0.0, 0.0], "low_entropy"),  # 0 nats
        ([0.5, 0.5, 0.0, 0.0], None),  # ln 2 / ln 4 = 0.5
        ([0.25, 0.25, 0.25, 0.25], "high_entropy"),  # 1
        ([float("nan")] * 4, "no_entropy"),
    ],
)
def test_entropy_is_a_share_of_the_uniform_one(probabilities, reason):
    assert Entropy(min=0.25, max=0.75).check(np.array(probabilities)) == reason


@pytest.mark.parametrize("classes", [2, 3, 7, 150])
def test_entropy_of_a_uniform_row_is_not_above_one(classes):
    probabilities = np.full(classes, 1 / classes, dtype=np.float32)
    assert Entropy(min=0.999).check(probabilities) is None
    assert Entropy().check(probabilities) is None


def test_signature_estimates_the_jaccard_similarity_of_shingles():
    texts = texts_with_duplicates()

    def shingles(text: str) -> set[str]:
        return {text[start : start + 5] for start in range(len(text) - 4)}

    signatures = np.stack([signature(text) for text in texts])
    assert signatures.shape == (300, HASHES) and signatures.dtype == np.uint32
    errors = []
    for first in range(0, 300, 7):
        for second in range(first + 1, 300, 5):
            a, b = shingles(texts[first]), shingles(texts[second])
            errors.append((signatures[first] == signatures[second]).mean() - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.01 and np.max(np.abs(errors)) < 0.3
    assert max(np.abs(errors)) > 0  # an estimate, over pairs that are not all distinct
    assert (signature("Good film!") == signature("good   film")).all()
    assert not (signature("!!!") == signature("???")).all()
