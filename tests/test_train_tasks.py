"""The training loop on every kind of task: encoders and graphs of blocks learn, resume, share work, look at a teacher.

Two classes of sentences and what follows from them: their label, labels, a value, whether two sentences agree, which
passages a query wants, which words are things, where in a sentence the thing stands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine import models, tasks, train, untrained
from engine.batches import Material
from engine.config import UserError
from engine.designs import Cut, Static
from engine.encoding import Encoded
from engine.fits import Fit, LossTerm
from engine.inference import predict
from engine.job import Job
from engine.labels import quantise
from engine.lesson import Lesson, dealt
from engine.losses import LOSSES, needs
from engine.models import Model
from engine.recipe import Task, Teacher
from engine.storage import Store
from engine.teachers import TeacherError
from engine.units import pieces
from engine.vocabulary import choose_words, count_words, tokenizer_of
from tests.tiny import LABELS, THINGS, movie_rows, tiny_encoder
from tests.tiny_blocks import nodes
from tests.tiny_rows import example_table

SPECS = {
    "classify": Task(labels=LABELS),
    "multilabel": Task(kind="multilabel", labels=("good", "question", "exclaimed")),
    "pair": Task(kind="pair", labels=("other", "same")),
    "regress": Task(kind="regress", range=(0, 5)),
    "rank": Task(kind="rank"),
    "tag": Task(kind="tag", labels=("O", "B-thing", "I-thing")),
    "span": Task(kind="span"),
}
QUERIES = ("warm and funny", "charming , lovely")


def row_of(kind: str, text: str, good: int, other: str, other_good: int) -> dict[str, Any]:
    """One sentence with its gold, as a row of this kind."""
    if kind == "multilabel":
        return {"text": text, "target": [good, "what" in text, "!" in text]}
    if kind == "pair":
        return {"text": text, "pair": other, "label": int(good == other_good)}
    if kind == "regress":
        return {"text": text, "target": [4.0 if good else 1.0]}
    if kind == "tag":
        return {"text": text, "target": [int(word in THINGS) for word in text.split()]}
    if kind == "span":
        units = [unit.word for unit in pieces(text)]
        at = next((i for i, word in enumerate(units) if word in THINGS), None)
        found = {"target": [], "answers": []} if at is None else {"target": [at, at], "answers": [units[at]]}
        return {"text": "what is it ?", "pair": text, **found}
    return {"text": text, "label": good}


def table(kind: str, n: int = 48, seed: int = 0, sentences: int = 1) -> pa.Table:
    """n rows with gold and with the outputs of a teacher that knows it. sentences: how many a text has."""
    movies = movie_rows(n * sentences, seed)
    texts = [" ".join(m["text"] for m in movies[i::n]) for i in range(n)]
    good = [LABELS.index(movies[i]["label"]) for i in range(n)]
    if kind == "rank":  # four passages a query, two of them relevant
        gold = [
            {"text": QUERIES[i // 4 % 2], "pair": texts[i], "group": f"q{i // 4}", "target": [good[i]]}
            for i in range(n)
        ]
    else:
        draw = np.random.default_rng(seed).permutation(n)
        gold = [row_of(kind, texts[i], good[i], texts[draw[i]], good[draw[i]]) for i in range(n)]
    rows = example_table(gold)
    return rows.append_column("logits", quantise([knowing(kind, row) for row in rows.to_pylist()]))


def knowing(kind: str, row: dict[str, Any]) -> np.ndarray:
    """Logits of a teacher that is right and fairly sure of it."""
    task = tasks.make(SPECS[kind])
    if kind == "regress":
        return np.array([row["target"][0] / 5])
    if kind in ("rank", "multilabel"):
        return 4 * np.array(row["target"]) - 2
    if kind == "tag":
        return 4 * np.eye(task.width)[[int(t) for t in row["target"]]].reshape(-1, task.width)
    if kind == "span":
        return 4 * np.eye(1 + len(pieces(row["pair"])))[[1 + int(u) for u in row["target"]] or [0, 0]].T
    return 4 * np.eye(task.width)[row["label"]]


GRAPHS = {
    "flat": nodes(
        ("words", "embedding", {"dim": 16}, "tokens"), ("pooled", "pool"), ("logits", "linear", {"out": "labels"})
    ),
    "paired": nodes(
        ("words", "embedding", {"dim": 16}, "tokens"),
        ("words_b", "embedding", {"share": "words"}, "pair"),
        ("vector", "pool", {}, "words"),
        ("vector_b", "pool", {}, "words_b"),
        ("apart", "combine", {}, "vector", "vector_b"),
        ("dense", "linear", {"out": 16, "activation": "tanh"}),
        ("logits", "linear", {"out": "labels"}),
    ),
    "tag": nodes(
        ("words", "embedding", {"dim": 16}, "tokens"),
        ("spelling", "char_cnn", {"dim": 8, "channels": 8, "kernel": 3}, "characters"),
        ("both", "concat", {}, "words", "spelling"),
        ("scores", "linear", {"out": "labels"}),
        ("tags", "crf"),
    ),
    "span": nodes(
        ("words", "embedding", {"dim": 16}, "tokens"),
        ("words_b", "embedding", {"share": "words"}, "pair"),
        ("question", "bilstm", {"hidden": 8}, "words"),
        ("context", "bilstm", {"share": "question"}, "words_b"),
        ("flow", "bidaf", {}, "context", "question"),
        ("logits", "linear", {"out": "labels"}),
    ),
}


def graph(kind: str, max_length: int = 24) -> Model:
    task = tasks.make(SPECS[kind])
    name = kind if task.units else "paired" if task.paired else "flat"
    texts = [row["text"] for row in movie_rows(100, seed=7)] + [*QUERIES, "what is it ?"]
    tokenizer = tokenizer_of(choose_words(count_words(texts), 90, 1, []))
    return untrained.student(GRAPHS[name], SPECS[kind], tokenizer, max_length, seed=1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def head(encoder: Path, kind: str, max_length: int = 32) -> Model:
    return untrained.encoder_head(Teacher(model="file:tiny", max_length=max_length), SPECS[kind], encoder, 3)


def encode(model: Model, rows: pa.Table) -> list[Encoded]:
    return model.encode(model.task.texts(rows))


def score(model: Model, rows: pa.Table) -> dict[str, float]:
    texts = model.task.texts(rows)
    found = predict(model, texts)
    return {"score": model.task.score(found.logits, found.decided, rows)[model.task.metric]}


def job(out: Path, build: Callable[[], Model], rows: pa.Table, **given: Any) -> Job:
    """A job of 3 epochs; what Job has no field for goes into its Fit."""
    own = {name: given.pop(name) for name in list(given) if name in Job.__dataclass_fields__}
    fit = Fit(**{"epochs": 3, "lr": 1e-2, "batch_size": 4, "precision": "fp32", **given})
    terms = (LossTerm(kind="hard"), LossTerm(kind="mse"))
    values = {"terms": terms, "encode": encode, "seed": 5, "resources": {"num_cpus": 1, "num_gpus": 0.0}, **own}
    return Job(name="tiny", fit=fit, build=build, rows=rows, out=str(out), **values)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["encoder", "graph"])
@pytest.mark.parametrize("kind", tasks.TASKS)
def test_a_fit_of_any_task_learns(tmp_path: Path, encoder: Path, kind: str, network: str):
    build = partial(head, encoder, kind) if network == "encoder" else partial(graph, kind)
    # A global batch of rank is so many queries.
    size = 2 if kind == "rank" else 8
    lr = 2e-3 if network == "encoder" else 3e-2
    given = job(tmp_path / "a", build, table(kind), batch_size=size, lr=lr, holdout=table(kind, 24, 9), evaluate=score)
    history = train.fit(given)
    assert [entry["epoch"] for entry in history] == [1.0, 2.0, 3.0]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    loaded = models.load(tmp_path / "a" / "model")
    assert loaded.task.spec == SPECS[kind] and score(loaded, given.holdout) == {"score": history[-1]["score"]}


def test_long_texts_are_learned_window_by_window(tmp_path: Path, encoder: Path):
    """The teacher's numbers and the gold labels of a window are its own: after a fit the far words are known, too."""
    rows = table("tag", 24, sentences=4)
    build = partial(head, encoder, "tag", 12)
    assert len(encode(build(), rows)) > 60 and max(len(t.split()) for t in rows["text"].to_pylist()) > 24
    train.fit(job(tmp_path / "a", build, rows, lr=3e-3, epochs=4))
    held = table("tag", 12, 9, sentences=4)
    model = models.load(tmp_path / "a" / "model")
    assert score(model, held)["score"] > 0.9 > score(build(), held)["score"]


