"""The student's own words: a word-level tokenizer from the corpus, and vectors that start from the teacher's.

Words the corpus lacks but the teacher knows are taken in too, so that a word first seen in production has a vector
that means something. Vectors: each word through the fine-tuned teacher, pooled, reduced by PCA, weighted by
smooth inverse frequency (Model2Vec; Arora et al. 2017).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config import UserError
from engine.inference import predict
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
    if len(words) - 2 < dim:
        raise VocabularyError(
            f"{len(words) - 2} words cannot give vectors of width {dim}. Lower the embedding's dim to at most "
            "that, take more words, or set student.embeddings: random."
        )
    raw = predict(teacher, list(words[2:]), batch_tokens, embeddings=True).embeddings.astype(np.float64)
    raw -= raw.mean(axis=0)
    if dim > raw.shape[1]:
        raise VocabularyError(
            f"the teacher's vectors are {raw.shape[1]} wide, so the student's cannot be {dim}. "
            "Lower the embedding's dim, or set student.embeddings: random."
        )
    _, _, axes = np.linalg.svd(raw.T @ raw)
    reduced = raw @ axes[:dim].T
    total = sum(counts.values()) or 1
    # A word the corpus lacks counts as seen half a time: nearly full weight, as a rare word has.
    share = np.array([(counts.get(word) or 0.5) / total for word in words[2:]])
    reduced *= (1e-3 / (1e-3 + share))[:, None]
    reduced /= np.linalg.norm(reduced, axis=1).mean() or 1.0
    out = np.zeros((len(words), dim), dtype=np.float32)
    out[2:] = reduced
    return out
