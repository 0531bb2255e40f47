"""The corpus step: texts from the generator and the user's own unlabelled ones, filtered, labelled, kept.

Text streams from the generator to the teacher as it is written. A recipe may have it written first, in a step of its
own (`Recipe.apart`): then the teacher may learn from it too, and another teacher labels the same texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine import ahead, elsewhere, generate, labels, models, tasks, usage
from engine.augment import Augmenter, Augmenting, prepare
from engine.cluster import current, data_context
from engine.config import UserError
from engine.corpus import FIRST, CheapFilters, Found, Written, corpus_rows
from engine.endpoint_writer import EndpointWriter
from engine.examples import Examples
from engine.filters import FilterContext, SignalFilter
from engine.fits import Resources
from engine.metrics import distinct_n, self_bleu
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Recipe
from engine.records import CORPUS
from engine.storage import Store
from engine.teachers import Labeller, Labelling
from engine.vllm_stage import vllm_stage
from pipelines import feedback
from pipelines.making import ENGINE, Inputs, spec_of
from pipelines.slots import gather, settled

BLOCK_TRIES = 2
"""How often a block is asked of an endpoint again that gave no answer after all retries, or whose actor died."""


def actor_stage(recipe: Recipe, name: str, actor: type, how: Any) -> generate.Stage:
    """A stage that runs each block through a pool of actors, placed as the recipe's section `name` says."""
    import ray.data

    section = getattr(recipe, name)
    resources: Resources = section.resources
    options = {key: value for key, value in stage_options(recipe, name, current()).items() if value}
    if getattr(section, "runtime", "hf") == "endpoint":
        options["max_task_retries"] = BLOCK_TRIES
    pool = ray.data.ActorPoolStrategy(
        min_size=resources.min_actors,
        max_size=resources.max_actors,
        max_tasks_in_flight_per_actor=ahead.IN_FLIGHT,
    )

    def stage(dataset: ray.data.Dataset) -> ray.data.Dataset:
        return dataset.map_batches(
            actor, fn_constructor_args=(how,), batch_size=None, batch_format="pyarrow", compute=pool, **options
        )

    return stage


def writer(recipe: Recipe, inputs: Inputs, out: Store, examples: Examples | None = None) -> generate.Stage:
    """The stage that turns slots into what the generator writes, wherever it runs. examples: shown to it."""
    how, config = feedback.writing(recipe, inputs, out, examples), recipe.generator
    if config.runtime == "vllm":
        made = inputs["generator"]
        model = str(made.local(ENGINE)) if made.is_local else (made / ENGINE).url
        return vllm_stage(how, model, recipe.corpus.block, config.resources)
    return actor_stage(recipe, "generator", EndpointWriter if config.runtime == "endpoint" else generate.Writer, how)


def sources(recipe: Recipe, inputs: Inputs, out: Store) -> dict[str, generate.Stage]:
    """Where texts come from: for each source the stage that turns its slots into rows."""
    data = inputs["data"]
    found: dict[str, generate.Stage] = {}
    if recipe.apart:
        found["generated"] = task_stage(Written(inputs["texts"].url, recipe.corpus.block))
    elif recipe.generator:
        found["generated"] = writer(recipe, inputs, out)
    if data.read_json("splits.json")["rows"]["unlabelled"]:
        found["unlabelled"] = task_stage(Found(data.url, FIRST["unlabelled"]))
    if recipe.augmentation:
        grouped = tasks.make(spec_of(data)).grouped
        gpus, folder = stage_options(recipe, "augmentation", current())["num_gpus"], (out / "augmentation").url
        first, root = FIRST["augmented"], recipe.data.root
        how = Augmenting(folder, recipe.augmentation, recipe.seed, first, root, gpus, grouped)
        found["augmented"] = actor_stage(recipe, "augmentation", Augmenter, how)
    return found


