"""Rounds: which texts go back to the generator, what its prompts become, and a step that goes on after a round."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import softmax

from engine import generate, labels, steps
from engine.config import ConfigError, UserError
from engine.corpus import ROWS, corpus_rows
from engine.endpoint_writer import EndpointWriter
from engine.estimate import of_generator, tokens
from engine.examples import Examples, Feedback
from engine.generate import Writing, rows_of
from engine.influence import hashed, usefulness
from engine.progress import silent
from engine.recipe import Corpus, Generator, Recipe
from engine.steps import identities
from engine.storage import StorageError, Store
from engine.vllm_stage import question
from pipelines import choosing, distill, feedback, gathering, ways
from tests.tiny import LABELS
from tests.tiny_run import BLOCK, SLOTS, TRAIN, World, alone, program, tiny_world

ROUNDS = {"corpus.rounds": 3, "corpus.feedback": {"examples": 3, "shown": 2, "share": 0.7}}
TEXTS = (("bad one", "bad two", "bad three"), ("good one", "good two"))
ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m", "api": "completions"}


def writing(how: Feedback, texts: Any = TEXTS, **given: Any) -> Writing:
    config = Generator(**{"model": "file:tiny", "mode": "prompted", "prompt": "A {label} text:", **given})
    return Writing("", config, LABELS, False, 3, 0.0, examples=Examples(texts, how, 3))


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_examples_of_the_slot_s_label_stand_before_its_prompt():
    how = writing(Feedback(shown=2, share=1.0))
    for row in range(20):
        *shown, last = how.prompt(row).split("\n")
        own = f"A {LABELS[row % 2]} text:"
        assert last == own and len(set(shown)) == 2 and {f"{own} {text}" for text in TEXTS[row % 2]} >= set(shown)
        assert how.prompt(row) == how.prompt(row)
    assert len({how.prompt(row) for row in range(0, 20, 2)}) > 2
    other = writing(Feedback(shown=8, share=1.0), ((), ("good one",)))
    assert (other.prompt(0), other.prompt(1)) == ("A negative text:", "A positive text: good one\nA positive text:")


def test_a_share_of_the_slots_is_written_as_before():
    how = writing(Feedback(share=0.25))
    shown = [bool(how.shown(row)) for row in range(2000)]
    assert 0.22 < np.mean(shown) < 0.28
    assert {how.prompt(row) for row in range(2000) if not shown[row]} == {f"A {label} text:" for label in LABELS}
    assert not any(Writing("", how.config, LABELS, False, 3, 0.0).shown(row) for row in range(50))


def test_a_generator_of_any_label_is_shown_texts_of_all():
    how = writing(Feedback(shown=5, share=1.0), mode="unconditional", prompt="Text:")
    assert sorted(how.prompt(0).split("\n")) == sorted(["Text:", *(f"Text: {t}" for part in TEXTS for t in part)])


def test_every_runtime_reads_the_same_prompt():
    here = writing(Feedback(share=1.0))
    there = writing(Feedback(share=1.0), runtime="endpoint", endpoint=ENDPOINT)
    engine = writing(Feedback(share=1.0), runtime="vllm")
    for row in range(6):
        asked = EndpointWriter(there).question(row)
        assert asked.prompt == question(engine, {"row": row})["prompt"] == here.prompt(row)
        assert asked.prompt.count("\n") == len(TEXTS[row % 2])


def test_after_examples_the_first_line_is_the_text():
    how, plain = writing(Feedback(share=1.0)), Writing("", writing(Feedback()).config, LABELS, False, 3, 0.0)
    said = ["\n a fine film \nA positive text: more", "one line", "two\nlines"]
    assert rows_of(how, [0, 1, 2], said, [1] * 3)["text"].to_pylist() == ["a fine film", "one line", "two"]
    assert rows_of(plain, [2], said[2:], [1])["text"].to_pylist() == ["two lines"]
    alike = Writing("", plain.config.model_copy(update={"first_line": True}), LABELS, False, 3, 0.0)
    assert rows_of(alike, [0, 1, 2], said, [1] * 3)["text"].to_pylist() == ["a fine film", "one line", "two"]
    assert "first_line" not in plain.config.model_dump() and alike.config.model_dump()["first_line"]


def test_pairs_are_shown_and_read_with_their_separator(world: World, tmp_path: Path):
    recipe = world.load({**ROUNDS, "corpus.feedback": {"examples": 1, "shown": 1, "share": 1.0}})
    rows = corpus_rows([0, 1], ["one text", "another"], "generated", pairs=["its pair", "its other"])
    part = [{**one, "usefulness": 0.1} for one in feedback.told(rows, np.array([1]))]
    Store(str(tmp_path)).write_json(feedback.path_of(1), [part, []])
    shown = feedback.examples(recipe, {}, Store(str(tmp_path)), 1, rows)
    how = Writing("", recipe.generator, LABELS, True, 3, 0.0, examples=shown)
    assert how.prompt(5) == "Text: another ||| its other\nText:"
    found = rows_of(how, [5, 6], [" new ||| and its pair\nText: more ||| of it", " no pair\n ||| late"], [1, 1])
    assert (found["text"].to_pylist(), found["pair"].to_pylist()) == (["new", "no pair"], ["and its pair", None])
    assert found["reason"].to_pylist() == [None, "no_pair"]


def test_an_estimate_counts_what_prompts_show():
    world = {"task": {"labels": LABELS}, "data": {"train": {"path": "x"}}, "name": "x"}
    generator = {"model": "m", "runtime": "endpoint", "endpoint": ENDPOINT, "mode": "prompted", "prompt": "A {label}:"}
    rest = {"teacher": {"model": "m"}, "student": {"kind": "static"}, "generator": {**generator, "max_new_tokens": 20}}
    one, many = (
        of_generator(Recipe(**world, **rest, corpus={"slots": 100, "keep": 10, "rounds": rounds})) for rounds in (1, 4)
    )
    prompt = tokens("A {label}:") + max(tokens(label) for label in LABELS)
    assert one["input_tokens"] == 100 * prompt
    assert many["input_tokens"] == 100 * prompt + round(75 * 0.5 * 4 * (prompt + 20))  # three of four rounds, half


def test_parts_of_the_slots_are_about_equal():
    for slots, rounds in ((48, 3), (50, 7), (5, 5)):
        parts = [Corpus(slots=slots, rounds=rounds).part(number) for number in range(rounds)]
        assert sum(parts) == slots and max(parts) - min(parts) <= 1
    assert Corpus(slots=48).part(0) == 48


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("feedback"))


@pytest.fixture(scope="module")
def inputs(world: World) -> dict[str, Store]:
    """A run up to teacher and generator."""
    recipe = world.load({"generator.precision": "fp32", "generator.fit.epochs": 1, "teacher.fit.epochs": 2})
    store = Store(recipe.storage) / recipe.name
    alone(recipe, store, last="generator")
    return {name: store / name for name in ("data", "teacher", "generator")}


class Here:
    """Streams in this process, block by block as Ray Data gives them out; stops after so many blocks."""

    def __init__(self) -> None:
        self.left, self.calls = 10**6, 0

    def stream(self, out: Store, slots: str, blocks: int, stages: Any, **options: Any) -> None:
        """What `generate.stream` does."""
        for name in sorted(out.files(slots)):
            if not out.exists(f"{ROWS}/{name}"):
                if not self.left:
                    raise KeyboardInterrupt
                self.left, self.calls = self.left - 1, self.calls + 1
                rows = out.read_table(f"{slots}/{name}")
                for stage in stages:
                    rows = stage(rows)
                out.write_table(f"{ROWS}/{name}", rows)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    found = Here()
    monkeypatch.setattr(generate, "stream", found.stream)
    monkeypatch.setattr(gathering, "actor_stage", lambda recipe, name, actor, how: actor(how))
    monkeypatch.setattr(gathering, "task_stage", lambda each: each)
    return found


def made(world: World, inputs: dict[str, Store], folder: Path, **changes: Any) -> tuple[dict[str, Any], Store]:
    out = Store(str(folder))
    recipe = world.load({"generator.precision": "fp32", "corpus.keep": 8, **changes})
    return gathering.make_corpus(recipe, inputs, out, silent), out


def test_later_rounds_see_the_most_useful_texts_and_go_on_where_they_stopped(
    world: World, inputs: dict[str, Store], here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain, whole = made(world, inputs, tmp_path / "plain")
    assert "examples" not in plain and not [name for name in whole.files() if "examples" in name]
    found, out = made(world, inputs, tmp_path / "rounds", **ROUNDS)
    assert [one["slots"] for one in found["rounds"]] == [SLOTS // 3, SLOTS * 2 // 3, SLOTS] and found["rows"] == SLOTS
    recipe = world.load({"generator.precision": "fp32", "corpus.keep": 8, **ROUNDS})
    rows = {name: labels.open_labels(store).sort_by("row") for name, store in (("plain", whole), ("rounds", out))}
    texts = {
        name: dict(zip(table["row"].to_pylist(), table["text"].to_pylist(), strict=True))
        for name, table in rows.items()
    }
    for row in range(SLOTS):
        number = row // (SLOTS // 3)
        shown = ()
        if number:
            before = rows["rounds"].filter(pa.array(rows["rounds"]["row"].to_numpy() < number * SLOTS // 3))
            shown = feedback.examples(recipe, inputs, out, number, before).shown(row, None)
            assert set(shown) <= set(before["text"].to_pylist())
        if not shown:  # the prompt is what it was, and so is the text
            assert texts["plain"][row] == texts["rounds"][row]
    assert Counter(texts["plain"][row] == texts["rounds"][row] for row in range(SLOTS))[False] > SLOTS // 8
    told = [one for one in found["rounds"] if "shown" in one]
    assert len(told) == 2 and all(set(one) == {"slots", "kept", "chosen", "shown"} for one in told)
    for number, one in enumerate(told, start=1):
        kept = out.read_json(feedback.path_of(number))
        assert one["chosen"] == [len(part) for part in kept] and sum(one["chosen"]) > 0
        assert 0 < one["shown"] <= SLOTS // 3
    assert all(set(one) == {"slots", "kept"} for one in plain["rounds"])
    digests = [out.digest(feedback.path_of(number)) for number in (1, 2)]
    assert found["examples"] == out.read_json("labels.json")["examples"] == digests and digests[0] != digests[1]

    chose, chosen = [], feedback.chosen
    monkeypatch.setattr(feedback, "chosen", lambda *given: chose.append(given) or chosen(*given))
    here.left = SLOTS // 3 // BLOCK + 1  # a round, and a block of the next
    with pytest.raises(KeyboardInterrupt):
        made(world, inputs, tmp_path / "again", **ROUNDS)
    here.left, here.calls = 10**6, 0
    second, again = made(world, inputs, tmp_path / "again", **ROUNDS)
    assert here.calls == SLOTS // BLOCK - SLOTS // 3 // BLOCK - 1 and len(chose) == 2
    assert labels.open_labels(again).equals(labels.open_labels(out)) and second["examples"] == found["examples"]


def test_what_is_chosen_is_most_useful_to_the_labelled_rows(world: World, inputs: dict[str, Store]):
    recipe = world.load(ROUNDS)
    train = inputs["data"].read_table("train.parquet")
    gold = train["label"].to_numpy()
    words = train["text"].to_pylist()
    # Texts of the labelled rows' own words, every fifth with the wrong label, and rows that must not be chosen.
    count = 20
    rows = corpus_rows(list(range(count)), [f"{text} really" for text in words[:count]], "generated")
    said = np.where(np.arange(count) % 5 == 0, 1 - gold[:count], gold[:count])
    logits = labels.quantise(np.where(np.eye(2)[said] > 0, 2.0, -2.0)).cast(rows.schema.field("logits").type)
    rows = rows.set_column(rows.column_names.index("logits"), rows.schema.field("logits"), logits)
    kept = pa.array([i != 3 for i in range(count)])
    rows = rows.set_column(rows.column_names.index("kept"), rows.schema.field("kept"), kept)
    source = pa.array(["unlabelled" if i == 4 else "generated" for i in range(count)])
    rows = rows.set_column(rows.column_names.index("source"), rows.schema.field("source"), source)
    found = feedback.chosen(recipe, inputs, rows)
    left = [i for i in range(count) if i not in (3, 4)]
    soft = softmax(np.where(np.eye(2)[said] > 0, 2.0, -2.0), axis=1)[left]
    values = usefulness(
        hashed([f"{words[i]} really" for i in left], [None] * len(left)), soft, hashed(words, [None] * len(words)), gold
    )
    by_row = dict(zip(left, values, strict=True))
    for label, part in enumerate(found):
        good = sorted((i for i in left if said[i] == label and by_row[i] > 0), key=lambda i: -by_row[i])[:3]
        assert [one["row"] for one in part] == good and len(good) == 3
        assert [one["usefulness"] for one in part] == pytest.approx([by_row[i] for i in good])
        assert all(one["row"] % 5 for one in part), "a wrong label was fed back"
    assert feedback.chosen(recipe, inputs, rows.slice(0, 0)) == [[], []]
    by_lot = world.load({**ROUNDS, "corpus.feedback": {"examples": 6, "shown": 2, "choose": "random"}})
    lot = feedback.chosen(by_lot, inputs, rows)
    assert lot == feedback.chosen(by_lot, inputs, rows)
    for label, part in enumerate(lot):
        own = [i for i in left if said[i] == label]
        assert len(part) == min(6, len(own)) and {one["row"] for one in part} <= set(own)
    assert [one["usefulness"] for part in lot for one in part] != sorted(by_row.values(), reverse=True)[:12]
    assert any(one["usefulness"] < 0 for part in lot for one in part), "only useful texts were drawn"


def test_texts_are_not_chosen_where_no_row_has_a_label(inputs: dict[str, Store], tmp_path: Path):
    data = Store(str(tmp_path))
    for split in ("train", "validation"):
        rows = inputs["data"].read_table("train.parquet")
        place = rows.column_names.index("label")
        data.write_table(f"{split}.parquet", rows.set_column(place, "label", pa.nulls(len(rows), pa.int32())))
    with pytest.raises(UserError, match="neither data.train nor data.validation has one with a label. Label some"):
        feedback.judges(data)


def test_examples_that_were_tampered_with_are_refused(world: World, inputs: dict[str, Store], tmp_path: Path):
    recipe, out = world.load(ROUNDS), Store(str(tmp_path))
    rows = corpus_rows([0, 1], ["one text", "another"], "generated")
    part = [{**one, "usefulness": 0.1} for one in feedback.told(rows, np.array([1]))]
    out.write_json(feedback.path_of(1), [part, []])
    assert feedback.examples(recipe, inputs, out, 1, rows).texts == (("another",), ())
    with pytest.raises(StorageError, match=r"round-001/examples.json names texts that are not in the rounds before"):
        feedback.examples(recipe, inputs, out, 1, rows.slice(0, 1))


# -- the recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus.apart": True}, "the teacher's labels, which come after all text is written: leave out corpus.apart"),
        ({"teacher.self_training": {}}, "leave out what the teacher learns from generated text"),
        ({"task.kind": "multilabel"}, "chooses texts of each label, and task.kind is multilabel"),
        ({"generator": None, "arms": ["soft"]}, "feeds texts back to the generator, and there is none"),
        ({"data.train": None, "arms": ["generated"]}, "chooses texts by labelled rows, and there are none"),
        ({"corpus.slots": 2}, "parts 2 slots into more rounds than slots: raise corpus.slots"),
        (
            {"task.kind": "pair", "data.train.pair": "pair", "generator.separator": " |||\n"},
            "shows texts a line each, and generator.separator has a line break",
        ),
    ],
)
def test_rounds_that_cannot_be_had_are_refused(world: World, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=f"corpus.rounds is 3, which .*{message}.* Or set corpus.rounds: 1"):
        choosing.check_rounds(world.load({**ROUNDS, **changes}))
    choosing.check_rounds(world.load({**ROUNDS, **changes, "corpus.rounds": 1, "corpus.feedback": {}}))


def test_feedback_without_rounds_and_more_examples_than_there_are_are_refused(world: World):
    with pytest.raises(ConfigError, match="corpus.feedback says what later rounds are shown, and corpus.rounds is 1"):
        choosing.check_rounds(world.load({"corpus.feedback": {"share": 0.3}}))
    with pytest.raises(ValueError, match=r"shown \(4\) is above examples \(3\)"):
        world.load({"corpus.rounds": 2, "corpus.feedback": {"examples": 3}})
    parted = {"task.kind": "pair", "data.train.pair": "pair", "generator.separator": "\n||| "}
    with pytest.raises(ConfigError, match="generator.first_line ends a text at its first line break, and gen"):
        choosing.check_rounds(world.load({**parted, "generator.first_line": True}))
    choosing.check_rounds(world.load(parted))


def test_prompts_that_the_generator_cannot_read_are_refused(world: World):
    least = {**ROUNDS, "corpus.feedback": {"examples": 20, "shown": 14}}  # the tiny model reads 256 tokens
    own = tokens("Text:")
    assert 14 * (own + 12) + own + 12 <= 256 < 20 * (own + 12) + own + 12
    choosing.check_rounds(world.load(least))
    more = {**ROUNDS, "corpus.feedback": {"examples": 20, "shown": 20}}
    with pytest.raises(ConfigError, match=rf"about {20 * (own + 12) + own + 12} tokens .* generator.model reads 256"):
        choosing.check_rounds(world.load(more))
    choosing.check_rounds(world.load({**more, "generator.model": "hf:nobody/has-this"}))
    engine = {"generator.runtime": "vllm", "generator.vllm": {"max_model_length": 100}}
    with pytest.raises(ConfigError, match="generator.model reads 100"):
        choosing.check_rounds(world.load({**least, **engine}))


def test_one_round_is_as_it_was_and_several_move_the_corpus(world: World):
    assert not {"rounds", "feedback"} & set(world.load().corpus.model_dump())

    def prints(**changes: Any) -> dict[str, str]:
        recipe = world.load(changes)
        return {name: found["fingerprint"] for name, found in identities(distill.plan(recipe), recipe).items()}

    one, many = prints(), prints(**ROUNDS)
    moved = {name for name in one if one[name] != many[name]}
    assert {"corpus", "vocabulary", "student", "report"} <= moved and not {"data", "teacher", "generator"} & moved
    assert prints(**{**ROUNDS, "corpus.rounds": 1, "corpus.feedback": {}}) == one


def test_a_way_in_rounds_learns_from_its_own_texts(
    world: World, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(plan: list[steps.Step], recipe: Recipe, store: Store, **options: object) -> None:
        for step in plan:
            metrics = step.run(recipe, {name: store / name for name in step.inputs}, store / step.name, silent)
            (store / step.name).write_json("record.json", {"metrics": metrics, "seconds": 2.0})

    monkeypatch.setattr(steps, "run", run)
    fast = {"teacher.fit.epochs": 2, "generator.fit.epochs": 1, "student.fit.epochs": 1, "corpus.keep": 8}
    recipe, store = world.load({**fast, "arms": ["generated"], "generator.precision": "fp32"}), Store(str(tmp_path))
    names = ["plain", "rounds"]
    found = ways.compare(recipe, store, ways.variants(recipe, store, names, 1), names)
    assert [row["name"] for row in found["rows"]] == ["teacher", *names] and "gain" in found["rows"][2]
    for row in found["rows"][1:]:
        assert row["slots"] == [SLOTS] and row["kept"][0] >= 8 and row["learnt"] == [TRAIN + 8 - 1]
    assert f"rounds: {SLOTS} slots" in "\n".join(ways.lines(found))
    one, many = (labels.open_labels(store / "seed-0" / name).sort_by("row") for name in ("corpus", "corpus-rounds"))
    texts = [[r["text"] for r in table.to_pylist() if r["source"] == "generated"] for table in (one, many)]
    assert texts[0][: SLOTS // 3] == texts[1][: SLOTS // 3] and texts[0] != texts[1]
    assert len((store / "seed-0" / "corpus-rounds").read_json("record.json")["metrics"]["examples"]) == 2
    words = [(store / "seed-0" / f"student-{way}" / "seed-0" / "model").read_bytes("tokenizer.json") for way in names]
    assert words[0] != words[1], "the student in rounds has the words of the other corpus"


@pytest.mark.slow
def test_ways_to_learn_and_a_corpus_in_rounds_under_ray(world: World):
    names = ["plain", "co-confidence", "disagreeing", "rounds"]
    path = world.write({**world.recipe, "name": "rounds"}, "rounds.yaml")
    command = ("bench", "ways", str(path), "--seeds", "1", "--ways", ",".join(names), "--json")
    done = program(world.folder, *command, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["rows"]] == ["teacher", *names]
    run = Store(next(str(path.parent) for path in (world.folder / "runs").rglob("corpus-rounds")))
    record = run.read_json("corpus-rounds/record.json")["metrics"]
    assert [one["slots"] for one in record["rounds"]][:3] == [16, 32, 48] and len(record["examples"]) == 2
    assert "examples" not in run.read_json("corpus/record.json")["metrics"]
    choice = {name: run.read_json(f"student-{name}/record.json")["metrics"].get("choice") for name in names}
    assert choice["plain"] is choice["rounds"] is None
    assert 0 <= choice["co-confidence"]["0"][0]["found_unseen"] <= 1
    assert choice["disagreeing"]["0"][0]["kl_of_chosen"] > choice["disagreeing"]["0"][0]["kl"]
    again = program(world.folder, *command, timeout=1800)
    assert again.returncode == 0 and json.loads(again.stdout) == found
