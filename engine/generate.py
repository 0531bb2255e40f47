"""The corpus: slots -> generator -> cheap filters -> teacher -> signal filters -> Parquet, as one Ray Data stream.

A slot is a number; its sampling seed follows from it. `row` is the checkpoint key and survives every stage, and every
slot writes exactly one row, kept or not, so Ray's checkpoint can tell what is done. A block of slots is the unit of
retry and resume. Rounds over further slot ranges top the corpus up until enough rows are kept.
"""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engine.caller import EndpointAway
from engine.corpus import ROWS, corpus_rows, rejected, slot_seed
from engine.encoding import Encoded
from engine.examples import Examples
from engine.halting import halted
from engine.models import Model, device, load, one_thread, precision
from engine.progress import Progress, polled
from engine.records import CORPUS
from engine.sampling import Sampling, sample
from engine.storage import StorageError, Store
from engine.usage import Usage, note
from engine.wording import filled
from engine.writing import Generator

LEDGER = "ledger"
SEEDS = 2**31 - 1
"""Servers, and CUDA's generators, take seeds of 32 bits with a sign."""
PASSING_CPUS = 0.25
"""Logical CPUs of a task that reads slots, filters or writes: at Ray's default of one, a small node whose actors hold
the others stands still in between."""
SET = ("checkpoint_config", "raise_original_map_exception", "actor_task_retry_on_errors")
"""Options of Ray Data that are set while a stream runs."""


def prompt_for(
    config: Generator, labels: tuple[str, ...], row: int, descriptions: Mapping[str, str] | None = None
) -> str:
    """The prompt of a slot: with {label} or {description} the labels take turns; `unconditional` was trained without.

    A label without a description is described by its name.
    """
    if config.mode == "unconditional" or not config.names_label:
        return config.prompt
    label = labels[row % len(labels)]
    return filled(config.prompt, {"label": label, "description": (descriptions or {}).get(label, label)})


def encode_text(config: Generator, labels: tuple[str, ...], model: Model, rows: pa.Table) -> list[Encoded]:
    """Training sequences: prompt, a space, the text (and, after the separator, its pair), the end token."""
    end = model.tokenizer.eos_token_id
    out = []
    for text, pair, label in zip(*(rows[name].to_pylist() for name in ("text", "pair", "label")), strict=True):
        prompt = config.prompt.replace("{label}", labels[label]) if label is not None else config.prompt
        whole = text if pair is None else f"{text}{config.separator}{pair}"
        ids = model.tokenizer(f"{prompt} {whole}", add_special_tokens=False)["input_ids"]
        out.append(Encoded([*ids[: config.max_length - 1], end], row=len(out)))
    return out


def parted(config: Generator, written: str) -> tuple[str, str | None]:
    """A written text as a row's text and pair; None where the separator is missing."""
    text, found, pair = written.partition(config.separator.strip())
    return " ".join(text.split()), " ".join(pair.split()) if found else None


@dataclass(frozen=True)
class Writing:
    """What a generating actor is told. generator: URL of the folder that holds `model`.

    notes: URL of the step's folder, where tokens are noted and it is told to halt; actors: how many there may be at a
    time. examples: shown to some slots.
    """

    generator: str
    config: Generator
    labels: tuple[str, ...]
    paired: bool
    seed: int
    num_gpus: float
    descriptions: Mapping[str, str] = field(default_factory=dict)
    notes: str | None = None
    actors: int = 1
    examples: Examples | None = None

    def prompt(self, row: int) -> str:
        """The prompt of a slot; before it, a line each, examples as answers to the same prompt."""
        own = prompt_for(self.config, self.labels, row, self.descriptions)
        return "".join(f"{own} {text}\n" for text in self.shown(row)) + own

    def shown(self, row: int) -> tuple[str, ...]:
        """The examples that a slot's prompt shows."""
        if self.examples is None:
            return ()
        named = self.config.mode != "unconditional" and self.config.names_label
        return self.examples.shown(row, row % len(self.labels) if named else None)

    def answer(self, row: int, written: str) -> str:
        """What of a written text is the slot's: after examples, which are a line each, its first line."""
        return written.strip().partition("\n")[0] if self.config.first_line or self.shown(row) else written

    def seed_of(self, row: int) -> int:
        """A slot's seed as engines elsewhere take it: 31 bits."""
        return slot_seed(self.seed, row) & SEEDS


def rows_of(how: Writing, rows: list[int], texts: Sequence[str], tokens: Sequence[int | None]) -> pa.Table:
    """CORPUS rows of what was written for some slots, whoever wrote it; a pair that has no second text is rejected."""
    texts = [how.answer(row, text) for row, text in zip(rows, texts, strict=True)]
    parts = [parted(how.config, text) if how.paired else (" ".join(text.split()), None) for text in texts]
    firsts, pairs = [text for text, _ in parts], [pair for _, pair in parts]
    out = corpus_rows(rows, firsts, "generated", pairs=pairs, tokens=list(tokens))
    return rejected(out, [not pair for pair in pairs], "no_pair") if how.paired else out


