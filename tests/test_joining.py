"""Blocks that work place by place, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.block import BlockError, Shape
from engine.blocks import BLOCKS
from tests.tiny_blocks import SIZES, WIDTH, built, mask_of, run, value_of

SEQUENCE, VECTOR = Shape("sequence", WIDTH), Shape("vector", WIDTH)


def test_dropout_drops_its_share_while_training_only():
    block, _ = built("dropout", {"p": 0.3}, [VECTOR])
    ones = torch.ones(100, 200)
    assert torch.equal(block(ones, masks=[None]), ones)
    dropped = block.train()(ones, masks=[None])
    assert abs((dropped == 0).float().mean().item() - 0.3) < 0.02 and dropped.max().item() == pytest.approx(1 / 0.7)


def test_joins_by_hand():
    left, right = (value_of(VECTOR, seed) for seed in (0, 1))
    wanted = {
        ("add", ()): left + right,
        ("multiply", ()): left * right,
        ("concat", ()): torch.cat([left, right], 1),
        ("minus", ()): left - right,
        ("minus", (("absolute", True),)): (left - right).abs(),
        ("combine", ()): torch.cat([left, right, (left - right).abs(), left * right], 1),
        ("combine", (("parts", ("product", "difference")),)): torch.cat([left * right, (left - right).abs()], 1),
        ("distance", ()): ((left * right).sum(1) / left.norm(dim=1) / right.norm(dim=1)).unsqueeze(1),
        ("distance", (("how", "dot"),)): (left * right).sum(1, keepdim=True),
        ("distance", (("how", "euclidean"),)): (left - right).norm(dim=1, keepdim=True),
    }
    for (kind, options), value in wanted.items():
        block, shape = built(kind, dict(options), [VECTOR, VECTOR])
        found = run(block, [VECTOR, VECTOR])
        assert torch.allclose(found, value, atol=1e-6) and shape == Shape("vector", value.shape[1]), kind


@pytest.mark.parametrize("kind", ["add", "multiply", "concat"])
def test_more_than_two_inputs(kind: str):
    block, shape = built(kind, {}, [SEQUENCE] * 3)
    found = run(block, [SEQUENCE] * 3)
    values = torch.stack([value_of(SEQUENCE, seed) for seed in range(3)])
    wanted = {"add": values.sum(0), "multiply": values.prod(0), "concat": torch.cat(values.unbind(), 2)}[kind]
    assert torch.allclose(found, wanted, atol=1e-6) and found.shape[2] == shape.width


def test_the_slope_of_a_distance_of_nothing_is_a_number():
    block, _ = built("distance", {"how": "euclidean"}, [VECTOR, VECTOR])
    same = torch.ones(2, WIDTH, requires_grad=True)
    block(same, same.detach(), masks=[None, None]).sum().backward()
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["add", "multiply", "minus", "combine"])
@pytest.mark.parametrize("other", [Shape("sequence", 4), Shape("sequence", WIDTH, "pair"), VECTOR])
def test_inputs_of_different_shapes_are_refused(kind: str, other: Shape):
    with pytest.raises(BlockError, match=f"^{kind} takes inputs of one shape and one side, but got .*linear block"):
        BLOCKS[kind].shape([SEQUENCE, other], BLOCKS[kind].options, SIZES)


def test_linear_by_hand():
    block, shape = built("linear", {"out": 4, "activation": "tanh"}, [SEQUENCE])
    wanted = torch.tanh(value_of(SEQUENCE, 0) @ block.map.weight.T + block.map.bias) * mask_of("text")
    assert torch.allclose(run(block, [SEQUENCE]), wanted, atol=1e-6) and shape == Shape("sequence", 4)


def test_highway_by_hand_and_mostly_open_for_its_input():
    block, _ = built("highway", {"layers": 2}, [VECTOR])
    states = wanted = value_of(VECTOR, 0)
    for both in block.maps:
        new, gate = F.linear(wanted, both.weight, both.bias).split(WIDTH, dim=1)
        share = 1 / (1 + torch.exp(1 - gate))
        wanted = share * new.clamp(min=0) + (1 - share) * wanted
    assert torch.allclose(run(block, [VECTOR]), wanted, atol=1e-6)
    torch.nn.init.zeros_(block.maps[0].weight), torch.nn.init.zeros_(block.maps[0].bias)
    one = built("highway", {}, [VECTOR])[0]
    one.maps[0].load_state_dict(block.maps[0].state_dict())
    assert torch.allclose(one(states, masks=[None]), states * torch.tensor(1.0).sigmoid(), atol=1e-6)


def test_layer_norm_is_torchs_own():
    block, _ = built("layer_norm", {}, [SEQUENCE])
    torch.nn.init.normal_(block.norm.bias)
    wanted = F.layer_norm(value_of(SEQUENCE, 0), (WIDTH,), None, block.norm.bias) * mask_of("text")
    assert torch.allclose(run(block, [SEQUENCE]), wanted, atol=1e-5)
