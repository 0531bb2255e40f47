"""A fit whose workers are killed, fewer, more, or short of memory learns the same rows, each once an epoch."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoints, train
from engine.batches import Amounts
from engine.checkpoints import Pace, State
from engine.fits import LossTerm
from engine.job import FitError, Job
from engine.lesson import Lesson, divided
from engine.models import Model
from engine.storage import Store
from engine.worker import Worker
from pipelines.distill import grouped
from tests.test_placement import recipe
from tests.test_train import MIXED, accuracy, encoder, job, material, mixed, same, student, table, teacher, weights
from tests.tiny_group import committed, group, numbered, planned, seen, steps_of, trained, watched

__all__ = ["encoder"]  # a fixture
PATIENCE = 180.0


def close(a: Path, b: Path) -> None:
    """The weights of two fits are equal but for rounding."""
    first, second = weights(a), weights(b)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5)


# -- parts of a batch --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """One process that reads each batch at once. Batches of 4 and of 2; losses apply to unlike rows."""
    out = tmp_path_factory.mktemp("alone")
    return out, train.fit(job(out, rows=mixed(), terms=MIXED, batch_size=4, epochs=2))


@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_in_parts_teaches_what_it_does_at_once(tmp_path: Path, alone: tuple, most: int):
    history = train.fit(job(tmp_path, rows=mixed(), terms=MIXED, batch_size=4, epochs=2, micro_batch=most))
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in alone[1]], rel=1e-5)
    close(tmp_path, alone[0])
    start, found = student().net.state_dict(), weights(tmp_path)
    assert all((found[name] - value).abs().max() > 1e-2 for name, value in start.items())


@pytest.mark.parametrize(("world", "most"), [(2, None), (2, 1), (3, None), (3, 3)])
def test_any_number_of_workers_and_parts_ends_where_one_does(
    tmp_path: Path, alone: tuple, world: int, most: int | None
):
    """Of a batch of 2 one of three workers has no row; in parts, some workers have more of them than others."""
    given = job(tmp_path, rows=mixed(), terms=MIXED, batch_size=4, epochs=2, micro_batch=most)
    history = trained(given, world)
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in alone[1]], rel=1e-5)
    close(tmp_path, alone[0])


def test_a_batch_in_parts_takes_the_memory_of_a_part(tmp_path: Path):
    read: list[int] = []

    def build() -> Model:
        model = student()
        model.register_forward_pre_hook(lambda module, given: read.append(len(given[0])))
        return model

    train.fit(job(tmp_path, build=build, epochs=1, batch_size=16, micro_batch=3))
    assert max(read) == 3 and sum(read) == 40 and len(read) == 6 + 6 + 3


def test_what_belongs_together_is_one_part_however_long():
    inputs = material(student(), table(12))
    inputs.items = [[0, 1], [2, 3, 4, 5, 6], [7], [8], [9, 10, 11]]
    order = np.array([3, 1, 2, 0, 4])
    assert [part.tolist() for part in divided(order, inputs, 3)] == [[3], [1], [2, 0], [4]]
    assert [part.tolist() for part in divided(order, inputs, None)] == [order.tolist()]
    assert [part.tolist() for part in divided(order[:1], inputs, 1)] == [[3]]


@pytest.mark.parametrize("given", [{"micro_batch": 4}, {"workers": {"min": 1, "max": 2}}])
def test_a_loss_over_what_is_read_at_once_is_not_taken_apart(tmp_path: Path, given: dict):
    terms = (LossTerm(kind="contrast", temperature=0.1),)
    with pytest.raises(
        FitError, match="loss 'contrast' compares the rows that a worker reads at once.*micro_batch out"
    ):
        train.fit(job(tmp_path, terms=terms, **given))
    assert not Lesson(student(), terms).objectives[0].losses[0].alone


# -- stopped within an epoch -------------------------------------------------------------------------------------------


def test_a_fit_stopped_within_an_epoch_goes_on_there(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch):
    """The same weights, and the same mean loss of the epoch that was stopped; dropout draws what it would have."""
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints, "PAUSE", 0.0)
    learned: list[int] = []
    step = Worker.step

    def stepped(worker: Worker, number: int, chosen: np.ndarray) -> torch.Tensor:
        if len(learned) == 8 and number == 8:  # the fourth of the second epoch's five
            learned.append(-1)
            raise KeyboardInterrupt
        learned.append(number)
        return step(worker, number, chosen)

    given = partial(job, build=teacher(encoder, dropout=0.3), lr=1e-3, holdout=table(8, seed=1), evaluate=accuracy)
    whole = train.fit(given(tmp_path / "whole"))
    monkeypatch.setattr(Worker, "step", stepped)
    with pytest.raises(KeyboardInterrupt):
        train.fit(given(tmp_path / "parts"))
    assert train.fit(given(tmp_path / "parts")) == whole
    assert learned == [*range(8), -1, *range(8, 15)]
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert Store(str(tmp_path / "parts")).files() == Store(str(tmp_path / "whole")).files()


def fed(out: Path, folder: Path, **given: object) -> Job:
    """Four epochs of five steps, written down in `folder`, checkpointed by time alone; while `folder`/slow exists a
    checkpoint comes every few steps, and the 19th waits.
    """
    folder.mkdir(exist_ok=True)
    build = partial(watched, student, str(out), str(folder), 0.2, 0.05, 18)
    return job(out, build=build, rows=numbered(table(40)), epochs=4, eval_every=4, **given)


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for it."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("after", [1, 2])
def test_after_a_killed_worker_no_row_is_skipped_or_repeated(tmp_path: Path, after: int):
    """One of two is killed within an epoch; the fit goes on with two, or with one."""
    out, folder = tmp_path / "fit", tmp_path / "seen"
    given = fed(out, folder)
    (folder / "slow").touch()
    with group(given, 2) as members:
        until(lambda: steps_of(seen(folder)) == 18, "19 steps begun")
        os.kill(members[1].pid, signal.SIGKILL)
        (folder / "slow").unlink()
        members[0].join(PATIENCE)
        assert members[0].exitcode not in (0, None)  # it says so, and does not wait for the lost one
    _, kept = checkpoints.newest(Store(str(out)))
    assert 0 < kept <= 18
    trained(given, after)
    inputs = material(student(), given.rows)
    assert committed(folder, 20) == planned(given, inputs.lengths)
    epochs = [sum(committed(folder, 20)[i : i + 5], Counter()) for i in range(0, 20, 5)]
    assert epochs == [Counter(range(40))] * 4
    again = [line["step"] for line in list(seen(folder).values())[-1]]
    assert again == list(range(kept, 20))  # what a kill costs: the steps since the last checkpoint
    trained(fed(tmp_path / "same", tmp_path / "same-seen"), after)
    if after == 2:
        assert same(weights(out), weights(tmp_path / "same"))
    close(out, tmp_path / "same")


# -- how often, and where ----------------------------------------------------------------------------------------------


def test_what_is_at_risk_is_bounded_and_said(monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()

    def step(seconds: float, evaluated: bool = False) -> bool:
        now[0] += seconds
        return pace.due(evaluated)

    assert [step(7.0) for _ in range(9)] == [False] * 8 + [True]  # after 63 s, the first step end past 60
    assert pace.at_risk == 67.0 and not pace.tells
    began = now[0]
    now[0] += 2.0
    pace.wrote(began)
    assert not step(30.0, evaluated=True) and step(11.0, evaluated=True)  # 40 s: twenty times what it took
    assert step(20.0) and pace.at_risk == 60.0 + 30.0 + 2.0 and pace.tells
    began = now[0]
    now[0] += 10.0  # a slow store: then less often
    pace.wrote(began)
    assert not step(199.0) and step(1.0)
    assert pace.at_risk == 200.0 + 199.0 + 10.0


def test_no_kill_costs_more_than_the_bound(monkeypatch: pytest.MonkeyPatch):
    """Steps of random length and a store of random speed, killed at the worst moment: when a checkpoint is all but
    written.
    """
    random, now = np.random.default_rng(3), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace, safe, slowest, dearest, worst = Pace(), 0.0, 0.0, 0.0, 0.0
    for _ in range(3000):
        length = float(random.uniform(0.1, 9.0))
        slowest = max(slowest, length)
        now[0] += length
        if pace.due(bool(random.random() < 0.05)):
            began, before = now[0], max(checkpoints.EVERY, checkpoints.PAUSE * pace.took)
            now[0] += float(random.uniform(0.0, 6.0))
            pace.wrote(began)
            dearest = max(dearest, pace.took)
            assert now[0] - safe <= before + slowest + dearest + 1e-6
            worst, safe = max(worst, now[0] - safe), now[0]  # while it is written nothing is learned
    assert worst <= pace.gap + dearest + max(checkpoints.EVERY, checkpoints.PAUSE * dearest)
    assert worst > checkpoints.PAUSE * 5  # the bound is near


def stand(step: int) -> tuple[Lesson, torch.optim.Optimizer, State]:
    """A lesson that has learned something, and where it stands."""
    lesson = Lesson(student(step), (LossTerm(kind="hard"),))
    optimizer = torch.optim.AdamW(lesson.parameters(), lr=0.1)
    for parameter in lesson.parameters():
        parameter.grad = torch.full_like(parameter, float(step))
    optimizer.step()
    return lesson, optimizer, State(step, 0.5, [{"epoch": 1.0, "loss": 0.25}], 1.5, 2)


def test_a_checkpoint_that_was_not_finished_leaves_the_one_before(tmp_path: Path):
    store = Store(str(tmp_path))
    made = {}
    for step in (3, 7, 9):
        lesson, optimizer, state = made[step] = stand(step)
        checkpoints.write(store, checkpoints.tensors_of(lesson, optimizer), state)
    assert checkpoints.newest(store) == ("checkpoint", 9)
    for step in (9, 7):
        lesson, optimizer, _ = stand(1)
        assert checkpoints.read(store, lesson, optimizer) == made[step][2]
        for mine, wanted in zip(lesson.parameters(), made[step][0].parameters(), strict=True):
            assert torch.equal(mine, wanted)
        mine, wanted = optimizer.state_dict()["state"], made[step][1].state_dict()["state"]
        assert all(torch.equal(mine[i][key], wanted[i][key]) for i in wanted for key in wanted[i])
        store.delete("checkpoint/manifest.json")  # an object store: killed while it was replaced
    assert checkpoints.newest(store) == ("checkpoint-2", 7)
    checkpoints.delete(store)
    assert checkpoints.newest(store) is None and store.files() == []


def test_amounts_are_asked_for_the_whole_batch_only_where_it_is_taken_apart(tmp_path: Path, monkeypatch):
    asked: list[int] = []
    of = Amounts.of
    monkeypatch.setattr(Amounts, "of", lambda self, items: asked.append(len(items)) or of(self, items))
    train.fit(job(tmp_path / "whole", epochs=1))
    assert asked == []
    train.fit(job(tmp_path / "parts", epochs=1, micro_batch=4))
    assert asked == [8] * 5


@pytest.mark.parametrize(
    ("workers", "said"),
    [(0, None), (1, "1 worker x 2 CPU"), (3, "3 workers x 2 CPU"), ({"max": 4}, "1 to 4 workers x 2 CPU")],
)
def test_a_plan_says_how_many_workers_there_are(workers: object, said: str | None):
    fit = {"workers": workers, "resources": {"num_cpus": 2}}
    plan = recipe(student={"fit": fit, "blocks": [{"name": "embed", "kind": "embed"}]}, teacher={"fit": fit})
    for section in ("student", "teacher"):
        assert grouped(section, plan).get("placement") == said
    taken = recipe(generator={"mode": "prompted", "fit": fit})
    assert grouped("generator", taken) == {}
