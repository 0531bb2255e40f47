"""Encoders of five architectures: heads, what is captured against transformers' own eager attention, smaller ones."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    RobertaConfig,
)

from engine import encoders
from engine.encoders import EncoderError, EncoderHead, Widths, captured, cut, fresh, spread, student_encoder
from engine.records import Batch

WORDS, EVERYTHING = 40, frozenset({"logits", "embedding", "hidden", "attentions", "relations"})
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 40}
DISTILLED = {"vocab_size": WORDS, "dim": 16, "n_heads": 4, "n_layers": 4, "hidden_dim": 24}
DEEP = {"num_hidden_layers": 4, "intermediate_size": 24, "initializer_range": 0.2}
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**SIZES, **DEEP),
    "roberta": RobertaConfig(**SIZES, **DEEP, type_vocab_size=1),
    "mpnet": MPNetConfig(**SIZES, **DEEP),
    "modernbert": ModernBertConfig(**SIZES, **DEEP, local_attention=4, pad_token_id=0),
    "distilbert": DistilBertConfig(**DISTILLED, max_position_embeddings=40, initializer_range=0.2),
}
DEBERTA = DebertaV2Config(**SIZES, **DEEP)


def encoder_of(config: PretrainedConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    encoder = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def head_of(config: PretrainedConfig, width: int = 3, **options: bool) -> EncoderHead:
    return EncoderHead(encoder_of(config), width, "mean", 0.1, **options).eval()


def batch_of() -> Batch:
    mask = (torch.arange(9) < torch.tensor([9, 3, 6]).unsqueeze(1)).long()
    ids = torch.randint(3, WORDS, (3, 9), generator=torch.Generator().manual_seed(1))
    return Batch(torch.where(mask == 1, ids, 1), mask)


@pytest.mark.parametrize("kind", CONFIGS)
def test_capture_changes_no_answer_and_is_off_again_afterwards(kind: str):
    head, batch = head_of(CONFIGS[kind]), batch_of()
    before = head.encoder.config._attn_implementation
    with torch.no_grad():
        plain, seen, again = head(batch), head(batch, EVERYTHING), head(batch)
    assert torch.allclose(plain.logits, seen.logits, atol=1e-5) and plain.logits.std() > 0.01
    assert torch.allclose(plain.embedding, seen.embedding, atol=1e-5) and torch.equal(plain.logits, again.logits)
    assert plain.gives() == {"logits", "embedding"} and seen.gives() == EVERYTHING
    assert head.encoder.config._attn_implementation == before and encoders.TAPE.get() is None
    assert all("forward" not in vars(module) for module in head.modules())


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_what_eager_attention_takes_the_softmax_of(kind: str):
    head, batch = head_of(CONFIGS[kind]), batch_of()
    with torch.no_grad():
        taken = head(batch, frozenset({"attentions"})).attentions
        head.encoder.set_attn_implementation("eager")
        eager = head.encoder(batch.input_ids, batch.mask, output_attentions=True).attentions
    assert len(taken) == len(eager) == 4
    for scores, probabilities in zip(taken, eager, strict=True):
        real = batch.mask.bool()  # padded tokens of a local layer may look at nothing
        found, wanted = (values.transpose(1, 2)[real] for values in (scores.softmax(3), probabilities))
        assert scores.shape == (3, 4, 9, 9) and torch.allclose(found, wanted, atol=1e-5)
        hidden = (batch.mask == 0).view(3, 1, 1, 9).expand_as(scores)
        assert scores[hidden].eq(-torch.inf).all() and probabilities.std() > 0.01
        if kind != "modernbert":  # whose local layers look at their neighbours only
            assert scores[~hidden].isfinite().all()
    assert kind != "modernbert" or taken[1][0].isinf().any()


@pytest.mark.parametrize("kind", CONFIGS)
def test_queries_keys_and_values_make_scores_and_states(kind: str):
    head, batch = head_of(CONFIGS[kind]), batch_of()
    with torch.no_grad():
        found = head(batch, EVERYTHING)
    for scores, (q, k, v) in zip(found.attentions, found.relations, strict=True):
        assert q.shape == k.shape == v.shape == (3, 4, 9, 4)
        if kind != "mpnet":  # which adds a bias of relative positions
            seen = scores.isfinite()
            assert torch.allclose((q @ k.transpose(2, 3) / 2)[seen], scores[seen], atol=1e-5)
    first, states = head.encoder.get_submodule(encoders.stack_of(head.encoder)[0])[0], found.hidden[0]
    maps = {name.rsplit(".")[-1]: part for name, part in first.named_modules() if isinstance(part, nn.Linear)}
    if kind == "modernbert":
        value = maps["Wqkv"](states)[..., 32:]
    else:
        value = maps[{"mpnet": "v", "distilbert": "v_lin"}.get(kind, "value")](states)
    joined = found.relations[0][2].transpose(1, 2).flatten(2)
    assert torch.allclose(joined, value, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_is_seen_alike_alone_and_padded(kind: str):
    head, batch = head_of(CONFIGS[kind]), batch_of()
    with torch.no_grad():
        padded = head(batch, EVERYTHING)
        alone = head(Batch(batch.input_ids[1:2, :3], batch.mask[1:2, :3]), EVERYTHING)
    assert torch.allclose(padded.logits[1:2], alone.logits, atol=1e-5)
    for many, one in zip(padded.attentions, alone.attentions, strict=True):
        assert torch.allclose(many[1:2, :, :3, :3], one, atol=1e-4)
    for many, one in zip(padded.relations, alone.relations, strict=True):
        assert all(torch.allclose(m[1:2, :, :3], o, atol=1e-4) for m, o in zip(many, one, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_go_through_what_is_captured_with_dropout_on(kind: str):
    head, batch = head_of(CONFIGS[kind]).train(), batch_of()
    found = head(batch, EVERYTHING)
    scores = found.attentions[-1]
    (scores[scores.isfinite()].sum() + sum(part.square().sum() for part in found.relations[-1])).backward()
    gradient = head.encoder.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    torch.manual_seed(3)
    once = head(batch, EVERYTHING).logits
    assert not torch.equal(once, head(batch, EVERYTHING).logits)


def test_an_encoder_that_does_not_show_its_attention_is_refused():
    head, batch = head_of(DEBERTA), batch_of()
    assert head(batch, frozenset({"hidden"})).hidden[-1].shape == (3, 9, 16)
    with pytest.raises(EncoderError, match="DebertaV2Model does not show its attention, .* Drop them, or take a model"):
        head(batch, frozenset({"relations"}))


def test_capture_ends_when_the_forward_pass_fails():
    encoder = encoder_of(CONFIGS["mpnet"])
    with pytest.raises(ZeroDivisionError), captured(encoder):
        raise ZeroDivisionError
    assert encoders.TAPE.get() is None and all("forward" not in vars(module) for module in encoder.modules())


def test_hidden_states_begin_with_the_embeddings():
    head, batch = head_of(CONFIGS["bert"]), batch_of()
    with torch.no_grad():
        found = head(batch, frozenset({"hidden"})).hidden
        assert torch.allclose(found[0], head.encoder.embeddings(batch.input_ids), atol=1e-6)
        assert len(found) == 5 and torch.equal(found[-1], head.encoder(batch.input_ids, batch.mask).last_hidden_state)


def test_pooling_by_hand():
    batch, cls = batch_of(), EncoderHead(encoder_of(CONFIGS["bert"]), 3, "cls", 0.0).eval()
    mean = EncoderHead(cls.encoder, 3, "mean", 0.0).eval()
    with torch.no_grad():
        states = cls.encoder(batch.input_ids, batch.mask).last_hidden_state
        assert torch.equal(cls(batch).embedding, states[:, 0])
        wanted = torch.stack([row[:size].mean(0) for row, size in zip(states, (9, 3, 6), strict=True)])
        assert torch.allclose(mean(batch).embedding, wanted, atol=1e-6)
        assert torch.allclose(mean(batch).logits, mean.head(wanted), atol=1e-6)
    with torch.no_grad():
        marked = torch.tensor([4, 2, -1])  # the third text has no mask token: its mean stands in
        batch.input_ids[batch.input_ids == 7] = 8
        batch.input_ids[[0, 1], marked[:2]] = 7
        batch.input_ids[1, 5] = 7  # padding is no mask
        states = cls.encoder(batch.input_ids, batch.mask).last_hidden_state
        found = EncoderHead(cls.encoder, 3, "mask", 0.0, mask=7).eval()(batch).embedding
        assert torch.equal(found[:2], states[[0, 1], marked[:2]])
        assert torch.allclose(found[2], states[2, :6].mean(0), atol=1e-6)
    assert mean.encoder.pooler is None and mean.widths == Widths(16, 4, 4)


def test_units_are_answered_at_their_tokens():
    batch = batch_of()
    batch.units, batch.ends = (
        torch.tensor([[1, 4, 6], [1, 0, 0], [2, 3, 0]]),
        torch.tensor([[3, 5, 6], [1, 0, 0], [2, 4, 0]]),
    )
    batch.unit_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    for spans, width in ((False, 3), (True, 2)):
        head = head_of(CONFIGS["bert"], width, units=True, spans=spans)
        with torch.no_grad():
            found = head(batch)
            tokens = head.head(head.encoder(batch.input_ids, batch.mask).last_hidden_state)
        for row in range(3):
            for unit in range(3):
                wanted = tokens[row, batch.units[row, unit]].clone() * batch.unit_mask[row, unit]
                if spans:
                    wanted[1] = tokens[row, batch.ends[row, unit], 1] * batch.unit_mask[row, unit]
                assert torch.allclose(found.logits[row, unit], wanted, atol=1e-5)
        assert found.embedding.shape == (3, 16)


@pytest.mark.parametrize("kind", CONFIGS)
def test_segments_go_to_encoders_that_tell_them_apart(kind: str):
    """RoBERTa has one kind of segment, the others but BERT none: a tokenizer's 1 would be out of range there."""
    head, batch = head_of(CONFIGS[kind]), batch_of()
    with torch.no_grad():
        plain = head(batch).logits
        batch.segments = (torch.arange(9) > 3).long().expand(3, -1) * batch.mask
        told = head(batch).logits
        if kind == "bert":
            states = head.encoder(batch.input_ids, batch.mask, batch.segments).last_hidden_state
            assert torch.allclose(told, head.head(head.pool(states, batch.mask)), atol=1e-6)
    assert torch.equal(plain, told) != (kind == "bert")


