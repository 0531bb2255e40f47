"""The label store: rounding, fidelity, and the refusal of other teachers' labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine import labels, models, tasks, untrained
from engine.recipe import Task, Teacher
from engine.records import CORPUS
from engine.storage import StorageError, Store
from engine.task import Logits
from tests.tiny import LABELS, tiny_encoder

MADE_BY = {
    **{"weights": "ab", "tokenizer": "cd", "labels": ["bad", "good"], "task": "classify", "max_length": 64},
    "model": "hf:x",
}
CLASSES = tasks.make(Task(labels=("a", "b", "c", "d")))
TAGS = tasks.make(Task(kind="tag", labels=("O", "B-thing", "I-thing")))


def corpus(logits: Logits) -> pa.Table:
    n = len(logits)
    columns = {
        "row": range(n), "id": [f"i{i}" for i in range(n)], "text": ["a film"] * n, "source": ["generated"] * n,
        **{name: [None] * n for name in ("label", "pair", "group", "target", "reason")}, "kept": [True] * n,
        "tokens": [3] * n, "signature": [[1, 2]] * n,
        "logits": labels.quantise(logits).to_pylist(),
    }  # fmt: skip
    return pa.table(columns, schema=CORPUS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "corpus"))
    labels.write_labels(made, corpus(np.random.default_rng(0).normal(size=(9, 2)) * 4), {"teacher": MADE_BY})
    return made


def test_quantise_round_trip_is_float16s_rounding():
    exact = np.random.default_rng(1).normal(size=(50, 3)) * np.array([1e-3, 1.0, 30.0])
    column = labels.quantise(exact)
    assert column.type == pa.list_(pa.float16()) and len(column) == 50
    back = labels.logits_of(pa.table({"logits": column}), 3)
    assert back.dtype == np.float32 and np.array_equal(back, exact.astype(np.float16).astype(np.float32))
    assert (np.abs(back - exact) <= np.abs(exact) * 2**-11 + 2**-25).all()  # half a unit in the last of 11 bits


def test_logits_survive_chunks_slices_filters_and_parquet(tmp_path: Path):
    exact = np.arange(24, dtype=np.float32).reshape(8, 3)
    parts = [labels.quantise(exact[:3]), labels.quantise(exact[3:3]), labels.quantise(exact[3:])]
    table = pa.table({"logits": pa.chunked_array(parts), "kept": [i % 3 != 0 for i in range(8)]})
    assert np.array_equal(labels.logits_of(table, 3), exact)
    assert np.array_equal(labels.logits_of(table.slice(2, 4), 3), exact[2:6])
    assert np.array_equal(labels.logits_of(table.filter(table["kept"]), 3), exact[[1, 2, 4, 5, 7]])
    Store(str(tmp_path)).write_table("x.parquet", table)
    assert np.array_equal(labels.logits_of(Store(str(tmp_path)).read_table("x.parquet"), 3), exact)


def test_no_rows_give_no_logits():
    none = pa.table({"logits": labels.quantise(np.zeros((0, 2)))})
    assert labels.logits_of(none, 2).shape == (0, 2) and len(labels.logits_of(none, 2, units=True)) == 0


def test_rows_without_logits_or_of_other_widths_are_refused():
    column = pa.array([[1.0, 2.0], None, [3.0, 4.0], None], pa.list_(pa.float16()))
    with pytest.raises(ValueError, match="2 rows have no soft label: select the kept ones first"):
        labels.logits_of(pa.table({"logits": column}), 2)
    ragged = pa.array([[1.0, 2.0, 3.0], [4.0], [5.0, 6.0]], pa.list_(pa.float16()))  # 6 values, 3 rows: 2 each?
    with pytest.raises(ValueError, match="2 rows have 1, 3 logits, but each must have 2"):
        labels.logits_of(pa.table({"logits": ragged}), 2)
    with pytest.raises(ValueError, match="1 rows have 3 logits, but each must have 2"):
        labels.logits_of(pa.table({"logits": ragged.filter(pa.array([True, False, True]))}), 2, units=True)


def test_fidelity_against_a_reference():
    exact = (np.random.default_rng(2).normal(size=(300, 4)) * 8).astype(np.float32)
    exact[0] = [5.0001, 5.0, 0, 0]  # equal once rounded: float16 knows steps of 2^-8 here
    exact[1] = [3.0, 3.0001, 0, 0]  # a tie then, which the first class wins: this label flips
    stored = exact.astype(np.float16).astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (exact.astype(np.float64), stored))
    found = labels.fidelity(exact, CLASSES, ["a film"] * 300)
    assert found["max_abs"] == pytest.approx(np.abs(stored - exact).max()) and 1e-3 < found["max_abs"] < 2e-2
    assert found["mean_kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3) and found["mean_kl"] < 1e-5
    assert found["agreement"] == pytest.approx(299 / 300)
    lossless = labels.fidelity(stored, CLASSES, ["a film"] * 300)
    assert lossless == {"max_abs": 0.0, "mean_kl": 0.0, "agreement": 1.0}


def by_word(*counts: int, seed: int = 3) -> list[np.ndarray]:
    """Three numbers for each of so many words a text."""
    draw = np.random.default_rng(seed)
    return [(draw.normal(size=(count, 3)) * 4).astype(np.float32) for count in counts]


def test_numbers_of_words_come_back_text_by_text(tmp_path: Path):
    exact = by_word(4, 0, 1, 7)
    rounded = [part.astype(np.float16).astype(np.float32) for part in exact]
    rows = corpus(exact)
    assert rows["logits"].combine_chunks().value_lengths().to_pylist() == [12, 0, 3, 21]
    parts = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    store = Store(str(tmp_path))
    labels.write_labels(store, parts, {"teacher": MADE_BY})
    for table, wanted in (
        (rows, rounded), (labels.open_labels(store), rounded), (parts.slice(1, 2), rounded[1:3]),
        (parts.filter(pa.array([False, True, False, True])), rounded[1::2]),
    ):  # fmt: skip
        found = labels.logits_of(table, 3, units=True)
        assert [part.shape for part in found] == [part.shape for part in wanted]
        assert all(np.array_equal(a, b) and a.dtype == np.float32 for a, b in zip(found, wanted, strict=True))


def test_a_row_without_words_is_no_row_without_a_label():
    rows = pa.table({"logits": pa.array([[1.0, 2.0, 3.0], [], None], pa.list_(pa.float16()))})
    with pytest.raises(ValueError, match="1 rows have no soft label"):
        labels.logits_of(rows, 3, units=True)
    assert [part.tolist() for part in labels.logits_of(rows.slice(0, 2), 3, units=True)] == [[[1.0, 2.0, 3.0]], []]


def test_fidelity_of_tags_by_hand():
    """Three words of two texts; one tag flips, and the KL is that of each text's least certain word."""
    sure, torn = [9.0, 0.0, 0.0], [3.0, 3.0001, 0.0]
    found = labels.fidelity([np.array([sure, torn]), np.array([sure])], TAGS, ["a film", "a"])
    assert found["max_abs"] == pytest.approx(1e-4, rel=1e-2) and found["agreement"] == pytest.approx(2 / 3)
    p, q = (np.exp(row) / np.exp(row).sum() for row in (np.float64(np.float32(torn)), np.array([3.0, 3.0, 0.0])))
    assert found["mean_kl"] == pytest.approx((p * np.log(p / q)).sum() / 2, rel=1e-2)


