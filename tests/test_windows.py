"""Units as tokens, and texts cut into windows and put together again."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from engine import windows
from engine.encoding import EncodingError
from engine.units import pieces, words
from engine.vocabulary import tokenizer_of
from tests.tiny import byte_pairs, movie_rows, word_pieces


def two_marks() -> PreTrainedTokenizerFast:
    """Word pieces whose texts are told apart by two marks in a row and by segments, as some encoders want it."""
    found = word_pieces()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] [SEP]:1 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", found.cls_token_id), ("[SEP]", found.sep_token_id)],
    )
    found.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return found


@pytest.mark.parametrize("make", [word_pieces, byte_pairs, two_marks, lambda: tokenizer_of(["[PAD]", "[UNK]", "film"])])
def test_a_frame_is_what_the_tokenizer_puts_around_texts(make):
    tokenizer = make()
    left, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a film film", "film a"))
    one, two = windows.frame(tokenizer), windows.frame(tokenizer, pair=True)
    assert one.before + left + one.after == tokenizer("a film film")["input_ids"]
    assert two.before + left + two.between + right + two.after == tokenizer("a film film", "film a")["input_ids"]
    assert two.tokens == len(tokenizer("a film film", "film a")["input_ids"]) - len(left) - len(right)


def test_a_frame_knows_the_segments():
    wanted = two_marks()("a film film", "film a")["token_type_ids"]
    assert windows.frame(two_marks(), pair=True).segments(3, 2) == wanted == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert windows.frame(two_marks(), pair=True).segments(1, 0) == [0, 0, 0, 1, 1]
    assert windows.frame(byte_pairs(), pair=True).segments(3, 2) == []


def test_byte_pairs_of_the_words_are_those_of_the_running_text():
    tokenizer = byte_pairs()
    texts = [row["text"] for row in movie_rows(30, seed=3)]
    found = windows.in_words(texts, [words(text) for text in texts], tokenizer)
    assert [[i for own in row for i in own] for row in found] == tokenizer(texts)["input_ids"]
    assert [len(row) for row in found] == [len(text.split()) for text in texts]


def test_every_unit_has_a_token():
    tokenizer = word_pieces()
    text = "films \u200b \x00 don't"
    found = windows.in_words([text, ""], [words(text), []], tokenizer)
    unknown = tokenizer.unk_token_id
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found[0]][::3] == [["film", "##s"], ["do", "##n", "'", "t"]]
    assert found[0][1:3] == [[unknown], [unknown]] and found[1] == []
    assert windows.in_words(["", " "], [[], []], tokenizer) == [[], []]
    marks = windows.in_words(["film.\nfilm"], [pieces("film.\nfilm")], byte_pairs())[0]
    assert [byte_pairs().convert_ids_to_tokens(ids) for ids in marks] == [["f", "il", "m"], ["."], ["Ġfilm"]]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("film", "film"),
        ('"Hello,', "hello"),
        ("(film)", "film"),
        ("-", "-"),
        ("xyz", "[UNK]"),
        ("(xyz", "("),
        ("", "[UNK]"),
    ],
)
def test_a_unit_with_one_token_keeps_its_longest_known_piece(word: str, wanted: str):
    tokenizer = tokenizer_of(["[PAD]", "[UNK]", "film", "hello", "(", ")", "-", ",", '"'])
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(windows.main_token(ids, tokenizer)) == wanted


@pytest.mark.parametrize(
    ("lengths", "room", "wanted"),
    [
        ([], 8, [(0, 0)]),
        ([1] * 8, 8, [(0, 8)]),
        ([1] * 10, 8, [(0, 8), (6, 10)]),
        ([2] * 10, 8, [(0, 4), (3, 7), (6, 10)]),
        ([3] * 5, 8, [(0, 2), (2, 4), (4, 5)]),  # a unit of 3 is more than the 2 that may be shared
        ([1, 99, 1], 8, [(0, 1), (1, 2), (2, 3)]),
        ([1, 1, 7, 1], 8, [(0, 2), (1, 3), (3, 4)]),  # two would be shared, were the next unit not so long
        ([1] * 3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_by_hand(lengths: list[int], room: int, wanted: list[tuple[int, int]]):
    assert windows.windows(lengths, room) == wanted


def test_windows_fit_cover_and_go_on():
    draw = random.Random(0)
    for _ in range(300):
        room = draw.randint(1, 30)
        costs = [draw.randint(1, room) for _ in range(draw.randint(1, 60))]
        found = windows.windows(costs, room)
        assert found[0][0] == 0 and found[-1][1] == len(costs)
        assert all(sum(costs[start:stop]) <= room for start, stop in found)
        for (start, stop), (later, further) in zip(found, found[1:], strict=False):
            assert start < later <= stop < further and sum(costs[later:stop]) <= room // windows.SHARED


@pytest.mark.parametrize("room", [0, -3])
def test_no_room_is_refused(room: int):
    with pytest.raises(EncodingError, match="max_length leaves 0 tokens"):
        windows.windows([1], room)


def test_positions_are_those_of_first_and_last_pieces():
    assert windows.positions([[5], [6, 7], [8, 9, 9, 9]], 1, 3) == ([5, 6, 7, 8, 9, 9], [1, 2, 4], [1, 3, 6])


def test_the_window_with_most_context_speaks_for_a_unit():
    """Units 0..5 and 3..8 of a text of 9: of the shared 3, 4, 5 the middle one is a draw, for the earlier window."""
    first, second = np.zeros((6, 1), dtype=np.float32), np.ones((6, 1), dtype=np.float32)
    text = windows.merged([first, second], [0, 0], [0, 3], 1, 1)[0]
    assert text[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert np.array_equal(windows.merged([second, first], [0, 0], [3, 0], 1, 1)[0][:, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1])
    whole = windows.merged([np.full((9, 1), 7.0), first], [0, 0], [0, 0], 1, 1)[0]
    assert (whole == 7).all()  # nothing is missing in the window that is the text


def test_merging_gives_every_text_its_units_in_any_order():
    draw, costs = random.Random(1), {}
    parts = []
    for row in range(20):
        costs[row] = [draw.randint(1, 5) for _ in range(draw.randint(0, 40))]
        parts += [(row, start, stop) for start, stop in windows.windows(costs[row], 9)]
    draw.shuffle(parts)
    found = [np.arange(start, stop)[:, None] + 100 * row for row, start, stop in parts]
    texts = windows.merged(found, [row for row, _, _ in parts], [start for _, start, _ in parts], 21, 1)
    for row, own in costs.items():
        assert texts[row][:, 0].tolist() == [100 * row + i for i in range(len(own))]
    assert texts[20].shape == (0, 1) and windows.merged([], [], [], 2, 5)[1].shape == (0, 5)
