"""Data fields of records, of an SDF or of the comment of an extended XYZ, as columns.

A field that holds numbers is a property; `smiles` and the field that `group` names have columns of
their own. Units are in the field `property_units` of the first record, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from molgen_energy.data.molecules import Molecule, Molecules, merge_units
from molgen_energy.errors import InputError

BONDS = "bonds"
"""The field is `given` where a molecule has bonds, `perceived` where they come from distances."""
BOND_FORM = "bond_form"
"""The field is `kekule` or `aromatic`; the latter with a reason where that was not asked for."""
UNITS = "property_units"
GROUP = "group"
TRAINED_ON = "trained_on"
"""The data that the network of samples was trained on, in words."""
CREATED_BY = "created_by"

_ORIGIN = (
    CREATED_BY, "checkpoint", TRAINED_ON, "seed", "sampler", "steps", "spacing", "eta",
    "sampling_temperature", "sampling_temperature_of", "sampling_temperature_range",
    "sampling_final_noise", "ancestral_positions", "self_condition_passes", "consistent_charges",
    "where", "guidance", "config",
)  # fmt: skip
OWN_FIELDS = frozenset(
    {*_ORIGIN, "molecule", "status", "fragments", BONDS, BOND_FORM, UNITS, GROUP}
)
"""Fields that this package writes and that are no properties of a molecule."""

_CREATOR = "molgen-energy "
FIRST_RECORDS = 100
"""How many records of a file tell which fields hold numbers."""
MOST_FIELDS = 10_000
"""How many data fields one record may have."""

_MOST_PROPERTIES = 2000  # more than usual sets of descriptors have

_SMILES = ("smiles", "SMILES")
_EXPONENT = re.compile(r"(?<=[\d.])(?:[dD]|\*\^)(?=[+-]?\d)")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_GROUP = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True)
class FieldSelection:
    """Which fields of records become columns."""

    properties: Mapping[str, str] = field(default_factory=dict)
    """Name of the property by the name of the field."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Of properties, by their name; all have one, which may be empty."""
    group: str | None = None
    """The field whose values tell groups apart; every record must have it."""
    known_units: Mapping[str, str] = field(default_factory=dict)
    """All units that the first record names, also of properties that are not chosen."""

    @classmethod
    def of(cls, names: Mapping[str, str], group: str | None = None) -> FieldSelection:
        """The properties of the given fields, with their units."""
        properties = {name: _property_name(name) for name in names}
        return cls(properties, {properties[name]: unit for name, unit in names.items()}, group)

    @classmethod
    def detect(
        cls, records: Iterable[Mapping[str, str]], group: str | None = None
    ) -> FieldSelection:
        """Every field that holds finite numbers in all the records, but `OWN_FIELDS`.

        Raises
        ------
        InputError
            Records name two units of one property.
        """
        numeric: dict[str, bool] = {}
        units: dict[str, str] = {}
        for fields in records:
            if text := fields.get(UNITS):
                try:
                    units = merge_units([units, read_units(text)])
                except ValueError as error:
                    raise InputError(str(error)) from error
            for name, text in fields.items():
                if text.strip():
                    is_number = math.isfinite(read_number(text))
                    numeric[name] = numeric.get(name, True) and is_number
        excluded = OWN_FIELDS | {*_SMILES, group}
        names = [name for name, chosen in numeric.items() if chosen and name not in excluded]
        if len(names) > _MOST_PROPERTIES:
            raise InputError(
                f"{len(names):,} data fields hold numbers, at most {_MOST_PROPERTIES:,} become "
                "properties; name those to keep with --properties, or keep none: --properties ''"
            )
        found = cls.of({name: units.get(_property_name(name), "") for name in names}, group)
        return replace(found, known_units=units)

    def columns(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """The columns of a record, as arguments of `Molecule`.

        A property is NaN where its field is missing or holds no finite number.

        Raises
        ------
        ValueError
            The field of the group is missing.
        """
        columns: dict[str, Any] = {
            "properties": {
                name: read_number(fields.get(key, "")) for key, name in self.properties.items()
            },
            "units": self.units,
        }
        for key in _SMILES:
            if key in fields:
                columns["smiles"] = fields[key].strip()
        if self.group is not None:
            if not fields.get(self.group, "").strip():
                raise ValueError(f"it lacks the field '{self.group}' of the group")
            columns["group"] = read_group(fields[self.group])
        return columns


def check_field_count(count: int) -> None:
    """Raise `ValueError` where a record has more data fields than any program writes."""
    if count > MOST_FIELDS:
        raise ValueError(f"it has more than {MOST_FIELDS:,} data fields")


def data_fields(molecule: Molecule) -> dict[str, str | float]:
    """Properties, SMILES and group of a molecule as fields; a missing value has none."""
    fields: dict[str, str | float] = {
        name: value for name, value in molecule.properties.items() if not math.isnan(value)
    }
    if molecule.smiles:
        fields["smiles"] = molecule.smiles
    if molecule.group is not None:
        fields[GROUP] = molecule.group
    return fields


def provenance(fields: Mapping[str, str]) -> dict[str, str]:
    """How this package made a file, from the fields of its first record; empty for other files."""
    if not fields.get(CREATED_BY, "").startswith(_CREATOR):
        return {}
    return {name: fields[name] for name in _ORIGIN if name in fields}


def units_field(molecules: Molecules) -> dict[str, str]:
    """The field of the units of properties; none where no unit is known."""
    units = {name: unit for name, unit in molecules.units.items() if unit}
    return {UNITS: json.dumps(units, ensure_ascii=False)} if units else {}


def read_units(text: str) -> dict[str, str]:
    """The units of `units_field`; empty for other text."""
    try:
        units = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(units, dict):
        return {}
    return {str(name): str(unit) for name, unit in units.items()}


def read_number(text: str) -> float:
    """A finite number, or NaN where `parse_number` raises."""
    try:
        return parse_number(text)
    except ValueError:
        return math.nan


def parse_number(text: str) -> float:
    """A finite number; its exponent may follow e, Fortran's d (`1.5D-03`) or Mathematica's `*^`.

    Raises
    ------
    ValueError
        The text is something else, such as `nan`, `inf` or `1_000`, or has digits of other scripts.
    """
    try:
        value = float(text)
    except ValueError:
        try:
            value = float(_EXPONENT.sub("e", text, count=1))
        except ValueError:
            value = math.nan
    if not math.isfinite(value) or "_" in text or not text.isascii():
        raise ValueError(f"'{text.strip()[:40]}' is no finite number")
    return value


def parse_integer(text: str) -> int:
    """An integer of at most 18 digits; `ValueError` says that the text is something else."""
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"'{text.strip()[:40]}' is no integer")
    return int(text)


def read_group(text: str) -> int:
    """An integer of 64 bits as it is; of other text a hash, the same in every file."""
    text = text.strip()
    value = int(text) if _GROUP.fullmatch(text) else 1 << 63
    if -(1 << 63) <= value < 1 << 63:
        return value
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _property_name(field_name: str) -> str:
    """The field's name, as a valid name of a data set of HDF5."""
    return field_name.replace("/", "_").strip() or "_"
