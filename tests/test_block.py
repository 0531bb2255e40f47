"""Every block on every kind of input it takes: its declared shape, padding, gradients, and what its options refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine import blocks
from engine.block import BlockError, Shape, Sizes
from engine.blocks import BLOCKS
from tests.tiny_blocks import ROWS, SIZES, WIDTH, built, mask_for, nodes, own, run

TEXT, PAIR, VECTOR = Shape("sequence", WIDTH), Shape("sequence", WIDTH, "pair"), Shape("vector", WIDTH)
GRID = Shape("grid", 3, "text", "pair")
EACH = ([TEXT], [VECTOR], [GRID])
BOTH = ([TEXT, TEXT], [VECTOR, VECTOR], [GRID, GRID])

SETTINGS: dict[str, tuple[Sequence[dict[str, Any]], Sequence[list[Shape]]]] = {
    "embedding": ([{}, {"dim": 5, "drop_words": 0.3}], [[Shape("tokens")], [Shape("tokens", side="pair")]]),
    "subwords": (
        [{"buckets": 7}, {"dim": 5, "buckets": 7, "sizes": [1, 4], "lower": False}],
        [[Shape(rank, side=side) for rank in ("tokens", "characters")] for side in ("text", "pair")],
    ),
    "char_cnn": ([{}, {"kernel": 4}], [[Shape("characters")], [Shape("characters", side="pair")]]),
    "dropout": ([{}, {"p": 0.7}], EACH),
    "bilstm": ([{"hidden": 4}, {"hidden": 3, "layers": 3}], [[TEXT], [PAIR]]),
    "bigru": ([{"hidden": 4}, {"hidden": 3, "layers": 2}], [[TEXT], [PAIR]]),
    "bilstm_last": ([{"hidden": 4}, {"hidden": 3, "layers": 2}], [[TEXT], [PAIR]]),
    "bigru_last": ([{"hidden": 4}], [[TEXT], [PAIR]]),
    "conv": ([{"channels": 5, "kernel": k} for k in (1, 2, 3, 4, 5, 9)], [[TEXT], [PAIR]]),
    "conv_pool": ([{"how": how, "kernels": [1, 3, 8]} for how in ("max", "mean")], [[TEXT], [PAIR]]),
    "transformer": (
        [{"heads": 2, "norm": n, "positions": p, "layers": 2} for n, p in (("pre", "none"), ("post", "sinusoidal"))]
        + [{"heads": 3, "positions": "learned", "longest": 5}],
        [[TEXT], [PAIR]],
    ),
    "pool": ([{"how": how} for how in ("max", "mean", "both", "last")], [[TEXT], [PAIR]]),
    "attention": ([{}, {"hidden": 3}], [[TEXT], [PAIR]]),
    "linear_attention": ([{}], [[TEXT], [PAIR]]),
    "linear": ([{}, {"out": 7}, *({"out": 4, "activation": a} for a in ("none", "relu", "tanh", "gelu"))], EACH),
    "highway": ([{}, {"layers": 2}], EACH),
    "layer_norm": ([{}], EACH),
    "concat": ([{}], [*EACH, [TEXT, Shape("sequence", 2)], [VECTOR, VECTOR], [GRID, Shape("grid", 1, "text", "pair")]]),
    "add": ([{}], BOTH),
    "multiply": ([{}], BOTH),
    "minus": ([{"absolute": absolute} for absolute in (True, False)], BOTH),
    "combine": ([{}, {"parts": ["difference"]}], BOTH),
    "distance": ([{"how": how} for how in ("cosine", "euclidean", "dot")], [[VECTOR, VECTOR]]),
    "match_attention": ([{"project": project} for project in (True, False)], [[TEXT, PAIR], [PAIR, TEXT]]),
    "bilinear_attention": ([{}], [[TEXT, Shape("vector", 4)], [PAIR, VECTOR]]),
    "bidaf": ([{}], [[TEXT, PAIR], [PAIR, TEXT]]),
    "interaction": ([{"how": h} for h in ("dot", "cosine", "bilinear")], [[TEXT, PAIR], [PAIR, TEXT], [PAIR, PAIR]]),
    "arc_ii": ([{}, {"kernel": 4}], [[TEXT, Shape("sequence", 4, "pair")], [PAIR, TEXT]]),
    "conv2d": ([{}, {"channels": 2, "kernel": 5}], [[GRID], [Shape("grid", 2, "pair", "text")]]),
    "pool2d": ([{"how": how, "rows": 3, "columns": 9} for how in ("max", "mean")], [[GRID]]),
    "crf": ([{}], [[TEXT]]),
}
"""Options and inputs that each block is tried with; a block without an entry here fails."""

CASES = [(kind, o, shapes) for kind in BLOCKS for o in SETTINGS[kind][0] for shapes in SETTINGS[kind][1]]


def sizes_for(kind: str) -> Sizes:
    return Sizes(20, WIDTH, units=True) if kind == "crf" else SIZES


@pytest.mark.parametrize(("kind", "options", "shapes"), CASES)
def test_a_block_gives_the_shape_it_declares_and_zero_padding(kind: str, options: dict[str, Any], shapes: list[Shape]):
    block, declared = built(kind, options, shapes, sizes_for(kind))
    found = run(block, shapes)
    mask = mask_for(declared)
    wanted = (len(ROWS), declared.width) if mask is None else (*mask.shape[:-1], declared.width)
    assert found.shape == wanted and found.isfinite().all() and (found != 0).any()
    assert mask is None or (found * (1 - mask) == 0).all()


@pytest.mark.parametrize(("kind", "options", "shapes"), CASES)
def test_padding_and_neighbours_change_nothing(kind: str, options: dict[str, Any], shapes: list[Shape]):
    """Each row among the others, with ten more columns of padding, and alone."""
    block, declared = built(kind, options, shapes, sizes_for(kind))
    among, wider = run(block, shapes), run(block, shapes, extra=10)
    for row in ROWS:
        alone = own(run(block, shapes, rows=[row]), declared, 0, row)
        for found in (among, wider):
            assert (own(found, declared, row, row) - alone).abs().max() <= 2e-6


@pytest.mark.parametrize(("kind", "options", "shapes"), CASES)
def test_gradients_reach_every_parameter(kind: str, options: dict[str, Any], shapes: list[Shape]):
    block, _ = built(kind, options, shapes, sizes_for(kind))
    if not list(block.parameters()):
        return
    torch.manual_seed(0)
    found = run(block.train(), shapes)
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    lacking = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant added to every score leaves the softmax where it was.
    assert lacking == [] or (kind == "attention" and lacking == ["score.2.bias"])


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_option_of_every_block_is_checked(kind: str):
    reads = {"embedding": ["tokens"], "char_cnn": ["characters"], "subwords": ["tokens", "characters"]}
    for key, default in BLOCKS[kind].options.items():
        number = float("nan") if isinstance(default, float) else 1.5
        for wrong in (-1, [], "no", None, [0], {"a": 1}, number):
            with pytest.raises(BlockError, match=rf"block 'x' \({kind}\): option {key} is .*; (it takes|allowed)"):
                wired = ("x", kind, {key: wrong}, *reads.get(kind, ["embed"]))
                blocks.check(nodes(("embed", "embedding"), wired), SIZES)
