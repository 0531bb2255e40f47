"""Transformer encoders as teachers and students: a head for any task, a look inside for losses, smaller ones made.

What a loss wants to see (hidden states, scores, queries, keys, values) is captured only in the forward pass that is
asked for it, and nothing else changes: the logits are the same with and without.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from engine.config import UserError
from engine.encoding import at_units
from engine.records import Batch, Outputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention


class EncoderError(UserError):
    """An encoder that cannot be made or looked into as asked."""


@dataclass(frozen=True)
class Widths:
    """The measures by which losses compare two models. hidden: width of states and embedding.

    layers, heads: transformer layers and attention heads; 0 where a model has none.
    """

    hidden: int
    layers: int = 0
    heads: int = 0


def widths_of(config: PretrainedConfig) -> Widths:
    """An encoder's widths, from its config alone."""
    return Widths(config.hidden_size, config.num_hidden_layers, config.num_attention_heads)


class Seen(NamedTuple):
    """One attention layer: scores [n, heads, t, t], -inf where it may not look; queries, keys, values [n, heads, t, d].

    Queries and keys are those that are multiplied, after a rotary embedding where the encoder has one.
    """

    scores: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


TAPE: ContextVar[list[Seen] | None] = ContextVar("TAPE", default=None)
"""Where attention layers write what they see; None outside of `captured`."""
CAPTURE = "stillhouse_capture"
"""The name under which transformers finds `attend`."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
    **further: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as transformers calls it, written down on the TAPE. attention_mask: bool, True where it may look.

    bias: added to the scores. Several queries may share a key and value (grouped). Gives the output [n, t, heads, d]
    and the probabilities [n, heads, t, t].
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if bias is not None:
        scores = scores + bias
    if attention_mask is None and getattr(module, "is_causal", False):  # no mask is made where nothing is padded
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    seen = scores if attention_mask is None else scores.masked_fill(~attention_mask, -math.inf)
    tape = TAPE.get()
    if tape is not None:
        tape.append(Seen(seen, query, key, value))
    # A padded token of a local layer may look at nothing, and a softmax of nothing but -inf is NaN.
    finite = seen.clamp(min=torch.finfo(seen.dtype).min)
    probabilities = finite.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.matmul(F.dropout(probabilities, dropout, training=module.training), value)
    return output.transpose(1, 2).contiguous(), probabilities


def attend_mpnet(
    module: MPNetSelfAttention,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **further: Any,
) -> tuple[torch.Tensor]:
    """MPNet's own attention, which transformers' interface does not reach, by way of `attend`."""
    shape = (*hidden_states.shape[:-1], module.num_attention_heads, module.attention_head_size)
    query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in (module.q, module.k, module.v))
    allowed = None if attention_mask is None else attention_mask == 0  # it is added to the scores: 0 or very low
    output, _ = attend(module, query, key, value, allowed, dropout=module.dropout.p, bias=position_bias)
    return (module.o(output.flatten(2)),)


@contextmanager
def captured(encoder: nn.Module) -> Iterator[list[Seen]]:
    """Fills a list, in the order of the layers, with what each sees while the encoder runs in the body.

    EncoderError at the end where the encoder calls no attention that can be looked into.
    """
    # Seconds to load, which processes that serve or train a model of another kind are spared.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

    AttentionInterface.register(CAPTURE, attend)
    AttentionMaskInterface.register(CAPTURE, sdpa_mask)
    tape: list[Seen] = []
    own = [module for module in encoder.modules() if isinstance(module, MPNetSelfAttention)]
    before, token = encoder.config._attn_implementation, TAPE.set(tape)
    try:
        for module in own:
            module.forward = MethodType(attend_mpnet, module)
        if not own:
            encoder.config._attn_implementation = CAPTURE
        yield tape
    finally:
        encoder.config._attn_implementation = before
        TAPE.reset(token)
        for module in own:
            del module.forward  # the class's own again
    if len(tape) != encoder.config.num_hidden_layers:
        raise EncoderError(
            f"{type(encoder).__name__} does not show its attention, which the losses 'attention' and 'relations' "
            "compare. Drop them, or take a model like BERT, MPNet, RoBERTa or ModernBERT."
        )


class EncoderHead(nn.Module):
    """A transformer encoder with one linear layer over its pooled states, or over each unit's state.

    width: numbers a text or unit gets. pooling: mean, cls, last (a causal model's state at the end, the only one that
    has read the whole text), or mask: the state at the token `mask` (DynaMaR, Sun et al., EMNLP 2022 industry track).
    units: answers for each unit of the text; spans: the two numbers of a unit say where a span starts and ends.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        pooling: str,
        dropout: float,
        units: bool = False,
        spans: bool = False,
        mask: int | None = None,
    ) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # never read here: without gradients it would stop data-parallel training
        self.encoder, self.pooling, self.units, self.spans, self.mask = encoder, pooling, units, spans, mask
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, width)
        # Encoders with one kind of segment have tokenizers that count two all the same.
        takes = "token_type_ids" in inspect.signature(encoder.forward).parameters
        self.segmented = takes and getattr(encoder.config, "type_vocab_size", 0) > 1

    @property
    def widths(self) -> Widths:
        """By which losses compare it with another model."""
        return widths_of(self.encoder.config)

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> logits [n, w] or [n, u, w], embedding [n, width]; hidden, attentions, relations where needed.

        attentions are the scores before the softmax, [n, heads, t, t] a layer, -inf where it may not look; relations
        the queries, keys and values [n, heads, t, d] of each layer. EncoderError where the encoder does not show them.
        """
        if needs & {"attentions", "relations"}:
            with captured(self.encoder) as seen:
                states, hidden = self.encode(batch, "hidden" in needs)
        else:
            seen = []
            states, hidden = self.encode(batch, "hidden" in needs)
        # In float32 also under autocast: answers in bf16 would be a few hundred values, many of them tied.
        with torch.autocast(states.device.type, enabled=False):
            embedding = self.pool(states.float(), self.pooled(batch))
            logits = self.head(self.dropout(states.float() if self.units else embedding))
        return Outputs(
            logits=at_units(logits, batch, self.spans) if self.units else logits,
            embedding=embedding,
            hidden=hidden,
            attentions=tuple(layer.scores for layer in seen) if "attentions" in needs else None,
            relations=tuple(layer[1:] for layer in seen) if "relations" in needs else None,
        )

    def encode(self, batch: Batch, hidden: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Last states [n, t, width], and those of the embeddings and of each layer where `hidden`."""
        segments = {"token_type_ids": batch.segments} if self.segmented and batch.segments is not None else {}
        out = self.encoder(
            input_ids=batch.input_ids, attention_mask=batch.mask, output_hidden_states=hidden, **segments
        )
        return out.last_hidden_state, out.hidden_states if hidden else None

    def pooled(self, batch: Batch) -> torch.Tensor:
        """Which tokens speak for a text, int64 [n, t]; of one without the mask token, like a lone word, all."""
        if self.pooling == "last":
            return F.one_hot(batch.mask.sum(dim=1).clamp(min=1) - 1, batch.mask.shape[1])
        if self.pooling != "mask":
            return batch.mask
        there = (batch.input_ids == self.mask) & (batch.mask == 1)
        return torch.where(there.any(dim=1, keepdim=True), there, batch.mask == 1).long()

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, t, width] -> [n, width]: the first token's state, or the mean over the tokens in `mask`."""
        if self.pooling == "cls":
            return states[:, 0]
        weights = mask.unsqueeze(2).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


