"""Data fields of records become columns, and columns fields."""

from __future__ import annotations

import math

import pytest

from molgen_energy.chemistry.fields import FieldSelection, parse_number, read_group, read_number

FIRST = {"gap": "0.5", "name": "water", "seed": "7", "smiles": "O", "cid": "12", "note": ""}


def test_fields_that_hold_numbers_are_properties():
    second = {"gap": "-1e-3", "name": "3", "cid": "A7", "mu": " 2 ", "property_units": "{}"}
    found = FieldSelection.detect([FIRST, second])
    assert found.properties == {"gap": "gap", "mu": "mu"}
    columns = found.columns(FIRST)
    assert columns["properties"]["gap"] == 0.5
    assert math.isnan(columns["properties"]["mu"])
    assert columns["smiles"] == "O"
    assert found.columns(second)["properties"] == {"gap": -1e-3, "mu": 2.0}
    assert "smiles" not in found.columns(second)


def test_units_come_with_the_first_record():
    first = FIRST | {"property_units": '{"gap": "hartree", "mu": "debye"}'}
    found = FieldSelection.detect([first])
    assert found.units == {"gap": "hartree", "cid": ""}
    assert found.known_units == {"gap": "hartree", "mu": "debye"}


def test_only_chosen_fields():
    chosen = FieldSelection.of({"seed": "", "a/b": "eV"}, group="name")
    assert chosen.units == {"seed": "", "a_b": "eV"}
    columns = chosen.columns(FIRST | {"a/b": "3"})
    assert columns["properties"] == {"seed": 7.0, "a_b": 3.0}
    assert columns["group"] == chosen.columns({"name": "water"})["group"]
    assert columns["group"] != chosen.columns({"name": "steam"})["group"]
    with pytest.raises(ValueError, match="it lacks the field 'name'"):
        chosen.columns({"name": " "})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one",
        "1_000",
        "inf",
        "nan",
        "1 2",
        "1e999",
        "D1",
        "1.5D",
        "0x1D5",
        "1,5",
        "*^2",
        "1d2d3",
    ],
)
def test_no_finite_number(text):
    assert math.isnan(read_number(text))
    with pytest.raises(ValueError, match="is no finite number"):
        parse_number(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 7.5 ", 7.5), ("-1e-3", -1e-3), ("7.29479528D-03", 7.29479528e-3), ("1.d+2", 100.0),
        ("-6.4*^-2", -0.064), ("8.*^3", 8000.0), ("+.5", 0.5), ("2D0", 2.0),
    ],
)  # fmt: skip
def test_numbers_of_other_programs(text, value):
    assert read_number(text) == parse_number(text) == value


def test_groups_are_numbers_or_hashes_of_64_bits():
    assert read_group(" -12 ") == -12
    for text in ("CCO", str(1 << 70)):
        assert 1000 < read_group(text) < 1 << 63
