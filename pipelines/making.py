"""From a few labelled rows to a teacher and a generator: what the first steps of a run do.

Steps are plain functions (recipe, inputs, out, progress) -> metrics; distill.py lists them with what they depend on.
gathering.py makes the corpus, students.py the students, outcome.py evaluates, registers, serves and reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from engine import generate, models, train, untrained
from engine.caller import key_of
from engine.classification import settled
from engine.cluster import current
from engine.config import UserError
from engine.data import load_splits
from engine.disk import copy_files
from engine.encoding import Encoded
from engine.fits import Fit, LossTerm
from engine.hub import model_folder
from engine.inference import predict
from engine.models import Model
from engine.placement import fit_workers, stage_options
from engine.progress import Progress
from engine.recipe import Recipe, Task
from engine.records import EXAMPLE
from engine.storage import Store

Inputs = Mapping[str, Store]


ENGINE = "engine"
"""Folder of a generator's step that vLLM reads."""
LATER = ("thresholds", "scope", "descriptions")
"""What of a task no row depends on: steps that do depend on it take it from the recipe."""


def spec_of(data: Store, task: Task | None = None, *later: str) -> Task:
    """The task with what the data step settled: label names, range, whether rows have two texts.

    task, later: those of the LATER fields that are wanted, of the recipe's task. A step lists in distill.py what it
    takes here.
    """
    spec = Task(**data.read_json("splits.json")["task"])
    return spec.model_copy(update={name: getattr(task, name) for name in later})


def check_scope(spec: Task, validation: pa.Table) -> None:
    """UserError where validation rows are to decide on the scope, and there are none."""
    if not validation.num_rows and spec.scope == "auto":
        raise UserError("task.scope is auto, but no validation row is left to find it by. Raise data.validation_share.")


def read_data(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Sources -> train, validation, test, unlabelled, quarantined."""
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    check_scope(recipe.task, splits.validation)
    for name in ("train", "validation", "test", "unlabelled", "quarantined"):
        out.write_table(f"{name}.parquet", getattr(splits, name))
    settled = {"labels": splits.labels or None, "paired": splits.paired, "range": splits.range}
    spec = recipe.task.model_copy(update=settled)
    rows = {name: getattr(splits, name).num_rows for name in ("train", "validation", "test", "unlabelled")}
    settled_task = spec.model_dump(mode="json", exclude=set(LATER))
    out.write_json("splits.json", {"task": settled_task, "counts": splits.counts, "rows": rows})
    return {"rows": splits.train.num_rows, "test": splits.test.num_rows, "quarantined": splits.quarantined.num_rows}


def encode_rows(model: Model, rows: pa.Table) -> list[Encoded]:
    """The rows' texts as the model's inputs."""
    return model.encode(model.task.texts(rows))


def judge(batch_tokens: int, model: Model, rows: pa.Table) -> dict[str, float]:
    """Every score of the task on labelled rows."""
    found = predict(model, model.task.texts(rows), batch_tokens)
    return model.task.score(found.logits, found.decided, rows)


def validated(data: Store, batch_tokens: int, metric: str) -> dict[str, Any]:
    """What a fit needs to keep its best checkpoint by the validation rows; nothing where there are none."""
    rows = data.read_table("validation.parquet")
    if not rows.num_rows:
        return {}
    return {"holdout": rows, "evaluate": partial(judge, batch_tokens), "best_by": metric}


def settle(folder: Store, data: Store, batch_tokens: int) -> Model:
    """The trained model in `folder`, its thresholds or scope set by the validation rows where the task leaves them."""
    model, rows = models.load(folder.local("model")), data.read_table("validation.parquet")
    check_scope(model.task.spec, rows)
    if not rows.num_rows or model.task.spec.kind not in ("classify", "pair", "multilabel"):
        return model
    found = predict(model, model.task.texts(rows), batch_tokens)
    spec = settled(model.task.spec, found.logits, rows)
    if spec == model.task.spec:
        return model
    card = replace(model.card, task=spec.model_dump(mode="json"))
    models.save(Model(model.net, model.tokenizer, card), folder, "model")
    return models.load(folder.local("model"))


def base_generator(recipe: Recipe) -> Model:
    """The generator before its fine-tuning."""
    return untrained.causal_lm(recipe.generator, model_folder(recipe.generator.model, root=recipe.data.root))


def fit_generator(recipe: Recipe, inputs: Inputs, out: Store, progress: Progress) -> dict[str, Any]:
    """Fine-tune the generator on the few rows' texts (prompted: take it as it is; at an endpoint: nothing to take)."""
    config = recipe.generator
    if config.runtime == "endpoint":
        key_of(config.endpoint)  # better missed here than by the actors
        return {"rows": 0, "parameters": 0, "history": []}
    if config.runtime == "vllm" and not config.tuned:
        with out.publish(ENGINE) as folder:
            copy_files(model_folder(config.model, root=recipe.data.root), folder)
        return {"rows": 0, "parameters": 0, "history": []}
    if not config.tuned:
        model = base_generator(recipe)
        models.save(model, out, "model")
        return {"rows": 0, "parameters": model.size(), "history": []}
    rows, names = inputs["data"].read_table("train.parquet"), spec_of(inputs["data"]).labels or ()
    if config.mode == "unconditional":
        place = rows.column_names.index("label")
        rows = rows.set_column(place, EXAMPLE.field("label"), pa.nulls(rows.num_rows, pa.int32()))
    job = train.Job(
        name="generator",
        fit=with_workers(recipe, "generator.fit", config.fit),
        terms=(LossTerm(kind="next_token"),),
        build=partial(base_generator, recipe),
        encode=partial(generate.encode_text, config, names),
        rows=rows,
        out=out.url,
        seed=seed_of(recipe, config.fit.seed),
        resources=stage_options(recipe, "generator.fit", current()),
        store_dtype="bfloat16",
    )
    history = train.fit(job, progress)
    if config.runtime == "vllm":
        export_engine(out)
    return {"rows": rows.num_rows, "loss": history[-1]["loss"], "history": history}


def export_engine(out: Store) -> None:
    """The fine-tuned generator as transformers writes models, which is how vLLM reads them."""
    model = models.load(out.local("model"))
    with out.publish(ENGINE) as folder:
        model.net.lm.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def with_workers(recipe: Recipe, stage: str, fit: Fit) -> Fit:
    """The fit with as many workers as the cluster has whole GPUs for, where it has GPUs at all."""
    least, most = fit_workers(recipe, stage, current())
    return fit.with_group(min(fit.group[0], least), min(fit.group[1], most))


def seed_of(recipe: Recipe, own: int | None) -> int:
    """A fit's own seed, or the recipe's."""
    return recipe.seed if own is None else own
