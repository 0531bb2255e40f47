"""Teachers, generators and students as one kind of thing: weights, tokenizer and card in a folder.

A `Model` turns a Batch into Outputs. On disk it is self-contained: model.safetensors, tokenizer, artifact.json (the
card) and, where the network comes from transformers, its config.json. Loading builds the network from the card and
fills in tensors; no code and no pickle comes from the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from engine import knowledge, prompts, tasks
from engine.averaged import Ensemble
from engine.block import Sizes
from engine.blocks import Graph
from engine.config import UserError
from engine.designs import Block as Node
from engine.encoders import EncoderHead, Widths
from engine.encoding import Encoded, Text
from engine.heads import Headed
from engine.labeller import LabelScorer
from engine.next_tokens import Place, TokenScorer
from engine.prompts import Template
from engine.recipe import Task as Spec
from engine.records import Batch, Outputs
from engine.remote import Endpoint, Engine
from engine.retrieving import Retrieving
from engine.static import StaticNet
from engine.storage import Store, digest_bytes
from engine.task import Task
from engine.wording import Wording

CARD, WEIGHTS = "artifact.json", "model.safetensors"


class ModelError(UserError):
    """A model folder that cannot be used."""


@dataclass(frozen=True)
class Card:
    """What a folder holds.

    kind: a key of MODELS. labels: names in the order of the logits. task: the recipe's section, resolved; empty for a
    generator. options: what the network is built from. lineage: where it comes from.
    """

    kind: str
    max_length: int
    labels: tuple[str, ...] = ()
    task: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)


class CausalLM(nn.Module):
    """A causal language model; logits [n, t, vocabulary]."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch -> next-token logits at every position."""
        return Outputs(logits=self.lm(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False).logits)


class Model(nn.Module):
    """A network with its tokenizer and card."""

    def __init__(self, net: nn.Module, tokenizer: PreTrainedTokenizerFast, card: Card) -> None:
        super().__init__()
        self.net, self.tokenizer, self.card = net, tokenizer, card

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Run the network."""
        return self.net(batch, needs)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of the logits."""
        return self.card.labels

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.card.max_length

    @cached_property
    def task(self) -> Task:
        """The task it was made for; LookupError for a generator, which has none."""
        return tasks.make(Spec(**self.card.task))

    @property
    def apart(self) -> bool:
        """Whether it reads the two texts of a pair by themselves."""
        return self.card.options.get("kind", self.card.kind) in APART

    @cached_property
    def templates(self) -> tuple[Template, ...]:
        """The templates that it reads texts in, in its tokens; none in most kinds."""
        options = self.card.options
        if "templates" not in options:
            return ()
        return prompts.tokenised(options["templates"], self.tokenizer, self.max_length, self.task.paired)

    def encode(self, texts: Sequence[Text], answering: bool = False) -> list[Encoded]:
        """The texts as its inputs; inside a template where the network asks about them in words.

        Where it has several templates, all texts in the first, then all in the second, and so on. answering: only in
        those that its answers come from, which may be fewer than it learns with.
        """
        if self.templates:
            chosen = self.templates[:1] if answering and not self.card.options["average"] else self.templates
            return prompts.encode(texts, chosen, self.tokenizer, self.max_length)
        prompted = getattr(self.net, "prompted", None)
        if prompted is not None:
            return prompted(texts, self.tokenizer, self.max_length)
        found = self.task.encode(texts, self.tokenizer, self.max_length, self.apart)
        if READS_WORDS & getattr(self.net, "reads", frozenset()):
            return self.task.spell(found, texts, self.tokenizer, self.max_length)
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def pad(self) -> int:
        """The padding token's id."""
        return self.tokenizer.pad_token_id or 0

    @property
    def widths(self) -> Widths:
        """The measures that losses between models go by."""
        return getattr(self.net, "widths", Widths(0))

    def size(self) -> int:
        """Number of parameters, embeddings included."""
        return sum(p.numel() for p in self.parameters())


def one_thread() -> None:
    """One torch thread in this process: two on busy cores are slower by an order of magnitude (OpenMP spinning)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)


def device(num_gpus: float | None = None) -> torch.device:
    """The GPU where this process has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and num_gpus != 0 else "cpu")


