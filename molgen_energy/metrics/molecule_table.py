"""The results of every molecule of an evaluation, as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.metrics.accumulator import failure_reasons
from molgen_energy.metrics.checks.chunk import ChunkChecks
from molgen_energy.metrics.checks.strain import Relaxation
from molgen_energy.output import atomic_replace, named_path
from molgen_energy.tables import data_frame

_IN_MEMORY = 1 << 25  # bytes of rows, about 300,000 molecules; more are in a temporary file
_CHECKED = {
    "file": str,
    "record": int,
    "smiles": str,
    "atoms": int,
    "unstable_atoms": int,
    "stable": bool,
    "valid": bool,
    "connected": bool,
    "passes_all": bool,
    "novel": bool,
    "reason": str,
}
"""Columns of every molecule, with the types of their values."""
_AGREEMENT = {"bonds": str, "same_bonds": bool, "same_connectivity": bool}
"""Columns where given and perceived bonds are compared."""


class MoleculeTable:
    """One row for each molecule of an evaluation; `report.molecules`.

    Rows are in the order of files and records; a broken record that was skipped has none. Columns:

    - `file`, `record` (from 1), `atoms`, `unstable_atoms` (numbers of them);
    - `smiles`: canonical SMILES of the largest fragment, with implicit hydrogens; empty if invalid
      (uniqueness and novelty compare SMILES with all hydrogens, so that missing ones count);
    - `stable`, `valid`, `connected`, `passes_all`, `novel`: true or false, `novel` empty for an
      invalid molecule or without training molecules;
    - `reason`: the checks that it fails, in words;
    - with both bonds `bonds`, `given` or `perceived`, since each molecule has a row of each;
      `same_bonds` and `same_connectivity`, whether the two agree;
    - `strain_energy` (kcal/mol), `strain_rmsd` (Å), `strain_reason`, why there is none; with the
      metric `xtb` the same with `xtb_`: of the random subset, else empty;
    - with the metric `descriptors` each of them, empty for a molecule that is not complete;
    - with the metric `posebusters` of its random subset `posebusters`, whether all its checks pass,
      and `posebusters_…`, each check.

    Iterating gives a dictionary for each row, with None where a value is empty. Memory is bounded:
    the rows of more than about 300,000 molecules are in a temporary file.
    """

    def __init__(self, descriptors: bool = False, agreement: bool = False) -> None:
        self._spool = SpooledTemporaryFile(_IN_MEMORY, "w+", encoding="utf-8", newline="")
        self._writer = csv.writer(self._spool)
        self._pending: list[tuple[Any, ...]] = []
        self._last = 0  # record of `_pending`
        self._files: list[str] = []
        self._bonds = ""
        self._count = 0
        self._described, self._agreement = descriptors, agreement
        self._columns: dict[str, type] = dict(_CHECKED)
        if agreement:
            self._columns |= _AGREEMENT
        if descriptors:
            self._columns |= dict.fromkeys(DESCRIPTORS, float)
        self._in_rows = len(self._columns)
        self._later: dict[tuple[int, int], dict[str, Any]] = {}

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"MoleculeTable of {self._count:,} molecules: {', '.join(self.columns)}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def begin(self, name: str, bonds: str = "") -> None:
        """Begin with the molecules of the next file, with `given` or `perceived` bonds."""
        self._flush()
        self._files.append(name)
        self._bonds = bonds

    def add(self, checks: ChunkChecks, novel: NDArray[np.bool_] | None) -> None:
        """Add the molecules of a chunk; `novel` (M,), None without training molecules."""
        records = checks.chunk.records
        # Molecules with and without bonds of one part of a file come in two chunks.
        if records.min() > self._last:
            self._flush()
        self._last = max(self._last, int(records.max()))
        valid = checks.valid.tolist()
        fresh: list[bool | None] = [None] * len(valid)
        if novel is not None:
            known = zip(valid, novel.tolist(), strict=True)
            fresh = [is_novel if is_valid else None for is_valid, is_novel in known]
        described: list[list[str]] = [[]] * len(valid)
        if self._described:
            described = [
                [_text(None if np.isnan(number) else number) for number in row]
                for row in checks.descriptors.tolist()
            ]
        if self._agreement and checks.agreement is not None:
            found = checks.agreement
            same = zip(found.same_bonds.tolist(), found.same_connectivity.tolist(), strict=True)
            described = [
                [self._bonds, *map(str, pair), *row]
                for pair, row in zip(same, described, strict=True)
            ]
        rows = zip(
            [len(self._files) - 1] * len(valid),
            records.tolist(),
            checks.short_smiles,
            checks.chunk.molecules.sizes.tolist(),
            checks.unstable_atoms.tolist(),
            (checks.unstable_atoms == 0).tolist(),
            valid,
            (checks.fragments == 1).tolist(),
            checks.passes_all.tolist(),
            fresh,
            ["; ".join(failure_reasons(checks, k)) for k in range(len(valid))],
            strict=True,
        )
        self._pending += [(*row, *more) for row, more in zip(rows, described, strict=True)]
        self._count += len(valid)

    def add_relaxations(
        self, metric: str, records: list[int], relaxations: list[Relaxation]
    ) -> None:
        """Add the relaxations of the file's subset of records, of the metric `strain` or `xtb`."""
        self._columns |= {f"{metric}_energy": float, f"{metric}_rmsd": float}
        self._columns |= {f"{metric}_reason": str}
        for record, found in zip(records, relaxations, strict=True):
            values = {"energy": found.strain, "rmsd": found.rmsd, "reason": found.reason}
            later = self._later.setdefault((len(self._files) - 1, record), {})
            later |= {f"{metric}_{key}": value for key, value in values.items()}

    def add_posebusters(self, records: list[int], passed: Sequence[Mapping[str, bool]]) -> None:
        """Add which of PoseBusters' checks the subset of records passed, by their names."""
        self._columns |= {"posebusters": bool}
        for record, checks in zip(records, passed, strict=True):
            named = {f"posebusters_{check}": ok for check, ok in checks.items()}
            self._columns |= dict.fromkeys(named, bool)
            later = self._later.setdefault((len(self._files) - 1, record), {})
            later |= {"posebusters": all(checks.values())} | named

    def _flush(self) -> None:
        self._pending.sort(key=lambda row: int(row[1]))
        self._writer.writerows(self._pending)
        self._pending, self._last = [], 0

    def _rows(self) -> Iterator[list[str]]:
        """The rows as text, with empty text for None."""
        self._flush()
        later = list(self._columns)[self._in_rows :]
        self._spool.seek(0)
        for row in csv.reader(self._spool):
            number, record = int(row[0]), int(row[1])
            found = self._later.get((number, record), {})
            more = [_text(found.get(name)) for name in later]
            yield [self._files[number], *row[1:], *more]
        self._spool.seek(0, 2)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kinds = list(self._columns.items())
        for row in self._rows():
            pairs = zip(kinds, row, strict=True)
            yield {name: _value(text, kind) for (name, kind), text in pairs}

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the table as CSV; returns its path.

        Raises
        ------
        InputError
            The file cannot be written.
        """
        target = named_path(Path(path))
        with (
            atomic_replace(target) as output,
            output.temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self._rows())
        return target

    def to_pandas(self) -> Any:
        """The table as a pandas `DataFrame`; empty truth values are missing (dtype `boolean`).

        Raises
        ------
        InputError
            pandas is not installed.
        """
        rows = list(self)
        table = data_frame({name: [row[name] for row in rows] for name in self.columns})
        kinds = {int: "int64", float: "float64", bool: "boolean"}
        return table.astype({n: kinds[kind] for n, kind in self._columns.items() if kind in kinds})


def _text(value: str | float | None) -> str:
    """A value as in CSV, numbers with six digits; empty for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if not text:
        return None
    return text == "True" if kind is bool else kind(text)
