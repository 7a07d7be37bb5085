"""Files of molecules (SDF, multi-XYZ), read and written one record at a time.

Reading keeps one record in memory, accepts gzip, and names the file, the record and the line of
what it cannot read. Writing perceives bonds and judges each molecule, since the formats that carry
bonds need them.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rdkit import Chem, rdBase

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, ORDERS, build, max_neighbours, sanitize
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError
from molgen_energy.output import atomic_replace, check_file

PERCEIVED = "bonds"
"""Field of an SDF that says `perceived` where its bonds were found from distances."""

_MOST_NAMED = 5


class BadRecord(NamedTuple):
    """A record that was skipped: its number and line in the file, both from 1, and why."""

    number: int
    line: int
    reason: str


class MoleculeReader:
    """Iterate over the molecules of an SDF or multi-XYZ file (plain or gzip).

    Parameters
    ----------
    path
        Ends in .sdf, .mol, .xyz, or one of these and .gz.
    skip_bad
        Go on behind a bad record and remember it in `skipped`; else raise.
    elements
        Symbols that may occur, a record with another is bad; None allows all.

    Raises
    ------
    InputError
        The file is missing, empty or of another kind; a record is bad and `skip_bad` is false.
    """

    def __init__(
        self, path: Path, skip_bad: bool = False, elements: list[str] | None = None
    ) -> None:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name an SDF or XYZ file")
        check_file(path)
        self.path = path
        self.skip_bad = skip_bad
        self._allowed = None if elements is None else {atomic_number(name) for name in elements}
        self.skipped: list[BadRecord] = []
        self.skipped_count = 0
        self.count = 0
        self.number = 0
        """Of the record that was read last, from 1."""
        self.fields: dict[str, str] = {}
        """What the first record says besides its atoms: the data fields of an SDF."""
        self.bonds_perceived = False
        """Whether the record that was read last says that its bonds were found from distances."""
        kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        if kind not in ("sdf", "mol", "xyz"):
            raise InputError(f"{path} is no SDF or XYZ file (.sdf, .xyz, also .gz)")
        self._records = _sdf_records if kind in ("sdf", "mol") else _xyz_records

    def __iter__(self) -> Iterator[Molecule]:
        self.count = self.skipped_count = self.number = 0
        self.skipped = []
        lines = _Lines(self.path)
        try:
            for line, record in self._records(lines, self):
                self.number += 1
                reason = record if isinstance(record, str) else self._unusable(record)
                if isinstance(record, Molecule) and not reason:
                    self.count += 1
                    yield record
                    continue
                self._skip(line, reason)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.number += 1
            if not (self.skip_bad and self.count):
                raise InputError(
                    f"{self.path} is cut off or no gzip file, behind record {self.number - 1} "
                    f"({error}); --skip-bad takes what can be read"
                ) from error
            self._skip(lines.number, f"the file is cut off ({error})")
        finally:
            lines.close()
        if self.count == 0:
            bad = self.skipped_count
            what = f"no usable molecule ({bad} bad records)" if bad else "no molecule"
            raise InputError(f"{self.path} holds {what}")

    def _skip(self, line: int, reason: str) -> None:
        """Remember the record that was read last as a bad one, or raise."""
        self.skipped_count += 1
        if len(self.skipped) < _MOST_NAMED:
            self.skipped.append(BadRecord(self.number, line, reason))
        if not self.skip_bad:
            raise InputError(
                f"{self.path}: record {self.number} (line {line}): {reason}; "
                "mend it or pass --skip-bad to leave out such records"
            )

    def _unusable(self, molecule: Molecule) -> str:
        """What is wrong with a molecule that was read, or nothing."""
        if len(molecule) == 0:
            return "no atoms"
        if not np.isfinite(molecule.positions).all():
            atom = int(np.flatnonzero(~np.isfinite(molecule.positions).all(axis=1))[0]) + 1
            return f"the coordinates of atom {atom} are not finite"
        if self._allowed is not None:
            foreign = set(molecule.atomic_numbers.tolist()) - self._allowed
            if foreign:
                allowed = ", ".join(symbol(z) for z in sorted(self._allowed))
                return f"it holds {symbol(min(foreign))}, which is not among {allowed}"
        return ""

    def chunks(self, size: int) -> Iterator[MoleculeChunk]:
        """The molecules in pieces of at most `size`."""
        molecules = ((self.number, molecule) for molecule in self)
        while part := list(islice(molecules, size)):
            records, piece = zip(*part, strict=True)
            yield MoleculeChunk(np.array(records, np.int64), Molecules.from_list(piece))


class _Lines:
    """Lines of a text file, plain or gzip, with their numbers and the means to put some back."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str]  # closed by `close`
        if path.name.lower().endswith(".gz"):
            self._file = gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
        else:
            self._file = path.open(encoding="utf-8-sig", errors="replace")
        self._returned: list[str] = []
        self.number = 0  # of the line that was read last

    def next(self) -> str | None:
        line = self._returned.pop() if self._returned else next(self._file, None)
        if line is not None:
            self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        self._returned.extend(reversed(lines))
        self.number -= len(lines)

    def close(self) -> None:
        self._file.close()


