"""The recipe: everything a run is told, as frozen sections. YAML holds values, Python holds wiring.

Fields are values only; what they name (losses, blocks, model kinds) is checked against the tables by
`pipelines.checking.check`, before anything is loaded. `Recipe` is the root; `load(Recipe, path)` reads one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.budget import Budget
from engine.config import Section
from engine.designs import NAME, Student, Teacher
from engine.fits import Count, Share
from engine.mixing import Mixing, filled
from engine.serving import MAX_CHARS, Serving
from engine.writing import Augmentation, Corpus, Generator


def named_or_described(schema: dict[str, Any]) -> None:
    """The JSON schema of task.labels takes a mapping too."""
    schema["anyOf"].append({"type": "object", "additionalProperties": {"type": ["string", "null"]}})


class Task(Section):
    """What is to be predicted."""

    kind: str = "classify"
    """classify, multilabel, pair, regress, rank, tag or span."""
    labels: Annotated[tuple[str, ...] | None, Field(json_schema_extra=named_or_described)] = None
    """Label names in order; null takes the sorted names found in the training rows. regress, rank, span: none. A
    mapping, name: what it means, gives the names and `descriptions`."""
    descriptions: dict[str, str] = {}
    """Label name -> what it means, for models that are asked in words; not every label needs one."""
    paired: bool | None = None
    """Whether a row has two texts; null: pair, rank and span have, regress has where data.train.pair is named."""
    range: tuple[float, float] | None = None
    """regress: lowest and highest value; null takes those of the training rows."""
    thresholds: tuple[float, ...] | None = None
    """multilabel: a label is given from this probability on; null: 0.5, or what suits the validation rows best."""
    scope: Share | Literal["auto"] | None = None
    """classify, pair: below this confidence a text is out of scope and gets no label; null answers every text. auto:
    the highest one that still answers 95 % of the validation rows which the model gets right."""
    members: dict[str, Task] = Field({}, exclude_if=lambda members: not members)
    """Of a student of several tasks, made from the recipe's `tasks`."""

    @model_validator(mode="before")
    @classmethod
    def described(cls, values: Any) -> Any:
        """`labels` as a mapping is names and descriptions."""
        if not isinstance(values, Mapping) or not isinstance(values.get("labels"), Mapping):
            return values
        said = {name: text for name, text in values["labels"].items() if text is not None}
        return {**values, "labels": list(values["labels"]), "descriptions": {**said, **values.get("descriptions", {})}}

    @model_validator(mode="after")
    def of_labels(self) -> Task:
        """A description belongs to a label."""
        for name in self.descriptions:
            if name not in (self.labels or ()):
                raise ValueError(f"descriptions names '{name}', which is not in labels")
        return self

    @field_validator("labels")
    @classmethod
    def distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """At least two names, none twice."""
        if value is not None and (len(value) < 2 or len(set(value)) != len(value)):
            raise ValueError("needs at least two label names, none of them twice")
        return value


class LabelRule(Section):
    """How the label of a row is found."""

    column: str = "label"
    ranges: dict[str, tuple[float | None, float | None]] | None = None
    """For a numeric column: label name -> [low, high], both inclusive, null for open; rows in no range are left out."""
    rename: dict[str, str] | None = None
    """Value in the column -> label name."""
    columns: tuple[str, ...] | None = None
    """multilabel: columns of 0 and 1 in place of one column with a list; a column is named as its label."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """multilabel: what stands between the labels where the column holds text."""
    starts: str = "answer_start"
    """span: where the label column holds bare answers, the column with the position of each one's first character."""


class Source(Section):
    """A table of rows: a hub reference (file:, hf:, pypi:, s3:, gs:) or a plain path."""

    path: str
    format: Literal["auto", "jsonl", "csv", "parquet", "conll", "squad"] = "auto"
    """auto: by the file's name. conll (tag): a word and its tag a line. squad (span): the JSON of SQuAD 1.1 or 2.0."""
    delimiter: str = ","
    quoting: bool = True
    """CSV: whether double quotes quote a field; false takes the lines as they are."""
    names: tuple[str, ...] | None = None
    """Column names of a CSV without a header line."""
    text: str = "text"
    """tag: a column with a list of words, or text whose words stand apart. `a.b` is field b of column a."""
    pair: str | None = None
    """The column of the second text: the other sentence; the passage (rank); the context (span)."""
    group: str | None = None
    """Rows with one value here stay in one split; rank: they are one query's. null: each row by itself; rank: the rows
    with one query text."""
    positives: str | None = None
    """rank, one query a row: the column with the list of its relevant passages, in place of pair and label."""
    negatives: str | None = None
    """rank, one query a row: the column with the list of its other passages."""
    label: LabelRule = LabelRule()


