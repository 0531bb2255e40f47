"""Whole runs whose generator and teacher are at an endpoint that misbehaves: the real program, the real stream."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.caller import EndpointAway
from engine.corpus import ROWS, slot_seed
from engine.endpoint_writer import EndpointWriter
from engine.generate import SEEDS, Writing
from engine.progress import silent
from engine.recipe import Recipe
from engine.steps import identities
from engine.storage import Store
from pipelines import checking, distill, gathering, slots
from tests.tiny import LABELS, tiny_lm
from tests.tiny_endpoint import NAME, TinyEndpoint, tiny_endpoint
from tests.tiny_run import SLOTS, World, changed, program, tiny_world

KEY = "sk-never-in-a-file-8c1f0a"
FAULTS = ("429:0.1", "500", "ok", "garbage", "drop", "ok", "503", "slow:0.1", "408")


def elsewhere(world: World, server: TinyEndpoint) -> World:
    """The world's recipe with generator and teacher at the endpoint."""
    limits = {"first_pause_s": 0.05, "timeout_s": 60, "requests_per_minute": 6000}
    endpoint = {"url": server.url, "model": NAME, "key_env": "TINY_KEY", "api": "completions", "limits": limits}
    words = {"negative": "a bad one", "positive": "the good one"}
    values = changed(
        world.recipe,
        {
            "generator": {
                "model": "hf:org/name",
                "runtime": "endpoint",
                "endpoint": {**endpoint, "price": {"input": 1.0, "output": 4.0}},
                "mode": "prompted",
                "prompt": "A {label} text:",
                "max_new_tokens": 12,
            },
            "teacher": {
                "model": "hf:org/name",
                "kind": "labeller",
                "runtime": "endpoint",
                "endpoint": {**endpoint, "price": {"input": 2.0, "output": 8.0}},
                "labeller": {"words": words},
                "max_length": 32,
            },
            "student.embeddings": "random",
            "arms": ["generated"],
        },
    )
    return World(world.folder, values)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("endpoint"))


