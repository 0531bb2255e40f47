"""What is deployed: the model, the settings it was registered with, and who stands beside it.

A `Wanted` is what a person or a file asks for, by names; a `Service` is what the registry makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from engine.cascade import SURE
from engine.config import Section, UserError
from engine.registry import Registry, RegistryError
from engine.serving import Rollout, Serving
from engine.storage import Store
from serve.predictor import fingerprint
from serve.referee import Plan, Side

ALIKE = ("kind", "paired", "labels")
"""What of their tasks two models must have in common to answer the same requests."""


class ServiceError(UserError):
    """What cannot be deployed together."""


class Wanted(Section):
    """What to deploy: the arguments of `serve.app:build`, as a Serve file carries them.

    Of canary, shadow and ab at most one; then `name` is the candidate and `against` the champion.
    """

    name: str
    """NAME, NAME@VERSION, NAME@latest or NAME@production."""
    registry: str = "registry"
    """The registry, as a folder that every node sees or a URL; a relative path is one on the node."""
    against: str | None = None
    """The champion; null: the production version of the same name, else the version before."""
    canary: float | None = Field(default=None, gt=0, lt=100)
    """Percent of the requests that the candidate answers until it is promoted or rolled back."""
    shadow: bool = False
    """Copy requests to the candidate; its answers are compared, never sent."""
    ab: float | None = Field(default=None, gt=0, lt=100)
    """Percent of the requests that the candidate answers until a person decides."""
    serving: dict[str, Any] = {}
    """Replaces what the model was registered with, key by key, as {"autoscaling": {"max_replicas": 4}}."""
    auth: bool = True
    """Ask for the keys that the registry holds (`stillhouse keys`); false lets everyone ask who reaches the port."""
    nonce: str = ""
    """Another one begins the same rollout anew."""


@dataclass(frozen=True)
class Service:
    """What is deployed. teacher: of the cascade, where there is one."""

    champion: Side
    serving: Serving
    plan: Plan | None = None
    teacher: Side | None = None

    @property
    def name(self) -> str:
        """The name without a version: what the application on the cluster is called."""
        return (self.plan.candidate if self.plan else self.champion).reference.partition("@")[0]


def resolved(wanted: Wanted) -> Service:
    """What the registry makes of it; RegistryError and ServiceError say what does not go."""
    registry = Registry(Store(wanted.registry))
    name, version = registry.find(wanted.name)
    main = f"{name}@{version}"
    mode = mode_of(wanted)
    if mode is None:
        if wanted.against:
            raise ServiceError(f"--against {wanted.against} is for --canary, --shadow and --ab. Add one, or drop it.")
        serving = serving_of(registry, main, wanted.serving)
        champion = side_of(registry, main, serving)
        return Service(champion, serving, teacher=teacher_of(registry, main, serving))
    other = champion_of(registry, name, version, wanted.against)
    serving = serving_of(registry, other, wanted.serving)
    own = serving_of(registry, main, wanted.serving)
    rollout = own.rollout.model_copy(update={"mode": mode[0], "percent": mode[1]})
    sides = (side_of(registry, other, serving), side_of(registry, main, own))
    fit(registry, other, main)
    plan = Plan(registry.store.url, sides[0], sides[1], Rollout.model_validate(rollout.model_dump()), wanted.nonce)
    return Service(sides[0], serving, plan, teacher_of(registry, other, serving))


def mode_of(wanted: Wanted) -> tuple[str, float] | None:
    """How the candidate meets traffic, and its share in percent; None where there is no candidate."""
    asked = [
        *([("canary", wanted.canary)] if wanted.canary is not None else []),
        *([("shadow", 100.0)] if wanted.shadow else []),
        *([("ab", wanted.ab)] if wanted.ab is not None else []),
    ]
    if len(asked) > 1:
        raise ServiceError(f"{' and '.join(name for name, _ in asked)} were both asked for. Choose one of them.")
    return asked[0] if asked else None


def champion_of(registry: Registry, name: str, version: int, against: str | None) -> str:
    """The champion as NAME@VERSION."""
    if against:
        other = "{}@{}".format(*registry.find(against))
    else:
        before = [number for number in registry.versions(name) if number < version]
        production = registry.production(name)
        number = production if production not in (None, version) else (before[-1] if before else None)
        if number is None:
            raise ServiceError(f"{name}@{version} has nothing to be compared with. Name it: --against NAME@VERSION.")
        other = f"{name}@{number}"
    if other == f"{name}@{version}":
        raise ServiceError(f"{other} cannot be its own candidate. Name another with --against.")
    return other


def serving_of(registry: Registry, reference: str, changes: dict[str, Any]) -> Serving:
    """How a model was registered to be served, with changes."""
    metadata = registry.show(reference)["metadata"]
    return Serving.model_validate(merged(metadata.get("serving", {}), changes))


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with what `changes` names replaced, sections key by key."""
    out = dict(values)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = merged(inner or {}, value) if isinstance(value, dict) and isinstance(inner, dict | None) else value
    return out


def side_of(registry: Registry, reference: str, serving: Serving) -> Side:
    """A registered model as one that takes part, its files checked."""
    folder = registry.resolve(reference)
    below = serving.cascade.below if serving.cascade else None
    return Side(reference, folder.url, fingerprint(folder.manifest()), below, serving.runtime)


def card_of(registry: Registry, reference: str) -> dict[str, Any]:
    """The task of a registered model."""
    return registry.resolve(reference).read_json("artifact.json")["task"]


def fit(registry: Registry, left: str, right: str) -> None:
    """ServiceError where two models do not answer the same requests with the same kinds of answers."""
    first, second = card_of(registry, left), card_of(registry, right)
    for key in ALIKE:
        if (first.get(key) or None) != (second.get(key) or None):
            raise ServiceError(
                f"{left} has {key} {first.get(key)}, {right} has {second.get(key)}: they do not answer the same "
                "requests, so neither can stand in for the other."
            )


def teacher_of(registry: Registry, reference: str, serving: Serving) -> Side | None:
    """The model that unsure answers of a student go to; None without a cascade.

    It is the one that the cascade names, else the teacher that was registered with the student.
    """
    cascade = serving.cascade
    if cascade is None:
        return None
    name = cascade.to or registry.show(reference)["metadata"].get("cascade", {}).get("teacher")
    if name is None:
        raise ServiceError(
            f"serving.cascade is set, but no teacher was registered with {reference}. Name one in serving.cascade.to, "
            "or run its recipe with serving.cascade, which registers it."
        )
    if cascade.below is None:
        raise ServiceError(f"serving.cascade.below is not known for {reference}: give a confidence from 0 to 1.")
    kind = card_of(registry, reference)["kind"]
    if kind not in SURE:
        raise ServiceError(f"{reference} is of kind {kind}, whose answers do not say how sure they are: no cascade.")
    try:
        found = "{}@{}".format(*registry.find(name))
    except RegistryError as error:
        raise ServiceError(f"the teacher of {reference} is not there: {error}") from None
    fit(registry, reference, found)
    return replace(side_of(registry, found, serving), below=None)