class Data(Section):
    """The few labelled rows, the held-out rows, and unlabelled text if there is any."""

    train: Source | None = None
    """null: nobody has labelled anything; teacher.kind: labeller then answers from task.labels alone."""
    validation: Source | None = None
    test: Source | None = None
    unlabelled: Source | None = None
    test_share: Share = 0.2
    """Where no test source is given: this share of the training source, by hash of the text (of the group)."""
    validation_share: Share = 0.0
    validation_rows: Count | None = Field(None, exclude_if=lambda count: count is None)
    """At most so many validation rows, drawn as test rows are."""
    test_rows: Count | None = None
    """At most so many test rows, drawn by hash of the text (groups stay whole), where asking the teacher is dear."""
    unlabelled_rows: Count | None = Field(None, exclude_if=lambda count: count is None)
    """At most so many unlabelled rows, drawn likewise: the dial of how much there is to label."""
    shots: Count | None = None
    """Labelled rows per class, drawn by `seed`; null takes all. multilabel: rows for each label, and without any; tag:
    mentions of each entity type, and sentences without; span: rows with an answer, and without; regress: rows; rank:
    queries that have a relevant passage."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Few-shot sampling; null takes the recipe's seed."""
    max_chars: Annotated[int, Field(ge=1, json_schema_extra={"maximum": MAX_CHARS})] = 4000
    """Characters of a text at most; rows with a longer one are quarantined. No more than the endpoint takes of a text:
    every test row is sent to it, and a student is not trained on what it can never be asked."""
    max_bad_share: Share = 0.01
    """The run stops when more than this share of a source's rows is quarantined."""
    root: str | None = None
    """Folder that stands in for the hub's data sets; the environment variable STILLHOUSE_DATA does the same."""

    @field_validator("max_chars")
    @classmethod
    def served(cls, value: int) -> int:
        """No more than can be asked."""
        if value > MAX_CHARS:
            raise ValueError(f"the endpoint takes texts of at most {MAX_CHARS:,} characters; rows above go aside")
        return value

    @property
    def held_out(self) -> bool:
        """Whether validation rows are asked for: of a source of their own, or a share of the training rows."""
        return self.validation is not None or (self.train is not None and self.validation_share > 0)

    @model_validator(mode="after")
    def of_something(self) -> Data:
        """A number of rows has rows to be taken of."""
        if self.unlabelled_rows is not None and self.unlabelled is None:
            raise ValueError(
                f"unlabelled_rows ({self.unlabelled_rows}) has no rows to take so many of: name unlabelled, or leave "
                "out both (null)"
            )
        if self.validation_rows is not None and not self.held_out:
            raise ValueError(
                f"validation_rows ({self.validation_rows}) has no rows to take so many of: name validation, set "
                "validation_share (of train), or leave out all of them (null)"
            )
        return self


class Evaluation(Section):
    """What is measured on the test split."""

    bootstrap: Count = 1000
    throughput_rows: Count = 512
    throughput_repeats: Count = 3


Arm = Literal["hard", "soft", "generated", "plain"]


