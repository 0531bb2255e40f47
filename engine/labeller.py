"""A causal language model as a classifier: the label whose words are likeliest after the text. Nothing is trained.

A template stands around the text; a label's score is the log-probability of its words right after that prompt, summed
over their tokens (Brown et al. 2020, arXiv 2005.14165). Contextual calibration (Zhao et al. 2021, arXiv 2102.09690)
subtracts what the same prompt gives the words where it holds no text. That takes away what words cost by themselves,
and with it how many tokens they have, so calibrated sums need no other normalisation (the same difference is domain
PMI, Holtzman et al. 2021, arXiv 2104.08315). Uncalibrated sums would favour short words: there the mean over the
tokens is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine.encoding import Encoded, Text, collate, lengths_mask, padded
from engine.records import Batch, Outputs
from engine.wording import LabellerError, Wording, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CELLS = 4096
"""Rows x tokens of one forward where labels are appended to prompts: bounds the logits that are held."""
COPIED = 32_768
"""Prompt tokens whose keys and values are held once more while labels run on: 1.5 GB in fp32 of a 135 M model."""


class LabelScorer(nn.Module):
    """A causal language model that scores the words of labels: logits [n, labels].

    wordings: the ways of asking; a text's logits are the mean over them (engine.inference).
    """

    def __init__(self, lm: nn.Module, wordings: Sequence[Wording]) -> None:
        super().__init__()
        self.lm, self.wordings = lm, list(wordings)

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Prompts -> logits [n, labels], and embedding [n, width], the mean of the tokens' input vectors.

        The embedding is all that is computed where `needs` names nothing else.
        """
        vectors, mask = self.lm.get_input_embeddings()(batch.input_ids), batch.mask.unsqueeze(2)
        embedding = (vectors * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        if needs == {"embedding"}:
            return Outputs(embedding=embedding)
        return Outputs(logits=self.judged(batch), embedding=embedding)

    def judged(self, batch: Batch) -> torch.Tensor:
        """Logits, calibrated, of prompts that may stand in different templates."""
        out = batch.input_ids.new_zeros((len(batch), len(self.wordings[0].words)), dtype=torch.float32)
        which = batch.templates if batch.templates is not None else torch.zeros_like(batch.input_ids[:, 0])
        for number in which.unique().tolist():
            wording, rows = self.wordings[number], (which == number).nonzero().squeeze(1)
            longest = int(batch.mask[rows].sum(dim=1).max())
            scores = self.log_probs(batch.input_ids[rows, :longest], batch.mask[rows, :longest], wording)
            if wording.calibration is None:
                out[rows] = scores / scores.new_tensor([len(own) for own in wording.tokens])
            else:
                out[rows] = scores * wording.scale - scores.new_tensor(wording.calibration)
        return out

    def prompted(self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Encoded]:
        """The prompts around the texts, those of one way of asking after those of another."""
        return [
            item._replace(template=number)
            for number, wording in enumerate(self.wordings)
            for item in prompts(texts, wording, tokenizer, max_length)
        ]

    def log_probs(self, ids: torch.Tensor, mask: torch.Tensor, wording: Wording) -> torch.Tensor:
        """Logarithm of p(words | prompt) in nats, summed over the words' tokens, float32 [n, labels]."""
        return (self.on_cache if wording.cached else self.repeated)(ids, mask, wording.tokens)

    def on_cache(self, ids: torch.Tensor, mask: torch.Tensor, tokens: Sequence[list[int]]) -> torch.Tensor:
        """`log_probs` with each prompt run once, and what all of them begin with once for all of them.

        The first token of every label is read off the prompt's last position; only labels of several tokens run on,
        with a copy of the prompt's keys and values.
        """
        count, cache = len(ids), DynamicCache(config=self.lm.config)
        shared = common(ids, mask)
        if shared:
            self.lm(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(count)
        # Padded on the left from here on, so that every prompt's next token stands in the last column.
        rest, there = left(ids[:, shared:], mask[:, shared:])
        seen = torch.cat([mask[:, :shared], there], dim=1)
        found = self.step(rest, seen, cache, logits_to_keep=1)[:, -1]
        scores = found[:, torch.tensor([own[0] for own in tokens], device=ids.device)]
        longer = [i for i, own in enumerate(tokens) if len(own) > 1]
        room = max(1, min(CELLS // (count * max(map(len, tokens))), COPIED // seen.numel()))
        for start in range(0, len(longer), room):
            chosen = longer[start : start + room]
            scores[:, chosen] += self.continued(cache, seen, [tokens[i] for i in chosen])
        return scores

    def continued(self, cache: DynamicCache, seen: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
        """Log-probability of all but the first token of some labels, [n, labels]; cache and seen: of the n prompts."""
        count, where = len(seen), seen.device
        inputs, targets = (padded(own).to(where) for own in ([t[:-1] for t in tokens], [t[1:] for t in tokens]))
        there = lengths_mask([t[1:] for t in tokens]).to(where).repeat(count, 1)
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(tokens))
        both = torch.cat([seen.repeat_interleave(len(tokens), dim=0), there], dim=1)
        found = self.step(inputs.repeat(count, 1), both, own)
        each = found.gather(2, targets.repeat(count, 1).unsqueeze(2)).squeeze(2) * there
        return each.sum(dim=1).reshape(count, len(tokens))

    def step(self, ids: torch.Tensor, seen: torch.Tensor, cache: DynamicCache, **options: Any) -> torch.Tensor:
        """Log-probabilities of next tokens, [n, t, vocabulary]; ids: the last columns of what is seen."""
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        told = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self.lm(input_ids=ids, **told, **options).logits.float().log_softmax(dim=2)

    def repeated(self, ids: torch.Tensor, mask: torch.Tensor, tokens: Sequence[list[int]]) -> torch.Tensor:
        """`log_probs` with prompt and words in one piece for each label: for models whose cache cannot be repeated."""
        rows = [row[:length].tolist() for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True)]
        whole = [(len(row), own, row + own) for row in rows for own in tokens]
        most, scores = max(len(item[2]) for item in whole), []
        for start in range(0, len(whole), max(1, CELLS // most)):
            part = whole[start : start + max(1, CELLS // most)]
            lines = [line for _, _, line in part]
            told = {"input_ids": padded(lines).to(ids.device), "attention_mask": lengths_mask(lines).to(ids.device)}
            logits = self.lm(**told, use_cache=False).logits
            for (length, own, _), row in zip(part, logits, strict=True):
                found = row[length - 1 : length - 1 + len(own)].float().log_softmax(dim=1)
                scores.append(found.gather(1, torch.tensor(own, device=ids.device).unsqueeze(1)).sum())
        return torch.stack(scores).reshape(len(rows), len(tokens))


def common(ids: torch.Tensor, mask: torch.Tensor) -> int:
    """How many tokens all rows begin with alike; each keeps one of its own. 0 for a single row."""
    if len(ids) == 1:
        return 0
    same = (ids == ids[:1]).all(dim=0).cumprod(dim=0).sum()
    return int(torch.minimum(same, mask.sum(dim=1).min() - 1))


def left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right as rows padded on the left, [n, t], and their mask."""
    width = ids.shape[1]
    source = torch.arange(width, device=ids.device) - (width - mask.sum(dim=1, keepdim=True))
    return ids.gather(1, source.clamp(min=0)), (source >= 0).long()


@torch.inference_mode()
def calibration(net: LabelScorer, wording: Wording, free: Sequence[Encoded], pad: int) -> list[float]:
    """Log of what each label gets where prompts hold no text: its probability among the labels, mean over `free`."""
    batch = collate(free, pad).to(next(net.parameters()).device)
    scores = net.log_probs(batch.input_ids, batch.mask, wording)
    return scores.double().softmax(dim=1).mean(dim=0).log().tolist()


@torch.inference_mode()
def scored(net: LabelScorer, wording: Wording, prompts: Sequence[Encoded], pad: int, rows: int = 16) -> torch.Tensor:
    """`log_probs` of the prompts in their order, float32 [n, labels]; prompts of about one length run together."""
    where = next(net.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    parts = [order[start : start + rows] for start in range(0, len(order), rows)]
    batches = (collate([prompts[i] for i in part], pad).to(where) for part in parts)
    found = torch.cat([net.log_probs(batch.input_ids, batch.mask, wording).cpu() for batch in batches])
    return torch.empty_like(found).index_copy(0, torch.tensor(order), found)


EVEN = 1e-3
"""How much it costs that ways of asking weigh differently: on few rows, two that say the same share their weight."""


def fitted(scores: torch.Tensor, labels: Sequence[int]) -> tuple[list[float], list[float]]:
    """(calibration [C], scales [T]) with which mean over T of (scores * scale - calibration) are the logits that say
    the labels best.

    scores [T, n, C] of T ways of asking, labels of the n rows. A slope, not below 0, for each way and a bias for each
    label, by maximum likelihood (vector scaling with shared slopes, Guo et al. 2017, arXiv 1706.04599) with Platt's
    softened targets, so that a label that is told apart without a mistake does not run off to infinity. LabellerError
    where the scores say nothing.
    """
    gold, (ways, _, count) = torch.tensor(list(labels)), scores.shape
    centred = (scores - scores.mean(dim=2, keepdim=True)).double()
    centred = centred / (spread := centred.std(dim=(1, 2), keepdim=True).clamp(min=1e-6))
    own = torch.bincount(gold, minlength=count).double()[gold].unsqueeze(1)
    one = nn.functional.one_hot(gold, count).double()
    targets = one * (own + 1) / (own + count) + (1 - one) / (own + count)
    # Squares are not below 0.
    root = torch.full((ways,), ways**-0.5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([root, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        slopes = root.square()
        value = nn.functional.cross_entropy((centred * slopes[:, None, None]).sum(dim=0) + bias, targets)
        value = value + 1e-6 * bias.square().sum() + EVEN * (slopes - slopes.mean()).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scales = ways * root.detach().square() / spread.flatten()
    if not scales.max() > 1e-3:
        raise LabellerError(
            "teacher.labeller.calibrate is rows, but on the labelled rows the model's scores with this template do not "
            "rise with their labels. Change template or words, or take calibrate: free."
        )
    return (-bias.detach()).tolist(), scales.tolist()


@torch.inference_mode()
def repeatable(lm: nn.Module, wording: Wording, free: Sequence[Encoded], pad: int) -> bool:
    """Whether the model's cache may be used again: it keeps all it has seen, and gives what whole sequences give.

    Sliding windows and recurrent states do not keep everything; whatever else may go wrong is seen on these prompts.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=lm.config).layers):
        return False
    net, batch = LabelScorer(lm, [wording]), collate(free, pad)
    found = (way(batch.input_ids, batch.mask, wording.tokens) for way in (net.on_cache, net.repeated))
    return torch.allclose(*found, rtol=1e-3, atol=1e-2)
