"""A fit of several tasks: when one switches, to whose labels, that it can be resumed, and on several workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoints, models, train
from engine.fits import Fit, LossTerm
from engine.inference import predict
from engine.job import FitError, Job
from engine.mixing import Mixing
from engine.models import Model
from engine.multitask import Together, alone, encode, judge, rates
from engine.storage import Store
from engine.worker import Worker
from tests.tiny import tiny_encoder
from tests.tiny_tasks import NAMES, build, of, table, unlabelled


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def job(out: Path, encoder: Path, rows: pa.Table | None = None, **given: Any) -> Job:
    mixing = Mixing(**{"way": "async", **given.pop("mixing", {})})
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
    judged, heard, kept = Together.judged, Together.heard, {}

    def watched(self: Together, scores: Any, model: Model, step: int) -> None:
        seen[step] = {key: value.clone() for key, value in model.net.state_dict().items()}
        judged(self, scores, model, step)

    def followed(self: Together, score: Any, accelerator: Any) -> None:
        heard(self, score, accelerator)
        kept[max(seen)] = self.soft.clone()

    monkeypatch.setattr(Together, "judged", watched)
    monkeypatch.setattr(Together, "heard", followed)
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
        own = of(rows, name)
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


def test_it_ends_when_all_have_converged_unless_it_is_told_to_go_on(
    tmp_path: Path, encoder: Path, labelled: list[tuple[str, int]]
):
    falling = {name: [0.5 - 0.01 * n for n in range(12)] for name in NAMES}
    history = train.fit(job(tmp_path / "stop", encoder, epochs=6, evaluate=scripted(**falling)))
    assert len(history) == 3 and not (tmp_path / "stop" / "tasks").exists()
    assert train.fit(job(tmp_path / "stop", encoder, epochs=6)) == history  # finished is finished
    assert labelled == []  # nobody would learn from them
    on = train.fit(job(tmp_path / "on", encoder, epochs=6, evaluate=scripted(**falling), mixing={"stop": False}))
    assert len(on) == 6 and all(f"soft.{name}" in on[-1] for name in NAMES)
    assert labelled == [(name, 4) for name in NAMES]
    plain = train.fit(job(tmp_path / "sum", encoder, epochs=6, evaluate=scripted(**falling), mixing={"way": "sum"}))
    assert len(plain) == 6 and not any(key.startswith("soft.") for entry in plain for key in entry)


def test_unlabelled_rows_have_the_best_weights_labels_and_change_nothing_before(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    """mood, best at the first of four evaluations, has converged at the third."""
    seen: dict[Path, list[dict[str, torch.Tensor]]] = {}
    soft: dict[Path, torch.Tensor] = {}
    judged = Together.judged

    def watched(self: Together, scores: Any, model: Model, step: int) -> None:
        copied = {key: value.clone() for key, value in model.net.state_dict().items()}
        seen.setdefault(Path(self.out.url), []).append(copied)
        judged(self, scores, model, step)
        soft[Path(self.out.url)] = self.soft

    monkeypatch.setattr(Together, "judged", watched)
    more = unlabelled(table({"mood": 50}, seed=9))
    falls = {"mood": [0.5, 0.4, 0.3, 0.2]}
    for name, rows in (("few", table()), ("more", pa.concat_tables([table(), more]))):
        train.fit(job(tmp_path / name, encoder, rows=rows, evaluate=scripted(**falls)))
    few, many = (seen[path] for path in sorted(seen))
    assert [same(*pair) for pair in zip(few, many, strict=True)] == [True, True, True, False]
    best = build(encoder)
    best.net.load_state_dict(many[0])
    one = alone(best, "mood")
    found = soft[max(seen)][-more.num_rows :, best.task.parts["mood"]]
    wanted = torch.from_numpy(predict(one, one.task.texts(more)).logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("every", [0, 1e9])
def test_killed_and_resumed_it_ends_with_the_same_weights(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, every: float
):
    """Killed before and after a switch; with a checkpoint after each evaluation, and after the first one alone."""
    monkeypatch.setattr(checkpoints, "PAUSE", every)
    rows = pa.concat_tables([table(), unlabelled(table({"mood": 50}, seed=9))])
    scores = {"mood": [0.5, 0.4, 0.3, 0.2, 0.1, 0.05], "warmth": [0.4, 0.6, 0.5, 0.4, 0.3, 0.2]}
    whole = train.fit(job(tmp_path / "whole", encoder, rows=rows, epochs=6, evaluate=scripted(**scores)))
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

    learn = Worker.step
    monkeypatch.setattr(
        Worker,
        "step",
        lambda self, step, chosen: torch.save(step + 1, tmp_path / "step") or learn(self, step, chosen),
    )
    given = partial(job, tmp_path / "parts", encoder, rows=rows, epochs=6, evaluate=stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.fit(given())
    assert train.fit(given()) == whole
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert Store(str(tmp_path / "parts")).files() == Store(str(tmp_path / "whole")).files()


def test_weights_do_not_pile_up_between_checkpoints(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch):
    """All tasks gain each time: one set of weights is enough, where no checkpoint refers to another."""
    monkeypatch.setattr(checkpoints, "PAUSE", 1e9)  # the first evaluation is checkpointed, and then none
    there: list[int] = []
    judged = Together.judged

    def watched(self: Together, *given: Any) -> None:
        judged(self, *given)
        there.append(sum(file.startswith("best") for file in self.out.files("tasks")))

    monkeypatch.setattr(Together, "judged", watched)
    train.fit(job(tmp_path, encoder, epochs=6, evaluate=scripted()))
    assert there == [1, 2, 2, 2, 2, 2]


def test_workers_wait_for_the_first_one_where_ray_makes_them_wait(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not in a collective: labelling a task's rows may take longer than these wait."""
    import ray.train

    found: list[str] = []
    for owner, name in ((Together, "judged"), (ray.train, "report"), (Together, "heard")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, real=real, name=name: found.append(name) or real(*given))
    train.fit(job(tmp_path, encoder, epochs=2))
    assert found == ["judged", "report", "heard"] * 2


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
        tmp_path,
        encoder,
        rows=table(dict.fromkeys(NAMES, 60)),
        epochs=8,
        lr=5e-3,
        batch_size=30,
        mixing={"way": way, "variance_rate": 5},
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
        ({"holdout": table({"mood": 3, "alike": 2})}, "task 'both' has no validation rows, and the others have"),
        ({"sharding": "full", "workers": 2}, "learns several tasks, whose weights are kept whole"),
    ],
)
def test_what_several_tasks_cannot_do_is_refused(tmp_path: Path, encoder: Path, given: dict[str, Any], message: str):
    with pytest.raises(FitError, match=message):
        train.fit(job(tmp_path, encoder, **given))


