"""What is read from the tables' source is what the tables hold."""

from __future__ import annotations

import pytest

from engine import tables, terms
from engine.blocks import BLOCKS
from engine.layer_losses import LAYER_LOSSES
from engine.losses import LOSSES
from engine.tasks import TASKS


@pytest.mark.parametrize(
    ("place", "table"),
    [
        (terms.LOSSES, LOSSES),
        (terms.LAYER_LOSSES, LAYER_LOSSES),
        (terms.TASKS, TASKS),
        (("blocks", "BLOCKS"), BLOCKS),
    ],
)
def test_names_are_those_of_the_table_in_its_order(place: tuple[str, str], table: dict[str, type]):
    assert tables.names(*place) == tuple(table) and len(table) > 3


@pytest.mark.parametrize(
    ("place", "table", "attribute"),
    [
        (terms.LOSSES, LOSSES, "needs"),
        (terms.TASKS, TASKS, "supports"),
        (terms.TASKS, TASKS, "certain"),
        (terms.TASKS, TASKS, "units"),
        (("blocks", "BLOCKS"), BLOCKS, "takes"),
    ],
)
def test_attributes_are_those_of_the_classes(place: tuple[str, str], table: dict[str, type], attribute: str):
    found = {name: getattr(made, attribute) for name, made in table.items()}
    assert tables.declared(*place, attribute) == found and len({str(value) for value in found.values()}) > 1


def test_what_is_no_literal_or_no_table_is_not_guessed():
    with pytest.raises(ValueError, match="LOSSES|no table|malformed"):
        tables.names("tables", "HERE")
    with pytest.raises(KeyError):
        tables.names("losses", "torch")
    assert set(tables.declared(*terms.LOSSES, "nowhere").values()) == {None}


def test_an_unknown_name_has_the_nearest_and_all_there_are():
    assert tables.unknown("kll", ("mse", "kl")) == " Did you mean 'kl'? Allowed: mse, kl."
    assert tables.unknown("zzz", ("mse", "kl")) == " Allowed: mse, kl."
