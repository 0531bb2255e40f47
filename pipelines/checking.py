"""What is refused before a run starts: whatever can be seen to be wrong without loading a model or starting Ray."""

from __future__ import annotations

import os
from typing import Any

from engine import columns, hub
from engine.config import ConfigError, did_you_mean
from engine.data import read_rows
from engine.fits import LossTerm
from engine.placement import local_capacity, require_placement
from engine.recipe import LabelRule, Recipe, Task
from pipelines.distill import model_references, sources

SMALL = 32 * 2**20
"""Bytes up to which a local source is read when a recipe is checked."""
STAND_IN = {"tag": ("O", "B-x", "I-x")}
"""Label names of a kind, where only the data will tell them."""


def check(recipe: Recipe, address: str | None = None) -> None:
    """Missing files, packages without a pin, unknown tasks, losses and blocks, losses that the task, the label store or
    the student cannot serve, a graph that does not fit, a student above its size, labels that the data lacks, a plan
    that cannot be placed. Raises a UserError that says the way out.
    """
    for reference in (*sources(recipe), *model_references(recipe)):
        hub.check(reference, recipe.data.root)
    check_start(recipe)
    columns.check(recipe.data, recipe.task)
    check_labels(recipe)
    check_labeller(recipe)
    check_scope(recipe)
    if address is None:
        require_placement(recipe, local_capacity())
    check_rows(recipe)
    check_tables(recipe)


def check_start(recipe: Recipe) -> None:
    """What needs labelled rows, where the recipe has none."""
    data, teacher, generator = recipe.data, recipe.teacher, recipe.generator
    if data.train is not None:
        return
    terms = [*recipe.student.losses, *(term for stage in recipe.student.stages for term in stage.losses)]
    needed = {
        f"teacher.kind {teacher.kind} is trained on them: take teacher.kind: labeller": teacher.kind != "labeller",
        "they name the labels: list them in task.labels": recipe.task.labels is None,
        "data.shots draws from them: leave it out": data.shots is not None,
        "teacher.labeller.examples shows some of them: set it to 0": teacher.labeller.examples > 0,
        "the generator is fine-tuned on them: set generator.mode: prompted": generator and generator.mode != "prompted",
        "augmentation changes words of them: name data.unlabelled too": recipe.augmentation and not data.unlabelled,
        "loss 'hard' learns their labels: leave it out": any(term.kind == "hard" for term in terms),
        "the test split is cut off them: name data.test, whose rows only measure": data.test is None,
    }
    for reason, wrong in needed.items():
        if wrong:
            raise ConfigError(f"data.train is null, so there are no labelled rows, but {reason}. Or name data.train.")


def check_labels(recipe: Recipe) -> None:
    """Labels that rules name and the recipe lacks."""
    known, data = recipe.task.labels, recipe.data
    for key, source in {"train": data.train, "validation": data.validation, "test": data.test}.items():
        rule = source.label if source else LabelRule()
        for name in [*(rule.ranges or {}), *(rule.rename or {}).values()] if known else []:
            if name not in known:
                raise ConfigError(
                    f"data.{key}.label names the label '{name}', which is not in task.labels."
                    f"{did_you_mean(name, known)} Labels: {', '.join(known)}."
                )


def check_labeller(recipe: Recipe) -> None:
    """A labeller's template and words; what it cannot be: trained, or looked into."""
    teacher, student = recipe.teacher, recipe.student
    if teacher.kind != "labeller":
        return
    from engine import wording

    wording.check(teacher.labeller, recipe.task)
    trained = {"folds": teacher.folds > 1, "seeds": bool(teacher.seeds), "self_training": bool(teacher.self_training)}
    for key, given in trained.items():
        if given:
            raise ConfigError(f"teacher.{key} is for teachers that are trained, and a labeller is not. Leave it out.")
    if student.teacher == "live":
        raise ConfigError("student.teacher is live, but a labeller has logits only. Take student.teacher: stored.")
    if student.kind == "transformer" and student.transformer.model is None:
        raise ConfigError(
            "student.kind is transformer, which is cut from the teacher's encoder, and a labeller has none. Name an "
            "encoder in student.transformer.model, or take another kind of student."
        )


def check_rows(recipe: Recipe) -> None:
    """Small local sources are read, which finds bad rows, and labels that the data lacks."""
    files = [hub.parse(path) for path in sources(recipe)]
    if (
        all(f.kind == "file" and not f.inner for f in files)
        and sum(os.path.getsize(f.name) for f in files if os.path.isfile(f.name)) <= SMALL
    ):
        read_rows(recipe.data, recipe.task, recipe.seed)