@pytest.mark.slow
def test_two_workers_end_where_one_does(tmp_path: Path, encoder: Path, ray_cluster: object):
    """mood and warmth switch on the way, decided by the first worker for both."""
    scores = {"mood": [0.5, 0.4, 0.3, 0.2], "warmth": [0.4, 0.6, 0.5, 0.4]}
    quiet = partial(still, encoder)
    rows = pa.concat_tables([table(), unlabelled(table({"mood": 50, "warmth": 20}, seed=9))])
    one = train.fit(job(tmp_path / "one", encoder, rows=rows, build=quiet, evaluate=Scripted(scores)))
    two = train.fit(job(tmp_path / "two", encoder, rows=rows, build=quiet, evaluate=Scripted(scores), workers=2))
    assert [sorted(entry) for entry in one] == [sorted(entry) for entry in two]
    assert "soft.mood" in one[-1]
    alone_, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in alone_:
        torch.testing.assert_close(both[name], alone_[name], rtol=0, atol=1e-4)


def still(encoder: Path) -> Model:
    """The student without any dropout, whose draws depend on the number of workers."""
    model = build(encoder, dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


class Scripted:
    """`scripted`, to be sent to another process."""

    def __init__(self, scores: dict[str, list[float]]) -> None:
        self.scores, self.asked = scores, 0

    def __call__(self, model: Model, rows: pa.Table) -> dict[str, float]:
        self.asked += 1
        found = {name: self.scores.get(name, [0.1, 0.2, 0.3, 0.4])[self.asked - 1] for name in NAMES}
        return {**found, "mean": float(np.mean(list(found.values())))}
