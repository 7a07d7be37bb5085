"""Which records of a file have bonds of their own, found without parsing all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from molgen_energy.chemistry.bonds import are_perceived
from molgen_energy.chemistry.fields import BONDS
from molgen_energy.chemistry.molfiles.lines import Lines
from molgen_energy.chemistry.molfiles.sdf import parse_mol_block, split_records
from molgen_energy.data.molecules import Molecule

_DECLARED_CHECKED = 100
_FIELD = f"<{BONDS}>"


class GivenBonds(NamedTuple):
    """What the records of a file say about their bonds."""

    some: bool
    """Whether a record has bonds that were not perceived from distances."""
    without: int | None
    """Number of the first record that has none, from 1; None if every record has them."""
    declared_perceived: bool = False
    """Whether a record declares its bonds as perceived from distances, and they are."""

    @property
    def every(self) -> bool:
        """Whether every record has bonds that were not perceived from distances."""
        return self.some and self.without is None


NO_BONDS = GivenBonds(False, 1)


class ScannedRecord(NamedTuple):
    """The bonds of one record."""

    has_bonds: bool
    """Whether it has any, or needs none as a single atom or as ions, or says that its bonds are
    given: a generated molecule may have none."""
    declared_perceived: bool
    """Whether it says that its bonds were perceived from distances."""
    parse: Callable[[], Molecule | None]
    """The molecule, None if it cannot be read."""


def find_given_bonds(records: Iterable[ScannedRecord]) -> GivenBonds:
    """Whether records have bonds of their own; reads only as far as it needs to know.

    Bonds that a record declares as perceived do not count, unless another program has replaced
    them. The first 100 such records are compared with what perception finds.
    """
    some = replaced = False
    without: int | None = None
    declared: list[int] = []
    for number, record in enumerate(records, start=1):
        if not record.has_bonds:
            without = without or number
        elif not record.declared_perceived:
            some = True
        elif not replaced:
            declared.append(number)
            molecule = record.parse()
            replaced = molecule is not None and not are_perceived(molecule)
        if len(declared) == _DECLARED_CHECKED and not replaced:
            break
        if without and (some or replaced):
            break
    lacking = [] if replaced else declared[:1]
    if without is not None:
        lacking.append(without)
    return GivenBonds(some or replaced, min(lacking, default=None), bool(declared) and not replaced)


def scan_xyz(lines: Lines) -> Iterator[ScannedRecord]:
    """An XYZ file has no bonds, which its first record shows."""
    if lines.next() is not None:
        yield ScannedRecord(False, False, lambda: None)


def scan_sdf(lines: Lines) -> Iterator[ScannedRecord]:
    """The records of an SDF, of which only the counts and the field `bonds` are read."""
    for _, record in split_records(lines):
        declared = next(
            (v for header, v in pairwise(record) if header[0] == ">" and _FIELD in header), ""
        )
        has_bonds = _has_bonds(record) or declared.startswith("given")
        yield ScannedRecord(has_bonds, declared.startswith("perceived"), _parser(record))


def _parser(record: list[str]) -> Callable[[], Molecule | None]:
    def parsed() -> Molecule | None:
        molecule = parse_mol_block("".join(record))
        return molecule if isinstance(molecule, Molecule) else None

    return parsed


def _has_bonds(record: list[str]) -> bool:
    """By the counts line; a broken record counts as one with bonds, reading it says why."""
    counts = record[3] if len(record) > 3 else ""
    texts = [counts[:3], counts[3:6]]
    if "V3000" in counts:
        texts = next((line.split()[3:5] for line in record if "V30 COUNTS" in line), [])
    try:
        atoms, bonds = map(int, texts)
    except ValueError:
        return True
    if bonds > 0 or atoms <= 1:
        return True
    return any(line.startswith("M  CHG") or ("V30" in line and "CHG=" in line) for line in record)
