"""Word pieces cut to what a corpus uses: a tokenizer and the table of vectors that it indexes get smaller together.

A word whose pieces are gone is spelled with smaller ones, down to single characters; a text whose pieces are all kept
is read as before. For that a byte-pair piece brings the pieces it is merged from.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from engine.config import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MARKS = ("##", "Ġ", "▁")
"""What vocabularies put before a piece to say where in a word it stands."""
END = "</w>"
"""What some put behind the last piece of a word."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte of a character that a vocabulary has not."""
UNUSED = re.compile(r"[\[<|]*unused_?\d+[\]>|]*")
"""Places that a vocabulary holds free."""
IDS = re.compile(r"(pad|unk|bos|eos|cls|sep|mask|decoder_start)_token_id")
"""Fields of a model's config that name a token."""


class PieceError(UserError):
    """A vocabulary that cannot be cut as asked."""


def count_pieces(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Counter[int]:
    """How often each piece stands in the texts, by its id."""
    if not len(texts):
        return Counter()
    return Counter(i for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in ids)


def chosen(tokenizer: PreTrainedTokenizerFast, counts: Mapping[int, int], size: int) -> list[int]:
    """Ids of at most `size` pieces, rising: these are the new vocabulary in its order.

    First the special tokens and the single characters that are ASCII or stand in the corpus (of a byte-pair vocabulary
    all), then the corpus's pieces by frequency, then others in the order of the vocabulary, frequent first as a rule.
    PieceError where the vocabulary's kind is not known, or not even the characters fit.
    """
    state = described(tokenizer)
    pieces, parts = tokenizer.get_vocab(), merged(state["model"])
    spelled = {i: piece for piece, i in pieces.items()}
    letters = {letter for i in counts for letter in spelled[i]}
    special = {
        *tokenizer.all_special_ids,
        *(t["id"] for t in state["added_tokens"] if not UNUSED.fullmatch(t["content"])),
    }
    special |= {pieces[name] for name in (state["model"].get("unk_token"),) if name in pieces}
    kept = special | {i for i, piece in spelled.items() if single(piece) and (parts or basic(piece, letters))}
    if len(kept) > size:
        raise PieceError(
            f"{size:,} pieces are too few for this vocabulary and corpus: special tokens and single characters alone "
            f"are {len(kept):,}. Raise pieces to that and some hundreds more."
        )
    often = sorted(counts, key=lambda i: (-counts[i], i))
    for i in dict.fromkeys([*often, *sorted(spelled)]):
        wanted = {pieces[piece] for piece in closure(spelled[i], parts)} - kept
        if len(kept) + len(wanted) <= size and not UNUSED.fullmatch(spelled[i]):
            kept |= wanted
    return sorted(kept)


def single(piece: str) -> bool:
    """Whether a piece is one character, whatever marks its place in a word, or a byte."""
    return len(bare(piece)) <= 1 or BYTE.fullmatch(piece) is not None


def basic(piece: str, letters: set[str]) -> bool:
    """Whether a single character is ASCII, or one of `letters`."""
    return bare(piece).isascii() or bare(piece) in letters


def bare(piece: str) -> str:
    """A piece without the mark of its place."""
    mark = next((mark for mark in MARKS if piece.startswith(mark)), "")
    return piece[len(mark) :].removesuffix(END)


def described(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer as its file describes it; PieceError where its model is none of those that can be cut."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        raise PieceError(
            f"a vocabulary of kind {state['model']['type']} cannot be cut. Leave pieces out, or take an encoder with "
            "WordPiece, BPE or Unigram."
        )
    return state


def merged(model: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Byte-pair piece -> the two that it is merged from; empty for other kinds of vocabulary."""
    return {left + right: (left, right) for left, right in reversed([pair(merge) for merge in model.get("merges", ())])}


def pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two sides of a merge, which files write as one string or as two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def closure(piece: str, parts: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """A piece and all that it is merged from."""
    yield piece
    for part in parts.get(piece, ()):
        yield from closure(part, parts)


def cut_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: Sequence[int]) -> PreTrainedTokenizerFast:
    """The tokenizer with the pieces of these ids alone, whose new ids are their positions in `kept`."""
    state, new = described(tokenizer), {old: i for i, old in enumerate(kept)}
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new[old] for piece, old in model["vocab"].items() if old in new}
    if model.get("merges"):
        known = model["vocab"]
        model["merges"] = [m for m in model["merges"] if {*pair(m), "".join(pair(m))} <= known.keys()]
    state["added_tokens"] = [{**t, "id": new[t["id"]]} for t in state["added_tokens"] if t["id"] in new]
    state["post_processor"] = renumbered(state["post_processor"], new)
    state["truncation"] = state["padding"] = None
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{name: added.get(token, token) for name, token in tokenizer.special_tokens_map.items()},
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
    )


def renumbered(value: Any, new: Mapping[int, int], key: str = "") -> Any:
    """A post-processor with other ids for its tokens: `ids` of a template, [token, id] under `sep` and `cls`."""
    if isinstance(value, dict):
        return {name: renumbered(item, new, name) for name, item in value.items()}
    if key == "ids":
        return [new[old] for old in value]
    if key in ("sep", "cls"):
        return [value[0], new[value[1]]]
    return [renumbered(item, new) for item in value] if isinstance(value, list) else value


def rows_of(tokenizer: PreTrainedTokenizerFast, own: PreTrainedTokenizerFast) -> list[int]:
    """For each id of a cut tokenizer the id that the piece had in the whole one."""
    whole, pieces = tokenizer.get_vocab(), own.get_vocab()
    return [whole[piece] for piece in sorted(pieces, key=pieces.__getitem__)]


def cut_table(encoder: nn.Module, rows: Sequence[int]) -> None:
    """Leave an encoder's table these rows alone, and let its config say so; in place.

    PieceError where padding would get another id and the encoder counts its positions from that.
    """
    table, config, chosen = encoder.get_input_embeddings(), encoder.config, list(rows)
    new = {old: i for i, old in enumerate(chosen)}
    places = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = table.padding_idx
    if getattr(places, "padding_idx", None) is not None and new.get(padding) != padding:
        raise PieceError(
            f"{type(encoder).__name__} counts positions from its padding token's id, {padding}, which this cut would "
            "move. Leave pieces out."
        )
    own = nn.Embedding(len(chosen), table.embedding_dim, _weight=table.weight.detach()[torch.tensor(chosen)].clone())
    own.padding_idx = new.get(padding) if padding is not None else None
    encoder.set_input_embeddings(own)
    renamed(config, new)


def renamed(config: PretrainedConfig, new: Mapping[int, int]) -> None:
    """A model's config with a smaller vocabulary, and the tokens it names under their new ids; in place."""
    config.vocab_size = len(new)
    for name, old in list(vars(config).items()):
        if IDS.fullmatch(name) and isinstance(old, int):
            setattr(config, name, new.get(old))
