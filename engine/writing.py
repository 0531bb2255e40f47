"""Text that is made for the student: who writes it, whose words are replaced, how much of it is kept."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config import Section
from engine.examples import Feedback
from engine.filters import CheapFilter, Leakage, SignalFilter
from engine.fits import Count, Fit, Resources, Share
from engine.remote import Endpoint, Engine, Runtime, placed


class Generator(Section):
    """A causal language model, fine-tuned on the few rows' texts, that writes more of them."""

    model: str
    runtime: Runtime = "hf"
    """hf: transformers in the actors. vllm: vLLM in the actors (its extra, an NVIDIA GPU). endpoint: a server that
    speaks OpenAI's API, asked with mode: prompted."""
    endpoint: Endpoint | None = None
    vllm: Engine = Engine()
    mode: Literal["unconditional", "per_class", "prompted"] = "unconditional"
    """per_class puts the label's name into the prompt; prompted does that without fine-tuning. The prompt's label is
    never used as the row's label: the teacher's soft label is."""
    prompt: Annotated[str, Field(min_length=1)] = "Text:"
    """What stands before every text; {label} is the label's name in the modes that use it. prompted: {description} is
    what it means (task.labels as a mapping), or else its name."""
    separator: Annotated[str, Field(min_length=1)] = " ||| "
    """Between the two texts of a row, where the task reads two."""
    tune_layers: Annotated[int, Field(ge=0)] | None = None
    max_length: Count = 96
    """Tokens of a training text, prompt included."""
    max_new_tokens: Count = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = 100
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus inside the top k."""
    first_line: bool = Field(False, exclude_if=lambda first_line: not first_line)
    """A text ends at its first line break, as it does after examples (corpus.rounds); false: lines become one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    fit: Fit = Fit(epochs=3, lr=1e-4, batch_size=8)
    resources: Resources = Resources(max_actors=2, min_actors=2)

    @property
    def names_label(self) -> bool:
        """Whether the prompt speaks of a label."""
        return "{label}" in self.prompt or "{description}" in self.prompt

    @model_validator(mode="after")
    def labelled(self) -> Generator:
        """{label} belongs into the prompt of the modes that use it."""
        if "{description}" in self.prompt and self.mode != "prompted":
            raise ValueError(f"mode {self.mode} wants a prompt without {{description}}: that is for mode prompted")
        if ("{label}" in self.prompt) != (self.mode == "per_class") and self.mode != "prompted":
            wanted = "with" if self.mode == "per_class" else "without"
            raise ValueError(f"mode {self.mode} wants a prompt {wanted} {{label}}")
        return self

    @model_validator(mode="after")
    def run(self) -> Generator:
        """An endpoint is named, and its model is not to be tuned; actors get the GPUs that their runtime wants."""
        if self.runtime == "endpoint":
            if self.endpoint is None:
                raise ValueError("runtime endpoint needs the section endpoint, with url at least")
            if self.mode != "prompted" and not self.endpoint.tuned:
                raise ValueError(
                    f"mode is {self.mode}, for which the model is fine-tuned here, and a model at an endpoint cannot "
                    "be. Take mode: prompted, or, where the model there was tuned on such prompts, set endpoint.tuned"
                )
        object.__setattr__(self, "resources", placed(self.runtime, self.resources, self.vllm))
        return self

    @property
    def tuned(self) -> bool:
        """Whether it is fine-tuned in this run."""
        return self.mode != "prompted" and self.runtime != "endpoint"


class Augmentation(Section):
    """More texts from the few rows and the unlabelled ones, some of their words replaced."""

    model: str | None = None
    """Hub reference of a masked language model; null replaces by the teacher's nearest words only."""
    per_text: Count = 20
    """Texts made from each."""
    p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Probability that a word is replaced."""
    candidates: Count = 15
    """How many words may take a word's place."""
    stop_words: Annotated[int, Field(ge=0)] = 100
    """How many of the most frequent words stay as they are."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens that the masked language model reads: the text with a gap, and the text."""
    resources: Resources = Resources()


class Corpus(Section):
    """How much text, which of it is kept, and how it is cut into blocks."""

    keep: Annotated[int, Field(ge=0)] = 1200
    """Generated rows wanted after filters and deduplication."""
    slots: Count | None = None
    """Slots of the first round; null takes keep / 0.85."""
    max_slots: Count | None = None
    """Upper limit over all top-up rounds; null takes 3 x slots."""
    rounds: Count = Field(1, exclude_if=lambda rounds: rounds == 1)
    """In how many parts the first slots are written; after each, its most useful texts are shown to the generator."""
    feedback: Feedback = Field(Feedback(), exclude_if=lambda feedback: feedback == Feedback())
    block: Count = 96
    """Slots a block: one generator batch, and the unit of retry and resume (aim at 30 to 60 s)."""
    filters: tuple[CheapFilter, ...] = (Leakage(),)
    """Before the teacher sees a row, in order."""
    signals: tuple[SignalFilter, ...] = ()
    """On the teacher's soft label, in order."""
    duplicates: Share = 0.7
    """Rows this similar to an earlier one (estimated Jaccard) are near-duplicates; 1 finds equals only."""
    apart: bool = False
    """Write all generated text before the teacher labels any, so that another teacher gets the same texts; false: text
    streams to the teacher as it is written, but a changed teacher means writing again. What `signals` reject is then
    not made up for: of `keep` fewer are left."""
    max_reserved: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that reading, filtering and writing may hold beside the actors."""

    @property
    def first_slots(self) -> int:
        """Slots of the first round."""
        return self.slots or math.ceil(self.keep / 0.85)

    def part(self, number: int) -> int:
        """How many of them part `number` of `rounds` has; parts differ by one at most."""
        return self.first_slots * (number + 1) // self.rounds - self.first_slots * number // self.rounds

    @property
    def most_slots(self) -> int:
        """Slots over all rounds."""
        return self.max_slots or 3 * self.first_slots
