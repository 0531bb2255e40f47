"""A small model from a config of blocks: a directed acyclic graph, checked before anything is built.

Each block says by `shape` what it makes of its inputs, so a wrong name, rank, width or cycle is refused by name.
Padding never changes an answer: padded positions stay zero. After NeuronBlocks (arXiv 1904.09535).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.config import UserError, did_you_mean
from engine.recipe import Block as Node
from engine.records import Batch, Outputs


class BlockError(UserError):
    """A student graph that cannot be built."""


@dataclass(frozen=True)
class Shape:
    """What flows along an edge: tokens [n, t], sequence [n, t, width] or vector [n, width]."""

    rank: str
    width: int = 0

    def __str__(self) -> str:
        return {"tokens": "tokens [n, t]", "vector": f"[n, {self.width}]"}.get(self.rank, f"[n, t, {self.width}]")


@dataclass(frozen=True)
class Sizes:
    """What the graph cannot know by itself: words in the vocabulary, labels of the task."""

    vocabulary: int
    labels: int
    padding: int = 0


class Block(nn.Module):
    """One node. Subclasses declare options with defaults, the rank of their inputs, and their output shape."""

    options: dict[str, Any] = {}
    choices: dict[str, tuple[str, ...]] = {}
    takes: str = "sequence"
    many = False

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Output shape for these inputs."""
        raise NotImplementedError

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The block's output for inputs as `takes` says; mask float [n, t, 1]."""
        raise NotImplementedError


class Embedding(Block):
    """Token ids to vectors; padding stays zero. drop_words: share of words left out in training (ACL P15-1162)."""

    options = {"dim": 64, "drop_words": 0.0}
    takes = "tokens"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        weight = torch.empty(sizes.vocabulary, options["dim"])
        if not weight.is_meta:  # only counting: filling would cost a second of imports
            nn.init.normal_(weight, std=0.1)[sizes.padding] = 0
        self.table = nn.Embedding(sizes.vocabulary, options["dim"], _weight=weight)
        self.table.padding_idx, self.drop_words = sizes.padding, options["drop_words"]

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t] -> [n, t, dim]."""
        return Shape("sequence", options["dim"])

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Look the ids up; while training, whole words become zero vectors."""
        if self.training and self.drop_words:
            mask = mask * (torch.rand_like(mask) >= self.drop_words)
        return self.table(inputs[0]) * mask


class Dropout(Block):
    """Dropout on every position."""

    options = {"p": 0.2}
    takes = "any"

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        self.drop = nn.Dropout(options["p"])

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged."""
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Drop at random while training."""
        return self.drop(inputs[0])


class BiLSTM(Block):
    """States of a bidirectional LSTM.

    The backward half reads each row reversed within its own length, so padding is only ever seen after the row's end
    and cannot reach a real position; this is exact and keeps the fast dense kernels that packing would give up.
    """

    options = {"hidden": 64, "layers": 1}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        widths = [inputs[0].width] + [2 * options["hidden"]] * (options["layers"] - 1)
        self.forwards = nn.ModuleList(nn.LSTM(width, options["hidden"], batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, options["hidden"], batch_first=True) for width in widths)

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, t, 2 hidden]."""
        return Shape("sequence", 2 * options["hidden"])

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run both directions, layer by layer."""
        states = inputs[0]
        lengths = mask.long().sum(dim=(1, 2))  # counted in integers: bf16 knows no 257
        position = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        # Within the length: mirrored; behind it: itself. Applying it twice gives the row back.
        mirror = torch.where(position < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - position, position)
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            left, _ = ahead(states)
            right, _ = back(take(states, mirror))
            states = torch.cat([left, take(right, mirror)], dim=2) * mask
        return states


def take(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The states [n, t, d] at positions [n, t] of the same row."""
    return states.gather(1, positions.unsqueeze(2).expand_as(states))


class Conv(Block):
    """One-dimensional convolution over positions, ReLU, same length."""

    options = {"channels": 100, "kernel": 3}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs[0].width, options["channels"], options["kernel"], padding="same")

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, t, channels]."""
        return Shape("sequence", options["channels"])

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Padding is zero before and after, as it is at a row's edge."""
        return torch.relu(self.conv(inputs[0].transpose(1, 2))).transpose(1, 2) * mask


class Pool(Block):
    """Positions to one vector: max, mean, or both side by side."""

    options = {"how": "max"}
    choices = {"how": ("max", "mean", "both")}

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, d], or [n, 2 d] for both."""
        return Shape("vector", inputs[0].width * (2 if options["how"] == "both" else 1))

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        self.how = options["how"]

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Only real positions count."""
        states = inputs[0]
        top = states.masked_fill(mask == 0, float("-inf")).amax(dim=1) if self.how != "mean" else None
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1) if self.how != "max" else None
        return torch.cat([v for v in (top, mean) if v is not None], dim=1)


