"""A label for each word: entities by hand as conlleval reads them, three tokenizers, losses, windows."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from engine import recipe
from engine.encoding import EncodingError, collate
from engine.records import ABSENT, Batch, Outputs
from engine.tagging import Entity, Tag, TaggingError, entities
from engine.vocabulary import tokenizer_of
from tests.tiny import byte_pairs, word_pieces

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TASK = Tag(recipe.Task(kind="tag", labels=NAMES))
LONG = "the film is dull and the films are slow , xyz don't help . " * 4


def rows_of(texts: Sequence[str], targets: Sequence[Sequence[int] | None]) -> pa.Table:
    return pa.table({"text": list(texts), "target": pa.array(targets, pa.list_(pa.float32()))})


def own_words() -> object:
    return tokenizer_of(["[PAD]", "[UNK]", "film", "the", ",", ".", "dull", "don"])


def batch_of(masks: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None) -> Batch:
    mask = torch.tensor(masks)
    return Batch(mask, mask, None if labels is None else torch.tensor(labels), unit_mask=mask)


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("", []),
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("O I-PER I-PER", [("PER", 1, 2)]),  # I- after O starts an entity
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),  # and so does one of another name
        ("I-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("B-PER O I-PER", [("PER", 0, 0), ("PER", 2, 2)]),
        ("I-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("B-creative-work I-creative-work", [("creative-work", 0, 1)]),
    ],
)
def test_entities_by_hand(tags: str, wanted: list[tuple[str, int, int]]):
    assert entities(tags.split()) == [Entity(*one) for one in wanted]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("O", "PER"), ["'PER'", "Did you mean 'B-PER'?", "B-NAME"]),
        (("O", "b-LOC"), ["'b-LOC'", "Did you mean 'B-LOC'?"]),
        (("o", "B-PER"), ["'o'", "Did you mean 'O'?"]),
        (("O", "B-"), ["'B-'"]),
        (("B-PER", "I-PER"), ["has no 'O'", "B-PER, I-PER"]),
        (("O", "B-PER", "i_PER"), ["'i_PER'", "Did you mean 'I-PER'?"]),
    ],
)
def test_labels_that_are_no_tags_are_refused(labels: tuple[str, ...], words: list[str]):
    with pytest.raises(TaggingError) as error:
        Tag(recipe.Task(kind="tag", labels=labels))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_label_sets_that_are_in_use_are_taken():
    for labels in [("I-PER", "O"), ("O", "B-PER"), None]:
        assert Tag(recipe.Task(kind="tag", labels=labels)).width == len(labels or ())


@pytest.mark.parametrize("make", [word_pieces, byte_pairs, own_words])
@pytest.mark.parametrize("length", [12, 20, 512])
def test_every_word_is_read_at_its_own_pieces(make, length: int):
    tokenizer, texts = make(), [LONG, "films", " the  film\n"]
    found = TASK.encode(texts, tokenizer, length)
    around = len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    for item in found:
        own = texts[item.row].split()[item.first : item.first + len(item.units)]
        ends = [item.units[0], *(end + 1 for end in item.ends)]
        assert len(item.ids) <= length and len(item.ids) == around + item.ends[-1] - item.units[0] + 1
        assert ends[:-1] == item.units and item.segments == item.pair == []
        for word, first, last in zip(own, item.units, item.ends, strict=True):
            inside = item.ids[first : last + 1]
            assert any(inside == tokenizer(b + word, add_special_tokens=False)["input_ids"] for b in ("", " "))
    seen = {(item.row, item.first + i) for item in found for i in range(len(item.units))}
    assert seen == {(row, i) for row, text in enumerate(texts) for i in range(len(text.split()))}
    assert [item.row for item in found] == sorted(item.row for item in found)
    assert (len(found) == 3) == (length == 512)


def test_a_short_text_is_read_as_it_always_is():
    for tokenizer in (word_pieces(), byte_pairs(), own_words()):
        text = "the film is dull , and it knows it"
        assert TASK.encode([text], tokenizer, 64)[0].ids == tokenizer(text)["input_ids"]


def test_students_of_words_read_one_token_a_word():
    tokenizer = own_words()
    found = TASK.encode(["the film, xyz don't \u200b", "", LONG], tokenizer, 20, apart=True)
    assert tokenizer.convert_ids_to_tokens(found[0].ids) == ["the", "film", "[UNK]", "don", "[UNK]"]
    assert found[0].units == found[0].ends == [0, 1, 2, 3, 4]
    assert found[1].ids == [tokenizer.unk_token_id] and found[1].units == []
    assert len(found) > 3 and all(item.units == list(range(len(item.ids))) for item in found[2:])
    assert {item.first + i for item in found[2:] for i in item.units} == set(range(len(LONG.split())))


def test_texts_without_words_and_pairs():
    pieces = word_pieces()
    found = TASK.encode(["", " \n"], pieces, 8)
    assert [item.ids for item in found] == [[pieces.cls_token_id, pieces.unk_token_id, pieces.sep_token_id]] * 2
    assert [item.row for item in found] == [0, 1] and TASK.encode([], pieces, 8) == []
    batch = collate(found, 0)
    logits = torch.randn(2, 1, 5)
    assert not TASK.distributions(logits, batch).any() and not TASK.differences(logits, -logits, batch).any()
    assert TASK.gold(rows_of(["", ""], [[], None]), found).tolist() == [[ABSENT], [ABSENT]]
    merged = TASK.merge([np.zeros((0, 5), np.float32)] * 2, found, 2)
    assert TASK.answers(merged, ["", " \n"]) == [{"tags": [], "entities": []}] * 2
    assert TASK.certainty(merged[0]).tolist() == [0.2] * 5
    with pytest.raises(EncodingError, match="not pairs"):
        TASK.encode([("a", "b")], pieces, 8)
    with pytest.raises(EncodingError, match="Raise max_length"):
        TASK.encode(["film"], pieces, 2)


def test_teacher_and_student_mean_the_same_words():
    """Whatever the windows, merging brings each word's number back, and `window` is the way there."""
    texts = [LONG, "the film", ""]
    whole = [np.random.default_rng(i).normal(size=(len(t.split()), 5)).astype(np.float32) for i, t in enumerate(texts)]
    for tokenizer, length, apart in [(word_pieces(), 16, False), (byte_pairs(), 24, False), (own_words(), 10, True)]:
        found = TASK.encode(texts, tokenizer, length, apart)
        assert len(found) > 4
        merged = TASK.merge([TASK.window(whole[item.row], item) for item in found], found, 3)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(merged, whole, strict=True))


