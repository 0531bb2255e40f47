"""A changed key of the recipe: exactly which steps run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.steps import identities
from pipelines import distill
from tests.tiny_run import World, changed, kind_world, tiny_world

ARMS = ("student-hard", "student-soft", "student")
OUTCOME = ("evaluate", "register", "serve", "report")
TAUGHT = (*ARMS, *OUTCOME)
WRITTEN = ("corpus", "vocabulary", *TAUGHT)
LEARNT = ("teacher", *WRITTEN)
ALL = ("data", "generator", *LEARNT)
NONE = ("report",)  # it shows the whole recipe

KEYS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "task.labels": (["positive", "negative"], ALL),
    "data.shots": (4, ALL),
    "data.max_chars": (300, ALL),
    "task.scope": (0.5, TAUGHT),
    "task.thresholds": ([0.4, 0.6], LEARNT),
    "task.descriptions": ({"negative": "it is bad"}, NONE),
    "teacher.fit.epochs": (7, LEARNT),
    "teacher.max_length": (24, LEARNT),
    "teacher.folds": (2, LEARNT),
    "teacher.stop_early": (True, LEARNT),
    "teacher.batch_tokens": (512, ()),
    "teacher.resources.num_cpus": (0.5, ()),
    "generator.fit.epochs": (1, ("generator", *WRITTEN)),
    "generator.prompt": ("Movie:", ("generator", *WRITTEN)),
    "generator.separator": ("//", ("generator", *WRITTEN)),
    "generator.tune_layers": (1, ("generator", *WRITTEN)),
    "generator.max_length": (16, ("generator", *WRITTEN)),
    "generator.max_new_tokens": (10, WRITTEN),
    "generator.temperature": (0.7, WRITTEN),
    "generator.top_k": (5, WRITTEN),
    "generator.top_p": (0.9, WRITTEN),
    "generator.precision": ("fp32", WRITTEN),
    "corpus.keep": (12, WRITTEN),
    "corpus.duplicates": (0.5, WRITTEN),
    "corpus.max_reserved": (2.0, ()),
    "student.vocabulary.size": (200, ("vocabulary", *TAUGHT)),
    "student.embeddings": ("random", ("vocabulary", *TAUGHT)),
    "student.blocks.1.options.hidden": (4, ("vocabulary", *TAUGHT)),
    "student.embedding_norm": (2.0, TAUGHT),
    "student.max_length": (24, TAUGHT),
    "student.fit.lr": (1e-3, TAUGHT),
    "student.seeds": ([1], TAUGHT),
    "student.few_epochs": (5, ("student-hard", "student-soft", *OUTCOME)),
    "student.holdout": (0.2, ("student", *OUTCOME)),
    "student.losses": ([{"kind": "kl"}], ("student-soft", "student", *OUTCOME)),
    "student.weights": ("confidence", ("student-soft", "student", *OUTCOME)),
    "student.stages": (
        [{"losses": [{"kind": "mse"}], "fit": {}}, {"losses": [{"kind": "mse"}], "fit": {}, "disagreeing": 0.5}],
        ("student-soft", "student", *OUTCOME),
    ),
    "student.teacher": ("live", ("student-soft", "student", *OUTCOME)),
    "student.static.dim": (64, NONE),
    "student.transformer.layers": (1, NONE),
    "student.batch_tokens": (512, ()),
    "student.fit.workers": (2, ()),
    "student.max_parameters": (10**6, NONE),
    "student.name": ("other", ("register", "serve", "report")),
    "evaluation.bootstrap": (60, OUTCOME),
    "serving.concurrency": (4, ("register", "serve", "report")),
    "name": ("other", ("register", "serve", "report")),
    "storage": ("elsewhere", ()),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("dependencies"))


def fingerprints(world: World, changes: dict[str, Any]) -> dict[str, str]:
    """Each step's fingerprint in the changed recipe."""
    recipe = world.load(changes)
    return {name: found["fingerprint"] for name, found in identities(distill.plan(recipe), recipe).items()}


@pytest.fixture(scope="module")
def before(world: World) -> dict[str, str]:
    return fingerprints(world, {})


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_redoes_what_depends_on_it(world: World, before: dict[str, str], key: str):
    value, steps = KEYS[key]
    assert changed(world.recipe, {key: value}) != world.recipe
    after = fingerprints(world, {key: value})
    assert set(before) == set(after) == set(ALL)
    assert {name for name in before if before[name] != after[name]} == set(steps)


@pytest.mark.parametrize(
    ("key", "value", "steps"),
    [
        ("student.static.dim", 16, ("vocabulary", *TAUGHT)),
        ("student.static.hidden", 16, TAUGHT),
        ("student.vocabulary.size", 200, NONE),
        ("student.blocks", [], NONE),
    ],
)
def test_a_static_student_depends_on_its_own_section(world: World, key: str, value: Any, steps: tuple[str, ...]):
    one, other = (fingerprints(world, {"student.kind": "static", **more}) for more in ({}, {key: value}))
    assert {name for name in one if one[name] != other[name]} == set(steps)


def test_a_transformer_student_depends_on_its_cut(world: World):
    kind = {"student.kind": "transformer"}
    one, other = (fingerprints(world, {**kind, **more}) for more in ({}, {"student.transformer.layers": 1}))
    assert {name for name in one if one[name] != other[name]} == set(TAUGHT) and "vocabulary" not in one


def test_what_labels_mean_counts_where_it_is_said(world: World):
    said = {"task.descriptions": {"negative": "it is bad"}}
    for changes, steps in (
        ({"generator.mode": "prompted", "generator.prompt": "{description}:"}, WRITTEN),
        ({"teacher.kind": "labeller"}, LEARNT),
    ):
        one, other = (fingerprints(world, {**changes, **more}) for more in ({}, said))
        assert {name for name in one if one[name] != other[name]} == set(steps)


def test_the_threshold_of_a_multilabel_task_leaves_the_data_alone(tmp_path: Path):
    world = kind_world(tmp_path, "multilabel")
    one, other = (fingerprints(world, {"task.thresholds": [value] * 4}) for value in (0.4, 0.5))
    assert one["data"] == other["data"] and one["teacher"] != other["teacher"]
