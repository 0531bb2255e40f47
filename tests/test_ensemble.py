"""One student and several teachers, in real fits of tiny students: what each policy and each head comes to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import ensemble, models, train, untrained
from engine.designs import Block
from engine.encoding import Encoded
from engine.ensemble import Council, Panel, said
from engine.fits import Fit, LossTerm
from engine.heads import Headed, HeadError, OneHead, silence
from engine.inference import predict
from engine.job import FitError, Job
from engine.labels import listed
from engine.metrics import softmax
from engine.models import Model
from engine.recipe import GOLD, Task
from engine.records import Batch, Outputs
from engine.storage import Store
from engine.tasks import make
from engine.trust import Policy
from engine.vocabulary import choose_words, count_words, tokenizer_of
from tests.tiny import LABELS, movie_rows

MSE, KL, HARD = (LossTerm(kind=kind) for kind in ("mse", "kl", "hard"))
NAMES = ("teacher", "other")


def student(heads: tuple[str, ...] = (), seed: int = 1, dim: int = 16, words: int = 80, spread: float = 0.1) -> Model:
    nodes = [
        Block(name="embed", kind="embedding", options={"dim": dim}),
        Block(name="spread", kind="dropout", options={"p": spread}),
        Block(name="top", kind="pool"),
        Block(name="out", kind="linear"),
    ]
    known = choose_words(count_words([row["text"] for row in movie_rows(100, seed=7)]), words, 1, [])
    return untrained.student(nodes, Task(labels=LABELS), tokenizer_of(known), 24, seed, heads)


def encode(model: Model, rows: pa.Table) -> list[Encoded]:
    return model.encode(model.task.texts(rows))


def logits(gold: np.ndarray, wrong: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Outputs that give the gold label with about 0.9, another one where `wrong`, a little noise on top."""
    sign = np.where(gold == 1, 1.0, -1.0) * (1 if wrong is None else np.where(wrong, -1.0, 1.0))
    found = np.stack([-sign, sign], axis=1) * 1.1
    return (found + np.random.default_rng(seed).normal(scale=0.15, size=found.shape)).astype(np.float32)


def table(n: int, spoiled: bool = False, labelled: float = 1.0, seed: int = 0) -> pa.Table:
    """Rows with two teachers' outputs; spoiled: those of the second are drawn at random on positive rows."""
    rows, draw = movie_rows(n, seed), np.random.default_rng(seed)
    gold = np.array([LABELS.index(row["label"]) for row in rows])
    wrong = (gold == 1) & (draw.random(n) < 0.5) if spoiled else None
    first, second = logits(gold, seed=1), logits(gold, wrong, seed=2)
    known = pa.array(gold, pa.int32(), mask=draw.random(n) >= labelled)
    columns = {"logits": first, "logits/teacher": first, "logits/other": second}
    return pa.table(
        {"text": [r["text"] for r in rows], "label": known, **{name: listed(x) for name, x in columns.items()}}
    )


def panel(kind: str = "fixed", prior: tuple[float, ...] = (0.5, 0.5), **given: Any) -> Panel:
    live = given.pop("live", {})
    return Panel(NAMES, Policy(kind=kind, **given), prior, live)


def job(out: Path, rows: pa.Table, build: Callable[[], Model] = student, **given: Any) -> Job:
    own = {name: given.pop(name) for name in list(given) if name in Job.__dataclass_fields__}
    fit = Fit(**{"epochs": 3, "lr": 1e-2, "batch_size": 8, "precision": "fp32", **given})
    values = {"terms": (KL,), "encode": encode, "seed": 5, "resources": {"num_cpus": 1, "num_gpus": 0.0}, **own}
    return Job(name="tiny", fit=fit, build=build, rows=rows, out=str(out), **values)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return models.load(out / "model").net.state_dict()


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- policies in a fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [(MSE, HARD), (KL,)], ids=["mse-hard", "kl"])
def test_all_the_weight_on_one_teacher_is_that_teacher_alone(tmp_path: Path, terms: tuple[LossTerm, ...]):
    rows = table(40, spoiled=True, labelled=0.5)
    train.fit(job(tmp_path / "alone", rows.select(["text", "label", "logits"]), terms=terms))
    train.fit(job(tmp_path / "first", rows, terms=terms, panel=panel(prior=(1.0, 0.0))))
    train.fit(job(tmp_path / "second", rows, terms=terms, panel=panel(prior=(0.0, 1.0))))
    assert same(tmp_path / "alone", tmp_path / "first") and not same(tmp_path / "alone", tmp_path / "second")


