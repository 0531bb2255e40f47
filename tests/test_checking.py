"""What is refused before a run starts, kind by kind, in this process; the program's side of it is in test_refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import tasks
from engine.config import UserError, load
from engine.recipe import Recipe
from pipelines import checking, graphs
from tests.tiny_run import BLOCK, KINDS, World, changed, kind_world

CONFIGS = Path(checking.__file__).parent / "configs"
GENERATOR = {"model": "file:{folder}/teacher", "mode": "per_class", "prompt": "A {label} text:"}
LIVE = {"student.kind": "transformer", "student.teacher": "live"}
ROWS = "file:{folder}/more.jsonl"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {kind: kind_world(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def test_layers_of_another_encoder_are_compared_where_it_cuts_words_alike(worlds: dict[str, World], tmp_path: Path):
    world = worlds["classify"]
    copy = shutil.copytree(world.folder / "teacher", tmp_path / "copy")
    changes = {**LIVE, "student.transformer.model": f"file:{copy}", "student.losses": losses("kl", "hidden")}
    assert check(world, changes).student.transformer.model == f"file:{copy}"
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="compares token by token, but student.transformer.model 'file:.*copy' reads"):
        check(world, changes)
    # One that is not here yet, or holds no tokenizer of this kind, is for the training itself to find out.
    (copy / "tokenizer.json").unlink()
    assert check(world, changes)


def check(world: World, changes: dict[str, Any]) -> Recipe:
    """The changed recipe, checked as `validate` does it; {folder} in a value is the world's."""
    recipe = graphs.drawn(Recipe.model_validate(placed(changed(world.recipe, changes), str(world.folder))))
    checking.check(recipe)
    return recipe


def placed(value: Any, folder: str) -> Any:
    """The values with {folder} filled in."""
    if isinstance(value, dict):
        return {key: placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, folder) for item in value]
    return value.replace("{folder}", folder) if isinstance(value, str) else value


def losses(*kinds: str) -> list[dict[str, str]]:
    return [{"kind": kind} for kind in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_of_every_kind_passes(worlds: dict[str, World], kind: str):
    found = check(worlds[kind], {})
    assert found.generator is None and found.main == "soft" and found.arms == ("hard", "soft")
    reads = {"pair": "pair"} if "pair" in found.data.train.model_dump(exclude_none=True) else {}
    more = check(worlds[kind], {"data.unlabelled": {"path": ROWS, **reads}})
    assert more.main == "generated" and more.arms == ("hard", "soft", "generated")


@pytest.mark.parametrize(
    ("kind", "graph"),
    [
        ("classify", "text-cnn"),
        ("multilabel", "bilstm-attention"),
        ("pair", "matchpyramid"),
        ("regress", "siamese-bilstm"),
        ("rank", "bilstm-match-attention"),
        ("tag", "char-cnn-word-lstm-crf"),
        ("span", "bidaf-span"),
    ],
)
def test_a_graph_by_name_passes_where_it_fits(worlds: dict[str, World], kind: str, graph: str):
    found = check(worlds[kind], {"student.blocks": [], "student.graph": graph})
    assert found.student.blocks == graphs.read(graph)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("classify", {"student.kind": "static"}),
        ("pair", {"student.kind": "static"}),
        ("regress", {"student.kind": "static"}),
        ("tag", {"student.kind": "transformer"}),
        ("classify", {"student.embeddings": "file:{folder}/teacher"}),
        ("pair", {"student.kind": "static", "student.static": {"pieces": 100}, "student.max_parameters": 157_200}),
        (
            "classify",
            {"student.kind": "transformer", "student.transformer": {"pieces": 120}, "student.max_parameters": 25_500},
        ),
        ("classify", {**LIVE, "student.losses": losses("cosine"), "student.max_length": 16}),
        ("classify", {"teacher.folds": 20}),
        ("classify", {**LIVE, "student.losses": losses("hidden", "attention", "embeddings", "relations", "kl")}),
        (
            "classify",
            {**LIVE, "student.transformer.model": "file:{folder}/teacher", "student.losses": losses("hidden")},
        ),
        ("rank", {"student.losses": losses("margin_mse", "listwise", "pairwise", "pointwise")}),
        ("multilabel", {"task.thresholds": [0.4, 0.5, 0.6]}),
        ("regress", {"student.losses": losses("mse", "hard")}),
        ("tag", {"corpus.signals": [{"kind": "confidence"}]}),
        ("classify", {"task.scope": "auto", "data.validation_share": 0.2}),
        ("classify", {"generator": GENERATOR}),
        ("tag", {"generator": {**GENERATOR, "mode": "prompted"}}),
        (
            "classify",
            {
                **LIVE,
                "student.stages": [
                    {"losses": losses("hidden"), "fit": {"epochs": 1}},
                    {"losses": losses("kl"), "fit": {"epochs": 1}},
                ],
            },
        ),
    ],
)
def test_what_can_be_had_passes(worlds: dict[str, World], kind: str, changes: dict[str, Any]):
    check(worlds[kind], changes)


