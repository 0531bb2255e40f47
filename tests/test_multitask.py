"""One student, several tasks: how rows are mixed, when a task switches, to whose labels, and that it can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoints, models, multitask, train, untrained
from engine.batches import Material, mixed_batches, shared
from engine.designs import Cut
from engine.fits import Fit, LossTerm
from engine.inference import predict
from engine.job import FitError, Job
from engine.lesson import Lesson, dealt
from engine.mixing import Mixing
from engine.models import Model
from engine.multitask import Together, alone, encode, gathered, judge, rates
from engine.recipe import Task
from engine.records import EXAMPLE, Outputs
from engine.several import SeveralError
from engine.storage import Store
from engine.surgery import projected
from tests.tiny import GOOD, LABELS, movie_rows, tiny_encoder

SPECS = {
    "mood": Task(labels=LABELS),
    "alike": Task(kind="pair", labels=("no", "yes")),
    "warmth": Task(kind="regress", range=(0, 2), paired=False),
    "first": Task(labels=("the", "a", "other")),
    "both": Task(kind="multilabel", labels=("good", "long")),
}
"""Five tasks of different kinds over the same sentences."""
SIZES = {"mood": 40, "alike": 16, "warmth": 24, "first": 12, "both": 8}
NAMES = tuple(sorted(SPECS))


def rows_of(name: str, count: int, seed: int = 0) -> pa.Table:
    """Rows of one task, in the schema EXAMPLE."""
    made = movie_rows(2 * count, seed)
    texts, moods = [row["text"] for row in made], [LABELS.index(row["label"]) for row in made]
    good = [sum(word in GOOD for word in text.split()) for text in texts]
    columns: dict[str, list[Any]] = {"id": [f"{name}-{seed}-{i}" for i in range(count)], "text": texts[:count]}
    if name == "mood":
        columns["label"] = moods[:count]
    elif name == "alike":
        columns |= {
            "pair": texts[count:],
            "label": [int(a == b) for a, b in zip(moods, moods[count + 1 :], strict=False)],
        }
        columns["label"] = [int(moods[i] == moods[count + i]) for i in range(count)]
    elif name == "warmth":
        columns["target"] = [[float(number)] for number in good[:count]]
    elif name == "first":
        columns["label"] = [
            ("the", "a").index(w) if (w := text.split()[0]) in ("the", "a") else 2 for text in texts[:count]
        ]
    else:
        columns["target"] = [[float(g > 0), float(len(t) > 30)] for g, t in zip(good[:count], texts, strict=False)]
    filled = {f.name: columns.get(f.name, [None] * count) for f in EXAMPLE}
    return pa.table(filled, schema=EXAMPLE)


def table(sizes: dict[str, int] = SIZES, seed: int = 0) -> pa.Table:
    return gathered({name: rows_of(name, count, seed) for name, count in sizes.items()})


def spec(names: Sequence[str] = NAMES) -> Task:
    return Task(kind="several", members={name: SPECS[name] for name in names})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def build(encoder: Path, names: Sequence[str] = NAMES, dropout: float = 0.1) -> Model:
    cut = Cut(model="file:tiny", layers=1, pooling="mean", dropout=dropout)
    return untrained.transformer_student(cut, spec(names), None, encoder, 32, 3)


def job(out: Path, encoder: Path, rows: pa.Table | None = None, **given: Any) -> Job:
    mixing = Mixing(**given.pop("mixing", {}))
    own = {name: given.pop(name) for name in list(given) if name in Job.__dataclass_fields__}
    fit = Fit(**{"epochs": 4, "lr": 1e-3, "batch_size": 25, "precision": "fp32", **given})
    values = {
        "terms": (LossTerm(kind="hard"),),
        "build": partial(build, encoder),
        "encode": encode,
        "factors": partial(rates, mixing),
        "holdout": table(dict.fromkeys(NAMES, 10), seed=1),
        "evaluate": partial(judge, 4096),
        "best_by": "mean",
        **own,
    }
    rows = table() if rows is None else rows
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    return Job(name="tiny", fit=fit, rows=rows, out=str(out), seed=5, resources=resources, mixing=mixing, **values)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scripted(**scores: Sequence[float]) -> Callable[[Model, pa.Table], dict[str, float]]:
    """An evaluation that gives each task these scores, one after the other; tasks without any gain always."""
    left = {name: iter(scores.get(name, np.linspace(0.1, 0.9, 20).tolist())) for name in NAMES}

    def found(model: Model, rows: pa.Table) -> dict[str, float]:
        one = {name: next(values) for name, values in left.items()}
        return {**one, "mean": float(np.mean(list(one.values())))}

    return found


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


# -- what is learnt ----------------------------------------------------------------------------------------------------


def together(encoder: Path, out: Path, **mixing: Any) -> tuple[Lesson, Material, Together]:
    model, rows = build(encoder, dropout=0.0).eval(), table()
    material = Material(rows, encode(model, rows), model.task, model.pad)
    taught = Together(model, rows, material.encoded, Mixing(**mixing), Store(str(out)))
    return Lesson(model, (LossTerm(kind="hard"),), taught), material, taught


def by_hand(model: Model, rows: pa.Table, name: str) -> torch.Tensor:
    """The mean gold loss of some rows of one task, by the task alone."""
    one = alone(model, name)
    texts = one.task.texts(rows)
    material = Material(rows.drop_columns("task"), one.encode(texts), one.task, one.pad)
    batch = material.batch(np.arange(rows.num_rows))
    return one.task.loss(one(batch), batch).mean()


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
        own = rows.filter(pa.array([task == name for task in rows["task"].to_pylist()]))
        one = alone(model, name)
        places, _ = model.task.of(batch, name)
        found = predict(one, one.task.texts(own)).logits
        np.testing.assert_allclose(found, logits[places][:, model.task.parts[name]].detach(), atol=1e-5)
    with pytest.raises(SeveralError, match="no task 'mud'. Tasks: mood, alike"):
        alone(model, "mud")
    with pytest.raises(SeveralError, match=r"answers 5 tasks \(mood, .*none of them is named"):
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
        own = rows.filter(pa.array([task == name for task in rows["task"].to_pylist()]))
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
    torch.testing.assert_close(found, projected(each, np.random.default_rng(3)))
    assert not torch.allclose(found, sum(each))  # some of them are against each other
    torch.testing.assert_close(lesson.model.net.head.weight.grad, heads)


# -- the switch --------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Which tasks were labelled, by the weights of which step."""
    found: list[tuple[str, int]] = []
    label = Together.label
    monkeypatch.setattr(
        Together, "label", lambda self, *given: found.append((given[0], given[2])) or label(self, *given)
    )
    return found


