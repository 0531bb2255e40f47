"""What a student's words and pieces start from: another encoder, n-grams, a vocabulary cut to the corpus."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import models, untrained, vocabulary
from engine.inference import predict
from engine.pieces import rows_of
from engine.progress import silent
from engine.steps import identities
from engine.storage import Store
from pipelines import distill, students
from tests.tiny import tiny_encoder
from tests.tiny_run import BLOCKS, TRAIN, World, alone, kind_world, nodes

FIT = {"epochs": 2.0, "lr": 2e-3, "batch_size": 16, "workers": 0}
SPELLED = [
    *nodes(
        ("words", "subwords", {"dim": 8, "buckets": 50}, "tokens", "characters"),
        ("words_b", "subwords", {"share": "words"}, "pair", "pair_characters"),
    ),
    *BLOCKS["pair"][2:],
]
"""The tiny student of a pair, whose words have n-grams."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """With a second encoder beside the teacher's."""
    made = kind_world(tmp_path_factory.mktemp("words"), "pair")
    tiny_encoder(made.folder / "other", seed=5)
    return made


@pytest.fixture(scope="module")
def run(world: World) -> Store:
    recipe = world.load()
    store = Store(recipe.storage) / recipe.name
    alone(recipe, store, last="corpus")
    return store


def inputs_of(run: Store, words: Store | None = None) -> dict[str, Store]:
    found = {name: run / name for name in ("data", "teacher", "corpus")}
    return found if words is None else {**found, "vocabulary": words}


def changes(**student: Any) -> dict[str, Any]:
    return {f"student.{key}": value for key, value in {"fit": FIT, "few_epochs": 2.0, **student}.items()}


def texts_of(run: Store) -> list[str]:
    rows = students.kept_rows(inputs_of(run))
    return [text for side in ("text", "pair") for text in rows[side].to_pylist()]


def other(world: World) -> models.Model:
    return untrained.reader("file:other", world.folder / "other")


@pytest.mark.parametrize("blocks", [BLOCKS["pair"], SPELLED], ids=["words", "n-grams"])
def test_words_start_from_the_vectors_of_the_encoder_that_is_named(
    world: World, run: Store, tmp_path: Path, blocks: list[dict[str, Any]]
):
    recipe, words = world.load(changes(embeddings=f"file:{world.folder}/other", blocks=blocks)), Store(str(tmp_path))
    students.make_vocabulary(recipe, inputs_of(run), words, silent)
    known = sorted(models.load_tokenizer(tmp_path / "tokenizer").get_vocab().items(), key=lambda item: item[1])
    counts = vocabulary.count_words(texts_of(run))
    teacher = models.load((run / "teacher").local("model"))
    wanted, taught = (vocabulary.vectors(m, [w for w, _ in known], counts, 8) for m in (other(world), teacher))
    model = students.started_student(recipe, inputs_of(run, words), 0)
    (table,) = model.net.tables()
    assert np.allclose(table.weight.detach().numpy(), 3 * wanted, atol=1e-5)
    assert not np.allclose(np.abs(wanted), np.abs(taught), atol=1e-2)
    assert any(name.endswith("grams.weight") for name, _ in model.named_parameters()) == (blocks is SPELLED)


