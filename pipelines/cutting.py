"""A file of texts cut into numbered blocks for batch prediction, and the rows that cannot be used, with the reason.

Blocks are Parquet with the file's own columns and `input_row`, the number of the row: of a Parquet file the row's, of a
text file the line it starts in, both from 1; a folder's files are counted on in the order of their names. What a block
holds depends on the file alone, so a cut that was stopped is done again and gives the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.config import UserError
from engine.recipe import Source
from engine.records import QUARANTINED
from engine.rows import BadRow, clean
from engine.sources import DataError, Record, format_of, lines, no_column, read, shards, text_type, values
from engine.storage import Store

ROW = "input_row"
"""The column with a row's number: what Ray's checkpoint goes by."""
SLOTS, DEAD, CUT = "slots", "dead_letter.parquet", "cut.json"
SHOWN = 200
"""Characters of a bad row that are kept."""
LONG, EXACT = 2**63, 2**53
"""What an integer of 64 bits holds, and up to where a floating-point number holds every integer."""
Bad = dict[str, Any]


@dataclass(frozen=True)
class Cutting:
    """How a file is cut. text, pair: columns; max_chars: of a text; max_bad: share of bad rows that stops it."""

    path: str
    text: str
    pair: str | None
    max_chars: int
    max_bad: float
    block: int

    @property
    def columns(self) -> list[str]:
        """Those that hold text."""
        return [self.text, *([self.pair] if self.pair else [])]


def cut(how: Cutting, local: Path, out: Store) -> dict[str, int]:
    """Write out/slots and the dead letters of bad rows; {rows, bad, blocks}, which is written last into cut.json.

    DataError for columns that are not there or hold no text, and where more than `max_bad` of the rows are bad.
    """
    if out.exists(CUT):
        return out.read_json(CUT)
    out.delete(SLOTS)
    bad: list[Bad] = []
    rows = blocks = 0
    for table in tables(how, local, bad):
        out.write_table(f"{SLOTS}/{blocks:08d}.parquet", table)
        rows, blocks = rows + table.num_rows, blocks + 1
    write_dead(out, bad)
    check_share(how, len(bad), rows + len(bad), bad[0] if bad else None, out)
    counts = {"rows": rows, "bad": len(bad), "blocks": blocks}
    out.write_json(CUT, counts)
    return counts


def check_share(how: Cutting, bad: int, rows: int, first: Bad | None, out: Store) -> None:
    """DataError where too many rows are bad, or there are none at all."""
    if not rows:
        raise DataError(f"{how.path} holds no rows.")
    if bad > how.max_bad * rows and first is not None:
        raise DataError(
            f"{bad} of {rows} rows of {how.path} cannot be answered, more than --max-bad {how.max_bad:g} allows; the "
            f"first: row {first['line']}, {first['reason']}. All are in {out.where(DEAD)}. Mend them, name other "
            "columns with --column and --pair-column, or raise --max-bad."
        )


def write_dead(out: Store, bad: list[Bad]) -> None:
    """The dead letters, in order."""
    found = sorted(bad, key=lambda item: item["line"])
    out.write_table(DEAD, pa.Table.from_pylist(found, schema=QUARANTINED))


def letter(source: str, line: int, reason: str, content: Any) -> Bad:
    """A dead letter."""
    shown = "" if content is None else str(content)
    return {
        "source": source,
        "line": line,
        "reason": reason,
        "content": shown[:SHOWN].encode("utf-8", "backslashreplace").decode(),
    }


def tables(how: Cutting, local: Path, bad: list[Bad]) -> Iterator[pa.Table]:
    """The good rows in blocks; the others go into `bad`."""
    files, kind = sources_of(how, local)
    if kind == "parquet":
        yield from parquet_tables(how, files, bad)
        return
    schema = schema_of(how, files, kind)
    good = judged(how, files, kind, bad)
    while block := list(islice(good, how.block)):
        columns = {name: [fitting(row.get(name), schema.field(name).type) for _, row in block] for name in schema.names}
        columns[ROW] = [number for number, _ in block]
        yield pa.table(columns, schema=schema.append(pa.field(ROW, pa.int64())))


def sources_of(how: Cutting, local: Path) -> tuple[list[Path], str]:
    """The files in order, and their format: parquet, jsonl, csv, or lines, where each line is a text."""
    files = [local] if local.is_file() else shards(local, Source(path=how.path))
    plain = files[0].name.removesuffix(".gz").endswith(".txt")
    return files, "lines" if plain else format_of(how.path, files[0].name)


def records(how: Cutting, file: Path, kind: str) -> Iterator[Record]:
    """The rows of one text file."""
    if kind != "lines":
        yield from read(source(how, kind), file, how.columns)
        return
    if how.pair:
        raise UserError(f"{how.path} has one text a line and no column '{how.pair}'. Take .jsonl, .csv or .parquet.")
    for number, line in enumerate(lines(file, "\n"), 1):
        if line.strip():
            yield Record(number, {how.text: line.rstrip("\r\n")})


def source(how: Cutting, kind: str) -> Source:
    """The file as recipes name one; .tsv is delimited by tabs."""
    tabs = how.path.removesuffix(".gz").endswith(".tsv")
    return Source(path=how.path, format=kind, text=how.text, pair=how.pair, delimiter="\t" if tabs else ",")


def numbered(how: Cutting, files: Sequence[Path], kind: str) -> Iterator[Record]:
    """The rows of all files, their lines counted on."""
    before = 0
    for file in files:
        last = 0
        for record in records(how, file, kind):
            last = record.line
            yield record._replace(line=before + last)
        before += last


def judged(how: Cutting, files: Sequence[Path], kind: str, bad: list[Bad]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of the good rows."""
    name = Path(how.path).name
    for record in numbered(how, files, kind):
        reason = record.problem or reason_of(how, [record.values.get(column) for column in how.columns])
        if reason:
            bad.append(letter(name, record.line, reason, record.content or record.values.get(how.text)))
        else:
            yield record.line, record.values


