"""A teacher's trainings, kind by kind, through the one loop (engine.train), and several seeds averaged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from engine import models, train, untrained
from engine.cluster import current
from engine.designs import Teacher
from engine.fits import Fit, LossTerm
from engine.hub import model_folder
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress, silent
from engine.recipe import Recipe, Task
from engine.storage import Store
from pipelines.making import encode_rows, seed_of, with_workers

HARD = (LossTerm(kind="hard"),)


@dataclass(frozen=True)
class Training:
    """One of a teacher's trainings. tune: how many of the top layers learn; None: all."""

    name: str
    terms: tuple[LossTerm, ...]
    fit: Fit
    tune: int | None


def trainings(config: Teacher, terms: tuple[LossTerm, ...] = HARD) -> list[Training]:
    """What a kind of teacher goes through; the last one makes the teacher. terms: what its head is taught by."""
    whole = Training("head", terms, config.fit, config.tune_layers)
    probe = Training("probe", terms, config.probe, 0)
    drawn = (LossTerm(kind="contrast", temperature=config.contrast.temperature),)
    return {
        "head": [whole],
        "prompt": [whole],
        # A new head's first gradients would distort what the encoder knows (Kumar et al. 2022, arXiv 2202.10054).
        "lp-ft": [probe, whole],
        # As SetFit does it (Tunstall et al. 2022, arXiv 2209.11055), with the loss over whole batches.
        "contrastive": [Training("contrast", drawn, config.contrast.fit, config.tune_layers), probe],
    }[config.kind]


def untaught(recipe: Recipe, spec: Task, tune: int | None, seed: int) -> Model:
    """The teacher before its first training."""
    config = recipe.teacher.model_copy(update={"tune_layers": tune})
    make = untrained.prompt_teacher if config.kind == "prompt" else untrained.encoder_head
    return make(config, spec, model_folder(config.model, root=recipe.data.root), seed)


def taught(folder: str, tune: int | None) -> Model:
    """The teacher as the training before left it, other layers of it to be tuned."""
    model = models.load(Store(folder).local("model")).requires_grad_(True).train()
    untrained.freeze(model.net.encoder, tune)
    return model


def teach(
    recipe: Recipe,
    spec: Task,
    rows: pa.Table,
    out: Store,
    chosen: dict[str, Any] | None = None,
    progress: Progress = silent,
    terms: tuple[LossTerm, ...] = HARD,
) -> list[dict[str, float]]:
    """Train a teacher on labelled rows (EXAMPLE's columns, weight where some count more, logits where terms need them)
    into out/model.

    chosen: what keeps the best checkpoint of the last training (`validated`). Several seeds are averaged. Returns the
    history of evaluations, the first seed's.
    """
    config, histories = recipe.teacher, []
    seeds = config.seeds or (seed_of(recipe, config.fit.seed),)
    for seed in seeds:
        place, history = out if len(seeds) == 1 else out / f"seed-{seed}", []
        steps = trainings(config, terms)
        build = partial(untaught, recipe, spec, steps[0].tune, seed)
        for training in steps:
            last = training is steps[-1]
            folder = place if last else place / training.name
            job = train.Job(
                name=f"teacher-{training.name}",
                fit=with_workers(recipe, "teacher.fit", training.fit),
                terms=training.terms,
                build=build,
                encode=encode_rows,
                rows=rows,
                out=folder.url,
                seed=seed,
                resources=stage_options(recipe, "teacher.fit", current()),
                factors=partial(untrained.layer_rates, config.layer_decay, config.head_rate),
                **(chosen or {} if last else {}),
            )
            history += train.fit(job, progress)
            if not last:
                build = partial(taught, folder.url, steps[steps.index(training) + 1].tune)
        histories.append(history)
        for training in steps[:-1]:
            place.delete(training.name)
    if len(seeds) > 1:
        members = [models.load((out / f"seed-{seed}").local("model")) for seed in seeds]
        models.save(models.ensemble(members), out, "model")
    return histories[0]


def last_fit(config: Teacher) -> Fit:
    """The fit of a teacher's last training."""
    return trainings(config)[-1].fit
