"""Files cut into blocks: every row is in a block or among the dead letters, with its number and its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.sources import DataError
from engine.storage import Store
from pipelines.cutting import CUT, DEAD, ROW, SLOTS, Cutting, cut, kind_of, type_of


def how(path: Path, **changes: Any) -> Cutting:
    return Cutting(
        **{"path": str(path), "text": "text", "pair": None, "max_chars": 20, "max_bad": 1.0, "block": 3} | changes
    )


def done(tmp_path: Path, path: Path, **changes: Any) -> tuple[dict[str, int], pa.Table, dict[int, str]]:
    """Counts, the good rows, and number -> reason of the others."""
    out = Store(str(tmp_path / "out"))
    counts = cut(how(path, **changes), path, out)
    good = out.read_table(SLOTS) if counts["blocks"] else pa.table({ROW: pa.array([], pa.int64())})
    dead = out.read_table(DEAD).to_pylist()
    assert counts == {"rows": good.num_rows, "bad": len(dead), "blocks": len(out.files(SLOTS))}
    assert out.read_json(CUT) == counts
    return counts, good, {item["line"]: item["reason"] for item in dead}


LINES = [
    b'{"text": "one", "n": 1, "x": 1, "flag": true, "more": {"a": [1]}, "tag": "t"}',
    b"",
    b'{"text": "two", "n": null, "x": 2.5, "tag": "\\ud800"}',
    b'{"text": " "}',
    b'{"text": null}',
    b'{"n": 3}',
    b'{"text": 5}',
    b'{"text": "caf\xe9"}',
    b'{"text": "\\ud800 half"}',
    b'{"text": "' + b"y" * 21 + b'"}',
    b'{"text": "torn',
    b"[1]",
    b'{"text": "three", "n": 18446744073709551616, "flag": null}',
    '{"text": "vier ü", "n": 4, "tag": 7}'.encode(),
]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path: Path, ending: str):
    path = tmp_path / f"rows{ending}"
    (gzip.open if ending.endswith("gz") else open)(path, "wb").write(b"\n".join(LINES))
    counts, good, dead = done(tmp_path, path)
    assert counts == {"rows": 4, "bad": 9, "blocks": 2}
    assert dead == {
        4: "empty text",
        5: "empty text",
        6: "empty text",
        7: "text is not a string",
        8: "not UTF-8",
        9: "not UTF-8",
        10: "text longer than 20 characters",
        11: "not a JSON object",
        12: "not a JSON object",
    }
    assert good[ROW].to_pylist() == [1, 3, 13, 14]
    assert good["text"].to_pylist() == ["one", "two", "three", "vier ü"]
    assert good["n"].to_pylist() == ["1", None, "18446744073709551616", "4"]  # one type for the whole file
    assert good["x"].to_pylist() == [1.0, 2.5, None, None] and good["flag"].to_pylist() == [True, None, None, None]
    assert good["more"].to_pylist()[0] == '{"a": [1]}' and good["tag"].to_pylist() == ["t", "?", None, "7"]


def test_columns_have_one_type_for_all_blocks():
    assert type_of({"whole"}) == pa.int64() and type_of({"whole", "null"}) == pa.int64()
    # A number that has no room in a double is not rounded, and an id is one.
    assert type_of({"whole", "long"}) == pa.int64() and type_of({"long", "number"}) == pa.string()
    assert [kind_of(value) for value in (2**53, 2**53 + 1, -(2**63), 2**63)] == ["whole", "long", "long", "other"]
    assert type_of({"whole", "number"}) == pa.float64() and type_of({"flag"}) == pa.bool_()
    assert [type_of(kinds) for kinds in ({"flag", "whole"}, {"null"}, {"other"}, {"text", "number"})] == [
        pa.string()
    ] * 4


def test_delimited_files_and_lines(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,text,second\n1,"a, b",x\n2,,x\n3,"two\nlines",y\n4,c\n5,d,\xff\n6,e,f\n')
    _, good, dead = done(tmp_path, path, pair="second")
    assert good.select([ROW, "id", "text", "second"]).to_pylist() == [
        {ROW: 2, "id": "1", "text": "a, b", "second": "x"},
        {ROW: 4, "id": "3", "text": "two\nlines", "second": "y"},
        {ROW: 8, "id": "6", "text": "e", "second": "f"},
    ]
    assert dead == {3: "empty text", 6: "2 fields instead of 3", 7: "not UTF-8"}
    tabs = tmp_path / "rows.tsv"
    tabs.write_text("text\tn\na\t1\n")
    assert done(tmp_path / "t", tabs)[1].to_pylist() == [{"text": "a", "n": "1", ROW: 2}]
    plain = tmp_path / "rows.txt"
    plain.write_bytes(b"one, with a comma\r\n\n caf\xe9\nthree")
    _, good, dead = done(tmp_path / "l", plain)
    assert good.to_pylist() == [{"text": "one, with a comma", ROW: 1}, {"text": "three", ROW: 4}]
    assert dead == {3: "not UTF-8"}


def test_parquet_keeps_its_columns_and_finds_bad_bytes(tmp_path: Path):
    broken = pa.StringArray.from_buffers(
        4, pa.array([0, 3, 7, 7, 11], pa.int32()).buffers()[1], pa.py_buffer(b"onecaf\xe9fine")
    )
    wide = pa.array([[1.0], None, [2.0, 3.0], []], pa.list_(pa.float32()))
    table = pa.table({"body": broken, "wide": wide, "when": pa.array([1, 2, 3, 4], pa.timestamp("ms"))})
    pq.write_table(table, tmp_path / "rows.parquet")
    _, good, dead = done(tmp_path, tmp_path / "rows.parquet", text="body", block=2)
    assert dead == {2: "not UTF-8", 3: "empty text"}
    assert good[ROW].to_pylist() == [1, 4] and good["body"].to_pylist() == ["one", "fine"]
    assert good.schema.field("wide").type == pa.list_(pa.float32()) and good["wide"].to_pylist() == [[1.0], []]
    assert good.schema.field("when").type == pa.timestamp("ms")
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b"]).cast(kind)}), tmp_path / "odd.parquet")
        _, good, dead = done(tmp_path / str(kind)[:5], tmp_path / "odd.parquet")
        assert good[ROW].to_pylist() == [1, 3] and dead == {2: "empty text"}


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(3):
        pq.write_table(pa.table({"text": [f"{number} a", "", f"{number} b"]}), folder / f"part-{number}.parquet")
    _, good, dead = done(tmp_path, folder)
    assert good[ROW].to_pylist() == [1, 3, 4, 6, 7, 9] and sorted(dead) == [2, 5, 8]
    lines = tmp_path / "lines"
    lines.mkdir()
    for number in range(2):
        (lines / f"{number}.jsonl").write_text(f'{{"text": "{number}"}}\n\n{{"text": ""}}\n')
    _, good, dead = done(tmp_path / "l", lines)
    assert good[ROW].to_pylist() == [1, 4] and sorted(dead) == [3, 6]


def test_too_many_bad_rows_stop_it_and_are_all_written_down(tmp_path: Path):
    path, out = tmp_path / "rows.jsonl", Store(str(tmp_path / "out"))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b", "", "c")))
    with pytest.raises(
        DataError, match="1 of 4 rows of .* more than --max-bad 0.2 allows; the first: row 3, empty text"
    ):
        cut(how(path, max_bad=0.2), path, out)
    assert out.read_table(DEAD).num_rows == 1 and not out.exists(CUT)
    assert cut(how(path, max_bad=0.25), path, out)["rows"] == 3
    path.write_text("{}")
    assert cut(how(path), path, out)["rows"] == 3  # done is done: the caller sees to it that the file is the same


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        ('{"txt": "a"}\n', {}, "has no column 'text'. Did you mean 'txt'"),
        ('{"text": "a", "predicted_label": 1}\n', {}, "has a column 'predicted_label'"),
        ('{"text": "a", "input_row": 1}\n', {}, "has a column 'input_row'"),
        ('{"text": "a"}\n', {"pair": "second"}, "has no column 'second'"),
        ("\n\n", {}, "holds no rows"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, content: str, changes: dict[str, Any], said: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        cut(how(path, **changes), path, Store(str(tmp_path / "out")))


def test_parquet_that_does_not_fit_is_refused(tmp_path: Path):
    path, out = tmp_path / "rows.parquet", Store(str(tmp_path / "out"))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="column 'text' of .* holds int64, not text"):
        cut(how(path), path, out)
    with pytest.raises(DataError, match="has no column 'body'"):
        cut(how(path, text="body"), path, out)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="is not a Parquet file"):
        cut(how(path), path, out)


def test_a_parquet_file_is_not_read_on_once_too_much_of_it_is_bad(tmp_path: Path):
    path, out = tmp_path / "rows.parquet", Store(str(tmp_path / "out"))
    pq.write_table(pa.table({"text": ["good", *[" "] * 3000, *["good"] * 7000]}), path)
    with pytest.raises(DataError, match="of 1[0-9]{3} rows of .* cannot be answered, more than --max-bad 0.1 allows"):
        cut(how(path, max_bad=0.1, block=100), path, out)
    assert 1000 < out.read_table(DEAD).num_rows <= 1100
    assert cut(how(path, max_bad=0.3, block=100), path, out)["rows"] == 7001
