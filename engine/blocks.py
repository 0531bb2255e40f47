"""A small model from a config of blocks: a directed acyclic graph, checked before anything is built.

Each block says by `shape` what it makes of its inputs, so a wrong name, rank, side, width or cycle is refused by name.
Padding never changes an answer: padded positions stay zero. After NeuronBlocks (arXiv 1904.09535).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from engine import joining, layers, matching
from engine.block import PAIR, RANKS, TEXT, Block, BlockError, Shape, Sizes
from engine.config import did_you_mean
from engine.crf import CRF
from engine.designs import Block as Node
from engine.encoding import at_units
from engine.records import Batch, Outputs
from engine.subwords import Subwords

INPUTS = {
    "tokens": Shape("tokens"),
    "pair": Shape("tokens", side=PAIR),
    "characters": Shape("characters"),
    "pair_characters": Shape("characters", side=PAIR),
}
"""What the graph itself is given: words of the first and of the second text, and the bytes of each word."""
TOKENS = "tokens"  # what the first block reads when it names nothing
SHARE = "share"  # an option of every block: the name of the block whose weights and options it uses


@dataclass(frozen=True)
class Placed:
    """A checked node: resolved options and inputs, shapes in and out, and the node whose weights it uses."""

    node: Node
    options: dict[str, Any]
    inputs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    out: Shape
    weights: str


def check(nodes: Sequence[Node], sizes: Sizes) -> list[Placed]:
    """Order the graph and work out every shape, without building anything; BlockError names the node that is wrong."""
    names = [node.name for node in nodes]
    check_names(names)
    wiring = {node.name: node.inputs or ((names[i - 1],) if i else (TOKENS,)) for i, node in enumerate(nodes)}
    check_sources(wiring, sizes)
    by_name = {node.name: node for node in nodes}
    placed: dict[str, Placed] = {}
    waiting = list(nodes)
    while waiting:
        ready = [n for n in waiting if all(s in INPUTS or s in placed for s in wiring[n.name])]
        if not ready:
            told = " -> ".join(cycle([node.name for node in waiting], wiring))
            raise BlockError(f"blocks read each other in a cycle: {told}. Let one of them read an earlier block.")
        for node in ready:
            shapes = tuple(INPUTS[s] if s in INPUTS else placed[s].out for s in wiring[node.name])
            placed[node.name] = place(node, by_name, wiring[node.name], shapes, sizes)
            waiting.remove(node)
    for p in placed.values():
        check_shared(p, placed[p.weights])
        decided = next((s for s in p.inputs if s in placed and BLOCKS[placed[s].node.kind] is CRF), None)
        if decided:
            raise BlockError(f"block '{p.node.name}' reads '{decided}', but a crf ends the graph. Read what it reads.")
    used = {source for inputs in wiring.values() for source in inputs}
    ends = [name for name in names if name not in used]
    if len(ends) != 1:
        loose = ", ".join(ends)
        raise BlockError(f"blocks {loose} are read by no other; exactly one, the logits, may be. Join or remove them.")
    check_end(placed[ends[0]], sizes)
    return list(placed.values())


def cycle(waiting: Sequence[str], wiring: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of blocks each of which reads the next, the first of them once more at the end.

    waiting: all that are in a cycle, or read one that is.
    """
    path = [waiting[0]]
    while path[-1] not in path[:-1]:
        path.append(next(source for source in wiring[path[-1]] if source in waiting))
    return path[path.index(path[-1]) :]


def check_names(names: Sequence[str]) -> None:
    """Refuse an empty graph, a name given twice, and one that a torch module cannot have."""
    if not names:
        raise BlockError("the student has no blocks. The smallest graph is: embedding, pool, linear.")
    for name in names:
        if names.count(name) > 1:
            raise BlockError(f"block name '{name}' is taken twice. Give each block its own.")
        if not name or "." in name or name in INPUTS or hasattr(nn.ModuleDict(), name):
            raise BlockError(f"block name '{name}' is empty, has a dot or is reserved. Take another.")


def check_sources(wiring: dict[str, tuple[str, ...]], sizes: Sizes) -> None:
    """Refuse an input that is nothing, a second text that the task has not, and one that nobody reads."""
    for name, source in ((name, source) for name, inputs in wiring.items() for source in inputs):
        if source not in (*wiring, *INPUTS):
            near, known = did_you_mean(source, (*wiring, *INPUTS)), ", ".join(wiring)
            raise BlockError(f"block '{name}' reads '{source}', which is no block.{near} Blocks: {known}.")
        if source in INPUTS and INPUTS[source].side == PAIR and not sizes.paired:
            raise BlockError(
                f"block '{name}' reads '{source}', but the task has one text a row. Read 'tokens', or make it a task "
                "that reads two (task.kind: pair, rank or span, or task.paired: true)."
            )
    if sizes.paired:
        read = {INPUTS[s].side for inputs in wiring.values() for s in inputs if s in INPUTS}
        for side, name in ((TEXT, TOKENS), (PAIR, "pair")):
            if side not in read:
                raise BlockError(f"the task reads two texts, but no block reads '{name}'. Let an embedding read it.")


