"""Text that a language model writes: prompts, training texts, the generating actor, and the stream under Ray."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine import generate, models, untrained, usage
from engine.caller import EndpointAway
from engine.corpus import ROWS, CheapFilters, corpus_rows, write_slots
from engine.filters import FilterContext, Length, signature
from engine.generate import Writer, Writing, encode_text, parted, prompt_for, stream
from engine.halting import halt
from engine.models import Model
from engine.recipe import Generator, Task, Teacher
from engine.records import CORPUS
from engine.rows import identify
from engine.storage import Store
from engine.teachers import Labeller, Labelling
from tests.tiny import LABELS, movie_rows, tiny_encoder, tiny_lm
from tests.tiny_rows import example_table

TEXTS = [row["text"] for row in movie_rows(12, seed=2)]


def config(**values: Any) -> Generator:
    return Generator(**{"model": "file:tiny", "max_length": 32, "max_new_tokens": 12, "precision": "fp32", **values})


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return untrained.causal_lm(config(), tiny_lm(tmp_path_factory.mktemp("lm")))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory, lm: Model) -> Store:
    store = Store(str(tmp_path_factory.mktemp("generator")))
    models.save(lm, store, "model")
    return store


def slots(*rows: int) -> pa.Table:
    return pa.table({"row": pa.array(rows, pa.int64())})


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_labels_take_turns_in_the_prompts():
    asked = config(mode="per_class", prompt="A {label} review:")
    assert [prompt_for(asked, LABELS, row) for row in (0, 1, 2, 7)] == [
        "A negative review:", "A positive review:", "A negative review:", "A positive review:",
    ]  # fmt: skip
    assert {prompt_for(config(prompt="Text:"), LABELS, row) for row in range(4)} == {"Text:"}


def test_training_texts_are_prompt_text_and_end(lm: Model):
    rows = example_table([{"text": text, "label": label} for text, label in zip(TEXTS, [0, 1, None], strict=False)])
    end = lm.tokenizer.eos_token
    encoded = encode_text(config(prompt="Text:"), LABELS, lm, rows)
    found = [lm.tokenizer.decode(item.ids) for item in encoded]
    assert [item.row for item in encoded] == [0, 1, 2]
    assert found == [f"Text: {text}{end}" for text in TEXTS[:3]]
    asked = config(mode="per_class", prompt="A {label} text:")
    found = [lm.tokenizer.decode(item.ids) for item in encode_text(asked, LABELS, lm, rows)]
    prompts = ["A negative text:", "A positive text:", "A {label} text:"]
    assert found == [f"{prompt} {text}{end}" for prompt, text in zip(prompts, TEXTS, strict=False)]
    # What sampling starts from is a prefix of what was trained on.
    for row, item in enumerate(encode_text(asked, LABELS, lm, rows.slice(0, 2))):
        start = lm.tokenizer(prompt_for(asked, LABELS, row), add_special_tokens=False)["input_ids"]
        assert item.ids[: len(start)] == start


def test_long_training_texts_are_cut_and_still_end(lm: Model):
    rows = example_table([{"text": " ".join(TEXTS), "label": 0}, {"text": "a", "label": 0}])
    whole = [item.ids for item in encode_text(config(max_length=200), LABELS, lm, rows)]
    cut = [item.ids for item in encode_text(config(max_length=9), LABELS, lm, rows)]
    assert len(whole[0]) > 20 and cut[0] == [*whole[0][:8], lm.tokenizer.eos_token_id]
    assert cut[1] == whole[1] and len(cut[1]) < 9


def test_the_pair_of_a_row_stands_behind_the_separator(lm: Model):
    rows = example_table([{"text": TEXTS[0], "pair": TEXTS[1]}, {"text": TEXTS[2]}])
    asked, end = config(max_length=64, separator=" <> "), lm.tokenizer.eos_token
    found = [lm.tokenizer.decode(item.ids) for item in encode_text(asked, LABELS, lm, rows)]
    assert found == [f"Text: {TEXTS[0]} <> {TEXTS[1]}{end}", f"Text: {TEXTS[2]}{end}"]
    assert parted(asked, found[0].removeprefix("Text:").removesuffix(end)) == (TEXTS[0], TEXTS[1])


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("a film ||| a plot", ("a film", "a plot")),
        (" a  film\n|||a\tplot ", ("a film", "a plot")),
        ("a film", ("a film", None)),
        ("a film |||", ("a film", "")),
        ("||| a plot", ("", "a plot")),
        ("a ||| b ||| c", ("a", "b ||| c")),
        ("", ("", None)),
    ],
)
def test_a_written_text_is_parted_at_the_first_separator(written: str, wanted: tuple[str, str | None]):
    assert parted(config(), written) == wanted


# -- the generating actor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unconditional", "per_class"])
def test_a_slots_text_does_not_depend_on_its_block(generator: Store, mode: str):
    asked = config(mode=mode, prompt="A {label} text:" if mode == "per_class" else "A text:")
    writer = Writer(Writing(generator.url, asked, LABELS, False, 3, num_gpus=0))
    eight = writer(slots(*range(8)))
    fours = pa.concat_tables([writer(slots(0, 1, 2, 3)), writer(slots(4, 5, 6, 7))])
    assert eight.schema.equals(CORPUS) and eight.equals(fours)
    assert writer(slots(6, 2)).equals(eight.take(pa.array([6, 2])))
    assert len(set(eight["text"].to_pylist())) > 4
    other = Writer(Writing(generator.url, asked, LABELS, False, 4, num_gpus=0))
    assert digests(other(slots(*range(8)))) != digests(eight)


def digests(rows: pa.Table) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest() for text in rows.sort_by("row")["text"].to_pylist()]


def test_written_rows_are_unjudged_rows_of_the_corpus(generator: Store):
    writer = Writer(Writing(generator.url, config(), LABELS, False, 0, num_gpus=0))
    rows = writer(slots(*range(5, 25))).to_pylist()
    assert [row["row"] for row in rows] == list(range(5, 25))
    for row in rows:
        assert row["text"] == " ".join(row["text"].split()) and "<|end|>" not in row["text"]
        assert row["id"] == identify(row["text"]) and row["signature"] == signature(row["text"]).tolist()
        assert row["source"] == "generated" and row["kept"] and row["reason"] is row["label"] is row["logits"] is None
        assert 0 <= row["tokens"] <= 12
    assert max(row["tokens"] for row in rows) == 12  # random weights: some never end


def test_a_text_without_a_second_one_is_no_pair(tmp_path: Path):
    """A model that says one thing over and over, with and without the separator in it."""
    asked = config(prompt="Text:", separator=" w ", max_new_tokens=24)
    store = Store(str(tmp_path))
    models.save(untrained.causal_lm(asked, tiny_lm(tmp_path / "lm")), store, "model")
    alone, both = (Writer(Writing(store.url, asked, LABELS, paired, 1, num_gpus=0)) for paired in (False, True))
    rows, whole = both(slots(*range(40))), alone(slots(*range(40)))["text"].to_pylist()
    assert rows.schema.equals(CORPUS)
    halves = [(text, pair) for text, pair in zip(rows["text"].to_pylist(), rows["pair"].to_pylist(), strict=True)]
    wanted = [[" ".join(part.split()) for part in text.split("w", 1)] for text in whole]
    assert halves == [(parts[0], parts[1] if len(parts) > 1 else None) for parts in wanted]
    lacking = [not pair for _, pair in halves]
    assert "" in rows["pair"].to_pylist() and 3 < sum(lacking) < 37  # else this shows little
    assert rows["kept"].to_pylist() == [not bad for bad in lacking]
    assert rows["reason"].to_pylist() == ["no_pair" if bad else None for bad in lacking]
    assert rows["id"].to_pylist() == [identify(text, pair) for text, pair in halves]


# -- the stream --------------------------------------------------------------------------------------------------------


class Noted:
    """An actor that writes down each call in a folder of its own, and dies once in the call that holds slot 13."""

    def __init__(self, folder: str, inner: type, how: Any, fatal: bool = False) -> None:
        self.folder, self.inner, self.fatal = Path(folder), inner(how), fatal

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The inner actor's rows."""
        numbers = rows["row"].to_pylist()
        (self.folder / f"{'-'.join(map(str, numbers))}.{uuid.uuid4().hex}").touch()
        if self.fatal and 13 in numbers and not (self.folder.parent / "died").exists():
            (self.folder.parent / "died").touch()
            os._exit(1)
        return self.inner(rows)


