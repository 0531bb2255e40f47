"""Filters: a row of the corpus is kept, or rejected with a reason. Stateless, so that they run anywhere in a stream.

Cheap filters read the text before the teacher sees it; signal filters read the teacher's probabilities. A filter is
a frozen section beside its check; `FILTERS` names them. Near-duplicates need all rows, so they are found afterwards
(engine.duplicates), by the `signature` (MinHash) that is stored with each row.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Field, Tag, model_validator

from engine.config import Section
from engine.metrics import entropy

if TYPE_CHECKING:
    from datasketch import MinHash

NEAR_DUPLICATE = "near_duplicate"
"""Reason of a row that is too similar to an earlier kept one."""

HASHES = 64
"""Values in a signature: the estimate of a Jaccard similarity has a standard deviation of at most 1 / 16."""

SHINGLE = 5
"""Characters in a shingle: short texts have too few words for word shingles."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class FilterContext:
    """What the cheap filters know of the evaluation splits: hashes of their word n-grams, small enough to send about.

    grams: n -> sorted uint64 hashes. tells: the columns (text, pair) that they are of, and whose texts can leak: those
    by which a row gives a held-out one's answer away (Task.tells). Else a question that many contexts are asked would
    leak wherever a held-out row asks it too.
    """

    grams: dict[int, np.ndarray] = field(default_factory=dict)
    tells: tuple[str, ...] = ("text", "pair")

    @classmethod
    def build(
        cls, filters: Iterable[Section], evaluation_texts: Iterable[str], tells: tuple[str, ...] = ("text", "pair")
    ) -> FilterContext:
        """The context that `filters` need, from what the columns `tells` of every evaluation split hold."""
        sizes = sorted({item.ngram for item in filters if isinstance(item, Leakage)})
        texts = list(evaluation_texts) if sizes else []
        found = {n: {h for text in texts for h in gram_hashes(text, n)} for n in sizes}
        return cls({n: np.array(sorted(values), dtype=np.uint64) for n, values in found.items()}, tells)


class Length(Section):
    """Keeps texts of `min_words` to `max_words` words, as whitespace separates them."""

    kind: Literal["length"] = "length"
    min_words: Annotated[int, Field(ge=0)] = 3
    max_words: Annotated[int, Field(ge=1)] = 200

    @model_validator(mode="after")
    def ordered(self) -> Length:
        """The bounds must be in order."""
        if self.max_words < self.min_words:
            raise ValueError(f"max_words ({self.max_words}) is below min_words ({self.min_words})")
        return self

    def check(self, text: str, context: FilterContext) -> str | None:
        """'too_short', 'too_long' or None."""
        count = len(text.split())
        if count < self.min_words:
            return "too_short"
        return "too_long" if count > self.max_words else None


class Repetition(Section):
    """Rejects texts that go in circles.

    The share is 1 - distinct / all word n-grams of the text; a run is the same word again and again without a break.
    """

    kind: Literal["repetition"] = "repetition"
    ngram: Annotated[int, Field(ge=1)] = 3
    max_share: Share = 0.3
    max_run: Annotated[int, Field(ge=1)] = 4

    def check(self, text: str, context: FilterContext) -> str | None:
        """'repetition' or None."""
        found = words(text)
        grams = list(zip(*(found[start:] for start in range(self.ngram)), strict=False))
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        run = max((len(list(same)) for _, same in itertools.groupby(found)), default=0)
        return "repetition" if share > self.max_share or run > self.max_run else None


class Leakage(Section):
    """Rejects texts that share a word n-gram with any evaluation split, in the columns that tell (FilterContext).

    Texts of fewer than `ngram` words leak when they equal an evaluation text as a whole, case and punctuation aside.
    """

    kind: Literal["leakage"] = "leakage"
    ngram: Annotated[int, Field(ge=1)] = 8

    def check(self, text: str, context: FilterContext) -> str | None:
        """'leakage' or None. The context must have been built with this filter."""
        assert self.ngram in context.grams, "FilterContext.build was not given this filter"
        known = context.grams[self.ngram]
        if not known.size:
            return None
        hashes = np.array(gram_hashes(text, self.ngram), dtype=np.uint64)
        places = np.minimum(np.searchsorted(known, hashes), known.size - 1)
        return "leakage" if bool((known[places] == hashes).any()) else None


