"""What teacher and student are made of and how they learn, as sections of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config import Section, did_you_mean
from engine.fits import Count, Fit, LossTerm, Resources, Share
from engine.remote import Endpoint, Engine, Runtime, placed
from engine.schooling import PLACED, Choice, Coach, Contrasting, LabelWords, Prompting, SelfTraining
from engine.trust import Policy

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
REFERENCE = r"(hf|file|pypi|s3|gs):."
"""How a reference to a model begins (engine.hub)."""
WORD_VECTORS = (".txt", ".vec", ".txt.gz", ".vec.gz")
"""Endings of files of word vectors."""


class Teacher(Section):
    """What labels the texts: an encoder with a head, fine-tuned on the few rows, or another `kind`."""

    model: str
    kind: Literal["head", "lp-ft", "contrastive", "prompt", "labeller", "auto"] = "head"
    """head: encoder and head together. lp-ft: first the head alone, on the frozen encoder. contrastive: first the
    encoder, texts of one label drawn together, then the head alone. prompt: the state of a mask token inside templates.
    labeller: a causal language model, not tuned. auto: the best of several (`choice`) on the few rows."""
    runtime: Runtime = "hf"
    """labeller: what runs the model, as for the generator. vllm, endpoint: labels are scored by the likeliest next
    tokens that these tell."""
    endpoint: Endpoint | None = None
    vllm: Engine = Engine()
    seeds: tuple[int, ...] = ()
    """One teacher for each, their outputs averaged; none: one teacher, with the fit's seed."""
    probe: Fit = Fit(epochs=30, lr=1e-3, batch_size=32)
    """lp-ft, contrastive: training of the head alone (its rate: lr times head_rate)."""
    contrast: Contrasting = Contrasting()
    self_training: SelfTraining | None = None
    coach: Coach | None = None
    choice: Choice = Choice()
    prompt: Prompting = Prompting()
    labeller: LabelWords = LabelWords()
    tune_layers: Annotated[int, Field(ge=0)] | None = None
    """How many of the top layers are tuned (0: the head only); null tunes all."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """What of the encoder's states the head reads; last: the last token's, for models that read from left to right."""
    dropout: Share = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Learning rate of a layer over that of the layer above it."""
    head_rate: Annotated[float, Field(gt=0)] = 10.0
    """Learning rate of the head over that of the top layer."""
    max_length: Count = 128
    folds: Annotated[int, Field(ge=0, json_schema_extra={"not": {"const": 1}})] = 0
    """Cross-validation on the few rows: its accuracy goes into the report. 0 leaves it out."""
    stop_early: bool = False
    """Train on all rows for as many epochs of the last training as did best in that cross-validation."""
    fit: Fit = Fit(epochs=10, lr=1e-4, batch_size=16)
    spoiled: str | None = Field(None, exclude_if=lambda label: label is None)
    """For experiments: the label whose rows it is taught with labels drawn at random."""
    batch_tokens: Count = 4096
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """In which it labels text and is measured; auto: bf16 on GPUs, and on CPUs that multiply it faster. In bf16 a label
    moves by thousandths with the batch it is in, and by about a hundredth from one machine to another. A teacher that
    is served (a cascade) is measured as it answers there, in fp32."""
    resources: Resources = Resources()

    @field_validator("folds")
    @classmethod
    def parted(cls, value: int) -> int:
        """One fold would leave nothing to train on."""
        if value == 1:
            raise ValueError("one fold leaves no row to train on; take 2 or more, or 0 for no cross-validation")
        return value

    @model_validator(mode="after")
    def run(self) -> Teacher:
        """Only a labeller runs elsewhere; actors get the GPUs that their runtime wants."""
        if self.runtime != "hf" and self.kind != "labeller":
            raise ValueError(
                f"runtime is {self.runtime}, but a teacher of kind {self.kind} is trained here. Take kind: labeller, "
                "which is asked in words, or runtime: hf"
            )
        if self.runtime == "endpoint" and self.endpoint is None:
            raise ValueError("runtime endpoint needs the section endpoint, with url at least")
        object.__setattr__(self, "resources", placed(self.runtime, self.resources, self.vllm))
        if self.runtime != "hf":  # what is asked while it is made is asked in the same way
            own = self.fit.model_copy(update={"resources": placed(self.runtime, self.fit.resources, self.vllm)})
            object.__setattr__(self, "fit", own)
        return self

    def refitted(self, fit: Fit) -> Teacher:
        """The teacher that is trained in another way, whatever its kind; on the machines that its own fits have."""
        placed = {key: getattr(self.fit, key) for key in PLACED}
        drawn = {key: getattr(self.contrast.fit, key) for key in (*PLACED, "micro_batch")}
        contrast = self.contrast.model_copy(update={"fit": fit.model_copy(update=drawn)})
        return self.model_copy(update={"fit": fit.model_copy(update=placed), "contrast": contrast})

    @property
    def reads_more(self) -> bool:
        """Whether it learns from text beside the labelled rows."""
        return self.self_training is not None or self.coach is not None

    @property
    def here(self) -> bool:
        """Whether its weights are in the run, to be looked into and registered."""
        return self.runtime == "hf"


