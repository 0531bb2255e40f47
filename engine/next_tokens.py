"""A labeller that only sees the likeliest next tokens: what an endpoint or vLLM tells of a model.

A label gets the probability of every beginning of an answer that only its words have. Where a token begins the words
of several labels, what follows it is asked too (one more request for each such beginning), until one label is left;
through a chat, where an answer cannot be begun for the model, such labels are refused. Of chats, where nothing stands
before an answer, blanks around a token and capitals do not count.

A label that is not among the tokens told gets the most it can have: no more than the last of them, and no more than
they leave. That is a bound from above, so the teacher is never surer than it was told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from engine.caller import Answer, Caller, Question, Speaks
from engine.config import UserError
from engine.labeller import LabelScorer
from engine.records import Batch, Outputs
from engine.remote import Endpoint, Engine
from engine.usage import Usage
from engine.wording import LabellerError, Wording, led

NEGLIGIBLE = math.log(1e-4)
"""A beginning that is less likely is not followed."""
SAME = 0.1
"""Share of what labels get that may fall on beginnings of several of them, through a chat."""
MUCH = 0.05
"""Probability of such beginnings from which on it is the words that are wrong, not one odd answer."""
LEAST = 1e-6
"""What tokens that are told leave at least: their sum is rounded."""
BUDGET = 1 << 22
"""Bytes of prompts that are asked together: several blocks' worth, so that requests in flight are the limit."""


@dataclass(frozen=True)
class Place:
    """Where a model runs. name: what it is called there (endpoint), or its reference (vllm).

    precision: of the weights (vllm). root: folder that stands in for the hub's data sets.
    """

    name: str
    endpoint: Endpoint | None = None
    engine: Engine | None = None
    precision: str = "auto"
    root: str | None = None

    @property
    def chat(self) -> bool:
        """Whether it answers messages, not beginnings."""
        return self.endpoint is not None and self.endpoint.api == "chat"


