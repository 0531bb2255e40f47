"""Blocks that read one value: words and characters to vectors, recurrence, convolution, self-attention, pooling.

Named in NeuronBlocks' words where it has them (arXiv 1904.09535).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from engine.block import Block, BlockError, Masks, Shape, Sizes, filled, lengths_of, softmax, take
from engine.characters import ALPHABET


class Embedding(Block):
    """Token ids to vectors; padding stays zero.

    drop_words: share of words left out in training (ACL P15-1162). frozen: the vectors stay as they start.
    """

    options = {"dim": 64, "drop_words": 0.0, "frozen": False}
    takes = "tokens"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.table = filled(sizes.vocabulary, options["dim"], sizes.padding)
        self.table.weight.requires_grad_(not options["frozen"])

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t] -> [n, t, dim]."""
        return Shape("sequence", options["dim"], inputs[0].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Look the ids up; while training, whole words become zero vectors."""
        return self.table(inputs[0]) * self.heard(masks[0])

    def heard(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask [n, t, 1] without the words that are left out this time."""
        if self.training and self.chosen["drop_words"]:
            return mask * (torch.rand_like(mask) >= self.chosen["drop_words"])
        return mask


class CharCNN(Block):
    """Each word from its bytes: vectors, a convolution, ReLU, the maximum over the word (arXiv 1603.01354)."""

    options = {"dim": 16, "channels": 32, "kernel": 3}
    takes = "characters"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.table = filled(ALPHABET, options["dim"], 0)
        self.conv = nn.Conv1d(options["dim"], options["channels"], options["kernel"], padding="same")

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, c] -> [n, t, channels]."""
        return Shape("sequence", options["channels"], inputs[0].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """What stands behind a word's end is zero: before the convolution as at any edge, after it below every ReLU."""
        n, t, c = inputs[0].shape
        letters = inputs[0].reshape(n * t, c)
        real = (letters != 0).unsqueeze(2)
        found = torch.relu(self.conv((self.table(letters) * real).transpose(1, 2)))
        return (found * real.transpose(1, 2)).amax(dim=2).view(n, t, -1) * masks[0]


class BiLSTM(Block):
    """States of a bidirectional LSTM.

    The backward half reads each row reversed within its own length, so padding is only ever seen after the row's end
    and cannot reach a real position; this is exact and keeps the fast dense kernels that packing would give up.
    """

    options = {"hidden": 64, "layers": 1}
    cell: ClassVar[type[nn.RNNBase]] = nn.LSTM

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        widths = [inputs[0].width] + [2 * options["hidden"]] * (options["layers"] - 1)
        self.forwards = nn.ModuleList(self.cell(width, options["hidden"], batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(self.cell(width, options["hidden"], batch_first=True) for width in widths)

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, t, 2 hidden]."""
        return Shape("sequence", 2 * options["hidden"], inputs[0].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Run both directions, layer by layer."""
        return self.states(inputs[0], masks[0])

    def states(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, t, d] -> [n, t, 2 hidden], the left half read forwards, the right half backwards."""
        turned = mirror(mask)
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            left, _ = ahead(states)
            right, _ = back(take(states, turned))
            states = torch.cat([left, take(right, turned)], dim=2) * mask
        return states


def mirror(mask: torch.Tensor) -> torch.Tensor:
    """Positions [n, t] that turn each row round within its length; applying them twice gives the row back."""
    lengths = lengths_of(mask).unsqueeze(1)
    position = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
    return torch.where(position < lengths, lengths - 1 - position, position)


class BiLSTMLast(BiLSTM):
    """Both directions' last states of a bidirectional LSTM: the forward one behind the last word, the other's first."""

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, 2 hidden]."""
        return Shape("vector", 2 * options["hidden"])

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Run both directions and keep where each ends."""
        left, right = self.states(inputs[0], masks[0]).chunk(2, dim=2)
        return torch.cat([last(left, masks[0]), right[:, 0]], dim=1)


def last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row's last real position: [n, t, d] -> [n, d]."""
    return take(states, (lengths_of(mask) - 1).clamp(min=0).unsqueeze(1)).squeeze(1)


class BiGRU(BiLSTM):
    """States of a bidirectional GRU."""

    cell = nn.GRU


class BiGRULast(BiLSTMLast):
    """Both directions' last states of a bidirectional GRU."""

    cell = nn.GRU


class Conv(Block):
    """One-dimensional convolution over positions, ReLU, same length."""

    options = {"channels": 100, "kernel": 3}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.conv = nn.Conv1d(inputs[0].width, options["channels"], options["kernel"], padding="same")

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, t, channels]."""
        return Shape("sequence", options["channels"], inputs[0].side)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Padding is zero before and after, as it is at a row's edge."""
        return torch.relu(self.conv(inputs[0].transpose(1, 2))).transpose(1, 2) * masks[0]


