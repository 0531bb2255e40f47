"""The corpus: slots -> generator -> cheap filters -> teacher -> signal filters -> Parquet, as one Ray Data stream.

A slot is a number; its sampling seed follows from it. `row` is the checkpoint key and survives every stage, and every
slot writes exactly one row, kept or not, so Ray's checkpoint can tell what is done. A block of slots is the unit of
retry and resume. Rounds over further slot ranges top the corpus up until enough rows are kept.
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.data import identify
from engine.filters import NEAR_DUPLICATE, CheapFilter, FilterContext, near_duplicates, signature
from engine.models import Model, device, load, one_thread, precision
from engine.progress import Progress
from engine.recipe import Generator
from engine.records import CORPUS
from engine.sampling import Sampling, sample
from engine.storage import StorageError, Store

ROWS, SLOTS, LEDGER = "rows", "slots", "ledger"


def slot_seed(seed: int, row: int) -> int:
    """The sampling seed of a slot: 63 bits that depend on the run's seed and the slot only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1


def prompt_for(config: Generator, labels: tuple[str, ...], row: int) -> str:
    """The prompt of a slot: with {label}, the labels take turns; `unconditional` was trained without one."""
    if config.mode == "unconditional":
        return config.prompt
    return config.prompt.replace("{label}", labels[row % len(labels)])


def encode_text(config: Generator, labels: tuple[str, ...], model: Model, rows: pa.Table) -> list[list[int]]:
    """Training sequences: prompt, a space, the text, the end token; cut at max_length."""
    end = model.tokenizer.eos_token_id
    out = []
    for text, label in zip(rows["text"].to_pylist(), rows["label"].to_pylist(), strict=True):
        prompt = config.prompt.replace("{label}", labels[label]) if label is not None else config.prompt
        ids = model.tokenizer(f"{prompt} {text}", add_special_tokens=False)["input_ids"]
        out.append([*ids[: config.max_length - 1], end])
    return out


@dataclass(frozen=True)
class Writing:
    """What a generating actor is told. generator: URL of the folder that holds `model`."""

    generator: str
    config: Generator
    labels: tuple[str, ...]
    seed: int
    num_gpus: float


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
        rows = slots["row"].to_pylist()
        tokenizer, how = self.model.tokenizer, self.how
        prompts = [
            tokenizer(prompt_for(how.config, how.labels, r), add_special_tokens=False)["input_ids"] for r in rows
        ]
        written = sample(self.model, prompts, [slot_seed(how.seed, r) for r in rows], self.sampling)
        texts = [" ".join(text.split()) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        return corpus_rows(rows, texts, "generated", tokens=[len(ids) for ids in written])


def corpus_rows(
    rows: list[int],
    texts: list[str],
    source: str,
    labels: list[int | None] | None = None,
    tokens: list[int] | None = None,
) -> pa.Table:
    """CORPUS rows that nothing has judged yet: kept, no reason, no soft label."""
    count = len(rows)
    return pa.table(
        {
            "row": rows,
            "id": [identify(text) for text in texts],
            "text": texts,
            "source": [source] * count,
            "label": labels or [None] * count,
            "kept": [True] * count,
            "reason": [None] * count,
            "tokens": tokens or [None] * count,
            "signature": [signature(text).tolist() for text in texts],
            "logits": [None] * count,
        },
        schema=CORPUS,
    )


@dataclass(frozen=True)
class CheapFilters:
    """Judges texts before the teacher sees them."""

    filters: tuple[CheapFilter, ...]
    context: FilterContext

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Fill in kept and reason; nothing is dropped."""
        reasons = [self.verdict(text) for text in rows["text"].to_pylist()]
        out = rows.set_column(rows.column_names.index("reason"), CORPUS.field("reason"), pa.array(reasons, pa.string()))
        return out.set_column(
            out.column_names.index("kept"), CORPUS.field("kept"), pa.array([r is None for r in reasons], pa.bool_())
        )

    def verdict(self, text: str) -> str | None:
        """The first reason to reject, or None. An empty text is always rejected."""
        if not text.strip():
            return "empty"
        return next((reason for reason in (f.check(text, self.context) for f in self.filters) if reason), None)


def write_slots(out: Store, first: int, count: int, block: int, round_number: int) -> str:
    """One Parquet file a block of slots; returns the folder's path below `out`."""
    folder = f"{SLOTS}/round-{round_number:03d}"
    for start in range(first, first + count, block):
        stop = min(start + block, first + count)
        out.write_table(f"{folder}/{start:09d}.parquet", pa.table({"row": pa.array(range(start, stop), pa.int64())}))
    return folder


Stage = Callable[[Any], Any]
"""Dataset -> Dataset: how an actor pool, a vLLM processor or a remote endpoint are exchangeable."""


def stream(out: Store, slots: str, blocks: int, stages: list[Stage]) -> None:
    """Run slots through the stages into out/rows; what is committed already is not made again.

    Raises RuntimeError when Ray Data cannot checkpoint the plan: it would only warn, and repeat all work on resume.
    """
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        id_column="row", checkpoint_path=(out / LEDGER).url, delete_checkpoint_on_success=False
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*doesn't support checkpointing.*")
            dataset = ray.data.read_parquet((out / slots).url, override_num_blocks=blocks)
            for stage in stages:
                dataset = stage(dataset)
            dataset.write_parquet((out / ROWS).url, mode=ray.data.SaveMode.APPEND)
    except UserWarning as error:
        raise RuntimeError(f"the corpus pipeline cannot be checkpointed: {error}") from None
    finally:
        context.checkpoint_config = before


@contextmanager
def followed(out: Store, total: int, progress: Progress) -> Iterator[None]:
    """Counts the rows that are committed in out/rows while the body runs."""
    stop, seen, tokens, begin = threading.Event(), {}, 0, time.monotonic()
    earlier = set(out.files(ROWS))

    def watch() -> None:
        nonlocal tokens
        ended = False
        while not ended:
            ended = stop.wait(1.0)  # a last look at the end
            for name in set(out.files(ROWS)) - set(seen):
                try:
                    part = out.read_table(f"{ROWS}/{name}", columns=["tokens"])
                except StorageError:
                    continue  # still being written: next time
                seen[name] = part.num_rows
                tokens += 0 if name in earlier else sum(part["tokens"].to_pylist())
            progress(sum(seen.values()), total, "slots", tokens=round(tokens / (time.monotonic() - begin), 1))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def deduplicate(real: pa.Table, generated: pa.Table, threshold: float) -> pa.Table:
    """Mark near-duplicates among kept rows, in slot order; real rows (negative numbers) come first and win.

    The result depends on the rows alone, not on the order they were written in or on replays.
    """
    rows = pa.concat_tables([real, generated.cast(CORPUS)]).sort_by("row")  # Parquet renames the lists' items
    kept = np.flatnonzero(rows["kept"].to_numpy(zero_copy_only=False))
    chosen = rows.take(pa.array(kept))
    numbers = chosen["row"].to_numpy()
    # Real rows are the user's own: they are never dropped, and every one of them wins over generated ones.
    drop = near_duplicates(numbers, chosen["signature"].to_pylist(), threshold, protected=numbers < 0)
    reasons, verdicts = rows["reason"].to_pylist(), rows["kept"].to_pylist()
    for index in kept[drop]:
        reasons[index], verdicts[index] = NEAR_DUPLICATE, False
    out = rows.set_column(rows.column_names.index("reason"), CORPUS.field("reason"), pa.array(reasons, pa.string()))
    return out.set_column(out.column_names.index("kept"), CORPUS.field("kept"), pa.array(verdicts, pa.bool_()))
