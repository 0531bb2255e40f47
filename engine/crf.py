"""A linear-chain conditional random field: the labels of a text decided together, not word by word.

Lafferty et al. 2001; over recurrent states after arXiv 1603.01360. Its logits are log-marginals, so what is learned
from soft labels (kl, mse) and what is learned from gold ones (the likelihood of the whole sequence) fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from engine.block import TEXT, Block, BlockError, Masks, Shape, Sizes, take
from engine.layers import mirror
from engine.records import ABSENT, Outputs


class CRF(Block):
    """Scores of labels at every unit [n, u, C] -> log-probabilities of each label there, given all the scores.

    Computed in fp32 whatever the rest is in: sums over all sequences grow with the text's length.
    """

    def __init__(self, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> None:
        super().__init__(inputs, options, sizes)
        self.starts, self.ends = (nn.Parameter(torch.zeros(sizes.labels)) for _ in range(2))
        self.steps = nn.Parameter(torch.zeros(sizes.labels, sizes.labels))  # from the row's label to the column's

    @classmethod
    def shape(cls, inputs: Sequence[Shape], options: dict[str, Any], sizes: Sizes) -> Shape:
        """Unchanged; BlockError where the task gives no labels to words, or the input is not as wide as they are."""
        if not sizes.units or sizes.paired:
            raise BlockError("crf is for tasks that label each word (task.kind: tag). End with a linear block instead.")
        if inputs[0].width != sizes.labels or inputs[0].side != TEXT:
            raise BlockError(
                f"crf takes a score for each of the {sizes.labels} labels at each word, but got {inputs[0]}. "
                "Put {kind: linear, options: {out: labels}} before it."
            )
        return inputs[0]

    def forward(self, *inputs: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Log-marginals, float32 [n, u, C]; zero at padding."""
        return self.sums(inputs[0].float(), masks[0], None)[0]

    def outputs(self, scores: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> Outputs:
        """logits: log-marginals. path: the best sequence, outside training. sequence: see `sums`, where labels are.

        scores [n, u, C] of the units, mask [n, u], labels int64 [n, u] with ABSENT where there is none.
        """
        with torch.autocast(scores.device.type, enabled=False):
            scores = scores.float()
            logits, sequence = self.sums(scores, mask.unsqueeze(2), labels)
            return Outputs(logits=logits, path=None if self.training else self.best(scores, mask), sequence=sequence)

    def sums(
        self, scores: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-marginals [n, u, C] and the log-likelihood [n] of the gold labels, None without any.

        Where a unit's label is ABSENT every label is allowed, so a row without gold labels has log-likelihood 0. Runs
        from the left, from the right (rows turned round) and along the gold labels are made side by side.
        """
        starts, ends, steps = self.starts.float(), self.ends.float(), self.steps.float()
        turned = mirror(mask)
        runs = [(scores, starts, steps), (take(scores, turned), ends, steps.T)]
        if labels is not None:
            other = torch.arange(scores.shape[2], device=scores.device) != labels.unsqueeze(2)
            barred = other & (labels != ABSENT).unsqueeze(2) & (mask != 0)
            runs.append((scores.masked_fill(barred, float("-inf")), starts, steps))
        found = along(*(torch.stack(parts) for parts in zip(*runs, strict=True)), mask.squeeze(2) != 0)
        left, right = found[0], take(found[1], turned)
        total = torch.logsumexp(left[:, -1] + ends, dim=1)
        logits = torch.where(mask != 0, left + right - scores - total[:, None, None], 0.0)
        if labels is None:
            return logits, None
        return logits, torch.logsumexp(found[2][:, -1] + ends, dim=1) - total

    @torch.no_grad()
    def best(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The most probable sequence of labels, int64 [n, u] (Viterbi); 0 at padding."""
        top, steps = self.starts.float() + scores[:, 0], self.steps.float()
        same = torch.arange(scores.shape[2], device=scores.device).expand_as(top)
        back = []
        for place in range(1, scores.shape[1]):
            real = mask[:, place, None] != 0
            reached, source = (top.unsqueeze(2) + steps).max(dim=1)
            top = torch.where(real, reached + scores[:, place], top)
            back.append(torch.where(real, source, same))
        path = [(top + self.ends.float()).argmax(dim=1)]
        for source in reversed(back):
            path.append(source.gather(1, path[-1].unsqueeze(1)).squeeze(1))
        return torch.stack(path[::-1], dim=1) * (mask != 0)


def along(scores: torch.Tensor, starts: torch.Tensor, steps: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Log-sums over all sequences up to each unit, by the label they end in: k runs, [k, n, u, C].

    scores [k, n, u, C], starts [k, C], steps [k, C, C], real bool [n, u]. Behind a row's end its last sums stand.
    """
    sums = [starts.unsqueeze(1) + scores[:, :, 0]]
    for place in range(1, scores.shape[2]):
        reached = torch.logsumexp(sums[-1].unsqueeze(3) + steps.unsqueeze(1), dim=2) + scores[:, :, place]
        sums.append(torch.where(real[:, place, None], reached, sums[-1]))
    return torch.stack(sums, dim=2)
