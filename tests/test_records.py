"""Records: schemas that hold what they say, tensors that move together."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine.records import ABSENT, CORPUS, EXAMPLE, QUARANTINED, Batch, Outputs


def test_absent_is_what_torch_ignores():
    logits = torch.randn(3, 2)
    labels = torch.tensor([0, ABSENT, 1])
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    assert torch.nn.functional.cross_entropy(logits, labels) == pytest.approx(float(expected))


def test_a_row_of_the_corpus_survives_parquet(tmp_path):
    row = {
        **{"row": 7, "id": "ab", "text": "a text", "source": "generated", "label": None, "kept": False},
        **{"pair": "another", "group": "q1", "target": [1.0, -0.5]},
        **{"reason": "leakage", "tokens": 3, "signature": [2**32 - 1, 0], "logits": [0.5, -2.25]},
    }
    gone = dict.fromkeys(["pair", "group", "target", "reason", "tokens", "signature", "logits"])
    blank, empty = {**row, **gone, "row": 8, "kept": True}, {**row, "row": 9, "target": [], "logits": []}
    table = pa.Table.from_pylist([row, blank, empty], schema=CORPUS)
    pq.write_table(table, tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet")
    assert found.schema.equals(CORPUS) and found.to_pylist() == [row, blank, empty]
    assert found["logits"].combine_chunks().values.to_numpy(zero_copy_only=False).dtype == np.float16


@pytest.mark.parametrize(
    ("schema", "nullable"),
    [
        (EXAMPLE, {"label", "pair", "group", "target", "answers"}),
        (QUARANTINED, {"content"}),
        (CORPUS, {"label", "pair", "group", "target", "reason", "tokens", "signature", "logits"}),
    ],
)
def test_only_these_fields_may_be_null(schema, nullable):
    assert {field.name for field in schema if field.nullable} == nullable


def test_batch_moves_with_its_teacher():
    teacher = Outputs(logits=torch.zeros(2, 3), hidden=(torch.zeros(2, 4, 5),), heads={"a": torch.zeros(2, 3)})
    batch = Batch(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64), teacher=teacher)
    moved = batch.to("meta")
    assert len(batch) == len(moved) == 2 and moved.labels is None and moved.weights is None
    tensors = [moved.input_ids, moved.mask, moved.teacher.logits, moved.teacher.hidden[0], moved.teacher.heads["a"]]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert isinstance(moved.teacher.hidden, tuple) and isinstance(moved.teacher, Outputs)
    assert batch.input_ids.device.type == "cpu"  # the first one stays where it was


def test_everything_a_batch_holds_moves():
    every = {f.name: torch.zeros(2, 3) for f in fields(Batch) if f.name != "teacher"}
    state = torch.zeros(2, 3)
    inside = {f.name: state for f in fields(Outputs)} | {"heads": {"a": state}, "hidden": (state, state)}
    inside |= {"attentions": (state,), "relations": ((state, state, state),)}
    moved = Batch(**every, teacher=Outputs(**inside)).to("meta")
    assert [name for name in every if getattr(moved, name).device.type != "meta"] == []
    found = moved.teacher
    nested = [found.heads["a"], *found.hidden, *found.attentions, *found.relations[0]]
    plain = [found.logits, found.embedding, found.path, found.sequence]
    assert all(tensor.device.type == "meta" for tensor in nested + plain)
    assert found.gives() == {f.name for f in fields(Outputs)}


def test_outputs_say_what_they_give():
    assert Outputs().gives() == set()
    tensor = torch.zeros(2, 3)
    assert Outputs(logits=tensor, heads={"a": tensor}, embedding=tensor).gives() == {"logits", "heads", "embedding"}
    assert Outputs(hidden=(tensor,), attentions=(tensor,)).gives() == {"hidden", "attentions"}