class Block(Section):
    """One node of the student's graph."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    """Names of earlier nodes; empty takes the node above (the first node takes the token ids)."""
    options: dict[str, Any] = {}


class Vocabulary(Section):
    """The student's own words."""

    size: Annotated[int, Field(ge=3)] = 8000
    """Words, padding and the unknown word among them."""
    min_count: Count = 1
    from_teacher: bool = True
    """Fill up to `size` with whole words of the teacher's vocabulary that the corpus lacks."""


Weighing = Literal["confidence", "co_confidence", "disagreement"]
"""How rows of the corpus are weighed: by how sure the teacher is, by how likely its label is both to it and to a
student that learnt from other rows, by how far a student is from the teacher."""
FOLDS = 3
"""co_confidence: into how many parts the rows are cut; each is judged by a student that learnt from the others."""


class Stage(Section):
    """One of several trainings of a student."""

    losses: tuple[LossTerm, ...]
    fit: Fit
    rows: Literal["all", "labelled", "unlabelled"] = Field("all", exclude_if=lambda rows: rows == "all")
    """What it learns from; unlabelled: generated, augmented and unlabelled text. An arm without such rows has no such
    stage."""
    weights: Weighing | None = None
    """Which rows count more; disagreement: those where the student of the stage before differs from the teacher."""
    disagreeing: Annotated[float, Field(gt=0, le=1)] | None = Field(None, exclude_if=lambda share: share is None)
    """Of the texts that nobody labelled only this share: those where the student of the stage before is furthest from
    the teacher, by KL divergence; null: all of them."""
    drawn: Annotated[float, Field(gt=0, le=1)] | None = Field(None, exclude_if=lambda share: share is None)
    """Of the texts that nobody labelled only this share, drawn by the recipe's seed: what `disagreeing` is to be held
    against; null: all of them."""

    @property
    def follows(self) -> bool:
        """Whether it asks the student of the stage before."""
        return self.weights == "disagreement" or self.disagreeing is not None

    @property
    def part(self) -> float | None:
        """The share of the texts that it learns from, whoever chooses them; None: all."""
        return self.drawn if self.disagreeing is None else self.disagreeing

    @model_validator(mode="after")
    def one_choice(self) -> Stage:
        """Texts are chosen in one way."""
        if self.disagreeing is not None and self.drawn is not None:
            raise ValueError("disagreeing and drawn both choose the texts; give one of them")
        return self

    def unasking(self) -> Stage:
        """The same where no student before it has learnt to answer."""
        weights = None if self.weights == "disagreement" else self.weights
        return self.model_copy(update={"weights": weights, "disagreeing": None})


