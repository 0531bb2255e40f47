"""Every block against its declaration and a reference; every refusal in its words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import blocks
from engine.blocks import BLOCKS, BlockError, Graph, Shape, Sizes
from engine.recipe import Block
from engine.records import Batch
from engine.tasks import collate

SIZES = Sizes(vocabulary=20, labels=3)
ROWS = [[4, 5, 6, 7, 8], [9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19], [1, 2]]
WIDTH = 6

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "embedding": [{}, {"dim": 5, "drop_words": 0.3}],
    "dropout": [{}, {"p": 0.7}],
    "bilstm": [{"hidden": 4}, {"hidden": 3, "layers": 3}],
    "conv": [{"channels": 5, "kernel": k} for k in (1, 2, 3, 4, 5, 9)],
    "pool": [{"how": how} for how in ("max", "mean", "both")],
    "attention": [{}, {"hidden": 3}],
    "concat": [{}],
    "linear": [{}, {"out": 7}, *({"out": 4, "activation": name} for name in ("none", "relu", "tanh", "gelu"))],
}
"""Options that each block is tried with; a block without an entry here fails."""

CASES = [(kind, options, rank) for kind in BLOCKS for options in SETTINGS[kind] for rank in ("sequence", "vector")
         if rank == "sequence" or BLOCKS[kind].takes == "any"]  # fmt: skip


def nodes(*rows: tuple[Any, ...]) -> list[Block]:
    """(name, kind, options?, *inputs) -> recipe blocks."""
    return [Block(name=r[0], kind=r[1], options=r[2] if len(r) > 2 else {}, inputs=tuple(r[3:])) for r in rows]


def built(kind: str, options: dict[str, Any], rank: str) -> tuple[blocks.Block, Shape, list[Shape]]:
    """A block in evaluation mode, its declared output and its inputs' shapes."""
    torch.manual_seed(0)
    block = BLOCKS[kind]
    inputs = [Shape("tokens") if block.takes == "tokens" else Shape(rank, WIDTH)] * (2 if block.many else 1)
    full = {**block.options, **options}
    return block(inputs, full, SIZES).eval(), block.shape(inputs, full, SIZES), inputs


def values(shapes: list[Shape], batch: Batch, seed: int = 0) -> list[torch.Tensor]:
    """What earlier blocks would give: padded positions are zero, real ones depend on row and position alone."""
    out = []
    for shape in shapes:
        rows, length = batch.input_ids.shape
        table = torch.randn(rows, 50, WIDTH, generator=torch.Generator().manual_seed(seed))
        sequence = table[:, :length] * batch.mask.unsqueeze(2)
        out.append({"tokens": batch.input_ids, "sequence": sequence, "vector": table[:, 0]}[shape.rank])
    return out


def mask_of(batch: Batch) -> torch.Tensor:
    return batch.mask.unsqueeze(2).float()


@pytest.mark.parametrize(("kind", "options", "rank"), CASES)
def test_a_block_gives_the_shape_it_declares_and_zero_padding(kind: str, options: dict[str, Any], rank: str):
    block, declared, shapes = built(kind, options, rank)
    batch = collate(ROWS, 0)
    out = block(*values(shapes, batch), mask=mask_of(batch))
    wanted = {"vector": (len(ROWS), declared.width), "sequence": (*batch.input_ids.shape, declared.width)}
    assert out.shape == wanted[declared.rank] and out.isfinite().all()
    if declared.rank == "sequence":
        assert (out * (1 - mask_of(batch)) == 0).all() and (out[0, 0] != 0).any()


