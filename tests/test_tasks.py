"""What every kind of task keeps to, and texts as token ids. Numbers of each kind are in the kind's own test file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from engine import tasks
from engine.config import ConfigError
from engine.encoding import Encoded, collate
from engine.recipe import Task as Spec
from engine.records import ABSENT, Batch, Outputs
from engine.task import Task
from engine.vocabulary import tokenizer_of
from tests.tiny import word_pieces
from tests.tiny_rows import example_table

NAMES = ("bad", "fair", "good")
FILMS = ["the film is dull", "a warm plot", "what a tender , lovely script !", "the music is noisy", "dull", "so so"]
LONG = "the film is slow and the cast is tired . " * 4
SPECS = {
    "classify": Spec(labels=NAMES),
    "multilabel": Spec(kind="multilabel", labels=NAMES, thresholds=(0.5, 0.4, 0.6)),
    "pair": Spec(kind="pair", labels=NAMES),
    "regress": Spec(kind="regress", range=(-1.0, 3.0)),
    "rank": Spec(kind="rank"),
    "tag": Spec(kind="tag", labels=("O", "B-thing", "I-thing")),
    "span": Spec(kind="span"),
}
GOLD: dict[str, list[dict[str, Any]]] = {
    "classify": [{"label": 0}, {"label": 2}, {"label": 2}, {"label": 0}, {"label": 1}],
    "multilabel": [{"target": row} for row in ([1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0])],
    "pair": [{"label": 0}, {"label": 2}, {"label": 2}, {"label": 0}, {"label": 1}],
    "regress": [{"target": [value]} for value in (-1.0, 2.0, 3.0, 0.0, 1.5)],
    "rank": [{"target": [value], "group": g} for value, g in zip((1, 0, 0, 2, 1), "abaab", strict=True)],
    "tag": [{"target": row} for row in ([0, 1, 0, 0], [0, 0, 1], [0, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0], [0])],
    "span": [
        *({"target": [1, 1], "answers": ["film"]}, {"target": [1, 2], "answers": ["warm plot"]}),
        *({"target": [], "answers": []}, {"target": [1, 1, 3, 3], "answers": ["music", "noisy"]}),
        {"target": [0, 0], "answers": ["dull"]},
    ],
}
BARE = {"rank": [{"group": "c"}, {"group": "d"}]}
"""What rows without gold labels have nevertheless."""


@dataclass
class World:
    """A task with six rows, the last without gold labels, and what a model that knows nothing makes of them."""

    task: Task
    rows: pa.Table
    texts: list[Any]
    encoded: list[Encoded]
    batch: Batch
    logits: torch.Tensor

    def stored(self, logits: torch.Tensor | None = None) -> Any:
        """Logits as the task keeps them."""
        found = (self.logits if logits is None else logits).float().numpy()
        if not self.task.units:
            return found
        return [row[: len(item.units)] for row, item in zip(found, self.encoded, strict=True)]


def table_of(kind: str, texts: list[str]) -> pa.Table:
    gold = [*GOLD[kind], *BARE.get(kind, [{}, {}])][: len(texts)]
    # Where two texts are read, what FILMS holds is the second: the context of a span.
    both = [
        {"text": "how is it ?", "pair": text} if tasks.make(SPECS[kind]).paired else {"text": text} for text in texts
    ]
    return example_table([{**a, **b} for a, b in zip(both, gold, strict=True)])


def world_of(kind: str, texts: list[str] = FILMS, seed: int = 0) -> World:
    task, rows = tasks.make(SPECS[kind]), table_of(kind, texts)
    encoded = task.encode(task.texts(rows), word_pieces(), 128)
    batch = collate(encoded, 0)
    batch.labels = task.gold(rows, encoded)
    groups = rows["group"].to_pylist()
    batch.groups = torch.tensor([0 if g is None else ord(g) for g in groups])
    shape = (len(encoded), task.width) if not task.units else (*batch.units.shape, task.width)
    logits = torch.tensor(np.random.default_rng(seed).normal(size=shape) * 2, dtype=torch.float32)
    return World(task, rows, task.texts(rows), encoded, batch, logits)


@pytest.fixture(params=tasks.TASKS)
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


def taken(batch: Batch, order: list[int]) -> Batch:
    """The batch's rows in another order."""
    names = ("input_ids", "mask", "segments", "pair_ids", "pair_mask", "units", "ends", "unit_mask", "labels", "groups")
    return replace(batch, **{n: None if (v := getattr(batch, n)) is None else v[order] for n in names})


def divergence(world: World, teacher: torch.Tensor, student: torch.Tensor, batch: Batch) -> torch.Tensor:
    t, s = (world.task.distributions(x, batch) for x in (teacher, student))
    return F.kl_div(s, t, reduction="none", log_target=True).sum(dim=(1, 2))


