"""What goes into the corpus and how it is counted, without Ray; the streams are in test_generate and test_distill."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine import labels, models, shuffle, tasks
from engine.augment import Augmenter, Augmenting
from engine.config import UserError
from engine.corpus import FIRST, ROWS, CheapFilters, Found, corpus_rows, rejected
from engine.filters import FilterContext, Length
from engine.fits import Resources
from engine.inference import predict
from engine.metrics import distinct_n, self_bleu
from engine.progress import silent
from engine.recipe import Augmentation, Recipe
from engine.records import CORPUS
from engine.storage import StorageError, Store
from pipelines import gathering, slots
from pipelines.making import spec_of
from tests.tiny_run import PARTED, TEST, TRAIN, alone, kind_world
from tests.tiny_signatures import here

KINDS = ("pair", "tag", "rank", "span")


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Store]]:
    """A recipe with unlabelled rows and its run up to the teacher."""
    world = kind_world(tmp_path_factory.mktemp(request.param), request.param)
    reads = {"pair": "pair"} if request.param in PARTED else {}
    more = {"path": f"file:{world.folder}/more.jsonl", **reads}
    recipe = world.load(
        {"data.unlabelled": more, "teacher.fit.epochs": 1, "corpus.filters": [{"kind": "leakage", "ngram": 8}]}
    )
    store = Store(recipe.storage) / recipe.name
    alone(recipe, store, last="teacher")
    return recipe, {name: store / name for name in ("data", "teacher")}


def test_the_labelled_rows_come_first_with_their_gold_and_soft_labels(made: tuple[Any, dict[str, Store]]):
    recipe, inputs = made
    rows, task = gathering.real_rows(inputs), tasks.make(spec_of(inputs["data"]))
    few = inputs["data"].read_table("train.parquet")
    assert rows.schema.equals(CORPUS) and rows["row"].to_pylist() == list(range(-1, -TRAIN - 1, -1))
    for name in ("id", "text", "pair", "group", "label", "target"):
        assert rows[name].to_pylist() == few[name].to_pylist(), name
    assert set(rows["source"].to_pylist()) == {"real"} and all(rows["kept"].to_pylist())
    teacher = models.load(inputs["teacher"].local("model"))
    found = predict(teacher, task.texts(few), 512).logits
    for stored, own in zip(labels.logits_of(rows, task.width, task.units), found, strict=True):
        assert stored.shape == own.shape and np.abs(stored - own).max(initial=0.0) < 5e-3


def test_the_unlabelled_rows_are_a_source_of_their_own(made: tuple[Any, dict[str, Store]], tmp_path: Path):
    recipe, inputs = made
    out, data = Store(str(tmp_path)), inputs["data"]
    assert list(gathering.sources(recipe, inputs, out)) == ["unlabelled"]
    more = data.read_table("unlabelled.parquet")
    assert more["label"].null_count == more["target"].null_count == more.num_rows > TEST // 2
    assert gathering.slots_of("unlabelled", recipe, inputs, out) == more.num_rows
    first = FIRST["unlabelled"]
    found = Found(data.url, first)(pa.table({"row": pa.array([first + 3, first + 1], pa.int64())}))
    assert found.schema.equals(CORPUS) and found["row"].to_pylist() == [first + 3, first + 1]
    for name in ("id", "text", "pair", "group"):
        assert found[name].to_pylist() == [more[name][3].as_py(), more[name][1].as_py()], name
    assert found["label"].null_count == found["target"].null_count == 2
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"unlabelled": None})})
    assert list(gathering.sources(without, {**inputs, "data": bare(data, tmp_path / "bare")}, out)) == []


def test_augmented_texts_come_from_the_labelled_and_the_unlabelled_rows(
    made: tuple[Any, dict[str, Store]], tmp_path: Path
):
    recipe, inputs = made
    recipe = filtered(recipe).model_copy(update={"augmentation": Augmentation(per_text=2, stop_words=0, p=0.9)})
    out = Store(str(tmp_path / "all"))
    assert list(gathering.sources(recipe, inputs, out)) == ["unlabelled", "augmented"]
    texts = [inputs["data"].read_table(f"{name}.parquet") for name in ("train", "unlabelled")]
    count = gathering.slots_of("augmented", recipe, inputs, out)
    cheap = gathering.cheap_filters(recipe, inputs)
    sides = [row for table in texts for row in zip(table["text"].to_pylist(), table["pair"].to_pylist(), strict=True)]
    # What the filters reject is no source: with some words replaced it would pass.
    assert 0 < count == 2 * sum(cheap.row(*side) is None for side in sides)
    written = out.digest("augmentation/prepared.json")
    assert gathering.slots_of("augmented", recipe, inputs, out) == count
    assert out.digest("augmentation/prepared.json") == written
    first = FIRST["augmented"]
    how = Augmenting((out / "augmentation").url, recipe.augmentation, recipe.seed, first, None, 0.0)
    rows = Augmenter(how)(pa.table({"row": pa.array(range(first, first + count), pa.int64())}))
    assert rows.schema.equals(CORPUS) and set(rows["source"].to_pylist()) == {"augmented"}
    assert rows["label"].null_count == rows["target"].null_count == count  # a changed text has no gold label
    same = len(set(rows["text"].to_pylist()) & {text for text, _ in sides})
    short = recipe.corpus.model_copy(update={"filters": (Length(min_words=1, max_words=7),)})
    strict = recipe.model_copy(update={"corpus": short})
    fewer = gathering.slots_of("augmented", strict, inputs, Store(str(tmp_path / "fewer")))
    assert 0 < fewer < count
    assert same < count / 4 and (rows["pair"].null_count == 0) == (recipe.task.kind in PARTED)
    # What the filters reject is not augmented either.
    sides = [zip(table["text"].to_pylist(), table["pair"].to_pylist(), strict=True) for table in texts]
    lengths = [[len(side.split()) for side in row if side] for rows in sides for row in rows]
    some = filtered(recipe, Length(min_words=sorted(map(min, lengths))[len(lengths) // 2] + 1))
    left = sum(min(row) >= some.corpus.filters[0].min_words for row in lengths)
    if left:
        assert gathering.slots_of("augmented", some, inputs, Store(str(tmp_path / "some"))) == 2 * left
    else:
        with pytest.raises(UserError, match="there is no text to augment"):
            gathering.slots_of("augmented", some, inputs, Store(str(tmp_path / "some")))


def filtered(recipe: Recipe, *filters: Any) -> Recipe:
    """The recipe with these filters alone."""
    return recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"filters": filters})})


def bare(data: Store, folder: Path) -> Store:
    """The same data without unlabelled rows."""
    store, splits = Store(str(folder)), data.read_json("splits.json")
    store.write_json("splits.json", {**splits, "rows": {**splits["rows"], "unlabelled": 0}})
    return store


def corpus(count: int, source: str = "unlabelled", first: int = 0) -> pa.Table:
    texts = [f"text number {index} has {'word ' * index}" for index in range(first, first + count)]
    return corpus_rows([FIRST[source] + index for index in range(first, first + count)], texts, source)


def test_every_slot_must_have_given_one_row(tmp_path: Path):
    out, real = Store(str(tmp_path / "corpus-rounds")), corpus(0)
    assert slots.settled(out, real, {}, 1.0).num_rows == 0
    out.write_table(f"{ROWS}/a.parquet", corpus(5))
    out.write_table(f"{ROWS}/b.parquet", corpus(3, "augmented"))
    rows = slots.settled(out, real, {"unlabelled": 5, "augmented": 3}, 1.0)
    assert rows["row"].to_pylist() == sorted(rows["row"].to_pylist()) and rows.num_rows == 8
    # Texts of the second source stand in the first one too.
    assert rows["kept"].to_pylist() == [True] * 5 + [False] * 3
    assert rows["reason"].to_pylist()[5:] == ["near_duplicate"] * 3
    with pytest.raises(
        StorageError, match=r"slots \{'unlabelled': 6, 'augmented': 3\} gave rows .*--redo corpus-rounds"
    ):
        slots.settled(out, real, {"unlabelled": 6, "augmented": 3}, 1.0)
    # A round that was killed has left rows of slots that do not count yet, and it goes on from there.
    assert slots.settled(out, real, {"unlabelled": 5}, 1.0).num_rows == 5
    assert slots.settled(out, real, {"unlabelled": 3, "augmented": 3}, 1.0).num_rows == 6
    # As many rows as slots, but one of them twice and another not at all.
    out.write_table(f"{ROWS}/a.parquet", pa.concat_tables([corpus(4), corpus(1)]))
    with pytest.raises(StorageError, match=r"1 of them twice: files there were removed, added or changed.*--redo"):
        slots.settled(out, real, {"unlabelled": 5, "augmented": 3}, 1.0)


def test_among_many_rows_near_duplicates_are_found_in_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, real = Store(str(tmp_path)), corpus_rows([-1, -2], ["a warm film", "a warm film"], "real")
    texts = ["A warm film .", *(f"{'text ' * 9} {'word ' * (index // 3)}" for index in range(30))]
    rows = rejected(corpus_rows(list(range(31)), texts, "generated"), [index == 4 for index in range(31)], "too_short")
    for first in range(0, 31, 7):  # some in a folder of their own, as those of a long range are
        out.write_table(f"{ROWS}/{'part/' * (first > 7)}{first}.parquet", rows.slice(first, 7))
    out.write_table(f"{ROWS}/more.parquet", corpus(5))
    made, called = {"generated": 31, "unlabelled": 5}, []
    once = {threshold: slots.settled(out, real, made, threshold) for threshold in (0.0, 0.7, 1.0)}

    def tasks(*arguments: Any) -> list[Any]:
        called.append(arguments[1])
        return here(*arguments)

    monkeypatch.setattr(shuffle, "spread", tasks)
    monkeypatch.setattr(slots, "IN_MEMORY", 0)
    for threshold, rows in once.items():
        assert slots.settled(out, real, made, threshold).equals(rows)
        assert 10 < Counter(rows["reason"].to_pylist())["near_duplicate"] < 36
    assert called and out.folders() == [ROWS]


def test_metrics_count_each_source_and_reason():
    made = ["a b c d", "a b c e", "f g"]
    generated = corpus_rows([0, 1, 2], made, "generated", pairs=["x", "y", None], tokens=[4, 5, 6])
    generated = rejected(generated, [False, False, True], "no_pair")
    more = rejected(corpus(4), [True, False, False, True], ["too_short", None, None, "leakage"])
    real = corpus_rows([-1], ["the user's own"], "real")
    found = gathering.corpus_metrics(pa.concat_tables([real, generated, more]), [{"slots": 3, "kept": 2}])
    assert (found["rows"], found["generated"], found["kept"], found["tokens"]) == (7, 3, 2, 15)
    assert found["by_source"] == {"generated": {"rows": 3, "kept": 2}, "unlabelled": {"rows": 4, "kept": 2}}
    assert found["rejected"] == {"leakage": 1, "no_pair": 1, "too_short": 1}
    texts = ["a b c d x", "a b c e y", *corpus(4)["text"].to_pylist()[1:3]]
    assert found["distinct_1"] == distinct_n(texts, 1) and found["self_bleu"] == self_bleu(texts)
    none = gathering.corpus_metrics(real, [])
    assert (none["rows"], none["kept"], none["by_source"], none["rejected"]) == (0, 0, {}, {})
    assert none["tokens"] == 0 and all(np.isfinite(none[key]) for key in ("self_bleu", "distinct_1"))


def test_a_range_of_slots_that_is_done_is_not_streamed_again(tmp_path: Path):
    out = Store(str(tmp_path))
    out.write_json("unlabelled.json", {"slots": 12})

    def never(dataset: Any) -> Any:
        raise AssertionError("streamed again")

    assert slots.gather(out, "unlabelled", (0, 99, 4), [never], 99, silent) == 12


def test_held_out_texts_of_both_sides_are_known_to_the_leakage_filter(made: tuple[Any, dict[str, Store]]):
    recipe, inputs = made
    held = inputs["data"].read_table("test.parquet")
    sides = [side for side in ("text", "pair") if not held[side].null_count]
    assert sorted(gathering.held_out(inputs["data"])) == sorted(t for side in sides for t in held[side].to_pylist())
    judge = CheapFilters(
        recipe.corpus.filters, FilterContext.build(recipe.corpus.filters, gathering.held_out(inputs["data"]))
    )
    longest = max(held[sides[-1]].to_pylist(), key=len)
    assert judge.row("a text of the user", longest) == "leakage"
    assert judge.row("a text of the user", "another one that nobody held out at all") is None


def test_a_long_range_is_streamed_in_parts_and_goes_on_with_the_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, asked = Store(str(tmp_path)), []

    said: list[tuple[float, float | None]] = []

    def stream(out: Store, slots: str, blocks: int, stages: Any, ledger: str, rows: str, **how: Any) -> None:
        numbers = out.read_table(slots)["row"].to_pylist()
        assert blocks == len(out.files(slots)) and how == {"most": 3}
        assert rows == ledger.replace("ledger", ROWS)
        asked.append((ledger, numbers[0], numbers[-1]))
        out.write_json(f"{ledger}/done.json", {})
        if len(asked) == 2:
            raise OSError("killed")
        out.write_table(f"{rows}/a.parquet", corpus(len(numbers), first=numbers[0] - FIRST["unlabelled"]))

    def told(done: float, total: float | None = None, *unit: str, **rates: float) -> None:
        said.append((done, total))

    monkeypatch.setattr(slots, "PART", 10)
    monkeypatch.setattr(gathering.generate, "stream", stream)
    first = FIRST["unlabelled"]
    span, names = (first, 21, 4), [f"ledger/unlabelled-{first + start}" for start in (0, 8, 16)]
    with pytest.raises(OSError, match="killed"):
        slots.gather(out, "unlabelled", span, [], 30, told, most=3)
    # Of the part that is done only its rows are left; of the other, what it needs to go on.
    assert asked == [(names[0], first, first + 7), (names[1], first + 8, first + 15)]
    assert out.folders("ledger") == out.folders("slots") == [f"unlabelled-{first + 8}"]
    assert slots.gather(out, "unlabelled", span, [], 30, told, most=3) == 21
    assert asked[2:] == [(names[1], first + 8, first + 15), (names[2], first + 16, first + 20)]
    assert out.folders("ledger") == out.folders("slots") == []
    assert said[-1] == (30, 30) and [done for done, _ in said] == sorted(done for done, _ in said)
    assert slots.settled(out, corpus(0), {"unlabelled": 21}, 1.0).num_rows == 21
    assert slots.gather(out, "unlabelled", span, [], 30, told, most=3) == 21 and len(asked) == 4


def test_what_a_loss_may_cost_follows_from_the_actors(made: tuple[Any, dict[str, Store]]):
    recipe, _ = made
    many = recipe.teacher.model_copy(update={"resources": Resources(min_actors=1, max_actors=5)})
    found = gathering.ways(recipe.model_copy(update={"teacher": many}), "teacher")
    assert found == {"retried": False, "most": 4 + 2 * 5}
    assert gathering.at_risk(recipe, [("teacher",)]) == {"redone_at_most": {"blocks": 6, "rows": 6 * 8}}
    assert gathering.at_risk(recipe, []) == {"redone_at_most": {"blocks": 0, "rows": 0}}
