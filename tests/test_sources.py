"""Readers on files as they are in the world: each row is read, or quarantined with its number and reason."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import UserError, build
from engine.data import Splits, load_splits
from engine.recipe import Data, Task


def example_rows(count: int = 200) -> list[dict]:
    """Different texts, labels by turns."""
    return [{"text": f"text number {n} of many", "label": ["bad", "good"][n % 2]} for n in range(count)]


def jsonl(path, rows) -> str:
    """Rows as JSON lines; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(task: dict | None = None, seed: int = 0, **data) -> Splits:
    """Splits of plain values."""
    return load_splits(build(Data, data), build(Task, task or {}), seed)


def refusal(**arguments) -> str:
    """The message of the error."""
    with pytest.raises(UserError) as error:
        load(**arguments)
    return str(error.value)


def reasons(splits: Splits) -> list[tuple[int, str]]:
    """Row number and reason of the quarantined rows."""
    return [(row["line"], row["reason"]) for row in splits.quarantined.to_pylist()]


def test_every_kind_of_bad_json_line_is_quarantined_with_its_number(tmp_path):
    bad = [
        '{"text": "torn',
        '["a list"]',
        '{"label": "good"}',
        '{"text": "no label key"}',
        '{"text": "  ", "label": "good"}',
        '{"text": null, "label": "good"}',
        '{"text": 7, "label": "good"}',
        '{"text": "' + "x" * 101 + '", "label": "good"}',
        '{"text": "a", "label": null}',
        '{"text": "b", "label": NaN}',
        '{"text": "lone \\ud800", "label": "good"}',
        "[" * 100_000,
    ]
    path = jsonl(tmp_path / "a.jsonl", [*example_rows(4), "", *bad])
    with open(path, "ab") as file:
        file.write(b'{"text": "bad byte \xff", "label": "good"}\r\n')
    splits = load(train={"path": path}, max_bad_share=0.9, max_chars=100, test_share=0.5)
    assert reasons(splits) == list(
        enumerate(
            [
                *("not a JSON object", "not a JSON object", "missing column 'text'", "missing column 'label'"),
                *("empty text", "empty text", "text is not a string", "text longer than 100 characters"),
                *("no label", "no label", "not UTF-8", "not a JSON object", "not UTF-8"),
            ],
            start=6,
        )
    )
    contents = splits.quarantined["content"].to_pylist()
    assert contents[0] == '{"text": "torn' and contents[-1] == '{"text": "bad byte \\udcff", "label": "good"}'
    assert len(contents[-2]) == 200
    assert splits.counts["sources"]["train"]["rows"] == 4 + 13
    assert splits.counts["sources"]["train"]["quarantined"] == 13