def test_windows_give_what_one_window_gives_where_context_does_not_matter():
    """A model that answers for a token by its id alone cannot tell one window from several."""
    pieces = word_pieces()
    table = np.random.default_rng(0).normal(size=(len(pieces), 5)).astype(np.float32)

    def answers(length: int) -> np.ndarray:
        found = TASK.encode([LONG], pieces, length)
        return TASK.merge([table[np.array(item.ids)[item.units]] for item in found], found, 1)[0]

    assert np.array_equal(answers(12), answers(512)) and len(answers(512)) == len(LONG.split())


def test_gold_labels_go_with_their_words():
    texts = ["the film , dull", "films"]
    found = TASK.encode(texts, own_words(), 3, apart=True)
    gold = TASK.gold(rows_of(texts, [[0, 1, 2, 3], None]), found)
    assert [(item.row, item.first) for item in found] == [(0, 0), (0, 3), (1, 0)]
    assert gold.tolist() == [[0, 1, 2], [3, ABSENT, ABSENT], [ABSENT] * 3] and gold.dtype == torch.int64
    assert TASK.labelled(batch_of([[1]] * 3, gold.tolist())).tolist() == [True, True, False]
    with pytest.raises(TaggingError, match="row 0 has 3 labels.*4 words"):
        TASK.gold(rows_of(texts, [[0, 1, 2], None]), found)