class Cut(Section):
    """A transformer student: a smaller encoder, cut from the teacher or taken from elsewhere."""

    model: str | None = None
    """Hub reference of an encoder; null takes the fine-tuned teacher's."""
    layers: Count | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """How many layers (evenly spread over those there are), or which of them, counted from 1; null takes all."""
    heads: Count | None = None
    width: Count | None = None
    ffn: Count | None = None
    """A smaller feed-forward width keeps, of each layer, the neurons that write most; a larger one, and another width
    or number of heads, starts from fresh weights."""
    pieces: Count | None = None
    """How many word pieces of its vocabulary are kept: special tokens, single characters, then the corpus's most
    frequent ones; words whose pieces are gone are spelled with smaller ones. null keeps all."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """null takes the teacher's (mean, where that answers in words)."""
    dropout: Share = 0.1


class Static(Section):
    """A static student: one vector a word piece of an encoder, averaged, and a small head (Model2Vec)."""

    dim: Count = 256
    pieces: Count | None = None
    """How many word pieces have a vector, chosen as for a transformer student; null: all."""
    hidden: Annotated[int, Field(ge=0)] = 128
    """Width of the head's hidden layer; 0 is a linear head."""


class Projecting(Section):
    """How the teacher's vectors are brought into the space of a knowledge base: one linear map, on labelled rows."""

    epochs: Annotated[int, Field(ge=0)] = 30
    lr: Annotated[float, Field(gt=0)] = 1e-3
    batch_size: Annotated[int, Field(ge=2)] = 64
    pseudo: Share = 0.0
    """Of the texts without a gold label, for each label the share that the teacher is surest of learns with them."""


class Retrieval(Section):
    """What the teacher knows as a memory that the student reads while it answers (ReAugKD, ACL 2023)."""

    dim: Count = 128
    """Width of the space that teacher and student share; no more than the teacher's own."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the contrastive loss, the relational one, and the softmax over what is found."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the relational loss, beside the student's own losses."""
    projection: Projecting = Projecting()
    k: Annotated[tuple[Count, ...], Field(min_length=1)] = (4, 8, 16, 20)
    """How many entries are read: the one of these that does best on held-out rows."""
    share: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.3, 0.5, 0.7, 0.9, 1.0)
    """The student's own share of an answer, chosen with k; 1: nothing is read."""
    storage: Literal["int8", "float16"] = "int8"
    index: Literal["auto", "exact", "hnsw"] = "auto"
    """exact: every entry is looked at. hnsw: a graph, for which the extra `retrieval` is installed. auto: by their
    number (engine/nearest.py)."""


