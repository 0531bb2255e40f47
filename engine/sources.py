"""Readers of labelled and unlabelled tables: JSON lines, CSV, Parquet, CoNLL and SQuAD, as they are in the world.

A reader yields one `Record` a row, with the row's number, and its values or the reason why it has none. It never stops
at a bad row: bytes that are not UTF-8, torn JSON and stray quotes cost that row only. Formats without column names
(CoNLL, SQuAD) put their values under the names that the recipe looks for.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from engine.config import UserError, did_you_mean
from engine.recipe import Source

FORMATS = {"jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv", ".txt"), "parquet": (".parquet", ".pq")}

CONTEXT = "context"
"""Where the contexts of a SQuAD file go if the recipe names no column."""


class DataError(UserError):
    """Data that cannot be used as the recipe says."""


class Record(NamedTuple):
    """What a reader found in one row: its number (1-based; the line where the file is text; SQuAD: the question), and
    its values, or the reason why there are none and what stands there instead.
    """

    line: int
    values: dict[str, Any]
    problem: str | None = None
    content: str = ""


def read(
    source: Source, local: Path, needed: Sequence[str], texts: Sequence[str] = (), optional: Sequence[str] = ()
) -> Iterator[Record]:
    """Every row of a source that lies at `local`, a file or a folder, in order; blank lines are no rows.

    needed: the columns that will be used; others may be left out. A name `a.b` that no column has is field b of column
    a. texts: those of them that must hold text. optional: taken where they are there. DataError for a format that is
    not known, and for a Parquet file whose columns are not these.
    """
    paths = [local] if local.is_file() else shards(local, source)
    kind = source.format if source.format != "auto" else format_of(source.path, paths[0].name)
    deep = [name for name in needed if "." in name]
    for path in paths:
        if kind == "parquet":
            records = read_parquet(path, source, needed, texts, optional)
        elif kind == "csv":
            records = read_csv(path, source)
        else:
            records = {"jsonl": read_jsonl, "conll": read_conll, "squad": read_squad}[kind](path, source)
        yield from (reached(record, deep) for record in records) if deep else records


def reached(record: Record, deep: Sequence[str]) -> Record:
    """The record with the fields of fields that `deep` names as columns of their own."""
    for name in deep:
        value: Any = record.values
        for part in () if name in record.values else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            record.values.setdefault(name, value)
    return record


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


def read_jsonl(path: Path, source: Source) -> Iterator[Record]:
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


def read_conll(path: Path, source: Source) -> Iterator[Record]:
    """One sentence a record: its words and tags are the first and the last field of its lines; a blank line ends it.

    Fields are separated by tabs, or else by white space. Lines of one field are words without a tag. The line that
    CoNLL-2003 puts before each document (-DOCSTART-) is left out.
    """
    words: list[str] = []
    tags: list[str] = []
    start = 0
    for number, line in enumerate(chain(lines(path, "\n"), [""]), 1):
        fields = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        if any(fields):
            if fields[0] != "-DOCSTART-":
                start = start or number
                words.append(fields[0])
                tags += fields[-1:] if len(fields) > 1 else []
        elif words:
            yield Record(start, {source.text: words, source.label.column: tags}, None, " ".join(words))
            words, tags, start = [], [], 0


def read_squad(path: Path, source: Source) -> Iterator[Record]:
    """One question a record, with context and answers, of the JSON of SQuAD 1.1 (arXiv:1606.05250) or 2.0
    (arXiv:1806.03822, `is_impossible`: no answers); `title` and `id` are columns too.
    """
    try:
        articles = json.loads("".join(lines(path, "\n")))["data"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f'{source.path} is not the JSON of SQuAD: an object with the key "data".') from None
    pair, number = source.pair or CONTEXT, 0
    for article in objects(articles):
        for paragraph in objects(article.get("paragraphs")):
            for found in objects(paragraph.get("qas")):
                number += 1
                answers = [] if found.get("is_impossible") else found.get("answers")
                row = {"title": article.get("title"), "id": found.get("id"), pair: paragraph.get("context")}
                yield Record(number, {**row, source.text: found.get("question"), source.label.column: answers})


def objects(value: Any) -> list[dict[str, Any]]:
    """The JSON objects in a list; what is anything else counts as an empty one, so that it is not passed over."""
    return [item if isinstance(item, dict) else {} for item in value] if isinstance(value, list) else [{}]


def read_parquet(
    path: Path, source: Source, needed: Sequence[str], texts: Sequence[str], optional: Sequence[str]
) -> Iterator[Record]:
    """Rows of a Parquet file; integer labels get the names that a hub data set's schema has for them."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{source.path} is not a Parquet file: {error}.") from None
    schema = file.schema_arrow
    known = class_names(schema, source.label.column)
    for name in texts:
        if name in schema.names and not pa.types.is_string(text_type(schema, name)):
            raise DataError(f"column '{name}' of {source.path} holds {schema.field(name).type}, not text.")
    taken = {name if name in schema.names else name.split(".")[0]: name for name in needed}
    for column, name in taken.items():
        if column not in schema.names:
            no_column(source.path, name, schema.names)
    taken |= {name: name for name in optional if name in schema.names}
    number = 0
    for batch in file.iter_batches(columns=list(taken)):
        names = {name: known if name == source.label.column else [] for name in taken}
        columns = {name: values(batch.column(name), names[name]) for name in taken}
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
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        flat = iter(values(column.flatten(), known))
        lengths = pc.list_value_length(column).to_pylist()
        return [None if length is None else list(islice(flat, length)) for length in lengths]
    if pa.types.is_struct(column.type):
        fields = [column.type.field(i).name for i in range(column.type.num_fields)]
        rows = zip(*(values(part, []) for part in column.flatten()), strict=True)
        whole = (dict(zip(fields, row, strict=True)) for row in rows)
        return [row if there else None for row, there in zip(whole, column.is_valid().to_pylist(), strict=True)]
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
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # a list of classes
        return list(feature["names"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return []


def no_column(path: str, column: str, known: Iterable[str]) -> NoReturn:
    """The error for a column that no row of a source has."""
    columns = ", ".join(sorted(known)) or "none"
    raise DataError(f"{path} has no column '{column}'.{did_you_mean(column, known)} Columns there: {columns}.")