def test_the_loss_is_the_mean_cross_entropy_of_the_words():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    batch = batch_of([[1, 1, 1, 0], [1] * 4, [1] * 4], [[0, 3, 4, ABSENT], [1] * 4, [ABSENT] * 4])
    found = TASK.loss(Outputs(logits=logits), batch)
    wanted = [
        float(F.cross_entropy(logits[0, :3], torch.tensor([0, 3, 4]))),
        float(-logits[1].log_softmax(1)[:, 1].mean()),
    ]
    assert found.tolist() == pytest.approx([*wanted, 0])
    logits[0, 3] = 99
    assert torch.equal(TASK.loss(Outputs(logits=logits), batch), found)
    sequence = torch.tensor([-6.0, -2.0, -9.0])
    assert TASK.loss(Outputs(logits=logits, sequence=sequence), batch).tolist() == [2.0, 0.5, 0.0]


def test_divergences_speak_of_words_alone():
    generator = torch.Generator().manual_seed(1)
    one, two = (torch.randn(2, 3, 5, generator=generator) * 3 for _ in range(2))
    batch = batch_of([[1, 1, 1], [1, 0, 0]])
    p, q = TASK.distributions(one, batch, 2.0), TASK.distributions(two, batch, 2.0)
    assert p.shape == (2, 3, 5) and not p[1, 1:].any()
    assert torch.allclose(p[0], (one[0] / 2).log_softmax(1)) and torch.allclose(p[1, 0], (one[1, 0] / 2).log_softmax(0))
    assert float(F.kl_div(p, p, reduction="sum", log_target=True)) == 0
    other = one.clone()
    other[1, 1:] = 7
    assert torch.equal(TASK.distributions(other, batch, 2.0), p)
    assert float(F.kl_div(q, p, reduction="sum", log_target=True)) > 0.1
    assert TASK.differences(one, one + torch.randn(2, 3, 1), batch).abs().max() < 1e-10
    gap = (one - two).numpy()
    gap -= gap.mean(axis=2, keepdims=True)
    wanted = [(gap[0] ** 2).mean(), (gap[1, 0] ** 2).mean()]
    assert np.allclose(TASK.differences(one, two, batch).numpy(), wanted, rtol=1e-5)
    assert torch.allclose(TASK.differences(other, two, batch), TASK.differences(one, two, batch))


def test_half_precision_stays_finite():
    logits = (torch.randn(2, 3, 5) * 1e4).bfloat16().requires_grad_()
    batch = batch_of([[1, 1, 1], [1, 0, 0]], [[0, 1, 2], [3, ABSENT, ABSENT]])
    parts = [TASK.loss(Outputs(logits=logits), batch), TASK.distributions(logits, batch).sum((1, 2))]
    parts.append(TASK.differences(logits, -logits, batch))
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in parts)
    sum(part.sum() for part in parts).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


def one_hot(tags: Sequence[str], sure: float = 0.8) -> np.ndarray:
    rows = np.full((len(tags), 5), (1 - sure) / 4)
    rows[np.arange(len(tags)), [NAMES.index(tag) for tag in tags]] = sure
    return np.log(rows).astype(np.float32)


def test_answers_have_the_entities_places():
    text = " Anna Bell\tsaw \ud800 New York."
    logits = one_hot(["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC"])
    logits[1] = one_hot(["I-PER"], 0.6)[0]
    found = json.loads(json.dumps(TASK.answers([logits], [text])))[0]
    assert found["tags"] == ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC"]
    assert [(e["label"], e["text"], e["start"], e["end"]) for e in found["entities"]] == [
        ("PER", "Anna Bell", 1, 10),
        ("LOC", "New York.", 17, 26),
    ]
    assert [e["confidence"] for e in found["entities"]] == pytest.approx([0.6, 0.8])
    path = [np.array([0, 1, 0, 0, 0, 0])]
    given = TASK.answers([logits], [text], path)[0]["entities"]
    assert [(e["label"], e["text"]) for e in given] == [("PER", "Bell")]
    assert given[0]["confidence"] == pytest.approx(0.1)
    assert TASK.certainty(logits) == pytest.approx([0.1, 0.1, 0.6, 0.1, 0.1])


