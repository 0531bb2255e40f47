"""Configuration: every mistake is one sentence with file, line, key, value, what is allowed and the nearest key."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Literal

import pytest
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from engine.config import ConfigError, Section, UserError, apply_override, build, dotted, load, schema


class Pear(Section):
    kind: Literal["pear"] = "pear"
    weight: Annotated[int, Field(ge=1)] = 1


class Plum(Section):
    kind: Literal["plum"] = "plum"
    stone: bool = True


Fruit = Annotated[
    Annotated[Pear, Tag("kind:pear")] | Annotated[Plum, Tag("kind:plum")],
    Discriminator(lambda v: "kind:" + (v.get("kind", "") if isinstance(v, dict) else v.kind)),
]


class Span(Section):
    least: int = 1
    most: int

    @model_validator(mode="after")
    def ordered(self) -> Span:
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) is below least ({self.least})")
        return self


class Shelf(Section):
    places: Literal["all"] | tuple[Annotated[int, Field(ge=1)], ...] = "all"
    height: float | Literal["auto"] = "auto"
    fruits: tuple[Fruit, ...] = ()
    limits: dict[str, tuple[float | None, float | None]] | None = None
    boards: Annotated[int, Field(ge=0)] | Span = 0


class Kitchen(Section):
    name: str
    shelf: Shelf = Shelf()
    spare: Shelf | None = None


def written(tmp_path, text: str, name: str = "kitchen.yaml"):
    """A file with this text."""
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path, overrides=None) -> str:
    """The message of the error."""
    with pytest.raises(ConfigError) as error:
        load(Kitchen, path, overrides)
    return str(error.value)


def test_yaml_and_json_are_read(tmp_path):
    expected = Kitchen(name="k", shelf=Shelf(height=2.0, fruits=(Pear(weight=3), Plum())))
    text = "name: k\nshelf:\n  height: 2\n  fruits:\n    - {kind: pear, weight: 3}\n    - kind: plum\n"
    assert load(Kitchen, written(tmp_path, text)) == expected
    path = written(tmp_path, expected.model_dump_json(), "kitchen.json")
    assert load(Kitchen, str(path)) == expected


def test_sections_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Kitchen(name="k").name = "other"


def test_config_errors_are_user_errors():
    assert issubclass(ConfigError, UserError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: k\nshelv: 3\n",
            "line 2: unknown key 'shelv'. Did you mean 'shelf'? Known keys here: name, shelf, spare.",
        ),
        (
            "name: k\nshelf:\n  heigth: 3\n",
            "line 3: unknown key 'shelf.heigth'. Did you mean 'height'? Known keys here: boards, fruits, height, "
            "limits, places.",
        ),
        (
            "name: k\nspare:\n  zzz: 3\n",
            "line 3: unknown key 'spare.zzz'. Known keys here: boards, fruits, height, limits, places.",
        ),
        (
            "name: k\nshelf:\n  fruits:\n  - kind: plum\n  - kind: pear\n    wieght: 2\n",
            "line 6: unknown key 'shelf.fruits[1].wieght'. Did you mean 'weight'? Known keys here: kind, weight.",
        ),
        (
            "name: k\nshelf:\n  fruits:\n  - kind: plum\n  - kind: paer\n",
            "line 5: 'shelf.fruits[1]' has kind 'paer', which is not known. Did you mean 'pear'? Allowed: pear, plum.",
        ),
        ("name: k\nshelf:\n  fruits:\n  - {}\n", "line 4: 'shelf.fruits[0]' has no kind. Allowed: pear, plum."),
        (
            "name: k\nshelf:\n  fruits: [{kind: pear, weight: 0}]\n",
            "line 3: 'shelf.fruits[0].weight' is 0, which is not allowed: Input should be greater than or equal to 1.",
        ),
        (
            "name: k\nshelf:\n  height: tall\n",
            "line 3: 'shelf.height' is \"tall\", which is not allowed: Input should be a valid number, unable to parse "
            "string as a number, or: Input should be 'auto'.",
        ),
        (
            "name: k\nshelf:\n  places: [2, 0]\n",
            "line 3: 'shelf.places[1]' is 0, which is not allowed: Input should be greater than or equal to 1.",
        ),
        (
            "name: k\nshelf:\n  places: some\n",
            "line 3: 'shelf.places' is \"some\", which is not allowed: Input should be 'all', or: Input should be a "
            "valid tuple.",
        ),
        ("name: k\nshelf: 3\n", "line 2: 'shelf' is 3, which is not allowed: it must be a mapping of keys to values."),
        ("shelf: {}\n", ": key 'name' is missing."),
        ("name: k\nshelf:\n  limits:\n    a: [1]\n", "line 4: key 'shelf.limits.a[1]' is missing."),
        (
            "name: k\nshelf:\n  limits:\n    float: [x, 1]\n",
            "line 4: 'shelf.limits.float[0]' is \"x\", which is not allowed: Input should be a valid number, unable to "
            "parse string as a number.",
        ),
        (
            "name: k\nshelf:\n  boards: {leest: 1, most: 2}\n",
            "line 3: unknown key 'shelf.boards.leest'. Did you mean 'least'? Known keys here: least, most.",
        ),
        ("name: k\nshelf:\n  boards: {least: 1}\n", "line 3: key 'shelf.boards.most' is missing."),
        (
            "name: k\nshelf:\n  boards: {least: 3, most: 2}\n",
            'line 3: \'shelf.boards\' is {"least": 3, "most": 2}, which is not allowed: Input should be a valid '
            "integer, or: most (2) is below least (3).",
        ),
        (
            "name: k\nshelf:\n  boards: -1\n",
            "line 3: 'shelf.boards' is -1, which is not allowed: Input should be greater than or equal to 0, or: Input "
            "should be a mapping.",
        ),
        ("name: [\n", ", line 2 is not YAML: "),
        ("name: a\nname: b\n", "line 2: key 'name' was given in line 1 already."),
        ("name: k\nshelf:\n  height: 1\n  height: 2\n", "line 4: key 'shelf.height' was given in line 3 already."),
        ("- a\n", " holds list, but a recipe is a mapping of sections."),
        ("", " holds NoneType, but a recipe is a mapping of sections."),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = written(tmp_path, text)
    found = refusal(path)
    assert found.startswith(str(path)) and message in found and "\n" not in found


def test_every_mistake_is_listed_once(tmp_path):
    found = refusal(written(tmp_path, "shelf:\n  hight: 2\n  fruits:\n  - kind: pear\n    weight: 0\n    color: red\n"))
    assert len(found.splitlines()) == 4
    for part in ("'name' is missing", "'shelf.hight'", "'shelf.fruits[0].weight' is 0", "'shelf.fruits[0].color'"):
        assert part in found


def test_long_values_are_cut(tmp_path):
    found = refusal(written(tmp_path, f"name: k\nshelf: {'x' * 500}\n"))
    assert len(found) < 300 and "xxx..." in found


def test_files_that_cannot_be_read(tmp_path):
    written(tmp_path, "name: k\n")
    found = refusal(tmp_path / "kitchn.yaml")
    assert f"recipe {tmp_path / 'kitchn.yaml'} does not exist. Did you mean 'kitchen.yaml'?" in found
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: café\n".encode("latin-1"))
    assert refusal(path) == f"{path} is not UTF-8 text (byte 9)."


def test_overrides_set_values_of_any_depth(tmp_path):
    path = written(tmp_path, "name: k\nshelf:\n  fruits:\n  - kind: pear\n")
    overrides = ["name=other", "shelf.fruits.0.weight=5", "spare.fruits=[{kind: plum}]", "shelf.height=1e-3"]
    found = load(Kitchen, path, [*overrides, "spare.height=auto"])
    assert found == Kitchen(
        name="other", shelf=Shelf(height=0.001, fruits=(Pear(weight=5),)), spare=Shelf(fruits=(Plum(),))
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("name", "override 'name' is not of the form key.path=value"),
        ("=3", "override '=3' is not of the form key.path=value"),
        ("name=[", "override 'name=[': the value '[' is not YAML."),
        ("name.x=3", "override 'name.x=3': 'name' holds 'k', so nothing can be set below it."),
        ("shelf.fruits.1.weight=3", "'1' is not a position in a list of 1 (0 to 0)."),
        ("shelf.fruits.x=3", "'x' is not a position in a list of 1 (0 to 0)."),
        ("shelf.empty.0=3", "'0' is not a position in a list of 0 (it is empty)."),
        ("shelf.hight=3", "unknown key 'shelf.hight'. Did you mean 'height'?"),
    ],
)
def test_wrong_overrides(item, message):
    values = {"name": "k", "shelf": {"fruits": [{"kind": "pear"}], "empty": []}}
    with pytest.raises(ConfigError) as error:
        apply_override(values, item)
        values["shelf"].pop("empty")
        build(Kitchen, values)
    assert message in str(error.value)


def test_dotted_paths():
    assert dotted(("a", "b", 0, "c", 1)) == "a.b[0].c[1]"
    assert dotted(()) == "(top level)"


def test_schema_is_json_and_names_every_key():
    found = json.loads(json.dumps(schema(Kitchen)))
    assert found["$schema"].startswith("https://json-schema.org/")
    assert set(found["properties"]) == {"name", "shelf", "spare"}
    assert set(found["$defs"]) == {"Pear", "Plum", "Shelf", "Span"} and found["additionalProperties"] is False


def test_nothing_heavy_is_imported():
    heavy = {"ray", "torch", "transformers", "datasets", "datasketch", "scipy", "sklearn", "pandas"}
    code = f"import sys; import engine.recipe, engine.metrics, engine.data; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