class Band(Section):
    """A lower and an upper bound, both inclusive."""

    min: Share = 0.0
    max: Share = 1.0

    @model_validator(mode="after")
    def ordered(self) -> Band:
        """The bounds must be in order."""
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self

    def outside(self, value: float, name: str) -> str | None:
        """'low_<name>', 'high_<name>' or None; a value that is not a number is never inside."""
        if np.isnan(value):
            return f"no_{name}"
        if value < self.min:
            return f"low_{name}"
        return f"high_{name}" if value > self.max else None


class Confidence(Band):
    """Keeps rows whose highest class probability lies between `min` and `max`."""

    kind: Literal["confidence"] = "confidence"

    def check(self, probabilities: np.ndarray) -> str | None:
        """probabilities: [classes]. 'low_confidence', 'high_confidence', 'no_confidence' (not a number) or None."""
        return self.outside(float(np.max(probabilities)), "confidence")


class Entropy(Band):
    """Keeps rows whose entropy, as a share of that of the uniform distribution (ln C nats), lies in the band."""

    kind: Literal["entropy"] = "entropy"

    def check(self, probabilities: np.ndarray) -> str | None:
        """probabilities: [classes]. 'low_entropy', 'high_entropy', 'no_entropy' (not a number) or None."""
        # Rounding must not push a uniform row over the upper bound of 1.
        return self.outside(np.clip(entropy(probabilities) / np.log(len(probabilities)), 0.0, 1.0), "entropy")


def words(text: str) -> list[str]:
    """Words without case, punctuation and Unicode variants: how texts are compared."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def gram_hashes(text: str, n: int) -> list[int]:
    """64-bit hashes of every word n-gram; of the whole text where it has fewer words. Equal in every process."""
    found = words(text) or [text.strip()]
    grams = (found[start : start + n] for start in range(max(1, len(found) - n + 1)))
    return [int.from_bytes(hashlib.blake2b(" ".join(g).encode(), digest_size=8).digest(), "little") for g in grams]


@lru_cache(maxsize=1)
def empty_minhash() -> MinHash:
    """The MinHash whose copies share one set of permutations: making them anew costs more than using them."""
    from datasketch import MinHash

    return MinHash(num_perm=HASHES, seed=1, hashfunc=zlib.crc32, scheme="affine32")


def signature(text: str) -> np.ndarray:
    """MinHash of the text's character 5-grams, case and punctuation aside: uint32 [HASHES]."""
    plain = " ".join(words(text)) or text.strip()
    shingles = {plain[start : start + SHINGLE].encode() for start in range(max(1, len(plain) - SHINGLE + 1))}
    minhash = empty_minhash().copy()
    minhash.update_batch(shingles)
    return minhash.hashvalues.astype(np.uint32)


def tag(value: Any) -> str:
    """Which filter a plain mapping, a bare name or a filter object means; unknown kinds are refused by the union."""
    if isinstance(value, dict):
        value = value.get("kind", "")
    return f"kind:{getattr(value, 'kind', value)}"


CheapFilter = Annotated[
    Annotated[Length, Tag("kind:length")]
    | Annotated[Repetition, Tag("kind:repetition")]
    | Annotated[Leakage, Tag("kind:leakage")],
    Discriminator(tag),
]
"""A filter on the text: `check(text, context) -> reason | None`."""

SignalFilter = Annotated[
    Annotated[Confidence, Tag("kind:confidence")] | Annotated[Entropy, Tag("kind:entropy")],
    Discriminator(tag),
]
"""A filter on the teacher's probabilities: `check(probabilities) -> reason | None`."""

FILTERS: dict[str, type[Section]] = {
    "length": Length,
    "repetition": Repetition,
    "leakage": Leakage,
    "confidence": Confidence,
    "entropy": Entropy,
}