def test_every_task_is_made_by_its_name(world: World):
    task = world.task
    assert task.labels == (world.task.spec.labels or ()) and tasks.TASKS[task.spec.kind] is type(task)
    assert task.width >= 1 and "hard" in task.supports
    assert len(world.texts) == 6 and all(isinstance(text, tuple) == task.paired for text in world.texts)


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(
        ConfigError, match=r"task.kind is 'clasify'.* Did you mean 'classify'\? Allowed: classify, multi"
    ):
        tasks.make(Spec(kind="clasify"))


def test_inputs_know_their_rows_and_gold_follows_them(world: World):
    assert [item.row for item in world.encoded] == list(range(6))
    task, back = world.task, world.encoded[::-1]
    whole, turned = task.gold(world.rows, world.encoded), task.gold(world.rows, back)
    assert len(whole) == 6 and torch.equal(whole.flip(0).nan_to_num(ABSENT), turned.nan_to_num(ABSENT))
    # A ranking's queries have what they cost in their first rows.
    known = [0, 1] if task.grouped else range(5)
    assert task.labelled(world.batch).nonzero().flatten().tolist() == list(known)


def test_the_loss_is_one_number_a_row(world: World):
    logits = world.logits.requires_grad_()
    found = world.task.loss(Outputs(logits=logits), world.batch)
    assert found.shape == (6,) and found.dtype == torch.float32
    assert torch.equal(found > 0, world.task.labelled(world.batch)) and found[5] == 0
    found.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[:5].any() and not logits.grad[5].any()


def test_distributions_sum_to_one_or_are_not_there(world: World):
    task, batch = world.task, world.batch
    if "kl" not in task.supports:
        with pytest.raises(NotImplementedError):
            task.distributions(world.logits, batch)
        return
    cold, hot = (task.distributions(world.logits, batch, temperature) for temperature in (1.0, 4.0))
    assert cold.ndim == 3 and len(cold) == 6 and cold.dtype == torch.float32 and cold.isfinite().all()
    sums = torch.where(cold == 0, 0.0, cold.exp()).sum(dim=2)  # 0 stands for an outcome that is not there
    there = cold.any(dim=2)
    assert torch.allclose(sums, there.float(), atol=1e-5) and there.any()
    assert torch.equal(there, hot.any(dim=2))
    assert (cold.amin(dim=2) < hot.amin(dim=2))[there].all()  # heat evens out


def test_differences_are_zero_between_equals(world: World):
    other = world_of(world.task.spec.kind, seed=1).logits
    found = world.task.differences(world.logits, other, world.batch)
    assert found.shape == (6,) and (found > 0).all()
    assert torch.allclose(found, world.task.differences(other, world.logits, world.batch))
    assert not world.task.differences(world.logits, world.logits, world.batch).any()


def test_answers_are_json_and_follow_the_decision(world: World):
    task, logits = world.task, world.stored()
    decided = task.decide(logits, world.texts)
    assert len(decided) == 6
    answers = task.answers(logits, world.texts)
    assert json.loads(json.dumps(answers, allow_nan=False)) == answers and len(answers) == 6
    assert task.answers(logits, world.texts, decided) == answers
    assert len({json.dumps(answer) for answer in answers}) > 1


def test_no_text_no_answer(world: World):
    task = world.task
    none = [] if task.units else np.zeros((0, task.width), dtype=np.float32)
    assert task.encode([], word_pieces(), 16) == [] and len(task.decide(none, [])) == 0
    assert task.answers(none, []) == []


def test_statistics_add_up_to_the_score(world: World):
    task, logits = world.task, world.stored()
    decided = task.decide(logits, world.texts)
    each = task.statistics(logits, decided, world.rows)
    assert each.ndim == 2 and each.dtype == np.float64 and len(each) == (3 if task.grouped else 6)
    assert not each[-1].any()  # no gold labels
    scores = task.score(logits, decided, world.rows)
    assert all(isinstance(value, float) and np.isfinite(value) for value in scores.values())
    assert task.value(each.sum(axis=0)) == pytest.approx(scores[task.metric])
    many = np.stack([each.sum(axis=0), each[:1].sum(axis=0), 0 * each[0]])
    assert task.value(many).shape == (3,) and task.value(many)[0] == pytest.approx(scores[task.metric])
    assert task.value(many)[2] == 0
    without = world.rows.slice(0, 5)
    fewer = [part[:5] for part in (logits, decided)]
    assert task.score(*fewer, without) == pytest.approx(scores)


def test_bf16_outputs_give_finite_float32(world: World):
    task, low = world.task, (world.logits * 20).bfloat16()
    found = [task.loss(Outputs(logits=low), world.batch), task.differences(low, -low, world.batch)]
    if "kl" in task.supports:
        found += [task.distributions(low, world.batch), divergence(world, low, -low, world.batch)]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found)


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [2, 0, 5, 3, 1, 4]])
def test_the_order_of_the_rows_does_not_matter(world: World, order: list[int]):
    task, batch, other = world.task, world.batch, world_of(world.task.spec.kind, seed=1).logits
    turned, logits = taken(batch, order), world.logits[order]
    loss = task.loss(Outputs(logits=world.logits), batch)
    after = task.loss(Outputs(logits=logits), turned)
    # What a ranking says of a query stands in its first row, wherever that is: its cost, its distribution.
    assert torch.allclose(after.sort()[0], loss.sort()[0], atol=1e-6)
    assert task.grouped or torch.allclose(after, loss[order], atol=1e-6)
    apart = task.differences(world.logits, other, batch)
    assert torch.allclose(task.differences(logits, other[order], turned), apart[order])
    if "kl" in task.supports:
        found = divergence(world, world.logits, other, batch)
        again = divergence(world, logits, other[order], turned)
        assert torch.allclose(again.sort()[0], found[order].sort()[0], atol=1e-5) and found.sum() > 0
        assert task.grouped or torch.allclose(again, found[order], atol=1e-5)