def _sdf_records(lines: _Lines, reader: MoleculeReader) -> Iterator[tuple[int, Molecule | str]]:
    """Line number and molecule, or what is wrong, of each record up to its `$$$$`."""
    while True:
        start = lines.number + 1
        record: list[str] = []
        while (line := lines.next()) is not None and not line.startswith("$$$$"):
            record.append(line)
        if reader.number == 0:
            reader.fields = _data_fields(record)
        reader.bonds_perceived = _says_perceived(record)
        if any(text.strip() for text in record):
            yield start, _parse_mol_block("".join(record))
        elif line is not None:
            yield start, "an empty record"
        if line is None:
            return


def _says_perceived(record: list[str]) -> bool:
    """Whether the data fields of an SDF record say so; quicker than reading them all."""
    for k, line in enumerate(record[:-1]):
        if line.startswith(">") and f"<{PERCEIVED}>" in line:
            return record[k + 1].startswith("perceived")
    return False


def _data_fields(record: list[str]) -> dict[str, str]:
    """The data fields of an SDF record, `> <name>` and the lines up to an empty one."""
    fields: dict[str, str] = {}
    name = None
    for line in record:
        header = re.match(r">.*<([^>]+)>", line)
        if header:
            name = header[1]
            fields[name] = ""
        elif not line.strip():
            name = None
        elif name is not None:
            fields[name] += line
    return {name: value.rstrip("\n") for name, value in fields.items()}


def _parse_mol_block(block: str) -> Molecule | str:
    with rdBase.BlockLogs():
        try:
            parsed = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
        except RuntimeError as error:
            return f"no readable mol block ({str(error).splitlines()[0]})"
    if parsed is None:
        return "no readable mol block (cut off, or counts that do not fit)"
    numbers = [atom.GetAtomicNum() for atom in parsed.GetAtoms()]
    if 0 in numbers:
        return f"atom {numbers.index(0) + 1} is no chemical element"
    if parsed.GetNumConformers() == 0:
        return "no atoms" if not numbers else "no coordinates"
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondType()) for b in parsed.GetBonds()]
    for i, j, kind in bonds:
        if kind not in ORDERS:
            return f"the bond of atoms {i + 1} and {j + 1} has no order 1, 2, 3 or aromatic"
    return Molecule(
        _positions(parsed.GetConformer().GetPositions()),
        np.array(numbers, np.uint8),
        np.array([atom.GetFormalCharge() for atom in parsed.GetAtoms()], np.int8),
        np.array([(i, j) for i, j, _ in bonds], np.uint16).reshape(-1, 2),
        np.array([ORDERS[kind] for _, _, kind in bonds], np.uint8),
    )


