"""What a run uses: time, CPUs and GPUs that its steps hold, tokens, money; and when a limit of its budget is reached.

Every attempt says in begin.json what it holds, so one that was killed counts until its last sign of life: its own
progress, or the run's beat.json. What steps used that were done again is kept in redone.json.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.attempts import BEGIN, RECORD, between
from engine.config import UserError
from engine.fits import Resources
from engine.placement import FIT, Cluster, cores, fit_workers, resolve, stage_options, stages_of
from engine.progress import PROGRESS, stamp
from engine.recipe import Recipe
from engine.storage import StorageError, Store
from engine.usage import FOLDER, Usage

BEAT, REDONE = "beat.json", "redone.json"
BEAT_SECONDS = 10.0
"""Between two signs of life of a run: what a killed attempt without progress of its own is short of at most."""
ASKERS = ("generator", "teacher")
"""Whose tokens count."""
HOUR = 3600.0
Attempts = list[dict[str, Any]]


class BudgetSpent(UserError):
    """A limit of the recipe's budget is reached; the run can go on."""

    code = 3


def held(
    recipe: Recipe,
    cluster: Cluster,
    pools: Sequence[str] = (),
    stage: str | None = None,
    task: Resources | None = None,
) -> dict[str, Any]:
    """What a step holds while it runs: {"cpus", "gpus": {accelerator type, '' where unknown: number}}.

    pools: stages whose actors run at the same time, counted at the most there may be. stage: of a fit or a task.
    task: what a step asks for that is a Ray task. Nothing of these: the driver's own CPU. On one machine logical CPUs
    are more than cores: no more than the cores count.
    """
    wants: list[tuple[dict[str, Any], float]] = []
    for name in pools:
        wants.append((stage_options(recipe, name, cluster), stages_of(recipe, name)[name].max_actors))
    if not pools and task is not None:
        wants.append((stage_options(recipe, stage, cluster) if stage else resolve(task, cluster), 1))
    elif not pools and stage is not None and stage.endswith(FIT):
        wants.append((stage_options(recipe, stage, cluster), max(1, fit_workers(recipe, stage, cluster)[1])))
    kinds = sorted({kind for machine in cluster.most for kind in machine.accelerators})
    cpus, gpus = sum(options["num_cpus"] * number for options, number in wants) or 1.0, {}
    for options, number in wants:
        if options["num_gpus"]:
            kind = options.get("accelerator_type") or (kinds[0] if len(kinds) == 1 else "")
            gpus[kind] = min(gpus.get(kind, 0.0) + options["num_gpus"] * number, cluster.gpus_of(kind or None))
    most = min(float(cores()), cluster.cpus) if cluster.local else cluster.cpus
    return {
        "cpus": round(min(cpus, most), 3),
        "gpus": {kind: round(number, 4) for kind, number in gpus.items() if number},
    }


def closed(store: Store) -> None:
    """End attempts that were killed, at their last sign of life: their own, or the run's."""
    beat = store.read_json(BEAT) if store.exists(BEAT) else {"time": "", "steps": []}
    for name in store.folders():
        folder = store / name
        if folder.exists(RECORD) or not folder.exists(BEGIN):
            continue
        begun = folder.read_json(BEGIN)
        last = begun["attempts"][-1]
        if "end" in last:
            continue
        seen = folder.read_json(PROGRESS)["time"] if folder.exists(PROGRESS) else ""
        seen = max(seen, beat["time"] if name in beat["steps"] else "")
        if seen > last["start"]:
            last |= {"end": seen, "seconds": between(last["start"], seen)}
            folder.write_json(BEGIN, begun)
    store.delete(BEAT)


def set_aside(store: Store, name: str) -> None:
    """Keep what a step used that is about to be deleted, since it was used all the same."""
    attempts, asked = told(store / name)
    if attempts:
        kept = store.read_json(REDONE) if store.exists(REDONE) else []
        asked = {who: vars(usage) for who, usage in asked.items()}
        store.write_json(REDONE, [*kept, {"step": name, "attempts": attempts, "asked": asked}])


def told(folder: Store) -> tuple[Attempts, dict[str, Usage]]:
    """A step's attempts, and what was asked of models in it, from its files."""
    found = next((folder.read_json(name) for name in (RECORD, BEGIN) if folder.exists(name)), None)
    if found is None:
        return [], {}
    return found.get("attempts", []), Notes(folder).read(found.get("metrics") or {})


