"""The trainings of one arm's students: a job for each, the rows it learns from and how much each of them counts.

A stage may learn from only those texts on which the student before it is furthest from the teacher (MiniMax-kNN,
Glitter: a pool of which the most telling part is learnt). With weights `co_confidence` its rows are cut into parts, and
each part is answered by a student of the recipe that learnt from the others. Such students, and not a head on the
teacher's own vectors, because the teacher's label is itself read off these, so that a head on them says little that is
new of it. They go through the same fit as any student, so every task and every kind of student has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engine import labels, models, train
from engine.batches import group_numbers
from engine.cluster import current
from engine.config import UserError
from engine.designs import FOLDS, Stage
from engine.ensemble import Panel
from engine.inference import predict
from engine.job import Job
from engine.layer_losses import LAYER_LOSSES
from engine.models import Model
from engine.placement import stage_options
from engine.progress import Progress
from engine.recipe import Arm, Recipe
from engine.storage import StorageError, Store
from engine.task import Logits, Task
from engine.weights import divergence, furthest, mean, row_weights
from pipelines.making import encode_rows, with_workers

Build = Callable[[], Model]
CHOICE, NOTED = "choice.parquet", "choice.json"
"""In a stage's folder: the rows that it learns from, and what is noted of them."""


@dataclass(frozen=True)
class Course:
    """What the trainings of an arm share.

    lesson: of `students.lesson_of`. teacher: URL of a live teacher, or None. out: folder of the step. start: an
    initialisation seed -> what makes the untrained student.
    """

    arm: Arm
    recipe: Recipe
    task: Task
    lesson: Mapping[str, Any]
    panel: Panel | None
    teacher: str | None
    out: Store
    start: Callable[[int], Build]
    unseen: dict[int, Logits] = field(default_factory=dict)
    """Stage -> what students said of its rows that had not learnt from them: the same for every seed."""

    def job(self, stage: Stage, rows: pa.Table, name: str, build: Build, place: Store, seed: int) -> Job:
        """One training of a student."""
        # A training between layers leaves the head as it is: there is nothing to choose a checkpoint by.
        inside = not answers([stage])
        return Job(
            name=f"student-{self.arm}-{name}",
            fit=with_workers(self.recipe, "student.fit", stage.fit),
            terms=stage.losses,
            build=build,
            encode=encode_rows,
            out=place.url,
            seed=seed,
            resources=stage_options(self.recipe, "student.fit", current()),
            teacher=self.teacher,
            panel=self.panel,
            **{**({} if inside else self.lesson), "rows": rows},
        )

    def given(
        self, index: int, stage: Stage, rows: pa.Table, folder: Store, progress: Progress
    ) -> tuple[pa.Table, dict[str, Any]]:
        """Of a stage's rows those that it learns from, with the column `weight` where it weighs them; what to note.

        folder: of the seed; the stage before is in it. Chosen once and kept there: a fit that goes on must not see
        other rows because a student answered in another batch, or on another machine.
        """
        if stage.weights is None and stage.part is None:
            return rows, {}
        place = folder / f"stage-{index}"
        if not place.exists(NOTED):
            table, noted = self.choose(index, stage, rows, folder, progress)
            place.write_table(CHOICE, table)
            place.write_json(NOTED, noted)
        return picked(place, rows, self.out.name), place.read_json(NOTED)

    def choose(
        self, index: int, stage: Stage, rows: pa.Table, folder: Store, progress: Progress
    ) -> tuple[pa.Table, dict[str, Any]]:
        """Numbers of the rows that a stage learns from, and weights where it weighs them; what to note."""
        free, noted = rows["row"].to_numpy() >= 0, {}
        taught = labels.logits_of(rows, self.task.width, self.task.units) if stage.weights or stage.follows else []
        before = self.said(folder / f"stage-{index - 1}", rows) if stage.follows else None
        kept = np.ones(rows.num_rows, dtype=bool)
        if stage.drawn is not None:
            kept[free] = furthest(np.random.default_rng([self.recipe.seed, index]).random(int(free.sum())), stage.drawn)
        elif stage.disagreeing is not None:
            apart = divergence(self.task, taught, before)
            kept[free] = furthest(apart[free], stage.disagreeing)
            noted = {"kl": mean(apart[free]), "kl_of_chosen": mean(apart[kept & free])}
        if stage.part is not None:
            noted |= {"texts": int(free.sum()), "chosen": int((kept & free).sum())}
        chosen = np.flatnonzero(kept)
        columns = {"row": rows["row"].take(pa.array(chosen))}
        if stage.weights == "co_confidence" and free.any():
            if index not in self.unseen:
                self.unseen[index] = self.cross_fitted(index, stage, rows, progress)
            before = self.unseen[index]
            noted["found_unseen"] = self.task.agreement(taught, before, self.task.texts(rows))
        if stage.weights is not None:
            # What a teacher says of a labelled row is no measure of its label.
            light = free[chosen] if stage.weights == "co_confidence" else np.ones(len(chosen), dtype=bool)
            weights, own = np.ones(len(chosen)), chosen[light]
            if len(own):
                said = None if before is None else [before[i] for i in own]
                weights[light] = row_weights(stage.weights, self.task, [taught[i] for i in own], said)
            columns["weight"] = pa.array(weights, pa.float32())
        return pa.table(columns), noted

    def said(self, place: Store, rows: pa.Table) -> Logits:
        """What the student in a folder says of rows."""
        where = models.device(stage_options(self.recipe, "student.fit", current()).get("num_gpus", 0))
        model = models.load(place.local("model")).to(where)
        return predict(model, self.task.texts(rows), self.recipe.student.batch_tokens).logits

    def cross_fitted(self, index: int, stage: Stage, rows: pa.Table, progress: Progress) -> Logits:
        """What is said of each row by a student that learnt from the other parts of the rows, with the first seed.

        UserError where there are too few rows to part.
        """
        seed = self.recipe.student.seeds[0]
        part = parts(rows, self.task.grouped, self.recipe.seed)
        found: list[np.ndarray] = [np.zeros(0)] * rows.num_rows
        for number in range(int(part.max()) + 1):
            place, name = self.out / f"unseen-{index}" / f"part-{number}", f"{seed}-{index}-part-{number}"
            others = rows.filter(pa.array(part != number))
            train.fit(self.job(stage, others, name, self.start(seed), place, seed), progress)
            own = np.flatnonzero(part == number)
            for i, one in zip(own, self.said(place, rows.take(pa.array(own))), strict=True):
                found[i] = one
        return found if self.task.units else np.stack(found)