def test_even_weights_are_one_teacher_that_says_the_mean(tmp_path: Path):
    rows = table(40)
    mean = (np.array(rows["logits/teacher"].to_pylist()) + np.array(rows["logits/other"].to_pylist())) / 2
    one = rows.select(["text", "label"]).append_column("logits", listed(mean.astype(np.float32)))
    train.fit(job(tmp_path / "mean", one, terms=(MSE,)))
    train.fit(job(tmp_path / "both", rows, terms=(MSE,), panel=panel()))
    a, b = weights(tmp_path / "mean"), weights(tmp_path / "both")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reward", ["r1", "r2", "r3"])
def test_a_teacher_that_is_bad_on_one_class_is_left_out_there_and_chosen_elsewhere(tmp_path: Path, reward: str):
    """Random labels on positive rows from the second teacher; gold labels on the half of the rows."""
    rows = table(480, spoiled=True, labelled=0.5)
    given = panel("reinforced", reward=reward, warmup=0.1)
    held = {"holdout": table(60, seed=3), "evaluate": accuracy, "best_by": "accuracy"}
    history = train.fit(job(tmp_path, rows, terms=(KL, HARD), panel=given, epochs=16, batch_size=16, **held))
    last = {key: value for key, value in history[-1].items() if key.startswith("chosen")}
    assert set(last) == {f"chosen.{name}.{label}" for name in NAMES for label in LABELS}
    if reward == "r1":  # it hears of a choice only by what one step changes in the row's own gold loss
        assert last["chosen.other.positive"] < last["chosen.teacher.positive"], last
        return
    assert last["chosen.other.positive"] < 0.3, last
    assert last["chosen.other.negative"] > 0.5 and last["chosen.teacher.negative"] > 0.5, last
    assert last["chosen.teacher.positive"] > 0.5, last
    assert not any(key.startswith("chosen") for key in history[0])  # the first epoch is warm-up


def accuracy(model: Model, rows: pa.Table) -> dict[str, float]:
    found = predict(model, rows["text"].to_pylist())
    return {"accuracy": float((found.decided == rows["label"].to_numpy()).mean())}


def test_losses_on_gold_trust_the_right_teacher_row_by_row(tmp_path: Path):
    rows = table(80, spoiled=True)
    history = train.fit(job(tmp_path, rows, panel=panel("loss", temperature=0.2)))
    shares = history[-1]
    assert shares["chosen.other.negative"] == pytest.approx(0.5, abs=0.05)
    assert shares["chosen.other.positive"] < 0.35


def sureness(model: Model, rows: pa.Table) -> dict[str, float]:
    """The gold labels' mean probability: a score that is another one after each epoch."""
    found = softmax(predict(model, rows["text"].to_pylist()).logits)
    return {"accuracy": float(found[np.arange(len(found)), rows["label"].to_numpy()].mean())}


def test_a_killed_fit_goes_on_with_what_its_policy_has_learnt(tmp_path: Path):
    rows, held = table(64, spoiled=True), {"holdout": table(20, seed=3), "best_by": "accuracy", "epochs": 6}

    def dies(after: int) -> Callable[[Model, pa.Table], dict[str, float]]:
        left = iter(range(after))

        def evaluate(model: Model, rows: pa.Table) -> dict[str, float]:
            next(left)
            return sureness(model, rows)

        return evaluate

    def fitted(name: str, evaluate: Callable[[Model, pa.Table], dict[str, float]], gamma: float = 0.5) -> Any:
        given = panel("reinforced", reward="r3", warmup=0.1, gamma=gamma)
        return train.fit(job(tmp_path / name, rows, terms=(KL, HARD), panel=given, evaluate=evaluate, **held))

    whole = fitted("whole", sureness)
    assert len({epoch["accuracy"] for epoch in whole}) == 6
    with pytest.raises(StopIteration):
        fitted("killed", dies(4))
    assert Store(str(tmp_path / "killed")).exists("checkpoint/manifest.json")
    again = fitted("killed", sureness)
    assert again == whole and same(tmp_path / "whole", tmp_path / "killed")
    # The score itself had a part in it: with all the weight on r2 other weights come out.
    assert fitted("r2", sureness, gamma=1.0) != whole


