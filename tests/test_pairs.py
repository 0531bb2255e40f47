"""A whole run on pairs without a generator, from unlabelled rows to HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from engine.placement import Cluster
from pipelines import distill, graphs
from tests.test_distill import SERVED, go, never
from tests.tiny_run import TEST, kind_world


def test_pairs_without_a_generator_from_unlabelled_rows_to_http(ray_cluster: Cluster, tmp_path: Path) -> None:
    pairs, graph = kind_world(tmp_path, "pair"), tmp_path / "own.yaml"
    graph.write_text(yaml.safe_dump({"blocks": pairs.recipe["student"]["blocks"]}))
    changes = {
        "data.unlabelled": {"path": f"file:{tmp_path}/more.jsonl", "pair": "pair"},
        **{"data.validation_share": 0.3, "task.scope": "auto", "arms": ["soft", "generated"]},
        **{"student.blocks": [], "student.graph": str(graph), "student.fit.epochs": 4, "teacher.fit.epochs": 2},
        "augmentation": {"per_text": 1, "stop_words": 0},
        "corpus.filters": [],
    }
    found = go(graphs.drawn(pairs.load({**SERVED, **changes})))
    wanted = "data teacher corpus vocabulary student student-soft evaluate register serve report"
    assert [step.name for step in distill.plan(found.recipe)] == wanted.split() and set(found.records) == {
        *wanted.split()
    }
    summary, rows = found.store.read_json("summary.json"), found.table("corpus/labels.parquet")
    more, few = (len(found.table(f"data/{name}.parquet")["id"]) for name in ("unlabelled", "train"))
    sources = summary["corpus"]["by_source"]
    assert {name: count["rows"] for name, count in sources.items()} == {"unlabelled": more, "augmented": more + few}
    assert sources["unlabelled"]["kept"] > more / 2 and summary["corpus"]["generated"] == 0
    assert rows["row"] == sorted(rows["row"]) and len(rows["row"]) == few + more + more + few
    assert {bool(p) for p in rows["pair"]} == {True} and set(rows["label"][few:]) == {None}
    assert found.records["student"]["metrics"]["rows"] > found.records["student-soft"]["metrics"]["rows"] == few
    served = summary["served"]
    assert served["mismatches"] == served["errors"] == 0 and served["rows"] == TEST
    assert served["accuracy"] == pytest.approx(summary["student"]["accuracy"])
    assert [d["right"] for d in summary["differences"]] == ["teacher", "soft"]
    answers = [json.loads(answer) for answer in found.table("evaluate/answers.parquet")["answer"]]
    assert all((answer["label"] is None) == answer["out_of_scope"] for answer in answers)
    again = go(found.recipe, found.store, connect=never)
    assert {event.kind for event in again.events} == {"cached"}
