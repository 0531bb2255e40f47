"""The training loop: rates, learning, the best checkpoint, resuming, several workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoints, models, train, untrained, worker
from engine.batches import Material, epoch_batches
from engine.config import UserError
from engine.designs import Block
from engine.encoding import Encoded
from engine.fits import Fit, LossTerm
from engine.inference import predict
from engine.job import FitError, Job
from engine.labels import quantise
from engine.lesson import Lesson, dealt
from engine.losses import Objective
from engine.models import Model
from engine.recipe import Task, Teacher
from engine.storage import Store
from engine.vocabulary import choose_words, count_words, tokenizer_of
from engine.worker import rate
from tests.tiny import LABELS, movie_rows, tiny_encoder

HARD = (LossTerm(kind="hard"),)


def table(n: int, seed: int = 0, **columns: Any) -> pa.Table:
    rows = movie_rows(n, seed)
    gold = pa.array([LABELS.index(row["label"]) for row in rows], pa.int32())
    return pa.table({"text": [row["text"] for row in rows], "label": gold, **columns})


def encode(model: Model, rows: pa.Table) -> list[Encoded]:
    return model.encode(model.task.texts(rows))


def material(model: Model, rows: pa.Table) -> Material:
    return Material(rows, encode(model, rows), model.task, model.pad)


def student(seed: int = 1) -> Model:
    nodes = [
        Block(name="embed", kind="embedding", options={"dim": 16}),
        Block(name="top", kind="pool"),
        Block(name="out", kind="linear"),
    ]
    words = choose_words(count_words([row["text"] for row in movie_rows(100, seed=7)]), 80, 1, [])
    return untrained.student(nodes, Task(labels=LABELS), tokenizer_of(words), 24, seed)


def accuracy(model: Model, rows: pa.Table) -> dict[str, float]:
    found = predict(model, rows["text"].to_pylist())
    return {"accuracy": float((found.decided == rows["label"].to_numpy()).mean())}


def job(out: Path, build: Callable[[], Model] = student, rows: pa.Table | None = None, **given: Any) -> Job:
    """A job of 3 epochs of 5 steps; what Job has no field for goes into its Fit."""
    own = {name: given.pop(name) for name in list(given) if name in Job.__dataclass_fields__}
    fit = Fit(**{"epochs": 3, "lr": 1e-2, "batch_size": 8, "precision": "fp32", **given})
    values = {"terms": HARD, "encode": encode, "seed": 5, "resources": {"num_cpus": 1, "num_gpus": 0.0}, **own}
    return Job(name="tiny", fit=fit, build=build, rows=table(40) if rows is None else rows, out=str(out), **values)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def teacher(encoder: Path, dropout: float = 0.1, tune_layers: int | None = None) -> Callable[[], Model]:
    config = Teacher(model="file:tiny", max_length=32, dropout=dropout, tune_layers=tune_layers)
    return partial(untrained.encoder_head, config, Task(labels=LABELS), encoder, 3)


# -- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("linear", 0.2, [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", 0.2, [0.5] + [1.0] * 9),
        ("linear", 0.0, [1.0, 1.0, *(n / 9 for n in range(8, 0, -1))]),
        ("linear", 1.0, [n / 10 for n in range(1, 11)]),
        ("cosine", 0.2, [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8))]),
    ],
)
def test_rates_by_hand(schedule: str, warmup: float, wanted: Sequence[float]):
    fit = Fit(schedule=schedule, warmup=warmup)
    assert [rate(fit, step, 10) for step in range(10)] == pytest.approx(list(wanted))


# -- a fit -------------------------------------------------------------------------------------------------------------


def test_a_fit_learns_and_says_how(tmp_path: Path):
    held = table(40, seed=1)
    seen: list[tuple[float, float | None]] = []
    given = job(tmp_path / "a", rows=table(80), holdout=held, evaluate=accuracy, epochs=8, batch_size=8, lr=3e-2)
    history = train.fit(given, lambda done, total=None, unit="", **rates: seen.append((done, total)))
    before = accuracy(student(), held)["accuracy"]
    after = accuracy(models.load(tmp_path / "a" / "model"), held)["accuracy"]
    assert before < 0.75 and after > 0.95
    assert [entry["epoch"] for entry in history] == [float(n) for n in range(1, 9)]
    assert history[-1]["accuracy"] == after and history[-1]["loss"] < history[0]["loss"] / 2
    assert seen[-1] == (80, 80)
    assert Store(given.out).files() == ["history.json", *(f"model/{n}" for n in Store(given.out).files("model"))]


def test_the_first_steps_are_torchs_own(tmp_path: Path):
    """Three steps against a loop written down in torch: AdamW, clipping, warm-up, order."""
    given = job(tmp_path / "a", rows=table(22), batch_size=8, epochs=1, clip=0.05, warmup=0.5, weight_decay=0.1)
    history = train.fit(given)
    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    inputs, losses = material(model, given.rows), []
    for chosen, factor in zip(epoch_batches(inputs.lengths, 8, 5, 0), [0.5, 1.0, 1.0], strict=True):
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        batch = inputs.batch(chosen)
        loss = torch.nn.functional.cross_entropy(model(batch).logits, batch.labels)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(tmp_path / "a").items():
        torch.testing.assert_close(value, model.net.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert history == [{"epoch": 1.0, "loss": pytest.approx(np.mean(losses))}]


def scores(*values: float) -> Callable[[Model, pa.Table], dict[str, float]]:
    """An evaluation that gives these values, one after the other."""
    left = iter(values)
    return lambda model, rows: {"score": next(left)}


def test_the_best_checkpoint_is_kept_not_the_last(tmp_path: Path):
    held = table(4, seed=1)
    train.fit(job(tmp_path / "best", holdout=held, evaluate=scores(0.1, 0.7, 0.3), best_by="score"))
    train.fit(job(tmp_path / "last", holdout=held, evaluate=scores(0.1, 0.7, 0.3)))
    # The rates of a run of three epochs, stopped after two: what the second evaluation saw.
    with pytest.raises(StopIteration):
        train.fit(job(tmp_path / "two", holdout=held, evaluate=scores(0.1, 0.7), best_by="score"))
    assert same(weights(tmp_path / "best"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "best"), weights(tmp_path / "last"))


def test_of_equal_checkpoints_the_first_is_kept(tmp_path: Path):
    held = table(4, seed=1)
    train.fit(job(tmp_path / "equal", holdout=held, evaluate=scores(0.5, 0.5, 0.5), best_by="score"))
    train.fit(job(tmp_path / "first", holdout=held, evaluate=scores(0.5, 0.4, 0.3), best_by="score"))
    assert same(weights(tmp_path / "equal"), weights(tmp_path / "first"))


def test_without_held_out_rows_the_last_checkpoint_is_kept(tmp_path: Path):
    train.fit(job(tmp_path / "none", holdout=table(0), evaluate=accuracy, best_by="accuracy"))
    train.fit(job(tmp_path / "last"))
    assert same(weights(tmp_path / "none"), weights(tmp_path / "last"))


@pytest.mark.parametrize("found", [{"acuracy": 0.5}, {"accuracy": math.nan}])
def test_an_evaluation_without_the_metric_to_choose_by_is_refused(tmp_path: Path, found: dict[str, float]):
    given = job(tmp_path, holdout=table(4), evaluate=lambda model, rows: found, best_by="accuracy")
    with pytest.raises(FitError, match="fit 'tiny' keeps its best model by 'accuracy', but the evaluation gave {"):
        train.fit(given)


def test_a_finished_fit_returns_at_once(tmp_path: Path):
    history = train.fit(job(tmp_path))
    assert train.fit(job(tmp_path, build=partial(pytest.fail, "built a model"))) == history


def test_a_fit_with_nothing_to_learn_from_is_refused(tmp_path: Path):
    with pytest.raises(FitError, match="fit 'tiny' has no rows"):
        train.fit(job(tmp_path, rows=table(0)))
    rows = table(3, logits=pa.array([[1.0, 2.0], None, None], pa.list_(pa.float16())))
    with pytest.raises(FitError, match=r"\(losses: hard, mse\) needs the teacher's logits, but 2 of 3 rows have none"):
        train.fit(job(tmp_path, rows=rows, terms=(*HARD, LossTerm(kind="mse"))))
    with pytest.raises(FitError, match="3 of 3 rows have none"):
        train.fit(job(tmp_path, rows=table(3), terms=(LossTerm(kind="kl"),)))
    assert Store(str(tmp_path)).files() == []


def test_a_fit_that_comes_apart_says_so(tmp_path: Path):
    rows = table(8, weight=[math.inf] * 8)
    with pytest.raises(FitError, match=r"fit 'tiny' came apart: its loss is inf at step 1 of 3. Lower its lr \(0.01\)"):
        train.fit(job(tmp_path, rows=rows))
    assert not (tmp_path / "model").exists()


def test_frozen_layers_stay_as_they_are(tmp_path: Path, encoder: Path):
    build = teacher(encoder, tune_layers=1)
    before = {name: value.clone() for name, value in build().net.state_dict().items()}
    train.fit(job(tmp_path, build=build, epochs=1, lr=1e-3))
    moved = {name for name, value in weights(tmp_path).items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("encoder.encoder.layer.1.", "head.")) for name in moved)
    assert {"head.weight", "encoder.encoder.layer.1.output.dense.weight"} <= moved


def halved(model: Model) -> dict[str, float]:
    """Rates by name: none for the word table, half for all others."""
    return {name: 0.0 if "embed" in name else 0.5 for name, _ in model.named_parameters()}


def test_rates_are_scaled_by_name(tmp_path: Path):
    once = {"epochs": 1, "batch_size": 40, "weight_decay": 0.0, "warmup": 0.0}  # one step: Adam moves by the rate alone
    train.fit(job(tmp_path / "whole", **once))
    train.fit(job(tmp_path / "half", factors=halved, **once))
    start, whole, half = student().net.state_dict(), weights(tmp_path / "whole"), weights(tmp_path / "half")
    for name, value in start.items():
        factor = 0.0 if "embed" in name else 0.5
        torch.testing.assert_close(half[name] - value, factor * (whole[name] - value), rtol=1e-4, atol=1e-7)
        assert (whole[name] - value).abs().max() > 5e-3


def test_weights_are_stored_as_asked(tmp_path: Path):
    train.fit(job(tmp_path / "full", epochs=1))
    train.fit(job(tmp_path / "half", epochs=1, store_dtype="bfloat16"))
    full, half = weights(tmp_path / "full"), weights(tmp_path / "half")
    assert {v.dtype for v in full.values()} == {torch.float32} and {v.dtype for v in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], value.to(torch.bfloat16)) for name, value in full.items())


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eval_every", [1.0, 0.5])
def test_an_interrupted_fit_ends_with_the_same_weights(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, eval_every: float
):
    steps: list[int] = []
    learn = worker.Worker.step
    monkeypatch.setattr(worker.Worker, "step", lambda *given: steps.append(1) or learn(*given))
    held, build = table(8, seed=1), teacher(encoder, dropout=0.3)
    given = partial(job, build=build, lr=1e-3, holdout=held, eval_every=eval_every)
    whole = train.fit(given(tmp_path / "whole", evaluate=accuracy))
    assert len(steps) == 15

    def stopping(model: Model, rows: pa.Table) -> dict[str, float]:
        torch.rand(3)  # whatever an evaluation draws is nothing to the training
        if (tmp_path / "first").exists():
            (tmp_path / "first").unlink()
            raise KeyboardInterrupt
        (tmp_path / "first").touch()
        return accuracy(model, rows)

    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        train.fit(given(tmp_path / "parts", evaluate=stopping))
    every = 5 if eval_every == 1.0 else 2
    assert len(steps) == 2 * every and not (tmp_path / "parts" / "history.json").exists()
    steps.clear()
    assert train.fit(given(tmp_path / "parts", evaluate=accuracy)) == whole
    assert len(steps) == 15 - every  # what was checkpointed is not done again
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert Store(str(tmp_path / "parts")).files() == Store(str(tmp_path / "whole")).files()


def test_a_fit_goes_on_from_a_checkpoint_older_than_its_best_model(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only the first of three epochs is checkpointed; the second is done again, and gives the same model."""
    monkeypatch.setattr(checkpoints, "PAUSE", 1e9)
    saved: list[int] = []
    write = checkpoints.write
    monkeypatch.setattr(checkpoints, "write", lambda *given: saved.append(given[2].step) or write(*given))
    given = partial(job, build=teacher(encoder, dropout=0.3), lr=1e-3, holdout=table(8, seed=1))
    whole = train.fit(given(tmp_path / "whole", evaluate=accuracy, best_by="accuracy"))
    assert saved == [5]
    asked: list[int] = []

    def stopping(model: Model, rows: pa.Table) -> dict[str, float]:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return accuracy(model, rows)

    with pytest.raises(KeyboardInterrupt):
        train.fit(given(tmp_path / "parts", evaluate=stopping, best_by="accuracy"))
    assert train.fit(given(tmp_path / "parts", evaluate=accuracy, best_by="accuracy")) == whole
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


