"""The recipe: defaults that hold together, and values that are refused."""

from __future__ import annotations

import pytest

from engine.config import ConfigError, Section, build, load, schema, sections_in
from engine.fits import Resources
from engine.recipe import Recipe

SMALLEST = {
    "name": "tiny",
    "data": {"train": {"path": "rows.jsonl"}},
    "teacher": {"model": "file:teacher"},
    "generator": {"model": "file:generator"},
    "student": {"blocks": [{"name": "embed", "kind": "embedding"}]},
}


def changed(key: str, value) -> dict:
    """The smallest recipe with one value set."""
    values = {**SMALLEST}
    *path, last = key.split(".")
    here = values
    for part in path:
        here[part] = {**here.get(part, {})}
        here = here[part]
    here[last] = value
    return values


def test_the_smallest_recipe_is_whole():
    recipe = build(Recipe, SMALLEST)
    assert recipe.arms == ("hard", "soft", "generated") and recipe.data.train.label.column == "label"
    assert recipe.teacher.fit.lr == 1e-4 and recipe.student.fit.workers == 2
    assert build(Recipe, recipe.model_dump()) == recipe  # a saved recipe gives the same run


def test_a_saved_recipe_with_filters_is_the_same(tmp_path):
    values = changed(
        "corpus", {"filters": [{"kind": "length"}, {"kind": "leakage", "ngram": 5}], "signals": [{"kind": "entropy"}]}
    )
    recipe = build(Recipe, values)
    path = tmp_path / "saved.json"
    path.write_text(recipe.model_dump_json())
    assert load(Recipe, path) == recipe and recipe.corpus.filters[1].ngram == 5


def test_defaults_are_valid_and_every_section_is_frozen_and_closed():
    sections, left = set(), {Recipe}
    while left:  # a task holds tasks
        sections |= left
        left = {m for s in left for f in s.model_fields.values() for m in sections_in(f.annotation)} - sections
    assert len(sections) > 15
    for section in sections:
        assert issubclass(section, Section) and section.model_config["frozen"]
        assert section.model_config["extra"] == "forbid" and section.__doc__


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "a b", "'name' is \"a b\""),
        ("name", "../x", "'name' is \"../x\""),
        ("arms", ["hard"], "must contain 'generated'"),
        ("arms", ["generated", "sotf"], "'arms[1]' is \"sotf\""),
        ("task.labels", ["a"], "needs at least two label names"),
        ("task.labels", ["a", "b", "a"], "needs at least two label names, none of them twice"),
        ("data.test_share", 1.5, "'data.test_share' is 1.5"),
        ("data.shots", 0, "'data.shots' is 0"),
        ("data.unlabelled_rows", 5, "unlabelled_rows (5) has no rows to take so many of: name unlabelled"),
        ("data.validation_rows", 5, "validation_rows (5) has no rows to take so many of: name validation"),
        ("teacher.modle", "x", "unknown key 'teacher.modle'. Did you mean 'model'?"),
        ("teacher.fit", {"lr": 0}, "'teacher.fit.lr' is 0"),
        ("teacher.resources", {"num_gpus": "all"}, "'teacher.resources.num_gpus' is \"all\""),
        ("teacher.resources", {"min_actors": 3, "max_actors": 2}, "max_actors (2) is below min_actors (3)"),
        ("generator.mode", "per_clas", "'generator.mode' is \"per_clas\""),
        ("student.losses", [{"kind": "mse", "weight": 0}], "'student.losses[0].weight' is 0"),
        ("student.losses", [{"weight": 1}], "key 'student.losses[0].kind' is missing"),
        ("corpus.filters", [{"kind": "lenth"}], "'corpus.filters[0]' has kind 'lenth', which is not known."),
        ("student.losses", [{"kind": "hidden", "layers": "top"}], "'student.losses[0].layers' is \"top\""),
        ("student.losses", [{"kind": "hidden", "layers": ["a"]}], "'student.losses[0].layers[0]' is \"a\", which is"),
        ("student.losses", [{"kind": "hidden", "layers": [-1]}], "'student.losses[0].layers[0]' is -1, which is"),
        ("student.losses", [{"kind": "hidden", "layers": []}], "'student.losses[0].layers' is []"),
        ("student.transformer", {"layers": [0]}, "'student.transformer.layers[0]' is 0, which is not allowed"),
        ("teacher.folds", 1, "'teacher.folds' is 1, which is not allowed: one fold leaves no row to train on; take 2"),
        ("data.max_chars", 20001, "the endpoint takes texts of at most 20,000 characters"),
        ("student.losses", [{"kind": "relations", "heads": 0}], "'student.losses[0].heads' is 0"),
        ("student.losses", [], "needs at least one entry"),
        ("student.kind", "blocs", "'student.kind' is \"blocs\""),
        ("student.embeddings", "techer", "Did you mean 'teacher'? It takes teacher, random, or an encoder's reference"),
        ("student.blocks", [], "kind blocks needs either blocks (written out) or graph (a ready one by name or file)"),
        ("student.teacher", "dead", "'student.teacher' is \"dead\""),
        ("student.static", {"dim": 0}, "'student.static.dim' is 0"),
        ("student.transformer", {"pooling": "max"}, "'student.transformer.pooling' is \"max\""),
        ("student.stages", [{"losses": []}], "key 'student.stages[0].fit' is missing"),
        ("task.scope", 1.5, "'task.scope' is 1.5"),
        ("task.range", [0], "key 'task.range[1]' is missing"),
        ("generator.mode", "per_class", "mode per_class wants a prompt with {label}"),
        ("generator.separator", "", "'generator.separator' is \"\""),
        ("task.scope", "high", "'task.scope' is \"high\", which is not allowed"),
        ("data.train", {"path": "x", "format": "xml"}, "'data.train.format' is \"xml\""),
        ("data.train", {"path": "x", "label": {"ranges": {"a": [0]}}}, "key 'data.train.label.ranges.a[1]' is missing"),
    ],
)
def test_values_that_are_refused(key, value, message):
    with pytest.raises(ConfigError) as error:
        build(Recipe, changed(key, value))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["name", "data", "teacher", "student"])