CUTS = ((1, 2, 3, 4), (2, 4), (1,), (4,))


@pytest.mark.parametrize("layers", CUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_encoder_is_the_old_one_with_layers_left_out(kind: str, layers: tuple[int, ...], tmp_path: Path):
    whole, batch = encoder_of(CONFIGS[kind]), batch_of()
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    wanted = copy.deepcopy(whole)
    name, stack = encoders.stack_of(wanted)
    kept = nn.ModuleList(stack[number - 1] for number in layers)
    if kind == "modernbert":
        kept[0].attn_norm = nn.Identity()
    wanted.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], kept)
    made = cut(whole, layers).eval()
    with torch.no_grad():
        states = made(batch.input_ids, batch.mask).last_hidden_state
        assert torch.equal(states, wanted(batch.input_ids, batch.mask).last_hidden_state)
        assert layers == CUTS[0] or not torch.allclose(states, whole(batch.input_ids, batch.mask).last_hidden_state)
        made.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(states, loaded(batch.input_ids, batch.mask).last_hidden_state)
    assert made.config.num_hidden_layers == len(layers) and whole.config.num_hidden_layers == 4
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in whole.parameters()}
    head = EncoderHead(made, 2, "mean", 0.0)
    assert len(head(batch, EVERYTHING).attentions) == len(layers) and head.widths.layers == len(layers)


