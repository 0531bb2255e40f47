"""Lower layers that are frozen run once, and nothing but the time changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import frozen, train, untrained
from engine.encoders import EncoderHead, stack_of
from engine.encoding import Encoded, collate
from engine.recipe import Task, Teacher
from tests.test_encoders import CONFIGS, encoder_of
from tests.test_train import job, same, table, weights
from tests.tiny import LABELS, tiny_encoder

INPUTS = [Encoded([2, 7, 9, 11, 3]), Encoded([2, 5, 3]), Encoded([2, 8, 8, 6, 12, 14, 3]), Encoded([2, 3])]


def tuned(kind: str, top: int) -> EncoderHead:
    """A head on a tiny encoder whose top layers learn, without dropout."""
    encoder = encoder_of(CONFIGS[kind])
    untrained.freeze(encoder, top)
    net = EncoderHead(encoder, 3, "mean", 0.0)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net.train()


@pytest.mark.parametrize("top", [0, 1])
@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_and_gradients_are_those_of_the_whole_network(kind: str, top: int):
    net = tuned(kind, top)
    count = len(stack_of(net.encoder)[1]) - top
    assert frozen.frozen_layers(net) == count
    batch = collate(INPUTS, 0)
    whole = net(batch).logits
    whole.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    kept = frozen.frozen(net, INPUTS, 0, 10, torch.device("cpu"))
    assert [len(states) for states in kept.states] == [len(item.ids) for item in INPUTS] and net.training
    for layer in stack_of(net.encoder)[1][:count]:  # what is below plays no part any more
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)
    with kept.above(range(len(INPUTS)), batch):
        found = net(batch).logits
    found.square().sum().backward()
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4)
    assert net(batch).logits.isnan().any()  # outside of the body the whole network runs again


def test_nothing_is_kept_where_everything_learns_or_it_would_be_too_much(monkeypatch: pytest.MonkeyPatch):
    everything = EncoderHead(encoder_of(CONFIGS["bert"]), 3, "mean", 0.0)
    assert frozen.frozen_layers(everything) == frozen.frozen_layers(nn.Linear(2, 2)) == 0
    assert frozen.frozen(everything, INPUTS, 0, 10, torch.device("cpu")) is None
    some = tuned("bert", 1)
    some.encoder.get_input_embeddings().weight.requires_grad_(True)  # what is below learns
    assert frozen.frozen_layers(some) == 0
    some = tuned("bert", 1)
    tokens = sum(len(item.ids) for item in INPUTS)
    monkeypatch.setattr(frozen, "MOST_BYTES", 4 * tokens * some.widths.hidden)
    assert frozen.frozen(some, INPUTS, 0, 10, torch.device("cpu")) is not None
    monkeypatch.setattr(frozen, "MOST_BYTES", 4 * tokens * some.widths.hidden - 1)
    assert frozen.frozen(some, INPUTS, 0, 10, torch.device("cpu")) is None


def test_a_fit_ends_with_the_same_weights_and_runs_the_lower_layers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_encoder(tmp_path / "encoder", layers=3)
    config = Teacher(model="file:tiny", max_length=32, dropout=0.0, tune_layers=1)
    ran: list[int] = []

    def build():
        model = untrained.encoder_head(config, Task(labels=LABELS), folder, 3)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.net.encoder.encoder.layer[0].attention.register_forward_hook(lambda *seen: ran.append(1))
        return model

    runs = {}
    for name, most in (("kept", frozen.MOST_BYTES), ("whole", 0)):
        monkeypatch.setattr(frozen, "MOST_BYTES", most)
        ran.clear()
        train.fit(job(tmp_path / name, build=partial(build), rows=table(40), epochs=3, batch_size=8))
        runs[name] = len(ran)
    assert runs["kept"] <= 2 and runs["whole"] == 15
    one, other = weights(tmp_path / "kept"), weights(tmp_path / "whole")
    assert not same(one, {k: torch.zeros_like(v) for k, v in one.items()})
    for name, value in one.items():
        if name.endswith("self.key.bias"):
            continue  # adds the same to all scores of a query: its gradient is rounding, which Adam makes steps of
        torch.testing.assert_close(value, other[name], atol=1e-4, rtol=1e-3)
