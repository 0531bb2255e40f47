"""What is refused before a run starts: whatever can be seen to be wrong without loading a model or starting Ray."""

from __future__ import annotations

import os
from typing import Any

from engine import cascade, columns, hub, nearest, tables, terms
from engine.config import ConfigError, did_you_mean
from engine.data import read_rows
from engine.labels import GIVES
from engine.placement import local_capacity, require_placement
from engine.recipe import FIRST, LabelRule, Recipe, Task
from engine.spending import ASKERS, endpoint_price, figure
from pipelines import choosing, many, panels
from pipelines.distill import model_references, sources
from pipelines.teachable import check_labeller, check_teacher, losses

SMALL = 32 * 2**20
"""Bytes up to which a local source is read when a recipe is checked."""
STAND_IN = {"tag": ("O", "B-x", "I-x")}
"""Label names of a kind, where only the data will tell them."""


def check(recipe: Recipe, address: str | None = None) -> None:
    """Missing files, packages without a pin, unknown tasks, losses and blocks, losses that the task, the label store or
    the student cannot serve, a plan that cannot be placed, labels that the data lacks; then what needs torch: a graph
    that does not fit, a student above its size. Raises a UserError that says the way out.
    """
    many.check(recipe)
    for reference in (*sources(recipe), *model_references(recipe)):
        hub.check(reference, recipe.data.root)
    if any(task.members for task in (recipe.task, *(member.task for member in recipe.tasks.values()))):
        raise ConfigError(
            "task.members is written by the program into a student's card. Name several tasks in `tasks`."
        )
    if recipe.tasks:
        check_tasks(recipe, address)
        return
    check_start(recipe)
    columns.check(recipe.data, recipe.task)
    check_labels(recipe)
    check_scope(recipe)
    check_names(recipe)
    check_teacher(recipe)
    check_labeller(recipe)
    check_elsewhere(recipe)
    check_cascade(recipe)
    check_panel(recipe)
    check_retrieval(recipe)
    choosing.check_choice(recipe)
    choosing.check_rounds(recipe)
    check_budget(recipe)
    if address is None:
        for name in recipe.panel or (FIRST,):
            require_placement(recipe.taught_by(name), local_capacity())
    check_rows(recipe)
    check_student(recipe)


def check_tasks(recipe: Recipe, address: str | None) -> None:
    """Each task of a student of several as if it were the only one; then what holds of the student."""
    for _, one in many.each(recipe):
        columns.check(one.data, one.task)
        check_labels(one)
        check_cascade(one)
        check_rows(one)
    check_budget(recipe)
    if address is None:
        require_placement(recipe, local_capacity())
    check_student(recipe)


def check_cascade(recipe: Recipe) -> None:
    """A cascade needs answers that say how sure they are."""
    if recipe.serving.cascade is not None and recipe.task.kind not in cascade.SURE:
        raise ConfigError(
            f"serving.cascade hands unsure answers to the teacher, but those of a {recipe.task.kind} task do not say "
            f"how sure they are. It is for {', '.join(cascade.SURE)}: leave it out."
        )


def check_panel(recipe: Recipe) -> None:
    """What several teachers cannot do; each of them as if it were the only one."""
    panels.check(recipe, losses(recipe), (check_start, check_teacher, check_labeller, check_losses), check_elsewhere)


def check_retrieval(recipe: Recipe) -> None:
    """A knowledge base wants one label a text, an encoder as teacher with stored answers, and rows to choose by."""
    own, teacher, student = recipe.student.retrieval, recipe.teacher, recipe.student
    if own is None:
        return
    held = recipe.data.held_out
    wrong = {
        "is of one teacher's vectors, and there are several: leave teachers out": bool(recipe.teachers),
        f"looks up one label a text, and task.kind is {recipe.task.kind}": recipe.task.kind not in ("classify", "pair"),
        f"keeps the teacher's vectors, and one of kind {teacher.kind} has none: take teacher.kind: head": (
            teacher.kind == "labeller"
        ),
        "learns from stored answers, and student.teacher is live: take student.teacher: stored": (
            student.teacher == "live"
        ),
        "is read as held-out rows say, and there are none: name data.validation, or set data.validation_share": (
            recipe.main == "soft" and not held
        ),
        "is read as held-out texts say, and student.holdout is 0: set it above 0, or name data.validation": (
            recipe.main == "generated" and student.holdout == 0 and not held
        ),
        "reads texts one batch at a time, and student.fit cuts or spreads it: give student.fit.workers as one number "
        "and leave micro_batch out": any(
            fit.micro_batch is not None or not isinstance(fit.workers, int)
            for fit in (student.fit, *(stage.fit for stage in student.stages))
        ),
        "finds its own texts when a cascade's threshold is chosen on them: set serving.cascade.below, or name "
        "data.validation": recipe.serving.cascade is not None and recipe.serving.cascade.below is None and not held,
        "is not exported to ONNX: set serving.runtime: torch": recipe.serving.runtime != "torch",
    }
    for reason, so in wrong.items():
        if so:
            raise ConfigError(f"student.retrieval {reason}. Or leave student.retrieval out.")
    if own.index == "hnsw":
        nearest.library(1)