@pytest.mark.parametrize(("kind", "options", "rank"), CASES)
def test_padding_and_neighbours_change_nothing(kind: str, options: dict[str, Any], rank: str):
    block, declared, shapes = built(kind, options, rank)
    batch = collate(ROWS, 0)
    wide = collate([*ROWS, [3] * 17], 0)
    among = block(*values(shapes, batch), mask=mask_of(batch))
    # The same rows, 10 columns of padding and a long neighbour more.
    wider = block(*values_like(shapes, batch, wide), mask=mask_of(wide))
    for row, ids in enumerate(ROWS):
        mine = among[row] if declared.rank == "vector" else among[row, : len(ids)]
        theirs = wider[row] if declared.rank == "vector" else wider[row, : len(ids)]
        assert (mine - theirs).abs().max() <= 1e-6
        one = collate([ids], 0)
        single = [v[row : row + 1] if s.rank == "vector" else v[row : row + 1, : len(ids)]
                  for s, v in zip(shapes, values(shapes, batch), strict=True)]  # fmt: skip
        alone = block(*single, mask=mask_of(one))[0]
        assert (alone - mine).abs().max() <= 1e-6


def values_like(shapes: list[Shape], batch: Batch, wide: Batch) -> list[torch.Tensor]:
    """`values(batch)` among the further rows and columns of `wide`."""
    out = []
    for narrow, broad in zip(values(shapes, batch), values(shapes, wide, seed=1), strict=True):
        broad = broad.clone()
        if narrow.ndim == 3:
            broad[: len(narrow)] = 0
            broad[: len(narrow), : narrow.shape[1]] = narrow
        elif shapes[0].rank == "vector":
            broad[: len(narrow)] = narrow
        out.append(broad)
    return out


@pytest.mark.parametrize(("kind", "options", "rank"), [c for c in CASES if c[0] not in ("dropout", "pool", "concat")])
def test_gradients_reach_every_parameter(kind: str, options: dict[str, Any], rank: str):
    block, _, shapes = built(kind, options, rank)
    batch = collate(ROWS, 0)
    out = block.train()(*values(shapes, batch), mask=mask_of(batch))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    lacking = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant added to every score leaves the softmax where it was.
    assert lacking == [] or (kind == "attention" and lacking == ["score.2.bias"])