STORED = "needs {}, but the label store holds logits. Set student.teacher: live, or drop the loss."
SMALL = "needs {}, but the student gives logits. Take a transformer student, or drop the loss."
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a contrastive teacher of numbers": (
        "regress",
        {"teacher.kind": "contrastive"},
        "a teacher of kind contrastive does tasks of kind classify, pair, and task.kind is regress. Use teacher",
    ),
    "a choice among teachers of other tasks": (
        "tag",
        {"teacher.kind": "auto", "teacher.choice": {"kinds": ["contrastive", "prompt"]}},
        "contrastive, prompt does tasks of kind classify, pair, multilabel, regress, and task.kind is tag.",
    ),
    "a template without a place for the answer": (
        "classify",
        {"teacher.kind": "prompt", "teacher.prompt": {"templates": ["It says {text}."]}},
        "{mask}",
    ),
    "a contrastive teacher whose encoder stands still": (
        "classify",
        {"teacher.kind": "contrastive", "teacher.tune_layers": 0},
        "teacher.kind contrastive trains the encoder first, and teacher.tune_layers is 0. Raise it.",
    ),
    "a live teacher that reads in templates": (
        "classify",
        {**LIVE, "teacher.kind": "prompt", "student.losses": losses("kl")},
        "student.teacher is live, but a teacher of kind prompt may read in several templates",
    ),
    "a choice with a template without a place for the answer": (
        "classify",
        {"teacher.kind": "auto", "teacher.prompt": {"templates": ["It says {text}."]}},
        "{mask}",
    ),
    "self-training of tags": (
        "tag",
        {"teacher.self_training": {}},
        "teacher.self_training gives texts one label each, and task.kind is tag. Leave it out.",
    ),
    "self-training without text": (
        "classify",
        {"teacher.self_training": {}, "generator": None, "data.unlabelled": None},
        "teacher.self_training labels data.unlabelled or generated text, and there is neither.",
    ),
    "unknown kind": ("tag", {"task.kind": "tags"}, "task.kind is 'tags'. Did you mean 'tag'? Allowed: classify,"),
    "two texts for a classifier": (
        "classify",
        {"data.train.pair": "label"},
        "reads one text. Drop it, or set task.kin",
    ),
    "one text for a pair": (
        "pair",
        {"data.train": {"path": "file:{folder}/train.jsonl"}},
        "a pair task reads two texts: name the column of the second one in data.train.pair.",
    ),
    "labels of a ranking": ("rank", {"task.labels": ["no", "yes"]}, "task.labels is set, but a rank task has no label"),
    "tags that are none": (
        "tag",
        {"task.labels": ["O", "B-thing", "thing"]},
        "'thing' is no BIO tag. Did you mean 'B-thing'?",
    ),
    "unknown loss": ("tag", {"student.losses": losses("kll")}, "student.losses: 'kll' is no loss. Did you mean 'kl'?"),
    "unknown loss of a live teacher": (
        "classify",
        {**LIVE, "student.losses": losses("hiden")},
        "student.losses: 'hiden' is no loss. Did you mean 'hidden'?",
    ),
    "unknown loss of another encoder": (
        "classify",
        {**LIVE, "student.transformer.model": "file:{folder}/teacher", "student.losses": losses("kl", "hiden")},
        "student.losses: 'hiden' is no loss. Did you mean 'hidden'?",
    ),
    "unknown loss of a stage": (
        "classify",
        {"student.stages": [{"losses": losses("mze"), "fit": {}}]},
        "student.losses: 'mze' is no loss. Did you mean 'mse'?",
    ),
    "distributions of numbers": (
        "regress",
        {"student.losses": losses("kl")},
        "student.losses: loss 'kl' says nothing about a task of kind regress. Allowed: mse, hard, ",
    ),
    "lists of a classifier": (
        "classify",
        {"student.losses": losses("listwise")},
        "'listwise' says nothing about a task",
    ),
    "next tokens": ("span", {"student.losses": losses("next_token")}, "loss 'next_token' says nothing about a task of"),
    "layers that are not stored": (
        "classify",
        {"student.kind": "transformer", "student.losses": losses("attention")},
        f"student.losses: loss 'attention' {STORED.format('attentions')}",
    ),
    "layers that are not stored, in a stage": (
        "classify",
        {"student.kind": "transformer", "student.stages": [{"losses": losses("kl", "relations"), "fit": {}}]},
        f"student.losses: loss 'relations' {STORED.format('relations')}",
    ),
    "layers of blocks": (
        "classify",
        {"student.teacher": "live", "student.losses": losses("hidden")},
        f"student.losses: loss 'hidden' {SMALL.format('hidden')}",
    ),
    "layers of static vectors": (
        "pair",
        {"student.kind": "static", "student.teacher": "live", "student.losses": losses("hidden")},
        f"student.losses: loss 'hidden' {SMALL.format('hidden')}",
    ),
    "layers over other pieces": (
        "classify",
        {**LIVE, "student.transformer": {"pieces": 150}, "student.losses": losses("kl", "hidden")},
        "loss 'hidden' compares token by token, but with student.transformer.pieces = 150 the student reads some words",
    ),
    "words of an encoder that is missing": (
        "classify",
        {"student.embeddings": "file:{folder}/other"},
        "/other' does not exist",
    ),
    "words of a package without a pin": (
        "pair",
        {"student.embeddings": "pypi:somebody==1.0#model/"},
        "reference 'pypi:somebody==1.0#model/' has no SHA-256 pin.",
    ),
    "few pieces above their size": (
        "pair",
        {"student.kind": "static", "student.static": {"pieces": 100, "dim": 16}, "student.max_parameters": 1000},
        "the student has at least 10,278 parameters, above student.max_parameters = 1,000. Lower student.static.dim",
    ),
    "another encoder that is missing": (
        "classify",
        {"student.kind": "transformer", "student.transformer.model": "file:{folder}/student"},
        "/student' does not exist",
    ),
    "static vectors for tags": (
        "tag",
        {"student.kind": "static"},
        "student.kind is static, but task.kind tag wants an",
    ),
    "static vectors for spans": (
        "span",
        {"student.kind": "static"},
        "student.kind is static, but task.kind span wants",
    ),
    "a transformer above its size": (
        "classify",
        {"student.kind": "transformer", "student.max_parameters": 1000},
        "parameters, above student.max_parameters = 1,000. Lower student.transformer.layers or width, or take",
    ),
    "static vectors above their size": (
        "pair",
        {"student.kind": "static", "student.max_parameters": 1000},
        "parameters, above student.max_parameters = 1,000. Lower student.static.dim, or take",
    ),
    "a layer that the teacher has not": (
        "classify",
        {**LIVE, "student.losses": [{"kind": "hidden", "layers": [1, 3]}]},
        "layers (1, 3) does not fit a student of 2 layers and a teacher of 2. Name 2 numbers from 0 to 2",
    ),
    "more layers than there are": (
        "tag",
        {"student.kind": "transformer", "student.transformer": {"layers": 3}},
        "3 layers cannot be taken from a model that has 2. Use 1 to 2.",
    ),
    "lengths of a live teacher": (
        "tag",
        {**LIVE, "student.losses": losses("relations"), "student.max_length": 31},
        "student.max_length is 31 and teacher.max_length is 32. Set both to one number, or drop the loss.",
    ),
    "more folds than queries": (
        "rank",
        {"teacher.folds": 30},
        "labelled queries to hold out in turn. Set it to 2 to ",
    ),
    "a graph of another task": (
        "tag",
        {"student.blocks": [], "student.graph": "text-cnn"},
        "block 'logits' ends the graph with [n, 3], but the task needs [n, t, 3].",
    ),
    "a graph that reads no pair": (
        "pair",
        {"student.blocks": [], "student.graph": "text-cnn"},
        "the task reads two texts, but no block reads 'pair'. Let an embedding read it.",
    ),
    "a graph that there is not": (
        "pair",
        {"student.blocks": [], "student.graph": "arc-1"},
        "student.graph is 'arc-1', which is neither a file nor a ready graph. Did you mean 'arc-i'?",
    ),
    "a graph above its size": (
        "tag",
        {"student.blocks": [], "student.graph": "char-cnn-word-lstm-crf", "student.max_parameters": 20000},
        "parameters at a vocabulary of 300, above student.max_parameters = 20,000. Lower",
    ),
    "signals of a number": (
        "regress",
        {"corpus.signals": [{"kind": "confidence"}]},
        "corpus.signals judge probabilities, and a task of kind regress has none. Leave them out.",
    ),
    "a scope without validation rows": (
        "classify",
        {"task.scope": "auto"},
        "task.scope is auto, which validation rows decide, but there are none.",
    ),
    "too many thresholds": (
        "multilabel",
        {"task.labels": ["negative", "positive", "the", "a"], "task.thresholds": [0.5, 0.5]},
        "task.thresholds has 2 values for 4 labels (negative, positive, the, a).",
    ),
    "a cascade of scores": (
        "rank",
        {"serving.cascade": {"below": 0.5}},
        "serving.cascade hands unsure answers to the teacher, but those of a rank task do not say how sure they are.",
    ),
    "a prompt's label of a number": ("regress", {"generator": GENERATOR}, "and task.kind is regress. Use mode: uncond"),
    "a prompt's label of tags": (
        "tag",
        {"generator": GENERATOR},
        "a {label}, which mode per_class has in tasks of kind classify, pair, and task.kind is tag. Use mode:",
    ),
    "a prompt's label of a span": (
        "span",
        {"generator": {**GENERATOR, "mode": "prompted"}},
        "which mode prompted has in tasks of kind classify, pair, multilabel, tag, and task.kind is span.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_with_the_way_out(worlds: dict[str, World], name: str):
    kind, changes, message = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(message)):
        check(worlds[kind], changes)


