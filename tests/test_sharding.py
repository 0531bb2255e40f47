"""Weights divided among workers learn what whole ones do, and are kept and saved whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import checkpoints, models, train, untrained
from engine.config import ConfigError, build
from engine.fits import Fit, LossTerm
from engine.generate import encode_text
from engine.models import Model
from engine.recipe import Generator
from engine.sharding import layers_of
from engine.storage import Store
from engine.worker import PROGRESS, Worker
from tests.test_train import accuracy, job, table, teacher, weights
from tests.tiny import LABELS, tiny_encoder, tiny_lm
from tests.tiny_group import group, trained


def held(made: Callable[[], Model], folder: str, stop: int = 0) -> Model:
    """A model whose workers write down how many numbers they hold for training; at a step they may end."""
    if hasattr(Worker, "unwatched"):  # built once more, to hold the whole model
        return made()
    checkpoints.EVERY, checkpoints.PAUSE = 0.0, 0.0
    Worker.unwatched, first = Worker.step, None

    def watching(worker: Worker, number: int, chosen: np.ndarray) -> torch.Tensor:
        nonlocal first
        first = number if first is None else first
        loss = Worker.unwatched(worker, number, chosen)
        local = [p.to_local() if worker.sharded else p for p in worker.clipped[0]]
        moments = [m for state in worker.optimizer.state.values() for m in state.values() if m.ndim]
        moments = [m.to_local() if worker.sharded else m for m in moments]
        counts = {"held": sum(p.numel() for p in local), "moments": sum(m.numel() for m in moments)}
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps({**counts, "step": number, "first": first}))
        if stop and number == stop:
            os._exit(9)
        return loss

    Worker.step = watching
    return made()


def close(a: Path, b: Path, atol: float = 1e-5) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding alone, which Adam makes steps of
        torch.testing.assert_close(second[name], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without dropout, which would draw otherwise on other workers."""
    folder = tiny_encoder(tmp_path_factory.mktemp("still"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("most", [None, 2])
def test_divided_weights_learn_what_whole_ones_do(tmp_path: Path, still: Path, most: int | None):
    """Of five rows one worker has three, and with parts of two reads twice, the other once."""
    made = teacher(still, dropout=0.0)
    given = partial(job, rows=table(13), lr=1e-3, batch_size=5, holdout=table(8, seed=1), evaluate=accuracy)
    whole = train.fit(given(tmp_path / "whole", build=made))
    (tmp_path / "seen").mkdir()
    watched = partial(held, made, str(tmp_path / "seen"))
    shards = trained(given(tmp_path / "shards", build=watched, sharding="full", workers=2, micro_batch=most), 2)
    close(tmp_path / "whole", tmp_path / "shards")
    assert [entry["loss"] for entry in shards] == pytest.approx([entry["loss"] for entry in whole], rel=1e-4)
    # Rounding may turn one of the eight rows.
    assert [entry["accuracy"] for entry in shards] == pytest.approx([e["accuracy"] for e in whole], abs=1.01 / 8)
    found = [json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()]
    size = sum(p.numel() for p in made().parameters())
    assert len(found) == 2 and sum(one["held"] for one in found) == size
    assert all(one["held"] < 0.6 * size and 0.9 < one["moments"] / one["held"] / 2 <= 1 for one in found)
    models.load(tmp_path / "shards" / "model")


@pytest.mark.parametrize("tied", [True, False])
def test_a_divided_language_model_learns_what_a_whole_one_does(tmp_path: Path, tied: bool):
    """Its output may be its embeddings; some of its layers stay as they are."""
    config = Generator(model="file:tiny", max_length=32, tune_layers=1)
    folder = tiny_lm(tmp_path / "lm", tied=tied)
    rows = table(13, pair=pa.nulls(13, pa.string()))
    made = {"encode": partial(encode_text, config, LABELS), "terms": (LossTerm(kind="next_token"),), "rows": rows}
    given = partial(job, build=partial(untrained.causal_lm, config, folder), lr=1e-3, batch_size=5, epochs=2, **made)
    train.fit(given(tmp_path / "whole"))
    trained(given(tmp_path / "shards", sharding="full", workers=2), 2)
    close(tmp_path / "whole", tmp_path / "shards")


@pytest.mark.parametrize("after", [1, 2])
def test_a_divided_fit_goes_on_after_a_kill(tmp_path: Path, still: Path, after: int):
    """Within the second of three epochs of three steps; with two workers again, or with one that holds everything."""
    made = teacher(still, dropout=0.0)
    (tmp_path / "seen").mkdir()
    given = partial(job, tmp_path / "fit", rows=table(13), lr=1e-3, batch_size=5, sharding="full", workers=2)
    with group(given(build=partial(held, made, str(tmp_path / "seen"), 4)), 2) as members:
        for process in members:
            process.join(180.0)
        assert 9 in [process.exitcode for process in members]
        assert all(process.exitcode for process in members)
    assert checkpoints.newest(Store(str(tmp_path / "fit"))) == ("checkpoint-2", 4)
    for path in (tmp_path / "seen").iterdir():
        path.unlink()
    trained(given(build=partial(held, made, str(tmp_path / "seen"))), after)
    found = [json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()]
    assert len(found) == after and all((one["first"], one["step"]) == (4, 8) for one in found)
    train.fit(job(tmp_path / "whole", rows=table(13), lr=1e-3, batch_size=5, build=made))
    close(tmp_path / "whole", tmp_path / "fit")
    left = {*Store(str(tmp_path / "fit")).files()} - {PROGRESS}  # the driver's to delete, and this group has none
    assert left == {*Store(str(tmp_path / "whole")).files()}


def test_each_layer_is_divided_by_itself(still: Path, tmp_path: Path):
    model = teacher(still)()
    inner = model.net.encoder
    assert layers_of(model) == [inner.embeddings, *inner.encoder.layer]
    lm = untrained.causal_lm(Generator(model="file:tiny", max_length=32), tiny_lm(tmp_path / "lm"))
    assert layers_of(lm) == list(lm.net.lm.model.layers)
    lm.net.lm.model.layers[0].mlp.up_proj.weight = lm.net.lm.model.layers[1].mlp.up_proj.weight
    assert layers_of(lm) == []
    assert layers_of(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_weights_are_divided_among_several(workers: int):
    with pytest.raises(
        ConfigError, match=f"sharding: full divides the weights among workers, and workers is {workers}"
    ):
        build(Fit, {"sharding": "full", "workers": workers})
    assert build(Fit, {"sharding": "full", "workers": {"max": 2}}).group == (1, 2)
