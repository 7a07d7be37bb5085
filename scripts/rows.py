"""What measuring scripts share: rows of a CSV that are not measured twice."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from molgen_energy.output import atomic_replace

Row = TypeVar("Row")
_TYPES = {"str": str, "float": float, "int": int}


def read(path: Path, kind: type[Row]) -> list[Row]:
    """What was measured before, as dataclasses of texts and numbers."""
    if not path.exists():
        return []
    columns: Any = fields(kind)  # type: ignore[arg-type]
    types = {column.name: _TYPES[column.type] for column in columns}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{k: types[k](v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Any]) -> None:
    """All rows, at least one, in place of the file."""
    with (
        atomic_replace(path) as output,
        output.temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