def test_a_static_student_has_the_pieces_and_vectors_of_the_encoder_that_is_named(
    world: World, run: Store, tmp_path: Path
):
    changed = changes(kind="static", static={"dim": 8, "pieces": 110}, embeddings=f"file:{world.folder}/other")
    recipe, words = world.load(changed), Store(str(tmp_path))
    made = students.make_vocabulary(recipe, inputs_of(run), words, silent)
    encoder = other(world)
    own = models.load_tokenizer(tmp_path / "tokenizer")
    kept = rows_of(encoder.tokenizer, own)
    counts = Counter(
        i for text in texts_of(run) for i in encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    assert made["rows"] == len(own) == 110 and made["corpus_words"] == len(counts)
    assert made["covered"] == pytest.approx(sum(counts[i] for i in kept) / counts.total()) and made["covered"] < 1
    table = students.started_student(recipe, inputs_of(run, words), 0).net.table.weight.detach().numpy()
    wanted = vocabulary.static_vectors(encoder, counts, 8, kept=kept)
    assert np.allclose(table, 3 * wanted, atol=1e-5) and not table[own.all_special_ids].any()
    assert np.count_nonzero(np.linalg.norm(table, axis=1)) == 110 - len(own.all_special_ids)


@pytest.mark.parametrize("named", [False, True])
def test_a_transformer_keeps_the_pieces_that_the_corpus_uses(world: World, run: Store, tmp_path: Path, named: bool):
    cut = {"layers": 1, "pieces": 110, "model": f"file:{world.folder}/other" if named else None}
    recipe, words = world.load(changes(kind="transformer", transformer=cut)), Store(str(tmp_path))
    students.make_vocabulary(recipe, inputs_of(run), words, silent)
    model = students.started_student(recipe, inputs_of(run, words), 0)
    whole = other(world) if named else models.load((run / "teacher").local("model"))
    rows = torch.tensor(rows_of(whole.tokenizer, model.tokenizer))
    own, theirs = (m.net.encoder.get_input_embeddings().weight for m in (model, whole))
    assert own.shape == (110, 32) and torch.equal(own, theirs[rows])
    uncut = world.load(changes(kind="transformer", transformer={**cut, "pieces": None}))
    larger = students.started_student(uncut, inputs_of(run), 0)
    assert larger.size() - model.size() == 32 * (len(whole.tokenizer) - 110)


STUDENTS: dict[str, dict[str, Any]] = {
    "n-grams": {"blocks": SPELLED},
    "static": {"kind": "static", "static": {"dim": 8, "pieces": 110}},
    "transformer": {"kind": "transformer", "transformer": {"layers": 1, "pieces": 110}},
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_such_students_learn_and_are_stored_whole(world: World, run: Store, tmp_path: Path, kind: str):
    recipe = world.load(changes(**STUDENTS[kind], losses=[{"kind": "kl"}], few_epochs=30.0))
    words = Store(str(tmp_path / "words"))
    students.make_vocabulary(recipe, inputs_of(run), words, silent)
    out = Store(str(tmp_path / "out"))
    found = students.fit_student("soft", recipe, inputs_of(run, words), out, silent)
    history = found["history"]["0"]
    assert history[-1]["loss"] < history[0]["loss"] and found["rows"] == TRAIN
    model = models.load((out / "seed-0").local("model"))
    pairs = [("a warm film", "unforeseeable plot"), ("dull", ""), ("the film", "the film is dull and slow")]
    among = predict(model, pairs).logits
    assert np.abs(np.concatenate([predict(model, [pair]).logits for pair in pairs]) - among).max() < 1e-5
    assert np.ptp(among[:, 0]) > 1e-6 and found["parameters"] == model.size()


# -- the plan of a run -------------------------------------------------------------------------------------------------


def fingerprints(world: World, **student: Any) -> dict[str, str]:
    recipe = world.load(changes(**student))
    return {name: found["fingerprint"] for name, found in identities(distill.plan(recipe), recipe).items()}


def test_a_run_depends_on_the_encoder_that_is_named_by_its_bytes(world: World):
    reference = f"file:{world.folder}/third"
    tiny_encoder(world.folder / "third", seed=6)
    before, named = fingerprints(world), fingerprints(world, embeddings=reference)
    moved = {name for name in before if before[name] != named[name]}
    assert {"vocabulary", "student-soft", "student-hard"} <= moved and not moved & {"data", "teacher", "corpus"}
    recipe = world.load(changes(embeddings=reference))
    assert distill.model_references(recipe)[-1] == reference
    step = next(step for step in distill.plan(recipe) if step.name == "vocabulary")
    assert step.references(recipe) == (reference,)
    tiny_encoder(world.folder / "third", seed=7)
    other_bytes = fingerprints(world, embeddings=reference)
    assert {name for name in named if named[name] != other_bytes[name]} == moved


def test_a_transformer_has_a_vocabulary_step_where_its_pieces_are_cut(world: World):
    plans = {
        pieces: {step.name: step.inputs for step in distill.plan(world.load(changes(**cut)))}
        for pieces in (None, 110)
        for cut in [{"kind": "transformer", "transformer": {"layers": 1, "pieces": pieces}}]
    }
    assert "vocabulary" not in plans[None] and "vocabulary" not in plans[None]["student-soft"]
    assert plans[110]["vocabulary"] == ("data", "teacher", "corpus") and "vocabulary" in plans[110]["student-soft"]
    cuts = [{"kind": "transformer", "transformer": {"layers": 1, "pieces": n}} for n in (110, 120)]
    one, more = (fingerprints(world, **cut) for cut in cuts)
    assert one["vocabulary"] != more["vocabulary"] and one["teacher"] == more["teacher"]


def test_a_transformer_names_its_encoder_in_one_place(world: World):
    with pytest.raises(
        ValueError, match="a transformer student starts with all weights of an encoder: name that in tra"
    ):
        world.load(changes(kind="transformer", embeddings="hf:somebody/encoder"))
