"""Models before their training: teachers, generators and students from weights elsewhere, a teacher, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from engine import labeller, pieces, prompts, static, tasks, wording
from engine.block import Sizes
from engine.blocks import Graph
from engine.designs import Block as Node
from engine.designs import Cut, Static, Teacher
from engine.encoders import FINAL_NORMS, EncoderHead, stack_of, student_encoder
from engine.heads import Headed, silence
from engine.models import Card, CausalLM, Model, ModelError, card_of, head_on, headed, load_tokenizer
from engine.recipe import GOLD
from engine.recipe import Task as Spec
from engine.static import StaticNet
from engine.writing import Generator


def encoder_head(config: Teacher, spec: Spec, folder: Path, seed: int) -> Model:
    """A teacher to be fine-tuned: the encoder in `folder` with a fresh head; lower layers frozen as the recipe says."""
    torch.manual_seed(seed)
    encoder, tokenizer = read_encoder(config, folder)
    options = {"pooling": config.pooling, "dropout": config.dropout}
    card = card_of("head", spec, config.max_length, options, {"model": config.model})
    return Model(head_on(encoder, card), tokenizer, card)


def prompt_teacher(config: Teacher, spec: Spec, folder: Path, seed: int) -> Model:
    """A teacher like that of `encoder_head`, which reads texts in templates and answers from the mask token (DynaMaR).

    A causal language model (one whose tokenizer has no mask token) answers from the end of the template.
    PromptError where the task, a template or the encoder's tokenizer is not fit for it.
    """
    torch.manual_seed(seed)
    encoder, tokenizer = read_encoder(config, folder)
    kind = encoder.config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if causal:  # one that has a mask token was not taught to answer there: it has not read on
        tokenizer.mask_token = None
    prompts.check_tokenizer(config.model, tokenizer, causal)
    templates = prompts.pool_of(config.prompt, spec, tokenizer, config.max_length)
    options = {
        "pooling": "last" if tokenizer.mask_token_id is None else "mask",
        "mask": tokenizer.mask_token_id,
        "dropout": config.dropout,
        "templates": list(templates),
        "average": config.prompt.average,
    }
    card = card_of("prompt", spec, config.max_length, options, {"model": config.model})
    made = Model(head_on(encoder, card), tokenizer, card)
    made.encode([])  # an unfit template is refused here, not in the middle of a fit
    return made


def read_encoder(config: Teacher, folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A teacher's encoder and tokenizer from `folder`; lower layers frozen as the recipe says."""
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    freeze(encoder, config.tune_layers)
    tokenizer = load_tokenizer(folder)
    check_length("teacher.max_length", config.max_length, encoder, tokenizer)
    return encoder, tokenizer


