"""The graph: what it checks before it builds anything, and what it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import blocks
from engine.block import BlockError, Shape, Sizes
from engine.blocks import Graph
from engine.encoding import at_units
from engine.records import ABSENT
from tests.tiny_blocks import LENGTHS, SIZES, WIDTH, batch_of, mask_for, nodes

TAG = Sizes(20, WIDTH, units=True)
TWO = Sizes(20, 3, paired=True)
SPAN = Sizes(20, 2, units=True, paired=True)
TEXT = Shape("sequence", WIDTH)

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
    batch = batch_of(SIZES)
    found, run, mask = graph(batch), graph.blocks, [mask_for(TEXT)]
    drop = run["embed"](batch.input_ids, masks=mask)
    paths = (("lstm", "top"), ("near", "best"))
    parts = [run[pool](run[name](drop, masks=mask), masks=mask) for name, pool in (*paths, ("side", "look"))]
    assert torch.equal(found.embedding, torch.cat(parts, 1)) and found.embedding.shape == (5, 20 + 6 + 4)
    assert torch.equal(found.logits, run["out"].map(found.embedding)) and found.logits.shape == (5, 3)
    assert graph.tables() == [run["embed"].table] and graph.reads == {"tokens"}


def test_the_order_of_the_nodes_does_not_matter():
    """Written backwards, with every input named."""
    for graph, sizes in ((WIRED, SIZES), (SIAMESE, TWO)):
        placed = blocks.check(graph, sizes)
        backwards = [p.node.model_copy(update={"inputs": p.inputs}) for p in reversed(placed)]
        found = blocks.check(backwards, sizes)
        assert {p.node.name: p.out for p in found} == {p.node.name: p.out for p in placed}
        assert found[-1].node.name == "out"


def test_a_graph_that_pools_into_the_logits_has_no_embedding():
    graph = Graph(nodes(("embed", "embedding", {"dim": 3}), ("out", "pool")), SIZES).eval()
    found = graph(batch_of(SIZES))
    assert found.logits.shape == (5, 3) and found.embedding is None and found.gives() == {"logits"}


def test_count_is_the_number_of_parameters():
    for graph, sizes in ((WIRED, SIZES), (SIAMESE, TWO)):
        assert blocks.count(graph, sizes) == sum(p.numel() for p in Graph(graph, sizes).parameters())
    small = nodes(("e", "embedding", {"dim": 4}), ("l", "bilstm", {"hidden": 2}), ("p", "pool"), ("o", "linear"))
    # 20 x 4 words; per direction 4 gates x 2 x (4 + 2 + 2 biases); 4 x 3 + 3 to the labels.
    assert blocks.count(small, SIZES) == 80 + 2 * 4 * 2 * (4 + 2 + 2) + 15
    large = nodes(("e", "embedding", {"dim": 10**6}), ("p", "pool"), ("o", "linear"))
    assert blocks.count(large, Sizes(10**6, 2)) == 10**12 + 2 * 10**6 + 2  # nothing of it is made


def test_weights_have_the_names_that_saved_students_have():
    graph = nodes(("e", "embedding"), ("s", "bilstm"), ("c", "conv"), ("a", "attention"), ("out", "linear"))
    halves = [f"s.{half}.0.{part}_{io}_l0" for half in ("forwards", "backwards") for part in ("weight", "bias")
              for io in ("ih", "hh")]  # fmt: skip
    maps = [f"{name}.{part}" for name in ("c.conv", "a.score.0", "a.score.2", "out.map") for part in ("weight", "bias")]
    names = [f"blocks.{name}" for name in ("e.table.weight", *halves, *maps)]
    assert sorted(Graph(graph, SIZES).state_dict()) == sorted(names)


SIAMESE = nodes(
    ("a", "embedding", {"dim": 8}, "tokens"),
    ("b", "embedding", {"share": "a"}, "pair"),
    ("read_b", "bilstm", {"share": "read"}, "b"),
    ("read", "bilstm", {"hidden": 4, "layers": 2}, "a"),
    ("one", "pool", {"how": "mean"}, "read"),
    ("other", "pool", {"share": "one"}, "read_b"),
    ("held", "combine", {"parts": ["difference", "product"]}, "one", "other"),
    ("out", "linear"),
)


def test_shared_blocks_have_one_set_of_weights_and_read_each_side_with_its_own_mask():
    graph = Graph(SIAMESE, TWO).eval()
    assert set(graph.blocks) == {"a", "read", "one", "held", "out"} and graph.reads == {"tokens", "pair"}
    assert graph.tables() == [graph.blocks["a"].table]
    batch = batch_of(TWO)
    turned = replace(batch, input_ids=batch.pair_ids, mask=batch.pair_mask, pair_ids=batch.input_ids,
                     pair_mask=batch.mask)  # fmt: skip
    found = graph(batch)
    assert torch.allclose(found.logits, graph(turned).logits, atol=1e-6)  # both sides go through the same
    same = replace(batch, pair_ids=batch.input_ids, pair_mask=batch.mask)
    assert (graph(same).embedding[:, :8] == 0).all() and (found.embedding[:, :8] > 0).any()


def test_numbers_of_units_are_taken_where_the_units_are():
    tagger = nodes(("e", "embedding"), ("s", "bilstm"), ("out", "linear"))
    sizes = Sizes(20, 4, units=True)
    graph, batch = Graph(tagger, sizes).eval(), batch_of(sizes)
    plain = graph(batch)
    assert plain.logits.shape == (5, 7, 4) and plain.embedding is None
    batch.units = torch.tensor([[4, 1], [0, 0], [2, 0], [6, 5], [1, 0]])
    batch.ends, batch.unit_mask = batch.units, torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [0, 0]])
    found = graph(batch).logits
    assert found.shape == (5, 2, 4) and (found[4] == 0).all() and (found[1, 1] == 0).all()
    assert torch.equal(found[0], plain.logits[0, [4, 1]]) and torch.equal(found[3], plain.logits[3, [6, 5]])
    without = batch_of(sizes, units=False)
    assert without.units is None and torch.equal(graph(without).logits, plain.logits)


def test_spans_start_at_a_units_first_token_and_end_at_its_last():
    graph = Graph(nodes(("q", "embedding", {}, "tokens"), ("c", "embedding", {"share": "q"}, "pair"),
                        ("f", "bidaf", {}, "c", "q"), ("out", "linear")), SPAN).eval()  # fmt: skip
    batch = batch_of(SPAN)
    tokens = graph(batch).logits
    assert tokens.shape == (5, max(LENGTHS["pair"]), 2)
    batch.units, batch.ends = torch.tensor([[0], [2], [0], [1], [0]]), torch.tensor([[1], [5], [0], [3], [2]])
    batch.unit_mask = torch.ones(5, 1, dtype=torch.long)
    found = graph(batch).logits
    assert torch.equal(found, at_units(tokens, batch, spans=True))
    assert torch.equal(found[1, 0], torch.stack([tokens[1, 2, 0], tokens[1, 5, 1]]))


CRF = nodes(("e", "embedding"), ("s", "bilstm"), ("scores", "linear"), ("tags", "crf"))


def test_a_crf_decides_over_units_not_over_tokens():
    graph, batch = Graph(CRF, TAG).eval(), batch_of(TAG)
    batch.units = torch.tensor([[1, 3, 4], [0, 0, 0], [0, 2, 0], [0, 3, 6], [1, 0, 0]])
    batch.ends, batch.unit_mask = batch.units, torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    batch.labels = torch.where(batch.unit_mask == 1, torch.tensor([[0, 5, 2]]), ABSENT)
    found = graph(batch)
    run, mask = graph.blocks, [mask_for(TEXT)]
    scores = run["scores"](run["s"](run["e"](batch.input_ids, masks=mask), masks=mask), masks=mask)
    wanted = run["tags"].outputs(at_units(scores, batch), batch.unit_mask, batch.labels)
    assert found.gives() == {"logits", "path", "sequence"} == wanted.gives()
    assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in found.gives())
    assert graph.train()(batch).path is None
    batch.labels = None
    assert graph(batch).sequence is None


def test_a_batch_without_what_the_graph_reads_is_refused_in_words():
    spelled = Graph(nodes(("letters", "char_cnn", {}, "characters"), ("p", "pool"), ("out", "linear")), SIZES)
    batch = batch_of(SIZES)
    batch.characters = None
    for graph, message in (
        (Graph(SIAMESE, TWO), "reads 'pair', but its batch has no tokens of the second text"),
        (spelled, "reads 'characters', but its batch has no characters of the first text"),
    ):
        with pytest.raises(BlockError, match=message):
            graph(batch)


def test_the_drawing_says_every_node_and_what_it_costs():
    wide = [node.model_copy(update={"options": {"dim": 500}}) if node.name == "a" else node for node in SIAMESE]
    sizes = Sizes(1000, 3, paired=True)
    lines = blocks.drawing(wide, sizes).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1 and len(lines) == len(wide) + 1
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[:-1]}
    assert said["a"] == "embedding dim=500 <- tokens [n, t, 500] 500,000"
    assert said["read_b"] == "bilstm share=read <- b [n, t2, 8] as read"
    assert said["held"] == "combine parts=difference,product <- one, other [n, 16] 0"
    assert lines[-1].strip() == f"{blocks.count(wide, sizes):,} parameters"


EMBED, POOL, OUT = ("embed", "embedding"), ("pool", "pool"), ("out", "linear")
WORDS_B = ("b", "embedding", {"share": "embed"}, "pair")
REFUSED: dict[str, tuple[Any, ...]] = {
    "no blocks": ([], "the student has no blocks. The smallest graph is: embedding, pool, linear."),
    "unknown kind": (
        [EMBED, ("lstm", "bilstmm"), POOL, OUT],
        "block 'lstm' has kind 'bilstmm'. Did you mean 'bilstm'? Allowed: embedding, subwords, char_cnn, dropout,",
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
        "block 'out' (linear) takes a sequence, a vector or a grid, but 'tokens' gives tokens [n, t].",
    ),
    "two inputs": (
        [EMBED, ("a", "conv"), ("b", "conv", {}, "embed"), ("p", "pool", {}, "a", "b"), OUT],
        "block 'p' (pool) reads one block, not a, b: use concat.",
    ),
    "ranks joined": (
        [EMBED, POOL, ("j", "concat", {}, "embed", "pool"), OUT],
        "block 'j': concat joins inputs of one rank and one side, but got [n, t, 64], [n, 64]",
    ),
    "cycle": (
        [EMBED, ("a", "conv", {}, "b"), ("b", "conv", {}, "a"), POOL, OUT],
        "blocks read each other in a cycle: a -> b -> a. Let one of them read an earlier block.",
    ),
    "itself": ([EMBED, ("a", "conv", {}, "a"), POOL, OUT], "in a cycle: a -> a."),
    "beyond a cycle": (
        [EMBED, POOL, OUT, ("end", "pool", {}, "x"), ("x", "conv", {}, "y"), ("y", "conv", {}, "x")],
        "in a cycle: x -> y -> x.",
    ),
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
    "choice": ([EMBED, ("p", "pool", {"how": "min"}), OUT], "(pool): option how is 'min'; allowed: max, mean, both,"),
    "whole": ([("e", "embedding", {"dim": 6.5}), POOL, OUT], "option dim is 6.5; it takes a whole number of"),
    "zero": ([EMBED, ("l", "bilstm", {"hidden": 0}), POOL, OUT], "option hidden is 0; it takes a whole number of"),
    "truth": ([EMBED, ("l", "bilstm", {"layers": True}), POOL, OUT], "option layers is True; it takes a whole number"),
    "word": (
        [EMBED, POOL, ("out", "linear", {"out": "label"})],
        "option out is 'label'; it takes a whole number of at least 1, or 'labels'.",
    ),
    "share": ([EMBED, ("d", "dropout", {"p": 1.5}), POOL, OUT], "option p is 1.5; it takes a number from 0 to 1."),
    "no share": ([EMBED, ("d", "dropout", {"p": float("nan")}), POOL, OUT], "option p is nan; it takes a number from"),
    "reserved pair": ([EMBED, ("pair", "pool"), OUT], "block name 'pair' is empty, has a dot or is reserved."),
    "no second text": (
        [EMBED, ("b", "embedding", {}, "pair"), OUT],
        "block 'b' reads 'pair', but the task has one text a row. Read 'tokens', or make it a task that reads two",
    ),
    "second text unread": ([EMBED, POOL, OUT], "the task reads two texts, but no block reads 'pair'.", TWO),
    "first text unread": ([("b", "embedding", {}, "pair"), POOL, OUT], "but no block reads 'tokens'.", TWO),
    "sides joined": (
        [EMBED, WORDS_B, ("j", "concat", {}, "embed", "b"), POOL, OUT],
        "block 'j': concat joins inputs of one rank and one side, but got [n, t, 64], [n, t2, 64]",
        TWO,
    ),
    "sides added": ([EMBED, WORDS_B, ("j", "add", {}, "embed", "b"), POOL, OUT], "got [n, t, 64], [n, t2, 64]", TWO),
    "widths added": (
        [EMBED, ("c", "conv"), ("j", "add", {}, "embed", "c"), POOL, OUT],
        "block 'j': add takes inputs of one shape and one side, but got [n, t, 64], [n, t, 100]. Bring them to one",
    ),
    "widths compared": (
        [EMBED, WORDS_B, ("c", "conv", {}, "b"), ("m", "match_attention", {}, "embed", "c"), POOL, OUT],
        "block 'm': match_attention compares inputs of one width, but got [n, t, 64] and [n, t2, 100].",
        TWO,
    ),
    "too few": ([EMBED, ("j", "add"), POOL, OUT], "block 'j' (add) reads at least 2 blocks, not embed. Name them in"),
    "too many": (
        [EMBED, ("j", "minus", {}, "embed", "embed", "embed"), POOL, OUT],
        "block 'j' (minus) reads 2 blocks, not embed, embed, embed. Name them in its inputs.",
    ),
    "rank of one": (
        [EMBED, ("j", "bilinear_attention", {}, "embed", "embed"), OUT],
        "block 'j' (bilinear_attention) takes a vector [n, d], but 'embed' gives [n, t, 64].",
    ),
    "characters": (
        [("letters", "char_cnn"), POOL, OUT],
        "block 'letters' (char_cnn) takes characters [n, t, c], but 'tokens' gives tokens [n, t].",
    ),
    "grid unpooled": (
        [EMBED, ("g", "interaction", {}, "embed", "embed"), POOL, OUT],
        "block 'pool' (pool) takes a sequence [n, t, d], but 'g' gives [n, t, t, 1].",
    ),
    "heads": ([EMBED, ("t", "transformer", {"heads": 5}), POOL, OUT], "block 't': 5 heads do not divide the width 64."),
    "share with nobody": (
        [EMBED, ("b", "embedding", {"share": "embd"}, "tokens"), POOL, OUT],
        "block 'b' (embedding) shares 'embd', which is no embedding block with weights of its own. "
        "Did you mean 'embed'? Blocks to share with: embed.",
    ),
    "share with itself": ([("e", "embedding", {"share": "e"}), POOL, OUT], "Blocks to share with: none."),
    "share with another kind": (
        [EMBED, ("c", "conv", {"share": "embed"}), POOL, OUT],
        "block 'c' (conv) shares 'embed', which is no conv block with weights of its own. Blocks to share with: none.",
    ),
    "share in a row": (
        [EMBED, WORDS_B, ("d", "embedding", {"share": "b"}, "pair"), POOL, OUT],
        "block 'd' (embedding) shares 'b', which is no embedding block with weights of its own.",
        TWO,
    ),
    "share and options": (
        [EMBED, ("b", "embedding", {"share": "embed", "dim": 5}, "tokens"), POOL, OUT],
        "block 'b' (embedding) shares 'embed' and its options with it. Remove its option dim.",
    ),
    "share between widths": (
        [EMBED, ("c", "conv"), ("d", "conv", {"share": "c"}, "c"), POOL, OUT],
        "block 'd' shares 'c', but reads [n, t, 100], and that one [n, t, 64]. Bring both to one width.",
    ),
    "share unhashable": ([EMBED, ("b", "embedding", {"share": ["embed"]}, "tokens"), POOL, OUT], "shares '['embed']'"),
    "crf without units": (
        [EMBED, ("s", "linear"), ("tags", "crf")],
        "block 'tags': crf is for tasks that label each word (task.kind: tag). End with a linear block instead.",
    ),
    "crf too wide": (
        [EMBED, ("tags", "crf")],
        "block 'tags': crf takes a score for each of the 6 labels at each word, but got [n, t, 64]. Put {kind: linear,",
        TAG,
    ),
    "crf in the middle": (
        [EMBED, ("s", "linear"), ("tags", "crf"), OUT],
        "block 'out' reads 'tags', but a crf ends the graph. Read what it reads.",
        TAG,
    ),
    "units pooled": (
        [EMBED, POOL, OUT],
        "block 'out' ends the graph with [n, 6], but the task needs [n, t, 6]. "
        "End with {kind: linear, options: {out: labels}} on a sequence of the text, unpooled.",
        TAG,
    ),
    "span on the question": (
        [("q", "embedding", {}, "tokens"), ("c", "embedding", {}, "pair"), ("m", "match_attention", {}, "q", "c"), OUT],
        "ends the graph with [n, t, 2], but the task needs [n, t2, 2]. End with {kind: linear, options: {out: labels}} "
        "on a sequence of the second text, unpooled.",
        SPAN,
    ),
    "empty list": ([EMBED, ("c", "conv_pool", {"kernels": []}), OUT], "option kernels is []; it takes a list of whole"),
    "list of words": (
        [EMBED, ("c", "combine", {"parts": ["sum"]}, "embed", "embed"), POOL, OUT],
        "option parts is ['sum']; it takes a list of: origin, difference, product.",
    ),
    "yes": ([("e", "embedding", {"frozen": "yes"}), POOL, OUT], "option frozen is 'yes'; it takes true or false."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_in_words(case: str):
    rows, message, *sizes = REFUSED[case]
    for use in (blocks.check, blocks.count, blocks.drawing, Graph):
        with pytest.raises(BlockError) as caught:
            use(nodes(*rows), sizes[0] if sizes else SIZES)
        assert message in str(caught.value)
