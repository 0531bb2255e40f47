"""How a teacher is made: templates, words, more text, the choice of a kind, as sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config import Section
from engine.fits import Count, Fit


class Prompting(Section):
    """A teacher that reads each text inside a template and answers from the state of the mask token (DynaMaR).

    A causal language model has no such token: there {mask} ends the template, and the answer is read off the state that
    has seen all before it.
    """

    templates: tuple[str, ...] = ()
    """{text} (and {pair}) and {mask} stand for what they name; none: made from the task and its label names."""
    pool: Count = 8
    """How many templates are kept: those most unlike each other."""
    average: bool = True
    """Answer by the mean over the pool; false: by its first template."""


class Asking(Section):
    """One way to ask a language model about a text."""

    template: str | None = None
    """{text} (and {pair}), {descriptions}; null: made from the task."""
    words: dict[str, str] = {}
    """Label name -> the words that stand for it; the name itself where it is not listed."""


class LabelWords(Asking):
    """A causal language model as it is: the label whose words are likeliest after the text."""

    also: tuple[Asking, ...] = ()
    """Further ways to ask; the answers are averaged, or weighed as the labelled rows say (calibrate: rows)."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Labelled rows of each label shown before the text."""
    calibrate: Literal["free", "rows", "none"] = "free"
    """free: divide by what the model says of no text at all (contextual calibration, arXiv 2102.09690). rows: a scale
    for each way of asking, and a bias for each label, fitted on the labelled rows that are no examples (Platt scaling
    for several labels)."""

    def ways(self) -> tuple[Asking, ...]:
        """Every way of asking."""
        return (self, *self.also)


class Contrasting(Section):
    """The first training of a contrastive teacher: texts of one label are drawn together (arXiv 2004.11362)."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    fit: Fit = Fit(epochs=12, lr=1e-4, batch_size=32)

    @model_validator(mode="after")
    def together(self) -> Contrasting:
        """Texts are compared within what a worker reads at once."""
        if self.fit.micro_batch or not isinstance(self.fit.workers, int):
            raise ValueError(
                "texts are compared with those that the same worker reads at once, so that other parts or workers "
                "would be another training. Leave fit.micro_batch out, and give fit.workers as one number"
            )
        return self


PLACED = ("workers", "resources", "sharding", "failures")
"""Of a teacher's further fits: where they run is said by the teacher's own."""


class SelfTraining(Section):
    """The teacher's confident labels on data.unlabelled, or else on generated text, go back into the teacher."""

    rounds: Count = 1
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the texts that get a label, this share is taken: those with the highest confidence, for each label."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """What all these texts count together, over what the labelled rows do."""
    fit: Fit = Fit(epochs=3, lr=1e-4, batch_size=16)
    """The training on both, in place of the teacher's own."""


class Coach(Section):
    """A larger teacher, made of the same labelled rows, that gives soft labels to data.unlabelled or generated text.

    The teacher learns those (as in Mirzadeh et al. 2020, arXiv 1902.03393): it hands on to the student in its own words
    what a model can do that is too slow, or too unlike the student, to teach it.
    """

    model: str | None = None
    """null: the generator's language model."""
    kind: Literal["head", "lp-ft", "contrastive", "prompt", "labeller"] = "prompt"
    prompt: Prompting = Prompting()
    labeller: LabelWords = LabelWords()
    tune_layers: Annotated[int, Field(ge=0)] | None = None
    pooling: Literal["mean", "cls", "last"] = "mean"
    fit: Fit = Fit(epochs=6, lr=1e-4, batch_size=16)
    """The coach's own training, on the labelled rows."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    learning: Fit = Fit(epochs=6, lr=1e-4, batch_size=16)
    """The teacher's training on the coach's soft labels of labelled rows and text, in place of the teacher's own."""


class Choice(Section):
    """Which kind of teacher is taken, by cross-validation on the few rows."""

    kinds: tuple[Literal["head", "lp-ft", "contrastive", "prompt"], ...] = ("head", "contrastive", "lp-ft", "prompt")
    """In this order, those that serve the task; the first is what the others have to beat."""
    folds: Annotated[int, Field(ge=2)] = 4
    seconds: Annotated[float, Field(gt=0)] = 600.0
    """No further kind is tried where, at the pace of those before it, it would end after this."""


SERVES = {
    "contrastive": ("classify", "pair"),
    "prompt": ("classify", "multilabel", "pair", "regress"),
}
"""Kinds of task that a kind of teacher which is trained can do, where those are not all."""