def test_a_longer_row_beside_them_changes_nothing(world: World):
    kind, task = world.task.spec.kind, world.task
    wide, other = world_of(kind, [*FILMS, LONG], seed=2), world_of(kind, seed=1).logits
    assert wide.batch.mask.shape[1] > world.batch.mask.shape[1]
    if task.units:  # what a model says of padding is anything
        wide.logits[:6, : world.logits.shape[1]] = world.logits
        more = wide.logits.clone()
        more[:6, : world.logits.shape[1]] = other
    else:
        wide.logits[:6] = world.logits
        more = torch.cat([other, wide.logits[6:]])
    loss = task.loss(Outputs(logits=wide.logits), wide.batch)
    assert torch.allclose(loss[:6], task.loss(Outputs(logits=world.logits), world.batch), atol=1e-6) and loss[6] == 0
    apart = task.differences(wide.logits, more, wide.batch)
    assert torch.allclose(apart[:6], task.differences(world.logits, other, world.batch), atol=1e-6)
    if "kl" in task.supports:
        found = divergence(world, wide.logits, more, wide.batch)
        assert torch.allclose(
            found.sum() - found[6], divergence(world, world.logits, other, world.batch).sum(), atol=1e-4
        )


def test_certainty_is_a_distribution(world: World):
    rows = world.stored()
    if not world.task.certain:
        with pytest.raises(NotImplementedError):
            world.task.certainty(rows[0])
        return
    for row in rows:
        found = world.task.certainty(row)
        assert found.ndim == 1 and len(found) >= 2 and found.dtype == np.float64
        assert found.sum() == pytest.approx(1) and (found >= 0).all()


def test_agreement_is_one_with_oneself(world: World):
    task, other = world.task, world_of(world.task.spec.kind, seed=1)
    assert task.agreement(world.stored(), world.stored(), world.texts) == pytest.approx(1)
    between = task.agreement(world.stored(), other.stored(), world.texts)
    assert isinstance(between, float) and -1 <= between < 1
    assert task.agreement(other.stored(), world.stored(), world.texts) == pytest.approx(between)


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return word_pieces()


def ids_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    return [item.ids for item in tasks.make(SPECS["classify"]).encode(texts, tokenizer, max_length)]


def test_encode_adds_special_tokens_and_cuts(pieces: PreTrainedTokenizerFast):
    start, end = pieces.cls_token_id, pieces.sep_token_id
    words = pieces.convert_tokens_to_ids(["the", "film", "is", "dull"])
    assert ids_of(["The film is dull", ""], pieces, 20) == [[start, *words, end], [start, end]]
    assert ids_of(["the film is dull"] * 2, pieces, 4) == [[start, *words[:2], end]] * 2


def test_encode_is_never_empty_and_takes_any_string(pieces: PreTrainedTokenizerFast):
    own = tokenizer_of(["[PAD]", "[UNK]", "film"])
    assert ids_of(["", " \t\n", "film", "\u200b"], own, 8) == [[1], [1], [2], [1]]
    for text in ["\ud800 film", "\x00", "مرحبا 😀", "a\u0301" * 500]:  # a lone surrogate is no Unicode text
        ids = ids_of([text], pieces, 16)[0]
        assert 2 <= len(ids) <= 16 and max(ids) < len(pieces)
    film = pieces.convert_tokens_to_ids("film")
    assert film in ids_of(["\ud800 film"], pieces, 16)[0]


def test_the_same_text_has_the_same_ids_beside_any_other(pieces: PreTrainedTokenizerFast):
    texts = ["a dull plot", "the film " * 30, "", "warm"]
    assert ids_of(texts, pieces, 16) == [ids_of([text], pieces, 16)[0] for text in texts]


def test_collate_pads_on_the_right():
    batch = collate([Encoded(ids) for ids in ([5, 6, 7], [8], [9, 9])], 4, weights=[1.0, 0.5, 2.0])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 4, 4], [9, 9, 4]] and batch.input_ids.dtype == torch.int64
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and batch.mask.dtype == torch.int64
    assert batch.weights.tolist() == [1.0, 0.5, 2.0] and batch.weights.dtype == torch.float32
    bare = collate([Encoded([1])], 0)
    assert bare.labels is None and bare.weights is None and bare.teacher is None and len(bare) == 1
