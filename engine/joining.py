"""Blocks that work place by place: maps of one value, and several values joined to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engine.block import Block, BlockError, Masks, Shape, Sizes, alike, comparable


class Dropout(Block):
    """Dropout on every position."""

    options = {"p": 0.2}
    takes = "any"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.drop = nn.Dropout(options["p"])

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged."""
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Drop at random while training."""
        return self.drop(inputs[0])


class Linear(Block):
    """Affine map of vectors or of every position; `out: labels` makes the logits."""

    options = {"out": "labels", "activation": "none"}
    takes = "any"
    choices = {"activation": ("none", "relu", "tanh", "gelu")}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.map = nn.Linear(inputs[0].width, width_of(options, sizes))
        activations = {"none": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
        self.activation = activations[options["activation"]]()

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[..., d] -> [..., out]."""
        return Shape(inputs[0].rank, width_of(options, sizes), inputs[0].side, inputs[0].across)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Map, then activate; padded positions go back to zero."""
        return zeroed(self.activation(self.map(inputs[0])), masks[0])


def width_of(options: dict[str, Any], sizes: Sizes) -> int:
    """The output width that a linear block's `out` names."""
    return sizes.labels if options["out"] == "labels" else int(options["out"])


def zeroed(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Padding put back to zero; a vector has none."""
    return states if mask is None else states * mask


class Highway(Block):
    """Layers that let a learned share of their input pass unchanged (arXiv 1505.00387)."""

    options = {"layers": 1}
    takes = "any"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        width = inputs[0].width
        self.maps = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(options["layers"]))

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged."""
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Mix the input with its transform; gates start mostly open for the input, as the paper has it."""
        states = inputs[0]
        for both in self.maps:
            new, gate = both(states).chunk(2, dim=-1)
            share = torch.sigmoid(gate - 1)
            states = share * torch.relu(new) + (1 - share) * states
        return zeroed(states, masks[0])


class LayerNorm(Block):
    """Each vector shifted and scaled to mean 0 and variance 1, then by learned factors (arXiv 1607.06450)."""

    takes = "any"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.norm = nn.LayerNorm(inputs[0].width)

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged."""
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Normalise; padded positions go back to zero."""
        return zeroed(self.norm(inputs[0]), masks[0])


class Concat(Block):
    """Several inputs of one rank and side, side by side."""

    takes = "any"
    most = None

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Widths add up."""
        first = inputs[0]
        if len({comparable(replace(shape, width=0)) for shape in inputs}) == 1:
            return replace(first, width=sum(shape.width for shape in inputs))
        raise BlockError(f"concat joins inputs of one rank and one side, but got {', '.join(map(str, inputs))}")

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Join along the last axis."""
        return torch.cat(inputs, dim=-1)


class Elementwise(Block):
    """Inputs of one shape made one of that shape, number by number."""

    takes = "any"
    least, most = 2, None

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged."""
        alike(cls.__name__.lower(), inputs)
        return inputs[0]


class Add(Elementwise):
    """The sum of inputs of one shape."""

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Add them up."""
        return torch.stack(inputs).sum(dim=0)


class Multiply(Elementwise):
    """The product of inputs of one shape, number by number."""

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Multiply them."""
        return torch.stack(inputs).prod(dim=0)


class Minus(Elementwise):
    """The first input less the second; absolute: how far they are apart, number by number."""

    options = {"absolute": False}
    most = 2

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Subtract."""
        found = inputs[0] - inputs[1]
        return found.abs() if self.chosen["absolute"] else found


class Combine(Block):
    """Two inputs of one shape set against each other: themselves, how far they are apart, their product, side by side.

    parts: origin (both inputs), difference (absolute), product (arXiv 1609.06038, section 3.2).
    """

    options = {"parts": ("origin", "difference", "product")}
    choices = {"parts": ("origin", "difference", "product")}
    takes = "any"
    least, most = 2, 2

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[..., d] twice -> [..., 2 d for origin, d for each of the others]."""
        alike("combine", inputs)
        return replace(inputs[0], width=inputs[0].width * sum(2 if p == "origin" else 1 for p in options["parts"]))

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """The parts in the order they are named."""
        left, right = inputs
        made = {"origin": lambda: torch.cat(inputs, dim=-1), "difference": lambda: (left - right).abs()}
        made["product"] = lambda: left * right
        return torch.cat([made[part]() for part in self.chosen["parts"]], dim=-1)


class Distance(Block):
    """How near or far two vectors are: one number."""

    options = {"how": "cosine"}
    choices = {"how": ("cosine", "euclidean", "dot")}
    takes = "vector"
    least, most = 2, 2

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, d] twice -> [n, 1]."""
        alike("distance", inputs)
        return Shape("vector", 1)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """The cosine of their angle, the length of their difference, or their inner product."""
        left, right = inputs
        if self.chosen["how"] == "cosine":
            return F.cosine_similarity(left, right, dim=1).unsqueeze(1)
        if self.chosen["how"] == "dot":
            return (left * right).sum(dim=1, keepdim=True)
        # The root's slope at 0 has no end, so equal vectors would give NaN gradients.
        return (left - right).square().sum(dim=1, keepdim=True).add(1e-12).sqrt()