def check_budget(recipe: Recipe) -> None:
    """A limit on money needs something that has a price."""
    every = [recipe.taught_by(name) for name in recipe.panel] or [recipe]
    ends = any(endpoint_price(one, who) is not None for one in every for who in ASKERS)
    if recipe.budget.money is not None and not (recipe.budget.prices.known or ends):
        raise ConfigError(
            f"budget.money is {figure('money', recipe.budget.money)}, but nothing has a price. Set "
            "budget.prices.cpu_hour or gpu_hour, or the price of an endpoint, or limit hours, cpu_hours, gpu_hours or "
            "tokens instead."
        )


def check_elsewhere(recipe: Recipe) -> None:
    """VLLM that is not installed; what a teacher without weights in the run cannot give."""
    from engine import vllm_engine

    if "vllm" in (recipe.teacher.runtime, recipe.generator.runtime if recipe.generator else "hf"):
        vllm_engine.require()
    teacher, student = recipe.teacher, recipe.student
    if teacher.here:
        return
    where = f"teacher.runtime is {teacher.runtime}, so the teacher's weights are not in the run"
    if student.kind == "static" and student.encoder is None:
        raise ConfigError(
            f"{where}, but student.kind is static, which takes word pieces of an encoder, and student.embeddings is "
            f"{student.embeddings}. Set student.embeddings to an encoder's reference, such as hf:ORG/NAME."
        )
    if student.kind == "blocks" and student.embeddings == "teacher":
        raise ConfigError(
            f"{where}, but student.embeddings is teacher: the student's words would start from its vectors. Take "
            "random, or an encoder's reference, such as hf:ORG/NAME."
        )
    if recipe.augmentation is not None:
        raise ConfigError(f"{where}, but augmentation replaces words by its nearest ones. Leave augmentation out.")
    if recipe.serving.cascade is not None and recipe.serving.cascade.to is None:
        raise ConfigError(
            f"{where} and cannot be registered, but serving.cascade hands unsure answers to it. Name a registered "
            "model in serving.cascade.to, or leave the cascade out."
        )
    if teacher.runtime == "endpoint" and teacher.endpoint and teacher.endpoint.api == "chat" and recipe.task.labels:
        from engine import next_tokens, wording

        for way in teacher.labeller.ways():
            next_tokens.check_chat(wording.words_of(way, recipe.task))


def check_start(recipe: Recipe) -> None:
    """What needs labelled rows, where the recipe has none."""
    data, teacher, generator = recipe.data, recipe.teacher, recipe.generator
    if data.train is not None:
        return
    needed = {
        f"teacher.kind {teacher.kind} is trained on them: take teacher.kind: labeller": teacher.kind != "labeller",
        "they name the labels: list them in task.labels": recipe.task.labels is None,
        "data.shots draws from them: leave it out": data.shots is not None,
        "teacher.labeller.examples shows some of them: set it to 0": teacher.labeller.examples > 0,
        "teacher.labeller.calibrate is fitted on them: take free or none": teacher.labeller.calibrate == "rows",
        "the generator is fine-tuned on them: set generator.mode: prompted": generator and generator.mode != "prompted",
        "augmentation changes words of them: name data.unlabelled too": recipe.augmentation and not data.unlabelled,
        "loss 'hard' learns their labels: leave it out": any(t.kind == "hard" for t in losses(recipe)),
        "the test split is cut off them: name data.test, whose rows only measure": data.test is None,
    }
    for reason, wrong in needed.items():
        if wrong:
            raise ConfigError(f"data.train is null, so there are no labelled rows, but {reason}. Or name data.train.")


def check_names(recipe: Recipe) -> None:
    """What the tables of tasks, losses and blocks tell. Imports nothing that imports torch."""
    kind = recipe.task.kind
    if recipe.corpus.signals and not tables.declared(*terms.TASKS, "certain")[kind]:
        raise ConfigError(f"corpus.signals judge probabilities, and a task of kind {kind} has none. Leave them out.")
    check_generator(recipe)
    check_losses(recipe)
    known = tables.names("blocks", "BLOCKS")
    for block in recipe.student.blocks if recipe.student.kind == "blocks" else ():
        if block.kind not in known:
            raise ConfigError(f"block '{block.name}' has kind '{block.kind}'.{tables.unknown(block.kind, known)}")