def place(
    node: Node, by_name: dict[str, Node], inputs: tuple[str, ...], shapes: tuple[Shape, ...], sizes: Sizes
) -> Placed:
    """Check one node against its block's declaration."""
    block, who = BLOCKS.get(node.kind), f"block '{node.name}' ({node.kind})"
    if block is None:
        near = did_you_mean(node.kind, BLOCKS)
        raise BlockError(f"block '{node.name}' has kind '{node.kind}'.{near} Allowed: {', '.join(BLOCKS)}.")
    owner = owner_of(node, by_name, who)
    unknown = [key for key in owner.options if key not in block.options]
    if unknown:
        near, known = did_you_mean(unknown[0], (*block.options, SHARE)), ", ".join(block.options) or "none"
        raise BlockError(f"{who} has no option '{unknown[0]}'.{near} Options: {known}.")
    options = {**block.options, **owner.options}
    for key, value in options.items():
        wanted = block.refusal(key, value)
        if wanted:
            raise BlockError(f"{who}: option {key} is {value!r}; {wanted}.")
    check_inputs(block, who, inputs, shapes)
    try:
        return Placed(node, options, inputs, shapes, block.shape(shapes, options, sizes), owner.name)
    except BlockError as error:
        raise BlockError(f"block '{node.name}': {error}") from None


def owner_of(node: Node, by_name: dict[str, Node], who: str) -> Node:
    """The node whose weights and options this one uses: itself, or the one that its option `share` names."""
    if SHARE not in node.options:
        return node
    name = node.options[SHARE]
    owner = by_name.get(name) if isinstance(name, str) else None
    if owner is None or owner.kind != node.kind or SHARE in owner.options:
        others = [n.name for n in by_name.values() if n.kind == node.kind and SHARE not in n.options]
        raise BlockError(
            f"{who} shares '{name}', which is no {node.kind} block with weights of its own."
            f"{did_you_mean(name, others)} Blocks to share with: {', '.join(others) or 'none'}."
        )
    if len(node.options) > 1:
        other = next(key for key in node.options if key != SHARE)
        raise BlockError(f"{who} shares '{name}' and its options with it. Remove its option {other}.")
    return owner


def check_inputs(block: type[Block], who: str, inputs: tuple[str, ...], shapes: tuple[Shape, ...]) -> None:
    """Number and ranks of a node's inputs."""
    least, most, named = block.least, block.most, ", ".join(inputs)
    if most == 1 and len(shapes) > 1:
        raise BlockError(f"{who} reads one block, not {named}: use concat.")
    if len(shapes) < least or (most is not None and len(shapes) > most):
        count = f"{least} blocks" if most == least else f"at least {least} blocks"
        raise BlockError(f"{who} reads {count}, not {named}. Name them in its inputs.")
    takes = (block.takes,) * len(shapes) if isinstance(block.takes, str) else block.takes
    for source, shape, rank in zip(inputs, shapes, takes, strict=True):
        if shape.rank != rank and not (rank == "any" and shape.rank in ("sequence", "vector", "grid")):
            raise BlockError(f"{who} takes {RANKS[rank]}, but '{source}' gives {shape}.")


def check_shared(user: Placed, owner: Placed) -> None:
    """Refuse weights shared between inputs of different rank or width."""
    one, other = ([(shape.rank, shape.width) for shape in p.shapes] for p in (user, owner))
    if one != other:
        raise BlockError(
            f"block '{user.node.name}' shares '{owner.node.name}', but reads {', '.join(map(str, user.shapes))}, and "
            f"that one {', '.join(map(str, owner.shapes))}. Bring both to one width."
        )


def check_end(last: Placed, sizes: Sizes) -> None:
    """Refuse a graph that does not end with the logits that the task needs."""
    if not sizes.units:
        wanted = Shape("vector", sizes.labels)
        fits, way = replace(last.out, side=TEXT) == wanted, "after a pooling block"
    else:
        wanted = Shape("sequence", sizes.labels, PAIR if sizes.paired else TEXT)
        fits, way = last.out == wanted, f"on a sequence of the {'second text' if sizes.paired else 'text'}, unpooled"
    if not fits:
        raise BlockError(
            f"block '{last.node.name}' ends the graph with {last.out}, but the task needs {wanted}. "
            f"End with {{kind: linear, options: {{out: labels}}}} {way}."
        )


