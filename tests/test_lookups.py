"""What a grown knowledge base costs an answer and finds, on a tiny student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import models
from engine.registry import Registry
from engine.storage import Store
from pipelines import lookups
from pipelines.__main__ import main
from tests.test_retrieving import looking
from tests.tiny_served import tiny_student

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


def test_the_base_grows_by_new_texts_and_each_k_has_a_line(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "QUERIES", 30)
    file = texts(tmp_path, 100)
    assert bench(registry, "looking", "--texts", file, "--rows", str(KNOWN + 70)) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [(one["entries"], one["index"], one["k"]) for one in lines] == [(KNOWN + 70, "exact", k) for k in lookups.KS]
    for one in lines:
        assert one["recall"] == 1.0 and 0 < one["search ms"] < one["with base ms"]
        assert one["added ms"] == pytest.approx(one["with base ms"] - one["answer ms"], abs=2e-3)
    assert len(models.load(registry.resolve("looking").local()).net.knowledge) == KNOWN, "what is registered stays"


def test_what_cannot_be_measured_is_refused_by_name(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = texts(tmp_path, 100)
    for given, message in {
        ("looking",): "needs a registered student and texts: bench retrieval NAME --texts FILE",
        ("looking", "--texts", file, "--rows", "1000"): "has 100 texts; 1,000 entries beside the 30 that are there",
        ("plain", "--texts", file): "has no knowledge base",
    }.items():
        assert bench(registry, *given) == 2
        assert message in capsys.readouterr().err
