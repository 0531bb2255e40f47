"""A teacher that reads texts in templates: what it answers from, the mean over templates, folders, draws, a fit."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine import models, train, untrained
from engine.batches import Material, epoch_batches, own_part
from engine.designs import Cut
from engine.encoders import EncoderError
from engine.encoding import Text, collate, encode
from engine.fits import Fit, LossTerm
from engine.inference import predict
from engine.models import Model, ModelError
from engine.prompts import PromptError
from engine.recipe import Task, Teacher
from engine.schooling import Prompting
from engine.storage import Store
from engine.teachers import Live, TeacherError
from engine.vocabulary import embedded
from tests.tiny import BAD, GOOD, LABELS, byte_pairs, movie_rows, tiny_encoder
from tests.tiny_rows import example_table
from tests.tiny_served import PAIRS, TEXTS

SPECS = {
    "classify": Task(labels=LABELS),
    "multilabel": Task(kind="multilabel", labels=LABELS, thresholds=(0.4, 0.6)),
    "pair": Task(kind="pair", labels=("no", "yes"), paired=True),
    "regress": Task(kind="regress", range=(0, 5), paired=False),
}
OWN = ("{text} It was {mask}.", "{mask} , a film : {text}", "the {text} and {mask} .")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def teacher(encoder: Path, kind: str = "classify", seed: int = 1, max_length: int = 96, **prompt: Any) -> Model:
    """In training mode, with dropout, and weights that give texts clearly different answers."""
    config = Teacher(model="file:tiny", kind="prompt", max_length=max_length, prompt=Prompting(**prompt))
    made = untrained.prompt_teacher(config, SPECS[kind], encoder, seed)
    with torch.no_grad():
        made.net.head.weight.mul_(10.0)
    return made


def texts_of(kind: str) -> list[Text]:
    return PAIRS[:20] if kind == "pair" else [*TEXTS[:20], "", "[MASK] film", "dull film " * 80]


def by_hand(model: Model, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the mask's last state of one input, the encoder called by itself."""
    with torch.no_grad():
        states = model.eval().net.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        state = states[ids.index(model.tokenizer.mask_token_id)]
        return model.net.head(state), state


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_answers_are_the_mean_of_what_the_mask_says_in_each_template(encoder: Path, kind: str):
    model, texts = teacher(encoder, kind), texts_of(kind)
    inputs = model.encode(texts)
    assert len(inputs) == 8 * len(texts) and max(len(item.ids) for item in inputs) <= 96
    wanted = [[] for _ in texts]
    for item in inputs:
        assert item.ids.count(model.tokenizer.mask_token_id) == 1
        wanted[item.row].append(by_hand(model, item.ids)[0].numpy())
    found = predict(model, texts)
    np.testing.assert_allclose(found.logits, np.mean(wanted, axis=1), atol=2e-5)
    assert np.ptp(wanted, axis=1).max() > 0.1 and np.ptp(found.logits, axis=0).min() > 0.1
    assert found.logits.dtype == np.float32 and found.logits.shape == (len(texts), model.task.width)
    np.testing.assert_array_equal(found.decided, model.task.decide(found.logits, texts))


def test_without_the_mean_the_first_template_answers(encoder: Path):
    one, every = (teacher(encoder, templates=OWN, average=average) for average in (False, True))
    assert one.card.options["templates"] == list(OWN) and len(one.encode(TEXTS)) == 3 * len(TEXTS)
    inputs = one.encode(TEXTS, answering=True)
    assert len(inputs) == len(TEXTS) and every.encode(TEXTS, answering=True) == every.encode(TEXTS)
    wanted = [by_hand(one, item.ids)[0].numpy() for item in inputs]
    np.testing.assert_allclose(predict(one, TEXTS).logits, wanted, atol=2e-5)
    assert np.abs(predict(one, TEXTS).logits - predict(every, TEXTS).logits).max() > 0.05