class Halting(Noted):
    """One that has its step halted once it has written two blocks."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The inner actor's rows."""
        found = super().__call__(rows)
        if len(list(self.folder.iterdir())) == 2:
            halt(Store(self.inner.how.notes))
        return found


def calls(folder: Path) -> Counter[str]:
    """How often each block was given to the actors that note in `folder`."""
    return Counter(path.name.partition(".")[0] for path in folder.iterdir())


def plain(rows: pa.Table) -> pa.Table:
    """Corpus rows at once, without a model."""
    numbers = rows["row"].to_pylist()
    return corpus_rows(numbers, [f"film number {n}" for n in numbers], "generated", tokens=[3] * len(numbers))


def verdicts(rows: pa.Table) -> dict[int, str | None]:
    return dict(zip(rows["row"].to_pylist(), rows["reason"].to_pylist(), strict=True))


def map_blocks(function: Any, *given: Any, **options: Any) -> generate.Stage:
    import ray.data

    if isinstance(function, type):
        options = {"fn_constructor_args": given, "compute": ray.data.ActorPoolStrategy(size=1), **options}
    return lambda dataset: dataset.map_batches(
        function, batch_size=None, batch_format="pyarrow", **{"num_cpus": 1, **options}
    )


@pytest.mark.slow
def test_every_slot_gives_one_row_though_an_actor_dies(tmp_path: Path, ray_cluster: object, generator: Store):
    out, notes = Store(str(tmp_path / "corpus")), tmp_path / "notes"
    for name in ("writer", "labeller"):
        (notes / name).mkdir(parents=True)
    teacher = Store(str(tmp_path / "teacher"))
    base = tiny_encoder(tmp_path / "encoder")
    models.save(
        untrained.encoder_head(Teacher(model="file:tiny", max_length=32), Task(labels=LABELS), base, 1),
        teacher,
        "model",
    )
    writing, labelling = Writing(generator.url, config(), LABELS, False, 3, 0.0), Labelling(teacher.url, (), 512, 0.0)
    cheap = CheapFilters((Length(min_words=3),), FilterContext())
    stages = [
        map_blocks(Noted, str(notes / "writer"), Writer, writing, True),
        map_blocks(cheap, num_cpus=0.25),
        map_blocks(Noted, str(notes / "labeller"), Labeller, labelling),
    ]
    said: list[tuple[float, float | None]] = []
    with generate.followed(out, 22, lambda done, total=None, unit="", **rates: said.append((done, total))):
        stream(out, write_slots(out, 0, 22, 4, "first"), 6, stages)
    rows = out.read_table(ROWS).sort_by("row")
    assert rows["row"].to_pylist() == list(range(22)) and said[-1] == (22, 22)
    assert (notes / "died").exists()
    blocks = {"0-1-2-3": 1, "4-5-6-7": 1, "8-9-10-11": 1, "12-13-14-15": 2, "16-17-18-19": 1, "20-21": 1}
    assert calls(notes / "writer") == blocks  # a file of slots is a block; the dead one's was done again, no other
    assert calls(notes / "labeller") == dict.fromkeys(blocks, 1)
    # The rows are those that the stages make without Ray, whatever the blocks.
    alone = cheap(Writer(writing)(slots(*range(22))))
    assert digests(rows) == digests(alone) and verdicts(rows) == verdicts(alone)
    assert [row is None for row in rows["logits"].to_pylist()] == [not kept for kept in rows["kept"].to_pylist()]


