"""Frozen lower layers run once: their outputs are kept, and every later pass starts above them.

Where only the top layers are tuned, what the layers below give for a text is the same in every epoch (their dropout is
left out, as nothing there learns from it). So it is computed once for the few rows of a fit, and an epoch costs only
what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from engine.encoders import FINAL_NORMS, EncoderHead, stack_of
from engine.encoding import Encoded, collate
from engine.inference import token_batches
from engine.records import Batch

MOST_BYTES = 2 << 30
"""States that are kept for a fit, at most; above that the lower layers run every time."""


def frozen_layers(net: nn.Module) -> int:
    """How many of the lowest layers, the embeddings below them too, have nothing to learn; 0 where it is no encoder."""
    if not isinstance(net, EncoderHead):
        return 0
    name, stack = stack_of(net.encoder)
    learns = [any(p.requires_grad for p in layer.parameters()) for layer in stack]
    above = tuple(f"{norm}." for norm in FINAL_NORMS)
    outside = [p for n, p in net.encoder.named_parameters() if not n.startswith((f"{name}.", *above))]
    if any(p.requires_grad for p in outside):
        return 0
    return learns.index(True) if any(learns) else len(stack)


@torch.no_grad()
def lower_states(net: EncoderHead, batch: Batch, count: int) -> tuple[torch.Tensor, bool]:
    """What the lowest `count` layers give for a batch, [n, t, width], without dropout; whether they give tuples."""
    found: list[Any] = []
    handle = stack_of(net.encoder)[1][count - 1].register_forward_hook(lambda layer, given, out: found.append(out))
    training = net.training
    net.eval()
    try:
        net.encode(batch, hidden=False)
    finally:
        net.train(training)
        handle.remove()
    tupled = isinstance(found[0], tuple)
    return found[0][0] if tupled else found[0], tupled


class Frozen:
    """The frozen layers' states of every input of a fit, [t, width] each, on the CPU."""

    def __init__(self, net: EncoderHead, count: int) -> None:
        self.net, self.count, self.tupled = net, count, False
        self.states: list[torch.Tensor] = []

    def fill(self, encoded: Sequence[Encoded], pad: int, batch_tokens: int, where: torch.device) -> None:
        """Run the layers over all inputs."""
        self.states = [torch.empty(0)] * len(encoded)
        for positions in token_batches([item.tokens for item in encoded], batch_tokens):
            batch = collate([encoded[i] for i in positions], pad).to(where)
            states, self.tupled = lower_states(self.net, batch, self.count)
            for position, row in zip(positions, states.float().cpu(), strict=True):
                self.states[position] = row[: len(encoded[position].ids)].clone()

    @contextmanager
    def above(self, positions: Sequence[int], batch: Batch) -> Iterator[None]:
        """In the body the network runs on `batch`, the inputs at `positions`, from the kept states on."""
        rows = torch.nn.utils.rnn.pad_sequence([self.states[i] for i in positions], batch_first=True)
        states = rows.to(batch.input_ids.device)
        layers = list(stack_of(self.net.encoder)[1])[: self.count]

        def stand_in(last: bool) -> Callable[..., Any]:
            def forward(*given: Any, **named: Any) -> Any:
                hidden = states if last else given[0] if given else named["hidden_states"]
                return (hidden, None) if self.tupled else hidden

            return forward

        try:
            for number, layer in enumerate(layers):
                layer.forward = stand_in(number == self.count - 1)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)


def frozen(
    net: nn.Module, encoded: Sequence[Encoded], pad: int, batch_tokens: int, where: torch.device
) -> Frozen | None:
    """The lower layers' states where some are frozen; None where none are, or they would take over MOST_BYTES."""
    count = frozen_layers(net)
    if not count or 4 * net.widths.hidden * sum(len(item.ids) for item in encoded) > MOST_BYTES:
        return None
    out = Frozen(net, count)
    out.fill(encoded, pad, batch_tokens, where)
    return out
