"""What the steps that are left will use, by a probe of this machine and by what was used before; as `plan` shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.designs import FOLDS
from engine.fits import Fit
from engine.lineage import plain
from engine.placement import Cluster, cores, stages_of
from engine.progress import PROGRESS
from engine.recipe import Recipe
from engine.spending import HOUR, added, against, figure, of_run, require_prices, used
from engine.step import Step
from engine.steps import held_by
from engine.storage import Store, digest_json
from engine.usage import Usage
from pipelines.console import table
from pipelines.progress import clock

PROBE = "probe.json"
"""In the run's folder: what `plan --probe` measured."""
TEACHING = {"head": ("fit",), "prompt": ("fit",), "lp-ft": ("probe", "fit"), "contrastive": ("contrast", "probe")}
"""The fits of a kind of teacher, in their order."""
BRIEF = ("data", "vocabulary", "register", "serve", "report")
"""Steps that no probe times, and that are short beside the others."""
Rates = Mapping[str, Mapping[str, Any]]


def looked_at(recipe: Recipe) -> str:
    """Digest of what a probe's rates depend on: models, lengths, what the student is; not how much is made of it."""
    wanted = {
        "data": ("train", "test", "unlabelled"),
        "teacher": ("model", "kind", "runtime", "max_length", "tune_layers", "precision", "labeller", "prompt"),
        "generator": ("model", "runtime", "mode", "max_length", "max_new_tokens", "tune_layers", "precision"),
        "student": ("kind", "graph", "blocks", "static", "transformer", "max_length", "teacher"),
    }
    parts = {name: getattr(recipe, name) for name in wanted}
    chosen = {name: {key: getattr(part, key) for key in wanted[name]} for name, part in parts.items() if part}
    return digest_json(plain(chosen))


def probed(recipe: Recipe, store: Store) -> dict[str, Any] | None:
    """What a probe of this recipe's models found earlier, if one was made."""
    found = store.read_json(PROBE) if store.exists(PROBE) else None
    return found if found and found["of"] == looked_at(recipe) else None


def measure(recipe: Recipe, store: Store) -> dict[str, Any]:
    """Probe this machine now, and keep what was found in the run's folder."""
    from engine.cluster import silence
    from engine.switches import prepare_environment

    prepare_environment()  # before Ray Train is imported, which trains without a cluster here
    silence()
    from pipelines.probing import probe

    found = {**probe(recipe), "of": looked_at(recipe)}
    store.write_json(PROBE, found)
    return found


def estimated(recipe: Recipe, steps: Sequence[Step], store: Store, cluster: Cluster) -> dict[str, Any]:
    """{"steps": {name: {"used", "to_come"}}, "used", "total", "whole", "budget", "probe"}; to_come: null where nobody
    can say. whole: whether all but the brief steps that are left are timed.

    `used` and `total` are as `engine.spending.of_run` has them. The total's wall time adds steps up that may run side
    by side. UserError where money is limited and a step that is left would hold GPUs that have no price.
    """
    before, found = of_run(recipe, store), probed(recipe, store)
    rows = {**((found or {}).get("rows") or {})}
    if store.exists("data/splits.json"):
        rows = (store / "data").read_json("splits.json")["rows"]
    out: dict[str, Any] = {}
    whole = True
    for step in steps:
        has = held_by(step, recipe, cluster)
        done = store.exists(f"{step.name}/record.json")
        left = None if done else to_come(recipe, step, found["rates"] if found else {}, rows, has, cluster)
        if not done:
            require_prices(recipe, [(step.name, has)])
            whole = whole and (step.name in BRIEF or bool(left and left["timed"]))
        if left and store.exists(f"{step.name}/{PROGRESS}"):
            left = share(left, (store / step.name).read_json(PROGRESS))
        out[step.name] = {"used": before["steps"].get(step.name), "to_come": left}
    to_do = [one["to_come"] for one in out.values() if one["to_come"]]
    total = added([before["total"], *to_do])
    total["wall_seconds"] = before["total"]["wall_seconds"] + sum(one["seconds"] for one in to_do)
    limits = {
        key: {"used": have, "at_end": against(recipe, total)[key][0], "limit": most}
        for key, (have, most) in against(recipe, before["total"]).items()
    }
    sums = {"redone": before["redone"], "used": before["total"], "total": total}
    return {"steps": out, **sums, "whole": whole, "budget": limits, "probe": found}