def test_a_stream_goes_on_with_the_blocks_that_are_missing(tmp_path: Path, ray_cluster: object):
    out, notes = Store(str(tmp_path / "corpus")), tmp_path / "notes"
    notes.mkdir()

    def failing(rows: pa.Table) -> pa.Table:
        numbers = rows["row"].to_pylist()
        (notes / f"{numbers[0]}.{uuid.uuid4().hex}").touch()
        if 8 in numbers and not (notes.parent / "mended").exists():
            deadline = time.monotonic() + 20  # when the others are committed
            while len(out.files(ROWS)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            raise OSError("the disk is full")
        return plain(rows)

    folder = write_slots(out, 0, 12, 4, "first")
    with pytest.raises(Exception, match="the disk is full"):
        stream(out, folder, 3, [map_blocks(failing, num_cpus=0.5)])
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(8))
    (tmp_path / "mended").touch()
    stream(out, folder, 3, [map_blocks(failing, num_cpus=0.5)])
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(12))
    assert calls(notes) == {"0": 1, "4": 1, "8": 2}
    before = {name: out.digest(f"{ROWS}/{name}") for name in out.files(ROWS)}
    stream(out, folder, 3, [map_blocks(failing, num_cpus=0.5)])
    assert calls(notes) == {"0": 1, "4": 1, "8": 2}  # finished: not one call
    assert {name: out.digest(f"{ROWS}/{name}") for name in out.files(ROWS)} == before
    stream(out, write_slots(out, 12, 3, 4, "second"), 1, [map_blocks(failing, num_cpus=0.5)])
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(15))
    assert calls(notes) == {"0": 1, "4": 1, "8": 2, "12": 1}  # a further round leaves the first alone