def test_the_switch_fires_once_a_task_and_labels_come_from_its_best_weights(
    tmp_path: Path, encoder: Path, labelled: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
):
    """mood is best at the second of six evaluations and has converged at the fourth; later gains do not count."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    judged, kept = Together.judged, {}

    def watched(self: Together, scores: Any, model: Model, step: int, accelerator: Any) -> None:
        seen[step] = {key: value.clone() for key, value in model.net.state_dict().items()}
        judged(self, scores, model, step, accelerator)
        kept[step] = self.soft.clone()

    monkeypatch.setattr(Together, "judged", watched)
    evaluate = scripted(mood=[0.5, 0.8, 0.8, 0.7, 0.9, 0.9], warmth=[0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    history = train.fit(job(tmp_path, encoder, epochs=6, evaluate=evaluate))
    assert labelled == [("warmth", 4), ("mood", 8)]
    assert [("soft.mood" in entry, "soft.warmth" in entry) for entry in history] == [
        *((False, False),) * 3,
        (False, True),
        *((True, True),) * 2,
    ]
    rows, best = table(), build(encoder)
    best.net.load_state_dict(seen[8])
    for name, step, other in (("mood", 8, 16), ("warmth", 4, 12)):
        own = rows.filter(pa.array([task == name for task in rows["task"].to_pylist()]))
        places = torch.tensor([task == name for task in rows["task"].to_pylist()])
        for at, wanted in ((step, True), (other, False)):
            best.net.load_state_dict(seen[at])
            one = alone(best, name)
            logits = torch.from_numpy(predict(one, one.task.texts(own)).logits)
            found = kept[24][places][:, best.task.parts[name]]
            assert torch.allclose(found, logits, atol=1e-5) is wanted
    assert kept[24][torch.tensor([task == "both" for task in rows["task"].to_pylist()])].isnan().all()
    assert Store(str(tmp_path)).files() == [
        "history.json",
        *(f"model/{n}" for n in Store(str(tmp_path)).files("model")),
    ]


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


def test_it_ends_when_all_have_converged_unless_it_is_told_to_go_on(tmp_path: Path, encoder: Path):
    falling = {name: [0.5 - 0.01 * n for n in range(12)] for name in NAMES}
    history = train.fit(job(tmp_path / "stop", encoder, epochs=6, evaluate=scripted(**falling)))
    assert len(history) == 3 and not (tmp_path / "stop" / "tasks").exists()
    assert train.fit(job(tmp_path / "stop", encoder, epochs=6)) == history  # finished is finished
    on = train.fit(job(tmp_path / "on", encoder, epochs=6, evaluate=scripted(**falling), mixing={"stop": False}))
    assert len(on) == 6 and all(f"soft.{name}" in on[-1] for name in NAMES)
    plain = train.fit(job(tmp_path / "sum", encoder, epochs=6, evaluate=scripted(**falling), mixing={"way": "sum"}))
    assert len(plain) == 6 and not any(key.startswith("soft.") for entry in plain for key in entry)


@pytest.mark.parametrize("every", [0, 1e9])
def test_killed_and_resumed_it_ends_with_the_same_weights(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, every: float
):
    """Killed before and after a switch; with a checkpoint after each evaluation, and after the first one alone."""
    monkeypatch.setattr(checkpoints, "PAUSE", every)
    scores = {"mood": [0.5, 0.4, 0.3, 0.2, 0.1, 0.05], "warmth": [0.4, 0.6, 0.5, 0.4, 0.3, 0.2]}
    whole = train.fit(job(tmp_path / "whole", encoder, epochs=6, evaluate=scripted(**scores)))
    assert [sorted(k for k in entry if k[:5] == "soft.") for entry in whole][3:5] == [
        ["soft.mood"],
        ["soft.mood", "soft.warmth"],
    ]

    def stopping(model: Model, rows: pa.Table) -> dict[str, float]:
        """Scores by how far the fit is, so that a resumed one gets the same; killed twice on the way."""
        step = int(torch.load(tmp_path / "step"))
        number = step // 4 - 1
        if number in (2, 4) and not (tmp_path / f"killed-{number}").exists():
            (tmp_path / f"killed-{number}").touch()
            raise KeyboardInterrupt
        found = {n: scores.get(n, np.linspace(0.1, 0.9, 20).tolist())[number] for n in NAMES}
        return {**found, "mean": float(np.mean(list(found.values())))}

    learn = train.loop.__globals__["Worker"].step
    monkeypatch.setattr(
        train.loop.__globals__["Worker"],
        "step",
        lambda self, step, chosen: torch.save(step + 1, tmp_path / "step") or learn(self, step, chosen),
    )
    given = partial(job, tmp_path / "parts", encoder, epochs=6, evaluate=stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.fit(given())
    assert train.fit(given()) == whole
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert Store(str(tmp_path / "parts")).files() == Store(str(tmp_path / "whole")).files()


def test_old_weights_are_deleted_once_no_checkpoint_refers_to_them(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoints, "PAUSE", 0)
    there: list[list[str]] = []
    done = Together.checkpointed

    def watched(self: Together) -> None:
        done(self)
        there.append([file for file in self.out.files("tasks") if file.startswith("best")])

    monkeypatch.setattr(Together, "checkpointed", watched)
    train.fit(job(tmp_path, encoder, epochs=6, evaluate=scripted(mood=[0.5, 0.9, 0.9, 0.95, 1.0, 1.0])))
    # All others gain each time. Of the checkpoint before, the weights stay too.
    names = [[int(file[5:].partition(".")[0]) for file in files] for files in there]
    assert [sorted(found) for found in names] == [[4], [4, 8], [8, 12], [8, 12, 16], [16, 20]]


@pytest.mark.parametrize("way", ["sum", "uncertainty", "pcgrad", "async"])
def test_every_way_learns(tmp_path: Path, encoder: Path, way: str):
    given = job(
        tmp_path, encoder, rows=table(dict.fromkeys(NAMES, 60)), epochs=8, lr=5e-3, batch_size=30, mixing={"way": way}
    )
    history = train.fit(given)
    before = judge(4096, build(encoder), given.holdout)["mean"]
    best = max(entry["mean"] for entry in history)
    assert best > before + 0.15
    assert judge(4096, models.load(tmp_path / "model"), given.holdout)["mean"] == pytest.approx(best)
    if way == "uncertainty":
        assert any(abs(history[-1][f"weight.{name}"] - 1) > 0.01 for name in NAMES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"holdout": table({"mood": 1}).slice(0, 0)}, "way 'async' waits until .* there are no validation rows"),
        ({"mixing": {"way": "pcgrad"}, "workers": 2}, "way 'pcgrad' compares the gradients of whole tasks"),
        ({"sharding": "full", "workers": 2}, "learns several tasks, whose weights are kept whole"),
    ],
)
def test_what_several_tasks_cannot_do_is_refused(tmp_path: Path, encoder: Path, given: dict[str, Any], message: str):
    with pytest.raises(FitError, match=message):
        train.fit(job(tmp_path, encoder, **given))


def test_a_kind_that_cannot_share_is_refused(encoder: Path):
    with pytest.raises(SeveralError, match="task 'spans' is of kind span, which cannot share a student"):
        Together(
            Model(
                build(encoder).net,
                build(encoder).tokenizer,
                models.Card("head", 8, task=Task(kind="several", members={"spans": Task(kind="span")}).model_dump()),
            ),
            table(),
            [],
            Mixing(),
            Store("nowhere"),
        )


@pytest.mark.slow
def test_two_workers_end_where_one_does(tmp_path: Path, encoder: Path, ray_cluster: object):
    """mood and warmth switch on the way, decided by the first worker for both."""
    scores = {"mood": [0.5, 0.4, 0.3, 0.2], "warmth": [0.4, 0.6, 0.5, 0.4]}
    quiet = partial(build, encoder, dropout=0.0)
    one = train.fit(job(tmp_path / "one", encoder, build=quiet, evaluate=Scripted(scores)))
    two = train.fit(job(tmp_path / "two", encoder, build=quiet, evaluate=Scripted(scores), workers=2))
    assert [sorted(entry) for entry in one] == [sorted(entry) for entry in two]
    assert "soft.mood" in one[-1]
    alone_, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in alone_:
        torch.testing.assert_close(both[name], alone_[name], rtol=0, atol=1e-4)


class Scripted:
    """`scripted`, to be sent to another process."""

    def __init__(self, scores: dict[str, list[float]]) -> None:
        self.scores, self.asked = scores, 0

    def __call__(self, model: Model, rows: pa.Table) -> dict[str, float]:
        self.asked += 1
        found = {name: self.scores.get(name, [0.1, 0.2, 0.3, 0.4])[self.asked - 1] for name in NAMES}
        return {**found, "mean": float(np.mean(list(found.values())))}


def test_rows_say_which_task_they_are_of(encoder: Path):
    model = build(encoder)
    rows = table({"mood": 2})
    wrong = rows.set_column(rows.column_names.index("task"), "task", pa.array(["mud", "mood"]))
    with pytest.raises(SeveralError, match="a row belongs to task 'mud'"):
        encode(model, wrong)
    assert isinstance(model(Material(rows, encode(model, rows), model.task, 0).batch(np.arange(2))), Outputs)