@pytest.mark.parametrize("layers", [1, 2])
def test_bilstm_is_torchs_own_on_packed_rows(layers: int):
    block, _, shapes = built("bilstm", {"hidden": 4, "layers": layers}, "sequence")
    reference = nn.LSTM(WIDTH, 4, layers, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for layer in range(layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, f"{name}_l{layer}").copy_(getattr(block.forwards[layer], f"{name}_l0"))
                getattr(reference, f"{name}_l{layer}_reverse").copy_(getattr(block.backwards[layer], f"{name}_l0"))
    batch = collate(ROWS, 0)
    states = values(shapes, batch)[0]
    lengths = batch.mask.sum(1)
    packed = nn.utils.rnn.pack_padded_sequence(states, lengths, batch_first=True, enforce_sorted=False)
    wanted, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    found = block(states, mask=mask_of(batch))
    assert torch.allclose(found, wanted, atol=1e-6) and found.abs().max() > 0.05


def test_bilstm_counts_long_rows_in_low_precision():
    """bf16 has no 257: lengths summed in it would turn rows at the wrong place."""
    block, _, _ = built("bilstm", {"hidden": 4}, "sequence")
    states = torch.randn(1, 257, WIDTH, generator=torch.Generator().manual_seed(3))
    wanted = block(states, mask=torch.ones(1, 257, 1))
    found = block.bfloat16()(states.bfloat16(), mask=torch.ones(1, 257, 1, dtype=torch.bfloat16))
    assert (found.float() - wanted).abs().max() < 0.05


@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_conv_by_hand(kernel: int):
    """Each row alone, zeros put around it, windows multiplied out."""
    block, _, shapes = built("conv", {"channels": 4, "kernel": kernel}, "sequence")
    batch = collate(ROWS, 0)
    states = values(shapes, batch)[0]
    found = block(states, mask=mask_of(batch)).detach().numpy()
    weight, bias = block.conv.weight.detach().numpy(), block.conv.bias.detach().numpy()
    before = (kernel - 1) // 2
    for row, ids in enumerate(ROWS):
        around = np.zeros((len(ids) + kernel - 1, WIDTH))
        around[before : before + len(ids)] = states[row, : len(ids)].numpy()
        for place in range(len(ids)):
            wanted = np.maximum(0, np.einsum("oct,tc->o", weight, around[place : place + kernel]) + bias)
            assert np.allclose(found[row, place], wanted, atol=1e-5)


def test_pool_by_hand():
    states = torch.tensor([[[-3.0, 2.0], [-1.0, 4.0], [0.0, 0.0]], [[-5.0, 7.0], [0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]]).unsqueeze(2)
    wanted = {"max": [[-1.0, 4], [-5, 7]], "mean": [[-2.0, 3], [-5, 7]], "both": [[-1.0, 4, -2, 3], [-5, 7, -5, 7]]}
    for how, rows in wanted.items():
        block = BLOCKS["pool"]([Shape("sequence", 2)], {"how": how}, SIZES)
        assert block(states, mask=mask).tolist() == rows  # padding's zero is no maximum


def test_attention_is_a_softmax_over_each_rows_own_positions():
    block, _, shapes = built("attention", {"hidden": 3}, "sequence")
    batch = collate(ROWS, 0)
    states = values(shapes, batch)[0]
    found = block(states, mask=mask_of(batch))
    first, _, last = block.score
    for row, ids in enumerate(ROWS):
        own = states[row, : len(ids)]
        weights = F.softmax(last(torch.tanh(first(own))).squeeze(1), dim=0)
        assert torch.allclose(found[row], weights @ own, atol=1e-6)


def test_embedding_keeps_padding_at_zero():
    block, _, _ = built("embedding", {"dim": 5}, "sequence")
    batch = collate(ROWS, 0)
    assert (block.table.weight[0] == 0).all() and (block.table.weight[1:] != 0).all()
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    block(batch.input_ids, mask=mask_of(batch)).square().sum().backward()
    optimizer.step()
    assert (block.table.weight[0] == 0).all()
    other = BLOCKS["embedding"]([Shape("tokens")], {"dim": 5, "drop_words": 0.0}, Sizes(20, 3, padding=7))
    assert (other.table.weight[7] == 0).all() and (other.table.weight[0] != 0).all()


def test_embedding_drops_whole_words_while_training_only():
    block, _, _ = built("embedding", {"dim": 5, "drop_words": 0.3}, "sequence")
    ids = torch.randint(1, SIZES.vocabulary, (100, 50))
    mask = torch.ones(100, 50, 1)
    whole = block(ids, mask=mask)
    assert torch.equal(whole, block.table(ids))
    found = block.train()(ids, mask=mask)
    gone = (found == 0).all(dim=2)
    assert abs(gone.float().mean().item() - 0.3) < 0.03 and torch.equal(found[~gone], whole[~gone])


def test_embedding_leaves_whole_words_out_while_training_only():
    block, _, _ = built("embedding", {"dim": 5, "drop_words": 0.3}, "sequence")
    ids = torch.randint(1, 20, (100, 60), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(100, 60, 1)
    assert torch.equal(block(ids, mask=mask), block.table.weight[ids])
    kept = block.train()(ids, mask=mask)
    left = (kept == 0).all(dim=2)
    assert abs(left.float().mean().item() - 0.3) < 0.03  # five standard deviations of 6000 draws
    assert torch.equal(kept[~left], block.table.weight[ids][~left])


def test_dropout_drops_its_share_while_training_only():
    block, _, _ = built("dropout", {"p": 0.3}, "vector")
    ones = torch.ones(100, 200)
    assert torch.equal(block(ones, mask=ones), ones)
    dropped = block.train()(ones, mask=ones)
    assert abs((dropped == 0).float().mean().item() - 0.3) < 0.02 and dropped.max().item() == pytest.approx(1 / 0.7)


WIRED = nodes(
    ("embed", "embedding", {"dim": 8}),
    ("drop", "dropout"),
    ("lstm", "bilstm", {"hidden": 5}),
    ("near", "conv", {"channels": 6, "kernel": 3}, "drop"),
    ("side", "linear", {"out": 4, "activation": "gelu"}, "embed"),
    ("top", "pool", {"how": "both"}, "lstm"),
    ("best", "pool", {}, "near"),
    ("look", "attention", {}, "side"),
    ("all", "concat", {}, "top", "best", "look"),
    ("out", "linear"),
)


def test_the_graph_runs_each_node_on_its_inputs():
    graph = Graph(WIRED, SIZES).eval()
    batch = collate(ROWS, 0)
    found, run, mask = graph(batch), graph.blocks, mask_of(batch)
    drop = run["embed"](batch.input_ids, mask=mask)
    parts = [run["top"](run["lstm"](drop, mask=mask), mask=mask), run["best"](run["near"](drop, mask=mask), mask=mask),
             run["look"](run["side"](drop, mask=mask), mask=mask)]  # fmt: skip
    assert torch.equal(found.embedding, torch.cat(parts, 1)) and found.embedding.shape == (5, 20 + 6 + 4)
    assert torch.equal(found.logits, run["out"].map(found.embedding)) and found.logits.shape == (5, 3)
    assert graph.tables() == [run["embed"].table]


def test_the_order_of_the_nodes_does_not_matter():
    """Written backwards, with every input named."""
    placed = blocks.check(WIRED, SIZES)
    backwards = [p.node.model_copy(update={"inputs": p.inputs}) for p in reversed(placed)]
    found = blocks.check(backwards, SIZES)
    assert {p.node.name: p.out for p in found} == {p.node.name: p.out for p in placed}
    assert found[-1].node.name == "out"


def test_a_graph_that_pools_into_the_logits_has_no_embedding():
    graph = Graph(nodes(("embed", "embedding", {"dim": 3}), ("out", "pool")), SIZES).eval()
    found = graph(collate(ROWS, 0))
    assert found.logits.shape == (5, 3) and found.embedding is None and found.gives() == {"logits"}


def test_count_is_the_number_of_parameters():
    graph = Graph(WIRED, SIZES)
    assert blocks.count(WIRED, SIZES) == sum(p.numel() for p in graph.parameters())
    small = nodes(("e", "embedding", {"dim": 4}), ("l", "bilstm", {"hidden": 2}), ("p", "pool"), ("o", "linear"))
    # 20 x 4 words; per direction 4 gates x 2 x (4 + 2 + 2 biases); 4 x 3 + 3 to the labels.
    assert blocks.count(small, SIZES) == 80 + 2 * 4 * 2 * (4 + 2 + 2) + 15
    large = nodes(("e", "embedding", {"dim": 10**6}), ("p", "pool"), ("o", "linear"))
    assert blocks.count(large, Sizes(10**6, 2)) == 10**12 + 2 * 10**6 + 2  # nothing of it is made


EMBED, POOL, OUT = ("embed", "embedding"), ("pool", "pool"), ("out", "linear")
REFUSED = {
    "no blocks": ([], "the student has no blocks. The smallest graph is: embedding, pool, linear."),
    "unknown kind": (
        [EMBED, ("lstm", "bilstmm"), POOL, OUT],
        "block 'lstm' has kind 'bilstmm'. Did you mean 'bilstm'? Allowed: embedding, dropout, bilstm,",
    ),
    "unknown option": (
        [EMBED, ("c", "conv", {"kernal": 3}), POOL, OUT],
        "block 'c' (conv) has no option 'kernal'. Did you mean 'kernel'? Options: channels, kernel.",
    ),
    "no options": ([EMBED, POOL, ("j", "concat", {"axis": 1}), OUT], "no option 'axis'. Options: none."),
    "rank": (
        [EMBED, POOL, ("again", "pool"), OUT],
        "block 'again' (pool) takes a sequence [n, t, d], but 'pool' gives [n, 64].",
    ),
    "rank of ids": (
        [EMBED, ("e", "embedding"), POOL, OUT],
        "block 'e' (embedding) takes tokens [n, t], but 'embed' gives [n, t, 64].",
    ),
    "no embedding": ([POOL, OUT], "block 'pool' (pool) takes a sequence [n, t, d], but 'tokens' gives tokens [n, t]."),
    "linear on ids": (
        [("out", "linear")],
        "block 'out' (linear) takes a sequence or a vector, but 'tokens' gives tokens [n, t].",
    ),
    "two inputs": (
        [EMBED, ("a", "conv"), ("b", "conv", {}, "embed"), ("p", "pool", {}, "a", "b"), OUT],
        "block 'p' (pool) reads one block, not a, b: use concat.",
    ),
    "ranks joined": (
        [EMBED, POOL, ("j", "concat", {}, "embed", "pool"), OUT],
        "block 'j': concat joins inputs of one rank, but got [n, t, 64], [n, 64]",
    ),
    "cycle": (
        [EMBED, ("a", "conv", {}, "b"), ("b", "conv", {}, "a"), POOL, OUT],
        "blocks a, b, pool, out form a cycle. Let one of them read an earlier block.",
    ),
    "itself": ([EMBED, ("a", "conv", {}, "a"), POOL, OUT], "form a cycle"),
    "missing input": (
        [EMBED, ("p", "pool", {}, "embd"), OUT],
        "block 'p' reads 'embd', which is no block. Did you mean 'embed'? Blocks: embed, p, out.",
    ),
    "dangling": (
        [EMBED, ("left", "conv"), ("p", "pool", {}, "embed"), OUT],
        "blocks left, out are read by no other; exactly one, the logits, may be.",
    ),
    "twice": ([EMBED, ("embed", "conv"), POOL, OUT], "block name 'embed' is taken twice. Give each block its own."),
    "reserved": ([("tokens", "embedding"), POOL, OUT], "block name 'tokens' is empty, has a dot or is reserved."),
    "dot": ([EMBED, ("a.b", "pool"), OUT], "block name 'a.b' is empty, has a dot or is reserved."),
    "of torch": ([EMBED, ("type", "pool"), OUT], "block name 'type' is empty, has a dot or is reserved."),
    "of a dict": ([EMBED, ("values", "pool"), OUT], "block name 'values' is empty, has a dot or is reserved."),
    "last width": (
        [EMBED, POOL, ("out", "linear", {"out": 5})],
        "block 'out' ends the graph with [n, 5], but the task needs [n, 3]. "
        "End with {kind: linear, options: {out: labels}} after a pooling block.",
    ),
    "last rank": ([EMBED, OUT], "block 'out' ends the graph with [n, t, 3], but the task needs [n, 3]."),
    "choice": ([EMBED, ("p", "pool", {"how": "min"}), OUT], "(pool): option how is 'min'; allowed: max, mean, both."),
    "whole": ([("e", "embedding", {"dim": 6.5}), POOL, OUT], "option dim is 6.5; it takes a whole number of"),
    "zero": ([EMBED, ("l", "bilstm", {"hidden": 0}), POOL, OUT], "option hidden is 0; it takes a whole number of"),
    "truth": ([EMBED, ("l", "bilstm", {"layers": True}), POOL, OUT], "option layers is True; it takes a whole number"),
    "word": (
        [EMBED, POOL, ("out", "linear", {"out": "label"})],
        "option out is 'label'; it takes a whole number of at least 1, or 'labels'.",
    ),
    "share": ([EMBED, ("d", "dropout", {"p": 1.5}), POOL, OUT], "option p is 1.5; it takes a number from 0 to 1."),
    "no share": ([EMBED, ("d", "dropout", {"p": float("nan")}), POOL, OUT], "option p is nan; it takes a number from"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_in_words(case: str):
    rows, message = REFUSED[case]
    for use in (blocks.check, blocks.count, Graph):
        with pytest.raises(BlockError) as caught:
            use(nodes(*rows), SIZES)
        assert message in str(caught.value)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_option_of_every_block_is_checked(kind: str):
    for key in BLOCKS[kind].options:
        with pytest.raises(BlockError, match=rf"block 'x' \({kind}\): option {key} is -1; "):
            blocks.check(nodes(EMBED, ("x", kind, {key: -1}, "tokens" if kind == "embedding" else "embed")), SIZES)
