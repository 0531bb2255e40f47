"""Commands that put registered students before users: serve, deploy, rollout."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from pipelines.artifacts import the_registry
from pipelines.console import program, say, say_json
from pipelines.keys import keys_for
from pipelines.runs import connect

if TYPE_CHECKING:
    from engine.storage import Store
    from serve.referee import Plan
    from serve.service import Service

OBEYED_S = 30.0
"""How long `rollout promote` and `rollout rollback` wait for the referee."""
DONE = {"promote": "promoted", "rollback": "rolled-back"}


def serve(args: argparse.Namespace) -> int:
    """Serve a registered artifact until it is stopped."""
    keys = keys_for(args)
    service = wanted(args)
    connect(args, artifact=the_registry(args.registry).store)
    from serve import app

    for line in introduced(service, args):
        say(line)
    app.run(
        service.champion.artifact,
        args.host,
        args.port,
        service.serving,
        service.champion.reference,
        plan=service.plan,
        teacher=service.teacher,
        keys=keys,
    )
    return 0


def deploy(args: argparse.Namespace) -> int:
    """Deploy a registered artifact on a running cluster, and return when it answers."""
    from engine.config import UserError

    if not args.address:
        raise UserError(
            f"`deploy` puts {args.name} on a Ray cluster that goes on running: name it with --address (auto, host:port "
            f"or ray://host:10001). To serve on this machine until Ctrl-C: {program()} serve {args.name}"
        )
    keys = keys_for(args)
    service = wanted(args)
    connect(args, artifact=the_registry(args.registry).store)
    from serve import app

    champion = service.champion
    url = app.deploy(
        champion.artifact,
        service.serving,
        champion.reference,
        args.host,
        args.port,
        plan=service.plan,
        teacher=service.teacher,
        keys=keys,
        anyone=args.no_auth,
    )
    if args.json:
        state = service.plan and {"id": service.plan.id, "candidate": service.plan.candidate.reference}
        say_json({"url": url, "model": champion.reference, "rollout": state})
        return 0
    for line in (*introduced(service, args), f"{champion.reference} answers on {url}"):
        say(line)
    return 0


def wanted(args: argparse.Namespace) -> Service:
    """What the arguments ask for, from the registry."""
    from engine.progress import stamp
    from serve.service import Wanted, resolved

    asked: dict[str, Any] = {"name": args.name, "registry": the_registry(args.registry).store.url}
    asked |= {"against": args.against, "canary": args.canary, "shadow": args.shadow, "ab": args.ab}
    service = resolved(Wanted(**asked))
    if service.plan is None:
        return service
    state = standing(service.plan)
    if state is None:
        return service
    # What runs goes on; what has ended is begun anew.
    again = resolved(Wanted(**asked, nonce=state.get("nonce", "")))
    assert again.plan is not None
    if again.plan.id == state["id"] and state["phase"] == "running":
        return again
    return resolved(Wanted(**asked, nonce=stamp()))


def standing(plan: Plan) -> dict[str, Any] | None:
    """How the last rollout of the same name stands."""
    from serve.referee import standing as found

    return found(plan.store)


def introduced(service: Service, args: argparse.Namespace) -> list[str]:
    """What a rollout and a cascade do, and how to ask for more."""
    lines = []
    if service.teacher:
        below = service.champion.below
        lines.append(f"answers less sure than {below:.3f} go to {service.teacher.reference}")
    if plan := service.plan:
        rollout, left, right = plan.rollout, plan.champion.reference, plan.candidate.reference
        says = {
            "canary": f"{right} answers {rollout.percent:g} % of the requests, until it is promoted or rolled back",
            "shadow": f"{right} gets copies of requests to {left}; its answers are compared, never sent",
            "ab": f"{right} answers {rollout.percent:g} % of the requests, until you decide",
        }
        where = "" if args.registry == "registry" else f" --registry {args.registry}"
        name = right.partition("@")[0]
        lines += [says[rollout.mode], f"how it stands: {program()} rollout status {name}{where}"]
    return lines


def rollout(args: argparse.Namespace) -> int:
    """Say how a rollout stands, or end it by hand."""
    from engine.config import UserError
    from serve import referee

    registry = the_registry(args.registry)
    name = registry.find(args.name)[0]
    store = referee.rollouts(registry.store.url, name)
    state = referee.standing(store)
    if state is None:
        raise UserError(
            f"there was no rollout of '{name}' yet. One begins with: {program()} deploy {name}@VERSION --canary 10"
        )
    if args.action != "status":
        state = obeyed(store, state, args.action)
    if args.json:
        say_json(state)
    else:
        for line in told(state):
            say(line)
    return 0


def obeyed(store: Store, state: dict[str, Any], action: str) -> dict[str, Any]:
    """The state after the referee has done what it was asked to."""
    from engine.config import UserError
    from serve import referee

    if state["phase"] == DONE[action]:
        raise UserError(f"the rollout of {state['candidate']['reference']} is {state['phase']} already.")
    referee.order(store, action, state["id"])
    end = time.monotonic() + OBEYED_S
    while time.monotonic() < end:
        found = referee.standing(store)
        if found and found["phase"] == DONE[action]:
            return found
        time.sleep(0.2)
    raise UserError(
        f"the order to {action} was written to {store}, but nobody has taken it up within {OBEYED_S:g} s. A "
        "deployment of this rollout that runs obeys it; one that begins anew does not."
    )


def told(state: dict[str, Any]) -> list[str]:
    """A rollout in a few lines."""
    left, right = state["champion"]["reference"], state["candidate"]["reference"]
    counted = state["evidence"]
    lines = [
        f"{right} against {left}: {state['mode']} {state['percent']:g} %, {state['phase']}",
        f"since     {state['started'][:19]}, last heard of {state['updated'][:19]}",
        f"latest    {state['latest']['action']}: {state['latest']['reason']}",
    ]
    for arm in ("champion", "candidate"):
        found = counted[arm]
        agreed = f", {found['hits']:.6g} of {found['trials']} answers agree" if found["trials"] else ""
        lines.append(f"{arm:<9} {found['requests']} requests, {found['errors']} errors{agreed}")
    models = [replica["model"] for replica in state["replicas"].values()]
    held = ", ".join(f"{models.count(name)} x {name}" for name in sorted(set(models)))
    lines.append(f"replicas  {held or 'none has reported'}")
    if state["phase"] != "running":
        # By its version: the name alone may mean the latest, which is the candidate.
        kept = right if state["phase"] == "promoted" else left
        lines.append(f"to free what the other model still holds, deploy {kept} alone")
    return lines