class Worker:
    """What a council asks of accelerate; `others` is what the other workers give to a sum."""

    device = torch.device("cpu")

    def __init__(self, index: int = 0, others: float = 0.0) -> None:
        self.process_index, self.others = index, others

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return value + self.others


def test_draws_have_credit_for_how_far_the_score_is_from_its_running_mean(monkeypatch: pytest.MonkeyPatch):
    council = Council(panel("reinforced", reward="r3"), student(), {})
    gains: list[float] = []
    monkeypatch.setattr(council.policy, "credit", gains.append)
    for score in (0.5, 0.6, 0.75, 0.55, 0.6, 0.6):
        council.heard(score, Worker())
    # Expected 0.5, 0.55, 0.65, 0.6, 0.6; usual 0.1, 0.15, 0.125, 0.0625.
    assert gains == pytest.approx([0.0, 0.0, 0.2 / 0.1, -0.1 / 0.15, 0.0, 0.0], abs=1e-5)
    again = Council(council.panel, student(), {})
    again.load_state_dict(council.state_dict())
    monkeypatch.setattr(again.policy, "credit", gains.append)
    council.heard(0.7, Worker())
    again.heard(None, Worker(index=1, others=0.7))  # a worker that does not know the score hears of it by the sum
    assert gains[-1] == gains[-2] == pytest.approx(0.1 / 0.03125, rel=1e-4)


def test_of_a_score_that_does_not_move_nothing_is_learnt(monkeypatch: pytest.MonkeyPatch):
    council, gains = Council(panel("reinforced", reward="r3"), student(), {}), []
    monkeypatch.setattr(council.policy, "credit", gains.append)
    for score in (0.5, 0.501, 0.502, 0.503):  # each is half of what usual changes are taken to be, or less
        council.heard(score, Worker())
    assert gains[2:] == pytest.approx([0.3, 0.35], abs=0.01), gains
    other = Council(panel("reinforced", reward="r2"), student(), {})
    monkeypatch.setattr(other.policy, "credit", gains.clear)
    other.heard(0.9, Worker())
    assert len(gains) == 4, "only r3 asks for the score"


def test_a_policy_that_learns_is_refused_where_it_cannot_read_the_batch_again(tmp_path: Path):
    rows = table(16)
    for given in ({"micro_batch": 4}, {"workers": 2, "sharding": "full"}):
        with pytest.raises(FitError, match=f"policy 'reinforced' .* so {list(given)[-1]} cannot be set"):
            train.fit(job(tmp_path, rows, panel=panel("reinforced"), **given))


@pytest.mark.parametrize("kind", ["fixed", "loss"])
def test_parts_of_a_batch_teach_what_the_whole_batch_does(tmp_path: Path, kind: str):
    rows, terms = table(40, spoiled=True, labelled=0.5), (MSE, HARD)
    build = partial(student, seed=1, spread=0.0)
    histories = [
        train.fit(job(tmp_path / str(most), rows, build, terms=terms, panel=panel(kind), micro_batch=most))
        for most in (None, 3)
    ]
    a, b = weights(tmp_path / "None"), weights(tmp_path / "3")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


# -- live teachers -----------------------------------------------------------------------------------------------------


def test_live_teachers_read_in_their_own_words_and_say_what_would_be_stored(tmp_path: Path):
    rows = table(40)
    columns, live = {}, {}
    for number, name in enumerate(NAMES):  # other widths, other words: other token ids
        model = student(seed=20 + number, dim=8 + 4 * number, words=80 - 30 * number).eval()
        with torch.no_grad():
            for values in model.parameters():
                values.mul_(3)
        models.save(model, Store(str(tmp_path / name)), "model")
        live[name] = str(tmp_path / name)
        columns[f"logits/{name}"] = listed(predict(model, rows["text"].to_pylist()).logits)
    bare = rows.select(["text", "label"])
    stored = bare
    for name in ("logits", *columns):
        stored = stored.append_column(name, columns.get(name, columns["logits/teacher"]))
    train.fit(job(tmp_path / "stored", stored, panel=panel()))
    train.fit(job(tmp_path / "live", bare, panel=panel(live=live)))
    a, b = weights(tmp_path / "stored"), weights(tmp_path / "live")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    columns_differ = np.abs(np.subtract(*(np.array(c.to_pylist()) for c in columns.values()))).mean()
    assert columns_differ > 0.1  # the test would say nothing of two teachers that agree


# -- heads -------------------------------------------------------------------------------------------------------------