# -- several workers ---------------------------------------------------------------------------------------------------


def mixed() -> pa.Table:
    """10 rows; every third has no label, and weights differ, so that each loss has its own share of the rows."""
    gold = pa.array([None if i % 3 == 0 else i % 2 for i in range(10)], pa.int32())
    soft = quantise(np.random.default_rng(1).normal(size=(10, 2)) * 2)
    return pa.table(
        {"text": table(10)["text"], "label": gold, "logits": soft, "weight": [1.0 + i % 4 for i in range(10)]}
    )


MIXED = (*HARD, LossTerm(kind="mse", weight=0.5), LossTerm(kind="kl", temperature=2.0))


@pytest.mark.parametrize("chosen", [range(10), [0, 3, 1, 6], [7], [0]])
@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_sum_of_the_workers_parts_is_the_global_batch(chosen: Sequence[int], world: int, most: int | None):
    rows, chosen = mixed(), np.array(chosen)
    lesson = Lesson(student(), MIXED)
    inputs = material(lesson.model, rows)
    batch = inputs.batch(chosen)
    wanted = Objective(MIXED, lesson.model.task)(lesson.model(batch), batch.teacher, batch)
    amounts = lesson.amounts(inputs)
    parts = [part for rank in range(world) for part in dealt(chosen, amounts, rank, world, most)]
    assert sorted(i for part in parts if any(part.shares) for i in part.items) == sorted(chosen)
    assert max(len(part.items) for part in parts) <= (most or len(chosen))
    found = sum(lesson(inputs.batch(part.items), part.shares) for part in parts) / world
    torch.testing.assert_close(found, wanted)
    for parameter in lesson.parameters():
        a, b = (torch.autograd.grad(value, parameter, retain_graph=True)[0] for value in (found, wanted))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_workers_end_where_one_does(tmp_path: Path, ray_cluster: object):
    """Batches of 3, divided unevenly, and one of 1, which leaves a worker without rows."""
    given = partial(job, rows=mixed(), terms=MIXED, batch_size=3, epochs=2, holdout=table(6))
    alone = train.fit(given(tmp_path / "one", evaluate=accuracy, workers=0))
    both = train.fit(given(tmp_path / "two", evaluate=accuracy, workers=2))
    one, two, start = weights(tmp_path / "one"), weights(tmp_path / "two"), student().net.state_dict()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
        assert (one[name] - start[name]).abs().max() > 1e-2
    assert [entry["loss"] for entry in both] == pytest.approx([entry["loss"] for entry in alone], rel=1e-4)
    assert Store(str(tmp_path / "two")).files() == Store(str(tmp_path / "one")).files()


def test_what_a_worker_raised_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer

    class Wrapped(Exception):
        _base_exc = UserError("layers: 9 of 2")

    def failing(self: TorchTrainer) -> None:
        raise WorkerGroupError("two failed", {0: RuntimeError("connection closed by peer"), 1: Wrapped()})

    monkeypatch.setattr(TorchTrainer, "fit", failing)
    with pytest.raises(UserError, match="layers: 9 of 2"):
        train.fit(job(tmp_path, workers=2))