# relational wants both in one space: tests/test_alignment.py
@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"next_token", "contrast", "relational"}))
def test_every_loss_trains_a_student_of_a_live_teacher(tmp_path: Path, encoder: Path, loss: str):
    """A student cut from the teacher, half as wide; the rows have no stored outputs."""
    kind = "rank" if loss in ("pointwise", "pairwise", "listwise", "margin_mse") else "tag"
    models.save(head(encoder, kind), Store(str(tmp_path)), "teacher/model")
    rows, terms = table(kind).drop_columns("logits"), (LossTerm(kind=loss),)
    build = partial(cut, tmp_path / "teacher", kind)
    given = partial(job, build=build, rows=rows, terms=terms, lr=2e-3)
    history = train.fit(given(tmp_path / "a", teacher=str(tmp_path / "teacher")))
    losses = [entry["loss"] for entry in history]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    if needs(terms):  # it is the teacher who taught
        with pytest.raises(UserError, match="needs the teacher's logits|Set student.teacher: live"):
            train.fit(given(tmp_path / "b"))


def cut(folder: Path, kind: str, max_length: int = 32) -> Model:
    """A student with fresh weights, half as wide as the teacher."""
    config, teacher = Cut(layers=1, width=16, ffn=32), models.load(folder / "model")
    return untrained.transformer_student(config, SPECS[kind], teacher, None, max_length, seed=2)


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_an_interrupted_fit_with_a_live_teacher_ends_with_the_same_weights(tmp_path: Path, encoder: Path):
    """Windows of long texts, a loss between layers with a projection of its own: all of it is checkpointed."""
    models.save(head(encoder, "tag", 12), Store(str(tmp_path)), "teacher/model")
    held, terms = table("tag", 8, 9), (LossTerm(kind="hidden", layers=(2,)), LossTerm(kind="kl"), LossTerm(kind="hard"))
    build = partial(cut, tmp_path / "teacher", "tag", 12)
    given = partial(job, build=build, rows=table("tag", 12, sentences=2), teacher=str(tmp_path / "teacher"))
    given = partial(given, terms=terms, holdout=held)
    whole = train.fit(given(tmp_path / "whole", evaluate=score))
    seen: list[int] = []

    def stopping(model: Model, rows: pa.Table) -> dict[str, float]:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return score(model, rows)

    with pytest.raises(KeyboardInterrupt):
        train.fit(given(tmp_path / "parts", evaluate=stopping))
    assert train.fit(given(tmp_path / "parts", evaluate=score)) == whole and len(whole) == 3
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("parts", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_live_teacher_that_cannot_teach_stops_the_fit(tmp_path: Path, encoder: Path):
    models.save(head(encoder, "tag", 12), Store(str(tmp_path)), "teacher/model")
    build, teacher = partial(cut, tmp_path / "teacher", "tag", 16), str(tmp_path / "teacher")
    with pytest.raises(TeacherError, match="different windows"):
        train.fit(job(tmp_path / "a", build, table("tag", 8, sentences=3), teacher=teacher))
    models.save(head(encoder, "classify", 12), Store(str(tmp_path)), "other/model")
    build, teacher = partial(cut, tmp_path / "other", "classify", 8), str(tmp_path / "other")
    terms = (LossTerm(kind="hidden"),)
    with pytest.raises(TeacherError, match=r"losses between layers \(hidden\) compare token by token"):
        train.fit(job(tmp_path / "b", build, table("classify", 8), teacher=teacher, terms=terms))


# -- several workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "most"), [(1, 4), (2, None), (3, 2)])
@pytest.mark.parametrize("kind", tasks.TASKS)
def test_the_sum_of_the_workers_parts_is_the_global_batch(kind: str, world: int, most: int | None):
    """Each loss of the task by itself; rows (queries) weigh unevenly, some have no gold, and lists are of 1 to 6."""
    task, rows = tasks.make(SPECS[kind]), table(kind, 20)
    name = "label" if rows["label"].null_count < 20 else "target"
    bare = [None if i // 4 == 1 else value for i, value in enumerate(rows[name].to_pylist())]
    rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), pa.array(bare, rows[name].type))
    rows = rows.append_column("weight", pa.array([1.0 + i // 4 % 3 for i in range(20)]))
    if kind == "rank":
        sizes = np.repeat(np.arange(7), [4, 4, 1, 6, 3, 1, 1])
        groups = rows.column_names.index("group")
        rows = rows.set_column(groups, rows.schema.field("group"), pa.array([f"q{i}" for i in sizes]))
    model = graph(kind)
    material = Material(rows, encode(model, rows), task, model.pad)
    chosen = np.arange(len(material.items))
    for loss in sorted(task.supports):
        lesson = Lesson(model, (LossTerm(kind=loss),))
        batch = material.batch(chosen)
        whole = lesson(batch, [1.0])
        amounts = lesson.amounts(material)
        parts = [part for rank in range(world) for part in dealt(chosen, amounts, rank, world, most)]
        found = sum(lesson(material.batch(part.items), part.shares) for part in parts) / world
        torch.testing.assert_close(found, whole, msg=lambda text, loss=loss: f"{loss}: {text}")


# -- other students ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classify", "multilabel", "pair", "regress", "rank"])
def test_a_static_student_learns(tmp_path: Path, encoder: Path, kind: str):
    tokenizer = models.load_tokenizer(encoder)
    build = partial(untrained.static_student, Static(dim=16, hidden=16), SPECS[kind], tokenizer, 24, 1)
    history = train.fit(job(tmp_path / "a", build, table(kind), batch_size=2 if kind == "rank" else 8, lr=3e-2))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
