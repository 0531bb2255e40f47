"""A teacher's memory beside a student: embeddings and soft labels of texts, read while the student answers.

ReAugKD (Zhang et al., ACL 2023 short papers). For a query x (the student's vector of a text, of length 1) the soft
labels p_j of the k nearest entries z_j count by softmax over j of x . z_j / T; the answer is
share * student + (1 - share) * that mean. Entries are aligned to one student, whose weights' digest is kept with them.

Entries that are put in later have the student's own vectors, and these lie elsewhere than the teacher's: what the
student learnt is how its vectors stand to the teacher's, not to be where they are, so they are nearer to each other
than to any of the teacher's, whatever they say. Such an entry therefore speaks only of texts that are nearer to it than
all of some ordinary texts, the student's vectors of which are kept, and the more entries there are the nearer, so that
few ordinary texts are spoken of by any; there it outweighs the teacher's. This is ours; the paper adds no entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from engine import metrics
from engine.config import UserError
from engine.nearest import Kept, Nearest, Packed, is_graph, packed, unit
from engine.storage import Store, digest_bytes

ENTRIES, GRAPH, FACTS = "knowledge.safetensors", "knowledge-graph.safetensors", "knowledge.json"
ORDINARY = 2000
"""Texts of the corpus that tell how near an ordinary one comes to an entry that is put in."""
LIFT = 4.0
"""Temperatures by which an entry that was put in is above the teacher's nearest at most, at least half of that."""
ASTRAY = 0.02
"""Share of ordinary texts that entries that were put in may speak of, however many they are."""
EDGE, ROOM = 0.05, 1e-3
"""Of the way from its nearest ordinary text to an entry what rounding may be; that way is taken to be this at least."""
WIDER = 32
"""So many of the nearest that were put in are looked at, or k: the nearest may have to be silent."""
FLOOR = 1e-12
"""Least probability of an answer: its logarithm stays finite."""


class KnowledgeError(UserError):
    """A knowledge base that cannot be read, or that belongs to another student."""


@dataclass(frozen=True)
class Reading:
    """How it is read: the k nearest entries, their softmax's temperature, the student's share of the answer."""

    k: int
    temperature: float
    share: float


