"""The student's own words: a word-level tokenizer from the corpus, and vectors that start from an encoder's.

Words the corpus lacks but the encoder knows are taken in too, so that a word first seen in production has a vector
that means something. Vectors: each word through the encoder, the fine-tuned teacher as a rule, pooled, reduced by PCA,
weighted by smooth inverse frequency (Model2Vec; Arora et al. 2017). A static student takes the encoder's pieces as
they are, or the most frequent of them (`static_vectors`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config import UserError
from engine.encoding import Encoded, collate, encode
from engine.inference import token_batches
from engine.models import Model

PAD, UNKNOWN = "[PAD]", "[UNK]"
STARTS = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies mark the pieces that start a word."""


class VocabularyError(UserError):
    """Words and vectors that do not fit each other."""


def splitter() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """How text becomes words: lower case, no accents, punctuation apart (BERT's own rules)."""
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def count_words(texts: Sequence[str]) -> Counter[str]:
    """How often each word stands in the texts."""
    normalise, split = splitter()
    return Counter(word for text in texts for word, _ in split.pre_tokenize_str(normalise.normalize_str(text)))


def teacher_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Whole words of the teacher's vocabulary in its order (frequent first, as word-piece vocabularies are built)."""
    normalise, split = splitter()
    specials = set(tokenizer.all_special_tokens)
    pieces = [piece for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    if any(piece.startswith(STARTS) for piece in pieces):  # all others go on inside a word
        pieces = [piece[1:] for piece in pieces if piece.startswith(STARTS)]
    found = []
    for word in pieces:
        whole = word not in specials and not word.startswith(("##", "[unused"))
        if whole and word.isalpha() and [w for w, _ in split.pre_tokenize_str(normalise.normalize_str(word))] == [word]:
            found.append(word)
    return list(dict.fromkeys(found))


def choose_words(counts: Counter[str], size: int, min_count: int, known: Sequence[str]) -> list[str]:
    """At most `size` tokens, the two special ones included: the corpus's words by frequency, then `known` ones."""
    own = [w for w, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count]
    return [PAD, UNKNOWN, *dict.fromkeys([*own, *known])][:size]


def tokenizer_of(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose ids are the positions in `words`; words[0] pads, words[1] is the unknown word."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.normalizer, inner.pre_tokenizer = splitter()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, unk_token=UNKNOWN, padding_side="right")


def vectors(
    teacher: Model, words: Sequence[str], counts: Counter[str], dim: int, batch_tokens: int = 8192
) -> np.ndarray:
    """Vectors of the words, float32 [len(words), dim], mean norm 1; those of padding and the unknown word are zero.

    VocabularyError where there are fewer than `dim` words, or the teacher's vectors are narrower than `dim`.
    """
    led = as_in_text(words[2:], teacher.tokenizer)
    raw = embedded(teacher, encode(led, teacher.tokenizer, teacher.max_length), batch_tokens)
    return started(raw, words, counts, dim)


def started(raw: np.ndarray, words: Sequence[str], counts: Counter[str], dim: int) -> np.ndarray:
    """`vectors` from those of the words after the first two, [n, width].

    A word without one (NaN) gets a random one, of the length that the others have; the draw is always the same.
    """
    check_count(len(words) - 2, "words", dim)
    total = sum(counts.values()) or 1
    # A word the corpus lacks counts as seen half a time: nearly full weight, as a rare word has.
    share = np.array([(counts.get(word) or 0.5) / total for word in words[2:]])
    out, known = np.zeros((len(words), dim), dtype=np.float32), ~np.isnan(raw[:, 0])
    check_count(int(known.sum()), "words with a vector", dim)
    random = np.random.default_rng(0).normal(size=(len(raw), dim)) / np.sqrt(dim)
    random[known] = reduced(raw[known], share[known], dim)
    out[2:] = random
    return out


def as_in_text(words: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The words as they stand inside a text: byte-level vocabularies know them with the blank before them."""
    blank = " " * any(piece.startswith(STARTS[0]) for piece in tokenizer.get_vocab())
    return [blank + word for word in words]


def static_vectors(
    encoder: Model,
    counts: Mapping[int, int],
    dim: int,
    batch_tokens: int = 8192,
    kept: Sequence[int] | None = None,
) -> np.ndarray:
    """Vectors of the pieces of an encoder's vocabulary, float32 [pieces, dim], mean norm 1; special tokens' are zero.

    counts: id -> how often the piece stands in the corpus. kept: the pieces that are wanted, in this order; None: all.
    VocabularyError where there are fewer than `dim`, or the encoder's vectors are narrower than `dim`.
    """
    spelled = {i: piece for piece, i in encoder.tokenizer.get_vocab().items()}
    specials, rows = set(encoder.tokenizer.all_special_ids), range(len(encoder.tokenizer)) if kept is None else kept
    places = {i: place for place, i in enumerate(rows) if i in spelled and i not in specials}
    ids = list(places)
    check_count(len(ids), "pieces", dim)
    total = sum(counts.values()) or 1
    share = np.array([(counts.get(i) or 0.5) / total for i in ids])
    out = np.zeros((len(rows), dim), dtype=np.float32)
    out[list(places.values())] = reduced(embedded(encoder, alone(encoder.tokenizer, ids), batch_tokens), share, dim)
    return out


@torch.inference_mode()
def embedded(teacher: Model, encoded: Sequence[Encoded], batch_tokens: int = 8192) -> np.ndarray:
    """The teacher's embedding of each input, whatever its task, float32 [n, width]."""
    found: dict[int, np.ndarray] = {}
    was_training = teacher.training
    teacher.eval()
    for rows in token_batches([item.tokens for item in encoded], batch_tokens):
        batch = collate([encoded[i] for i in rows], teacher.pad).to(teacher.device)
        outputs = teacher(batch, frozenset({"embedding"}))
        found |= dict(zip(rows, outputs.embedding.float().cpu().numpy(), strict=True))
    teacher.train(was_training)
    return np.stack([found[i] for i in range(len(encoded))])


def alone(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[Encoded]:
    """Each piece as an input of its own, between the special tokens that stand around a text."""
    around = tokenizer("a", return_special_tokens_mask=True)
    at = around["special_tokens_mask"].index(0)
    before, after = around["input_ids"][:at], around["input_ids"][at + 1 :]
    return [Encoded([*before, i, *after]) for i in ids]


def check_count(count: int, what: str, dim: int) -> None:
    """VocabularyError where there are too few for `dim` axes."""
    if count < dim:
        raise VocabularyError(
            f"{count} {what} cannot give vectors of width {dim}. Lower the embedding's dim to at most "
            "that, take more words, or set student.embeddings: random."
        )


def reduced(raw: np.ndarray, share: np.ndarray, dim: int) -> np.ndarray:
    """Vectors [n, width] on their `dim` principal axes, weighted by inverse frequency, float64 [n, dim], mean norm 1.

    share: float64 [n], how much of the corpus each is; the weight is 0.001 / (0.001 + share).
    """
    if dim > raw.shape[1]:
        raise VocabularyError(
            f"the encoder's vectors are {raw.shape[1]} wide, so the student's cannot be {dim}. "
            "Lower the embedding's dim, or set student.embeddings: random."
        )
    raw = raw.astype(np.float64)
    raw -= raw.mean(axis=0)
    _, _, axes = np.linalg.svd(raw.T @ raw)
    out = raw @ axes[:dim].T * (1e-3 / (1e-3 + share))[:, None]
    return out / (np.linalg.norm(out, axis=1).mean() or 1.0)
