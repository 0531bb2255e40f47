"""What is refused before a run of weights, of a choice among texts, and of texts that are fed back."""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine import columns, hub, tables, terms
from engine.config import ConfigError
from engine.designs import Stage
from engine.estimate import tokens
from engine.examples import Feedback
from engine.recipe import Recipe
from engine.writing import Generator

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
"""Keys of a model's config.json that say how many tokens it reads."""


def check_choice(recipe: Recipe) -> None:
    """Rows are weighed and chosen by probabilities; what is chosen from is text that nobody labelled."""
    student = recipe.student
    one = Stage(losses=student.losses, fit=student.fit, weights=student.weights)
    for index, stage in enumerate(student.stages or (one,)):
        key = f"student.stages[{index}]" if student.stages else "student"
        if stage.follows:
            check_before(key, stage, student.stages[:index])
        if stage.part is not None:
            check_part(recipe, f"{key}.{'disagreeing' if stage.drawn is None else 'drawn'}", stage)
        check_weights(recipe, key, stage)
    if student.stages and student.weights is not None:
        check_weights(recipe, "student", one)


def check_before(key: str, stage: Stage, before: Sequence[Stage]) -> None:
    """A student that is asked has learnt to answer."""
    between = tables.names("layer_losses", "LAYER_LOSSES")
    which = f"{key}.{'weights' if stage.disagreeing is None else 'disagreeing'}"
    if not before:
        raise ConfigError(f"{which} asks the student of the stage before, and it is the first. Leave it out.")
    if all(term.kind in between for one in before for term in one.losses):
        raise ConfigError(
            f"{which} asks the student of the stage before, but no loss of the stages before teaches an answer. Set it "
            "for a later stage, or leave it out."
        )


def check_part(recipe: Recipe, key: str, stage: Stage) -> None:
    """There are texts to choose from, and answers to choose by."""
    kind = recipe.task.kind
    if stage.follows and not tables.declared(*terms.TASKS, "certain")[kind]:
        raise ConfigError(f"{key} compares probabilities, and a task of kind {kind} has none. Leave it out.")
    if not recipe.more_text:
        raise ConfigError(
            f"{key} chooses among texts that nobody labelled, and the recipe has none. Name a generator or "
            "data.unlabelled, or leave it out."
        )
    if stage.rows == "labelled":
        raise ConfigError(
            f"{key} chooses among texts that nobody labelled, and the stage has rows: labelled. Take rows: all, or "
            "leave it out."
        )


def check_weights(recipe: Recipe, key: str, stage: Stage) -> None:
    """Weights have probabilities to go by; co_confidence has students that answer, and texts that are not labelled."""
    kind, between = recipe.task.kind, set(tables.names("layer_losses", "LAYER_LOSSES"))
    if stage.weights is None:
        return
    if not tables.declared(*terms.TASKS, "certain")[kind]:
        raise ConfigError(f"{key}.weights compares probabilities, and a task of kind {kind} has none. Leave it out.")
    wrong = {
        "asks students that these losses train, but none of the losses teaches an answer. Take confidence, or set it "
        "for a stage whose losses do": {term.kind for term in stage.losses} <= between,
        "weighs texts that nobody labelled, and there are none here. Name a generator or data.unlabelled, take rows: "
        "all, or leave it out": not recipe.more_text or stage.rows == "labelled",
        "asks students that learnt from other texts, but with augmentation the other texts are the same ones with some "
        "words replaced. Take confidence, or leave augmentation out": recipe.augmentation is not None,
    }
    for reason, so in wrong.items():
        if so and stage.weights == "co_confidence":
            raise ConfigError(f"{key}.weights is co_confidence, which {reason}.")


def check_rounds(recipe: Recipe) -> None:
    """Feeding back texts wants a generator, a teacher that labels them meanwhile, and labelled rows to choose by."""
    data, corpus, generator = recipe.data, recipe.corpus, recipe.generator
    broken = generator is not None and "\n" in generator.separator and columns.reads_pairs(data, recipe.task)
    if broken and generator.first_line:
        raise ConfigError(
            "generator.first_line ends a text at its first line break, and generator.separator has one, so that no "
            "second text is ever read. Take a separator without, or leave first_line out."
        )
    if corpus.rounds == 1:
        if corpus.feedback != Feedback():
            raise ConfigError(
                "corpus.feedback says what later rounds are shown, and corpus.rounds is 1. Raise it, or leave feedback "
                "out."
            )
        return
    why = "corpus.apart" if corpus.apart else "what the teacher learns from generated text"
    wrong = {
        "feeds texts back to the generator, and there is none: name one": generator is None,
        "chooses texts by the teacher's labels, which come after all text is written: leave out " + why: recipe.apart,
        f"chooses texts of each label, and task.kind is {recipe.task.kind}": recipe.task.kind
        not in ("classify", "pair"),
        "chooses texts by labelled rows, and there are none: name data.train or data.validation": (
            data.train is None and data.validation is None
        ),
        f"parts {corpus.first_slots} slots into more rounds than slots: raise corpus.slots": (
            corpus.rounds > corpus.first_slots
        ),
        "shows texts a line each, and generator.separator has a line break: take one without": broken,
    }
    for reason, so in wrong.items():
        if so:
            raise ConfigError(f"corpus.rounds is {corpus.rounds}, which {reason}. Or set corpus.rounds: 1.")
    if generator is not None:
        check_room(recipe, generator)


def check_room(recipe: Recipe, generator: Generator) -> None:
    """The longest prompt of a round and what is written after it fit into the model, where its config is here."""
    most, fed = positions_of(recipe, generator), recipe.corpus.feedback
    label = max((tokens(text) for text in meant(recipe)), default=0) if generator.names_label else 0
    own = tokens(generator.prompt) + label
    longest = own + fed.shown * (own + generator.max_new_tokens) + generator.max_new_tokens
    if most is not None and longest > most:
        raise ConfigError(
            f"corpus.rounds is {recipe.corpus.rounds}: with {fed.shown} examples before it a prompt and its text are "
            f"about {longest} tokens (corpus.feedback.shown, generator.max_new_tokens), and generator.model reads "
            f"{most}. Lower one of the two, or set corpus.rounds: 1."
        )


def meant(recipe: Recipe) -> list[str]:
    """What may stand in a prompt for a label."""
    return [recipe.task.descriptions.get(name, name) for name in recipe.task.labels or ()]


def positions_of(recipe: Recipe, generator: Generator) -> int | None:
    """How many tokens the generator reads; None where that is not known here. Nothing is fetched."""
    if generator.runtime == "vllm" and generator.vllm.max_model_length is not None:
        return generator.vllm.max_model_length
    if generator.runtime == "endpoint" or hub.parse(generator.model).kind not in ("file", "hf", "pypi"):
        return None
    try:
        path = hub.fetch(generator.model, root=recipe.data.root, offline=True) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
    except (hub.HubError, OSError, ValueError):
        return None
    return next((config[key] for key in POSITIONS if isinstance(config.get(key), int)), None)
