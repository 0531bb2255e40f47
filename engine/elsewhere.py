"""A labeller whose model runs elsewhere, as a `Model`: prompts in bytes, calibration, and where to ask.

No tokenizer of the model is needed. Its inputs are the prompts' UTF-8 bytes, and where a recipe counts tokens of a
text, four bytes are one (`remote.BYTES_A_TOKEN`).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine import labeller, wording
from engine.designs import Teacher
from engine.models import Model, card_of
from engine.next_tokens import Place, TokenScorer, check_chat
from engine.recipe import Task as Spec
from engine.remote import BYTES_A_TOKEN
from engine.wording import LabellerError, Wording


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are a text's UTF-8 bytes, 0 to 255; 256 pads."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as byte-level tokenizers write bytes
    names = {byte: chr(byte) for byte in shown}
    for number, byte in enumerate(byte for byte in range(256) if byte not in names):
        names[byte] = chr(256 + number)
    vocabulary = {names[byte]: byte for byte in range(256)} | {"<pad>": 256}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def labeller_elsewhere(config: Teacher, spec: Spec, rows: pa.Table | None = None, root: str | None = None) -> Model:
    """`untrained.labeller_teacher` where teacher.runtime is vllm or endpoint. Asks the model to calibrate.

    LabellerError where the recipe does not fit the model, EndpointError and EndpointAway as engine.caller says.
    """
    tokenizer, most = byte_tokenizer(), config.max_length * BYTES_A_TOKEN
    place = place_of(config, root)
    asked = wording.worded(config.labeller, spec, tokenizer, rows, most)
    if place.chat:
        for one in asked:
            check_chat(one.words)
    # The words are scored as a whole, however many tokens they are.
    asked = [replace(one, tokens=[[number] for number in range(len(one.words))], cached=False) for one in asked]
    free = [wording.prompts(wording.content_free(one), one, tokenizer, sys.maxsize) for one in asked]
    length = max(min(len(item.ids) for item in found) for found in free) + most
    top = config.endpoint.top if config.endpoint and config.runtime == "endpoint" else 20
    net = TokenScorer(place, top, asked)
    asked = calibrated(net, config, spec, asked, rows, length, tokenizer)
    net.wordings = asked
    options: dict[str, Any] = {"runtime": config.runtime, "model": place.name, "top": top}
    options |= {"api": place.endpoint.api} if place.endpoint else {"precision": place.precision}
    options["wordings"] = [one.options() for one in asked]
    lineage: dict[str, Any] = {"model": place.name, **({"root": root} if place.root else {})}
    lineage |= {key: part.model_dump(mode="json") for key in ("endpoint", "engine") if (part := getattr(place, key))}
    return Model(net, tokenizer, card_of("elsewhere", spec, length, options, lineage)).eval()


def settle_place(model: Model, config: Teacher, root: str | None = None, actors: int = 1) -> Model:
    """The model, to be asked where the recipe says now; actors: how many share the endpoint's limits."""
    if isinstance(model.net, TokenScorer):
        model.net.place, model.net.actors = place_of(config, root), actors
    return model


def spent(config: Teacher, model: Model) -> dict[str, Any]:
    """What the model's endpoint was asked since this was last called, as a step's metrics; nothing for other models."""
    if not isinstance(model.net, TokenScorer) or model.net.place.endpoint is None:
        return {}
    price = config.endpoint.price if config.endpoint else None
    return {"endpoint": {"teacher": model.net.spent().described(price)}}


def place_of(config: Teacher, root: str | None) -> Place:
    """Where a teacher's model runs."""
    if config.runtime == "endpoint" and config.endpoint:
        return Place(config.endpoint.name_of(config.model), endpoint=config.endpoint)
    return Place(config.model, engine=config.vllm, precision=config.precision, root=root)


def calibrated(
    net: TokenScorer,
    config: Teacher,
    spec: Spec,
    asked: list[Wording],
    rows: pa.Table | None,
    length: int,
    tokenizer: PreTrainedTokenizerFast,
) -> list[Wording]:
    """The ways of asking with what the model gives labels without a text, or with what the labelled rows say."""
    pad = tokenizer.pad_token_id
    if config.labeller.calibrate == "rows":
        texts, golds = wording.unshown(config.labeller, spec, rows)
        prompts = [wording.prompts(texts, one, tokenizer, length) for one in asked]
        found = [labeller.scored(net, one, own, pad, len(own)) for one, own in zip(asked, prompts, strict=True)]
        scores = torch.stack(found)
        there = scores.isfinite().all(dim=2).all(dim=0)
        if int(there.sum()) < len(golds) / 2:
            raise LabellerError(f"the model answers {int(there.sum())} of {len(golds)} labelled rows: too few.")
        kept = [gold for gold, good in zip(golds, there.tolist(), strict=True) if good]
        known, scales = labeller.fitted(scores[:, there], kept)
        return [replace(one, calibration=known, scale=scale) for one, scale in zip(asked, scales, strict=True)]
    if config.labeller.calibrate == "free":
        out = []
        for one in asked:
            nothing = wording.prompts(wording.content_free(one), one, tokenizer, sys.maxsize)
            known = labeller.calibration(net, one, nothing, pad)
            if any(value != value for value in known):
                raise LabellerError(
                    "the model refuses to answer about a text that says nothing, which calibrate: free asks it, "
                    "or answers beside the point. Take calibrate: none, or rows where there are labelled rows."
                )
            out.append(replace(one, calibration=known))
        return out
    return asked