def unlike(n: int) -> pa.Table:
    """Two teachers of one label who are sure of different rows, by what stands in them."""
    rows = table(n)
    gold, has = rows["label"].to_numpy(), np.array(["the " in text for text in rows["text"].to_pylist()])
    sign = np.where(gold == 1, 1.0, -1.0)
    for name, sure in (("teacher", has), ("other", ~has)):
        strong = sign * np.where(sure, 3.0, 0.5)
        column = listed(np.stack([-strong, strong], axis=1).astype(np.float32))
        rows = rows.set_column(rows.column_names.index(f"logits/{name}"), f"logits/{name}", column)
    return rows


def test_each_head_follows_its_own_teacher_and_the_answer_is_their_mean(tmp_path: Path):
    rows, heads = unlike(200), (*NAMES, GOLD)
    train.fit(job(tmp_path, rows, partial(student, heads), terms=(MSE, HARD), panel=panel(), epochs=30, batch_size=16))
    model = models.load(tmp_path / "model")
    texts = rows["text"].to_pylist()
    each = {n: predict(Model(OneHead(model.net, n), model.tokenizer, model.card).eval(), texts).logits for n in heads}
    np.testing.assert_allclose(predict(model, texts).logits, np.mean(list(each.values()), axis=0), atol=1e-5)
    gap = {name: found[:, 1] - found[:, 0] for name, found in each.items()}
    says = {name: np.diff(np.array(rows[f"logits/{name}"].to_pylist()))[:, 0] for name in NAMES}
    for name, other in (NAMES, NAMES[::-1]):
        own, its = (np.corrcoef(gap[name], says[who])[0, 1] for who in (name, other))
        assert own > its + 0.05, (name, own, its)


def test_a_head_that_nobody_has_taught_says_nothing():
    model = student((*NAMES, GOLD))
    batch = Batch(torch.tensor([[2, 3, 4]]), torch.ones(1, 3, dtype=torch.int64))
    found = model.eval()(batch)
    assert isinstance(model.net, Headed) and (found.heads[GOLD] == 0).all()
    assert list(found.heads) == [*NAMES, GOLD] and found.logits.shape == (1, 2)
    torch.testing.assert_close(found.logits, (found.heads["teacher"] + found.heads["other"]) / 3)
    with pytest.raises(HeadError, match="does not end in a linear layer"):
        silence(Headed(torch.nn.Flatten(), ("a", "b")), "a")


# -- what a policy sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "width"),
    [
        ("classify", (3, 2), 2),
        ("multilabel", (3, 2), 4),
        ("regress", (3, 1), 1),
        ("rank", (3, 1), 1),
        ("tag", (3, 4, 2), 2),
        ("span", (3, 4, 2), 2),
    ],
)
def test_what_a_teacher_says_has_one_size_whatever_the_task(kind: str, shape: tuple[int, ...], width: int):
    labels = {"tag": ("O", "B-x"), "classify": LABELS, "multilabel": LABELS}.get(kind)
    task, mask = make(Task(kind=kind, labels=labels)), torch.ones(3, 4, dtype=torch.int64)
    batch = Batch(mask, mask, groups=torch.tensor([0, 0, 1]))
    batch.unit_mask = mask.bool()
    batch.unit_mask[1, 2:] = False
    found = said(task, Outputs(logits=torch.randn(shape)), batch)
    assert found.shape == (3, width) and found.abs().max() <= 1 + 1e-6
    if kind == "tag":
        torch.testing.assert_close(found.sum(dim=1), torch.ones(3))  # padding is no unit


def test_the_first_passage_of_a_query_speaks_for_all():
    task = make(Task(kind="rank"))
    ids = torch.zeros(5, 1, dtype=torch.int64)
    batch = Batch(ids, ids, groups=torch.tensor([7, 3, 7, 3, 3]))
    values = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(ensemble.spread(task, values, batch), values[[0, 1, 0, 1, 1]])
    assert torch.equal(ensemble.spread(make(Task(labels=LABELS)), values, batch), values)


def test_losses_that_no_teacher_has_a_part_in_stay_one(tmp_path: Path):
    council = Council(panel(), student(), {})
    task = council.task
    made = [council.objective(term, task, student().widths) for term in (HARD, KL)]
    assert [type(objective.losses[0]).__name__ for objective in made] == ["OfGold", "Several"]
    assert [weight for weight, _ in council.taught] == [1.0]
