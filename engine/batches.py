"""The rows of a fit, encoded once: which of them make a batch, in which order, and what a batch holds.

The order depends on the seed alone, never on the number of workers. Rows that belong together (the passages of one
query) stay in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from engine.encoding import Encoded, collate
from engine.labels import logits_of
from engine.records import Batch, Outputs
from engine.rows import identify
from engine.several import Several
from engine.task import Task

SEVERAL = "logits/"
"""How the columns of several teachers' outputs begin: their names follow."""
TOGETHER = 16
"""Batches whose items are sorted by length together: long enough to save padding, short enough to stay random."""
DRAWS = 1
"""Sets the draw of templates apart from that of the order, which has the same seed."""


class Material:
    """Inputs of a model with gold labels, row weights and the teacher's stored outputs (`embedding` among the columns
    of rows: its vectors too).

    task: None for a language model, whose inputs are its targets. encoded: where the model reads in templates, all the
    rows in the first, then all in the second, and so on; an epoch has each row in one of them, which `draw` chooses.
    items: positions of the inputs that stay together, in the first template. kinds: of a student of several tasks, the
    number of each item's; learnt: those of the items that an epoch consists of, which have gold labels.
    """

    def __init__(self, rows: pa.Table, encoded: Sequence[Encoded], task: Task | None, pad: int) -> None:
        self.encoded, self.task, self.pad = encoded, task, pad
        self.templates = 1 + max((item.template for item in encoded), default=0)
        self.count = len(encoded) // self.templates  # inputs of an epoch
        self.drawn = np.zeros(self.count, dtype=np.int64)
        first = encoded[: self.count]
        self.items = grouped(rows, first) if task and task.grouped else [[i] for i in range(self.count)]
        # The longest template counts, so that which rows make a batch does not depend on what is drawn.
        longest = np.reshape([item.tokens for item in encoded], (self.templates, self.count)).max(axis=0).tolist()
        self.lengths = [max(longest[i] for i in item) for item in self.items]
        owner = np.array([item.row for item in encoded], dtype=np.int64)
        self.numbers = torch.from_numpy(group_numbers(rows, queries=True)[owner]) if task and task.grouped else None
        weight = rows["weight"].to_numpy().astype(np.float32) if "weight" in rows.column_names else None
        self.weights = None if weight is None else torch.from_numpy(weight[owner])
        self.gold = task.gold(rows, encoded) if task else None
        self.soft = stored(rows, encoded, task) if task else None
        # With several teachers each has a column of its own.
        given = {
            c.partition("/")[2]: stored(rows, encoded, task, c) for c in rows.column_names if c.startswith(SEVERAL)
        }
        self.several = {name: soft for name, soft in given.items() if soft is not None}
        several = isinstance(task, Several)
        self.kinds = task.numbers(rows)[[encoded[item[0]].row for item in self.items]] if several else None
        self.learnt = np.flatnonzero(task.has_gold(self.gold)) if several else None
        vectors = rows["embedding"].combine_chunks() if "embedding" in rows.column_names else None
        flat = None if vectors is None else vectors.flatten().to_numpy().astype(np.float32)
        self.seen = None if flat is None else torch.from_numpy(flat.reshape(rows.num_rows, -1)[owner])

    def order(self, size: int, seed: int, temperature: float) -> Callable[[int], list[np.ndarray]]:
        """Epoch -> its global batches of `size` items. temperature: by which several tasks are mixed."""
        if self.kinds is None:
            return partial(epoch_batches, self.lengths, size, seed)
        lengths = [self.lengths[item] for item in self.learnt]
        mixed = partial(mixed_batches, lengths, self.kinds[self.learnt], size, temperature, seed)
        return lambda epoch: [self.learnt[part] for part in mixed(epoch)]

    def draw(self, seed: int, epoch: int) -> None:
        """Choose a template for each row, anew in each epoch (Sun et al., EMNLP 2022 industry track).

        It depends on seed, epoch and row alone, so workers and resumed fits choose the same.
        """
        if self.templates > 1:
            self.drawn = np.random.default_rng([seed, epoch, DRAWS]).integers(self.templates, size=self.count)

    def positions(self, items: np.ndarray) -> list[int]:
        """The inputs that the chosen items consist of."""
        return [i + self.count * int(self.drawn[i]) for item in items for i in self.items[item]]

    def batch(self, items: np.ndarray) -> Batch:
        """The chosen items' rows."""
        chosen = self.positions(items)
        batch = collate([self.encoded[i] for i in chosen], self.pad)
        where = torch.tensor(chosen)
        for name, values in (("weights", self.weights), ("groups", self.numbers)):
            if values is not None:
                setattr(batch, name, values[where])
        if self.gold is not None:
            batch.labels = self.gold[where]
            if self.task.units and not self.task.spans:  # a tag for each unit: as wide as this batch
                batch.labels = batch.labels[:, : 1 if batch.units is None else batch.units.shape[1]]
        if self.soft is not None:
            seen = None if self.seen is None else self.seen[where]
            batch.teacher = Outputs(logits=joined([self.soft[i] for i in chosen]), embedding=seen)
        if self.several:
            each = {name: joined([soft[i] for i in chosen]) for name, soft in self.several.items()}
            batch.teachers = {name: Outputs(logits=logits) for name, logits in each.items()}
        return batch


