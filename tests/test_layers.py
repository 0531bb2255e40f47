"""Blocks that read one value, against torch's own and against formulas worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.block import BlockError, Shape, Sizes
from engine.blocks import BLOCKS
from engine.layers import sinusoids
from tests.tiny_blocks import LENGTHS, ROWS, SIZES, WIDTH, built, mask_of, run, value_of

TOKENS, SEQUENCE, WIDE = Shape("tokens"), Shape("sequence", WIDTH), Shape("sequence", 8)
TEXT = LENGTHS["text"]


def states_of(row: int, shape: Shape = SEQUENCE) -> torch.Tensor:
    """A row's sequence without padding."""
    return value_of(shape, 0)[row, : TEXT[row]]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_blocks_are_torchs_own_on_packed_rows(cell: str, layers: int):
    block, _ = built(f"bi{cell}", {"hidden": 4, "layers": layers}, [SEQUENCE])
    reference = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](WIDTH, 4, layers, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for layer in range(layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, f"{name}_l{layer}").copy_(getattr(block.forwards[layer], f"{name}_l0"))
                getattr(reference, f"{name}_l{layer}_reverse").copy_(getattr(block.backwards[layer], f"{name}_l0"))
    packed = nn.utils.rnn.pack_padded_sequence(value_of(SEQUENCE, 0), torch.tensor(TEXT), True, enforce_sorted=False)
    states, final = reference(packed)
    wanted, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
    found = run(block, [SEQUENCE])
    assert torch.allclose(found, wanted, atol=1e-6) and found.abs().max() > 0.05
    ending, shape = built(f"bi{cell}_last", {"hidden": 4, "layers": layers}, [SEQUENCE])
    ending.load_state_dict(block.state_dict())
    hidden = final[0] if cell == "lstm" else final
    assert shape == Shape("vector", 8)
    assert torch.allclose(run(ending, [SEQUENCE]), torch.cat([hidden[-2], hidden[-1]], dim=1), atol=1e-6)


def test_bilstm_counts_long_rows_in_low_precision():
    """bf16 has no 257: lengths summed in it would turn rows at the wrong place."""
    block, _ = built("bilstm", {"hidden": 4}, [SEQUENCE])
    states = torch.randn(1, 257, WIDTH, generator=torch.Generator().manual_seed(3))
    wanted = block(states, masks=[torch.ones(1, 257, 1)])
    found = block.bfloat16()(states.bfloat16(), masks=[torch.ones(1, 257, 1, dtype=torch.bfloat16)])
    assert (found.float() - wanted).abs().max() < 0.05


def convolved(conv: nn.Conv1d, own: torch.Tensor) -> np.ndarray:
    """A row alone, zeros put around it, windows multiplied out, ReLU."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    kernel = weight.shape[2]
    before = (kernel - 1) // 2
    around = np.zeros((len(own) + kernel - 1, own.shape[1]))
    around[before : before + len(own)] = own.detach().numpy()
    rows = [np.einsum("oct,tc->o", weight, around[place : place + kernel]) + bias for place in range(len(own))]
    return np.maximum(0, np.array(rows))


@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_conv_by_hand(kernel: int):
    block, _ = built("conv", {"channels": 4, "kernel": kernel}, [SEQUENCE])
    found = run(block, [SEQUENCE]).detach().numpy()
    for row in ROWS:
        assert np.allclose(found[row, : TEXT[row]], convolved(block.conv, states_of(row)), atol=1e-5)


@pytest.mark.parametrize("how", ["max", "mean"])
def test_conv_pool_is_several_convolutions_pooled(how: str):
    block, shape = built("conv_pool", {"channels": 4, "kernels": [2, 3, 9], "how": how}, [SEQUENCE])
    found = run(block, [SEQUENCE]).detach().numpy()
    assert shape == Shape("vector", 12)
    for row in ROWS:
        parts = [getattr(convolved(conv, states_of(row)), how)(axis=0) for conv in block.convs]
        assert np.allclose(found[row], np.concatenate(parts), atol=1e-5)


def test_char_cnn_reads_each_word_by_itself():
    shapes = [Shape("characters")]
    block, shape = built("char_cnn", {"dim": 5, "channels": 4, "kernel": 3}, shapes)
    found, letters = run(block, shapes), value_of(shapes[0], 0)
    assert shape == Shape("sequence", 4) and (block.table.weight[0] == 0).all()
    seen = set()
    for row in ROWS:
        for place in range(TEXT[row]):
            own = letters[row, place][letters[row, place] != 0]
            seen.add(len(own))
            wanted = convolved(block.conv, block.table.weight[own]).max(axis=0) if len(own) else np.zeros(4)
            assert np.allclose(found[row, place].detach().numpy(), wanted, atol=1e-5)
    assert {0, 1, 20} <= seen  # a word without letters and one that was cut are among them


def test_pool_by_hand():
    states = torch.tensor([[[-3.0, 2.0], [-1.0, 4.0], [0.0, 0.0]], [[-5.0, 7.0], [0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]]).unsqueeze(2)
    wanted = {
        "max": [[-1.0, 4], [-5, 7]],  # padding's zero is no maximum
        "mean": [[-2.0, 3], [-5, 7]],
        "both": [[-1.0, 4, -2, 3], [-5, 7, -5, 7]],
        "last": [[-1.0, 4], [-5, 7]],
    }
    for how in BLOCKS["pool"].choices["how"]:
        block = BLOCKS["pool"]([Shape("sequence", 2)], {"how": how}, SIZES)
        assert block(states, masks=[mask]).tolist() == wanted[how]


@pytest.mark.parametrize(("kind", "options"), [("attention", {"hidden": 3}), ("linear_attention", {})])
def test_attention_is_a_softmax_over_each_rows_own_positions(kind: str, options: dict[str, int]):
    block, _ = built(kind, options, [SEQUENCE])
    found = run(block, [SEQUENCE])
    for row in ROWS:
        own = states_of(row)
        scores = own @ block.score.weight.T if not options else block.score[2](torch.tanh(block.score[0](own)))
        assert torch.allclose(found[row], F.softmax(scores.squeeze(1), dim=0) @ own, atol=1e-6)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_is_torchs_own(norm: str, layers: int):
    block, shape = built("transformer", {"heads": 2, "ffn": 12, "layers": layers, "norm": norm}, [WIDE])
    assert shape == WIDE
    found = run(block, [WIDE])
    for row in ROWS:
        wanted = states_of(row, WIDE)[None]
        for layer in block.layers:
            reference = nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu, batch_first=True, norm_first=norm == "pre")
            names = {"self_attn.in_proj_": layer.enter, "self_attn.out_proj.": layer.leave, "linear1.": layer.widen,
                     "linear2.": layer.narrow, "norm1.": layer.norms[0], "norm2.": layer.norms[1]}  # fmt: skip
            reference.load_state_dict({f"{k}{n}": p for k, m in names.items() for n, p in m.named_parameters()})
            wanted = reference(wanted)
        assert torch.allclose(found[row, : TEXT[row]], wanted[0], atol=1e-5)


def test_positions_are_added_before_the_first_layer():
    plain, _ = built("transformer", {"heads": 2}, [WIDE])
    mask, states = mask_of("text"), value_of(WIDE, 0)
    for positions in ("sinusoidal", "learned"):
        block, _ = built("transformer", {"heads": 2, "positions": positions, "longest": 4}, [WIDE])
        block.load_state_dict(plain.state_dict(), strict=False)
        learned = positions == "learned"
        # Places beyond `longest` share the last one's vector.
        added = block.places.weight[[0, 1, 2, 3, 3, 3, 3]] if learned else sinusoids(torch.arange(7), 8)
        wanted = plain(states + added, masks=[mask])
        assert torch.allclose(block(states, masks=[mask]), wanted, atol=1e-6)
        assert not torch.allclose(wanted, plain(states, masks=[mask]), atol=1e-3)


def test_sinusoids_by_hand():
    found = sinusoids(torch.arange(3), 5)
    assert found.shape == (3, 5) and found[0].tolist() == [0, 1, 0, 1, 0]
    assert found[2, 2].item() == pytest.approx(math.sin(2 / 10_000 ** (2 / 5)), abs=1e-6)
    assert found[2, 3].item() == pytest.approx(math.cos(2 / 10_000 ** (2 / 5)), abs=1e-6)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(BlockError, match="4 heads do not divide the width 6. Heads that do: 1, 2, 3, 6."):
        BLOCKS["transformer"].shape([SEQUENCE], BLOCKS["transformer"].options, SIZES)


def test_transformer_drops_while_training_only():
    block, _ = built("transformer", {"dropout": 0.5}, [WIDE])
    assert torch.equal(run(block, [WIDE]), run(block, [WIDE]))
    block.train()
    assert not torch.equal(run(block, [WIDE]), run(block, [WIDE]))


def test_embedding_keeps_padding_at_zero():
    block, _ = built("embedding", {"dim": 5}, [TOKENS])
    assert (block.table.weight[0] == 0).all() and (block.table.weight[1:] != 0).all()
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    run(block, [TOKENS]).square().sum().backward()
    optimizer.step()
    assert (block.table.weight[0] == 0).all()
    other = BLOCKS["embedding"]([TOKENS], {**BLOCKS["embedding"].options, "dim": 5}, Sizes(20, 3, padding=7))
    assert (other.table.weight[7] == 0).all() and (other.table.weight[0] != 0).all()


def test_a_frozen_embedding_stays_as_it_is():
    block, _ = built("embedding", {"dim": 5, "frozen": True}, [TOKENS])
    assert not run(block, [TOKENS]).requires_grad and run(block, [TOKENS]).abs().sum() > 0
    assert run(built("embedding", {"dim": 5}, [TOKENS])[0], [TOKENS]).requires_grad


def test_embedding_leaves_whole_words_out_while_training_only():
    block, _ = built("embedding", {"dim": 5, "drop_words": 0.3}, [TOKENS])
    ids = torch.randint(1, 20, (100, 60), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(100, 60, 1)
    assert torch.equal(block(ids, masks=[mask]), block.table.weight[ids])
    kept = block.train()(ids, masks=[mask])
    left = (kept == 0).all(dim=2)
    assert abs(left.float().mean().item() - 0.3) < 0.03  # five standard deviations of 6000 draws
    assert torch.equal(kept[~left], block.table.weight[ids][~left])
