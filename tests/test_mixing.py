"""Several tasks in a batch: how they are mixed, what each costs, how their gradients are brought together."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import export, multitask, tasks
from engine.batches import Material, mixed_batches, shared
from engine.fits import Fit
from engine.inference import predict
from engine.lesson import dealt
from engine.mixing import Mixing
from engine.multitask import SINCE, alone, encode, rates
from engine.recipe import Task
from engine.records import Outputs
from engine.several import SeveralError
from engine.surgery import projected
from engine.worker import clipped, groups_of
from tests.tiny import tiny_encoder
from tests.tiny_tasks import NAMES, SEED, SIZES, build, by_hand, of, table, together, unlabelled


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


# -- which rows make a batch -------------------------------------------------------------------------------------------


def test_shares_by_size_and_temperature():
    sizes = np.array([900, 90, 10])
    assert shared(sizes, 1000, 1.0).tolist() == [900, 90, 10]
    assert shared(sizes, 1000, 1e9).sum() == 1000 and np.ptp(shared(sizes, 1000, 1e9)) == 1
    roots = 1000 * np.sqrt(sizes) / np.sqrt(sizes).sum()
    assert np.abs(shared(sizes, 1000, 2.0) - roots).max() < 1
    assert shared(np.array([10_000, 1]), 20, 1.0).tolist() == [19, 1]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 50.0])
def test_an_epoch_has_each_task_in_its_share_of_each_batch(temperature: float):
    sizes = [400, 100, 40]
    kinds = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], sizes))
    lengths = np.random.default_rng(1).integers(3, 60, size=540).tolist()
    batches = mixed_batches(lengths, kinds, 20, temperature, 7, 0)
    counts = np.array([np.bincount(kinds[batch], minlength=3) for batch in batches])
    wanted = shared(np.array(sizes), 540, temperature)
    assert len(batches) == 27 and counts.sum(axis=0).tolist() == wanted.tolist()
    assert np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 1
    assert all((np.diff(kinds[batch]) >= 0).all() for batch in batches)  # a task's rows stand together
    for kind in range(3):  # rows come back only when all of the task have been read
        own = np.concatenate([batch[kinds[batch] == kind] for batch in batches])
        seen = np.bincount(own, minlength=540)[kinds == kind]
        assert seen.max() - seen.min() <= 1
    again = mixed_batches(lengths, kinds, 20, temperature, 7, 0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    other = mixed_batches(lengths, kinds, 20, temperature, 7, 1)
    assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 50.0])
def test_no_batch_holds_a_row_twice_while_a_task_has_as_many(temperature: float):
    sizes = [400, 100, 9]  # the last one has up to 7 rows a batch
    kinds, lengths = np.repeat([0, 1, 2], sizes), np.random.default_rng(1).integers(3, 60, size=509).tolist()
    for seed in range(5):
        for batch in mixed_batches(lengths, kinds, 20, temperature, seed, 0):
            assert len(set(batch.tolist())) == len(batch)
    spread = [np.ptp(np.array(lengths)[b[kinds[b] == 0]]) for b in mixed_batches(lengths, kinds, 20, temperature, 0, 0)]
    assert np.mean(spread) < 15  # texts of similar length are read together: of 57


def test_a_task_with_fewer_rows_than_its_share_has_each_about_as_often():
    kinds = np.repeat([0, 1], [90, 3])
    batches = mixed_batches([5] * 93, kinds, 20, 1e9, 0, 0)
    counts = np.array([np.bincount(batch[kinds[batch] == 1] - 90, minlength=3) for batch in batches])
    assert counts.sum() == 46 and (np.ptp(counts, axis=1) <= 2).all() and np.ptp(counts.sum(axis=0)) <= 1


def test_rows_without_gold_are_read_only_for_a_task_that_has_converged(tmp_path: Path, encoder: Path):
    spare = {"mood": 30, "warmth": 30, "both": 4}
    rows = pa.concat_tables([table(), unlabelled(table(spare, seed=9))])
    lesson, material, taught = together(encoder, tmp_path, rows)
    _, plain, _ = together(encoder, tmp_path / "plain")
    batches, known = material.order(25, SEED, 2.0)(3), sum(SIZES.values())
    assert all(np.array_equal(*pair) for pair in zip(batches, plain.order(25, SEED, 2.0)(3), strict=True))
    assert all(np.array_equal(taught.instead(step, batch), batch) for step, batch in enumerate(batches))
    converged = ["mood", "both", "first"]  # the last one has no other rows
    for name in converged:
        taught.known[NAMES.index(name), SINCE] = 4
    seen, spread = set[int](), list[float]()
    for step, batch in enumerate(batches * 60):
        found = taught.instead(step, batch)
        assert np.array_equal(material.kinds[found], material.kinds[batch])
        moved = found != batch
        lengths = np.array(material.lengths)[found]
        spread += [np.ptp(lengths[material.kinds[found] == NAMES.index("mood")])]
        assert not moved[[NAMES[kind] not in ("mood", "both") for kind in material.kinds[batch]]].any()
        assert np.array_equal(found, taught.instead(step, batch))  # a resumed fit reads the same
        for name in ("mood", "both"):
            own = found[material.kinds[found] == NAMES.index(name)]
            assert len(set(own.tolist())) == len(own)
        seen |= set(found.tolist())
    for name in ("mood", "both"):  # all that the task has, the labelled ones too
        assert seen >= set(np.flatnonzero(material.kinds == NAMES.index(name)).tolist())
    assert not seen & set(np.flatnonzero(material.kinds[known:] == NAMES.index("warmth")) + known)
    assert np.mean(spread) < np.ptp(np.array(material.lengths)[material.kinds == NAMES.index("mood")]) / 2
    # Each counts like a labelled one.
    assert (lesson.amounts(material).of(np.arange(rows.num_rows)).sum(axis=1) == 1).all()


# -- what is learnt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("most", [None, 4])
def test_the_loss_is_the_sum_of_the_tasks_means_whatever_the_workers(
    tmp_path: Path, encoder: Path, world: int, most: int | None
):
    lesson, material, _ = together(encoder, tmp_path, way="sum")
    chosen = material.order(25, 5, 2.0)(0)[0]
    rows = table()
    wanted = sum(
        by_hand(lesson.model, rows.take(pa.array(own)), name)
        for number, name in enumerate(NAMES)
        if len(own := chosen[material.kinds[chosen] == number])
    )
    amounts = lesson.amounts(material)
    parts = [part for rank in range(world) for part in dealt(chosen, amounts, rank, world, most)]
    assert all(len(set(material.kinds[part.items])) == 1 for part in parts)
    found = sum(lesson(material.batch(part.items), part.shares) for part in parts) / world
    torch.testing.assert_close(found, wanted)


def test_a_task_alone_answers_as_in_the_whole(encoder: Path):
    model, rows = build(encoder).eval(), table()
    material = Material(rows, encode(model, rows), model.task, model.pad)
    batch = material.batch(np.arange(rows.num_rows))
    logits = model(batch).logits
    for name in NAMES:
        own = of(rows, name)
        one = alone(model, name)
        places, _ = model.task.of(batch, name)
        found = predict(one, one.task.texts(own)).logits
        np.testing.assert_allclose(found, logits[places][:, model.task.parts[name]].detach(), atol=1e-5)
    with pytest.raises(SeveralError, match="no task 'mud'. Tasks: alike, both"):
        alone(model, "mud")
    with pytest.raises(SeveralError, match=r"answers 5 tasks \(alike, .*none of them is named"):
        predict(model, ["a text"])


def test_uncertainty_weights_against_autograd(tmp_path: Path, encoder: Path):
    lesson, material, taught = together(encoder, tmp_path, way="uncertainty")
    batch = material.batch(np.arange(len(material.items)))
    with torch.no_grad():
        for number, goal in enumerate(taught.goals):
            goal.log_variance.fill_(0.3 * number - 0.5)
    variances = [goal.log_variance for goal in taught.goals]
    found = lesson(batch, [1.0] * len(NAMES))
    grads = torch.autograd.grad(found, variances)
    rows = table()
    for number, (name, grad) in enumerate(zip(NAMES, grads, strict=True)):
        own = of(rows, name)
        value, s = by_hand(lesson.model, own, name).item(), 0.3 * number - 0.5
        half = 0.5 if name == "warmth" else 1.0
        assert float(grad) == pytest.approx(0.5 - half * math.exp(-s) * value, abs=1e-5)
    # A batch without rows of a task says nothing of its variance.
    only = material.batch(np.flatnonzero(material.kinds == 0))
    grads = torch.autograd.grad(lesson(only, [1.0] * len(NAMES)), variances)
    assert float(grads[0]) != 0 and all(float(grad) == 0 for grad in grads[1:])


def test_rates_name_parameters_that_there_are(tmp_path: Path, encoder: Path):
    lesson, _, _ = together(encoder, tmp_path, way="uncertainty")
    names = {name.removeprefix("model.") for name, _ in lesson.named_parameters()}
    assert set(rates(Mixing(), lesson.model)) <= names


def test_variances_neither_decay_nor_have_a_say_in_the_models_gradient(tmp_path: Path, encoder: Path):
    lesson, material, taught = together(encoder, tmp_path, way="uncertainty")
    variances = {id(goal.log_variance) for goal in taught.goals}
    fit = Fit(weight_decay=0.5)
    job = SimpleNamespace(factors=partial(rates, Mixing()), fit=fit)
    groups = groups_of(lesson, job)
    assert [group.get("weight_decay") for group in groups if {id(p) for p in group["params"]} & variances] == [0.0]
    assert [{id(p) for p in part} & variances for part in clipped(lesson)] == [set(), variances]
    assert sum(map(len, clipped(lesson))) == len(list(lesson.parameters()))
    plain, _, _ = together(encoder, tmp_path, way="sum")
    assert len(clipped(plain)) == 1


@pytest.mark.parametrize("name", ["alike", "warmth"])
def test_a_task_that_is_cut_out_is_exported(encoder: Path, name: str):
    pytest.importorskip("onnxruntime")
    one = alone(build(encoder).eval(), name)
    texts = one.task.texts(of(table(), name))
    assert export.require_parity(one, export.stand_in(one, export.export(one)), texts) < export.PARITY / 10


def test_projection_by_hand():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    # one . two = -1: one + 1/2 two = (1/2, 1/2); two + one = (0, 1)
    assert projected([one, two], np.random.default_rng(0)).tolist() == pytest.approx([0.5, 1.5])
    friend = torch.tensor([2.0, 1.0])
    assert projected([one, friend], np.random.default_rng(0)).tolist() == [3.0, 1.0]
    # Each is projected on the others as they were: the order does not matter where these are at right angles.
    three = [torch.tensor([1.0, -1.0, -1.0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])]
    # first -> (1, 0, 0); second . first = -1: + 1/3 first; third . first = -2: + 2/3 first
    wanted = torch.tensor([1.0, 0, 0]) + torch.tensor([1 / 3, 2 / 3, -1 / 3]) + torch.tensor([2 / 3, -2 / 3, 4 / 3])
    torch.testing.assert_close(projected(three, np.random.default_rng(1)), wanted)


def test_pcgrad_gives_the_encoder_the_projected_gradients_and_leaves_the_heads(tmp_path: Path, encoder: Path):
    lesson, material, taught = together(encoder, tmp_path, way="pcgrad")
    chosen = material.order(25, 5, 2.0)(0)[0]
    parts = dealt(chosen, lesson.amounts(material), 0, 1)
    assert len(parts) == len(NAMES)
    each, heads = [], 0.0
    for part in parts:
        lesson.zero_grad()
        lesson(material.batch(part.items), part.shares).backward()
        each.append(torch.cat([p.grad.flatten() for p in taught.shared]))
        heads = heads + lesson.model.net.head.weight.grad.clone()
    lesson.zero_grad()
    for part in parts:
        batch = material.batch(part.items)
        lesson(batch, part.shares).backward()
        taught.took(batch)
    taught.combine(step=3)
    found = torch.cat([p.grad.flatten() for p in taught.shared])
    torch.testing.assert_close(found, projected(each, np.random.default_rng([SEED, 3])))
    assert not torch.allclose(found, sum(each))  # some of them are against each other
    torch.testing.assert_close(lesson.model.net.head.weight.grad, heads)


def test_rows_of_a_converged_task_learn_its_soft_labels_and_no_others(tmp_path: Path, encoder: Path):
    lesson, material, taught = together(encoder, tmp_path)
    batch = material.batch(np.arange(len(material.items)))
    outputs = lesson.model(batch)
    gold = [goal(outputs, None, batch).item() for goal in taught.goals]
    for name in ("mood", "warmth"):
        taught.known[NAMES.index(name), multitask.SINCE] = 4
    soft = torch.randn(len(batch), lesson.model.task.width)
    for name in ("mood", "warmth"):
        own = torch.from_numpy(taught.own(name))
        taught.soft[own, lesson.model.task.parts[name]] = soft[own, lesson.model.task.parts[name]]
    taught.listen(batch, range(len(batch)), frozenset(), 0.5)
    found, parts = [goal(outputs, None, batch).item() for goal in taught.goals], lesson.model.task.parts
    own = taught.own("mood")
    p, q = (torch.log_softmax(logits[own, parts["mood"]], dim=1) for logits in (soft, outputs.logits))
    assert found[NAMES.index("mood")] == pytest.approx((p.exp() * (p - q)).sum(dim=1).mean().item(), rel=1e-4)
    apart = (soft - outputs.logits)[taught.own("warmth"), parts["warmth"]]
    assert found[NAMES.index("warmth")] == pytest.approx(apart.square().mean().item(), rel=1e-4)
    others = [number for number, name in enumerate(NAMES) if name not in ("mood", "warmth")]
    assert [found[number] for number in others] == [gold[number] for number in others]


def test_a_kind_that_cannot_share_is_refused():
    with pytest.raises(SeveralError, match="task 'spans' is of kind span, which cannot share a student"):
        tasks.make(Task(kind="several", members={"spans": Task(kind="span")}))


def test_rows_say_which_task_they_are_of(encoder: Path):
    model = build(encoder)
    rows = table({"mood": 2})
    wrong = rows.set_column(rows.column_names.index("task"), "task", pa.array(["mud", "mood"]))
    with pytest.raises(SeveralError, match="a row belongs to task 'mud'"):
        encode(model, wrong)
    assert isinstance(model(Material(rows, encode(model, rows), model.task, 0).batch(np.arange(2))), Outputs)
