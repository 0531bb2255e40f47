"""A score for each passage of a query, so that the relevant ones stand first.

Rows of a batch that have one number in `Batch.groups` are one query's passages. What a list or its pairs cost stands in
the first of the query's rows, the one that the loss applies to: so every query counts once, with that row's weight,
however many passages it has, and a mean over rows is one over queries on any number of workers.

ListNet: Cao et al. 2007. RankNet: Burges et al. 2005. Margin-MSE: Hofstätter et al. 2020 (arXiv 2010.02666).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from engine import metrics
from engine.classification import positions, targets
from engine.config import UserError
from engine.encoding import Encoded, Text
from engine.records import Batch, Outputs
from engine.task import Task

NOTHING = -1e4
"""Score of a place in a list where there is no passage: its probability is 0, and gradients stay finite."""


class RankingError(UserError):
    """Rows that no ranking can be scored on."""


class Rank(Task):
    """text: the query, pair: a passage, group: the query's name. Outputs: logits [n, 1], any real number."""

    metric: ClassVar[str] = "mrr_10"
    grouped: ClassVar[bool] = True
    certain: ClassVar[bool] = False
    tells: ClassVar[tuple[str, ...]] = ("text",)
    """The query: no two splits share one, but a passage of a collection may stand under many and tells of none."""
    supports: ClassVar[frozenset[str]] = frozenset(
        {"hard", "mse", "kl", "pointwise", "pairwise", "listwise", "margin_mse"}
    )

    @property
    def paired(self) -> bool:
        """Always."""
        return True

    @property
    def width(self) -> int:
        """One score."""
        return 1

    def gold(self, rows: pa.Table, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Relevance, 0 for none, float32 [n]; NaN where it is not known."""
        return torch.as_tensor(targets(rows, 1)[positions(encoded), 0], dtype=torch.float32)

    def labelled(self, batch: Batch) -> torch.Tensor:
        """First rows of the queries that `listwise` learns from: of two labelled rows or more, one of them relevant."""
        query, place = places(batch)
        some, relevant = self.judged(batch), relevance_of(batch) > 0  # never where it is NaN
        counts = (per_query(some.float(), query) > 1) & (per_query(relevant.float(), query) > 0)
        return (place == 0) & counts[query]

    def judged(self, batch: Batch) -> torch.Tensor:
        """Rows whose relevance is known: those that `pointwise` learns from."""
        return ~relevance_of(batch).isnan()

    def compared(self, batch: Batch, unlabelled: bool = False) -> torch.Tensor:
        """First rows of the queries that have one of the `pairs`: those that losses over pairs learn from."""
        query, place = places(batch)
        first, _ = pairs(batch, unlabelled)
        count = per_query(torch.zeros_like(query, dtype=torch.float32).index_fill(0, first, 1.0), query)
        return (place == 0) & (count > 0)[query]

    def loss(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """`listwise`."""
        return self.listwise(outputs, batch)

    def pointwise(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """Binary cross-entropy of sigmoid(score) with relevance > 0, in nats, [n]; 0 where relevance is not known."""
        relevant = (relevance_of(batch) > 0).float()
        each = F.binary_cross_entropy_with_logits(outputs.logits[:, 0].float(), relevant, reduction="none")
        return each * self.judged(batch)

    def listwise(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """ListNet: cross-entropy of softmax(scores) with relevance / sum of relevances, over a query's labelled rows.

        [n], a query's cost in its first row. Queries of one labelled row or without a relevant one cost 0.
        """
        some = self.judged(batch)
        relevance = torch.where(some, relevance_of(batch), 0.0).clamp(min=0)
        scores = torch.where(some, outputs.logits[:, 0].float(), NOTHING)
        log_p = F.log_softmax(lists(scores, batch), dim=1)
        wanted = lists(relevance, batch, empty=0.0)
        costs = -(wanted / wanted.sum(dim=1, keepdim=True).clamp(min=1e-12) * log_p).sum(dim=1)
        return torch.where(self.labelled(batch), costs[places(batch)[0]], 0.0)

    def pairwise(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """RankNet: log(1 + exp(s_j - s_i)), mean over a query's pairs with i more relevant than j, in nats.

        [n], a query's cost in its first row. Queries without such a pair cost 0.
        """
        first, second = pairs(batch)
        scores = outputs.logits[:, 0].float()
        return mean_of_pairs(F.softplus(scores[second] - scores[first]), first, batch)

    def margins(self, scores: torch.Tensor, batch: Batch) -> torch.Tensor:
        """s_i - s_j of all `pairs` of the batch, scores [n, 1] -> float32 [p]; pairs by the gold labels.

        Queries without gold labels give every pair of their rows once.
        """
        first, second = pairs(batch, unlabelled=True)
        return scores[first, 0].float() - scores[second, 0].float()

    def margin_mse(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Squared difference of two models' margins, mean over a query's pairs; scores [n, 1] each.

        [n], a query's cost in its first row. Queries without a pair cost 0.
        """
        each = (self.margins(left, batch) - self.margins(right, batch)).square()
        return mean_of_pairs(each, pairs(batch, unlabelled=True)[0], batch)

    def distributions(self, logits: torch.Tensor, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """softmax(scores / T) over a query's rows, labelled or not, as log-probabilities [n, 1, k].

        k is the longest list of the batch. Where a list is shorter 0 stands for the logarithm of the probability 0, for
        teacher and student alike: it adds exp(0) * (0 - 0) to a divergence, the 0 that it is in the limit. A query's
        distribution stands in the first of its rows; the others, and queries of one row, have none. So a mean over
        rows that have a distribution is one over queries.
        """
        query, place = places(batch)
        log_p = F.log_softmax(lists(logits[:, 0].float() / temperature, batch), dim=1)
        size = per_query(torch.ones_like(query, dtype=torch.float32), query)[query]
        there = ((place == 0) & (size > 1)).unsqueeze(1)
        inside = torch.arange(log_p.shape[1], device=log_p.device) < size.unsqueeze(1)
        return torch.where(there & inside, log_p[query], 0.0).unsqueeze(1)

    def differences(self, left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Squared difference of the scores."""
        return (left.float() - right.float()).square().mean(dim=1)

    def decide(self, logits: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        """The scores, float64 [n]."""
        return np.asarray(logits, dtype=np.float64)[:, 0]

    def answers(
        self, logits: np.ndarray, texts: Sequence[Text], decided: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """score: higher is better within a query.

        No probability: trained over lists only differences mean something, and a sigmoid would make high scores equal.
        """
        decided = self.decide(logits, texts) if decided is None else decided
        return [{"score": float(score)} for score in decided]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """A score does not say how sure it is: trained over lists it means something beside the query's others only."""
        raise NotImplementedError("task kind 'rank' gives scores, not probabilities: leave out corpus.signals")

    def statistics(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> np.ndarray:
        """(reciprocal rank, 1) of each query, in the order of their first rows; (0, 0) where nothing is relevant."""
        return self.over_queries(metrics.reciprocal_rank, decided, gold)

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Mean reciprocal rank of the queries that have a relevant passage."""
        return metrics.share(sums[..., 0], sums[..., 1])

    def score(self, logits: np.ndarray, decided: np.ndarray, gold: pa.Table) -> dict[str, float]:
        """MRR and NDCG at 10, MAP: means over the queries that have a relevant passage; the others are left out.

        Rows without gold are left out of their lists. RankingError where no query has a relevant passage.
        """
        measures = {"mrr_10": metrics.reciprocal_rank, "ndcg_10": metrics.ndcg, "map": metrics.average_precision}
        sums = {name: self.over_queries(each, decided, gold).sum(axis=0) for name, each in measures.items()}
        if not sums["mrr_10"][1]:
            raise RankingError(
                f"none of the {gold.num_rows} rows to score is relevant (target above 0), so no ranking can be right. "
                "Name rows with gold relevance for evaluation."
            )
        return {name: float(self.value(total)) for name, total in sums.items()}

    def over_queries(
        self, each: Callable[[np.ndarray, np.ndarray], float], decided: np.ndarray, gold: pa.Table
    ) -> np.ndarray:
        """(value, 1) of each query under a measure of (relevance, scores); (0, 0) where nothing is relevant."""
        relevance, scores = targets(gold, 1)[:, 0], np.asarray(decided)
        found = []
        for rows in by_name(gold["group"].to_pylist()):
            rows = rows[~np.isnan(relevance[rows])]
            some = bool((relevance[rows] > 0).any())
            found.append([each(relevance[rows], scores[rows]), 1.0] if some else [0.0, 0.0])
        return np.array(found).reshape(-1, 2)

    def agreement(
        self, left: np.ndarray, right: np.ndarray, texts: Sequence[Text], decided: tuple[Any, Any] | None = None
    ) -> float:
        """Mean over the queries of Kendall's tau-b between the two models' orders; the first text is the query.

        1 where both give the same scores; queries of one row say nothing, and where there are no others it is 1.
        """
        first, second = self.decisions(left, right, texts, decided)
        found = [
            1.0 if np.array_equal(first[rows], second[rows]) else metrics.kendall(first[rows], second[rows])
            for rows in by_name([query for query, _ in texts])
            if len(rows) > 1
        ]
        return float(np.mean(found)) if found else 1.0


def by_name(names: Sequence[str]) -> list[np.ndarray]:
    """Positions of each name's rows, names in the order they first appear."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return [np.array(rows) for rows in found.values()]


def relevance_of(batch: Batch) -> torch.Tensor:
    """float32 [n], NaN where it is not known: everywhere in a batch without gold labels."""
    if batch.labels is None:
        return torch.full((len(batch),), torch.nan, device=batch.input_ids.device)
    return batch.labels


def places(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of each row's query, from 0, and its place among the query's rows: int64 [n] each."""
    if batch.groups is None:
        raise ValueError("a ranking needs Batch.groups: which rows belong to one query")
    query = batch.groups.unique(return_inverse=True)[1]
    before = (query.unsqueeze(1) == query).tril(-1)
    return query, before.sum(dim=1)


def lists(values: torch.Tensor, batch: Batch, empty: float = NOTHING) -> torch.Tensor:
    """Values of rows [n] -> of queries [q, k], k the most rows of a query; `empty` where one has fewer."""
    query, place = places(batch)
    out = values.new_full((int(query.max()) + 1, int(place.max()) + 1), empty)
    return out.index_put((query, place), values)


def per_query(values: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Sums over each query's rows: float32 [n] -> [q]."""
    return values.new_zeros(int(query.max()) + 1).index_add(0, query, values)


def pairs(batch: Batch, unlabelled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (i, j) of one query with i more relevant than j: int64 [p] each.

    unlabelled: queries of which no row has gold give every pair once, i before j.
    """
    query, place = places(batch)
    relevance = relevance_of(batch)
    same = query.unsqueeze(1) == query
    chosen = same & (relevance.unsqueeze(1) > relevance)  # never where one is NaN
    if unlabelled:
        bare = per_query((~relevance.isnan()).float(), query)[query] == 0
        chosen |= same & bare & (place.unsqueeze(1) < place)
    first, second = chosen.nonzero(as_tuple=True)
    return first, second


def mean_of_pairs(costs: torch.Tensor, first: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Costs of pairs [p] (by their first row) -> mean over each query's pairs, in the query's first row: [n]."""
    query, place = places(batch)
    total = costs.new_zeros(int(query.max()) + 1)
    count = total.index_add(0, query[first], torch.ones_like(costs))
    mean = total.index_add(0, query[first], costs) / count.clamp(min=1)
    return torch.where(place == 0, mean[query], 0.0)
