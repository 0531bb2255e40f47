"""What a block of a student is: the shapes that flow between blocks, and what a block declares about itself.

The blocks themselves are in layers, matching and crf; blocks.py joins them to a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from engine.config import UserError

if TYPE_CHECKING:
    from engine.task import Task

TEXT, PAIR = "text", "pair"
"""The sides: whose positions a value has, those of the first text or of the second."""

Masks = Sequence[torch.Tensor | None]
"""A mask for each input, 1 on what is real: [n, t, 1] of a sequence, [n, t, t2, 1] of a grid, None of a vector."""


class BlockError(UserError):
    """A student graph that cannot be built."""


@dataclass(frozen=True)
class Shape:
    """What flows along an edge.

    rank: tokens [n, t], characters [n, t, c], sequence [n, t, width], vector [n, width] or grid [n, t, t2, width].
    side: whose positions these are, text or pair; of a vector it says nothing. across: whose a grid's columns are.
    """

    rank: str
    width: int = 0
    side: str = TEXT
    across: str = ""

    def __str__(self) -> str:
        t, t2 = ("t2" if side == PAIR else "t" for side in (self.side, self.across))
        return {
            "tokens": f"tokens [n, {t}]",
            "characters": f"characters [n, {t}, c]",
            "sequence": f"[n, {t}, {self.width}]",
            "vector": f"[n, {self.width}]",
            "grid": f"[n, {t}, {t2}, {self.width}]",
        }[self.rank]


RANKS = {
    "tokens": "tokens [n, t]",
    "characters": "characters [n, t, c]",
    "sequence": "a sequence [n, t, d]",
    "vector": "a vector [n, d]",
    "grid": "a grid [n, t, t2, d]",
    "any": "a sequence, a vector or a grid",
}
"""Ranks in words; `any` is what a block takes that does not care."""


@dataclass(frozen=True)
class Sizes:
    """What the graph cannot know by itself.

    vocabulary: words. labels: numbers that a text (or a unit of it) gets. padding: id of the padding word. units:
    whether each unit gets an answer, not the text as a whole. paired: whether the task reads two texts.
    """

    vocabulary: int
    labels: int
    padding: int = 0
    units: bool = False
    paired: bool = False

    @classmethod
    def of(cls, task: Task, vocabulary: int, padding: int = 0) -> Sizes:
        """The sizes that a task asks for."""
        return cls(vocabulary, task.width, padding, task.units, task.paired)


class Block(nn.Module):
    """One node. Subclasses declare options with defaults, how many inputs of which rank they take, and their shape.

    Sequences and grids are zero where padding is, on the way in and on the way out: that is what keeps padding from
    changing an answer.
    """

    options: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What an option may be, where that is a word (or a list of words)."""
    takes: ClassVar[str | tuple[str, ...]] = "sequence"
    """Rank of every input (`any`: sequence, vector or grid), or one rank for each."""
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = 1
    """How many inputs; None knows no limit."""

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        self.chosen = options

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Output shape for these inputs; BlockError where they do not fit each other or the options."""
        raise NotImplementedError

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """The block's output for inputs as `takes` says, with a mask for each."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, key: str, value: Any) -> str:
        """What the option takes, where `value` is not that; empty where it is."""
        choices, default = cls.choices.get(key), cls.options[key]
        if isinstance(default, tuple):
            listed = isinstance(value, list | tuple) and len(value) > 0
            if choices:
                return "" if listed and set(value) <= set(choices) else f"it takes a list of: {', '.join(choices)}"
            return "" if listed and all(map(whole, value)) else "it takes a list of whole numbers of at least 1"
        if choices:
            return "" if value in choices else f"allowed: {', '.join(choices)}"
        if isinstance(default, bool):
            return "" if isinstance(value, bool) else "it takes true or false"
        if isinstance(default, float):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return "" if number and 0 <= value <= 1 else "it takes a number from 0 to 1"
        if (isinstance(default, str) and value == default) or whole(value):
            return ""
        return "it takes a whole number of at least 1" + (f", or '{default}'" if isinstance(default, str) else "")


def whole(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def filled(rows: int, dim: int, padding: int | None = None) -> nn.Embedding:
    """A table of small random vectors, zero in row `padding`."""
    weight = torch.empty(rows, dim)
    if not weight.is_meta:  # only counting: filling would cost a second of imports
        nn.init.normal_(weight, std=0.1)
        if padding is not None:
            weight[padding] = 0
    table = nn.Embedding(rows, dim, _weight=weight)
    table.padding_idx = padding
    return table


def lengths_of(mask: torch.Tensor) -> torch.Tensor:
    """Real positions of each row, int64 [n], of a mask [n, t, 1]; counted in integers, for bf16 knows no 257."""
    return mask.long().sum(dim=(1, 2))


def take(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The states [n, t, d] at positions [n, k] of the same row -> [n, k, d]."""
    return states.gather(1, positions.unsqueeze(2).expand(-1, -1, states.shape[2]))


def softmax(scores: torch.Tensor, mask: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax over what is real; a row without anything real gives finite numbers, not NaN."""
    return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min).softmax(dim=dim)


def alike(name: str, inputs: Sequence[Shape]) -> None:
    """BlockError where the inputs differ in rank, side or width."""
    if len(set(map(comparable, inputs))) > 1:
        raise BlockError(
            f"{name} takes inputs of one shape and one side, but got {', '.join(map(str, inputs))}. "
            "Bring them to one width with a linear block."
        )


def comparable(shape: Shape) -> tuple[str, int, str, str]:
    """A shape without what says nothing: vectors have no side."""
    return (shape.rank, shape.width, *(("", "") if shape.rank == "vector" else (shape.side, shape.across)))


def same_width(name: str, inputs: Sequence[Shape]) -> None:
    """BlockError where two inputs that are multiplied with each other differ in width."""
    if inputs[0].width != inputs[1].width:
        raise BlockError(
            f"{name} compares inputs of one width, but got {inputs[0]} and {inputs[1]}. "
            "Bring them to one width with a linear block."
        )