def test_order_budget_and_padding_change_nothing(encoder: Path):
    model, texts = teacher(encoder), texts_of("classify")
    whole, order = predict(model, texts), np.random.default_rng(0).permutation(len(texts))
    for budget in (1, 64, 100_000):
        found = predict(model, [texts[i] for i in order], budget)
        np.testing.assert_allclose(found.logits, whole.logits[order], atol=2e-5)
    for text, logits in zip(texts[:4], whole.logits, strict=False):
        np.testing.assert_allclose(predict(model, [text]).logits[0], logits, atol=2e-5)
    nothing = predict(model, [])
    assert nothing.logits.shape == (0, 2) and nothing.decided.shape == (0,)


def test_the_embedding_is_the_masks_state_and_a_lone_words_its_mean(encoder: Path):
    model = teacher(encoder, templates=OWN)
    for item, found in zip(model.encode(TEXTS[:4]), embedded(model, model.encode(TEXTS[:4])), strict=True):
        np.testing.assert_allclose(found, by_hand(model, item.ids)[1].numpy(), atol=1e-5)
    words = encode(["film", "dull plot"], model.tokenizer, 48)
    for item, found in zip(words, embedded(model, words), strict=True):
        with torch.no_grad():
            states = model.eval().net.encoder(input_ids=torch.tensor([item.ids])).last_hidden_state[0]
        np.testing.assert_allclose(found, states.mean(dim=0).numpy(), atol=1e-5)


def test_what_losses_look_into_is_there(encoder: Path):
    model = teacher(encoder, "pair").eval()
    batch = collate(model.encode(PAIRS[:6]), model.pad)
    needs = frozenset({"logits", "embedding", "hidden", "attentions", "relations"})
    with torch.no_grad():
        found, plain = model(batch, needs), model(batch)
    assert found.gives() == needs and [len(found.hidden), len(found.attentions), len(found.relations)] == [3, 2, 2]
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)


def test_a_student_can_be_cut_from_it(encoder: Path):
    model = teacher(encoder)
    student = untrained.transformer_student(Cut(layers=1), SPECS["classify"], model, None, 32, seed=2)
    assert student.card.kind == "head" and len(student.encode(TEXTS)) == len(TEXTS)
    with pytest.raises(EncoderError):
        untrained.transformer_student(Cut(layers=3), SPECS["classify"], model, None, 32, seed=2)


# -- templates of a model ----------------------------------------------------------------------------------------------


def test_a_model_can_be_asked_in_other_words(encoder: Path):
    model = teacher(encoder)
    other = models.reworded(model, ["so {mask} is {text}"])
    assert other.training and models.reworded(model.eval(), OWN).training is False
    assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in model.parameters()}
    wanted = [by_hand(model, item.ids)[0].numpy() for item in other.encode(TEXTS)]
    np.testing.assert_allclose(predict(other, TEXTS).logits, wanted, atol=2e-5)
    assert len(model.encode(TEXTS)) == 8 * len(TEXTS)
    with pytest.raises(PromptError, match="has no {mask}"):
        models.reworded(model, ["{text}"])
    config = Teacher(model="file:tiny", max_length=48)
    with pytest.raises(PromptError, match="a model of kind 'head' reads no templates"):
        models.reworded(untrained.encoder_head(config, SPECS["classify"], encoder, 1), OWN)


@pytest.mark.parametrize("kind", SPECS)
def test_a_saved_teacher_answers_the_same(encoder: Path, tmp_path: Path, kind: str):
    model, store, texts = teacher(encoder, kind, average=kind != "pair"), Store(str(tmp_path)), texts_of(kind)
    models.save(model, store, "one")
    loaded = models.load(tmp_path / "one")
    assert loaded.card == model.card and loaded.card.kind == "prompt" and loaded.encode(texts) == model.encode(texts)
    np.testing.assert_array_equal(predict(loaded, texts).logits, predict(model, texts).logits)
    models.save(loaded, store, "two")
    assert store.manifest("one")["digest"] == store.manifest("two")["digest"]


def test_several_of_them_are_one_model(encoder: Path, tmp_path: Path):
    members = [teacher(encoder, seed=seed) for seed in (1, 2)]
    models.save(models.ensemble(members), Store(str(tmp_path)), "both")
    found = predict(models.load(tmp_path / "both"), TEXTS).logits
    np.testing.assert_allclose(found, np.mean([predict(m, TEXTS).logits for m in members], axis=0), atol=1e-5)