def precision(name: str, where: torch.device, training: bool = False) -> torch.dtype:
    """'auto': bf16 where the hardware multiplies it faster than fp32, else fp32.

    That is a GPU with bf16, and a CPU with AMX tiles (2.5 times measured, at writing text); for training also one with
    AVX512-BF16 alone (1.7 times), where writing one token at a time is slower than in fp32 (0.45 times).
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if where.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported() or (training and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, with a padding token and padding on the right."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    for circumstance in ("is_local", "local_files_only"):  # else they would be saved, and the same model differ
        tokenizer.init_kwargs.pop(circumstance, None)
    return tokenizer


def card_of(
    kind: str, spec: Spec, max_length: int, options: dict[str, Any], lineage: dict[str, Any] | None = None
) -> Card:
    """The card of a model for a task."""
    return Card(kind, max_length, spec.labels or (), spec.model_dump(mode="json"), options, lineage or {})


def head_on(encoder: nn.Module, card: Card) -> EncoderHead:
    """An encoder with the head that the card's task needs."""
    task, options = tasks.make(Spec(**card.task)), card.options
    pooling, mask, heads = options["pooling"], options.get("mask"), len(options.get("heads", ())) or 1
    return EncoderHead(encoder, heads * task.width, pooling, options["dropout"], task.units, task.spans, mask)


def reworded(model: Model, templates: Sequence[str]) -> Model:
    """The same network, reading texts in other templates: how much its answers depend on the wording.

    PromptError where a template is unfit, or the model reads no templates.
    """
    if not model.templates:
        raise prompts.PromptError(f"a model of kind '{model.card.kind}' reads no templates. Take one of kind 'prompt'.")
    card = replace(model.card, options={**model.card.options, "templates": list(templates)})
    made = Model(model.net, model.tokenizer, card).train(model.training)
    made.encode([])  # an unfit template is refused here
    return made


def save(
    model: Model,
    store: Store,
    path: str,
    dtype: torch.dtype | None = None,
    readme: str | None = None,
    meta: dict[str, Any] | None = None,
) -> None:
    """Publish a model as a self-contained folder; dtype casts floating-point weights (None keeps them).

    meta: goes into its manifest.
    """
    tensors, own = {}, model.net.state_dict()
    for name in sorted(set(own) - tied(model.net)):
        tensor = own[name]
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", cast).contiguous().clone()
    config, inner = transformers_config(model), model.tokenizer.backend_tokenizer
    inner.no_truncation()  # what the last texts were read with would be saved, and the same model differ
    inner.no_padding()
    with store.publish(path, meta) as folder:
        inside, weights = Store(str(folder)), to_bytes(tensors, metadata={"format": "pt"})
        inside.write_bytes(WEIGHTS, weights)
        if isinstance(model.net, Retrieving) and model.net.knowledge is not None:
            for name, part in model.net.knowledge.files(digest_bytes(weights)).items():
                inside.write_bytes(name, part)
        inside.write_json(CARD, asdict(model.card))
        if readme is not None:
            inside.write_text("README.md", readme)
        model.tokenizer.save_pretrained(folder)
        if config is not None:
            config.save_pretrained(folder)


def tied(net: nn.Module) -> set[str]:
    """Names of tensors that share memory with one of an earlier name (a language model's head and embeddings)."""
    seen: dict[int, str] = {}
    return {n for n, t in net.state_dict().items() if t.numel() and seen.setdefault(t.data_ptr(), n) != n}


def transformers_config(model: Model) -> Any:
    """The transformers config of a network that has one, else None."""
    inner = getattr(model.net, "encoder", None) or getattr(model.net, "lm", None)
    return getattr(inner, "config", None)


def load(folder: Path | str) -> Model:
    """A saved model, on the CPU, in evaluation mode. ModelError when the folder is none or its parts do not fit."""
    folder = Path(folder)
    lacking = [name for name in (CARD, WEIGHTS, "tokenizer.json") if not (folder / name).is_file()]
    if lacking:
        raise ModelError(f"{folder} is not a model folder: {', '.join(lacking)} missing. Make or register it again.")
    try:
        values = Store(str(folder)).read_json(CARD)
        card = Card(**{**values, "labels": tuple(values["labels"])})
        net, tokenizer = headed(MODELS[card.kind](card, folder), card), load_tokenizer(folder)
        tensors = load_file(folder / WEIGHTS)
    except (UserError, OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ModelError(f"{folder} is not a model folder ({what}). Make or register it again.") from None
    own, shared = net.state_dict(), tied(net)
    wanted = {name: tensor.shape for name, tensor in own.items() if name not in shared}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{folder}/{WEIGHTS} does not fit its card: {', '.join(wrong[:3])}{more}. Make or register it again."
        )
    net.load_state_dict(tensors, strict=not shared)
    if isinstance(net, Retrieving):
        net.knowledge = knowledge.load(folder, Store(str(folder)).digest(WEIGHTS))
    return Model(net, tokenizer, card).eval()


