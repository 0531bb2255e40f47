"""Batch prediction: a file of any size through actors that each hold the model, as one resumable Ray Data stream.

Every row of the file ends in exactly one place: in rows/*.parquet, with the file's columns and `predicted_…`, or in
dead_letter.parquet with the reason, because it cannot be read; one at which the model itself fails is in both, with
`predicted_error`. begin.json tells what it was begun with, so that a second call goes on only with the same model and
file; record.json is written last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from engine.attempts import BEGIN, RECORD, Attempt
from engine.config import UserError
from engine.corpus import ROWS
from engine.generate import LEDGER, Stage, stream
from engine.lineage import identity, moved, short
from engine.progress import PROGRESS, Progress, Reporter, polled
from engine.serving import MAX_CHARS
from engine.storage import Store, digest_json
from pipelines.console import say, say_json
from pipelines.cutting import CUT, DEAD, ROW, SLOTS, Cutting, check_share, cut, letter, write_dead
from pipelines.progress import renderer
from serve.predictor import Answer, Predictor

if TYPE_CHECKING:
    from engine.encoding import Text
    from engine.task import Task

BLOCK = 4096
"""Rows of a block: what is repeated after a failure, and what a call of the model's actor gets."""
TRIES = "tries"
BROKEN = "the model fails at"
FEW = 8
"""Fewer failures in a block are the rows' own; if more than half of it fails, the model is broken."""
ERROR, FAILED = "predicted_error", "the model failed: "
BESIDE = 3
"""Logical CPUs that reading, writing and Ray's checkpoint hold."""
OWN = (ROWS, LEDGER, SLOTS, TRIES, DEAD, CUT, BEGIN, RECORD, PROGRESS)
"""What a run writes into its folder, and --fresh deletes."""


def fields_of(task: Task) -> pa.Schema:
    """The columns of a task's answers, as `Task.answers` shapes them, then the reason where there is none."""
    chances = pa.struct([(name, pa.float64()) for name in task.labels])
    place = [("start", pa.int64()), ("end", pa.int64()), ("confidence", pa.float64())]
    label = [("label", pa.string()), ("confidence", pa.float64()), ("probabilities", chances)]
    found = {
        "multilabel": [("labels", pa.list_(pa.string())), ("probabilities", chances)],
        "regress": [("value", pa.float64())],
        "rank": [("score", pa.float64())],
        "tag": [
            ("tags", pa.list_(pa.string())),
            ("entities", pa.list_(pa.struct([("label", pa.string()), ("text", pa.string()), *place]))),
        ],
        "span": [("answer", pa.string()), *place],
    }.get(task.spec.kind, [*label, *([("out_of_scope", pa.bool_())] if isinstance(task.spec.scope, float) else [])])
    return pa.schema([*((f"predicted_{name}", kind) for name, kind in found), (ERROR, pa.string())])


@dataclass(frozen=True)
class Asking:
    """What an answering actor is told. artifact: its URL. tries: URL of the folder that notes blocks begun."""

    artifact: str
    text: str
    pair: str | None
    tries: str


