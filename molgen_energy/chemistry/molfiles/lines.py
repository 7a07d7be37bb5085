"""Lines of a text file, plain or gzip, and what is read of one record."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO, NamedTuple

from molgen_energy.data.molecules import Molecule


class Record(NamedTuple):
    """One record of a file."""

    line: int
    """Its first line, from 1."""
    molecule: Molecule | str
    """The molecule, or why it cannot be read."""
    fields: dict[str, str]
    """Data fields: those of an SDF, or keys of the comment of an XYZ."""


class Lines:
    """Lines with their numbers, some of which can be put back."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str]  # closed by `close`
        if path.name.lower().endswith(".gz"):
            self._file = gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
        else:
            self._file = path.open(encoding="utf-8-sig", errors="replace")
        self._returned: list[str] = []
        self.number = 0
        """Of the line that was read last, from 1."""

    def next(self) -> str | None:
        """The next line, None at the end."""
        line = self._returned.pop() if self._returned else next(self._file, None)
        if line is not None:
            self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        """Have the last lines read again."""
        self._returned.extend(reversed(lines))
        self.number -= len(lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