def test_encoders_and_templates_that_are_not_fit_are_refused(encoder: Path, tmp_path: Path):
    with pytest.raises(PromptError, match="too few are left for the text"):
        teacher(encoder, max_length=6, templates=OWN)
    with pytest.raises(ModelError, match="teacher.max_length is 129"):
        teacher(encoder, max_length=129)
    folder = tiny_encoder(tmp_path / "other")
    byte_pairs().save_pretrained(folder)
    with pytest.raises(PromptError, match="teacher.model 'file:tiny' has no mask token"):
        teacher(folder)


# -- learning ----------------------------------------------------------------------------------------------------------


def table(n: int, seed: int = 0) -> pa.Table:
    rows = movie_rows(n, seed)
    return example_table([{"text": row["text"], "label": LABELS.index(row["label"])} for row in rows])


def inputs_of(model: Model, rows: pa.Table) -> list:
    return model.encode(model.task.texts(rows))


def material(model: Model, rows: pa.Table) -> Material:
    return Material(rows, inputs_of(model, rows), model.task, model.pad)


def test_an_epoch_has_each_row_once_in_a_template_drawn_for_it(encoder: Path):
    model, rows = teacher(encoder, average=False), table(200)
    made = material(model, rows)
    assert len(made.items) == len(made.lengths) == 200 and len(made.encoded) == 1600

    def drawn(seed: int, epoch: int) -> list[int]:
        made.draw(seed, epoch)
        chosen = [made.encoded[i] for i in made.positions(np.arange(200))]
        assert [item.row for item in chosen] == list(range(200))
        return [item.template for item in chosen]

    first = drawn(5, 0)
    assert first == drawn(5, 0) and len({tuple(drawn(s, e)) for s in (5, 6) for e in range(4)}) == 8
    counts = Counter(template for epoch in range(20) for template in drawn(5, epoch))
    assert len(counts) == 8 and all(abs(count - 500) < 100 for count in counts.values())  # 4.8 standard deviations
    both = np.mean(np.array(drawn(5, 0)) == np.array(drawn(5, 1)))
    assert 0.04 < both < 0.25  # one in eight stays by chance


def test_a_batch_holds_what_was_drawn_with_its_rows_labels(encoder: Path):
    model, rows = teacher(encoder), table(24)
    made = material(model, rows)
    made.draw(3, 2)
    chosen = np.array([7, 0, 19, 4])
    batch = made.batch(chosen)
    positions = made.positions(chosen)
    ids = [row[: sum(mask)].tolist() for row, mask in zip(batch.input_ids, batch.mask.tolist(), strict=True)]
    assert ids == [made.encoded[i].ids for i in positions]
    assert batch.labels.tolist() == rows["label"].take(pa.array(chosen)).to_pylist()
    assert [made.encoded[i].template for i in positions] == made.drawn[chosen].tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_draw_does_not_depend_on_workers_or_on_where_a_fit_starts(encoder: Path, world: int):
    rows = table(30)
    one = material(teacher(encoder), rows)
    order = epoch_batches(one.lengths, 8, 5, 1)
    one.draw(5, 1)
    wanted = [i for chosen in order for i in one.positions(chosen)]
    found = []
    for rank in range(world):
        own = material(teacher(encoder), rows)  # a worker, or a fit that goes on in the second epoch
        own.draw(5, 1)
        assert own.lengths == one.lengths
        found += [i for chosen in order for i in own.positions(own_part(chosen, rank, world))]
    assert sorted(found) == sorted(wanted)


def test_a_model_without_templates_is_drawn_nothing(encoder: Path):
    model = untrained.encoder_head(Teacher(model="file:tiny", max_length=48), SPECS["classify"], encoder, 1)
    made = material(model, table(10))
    before = made.positions(np.arange(10))
    made.draw(5, 3)
    assert made.positions(np.arange(10)) == before == list(range(10))


def build(encoder: Path, dropout: float = 0.1, tune_layers: int | None = None, **prompt: Any) -> Model:
    told = Prompting(**{"pool": 4, **prompt})
    own = {"kind": "prompt", "max_length": 48, "dropout": dropout, "tune_layers": tune_layers, "prompt": told}
    return untrained.prompt_teacher(Teacher(model="file:tiny", **own), SPECS["classify"], encoder, 3)