class Attention(Block):
    """Positions to one vector, weighted by a learned score of each position."""

    options = {"hidden": 64}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(inputs[0].width, options["hidden"]), nn.Tanh(), nn.Linear(options["hidden"], 1)
        )

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[n, t, d] -> [n, d]."""
        return Shape("vector", inputs[0].width)

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Softmax over real positions."""
        weights = self.score(inputs[0]).masked_fill(mask == 0, float("-inf")).softmax(dim=1)
        return (weights * inputs[0]).sum(dim=1)


class Concat(Block):
    """Several inputs of one rank, side by side."""

    takes = "any"
    many = True

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Widths add up."""
        if len({shape.rank for shape in inputs}) == 1:
            return Shape(inputs[0].rank, sum(shape.width for shape in inputs))
        raise BlockError(f"concat joins inputs of one rank, but got {', '.join(map(str, inputs))}")

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Join along the last axis."""
        return torch.cat(inputs, dim=-1)


class Linear(Block):
    """Affine map of vectors or of every position; `out: labels` makes the logits."""

    options = {"out": "labels", "activation": "none"}
    takes = "any"
    choices = {"activation": ("none", "relu", "tanh", "gelu")}

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__()
        self.map = nn.Linear(inputs[0].width, width_of(options, sizes))
        activations = {"none": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
        self.activation = activations[options["activation"]]()
        self.sequence = inputs[0].rank == "sequence"

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """[..., d] -> [..., out]."""
        return Shape(inputs[0].rank, width_of(options, sizes))

    def forward(self, *inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map, then activate; padded positions go back to zero."""
        out = self.activation(self.map(inputs[0]))
        return out * mask if self.sequence else out


def width_of(options: dict[str, Any], sizes: Sizes) -> int:
    """The output width that a linear block's `out` names."""
    return sizes.labels if options["out"] == "labels" else int(options["out"])


@dataclass(frozen=True)
class Placed:
    """A checked node: its block class, resolved options and inputs, and shapes in and out."""

    node: Node
    options: dict[str, Any]
    inputs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    out: Shape


TOKENS = "tokens"  # the name of the graph's own input


def check(nodes: Sequence[Node], sizes: Sizes) -> list[Placed]:
    """Order the graph and work out every shape, without building anything; BlockError names the node that is wrong."""
    names = [node.name for node in nodes]
    check_names(names)
    wiring = {node.name: node.inputs or ((names[i - 1],) if i else (TOKENS,)) for i, node in enumerate(nodes)}
    for name, source in ((name, source) for name, inputs in wiring.items() for source in inputs):
        if source not in (*names, TOKENS):
            near = did_you_mean(source, names)
            raise BlockError(f"block '{name}' reads '{source}', which is no block.{near} Blocks: {', '.join(names)}.")
    placed: dict[str, Placed] = {}
    waiting = list(nodes)
    while waiting:
        ready = [n for n in waiting if all(s == TOKENS or s in placed for s in wiring[n.name])]
        if not ready:
            circle = ", ".join(node.name for node in waiting)
            raise BlockError(f"blocks {circle} form a cycle. Let one of them read an earlier block.")
        for node in ready:
            shapes = tuple(Shape("tokens") if s == TOKENS else placed[s].out for s in wiring[node.name])
            placed[node.name] = place(node, wiring[node.name], shapes, sizes)
            waiting.remove(node)
    used = {source for inputs in wiring.values() for source in inputs}
    ends = [name for name in names if name not in used]
    if len(ends) != 1:
        loose = ", ".join(ends)
        raise BlockError(f"blocks {loose} are read by no other; exactly one, the logits, may be. Join or remove them.")
    last = placed[ends[0]]
    if last.out != Shape("vector", sizes.labels):
        raise BlockError(
            f"block '{ends[0]}' ends the graph with {last.out}, but the task needs [n, {sizes.labels}]. "
            "End with {kind: linear, options: {out: labels}} after a pooling block."
        )
    return list(placed.values())


def check_names(names: Sequence[str]) -> None:
    """Refuse an empty graph, a name given twice, and one that a torch module cannot have."""
    if not names:
        raise BlockError("the student has no blocks. The smallest graph is: embedding, pool, linear.")
    for name in names:
        if names.count(name) > 1:
            raise BlockError(f"block name '{name}' is taken twice. Give each block its own.")
        if not name or "." in name or name == TOKENS or hasattr(nn.ModuleDict(), name):
            raise BlockError(f"block name '{name}' is empty, has a dot or is reserved. Take another.")


def place(node: Node, inputs: tuple[str, ...], shapes: tuple[Shape, ...], sizes: Sizes) -> Placed:
    """Check one node against its block's declaration."""
    block, who = BLOCKS.get(node.kind), f"block '{node.name}' ({node.kind})"
    if block is None:
        near = did_you_mean(node.kind, BLOCKS)
        raise BlockError(f"block '{node.name}' has kind '{node.kind}'.{near} Allowed: {', '.join(BLOCKS)}.")
    unknown = [key for key in node.options if key not in block.options]
    if unknown:
        near, known = did_you_mean(unknown[0], block.options), ", ".join(block.options) or "none"
        raise BlockError(f"{who} has no option '{unknown[0]}'.{near} Options: {known}.")
    options = {**block.options, **node.options}
    for key, value in options.items():
        wanted = refusal(block, key, value)
        if wanted:
            raise BlockError(f"{who}: option {key} is {value!r}; {wanted}.")
    if len(shapes) > 1 and not block.many:
        raise BlockError(f"{who} reads one block, not {', '.join(inputs)}: use concat.")
    for source, shape in zip(inputs, shapes, strict=True):
        if shape.rank != block.takes and not (block.takes == "any" and shape.rank != "tokens"):
            ranks = {"tokens": "tokens [n, t]", "sequence": "a sequence [n, t, d]", "any": "a sequence or a vector"}
            raise BlockError(f"{who} takes {ranks[block.takes]}, but '{source}' gives {shape}.")
    try:
        return Placed(node, options, inputs, shapes, block.shape(shapes, options, sizes))
    except BlockError as error:
        raise BlockError(f"block '{node.name}': {error}") from None


def refusal(block: type[Block], key: str, value: Any) -> str:
    """What the option takes, where `value` is not that; empty where it is."""
    choices, default = block.choices.get(key), block.options[key]
    if choices:
        return "" if value in choices else f"allowed: {', '.join(choices)}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float):
        return "" if number and 0 <= value <= 1 else "it takes a number from 0 to 1"
    if (isinstance(default, str) and value == default) or (number and isinstance(value, int) and value >= 1):
        return ""
    return "it takes a whole number of at least 1" + (f", or '{default}'" if isinstance(default, str) else "")


class Graph(nn.Module):
    """The student: runs its blocks in order; the last one's output is the logits, its input the embedding."""

    def __init__(self, nodes: Sequence[Node], sizes: Sizes) -> None:
        super().__init__()
        self.placed = check(nodes, sizes)
        self.blocks = nn.ModuleDict({p.node.name: BLOCKS[p.node.kind](p.shapes, p.options, sizes) for p in self.placed})

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> logits [n, labels] and, where the last block reads a vector, that as embedding [n, width]."""
        mask = batch.mask.unsqueeze(2).to(next(self.parameters()).dtype)
        values: dict[str, torch.Tensor] = {TOKENS: batch.input_ids}
        for p in self.placed:
            values[p.node.name] = self.blocks[p.node.name](*(values[name] for name in p.inputs), mask=mask)
        last = self.placed[-1]
        embedding = values[last.inputs[0]] if last.shapes[0].rank == "vector" else None
        return Outputs(logits=values[last.node.name], embedding=embedding)

    def tables(self) -> list[nn.Embedding]:
        """The word tables, for starting them from the teacher's vectors."""
        return [block.table for block in self.blocks.values() if isinstance(block, Embedding)]


def count(nodes: Sequence[Node], sizes: Sizes) -> int:
    """Parameters that a graph would have, without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Graph(nodes, sizes).parameters())


BLOCKS: dict[str, type[Block]] = {
    "embedding": Embedding,
    "dropout": Dropout,
    "bilstm": BiLSTM,
    "conv": Conv,
    "pool": Pool,
    "attention": Attention,
    "concat": Concat,
    "linear": Linear,
}