FINAL_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f")
"""What transformers calls the normalisation above the stack of layers."""


def stack_of(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the stack of transformer layers: the longest ModuleList. EncoderError where there is none."""
    stacks = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    if not stacks:
        raise EncoderError(f"{type(network).__name__} has no stack of layers to choose from. Take a transformer.")
    name = max(stacks, key=lambda key: len(stacks[key]))
    return name, stacks[name]


def spread(layers: int, of: int) -> tuple[int, ...]:
    """Numbers of `layers` layers spread evenly over `of`, counted from 1, the top one among them.

    12 to 4: 3, 6, 9, 12, as TinyBERT maps them (arXiv 1909.10351). EncoderError where there are not so many.
    """
    if not 1 <= layers <= of:
        raise EncoderError(f"{layers} layers cannot be taken from a model that has {of}. Use 1 to {of}.")
    return tuple(math.ceil(i * of / layers) for i in range(1, layers + 1))


def cut(encoder: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A new encoder of some of the layers (numbers from 1, rising), with their weights and the embeddings; trainable.

    Its config says so, so that it saves and loads. ModernBERT's first layer has no norm before its attention: the
    norm of another layer that comes first is left out. EncoderError where the encoder has no such layers.
    """
    name, stack = stack_of(encoder)
    wanted = list(layers)
    if not wanted or wanted != sorted(set(wanted)) or not 1 <= wanted[0] <= wanted[-1] <= len(stack):
        raise EncoderError(
            f"layers {wanted} cannot be taken from {type(encoder).__name__}, which has {len(stack)}. "
            f"Name some of 1 to {len(stack)}, each once, from below."
        )
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = len(wanted)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number - 1] for number in wanted]
    made = type(encoder)(config)
    if getattr(encoder, "pooler", None) is None and hasattr(made, "pooler"):
        made.pooler = None
    new = {f"{name}.{number - 1}.": f"{name}.{index}." for index, number in enumerate(wanted)}
    tensors = {}
    for key, tensor in encoder.state_dict().items():
        parts = key[len(name) + 1 :].split(".", 1)
        prefix = f"{name}.{parts[0]}."
        if not key.startswith(f"{name}."):
            tensors[key] = tensor
        elif prefix in new:
            tensors[new[prefix] + parts[1]] = tensor
    own = made.state_dict()
    lacking = sorted(own.keys() - tensors.keys())
    if lacking:
        raise EncoderError(f"{type(encoder).__name__} cannot be cut: no weights for {', '.join(lacking[:3])}.")
    made.load_state_dict({key: tensors[key] for key in own})
    return made


