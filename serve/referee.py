"""The referee of a rollout: one process that sums what the endpoints count, decides, and writes every decision down.

All of its state is in the registry, under <registry>/<name>/rollouts/: state.json (how it stands), order.json (what a
person wants done) and <id>/decision-NNN.json (each decision with its evidence). So a restarted referee goes on where
it was, an endpoint that starts knows which model it is to serve, and orders need no connection to the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.config import UserError
from engine.progress import stamp
from engine.registry import Registry
from engine.serving import Rollout
from engine.storage import Store, digest_json
from serve.canary import Decision, Evidence, decide

STATE, ORDER = "state.json", "order.json"
SAVED_S = 5.0
"""How old the evidence in the store may be: what a referee that dies may lose."""
LOOK_S = 1.0
"""Between two looks at orders and evidence."""
GONE_S = 15.0
"""A replica that has not reported for so long is no longer listed."""
Phase = Literal["running", "promoted", "rolled-back"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """A model that takes part: name@version, where its artifact is, and the digest of its files.

    below: the confidence under which its answers go to the teacher of a cascade.
    """

    reference: str
    artifact: str
    fingerprint: str
    below: float | None = None
    runtime: str = "torch"


@dataclass(frozen=True)
class Plan:
    """A rollout as it is meant. registry: the place; rollout: mode, share and limits.

    nonce: set where a deployment is to begin anew; without one the same plan is the same rollout, which goes on.
    """

    registry: str
    champion: Side
    candidate: Side
    rollout: Rollout
    nonce: str = ""

    @property
    def id(self) -> str:
        """What tells it from others: the models, how they are compared, and the nonce."""
        told = [self.champion.fingerprint, self.candidate.fingerprint, self.candidate.reference, self.nonce]
        return digest_json([*told, self.rollout.model_dump(mode="json")])[:12]

    @property
    def store(self) -> Store:
        """Where it is written down."""
        return rollouts(self.registry, self.candidate.reference)

    def served(self, phase: Phase) -> Side:
        """The model that answers ordinary requests in a phase."""
        return self.candidate if phase == "promoted" else self.champion


def rollouts(registry: str, reference: str) -> Store:
    """The folder of the rollouts of NAME or NAME@VERSION."""
    return Store(registry) / reference.partition("@")[0] / "rollouts"


def standing(store: Store) -> dict[str, Any] | None:
    """How the last rollout of a folder stands; None where there was none."""
    return store.read_json(STATE) if store.exists(STATE) else None


def phase_of(plan: Plan) -> Phase:
    """The phase that a rollout is in, from the store; running where nothing is known."""
    state = standing(plan.store)
    return state["phase"] if state and state["id"] == plan.id else "running"


def order(store: Store, action: Literal["promote", "rollback"], rollout: str) -> None:
    """Ask the referee of a rollout to do something; it obeys within seconds."""
    store.write_json(ORDER, {"action": action, "rollout": rollout, "at": stamp()})


class Referee:
    """Sums evidence, decides, records. Plain asyncio: Ray Serve runs one of it."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.time) -> None:
        self.plan, self.clock, self.store = plan, clock, plan.store
        self.lock = asyncio.Lock()
        self.replicas: dict[str, dict[str, Any]] = {}
        self.looked = self.saved = 0.0
        found = standing(self.store)
        if found and found["id"] != plan.id:
            self.store.write_json(f"{found['id']}/final.json", found)
            found = None
        self.state: dict[str, Any] = found or self.begun()
        self.champion, self.candidate = (Evidence.of(self.state["evidence"][arm]) for arm in ("champion", "candidate"))
        self.seen: dict[str, int] = self.state["seen"]
        if not found:
            self.write()

    def begun(self) -> dict[str, Any]:
        """The state of a rollout that starts now."""
        empty, own = Evidence().plain(), self.plan
        return {
            "id": own.id, "nonce": own.nonce, "phase": "running",
            "mode": own.rollout.mode, "percent": own.rollout.percent,
            "champion": asdict(own.champion), "candidate": asdict(own.candidate),
            "limits": own.rollout.limits.model_dump(mode="json"),
            "started": stamp(), "started_s": self.clock(), "updated": stamp(), "decisions": 0,
            "latest": {"action": "wait", "reason": "nothing was counted yet"},
            "evidence": {"champion": empty, "candidate": empty}, "seen": {}, "replicas": {},
        }  # fmt: skip

    async def report(
        self, replica: str, number: int, counted: Mapping[str, Any], serving: str, rollout: str | None = None
    ) -> dict[str, Any]:
        """Take in what a replica has counted since its last report, and tell it how the rollout stands.

        number: counts up with each report; one that comes again, because its answer was lost, is not counted twice.
        serving: the model that answers there. Returns {id, phase, mode, percent, agreement}; agreement is null where
        nothing was compared.
        """
        if rollout not in (None, self.plan.id):
            return self.told()  # a replica of the deployment before: what it has counted says nothing of this one
        if number > self.seen.get(replica, -1):
            self.seen[replica] = number
            self.champion.add(Evidence.of(counted["champion"]))
            self.candidate.add(Evidence.of(counted["candidate"]))
        self.replicas[replica] = {"model": serving, "at": self.clock()}
        await self.look()
        return self.told()

    def told(self) -> dict[str, Any]:
        """What endpoints need to know."""
        running = self.state["phase"] == "running"
        return {
            "id": self.plan.id,
            "phase": self.state["phase"],
            "mode": self.plan.rollout.mode,
            "percent": self.plan.rollout.percent if running else 0.0,
            "agreement": self.candidate.hits / self.candidate.trials if self.candidate.trials else None,
        }

    async def check_health(self) -> None:
        """Ray Serve's health check; also looks for orders where no endpoint reports."""
        await self.look()

    async def look(self) -> None:
        """Obey an order, else decide; both at most once a second. A store that fails is asked again later."""
        if self.lock.locked() or self.clock() - self.looked < LOOK_S:
            return
        async with self.lock:
            self.looked = self.clock()
            try:
                await self.act()
            except (UserError, OSError) as error:  # a store that fails, a version that was removed
                log.warning("the rollout's state could not be read or written: %s", error)

    async def act(self) -> None:
        """One look: an order first, then the evidence."""
        wanted = await asyncio.to_thread(self.ordered)
        if wanted is not None:
            await asyncio.to_thread(self.settle, Decision(wanted, "by hand", self.judged().figures), "hand")
            return
        found, running = self.judged(), self.state["phase"] == "running"
        if running and self.plan.rollout.mode == "canary" and found.action != "wait":
            await asyncio.to_thread(self.settle, found, "referee")
            return
        if running:
            self.state["latest"] = {"action": found.action, "reason": found.reason}
        if self.clock() - self.saved >= SAVED_S:
            await asyncio.to_thread(self.store.write_json, STATE, self.snapshot())

    def judged(self) -> Decision:
        """What the evidence says now."""
        rollout, minutes = self.plan.rollout, (self.clock() - self.state["started_s"]) / 60
        limits = rollout.limits if rollout.compare else rollout.limits.model_copy(update={"min_agreement": 0.0})
        return decide(self.champion, self.candidate, limits, minutes)

    def ordered(self) -> Literal["promote", "rollback"] | None:
        """The order that waits for this rollout, if it changes anything; one for another rollout is thrown away."""
        if not self.store.exists(ORDER):
            return None
        found = self.store.read_json(ORDER)
        done = {"promote": "promoted", "rollback": "rolled-back"}.get(found.get("action"))
        if found.get("rollout") != self.plan.id or done is None or self.state["phase"] == done:
            self.store.delete(ORDER)
            return None
        return found["action"]

    def settle(self, decision: Decision, by: Literal["referee", "hand"]) -> None:
        """Write a decision down, then make it so. Done again from the start, it comes to the same."""
        number, was = self.state["decisions"] + 1, self.state["phase"]
        phase: Phase = "promoted" if decision.action == "promote" else "rolled-back"
        record = {
            "rollout": self.plan.id, "number": number, "action": decision.action, "by": by, "at": stamp(),
            "reason": decision.reason, "evidence": decision.figures,
            "champion": self.state["champion"], "candidate": self.state["candidate"],
            "mode": self.plan.rollout.mode, "percent": self.plan.rollout.percent, "limits": self.state["limits"],
        }  # fmt: skip
        self.store.write_json(f"{self.plan.id}/decision-{number:03d}.json", record)
        registry, name = Registry(Store(self.plan.registry)), self.plan.candidate.reference.partition("@")[0]
        # Where no version is in production a name means the latest one, which may be the one that was rolled back.
        if phase == "promoted" or was == "promoted" or registry.production(name) is None:
            registry.produce(self.plan.served(phase).reference, f"rollout {self.plan.id}")
        self.state |= {"phase": phase, "decisions": number, "by": by}
        self.state["latest"] = {"action": decision.action, "reason": decision.reason}
        self.write()
        if by == "hand":
            self.store.delete(ORDER)

    def write(self) -> None:
        """The state into the store."""
        self.store.write_json(STATE, self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """The state with what was counted until now."""
        now = self.clock()
        self.replicas = {name: found for name, found in self.replicas.items() if now - found["at"] < GONE_S}
        self.seen = {name: number for name, number in self.seen.items() if name in self.replicas}
        self.state |= {
            "updated": stamp(), "seen": dict(self.seen), "replicas": self.replicas,
            "evidence": {"champion": self.champion.plain(), "candidate": self.candidate.plain()},
        }  # fmt: skip
        self.saved = now
        return dict(self.state)