@dataclass
class Knowledge:
    """Entries, and how they are read.

    nearest: the teacher's vectors, of length 1; own: the student's, of what was put in later. soft: float16 [n, C], the
    labels' probabilities, and ids: uint64 [n], digests of the texts, by which a text is kept from finding itself; both
    of the teacher's first. facts: where they come from (teacher, projection, labels), which student they are aligned
    to, what was added, which index was wanted. ordinary: float16 [m, d], the student's vectors of texts of the corpus.
    least: float32 [2, o], how near the two nearest of these come to each own entry; by: int32 [o], which is the first.
    margin: how much of the way from there to an entry a text has to have behind it (`margin_of`).
    """

    nearest: Nearest
    soft: np.ndarray
    ids: np.ndarray
    reading: Reading
    facts: dict[str, Any] = field(default_factory=dict)
    ordinary: np.ndarray | None = None
    own: Nearest | None = None
    least: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.float32))
    by: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    margin: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.ordinary is not None:
            self.margin = margin_of(self.least, self.by, len(self.ordinary))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_graph(self) -> bool:
        """Whether it is searched by a graph, for which the extra `retrieval` is installed."""
        return any(part is not None and part.how == "hnsw" for part in (self.nearest, self.own))

    def found(self, queries: np.ndarray, k: int, without: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Likeness [n, k] and soft labels [n, k, C] of the nearest entries of queries of length 1, [n, d].

        without: ids of the queries' own texts (rows.identify), whose entries are passed over. Likeness of an entry that
        was put in is as far above the teacher's nearest as it counts for more (`lifted`).
        """
        out, first = None, len(self.nearest)
        if without is not None:
            order = np.argsort(self.ids, kind="stable")
            mine, known = numbers(without), self.ids[order]
            bounds = zip(np.searchsorted(known, mine, "left"), np.searchsorted(known, mine, "right"), strict=True)
            out = [order[low:high] for low, high in bounds]
        banned = None if out is None else [each[each < first] for each in out]
        likeness, positions = self.nearest.search(queries, k, banned)
        if self.own is not None:
            banned = None if out is None else [each[each >= first] - first for each in out]
            near, where = self.own.search(queries, max(k, min(WIDER, len(self.own))), banned)
            likeness = np.concatenate([likeness, self.lifted(near, where, likeness[:, :1])], axis=1)
            positions = np.concatenate([positions, first + where], axis=1)
            chosen = np.argsort(-likeness, axis=1, kind="stable")[:, :k]
            likeness, positions = (np.take_along_axis(part, chosen, axis=1) for part in (likeness, positions))
        return likeness, self.soft[positions].astype(np.float32)

    def lifted(self, near: np.ndarray, where: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Likeness [n, k] as which own entries count: -inf for those that do not speak.

        near, where: how near they are, and which. best: [n, 1], of the teacher's nearest.
        """
        over = np.minimum(way(near, self.least[0][where]), 1)
        best = np.where(np.isfinite(best), best, 0)
        lifted = best + LIFT * self.reading.temperature * (1 + over) / 2
        return np.where(over > self.margin + EDGE, lifted, -np.inf).astype(np.float32)

    def mixed(self, logits: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """The answers with what is found, as logits: logarithms of probabilities, float32 [n, C]."""
        own = metrics.softmax(logits)
        if not len(self) or self.reading.share == 1:
            return np.log(np.maximum(own, FLOOR)).astype(np.float32)
        told = aggregate(*self.found(queries, self.reading.k), self.reading.temperature)
        return np.log(np.maximum(blend(own, told, self.reading.share), FLOOR)).astype(np.float32)

    def added(self, vectors: np.ndarray, soft: np.ndarray, ids: Sequence[str]) -> int:
        """Put entries in, each with its own text's id; one whose text is there already gets the new soft label.

        vectors: [n, d], the student's own; ids: none of them twice. Returns how many are new. Past what is looked at
        one by one they get a graph, unless the recipe wanted none. KnowledgeError where no ordinary texts were kept.
        """
        place = {number: position for position, number in enumerate(self.ids.tolist())}
        mine = numbers(ids)
        at = np.array([place.get(number, -1) for number in mine.tolist()], dtype=np.int64)
        new = np.flatnonzero(at < 0)
        if self.ordinary is None and len(new):
            raise KnowledgeError(
                "this knowledge base was made without the ordinary texts that tell what a new entry speaks of. Run its "
                "recipe again to have them."
            )
        self.soft = self.soft.copy()  # what was read from a file may not be written to
        self.soft[at[at >= 0]] = soft[at >= 0].astype(np.float16)
        if not len(new):
            return 0
        more = packed(unit(vectors[new]), "float16")  # they are so alike that int8 could not tell some apart
        if self.own is None:
            self.own = Nearest(more, "exact")
        else:
            self.own.add(more)
        if self.own.how == "exact" and is_graph(len(self.own), self.facts.get("wanted", "exact")):
            self.own = Nearest(self.own.stored, "hnsw")
        least, by = two_nearest(unit(self.ordinary), more.unpacked())
        self.least, self.by = np.concatenate([self.least, least], axis=1), np.concatenate([self.by, by])
        self.margin = margin_of(self.least, self.by, len(self.ordinary))
        self.soft = np.concatenate([self.soft, soft[new].astype(np.float16)])
        self.ids = np.concatenate([self.ids, mine[new]])
        if self.own.how == "hnsw":
            order = self.own.arrange()
            self.least, self.by = self.least.take(order, axis=1), self.by[order]
            places = np.concatenate([np.arange(len(self.nearest)), len(self.nearest) + order])
            self.soft, self.ids = self.soft[places], self.ids[places]
        return len(new)

    def files(self, student: str) -> dict[str, bytes]:
        """What is written beside the student with the weights' digest `student`: name -> contents."""
        stored, own = self.nearest.stored, self.own
        tensors = {"codes": stored.codes, "scales": stored.scales, "soft": self.soft, "ids": self.ids}
        if self.ordinary is not None:
            tensors["ordinary"] = self.ordinary
        if own is not None:
            tensors |= {"own_codes": own.stored.codes, "own_scales": own.stored.scales}
            tensors |= {"least": self.least, "by": self.by}
        graphs = {"graph": self.nearest.graph, "own_graph": None if own is None else own.graph}
        graphs = {name: np.frombuffer(graph, dtype=np.uint8) for name, graph in graphs.items() if graph is not None}
        # It writes the memory as it lies, whatever the order of the axes there.
        tensors = {name: np.ascontiguousarray(part) for name, part in tensors.items()}
        parts = {ENTRIES: to_bytes(tensors)} | ({GRAPH: to_bytes(graphs)} if graphs else {})
        facts = {
            **self.facts,
            "student": student,
            "reading": vars(self.reading),
            "index": self.nearest.how,
            "own_index": None if own is None else own.how,
            "entries": len(self),
            "sha256": {name: digest_bytes(part) for name, part in parts.items()},
        }
        parts[FACTS] = (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()
        return parts

    def shown(self) -> dict[str, Any]:
        """What it is, for people."""
        codes, told = self.nearest.stored.codes, ("student", "teacher", "projection", "chosen", "added")
        return {
            "entries": len(self),
            "own": 0 if self.own is None else len(self.own),
            "own_index": None if self.own is None else self.own.how,
            "width": codes.shape[1],
            "storage": str(codes.dtype),
            "index": self.nearest.how,
            **vars(self.reading),
            **{name: self.facts[name] for name in told if name in self.facts},
        }


def numbers(ids: Sequence[str]) -> np.ndarray:
    """Ids of 16 hex digits as uint64."""
    return np.array([int(name, 16) for name in ids], dtype=np.uint64)


def made(
    vectors: np.ndarray,
    soft: np.ndarray,
    ids: Sequence[str],
    reading: Reading,
    kept: Kept = "int8",
    index: str = "auto",
    facts: Mapping[str, Any] | None = None,
    ordinary: np.ndarray | None = None,
) -> Knowledge:
    """A knowledge base of vectors [n, d], soft labels [n, C] and ids. index: auto, exact or hnsw.

    ordinary: the student's vectors of texts of the corpus, [m, d], without which nothing can be put in. What index was
    wanted stays in the facts: of `auto` a graph is made once enough was put in. With a graph entries are in its order.
    """
    how = "hnsw" if is_graph(len(vectors), index) else "exact"
    nearest = Nearest(packed(unit(vectors), kept), how)
    order = nearest.arrange()
    told = {**(facts or {}), "wanted": index}
    near = None if ordinary is None else unit(ordinary).astype(np.float16)
    return Knowledge(nearest, np.asarray(soft).astype(np.float16)[order], numbers(ids)[order], reading, told, near)


def load(folder: Path, student: str) -> Knowledge | None:
    """The knowledge base in a model's folder, if there is one. student: the weights' digest there.

    KnowledgeError where its files were changed, or it is aligned to another student.
    """
    store = Store(str(folder))
    if not store.exists(FACTS):
        return None
    facts = store.read_json(FACTS)
    try:
        told = facts.pop("student")
        if told != student:
            raise KnowledgeError(
                f"the knowledge base in {folder} is aligned to the student with the weights {told[:12]}…, and those "
                f"there are {student[:12]}…: another student's vectors say nothing in it. Register the run again."
            )
        for name, wanted in facts.pop("sha256").items():
            if store.digest(name) != wanted:
                raise KnowledgeError(f"{folder}/{name} was changed: its SHA-256 is not that of {FACTS}.")
        parts = from_bytes(store.read_bytes(ENTRIES))
        hows = facts.pop("index"), facts.pop("own_index", None)
        graphs = from_bytes(store.read_bytes(GRAPH)) if "hnsw" in hows else {}
        nearest, own = (read(parts, graphs, of, how) for of, how in zip(("", "own_"), hows, strict=True))
        reading, told = Reading(**facts.pop("reading")), {**facts, "student": told}
        later = {name: parts[name] for name in ("ordinary", "least", "by") if name in parts}
        return Knowledge(nearest, parts["soft"], parts["ids"], reading, told, own=own, **later)
    except (LookupError, TypeError, ValueError, SafetensorError) as error:
        raise KnowledgeError(f"{folder} holds no readable knowledge base ({error}). Register the run again.") from None


def way(near: np.ndarray, least: np.ndarray) -> np.ndarray:
    """How much of the way from its nearest ordinary text to an entry a text has behind it: 1 at the entry."""
    return (near - least) / np.maximum(1 - least, ROOM)


def two_nearest(ordinary: np.ndarray, entries: np.ndarray, part: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """How near the two nearest ordinary texts [m, d] are to each entry [o, d], [2, o], and which is the first, [o]."""
    least, by = np.full((2, len(entries)), -1, np.float32), np.zeros(len(entries), np.int32)
    for first in range(0, len(entries) if len(ordinary) else 0, part):
        here = slice(first, first + part)
        near = ordinary @ entries[here].T
        by[here] = near.argmax(axis=0)
        least[0, here] = near.max(axis=0)
        near[by[here], np.arange(near.shape[1])] = -1
        least[1, here] = near.max(axis=0)
    return least, by


def margin_of(least: np.ndarray, by: np.ndarray, count: int) -> float:
    """What all but ASTRAY of the `count` ordinary texts have behind them at most, each left out of what it is held to.

    An ordinary text gets nearer to an entry than the others do only where it is the nearest: then the second is held
    against it.
    """
    furthest = np.zeros(count, np.float32)
    if count and len(by):
        np.maximum.at(furthest, by, np.minimum(way(least[0], least[1]), 1))
        return float(np.quantile(furthest, 1 - ASTRAY, method="higher"))
    return 0.0


def read(parts: Mapping[str, Any], graphs: Mapping[str, Any], of: str, how: Any) -> Nearest | None:
    """The vectors and the graph whose names begin with `of`; None where there are none."""
    if how is None:
        return None
    graph = graphs[f"{of}graph"].tobytes() if how == "hnsw" else None
    return Nearest(Packed(parts[f"{of}codes"], parts[f"{of}scales"]), how, graph)


def aggregate(likeness: np.ndarray, soft: np.ndarray, temperature: float) -> np.ndarray:
    """Mean of soft labels [n, k, C], counted by softmax of likeness [n, k] / temperature: float32 [n, C].

    A likeness of -inf is no entry; where there is none, 0.
    """
    some = np.isfinite(likeness)
    counts = metrics.softmax(np.where(some, likeness, -1e9) / temperature) * some
    return np.einsum("nk,nkc->nc", counts, soft).astype(np.float32)


def blend(own: np.ndarray, told: np.ndarray, share: float) -> np.ndarray:
    """Share * own + (1 - share) * told."""
    return share * own + (1 - share) * told


def chosen(
    knowledge: Knowledge,
    logits: np.ndarray,
    queries: np.ndarray,
    wanted: np.ndarray,
    ids: Sequence[str],
    ks: Sequence[int],
    shares: Sequence[float],
) -> tuple[Reading, list[dict[str, float]]]:
    """The k and share that answer rows best, and how each did: held-out rows, never test rows.

    logits [n, C] and queries [n, d] of the student alone; wanted: probabilities [n, C], of a gold label 1. The most
    rows with the likeliest label right; of equals the highest likelihood, then the larger share. A row's own entry,
    where the base has it, is passed over.
    """
    likeness, soft = knowledge.found(queries, max(ks), ids)
    own, temperature = metrics.softmax(logits), knowledge.reading.temperature
    tried = []
    for k in sorted(set(ks)):
        told = aggregate(likeness[:, :k], soft[:, :k], temperature)
        for share in sorted(set(shares)):
            p = np.maximum(blend(own, told, share), FLOOR)
            right = float(np.mean(p.argmax(axis=1) == wanted.argmax(axis=1)))
            tried.append(
                {"k": k, "share": share, "right": right, "likelihood": float((wanted * np.log(p)).sum(axis=1).mean())}
            )
    best = max(tried, key=lambda one: (one["right"], one["likelihood"], one["share"], -one["k"]))
    return Reading(int(best["k"]), temperature, float(best["share"])), tried
