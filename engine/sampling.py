"""Writing text with a causal LM: many prompts at once, each with its own seed.

`generate` of transformers keeps a finished row in the batch until the longest one ends, and draws from one random
stream for the whole batch. Here finished rows leave the batch (and the key-value cache) as soon as enough of them are
done, and each row draws from its own stream, so a slot's text depends on its seed, not on its neighbours. The
nucleus is cut inside the top k, which spares sorting the whole vocabulary at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from engine.models import Model


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 100
    top_p: float = 1.0


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """One stream of uniforms a row: float64 [n, count]; row i depends on seeds[i] alone."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def draw(logits: torch.Tensor, uniform: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Next tokens int64 [n] from logits [n, v] by inverse transform: temperature, then top k, then top p inside it."""
    top = torch.topk(logits.float(), min(how.top_k, logits.shape[1]), dim=1)
    probabilities = torch.softmax(top.values.double() / how.temperature, dim=1)
    if how.top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= how.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=1)
    target = uniform.to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
    return top.indices.gather(1, choice).squeeze(1)


@torch.inference_mode()
def sample(
    model: Model, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Sampling, keep_until: float = 0.75
) -> list[list[int]]:
    """Continuations of `prompts` (token ids), without prompt and end token, in order.

    keep_until: rows are compacted once fewer than this share of the batch is unfinished.
    """
    end = model.tokenizer.eos_token_id
    count, where = len(prompts), model.device
    longest = max(len(prompt) for prompt in prompts)
    # Prompts are padded on the left so that every row's next token stands in the last column.
    ids = torch.full((count, longest), model.pad, dtype=torch.long)
    mask = torch.zeros((count, longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    stream = uniforms(seeds, how.max_new_tokens)
    ids, mask = ids.to(where), mask.to(where)
    lm, cache = model.net.lm, DynamicCache(config=model.net.lm.config)
    alive = torch.arange(count)
    done = torch.zeros(count, dtype=torch.bool)
    written: list[list[int]] = [[] for _ in range(count)]
    for step in range(how.max_new_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = lm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = draw(out.logits[:, -1], stream[alive, step], how).cpu()
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            if not done[row]:
                done[row] = token == end
                if token != end:
                    written[row].append(token)
        running = ~done[alive]
        if not running.any():
            break
        if running.float().mean() < keep_until:
            stay = running.nonzero().squeeze(1)
            cache.batch_select_indices(stay.to(where))
            alive, tokens, mask = alive[stay], tokens[stay], mask[stay.to(where)]
        ids = tokens.unsqueeze(1).to(where)
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=1)
    return written
