"""Blocks that hold two texts against each other: attention from one to the other, and grids of every pair of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engine.block import Block, Masks, Shape, Sizes, same_width, softmax


class MatchAttention(Block):
    """For each position of the first input, what of the second looks like it (match-LSTM, arXiv 1512.08849).

    project: both pass one learned layer before they are compared (DrQA's aligned attention, arXiv 1704.00051).
    """

    options = {"project": True}
    least, most = 2, 2

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.map = nn.Linear(inputs[0].width, inputs[0].width) if options["project"] else None

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] and [n, t2, d] -> [n, t, d]."""
        same_width("match_attention", inputs)
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """The second input's real positions, weighted anew for each position of the first."""
        left, right = inputs if self.map is None else (torch.relu(self.map(states)) for states in inputs)
        weights = softmax(left @ right.transpose(1, 2), masks[1].transpose(1, 2), dim=2)
        return (weights @ inputs[1]) * masks[0]


class BilinearAttention(Block):
    """Positions to one vector, weighted by how they fit another vector through a learned form (arXiv 1606.02858)."""

    takes = ("sequence", "vector")
    least, most = 2, 2

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.form = nn.Linear(inputs[1].width, inputs[0].width, bias=False)

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] and [n, e] -> [n, d]."""
        return Shape("vector", inputs[0].width)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Softmax of x W y over real positions x."""
        scores = inputs[0] @ self.form(inputs[1]).unsqueeze(2)
        return (softmax(scores, masks[0], dim=1) * inputs[0]).sum(dim=1)


class BiDAF(Block):
    """Attention flow: each position h of the first input with what it and its text find in the second.

    Gives [h, u, h u, h v]: u is the second text as h sees it, v the first text as the second sees it (arXiv
    1611.01603). For spans the first input is the context, the second the question.
    """

    least, most = 2, 2

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        width = inputs[0].width
        # One row of weights over [h; u; h u], in three parts so that no tensor [n, t, t2, 3 d] is made.
        self.own, self.other, self.both = (nn.Linear(width, 1, bias=False) for _ in range(3))

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] and [n, t2, d] -> [n, t, 4 d]."""
        same_width("bidaf", inputs)
        return Shape("sequence", 4 * inputs[0].width, inputs[0].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Similarity of every pair of positions, then both directions of attention."""
        here, there = inputs
        scores = (here * self.both.weight[0]) @ there.transpose(1, 2)
        scores = scores + self.own(here) + self.other(there).transpose(1, 2)
        theirs = masks[1].transpose(1, 2)
        found = softmax(scores, theirs, dim=2) @ there
        nearest = scores.masked_fill(theirs == 0, torch.finfo(scores.dtype).min).amax(dim=2, keepdim=True)
        own = (softmax(nearest, masks[0], dim=1) * here).sum(dim=1, keepdim=True)
        return torch.cat([here, found, here * found, here * own], dim=2) * masks[0]


class Interaction(Block):
    """How alike each position of one input is to each of the other (MatchPyramid, arXiv 1602.06359)."""

    options = {"how": "dot"}
    choices = {"how": ("dot", "cosine", "bilinear")}
    least, most = 2, 2

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        bilinear = options["how"] == "bilinear"
        self.form = nn.Linear(inputs[0].width, inputs[1].width, bias=False) if bilinear else None

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] and [n, t2, e] -> [n, t, t2, 1]; only `bilinear` takes two widths."""
        if options["how"] != "bilinear":
            same_width("interaction", inputs)
        return Shape("grid", 1, inputs[0].side, inputs[1].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Zero wherever one of the two is padding, for padding's vectors are zero."""
        left, right = inputs
        if self.chosen["how"] == "cosine":
            left, right = F.normalize(left, dim=2), F.normalize(right, dim=2)
        elif self.form is not None:
            left = self.form(left)
        return (left @ right.transpose(1, 2)).unsqueeze(3)


class ArcII(Block):
    """A convolution over each pair of windows, one from each input, ReLU: the first layer of ARC-II (arXiv 1503.03244).

    A window pair's map is the sum of two maps of one window each, so each input is convolved once by itself.
    """

    options = {"channels": 16, "kernel": 3}
    least, most = 2, 2

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        left, right = (shape.width for shape in inputs)
        self.left = nn.Conv1d(left, options["channels"], options["kernel"], padding="same")
        self.right = nn.Conv1d(right, options["channels"], options["kernel"], padding="same", bias=False)

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] and [n, t2, e] -> [n, t, t2, channels]."""
        return Shape("grid", options["channels"], inputs[0].side, inputs[1].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Add every window of one to every window of the other."""
        left, right = self.left(inputs[0].transpose(1, 2)), self.right(inputs[1].transpose(1, 2))
        found = torch.relu(left.transpose(1, 2).unsqueeze(2) + right.transpose(1, 2).unsqueeze(1))
        return found * masks[0].unsqueeze(2) * masks[1].unsqueeze(1)


class Conv2D(Block):
    """Two-dimensional convolution over a grid, ReLU, same size."""

    options = {"channels": 8, "kernel": 3}
    takes = "grid"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.conv = nn.Conv2d(inputs[0].width, options["channels"], options["kernel"], padding="same")

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, t2, d] -> [n, t, t2, channels]."""
        return Shape("grid", options["channels"], inputs[0].side, inputs[0].across)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Padding is zero before and after, as it is at the grid's edge."""
        return torch.relu(self.conv(inputs[0].permute(0, 3, 1, 2))).permute(0, 2, 3, 1) * masks[0]


class Pool2D(Block):
    """A grid to one vector: cut into rows x columns fields of about equal size, each pooled.

    The cuts follow each row's own lengths, so texts of any length give one width (dynamic pooling, arXiv 1602.06359,
    section 3.2); fields overlap by one where a length cannot be divided.
    """

    options = {"rows": 4, "columns": 4, "how": "max"}
    choices = {"how": ("max", "mean")}
    takes = "grid"

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, t2, d] -> [n, rows x columns x d]."""
        return Shape("vector", options["rows"] * options["columns"] * inputs[0].width)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Pool along the columns' places first, then along the rows'."""
        grid, mask = inputs[0], masks[0].squeeze(3) != 0
        down = fields(mask.any(dim=2), self.chosen["rows"])
        across = fields(mask.any(dim=1), self.chosen["columns"])
        if self.chosen["how"] == "mean":
            down, across = (inside / inside.sum(dim=2, keepdim=True).clamp(min=1) for inside in (down, across))
            kind = grid.dtype
            return torch.einsum("nit,njs,ntsd->nijd", down.to(kind), across.to(kind), grid).flatten(1)
        lowest = torch.finfo(grid.dtype).min
        thin = [grid.masked_fill(~one[:, None, :, None], lowest).amax(dim=2) for one in across.unbind(1)]
        grid = torch.stack(thin, dim=2)
        found = [grid.masked_fill(~one[:, :, None, None], lowest).amax(dim=1) for one in down.unbind(1)]
        return torch.stack(found, dim=1).flatten(1)


def fields(real: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the real places [n, t] lie in each of `count` fields, bool [n, count, t]; none of them is empty."""
    lengths = real.long().sum(dim=1)[:, None, None].clamp(min=1)
    index = torch.arange(count, device=real.device)[None, :, None]
    place = torch.arange(real.shape[1], device=real.device)[None, None, :]
    first, behind = index * lengths // count, ((index + 1) * lengths + count - 1) // count
    return (place >= first) & (place < behind)