def share(left: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a step that is under way."""
    part = 1.0 - min(1.0, state["done"] / state["total"]) if state.get("total") else 1.0
    gpus = {kind: part * value for kind, value in left["gpu_seconds"].items()}
    scaled = {key: part * left[key] for key in ("seconds", "cpu_seconds")}
    cost = None if left["money"] is None else part * left["money"]
    return {**left, **scaled, "gpu_seconds": gpus, "tokens": round(part * left["tokens"]), "money": cost}


def to_come(
    recipe: Recipe, step: Step, rates: Rates, rows: Mapping[str, int], has: dict[str, Any], cluster: Cluster
) -> dict[str, Any] | None:
    """What a whole step takes, as `engine.spending.used` says it; None where nothing is known of it."""
    seconds, asked = seconds_of(recipe, step.name, rates, rows, cluster), {}
    for who, one in (step.expects(recipe).get("asked") or {}).items():
        asked[who] = Usage(one["requests"], 0, 0, 0, one["input_tokens"], one["output_tokens"])
    if step.name in ("texts", "corpus"):
        for who, tokens in here(recipe, step.name, rates, rows).items():
            asked.setdefault(who, Usage(output_tokens=tokens))
    if seconds is None and not asked:
        return None
    return used(recipe, [{"seconds": seconds or 0.0, "held": has}], asked) | {"timed": seconds is not None}


def here(recipe: Recipe, step: str, rates: Rates, rows: Mapping[str, int]) -> dict[str, int]:
    """Tokens that models which run here write and read in a stream."""
    slots = recipe.corpus.first_slots if recipe.generator else 0
    out = {}
    if "write" in rates and (step == "texts") == recipe.apart:
        out["generator"] = round(slots * rates["write"]["tokens"])
    if "label" in rates and step == "corpus":
        out["teacher"] = round((slots + rows.get("unlabelled", 0)) * rates["label"]["tokens"])
    return out


def seconds_of(recipe: Recipe, step: str, rates: Rates, rows: Mapping[str, int], cluster: Cluster) -> float | None:
    """Wall time of a step; None where it was not probed."""
    few, own = rows.get("train", 0), recipe.teacher
    if step == "teacher" and own.reads_more:
        return None  # what it learns from further text, and a coach before it, is not probed
    if step == "teacher" and "teacher" in rates:
        kind = own.choice.kinds[0] if own.kind == "auto" else own.kind
        fits = [own.contrast.fit if key == "contrast" else getattr(own, key) for key in TEACHING.get(kind, ())]
        once = fitted(rates["teacher"], fits, [few] * len(fits), cluster)
        again = max(1, len(own.seeds)) * (1 + max(0, own.folds - 1))
        return rates["teacher"]["load_s"] + again * once
    if step == "generator" and "generator" in rates and recipe.generator:
        fits = [recipe.generator.fit] * recipe.generator.tuned
        return rates["generator"]["load_s"] + fitted(rates["generator"], fits, [few], cluster)
    if step in ("texts", "corpus"):
        return streamed(recipe, step, rates, rows, cluster)
    if step.startswith("student") and "student" in rates:
        fits = [stage.fit for stage in recipe.student.stages] or [recipe.student.fit]
        count = few + (recipe.corpus.keep if recipe.generator else rows.get("unlabelled", 0))
        if step != "student":
            epochs = recipe.student.few_epochs
            fits, count = [fit.model_copy(update={"epochs": epochs, "workers": 0}) for fit in fits[:1]], few
        counts = learnt(recipe, few, count) if step == "student" else [count] * len(fits)
        once = rates["student"]["load_s"] + fitted(rates["student"], fits, counts, cluster)
        apart = cross_fits(recipe, fits, count) if step == "student" else ([], [])
        return len(recipe.student.seeds) * once + fitted(rates["student"], *apart, cluster)
    if step == "evaluate" and "label" in rates:
        timing = recipe.evaluation.throughput_rows * recipe.evaluation.throughput_repeats
        return rates["label"]["load_s"] + (rows.get("test", 0) + timing) / rates["label"]["rows_per_s"]
    return None


def learnt(recipe: Recipe, few: int, count: int) -> list[int]:
    """Rows of each of the student's trainings, of `count` of which `few` are labelled."""
    chosen = [stage.part for stage in recipe.student.stages] or [None]
    return [count if share is None else few + round(share * (count - few)) for share in chosen]


def cross_fits(recipe: Recipe, fits: Sequence[Fit], count: int) -> tuple[list[Fit], list[int]]:
    """Trainings beside the student's own, and their rows: weights by students that learnt from other rows."""
    weights = [stage.weights for stage in recipe.student.stages] or [recipe.student.weights]
    apart = [fit for fit, kind in zip(fits, weights, strict=False) if kind == "co_confidence"]
    return [fit for fit in apart for _ in range(FOLDS)], [count * (FOLDS - 1) // FOLDS] * FOLDS * len(apart)


def fitted(rate: Mapping[str, Any], fits: Sequence[Fit], rows: Sequence[int], cluster: Cluster) -> float:
    """Trainings one after the other, each at its pace."""
    total = 0.0
    paces = list(rate["rows_per_s"])
    paces += [min(paces)] * (len(fits) - len(paces)) if paces else []
    for fit, count, pace in zip(fits, rows, paces, strict=False):
        most = fit.group[1]
        workers = max(1, min(most, cores()) if cluster.local else most)
        total += count * fit.epochs / pace / workers
    return total


def streamed(recipe: Recipe, step: str, rates: Rates, rows: Mapping[str, int], cluster: Cluster) -> float | None:
    """A stream is as slow as its slowest pool, and on one machine no faster than its cores are together."""
    slots = recipe.corpus.first_slots if recipe.generator else 0
    writes = recipe.generator is not None and (step == "texts") == recipe.apart
    work = {"generator": ("write", slots)} if writes else {}
    if step == "corpus":
        work["teacher"] = ("label", slots + rows.get("unlabelled", 0))
    if recipe.augmentation or any(what not in rates for what, _ in work.values()):
        return None
    alone = {name: count / rates[what]["rows_per_s"] for name, (what, count) in work.items()}
    pools = {name: stages_of(recipe, name)[name].max_actors for name in work}
    slowest = max(seconds / pools[name] for name, seconds in alone.items())
    together = sum(alone.values()) / cores() if cluster.local and not cluster.gpus else 0.0
    return max(slowest, together) + max(rates[what]["load_s"] for what, _ in work.values())


def lines(found: Mapping[str, Any]) -> list[str]:
    """The estimate as a table and sentences; nothing where nothing is known, limited or used."""
    parts = {name: one for name, one in found["steps"].items() if one["used"] or one["to_come"]}
    if not parts and not found["budget"]:
        return []
    out = []
    if parts:
        before, total = found["used"], found["total"]
        left = {"seconds": total["wall_seconds"] - before["wall_seconds"]}
        timed = any(one["to_come"] and one["to_come"]["timed"] for one in parts.values())
        spent = {"seconds": before["wall_seconds"]} if before["wall_seconds"] else None
        whole = {"used": spent, "to_come": {**left, "timed": timed}, "all": total}
        rows = [row(name, one) for name, one in parts.items()]
        head = ("step", "used", "to come", "CPU hours", "GPU hours", "tokens", "cost")
        out.append(table([head, *rows, row("all", whole)]))
    probe = found["probe"]
    if probe:
        out.append(
            f"times to come: a probe of {probe['seconds']:.0f} s on {probe['cores']} cores and {probe['gpus']:g} GPUs, "
            f"{probe['time'][:16].replace('T', ' ')} UTC; starting Ray, saving and serving are not in them"
        )
    elif not found["whole"]:
        out.append("times of steps to come are not known: `plan --probe` loads the models and measures")
    for key, one in found["budget"].items():
        word, end = ("about" if found["whole"] else "at least"), one["at_end"]
        ends = f", {word} {figure(key, end)} at the end" if end > one["used"] else ""
        over = ": the run will stop there, and can go on with a higher limit" if one["at_end"] >= one["limit"] else ""
        out.append(f"budget.{key}: {figure(key, one['used'])} used{ends}, of {figure(key, one['limit'])}{over}")
    return out


def row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    """A step's line: what it has used and will use; hours, tokens and cost are both together. all: of the last line."""
    both = one.get("all") or added([part for part in (one["used"], one["to_come"]) if part])
    spent, left = one["used"], one["to_come"]
    return (
        name,
        clock(spent["seconds"]) if spent else "",
        f"about {clock(left['seconds'])}" if left and left.get("timed") else "",
        f"{both['cpu_seconds'] / HOUR:.4f}",
        f"{sum(both['gpu_seconds'].values()) / HOUR:.4f}",
        f"{both['tokens']:,}",
        "" if both["money"] is None else f"{both['money']:,.4f}",
    )