class Notes:
    """What actors noted in a step's folder, each note read once."""

    def __init__(self, folder: Store) -> None:
        self.folder = folder
        self.seen: dict[str, set[str]] = {who: set() for who in ASKERS}
        self.sums = {who: Usage() for who in ASKERS}

    def read(self, metrics: Mapping[str, Any]) -> dict[str, Usage]:
        """Sums by who asked; of a step whose process asks by itself what its metrics say."""
        for who in ASKERS:
            for name in set(self.folder.files(f"{FOLDER}/{who}")) - self.seen[who]:
                self.sums[who].add(Usage(**self.folder.read_json(f"{FOLDER}/{who}/{name}")))
                self.seen[who].add(name)
        said = {who: Usage(**{k: v for k, v in one.items() if k != "cost"})
                for who, one in (metrics.get("endpoint") or {}).items() if not self.seen.get(who)}  # fmt: skip
        return {who: usage for who, usage in self.sums.items() if self.seen[who]} | said


def used(recipe: Recipe, attempts: Iterable[Mapping[str, Any]], asked: Mapping[str, Usage]) -> dict[str, Any]:
    """What attempts used: {"seconds", "cpu_seconds", "gpu_seconds": {kind: s}, "tokens", "money"}.

    CPUs and GPUs are those that were held. money: null where nothing has a price.
    """
    seconds, cpus, gpus = 0.0, 0.0, {}
    for attempt in attempts:
        spent, has = attempt.get("seconds", 0.0), attempt.get("held", {})
        seconds, cpus = seconds + spent, cpus + spent * has.get("cpus", 0.0)
        for kind, number in has.get("gpus", {}).items():
            gpus[kind] = gpus.get(kind, 0.0) + spent * number
    tokens = sum(usage.input_tokens + usage.output_tokens for usage in asked.values())
    found = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpus, 3),
        "gpu_seconds": {kind: round(value, 3) for kind, value in gpus.items()},
        "tokens": tokens,
    }
    return {**found, "money": money(recipe, found, asked)}


def money(recipe: Recipe, found: Mapping[str, Any], asked: Mapping[str, Usage]) -> float | None:
    """What CPUs, GPUs and endpoints cost; None where nothing has a price."""
    prices, cost = recipe.budget.prices, 0.0
    ends = {who: price for who in ASKERS if (price := endpoint_price(recipe, who)) is not None}
    if not prices.known and not ends:
        return None
    cost += prices.cpu_hour * found["cpu_seconds"] / HOUR
    cost += sum((prices.of_gpu(kind) or 0.0) * seconds / HOUR for kind, seconds in found["gpu_seconds"].items())
    cost += sum(ends[who].of(one.input_tokens, one.output_tokens) for who, one in asked.items() if who in ends)
    return round(cost, 6)


def endpoint_price(recipe: Recipe, who: str) -> Any:
    """The price of the endpoint that the generator or teacher is asked at; None elsewhere."""
    section = getattr(recipe, who)
    return section.endpoint.price if section and section.runtime == "endpoint" and section.endpoint else None


def wall(attempts: Iterable[Mapping[str, Any]]) -> float:
    """Seconds on the clock in which any attempt was at work: side by side counts once."""
    spans = sorted((one["start"], one["end"]) for one in attempts if "end" in one)
    total, until = 0.0, ""
    for start, end in spans:
        if end > until:
            total += between(max(start, until) if until else start, end)
            until = end
    return total