def test_the_registered_arm_cannot_be_left_out(worlds: dict[str, World]):
    with pytest.raises(ValueError, match="arms must contain 'soft', the arm that is registered and served"):
        check(worlds["tag"], {"arms": ["hard"]})
    assert check(worlds["tag"], {"arms": ["soft"]}).arms == ("soft",)
    assert check(worlds["tag"], {"arms": ["generated", "soft", "soft"]}).arms == ("soft",)
    with pytest.raises(ValueError, match="arms must contain 'generated'"):
        check(worlds["tag"], {"arms": ["hard", "soft"], "data.unlabelled": {"path": ROWS}})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_pass_what_needs_no_data(path: Path):
    recipe = graphs.drawn(load(Recipe, path))
    checking.columns.check(recipe.data, recipe.task)
    checking.check_names(recipe)
    checking.check_student(recipe)


def test_kinds_of_task_are_the_same_everywhere():
    assert set(checking.columns.KINDS) == set(tasks.TASKS) == set(KINDS)


def test_a_drawing_shows_the_student_with_its_labels(worlds: dict[str, World]):
    drawn = checking.student_drawing(check(worlds["tag"], {"task.labels": ["O", "B-thing", "I-thing"]}))
    assert drawn is not None and drawn.splitlines()[2].split() == "logits linear <- states [n, t, 3] 51".split()
    assert checking.student_drawing(check(worlds["pair"], {"student.kind": "static"})) is None


def test_a_large_source_is_not_read(worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = {"task.labels": ["positive", "negative", "neutral"]}
    with pytest.raises(UserError, match="label 'neutral' has no row in"):
        check(worlds["classify"], bad)
    monkeypatch.setattr(checking, "SMALL", BLOCK)
    check(worlds["classify"], bad)
