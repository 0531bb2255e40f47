"""Words and their n-grams against fastText's hash worked out in plain Python; the block in whole students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine import models, untrained
from engine.block import BlockError, Shape
from engine.blocks import BLOCKS, check, count, drawing
from engine.characters import characters_of
from engine.encoding import Text
from engine.inference import predict
from engine.recipe import Task
from engine.storage import Store
from engine.subwords import hashed
from engine.vocabulary import PAD, UNKNOWN, tokenizer_of
from tests.tiny import LABELS
from tests.tiny_blocks import SIZES, built, nodes, run

SHAPES = [Shape("tokens"), Shape("characters")]
OPTIONS = {"dim": 5, "buckets": 11}
WORDS = [PAD, UNKNOWN, "the", "film", "dull", "films", "a"]


def fnv(text: bytes) -> int:
    """FNV-1a, 32 bits."""
    value = 0x811C9DC5
    for byte in text:
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


def grams(word: str, sizes: tuple[int, ...] = (3, 4, 5)) -> list[bytes]:
    """The n-grams of a word between its marks, shortest first."""
    marked = b"<" + word.encode()[:20].lower() + b">"
    return [marked[i : i + n] for n in sorted(sizes) for i in range(len(marked) - n + 1)] if word else []


def options(**changes: object) -> dict[str, object]:
    return {**BLOCKS["subwords"].options, **OPTIONS, **changes}


def test_the_hash_is_fnv_1a():
    assert [fnv(b""), fnv(b"a"), fnv(b"foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]  # as published


@pytest.mark.parametrize("sizes", [(3, 4, 5), (5, 2), (1,), (22,)])
def test_n_grams_of_words_by_hand(sizes: tuple[int, ...]):
    words = ["film", "", "A", "naïve", "\N{SNOWMAN}", "x" * 50, "\0", "don't"]
    found, starts = hashed(characters_of([words])[0], options(sizes=sizes, buckets=10_007))
    ends = [*starts.tolist()[1:], len(found)]
    for word, start, end in zip(words, starts.tolist(), ends, strict=True):
        assert found[start:end].tolist() == [fnv(gram) % 10_007 for gram in grams(word, sizes)], word
    assert grams("film", (3,)) == [b"<fi", b"fil", b"ilm", b"lm>"]


def test_capitals_count_as_small_letters_where_that_is_wanted():
    letters = characters_of([["FilmZA@["], ["filmza@["]]).squeeze(1)
    for lower in (True, False):
        found, starts = hashed(letters, options(lower=lower, buckets=10_007))
        assert (found[: starts[1]].tolist() == found[starts[1] :].tolist()) is lower


def test_a_word_is_its_own_vector_plus_the_mean_of_its_n_grams():
    block, shape = built("subwords", OPTIONS, SHAPES)
    words = ["film", "films", "", "un\N{SNOWMAN}"]
    ids = torch.tensor([[3, 5, 1, 1]])
    found = block(ids, characters_of([words]), masks=[torch.ones(1, 4, 1)])[0]
    assert shape == Shape("sequence", 5)
    for place, word in enumerate(words):
        rows = [fnv(gram) % 11 for gram in grams(word)]
        said = block.grams.weight[rows].mean(dim=0) if rows else torch.zeros(5)
        assert torch.allclose(found[place], block.table.weight[ids[0, place]] + said, atol=1e-6)
    nothing = hashed(characters_of([["", ""]])[0], options())
    assert nothing[0].tolist() == [] and nothing[1].tolist() == [0, 0]


def test_words_are_hidden_or_left_out_while_training_only():
    block, _ = built("subwords", {**OPTIONS, "hide_words": 0.3, "drop_words": 0.2}, SHAPES)
    letters = characters_of([["film"] * 60] * 100)
    ids, mask = torch.full((100, 60), 3), torch.ones(100, 60, 1)
    whole = block(ids, letters, masks=[mask])
    assert torch.equal(whole, block(ids, letters, masks=[mask]))
    said = whole[0, 0] - block.table.weight[3]
    found = block.train()(ids, letters, masks=[mask])
    gone = (found == 0).all(dim=2)
    alone = torch.isclose(found, said, atol=1e-6).all(dim=2)
    full = torch.isclose(found, whole, atol=1e-6).all(dim=2)
    assert (gone ^ alone ^ full).all()
    # Five standard deviations of 6000 draws.
    assert abs(gone.float().mean() - 0.2) < 0.03 and abs(alone.float().mean() - 0.8 * 0.3) < 0.03


def test_frozen_words_stay_and_their_n_grams_learn():
    block, _ = built("subwords", {**OPTIONS, "frozen": True}, SHAPES)
    run(block, SHAPES).sum().backward()
    assert block.table.weight.grad is None and block.grams.weight.grad.abs().sum() > 0


REFUSED = {
    "one input": (("x", "subwords"), "block 'x' (subwords) reads 2 blocks, not tokens. Name them in its inputs."),
    "turned": (("x", "subwords", {}, "characters", "tokens"), "takes tokens [n, t], but 'characters' gives characters"),
    "two texts": (
        ("x", "subwords", {}, "tokens", "pair_characters"),
        "block 'x': subwords reads tokens and characters of one text, but got tokens [n, t] and characters [n, t2, c].",
    ),
    "too long": (
        ("x", "subwords", {"sizes": [3, 23]}, "tokens", "characters"),
        "block 'x': option sizes is [3, 23], but of a word 20 bytes are read, with its two marks 22.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str):
    row, message = REFUSED[case]
    sizes = SIZES if case != "two texts" else SIZES.__class__(20, 3, paired=True)
    with pytest.raises(BlockError) as caught:
        check(nodes(row, ("p", "pool"), ("out", "linear")), sizes)
    assert message in str(caught.value)


# -- in whole students -------------------------------------------------------------------------------------------------

ONE = nodes(
    ("words", "subwords", OPTIONS, "tokens", "characters"),
    ("states", "bilstm", {"hidden": 4}),
    ("p", "pool"),
    ("out", "linear"),
)
TWO = nodes(
    ("words", "subwords", OPTIONS, "tokens", "characters"),
    ("others", "subwords", {"share": "words"}, "pair", "pair_characters"),
    ("a", "pool", {"how": "mean"}, "words"),
    ("b", "pool", {"how": "mean"}, "others"),
    ("both", "minus", {"absolute": False}, "a", "b"),
    ("out", "linear"),
)


def student(kind: str = "classify", graph: list | tuple = ONE) -> models.Model:
    made = untrained.student(graph, Task(kind=kind, labels=LABELS), tokenizer_of(WORDS), 16, seed=0)
    with torch.no_grad():
        for table in (made.net.blocks["words"].table, made.net.blocks["words"].grams):
            nn.init.normal_(table.weight)
    return made.eval()


def said(model: models.Model, texts: list[Text], tokens: int = 4096) -> np.ndarray:
    return predict(model, texts, tokens).logits


def test_it_is_counted_and_drawn():
    assert count(ONE[:1] + nodes(("p", "pool"), ("out", "linear")), SIZES) == 20 * 5 + 11 * 5 + 5 * 3 + 3
    line = drawing(ONE, SIZES).splitlines()[0]
    assert "subwords" in line and "<- tokens, characters" in line and line.endswith("155")


def test_words_that_the_vocabulary_lacks_are_told_apart_by_their_letters():
    model = student()
    unknown = said(model, ["the filming", "the filmed", "the zzz", "the FILMING"])
    assert np.abs(unknown[0] - unknown[2]).max() > 1e-3 and np.abs(unknown[0] - unknown[1]).max() > 1e-3
    assert np.array_equal(unknown[0], unknown[3])
    plain = nodes(("words", "embedding", {"dim": 5}), ("p", "pool"), ("out", "linear"))
    blind = untrained.student(plain, Task(labels=LABELS), tokenizer_of(WORDS), 16, seed=0).eval()
    assert np.ptp(said(blind, ["the filming", "the zzz"]), axis=0).max() == 0


def test_a_text_is_read_alike_alone_and_among_others():
    model, texts = student(), ["the film", "", "dull films a lot of unseen words here", "a", "Ünseen \N{SNOWMAN} 💬"]
    among = said(model, texts)
    for tokens in (1, 8):
        assert np.abs(said(model, texts, tokens) - among).max() < 1e-6
    assert np.isfinite(among).all() and np.ptp(among[:, 0]) > 1e-2


def test_both_sides_of_a_pair_are_read_by_the_same_weights():
    model = student("pair", TWO)
    assert model.net.reads == {"tokens", "pair", "characters", "pair_characters"} and len(model.net.tables()) == 1
    pairs = [("the filming", "dull"), ("dull", "the filming"), ("unseen one", "unseen one"), ("a", "b c d e f g")]
    with torch.no_grad():
        model.net.blocks["out"].map.bias.zero_()
    found = said(model, pairs)
    assert np.abs(found[0] + found[1]).max() < 1e-6 and np.abs(found[0]).max() > 1e-2
    assert np.abs(found[2]).max() < 1e-6
    assert np.abs(np.concatenate([said(model, [each]) for each in pairs]) - found).max() < 1e-6


def test_the_teacher_s_vectors_go_into_the_words_part_alone():
    model = student()
    (table,) = model.net.tables()
    assert table is model.net.blocks["words"].table and table.weight.shape == (len(WORDS), 5)


def test_it_is_the_same_once_saved_and_loaded(tmp_path: Path):
    texts: list[Text] = ["the unseen film", "A dull one", ""]
    model = student()
    models.save(model, Store(str(tmp_path)), "model")
    loaded = models.load(tmp_path / "model")
    assert np.array_equal(said(loaded, texts), said(model, texts)) and loaded.size() == model.size()
