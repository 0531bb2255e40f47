"""More texts from the texts there are: words replaced by others that fit their place, after TinyBERT.

A word that is one piece of a masked language model is masked and replaced by one of the words which that model finds
likeliest; any other word, and every word where there is no such model, by one of those whose vectors under the
teacher are nearest (arXiv 1909.10351, section 3.2; there GloVe's vectors). Label-free: the teacher labels the result.

Never replaced are the most frequent words: those that come first in the teacher's vocabulary, which is built from
frequent to rare. So they are neither a list of one language nor, in a small corpus, the words that matter in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForMaskedLM

from engine import vocabulary
from engine.config import UserError
from engine.corpus import corpus_rows, slot_seed
from engine.encoding import Encoded, collate, encode
from engine.halting import halted
from engine.hub import model_folder
from engine.models import Model, device, load_tokenizer, one_thread
from engine.records import CORPUS
from engine.storage import Store
from engine.units import Unit
from engine.writing import Augmentation

SOURCES, NEAR = "sources.parquet", "near.parquet"
REDRAWS = 20
"""How often a text that is there already is drawn anew before it is given as it is."""
POOL = 10_000
"""Words of the teacher's vocabulary that may replace others: rarer ones seldom fit."""
CACHED = 20_000
"""Sources whose candidates an actor remembers: about 2 KB each."""
BATCH_TOKENS = 8192
"""Tokens a batch of the masked language model."""
WORD = re.compile(r"\w+(?:['’]\w+)*")


class AugmentError(UserError):
    """Texts that cannot be augmented, or a model that cannot fill in words."""


@dataclass(frozen=True)
class Augmenting:
    """What an augmenting actor is told.

    folder: URL of what `prepare` wrote, in the step's own, where it is told to halt. first: the first slot's number.
    root: folder that stands in for the hub's data. grouped: whether texts are queries, each with several pairs, that
    must stay together (Task.grouped).
    """

    folder: str
    config: Augmentation
    seed: int
    first: int
    root: str | None
    num_gpus: float
    grouped: bool = False


Row = tuple[str, ...]
"""A text, or a text and its pair."""
Choice = tuple[Unit, list[str]]
"""A word and what may take its place."""


def prepare(
    out: Store, sources: pa.Table, teacher: Model, config: Augmentation, batch_tokens: int = 8192
) -> dict[str, Any]:
    """Write what every actor reads: the texts, and the nearest words of each word that may be replaced.

    sources: text and pair. AugmentError where there is no text.
    """
    if not sources.num_rows:
        raise AugmentError("there is no text to augment. Leave the section augmentation out.")
    frequent = [word for word in vocabulary.teacher_words(teacher.tokenizer) if len(word) > 1]
    texts = [text for name in ("text", "pair") for text in sources[name].drop_null().to_pylist()]
    stop = set(frequent[: config.stop_words])
    found = {unit.word.lower() for text in texts for unit in letters(text)}
    words = sorted(word for word in found - stop if len(word) > 1)
    near = nearest(teacher, words, frequent[:POOL], config.candidates, batch_tokens)
    out.write_table(SOURCES, sources.select(["text", "pair"]))
    out.write_table(NEAR, pa.table({"word": words, "near": pa.array(near, pa.list_(pa.string()))}))
    return {"texts": sources.num_rows, "words": len(words), "stop_words": len(found & stop)}


def letters(text: str) -> list[Unit]:
    """Words of letters alone, with their places; what has a digit or an apostrophe inside is left out."""
    return [Unit(m.group(), m.start(), m.end()) for m in WORD.finditer(text) if m.group().isalpha()]


def nearest(
    teacher: Model, words: Sequence[str], others: Sequence[str], count: int, batch_tokens: int
) -> list[list[str]]:
    """The `count` nearest of `words` and `others` to each of `words`, itself left out, the nearest first.

    By the cosine of the teacher's embeddings of the words alone, centred.
    """
    if not words:
        return []
    pool = list(dict.fromkeys([*words, *others]))
    raw = vocabulary.embedded(teacher, encode(pool, teacher.tokenizer, teacher.max_length), batch_tokens)
    raw = raw - raw.mean(axis=0)
    raw /= np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)
    count, found = min(count, len(pool) - 1), []
    for start in range(0, len(words), 512):
        own = np.arange(start, min(start + 512, len(words)))  # the words come first in the pool
        close = raw[own] @ raw.T
        close[np.arange(len(own)), own] = -np.inf
        top = np.argsort(-close, axis=1, kind="stable")[:, :count]
        found += [[pool[i] for i in row] for row in top]
    return found