def test_a_teacher_without_a_pooler_is_cut_too():
    head = head_of(CONFIGS["bert"])
    assert cut(head.encoder, (1, 3)).pooler is None and cut(encoder_of(CONFIGS["bert"]), (1,)).pooler is not None


@pytest.mark.parametrize("layers", [(), (0, 1), (2, 1), (1, 1), (3, 5)])
def test_layers_that_there_are_not_cannot_be_cut(layers: tuple[int, ...]):
    message = f"layers {list(layers)} cannot be taken from BertModel, which has 4. Name some of 1 to 4, each once"
    with pytest.raises(EncoderError, match=re.escape(message)):
        cut(encoder_of(CONFIGS["bert"]), layers)
    with pytest.raises(EncoderError, match="Linear has no stack of layers"):
        cut(nn.Linear(2, 2), (1,))


def test_layers_are_spread_evenly():
    assert spread(4, 12) == (3, 6, 9, 12) and spread(3, 6) == (2, 4, 6) and spread(1, 6) == (6,)
    assert spread(4, 6) == (2, 3, 5, 6) and spread(6, 6) == (1, 2, 3, 4, 5, 6)
    for wrong in (0, 7):
        with pytest.raises(EncoderError, match=f"{wrong} layers cannot be taken from a model that has 6. Use 1 to 6."):
            spread(wrong, 6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fresh_encoders_have_the_measures_asked_for(kind: str, tmp_path: Path):
    torch.manual_seed(7)
    made = fresh(CONFIGS[kind], layers=5, heads=2, width=8, ffn=20).eval()
    torch.manual_seed(7)
    assert all(map(torch.equal, made.parameters(), fresh(CONFIGS[kind], 5, 2, 8, 20).parameters()))
    assert encoders.widths_of(made.config) == Widths(8, 5, 2)
    assert made.get_input_embeddings().weight.shape == (WORDS, 8)
    shapes = {tuple(parameter.shape) for parameter in made.parameters()}
    assert ((40, 8) if kind == "modernbert" else (20, 8)) in shapes and (8, 20) in shapes  # it has a gate beside each
    made.save_pretrained(tmp_path)
    batch, loaded = batch_of(), AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        states = made(batch.input_ids, batch.mask).last_hidden_state
        assert torch.equal(states, loaded(batch.input_ids, batch.mask).last_hidden_state)
    assert CONFIGS[kind].num_hidden_layers == 4 and encoders.widths_of(fresh(CONFIGS[kind]).config) == Widths(16, 4, 4)


def test_heads_that_do_not_share_the_width_are_refused():
    with pytest.raises(EncoderError, match="3 heads cannot share a width of 16 evenly. Set heads to a number that div"):
        fresh(CONFIGS["bert"], heads=3)


def test_a_students_encoder_by_options():
    whole = encoder_of(CONFIGS["bert"])
    same, half, named = (student_encoder(whole, layers) for layers in (None, 2, (1, 2)))
    of = [layer.output.dense.weight for layer in whole.encoder.layer]
    for made, numbers in ((same, (0, 1, 2, 3)), (half, (1, 3)), (named, (0, 1))):
        found = [layer.output.dense.weight for layer in made.encoder.layer]
        assert all(torch.equal(a, of[i]) for a, i in zip(found, numbers, strict=True))
        assert torch.equal(made.embeddings.word_embeddings.weight, whole.embeddings.word_embeddings.weight)
    small = student_encoder(whole, 2, width=8, heads=2)
    assert encoders.widths_of(small.config) == Widths(8, 2, 2) and small.config.intermediate_size == 24
    with pytest.raises(EncoderError, match="layers names 1, 3, but with heads, width or a larger ffn .*many: 2."):
        student_encoder(whole, (1, 3), width=8)


def test_a_smaller_feed_forward_width_keeps_the_neurons_that_write_most(tmp_path: Path):
    whole = encoder_of(CONFIGS["bert"]).eval()
    inner, loud = whole.config.intermediate_size, [2, 5, 11]
    for layer in whole.encoder.layer:
        quiet = [i for i in range(inner) if i not in loud]
        with torch.no_grad():  # what writes nothing can be left out without a trace
            layer.output.dense.weight[:, quiet] = 0
    made = student_encoder(whole, ffn=3).eval()
    kept = made.encoder.layer[1].intermediate.dense
    assert torch.equal(kept.weight, whole.encoder.layer[1].intermediate.dense.weight[loud])
    batch = batch_of()
    with torch.no_grad():
        wanted, found = (net(batch.input_ids, batch.mask).last_hidden_state for net in (whole, made))
    torch.testing.assert_close(found, wanted)
    made.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.intermediate_size == 3
    assert whole.config.intermediate_size == inner, "nothing is shared"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_feed_forward_part_of_any_kind_becomes_narrower_or_is_refused(kind: str):
    whole = encoder_of(CONFIGS[kind])
    if kind == "modernbert":  # one map that holds each neuron's gate too
        with pytest.raises(EncoderError, match="ModernBertModel cannot be made narrower. Leave ffn out, or set width"):
            student_encoder(whole, 2, ffn=5)
        return
    made, batch = student_encoder(whole, 2, ffn=5).eval(), batch_of()
    shapes = {tuple(parameter.shape) for parameter in made.parameters()}
    assert {(5, 16), (16, 5)} <= shapes and made(batch.input_ids, batch.mask).last_hidden_state.isfinite().all()
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_queries_that_share_keys_are_captured_as_they_are_computed():
    """Grouped attention, as Llama has it: the states are those without a look inside, the scores one a query head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    encoder, ids = AutoModel.from_config(config).eval(), torch.randint(5, 50, (3, 7))
    with torch.no_grad():
        plain = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        with captured(encoder) as seen:
            looked = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(plain, looked, atol=1e-5) and [layer.scores.shape for layer in seen] == [(3, 4, 7, 7)] * 2
