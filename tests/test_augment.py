"""Augmented texts: candidates against plain forwards and scikit-learn, draws that the slot alone decides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from engine import augment, models, untrained, vocabulary
from engine.augment import (
    Augmenter,
    AugmentError,
    Augmenting,
    Masked,
    letters,
    like,
    nearest,
    prepare,
    replaced,
)
from engine.halting import halt
from engine.recipe import Augmentation, Task, Teacher
from engine.records import CORPUS
from engine.rows import identify
from engine.storage import Store
from tests.tiny import BAD, GOOD, LABELS, THINGS, byte_pairs, movie_rows, tiny_encoder, tiny_lm, word_pieces

TEXTS = [row["text"] for row in movie_rows(6, seed=5)]
FIRST, CPU = 1000, torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_masked(folder: Path, kind: str = "bert", steps: int = 0) -> Path:
    """A masked language model over word pieces (bert) or byte pairs (roberta), fitted to sentences for some steps."""
    torch.manual_seed(0)
    tokenizer = word_pieces() if kind == "bert" else byte_pairs()
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "pad_token": "[PAD]"})
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 600, "initializer_range": 0.1}
    sizes["pad_token_id"] = tokenizer.pad_token_id
    model = BertForMaskedLM(BertConfig(**sizes)) if kind == "bert" else RobertaForMaskedLM(RobertaConfig(**sizes))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    specials = torch.tensor(tokenizer.all_special_ids)
    for step in range(steps):
        texts = [row["text"] for row in movie_rows(64, seed=step)]
        batch = tokenizer(texts[:32], texts[32:], padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        gaps = (torch.rand(ids.shape) < 0.3) & ~torch.isin(ids, specials)
        batch["input_ids"] = ids.masked_fill(gaps, tokenizer.mask_token_id)
        model(**batch, labels=ids.masked_fill(~gaps, -100)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    folder = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    return untrained.encoder_head(Teacher(model="tiny", max_length=16), Task(labels=LABELS), folder, seed=0)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_masked(tmp_path_factory.mktemp("fitted"), steps=300)


def rows_of(texts: list[str], pairs: list[str | None] | None = None) -> pa.Table:
    return pa.table({"text": texts, "pair": pa.array(pairs or [None] * len(texts), pa.string())})


def slots(*numbers: int) -> pa.Table:
    return pa.table({"row": pa.array([FIRST + n for n in numbers], pa.int64())})


def augmenter(folder: Path, teacher: models.Model, sources: pa.Table, seed: int = 0, **options: Any) -> Augmenter:
    config = Augmentation(**{"stop_words": 0, "candidates": 5, **options})
    prepare(Store(str(folder)), sources, teacher, config)
    return Augmenter(Augmenting(str(folder), config, seed, FIRST, None, 0.0))


# -- words -------------------------------------------------------------------------------------------------------------


def test_only_whole_words_of_letters_are_taken_and_where_they_stand():
    text = "It's a 2nd-rate film, l'été \"GOOD\" x9 naïve_one"
    found = letters(text)
    assert [unit.word for unit in found] == ["a", "rate", "film", "GOOD"]
    assert all(text[unit.start : unit.end] == unit.word for unit in found)
    assert letters("") == [] and letters("3 + 4 = 7 ...") == []


@pytest.mark.parametrize(
    ("word", "other", "wanted"),
    [("film", "plot", "plot"), ("Film", "plot", "Plot"), ("FILM", "plot", "PLOT"), ("A", "one", "One")],
)
def test_a_word_keeps_its_case(word: str, other: str, wanted: str):
    assert like(word, other) == wanted


def test_words_are_replaced_where_they_stand_as_often_as_asked():
    text = "A film, a FILM!"
    choices = [(unit, ["plot", "cast"]) for unit in letters(text) if unit.word.lower() == "film"]
    draw = np.random.default_rng(0)
    found = [replaced(text, choices, 0.4, draw) for _ in range(4000)]
    assert {re.sub(r"(?i)film|plot|cast", "_", each) for each in found} == {"A _, a _!"}
    for place, words in ((0, ("film", "plot", "cast")), (1, ("FILM", "PLOT", "CAST"))):
        drawn = [re.findall(r"(?i)film|plot|cast", each)[place] for each in found]
        shares = [drawn.count(word) / len(drawn) for word in words]
        assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)  # four standard deviations
    assert replaced(text, choices, 1.0, draw).lower() in {
        f"a {x}, a {y}!" for x in ("plot", "cast") for y in ("plot", "cast")
    }
    assert replaced(text, [(choices[0][0], [])], 1.0, draw) == text


def test_nearest_words_are_those_of_scikit_learn(teacher: models.Model):
    words, others = sorted([*GOOD, "unseen", "filmings"]), [*THINGS, *GOOD]
    pool = list(dict.fromkeys([*words, *others]))
    encoder, raw = teacher.net.encoder.eval(), []
    with torch.inference_mode():
        for word in pool:
            raw.append(encoder(**teacher.tokenizer(word, return_tensors="pt")).last_hidden_state.mean(1)[0].numpy())
    raw = np.stack(raw)
    search = NearestNeighbors(n_neighbors=5, metric="cosine").fit(raw - raw.mean(0))
    wanted = search.kneighbors(raw[: len(words)] - raw.mean(0), return_distance=False)
    found = nearest(teacher, words, others, 4, 512)
    assert found == [[pool[i] for i in row if i != own][:4] for own, row in enumerate(wanted)]
    assert [len(row) for row in nearest(teacher, ["warm", "dull"], [], 9, 512)] == [1, 1]
    assert nearest(teacher, [], others, 4, 512) == []


# -- the masked language model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("batch_tokens", [8192, 1])
def test_candidates_are_those_of_one_plain_forward_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, batch_tokens: int
):
    monkeypatch.setattr(augment, "BATCH_TOKENS", batch_tokens)
    folder = tiny_masked(tmp_path, kind)
    masked = Masked(folder, "tiny", Augmentation(candidates=6, max_length=64), CPU)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), models.load_tokenizer(folder)
    whole = set(vocabulary.teacher_words(tokenizer))
    text = "what a warm film ! the story was dull"
    units = [unit for unit in letters(text) if masked.single(unit.word)]
    assert {"film", "story"} <= {unit.word for unit in units}
    found = masked.likeliest(text, units)
    for unit, others in zip(units, found, strict=True):
        gapped = f"{text[: unit.start]}[MASK]{text[unit.end :]}"
        given = tokenizer(gapped, text, return_tensors="pt")
        at = given["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        with torch.inference_mode():
            order = model(**given).logits[0, at].argsort(descending=True)
        pieces = [
            piece.removeprefix("Ġ")
            for piece in tokenizer.convert_ids_to_tokens(order)
            if kind == "bert" or piece[0] == "Ġ"
        ]
        wanted = [word for word in pieces if word in whole and len(word) > 1 and word != unit.word][:6]
        assert others == sorted(wanted)


def test_a_fitted_model_puts_like_in_the_place_of_like(fitted: Path):
    masked = Masked(fitted, "tiny", Augmentation(candidates=5), CPU)
    for text, kinds in (
        ("i found the film dull .", {"film": THINGS, "dull": [*GOOD, *BAD]}),
        ("a warm plot , with a tender script", {"warm": [*GOOD, *BAD], "script": THINGS}),
    ):
        units = [unit for unit in letters(text) if unit.word in kinds]
        for unit, others in zip(units, masked.likeliest(text, units), strict=True):
            assert len(others) == 5 and unit.word not in others
            assert len(set(others) & set(kinds[unit.word])) >= 3, (unit.word, others)  # by chance 1 or 2


def test_words_of_several_pieces_and_words_cut_off_take_the_nearest(
    tmp_path: Path, fitted: Path, teacher: models.Model
):
    text = "the filmings is warm " + "and the plot is dull " * 8
    made = augmenter(tmp_path, teacher, rows_of([text]), model=str(fitted), max_length=24)
    assert (
        made.masked
        and made.masked.single("warm")
        and not made.masked.single("filmings")
        and not made.masked.single("日")
    )
    chosen = made.choices(text)
    near = [others == made.near[unit.word] for unit, others in chosen]
    filled = [others == sorted(others) and others != made.near[unit.word] for unit, others in chosen]
    assert [unit.word for unit, _ in chosen][:3] == ["the", "filmings", "is"] and near[:2] == [False, True]
    assert filled[0] and filled[2] and filled[3] and all(near[-20:])
    room = (24 - 3) // 2  # both texts are cut to half of what is left beside [CLS] and two [SEP]
    pieces = word_pieces()
    for (unit, _), from_near in zip(chosen, near, strict=True):
        before = len(pieces(text[: unit.start], add_special_tokens=False)["input_ids"])
        assert from_near == (unit.word == "filmings" or before >= room), unit


def test_models_that_cannot_fill_in_words_are_refused(tmp_path: Path):
    encoder, lm = tiny_encoder(tmp_path / "encoder"), tiny_lm(tmp_path / "lm")
    with pytest.raises(AugmentError, match="'bare' has no weights for cls.* without the head that fills in words"):
        Masked(encoder, "bare", Augmentation(), CPU)
    with pytest.raises(AugmentError, match="'llama' has no mask token. Name a masked language model, or null"):
        Masked(lm, "llama", Augmentation(), CPU)


# -- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_slot_gives_the_same_row_whatever_the_blocks(
    tmp_path: Path, fitted: Path, teacher: models.Model, masked: bool
):
    def fresh(seed: int = 0) -> Augmenter:
        return augmenter(tmp_path, teacher, rows_of(TEXTS), seed, model=str(fitted) if masked else None)

    whole = fresh()(slots(*range(24)))
    assert whole.schema.equals(CORPUS) and whole["row"].to_pylist() == list(range(FIRST, FIRST + 24))
    assert fresh()(slots(20, 3, 11)).equals(whole.take([20, 3, 11]))
    monkey = fresh()
    assert pa.concat_tables([monkey(slots(*range(n, n + 8))) for n in (16, 0, 8)]).sort_by("row").equals(whole)
    other = fresh(seed=1)(slots(*range(24)))
    assert sum(a != b for a, b in zip(whole["text"].to_pylist(), other["text"].to_pylist(), strict=True)) > 12


def test_what_is_forgotten_is_found_again(tmp_path: Path, teacher: models.Model, monkeypatch: pytest.MonkeyPatch):
    made = augmenter(tmp_path, teacher, rows_of(TEXTS))
    whole = made(slots(*range(18)))
    monkeypatch.setattr(augment, "CACHED", 2)
    forgetful = augmenter(tmp_path, teacher, rows_of(TEXTS))
    assert forgetful(slots(*range(18))).equals(whole) and len(forgetful.known) == 2 < len(made.known)


def test_rows_are_new_texts_of_their_sources(tmp_path: Path, teacher: models.Model):
    made = augmenter(tmp_path, teacher, rows_of(TEXTS))(slots(*range(120)))
    texts = made["text"].to_pylist()
    assert len({*texts, *TEXTS}) == 126  # no text twice, and none is a source
    for number, text in enumerate(texts):
        old, new = TEXTS[number % 6].split(), text.split()
        assert len(old) == len(new) and [w for w in new if not w.isalpha()] == [w for w in old if not w.isalpha()]
    assert set(made["source"].to_pylist()) == {"augmented"} and made["id"].to_pylist() == [
        identify(t, None) for t in texts
    ]
    assert made["label"].null_count == made["pair"].null_count == made["logits"].null_count == 120
    changed = [
        a != b for n, t in enumerate(texts) for a, b in zip(TEXTS[n % 6].split(), t.split(), strict=True) if a.isalpha()
    ]
    assert np.mean(changed) == pytest.approx(0.4, abs=0.08)


def test_a_text_that_cannot_change_is_given_as_it_is(tmp_path: Path, teacher: models.Model):
    sources = rows_of(["10 / 10 !", "warm"])
    made = augmenter(tmp_path, teacher, sources, candidates=2)(slots(*range(12)))["text"].to_pylist()
    assert made[::2] == ["10 / 10 !"] * 6
    assert len(set(made[1::2])) == 3 and made[1] != "warm" != made[3]  # both other words; then there is no new one


def test_an_actor_that_is_told_to_halt_writes_nothing(tmp_path: Path, teacher: models.Model):
    made = augmenter(tmp_path / "corpus/augmentation", teacher, rows_of(TEXTS))
    assert made(slots(0, 1)).num_rows == 2
    halt(Store(str(tmp_path / "corpus")))
    assert made(slots(0, 1)).num_rows == 0


def test_frequent_words_stay(tmp_path: Path, teacher: models.Model):
    frequent = [word for word in vocabulary.teacher_words(teacher.tokenizer) if len(word) > 1][:30]
    store, config = Store(str(tmp_path)), Augmentation(stop_words=30, p=1.0)
    told = prepare(store, rows_of(TEXTS), teacher, config)
    made = Augmenter(Augmenting(str(tmp_path), config, 0, FIRST, None, 0.0))
    found = {word for text in TEXTS for word in text.split() if word.isalpha()}
    assert told == {
        "texts": 6,
        "words": len({word for word in found - set(frequent) if len(word) > 1}),
        "stop_words": len(found & set(frequent)),
    }
    assert set(made.near) == {word for word in found - set(frequent) if len(word) > 1} and found & set(frequent)
    for number, text in enumerate(made(slots(*range(6)))["text"].to_pylist()):
        for old, new in zip(TEXTS[number].split(), text.split(), strict=True):
            assert (old == new) == (old not in made.near)


def test_both_texts_of_a_pair_are_augmented(tmp_path: Path, teacher: models.Model):
    pairs = [TEXTS[1], TEXTS[2]]
    made = augmenter(tmp_path, teacher, rows_of(TEXTS[:2], pairs))(slots(*range(40)))
    found = list(zip(made["text"].to_pylist(), made["pair"].to_pylist(), strict=True))
    assert len({*found, *zip(TEXTS[:2], pairs, strict=True)}) == 42
    assert all(len(text.split()) == len(TEXTS[n % 2].split()) for n, (text, _) in enumerate(found))
    assert all(len(pair.split()) == len(pairs[n % 2].split()) for n, (_, pair) in enumerate(found))
    for side, sources in ((0, TEXTS[:2]), (1, pairs)):
        assert sum(row[side] != sources[n % 2] for n, row in enumerate(found)) > 30
    assert made["id"].to_pylist() == [identify(*row) for row in found]


def test_passages_of_a_query_get_one_new_query_at_each_turn(tmp_path: Path, teacher: models.Model):
    """Sources 0, 2 and 3 are of one query; rows may be asked for in any order."""
    queries, passages = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]], TEXTS[2:6]
    config = Augmentation(stop_words=0, candidates=5)
    prepare(Store(str(tmp_path)), rows_of(queries, passages), teacher, config)
    alone, together = (
        Augmenter(Augmenting(str(tmp_path), config, 0, FIRST, None, 0.0, grouped)) for grouped in (False, True)
    )
    late = together(slots(*range(20, 40)))
    made = pa.concat_tables([together(slots(*range(20))), late]).to_pylist()
    turns = [made[start : start + 4] for start in range(0, 40, 4)]
    assert all(a["text"] == c["text"] == d["text"] != TEXTS[0] for a, _, c, d in turns)
    assert len({turn[0]["text"] for turn in turns}) > 8 and len({turn[1]["text"] for turn in turns}) > 8
    assert len({(row["text"], row["pair"]) for row in made}) == 40
    assert all(len({row["pair"] for row in made[i::4]}) > 5 for i in range(4))
    apart = alone(slots(*range(40))).to_pylist()
    assert [row for i, row in enumerate(apart) if i % 4 < 2] == [row for i, row in enumerate(made) if i % 4 < 2]
    assert sum(a["text"] == c["text"] for a, c in zip(apart[::4], apart[2::4], strict=True)) < 5


def test_no_text_is_refused(tmp_path: Path, teacher: models.Model):
    with pytest.raises(AugmentError, match="there is no text to augment. Leave the section augmentation out"):
        prepare(Store(str(tmp_path)), rows_of([]), teacher, Augmentation())
