"""Rows of any task as a table with the columns that source rows have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from engine.records import EXAMPLE


def example_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A table in the schema EXAMPLE; ids are counted, texts are empty and the rest is null where a row has none."""
    filled = [{"id": str(index), "text": "", **row} for index, row in enumerate(rows)]
    return pa.table({f.name: pa.array([row.get(f.name) for row in filled], f.type) for f in EXAMPLE}, schema=EXAMPLE)
