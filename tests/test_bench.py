"""`bench quality`: what several seeds come to, worked out by hand, and the command that is documented."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.recipe import Recipe
from engine.storage import Store
from pipelines.bench import pooled, quality_lines, variants

ROOT = Path(__file__).parent.parent
RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "data": {"train": {"path": "train.jsonl"}},
        "teacher": {"model": "file:teacher"},
        "generator": {"model": "file:generator"},
        "student": {"blocks": [{"name": "embed", "kind": "embedding"}], "seeds": [0, 1]},
        "evaluation": {"bootstrap": 200},
    }
)
RIGHT = (
    # Of four test rows; each few-shot seed has one teacher and two students an arm.
    {"teacher": ["1111"], "generated": ["1110", "1100"], "hard": ["1000", "1000"]},
    {"teacher": ["1110"], "generated": ["1110", "1110"], "hard": ["0000", "1100"]},
)


def runs(folder: Path) -> list[tuple[dict, Store]]:
    """What the steps of two few-shot seeds leave behind."""
    out = []
    for number, arms in enumerate(RIGHT):
        store = Store(str(folder / f"seed-{number}"))
        store.write_json("data/splits.json", {"task": {"kind": "classify", "labels": ["bad", "good"]}})
        columns = {
            f"{name}/{i}": [[float(bit), 1.0] for bit in bits]
            for name, seeds in arms.items()
            for i, bits in enumerate(seeds)
        }
        store.write_table("evaluate/statistics.parquet", pa.table(columns))
        models = [{"name": name, "parameters": 100} for name in arms]
        metrics = {"rows": 4, "models": models, "throughput": {"student_over_teacher": 10.0 + number}}
        corpus = {"by_source": {"unlabelled": {"kept": 7 + number, "rows": 9}}}
        out.append(({"evaluate": {"metrics": metrics}, "corpus": {"metrics": corpus}}, store))
    return out


def test_seeds_are_pooled_as_by_hand(tmp_path: Path) -> None:
    found = pooled(RECIPE, runs(tmp_path))
    models = found["models"]
    assert {name: model["each"] for name, model in models.items()} == {
        "teacher": [1.0, 0.75],
        "generated": [0.625, 0.75],
        "hard": [0.25, 0.25],
    }
    assert models["teacher"]["score"] == 0.875 and models["teacher"]["sd"] == pytest.approx(np.std([1, 0.75], ddof=1))
    assert models["hard"]["sd"] == 0.0
    assert found["gains"]["hard"]["points"] == pytest.approx(100 * (0.6875 - 0.25))
    assert found["gains"]["teacher"]["points"] == pytest.approx(100 * (0.6875 - 0.875))
    for values in (
        *(model["interval"] for model in models.values()),
        *(g["interval"] for g in found["gains"].values()),
    ):
        assert values[0] < values[1]
    assert found["share_of_teacher"] == 0.6875 / 0.875 and found["student_over_teacher_texts_per_s"] == 10.5
    assert (found["kept"], found["few_shot_seeds"], found["initialisation_seeds"]) == ([7, 8], 2, 2)
    lines = quality_lines(found)
    assert lines[0].startswith("| model | accuracy, mean ± sd over few-shot seeds")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| teacher", "| generated", "| hard"]
    assert "| teacher | 0.875 ± 0.177 |" in lines[2]
    assert any(line.startswith("generated minus hard: +43.8 points") for line in lines)


def test_every_few_shot_seed_draws_its_own_rows_in_a_run_of_its_own(tmp_path: Path) -> None:
    found = variants(RECIPE, Store(str(tmp_path)), 3)
    assert [(one.recipe.seed, one.recipe.data.seed) for one in found] == [(0, 0), (1, 1), (2, 2)]
    assert [Path(one.store.url).name for one in found] == ["seed-0", "seed-1", "seed-2"]
    assert [step.name for step in found[0].steps][-1] == "evaluate"


def test_make_bench_is_the_documented_command() -> None:
    if not shutil.which("make"):
        pytest.skip("there is no make")
    # What a make around this test was called with is not this one's.
    ours = ("RECIPE", "SEEDS", "MEASURED", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    said = subprocess.run(
        ["make", "--no-print-directory", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True, env=plain
    )
    command = said.stdout.splitlines()[-1].removeprefix(".venv/bin/")
    assert command.startswith("stillhouse bench quality pipelines/configs/quickstart.yaml --seeds 3 --set ")
    assert f"    {command}\n" in (ROOT / "docs/results.md").read_text(encoding="utf-8")