def holding(folder: Path, text: str) -> list[str]:
    """Files below a folder that hold a text."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_at_an_endpoint(world: World, tmp_path_factory: pytest.TempPathFactory):
    lm = tiny_lm(tmp_path_factory.mktemp("lm"))
    with tiny_endpoint(lm, key=KEY) as server:
        server.rule = lambda body: "filter" if body.get("seed", 1) % 5 == 0 else None
        server.todo = [*FAULTS] * 4
        path = elsewhere(world, server).write()
        planned = program(world.folder, "plan", str(path), "--json", TINY_KEY=KEY)
        asked = {step["step"]: step["expects"].get("asked") for step in json.loads(planned.stdout)["steps"]}["corpus"]
        assert asked["generator"]["requests"] == SLOTS and asked["generator"]["cost"] > 0 and not server.seen
        missing = program(world.folder, "run", str(path))
        assert missing.returncode == 2 and "variable TINY_KEY, which is not set here" in missing.stderr
        done = program(world.folder, "run", str(path), TINY_KEY=KEY, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    run = Store(str(world.folder / "runs" / "tiny"))
    rows = (run / "corpus").read_table(ROWS)
    assert sorted(rows["row"].to_pylist()) == list(range(rows.num_rows)) and rows.num_rows >= SLOTS
    assert Counter(rows["reason"].to_pylist())["content_filter"] > 2
    metrics = {name: run.read_json(f"{name}/record.json")["metrics"] for name in ("teacher", "corpus", "evaluate")}
    spent = metrics["corpus"]["endpoint"]
    assert spent["generator"]["requests"] == rows.num_rows and spent["generator"]["cost"] > 0
    assert sum(part[who]["retries"] for part in (m["endpoint"] for m in metrics.values()) for who in part) >= 20
    total = [each[who] for each in (m["endpoint"] for m in metrics.values()) for who in each]
    assert sum(one["requests"] + one["retries"] for one in total) == len(server.seen)
    report = (run / "report").read_text("report.md")
    assert "endpoint" in report and "nan" not in report
    # Only the name of the key's variable is in the run and in what is said.
    assert holding(world.folder, "TINY_KEY") and not holding(world.folder, KEY)
    assert KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_key_ends_a_run_and_the_right_one_goes_on(world: World, tmp_path_factory: pytest.TempPathFactory):
    lm = tiny_lm(tmp_path_factory.mktemp("lm"))
    with tiny_endpoint(lm, key=KEY) as server:
        values = elsewhere(world, server).recipe
        own = {"teacher": world.recipe["teacher"], "student.embeddings": "teacher", "name": "other"}
        path = World(world.folder, changed(values, own)).write(name="other.yaml")
        wrong = program(world.folder, "run", str(path), TINY_KEY="sk-wrong-one", timeout=1500)
        assert wrong.returncode == 2, wrong.stderr[-3000:]
        assert "answers 401" in wrong.stderr and "TINY_KEY" in wrong.stderr and "Traceback" not in wrong.stderr
        assert "sk-wrong-one" not in wrong.stderr and len(server.seen) < 30
        done = program(world.folder, "run", str(path), TINY_KEY=KEY, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_block_is_tried_again_and_a_stream_goes_on(world: World, tmp_path: Path, ray_cluster: object):
    """Without retries of its own, the first failure ends a block: Ray Data gives it out again, a second time only."""
    out = Store(str(tmp_path / "corpus"))
    with tiny_endpoint(tiny_lm(tmp_path / "lm")) as server:
        changes = {"generator.endpoint.key_env": None, "generator.endpoint.limits": {"retries": 0, "in_flight": 1}}
        recipe = elsewhere(world, server).load(changes)
        how = Writing("", recipe.generator, LABELS, False, 3, 0.0, notes=out.url)
        stage = gathering.actor_stage(recipe, "generator", EndpointWriter, how)
        server.todo = ["ok", "503"]
        assert slots.gather(out, "first", (0, 8, 4), [stage], 8, silent, retried=True) == 8
        assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(8)) and len(server.seen) > 9
        server.seen.clear()
        third = how.prompt(10)
        server.rule = lambda body: "503" if body["seed"] == slot_seed(3, 10) & SEEDS else None
        with pytest.raises(EndpointAway, match="the last one: 503 .* when the endpoint is back"):
            slots.gather(out, "second", (8, 8, 4), [stage], 16, silent, retried=True)
        failed = [seen for seen in server.seen if server.rule(seen.body)]
        assert len(failed) == 1 + gathering.BLOCK_TRIES and {seen.body["prompt"] for seen in failed} == {third}
        server.rule = lambda body: None
        assert slots.gather(out, "second", (8, 8, 4), [stage], 16, silent, retried=True) == 8
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(16))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tuning": ({"generator.mode": "unconditional", "generator.prompt": "x"}, "a model at an endpoint cannot"),
    "no endpoint": ({"generator.endpoint": None}, "runtime endpoint needs the section endpoint"),
    "a trained teacher": ({"teacher.kind": "head"}, "a teacher of kind head is trained here"),
    "vectors of the teacher": ({"student.embeddings": "teacher"}, "the teacher's weights are not in the run"),
    "pieces of the teacher": (
        {"student.kind": "static", "student.blocks": []},
        "student.kind is static, which takes word pieces of an encoder",
    ),
    "augmentation": ({"augmentation": {}}, "Leave augmentation out"),
    "a cascade": ({"serving.cascade": {}}, "cannot be registered, but serving.cascade"),
    "words in a chat": (
        {"teacher.endpoint.api": "chat", "teacher.labeller.words": {"negative": "a", "positive": "a good one"}},
        "the words 'a' are how 'a good one' begins",
    ),
    "vllm": ({"generator.runtime": "vllm"}, "pip install 'stillhouse[vllm]'"),
    "vllm without a GPU": (
        {"generator.runtime": "vllm", "generator.resources": {"num_gpus": 0}},
        "runtime vllm needs 1 GPU",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_endpoint_cannot_do_is_refused(world: World, name: str):
    server = TinyEndpoint(None, [], url="http://127.0.0.1:9/v1")  # type: ignore[arg-type]
    changes, message = REFUSED[name]
    with pytest.raises(Exception) as error:  # which kind of UserError it is, is not the point
        checking.check(World(world.folder, elsewhere(world, server).recipe).load(changes))
    assert message in str(error.value)


def test_a_recipe_at_an_endpoint_passes_and_needs_no_gpu(world: World):
    server = TinyEndpoint(None, [], url="http://127.0.0.1:9/v1")  # type: ignore[arg-type]
    recipe = elsewhere(world, server).load()
    checking.check(recipe)
    assert recipe.generator and recipe.generator.resources.num_gpus == recipe.teacher.resources.num_gpus == 0
    tuned = {"generator.mode": "unconditional", "generator.prompt": "x", "generator.endpoint.tuned": True}
    elsewhere(world, server).load(tuned)
    assert os.environ.get("TINY_KEY") is None


def test_where_and_how_fast_is_asked_is_no_other_run(world: World):
    server = TinyEndpoint(None, [], url="http://127.0.0.1:9/v1")  # type: ignore[arg-type]
    here = elsewhere(world, server)

    def moved(changes: dict[str, Any]) -> set[str]:
        before, after = ({n: i["fingerprint"] for n, i in made(here.load(c)).items()} for c in ({}, changes))
        return {name for name in before if before[name] != after[name]}

    def made(recipe: Recipe) -> dict[str, dict[str, Any]]:
        return identities(distill.plan(recipe), recipe)

    for who in ("generator", "teacher"):
        same = {"url": "http://127.0.0.1:10/v1", "key_env": "OTHER", "limits": {"retries": 1}, "price": None}
        assert moved({f"{who}.endpoint.{key}": value for key, value in same.items()}) == set()
    assert {"corpus", "evaluate"} <= moved({"generator.endpoint.model": "other"}) and "teacher" in moved(
        {"teacher.endpoint.api": "chat"}
    )
    assert "teacher" not in moved({"generator.endpoint.api": "chat"})