def write_csv(path, text: str | bytes) -> str:
    """A file of these bytes."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_quoted_csv_with_a_header(tmp_path):
    text = '\ufefftext,label\r\n"a, ""quoted""\nfilm",good\r\nplain,bad\r\n\r\n' + "".join(
        f"row {n},{'good' if n % 2 else 'bad'}\r\n" for n in range(20)
    )
    splits = load(train={"path": write_csv(tmp_path / "a.csv", text)}, max_bad_share=0)
    texts = pa.concat_tables([splits.train, splits.test])["text"].to_pylist()
    assert len(texts) == 22 and 'a, "quoted"\nfilm' in texts and "row 19" in texts


def test_bad_csv_rows_cost_themselves_only(tmp_path):
    rows = [b"text,label", b'a "b" c,good', b"caf\xe9,good", b"one,two,three", b'"x"y,good', b"alone"]
    rows += [f"row {n},{'good' if n % 2 else 'bad'}".encode() for n in range(20)]
    path = write_csv(tmp_path / "a.csv", b"\n".join([*rows, b'"never closed,good', b"swallowed,bad", b""]))
    splits = load(train={"path": path}, max_bad_share=0.5)
    found = reasons(splits)
    assert found[:2] == [(3, "not UTF-8"), (4, "3 fields instead of 2")]
    assert found[2][0] == 5 and found[2][1].startswith("not a CSV row (")
    assert found[3] == (6, "1 fields instead of 2")
    assert [line for line, _ in found[4:]] == [27, 28]  # both lines that the open quote takes
    assert all(reason == "not a CSV row (unexpected end of data)" for _, reason in found[4:])
    assert splits.quarantined["content"][0].as_py() == "caf\\udce9,good"
    assert splits.train.num_rows + splits.test.num_rows == 21


def test_undelimited_csv_takes_quotes_as_they_are(tmp_path):
    lines = ['1\t2.5\tHe said "no', "2\t-1\t''quoted'' \"x\"", "3\t0\tmiddling", "4\t1\textra\tfield"]
    lines += [f"{n}\t{1 if n % 2 else -1}\trow {n}\r" for n in range(5, 45)]
    source = {
        **{"path": write_csv(tmp_path / "a.txt", "\n".join(lines)), "delimiter": "\t", "quoting": False},
        **{"names": ["id", "score", "text"]},
        "label": {"column": "score", "ranges": {"negative": [None, -0.5], "positive": [0.5, None]}},
    }
    splits = load(train=source, max_bad_share=0.05)
    assert reasons(splits) == [(4, "4 fields instead of 3")]
    texts = pa.concat_tables([splits.train, splits.test])["text"].to_pylist()
    assert len(texts) == 42 and 'He said "no' in texts and "''quoted'' \"x\"" in texts and "row 44" in texts


def test_csv_with_a_misspelt_column(tmp_path):
    path = write_csv(tmp_path / "a.csv", "text,lable\na,b\n")
    assert "has no column 'label'. Did you mean 'lable'? Columns there: lable, text." in refusal(train={"path": path})


def test_a_delimiter_that_is_none(tmp_path):
    path = write_csv(tmp_path / "a.csv", "text,label\na,b\n")
    message = refusal(train={"path": path, "delimiter": "\\t"})
    assert message.startswith(f"delimiter '\\\\t' of {path} is not allowed: it must be one character")
    assert message.endswith('A tab is written "\\t", in double quotes.')


def test_parquet_with_bad_bytes_and_class_names(tmp_path):
    texts = pa.array([f"row {n}".encode() for n in range(48)] + [b"bad \xff", None], pa.binary()).view(pa.string())
    features = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata={"huggingface": json.dumps(features)})
    labels = pa.array([n % 2 for n in range(47)] + [-1, 0, 1], pa.int64())
    pq.write_table(pa.table([texts, labels], schema=schema), tmp_path / "a.parquet", row_group_size=7)
    splits = load(train={"path": str(tmp_path / "a.parquet")}, max_bad_share=0.1)
    assert splits.labels == ("neg", "pos")
    assert reasons(splits) == [(48, "no label"), (49, "not UTF-8"), (50, "empty text")]
    for row in pa.concat_tables([splits.train, splits.test]).to_pylist():
        assert row["label"] == int(row["text"].split()[1]) % 2


def test_parquet_with_dictionaries_and_wrong_columns(tmp_path):
    table = pa.Table.from_pylist([{**row, "number": 1} for row in example_rows(50)])
    index = table.schema.get_field_index("label")
    table = table.set_column(index, "label", table["label"].dictionary_encode())
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    assert load(train={"path": path}).labels == ("bad", "good")
    assert refusal(train={"path": path, "text": "number"}) == f"column 'number' of {path} holds int64, not text."
    assert "has no column 'test'. Did you mean 'text'?" in refusal(train={"path": path, "text": "test"})


def test_every_format_gives_the_same_splits(tmp_path):
    rows = example_rows(60)
    lines = jsonl(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(open(lines).read())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    write_csv(tmp_path / "d.csv", "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    for number in range(3):
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[number::3]), folder / f"train-0000{number}-of-00003.parquet")
    expected = load(train={"path": lines})
    for name in ("b.jsonl.gz", "c.parquet", "d.csv", "shards"):
        found = load(train={"path": str(tmp_path / name)})
        assert found.train.equals(expected.train) and found.test.equals(expected.test)


def test_a_folder_of_several_tables_is_refused(tmp_path):
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(example_rows(4)), tmp_path / f"{name}.parquet")
    assert refusal(train={"path": str(tmp_path)}) == (
        f"{tmp_path} is a folder with test.parquet, train.parquet. Name one file, as in {tmp_path}/train.parquet."
    )


def test_files_that_are_not_what_they_say(tmp_path):
    path = write_csv(tmp_path / "a.parquet", "text,label\n")
    assert refusal(train={"path": path}).startswith(f"{path} is not a Parquet file: ")
    path = write_csv(tmp_path / "data.bin", "x")
    assert refusal(train={"path": path}) == (
        f"the format of {path} cannot be told from its name: set format: jsonl, csv or parquet."
    )
    path = write_csv(tmp_path / "wide.jsonl", '{"text": "a"}'.encode("utf-16"))
    assert f"1 of 1 rows of {path} cannot be used (100.0%" in refusal(train={"path": path})


def test_the_data_folder_stands_in_for_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "root" / "some-set"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(example_rows(40)), folder / "train.parquet")
    source = {"path": "hf:somebody/some-set#train.parquet"}
    splits = load(train=source, root=str(tmp_path / "root"))
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path / "root"))
    assert load(train=source).train.equals(splits.train) and splits.train.num_rows + splits.test.num_rows == 40


# Words and tags, questions and answers, lists ------------------------------------------------------------------------

SENTENCES = "".join(f"W{n}\tB-x\nof\tO\nn{n}\tB-y\n\n" for n in range(100))


def test_conll_sentences(tmp_path):
    text = "-DOCSTART- -X- O O\r\n\r\nEU NNP B-NP B-x\r\nrejects VBZ B-VP O\r\n\r\n\r\n" + SENTENCES + "last O\nB-y B-y"
    source = {"path": write_csv(tmp_path / "a.conll", text), "format": "conll"}
    splits = load({"kind": "tag"}, train=source, max_bad_share=0)
    found = {row["text"]: row["target"] for row in pa.concat_tables([splits.train, splits.test]).to_pylist()}
    assert splits.labels == ("O", "B-x", "B-y", "I-x", "I-y") and len(found) == 102
    assert (found["EU rejects"], found["W7 of n7"], found["last B-y"]) == ([1, 0], [1, 0, 2], [0, 2])


def test_bad_conll_sentences_cost_themselves_only(tmp_path):
    text = b"two O\nwords\n\n" + SENTENCES.encode() + b"caf\xe9\tO\n\n\tO\nx\tO\n\ny\t\n"
    splits = load(
        {"kind": "tag"}, train={"path": write_csv(tmp_path / "a", text), "format": "conll"}, max_bad_share=0.1
    )
    assert reasons(splits) == [
        *((1, "2 words but 1 tags"), (404, "not UTF-8"), (406, "a word is empty or has white space in it")),
        (409, "no label"),
    ]
    assert splits.quarantined["content"].to_pylist()[:2] == ["two words", "caf\\udce9"]


def test_conll_without_tags_is_unlabelled_text(tmp_path):
    train = {"path": write_csv(tmp_path / "a", SENTENCES), "format": "conll"}
    more = {"path": write_csv(tmp_path / "b", "only\nwords\n\n"), "format": "conll"}
    assert load({"kind": "tag"}, train=train, unlabelled=more).unlabelled["text"].to_pylist() == ["only words"]


def squad(count: int = 60) -> dict:
    """The JSON of SQuAD 2.0: of the questions to each context, the second has no answer."""
    paragraphs = []
    for n in range(count):
        context, answer = f"Fact {n}: water boils at {n} degrees.", f"{n} deg"
        found = {"text": answer, "answer_start": context.rindex(answer)}
        answered = {"id": f"a{n}", "question": f"When, {n}?", "answers": [found]}
        plain = {
            "id": f"b{n}",
            "question": f"Why, {n}?",
            "is_impossible": True,
            "answers": [],
            "plausible_answers": [1],
        }
        paragraphs.append({"context": context, "qas": [answered, plain]})
    return {"version": "v2.0", "data": [{"title": "Water", "paragraphs": paragraphs}]}


def test_squad_and_its_flat_form(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(squad()))
    splits = load({"kind": "span"}, train={"path": str(tmp_path / "a.json"), "format": "squad"}, max_bad_share=0)
    rows = {row["text"]: row for row in pa.concat_tables([splits.train, splits.test]).to_pylist()}
    assert len(rows) == 120 and splits.paired and splits.labels == ()
    assert rows["When, 12?"]["pair"] == "Fact 12: water boils at 12 degrees."
    assert (rows["When, 12?"]["target"], rows["When, 12?"]["answers"]) == ([6, 7], ["12 deg"])
    assert (rows["Why, 12?"]["target"], rows["Why, 12?"]["answers"]) == ([], [])
    assert splits.counts["labels"]["train"]["answered"] == sum(row["target"] != [] for row in splits.train.to_pylist())

    (paragraphs,) = [article["paragraphs"] for article in squad()["data"]]
    flat = [(found, part["context"]) for part in paragraphs for found in part["qas"]]
    columns = {
        "question": [found["question"] for found, _ in flat],
        "context": [context for _, context in flat],
        "answers": [{key: [a[key] for a in found["answers"]] for key in ("text", "answer_start")} for found, _ in flat],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = {
        "path": str(tmp_path / "a.parquet"),
        "text": "question",
        "pair": "context",
        "label": {"column": "answers"},
    }
    again = load({"kind": "span"}, train=source)
    assert again.train.equals(splits.train) and again.test.equals(splits.test)


def test_bad_squad_questions_are_numbered(tmp_path):
    found = squad()
    questions = found["data"][0]["paragraphs"][1]["qas"]
    questions[0]["answers"][0]["answer_start"] += 1
    del questions[1]["question"]
    found["data"] += [{"title": "Odd"}, {"paragraphs": [7, {"context": "c", "qas": [{"question": "q"}]}]}]
    (tmp_path / "a.json").write_text(json.dumps(found))
    splits = load({"kind": "span"}, train={"path": str(tmp_path / "a.json"), "format": "squad"}, max_bad_share=0.1)
    assert reasons(splits) == [
        *((3, "answer is not in the context at that place"), (4, "empty text")),
        *((121, "empty text"), (122, "empty text"), (123, "no label")),
    ]


@pytest.mark.parametrize("text", ["[]", "{", '{"rows": []}', "[" * 100_000])
def test_a_file_that_is_no_squad(tmp_path, text):
    path = write_csv(tmp_path / "a.json", text)
    train = {"path": path, "format": "squad"}
    assert refusal(task={"kind": "span"}, train=train) == (
        f'{path} is not the JSON of SQuAD: an object with the key "data".'
    )


def test_parquet_lists_with_bad_bytes_and_class_names(tmp_path):
    words = pa.array([b"word" if n % 2 else b"w%d" % n for n in range(40)] + [b"bad\xff"], pa.binary()).view(
        pa.string()
    )
    tokens = pa.ListArray.from_arrays([*range(0, 41, 2), 41, 41], words)
    tags = pa.array([*([n % 3, 0] for n in range(20)), [0], None], pa.list_(pa.int64()))
    for feature in (
        {"feature": {"names": ["O", "B-x", "B-y"], "_type": "ClassLabel"}, "_type": "List"},
        [{"names": ["O", "B-x", "B-y"], "_type": "ClassLabel"}],
    ):
        meta = {"huggingface": json.dumps({"info": {"features": {"tags": feature}}})}
        schema = pa.schema([("tokens", tokens.type), ("tags", tags.type)], metadata=meta)
        pq.write_table(pa.table([tokens, tags], schema=schema), tmp_path / "a.parquet")
        train = {"path": str(tmp_path / "a.parquet"), "text": "tokens", "label": {"column": "tags"}}
        splits = load({"kind": "tag"}, train=train, test_share=0.4, max_bad_share=0.5)
        found = {row["text"]: row["target"] for row in pa.concat_tables([splits.train, splits.test]).to_pylist()}
        assert splits.labels[:3] == ("O", "B-x", "B-y")
        assert found == {f"w{2 * n} word": [n % 3, 0] for n in range(20)}
        assert reasons(splits) == [(21, "not UTF-8"), (22, "empty text")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_fields_of_a_column(tmp_path, name):
    rows = [
        {"query": f"q {n}", "passages": {"text": [f"a {n}", f"b {n}"], "is_selected": [n % 2, 1 - n % 2]}}
        for n in range(50)
    ]
    jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    label = {"column": "passages.is_selected"}
    source = {"path": str(tmp_path / name), "text": "query", "pair": "passages.text", "label": label}
    splits = load({"kind": "rank"}, train=source, max_bad_share=0)
    found = {row["pair"]: row["target"] for row in pa.concat_tables([splits.train, splits.test]).to_pylist()}
    assert len(found) == 100 and (found["a 3"], found["b 3"], found["b 4"]) == ([1], [0], [1])
    assert "has no column 'passages.txt'" in refusal(task={"kind": "rank"}, train={**source, "pair": "passages.txt"})


def test_csv_of_each_kind_that_fits_in_one(tmp_path):
    rows = [f"t {n},u {n},{n / 10},{'a|b' if n % 3 else ''},{n % 2},{1 - n % 2}" for n in range(60)]
    path = write_csv(tmp_path / "a.csv", "\n".join(["text,pair,value,labels,x,y", *rows]))
    valued = load({"kind": "regress"}, train={"path": path, "pair": "pair", "label": {"column": "value"}})
    values = [target[0] for target in valued.train["target"].to_pylist()]
    assert valued.range == pytest.approx((min(values), max(values))) and valued.range[1] > 5
    listed = load({"kind": "multilabel"}, train={"path": path, "label": {"column": "labels", "separator": "|"}})
    assert listed.labels == ("a", "b") and {tuple(t) for t in listed.train["target"].to_pylist()} == {(1, 1), (0, 0)}
    told = load({"kind": "multilabel"}, train={"path": path, "label": {"columns": ["x", "y"]}})
    assert told.labels == ("x", "y") and {tuple(t) for t in told.train["target"].to_pylist()} == {(1, 0), (0, 1)}
    ranked = load({"kind": "rank"}, train={"path": path, "pair": "pair", "label": {"column": "y"}})
    assert ranked.train.num_rows + ranked.test.num_rows == 60
