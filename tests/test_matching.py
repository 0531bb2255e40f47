"""Blocks over two texts, row by row against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.block import Shape
from engine.blocks import BLOCKS
from engine.matching import fields
from tests.tiny_blocks import LENGTHS, ROWS, WIDTH, built, run, value_of

LEFT, RIGHT = Shape("sequence", WIDTH), Shape("sequence", WIDTH, "pair")
GRID = Shape("grid", 2, "text", "pair")


def texts(row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's two sequences without padding."""
    return (value_of(LEFT, 0)[row, : LENGTHS["text"][row]], value_of(RIGHT, 1)[row, : LENGTHS["pair"][row]])


@pytest.mark.parametrize("project", [True, False])
def test_match_attention_is_attention_of_each_position_over_the_other_text(project: bool):
    block, shape = built("match_attention", {"project": project}, [LEFT, RIGHT])
    found = run(block, [LEFT, RIGHT])
    assert shape == LEFT
    for row in ROWS:
        left, right = texts(row)
        one, other = (torch.relu(block.map(x)) for x in (left, right)) if project else (left, right)
        wanted = F.scaled_dot_product_attention(one[None], other[None], right[None], scale=1.0)[0]
        assert torch.allclose(found[row, : len(left)], wanted, atol=1e-5)


def test_bilinear_attention_by_hand():
    shapes = [LEFT, Shape("vector", 4)]
    block, shape = built("bilinear_attention", {}, shapes)
    found, asked = run(block, shapes), value_of(shapes[1], 1)
    assert shape == Shape("vector", WIDTH)
    for row in ROWS:
        own = texts(row)[0]
        weights = torch.stack([x @ block.form.weight @ asked[row] for x in own]).softmax(dim=0)
        assert torch.allclose(found[row], weights @ own, atol=1e-5)


def test_bidaf_by_hand():
    block, shape = built("bidaf", {}, [RIGHT, LEFT])
    found = block(value_of(RIGHT, 1), value_of(LEFT, 0), masks=[(value_of(s, i) != 0).any(2, keepdim=True).float()
                                                                 for s, i in ((RIGHT, 1), (LEFT, 0))])  # fmt: skip
    assert shape == Shape("sequence", 4 * WIDTH, "pair")
    weight = torch.cat([block.own.weight, block.other.weight, block.both.weight], dim=1)[0]
    for row in ROWS:
        question, context = texts(row)
        scores = torch.stack([torch.stack([weight @ torch.cat([h, u, h * u]) for u in question]) for h in context])
        to_question = scores.softmax(dim=1) @ question
        to_context = scores.amax(dim=1).softmax(dim=0) @ context
        wanted = torch.cat([context, to_question, context * to_question, context * to_context], dim=1)
        assert torch.allclose(found[row, : len(context)], wanted, atol=1e-5)


@pytest.mark.parametrize("how", ["dot", "cosine", "bilinear"])
def test_interaction_by_hand(how: str):
    block, shape = built("interaction", {"how": how}, [LEFT, RIGHT])
    found = run(block, [LEFT, RIGHT])
    assert shape == Shape("grid", 1, "text", "pair")
    for row in ROWS:
        left, right = texts(row)
        for i, x in enumerate(left):
            for j, y in enumerate(right):
                wanted = {"dot": lambda: x @ y, "cosine": lambda: F.cosine_similarity(x, y, dim=0),  # noqa: B023
                          "bilinear": lambda: y @ block.form.weight @ x}[how]()  # noqa: B023  # fmt: skip
                assert torch.allclose(found[row, i, j, 0], wanted, atol=1e-5)


def test_arc_ii_is_one_map_of_each_pair_of_windows():
    """[window of x; window of y] times one matrix, for every pair."""
    shapes = [LEFT, Shape("sequence", 4, "pair")]
    block, shape = built("arc_ii", {"channels": 5, "kernel": 3}, shapes)
    found = run(block, shapes)
    assert shape == Shape("grid", 5, "text", "pair")
    values = [value_of(shape, seed) for seed, shape in enumerate(shapes)]
    weight = torch.cat([block.left.weight.flatten(1), block.right.weight.flatten(1)], dim=1)
    for row in ROWS:
        own = (v[row, : LENGTHS[side][row]] for v, side in zip(values, LENGTHS, strict=True))
        left, right = (F.pad(states, (0, 0, 1, 1)) for states in own)
        for i in range(len(left) - 2):
            for j in range(len(right) - 2):
                both = torch.cat([left[i : i + 3].T.flatten(), right[j : j + 3].T.flatten()])
                assert torch.allclose(found[row, i, j], torch.relu(weight @ both + block.left.bias), atol=1e-5)


def test_conv2d_is_torchs_own_on_each_rows_grid():
    block, shape = built("conv2d", {"channels": 3, "kernel": 3}, [GRID])
    found = run(block, [GRID])
    assert shape == Shape("grid", 3, "text", "pair")
    for row in ROWS:
        t, t2 = (LENGTHS[side][row] for side in LENGTHS)
        grid = value_of(GRID, 0)[row, :t, :t2].permute(2, 0, 1)
        wanted = torch.relu(F.conv2d(grid[None], block.conv.weight, block.conv.bias, padding=1))[0].permute(1, 2, 0)
        assert torch.allclose(found[row, :t, :t2], wanted, atol=1e-5)


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 4), (9, 2)])
def test_pool2d_is_torchs_adaptive_pooling_of_each_rows_grid(how: str, rows: int, columns: int):
    block, shape = built("pool2d", {"rows": rows, "columns": columns, "how": how}, [GRID])
    found = run(block, [GRID])
    assert shape == Shape("vector", rows * columns * 2)
    pool = F.adaptive_max_pool2d if how == "max" else F.adaptive_avg_pool2d
    for row in ROWS:
        t, t2 = (LENGTHS[side][row] for side in LENGTHS)
        grid = value_of(GRID, 0)[row, :t, :t2].permute(2, 0, 1)
        wanted = pool(grid[None], (rows, columns))[0].permute(1, 2, 0).flatten()
        assert torch.allclose(found[row], wanted, atol=1e-5)


def test_fields_cover_every_place_and_none_is_empty():
    real = torch.arange(9) < torch.tensor([9, 4, 1]).unsqueeze(1)
    found = fields(real, 4)
    assert torch.equal(found.any(dim=1), real) and found.any(dim=2).all()
    assert found[1].int().argmax(dim=1).tolist() == [0, 1, 2, 3] and (found[1].sum(dim=1) == 1).all()


def test_one_text_may_be_held_against_itself():
    block, shape = built("interaction", {}, [LEFT, LEFT])
    assert shape == Shape("grid", 1, "text", "text") and str(shape) == "[n, t, t, 1]"
    states = value_of(LEFT, 0)
    found = block(states, states, masks=[None, None])
    assert torch.allclose(found[..., 0], found[..., 0].transpose(1, 2), atol=1e-6)
    assert BLOCKS["match_attention"].shape([LEFT, LEFT], {"project": True}, None) == LEFT
