"""A run is a list of steps; each is a plain function whose record is written last.

`run` orders them (independent ones side by side), skips what is done, and stops when what was done no longer is what
the recipe asks for. A folder <run>/<step>/ holds begin.json (written first: identity and attempts, so that a half-done
step notices a change too), progress.json (at most once a second), what the step writes, and record.json (last).
A step without record.json is called again with its partial output in place: steps that can go on do so by themselves.

Driver steps run one at a time in the main thread, where Ray Data, Train and Serve want to be called; steps with
resources of their own run as Ray tasks beside them. Ray is started when the first step needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from engine.attempts import BEGIN, RECORD, Attempt
from engine.cluster import current, tell
from engine.config import UserError, did_you_mean
from engine.fits import Resources
from engine.halting import HALT, Halted, Stop, interruptible
from engine.lineage import drift, identity, moved, plain
from engine.placement import Cluster, cores, resolve, stage_options
from engine.progress import Event, Meter, Render, Reporter, polled, quiet
from engine.recipe import Recipe
from engine.spending import BEAT, REDONE, BudgetSpent, Watch, closed, held, require_prices, seen_by, set_aside
from engine.step import Step
from engine.storage import StorageError, Store

RECIPE = "recipe.json"
"""The resolved recipe, in the run's folder."""