def _positions(values: ArrayLike) -> NDArray[np.float32]:
    """Coordinates (N, 3) as they are kept; infinite, without a warning, where they do not fit."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32)


def _xyz_records(lines: _Lines, reader: MoleculeReader) -> Iterator[tuple[int, Molecule | str]]:
    """Line number and molecule, or what is wrong, of each frame.

    Behind a bad frame the next one is looked for: a line with a number alone, a comment, and a
    line that reads as an atom.
    """
    while True:
        line = lines.next()
        if line is None:
            return
        if not line.strip():
            continue
        start = lines.number
        record = [line]
        parsed = _parse_frame(lines, record)
        following = lines.next()
        if following is not None:
            lines.put_back([following])
            if isinstance(parsed, Molecule) and not isinstance(_parse_atom(following), str):
                parsed = f"more atoms follow than the {len(parsed)} that it names"
        if reader.number == 0 and len(record) > 1:
            reader.fields = dict(re.findall(r"(\w+)='([^']*)'", record[1]))
        yield start, parsed
        if isinstance(parsed, str):
            lines.put_back(record[1:])
            _seek_frame(lines)


def _parse_frame(lines: _Lines, record: list[str]) -> Molecule | str:
    """Read one frame behind its first line; every line read is added to `record`."""
    try:
        size = int(record[0])
    except ValueError:
        return f"expected a number of atoms, found '{record[0].strip()[:40]}'"
    if size < 1:
        return f"{size} atoms"
    positions, numbers = [], []
    for k in range(size + 1):
        line = lines.next()
        if line is None:
            return f"the file ends before atom {max(k, 1)} of {size}"
        record.append(line)
        if k == 0:
            continue  # the comment
        atom = _parse_atom(line)
        if isinstance(atom, str):
            return f"atom {k} of {size}: {atom}"
        numbers.append(atom[0])
        positions.append(atom[1:])
    return Molecule(_positions(positions), np.array(numbers, np.uint8))


def _parse_atom(line: str) -> tuple[int, float, float, float] | str:
    fields = line.split()
    if len(fields) < 4:
        return f"expected element, x, y, z, found '{line.strip()[:40]}'"
    try:
        return (atomic_number(fields[0]), float(fields[1]), float(fields[2]), float(fields[3]))
    except ValueError as error:
        return str(error)


def _seek_frame(lines: _Lines) -> None:
    while (line := lines.next()) is not None:
        if not line.strip().isdigit():
            continue
        ahead = [text for text in (lines.next(), lines.next()) if text is not None]
        is_frame = len(ahead) == 2 and not isinstance(_parse_atom(ahead[1]), str)
        lines.put_back([line, *ahead] if is_frame else ahead)
        if is_frame:
            return


def count_records(path: Path) -> int:
    """Whole records of an SDF (`$$$$`) or frames of an XYZ, counted without looking into them."""
    with path.open(encoding="utf-8") as lines:
        if path.suffix.lower() == ".sdf":
            return sum(line.startswith("$$$$") for line in lines)
        frames = 0
        for line in lines:
            rest = int(line) + 1  # a comment, then the atoms
            if sum(1 for _ in islice(lines, rest)) < rest:
                break
            frames += 1
        return frames


class MoleculeTextWriter:
    """Write SDF or XYZ piece by piece; the file appears under its name when the block succeeds.

    Every molecule becomes a record. Bonds are perceived from distances, as the SDF field `bonds`
    says; the fields `status` (`valid`, or why RDKit refuses the molecule) and `fragments` say what
    came of it. Where coordinates are not finite, no format can hold them: the atoms are put at the
    origin, without bonds, and the status says so. A crowd of atoms is written without bonds too.

    Parameters
    ----------
    path
        Ends in .sdf or .xyz.
    fields
        Said of every molecule: data fields of an SDF, the comment line of an XYZ.
    once
        Said of the first molecule of an SDF only, since it is long.
    """

    def __init__(
        self, path: Path, fields: dict[str, str], once: dict[str, str] | None = None
    ) -> None:
        self._path = path
        self._fields = fields
        self._once = once or {}
        self._record = _sdf_record if path.suffix.lower() == ".sdf" else _xyz_record
        self.count = 0

    def __enter__(self) -> MoleculeTextWriter:
        self._stack = ExitStack()
        self.output = self._stack.enter_context(atomic_replace(self._path))
        self._file = self._stack.enter_context(self.output.temporary.open("w", encoding="utf-8"))
        return self

    def append(self, molecules: Molecules, numbers: NDArray[np.int64] | None = None) -> None:
        """Write molecules behind those that are there, in their order.

        `numbers` (M,) are what they are called by; by default that counts the file's records.
        """
        for k, molecule in enumerate(perceive(molecules)):
            number = self.count if numbers is None else int(numbers[k])
            fields = {"molecule": str(number)} | self._fields
            if self.count == 0 and self._record is _sdf_record:
                fields |= self._once
            self._file.write(self._record(molecule, fields))
            self.count += 1

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _sdf_record(molecule: Molecule, fields: dict[str, str]) -> str:
    if np.isfinite(molecule.positions).all():
        checked = sanitize(molecule)
        status, fragments = checked.reason or "valid", checked.fragments
        if max_neighbours(molecule) > MAX_NEIGHBOURS:
            molecule = Molecule(molecule.positions, molecule.atomic_numbers)
    else:
        molecule = Molecule(np.zeros_like(molecule.positions), molecule.atomic_numbers)
        status, fragments = "coordinates are not finite", len(molecule)
    with rdBase.BlockLogs():
        built = build(molecule, positions=True)
        built.UpdatePropertyCache(strict=False)
        built.SetProp("_Name", f"molecule {fields['molecule']}")
        block = Chem.MolToMolBlock(built, kekulize=False)
    fields = fields | {PERCEIVED: "perceived", "status": status, "fragments": str(fragments)}
    # An empty line would end a field.
    data = "".join(f">  <{key}>\n{value.strip()}\n\n" for key, value in fields.items() if value)
    return f"{block}{data}$$$$\n"


def _xyz_record(molecule: Molecule, fields: dict[str, str]) -> str:
    positions = molecule.positions
    if not np.isfinite(positions).all():
        positions, fields = np.zeros_like(positions), fields | {"status": "coordinates not finite"}
    comment = " ".join(f"{key}={value!r}" for key, value in fields.items())
    atoms = (
        f"{symbol(z):<2} {x:14.6f} {y:14.6f} {z_:14.6f}"
        for z, (x, y, z_) in zip(molecule.atomic_numbers.tolist(), positions.tolist(), strict=True)
    )
    return "\n".join([str(len(molecule)), comment, *atoms]) + "\n"