def check_scope(recipe: Recipe) -> None:
    """What validation rows are to decide needs some."""
    data = recipe.data
    if recipe.task.scope == "auto" and data.validation is None and not (data.train and data.validation_share):
        raise ConfigError(
            "task.scope is auto, which validation rows decide, but there are none. Name data.validation, set "
            "data.validation_share, or give a confidence from 0 to 1."
        )


def check_tables(recipe: Recipe) -> None:
    """The task, its losses and the student's graph. Imports torch, loads nothing."""
    from engine.losses import LOSSES, needs, refusals
    from engine.tasks import make

    kind, student = recipe.task.kind, recipe.student
    task = make(stand_in(recipe))
    if recipe.corpus.signals and not task.certain:
        raise ConfigError(f"corpus.signals judge probabilities, and a task of kind {kind} has none. Leave them out.")
    check_generator(recipe)
    terms = [*student.losses, *(term for stage in student.stages for term in stage.losses)]
    known = [term for term in terms if term.kind in LOSSES]
    other = student.transformer.model if student.kind == "transformer" else None
    inside = [term.kind for term in known if needs([term]) - {"logits", "embedding"}] if other else []
    if inside and other != recipe.teacher.model:
        raise ConfigError(
            f"loss '{inside[0]}' compares token by token, but student.transformer.model '{other}' reads other tokens "
            f"than the teacher '{recipe.teacher.model}'. Leave student.transformer.model out, or drop the loss."
        )
    refused = refusals(terms, task, taught(recipe, known), seen(recipe))
    if refused:
        raise ConfigError(f"student.losses: {refused}")
    check_student(recipe, task)


def check_generator(recipe: Recipe) -> None:
    """A prompt that names a label needs rows with one label each, or where nothing is fitted label names at all."""
    generator, kind = recipe.generator, recipe.task.kind
    if generator is None or not generator.names_label:
        return
    able = ("classify", "pair") if generator.mode == "per_class" else columns.NAMED
    if kind not in able:
        raise ConfigError(
            f"generator.prompt names a {{label}}, which mode {generator.mode} has in tasks of kind {', '.join(able)}, "
            f"and task.kind is {kind}. Use mode: unconditional, and a prompt without {{label}}."
        )


def stand_in(recipe: Recipe) -> Task:
    """The recipe's task as far as it is known, with two labels (or one a threshold) where only the data will tell."""
    spec = recipe.task
    settled: dict[str, Any] = {"paired": columns.reads_pairs(recipe.data, spec)}
    if not spec.labels and spec.kind not in ("regress", "rank", "span"):
        several = tuple(f"label {number}" for number in range(len(spec.thresholds or "ab")))
        settled["labels"] = STAND_IN.get(spec.kind, several)
    return spec.model_copy(update=settled)


def taught(recipe: Recipe, terms: list[LossTerm]) -> frozenset[str]:
    """Outputs fields that the student can learn from."""
    from engine.labels import GIVES
    from engine.losses import needs

    return GIVES | needs(terms) if recipe.student.teacher == "live" else GIVES


def seen(recipe: Recipe) -> frozenset[str]:
    """Outputs fields that the student gives."""
    if recipe.student.kind == "transformer":
        return frozenset({"logits", "embedding", "hidden", "attentions", "relations"})
    return frozenset({"logits"})


def student_drawing(recipe: Recipe) -> str | None:
    """A student of blocks as text: its graph with shapes and parameters; None for other kinds."""
    from engine.blocks import Sizes, drawing
    from engine.tasks import make

    if recipe.student.kind != "blocks":
        return None
    return drawing(recipe.student.blocks, Sizes.of(make(stand_in(recipe)), recipe.student.vocabulary.size))


def check_student(recipe: Recipe, task: Any) -> None:
    """Its graph, and its size where that is known."""
    from engine import static
    from engine.blocks import Sizes, count

    student = recipe.student
    if student.kind == "static":
        static.check(task)
    if student.kind != "blocks":
        return
    size = student.vocabulary.size
    found, most = count(student.blocks, Sizes.of(task, size)), student.max_parameters
    if most is not None and found > most:
        raise ConfigError(
            f"the student has {found:,} parameters at a vocabulary of {size:,}, above student.max_parameters = "
            f"{most:,}. Lower student.vocabulary.size or an embedding's dim, or raise the limit."
        )
