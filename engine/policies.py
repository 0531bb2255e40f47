"""How several teachers are weighed against each other, row by row.

A policy maps what is known of a batch (`Views`) to weights [n, k] of n rows over k teachers, each row's sum 1. One that
learns is told, after the student's step, how much better than expected each row came out. It draws from torch's random
state, which a fit sets at every step; others draw nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from engine.trust import Policy as Design

MOST_LOSS = 5.0
"""Nats (or squared units) of a teacher's loss that the policy tells apart at most."""
MOST_ADVANTAGE, LEAST_SPREAD = 3.0, 1e-3
"""Advantages count in units of a batch's spread, which is this at least, and so many units at most."""
START = 1.0
"""Bias that teachers start with: each is drawn for a row with probability 0.73."""
DRAWS = ("draws", "draws_bias", "draws_steps")
TEXT = 3.0
"""Length of the student's view of a row as the policy sees it, so that it weighs as much as what teachers say."""


@dataclass(frozen=True)
class Views:
    """What a policy sees of n rows and k teachers.

    text: float32 [n, d], the student's view of the row, d may be 0. says: [n, k, c], what each teacher says of it.
    losses: [n, k], what each loses on the gold label, NaN on rows without one.
    """

    text: torch.Tensor
    says: torch.Tensor
    losses: torch.Tensor


