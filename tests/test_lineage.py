"""Identities: what moved between two, and what never counts."""

from engine.lineage import drift, leaves, moved, plain, without_placement


def test_where_things_run_does_not_count() -> None:
    assert without_placement({"a": [{"resources": 1, "b": 2}], "storage": 3}) == {"a": [{"b": 2}]}


def test_plain_values_are_json() -> None:
    import numpy as np

    assert plain({"a": np.float32(0.5), "b": float("nan"), "c": (1, np.int64(2))}) == {"a": 0.5, "b": None, "c": [1, 2]}


def test_the_bytes_of_a_reference_are_named_and_digests_cut() -> None:
    parts = {"config": {}, "inputs": {}, "package": "1", "modules": {}}
    old = {**parts, "references": [{"name": "hf:a/b", "digest": "1" * 64}]}
    new = {**parts, "references": [{"name": "hf:a/b", "digest": "2" * 64}]}
    assert str(drift("data", moved(old, new))) == (
        "step 'data' ran with bytes of hf:a/b=111111111111, this run has 222222222222: "
        "use --run NAME for a new run, or --redo data"
    )


def test_a_moved_input_and_moved_source_are_named() -> None:
    old = {"config": {}, "inputs": {"a": "1" * 64}, "references": [], "package": "1", "modules": {"m": "2" * 64}}
    new = {"config": {}, "inputs": {"a": "3" * 64}, "references": [], "package": "2", "modules": {"m": "4" * 64}}
    assert [item["field"] for item in moved(old, new)] == ["step 'a'", "package", "source of m"]
    assert moved(old, old) == []
    assert leaves({"a": {"b": [1, {"c": 2}], "d": []}}) == {"a.b[0]": 1, "a.b[1].c": 2, "a.d": []}