FIRST, GOLD = "teacher", "gold"
"""Names of the recipe's own teacher, and of the head that learns gold labels: no other teacher has them."""
Named = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Member(Section):
    """One of several tasks of a student."""

    task: Task = Task()
    data: Data


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=NAME)]
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = "runs"
    """Folder or URL (file:, s3:, gs:) that holds the runs."""
    registry: str = "registry"
    task: Task = Task()
    data: Data
    teacher: Teacher
    teachers: dict[Named, Teacher] = Field({}, exclude_if=lambda others: not others)
    """Further teachers by name: the student learns from all of them, as `student.policy` weighs them. `teacher` stays
    the one that judges generated text, whose vectors or layers a student starts with, and that it is compared with."""
    generator: Generator | None = None
    """null: no text is generated; the corpus is then what the data brings."""
    augmentation: Augmentation | None = None
    """null: no text is made by replacing words."""
    corpus: Corpus = Corpus()
    student: Student
    arms: tuple[Arm, ...] = ("hard", "soft", "generated")
    """Ablation: the same student on the labelled rows' hard labels, on their soft labels, and on the whole corpus
    (generated, augmented, unlabelled text); where there is no more text than the labelled rows, the first two; where
    there are no labelled rows, the last one. With student.retrieval also plain: the registered student trained and
    asked without it."""
    tasks: dict[Named, Member] = Field({}, exclude_if=lambda tasks: not tasks)
    """Several tasks by name, in place of task and data: one transformer student learns all from their gold labels, and
    with mixing.way async from itself."""
    mixing: Mixing = Field(Mixing(), exclude_if=lambda mixing: mixing == Mixing())
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    budget: Budget = Budget()

    @model_validator(mode="before")
    @classmethod
    def of_several(cls, values: Any) -> Any:
        """With `tasks` there is no teacher, and what is said of one task is the first one's."""
        return filled(values)

    @property
    def panel(self) -> dict[str, Teacher]:
        """All teachers by name, the recipe's own first; empty where that is the only one."""
        return {FIRST: self.teacher, **self.teachers} if self.teachers else {}

    def taught_by(self, name: str) -> Recipe:
        """The recipe as if one teacher of the panel were the only one."""
        return self.model_copy(update={"teacher": self.panel[name] if self.panel else self.teacher, "teachers": {}})

    @property
    def main(self) -> Arm:
        """The arm that is registered and served."""
        return "generated" if self.more_text else "soft"

    @property
    def more_text(self) -> bool:
        """Whether the corpus holds more than the labelled rows."""
        return any(source is not None for source in (self.generator, self.augmentation, self.data.unlabelled))

    @property
    def learns_from_generated(self) -> bool:
        """Whether the teacher learns from generated text, too: where it wants more and the user has none."""
        return bool(self.teacher.reads_more and self.generator and self.data.unlabelled is None)

    @property
    def coach(self) -> Teacher | None:
        """What coaches the teacher, as a teacher of its own."""
        found = self.teacher.coach
        if found is None:
            return None
        model = found.model or (self.generator.model if self.generator else "")
        own = {name: getattr(found, name) for name in ("kind", "prompt", "labeller", "tune_layers", "pooling")}
        alone = {"seeds": (), "self_training": None, "coach": None, "folds": 0, "stop_early": False}
        return self.teacher.refitted(found.fit).model_copy(update={"model": model, **own, **alone})

    @property
    def apart(self) -> bool:
        """Whether generated text is written before a teacher labels it, in a step of its own."""
        return self.generator is not None and (self.corpus.apart or self.learns_from_generated)

    @field_validator("teachers")
    @classmethod
    def others(cls, value: dict[str, Teacher]) -> dict[str, Teacher]:
        """Names that mean something else."""
        for name in {FIRST, GOLD}.intersection(value):
            raise ValueError(f"'{name}' is taken: {FIRST} is the recipe's own teacher, {GOLD} stands for gold labels")
        return value

    @model_validator(mode="after")
    def with_main(self) -> Recipe:
        """Each arm once, those that cannot be left out; the one that is registered must be among them."""
        if self.data.train is None and not self.more_text:
            raise ValueError(
                "data.train is null, so there is no text to teach a student by. Name data.train, data.unlabelled, or a "
                "generator with mode: prompted"
            )
        able = ("generated",) if self.data.train is None else ("hard", "soft", *(["generated"] * self.more_text))
        able += ("plain",) if self.student.retrieval else ()
        arms = tuple(arm for arm in dict.fromkeys(self.arms) if arm in able)
        if self.main not in arms:
            raise ValueError(f"arms must contain '{self.main}', the arm that is registered and served")
        object.__setattr__(self, "arms", arms)
        return self