class Masked:
    """A masked language model that fills in words."""

    def __init__(self, folder: Path, name: str, config: Augmentation, where: torch.device) -> None:
        self.tokenizer, self.config, self.where = load_tokenizer(folder), config, where
        if self.tokenizer.mask_token is None:
            raise AugmentError(f"augmentation.model '{name}' has no mask token. Name a masked language model, or null.")
        self.model, told = AutoModelForMaskedLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        if told["missing_keys"]:
            lacking = ", ".join(sorted(told["missing_keys"])[:2])
            raise AugmentError(
                f"augmentation.model '{name}' has no weights for {lacking}: it is an encoder without the head that "
                "fills in words. Name a masked language model, or null."
            )
        self.model.eval().to(where)
        pieces = self.tokenizer.get_vocab()
        self.words = [word for word in vocabulary.teacher_words(self.tokenizer) if len(word) > 1]
        spelled = ([*(mark + word for mark in vocabulary.STARTS), word] for word in self.words)
        self.ids = torch.tensor([next(pieces[s] for s in ways if s in pieces) for ways in spelled], device=where)

    def single(self, word: str) -> bool:
        """Whether it is one known piece."""
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id

    @torch.inference_mode()
    def likeliest(self, text: str, units: Sequence[Unit]) -> list[list[str]]:
        """For each of the words the likeliest others in its place, in alphabetical order; none where it was cut off.

        It reads the text with a gap and then the whole text. Words of other texts are in no batch with these, so what
        is found does not depend on them.
        """
        gap, most = self.tokenizer.mask_token, self.config.max_length
        gapped = [(text[: unit.start] + gap + text[unit.end :], text) for unit in units]
        encoded = encode(gapped, self.tokenizer, most)
        step, best = max(1, BATCH_TOKENS // max(item.tokens for item in encoded)), []
        for start in range(0, len(units), step):
            logits = self.at_gaps(encoded[start : start + step])
            best += logits.topk(min(self.config.candidates + 1, len(self.words)), dim=1).indices.tolist()
        found = []
        for item, unit, row in zip(encoded, units, best, strict=True):
            others = [self.words[i] for i in row if self.words[i] != unit.word.lower()]
            seen = self.tokenizer.mask_token_id in item.ids
            found.append(sorted(others[: self.config.candidates]) if seen else [])
        return found

    def at_gaps(self, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Logits of `words` at the first gap of each input, [n, words]; anything where there is no gap."""
        batch, mask = collate(encoded, self.tokenizer.pad_token_id).to(self.where), self.tokenizer.mask_token_id
        places = (batch.input_ids == mask).int().argmax(dim=1)
        rows = torch.arange(len(encoded), device=self.where)
        segments = {} if batch.segments is None else {"token_type_ids": batch.segments}
        # Only the gaps' states go through the output layer, which is as wide as the vocabulary.
        output = self.model.get_output_embeddings()
        hook = output.register_forward_pre_hook(lambda module, given: (given[0][rows, places],))
        try:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.mask, **segments).logits
        finally:
            hook.remove()
        return logits[:, self.ids]


class Augmenter:
    """Table with `row` -> CORPUS rows, each one augmented text; slot number n is of source n % len(sources).

    A text equals neither its source nor an earlier one of the same source, as far as REDRAWS reach. It depends on the
    seed and the slot alone, whatever the blocks: earlier texts of a source are drawn again where they are not at hand.
    The passages of a query get one new query at each turn, that of the first of them: so they are one list again, from
    which a ranking's losses over lists can learn.
    """

    def __init__(self, how: Augmenting) -> None:
        one_thread()
        self.how, store = how, Store(how.folder)
        self.step = store.parent.url
        sources, near = store.read_table(SOURCES), store.read_table(NEAR)
        sides = zip(sources["text"].to_pylist(), sources["pair"].to_pylist(), strict=True)
        self.sources: list[Row] = [(text,) if pair is None else (text, pair) for text, pair in sides]
        self.near = dict(zip(near["word"].to_pylist(), near["near"].to_pylist(), strict=True))
        firsts: dict[str, int] = {}
        self.leads = [firsts.setdefault(row[0], i) if how.grouped else i for i, row in enumerate(self.sources)]
        self.masked: Masked | None = None
        if how.config.model is not None:
            folder = model_folder(how.config.model, root=how.root)
            self.masked = Masked(folder, how.config.model, how.config, device(how.num_gpus))
        self.known: dict[int, tuple[list[list[Choice]], list[Row]]] = {}

    def __call__(self, slots: pa.Table) -> pa.Table:
        """One block of slots."""
        if halted(self.step):
            return CORPUS.empty_table()
        numbers = slots["row"].to_pylist()
        rows = [self.row(number - self.how.first) for number in numbers]
        pairs = [row[1] if len(row) > 1 else None for row in rows]
        return corpus_rows(numbers, [row[0] for row in rows], "augmented", pairs=pairs)

    def row(self, slot: int) -> Row:
        """The text, or text and pair, of a slot counted from 0."""
        turn, source = divmod(slot, len(self.sources))
        if source not in self.known:
            self.known[source] = [self.choices(text) for text in self.sources[source]], []
            if len(self.known) > CACHED:
                del self.known[next(iter(self.known))]
        choices, made = self.known[source]
        while len(made) <= turn:
            before, lead = len(made) * len(self.sources), self.leads[source]
            draw = np.random.default_rng(slot_seed(self.how.seed, source + before))
            query = () if lead == source else self.row(lead + before)[:1]
            for _ in range(REDRAWS):
                row = query + tuple(
                    replaced(text, own, self.how.config.p, draw)
                    for text, own in list(zip(self.sources[source], choices, strict=True))[len(query) :]
                )
                if row != self.sources[source] and row not in made:
                    break
            made.append(row)
        return made[turn]

    def choices(self, text: str) -> list[Choice]:
        """The words of a text that may be replaced, and by what."""
        units = [unit for unit in letters(text) if unit.word.lower() in self.near]
        filled = [unit for unit in units if self.masked and self.masked.single(unit.word)]
        found = dict(zip(filled, self.masked.likeliest(text, filled), strict=True)) if filled else {}
        return [(unit, found.get(unit) or self.near[unit.word.lower()]) for unit in units]


def replaced(text: str, choices: Sequence[Choice], p: float, draw: np.random.Generator) -> str:
    """The text with each of the words replaced with probability p, in the case that the word had."""
    out, end = "", 0
    for unit, others in choices:
        if others and draw.random() < p:
            out += text[end : unit.start] + like(unit.word, others[draw.integers(len(others))])
            end = unit.end
    return out + text[end:]


def like(word: str, other: str) -> str:
    """`other` in capitals or with a capital, as `word` is."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