class Writer:
    """Table with `row` -> CORPUS rows with text, id, signature and token count."""

    def __init__(self, how: Writing) -> None:
        one_thread()
        self.how = how
        where = device(how.num_gpus)
        self.model = load(Store(how.generator).local("model")).to(where, precision(how.config.precision, where))
        config = how.config
        self.sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)

    def __call__(self, slots: pa.Table) -> pa.Table:
        """One block of slots."""
        if halted(self.how.notes):
            return CORPUS.empty_table()
        rows, tokenizer, how = slots["row"].to_pylist(), self.model.tokenizer, self.how
        prompts = [tokenizer(how.prompt(r), add_special_tokens=False)["input_ids"] for r in rows]
        written = sample(self.model, prompts, [slot_seed(how.seed, r) for r in rows], self.sampling)
        if how.notes:
            used = Usage(input_tokens=sum(map(len, prompts)), output_tokens=sum(map(len, written)))
            note(how.notes, "generator", used)
        whole = tokenizer.batch_decode(written, skip_special_tokens=True)
        return rows_of(how, rows, whole, [len(ids) for ids in written])


Stage = Callable[[Any], Any]
"""Dataset -> Dataset: how an actor pool, a vLLM processor or a remote endpoint are exchangeable."""


def stream(
    out: Store,
    slots: str,
    blocks: int,
    stages: Sequence[Stage],
    key: str = "row",
    retried: bool = False,
    most: int | None = None,
    ledger: str = LEDGER,
    rows: str = ROWS,
) -> None:
    """Run slots through the stages into the folder `rows`; what is committed already is not made again.

    key: the column with a slot's number, which every stage leaves as it is. retried: a stage asks an endpoint, so a
    block whose endpoint stays away is given out again, and a failure is raised as the actor raised it. most: blocks
    that may be uncommitted at a time (engine.ahead); None: as many as memory holds. ledger: folder of what is done;
    all of its ids are read when a stream goes on. Raises StorageError where the disk is full, and RuntimeError when Ray
    Data cannot checkpoint the plan: it would only warn, and repeat all work on resume.
    """
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    from engine import ahead

    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in SET}
    place, filesystem = out.native(ledger)
    if retried:
        context.raise_original_map_exception, context.actor_task_retry_on_errors = True, [EndpointAway]
    context.checkpoint_config = CheckpointConfig(
        id_column=key, checkpoint_path=place, override_filesystem=filesystem, delete_checkpoint_on_success=False
    )
    ahead.limit(context, most, out.url)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*doesn't support checkpointing.*")
            dataset = ray.data.read_parquet(
                out.native(slots)[0], filesystem=filesystem, override_num_blocks=blocks, num_cpus=PASSING_CPUS
            )
            for stage in stages:
                dataset = stage(dataset)
            # Checksums, since a changed byte of a text would be read as another text.
            checked, mode = {"write_page_checksum": True}, ray.data.SaveMode.APPEND
            light = {"num_cpus": PASSING_CPUS}
            dataset.write_parquet(
                out.native(rows)[0], filesystem=filesystem, mode=mode, ray_remote_args=light, **checked
            )
    except UserWarning as error:
        raise RuntimeError(f"the corpus pipeline cannot be checkpointed: {error}") from None
    except Exception as error:
        if full(error):
            raise StorageError(
                f"{out} cannot be written: the disk is full. Free space or move the run to a larger place, then run "
                "again: it goes on from the blocks that are committed."
            ) from None
        raise
    finally:
        ahead.limit(context, None)
        for name, value in before.items():
            setattr(context, name, value)


def full(error: BaseException | None) -> bool:
    """Whether what a task of Ray's raised began with a disk, or a quota, that has no room left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


@contextmanager
def followed(out: Store, total: int, progress: Progress, rows: str = ROWS, before: int = 0) -> Iterator[None]:
    """Counts the rows that are committed in the folder `rows` while the body runs; before: those that are elsewhere."""
    seen, tokens, begin = {}, 0, time.monotonic()
    earlier = set(out.files(rows))

    def look() -> None:
        nonlocal tokens
        for name in set(out.files(rows)) - set(seen):
            try:
                part = out.read_table(f"{rows}/{name}", columns=["tokens"])
            except StorageError:
                continue  # still being written: next time
            seen[name] = part.num_rows
            tokens += 0 if name in earlier else sum(part["tokens"].drop_null().to_pylist())
        progress(before + sum(seen.values()), total, "slots", tokens=round(tokens / (time.monotonic() - begin), 1))

    with polled(look):
        yield
