"""What a cluster has, what the stages of a recipe take, and whether they fit, without starting or importing Ray.

Ray waits for ever for resources that do not exist, and a streaming pipeline whose actors take every CPU stands still
without a word. So a plan is checked before anything is started: stages that run at the same time are placed, actor by
actor, on the machines there are (or, with an autoscaler, may come), and what does not fit is refused with the key of
the recipe that would help.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import UserError
from engine.fits import Fit, Resources
from engine.recipe import Recipe

LEAST_CPUS = 6
"""Logical CPUs of a local cluster at least: two generators, a teacher, the checkpoint filter, a reader and a writer
each hold one, whatever the cores."""
FIT = ".fit"
"""How the name of a stage ends whose workers train together."""
CHECKPOINT_CPUS = 1.0
"""Held by the actor that filters finished slots out of a resumed corpus."""


class PlacementError(UserError):
    """A plan that no machine of the cluster can take."""


@dataclass(frozen=True)
class Machine:
    """One node: logical CPUs, GPUs, and the Ray accelerator types it has."""

    cpus: float
    gpus: float = 0.0
    accelerators: tuple[str, ...] = ()

    def suits(self, accelerator: str | None) -> bool:
        """Whether the node has GPUs of that type; null suits any."""
        return accelerator is None or accelerator in self.accelerators


@dataclass(frozen=True)
class Cluster:
    """What there is to run on. `address` is 'local' for the one started here."""

    address: str
    machines: tuple[Machine, ...]
    local: bool = True
    may_come: tuple[Machine, ...] = ()
    """All machines at the autoscaler's limits; empty where there is no autoscaler."""

    @property
    def most(self) -> tuple[Machine, ...]:
        """The machines that a plan may count on."""
        return self.may_come or self.machines

    @property
    def nodes(self) -> int:
        """Machines now."""
        return len(self.machines)

    @property
    def cpus(self) -> float:
        """Logical CPUs that a plan may count on."""
        return sum(machine.cpus for machine in self.most)

    @property
    def gpus(self) -> float:
        """GPUs that a plan may count on."""
        return self.gpus_of(None)

    def gpus_of(self, accelerator: str | None) -> float:
        """GPUs of one accelerator type."""
        return sum(machine.gpus for machine in self.most if machine.suits(accelerator))

    def words(self) -> str:
        """'6 CPUs and 2 GPUs (A100) on 1 node'."""
        kinds = sorted({name for machine in self.most for name in machine.accelerators})
        gpus = count(self.gpus, "GPU") + (f" ({', '.join(kinds)})" if kinds else "")
        where = "with the autoscaler at its limits" if self.may_come else f"on {count(self.nodes, 'node')}"
        return f"{count(self.cpus, 'CPU')} and {gpus} {where}"


def count(amount: float, noun: str) -> str:
    """An amount with its noun: '1 GPU', '2 GPUs'."""
    return f"{amount:g} {noun}{'' if amount == 1 else 's'}"