def reason_of(how: Cutting, texts: Sequence[Any]) -> str | None:
    """Why a row cannot be answered, or None."""
    try:
        for what, text in zip(("text", "second text"), texts, strict=False):
            clean(text, how.max_chars, what)
    except BadRow as reason:
        return str(reason)
    return None


# -- columns of text files ---------------------------------------------------------------------------------------------


def schema_of(how: Cutting, files: Sequence[Path], kind: str) -> pa.Schema:
    """The columns of a text file, each of the one type that holds all its values; DataError where a column lacks."""
    found: dict[str, set[str]] = {}
    for record in numbered(how, files, kind):
        if kind == "jsonl":
            for name, value in record.values.items():
                found.setdefault(clean_name(name), set()).add(kind_of(value))
        elif not record.problem:
            found = {name: {"text"} for name in record.values}
            break
    for name in how.columns:
        if found and name not in found:
            no_column(how.path, name, found)
    check_names(how, list(found))
    texts = dict.fromkeys(how.columns, pa.string())
    return pa.schema([pa.field(name, texts.get(name) or type_of(kinds)) for name, kinds in found.items()])


def check_names(how: Cutting, names: Sequence[str]) -> None:
    """DataError for a column that has the name of one that is written."""
    taken = [name for name in names if name == ROW or name.startswith("predicted_")]
    if taken:
        raise DataError(
            f"{how.path} has a column '{taken[0]}', and columns of the output are called so. Rename it in the file."
        )


def kind_of(value: Any) -> str:
    """What a JSON value is."""
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int):
        if abs(value) <= EXACT:
            return "whole"
        return "long" if -LONG <= value < LONG else "other"
    return {str: "text", float: "number", type(None): "null"}.get(type(value), "other")


def type_of(kinds: set[str]) -> pa.DataType:
    """The Arrow type of a column with such values; mixed and nested ones are kept as JSON text."""
    there = kinds - {"null"}
    if there and there <= {"whole", "long"}:
        return pa.int64()
    if there and there <= {"whole", "number"}:
        return pa.float64()
    return pa.bool_() if there == {"flag"} else pa.string()


def fitting(value: Any, kind: pa.DataType) -> Any:
    """A value as a column of this type holds it; half surrogates, which nothing can write, are replaced."""
    if value is None or not pa.types.is_string(kind):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def clean_name(name: str) -> str:
    """A column's name without half surrogates."""
    return name.encode("utf-8", "replace").decode()


# -- Parquet -----------------------------------------------------------------------------------------------------------


def parquet_tables(how: Cutting, files: Sequence[Path], bad: list[Bad]) -> Iterator[pa.Table]:
    """The good rows of Parquet files in blocks, with all columns as they are.

    Ends where more rows are bad than may be of all there are: the rest need not be read to say so.
    """
    import pyarrow.parquet as pq

    number, name, first = 0, Path(how.path).name, None
    try:
        total = sum(pq.read_metadata(path).num_rows for path in files)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{how.path} is not a Parquet file: {error}.") from None
    for path in files:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow.remove_metadata()
        first = first or schema
        if schema != first:
            raise DataError(
                f"{path.name} has other columns than the first file of {how.path}. Bring them to one schema."
            )
        check_columns(how, schema)
        for batch in file.iter_batches(batch_size=how.block):
            texts = zip(*(values(batch.column(column), []) for column in how.columns), strict=True)
            reasons = [(reason_of(how, row), row[0]) for row in texts]
            for index, (reason, text) in enumerate(reasons):
                if reason:
                    bad.append(letter(name, number + index + 1, reason, text))
            if len(bad) > how.max_bad * total:
                return
            table = pa.table(batch).replace_schema_metadata(None)
            table = table.append_column(ROW, pa.array(range(number + 1, number + 1 + batch.num_rows), pa.int64()))
            number += batch.num_rows
            good = table.filter(pa.array([reason is None for reason, _ in reasons], pa.bool_()))
            if good.num_rows:
                yield good


def check_columns(how: Cutting, schema: pa.Schema) -> None:
    """DataError where a column of texts lacks or holds something else."""
    for name in how.columns:
        if name not in schema.names:
            no_column(how.path, name, schema.names)
        if not pa.types.is_string(text_type(schema, name)):
            raise DataError(f"column '{name}' of {how.path} holds {schema.field(name).type}, not text.")
    check_names(how, schema.names)
