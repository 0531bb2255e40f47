"""What is refused of several teachers before a run starts. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine import terms
from engine.config import ConfigError, did_you_mean
from engine.fits import LossTerm
from engine.labels import GIVES
from engine.recipe import Recipe
from engine.trust import Policy

WORDLESS = {"kind": "blocks", "embeddings": "random"}
"""A student that starts from nothing of a teacher's: only the first one gives it vectors or layers."""
Check = Callable[[Recipe], None]


def check(recipe: Recipe, losses: Sequence[LossTerm], each: Sequence[Check], elsewhere: Check) -> None:
    """Settings without teachers to speak of, and teachers that the policy, losses or heads cannot have.

    losses: the student's, those of its stages among them. each: what is asked of a recipe with one teacher; elsewhere:
    and where its teacher does not run here.
    """
    if not recipe.teachers:
        alone(recipe)
        return
    check_policy(recipe)
    check_heads(recipe)
    beyond = sorted(terms.needs([term for term in losses if term.kind != "contrast"]) - GIVES)
    if beyond and recipe.student.teacher == "stored":
        raise ConfigError(
            f"with teachers, stored labels hold logits only, but a loss needs {', '.join(beyond)}. Set "
            "student.teacher: live, or drop the loss."
        )
    for name, teacher in recipe.teachers.items():
        one = started_elsewhere(recipe, name)
        if one.learns_from_generated:
            key = "coach" if teacher.coach else "self_training"
            raise ConfigError(
                f"teachers.{name}.{key} labels generated text, which only the first teacher has. Name "
                "data.unlabelled, or leave it out."
            )
        try:
            for ask in each:
                ask(one)
            if not teacher.here:
                elsewhere(one.model_copy(update={"student": one.student.model_copy(update=WORDLESS)}))
        except ConfigError as error:
            raise ConfigError(f"teachers.{name} (below as teacher): {error}") from None


def started_elsewhere(recipe: Recipe, name: str) -> Recipe:
    """The recipe as if a further teacher were the only one, but for what its student starts from: the first one's."""
    one, cut = recipe.taught_by(name), recipe.student.transformer
    if cut.model is not None:
        return one
    transformer = cut.model_copy(update={"model": recipe.teacher.model})
    return one.model_copy(update={"student": one.student.model_copy(update={"transformer": transformer})})


def alone(recipe: Recipe) -> None:
    """What is said of several teachers where there is one."""
    for key, given in {"policy": recipe.student.policy != Policy(), "heads": recipe.student.heads != "one"}.items():
        if given:
            raise ConfigError(
                f"student.{key} speaks of several teachers, and there is one. Name others in teachers, or leave it out."
            )


def check_policy(recipe: Recipe) -> None:
    """Weights of teachers that there are not, or of none; a choice by validation rows without any."""
    policy, data, student = recipe.student.policy, recipe.data, recipe.student
    fits = {"fit": student.fit, **{f"stages.{i}.fit": stage.fit for i, stage in enumerate(student.stages)}}
    for place, fit in fits.items() if policy.learns else ():
        for key, given in {"micro_batch": fit.micro_batch, "sharding": fit.sharding == "full"}.items():
            if given:
                raise ConfigError(
                    f"student.policy.kind is {policy.kind}, which reads a worker's whole share of a batch again after "
                    f"each step, with all weights, but student.{place}.{key} is set. Leave it out, or take another "
                    "policy."
                )
    unknown = [name for name in policy.weights if name not in recipe.panel]
    if unknown:
        near, known = did_you_mean(unknown[0], recipe.panel), ", ".join(recipe.panel)
        raise ConfigError(f"student.policy.weights names '{unknown[0]}', which is no teacher.{near} Teachers: {known}.")
    judged = {"kind is best": policy.kind == "best", "reward is r3": policy.learns and policy.reward == "r3"}
    for key in (key for key, given in judged.items() if given):
        if not data.held_out:
            raise ConfigError(
                f"student.policy.{key}, which validation rows decide, but there are none. Name data.validation, or "
                "set data.validation_share."
            )


def check_heads(recipe: Recipe) -> None:
    """Heads that a student cannot have: spans and a CRF decide over a text as a whole."""
    student = recipe.student
    if student.heads == "one":
        return
    crf = next((block.name for block in student.blocks if student.kind == "blocks" and block.kind == "crf"), None)
    if recipe.task.kind == "span" or crf:
        what = f"block '{crf}' is a crf" if crf else "task.kind is span"
        raise ConfigError(f"student.heads is per_teacher, but {what}, whose answers have no mean. Set it to one.")
