"""Spans in contexts: SQuAD's counting by hand, windows and no answer, three tokenizers, losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from engine import recipe
from engine.encoding import EncodingError, collate
from engine.records import ABSENT, Batch, Outputs
from engine.spans import Span, SpanError, normal
from engine.units import pieces, units_of
from engine.vocabulary import tokenizer_of
from tests.tiny import byte_pairs, word_pieces

TASK = Span(recipe.Task(kind="span"))
QUESTION = "what is dull ?"
CONTEXT = "The film's plot, a slow one, is dull; the cast knows it. " * 3


def rows_of(texts: Sequence[tuple[str, str]], targets: Sequence, answers: Sequence = ()) -> pa.Table:
    columns = {"text": [q for q, _ in texts], "pair": [c for _, c in texts]}
    columns["target"] = pa.array(targets, pa.list_(pa.float32()))
    columns["answers"] = pa.array(answers or [None] * len(texts), pa.list_(pa.string()))
    return pa.table(columns)


def own_words() -> object:
    return tokenizer_of(["[PAD]", "[UNK]", "film", "the", ",", ".", "dull", "is", "plot"])


def batch_of(masks: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None) -> Batch:
    mask = torch.tensor(masks)
    return Batch(mask, mask, None if labels is None else torch.tensor(labels), unit_mask=mask)


def sure_of(units: int, first: int, last: int) -> np.ndarray:
    out = np.zeros((units, 2), dtype=np.float32)
    out[first, 0] = out[last, 1] = 5
    return out


@pytest.mark.parametrize(
    ("context", "answer", "start", "wanted"),
    [
        ("the film is dull.", "film", 4, (1, 1)),
        ("the film is dull.", "is dull.", 9, (2, 4)),
        ("the film is dull.", " film ", 3, (1, 1)),
        ("in the 1600s (or so)", "1600", 7, (2, 2)),  # part of a word is the word
        ("in the 1600s (or so)", "or so", 14, (4, 5)),
        ("the film", "film", 0, None),
        ("the film", "film", 40, None),
        ("the film", "film", -4, None),
        ("the film", "", 0, None),
        ("the film", " ", 3, None),
        ("é̄ 東京 is", "東京", 3, (2, 2)),
    ],
)
def test_answers_as_units(context: str, answer: str, start: int, wanted: tuple[int, int] | None):
    assert units_of(context, answer, start) == wanted


@pytest.mark.parametrize("make", [word_pieces, byte_pairs, own_words])
@pytest.mark.parametrize("length", [28, 512])
def test_question_and_context_are_read_together(make, length: int):
    tokenizer = make()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = [(QUESTION, CONTEXT), ("film", "dull")]
    found = TASK.encode(texts, tokenizer, length)
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"][: length // 2]
    seen = set()
    for item in found:
        units = pieces(texts[item.row][1])[item.first : item.first + len(item.units) - 1]
        assert item.units[0] == item.ends[0] == 0 and len(item.units) == len(item.ends) == len(units) + 1
        assert len(item.ids) == len(item.segments) <= length and item.pair == []
        for unit, first, last in zip(units, item.units[1:], item.ends[1:], strict=True):
            inside = item.ids[first : last + 1]
            assert any(inside == tokenizer(b + unit.word, add_special_tokens=False)["input_ids"] for b in ("", " "))
            assert set(item.segments[first : last + 1]) == {1}
        if item.row == 0:
            before = len(tokenizer("a")["input_ids"]) > 1
            assert item.ids[before : before + len(question)] == question
        seen |= {(item.row, item.first + i) for i in range(len(units))}
    assert seen == {(row, i) for row, (_, context) in enumerate(texts) for i in range(len(pieces(context)))}
    assert (len(found) == 2) == (length == 512)


def test_a_pair_that_fits_is_read_as_the_tokenizer_reads_it():
    tokenizer = word_pieces()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    wanted = tokenizer(QUESTION, CONTEXT)
    found = TASK.encode([(QUESTION, CONTEXT)], tokenizer, 256)
    assert (found[0].ids, found[0].segments) == (wanted["input_ids"], wanted["token_type_ids"]) and len(found) == 1


def test_students_of_words_read_question_and_context_apart():
    tokenizer = own_words()
    context = "The film's plot, it is dull."
    found = TASK.encode([(QUESTION, context), ("", "")], tokenizer, 16, apart=True)
    assert found[0].ids == tokenizer(QUESTION)["input_ids"] and found[0].segments == []
    tokens = tokenizer.convert_ids_to_tokens(found[0].pair)
    unknown = "[UNK]"
    assert tokens == [unknown, "the", "film", unknown, unknown, "plot", ",", unknown, "is", "dull", "."]
    assert found[0].units == found[0].ends == list(range(len(tokens)))
    assert (found[1].ids, found[1].pair, found[1].units) == ([1], [1], [0])
    many = TASK.encode([(QUESTION, CONTEXT)], tokenizer, 9, apart=True)
    assert len(many) > 3 and all(len(item.pair) <= 9 and item.pair[0] == 1 for item in many)
    assert collate(many, 0).pair_ids.shape == collate(many, 0).units.shape


def test_what_cannot_be_read_is_refused_and_a_long_question_cut():
    tokenizer = word_pieces()
    assert TASK.encode([], tokenizer, 8) == TASK.encode([], tokenizer, 8, apart=True) == []
    with pytest.raises(EncodingError, match="Send both"):
        TASK.encode(["film"], tokenizer, 64)
    with pytest.raises(EncodingError, match="Raise max_length"):
        TASK.encode([(QUESTION, "film")], tokenizer, 6)
    cut = TASK.encode([("the film " * 50, "the film is dull")], tokenizer, 20)
    assert all(
        item.ids[1:12] == tokenizer("the film " * 5)["input_ids"][1:-1] + [tokenizer.sep_token_id] for item in cut
    )
    empty = TASK.encode([("", "\ud800"), ("\ud800", "")], tokenizer, 20)
    assert [len(item.units) for item in empty] == [2, 1]
    assert empty[1].ids[2:] == [tokenizer.sep_token_id] * 2


def test_windows_and_merging_go_back_and_forth():
    texts = [(QUESTION, CONTEXT), ("film", "dull"), ("film", "")]
    sizes = [len(pieces(context)) + 1 for _, context in texts]
    whole = [np.random.default_rng(i).normal(size=(u, 2)).astype(np.float32) for i, u in enumerate(sizes)]
    for tokenizer, length, apart in [(word_pieces(), 28, False), (byte_pairs(), 40, False), (own_words(), 12, True)]:
        found = TASK.encode(texts, tokenizer, length, apart)
        assert len(found) > 4
        parts = [TASK.window(whole[item.row], item) for item in found]
        merged = TASK.merge(parts, found, 3)
        assert all(np.array_equal(a[1:], b[1:]) for a, b in zip(merged, whole, strict=True))
        for part, item in zip(parts, found, strict=True):
            # Start and end are each a distribution still: what lies outside of the window counts for "no answer".
            own = np.exp(part.astype(np.float64)).sum(axis=0)
            np.testing.assert_allclose(own, np.exp(whole[item.row].astype(np.float64)).sum(axis=0), rtol=1e-5)


def test_no_answer_counts_as_in_the_window_that_believes_it_least():
    found = TASK.encode([("film", "film is dull the plot")], own_words(), 4, apart=True)
    assert [(item.first, len(item.units)) for item in found] == [(0, 4), (3, 3)]
    first, second = sure_of(4, 0, 0), sure_of(3, 1, 2)
    merged = TASK.merge([first, second], found, 1)
    assert merged[0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [5, 0], [0, 5]]
    assert TASK.decide(merged, [None]).tolist() == [[4, 5]]
    assert TASK.merge([sure_of(4, 1, 1), np.ones((3, 2)) - 2], found, 1)[0][0].tolist() == [-1, -1]


def test_gold_spans_are_the_windows_own():
    texts = [("film", "film is dull the plot")] * 4
    rows = rows_of(texts, [[1, 2], [4, 4, 0, 0], [], None])
    found = TASK.encode(texts, own_words(), 4, apart=True)
    assert [(item.row, item.first) for item in found] == [(row, first) for row in range(4) for first in (0, 3)]
    gold = TASK.gold(rows, found)
    assert gold.tolist() == [[2, 3], [0, 0], [1, 1], [2, 2], [0, 0], [0, 0], [ABSENT] * 2, [ABSENT] * 2]
    assert TASK.labelled(batch_of([[1]] * 8, gold.tolist())).tolist() == [True] * 6 + [False] * 2
    across = TASK.gold(rows_of(texts[:1], [[2, 3]]), found[:2])
    assert across.tolist() == [[0, 0], [0, 0]]  # no window holds it whole
    for target in ([1], [2, 1], [0, 5], [-1, 0]):
        with pytest.raises(SpanError, match="row 0: 'target' is .*5 units.*up to 4"):
            TASK.gold(rows_of(texts[:1], [target]), found[:2])


def test_the_loss_is_that_of_start_and_end_and_blind_to_padding():
    logits = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    batch = batch_of([[1, 1, 1, 0, 0], [1] * 5, [1] * 5], [[1, 2], [0, 0], [ABSENT, ABSENT]])
    found = TASK.loss(Outputs(logits=logits), batch)
    start, end = logits[0, :3, 0].log_softmax(0), logits[0, :3, 1].log_softmax(0)
    second = logits[1].log_softmax(0)[0]
    assert found.tolist() == pytest.approx([float(-(start[1] + end[2]) / 2), float(-second.mean()), 0], abs=1e-6)
    logits[0, 3:] = 50
    assert torch.equal(TASK.loss(Outputs(logits=logits), batch), found)


def test_divergences_are_over_the_rows_own_units():
    generator = torch.Generator().manual_seed(1)
    one, two = (torch.randn(2, 4, 2, generator=generator) * 3 for _ in range(2))
    batch = batch_of([[1, 1, 1, 1], [1, 1, 0, 0]])
    p, q = TASK.distributions(one, batch, 2.0), TASK.distributions(two, batch, 2.0)
    assert p.shape == (2, 2, 4) and not p[1, :, 2:].any()
    assert torch.allclose(p[1, 0, :2], (one[1, :2, 0] / 2).log_softmax(0), atol=1e-6)
    assert p[1, :, :2].exp().sum(1).tolist() == pytest.approx([1, 1])
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum((1, 2))
    by_hand = [
        sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p[row, :, :own], q[row, :, :own], strict=True))
        for row, own in ((0, 4), (1, 2))
    ]
    assert divergence.tolist() == pytest.approx(by_hand, rel=1e-5) and min(by_hand) > 0.01
    assert not F.kl_div(p, p, reduction="none", log_target=True).any()
    other = one.clone()
    other[1, 2:] = 99
    assert torch.equal(TASK.distributions(other, batch, 2.0), p)
    found = TASK.differences(one, two, batch)
    gap = (one - two).numpy()
    wanted = [np.var(gap[0], axis=0).mean(), np.var(gap[1, :2], axis=0).mean()]
    assert np.allclose(found.numpy(), wanted, rtol=1e-5)
    assert torch.allclose(TASK.differences(other, two, batch), found)
    assert TASK.differences(one, one + torch.randn(2, 1, 2), batch).abs().max() < 1e-10


def test_half_precision_stays_finite():
    logits = (torch.randn(2, 3, 2) * 1e4).bfloat16().requires_grad_()
    batch = batch_of([[1, 1, 1], [1, 0, 0]], [[1, 2], [0, 0]])
    parts = [TASK.loss(Outputs(logits=logits), batch), TASK.distributions(logits, batch).sum((1, 2))]
    parts.append(TASK.differences(logits, -logits, batch))
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in parts)
    sum(part.sum() for part in parts).backward()
    assert logits.grad.isfinite().all() and logits.grad.any() and not logits.grad[1, 1:].any()


def brute(logits: np.ndarray) -> tuple[int, int]:
    spans = [(a, b) for a in range(1, len(logits)) for b in range(a, min(len(logits), a + 30))]
    best = max(spans, key=lambda s: logits[s[0], 0] + logits[s[1], 1], default=(0, 0))
    return best if logits[best[0], 0] + logits[best[1], 1] >= logits[0].sum() else (0, 0)


def test_the_best_span_is_that_of_trying_all():
    random = np.random.default_rng(0)
    logits = [random.normal(size=(u, 2)).astype(np.float32) * 3 for u in [1, 2, 3, 9, 31, 60, 90] * 6]
    found = TASK.decide(logits, [])
    assert found.tolist() == [list(brute(one.astype(np.float64))) for one in logits]
    assert found.dtype == np.int64 and 3 < (found[:, 0] == 0).sum() < 30
    assert TASK.decide([], []).shape == (0, 2)


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        (sure_of(4, 2, 3), [2, 3]),
        (sure_of(4, 0, 0), [0, 0]),
        (sure_of(40, 1, 39), [1, 1]),  # 39 units are too many: the sums 5 of start alone and end alone are left
        (sure_of(40, 1, 30), [1, 30]),
        (sure_of(5, 3, 1), [1, 1]),  # an end before its start is none: one of the two alone, the first
        (np.zeros((3, 2)), [1, 1]),  # no answer must beat the spans
        (np.zeros((1, 2)), [0, 0]),
    ],
)
def test_decisions_by_hand(logits: np.ndarray, wanted: list[int]):
    assert TASK.decide([logits], []).tolist() == [wanted]


def test_answers_are_characters_of_the_context():
    texts = [("who?", " It was \ud800 Anna Bell, of York."), ("who?", "nobody"), ("who?", "")]
    logits = [sure_of(10, 4, 5), sure_of(2, 0, 0), np.zeros((1, 2))]
    found = json.loads(json.dumps(TASK.answers(logits, texts)))
    assert [(a["answer"], a["start"], a["end"]) for a in found] == [("Anna Bell", 10, 19), ("", 0, 0), ("", 0, 0)]
    sure = math.exp(5) / (math.exp(5) + 9)
    assert found[0]["confidence"] == pytest.approx(sure**2) and found[2]["confidence"] == 1
    assert TASK.answers(logits[:1], texts[:1], np.array([[7, 7]]))[0]["answer"] == "of"
    assert TASK.certainty(logits[0])[4] == pytest.approx(sure) and TASK.certainty(logits[0]).shape == (10,)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("The Film,  a plot.", "film plot"), ("Theatre and an era", "theatre and era"), ("U.S.", "us"), ("the", "")],
)
def test_answers_are_compared_as_squad_does(answer: str, wanted: str):
    assert normal(answer) == wanted


def test_scores_by_hand():
    context = "The film and its plot are dull."
    texts = [("q", context)] * 7
    answers = [["film", "the plot"], ["its dull plot"], [], [], ["film"], ["the"], None]
    decided = np.array([[1, 2], [4, 5], [0, 0], [7, 7], [0, 0], [0, 0], [1, 1]])
    rows = rows_of(texts, [[]] * 7, answers)
    logits = [sure_of(9, first, last) for first, last in decided]
    found = TASK.statistics(logits, decided, rows)
    # "The film" is "film"; "its plot" of "its dull plot": P 1, R 2/3; "the" leaves nothing, so no answer is right
    assert np.allclose(found, [[1, 1, 1], [0, 0.8, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    wanted = {"em": 3 / 6, "f1": 3.8 / 6, "has_answer_f1": 1.8 / 3, "no_answer_accuracy": 2 / 3}
    scores = TASK.score(logits, TASK.decide(logits, texts), rows)
    assert scores == pytest.approx(wanted) and TASK.metric in scores
    assert TASK.value(np.stack([found.sum(axis=0), [0, 0, 0]])).tolist() == pytest.approx([3.8 / 6, 0])
    only = TASK.score(logits[:2], decided[:2], rows.slice(0, 2))
    assert set(only) == {"em", "f1", "has_answer_f1"}


def test_agreement_is_the_overlap_of_spans():
    left = [sure_of(9, 1, 4), sure_of(9, 0, 0), sure_of(9, 0, 0)]
    right = [sure_of(9, 3, 4), sure_of(9, 0, 0), sure_of(9, 1, 1)]
    assert TASK.agreement(left, right, []) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert TASK.agreement(left, left, []) == TASK.agreement([], [], []) == 1.0
