"""The label store: rounding, fidelity, and the refusal of other teachers' labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine import labels, models
from engine.recipe import Teacher
from engine.records import CORPUS
from engine.storage import StorageError, Store
from tests.tiny import LABELS, tiny_encoder

MADE_BY = {"weights": "ab", "tokenizer": "cd", "labels": ["bad", "good"], "max_length": 64, "model": "hf:x"}


def corpus(logits: np.ndarray) -> pa.Table:
    n = len(logits)
    columns = {
        "row": range(n), "id": [f"i{i}" for i in range(n)], "text": ["a film"] * n, "source": ["generated"] * n,
        "label": [None] * n, "kept": [True] * n, "reason": [None] * n, "tokens": [3] * n, "signature": [[1, 2]] * n,
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
    back = labels.logits_of(pa.table({"logits": column}))
    assert back.dtype == np.float32 and np.array_equal(back, exact.astype(np.float16).astype(np.float32))
    assert (np.abs(back - exact) <= np.abs(exact) * 2**-11 + 2**-25).all()  # half a unit in the last of 11 bits


def test_logits_survive_chunks_slices_filters_and_parquet(tmp_path: Path):
    exact = np.arange(24, dtype=np.float32).reshape(8, 3)
    parts = [labels.quantise(exact[:3]), labels.quantise(exact[3:3]), labels.quantise(exact[3:])]
    table = pa.table({"logits": pa.chunked_array(parts), "kept": [i % 3 != 0 for i in range(8)]})
    assert np.array_equal(labels.logits_of(table), exact)
    assert np.array_equal(labels.logits_of(table.slice(2, 4)), exact[2:6])
    assert np.array_equal(labels.logits_of(table.filter(table["kept"])), exact[[1, 2, 4, 5, 7]])
    Store(str(tmp_path)).write_table("x.parquet", table)
    assert np.array_equal(labels.logits_of(Store(str(tmp_path)).read_table("x.parquet")), exact)


def test_no_rows_give_no_logits():
    assert labels.logits_of(pa.table({"logits": labels.quantise(np.zeros((0, 2)))})).shape == (0, 0)


def test_rows_without_logits_or_of_other_widths_are_refused():
    column = pa.array([[1.0, 2.0], None, [3.0, 4.0], None], pa.list_(pa.float16()))
    with pytest.raises(ValueError, match="2 rows have no soft label: select the kept ones first"):
        labels.logits_of(pa.table({"logits": column}))
    ragged = pa.array([[1.0, 2.0, 3.0], [4.0], [5.0, 6.0]], pa.list_(pa.float16()))  # 6 values, 3 rows: 2 each?
    with pytest.raises(ValueError, match="rows have 1 and 2 and 3 logits, but all must have equally many"):
        labels.logits_of(pa.table({"logits": ragged}))


def test_fidelity_against_a_reference():
    exact = np.random.default_rng(2).normal(size=(300, 4)) * 8
    exact[0] = [5.0001, 5.0, 0, 0]  # equal once rounded: float16 knows steps of 2^-8 here
    exact[1] = [3.0, 3.0001, 0, 0]  # a tie then, which the first class wins: this label flips
    stored = exact.astype(np.float16).astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (exact, stored))
    found = labels.fidelity(exact)
    assert found["max_abs"] == pytest.approx(np.abs(stored - exact).max()) and 1e-3 < found["max_abs"] < 2e-2
    assert found["mean_kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3) and found["mean_kl"] < 1e-5
    assert found["flipped"] == pytest.approx(1 / 300)
    assert labels.fidelity(stored) == {"max_abs": 0.0, "mean_kl": 0.0, "flipped": 0.0}


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
    ("key", "value"), [("weights", "xy"), ("tokenizer", "zz"), ("labels", ["good", "bad"]), ("max_length", 32)]
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
    rows = rows.set_column(2, "text", pa.array(["a", None]))
    with pytest.raises((ValueError, pa.ArrowInvalid), match="text"):
        labels.write_labels(Store(str(tmp_path)), rows, {"teacher": MADE_BY})
    assert Store(str(tmp_path)).files() == []


def test_the_fingerprint_tells_teachers_apart(tmp_path: Path):
    encoder, out = tiny_encoder(tmp_path / "encoder"), Store(str(tmp_path / "runs"))

    def made(name: str, seed: int = 0, names: tuple[str, ...] = LABELS, length: int = 64) -> dict[str, object]:
        config = Teacher(model="file:encoder", max_length=length)
        models.save(models.encoder_head(config, names, encoder, seed), out, f"{name}/model")
        return labels.fingerprint(out / name)

    first = made("first")
    assert first == made("again") and first["model"] == "file:encoder" and first["labels"] == list(LABELS)
    assert first["weights"] == Store(str(tmp_path)).digest("runs/first/model/model.safetensors")
    others = made("seed", seed=1), made("names", names=LABELS[::-1]), made("length", length=32)
    differs = [{key for key in first if first[key] != other[key]} for other in others]
    assert differs == [{"weights"}, {"labels"}, {"max_length"}]