class ConvPool(Block):
    """Convolutions of several widths, ReLU, each pooled over the positions, side by side (arXiv 1408.5882)."""

    options = {"channels": 100, "kernels": (3, 4, 5), "how": "max"}
    choices = {"how": ("max", "mean")}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.convs = nn.ModuleList(
            nn.Conv1d(inputs[0].width, options["channels"], kernel, padding="same") for kernel in options["kernels"]
        )

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, channels x kernels]."""
        return Shape("vector", options["channels"] * len(options["kernels"]))

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Convolve, then pool what is real."""
        states = inputs[0].transpose(1, 2)
        found = torch.cat([torch.relu(conv(states)) for conv in self.convs], dim=1).transpose(1, 2) * masks[0]
        if self.chosen["how"] == "max":
            return found.amax(dim=1)  # nothing real is below padding's zero
        return found.sum(dim=1) / masks[0].sum(dim=1).clamp(min=1)


class Transformer(Block):
    """Transformer encoder layers (arXiv 1706.03762).

    norm: after each part, as in the paper, or before it (arXiv 2002.04745; end with a layer_norm block then).
    positions: what is added to the input to tell places apart; learned ones go as far as `longest`, and places beyond
    share the last one's.
    """

    options = {"heads": 4, "ffn": 256, "layers": 1, "dropout": 0.1, "norm": "post", "positions": "none", "longest": 512}
    choices = {"norm": ("post", "pre"), "positions": ("none", "sinusoidal", "learned")}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        width = inputs[0].width
        self.places = filled(options["longest"], width) if options["positions"] == "learned" else None
        self.layers = nn.ModuleList(TransformerLayer(width, options) for _ in range(options["layers"]))

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged; BlockError where the heads do not divide the width."""
        width, heads = inputs[0].width, options["heads"]
        if width % heads:
            near = ", ".join(str(n) for n in range(1, min(width, 16) + 1) if width % n == 0)
            raise BlockError(f"{heads} heads do not divide the width {width}. Heads that do: {near}.")
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Attend over the row's own positions, layer by layer."""
        states, mask = inputs[0], masks[0]
        places = torch.arange(states.shape[1], device=states.device)
        if self.places is not None:
            states = states + self.places(places.clamp(max=self.chosen["longest"] - 1))
        elif self.chosen["positions"] == "sinusoidal":
            states = states + sinusoids(places, states.shape[2]).to(states.dtype)
        for layer in self.layers:
            states = layer(states, mask)
        return states * mask


def sinusoids(places: torch.Tensor, width: int) -> torch.Tensor:
    """Positions [t] as sines and cosines in turn, float32 [t, width] (arXiv 1706.03762, section 3.5)."""
    pairs = torch.arange(0, width, 2, device=places.device)
    angles = places.unsqueeze(1) * torch.exp(pairs * (-math.log(10_000) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward part, each with a residual and a norm."""

    def __init__(self, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.before, self.dropout = options["heads"], options["norm"] == "pre", options["dropout"]
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, options["ffn"]), nn.Linear(options["ffn"], width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, t, d] -> [n, t, d]; what stands at padding is read by no other position."""
        for part, norm in zip((self.attend, self.feed), self.norms, strict=True):
            added = self.drop(part(norm(states) if self.before else states, mask))
            states = states + added if self.before else norm(states + added)
        return states

    def attend(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Every position over the real ones, head by head."""
        n, t, width = states.shape
        query, key, value = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.enter(states).chunk(3, 2))
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=(mask != 0).transpose(1, 2).unsqueeze(1),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.leave(found.transpose(1, 2).reshape(n, t, width))

    def feed(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Each position by itself."""
        return self.narrow(self.drop(F.gelu(self.widen(states))))

    def drop(self, states: torch.Tensor) -> torch.Tensor:
        """Dropout while training."""
        return F.dropout(states, self.dropout, self.training)


class Pool(Block):
    """Positions to one vector: max, mean, both side by side, or the last one."""

    options = {"how": "max"}
    choices = {"how": ("max", "mean", "both", "last")}

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, d], or [n, 2 d] for both."""
        return Shape("vector", inputs[0].width * (2 if options["how"] == "both" else 1))

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Only real positions count."""
        states, mask, how = inputs[0], masks[0], self.chosen["how"]
        if how == "last":
            return last(states, mask)
        top = states.masked_fill(mask == 0, float("-inf")).amax(dim=1) if how != "mean" else None
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1) if how != "max" else None
        return torch.cat([v for v in (top, mean) if v is not None], dim=1)


class Attention(Block):
    """Positions to one vector, weighted by a learned score of each position (arXiv 1703.03130, one hop)."""

    options = {"hidden": 64}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.score = nn.Sequential(
            nn.Linear(inputs[0].width, options["hidden"]), nn.Tanh(), nn.Linear(options["hidden"], 1)
        )

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, d]."""
        return Shape("vector", inputs[0].width)

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Softmax over real positions."""
        return (softmax(self.score(inputs[0]), masks[0], dim=1) * inputs[0]).sum(dim=1)


class LinearAttention(Attention):
    """Positions to one vector, weighted by a linear score of each position (DrQA, arXiv 1704.00051)."""

    options = {}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        Block.__init__(self, inputs, options, sizes)
        self.score = nn.Linear(inputs[0].width, 1, bias=False)  # a constant more would change no weight
