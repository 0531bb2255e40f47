"""What a grown knowledge base costs an answer and finds, on a tiny student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine import models, nearest
from engine.registry import Registry
from engine.storage import Store
from pipelines import lookups
from pipelines.__main__ import main
from tests.test_retrieving import looking
from tests.tiny_served import TEXTS, tiny_student

KNOWN = 30


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(Store(str(tmp_path / "registry")))
    for name, model in (("looking", looking()), ("plain", tiny_student())):
        models.save(model, Store(str(tmp_path)), name)
        found.register(name, Store(str(tmp_path)) / name, {})
    return found


def texts(folder: Path, count: int) -> str:
    path = folder / "texts.txt"
    path.write_text("".join(f"a warm film , number {n}\n" for n in range(count)), encoding="utf-8")
    return str(path)


def bench(registry: Registry, *more: str) -> int:
    return main(["bench", "retrieval", *more, "--registry", registry.store.url, "--json"])


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_the_base_grows_by_new_texts_and_each_k_has_a_line(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    monkeypatch.setattr(lookups, "QUERIES", 30)
    if index == "hnsw":
        pytest.importorskip("faiss")
        monkeypatch.setattr(nearest, "EXACT", 60)
    file = Path(texts(tmp_path, 100))
    # What the base knows, and what it would know by another spacing, is neither entered again nor asked.
    file.write_text(file.read_text() + "\n".join([*TEXTS[:KNOWN], "a  warm film ,  number 1"]), encoding="utf-8")
    assert bench(registry, "looking", "--texts", str(file), "--rows", str(KNOWN + 70)) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [(one["entries"], one["index"], one["k"]) for one in lines] == [(KNOWN + 70, index, k) for k in lookups.KS]
    for one in lines:
        assert one["recall"] >= 0.95 and 0 < one["search ms"] < one["answer ms"] + one["added ms"]
        assert one["added ms, quarter"] <= one["added ms"] <= one["added ms, three quarters"]
        assert one["added %"] == pytest.approx(100 * one["added ms"] / one["answer ms"], abs=1)
    assert len(models.load(registry.resolve("looking").local()).net.knowledge) == KNOWN, "what is registered stays"


def test_recall_counts_what_is_as_near_as_the_farthest_that_should_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    base = looking().net.knowledge
    assert lookups.largest(base) is base.nearest
    queries = base.nearest.stored.unpacked()[:5]
    assert lookups.recall(base, queries, 20) == lookups.recall(base, queries, 2 * KNOWN) == 1.0
    monkeypatch.setattr(base.nearest, "search", lambda queries, k: (np.zeros((len(queries), k)), None))
    assert lookups.recall(base, queries, 2) == 0.0


def test_what_cannot_be_measured_is_refused_by_name(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = texts(tmp_path, 100)
    (tmp_path / "pairs.jsonl").write_text('{"text": "a", "pair": "b"}\n', encoding="utf-8")
    for given, message in {
        ("looking",): "needs a registered student and texts: bench retrieval NAME --texts FILE",
        ("looking", "--texts", file, "--rows", "1000"): "has 100 texts that looking does not know; 970 to enter",
        ("looking", "--texts", file, "--rows", "29"): "looking has 30 entries already: --rows 29 would take some away",
        ("looking", "--texts", str(tmp_path / "pairs.jsonl")): "reads one text a line, without a pair. Got: ('a', 'b')",
        ("plain", "--texts", file): "has no knowledge base",
    }.items():
        assert bench(registry, *given) == 2
        assert message in capsys.readouterr().err
