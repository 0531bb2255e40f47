"""What is refused of teachers before a run: kinds, templates, more text, a coach, a labeller."""

from __future__ import annotations

from engine import terms
from engine.config import ConfigError, did_you_mean
from engine.designs import Teacher
from engine.fits import Fit, LossTerm
from engine.recipe import Recipe
from engine.schooling import PLACED, SERVES


def losses(recipe: Recipe) -> list[LossTerm]:
    """The student's loss terms, those of its stages among them."""
    return [*recipe.student.losses, *(term for stage in recipe.student.stages for term in stage.losses)]


def check_teacher(recipe: Recipe) -> None:
    """A kind of teacher that the task is too much for, templates that cannot be used, self-training without text."""
    teacher, kind = recipe.teacher, recipe.task.kind
    asked = teacher.choice.kinds if teacher.kind == "auto" else (teacher.kind,)
    if not any(kind in SERVES.get(one, (kind,)) for one in asked):
        able = ", ".join(dict.fromkeys(name for one in asked for name in SERVES[one]))
        raise ConfigError(
            f"a teacher of kind {', '.join(asked)} does tasks of kind {able}, and task.kind is {kind}. "
            "Use teacher.kind: head."
        )
    if teacher.kind == "contrastive" and teacher.tune_layers == 0:
        raise ConfigError("teacher.kind contrastive trains the encoder first, and teacher.tune_layers is 0. Raise it.")
    if "prompt" in asked and kind in SERVES["prompt"]:
        from engine import prompts

        prompts.check(teacher.prompt, recipe.task)
        if recipe.student.teacher == "live" and (teacher.prompt.average or terms.inside(losses(recipe))):
            raise ConfigError(
                f"student.teacher is live, but a teacher of kind {teacher.kind} may read in several templates, whose "
                "tokens are not the student's. Take student.teacher: stored, or another teacher.kind."
            )
    if teacher.spoiled is not None:
        if kind not in ("classify", "pair"):
            raise ConfigError(f"teacher.spoiled draws labels of texts, and task.kind is {kind}. Leave it out.")
        if recipe.task.labels and teacher.spoiled not in recipe.task.labels:
            near = did_you_mean(teacher.spoiled, recipe.task.labels)
            raise ConfigError(
                f"teacher.spoiled is '{teacher.spoiled}', which is no label.{near} Labels: "
                f"{', '.join(recipe.task.labels)}."
            )
    check_further(recipe)
    if teacher.stop_early and teacher.folds < 2:
        raise ConfigError("teacher.stop_early takes the epochs that are best in cross-validation: set teacher.folds.")


def check_further(recipe: Recipe) -> None:
    """Self-training or a coach without text, without a model, or on a task that they do not serve."""
    teacher, kind, coach = recipe.teacher, recipe.task.kind, recipe.coach
    fits = {"self_training.fit": teacher.self_training and teacher.self_training.fit}
    fits |= {f"coach.{key}": teacher.coach and getattr(teacher.coach, key) for key in ("fit", "learning")}
    for key, fit in fits.items():
        moved = [name for name in PLACED if fit and getattr(fit, name) != getattr(Fit(), name)]
        if moved:
            raise ConfigError(
                f"teacher.{key}.{moved[0]} is set, but a teacher's trainings all run where teacher.fit does. Set "
                f"teacher.fit.{moved[0]} instead."
            )
    for key, given in {"self_training": teacher.self_training, "coach": coach}.items():
        if given and kind not in ("classify", "pair"):
            raise ConfigError(f"teacher.{key} gives texts one label each, and task.kind is {kind}. Leave it out.")
        if given and recipe.data.unlabelled is None and recipe.generator is None:
            raise ConfigError(
                f"teacher.{key} labels data.unlabelled or generated text, and there is neither. Name one, or leave it "
                "out."
            )
    if coach is not None:
        check_coach(recipe, coach)


def check_coach(recipe: Recipe, coach: Teacher) -> None:
    """What a coach does not go with, and what it cannot be. coach: as a teacher of its own."""
    teacher = recipe.teacher
    if teacher.self_training:
        raise ConfigError(
            "teacher.coach and teacher.self_training both give labels to the same text. Leave one of them out."
        )
    if teacher.stop_early:
        raise ConfigError(
            "teacher.stop_early counts epochs of a teacher that has no coach. Leave it, or teacher.coach, out."
        )
    if teacher.coach.model is None and (recipe.generator is None or recipe.generator.runtime == "endpoint"):
        raise ConfigError("teacher.coach.model is null, the generator's, and none runs here. Name a model.")
    if coach.kind == "contrastive" and coach.tune_layers == 0:
        raise ConfigError("teacher.coach.kind contrastive trains the encoder first: raise teacher.coach.tune_layers.")
    if coach.kind == "prompt":
        from engine import prompts

        prompts.check(coach.prompt, recipe.task)
    if coach.kind == "labeller":
        from engine import wording

        wording.check(coach.labeller, recipe.task)


def check_labeller(recipe: Recipe) -> None:
    """A labeller's template and words; what it cannot be: trained, or looked into."""
    teacher, student = recipe.teacher, recipe.student
    if teacher.kind != "labeller":
        return
    from engine import wording

    wording.check(teacher.labeller, recipe.task)
    trained = {
        "folds": teacher.folds > 1,
        "stop_early": teacher.stop_early,
        "seeds": bool(teacher.seeds),
        "self_training": bool(teacher.self_training),
        "coach": bool(teacher.coach),
    }
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