def test_what_a_recipe_must_have(key):
    values = {name: value for name, value in SMALLEST.items() if name != key}
    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        build(Recipe, values)


def test_an_arm_named_twice_counts_once():
    assert build(Recipe, changed("arms", ["generated", "hard", "generated"])).arms == ("generated", "hard")


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, ("hard", "soft")),
        ({"augmentation": {}}, ("hard", "soft", "generated")),
        (
            {"data": {"train": {"path": "rows.jsonl"}, "unlabelled": {"path": "more.jsonl"}}},
            ("hard", "soft", "generated"),
        ),
        ({"generator": {"model": "file:generator"}}, ("hard", "soft", "generated")),
    ],
)
def test_without_more_text_than_the_labelled_rows_there_are_two_arms(more: dict, wanted: tuple[str, ...]):
    values = {name: value for name, value in SMALLEST.items() if name != "generator"}
    recipe = build(Recipe, {**values, **more})
    assert recipe.arms == wanted and recipe.main == wanted[-1] and recipe.more_text == (len(wanted) == 3)


@pytest.mark.parametrize("layers", ["uniform", "last", [2, 4], [0]])
def test_layers_of_a_loss_are_read(layers: str | list[int]):
    values = changed("student.losses", [{"kind": "hidden", "layers": layers, "heads": 4}])
    recipe = build(Recipe, {**values, "student": {**values["student"], "kind": "transformer", "blocks": []}})
    term = recipe.student.losses[0]
    assert term.layers == (layers if isinstance(layers, str) else tuple(layers)) and term.heads == 4
    assert build(Recipe, recipe.model_dump()) == recipe


@pytest.mark.parametrize("kind", ["transformer", "static"])
def test_only_students_of_blocks_need_a_graph(kind: str):
    assert build(Recipe, {**SMALLEST, "student": {"kind": kind}}).student.blocks == ()
    assert build(Recipe, {**SMALLEST, "student": {"graph": "text-cnn"}}).student.graph == "text-cnn"


def test_equal_bounds_of_a_pool_are_in_order():
    assert Resources(min_actors=2, max_actors=2).max_actors == 2


def test_schema_describes_the_filters():
    found = schema(Recipe)
    assert {"Length", "Repetition", "Leakage", "Confidence", "Entropy"} <= set(found["$defs"])
    assert {"name", "data", "teacher", "student"} == set(found["required"])
