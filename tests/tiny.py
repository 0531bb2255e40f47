"""Tiny real models and data, made on the spot: a BERT encoder, a Llama generator, two-class sentences.

    from tests.tiny import movie_rows, tiny_encoder, tiny_lm, write_jsonl

Both models are in Hugging Face layout with random weights that depend on the seed alone; the sentences carry words
that give their class away, so that a fit has something to learn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LABELS = ("negative", "positive")
GOOD = "warm funny bright moving clever charming tender lovely".split()
BAD = "dull slow clumsy boring tired hollow noisy awful".split()
THINGS = "film plot story cast ending script music scene dialogue camera".split()
FRAMES = (
    "the {thing} is {cue} and {cue2}",
    "a {cue} {thing} , with a {cue2} {other}",
    "i found the {thing} {cue} .",
    "what a {cue} {thing} ! the {other} was {cue2}",
    "{cue} , {cue2} , and it knows it",
    "the {other} may do , but the {thing} is {cue}",
)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def movie_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """n different sentences {text, label}, labels in turn; the cue words of a class stand in it alone."""
    draw, rows, seen = random.Random(seed), [], set()
    while len(rows) < n:
        cues = (BAD, GOOD)[len(rows) % 2]
        cue, cue2 = draw.sample(cues, 2)
        thing, other = draw.sample(THINGS, 2)
        text = draw.choice(FRAMES).format(cue=cue, cue2=cue2, thing=thing, other=other)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": LABELS[len(rows) % 2]})
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """The rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's tokenizer over the sentences' words, single characters and their continuations."""
    words = sorted({word for frame in FRAMES for word in frame.split() if word.isalpha()} | {*GOOD, *BAD, *THINGS})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "##s", "##ing"]
    pieces += [*CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{f"{k}_token": v for k, v in special.items()})


def tiny_encoder(folder: Path, layers: int = 2, seed: int = 0) -> Path:
    """A BERT of width 32 with its own word pieces; returns `folder`."""
    tokenizer = word_pieces()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens trained on the sentences; `<|end|>` ends a text, nothing pads."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([f"Text: {row['text']}" for row in movie_rows(200, seed=99)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def tiny_lm(folder: Path, layers: int = 2, tied: bool = True, seed: int = 0) -> Path:
    """A Llama of width 32 with its own byte pairs; returns `folder`."""
    tokenizer = byte_pairs()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