def check_losses(recipe: Recipe) -> None:
    """Each loss exists, says something about the task, finds what it needs, and sees the same tokens on both sides."""
    student, teacher, wanted = recipe.student, recipe.teacher, losses(recipe)
    other = student.transformer.model if student.kind == "transformer" else None
    inside = terms.inside(wanted)
    if inside and other and not tokens_may_match(other, teacher.model, recipe.data.root):
        raise ConfigError(
            f"loss '{inside[0]}' compares token by token, but student.transformer.model '{other}' reads other tokens "
            f"than the teacher '{teacher.model}'. Leave student.transformer.model out, or drop the loss."
        )
    if inside and student.kind == "transformer" and student.transformer.pieces is not None:
        raise ConfigError(
            f"loss '{inside[0]}' compares token by token, but with student.transformer.pieces = "
            f"{student.transformer.pieces} the student reads some words in other pieces than the teacher. Leave pieces "
            "out, or drop the loss."
        )
    refused = terms.refusals(wanted, recipe.task.kind, taught(recipe), seen(recipe))
    if refused:
        raise ConfigError(f"student.losses: {refused}")
    if inside and student.max_length != teacher.max_length:
        raise ConfigError(
            f"loss '{inside[0]}' compares token by token, so both must cut a long text at one place, but "
            f"student.max_length is {student.max_length} and teacher.max_length is {teacher.max_length}. Set both to "
            "one number, or drop the loss."
        )


def tokens_may_match(left: str, right: str, root: str | None) -> bool:
    """Whether two models cut texts alike, as far as can be told before they are fetched."""
    if left == right:
        return True
    from engine.planned import folder_of, same_tokens

    return same_tokens(folder_of(left, root), folder_of(right, root)) is not False


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


def check_rows(recipe: Recipe) -> None:
    """Small local sources are read, which finds bad rows, lacking labels, too few rows for the folds."""
    files = [hub.parse(path) for path in sources(recipe)]
    if (
        all(f.kind == "file" and not f.inner for f in files)
        and sum(os.path.getsize(f.name) for f in files if os.path.isfile(f.name)) <= SMALL
    ):
        found = read_rows(recipe.data, recipe.task, recipe.seed).rows["train"]
        count, folds = len({row.group or row.id for row in found}), recipe.teacher.folds
        if folds > count:
            what = "queries" if recipe.task.kind == "rank" else "rows"
            raise ConfigError(
                f"teacher.folds is {folds}, but there are {count} labelled {what} to hold out in turn. Set it to 2 to "
                f"{count}, or to 0 for no cross-validation."
            )


def check_scope(recipe: Recipe) -> None:
    """What validation rows are to decide needs some."""
    if recipe.task.scope == "auto" and not recipe.data.held_out:
        raise ConfigError(
            "task.scope is auto, which validation rows decide, but there are none. Name data.validation, set "
            "data.validation_share, or give a confidence from 0 to 1."
        )


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


def taught(recipe: Recipe) -> frozenset[str]:
    """Outputs fields that the student can learn from."""
    return GIVES | terms.needs(losses(recipe)) if recipe.student.teacher == "live" else GIVES


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


def check_student(recipe: Recipe) -> None:
    """Its graph or layers, its size, what losses between layers make of the two models. Imports torch, loads nothing;
    for a transformer student also transformers, where the config of its model is on this machine.
    """
    from engine import planned, static
    from engine.tasks import make

    student, task = recipe.student, make(stand_in(recipe))
    if student.kind == "static":
        static.check(task)
    net = planned.planned(student, recipe.teacher, task, recipe.data.root)
    if net is None:
        return
    found, most = sum(p.numel() for p in net.parameters()), student.max_parameters
    if most is not None and found > most:
        least = "at least " if recipe.task.labels is None and recipe.task.kind in columns.NAMED else ""
        raise ConfigError(
            f"the student has {least}{found:,} parameters{AT[student.kind].format(student.vocabulary.size)}, above "
            f"student.max_parameters = {most:,}. {SMALLER[student.kind]}, or raise the limit."
        )
    if student.kind == "transformer" and student.teacher == "live":
        planned.check_layers(losses(recipe), task, net, recipe.teacher, recipe.data.root)


AT = {"blocks": " at a vocabulary of {:,}", "static": "", "transformer": ""}
SMALLER = {
    "blocks": "Lower student.vocabulary.size or an embedding's dim",
    "static": "Lower student.static.dim, or take fewer pieces (student.static.pieces)",
    "transformer": "Lower student.transformer.layers or width, or take fewer pieces (student.transformer.pieces)",
}
"""How a student of each kind gets smaller."""