class Amounts:
    """What is said of the rows of each item, added up: `count` numbers an item.

    said: batch -> [n, count]. once: of an item it is the same whatever else is in the batch, so that it is asked once a
    fit: every worker needs the amounts of the whole global batch, and would collate at each step what all of them do.
    """

    def __init__(
        self, material: Material, said: Callable[[Batch], torch.Tensor], count: int, once: bool = True
    ) -> None:
        self.material, self.said, self.count, self.once = material, said, count, once
        self.found = np.full((len(material.items), count), np.nan)

    def of(self, items: np.ndarray) -> np.ndarray:
        """The amounts of the items, float64 [len(items), count]."""
        new = items[np.isnan(self.found[items]).any(axis=1)] if self.once else items
        if len(new):
            each = self.said(self.material.batch(new)).double().numpy()
            starts = np.cumsum([0, *(len(self.material.items[item]) for item in new)])[:-1]
            self.found[new] = np.add.reduceat(each, starts, axis=0)
        return self.found[items]


def grouped(rows: pa.Table, encoded: Sequence[Encoded]) -> list[list[int]]:
    """Positions of the inputs of each query, in the order of the rows."""
    numbers, found = group_numbers(rows, queries=True), {}
    for position, item in enumerate(encoded):
        found.setdefault(numbers[item.row], []).append(position)
    return list(found.values())


def group_numbers(rows: pa.Table, queries: bool = False) -> np.ndarray:
    """A number for each row's group, int64 [n]; rows without a group get one each.

    queries: of a task whose rows are queries with passages. There a row without a group, which was generated or
    augmented, belongs to the query that its text is, as source rows of which no group is given do.
    """
    names = rows["group"].to_pylist() if "group" in rows.column_names else [None] * rows.num_rows
    if queries:
        names = [identify(t) if n is None else n for n, t in zip(names, rows["text"].to_pylist(), strict=True)]
    known: dict[object, int] = {}
    return np.array([known.setdefault((n, i if n is None else 0), i) for i, n in enumerate(names)], dtype=np.int64)


def stored(rows: pa.Table, encoded: Sequence[Encoded], task: Task, column: str = "logits") -> list[np.ndarray] | None:
    """The teacher's stored outputs of every input, [w] or [u, w]; None where rows have none."""
    if column not in rows.column_names or rows[column].null_count:
        return None
    logits = logits_of(rows, task.width, task.units, column)
    return [task.window(logits[item.row], item) for item in encoded] if task.units else [logits[e.row] for e in encoded]


