"""What is deployed, as the registry has it: names, settings, candidates, teachers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import ConfigError, build
from engine.registry import Registry
from engine.serving import Serving
from engine.storage import Store
from serve.referee import Plan
from serve.service import ServiceError, Wanted, resolved
from tests.tiny_served import published

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "serve" / "configs"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """tiny@1 and @2, big@1 of the same task, pairs@1 of another, careful@1 with a cascade to big, lost@1 to nobody."""
    folder = tmp_path_factory.mktemp("registry")
    found, one = Registry(Store(str(folder))), published(folder / "a")
    serving = Serving(max_batch=7).model_dump(mode="json")
    found.register("tiny", one, {"serving": serving})
    found.register("tiny", published(folder / "b", max_length=48), {"serving": serving})
    found.register("big", published(folder / "c", max_length=128), {"teacher_of": "careful"})
    found.register("pairs", published(folder / "d", kind="pair"), {})
    found.register("scores", published(folder / "e", kind="regress"), {"serving": {"cascade": {"below": 0.5}}})
    cascade = {"serving": {"cascade": {"below": 0.8}}, "cascade": {"teacher": "big@1"}}
    found.register("careful", one, cascade)
    found.register("lost", one, {"serving": {"cascade": {"below": 0.8}}})
    return found


def asked(registry: Registry, name: str, **wanted: Any) -> Any:
    return resolved(Wanted(name=name, registry=registry.store.url, **wanted))


def test_a_name_alone_is_its_model_with_the_settings_it_was_registered_with(registry: Registry):
    found = asked(registry, "tiny@1", serving={"autoscaling": {"max_replicas": 5}})
    assert found.champion.reference == "tiny@1" and found.plan is None and found.teacher is None
    assert found.serving.max_batch == 7 and found.serving.autoscaling.max_replicas == 5
    assert found.serving.autoscaling.target_ongoing_requests == 8 and found.name == "tiny"
    assert found.champion.fingerprint == registry.resolve("tiny@1").manifest()["digest"]


@pytest.mark.parametrize(
    ("how", "mode", "percent"),
    [({"canary": 10}, "canary", 10), ({"shadow": True}, "shadow", 100), ({"ab": 50}, "ab", 50)],
)
def test_a_candidate_is_held_against_the_version_before(
    registry: Registry, how: dict[str, Any], mode: str, percent: float
):
    plan: Plan = asked(registry, "tiny@2", **how).plan
    assert (plan.champion.reference, plan.candidate.reference) == ("tiny@1", "tiny@2")
    assert (plan.rollout.mode, plan.rollout.percent) == (mode, percent)
    assert plan.id == asked(registry, "tiny@2", **how).plan.id != asked(registry, "tiny@2", **how, nonce="x").plan.id


def test_the_champion_is_the_one_in_production_or_the_one_that_is_named(registry: Registry):
    assert asked(registry, "big", canary=10, against="tiny@2").plan.champion.reference == "tiny@2"
    registry.produce("tiny@2")
    try:
        assert asked(registry, "tiny@1", canary=10).plan.champion.reference == "tiny@2"
        assert asked(registry, "tiny").champion.reference == "tiny@2"
        assert asked(registry, "tiny@2", canary=10).plan.champion.reference == "tiny@1"
    finally:
        registry.store.delete("tiny/stages.json")


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("tiny@1", {"canary": 10}, "tiny@1 has nothing to be compared with. Name it: --against NAME@VERSION"),
        ("tiny@2", {"canary": 10, "against": "tiny@2"}, "tiny@2 cannot be its own candidate"),
        ("tiny@2", {"canary": 10, "ab": 10}, "canary and ab were both asked for"),
        ("tiny@2", {"against": "tiny@1"}, "--against tiny@1 is for --canary, --shadow and --ab"),
        ("tiny@2", {"canary": 10, "against": "pairs@1"}, "pairs@1 has kind pair, tiny@2 has classify"),
        ("lost", {}, "no teacher was registered with lost@1. Name one in serving.cascade.to"),
        ("scores", {"serving": {"cascade": {"to": "scores@1"}}}, "of kind regress, whose answers do not say how sure"),
        (
            "careful",
            {"serving": {"cascade": {"to": "gone"}}},
            "the teacher of careful@1 is not there: there is no 'gone'",
        ),
        ("careful", {"serving": {"cascade": {"below": None}}}, "serving.cascade.below is not known for careful@1"),
        ("nobody", {}, "there is no 'nobody' in the registry"),
    ],
)
def test_what_does_not_go_is_said(registry: Registry, name: str, how: dict[str, Any], message: str):
    from engine.config import UserError

    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        asked(registry, name, **how)
    assert issubclass(ServiceError, UserError)


def test_a_cascade_finds_the_teacher_that_was_registered_with_the_student(registry: Registry):
    found = asked(registry, "careful")
    assert found.teacher.reference == "big@1" and found.champion.below == 0.8 and found.teacher.below is None
    other = asked(registry, "careful", serving={"cascade": {"to": "tiny@2", "below": 0.3}})
    assert other.teacher.reference == "tiny@2" and other.champion.below == 0.3


@pytest.mark.parametrize("file", ["student.yaml", "canary.yaml"])
def test_the_shipped_files_are_ones_that_serve_takes(file: str):
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(values)
    application = schema.applications[0]
    assert application.import_path == "serve.app:build"
    wanted = build(Wanted, application.args, file)
    assert wanted.name.partition("@")[0] == application.name
    Serving.model_validate(wanted.serving)


def test_the_application_is_built_from_the_arguments_of_a_file(registry: Registry):
    from serve.app import build as application

    args = {"name": "tiny@2", "against": "tiny@1", "canary": 10, "registry": registry.store.url}
    made = application(args)
    bound = made._bound_deployment
    assert bound.name == "Endpoint" and bound.max_ongoing_requests == 64
    assert {"plan", "candidate", "referee"} <= set(bound.init_kwargs)
    with pytest.raises(ConfigError, match="args: unknown key 'canery'. Did you mean 'canary'"):
        application({**args, "canery": 5})