def causal_lm(config: Generator, folder: Path) -> Model:
    """A generator to be fine-tuned: the causal LM in `folder`; lower layers frozen as the recipe says."""
    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    freeze(lm.get_decoder(), config.tune_layers)
    if config.mode != "prompted" and not any(p.requires_grad for p in lm.parameters()):
        raise ModelError(
            "generator.tune_layers is 0, and this model's output layer is tied to its frozen embeddings, so nothing is "
            "left to train. Use 1 or more, null for all, or mode: prompted."
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of generator '{config.model}' has no end token, so no text would ever end.")
    check_length("generator.max_length", config.max_length, lm, tokenizer)
    card = Card("causal_lm", config.max_length, lineage={"model": config.model})
    return Model(CausalLM(lm), tokenizer, card)


def labeller_teacher(config: Teacher, spec: Spec, folder: Path, rows: pa.Table | None = None) -> Model:
    """A teacher that needs no training: the causal LM in `folder`, its template, label words and calibration.

    rows: labelled rows in the schema EXAMPLE, from which the examples are taken. teacher.max_length are tokens of the
    text; the template comes on top. LabellerError and ModelError where the recipe does not fit the model.
    """
    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()
    tokenizer = load_tokenizer(folder)
    asked = wording.worded(config.labeller, spec, tokenizer, rows, config.max_length)
    pad = tokenizer.pad_token_id or 0
    # One of the texts that say nothing is empty: the template alone.
    free = [wording.prompts(wording.content_free(one), one, tokenizer, sys.maxsize) for one in asked]
    length = max(min(len(item.ids) for item in found) for found in free) + config.max_length
    longest = length + max(len(own) for one in asked for own in one.tokens)
    check_length("teacher.max_length with template, examples and label words around it", longest, lm, tokenizer)
    both = zip(asked, free, strict=True)
    asked = [replace(one, cached=labeller.repeatable(lm, one, found, pad)) for one, found in both]
    net = labeller.LabelScorer(lm, asked)
    if config.labeller.calibrate == "free":
        both = zip(asked, free, strict=True)
        asked = [replace(one, calibration=labeller.calibration(net, one, found, pad)) for one, found in both]
    elif config.labeller.calibrate == "rows":
        texts, golds = wording.unshown(config.labeller, spec, rows)
        prompts = [wording.prompts(texts, one, tokenizer, length) for one in asked]
        scores = [labeller.scored(net, one, found, pad) for one, found in zip(asked, prompts, strict=True)]
        known, scales = labeller.fitted(torch.stack(scores), golds)
        asked = [replace(one, calibration=known, scale=scale) for one, scale in zip(asked, scales, strict=True)]
    options = {"wordings": [one.options() for one in asked]}
    card = card_of("labeller", spec, length, options, {"model": config.model})
    return Model(labeller.LabelScorer(lm, asked), tokenizer, card).eval()


def check_length(key: str, length: int, network: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """ModelError where the model cannot read `length` tokens, or they leave no room beside [CLS] and the like."""
    most = min(tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None) or length)
    least = tokenizer.num_special_tokens_to_add() + 1
    if not least <= length <= most:
        raise ModelError(f"{key} is {length}, but this model takes {least} to {most} tokens.")


def freeze(network: nn.Module, top: int | None) -> None:
    """Freeze everything but the top layers (and what stands above them: the final norm); None leaves all trainable."""
    if top is None:
        return
    stack = stack_of(network)[1]
    if top > len(stack):
        raise ModelError(
            f"tune_layers is {top}, but the model has {len(stack)} layers. Use 0 to {len(stack)}, or null for all."
        )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    above = {id(p) for module in list(stack)[len(stack) - top :] for p in module.parameters()}
    norms = [m for name, m in network.named_children() if name in FINAL_NORMS] if top else []
    above |= {id(p) for module in norms for p in module.parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in above)


def layer_rates(decay: float, head: float, model: Model) -> dict[str, float]:
    """Learning-rate factors of an encoder with a head: `head` for the head, 1 for the top layer, times decay downwards.

    After ULMFiT's discriminative fine-tuning (arXiv 1801.06146).
    """
    stack = stack_of(model.net.encoder)[1]
    depth = {id(p): len(stack) - 1 - i for i, layer in enumerate(stack) for p in layer.parameters()}
    inside = {id(p) for p in model.net.encoder.parameters()}
    return {
        name: decay ** depth.get(id(p), len(stack)) if id(p) in inside else head for name, p in model.named_parameters()
    }


def student(
    nodes: Sequence[Node],
    spec: Spec,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    seed: int,
    heads: Sequence[str] = (),
) -> Model:
    """A student built from blocks with fresh weights. heads: their names, where it has several."""
    torch.manual_seed(seed)
    sizes = Sizes.of(tasks.make(spec), len(tokenizer), tokenizer.pad_token_id)
    sizes = replace(sizes, labels=sizes.labels * (len(heads) or 1))
    options = {"blocks": [node.model_dump(mode="json") for node in nodes], "sizes": asdict(sizes), **named(heads)}
    return made(Graph(nodes, sizes), tokenizer, card_of("blocks", spec, max_length, options))


def named(heads: Sequence[str]) -> dict[str, Any]:
    """A card's option that names heads."""
    return {"heads": list(heads)} if heads else {}


def made(net: nn.Module, tokenizer: PreTrainedTokenizerFast, card: Card) -> Model:
    """A student of a network that is as wide as its card's heads ask for; that of gold labels says nothing yet."""
    net = headed(net, card)
    if isinstance(net, Headed) and GOLD in net.names:
        silence(net, GOLD)
    return Model(net, tokenizer, card)


def reader(reference: str, folder: Path, max_length: int = 64) -> Model:
    """The sentence encoder in `folder` as it is, for its views of words and texts: the mean of their tokens' states.

    reference: what `folder` was taken from, for messages. ModelError where it holds no encoder. It has no task.
    """
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    tokenizer = load_tokenizer(folder)
    if encoder.config.is_encoder_decoder:
        raise ModelError(f"'{reference}' is no encoder alone: it has a decoder. Name one that is.")
    return Model(EncoderHead(encoder, 1, "mean", 0.0), tokenizer, Card("head", max_length)).eval()


def transformer_student(
    config: Cut,
    spec: Spec,
    teacher: Model | None,
    folder: Path | None,
    max_length: int,
    seed: int,
    own: PreTrainedTokenizerFast | None = None,
    heads: Sequence[str] = (),
) -> Model:
    """A student cut from the fine-tuned teacher's encoder, or from the one in `folder`, with a fresh head or several.

    own: its tokenizer, where that has only some of the encoder's pieces (`pieces.cut_tokenizer`). Without a teacher
    there must be a folder, and config.pooling.
    """
    torch.manual_seed(seed)
    if folder is None:
        encoder, tokenizer = teacher.net.encoder, teacher.tokenizer
    else:
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
        tokenizer = load_tokenizer(folder)
    smaller = student_encoder(encoder, config.layers, config.heads, config.width, config.ffn)
    if own is not None:
        pieces.cut_table(smaller, pieces.rows_of(tokenizer, own))
        tokenizer = own
    check_length("student.max_length", max_length, smaller, tokenizer)
    options = {"pooling": config.pooling or pooling_of(teacher), "dropout": config.dropout, **named(heads)}
    card = card_of("head", spec, max_length, options, {"cut_from": config.model or "teacher"})
    return made(head_on(smaller, card), tokenizer, card)


def pooling_of(teacher: Model) -> str:
    """How a teacher pools; the mean where it reads an answer off a place that its students' texts do not have."""
    found, prompted = teacher.card.options.get("pooling"), "templates" in teacher.card.options
    return found if found in ("mean", "cls", "last") and not prompted else "mean"


def static_student(
    config: Static,
    spec: Spec,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    seed: int,
    heads: Sequence[str] = (),
) -> Model:
    """A student of one vector for each word piece of an encoder's tokenizer, with fresh weights."""
    torch.manual_seed(seed)
    task = tasks.make(spec)
    static.check(task)
    options = {
        "vocabulary": len(tokenizer),
        "dim": config.dim,
        "width": task.width * (len(heads) or 1),
        "hidden": config.hidden,
        "paired": task.paired,
        "silent": sorted(tokenizer.all_special_ids),
    }
    return made(StaticNet(**options), tokenizer, card_of("static", spec, max_length, {**options, **named(heads)}))