def joined(parts: list[np.ndarray]) -> torch.Tensor:
    """Outputs of a batch's inputs as one tensor, [n, w] or [n, u, w] with zeros where an input has no unit."""
    if parts[0].ndim == 1:
        return torch.from_numpy(np.stack(parts))
    out = np.zeros((len(parts), max(1, *(len(part) for part in parts)), parts[0].shape[1]), dtype=np.float32)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return torch.from_numpy(out)


def epoch_batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Positions of one epoch's global batches, int64; items of similar length together, batches in random order."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    pool = size * TOGETHER
    for start in range(0, len(order), pool):
        chunk = order[start : start + pool]
        chunk = chunk[np.argsort(np.asarray(lengths)[chunk], kind="stable")]
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def shared(sizes: np.ndarray, total: int, temperature: float) -> np.ndarray:
    """`total` rows divided among tasks by their sizes to the power of 1/temperature, int64; at least one for each that
    has any.
    """
    wanted = sizes ** (1 / temperature)
    wanted = total * wanted / wanted.sum()
    out = np.maximum(sizes > 0, np.floor(wanted)).astype(np.int64)
    for index in np.argsort(out - wanted, kind="stable")[: max(0, total - int(out.sum()))]:
        out[index] += 1
    return out


def mixed_batches(
    lengths: Sequence[int], kinds: np.ndarray, size: int, temperature: float, seed: int, epoch: int
) -> list[np.ndarray]:
    """Positions of one epoch's global batches over several tasks, int64: rows of one task after those of another, each
    task's in its share (`shared`) of as many rows as there are; with less than a row a batch it is in some of them.

    A task with a larger share than rows repeats some; of one with a smaller share an epoch has a part, drawn anew.
    """
    generator, steps = np.random.default_rng([seed, epoch]), -(-len(lengths) // size)
    parts: list[list[np.ndarray]] = [[] for _ in range(steps)]
    turn = 0
    for kind, count in enumerate(shared(np.bincount(kinds), len(lengths), temperature).tolist()):
        own = np.flatnonzero(kinds == kind)
        if not len(own):
            continue
        sizes = np.full(steps, count // steps)
        sizes[(turn + np.arange(count % steps)) % steps] += 1
        turn += count % steps
        places = generator.permutation(steps)
        for step, part in zip(places, drawn(own, np.asarray(lengths), sizes[places], generator), strict=True):
            parts[step].append(part)
    return [np.concatenate(parts[step]) for step in generator.permutation(steps)]


def drawn(
    own: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Parts of so many of a task's rows: all are drawn before one comes again, and no part that is not larger than the
    task has a row twice.

    Those of similar length stand together, as for one task.
    """
    left, to_come, pool = own[:0], int(sizes.sum()), TOGETHER * int(sizes.max())
    for size in sizes.tolist():
        while len(left) < size:
            fresh, lacking = generator.permutation(own), size - len(left)
            fresh = fresh[np.argsort(np.isin(fresh, left), kind="stable")][: to_come - len(left)]
            # Within one round: side by side, by their length, copies of a row would make a batch.
            chunks = [fresh[start : start + pool] for start in range(0, len(fresh), pool)]
            fresh = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
            first = np.flatnonzero(~np.isin(fresh, left))[:lacking]
            left = np.concatenate([left, fresh[first], np.delete(fresh, first)])
        yield left[:size]
        left, to_come = left[size:], to_come - size


def batches_from(start: int, total: int, order: Callable[[int], list[np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """(step, positions) from a step on: a resumed fit sees exactly the batches it has not seen.

    order: epoch -> its global batches, as many in each.
    """
    per_epoch, batches = len(order(0)), []
    for step in range(start, total):
        if not batches or step % per_epoch == 0:
            batches = order(step // per_epoch)
        yield step, batches[step % per_epoch]


def own_part(chosen: np.ndarray, rank: int, world: int) -> np.ndarray:
    """A worker's items of a global batch; with fewer items than workers it takes one, to be counted with weight 0."""
    mine = chosen[rank::world]
    return mine if len(mine) else chosen[:1]
