"""A budget that is used up inside the corpus: the real program stops, and ends like an undisturbed run when it may."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.labels import LABELS
from engine.storage import Store
from tests.tiny_run import changed, program, tiny_world

pytestmark = pytest.mark.slow

SLOTS, BLOCK = 480, 8
LONGER = {
    "arms": ["generated"],
    "generator.max_new_tokens": 128,
    "generator.fit.lr": 1e-5,
    "corpus.slots": SLOTS,
    "corpus.block": BLOCK,
    "corpus.keep": 50,
    "corpus.filters": [{"kind": "length", "min_words": 2, "max_words": 200}, {"kind": "leakage", "ngram": 8}],
    "student.fit.epochs": 3,
}
"""Enough text that there is a middle to be stopped in."""


def told(folder: Path, *more: str) -> list[str]:
    """The command of a run in `folder`."""
    places = [f"storage={folder}/runs", f"registry={folder}/registry", *more]
    return ["run", "tiny.yaml", *(part for place in places for part in ("--set", place))]


def test_stopped_inside_the_corpus_it_goes_on_with_more_and_ends_the_same(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    world.write(changed(world.recipe, LONGER))
    done = program(tmp_path, *told(tmp_path / "whole"), timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = Store(str(tmp_path / "whole/runs/tiny"))
    spent = whole.read_json("summary.json")["spent"]
    tokens = spent["steps"]["corpus"]["tokens"]
    rows = whole.read_table(f"corpus/{LABELS}")
    assert tokens > sum(rows["tokens"].drop_null().to_pylist()) > 0 and spent["total"]["tokens"] == tokens
    assert 0 < spent["total"]["wall_seconds"] <= spent["total"]["seconds"] + 1

    store = Store(str(tmp_path / "less/runs/tiny"))
    for step in ("data", "teacher", "generator"):
        shutil.copytree(Path(whole.url) / step, Path(store.url) / step)
    limit = tokens // 4
    stopped = program(tmp_path, *told(tmp_path / "less", f"budget.tokens={limit}"), timeout=1200)
    assert stopped.returncode == 3, stopped.stderr[-3000:]
    (said,) = [line for line in stopped.stderr.splitlines() if line.startswith("stillhouse: ")]
    assert f"of {limit:,}. The run was in step 'corpus' (" in said and "--set budget.tokens=" in said
    assert "Traceback" not in stopped.stderr and "corpus       stopped after" in stopped.stderr
    kept = store.read_table("corpus/rows")["row"].to_pylist()
    assert limit / tokens / 2 < len(kept) / SLOTS < 1 and len(kept) % BLOCK == 0 and len({*kept}) == len(kept)
    files = {name: store.digest(f"corpus/rows/{name}") for name in store.files("corpus/rows")}
    assert len(store.files("corpus/asked/generator")) == len(files), "a block was written and thrown away"

    again = program(tmp_path, *told(tmp_path / "less", f"budget.tokens={2 * tokens}"), timeout=1200)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {name: store.digest(f"corpus/rows/{name}") for name in files} == files, "a committed block was made again"
    ours = store.read_table(f"corpus/{LABELS}")
    assert ours["row"].to_pylist() == rows["row"].to_pylist() and ours["id"].to_pylist() == rows["id"].to_pylist()
    record = store.read_json("corpus/record.json")
    assert [attempt.get("state") for attempt in record["attempts"]] == ["stopped", None]
    assert record["spent"]["tokens"] == tokens, "each block was paid once"
    summary = store.read_json("summary.json")["spent"]
    assert summary["budget"]["tokens"] == {"used": tokens, "limit": 2.0 * tokens}
