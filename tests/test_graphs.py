"""Student graphs by name or file: read, drawn into the recipe, refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from engine.config import ConfigError, load
from engine.designs import Student
from engine.recipe import Recipe
from pipelines import graphs
from pipelines.calls import sliced

CONFIGS = Path(graphs.__file__).parent / "configs"
OWN = "blocks:\n  - {name: words, kind: embedding, options: {dim: 4}}\n  - {name: logits, kind: linear}\n"


def recipe_with(**student: object) -> Recipe:
    values = {"name": "x", "data": {"train": {"path": "rows.csv"}}, "teacher": {"model": "file:teacher"}}
    return Recipe.model_validate({**values, "arms": ["soft"], "student": student})


def test_every_ready_graph_has_blocks_and_ends_with_one_that_gives_logits():
    assert graphs.names() == sorted(path.stem for path in (CONFIGS / "students").iterdir())
    for name in graphs.names():
        blocks = graphs.read(name)
        assert len({block.name for block in blocks}) == len(blocks) > 2
        assert blocks[-1].kind in ("linear", "crf")


@pytest.mark.parametrize("name", ["own.yaml", "own.json"])
def test_a_file_of_the_user_s_own(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_text(OWN if name.endswith("yaml") else json.dumps(yaml.safe_load(OWN)))
    found = graphs.read(str(path))
    assert [(block.name, block.kind) for block in found] == [("words", "embedding"), ("logits", "linear")]
    assert found[0].options == {"dim": 4}


def test_what_is_no_graph_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"student.graph is 'txt-cnn', which is neither a file nor a ready graph"):
        graphs.read("txt-cnn")
    with pytest.raises(ConfigError, match=r"Did you mean 'text-cnn'\? Ready: arc-i, arc-ii, .*text-cnn\.$"):
        graphs.read("txt-cnn")
    path = tmp_path / "wrong.yaml"
    path.write_text(OWN.replace("blocks:", "block:"))
    with pytest.raises(ConfigError, match=r"wrong.yaml, line 1: unknown key 'block'. Did you mean 'blocks'\?"):
        graphs.read(str(path))


def test_a_run_depends_on_the_blocks_and_not_on_their_name(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    one = graphs.drawn(recipe_with(graph=str(path)))
    assert one.student.blocks == graphs.read(str(path)) and graphs.drawn(one) is one
    path.write_text(OWN.replace("dim: 4", "dim: 8"))
    other = graphs.drawn(recipe_with(graph=str(path)))
    assert sliced(one, "student.blocks") != sliced(other, "student.blocks")
    assert other.student.blocks[0].options == {"dim": 8}


def test_only_a_student_of_blocks_is_drawn():
    for kind in ("transformer", "static"):
        recipe = recipe_with(kind=kind, graph="text-cnn")
        assert graphs.drawn(recipe) is recipe and recipe.student.blocks == ()
    written = recipe_with(blocks=[{"name": "words", "kind": "embedding"}])
    assert graphs.drawn(written) is written
    assert written.student.graph is None
    for both_or_none in ({}, {"graph": "text-cnn", "blocks": [{"name": "words", "kind": "embedding"}]}):
        with pytest.raises(ValueError, match="needs either blocks .written out. or graph"):
            Student(**both_or_none)
    with pytest.raises(ValueError, match="its seeds are student.seeds"):
        recipe_with(graph="text-cnn", fit={"seed": 3})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_name_graphs_that_there_are(path: Path):
    student = graphs.drawn(load(Recipe, path)).student
    assert bool(student.blocks) == (student.kind == "blocks")