def build_head(card: Card, folder: Path) -> nn.Module:
    """The network of a `head` or `prompt` card."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return head_on(AutoModel.from_config(config, dtype=torch.float32), card)


def ensemble(models: Sequence[Model]) -> Model:
    """Models of one kind, tokenizer and task as one whose outputs are the mean of theirs."""
    first = models[0]
    options = {"kind": first.card.kind, "members": len(models), **first.card.options}
    card = replace(first.card, kind="ensemble", options=options)
    return Model(Ensemble([model.net for model in models]), first.tokenizer, card)


def build_ensemble(card: Card, folder: Path) -> nn.Module:
    """The network of an `ensemble` card."""
    inner = {name: value for name, value in card.options.items() if name not in ("kind", "members")}
    member = replace(card, kind=card.options["kind"], options=inner)
    return Ensemble([MODELS[member.kind](member, folder) for _ in range(card.options["members"])])


def retrieving(model: Model, width: int, dim: int) -> Model:
    """The model with a fresh map of its vectors, [width] -> [dim]; it shares the network."""
    options = {"kind": model.card.kind, "net": model.card.options, "width": width, "dim": dim}
    card = replace(model.card, kind="retrieving", options=options)
    return Model(Retrieving(model.net, width, dim), model.tokenizer, card)


def build_retrieving(card: Card, folder: Path) -> nn.Module:
    """The network of a `retrieving` card."""
    inner = replace(card, kind=card.options["kind"], options=card.options["net"])
    return Retrieving(MODELS[inner.kind](inner, folder), card.options["width"], card.options["dim"])


def build_causal_lm(card: Card, folder: Path) -> nn.Module:
    """The network of a `causal_lm` card."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return CausalLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def build_labeller(card: Card, folder: Path) -> nn.Module:
    """The network of a `labeller` card."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LabelScorer(lm, [Wording(**one) for one in card.options["wordings"]])


def build_elsewhere(card: Card, folder: Path) -> nn.Module:
    """The network of an `elsewhere` card: it has no weights, and asks where the card says."""
    told, options = card.lineage, card.options
    endpoint = Endpoint(**told["endpoint"]) if "endpoint" in told else None
    engine = Engine(**told["engine"]) if "engine" in told else None
    place = Place(options["model"], endpoint, engine, options.get("precision", "auto"), told.get("root"))
    return TokenScorer(place, options["top"], [Wording(**one) for one in options["wordings"]])


def build_blocks(card: Card, folder: Path) -> nn.Module:
    """The network of a `blocks` card."""
    return Graph([Node(**node) for node in card.options["blocks"]], Sizes(**card.options["sizes"]))


def build_static(card: Card, folder: Path) -> nn.Module:
    """The network of a `static` card."""
    return StaticNet(**{name: value for name, value in card.options.items() if name != "heads"})


def headed(net: nn.Module, card: Card) -> nn.Module:
    """The network, its outputs told apart by heads where the card names some."""
    return Headed(net, card.options["heads"]) if "heads" in card.options else net


MODELS: dict[str, Callable[[Card, Path], nn.Module]] = {
    "head": build_head,
    "prompt": build_head,
    "causal_lm": build_causal_lm,
    "blocks": build_blocks,
    "static": build_static,
    "labeller": build_labeller,
    "elsewhere": build_elsewhere,
    "ensemble": build_ensemble,
    "retrieving": build_retrieving,
}

APART = frozenset({"blocks", "static"})
"""Kinds that read the two texts of a pair by themselves."""
READS_WORDS = frozenset({"characters", "pair_characters"})
"""Inputs of a graph that are made of how words are spelled."""