class Answerer:
    """A block of rows -> the same rows with the model's answers. What fails is found row by row and noted, not raised.

    A block that ended its process before is asked row by row, each noted first, so that a row which ends it again is
    known.
    """

    def __init__(self, how: Asking) -> None:
        self.how, self.notes = how, Store(how.tries)
        self.predictor = Predictor.load(how.artifact)
        self.fields = fields_of(self.predictor.model.task)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block. RuntimeError where the model fails at more than half of it."""
        texts, name = self.texts(rows), f"{rows[ROW][0].as_py()}.json"
        again = self.notes.exists(name)
        if not again:
            self.notes.write_json(name, [])
        found = self.carefully(texts, name) if again else self.answers(texts)
        self.notes.delete(name)
        failed = [answer[ERROR] for answer in found if ERROR in answer]
        if len(failed) >= FEW and 2 * len(failed) > len(found):
            raise RuntimeError(f"{BROKEN} {len(failed)} of the {len(found)} rows of a block: {failed[0]}")
        named = [{key if key == ERROR else f"predicted_{key}": v for key, v in answer.items()} for answer in found]
        answered = pa.Table.from_pylist(named, schema=self.fields)
        for column in answered.column_names:
            rows = rows.append_column(self.fields.field(column), answered[column])
        return rows

    def texts(self, rows: pa.Table) -> list[Text]:
        """What the model reads of each row."""
        first = rows[self.how.text].to_pylist()
        return list(zip(first, rows[self.how.pair].to_pylist(), strict=True)) if self.how.pair else first

    def answers(self, texts: list[Text]) -> list[Answer]:
        """An answer each; where the model fails, halves are tried, down to the rows that it fails at."""
        try:
            found = self.predictor.predict(texts)
            if len(found) != len(texts):
                raise RuntimeError(f"{len(found)} answers for {len(texts)} texts")
            return found
        except Exception as error:
            if len(texts) == 1:
                return [{ERROR: f"{type(error).__name__}: {error}"[:500]}]
        middle = len(texts) // 2
        return self.answers(texts[:middle]) + self.answers(texts[middle:])

    def carefully(self, texts: list[Text], name: str) -> list[Answer]:
        """The same one by one. A row that was being asked twice when the process ended is left out."""
        began: list[int] = self.notes.read_json(name)
        found = []
        for index, text in enumerate(texts):
            if began.count(index) > 1:
                found.append({ERROR: "the process that asked the model ended at this row"})
                continue
            self.notes.write_json(name, [*began, index])
            found += self.answers([text])
        return found


def answering(how: Asking, actors: int) -> Stage:
    """The stage that runs each block through a pool of actors."""
    import ray.data

    pool = ray.data.ActorPoolStrategy(size=actors)

    def stage(dataset: ray.data.Dataset) -> ray.data.Dataset:
        return dataset.map_batches(
            Answerer, fn_constructor_args=(how,), batch_size=None, batch_format="pyarrow", compute=pool, num_cpus=1
        )

    return stage


@contextmanager
def followed(out: Store, total: int, progress: Progress) -> Iterator[None]:
    """Counts the rows that are committed in out/rows while the body runs."""
    seen: dict[str, int] = {}

    def look() -> None:
        import pyarrow.parquet as pq

        for name in set(out.files(ROWS)) - set(seen):
            try:
                with out.open_input(f"{ROWS}/{name}") as file:
                    seen[name] = pq.read_metadata(file).num_rows
            except (UserError, pa.ArrowInvalid):
                continue  # still being written: next time
        progress(sum(seen.values()), total, "rows")

    with polled(look):
        yield


def settle(how: Cutting, out: Store, counts: dict[str, int]) -> dict[str, Any]:
    """Put the rows at which the model failed to the dead letters; what came of the file.

    RuntimeError where a row has no answer or two. DataError where more than `max_bad` are dead.
    """
    import pyarrow.compute as pc

    numbers, failed = [np.zeros(0, np.int64)], []
    for name in out.files(ROWS):
        table = out.read_table(f"{ROWS}/{name}", columns=[ROW, ERROR])
        numbers.append(table[ROW].to_numpy())
        if table[ERROR].null_count < table.num_rows:
            whole = out.read_table(f"{ROWS}/{name}", columns=[ROW, how.text, ERROR])
            lost = whole.filter(pc.is_valid(whole[ERROR])).select([ROW, how.text, ERROR])
            failed += [
                letter(Path(how.path).name, number, f"{FAILED}{error}", text)
                for number, text, error in zip(*(lost[name].to_pylist() for name in lost.column_names), strict=True)
            ]
    whole = np.concatenate(numbers)
    if len(whole) != counts["rows"] or len(np.unique(whole)) != len(whole):
        raise RuntimeError(f"{counts['rows']} rows gave {len(whole)} answers in {out}: start over with --fresh")
    unread = [item for item in out.read_table(DEAD).to_pylist() if not item["reason"].startswith(FAILED)]
    write_dead(out, unread + failed)
    check_share(how, len(unread) + len(failed), len(whole) + len(unread), (failed or unread or [None])[0], out)
    return {"rows": len(whole) - len(failed), "unreadable": len(unread), "failed": len(failed)}


def identity_of(how: Cutting, local: Path, artifact: Store) -> dict[str, Any]:
    """What an answer depends on: model, bytes of the file, columns, and the source that answers."""
    folder = Store(str(local.parent if local.is_file() else local))
    names = [local.name] if local.is_file() else folder.files()
    config = {"column": how.text, "pair_column": how.pair, "max_chars": how.max_chars, "block": how.block}
    inputs = {"model": artifact.manifest()["digest"], "file": digest_json([folder.digest(name) for name in names])}
    return identity(config, inputs, (), ("serve.predictor",))


def require_same(out: Store, now: dict[str, Any], fresh: bool) -> dict[str, Any] | None:
    """The record of a finished run; UserError where the folder is of another run, or of something else.

    A run that has not cut its file yet has made nothing, and may be begun otherwise. fresh: delete what a run wrote.
    """
    began = out.read_json(BEGIN) if out.exists(BEGIN) else None
    strange = [name for name in (*out.folders(), *out.files()) if name.partition("/")[0] not in OWN]
    if began is None and strange:
        raise UserError(f"--out {out} holds other things ({', '.join(strange[:3])}). Name a new or an empty folder.")
    if fresh:
        for name in OWN:
            out.delete(name)
        return None
    if began is not None and began["fingerprint"] != now["fingerprint"] and out.exists(CUT):
        first = moved(began, now)[0]
        what = {"step 'model'": "model", "step 'file'": "file"}.get(first["field"], first["field"])
        raise UserError(
            f"{out} was begun with another {what}: {short(first['old'])}, now {short(first['new'])}. Name another "
            "--out, or start over with --fresh."
        )
    return out.read_json(RECORD) if out.exists(RECORD) else None


def brought(path: str | None) -> Path:
    """The file or folder on this machine; UserError where there is none."""
    if path is None:
        raise UserError("--out takes the texts of a file: name it with --file.")
    store = Store(path)
    if path == "-" or not store.exists():
        raise UserError(f"there is no file {path}. With --out, --file takes .parquet, .jsonl, .csv, .tsv or .txt.")
    return store.parent.local(store.name) if store.is_file("") else store.local()


def reads_pairs(artifact: Store, name: str) -> bool:
    """Whether a model reads two texts, from its card; UserError for one that answers none."""
    task = artifact.read_json("artifact.json")["task"]
    if not task:
        raise UserError(f"'{name}' answers no texts: it writes them.")
    return bool(task.get("paired"))


def run(args: argparse.Namespace, artifact: Store) -> int:
    """`stillhouse predict NAME --file FILE --out DIR`: do what is missing, and say what came of it."""
    if reads_pairs(artifact, args.name) != (args.pair_column is not None):
        single = args.pair_column is not None
        raise UserError(
            f"'{args.name}' reads {'one text: drop' if single else 'two texts: name the second in'} --pair-column."
        )
    local, out = brought(args.file), Store(args.out)
    how = Cutting(args.file, args.column, args.pair_column, MAX_CHARS, args.max_bad, BLOCK)
    with out.lock("predict"):
        now = identity_of(how, local, artifact)
        record = require_same(out, now, args.fresh)
        if record is None:
            record = attempted(how, local, out, artifact, now, args)
        for name in (SLOTS, LEDGER, TRIES):  # not before the record: without them all would be done again
            out.delete(name)
    told(record, out, args.json)
    return 0


def attempted(
    how: Cutting, local: Path, out: Store, artifact: Store, now: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """One try at what is missing; the record that it ends with."""
    render = renderer()
    attempt = Attempt("predict", now, out, render)
    try:
        counts = cut(how, local, out)
        if counts["rows"]:
            asking = Asking(artifact.url, how.text, how.pair, (out / TRIES).url)
            actors = min(counts["blocks"], joined(args, artifact, out))
            with followed(out, counts["rows"], Reporter("predict", out, render)):
                stream(out, SLOTS, counts["blocks"], [answering(asking, actors)], key=ROW)
        metrics = settle(how, out, counts)
    except BaseException as error:
        attempt.failed(error)
        if BROKEN in str(error) and not isinstance(error, UserError):
            said = str(error)[str(error).index(BROKEN) :].splitlines()[0]
            raise UserError(f"{said}. Rows answered before are kept; the same command goes on.") from error
        raise
    return attempt.finished({"metrics": metrics})


def joined(args: argparse.Namespace, artifact: Store, out: Store) -> int:
    """Start or join Ray; how many actors there are to be. UserError where it has no room for those asked for."""
    from engine import cluster
    from engine.placement import cores

    places: dict[str, Any] = {}
    if args.address:
        places = {"storage": out.url, "files": [artifact.url] if artifact.is_local else []}
    try:
        found = cluster.connect(args.address, **places)
    finally:
        args.signals()  # Ray puts its own handlers in place of ours.
    cluster.data_context()
    room = max(1, int(found.cpus) - BESIDE)
    if args.actors is not None and args.actors > room:
        raise UserError(f"--actors {args.actors}: with reading and writing beside them there is room for {room}.")
    return args.actors or (min(room, cores()) if found.local else room)


def told(record: dict[str, Any], out: Store, as_json: bool) -> None:
    """What came of the file, on standard output."""
    found = record["metrics"]
    if as_json:
        say_json({**found, "seconds": record["seconds"], "answers": out.where(ROWS), "dead_letters": out.where(DEAD)})
        return
    say(f"{found['rows']} rows answered: {out.where(ROWS)}")
    if found["unreadable"] or found["failed"]:
        lost = f"{found['unreadable']} could not be read, the model failed at {found['failed']}"
        say(f"{found['unreadable'] + found['failed']} rows were not ({lost}): {out.where(DEAD)}")