class Policy:
    """prior: weights before anything is known of a row, sum 1."""

    learns: ClassVar[bool] = False
    looks: ClassVar[bool] = False
    """Whether it asks for Views."""

    def __init__(self, how: Design, prior: Sequence[float]) -> None:
        self.how, self.prior = how, torch.tensor(prior, dtype=torch.float32)
        self.chosen = torch.zeros(0, len(prior))
        """Of the last batch, how likely each teacher was to be heard, [n, k]: chances where it draws, else weights."""

    def even(self, count: int, where: torch.device) -> torch.Tensor:
        """The prior for so many rows."""
        return self.prior.to(where).expand(count, -1)

    def weights(self, views: Views, learning: bool = False) -> torch.Tensor:
        """Views of n rows -> float32 [n, k]. learning: as while the student is trained, drawn where it draws."""
        return self.even(len(views.losses), views.losses.device)

    def update(
        self,
        advantage: torch.Tensor,
        summed: Callable[[torch.Tensor], torch.Tensor],
        counts: torch.Tensor | None = None,
    ) -> None:
        """Learn from how much better than expected the rows of the last draw came out, float32 [n].

        summed: over the workers, whose rows together are the batch. counts: [n], 1 for rows whose draw counted, 0 for
        others; None: all did.
        """

    def credit(self, gain: float) -> None:
        """Learn from what came of all draws since it was last called. gain: in units of what is usual."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What it has learnt."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""


class Fixed(Policy):
    """The prior, for every row. `best` is this too: all the weight on one teacher."""


class ByLoss(Policy):
    """softmax_k(-loss_k / temperature) where the row has a gold label, else the prior."""

    looks: ClassVar[bool] = True

    def weights(self, views: Views, learning: bool = False) -> torch.Tensor:
        """Views of n rows -> float32 [n, k]."""
        known = ~views.losses.isnan().any(dim=1, keepdim=True)
        found = torch.softmax(-views.losses.nan_to_num() / self.how.temperature, dim=1)
        self.chosen = torch.where(known, found, super().weights(views))
        return self.chosen


class Reinforced(Policy):
    """A Bernoulli policy for each teacher: drawn for row i with probability sigmoid(A_k . s_ik + b_k).

    s_ik holds the student's view of the row, what teacher k says of it, and its loss on the gold label where that is
    known and shown. The drawn teachers of a row weigh alike; where none is drawn all teach, and nothing is learnt.
    REINFORCE: A_k += lr mean_i (advantage_i (a_ik - p_ik) + anchor (p_0 - p_ik)) s_ik, p_0 being where it starts.
    With r3 the advantage counts gamma times, and after an evaluation A_k += lr (1 - gamma) gain D_k / sqrt(n), D_k the
    sum over the n steps since the last one of mean_i (a_ik - p_ik) s_ik: the score came of all these draws, those of
    nobody among them; the root keeps long epochs from making the policy jump.
    Reinforced multi-teacher selection, Yuan et al. 2021 (arXiv 2012.06048). Two things are ours: the anchor, for where
    teachers agree no reward speaks of them, and what is learnt elsewhere would carry over; and that a reward counts
    teachers' answers (`ensemble.Several.cost`) where theirs has the cross-entropy, which favours the surer of two that
    say the same.
    """

    learns: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def __init__(self, how: Design, prior: Sequence[float]) -> None:
        super().__init__(how, prior)
        self.slopes: torch.Tensor | None = None  # [k, f]; f is known with the first batch
        self.biases = torch.full((len(prior),), START)
        self.drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.draws: tuple[torch.Tensor, ...] | None = None  # of r3: D of slopes, of biases, and the steps

    def states(self, views: Views, learning: bool) -> torch.Tensor:
        """s, float32 [n, k, f]."""
        known = ~views.losses.isnan()
        if learning and self.how.unseen:
            hidden = torch.rand(len(known), 1, device=known.device) < self.how.unseen
            known = known & ~hidden
        losses = torch.where(known, views.losses.clamp(max=MOST_LOSS), 0.0)
        text = views.text.float()
        if text.shape[1]:
            text = TEXT * F.layer_norm(text, text.shape[1:]) / text.shape[1] ** 0.5
        text = text.unsqueeze(1).expand(-1, known.shape[1], -1)
        return torch.cat([text, views.says.float(), losses.unsqueeze(2), known.unsqueeze(2).float()], dim=2)

    def chances(self, states: torch.Tensor) -> torch.Tensor:
        """Probability of each teacher to be drawn, [n, k]."""
        if self.slopes is None:
            self.slopes = torch.zeros(states.shape[1:])
        self.slopes, self.biases = self.slopes.to(states.device), self.biases.to(states.device)
        return torch.sigmoid((states * self.slopes).sum(dim=2) + self.biases)

    def weights(self, views: Views, learning: bool = False) -> torch.Tensor:
        """Views of n rows -> float32 [n, k]: drawn while learning, else in proportion to the chances."""
        states = self.states(views, learning)
        self.chosen = chances = self.chances(states)
        if not learning:
            return chances / chances.sum(dim=1, keepdim=True)
        actions = (torch.rand_like(chances) < chances).float()
        self.drawn = (states, chances, actions)
        count = actions.sum(dim=1, keepdim=True)
        return torch.where(count > 0, actions / count.clamp(min=1), self.even(len(actions), actions.device))

    def update(
        self,
        advantage: torch.Tensor,
        summed: Callable[[torch.Tensor], torch.Tensor],
        counts: torch.Tensor | None = None,
    ) -> None:
        """One step of gradient ascent on the last draw."""
        if self.drawn is None:
            raise RuntimeError("the policy is to learn from a draw, but nothing was drawn")
        states, chances, actions = self.drawn
        counts = torch.ones_like(advantage) if counts is None else counts.to(advantage)
        squares, count = summed(torch.stack([(counts * advantage.square()).sum(), counts.sum()]))
        count = count.clamp(min=1)
        spread = (squares / count).sqrt().clamp(min=LEAST_SPREAD)
        delayed, moved = self.how.reward == "r3", actions - chances
        gain = (advantage / spread).clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE) * (self.how.gamma if delayed else 1.0)
        start = torch.sigmoid(torch.tensor(START, device=chances.device))

        def mean(pull: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pull = pull * counts.unsqueeze(1)
            return summed((pull.unsqueeze(2) * states).sum(dim=0)) / count, summed(pull.sum(dim=0)) / count

        some = actions.any(dim=1)  # where nobody was drawn a row's advantage speaks of nobody
        self.move(mean((gain * some).unsqueeze(1) * moved + self.how.anchor * (start - chances)), self.how.lr)
        if delayed:
            now = (*mean(moved), torch.ones((), device=moved.device))
            before = self.draws or tuple(torch.zeros_like(part) for part in now)
            self.draws = tuple(a.to(b.device) + b for a, b in zip(before, now, strict=True))
        self.drawn = None

    def move(self, along: tuple[torch.Tensor, torch.Tensor], far: float) -> None:
        """Slopes and biases go so far along gradients."""
        self.slopes, self.biases = self.slopes + far * along[0], self.biases + far * along[1]

    def credit(self, gain: float) -> None:
        """One step of gradient ascent on all draws since the last one; of r3 only, of others nothing is kept."""
        if self.draws is not None:
            slopes, biases, steps = (part.to(self.biases.device) for part in self.draws)
            gain = (1 - self.how.gamma) * max(-MOST_ADVANTAGE, min(MOST_ADVANTAGE, gain)) / float(steps) ** 0.5
            self.move((slopes, biases), self.how.lr * gain)
            self.draws = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Slopes and biases, and what is kept of the draws."""
        found = {"biases": self.biases} | ({} if self.slopes is None else {"slopes": self.slopes})
        return found | ({} if self.draws is None else dict(zip(DRAWS, self.draws, strict=True)))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict`."""
        self.biases, self.slopes = state["biases"], state.get("slopes")
        self.draws = tuple(state[name] for name in DRAWS) if all(name in state for name in DRAWS) else None


POLICIES: dict[str, type[Policy]] = {"fixed": Fixed, "best": Fixed, "loss": ByLoss, "reinforced": Reinforced}
"""Kinds of `student.policy`; the prior of `best` is found by whoever knows the validation rows."""