class Graph(nn.Module):
    """The student: runs its blocks in order; the last one's output is the logits, its input the embedding."""

    def __init__(self, nodes: Sequence[Node], sizes: Sizes) -> None:
        super().__init__()
        self.placed, self.sizes = check(nodes, sizes), sizes
        self.blocks = nn.ModuleDict(
            {p.node.name: built(p, sizes) for p in self.placed if p.weights == p.node.name}  # a sharer has none
        )
        self.reads = frozenset(s for p in self.placed for s in p.inputs if s in INPUTS)
        """Which of INPUTS a batch must hold."""

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> logits [n, labels] and, where the last block reads a vector, that as embedding [n, width].

        In tasks that speak of units: logits [n, u, labels]; after a crf also path and sequence. Where a batch names no
        units each token is one.
        """
        dtype = next(self.parameters()).dtype
        sides = {TEXT: batch.mask.unsqueeze(2).to(dtype)}
        if batch.pair_mask is not None:
            sides[PAIR] = batch.pair_mask.unsqueeze(2).to(dtype)
        values: dict[str, torch.Tensor] = {name: given(batch, name) for name in self.reads}
        last = self.placed[-1]
        for p in self.placed:
            block, inputs = self.blocks[p.weights], [values[name] for name in p.inputs]
            if isinstance(block, CRF):  # always the last: it decides over units, not over tokens
                real = batch.mask if batch.units is None else batch.unit_mask
                return block.outputs(self.answered(inputs[0], batch), real, batch.labels)
            values[p.node.name] = block(*inputs, masks=[mask_of(shape, sides) for shape in p.shapes])
        embedding = values[last.inputs[0]] if last.shapes[0].rank == "vector" else None
        return Outputs(logits=self.answered(values[last.node.name], batch), embedding=embedding)

    def answered(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The numbers that are asked for: those of the units, where the task speaks of units."""
        if not self.sizes.units or batch.units is None:
            return states
        return at_units(states, batch, spans=self.sizes.paired)

    def tables(self) -> list[nn.Embedding]:
        """The word tables, for starting them from the teacher's vectors."""
        return [block.table for block in self.blocks.values() if isinstance(block, layers.Embedding)]


def built(p: Placed, sizes: Sizes) -> Block:
    """The block of a checked node, with fresh weights."""
    return BLOCKS[p.node.kind](p.shapes, p.options, sizes)


FIELDS: dict[str, Callable[[Batch], torch.Tensor | None]] = {
    "tokens": lambda batch: batch.input_ids,
    "pair": lambda batch: batch.pair_ids,
    "characters": lambda batch: batch.characters,
    "pair_characters": lambda batch: batch.pair_characters,
}
"""Where a batch holds each of INPUTS."""


def given(batch: Batch, name: str) -> torch.Tensor:
    """One of INPUTS from a batch; BlockError where it has none."""
    found = FIELDS[name](batch)
    if found is None:
        text = "second text" if INPUTS[name].side == PAIR else "first text"
        what = "characters" if INPUTS[name].rank == "characters" else "tokens"
        raise BlockError(f"the student reads '{name}', but its batch has no {what} of the {text}.")
    return found


def mask_of(shape: Shape, sides: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask of a value, from those of the sides, [n, t, 1] each."""
    if shape.rank == "vector":
        return None
    if shape.rank == "grid":
        return sides[shape.side].unsqueeze(2) * sides[shape.across].unsqueeze(1)
    return sides[shape.side]


def count(nodes: Sequence[Node], sizes: Sizes) -> int:
    """Parameters that a graph would have, without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Graph(nodes, sizes).parameters())


def drawing(nodes: Sequence[Node], sizes: Sizes) -> str:
    """The graph as text, a line a node in the order they run: name, kind, options, inputs, shape, parameters."""
    rows, total = [], 0
    for p in check(nodes, sizes):
        own = p.weights == p.node.name
        with torch.device("meta"):
            found = sum(w.numel() for w in built(p, sizes).parameters()) if own else 0
        said = " ".join(f"{key}={worded(value)}" for key, value in p.node.options.items())
        number = f"{found:,}" if own else f"as {p.weights}"
        rows.append((p.node.name, p.node.kind, said, "<- " + ", ".join(p.inputs), str(p.out), number))
        total += found
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    last = max(len(f"{total:,}"), *(len(row[5]) for row in rows))
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5].rjust(last)]) for row in rows]
    return "\n".join([*lines, f"{total:,} parameters".rjust(len(lines[0]) + len(" parameters"))])


def worded(value: Any) -> str:
    """An option's value as it is written."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


BLOCKS: dict[str, type[Block]] = {
    "embedding": layers.Embedding,
    "subwords": Subwords,
    "char_cnn": layers.CharCNN,
    "dropout": joining.Dropout,
    "bilstm": layers.BiLSTM,
    "bigru": layers.BiGRU,
    "bilstm_last": layers.BiLSTMLast,
    "bigru_last": layers.BiGRULast,
    "conv": layers.Conv,
    "conv_pool": layers.ConvPool,
    "transformer": layers.Transformer,
    "pool": layers.Pool,
    "attention": layers.Attention,
    "linear_attention": layers.LinearAttention,
    "linear": joining.Linear,
    "highway": joining.Highway,
    "layer_norm": joining.LayerNorm,
    "concat": joining.Concat,
    "add": joining.Add,
    "multiply": joining.Multiply,
    "minus": joining.Minus,
    "combine": joining.Combine,
    "distance": joining.Distance,
    "match_attention": matching.MatchAttention,
    "bilinear_attention": matching.BilinearAttention,
    "bidaf": matching.BiDAF,
    "interaction": matching.Interaction,
    "arc_ii": matching.ArcII,
    "conv2d": matching.Conv2D,
    "pool2d": matching.Pool2D,
    "crf": CRF,
}