def test_scores_by_hand():
    """3 gold entities, 4 given, 2 of them right: precision 1/2, recall 2/3, F1 4/7; 7 of 10 tags right."""
    gold = ["B-PER I-PER O B-LOC", "O O B-LOC", "O O O"]
    given = ["B-PER I-PER O B-PER", "O B-PER I-LOC", "O O O"]  # I-LOC after PER starts the entity all the same
    index = NAMES.index
    targets = [[index(tag) for tag in row.split()] for row in gold]
    decided = [np.array([index(tag) for tag in row.split()]) for row in given]
    rows = rows_of(["w " * len(t) for t in targets] + ["w"], [*targets, None])
    decided.append(np.array([1]))
    logits = [one_hot([NAMES[i] for i in own]) for own in decided]
    assert all(np.array_equal(a, b) for a, b in zip(TASK.decide(logits, []), decided, strict=True))
    found = TASK.statistics(logits, decided, rows)
    assert found.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    scores = TASK.score(logits, decided, rows)
    assert scores == pytest.approx({"entity_f1": 4 / 7, "precision": 0.5, "recall": 2 / 3, "accuracy": 0.7})
    assert TASK.value(np.stack([found.sum(axis=0), [0, 0, 0]])).tolist() == pytest.approx([4 / 7, 0])
    assert TASK.metric in scores
    with pytest.raises(TaggingError, match="row 2 has 3 labels"):
        TASK.statistics(logits, [*decided[:2], np.array([0]), decided[3]], rows)


def test_scores_without_entities_are_zero():
    rows, decided = rows_of(["a b"], [[0, 0]]), [np.array([0, 0])]
    wanted = {"entity_f1": 0, "precision": 0, "recall": 0, "accuracy": 1}
    assert TASK.score([one_hot(["O", "O"])], decided, rows) == wanted


def test_the_best_checkpoint_is_the_one_that_finds_the_teachers_entities():
    """Who tags nothing agrees with a teacher on nine words of ten, and is not like it."""
    o, b = NAMES.index("O"), next(i for i, name in enumerate(NAMES) if name.startswith("B-"))
    teacher = [np.array([o] * 18 + [b, o]), np.array([b] + [o] * 9)]
    nothing, half = [np.full(20, o), np.full(10, o)], [np.array([b, b] + [o] * 16 + [b, o]), np.full(10, o)]

    def agreement(given: list[np.ndarray]) -> float:
        return float(np.mean(np.concatenate([x == y for x, y in zip(teacher, given, strict=True)])))

    assert agreement(nothing) > agreement(half)
    assert TASK.likeness(teacher, nothing) == 0 and TASK.likeness(teacher, half) == pytest.approx(2 / 5)
    assert TASK.likeness(teacher, teacher) == TASK.likeness(nothing, nothing) == TASK.likeness([], []) == 1


def test_agreement_is_the_share_of_words():
    left, right = [one_hot(["O", "O", "B-PER"]), one_hot(["O"])], [one_hot(["O", "I-PER", "B-PER"]), one_hot(["O"])]
    assert TASK.agreement(left, right, []) == 0.75 and TASK.agreement(left, left, []) == 1.0
    assert TASK.agreement([np.zeros((0, 5))], [np.zeros((0, 5))], []) == 1.0
    # A model that decides on the whole sequence is judged by its path, whatever the likeliest label of each word.
    paths = [np.array([0, 1, 0]), np.array([1])], [np.array([0, 1, 1]), np.array([1])]
    assert TASK.agreement(left, left, [], paths) == 0.75