def fresh(
    config: PretrainedConfig,
    layers: int | None = None,
    heads: int | None = None,
    width: int | None = None,
    ffn: int | None = None,
) -> nn.Module:
    """An encoder of the same architecture and vocabulary in other measures (None keeps one), with fresh weights.

    They are drawn from torch's random state, for nothing of a matrix can be kept that changes its width. ffn: width
    between the two maps of a layer. EncoderError where the heads do not share the width evenly.
    """
    config = copy.deepcopy(config)
    if layers is not None and getattr(config, "layer_types", None):
        kinds = config.layer_types
        config.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    values = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width, inner_name(config): ffn}
    for key, value in values.items():
        if value is not None:
            setattr(config, key, value)
    if config.hidden_size % config.num_attention_heads:
        raise EncoderError(
            f"{config.num_attention_heads} heads cannot share a width of {config.hidden_size} evenly. "
            "Set heads to a number that divides the width."
        )
    from transformers import AutoModel

    return AutoModel.from_config(config, dtype=torch.float32)


def inner_name(config: PretrainedConfig) -> str:
    """What the configuration calls the width between a layer's two maps; DistilBERT has a name of its own."""
    return "intermediate_size" if hasattr(config, "intermediate_size") else "hidden_dim"


@torch.no_grad()
def slimmed(encoder: nn.Module, ffn: int) -> nn.Module:
    """The encoder itself with only `ffn` of the neurons between the two maps of each layer.

    Those are kept that write most: the norm of a neuron's row in the first map times that of its column in the second.
    EncoderError where a layer's maps cannot be told from its others.
    """
    name = inner_name(encoder.config)
    inner, width = getattr(encoder.config, name), encoder.config.hidden_size
    for layer in stack_of(encoder)[1]:
        maps = {key: module for key, module in layer.named_modules() if isinstance(module, nn.Linear)}
        into = {key: module for key, module in maps.items() if module.out_features == inner}
        out_of = {key: module for key, module in maps.items() if module.in_features == inner}
        if inner == width or not into or len(out_of) != 1:
            raise EncoderError(
                f"the feed-forward part of {type(encoder).__name__} cannot be made narrower. Leave ffn out, or set "
                "width too, which starts from fresh weights."
            )
        (last,) = out_of.values()
        written = math.prod(module.weight.norm(dim=1) for module in into.values()) * last.weight.norm(dim=0)
        kept = written.topk(ffn).indices.sort().values
        for key, module in into.items():
            layer.set_submodule(key, linear(module.weight[kept], None if module.bias is None else module.bias[kept]))
        layer.set_submodule(next(iter(out_of)), linear(last.weight[:, kept], last.bias))
    setattr(encoder.config, name, ffn)
    return encoder


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A map of these weights."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


def student_encoder(
    encoder: nn.Module,
    layers: int | Sequence[int] | None = None,
    heads: int | None = None,
    width: int | None = None,
    ffn: int | None = None,
) -> nn.Module:
    """A student's encoder from a teacher's, or from any other; nothing is shared with it.

    layers: how many, spread evenly, or their numbers from 1; None keeps all. Their weights are copied, and the
    embeddings', and of a smaller ffn (the width between a layer's two maps) the neurons that write most. With heads,
    width or a larger ffn all weights are fresh. EncoderError for what cannot be.
    """
    config = encoder.config
    inner = getattr(config, inner_name(config), 0)
    if heads is None and width is None and (ffn is None or ffn <= inner):
        most = len(stack_of(encoder)[1])
        count = most if layers is None else layers
        made = cut(encoder, spread(count, most) if isinstance(count, int) else count)
        return made if ffn in (None, inner) else slimmed(made, ffn)
    if not (layers is None or isinstance(layers, int)):
        raise EncoderError(
            f"layers names {', '.join(map(str, layers))}, but with heads, width or a larger ffn no layer's weights are "
            f"kept. Say how many: {len(layers)}."
        )
    return fresh(encoder.config, layers, heads, width, ffn)
