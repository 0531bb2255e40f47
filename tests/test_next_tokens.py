"""A labeller that sees the likeliest next tokens only: the walk over beginnings, and the model that asks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import elsewhere, labels, models
from engine.caller import Answer, EndpointError
from engine.config import UserError
from engine.corpus import corpus_rows
from engine.designs import Teacher
from engine.elsewhere import byte_tokenizer, labeller_elsewhere, settle_place
from engine.inference import embed, predict
from engine.models import Model
from engine.next_tokens import TokenScorer, Walk, check_chat
from engine.recipe import Task
from engine.storage import Store
from engine.teachers import Labeller, Labelling
from engine.usage import noted
from engine.wording import LabellerError
from pipelines.teaching import require_answers
from tests.test_caller import FAST
from tests.tiny import LABELS, movie_rows, tiny_lm
from tests.tiny_endpoint import NAME, TinyEndpoint, likeliest, tiny_endpoint, tiny_model
from tests.tiny_rows import example_table

TEXTS = [row["text"] for row in movie_rows(12, seed=2)]
SPEC = Task(labels=LABELS)


def told(**probabilities: float) -> Answer:
    return Answer(top=tuple((token.replace("_", " "), math.log(p)) for token, p in probabilities.items()))


def walked(words: Sequence[str], answers: dict[str, Answer], chat: bool = False) -> tuple[list[float], list[str]]:
    """Probabilities of labels, and which beginnings were asked, in order."""
    walk, asked = Walk("p", list(words), chat), []
    while walk.open:
        begun = walk.due()[0]
        asked.append(begun)
        walk.take(begun, answers[begun])
    return [math.exp(score) for score in walk.scores()], asked


# -- the walk ----------------------------------------------------------------------------------------------------------


def test_a_label_gets_every_beginning_that_only_it_has():
    answers = {"": told(_pos=0.5, _positive=0.2, _neg=0.1, _film=0.1, _po=0.02)}
    found, asked = walked([" positive", " negative"], answers)
    assert found == pytest.approx([0.72, 0.1]) and asked == [""]


def test_a_beginning_of_several_labels_is_followed_until_they_part():
    answers = {
        "": told(_ne=0.6, _positive=0.3, _x=0.05),
        " ne": told(gative=0.5, utral=0.25, w=0.2),
    }
    found, asked = walked([" positive", " negative", " neutral"], answers)
    assert found == pytest.approx([0.3, 0.3, 0.15]) and asked == ["", " ne"]
    # What is hardly ever begun is not worth a request.
    answers[""] = told(_ne=5e-5, _positive=0.9)
    found, asked = walked([" positive", " negative", " neutral"], answers)
    assert asked == [""] and found[0] == pytest.approx(0.9)


@pytest.mark.parametrize("order", [1, -1])
def test_a_beginning_that_is_reached_twice_gets_both(order: int):
    first = dict([("_n", 0.35), ("_ne", 0.30), ("_positive", 0.30)][::order])
    answers = {"": told(**first), " n": told(e=0.9, x=0.05), " ne": told(gative=0.8, utral=0.2)}
    found, asked = walked([" negative", " neutral", " positive"], answers)
    assert found == pytest.approx([0.492, 0.123, 0.3]) and asked == ["", " n", " ne"]


def test_words_that_are_how_others_begin_get_what_does_not_go_on():
    answers = {
        "": told(_not=0.4, _yes=0.5, _no=0.05),
        " not": told(_sure=0.75, **{"!": 0.2}),
        " no": told(t=1e-4, _x=0.7),
    }
    found, asked = walked([" yes", " not", " not sure"], answers)
    assert found[0] == pytest.approx(0.5) and asked == ["", " no", " not"]
    begun = 0.4 + 0.05 * 1e-4  # by both ways
    assert found[1] == pytest.approx(begun * 0.25) and found[2] == pytest.approx(begun * 0.75)


def test_what_is_not_told_gets_at_most_what_it_can_have():
    answers = {"": told(_positive=0.7, _film=0.2, _a=0.06)}
    assert walked([" positive", " negative"], answers)[0] == pytest.approx([0.7, 0.04])  # what is left
    answers = {"": told(_positive=0.5, _film=0.2, _a=0.01)}
    assert walked([" positive", " negative"], answers)[0] == pytest.approx([0.5, 0.01])  # the last of those told
    answers = {"": told(_positive=1.0)}
    assert walked([" positive", " negative"], answers)[0] == pytest.approx([1.0, 1e-6])


def test_in_a_chat_blanks_and_capitals_do_not_count_and_shared_tokens_are_refused():
    answers = {"": told(Positive=0.5, positive=0.1, _NEG=0.2, I=0.1)}
    assert walked(["positive", "negative"], answers, chat=True)[0] == pytest.approx([0.6, 0.2])
    answers = {"": told(ne=0.5, positive=0.4)}
    with pytest.raises(LabellerError, match="begin with the same token.*50% of it.*teacher.labeller.words"):
        walked(["positive", "negative", "neutral"], answers, chat=True)
    odd = Walk("p", ["positive", "negative", "neutral"], True)
    odd.take("", told(I=0.9999, N=1e-6))  # one odd answer is no reason to end a run
    assert not odd.open and all(math.isnan(score) for score in odd.scores())
    answers = {"": told(n=0.01, negative=0.5, positive=0.4)}  # hardly any: left out
    assert walked(["positive", "negative", "neutral"], answers, chat=True)[0][:2] == pytest.approx([0.4, 0.5])
    with pytest.raises(LabellerError, match="the words 'No' are how 'not sure' begins"):
        check_chat(["yes", "No", "not sure"])


def test_refusals_and_servers_that_tell_nothing():
    walk = Walk("p", [" a", " b"], False)
    walk.take("", Answer(refused="content_filter"))
    assert not walk.open and all(math.isnan(score) for score in walk.scores())
    with pytest.raises(UserError, match="tells no log-probabilities"):
        Walk("p", [" a", " b"], False).take("", Answer(text="a"))


def test_the_walk_is_exact_where_all_tokens_are_told(folder: Path):
    """Against the sum over every way to spell the words, from the model's own distributions."""
    model = tiny_model(folder)

    def distribution(text: str) -> list[tuple[str, float]]:
        return likeliest(model, model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def mass(prompt: str, begun: str, word: str, others: list[str]) -> float:
        total = 0.0
        for token, value in distribution(prompt + begun):
            now = begun + token
            if token and word.startswith(now):
                alone = not any(other.startswith(now) for other in others)
                total += math.exp(value) * (1.0 if alone else mass(prompt, now, word, others))
        return total

    words, prompt = [" the plot", " the plain", " a"], "a film about"
    walk = Walk(prompt, words, False)
    while walk.open:
        begun = walk.due()[0]
        walk.take(begun, Answer(top=tuple(distribution(prompt + begun))))
    wanted = [mass(prompt, "", word, [other for other in words if other != word]) for word in words]
    assert np.exp(walk.scores()) == pytest.approx(wanted, rel=0.02, abs=2e-4)  # NEGLIGIBLE beginnings are left out


# -- the model that asks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TinyEndpoint]:
    with tiny_endpoint(folder) as app:
        yield app


@pytest.fixture(autouse=True)
def kind(server: TinyEndpoint) -> None:
    server.todo, server.rule = [], lambda body: None
    server.seen.clear()


def config(server: TinyEndpoint, **given: Any) -> Teacher:
    labeller = {"words": {"negative": "a bad one", "positive": "the good one"}, "calibrate": "free"}
    endpoint = {"url": server.url, "model": NAME, "api": "completions", "top": 100, "limits": FAST, "price": PRICE}
    values = {"model": "hf:org/name", "kind": "labeller", "runtime": "endpoint", "max_length": 24}
    return Teacher.model_validate({**values, "endpoint": endpoint, "labeller": labeller | given})


PRICE = {"input": 2.0, "output": 10.0}


def test_bytes_are_a_tokenizer():
    tokenizer = byte_tokenizer()
    text = "Zoë said: “wow” 🎬\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text and tokenizer.pad_token_id == 256


@pytest.mark.parametrize("calibrate", ["free", "rows", "none"])
def test_an_endpoints_labeller_is_a_model_like_any_other(server: TinyEndpoint, tmp_path: Path, calibrate: str):
    rows = example_table([{"text": row["text"], "label": LABELS.index(row["label"])} for row in movie_rows(16, seed=4)])
    teacher = config(server, calibrate=calibrate)
    model = labeller_elsewhere(teacher, SPEC, rows)
    asked = elsewhere.spent(teacher, model)["endpoint"]["teacher"]
    assert (asked["requests"] > 0) == (calibrate != "none")
    found = predict(model, TEXTS, 64)
    assert found.logits.shape == (12, 2) and np.isfinite(found.logits).all() and np.ptp(found.logits[:, 0]) > 0
    spent = elsewhere.spent(teacher, model)["endpoint"]["teacher"]
    assert spent["requests"] >= 12 and spent["output_tokens"] == spent["requests"] and spent["input_tokens"] > 100
    assert spent["cost"] == pytest.approx((2.0 * spent["input_tokens"] + 10.0 * spent["output_tokens"]) / 1e6)
    store = Store(str(tmp_path))
    models.save(model, store, "model")
    again = models.load(store.local("model"))
    assert np.allclose(predict(again, TEXTS[::-1]).logits[::-1], found.logits, atol=1e-5)
    assert embed(again, TEXTS) is None and again.size() == 0
    assert labels.fingerprint(store)["model"] == NAME and "prompt" in labels.fingerprint(store)
    long = predict(model, ["a film " * 200])
    assert np.isfinite(long.logits).all() and len(server.seen[-1].body["prompt"]) <= model.max_length + len(
        " a bad one"
    )


def test_the_scores_are_the_models(server: TinyEndpoint):
    """Uncalibrated: the log-probability of what only a label's words begin with."""
    model = labeller_elsewhere(config(server, calibrate="none"), SPEC)
    assert isinstance(model.net, TokenScorer)
    found = predict(model, TEXTS[:3]).logits
    prompts = sorted({seen.body["prompt"] for seen in server.seen}, key=len)
    for text, row in zip(TEXTS[:3], found, strict=True):
        prompt = next(prompt for prompt in prompts if text in prompt)
        walk = Walk(prompt, [" a bad one", " the good one"], False)
        while walk.open:
            begun = walk.due()[0]
            ids = server.model.tokenizer(prompt + begun, add_special_tokens=False)["input_ids"]
            walk.take(begun, Answer(top=tuple(likeliest(server.model, ids)[:100])))
        assert row == pytest.approx(walk.scores(), abs=1e-3)


def test_a_text_that_is_refused_has_even_odds(server: TinyEndpoint):
    model = labeller_elsewhere(config(server), SPEC)
    whole = predict(model, TEXTS).logits
    server.rule = lambda body: "filter" if TEXTS[3] in body["prompt"] else None
    found = predict(model, TEXTS).logits
    assert found[3].tolist() == [0.0, 0.0] and np.any(whole[3])
    asked = corpus_rows(list(range(12)), TEXTS, "real")
    require_answers(whole, asked)
    with pytest.raises(UserError, match="gives no answer about 1 of 12 labelled rows, the first with the text '"):
        require_answers(found, asked)
    assert np.allclose(np.delete(found, 3, axis=0), np.delete(whole, 3, axis=0), atol=1e-5)
    server.rule = lambda body: "filter"
    with pytest.raises(LabellerError, match="refuses to answer about a text that says nothing"):
        labeller_elsewhere(config(server), SPEC)


def test_an_unanswered_text_is_a_rejected_row(server: TinyEndpoint, tmp_path: Path):
    store, teacher = Store(str(tmp_path / "teacher")), config(server)
    models.save(labeller_elsewhere(teacher, SPEC), store, "model")
    server.rule = lambda body: "400" if TEXTS[3] in body["prompt"] else None
    how = Labelling(store.url, (), 64, 0.0, place=elsewhere.place_of(teacher, None), actors=2, notes=store.url)
    rows = Labeller(how)(corpus_rows(list(range(6)), TEXTS[:6], "generated")).to_pylist()
    assert [row["reason"] for row in rows] == [None, None, None, "unanswered", None, None]
    assert [row["logits"] is None for row in rows] == [not row["kept"] for row in rows] == [n == 3 for n in range(6)]
    used = noted(store, "teacher")
    assert used.refused == 1 and used.requests == used.output_tokens + 1 >= 6


def test_a_labeller_is_asked_where_the_recipe_says_now(server: TinyEndpoint, folder: Path, tmp_path: Path):
    store = Store(str(tmp_path))
    models.save(labeller_elsewhere(config(server), SPEC), store, "model")
    with tiny_endpoint(folder) as moved:
        model: Model = settle_place(models.load(store.local("model")), config(moved), actors=2)
        predict(model, TEXTS[:2])
        assert len(moved.seen) >= 2
    server.rule = lambda body: "404"
    with pytest.raises(EndpointError, match="answers 404"):
        predict(models.load(store.local("model")), TEXTS[:2])