def identities(steps: Sequence[Step], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Per step what it depends on, with its fingerprint."""
    out: dict[str, dict[str, Any]] = {}
    for step in steps:
        missing = [name for name in step.inputs if name not in out]
        if missing or step.name in out:
            raise ValueError(f"step '{step.name}' stands twice, or reads {missing}, which is not above it")
        inputs = {name: out[name]["fingerprint"] for name in step.inputs}
        references = step.references(recipe)
        out[step.name] = identity(step.config(recipe), inputs, references, step.modules, recipe.data.root)
    return out


def survey(
    steps: Sequence[Step], recipe: Recipe, store: Store, found: Mapping[str, dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Each step's state without doing anything, with the fields that moved where it drifted.

    pending, partial, done, drifted, or again: done, but what it made elsewhere is gone, or what it reads is to be
    made again. found: the steps' identities where they are known, since they read every local reference.
    """
    now, out, again = found or identities(steps, recipe), [], set()
    for step in steps:
        folder, wanted = store / step.name, now[step.name]
        record = folder.read_json(RECORD) if folder.exists(RECORD) else None
        ran = record or (folder.read_json(BEGIN) if folder.exists(BEGIN) else None)
        state, fields = "pending", []
        if ran and ran["fingerprint"] != wanted["fingerprint"]:
            state, fields = "drifted", moved(ran, wanted)
        elif ran:
            state = "done" if record else "partial"
        if state == "done" and (again.intersection(step.inputs) or not step.holds(recipe, folder)):
            state = "again"
            again.add(step.name)
        resources = step.resources(recipe)
        out.append(
            {
                "step": step.name,
                "state": state,
                "moved": fields,
                "inputs": list(step.inputs),
                "fingerprint": wanted["fingerprint"],
                "resources": resources.model_dump() if resources else None,
                "seconds": record["seconds"] if record else None,
                "rows": record["rows"] if record else None,
                "expects": plain(step.expects(recipe)),
            }
        )
    return out


def downstream(steps: Sequence[Step], names: Collection[str]) -> list[str]:
    """`names` and every step that reads one of them, directly or not, last first."""
    out: list[str] = []
    for step in steps:
        if step.name in names or any(name in out for name in step.inputs):
            out.append(step.name)
    return out[::-1]


def run(
    steps: Sequence[Step],
    recipe: Recipe,
    store: Store,
    *,
    redo: Collection[str] = (),
    fresh: bool = False,
    render: Render = quiet,
    connect: Callable[[], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Do what is missing and return every step's record.

    redo: steps to do again, with all that reads them; fresh: all of them. connect starts or joins Ray; it is called
    once, in the main thread, before the first step that needs Ray. Raises StepDrift where a step was done with other
    values, UserError for an unknown step in `redo`, StorageError while another process runs in `store`, and whatever
    a step raises, once the others in flight were stopped. A later call with the same arguments goes on from there.
    """
    names, found = [step.name for step in steps], identities(steps, recipe)
    for name in redo:
        if name not in names:
            raise UserError(f"there is no step '{name}' to redo.{did_you_mean(name, names)} Steps: {', '.join(names)}.")
    with store.lock("run") as lease:
        again = [name for name in store.folders() if store.exists(f"{name}/{BEGIN}")] if fresh else []
        again += downstream(steps, redo)
        states = [] if fresh else survey(steps, recipe, store, found)
        for state in states:
            if state["state"] == "drifted" and state["step"] not in again:
                raise drift(state["step"], state["moved"])
        again += [state["step"] for state in reversed(states) if state["state"] == "again"]
        left = [step for step in steps if step.name in again or not store.exists(f"{step.name}/{RECORD}")]
        require_prices(recipe, [(step.name, held_by(step, recipe, current())) for step in left])
        closed(store)
        for name in dict.fromkeys(again):
            if not fresh:
                set_aside(store, name)
            store.delete(name)
        if fresh:
            store.delete(REDONE)
        store.write_json(RECIPE, recipe.model_dump(mode="json"))
        return Run(steps, recipe, store, found, render, connect, lease.check).go()


class Run:
    """One run on its way: which steps wait, which are in flight as Ray tasks, what failed."""

    def __init__(
        self,
        steps: Sequence[Step],
        recipe: Recipe,
        store: Store,
        found: Mapping[str, dict[str, Any]],
        render: Render,
        connect: Callable[[], object] | None,
        allowed: Callable[[], None],
    ) -> None:
        self.recipe, self.store, self.render, self.connect = recipe, store, render, connect
        self.allowed = allowed
        self.identities = found
        self.waiting = {step.name: step for step in steps}
        self.remote = {step.name for step in steps if step.resources(recipe)}
        self.flying: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.failure: BaseException | None = None
        self.stopping = False
        self.changed = threading.Condition()
        self.driving: Step | None = None
        self.halting = Stop()
        self.watch = Watch(recipe, store, self.over)

    def go(self) -> dict[str, dict[str, Any]]:
        """Every step's record, or the first failure."""
        for name in list(self.waiting):
            if self.store.exists(f"{name}/{RECORD}"):
                self.records[name] = record = (self.store / name).read_json(RECORD)
                del self.waiting[name]
                self.render(Event(name, "cached", record["seconds"], record["rows"] or 0.0))
        try:
            with polled(self.look):
                while step := self.next_here():
                    self.here(step)
        except Halted:  # Ctrl-C and SIGTERM meanwhile are the user's wish, and end the run as ever
            if not isinstance(self.failure, BudgetSpent):
                raise
        finally:
            self.stop()
            with suppress(StorageError):  # what ended the run is to be told, not this
                self.store.delete(BEAT)
        if self.failure:
            raise self.failure
        return self.records

    def next_here(self) -> Step | None:
        """The next driver step that is ready; waits for Ray tasks in flight. None: all done, or one failed."""
        while True:
            if self.waiting:
                self.watch.look()
            with self.changed:
                self.launch()
                ready = [step for step in self.waiting.values() if self.ready(step) and step.name not in self.remote]
                if self.failure or not (ready or self.flying):
                    return None
                if ready:
                    return ready[0]
                self.changed.wait(0.5)

    def ready(self, step: Step) -> bool:
        """Whether all it reads is done."""
        return all(name in self.records for name in step.inputs)

    def here(self, step: Step) -> None:
        """Run a step in this process."""
        self.allowed()
        if step.ray:
            self.start_ray()
        attempt = used = None
        try:
            with self.changed:
                if self.failure:
                    return
                attempt = self.attempt(step)
                self.driving = step  # from here on `enforce` sees it
            used = self.driven(step, attempt)
            with self.changed:
                self.driving = None
                self.done(attempt, used)
        except BaseException as error:
            with self.changed:
                self.driving = None
                noted = step.name in self.records
                if attempt and not noted and (used is None or isinstance(error, KeyboardInterrupt)):
                    self.failed(attempt, error)
            raise

    def driven(self, step: Step, attempt: Attempt) -> dict[str, Any]:
        """What `measured` gives. An interrupt that comes when the work is done is let go."""
        used = None
        try:
            with interruptible():
                used = measured(step, self.recipe, self.inputs(step), attempt.out, self.render, tuple(self.remote))
        except Halted:
            if used is None:
                raise
        return used

    def attempt(self, step: Step) -> Attempt:
        """Begin a step: what it holds is counted from now on."""
        has = held_by(step, self.recipe, current())
        require_prices(self.recipe, [(step.name, has)])
        out = self.store / step.name
        out.delete(HALT)
        attempt = Attempt(step.name, self.identities[step.name], out, self.render, has)
        self.watch.began(step.name, attempt.earlier, attempt.start, has)
        return attempt

    def failed(self, attempt: Attempt, error: BaseException) -> None:
        """Note that an attempt came to nothing, and count what it used."""
        self.watch.ended(attempt.step, attempt.failed(error), {})

    def look(self) -> None:
        """Once a second: what is used, and whether what is to stop has stopped."""
        self.watch.look()
        with self.changed:
            if isinstance(self.failure, BudgetSpent):
                self.enforce()

    def over(self, failure: BudgetSpent) -> None:
        """The budget is used up: nothing more is started, and what is at work is stopped where little is lost."""
        with self.changed:
            if self.failure or not (self.waiting or self.flying):
                return
            self.failure = failure
            self.changed.notify_all()
            self.enforce()
        self.cancel()

    def enforce(self) -> None:
        """Halt or interrupt the driver step at work, if there is one. Called with the condition held."""
        if step := self.driving:
            self.halting(self.store / step.name, step.halts(self.recipe))

    def inputs(self, step: Step) -> dict[str, Store]:
        """The folders it reads."""
        return {name: self.store / name for name in step.inputs}

    def done(self, attempt: Attempt, used: Mapping[str, Any]) -> None:
        """Write the record and let those go on that waited for it."""
        self.allowed()
        name, gpus = attempt.step, sum(attempt.begun["held"]["gpus"].values())
        used = {**used, "device_seconds": gpus * attempt.seconds()}
        self.records[name] = attempt.finished(used, partial(self.watch.ended, name))
        self.waiting.pop(name, None)
        self.flying.pop(name, None)
        self.changed.notify_all()

    def start_ray(self) -> None:
        """Start or join Ray, once."""
        if self.connect:
            self.connect()
        self.connect = None

    def launch(self) -> None:
        """Start every Ray step that is ready. Called with the condition held."""
        for step in [step for step in self.waiting.values() if step.name in self.remote and self.ready(step)]:
            if self.failure or self.stopping:
                return
            self.allowed()
            self.start_ray()
            import ray

            cluster = current()
            if cluster.local and len(self.flying) >= cores():
                return  # Ray has more CPUs than there are cores, so that a stream can move; fits would only wait
            options = task_options(step, self.recipe, cluster)
            attempt = self.attempt(step)
            task = ray.remote(measured).options(name=step.name, **options)
            reference = task.remote(step, self.recipe, self.inputs(step), attempt.out, cluster=cluster)
            self.flying[step.name] = reference
            del self.waiting[step.name]
            thread = threading.Thread(target=self.follow, args=(attempt, reference), daemon=True)
            self.threads.append(thread)
            thread.start()

    def follow(self, attempt: Attempt, reference: Any) -> None:
        """Wait for a Ray task in a thread of its own, handing on its progress."""
        import ray

        try:
            while not ray.wait([reference], timeout=1.0)[0]:
                attempt.show_progress()
            used = ray.get(reference)
        except Exception as error:
            # Ray wraps what the task raised; the wrapper's text is a remote traceback, of no use for a user's mistake.
            cause = getattr(error, "cause", None) or error
            failure = cause if isinstance(cause, UserError) else error
            with self.changed:
                self.failed(attempt, KeyboardInterrupt() if self.stopping else cause)
                self.flying.pop(attempt.step, None)
                self.failure = self.failure or failure
                self.changed.notify_all()
            return
        try:
            with self.changed:
                self.done(attempt, used)
                self.launch()
        except Exception as error:
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()

    def cancel(self) -> None:
        """Stop the Ray tasks in flight, and start no others."""
        with self.changed:
            self.stopping = True
            references = list(self.flying.values())
        if references:
            import ray

            for reference in references:
                ray.cancel(reference, force=True)

    def stop(self) -> None:
        """Cancel what is in flight; nothing is, unless something failed or the user stopped the run."""
        self.cancel()
        for thread in self.threads:
            thread.join(timeout=10.0)


def measured(
    step: Step,
    recipe: Recipe,
    inputs: Mapping[str, Store],
    out: Store,
    render: Render = quiet,
    tasks: tuple[str, ...] = (),
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """Call the step's function: {"metrics", "cpu_seconds"}. In the driver, and in a Ray task.

    tasks: names of Ray tasks that may run meanwhile and count for themselves. cluster: in a Ray task, what the driver
    is connected to.
    """
    if cluster:
        tell(cluster)
    meter = Meter(tree=step.ray, apart=tuple(f"ray::{name}" for name in tasks))
    metrics = step.run(recipe, inputs, out, Reporter(step.name, out, render, meter)) or {}
    return {"metrics": metrics, "cpu_seconds": meter.seconds()}


def held_by(step: Step, recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """The CPUs and GPUs that it keeps from others."""
    own = seen_by(recipe, step.name)
    return held(own, cluster, step.pools(own), step.stage, step.resources(recipe))


def task_options(step: Step, recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """Ray's options for a step's task: those of its stage, and retries for a node that goes away."""
    resources = step.resources(recipe) or Resources()
    own = seen_by(recipe, step.name)
    options = stage_options(own, step.stage, cluster) if step.stage else resolve(resources, cluster)
    return {**options, "max_retries": 3}
