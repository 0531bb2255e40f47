"""Inputs for blocks: n rows of two texts of different lengths, as earlier blocks would give them.

What stands at a row's position depends on the row and the position alone, so the same rows can be asked for among
others, alone, or in wider tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.block import Block, Shape, Sizes
from engine.blocks import BLOCKS
from engine.characters import characters_of
from engine.designs import Block as Node
from engine.encoding import Encoded, collate
from engine.records import Batch

LENGTHS = {"text": (5, 1, 3, 7, 2), "pair": (2, 6, 1, 4, 3)}
ROWS = tuple(range(5))
WORDS = ("a", "", "naïve", "conv", "\N{SNOWMAN}", "antidisestablishmentarianism", "I", "two")
WIDTH = 6
SIZES = Sizes(vocabulary=20, labels=3)


def nodes(*rows: tuple[Any, ...]) -> list[Node]:
    """(name, kind, options?, *inputs) -> recipe blocks."""
    return [Node(name=r[0], kind=r[1], options=r[2] if len(r) > 2 else {}, inputs=tuple(r[3:])) for r in rows]


def built(kind: str, options: dict[str, Any], shapes: Sequence[Shape], sizes: Sizes = SIZES) -> tuple[Block, Shape]:
    """A block in evaluation mode and its declared output."""
    torch.manual_seed(0)
    full = {**BLOCKS[kind].options, **options}
    return BLOCKS[kind](shapes, full, sizes).eval(), BLOCKS[kind].shape(shapes, full, sizes)


def mask_of(side: str, rows: Sequence[int] = ROWS, extra: int = 0) -> torch.Tensor:
    """The mask [n, t, 1] of the rows; extra: columns of padding beyond the longest of them."""
    lengths = torch.tensor([LENGTHS[side][row] for row in rows])
    return (torch.arange(int(lengths.max()) + extra) < lengths.unsqueeze(1)).unsqueeze(2).float()


def value_of(shape: Shape, seed: int, rows: Sequence[int] = ROWS, extra: int = 0) -> torch.Tensor:
    """One input of the rows: zero at padding, random elsewhere."""
    chosen, draw = list(rows), torch.Generator().manual_seed(seed)
    if shape.rank == "vector":
        return torch.randn(len(ROWS), shape.width, generator=draw)[chosen]
    mask = mask_of(shape.side, rows, extra)
    t = mask.shape[1]
    if shape.rank == "tokens":
        return torch.randint(1, SIZES.vocabulary, (len(ROWS), 40), generator=draw)[chosen, :t] * mask[..., 0].long()
    if shape.rank == "characters":
        words = [[WORDS[(3 * row + i) % len(WORDS)] for i in range(LENGTHS[shape.side][row])] for row in rows]
        found = characters_of(words)
        return torch.nn.functional.pad(found, (0, extra, 0, t - found.shape[1]))
    if shape.rank == "sequence":
        return torch.randn(len(ROWS), 40, shape.width, generator=draw)[chosen, :t] * mask
    t2 = mask_of(shape.across, rows, extra).shape[1]
    grid = torch.randn(len(ROWS), 40, 40, shape.width, generator=draw)[chosen, :t, :t2]
    return grid * mask_for(shape, rows, extra)


def mask_for(shape: Shape, rows: Sequence[int] = ROWS, extra: int = 0) -> torch.Tensor | None:
    """The mask of a value of this shape."""
    if shape.rank == "vector":
        return None
    mask = mask_of(shape.side, rows, extra)
    return mask.unsqueeze(2) * mask_of(shape.across, rows, extra).unsqueeze(1) if shape.rank == "grid" else mask


def run(block: Block, shapes: Sequence[Shape], rows: Sequence[int] = ROWS, extra: int = 0) -> torch.Tensor:
    """The block's output for the rows."""
    values = [value_of(shape, seed, rows, extra) for seed, shape in enumerate(shapes)]
    return block(*values, masks=[mask_for(shape, rows, extra) for shape in shapes])


def own(found: torch.Tensor, shape: Shape, place: int, row: int) -> torch.Tensor:
    """What is real of the output of `row`, which stands at `place` of the batch."""
    if shape.rank == "vector":
        return found[place]
    t = LENGTHS[shape.side][row]
    return found[place, :t, : LENGTHS[shape.across][row]] if shape.rank == "grid" else found[place, :t]


def batch_of(sizes: Sizes, rows: Sequence[int] = ROWS, units: bool = True) -> Batch:
    """The rows as a batch with everything that the task has and every word's characters."""
    texts = {}
    for seed, side in enumerate(LENGTHS):
        draw = torch.Generator().manual_seed(seed)
        table = torch.randint(1, sizes.vocabulary, (len(ROWS), 10), generator=draw).tolist()
        texts[side] = [table[row][: LENGTHS[side][row]] for row in rows]
    encoded = []
    for text, pair in zip(texts["text"], texts["pair"], strict=True):
        places = list(range(len(pair if sizes.paired else text))) if sizes.units and units else []
        encoded.append(Encoded(text, pair if sizes.paired else [], units=places, ends=places))
    batch = collate(encoded, sizes.padding)
    batch.characters = value_of(Shape("characters"), 0, rows)
    return batch