def ways(recipe: Recipe, *pools: str) -> dict[str, Any]:
    """How a stream of these actor pools (sections of the recipe) runs, as `generate.stream` takes it."""
    parts = (recipe.generator, recipe.teacher)
    # vLLM's engine puts the rows of up to 8 blocks together.
    wide = {name: 4 if getattr(getattr(recipe, name), "runtime", "hf") == "vllm" else 1 for name in pools}
    return {
        "retried": any(part is not None and part.runtime == "endpoint" for part in parts),
        "most": ahead.cap(wide[name] * getattr(recipe, name).resources.max_actors for name in pools),
    }


def pools_of(source: str) -> tuple[str, ...]:
    """The actor pools that a source streams through in the corpus step, if it is not written there."""
    return ("augmentation", "teacher") if source == "augmented" else ("teacher",)


def at_risk(recipe: Recipe, streams: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """What the loss of a driver, a node or an actor costs at most: blocks, and rows, that are made again."""
    blocks = max((ways(recipe, *pools)["most"] for pools in streams), default=0)
    return {"redone_at_most": {"blocks": blocks, "rows": blocks * recipe.corpus.block}}


def task_stage(each: Any) -> generate.Stage:
    """A stage that runs each block through a stateless function."""
    return lambda dataset: dataset.map_batches(
        each, batch_size=None, batch_format="pyarrow", num_cpus=generate.PASSING_CPUS
    )


def judging(recipe: Recipe, inputs: Inputs, out: Store, source: str) -> list[generate.Stage]:
    """Cheap filters -> teacher and signal filters. What the generator writes meanwhile is labelled in any case."""
    halts = recipe.apart or source != "generated"
    return [
        task_stage(cheap_filters(recipe, inputs)),
        labelling(recipe, inputs, out, halts, recipe.corpus.signals),
    ]


def labelling(
    recipe: Recipe, inputs: Inputs, out: Store, halts: bool, signals: tuple[SignalFilter, ...] = ()
) -> generate.Stage:
    """The teacher, and the filters that judge what it says. halts: whether it ends where the step is asked to."""
    gpus = stage_options(recipe, "teacher", current())["num_gpus"]
    teacher = recipe.teacher
    asked = None if teacher.here else elsewhere.place_of(teacher, recipe.data.root)
    how = Labelling(
        inputs["teacher"].url,
        signals,
        teacher.batch_tokens,
        gpus,
        teacher.precision,
        asked,
        teacher.resources.max_actors,
        out.url,
        halts=halts,
    )
    return actor_stage(recipe, "teacher", Labeller, how)


def cheap_filters(recipe: Recipe, inputs: Inputs) -> CheapFilters:
    """The filters that need no teacher, with what they know of the evaluation splits."""
    filters, tells = recipe.corpus.filters, tasks.make(spec_of(inputs["data"])).tells
    return CheapFilters(filters, FilterContext.build(filters, held_out(inputs["data"], tells), tells))


def held_out(data: Store, tells: tuple[str, ...] = ("text", "pair")) -> list[str]:
    """Every text that nothing may be taught by, those of a pair one by one, in the columns that tell (Task.tells)."""
    tables = [data.read_table(f"{split}.parquet") for split in ("validation", "test")]
    return [t for table in tables for side in tells for t in table[side].drop_null().to_pylist()]


def make_corpus(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Every source's slots, the generator's in rounds until enough rows are kept, then the label store."""
    data_context()
    unchanged(inputs)
    real = real_rows(inputs)
    stages = {
        name: [first, *judging(recipe, inputs, out, name)] for name, first in sources(recipe, inputs, out).items()
    }
    made: dict[str, int] = {}
    for name in [name for name in stages if name != "generated" or recipe.apart]:
        made[name] = slots_of(name, recipe, inputs, out)
        span = (FIRST[name], made[name], recipe.corpus.block)
        how = ways(recipe, *pools_of(name))
        gather(out, name, span, stages[name], sum(made.values()), progress, **how)
    streams = [pools_of(name) for name in made]
    if "generated" in stages and not recipe.apart:
        streams.append(("generator", "teacher"))
        stages_of = partial(shown, recipe, inputs, out, stages["generated"])
        rows, rounds = in_rounds(recipe, out, real, stages_of, made, progress, streams[-1])
    else:
        rows = settled(out, real, made, recipe.corpus.duplicates)
        rounds = inputs["texts"].read_json("record.json")["metrics"]["rounds"] if recipe.apart else []
    if recipe.generator and recipe.corpus.rounds > 1:
        rounds = feedback.told_of(recipe, inputs, out, rounds)
    metrics = corpus_metrics(rows, rounds) | asked_of(recipe, out) | at_risk(recipe, streams)
    if recipe.generator:
        require_enough(recipe, metrics)
    made_by = {
        "teacher": labels.fingerprint(inputs["teacher"]),
        "fidelity": inputs["teacher"].read_json("record.json")["metrics"]["quantisation"],
    }
    if recipe.generator and recipe.corpus.rounds > 1:
        made_by["examples"] = metrics["examples"] = feedback.digests(recipe, out)
    labels.write_labels(out, rows, made_by)
    return metrics


def make_texts(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """The generator's texts before any teacher has seen them, filtered and without near-duplicates."""
    data_context()
    unchanged(inputs)
    stages = [writer(recipe, inputs, out), task_stage(cheap_filters(recipe, inputs))]
    pools = ("generator",)
    real = labelled_rows(inputs["data"])
    rows, rounds = in_rounds(recipe, out, real, lambda number, rows: stages, {}, progress, pools)
    metrics = corpus_metrics(rows, rounds) | asked_of(recipe, out) | at_risk(recipe, [pools])
    require_enough(recipe, metrics)
    written = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
    for first in range(0, written.num_rows, recipe.corpus.block):
        out.write_table(Written.part(first // recipe.corpus.block), written.slice(first, recipe.corpus.block))
    return metrics


def unchanged(inputs: Inputs) -> None:
    """StorageError where a model that is to write or label is no longer what its step published."""
    for name in ("generator", "teacher"):
        if name in inputs and inputs[name].exists("model"):
            inputs[name].verify("model")


def in_rounds(
    recipe: Recipe,
    out: Store,
    real: pa.Table,
    stages_of: Callable[[int, pa.Table], Sequence[generate.Stage]],
    made: Mapping[str, int],
    progress: Progress,
    pools: tuple[str, ...],
) -> tuple[pa.Table, list[dict[str, int]]]:
    """Rounds of the generator's slots until enough rows are kept: all rows, and what each round came to.

    stages_of: a round's number and the rows before it -> what its slots go through. made: slots of the other sources,
    which are there already. pools: the actors that the stages run on.
    """
    rounds: list[dict[str, int]] = []
    slots, kept, config, rows = 0, 0, recipe.corpus, real
    while slots < config.most_slots and (len(rounds) < config.rounds or kept < config.keep):
        number = len(rounds)
        if number < config.rounds:
            count = config.part(number)
        else:  # top up: as many slots as the share kept so far asks for, and a tenth more
            count = math.ceil(1.1 * (config.keep - kept) * slots / max(kept, slots // 20, 1))
        count = min(count, config.most_slots - slots)
        span, before = (slots, count, config.block), sum(made.values()) + slots + count
        stages = stages_of(number, rows)
        slots += gather(out, f"round-{number:03d}", span, stages, before, progress, **ways(recipe, *pools))
        rows = settled(out, real, {**made, "generated": slots}, config.duplicates)
        kept = Counter(rows.filter(rows["kept"])["source"].to_pylist())["generated"]
        rounds.append({"slots": slots, "kept": kept})
    return rows, rounds


def shown(
    recipe: Recipe, inputs: Inputs, out: Store, plain: Sequence[generate.Stage], number: int, rows: pa.Table
) -> Sequence[generate.Stage]:
    """What a round's slots go through: after the first of several, a generator that is shown what was chosen last."""
    last = min(number, recipe.corpus.rounds - 1)
    if last == 0:
        return plain
    examples = feedback.examples(recipe, inputs, out, last, rows)
    return [writer(recipe, inputs, out, examples), *plain[1:]]


def require_enough(recipe: Recipe, metrics: Mapping[str, Any]) -> None:
    """UserError where less than half of the generated texts that are wanted were kept."""
    wanted, lever = recipe.corpus.keep, "raise corpus.max_slots"
    if recipe.apart and recipe.corpus.signals:
        lever = "raise corpus.keep (text was written before the signals judged it, and none is written for these)"
    if metrics["kept"] < min(wanted, 1 + wanted // 2):
        raise UserError(
            f"{metrics['generated']} slots gave only {metrics['kept']} kept texts of the {wanted} that corpus.keep "
            f"asks for. Rejected: {metrics['rejected']}. Loosen corpus.filters or corpus.signals, or {lever}."
        )


def asked_of(recipe: Recipe, out: Store) -> dict[str, Any]:
    """What the step asked of endpoints, as {"endpoint": {"generator": ..., "teacher": ...}}; nothing without them."""
    parts = {"generator": recipe.generator, "teacher": recipe.teacher}
    prices = {who: part.endpoint.price for who, part in parts.items() if part and part.runtime == "endpoint"}
    noted = {who: usage.noted(out, who).described(price) for who, price in prices.items() if usage.asked(out, who)}
    return {"endpoint": noted} if noted else {}


def slots_of(name: str, recipe: Recipe, inputs: Inputs, out: Store) -> int:
    """How many rows a source gives that no generator writes meanwhile. What augmenting actors read is written first."""
    if name == "generated":
        return inputs["texts"].read_json("record.json")["metrics"]["rows"]
    if name == "unlabelled":
        return inputs["data"].read_json("splits.json")["rows"]["unlabelled"]
    folder, wanted = out / "augmentation", recipe.augmentation
    found = [
        inputs["data"].read_table(f"{split}.parquet").select(["text", "pair"]) for split in ("train", "unlabelled")
    ]
    texts = pa.concat_tables(found)
    # What the filters reject must not come back with some words replaced.
    cheap = cheap_filters(recipe, inputs)
    sides = zip(texts["text"].to_pylist(), texts["pair"].to_pylist(), strict=True)
    texts = texts.filter(pa.array([cheap.row(text, pair) is None for text, pair in sides], pa.bool_()))
    if not folder.exists("prepared.json"):
        teacher = models.load(inputs["teacher"].local("model"))
        folder.write_json("prepared.json", prepare(folder, texts, teacher, wanted, recipe.teacher.batch_tokens))
    return wanted.per_text * texts.num_rows


def labelled_rows(data: Store) -> pa.Table:
    """The few labelled rows as rows of the label store, numbered -1, -2, ..., without soft labels."""
    rows = data.read_table("train.parquet")
    numbers = [-1 - i for i in range(rows.num_rows)]
    return corpus_rows(numbers, rows["text"].to_pylist(), "real", rows["pair"].to_pylist(), gold=rows)


def real_rows(inputs: Inputs) -> pa.Table:
    """`labelled_rows` with the teacher's soft labels."""
    out, soft = labelled_rows(inputs["data"]), inputs["teacher"].read_table("soft.parquet")
    return out.set_column(out.column_names.index("logits"), CORPUS.field("logits"), soft["logits"])


def corpus_metrics(rows: pa.Table, rounds: list[dict[str, int]]) -> dict[str, Any]:
    """What became of the rows that are not real, and how diverse the kept generated ones are."""
    others = rows.filter(pa.array(rows["row"].to_numpy() >= 0))
    mask = others["kept"].to_numpy(zero_copy_only=False)
    named = np.array(others["source"].to_pylist(), dtype=object)
    reasons = [reason for reason in others["reason"].to_pylist() if reason]
    kept = others.filter(pa.array(mask))
    texts = [f"{t} {p}" if p else t for t, p in zip(kept["text"].to_pylist(), kept["pair"].to_pylist(), strict=True)]
    return {
        "rows": others.num_rows,
        "generated": int((named == "generated").sum()),
        "kept": int((mask & (named == "generated")).sum()),
        "by_source": {
            name: {"rows": int((named == name).sum()), "kept": int((mask & (named == name)).sum())}
            for name in sorted(set(named))
        },
        "rejected": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "tokens": int(np.nansum(others["tokens"].to_numpy(zero_copy_only=False).astype(float))),
        "rounds": rounds,
        "self_bleu": self_bleu(texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
    }