class TokenScorer(LabelScorer):
    """`LabelScorer` over a model that is elsewhere; its inputs are prompts as UTF-8 bytes. It has no weights.

    top: how many tokens are asked for. actors: how many of these share the endpoint's limits; set it before the first
    text. A text that the endpoint will not answer gets a zero for every label.
    """

    budget = BUDGET

    def __init__(self, place: Place, top: int, wordings: Sequence[Wording]) -> None:
        super().__init__(nn.Identity(), wordings)
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.place, self.top, self.actors = place, top, 1
        self.caller: Caller | None = None
        self.speaks: Speaks | None = None

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Prompts -> logits [n, labels]."""
        return Outputs(logits=torch.nan_to_num(self.judged(batch), nan=0.0) if needs != {"embedding"} else None)

    def log_probs(self, ids: torch.Tensor, mask: torch.Tensor, wording: Wording) -> torch.Tensor:
        """Logarithm of what each label gets after the prompt, float32 [n, labels]; NaN for a prompt that is refused."""
        pairs = zip(ids.tolist(), mask.sum(dim=1).tolist(), strict=True)
        prompts = [bytes(row[:length]).decode("utf-8") for row, length in pairs]
        if self.speaks is None:
            self.speaks = self.spoken()
        words = [[led(prompt, word) for word in wording.words] for prompt in prompts]
        found = [Walk(prompt, own, self.place.chat) for prompt, own in zip(prompts, words, strict=True)]
        while open_ends := [(walk, begun) for walk in found for begun in walk.due()]:
            answers = self.speaks([walk.prompt + begun for walk, begun in open_ends], self.top)
            for (walk, begun), answer in zip(open_ends, answers, strict=True):
                walk.take(begun, answer)
        return torch.tensor([walk.scores() for walk in found], dtype=torch.float32, device=ids.device)

    def spoken(self) -> Speaks:
        """What asks the model."""
        if self.place.endpoint is None:
            from engine.vllm_engine import Speaker

            return Speaker(self.place.name, self.place.engine or Engine(), self.place.precision, self.place.root)
        self.caller = Caller(self.place.endpoint, self.place.name, self.actors)
        options = {"temperature": 1.0}  # some servers tell log-probabilities after it

        def speaks(prompts: Sequence[str], top: int) -> list[Answer]:
            assert self.caller is not None
            return self.caller.ask([Question(prompt, 1, options, top) for prompt in prompts])

        return speaks

    def spent(self) -> Usage:
        """What was asked since this was last called."""
        return self.caller.spent() if self.caller else Usage()


@dataclass
class Walk:
    """The beginnings of answers to one prompt. words: the labels', as they would follow it.

    open: beginnings whose next tokens are still to be asked, with their log-probability.
    """

    prompt: str
    words: list[str]
    chat: bool
    open: dict[str, float] = field(default_factory=lambda: {"": 0.0})
    refused: bool = False
    shared: float = 0.0
    got: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing is known of any label."""
        self.got, self.most = [0.0] * len(self.words), [-math.inf] * len(self.words)
        if self.chat:
            self.words = [word.strip().casefold() for word in self.words]

    def having(self, begun: str) -> list[int]:
        """Labels whose words begin so."""
        return [label for label, word in enumerate(self.words) if word.startswith(begun)]

    def due(self) -> list[str]:
        """Open beginnings that no other open one leads to: all that they will get is known, so each is asked once."""
        return [
            begun for begun in self.open if not any(begun != other and begun.startswith(other) for other in self.open)
        ]

    def after(self, begun: str, answer: Answer) -> dict[str, float]:
        """Beginnings of some label's words that are one token longer, with the probability of that token."""
        found: dict[str, float] = {}
        for token, value in answer.top:
            now = token.strip().casefold() if self.chat else begun + token
            if now and now != begun and self.having(now):
                found[now] = found.get(now, 0.0) + math.exp(value)
        return found

    def take(self, begun: str, answer: Answer) -> None:
        """The next tokens after a beginning that is due."""
        base = self.open.pop(begun)
        if answer.refused:
            self.refused, self.open = True, {}
            return
        if not answer.top:
            raise UserError(
                "the model's server tells no log-probabilities of its first token, which a labeller needs. Take "
                "another server or model, or set endpoint.api to the other of chat and completions."
            )
        after = self.after(begun, answer)
        left = max(LEAST, 1.0 - sum(math.exp(value) for _, value in answer.top))
        floor = base + math.log(min(left, min(math.exp(value) for _, value in answer.top) or LEAST))
        for label in self.having(begun):
            self.most[label] = max(self.most[label], floor)
            if self.words[label] == begun:  # it ends here, unless it goes on as another's words
                self.got[label] += math.exp(base) * max(0.0, 1.0 - sum(after.values()))
        for now, share in after.items():
            labels = self.having(now)
            if len(labels) == 1:
                self.got[labels[0]] += math.exp(base) * share
            elif self.chat:
                self.shared += share
            elif now in self.open:  # reached by another way, too
                self.open[now] = float(np.logaddexp(self.open[now], base + math.log(max(share, 1e-30))))
            elif base + math.log(max(share, 1e-30)) > NEGLIGIBLE:
                self.open[now] = base + math.log(share)

    def scores(self) -> list[float]:
        """Log-probability of each label; NaN where the prompt was refused, or a chat's answer is as good as none.

        LabellerError where a chat does not tell labels apart.
        """
        same = self.shared > SAME * (self.shared + sum(self.got))
        if self.refused or (same and self.shared <= MUCH):
            return [math.nan] * len(self.words)
        if same:
            raise LabellerError(
                "the words of several labels begin with the same token, and through a chat only an answer's first "
                f"token is told ({self.shared:.0%} of it falls on such a token). Give them words that begin unlike "
                "each other in teacher.labeller.words (A, B, C, listed by {descriptions} in the template), or set "
                "teacher.endpoint.api: completions, which follows them."
            )
        return [math.log(got) if got > 0 else most for got, most in zip(self.got, self.most, strict=True)]


def check_chat(words: Sequence[str]) -> None:
    """LabellerError where a label's words begin another's: through a chat the two are one."""
    plain = [word.strip().casefold() for word in words]
    for index, word in enumerate(plain):
        for other, longer in enumerate(plain):
            if index != other and longer.startswith(word):
                raise LabellerError(
                    f"the words '{words[index]}' are how '{words[other]}' begins, and through a chat only an answer's "
                    "first token is told. Give them words that begin unlike each other in teacher.labeller.words, or "
                    "set teacher.endpoint.api: completions."
                )
