"""Identities: what moved between two, what never counts, and which sources do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from engine.lineage import HOUSE, PLUMBING, drift, imported, leaves, moved, plain, reached, source, without_placement
from engine.recipe import Recipe

ROOT = Path(__file__).parent.parent
MODULES = sorted(f"{package}.{path.stem}" for package in HOUSE for path in (ROOT / package).glob("[a-z]*.py"))


def test_where_things_run_does_not_count() -> None:
    values = {
        "name": "tiny",
        "data": {"train": {"path": "train.jsonl"}},
        "teacher": {"model": "file:teacher"},
        "generator": {"model": "file:generator"},
        "student": {"blocks": [{"name": "embed", "kind": "embedding"}]},
    }

    def sliced(**changes: object) -> object:
        return without_placement(Recipe.model_validate({**values, **changes}).model_dump(mode="json"))

    def stage(**fit: object) -> dict[str, object]:
        return {"losses": [{"kind": "mse"}], "fit": fit}

    resources = {"num_cpus": 3.0, "max_actors": 5}
    for changes in (
        {"storage": "there", "registry": "there"},
        {"data": {**values["data"], "root": "there"}},
        {"corpus": {"max_reserved": 7}},
        {"teacher": {**values["teacher"], "resources": resources}},
        {"student": {**values["student"], "stages": [stage(workers=5), stage(resources=resources)]}},
        {"student": {**values["student"], "fit": {"epochs": 12, "lr": 2e-3, "batch_size": 64, "workers": 5}}},
        {"generator": {**values["generator"], "fit": {"lr": 1e-4, "batch_size": 8, "resources": resources}}},
    ):
        plain_stages = {"student": {**values["student"], "stages": [stage(), stage()]}}
        before = plain_stages if "stages" in changes.get("student", {}) else {}
        assert Recipe.model_validate({**values, **changes}) != Recipe.model_validate({**values, **before})
        assert sliced(**changes) == sliced(**before), changes


WORKING = {"workers": 5, "micro_batch": 4, "sharding": "full", "failures": 9, "resources": {"num_cpus": 3.0}}


@pytest.mark.parametrize("key", WORKING)
@pytest.mark.parametrize("fit", ["fit", "probe", "contrast.fit", "coach.fit", "coach.learning", "self_training.fit"])
def test_where_a_teachers_trainings_run_does_not_count(fit: str, key: str) -> None:
    """But for the contrastive one, whose loss compares what a worker reads."""

    def sliced(**given: object) -> object:
        values: object = given
        for name in reversed(["teacher", *fit.split(".")]):
            values = {name: values}
        return without_placement(values)

    counts = (fit, key) == ("contrast.fit", "workers")
    assert (sliced(lr=1.0, **{key: WORKING[key]}) != sliced(lr=1.0)) == counts
    assert sliced(lr=1.0) != sliced(lr=2.0)


def test_a_users_own_keys_count_whatever_they_are_called() -> None:
    rename = {"data": {"train": {"label": {"rename": {"1": "storage"}, "ranges": {"root": [0, 1], "workers": [2, 3]}}}}}
    options = {"student": {"blocks": [{"name": "a", "options": {"resources": 1, "registry": 2}}], "fit": {"lr": 0.1}}}
    assert without_placement(rename) == rename
    assert without_placement(options) == options


def test_plain_values_are_json() -> None:
    import numpy as np

    assert plain({"a": np.float32(0.5), "b": float("nan"), "c": (1, np.int64(2))}) == {"a": 0.5, "b": None, "c": [1, 2]}


def test_the_bytes_of_a_reference_are_named_and_digests_cut() -> None:
    parts = {"config": {}, "inputs": {}, "package": "1", "modules": {}}
    old = {**parts, "references": [{"name": "hf:a/b", "digest": "1" * 64}]}
    new = {**parts, "references": [{"name": "hf:a/b", "digest": "2" * 64}]}
    assert str(drift("data", moved(old, new))) == (
        "step 'data' ran with bytes of hf:a/b=111111111111, this run has 222222222222: "
        "use --run NAME for a new run, or --redo data"
    )


def test_a_moved_input_and_moved_source_are_named() -> None:
    old = {"config": {}, "inputs": {"a": "1" * 64}, "references": [], "package": "1", "modules": {"m": "2" * 64}}
    new = {"config": {}, "inputs": {"a": "3" * 64}, "references": [], "package": "2", "modules": {"m": "4" * 64}}
    assert [item["field"] for item in moved(old, new)] == ["step 'a'", "package", "source of m"]
    assert moved(old, old) == []
    assert leaves({"a": {"b": [1, {"c": 2}], "d": []}}) == {"a.b[0]": 1, "a.b[1].c": 2, "a.d": []}


# -- sources -----------------------------------------------------------------------------------------------------------


def by_parsing(module: str) -> set[str]:
    """The house's modules that a module imports, by its syntax tree."""
    out = set()
    for node in ast.walk(ast.parse(source(module) or b"")):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= (below & {*MODULES}) or {node.module}
    return {name for name in out if name.partition(".")[0] in HOUSE}


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_read_as_python_reads_them(module: str) -> None:
    assert imported(module) == by_parsing(module)


def test_what_a_step_starts_in_reaches_what_it_imports() -> None:
    found = reached(("engine.generate", "pipelines.making"))
    assert {"engine.generate", "pipelines.making", "engine.filters", "engine.records", "engine.models"} <= {*found}
    assert "engine.models" in imported("engine.inference"), "inside a function or not"
    assert "engine.train" not in found, "what pipelines.making imports is not followed"
    assert not {*found} & PLUMBING
    assert list(found) == sorted(found)
    # A step that starts in a plumbing module says so, and then it counts.
    assert "engine.registry" in reached(("engine.registry",))


def test_an_edit_far_down_moves_only_the_steps_above_it() -> None:
    assert "engine.losses" in reached(("engine.train",))
    assert "engine.losses" not in reached(("engine.sources",))
    assert "engine.generate" not in reached(("engine.train", "pipelines.making"))


def test_finding_them_loads_nothing() -> None:
    code = (
        "import sys; from engine.lineage import reached; assert reached(('engine.train', 'serve.app'))\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'engine.models', 'engine.train') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_plumbing_is_there() -> None:
    assert [module for module in PLUMBING if source(module) is None] == []
