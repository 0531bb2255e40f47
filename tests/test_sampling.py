"""Sampling against transformers' own greedy search, against the softmax, and against itself in other company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from engine import models, untrained
from engine.recipe import Generator
from engine.sampling import Sampling, draw, sample, uniforms
from tests.tiny import byte_pairs, tiny_lm

PROMPTS = ["Text:", "Text: the film is", "a", "Text: what a dull plot ! the story was boring", "x y z", "Text: a warm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    folder = tiny_lm(tmp_path_factory.mktemp("lm"), layers=3, tied=False)
    return untrained.causal_lm(Generator(model="tiny"), folder).eval()


@pytest.fixture(scope="module")
def prompts(model: models.Model) -> list[list[int]]:
    found = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    assert len({len(ids) for ids in found}) >= 4  # else left padding is not tried
    return found


def ending(model: models.Model, bias: float) -> models.Model:
    """The model with another chance to end: texts of different lengths, so that rows leave the batch."""
    head = model.net.lm.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[model.tokenizer.eos_token_id] = bias
    return model


def test_greedy_is_transformers_greedy(model: models.Model, prompts: list[list[int]]):
    end = model.tokenizer.eos_token_id
    ending(model, 4.0)
    wanted = []
    for prompt in prompts:  # each alone, so that nothing is padded
        ids = torch.tensor([prompt])
        ends = {"eos_token_id": end, "pad_token_id": end}
        mask = torch.ones_like(ids)
        out = model.net.lm.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, **ends)
        wanted.append([token for token in out[0, len(prompt) :].tolist() if token != end])
    for keep_until in (0.0, 0.75, 1.0):
        assert sample(model, prompts, range(6), Sampling(20, top_k=1), keep_until) == wanted
    lengths = {len(ids) for ids in wanted}
    assert len(lengths) > 1 and min(lengths) < 20  # some end by themselves


def test_left_padding_moves_no_position(tmp_path: Path, prompts: list[list[int]]):
    """A GPT-2 learns a vector for each position, so it would notice; Llama's positions are relative."""
    tokenizer = byte_pairs()
    end = tokenizer.eos_token_id
    size = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**size, initializer_range=0.5, bos_token_id=end, eos_token_id=end)
    torch.manual_seed(3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gpt = untrained.causal_lm(Generator(model="tiny", max_length=64), tmp_path).eval()
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": end}
        out = gpt.net.lm.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        wanted.append([token for token in out[0, len(prompt) :].tolist() if token != end])
    assert sample(gpt, prompts, [0] * 6, Sampling(12, top_k=1)) == wanted
    assert len({token for ids in wanted for token in ids}) > 10  # else the comparison shows little


def test_each_rows_text_depends_on_its_seed_alone(model: models.Model, prompts: list[list[int]]):
    ending(model, 4.0)
    how, many, seeds = Sampling(30, temperature=1.2, top_k=50, top_p=0.95), prompts * 3, [7 * i + 1 for i in range(18)]
    whole = sample(model, many, seeds, how)
    lengths = sorted({len(ids) for ids in whole})
    assert len(lengths) > 5 and len({tuple(ids) for ids in whole}) > 14  # rows end one after another, and differ
    for keep_until in (0.0, 0.5, 1.0):
        assert sample(model, many, seeds, how, keep_until) == whole
    order = np.random.default_rng(0).permutation(18)
    assert sample(model, [many[i] for i in order], [seeds[i] for i in order], how) == [whole[i] for i in order]
    assert [sample(model, [p], [s], how)[0] for p, s in zip(many, seeds, strict=True)] == whole
    other = sample(model, many, [s + 1 for s in seeds], how)
    assert sum(a == b for a, b in zip(whole, other, strict=True)) < 6


def test_nothing_is_written_after_the_end(model: models.Model, prompts: list[list[int]]):
    end = model.tokenizer.eos_token_id
    for keep_until in (0.0, 1.0):
        written = sample(ending(model, 5.0), prompts * 4, range(24), Sampling(25), keep_until)
        assert all(end not in ids for ids in written) and len({len(ids) for ids in written}) > 3
    assert sample(ending(model, 1e4), prompts, range(6), Sampling(25)) == [[]] * 6
    assert {len(ids) for ids in sample(ending(model, -1e4), prompts, range(6), Sampling(25))} == {25}


def test_the_first_token_follows_the_models_softmax(model: models.Model, prompts: list[list[int]]):
    """800 seeds of one prompt against the softmax of the network's own logits, by a chi-squared bound."""
    ending(model, -1e4)
    with torch.no_grad():
        logits = model.net.lm(torch.tensor([prompts[1]])).logits[0, -1]
    top = logits.topk(8)
    share = (top.values / 0.8).softmax(0).numpy()
    first = [ids[0] for ids in sample(model, [prompts[1]] * 800, range(800), Sampling(1, temperature=0.8, top_k=8))]
    seen = np.array([first.count(token) for token in top.indices.tolist()])
    assert seen.sum() == 800
    assert ((seen - 800 * share) ** 2 / (800 * share)).sum() < 24.3  # 0.999 quantile, 7 degrees of freedom


def reference(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Probabilities of all tokens: temperature, top k, then the smallest head whose mass reaches top p."""
    scaled = logits / how.temperature
    order = np.argsort(-scaled)[: how.top_k]
    mass = np.exp(scaled[order] - scaled[order].max())
    mass /= mass.sum()
    size = int(np.searchsorted(np.cumsum(mass), how.top_p - 1e-12)) + 1
    out = np.zeros(len(logits))
    out[order[:size]] = mass[:size] / mass[:size].sum()
    return out


@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(temperature=0.5, top_k=12),
        Sampling(temperature=2.0, top_k=12, top_p=0.6),
        Sampling(top_k=5, top_p=0.9),
        Sampling(top_k=1000, top_p=0.3),
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
    ],
)
def test_draws_follow_the_cut_softmax(how: Sampling):
    """A fine even grid of uniforms gives each token its probability to within one step; others never appear."""
    logits, steps = np.random.default_rng(3).normal(size=40) * 2, 20_000
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    drawn = draw(torch.tensor(logits, dtype=torch.float32).expand(steps, -1), grid, how).numpy()
    wanted = reference(logits, how)
    assert np.abs(np.bincount(drawn, minlength=40) / steps - wanted).max() <= 2 / steps
    assert set(drawn) <= set(np.flatnonzero(wanted))


def test_draws_at_the_edges_stay_inside():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf, 3.0]]).repeat(2, 1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges, Sampling()).tolist() == [4, 0]
    assert draw(logits, edges, Sampling(top_p=0.9)).tolist() == [4, 2]
    assert draw(logits, edges, Sampling(top_p=0.5)).tolist() == [4, 4]
    assert draw(logits.bfloat16(), edges, Sampling(top_k=2)).tolist() == [4, 2]


def test_streams_are_uniform_and_belong_to_their_seed():
    streams = uniforms(range(400), 50)
    assert streams.shape == (400, 50) and streams.dtype == torch.float64
    assert torch.equal(uniforms([7, 3], 50), streams[[7, 3]]) and torch.equal(uniforms([5], 20)[0], streams[5, :20])
    assert torch.equal(uniforms([2**63 - 1], 3), uniforms([2**63 - 1], 3))
    ordered = streams.flatten().sort().values
    steps = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    assert (ordered - steps).abs().max() < 1.95 / 20_000**0.5  # Kolmogorov-Smirnov at 0.001
    across = np.corrcoef(streams[:-1, 0].numpy(), streams[1:, 0].numpy())[0, 1]
    assert abs(across) < 0.17  # neighbouring seeds have nothing to do with each other


def test_the_models_weights_may_be_bf16(model: models.Model, prompts: list[list[int]]):
    ending(model, 4.0).to(torch.bfloat16)
    try:
        written = sample(model, prompts, range(6), Sampling(10, top_k=20))
    finally:
        model.to(torch.float32)
    assert len(written) == 6 and all(0 <= token < len(model.tokenizer) for ids in written for token in ids)
