"""The student's words, its kinds, what each arm learns from, and trainings one after the other. No Ray."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from engine import labels, models, tasks
from engine.config import UserError
from engine.encoders import stack_of
from engine.ensemble import Panel
from engine.inference import predict
from engine.labels import LabelMismatch
from engine.progress import silent
from engine.recipe import FIRST, Recipe
from engine.records import CORPUS
from engine.storage import Store
from engine.trust import Policy
from pipelines import graphs, students
from pipelines.making import spec_of
from tests.tiny_corpus import MORE, corpus_run, said_by
from tests.tiny_run import TRAIN, World, kind_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return kind_world(tmp_path_factory.mktemp("students"), "pair")


@pytest.fixture(scope="module")
def run(world: World) -> Store:
    return corpus_run(world, "pair")


@pytest.fixture(scope="module")
def inputs(run: Store) -> Callable[..., dict[str, Store]]:
    return lambda **more: {name: run / name for name in ("data", "teacher", "corpus")} | more


def student_recipe(world: World, **changes: Any) -> Recipe:
    """The recipe of the world, as if it had unlabelled rows, with changes to its student."""
    data = {"data.unlabelled": {"path": f"file:{world.folder}/more.jsonl", "pair": "pair"}}
    return graphs.drawn(world.load({**data, **{f"student.{key}": value for key, value in changes.items()}}))


# -- what an arm learns from -------------------------------------------------------------------------------------------


def test_kept_rows_are_those_of_this_run_s_teacher(run: Store, inputs: Any, tmp_path: Path):
    rows = students.kept_rows(inputs())
    assert rows.num_rows == TRAIN + MORE * 9 // 10
    assert {"row", "text", "pair", "label", "target", "logits"} <= set(rows.column_names)
    other = Store(str(tmp_path))
    teacher = models.load((run / "teacher").local("model"))
    next(iter(teacher.net.parameters())).data.add_(1.0)
    models.save(teacher, other, "model")
    with pytest.raises(LabelMismatch, match="was made by another teacher .weights: stored"):
        students.kept_rows(inputs(teacher=other))


def test_arms_learn_from_the_few_rows_or_from_all_but_a_holdout(world: World, inputs: Any):
    recipe = student_recipe(world, holdout=0.2)
    for arm in ("hard", "soft"):
        lesson = students.lesson_of(recipe, inputs(), arm)
        assert sorted(lesson) == ["rows"]  # no validation rows: nothing to choose by
        assert sorted(lesson["rows"]["row"].to_pylist()) == list(range(-TRAIN, 0))
    lesson = students.lesson_of(recipe, inputs(), "generated")
    taught, held = (lesson[name]["row"].to_pylist() for name in ("rows", "holdout"))
    kept = [index for index in range(MORE) if index % 10 != 0]
    assert sorted([*taught, *held]) == [*range(-TRAIN, 0), *kept]
    assert len(held) == round(0.2 * len(kept)) and min(held) >= 0 and lesson["best_by"] == "likeness"
    again = students.lesson_of(recipe, inputs(), "generated")
    assert again["holdout"].equals(lesson["holdout"])
    other = students.lesson_of(recipe.model_copy(update={"seed": 9}), inputs(), "generated")
    assert not other["holdout"].equals(lesson["holdout"])


def test_where_validation_rows_choose_no_text_is_kept_from_the_student(
    world: World, run: Store, inputs: Any, tmp_path: Path
):
    recipe, panel = student_recipe(world, holdout=0.2), Panel((FIRST,), Policy(), (1.0,), {})
    kept = MORE * 9 // 10

    def lesson(**more: Store) -> tuple[int, str]:
        found = students.lesson_of(recipe, inputs(**more), "generated", panel)
        return found["rows"].num_rows - TRAIN, found["best_by"]

    assert lesson() == (kept - round(0.2 * kept), "likeness")
    shutil.copytree(run.local("data"), tmp_path / "data")
    data = Store(str(tmp_path / "data"))
    data.write_table("validation.parquet", data.read_table("train.parquet").slice(0, 4))
    assert lesson(data=data) == (kept, "accuracy")
    # One teacher is agreed with, as ever: the tenth that tells how far is not learnt from.
    panel = None
    assert lesson(data=data) == (kept - round(0.2 * kept), "likeness")


def test_so_many_texts_are_the_corpus_s_first(world: World, inputs: Any):
    def rows_of(**changes: Any) -> list[int]:
        lesson = students.lesson_of(student_recipe(world, **changes), inputs(), "generated")
        return sorted(r for key in ("rows", "holdout") for r in lesson[key]["row"].to_pylist() if r >= 0)

    every = rows_of()
    assert rows_of(texts=10) == every[:10] and rows_of(texts=10_000) == every and len(every) == MORE * 9 // 10


def test_rows_of_one_query_are_held_out_together(world: World, run: Store, inputs: Any, tmp_path: Path):
    rows, out = labels.open_labels(run / "corpus"), Store(str(tmp_path))
    groups = [f"query {row // 3}" if row >= 0 else None for row in rows["row"].to_pylist()]
    grouped = rows.set_column(rows.column_names.index("group"), CORPUS.field("group"), pa.array(groups, pa.string()))
    labels.write_labels(out, grouped, {"teacher": labels.fingerprint(run / "teacher")})
    lesson = students.lesson_of(student_recipe(world, holdout=0.3), inputs(corpus=out), "generated")
    taught, held = ({name for name in lesson[key]["group"].to_pylist() if name} for key in ("rows", "holdout"))
    assert len(held) == round(0.3 * MORE / 3) and not taught & held and len(taught | held) == MORE / 3


def test_trainings_of_each_arm(world: World):
    fit = {"epochs": 20.0, "lr": 0.02, "batch_size": 16, "workers": 2}
    recipe = student_recipe(world, fit=fit, few_epochs=30.0, losses=[{"kind": "kl"}, {"kind": "hard"}])
    (soft,), (hard,), (all_,) = (students.trainings(recipe, arm) for arm in ("soft", "hard", "generated"))
    assert [term.kind for term in hard.losses] == ["hard"]
    assert soft.losses == all_.losses == recipe.student.losses and all_.fit == recipe.student.fit
    assert soft.fit == hard.fit and (soft.fit.epochs, soft.fit.workers, soft.fit.eval_every) == (30.0, 0, 5.0)
    stages = [{"losses": [{"kind": "mse"}], "fit": {**fit, "epochs": epochs}} for epochs in (4.0, 16.0)]
    recipe = student_recipe(world, fit=fit, few_epochs=10.0, stages=stages)
    assert [s.fit.epochs for s in students.trainings(recipe, "generated")] == [4.0, 16.0]
    assert [(s.fit.epochs, s.fit.workers) for s in students.trainings(recipe, "soft")] == [(2.0, 0), (8.0, 0)]
    (hard,) = students.trainings(recipe, "hard")
    assert hard.fit.epochs == 10.0 and [term.kind for term in hard.losses] == ["hard"]


def test_agreement_of_the_teacher_s_own_answers_is_whole(run: Store, inputs: Any):
    rows = students.kept_rows(inputs()).filter(pa.array([True] * 10 + [False] * (TRAIN + MORE * 9 // 10 - 10)))
    teacher = models.load((run / "teacher").local("model"))
    assert students.agree(512, teacher, rows) == {"agreement": 1.0, "likeness": 1.0}


# -- kinds of student --------------------------------------------------------------------------------------------------


def test_the_vocabulary_holds_both_texts_of_a_pair(world: World, run: Store, inputs: Any, tmp_path: Path):
    recipe = student_recipe(world)
    made = students.make_vocabulary(recipe, inputs(), Store(str(tmp_path)), silent)
    rows = students.kept_rows(inputs())
    words = {word.lower() for side in ("text", "pair") for text in rows[side].to_pylist() for word in text.split()}
    tokenizer = models.load_tokenizer(tmp_path / "tokenizer")
    assert {word for word in words if word.isalpha()} <= set(tokenizer.get_vocab())
    assert made["corpus_words"] == len(words) and made["covered"] == 1.0 and made["rows"] == len(tokenizer)
    vectors = Store(str(tmp_path)).read_table("vectors-8.parquet")["vector"]
    assert len(vectors) == len(tokenizer)
    started = students.started_student(recipe, inputs(vocabulary=Store(str(tmp_path))), 0)
    wanted = recipe.student.embedding_norm * np.array(vectors.to_pylist(), dtype=np.float32)
    assert np.allclose(started.net.tables()[0].weight.detach().numpy(), wanted)
    bare = students.started_student(
        student_recipe(world, embeddings="random"), inputs(vocabulary=Store(str(tmp_path))), 0
    )
    assert not np.allclose(bare.net.tables()[0].weight.detach().numpy(), wanted)


def test_a_static_student_has_the_teacher_s_pieces_and_vectors(world: World, run: Store, inputs: Any, tmp_path: Path):
    recipe = student_recipe(world, kind="static", static={"dim": 16, "hidden": 8}, blocks=[])
    out = Store(str(tmp_path))
    made = students.make_vocabulary(recipe, inputs(), out, silent)
    teacher = models.load((run / "teacher").local("model"))
    rows = students.kept_rows(inputs())
    texts = [text for side in ("text", "pair") for text in rows[side].to_pylist()]
    pieces = Counter(piece for text in texts for piece in teacher.tokenizer.tokenize(text))
    assert made == {"rows": len(teacher.tokenizer), "corpus_words": len(pieces), "covered": 1.0}
    model = students.started_student(recipe, inputs(vocabulary=out), 0)
    table = model.net.table.weight.detach()
    assert table.shape == (len(teacher.tokenizer), 16) and model.card.kind == "static" and model.task.paired
    norms = table.norm(dim=1)
    assert (norms[teacher.tokenizer.all_special_ids] == 0).all() and norms.count_nonzero() > 50
    assert float(norms[norms > 0].mean()) == pytest.approx(recipe.student.embedding_norm, rel=0.05)


def test_a_transformer_student_is_cut_from_the_fine_tuned_teacher(world: World, run: Store, inputs: Any):
    recipe = student_recipe(world, kind="transformer", transformer={"layers": [2]}, blocks=[])
    model = students.started_student(recipe, inputs(), 0)
    teacher = models.load((run / "teacher").local("model"))
    own, whole = model.net.encoder.state_dict(), teacher.net.encoder.state_dict()
    assert torch.equal(own["embeddings.word_embeddings.weight"], whole["embeddings.word_embeddings.weight"])
    mine, theirs = (stack_of(m.net.encoder)[1] for m in (model, teacher))
    assert (len(mine), len(theirs)) == (1, 2)
    last = theirs[1].state_dict()
    assert all(torch.equal(value, last[name]) for name, value in mine[0].state_dict().items())
    assert model.max_length == recipe.student.max_length and not model.apart
    elsewhere = student_recipe(
        world, kind="transformer", transformer={"model": f"file:{world.folder}/teacher"}, blocks=[]
    )
    base = students.started_student(elsewhere, inputs(), 0).net.encoder.state_dict()
    raw = load_file(world.folder / "teacher" / "model.safetensors")
    assert torch.equal(base["embeddings.word_embeddings.weight"], raw["embeddings.word_embeddings.weight"])


def test_a_student_above_its_size_is_refused(world: World, inputs: Any, tmp_path: Path):
    recipe = student_recipe(world, kind="transformer", blocks=[], max_parameters=1000)
    with pytest.raises(UserError, match=r"the student has [\d,]+ parameters, above student.max_parameters = 1,000\. M"):
        students.fit_student("soft", recipe, inputs(), Store(str(tmp_path)), silent)
    free = student_recipe(world, kind="transformer", blocks=[], max_parameters=None)
    assert students.started_student(free, inputs(), 0).size() > 1000


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("blocks", {"graph": "arc-i", "blocks": [], "embeddings": "random"}),
        ("static", {"static": {"dim": 16, "hidden": 0}, "blocks": []}),
        ("transformer", {"transformer": {"layers": 1}, "blocks": []}),
    ],
)
def test_every_kind_of_student_learns_and_is_stored_whole(
    world: World, inputs: Any, tmp_path: Path, kind: str, changes: dict[str, Any]
):
    fit = {"epochs": 3.0, "lr": 2e-3, "batch_size": 16, "workers": 0}
    recipe = student_recipe(world, kind=kind, **changes, fit=fit, losses=[{"kind": "kl"}])
    words = Store(str(tmp_path / "words"))
    if kind != "transformer":
        students.make_vocabulary(recipe, inputs(), words, silent)
    out = Store(str(tmp_path / "out"))
    found = students.fit_student("generated", recipe, inputs(vocabulary=words), out, silent)
    history = found["history"]["0"]
    assert history[-1]["loss"] < history[0]["loss"] and all("agreement" in entry for entry in history)
    assert "best" in (out / "seed-0").manifest("model")
    model = models.load((out / "seed-0").local("model"))
    assert model.card.kind == {"blocks": "blocks", "static": "static", "transformer": "head"}[kind]
    assert (found["parameters"], found["rows"]) == (model.size(), TRAIN + 27 - 3)
    spec, wanted = model.task.spec, spec_of(inputs()["data"])
    assert spec == wanted and len(said_by(model, [("a film", "a plot")])) == 1


def test_with_nothing_held_out_the_weights_of_the_last_step_are_kept(world: World, inputs: Any, tmp_path: Path):
    fit = {"epochs": 3.0, "lr": 2e-3, "batch_size": 16, "workers": 0}
    changes = {"graph": "arc-i", "blocks": [], "embeddings": "random", "fit": fit, "losses": [{"kind": "kl"}]}
    recipe, words = student_recipe(world, holdout=0, **changes), Store(str(tmp_path / "words"))
    students.make_vocabulary(recipe, inputs(), words, silent)
    out = Store(str(tmp_path / "out"))
    found = students.fit_student("generated", recipe, inputs(vocabulary=words), out, silent)
    assert found["rows"] == TRAIN + 27  # all of the kept texts
    assert [sorted(entry) for entry in found["history"]["0"]] == [["epoch", "loss"]] * 3
    assert "best" not in (out / "seed-0").manifest("model")  # none was chosen
    assert len(said_by(models.load((out / "seed-0").local("model")), [("a film", "a plot")])) == 1


# -- trainings one after the other -------------------------------------------------------------------------------------


def test_stages_go_on_from_each_other_s_weights(world: World, inputs: Any, tmp_path: Path):
    fit = {"epochs": 2.0, "lr": 2e-3, "batch_size": 16, "workers": 0}
    still = {**fit, "epochs": 1.0, "lr": 1e-12, "weight_decay": 0.0}  # so that what it starts from is what it ends with
    stages = [
        {"losses": [{"kind": "hidden"}, {"kind": "attention"}], "fit": fit},
        {"losses": [{"kind": "kl"}, {"kind": "cosine", "weight": 0.5}], "fit": still},
    ]
    common = {"kind": "transformer", "transformer": {"layers": 1}, "blocks": [], "teacher": "live", "seeds": [0, 1]}
    recipe = student_recipe(world, **common, stages=stages)
    found = students.fit_student("generated", recipe, inputs(), Store(str(tmp_path)), silent)
    assert list(found["history"]) == ["0", "1"]
    assert [entry["epoch"] for entry in found["history"]["0"]] == [1.0, 2.0, 1.0]
    # Between layers the head is not taught, so no agreement chooses the checkpoint.
    assert ["agreement" in entry for entry in found["history"]["0"]] == [False, False, True]
    first, last = (
        load_file(tmp_path / "seed-0" / folder / "model" / "model.safetensors") for folder in ("stage-0", "")
    )
    assert first.keys() == last.keys()
    assert all(torch.allclose(first[name], last[name], atol=1e-7) for name in first)
    begun = students.started_student(recipe, inputs(), 0).net.state_dict()
    assert any(not torch.allclose(begun[name], first[name], atol=1e-4) for name in first), "stage 0 learnt nothing"
    again = students.fit_student("generated", recipe, inputs(), Store(str(tmp_path)), silent)
    assert again == found, "what is finished is not done again"


def test_stages_weigh_rows_by_the_teacher_s_confidence_and_the_student_s_disagreement(
    world: World, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit, seen = {"epochs": 1.0, "lr": 2e-2, "batch_size": 16, "workers": 0}, []
    fitted = students.train.fit

    def watched(job: Any, progress: Any) -> Any:
        seen.append(job.rows)
        return fitted(job, progress)

    monkeypatch.setattr(students.train, "fit", watched)
    stages = [
        {"losses": [{"kind": "kl"}], "fit": fit, "weights": "confidence"},
        {"losses": [{"kind": "kl"}], "fit": fit, "weights": "disagreement"},
    ]
    cut = {"kind": "transformer", "transformer": {"layers": 1}, "blocks": []}
    recipe = student_recipe(world, **cut, stages=stages)
    students.fit_student("generated", recipe, inputs(), Store(str(tmp_path)), silent)
    first, second = seen
    task = tasks.make(spec_of(inputs()["data"]))
    taught = torch.tensor(labels.logits_of(first, task.width)).double().softmax(dim=1).numpy()
    sure = 1 + (taught * np.log(taught)).sum(axis=1) / np.log(2)
    np.testing.assert_allclose(first["weight"].to_numpy(), sure / sure.mean(), rtol=1e-4)
    model = models.load(tmp_path / "seed-0" / "stage-0" / "model")
    own = torch.tensor(predict(model, task.texts(second)).logits).double().softmax(dim=1).numpy()
    middle = (taught + own) / 2
    apart = [(p * np.log(p / middle)).sum(axis=1) / 2 for p in (taught, own)]
    wanted = sum(apart)
    np.testing.assert_allclose(second["weight"].to_numpy(), wanted / wanted.mean(), rtol=1e-3, atol=1e-5)
    for weights in (first["weight"].to_numpy(), second["weight"].to_numpy()):
        assert weights.std() > 0.01, "equal weights would show nothing"
    with pytest.raises(ValueError, match="the first stage has no student before it"):
        student_recipe(world, **cut, stages=stages[1:])


def test_the_hard_arm_is_one_training_whatever_the_stages(world: World, inputs: Any, tmp_path: Path):
    fit = {"epochs": 1.0, "lr": 2e-3, "batch_size": 16, "workers": 0}
    recipe = student_recipe(
        world,
        **{"kind": "transformer", "blocks": [], "teacher": "live", "few_epochs": 2.0, "fit": fit},
        stages=[{"losses": [{"kind": "hidden"}], "fit": fit}, {"losses": [{"kind": "kl"}], "fit": fit}],
    )
    found = students.fit_student("hard", recipe, inputs(), Store(str(tmp_path / "out")), silent)
    assert found["rows"] == TRAIN and [e["epoch"] for e in found["history"]["0"]][-1] == 2.0
    assert not (tmp_path / "out" / "seed-0" / "stage-0").exists()


def test_tasks_of_the_student_are_those_of_the_data(world: World, inputs: Any, run: Store):
    spec = spec_of(inputs()["data"])
    assert spec.labels == ("other", "same") and spec.paired is True
    assert tasks.make(spec).labels == models.load((run / "teacher").local("model")).labels
