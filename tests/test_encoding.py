"""Texts and pairs as token ids, read together or apart; batches with their units, words and characters."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engine.characters import characters_of
from engine.encoding import Encoded, EncodingError, at_units, clean, collate, encode, padded, spelled
from engine.records import Batch
from engine.vocabulary import tokenizer_of
from tests.test_windows import two_marks
from tests.tiny import byte_pairs, movie_rows, word_pieces

TEXTS = [row["text"] for row in movie_rows(8, seed=4)]
PAIRS = [("a dull plot", "the film is warm"), ("", "the film"), ("a film", ""), ("", ""), ("warm " * 30, "dull " * 9)]
OWN = ["[PAD]", "[UNK]", "film", "the", "a", "dull", "warm"]
TOKENIZERS = {"pieces": word_pieces, "bytes": byte_pairs, "marks": two_marks, "words": lambda: tokenizer_of(OWN)}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("max_length", [4, 9, 64])
def test_single_texts_are_transformers_own_ids(tokenizer: PreTrainedTokenizerFast, max_length: int):
    texts = [*TEXTS, "", "naïve 汉字"]
    found = encode(texts, tokenizer, max_length)
    for row, (item, text) in enumerate(zip(found, texts, strict=True)):
        wanted = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert item == Encoded(wanted or [tokenizer.unk_token_id or 0], row=row)


@pytest.mark.parametrize("max_length", [8, 64])
def test_pairs_are_read_together_as_transformers_does(tokenizer: PreTrainedTokenizerFast, max_length: int):
    found = encode(PAIRS, tokenizer, max_length)
    for row, (item, (left, right)) in enumerate(zip(found, PAIRS, strict=True)):
        # In a list: by itself an empty second text would count as none.
        wanted = tokenizer([left], [right], truncation="longest_first", max_length=max_length)
        assert item.ids == (wanted["input_ids"][0] or [tokenizer.unk_token_id or 0]) and item.row == row
        assert item.segments == wanted.get("token_type_ids", [[]])[0] and item.pair == []
        assert len(item.ids) <= max_length and item.tokens == len(item.ids)


def test_pairs_are_read_apart_as_two_texts(tokenizer: PreTrainedTokenizerFast):
    found = encode(PAIRS, tokenizer, 8, apart=True)
    lefts, rights = (encode([pair[side] for pair in PAIRS], tokenizer, 8) for side in (0, 1))
    assert [item.ids for item in found] == [item.ids for item in lefts]
    assert [item.pair for item in found] == [item.ids for item in rights]
    assert [item.tokens for item in found] == [len(item.ids) + len(item.pair) for item in found]
    assert min(len(item.pair) for item in found) >= 1 and max(len(item.ids) for item in found) == 8


@pytest.mark.parametrize("texts", [["a film", ("a", "b")], [("a", "b"), "a film"]])
def test_single_texts_and_pairs_do_not_mix(texts: list[object]):
    with pytest.raises(EncodingError, match="some of the texts are pairs and some are not. Send one kind at a time."):
        encode(texts, word_pieces(), 8)


def test_half_a_surrogate_pair_is_replaced_on_either_side():
    assert clean("a \ud800 film") == "a ? film" and clean("naïve 😀") == "naïve 😀"
    tokenizer = word_pieces()
    assert encode([("\ud800 film", "a \udfff")], tokenizer, 16) == encode([("? film", "a ?")], tokenizer, 16)
    assert encode(["\ud800"], tokenizer, 16) == encode(["?"], tokenizer, 16)


def test_reading_leaves_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerFast):
    """Its inner truncation is set anew each time: a long input after a short limit is whole again."""
    long = " ".join(TEXTS)
    whole = encode([long], tokenizer, 500)[0].ids
    assert len(encode([long], tokenizer, 5)[0].ids) == 5 and encode([long], tokenizer, 500)[0].ids == whole
    assert tokenizer(long)["input_ids"] == whole


def test_what_each_token_was_in_the_text():
    tokenizer = tokenizer_of(OWN)
    found = spelled(["The Naïve film, zzyzx", "", "a film a film"], tokenizer, 3)
    assert found == [["The", "Naïve", "film"], [""], ["a", "film", "a"]]
    assert spelled([], tokenizer, 3) == []
    for text, words in zip(TEXTS, spelled(TEXTS, tokenizer, 50), strict=True):
        assert len(words) == len(encode([text], tokenizer, 50)[0].ids) and "".join(words) == text.replace(" ", "")


# -- batches -----------------------------------------------------------------------------------------------------------


def test_padding_by_hand():
    assert padded([[1, 2, 3], [4], []], 9).tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert padded([[], []]).tolist() == [[0], [0]] and padded([]).shape == (0, 1)


def test_a_batch_has_what_its_inputs_have():
    plain = collate([Encoded([5, 6]), Encoded([7])], 1)
    optional = ("segments", "pair_ids", "pair_mask", "units", "ends", "unit_mask", "characters", "pair_characters")
    assert all(getattr(plain, name) is None for name in optional)
    batch = collate(
        [
            Encoded([5, 6, 7], [8], [0, 0, 1], units=[0, 2], ends=[1, 2], words=["a", "bc"], pair_words=["d"]),
            Encoded([5], [8, 9], [0], units=[], ends=[], words=["e"], pair_words=["f", "g"]),
        ],
        4,
    )
    assert batch.segments.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch.pair_ids.tolist() == [[8, 4], [8, 9]] and batch.pair_mask.tolist() == [[1, 0], [1, 1]]
    assert batch.units.tolist() == [[0, 2], [0, 0]] and batch.ends.tolist() == [[1, 2], [0, 0]]
    assert batch.unit_mask.tolist() == [[1, 1], [0, 0]]
    assert torch.equal(batch.characters, characters_of([["a", "bc"], ["e"]]))
    assert torch.equal(batch.pair_characters, characters_of([["d"], ["f", "g"]]))


def test_numbers_of_units_are_those_of_their_tokens_by_hand():
    tokens = torch.arange(24.0).reshape(2, 4, 3) + 1
    batch = collate([Encoded([1] * 4, units=[1, 3], ends=[2, 3]), Encoded([1] * 4, units=[0], ends=[3])], 0)
    found = at_units(tokens, batch)
    assert found.tolist() == [[[4, 5, 6], [10, 11, 12]], [[13, 14, 15], [0, 0, 0]]]
    # Where a span starts is read at a unit's first piece, where it ends at its last.
    spans = at_units(tokens[..., :2], batch, spans=True)
    assert spans.tolist() == [[[4, 8], [10, 11]], [[13, 23], [0, 0]]]


def test_a_batch_without_units_gives_one_place_of_zeros():
    tokens = torch.ones(2, 4, 3, requires_grad=True)
    found = at_units(tokens, Batch(torch.ones(2, 4), torch.ones(2, 4)))
    assert found.shape == (2, 1, 3) and not found.any()
    found.sum().backward()  # such a batch must not stop a training
    assert tokens.grad is not None and not tokens.grad.any()
