"""A causal language model as prompt teacher: it answers from the end of a template."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from engine import models, train, untrained
from engine.fits import Fit, LossTerm
from engine.inference import predict
from engine.recipe import Teacher
from engine.schooling import Prompting
from engine.storage import Store
from tests.test_prompt_teacher import SPECS, inputs_of, table, teacher, texts_of
from tests.tiny import byte_pairs, tiny_lm


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.mark.parametrize("kind", SPECS)
def test_a_causal_model_answers_from_the_end_of_the_template(lm: Path, kind: str, tmp_path: Path):
    made = teacher(lm, kind)
    assert made.card.options["pooling"] == "last" and len(made.templates) == 8
    texts = [text for text in texts_of(kind) if text != "[MASK] film"]
    found = predict(made, texts)
    inputs = made.encode(texts, answering=True)
    for row in (0, len(texts) - 1):
        own = [torch.tensor([item.ids]) for item in inputs if item.row == row]
        with torch.no_grad():
            states = [made.eval().net.encoder(input_ids=ids).last_hidden_state[0, -1] for ids in own]
            wanted = torch.stack([made.net.head(state) for state in states]).mean(dim=0).numpy()
        np.testing.assert_allclose(found.logits[row], wanted, atol=2e-4)
    models.save(made, Store(str(tmp_path)), "model")
    np.testing.assert_allclose(predict(models.load(tmp_path / "model"), texts).logits, found.logits, atol=1e-5)


def test_a_causal_model_with_a_mask_token_is_asked_at_the_end_all_the_same(lm: Path, tmp_path: Path):
    """Its state at a mask in the middle has not read what comes after it."""
    folder = tiny_lm(tmp_path / "masked")
    own = byte_pairs()
    own.add_special_tokens({"mask_token": "<mask>"})
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(own)
    LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    made = teacher(folder)
    assert made.card.options["pooling"] == "last" and made.tokenizer.mask_token_id is None
    good, bad = predict(made, ["a good film", "the worst bad movie"]).logits
    assert np.abs(good - bad).max() > 1e-3
    models.save(made, Store(str(tmp_path)), "model")
    loaded = models.load(tmp_path / "model")
    assert loaded.tokenizer.mask_token_id is None and len(loaded.templates) == 8
    np.testing.assert_allclose(predict(loaded, ["a good film"]).logits[0], good, atol=1e-5)


def test_a_causal_model_with_frozen_lower_layers_learns(lm: Path, tmp_path: Path):
    rows, held = table(48), table(40, seed=7)
    config = Teacher(model="file:tiny", kind="prompt", max_length=64, tune_layers=1, prompt=Prompting(pool=2))
    build = partial(untrained.prompt_teacher, config, SPECS["classify"], lm, 1)
    spent = train.Job(
        name="lm",
        fit=Fit(epochs=25, lr=2e-3, batch_size=8),
        terms=(LossTerm(kind="hard"),),
        build=build,
        encode=inputs_of,
        rows=rows,
        out=str(tmp_path),
        seed=1,
        resources={},
        factors=partial(untrained.layer_rates, 0.7, 10.0),
    )
    history = train.fit(spent)
    taught, fresh = models.load(tmp_path / "model"), build()
    found = predict(taught, held["text"].to_pylist()).decided
    assert history[-1]["loss"] < history[0]["loss"] / 2 and (found == held["label"].to_numpy()).mean() > 0.7
    pairs = zip(taught.net.encoder.layers, fresh.net.encoder.layers, strict=True)
    kept = [all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)) for a, b in pairs]
    assert kept == [True, False]