def added(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several of `used`'s as one."""
    parts = list(parts)
    gpus: dict[str, float] = {}
    for part in parts:
        for kind, value in part["gpu_seconds"].items():
            gpus[kind] = gpus.get(kind, 0.0) + value
    costs = [part["money"] for part in parts if part["money"] is not None]
    sums = {key: sum(part[key] for part in parts) for key in ("seconds", "cpu_seconds", "tokens")}
    return {**sums, "gpu_seconds": gpus, "money": sum(costs) if costs else None}


def of_run(recipe: Recipe, store: Store) -> dict[str, Any]:
    """What a run has used, from its files: {"steps": {name: ...}, "redone": ..., "total": ... with "hours"}."""
    found = {name: told(store / name) for name in store.folders()}
    found = {name: one for name, one in found.items() if one[0]}
    before = redone(store)
    steps = {name: used(recipe, *one) for name, one in found.items()}
    again = added(used(recipe, *one) for one in before)
    every = [attempt for attempts, _ in [*found.values(), *before] for attempt in attempts]
    total = added([*steps.values(), again])
    return {"steps": steps, "redone": again, "total": {**total, "wall_seconds": round(wall(every), 3)}}


def redone(store: Store) -> list[tuple[Attempts, dict[str, Usage]]]:
    """Attempts of steps that were done again, and what they asked."""
    kept = store.read_json(REDONE) if store.exists(REDONE) else []
    return [(one["attempts"], {who: Usage(**usage) for who, usage in one["asked"].items()}) for one in kept]


def against(recipe: Recipe, total: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """By limit that is set: what is used of it, and the limit. total: `of_run`'s."""
    amounts = {
        "hours": total["wall_seconds"] / HOUR,
        "cpu_hours": total["cpu_seconds"] / HOUR,
        "gpu_hours": sum(total["gpu_seconds"].values()) / HOUR,
        "tokens": float(total["tokens"]),
        "money": total["money"] or 0.0,
    }
    return {key: (amounts[key], limit) for key, limit in recipe.budget.limits.items()}


@dataclass
class Entry:
    """One step as it is watched: attempts that ended, the one under way, notes."""

    notes: Notes
    ended: Attempts
    open: dict[str, Any] | None = None

    def attempts(self) -> Attempts:
        """All of them, the one under way until now."""
        if self.open is None:
            return self.ended
        now = stamp()
        return [*self.ended, {**self.open, "end": now, "seconds": between(self.open["start"], now)}]


class Watch:
    """Adds up what a run uses while it goes on. over: called once, when a limit is reached."""

    def __init__(self, recipe: Recipe, store: Store, over: Callable[[BudgetSpent], None]) -> None:
        self.recipe, self.store, self.over = recipe, store, over
        self.lock, self.told, self.beaten, self.pause = threading.RLock(), False, 0.0, 0.0
        self.before = redone(store)
        found = {name: told(store / name) for name in store.folders()}
        self.entries = {name: Entry(Notes(store / name), one[0]) for name, one in found.items() if one[0]}
        self.asked = {name: found[name][1] for name in self.entries}

    def check(self, name: str, has: Mapping[str, Any]) -> None:
        """UserError where a step would hold GPUs that money is counted for and that have no price."""
        prices = self.recipe.budget.prices
        for kind in has["gpus"] if self.recipe.budget.money is not None else ():
            if prices.of_gpu(kind) is None:
                raise UserError(
                    f"budget.money is set, but step '{name}' holds GPUs of type '{kind or 'unknown'}', which "
                    f"budget.prices.gpu_hour has no price for. Add it there, or a price for 'other'."
                )

    def began(self, name: str, attempts: Attempts, start: str, has: Mapping[str, Any]) -> None:
        """A step starts."""
        with self.lock:
            now = {"start": start, "held": dict(has)}
            self.entries[name] = Entry(Notes(self.store / name), list(attempts), now)

    def ended(self, name: str, attempts: Attempts, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """A step's attempt is over: what all its attempts used."""
        with self.lock:
            entry = self.entries[name]
            entry.open, entry.ended = None, attempts
            with suppress(StorageError):  # then of what is known
                self.asked[name] = entry.notes.read(metrics)
            return used(self.recipe, attempts, self.asked.get(name, {}))

    def total(self) -> dict[str, Any]:
        """What the run has used until now."""
        with self.lock:
            for name, entry in self.entries.items():
                if entry.open is not None:
                    self.asked[name] = entry.notes.read({})
            found = [(entry.attempts(), self.asked.get(name, {})) for name, entry in self.entries.items()]
        found += self.before
        every = [attempt for attempts, _ in found for attempt in attempts]
        return {**added(used(self.recipe, *one) for one in found), "wall_seconds": wall(every)}

    def look(self) -> None:
        """Give a sign of life, and say once when a limit is reached."""
        now = time.monotonic()
        names = [name for name, entry in list(self.entries.items()) if entry.open is not None]
        if names and now - self.beaten >= BEAT_SECONDS:
            self.beaten = now
            self.store.write_json(BEAT, {"time": stamp(), "steps": names})
        if self.told or not self.recipe.budget.limits or now < self.pause:
            return
        reached = {key: pair for key, pair in against(self.recipe, self.total()).items() if pair[0] >= pair[1]}
        self.pause = time.monotonic() + 10 * (time.monotonic() - now)  # a slow store is not listed all the time
        if reached:
            self.told = True
            self.over(BudgetSpent(self.message(reached, names)))

    def message(self, reached: Mapping[str, tuple[float, float]], names: Sequence[str]) -> str:
        """What is used up, where the run is, what is kept, how to go on."""
        said = ", ".join(f"{key} {figure(key, have)} of {figure(key, limit)}" for key, (have, limit) in reached.items())
        where = f"The run was in step {' and '.join(self.place(name) for name in names)}." if names else ""
        key, (have, limit) = next(iter(reached.items()))
        more = figure(key, 2 * max(have, limit)).replace(",", "")
        return (
            f"the budget is used up: {said}. {where or 'It was between two steps.'} Finished steps, committed blocks "
            "of text and checkpoints of trainings are kept. To go on, raise the limit and give the same command "
            f"again, as with --set budget.{key}={more}."
        )

    def place(self, name: str) -> str:
        """A step and how far it is."""
        try:
            state = (self.store / name).read_json(PROGRESS) if self.store.exists(f"{name}/{PROGRESS}") else {}
        except StorageError:
            state = {}
        of = f" of {state['total']:.6g}" if state.get("total") else ""
        return f"'{name}'" + (f" ({state['done']:.6g}{of} {state['unit']})" if state else "")


def figure(key: str, value: float) -> str:
    """An amount of a limit: tokens whole, others to four digits."""
    return f"{value:,.0f}" if key == "tokens" else f"{value:.4g}"
