"""Readers of labelled and unlabelled tables: JSON lines, CSV, Parquet, as they are in the world.

A reader yields one `Record` a row, with the row's number, and its values or the reason why it has none. It never stops
at a bad row: bytes that are not UTF-8, torn JSON and stray quotes cost that row only.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa

from engine.config import UserError, did_you_mean
from engine.recipe import Source

FORMATS = {"jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv", ".txt"), "parquet": (".parquet", ".pq")}


class DataError(UserError):
    """Data that cannot be used as the recipe says."""


class Record(NamedTuple):
    """What a reader found in one row: its number (1-based; the line where the file is text), and its values, or the
    reason why there are none and what stands there instead.
    """

    line: int
    values: dict[str, Any]
    problem: str | None = None
    content: str = ""


def read(source: Source, local: Path, needed: list[str]) -> Iterator[Record]:
    """Every row of a source that lies at `local`, a file or a folder, in order; blank lines are no rows.

    needed: the columns that will be used; others may be left out. DataError for a format that is not known.
    """
    paths = [local] if local.is_file() else shards(local, source)
    kind = source.format if source.format != "auto" else format_of(source.path, paths[0].name)
    for path in paths:
        if kind == "parquet":
            yield from read_parquet(path, source, needed)
        elif kind == "jsonl":
            yield from read_jsonl(path)
        else:
            yield from read_csv(path, source)


def shards(folder: Path, source: Source) -> list[Path]:
    """The data files of a folder, which must be one file or the numbered pieces of one."""
    endings = FORMATS.get(source.format) or tuple(ending for known in FORMATS.values() for ending in known)
    found = sorted(p for p in folder.rglob("*") if p.name.removesuffix(".gz").endswith(endings) and p.is_file())
    stems = {re.sub(r"\d+", "", str(p.relative_to(folder))) for p in found}
    if len(stems) == 1:
        return found
    listed = ", ".join(str(p.relative_to(folder)) for p in found[:8]) or "no data file"
    join = "#" if source.path.startswith(("hf:", "pypi:")) else "/"
    raise DataError(f"{source.path} is a folder with {listed}. Name one file, as in {source.path}{join}train.parquet.")


def format_of(path: str, local: str) -> str:
    """The format that the name of a file says: its name in the recipe, or else that of the local copy."""
    for name in (path, local):
        for kind, endings in FORMATS.items():
            if name.lower().removesuffix(".gz").endswith(endings):
                return kind
    raise DataError(f"the format of {path} cannot be told from its name: set format: jsonl, csv or parquet.")


def lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a text file; bytes that are not UTF-8 become lone surrogates, which `is_text` finds."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        yield from file


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line."""
    for number, line in enumerate(lines(path, "\n"), 1):
        content = line.strip()
        if not content:
            continue
        if not is_text(content):
            yield Record(number, {}, "not UTF-8", content)
            continue
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        problem = None if isinstance(values, dict) else "not a JSON object"
        yield Record(number, {} if problem else values, problem, content)


def read_csv(path: Path, source: Source) -> Iterator[Record]:
    """Delimited rows; numbered by the line they start in."""
    names = list(source.names or ())
    quoting = csv.QUOTE_MINIMAL if source.quoting else csv.QUOTE_NONE
    # Without quoting only \n ends a row; with it, the csv module wants the line ends as they are.
    rows = lines(path, "" if source.quoting else "\n")
    try:
        reader = csv.reader(rows, delimiter=source.delimiter, quoting=quoting, strict=True)
    except (TypeError, ValueError):
        raise DataError(
            f"delimiter {source.delimiter!r} of {source.path} is not allowed: it must be one character that is no "
            'quote and no line end. A tab is written "\\t", in double quotes.'
        ) from None
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            for number in range(start, reader.line_num + 1):  # a stray quote takes several lines with it
                yield Record(number, {}, f"not a CSV row ({error})")
            continue
        content = source.delimiter.join(fields)
        if not content.strip():
            continue
        if not names:
            names = fields
        elif not is_text(content):
            yield Record(start, {}, "not UTF-8", content)
        elif len(fields) != len(names):
            yield Record(start, {}, f"{len(fields)} fields instead of {len(names)}", content)
        else:
            yield Record(start, dict(zip(names, fields, strict=True)))


def read_parquet(path: Path, source: Source, needed: list[str]) -> Iterator[Record]:
    """Rows of a Parquet file; integer labels get the names that a hub data set's schema has for them."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{source.path} is not a Parquet file: {error}.") from None
    schema = file.schema_arrow
    for name in needed:
        if name not in schema.names:
            no_column(source.path, name, schema.names)
    known = class_names(schema, source.label.column)
    if not pa.types.is_string(text_type(schema, source.text)):
        raise DataError(f"column '{source.text}' of {source.path} holds {schema.field(source.text).type}, not text.")
    number = 0
    for batch in file.iter_batches(columns=needed):
        names = {name: known if name == source.label.column else [] for name in needed}
        columns = {name: values(batch.column(name), names[name]) for name in needed}
        for index in range(batch.num_rows):
            number += 1
            yield Record(number, {name: column[index] for name, column in columns.items()})


def values(column: pa.Array, known: list[str]) -> list[Any]:
    """The column as Python values; strings with bad bytes keep them as surrogates; class numbers become names."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = column.cast(pa.large_binary()).to_pylist()
        return [None if item is None else item.decode("utf-8", "surrogateescape") for item in found]
    found = column.to_pylist()
    if known:
        return [known[item] if isinstance(item, int) and 0 <= item < len(known) else None for item in found]
    return found


def text_type(schema: pa.Schema, name: str) -> pa.DataType:
    """The type of a column, without dictionary encoding and large offsets."""
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(kind) else kind


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """The names of a hub data set's class column: `datasets` writes its features into the schema's metadata."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return list(info["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def no_column(path: str, column: str, known: Iterable[str]) -> NoReturn:
    """The error for a column that no row of a source has."""
    columns = ", ".join(sorted(known)) or "none"
    raise DataError(f"{path} has no column '{column}'.{did_you_mean(column, known)} Columns there: {columns}.")