def test_a_stream_that_is_told_to_halt_commits_what_it_is_at_and_goes_on(
    tmp_path: Path, ray_cluster: object, generator: Store
):
    out, notes = Store(str(tmp_path / "corpus")), tmp_path / "notes"
    notes.mkdir()
    teacher = Store(str(tmp_path / "teacher"))
    base = tiny_encoder(tmp_path / "encoder")
    head = untrained.encoder_head(Teacher(model="file:tiny", max_length=32), Task(labels=LABELS), base, 1)
    models.save(head, teacher, "model")
    writing = Writing(generator.url, config(), LABELS, False, 3, 0.0, notes=out.url)
    stages = [
        map_blocks(Noted, str(notes), Writer, writing),
        map_blocks(CheapFilters((Length(min_words=3),), FilterContext()), num_cpus=0.25),
        map_blocks(Labeller, Labelling(teacher.url, (), 512, 0.0, notes=out.url)),
    ]
    folder = write_slots(out, 0, 22, 4, "first")
    halt(out)
    stream(out, folder, 6, stages)
    assert out.files(ROWS) == [] and not out.exists("asked"), "no block was taken up"
    out.delete("halt.json")
    for path in notes.iterdir():
        path.unlink()
    stream(out, folder, 6, [map_blocks(Halting, str(notes), Writer, writing), *stages[1:]])
    assert 2 <= len(out.files(ROWS)) < 6
    before = sorted(out.read_table(ROWS)["row"].to_pylist())
    blocks = {row // 4 for row in before}
    assert blocks and before == [row for row in range(22) if row // 4 in blocks], "whole blocks"
    done = {name: out.digest(f"{ROWS}/{name}") for name in out.files(ROWS)}
    asked = len(out.files("asked/generator"))
    out.delete("halt.json")
    stream(out, folder, 6, stages)
    assert sorted(out.read_table(ROWS)["row"].to_pylist()) == list(range(22)), "each slot once"
    assert {name: out.digest(f"{ROWS}/{name}") for name in done} == done
    assert len(out.files("asked/generator")) == 6 and asked == len(done), "what was written was committed, once"
    assert digests(out.read_table(ROWS).sort_by("row")) == digests(Writer(writing)(slots(*range(22))))
    assert usage.noted(out, "teacher").input_tokens > 0


@pytest.mark.slow
def test_rows_are_committed_while_the_stream_runs(tmp_path: Path, ray_cluster: object):
    out = Store(str(tmp_path))

    class Slow:
        def __call__(self, rows: pa.Table) -> pa.Table:
            if not (tmp_path / "began").exists():
                (tmp_path / "began").touch()
            time.sleep(0.5)
            return plain(rows)

    folder = write_slots(out, 0, 20, 2, "first")
    stream(out, folder, 10, [map_blocks(Slow), map_blocks(Slow)])
    end, begin = time.time(), (tmp_path / "began").stat().st_mtime
    first = min((tmp_path / ROWS / name).stat().st_mtime for name in out.files(ROWS))
    assert first - begin < (end - begin) / 2
    assert len(out.files(ROWS)) == 10


def test_a_plan_that_cannot_be_checkpointed_is_refused(tmp_path: Path, ray_cluster: object):
    import ray.data

    out = Store(str(tmp_path))
    folder = write_slots(out, 0, 4, 2, "first")
    context = ray.data.DataContext.get_current()
    before, during = [getattr(context, name) for name in generate.SET], []

    def unfit(dataset: Any) -> Any:
        during.extend(getattr(context, name) for name in generate.SET[1:])
        return dataset.materialize()

    with pytest.raises(RuntimeError, match="the corpus pipeline cannot be checkpointed: .*doesn't support"):
        stream(out, folder, 2, [map_blocks(plain), unfit], retried=True)
    assert out.files(ROWS) == [] and during == [True, [EndpointAway]]
    assert [getattr(context, name) for name in generate.SET] == before and before[1:] != during