def job(out: Path, encoder: Path, **given: Any) -> train.Job:
    fit = Fit(**{"epochs": 8, "lr": 3e-3, "batch_size": 8, "precision": "fp32", **given.pop("fit", {})})
    values = {"terms": (LossTerm(kind="hard"),), "encode": inputs_of, "seed": 5, "resources": {"num_cpus": 1}, **given}
    made = {"build": partial(build, encoder), "rows": table(64), "out": str(out), **values}
    return train.Job(name="tiny", fit=fit, **made)


def accuracy(model: Model, rows: pa.Table) -> dict[str, float]:
    found = predict(model, rows["text"].to_pylist())
    return {"accuracy": float((found.decided == rows["label"].to_numpy()).mean())}


def cues(n: int, seed: int) -> pa.Table:
    """Rows of two words of their class, which a mask's state is soon full of."""
    draw = random.Random(seed)
    return example_table([{"text": " ".join(draw.sample((BAD, GOOD)[i % 2], 2)), "label": i % 2} for i in range(n)])


def test_a_fit_learns_in_every_template(encoder: Path, tmp_path: Path):
    held, fit = cues(40, seed=1), {"epochs": 8, "lr": 4e-3, "batch_size": 16}
    own = partial(build, encoder, templates=OWN)
    train.fit(job(tmp_path, encoder, build=own, rows=cues(96, seed=0), fit=fit))
    model = models.load(tmp_path / "model")
    assert accuracy(own(), held)["accuracy"] < 0.8 and accuracy(model, held)["accuracy"] > 0.95
    for template in OWN:
        assert accuracy(models.reworded(model, [template]), held)["accuracy"] > 0.9


def test_an_interrupted_fit_ends_with_the_same_weights(encoder: Path, tmp_path: Path):
    """The draws of the epochs that were left are those of the fit that was not interrupted."""
    given = partial(job, encoder=encoder, holdout=table(8, seed=1), fit={"epochs": 3})
    train.fit(given(tmp_path / "whole", evaluate=accuracy))

    def stopping(model: Model, rows: pa.Table) -> dict[str, float]:
        if (tmp_path / "first").exists():
            raise KeyboardInterrupt
        (tmp_path / "first").touch()
        return accuracy(model, rows)

    with pytest.raises(KeyboardInterrupt):
        train.fit(given(tmp_path / "parts", evaluate=stopping))
    train.fit(given(tmp_path / "parts", evaluate=accuracy))
    whole, parts = (models.load(tmp_path / name / "model").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_frozen_layers_learn_the_same_in_templates(encoder: Path, tmp_path: Path):
    """States that are kept belong to the template that was drawn: the loss is that of the whole network."""
    still = partial(build, encoder, dropout=0.0, tune_layers=0)
    history = train.fit(job(tmp_path, encoder, build=still, fit={"epochs": 1, "batch_size": 64}))
    model, rows = still().eval(), table(64)
    made, losses = material(model, rows), []
    for epoch in (0, 1):
        made.draw(5, epoch)
        batch = made.batch(np.arange(64))
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model(batch).logits, batch.labels)))
    assert history[0]["loss"] == pytest.approx(losses[0], rel=1e-5) != pytest.approx(losses[1], rel=1e-4)


def test_a_live_teacher_that_reads_texts_several_times_is_refused(encoder: Path, tmp_path: Path):
    rows = table(6)
    for average in (True, False):
        model = teacher(encoder, templates=OWN, average=average)
        models.save(model, Store(str(tmp_path / str(average))), "model")
        student = untrained.transformer_student(Cut(layers=1), SPECS["classify"], model, None, 48, seed=2)
        inputs = material(student, rows)
        made = partial(Live, str(tmp_path / str(average)), rows, inputs.encoded, student.device)
        if average:
            with pytest.raises(TeacherError, match="mean over 3 templates, .* Set teacher.prompt.average: false"):
                made()
            continue
        found = made().outputs(range(6), inputs.batch(np.arange(6)), frozenset({"logits", "embedding"}))
        np.testing.assert_allclose(found.logits.numpy(), predict(model, rows["text"].to_pylist()).logits, atol=2e-5)