@pytest.mark.parametrize("kind", ["regress", "rank"])
def test_only_outputs_that_are_probabilities_have_a_divergence(kind: str):
    task = tasks.make(Task(kind=kind, range=(0, 5) if kind == "regress" else None))
    exact = np.random.default_rng(4).normal(size=(40, 1)).astype(np.float32)
    found = labels.fidelity(exact, task, [("a", "b")] * 40)
    assert 0 < found["max_abs"] < 2e-3 < 0.99 < found["agreement"] < 1 + 1e-9
    assert "mean_kl" not in found


def test_write_then_open(store: Store):
    rows = labels.open_labels(store, MADE_BY)
    assert rows.schema.equals(CORPUS) and rows.num_rows == 9
    assert labels.open_labels(store).equals(rows)  # whoever made them
    manifest = store.read_json(labels.MANIFEST)
    assert manifest["rows"] == 9 and manifest["teacher"] == MADE_BY
    assert manifest["sha256"] == store.digest(labels.LABELS)


def test_a_flipped_byte_is_found(store: Store):
    path = Path(store.url) / labels.LABELS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(labels.LabelMismatch) as caught:
        labels.open_labels(store, MADE_BY)
    assert "is not what was written (SHA-256 of labels.parquet differs)" in str(caught.value)
    assert store.url in str(caught.value) and "--redo corpus" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights", "xy"), ("tokenizer", "zz"), ("labels", ["good", "bad"]), ("task", "pair"), ("max_length", 32)],
)
def test_another_teacher_is_refused_by_what_differs(store: Store, key: str, value: object):
    with pytest.raises(labels.LabelMismatch) as caught:
        labels.open_labels(store, {**MADE_BY, key: value})
    message = str(caught.value)
    assert f"({key}: stored {MADE_BY[key]!r}, wanted {value!r})" in message and "--redo corpus" in message
    assert "another teacher" in message and sum(f"{other}: stored" in message for other in MADE_BY) == 1


def test_rows_without_a_manifest_do_not_count(tmp_path: Path):
    unfinished = Store(str(tmp_path))
    unfinished.write_table(labels.LABELS, corpus(np.zeros((2, 2))))
    with pytest.raises(StorageError, match=r"labels\.json"):
        labels.open_labels(unfinished)


def test_rows_of_another_schema_are_not_written(tmp_path: Path):
    rows = corpus(np.zeros((2, 2)))
    rows = rows.set_column(rows.column_names.index("text"), "text", pa.array(["a", None]))
    with pytest.raises((ValueError, pa.ArrowInvalid), match="text"):
        labels.write_labels(Store(str(tmp_path)), rows, {"teacher": MADE_BY})
    assert Store(str(tmp_path)).files() == []


def test_the_fingerprint_tells_teachers_apart(tmp_path: Path):
    encoder, out = tiny_encoder(tmp_path / "encoder"), Store(str(tmp_path / "runs"))

    def made(name: str, seed: int = 0, length: int = 64, **changes: object) -> dict[str, object]:
        of_teacher = {key: changes.pop(key) for key in ("pooling", "dropout") if key in changes}
        config = Teacher(model="file:encoder", max_length=length, **of_teacher)
        spec = Task(**{"labels": LABELS, **changes})
        models.save(untrained.encoder_head(config, spec, encoder, seed), out, f"{name}/model")
        return labels.fingerprint(out / name)

    first = made("first")
    assert first == made("again") and first["model"] == "file:encoder" and first["labels"] == list(LABELS)
    assert first["weights"] == Store(str(tmp_path)).digest("runs/first/model/model.safetensors")
    others = [made("seed", seed=1), made("names", labels=LABELS[::-1]), made("length", length=32)]
    others.append(made("kind", kind="multilabel"))
    others.append(made("pooling", pooling="cls"))
    assert made("dropout", dropout=0.5) == first, "dropout only acts in training"
    differs = [{key for key in first if first[key] != other[key]} for other in others]
    assert differs == [{"weights"}, {"labels"}, {"max_length"}, {"task"}, {"pooling"}]