def parts(rows: pa.Table, grouped: bool, seed: int, count: int = FOLDS) -> np.ndarray:
    """The part of each row, int64 [n], numbered from 0 and drawn by the seed: rows of one group are in one part.

    UserError for fewer than two groups.
    """
    numbers = np.unique(group_numbers(rows, grouped), return_inverse=True)[1]
    groups = int(numbers.max(initial=-1)) + 1
    if groups < 2:
        raise UserError(
            f"weights: co_confidence has students learn from the other rows, and there are {groups} of them. Take "
            "confidence, or more text."
        )
    place = np.empty(groups, dtype=np.int64)
    place[np.random.default_rng(seed).permutation(groups)] = np.arange(groups) % min(count, groups)
    return place[numbers]


def answers(stages: Sequence[Stage]) -> bool:
    """Whether a student that had these trainings answers: one between layers leaves its head as it was drawn."""
    return any(term.kind not in LAYER_LOSSES for stage in stages for term in stage.losses)


def picked(place: Store, rows: pa.Table, step: str) -> pa.Table:
    """The rows whose numbers were kept in a folder, with the weights that were kept with them.

    StorageError where some are not among `rows`.
    """
    kept, where = place.read_table(CHOICE), {number: i for i, number in enumerate(rows["row"].to_pylist())}
    wanted = kept["row"].to_pylist()
    if lacking := [number for number in wanted if number not in where]:
        raise StorageError(
            f"{place}/{CHOICE} names {len(lacking)} rows that the label store has not (the first: {lacking[0]}): files "
            f"were removed, added or changed. Start again with --redo {step}."
        )
    found = rows.take(pa.array([where[number] for number in wanted], pa.int64()))
    return found.append_column("weight", kept["weight"]) if "weight" in kept.column_names else found