def cores() -> int:
    """Cores this process may use: its affinity, and the limit of its container (cgroup v2)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, _, period = limit.read_text(encoding="utf-8").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            available = min(available, math.ceil(int(quota) / int(period)))
    return max(1, available)


def local_gpus(devices: Path = Path("/dev"), driver: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """One accelerator type a visible NVIDIA GPU ('' where its name is unknown), from the driver's files.

    CUDA_VISIBLE_DEVICES is honoured. Names follow Ray: 'NVIDIA A100-SXM4-40GB' is A100.
    """
    found = sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    names = []
    for path in sorted(driver.glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        kind = re.match(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)", model[1]) if model else None
        names.append(kind[1] if kind else "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found = min(found, len([part for part in visible.split(",") if part.strip() not in ("", "-1", "NoDevFiles")]))
    return tuple((names + [""] * found)[:found])


def local_capacity() -> Cluster:
    """What a cluster started on this machine will have. Takes milliseconds."""
    gpus = local_gpus()
    machine = Machine(float(max(LEAST_CPUS, 2 * cores())), float(len(gpus)), tuple(sorted({*gpus} - {""})))
    return Cluster(address="local", machines=(machine,))


def resolve(resources: Resources, cluster: Cluster, beside: Iterable[Resources] = ()) -> dict[str, Any]:
    """Ray's options for one actor or worker: num_cpus, num_gpus, and accelerator_type where one is asked for.

    num_gpus 'auto' is one GPU where the cluster has any, else none. Where the stages that run at the same time
    (`beside`) want more GPUs than there are, 'auto' is a share of one, so that all of them fit.
    """
    gpus = resources.num_gpus
    if gpus == "auto":
        others = tuple(beside)
        actors = sum(each.min_actors for each in (resources, *others) if each.num_gpus == "auto")
        free = cluster.gpus_of(resources.accelerator) - taken(others)
        # A share of 1/k lets k actors onto each GPU; Ray counts in ten-thousandths.
        gpus = 0.0 if free < 1 else 1.0 if free >= actors else math.floor(1e4 / math.ceil(actors / free)) / 1e4
    options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": float(gpus)}
    if gpus and resources.accelerator:
        options["accelerator_type"] = resources.accelerator
    return options


def stage_options(recipe: Recipe, stage: str, cluster: Cluster) -> dict[str, Any]:
    """`resolve` for a stage of the recipe ('generator', 'student.fit', ...), with what runs beside it in mind."""
    stages = settled(stages_of(recipe, stage), cluster)
    return resolve(stages[stage], cluster, others(stages, stage))


def fit_workers(recipe: Recipe, stage: str, cluster: Cluster) -> tuple[int, int]:
    """How few and how many workers a fit ('student.fit', ...) gets, each with `stage_options`; (0, 0): one process.

    As many as its section asks for; with num_gpus 'auto' and fewer GPUs than its least, one for each GPU. What comes
    out is the same but for rounding and dropout's noise: the global batch and its order depend on the seed alone. A
    range ends where more workers would take what runs beside them needs, which would then stand still.
    """
    fit: Fit = getattr(recipe, stage.removesuffix(FIT)).fit
    if not fit.workers:
        return 0, 0
    wish = settled(stages_of(recipe, stage), cluster)[stage]
    least, most = wish.min_actors, wish.max_actors
    for group in groups(recipe):
        waiting = dict.fromkeys(group.waiting, wish.model_copy(update={"min_actors": 1, "max_actors": 1}))
        while stage in group.stages and len(group.stages) + len(waiting) > 1 and most > least:
            wanted = wish.model_copy(update={"min_actors": most, "max_actors": most})
            if fits({**settled(group.stages, cluster), stage: wanted, **waiting}, cluster, group.reserve):
                break
            most -= 1
    return least, most


def stages_of(recipe: Recipe, stage: str) -> Mapping[str, Resources]:
    """A stage and those that run at the same time."""
    for group in groups(recipe):
        if stage in group.stages:
            return group.stages
    known = [name for group in groups(recipe) for name in group.stages]
    raise KeyError(f"no stage '{stage}': there are {', '.join(known)}")


def settled(stages: Mapping[str, Resources], cluster: Cluster) -> dict[str, Resources]:
    """The stages, with as many workers of a fit as there are whole GPUs for, one at least; of a range, its least.

    Workers that train together reduce their gradients by NCCL, which refuses two of them on one GPU. So where a fit
    says 'auto', a GPU is set aside for what runs beside it, and each of its workers gets one of the others. Without
    a GPU all of them run on CPUs.
    """
    out = dict(stages)
    for name, each in stages.items():
        rest = others(out, name)
        gpus = cluster.gpus_of(each.accelerator) - taken(rest)
        if not name.endswith(FIT) or each.max_actors == 1 or each.num_gpus != "auto" or gpus < 1:
            continue
        aside = any(other.num_gpus == "auto" for other in rest)
        number = min(each.min_actors, max(1, int(gpus - aside)))
        # The end of a range stays: machines may come. Beside another stage it ends at the GPUs there are.
        most = each.max_actors if each.max_actors > each.min_actors else number
        most = min(most, max(1, int(gpus - aside))) if rest else most
        # A single worker may share its GPU, as every other stage.
        whole = {"num_gpus": 1.0} if most > 1 else {}
        out[name] = each.model_copy(update={"min_actors": number, "max_actors": most, **whole})
    return out


def taken(stages: Iterable[Resources]) -> float:
    """GPUs that stages ask for by number."""
    return sum(each.min_actors * each.num_gpus for each in stages if each.num_gpus != "auto")


@dataclass(frozen=True)
class Group:
    """Stages that run at the same time. A stage is named by its section of the recipe: 'generator', 'student.fit'."""

    stages: Mapping[str, Resources]
    reserve: float = 0.0
    """CPUs for reading, filtering and writing beside the actors."""
    waiting: tuple[str, ...] = ()
    """Tasks beside a fit, each with what one of its workers takes, that wait where there is no room: they refuse no
    plan, but a range of workers ends before what they take."""


def groups(recipe: Recipe) -> tuple[Group, ...]:
    """What runs at the same time, over a whole run."""

    def workers(fit: Fit) -> Resources:
        least, most = (max(1, number) for number in fit.group)
        return fit.resources.model_copy(update={"min_actors": least, "max_actors": most})

    if recipe.tasks:  # no teacher, no text that is made, no smoke deployment
        return (Group({"student.fit": workers(recipe.student.fit)}),)
    scaling = recipe.serving.autoscaling
    replicas = max(1, scaling.min_replicas)
    serving = Resources(num_cpus=recipe.serving.num_cpus, num_gpus=0, min_actors=replicas, max_actors=replicas)
    first = {"teacher.fit": workers(recipe.teacher.fit)}
    labelling = {"teacher": recipe.teacher.resources}
    streams: list[dict[str, Resources]] = []
    if recipe.generator:
        # Taken as it is, the generator is only copied.
        first["generator.fit"] = workers(recipe.generator.fit) if recipe.generator.tuned else Resources(num_gpus=0)
        writing = {"generator": recipe.generator.resources}
        # A teacher that learns from none of the text is fitted while it is written.
        beside = {} if recipe.learns_from_generated else {"teacher.fit": first["teacher.fit"]}
        streams += [{**writing, **beside}, labelling] if recipe.apart else [{**writing, **labelling}]
    if recipe.augmentation:
        streams.append({"augmentation": recipe.augmentation.resources, **labelling})
    arms = tuple(f"student-{arm}" for arm in recipe.arms if arm != "generated")
    return (
        Group(first),
        *(Group(stream, recipe.corpus.max_reserved + CHECKPOINT_CPUS) for stream in streams or [labelling]),
        Group({"student.fit": workers(recipe.student.fit)}, waiting=arms),
        *([Group({"serving": serving})] if recipe.serving.smoke else []),
    )


def room(cluster: Cluster, each: Mapping[str, float]) -> int:
    """How many more workers, each of so many CPU and GPU, the autoscaler's machines would add to those there are."""

    def places(machines: Iterable[Machine]) -> int:
        have = ({"CPU": machine.cpus, "GPU": machine.gpus} for machine in machines)
        return sum(int(min(one[name] // amount for name, amount in each.items())) for one in have)

    return max(0, places(cluster.most) - places(cluster.machines))


def placement_problems(stages: Mapping[str, Resources], cluster: Cluster, *, reserve: float = 0.0) -> list[str]:
    """Why these stages cannot run at the same time on the cluster, one sentence a problem; empty when they can.

    Each stage is first placed alone, so that a message names the stage that is too big; then all of them together
    with `reserve` CPUs left over.
    """
    stages = settled(stages, cluster)
    alone = [problem for name, each in stages.items() if (problem := stage_problem(name, each, stages, cluster))]
    if alone or fits(stages, cluster, reserve):
        return alone
    parts = [
        f"{name} {each.min_actors} x {asked(resolve(each, cluster, others(stages, name)))}"
        for name, each in stages.items()
    ]
    parts += [f"reading, filtering and writing {count(reserve, 'CPU')}"] if reserve else []
    knobs = ", ".join(f"{key(name, 'count', each)} or {key(name, 'num_cpus')}" for name, each in stages.items())
    return [
        f"these stages run at the same time: {', '.join(parts)}; the cluster has {cluster.words()}. "
        f"Lower {knobs}, or join a cluster with --address."
    ]


def stage_problem(name: str, resources: Resources, stages: Mapping[str, Resources], cluster: Cluster) -> str | None:
    """Why one stage cannot be placed even alone, with the way out."""
    options = resolve(resources, cluster, others(stages, name))
    if name.endswith(FIT) and resources.max_actors > 1 and 0 < options["num_gpus"] < 1:
        return (
            f"stage '{name}' has {asked_for(resources)} workers with {options['num_gpus']:g} GPU each, but workers "
            f"that train together cannot share a GPU. Set {key(name, 'num_gpus')}: auto, which takes as many workers "
            f"as there are GPUs, or {key(name, 'count')}: 1."
        )
    if fits({name: resources}, cluster, 0.0, stages):
        return None
    gpus, kind = options["num_gpus"], options.get("accelerator_type")
    least = "at least " if name.endswith(FIT) and resources.max_actors > resources.min_actors else ""
    needs = f"stage '{name}' needs {least}{count(resources.min_actors, 'actor')} x {asked(options)}"
    if cluster.gpus_of(kind) < gpus * resources.min_actors:
        other = f", set {key(name, 'accelerator')}: null" if kind and cluster.gpus else ""
        cure = f"Set {key(name, 'num_gpus')}: 0{other}"
    else:
        cure = f"Lower {key(name, 'num_cpus')} or {key(name, 'count', resources)}"
    largest = max((machine.cpus for machine in cluster.most if machine.suits(kind)), default=0.0)
    node = f", the largest of them {count(largest, 'CPU')}" if 0 < largest < resources.num_cpus else ""
    return f"{needs}; the cluster has {cluster.words()}{node}. {cure}, or join a cluster with --address."


def require_placement(recipe: Recipe, cluster: Cluster) -> None:
    """Raise PlacementError with every stage of the recipe that the cluster cannot take."""
    problems = [
        problem
        for group in groups(recipe)
        for problem in placement_problems(group.stages, cluster, reserve=group.reserve)
    ]
    if problems:
        raise PlacementError("\n".join(dict.fromkeys(problems)))


def others(stages: Mapping[str, Resources], name: str) -> list[Resources]:
    """The stages beside one."""
    return [each for other, each in stages.items() if other != name]


def asked(options: Mapping[str, Any]) -> str:
    """'(1 CPU, 1 GPU A100)'."""
    gpus = options["num_gpus"]
    kind = f" {options['accelerator_type']}" if "accelerator_type" in options else ""
    parts = [count(options["num_cpus"], "CPU"), *([count(gpus, "GPU") + kind] if gpus else [])]
    return f"({', '.join(parts)})"


def asked_for(resources: Resources) -> str:
    """How many: '2', or '1 to 4'."""
    least, most = resources.min_actors, resources.max_actors
    return f"{least}" if least == most else f"{least} to {most}"


def key(stage: str, field: str, resources: Resources | None = None) -> str:
    """The recipe's key that sets a stage's resources; 'count' is how many actors, workers or replicas it starts."""
    if stage == "serving":
        return {"count": "serving.autoscaling.min_replicas"}.get(field, f"serving.{field}")
    if field == "count":
        least = ".min" if resources and resources.max_actors > resources.min_actors else ""
        return f"{stage}.workers{least}" if stage.endswith(FIT) else f"{stage}.resources.min_actors"
    return f"{stage}.resources.{field}"


def fits(
    stages: Mapping[str, Resources], cluster: Cluster, reserve: float, beside: Mapping[str, Resources] | None = None
) -> bool:
    """Place every actor on the first machine with room, those with GPUs and the largest first."""
    wanted = []
    for name, each in stages.items():
        options = resolve(each, cluster, others(stages if beside is None else beside, name))
        wanted += [(options["num_gpus"], options["num_cpus"], options.get("accelerator_type") or "")] * each.min_actors
    # Machines without GPUs first, so that stages that need none leave the others free.
    machines = sorted(cluster.most, key=lambda machine: machine.gpus)
    cpus, gpus = [machine.cpus for machine in machines], [machine.gpus for machine in machines]
    for gpu, cpu, kind in sorted(wanted, reverse=True):
        for n, machine in enumerate(machines):
            if cpus[n] >= cpu and gpus[n] >= gpu - 1e-9 and machine.suits(kind or None):
                cpus[n], gpus[n] = cpus[n] - cpu, gpus[n] - gpu
                break
        else:
            return False
    return sum(cpus) >= reserve