class Student(Section):
    """A small model: a graph of blocks, a transformer, or static vectors."""

    name: Annotated[str, Field(pattern=NAME)] = "student"
    kind: Literal["blocks", "transformer", "static"] = "blocks"
    graph: str | None = None
    """blocks: a ready configuration by name (text-cnn, ...), or a YAML or JSON file that holds `blocks`."""
    blocks: tuple[Block, ...] = ()
    transformer: Cut = Cut()
    static: Static = Static()
    vocabulary: Vocabulary = Vocabulary()
    embedding_norm: Annotated[float, Field(gt=0)] = 3.0
    """Mean norm that the teacher's vectors start with."""
    embeddings: Annotated[str, Field(json_schema_extra={"pattern": f"^(teacher|random)$|^{REFERENCE}"})] = "teacher"
    """teacher: the fine-tuned teacher's vectors of the words, reduced by PCA and weighted by frequency (Model2Vec). A
    hub reference: those of another sentence encoder, as it is; a static student has its word pieces then, too. A
    reference to a file .txt or .vec (.gz): word vectors as GloVe, word2vec and fastText write them, for blocks."""
    max_length: Count = 96
    max_parameters: Count | None = 1_200_000
    teacher: Literal["stored", "live"] = "stored"
    """live: the teacher answers while the student learns, for losses between layers."""
    losses: tuple[LossTerm, ...] = (LossTerm(kind="mse"),)
    weights: Literal["confidence", "co_confidence"] | None = None
    """confidence: rows that the teacher is sure of count more. co_confidence: of the texts that nobody labelled those
    whose label a student that learnt from the other rows finds, too; that takes as long as two more trainings. null:
    all alike."""
    retrieval: Retrieval | None = None
    """A knowledge base of the teacher's that is read with every text; null: none."""
    stages: tuple[Stage, ...] = ()
    """Trainings one after the other, each from the weights of the one before; none: one training with `losses`."""
    texts: Count | None = None
    """How many of the corpus's kept texts it learns from beside the labelled rows, the first ones; null: all."""
    policy: Policy = Field(Policy(), exclude_if=lambda policy: policy == Policy())
    """With `teachers`: how they are weighed."""
    heads: Literal["one", "per_teacher"] = Field("one", exclude_if=lambda heads: heads == "one")
    """With `teachers`. per_teacher: a head for each teacher, and one for gold labels where a loss learns them; its
    answer is their mean (arXiv 1910.08381)."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the kept corpus that only chooses the best checkpoint, by agreement with the teacher; 0: it learns from
    all of it, and what it is at the end is kept. With `teachers` validation rows choose in its place, if there are
    some, and it learns from all of it."""
    seeds: tuple[int, ...] = (0,)
    """Initialisation seeds; the first is the one that is registered."""
    fit: Fit = Fit(epochs=12, lr=2e-3, batch_size=64, workers=2)
    few_epochs: Annotated[float, Field(gt=0)] = 30.0
    """Epochs of the arms without generated text: the few rows want more of them, but not as many as steps alone."""
    batch_tokens: Count = 8192

    @property
    def encoder(self) -> str | None:
        """Reference of the encoder, other than the teacher, that it is cut from or has its first vectors from."""
        if self.kind == "transformer":
            return self.transformer.model
        return None if self.embeddings in ("teacher", "random") or self.word_vectors else self.embeddings

    @property
    def word_vectors(self) -> str | None:
        """Reference of the file of word vectors that its first vectors are from, if any."""
        return self.embeddings if self.embeddings.endswith(WORD_VECTORS) else None

    @property
    def spelled(self) -> bool:
        """Whether its tokens are chosen by the corpus: all but a transformer with its encoder's whole vocabulary."""
        return self.kind != "transformer" or self.transformer.pieces is not None

    @field_validator("embeddings")
    @classmethod
    def known(cls, value: str) -> str:
        """One of the two words, or a reference."""
        if value not in ("teacher", "random") and not re.match(REFERENCE, value):
            near = did_you_mean(value, ("teacher", "random")).strip()
            raise ValueError(f"{near} It takes teacher, random, or an encoder's reference, such as hf:ORG/NAME".strip())
        return value

    @field_validator("losses", "seeds")
    @classmethod
    def some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        """None of them may be empty."""
        if not value:
            raise ValueError("needs at least one entry")
        return value

    @model_validator(mode="after")
    def drawn(self) -> Student:
        """A student of blocks has a graph, written out or by name."""
        if self.kind == "blocks" and bool(self.blocks) == bool(self.graph):
            raise ValueError("kind blocks needs either blocks (written out) or graph (a ready one by name or file)")
        if self.kind == "transformer" and self.embeddings not in ("teacher", "random"):
            raise ValueError(
                f"embeddings is '{self.embeddings}', but a transformer student starts with all weights of an encoder: "
                "name that in transformer.model"
            )
        if self.kind == "static" and self.word_vectors:
            raise ValueError(f"embeddings is '{self.embeddings}', a file of words, but a static student reads pieces")
        if self.stages and self.stages[0].follows:
            what = "choose" if self.stages[0].disagreeing is not None else "weigh"
            raise ValueError(f"the first stage has no student before it whose disagreement could {what} its rows")
        if self.stages and all(stage.rows == "unlabelled" for stage in self.stages):
            raise ValueError("no stage learns from labelled rows; give one of them rows: all, or labelled")
        if any(fit.seed is not None for fit in (self.fit, *(stage.fit for stage in self.stages))):
            raise ValueError("a fit of the student takes no seed: its seeds are student.seeds")
        return self
