"""Frames of XYZ files, plain, extended (`key=value` in the comment) and of QM9.

The columns of an extended XYZ are what `Properties=name:type:count:…` says
(https://github.com/libAtoms/extxyz); without it they are element or atomic number, x, y, z, and
what follows is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from molgen_energy.chemistry import qm9
from molgen_energy.chemistry.convert import as_positions
from molgen_energy.chemistry.fields import check_field_count, parse_number, read_number
from molgen_energy.chemistry.molfiles.lines import NUL, Lines, Record
from molgen_energy.data.molecules import Molecule
from molgen_energy.elements import atomic_number, symbol

CELL = "the cell (Lattice) is dropped, molecules have none here"

_QUOTED = r"""\s*(?:"([^"\\]*(?:\\.[^"\\]*)*)"|'([^']*)'|"""
_VALUE = re.compile(_QUOTED + r"\{([^}]*)\}|(\S*))")
_VALUE_WITHOUT_BRACES = re.compile(_QUOTED + r"()(\S*))")
_COLUMN_NAMES = {
    "species": "element", "element": "element", "elements": "element", "symbol": "element",
    "symbols": "element", "z": "number", "numbers": "number", "atomic_number": "number",
    "atomic_numbers": "number", "pos": "positions", "position": "positions",
    "positions": "positions",
}  # fmt: skip
_BETWEEN_FRAMES = ("", ">")  # ORCA divides the frames of .allxyz by the second
_MOST_AHEAD = 200_000  # lines; the end of a longer bad frame is not looked for by its size
_FIRST_LOOK = 256  # lines of a long frame that are looked at before others
_MOST_EMPTY = 100  # lines between two frames
_MOST_ATOMS = 1_000_000
_ATOM = re.compile(r"\s*[A-Za-z]{1,2}(?:\s+[-+]?[0-9]+(?:\.[0-9]+)?){3}\s*")  # most lines
_MOST_VALUES = 10_000_000  # of all columns of a frame
_MOST_WORDS = 1000  # characters in which the words of a line tell what it is
_MOST_DECLARED = 4000  # characters of Properties


class Columns(NamedTuple):
    """Where element and coordinates stand in the line of an atom."""

    element: int
    x: int
    """The column of x; y and z follow."""
    total: int | None = None
    """How many columns each line must have; None allows any others after z."""


PLAIN = Columns(0, 1)
_PLAIN_COLUMNS = 4
_COLUMNS = " (columns are element, x, y, z unless the comment says Properties=…)"


class _Elements(dict[str, int]):
    """Atomic numbers by the texts that were met, for speed."""

    def __missing__(self, text: str) -> int:
        number = self[text] = atomic_number(text)
        return number


_ELEMENTS = _Elements()


def read_records(lines: Lines) -> Iterator[Record]:
    """Each frame; `_skip_bad_frame` says where the next one begins after a bad one."""
    while (line := lines.next()) is not None:
        if line.strip() not in _BETWEEN_FRAMES:
            lines.begin_record()
            yield _read_frame(line, lines)


def _read_frame(first: str, lines: Lines) -> Record:
    """Read one frame after its first line, whether it is good or bad."""
    start = lines.number
    comment = lines.ahead(0) or ""
    of_qm9 = qm9.fields_of_comment(comment)
    fields = of_qm9
    size = _size(first)
    try:
        fields = fields or _comment_fields(comment)
        if size is None:
            raise ValueError(f"expected a number of atoms, found '{first.strip()[:40]}'")
        if size < 1:
            raise ValueError(f"{size} atoms")
        if size > _MOST_ATOMS:
            raise ValueError(f"{size:,} atoms, of which at most {_MOST_ATOMS:,} are read")
        columns = _columns_of(fields)
        molecule = _parse_ahead(lines, size, columns)
    except ValueError as error:
        _skip_bad_frame(lines, size)
        return Record(start, str(error), fields)
    note = CELL if "Lattice" in fields else ""
    lines.skip(1 + size)
    if of_qm9:
        _read_end_of_qm9(lines, fields)
    return Record(start, molecule, fields, note)


def _size(first: str) -> int | None:
    """The number of atoms, None where the line holds something else."""
    text = first.strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None


def _comment_fields(comment: str) -> dict[str, str]:
    """`key=value` of a comment line; the value may be in quotes or braces."""
    fields: dict[str, str] = {}
    start, last_brace = 0, comment.rfind("}")
    while (equals := comment.find("=", start)) >= 0:
        key = comment[start:equals].split()[-1:]
        start = equals + 1
        if not key:
            continue
        # Where no brace is left that closes, every one that opens would be looked for to the end.
        pattern = _VALUE if start < last_brace else _VALUE_WITHOUT_BRACES
        match = pattern.match(comment, start)
        assert match is not None  # an empty value matches too
        double, single, braces, plain = match.groups("")
        fields[key[0]] = double.replace('\\"', '"') or single or braces or plain
        start = match.end()
    check_field_count(len(fields))
    return fields


def _columns_of(fields: Mapping[str, str]) -> Columns:
    """The columns that a comment declares, or those of a plain XYZ; `ValueError` if neither."""
    declared = fields.get("Properties", fields.get("properties"))
    if declared is None:
        return PLAIN
    return _read_properties(declared)


@lru_cache(maxsize=128)
def _read_properties(declared: str) -> Columns:
    """The columns of `name:type:count:name:type:count…`; `ValueError` says what is wrong."""
    if len(declared) > _MOST_DECLARED:
        raise ValueError(f"Properties has more than {_MOST_DECLARED:,} characters")
    parts = declared.strip().split(":")
    where: dict[str, int] = {}
    column = 0
    shown = f"Properties={declared.strip()[:60]}"
    if len(parts) % 3:
        raise ValueError(f"{shown} is not name:type:count for each column")
    for name, kind, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if kind.upper() not in ("S", "R", "I", "L") or not re.fullmatch("0*[1-9][0-9]{0,5}", text):
            raise ValueError(
                f"{shown}: '{name}:{kind}:{text}' is no name, type S, R, I or L, count"
            )
        meaning = _COLUMN_NAMES.get(name.lower())
        expected = 3 if meaning == "positions" else 1
        if meaning is not None and int(text) != expected:
            raise ValueError(f"{shown}: {name} has {text} columns, expected {expected}")
        if meaning is not None:
            where.setdefault(meaning, column)
        column += int(text)
    element = where.get("element", where.get("number"))
    if element is None or "positions" not in where:
        missing = "species or Z" if element is None else "pos"
        raise ValueError(f"{shown} lacks {missing}, so its columns are not known")
    return Columns(element, where["positions"], column)


def _parse_ahead(lines: Lines, size: int, columns: Columns) -> Molecule:
    """The molecule of the frame whose comment comes next; `ValueError` says what is wrong."""
    comment, *atoms = _body(lines, size) or [""]
    text = "".join(atoms)
    if "\0" in text or "\0" in comment:
        raise ValueError(NUL)
    if (columns.total or 0) * len(atoms) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values in all columns")
    rows = [_words(line, columns) for line in atoms]
    molecule = None
    # float reads 1_0 as 10, and digits of other scripts
    if len(rows) == size and "_" not in text and text.isascii():
        molecule = _parse_quickly(rows, columns)
    if molecule is None:
        molecule = _parse_carefully(rows, size, columns)
    if columns is PLAIN and len(rows[0]) > 4:
        _check_plain(rows, molecule)
    following = lines.ahead(size + 1)
    if following is not None and _is_atom(following, columns):
        raise ValueError(f"more atoms follow than the {size} that it names")
    return molecule


def _words(line: str, columns: Columns) -> list[str]:
    """The columns of the line of an atom; those beyond the last that is looked at are one."""
    return line.split(None, columns.total or _PLAIN_COLUMNS)


def _body(lines: Lines, size: int) -> list[str]:
    """Comment and atoms; fewer where the file ends, or where a long frame ends before its size."""
    count = checked = min(size + 1, _FIRST_LOOK)
    while True:
        body = lines.peek(count)
        if len(body) < count or count == size + 1:
            return body
        if any(len(line.split(None, 3)) < 4 for line in body[checked if count > checked else 1 :]):
            return body
        checked, count = count, min(size + 1, 2 * count)


def _parse_quickly(rows: list[list[str]], columns: Columns) -> Molecule | None:
    """The molecule, None where a line needs a closer look."""
    element, x, total = columns
    y, z = x + 1, x + 2
    try:
        numbers = [_ELEMENTS[row[element]] for row in rows]
        positions = [[float(row[x]), float(row[y]), float(row[z])] for row in rows]
    except (ValueError, IndexError):
        return None
    if total is not None and any(len(row) != total for row in rows):
        return None
    return Molecule(as_positions(positions), np.array(numbers, np.uint8))


def _parse_carefully(rows: Iterable[list[str]], size: int, columns: Columns) -> Molecule:
    """The molecule with numbers in any notation; `ValueError` names the atom that is bad."""
    atoms = [
        _parse_atom(row, columns, f"atom {k} of {size}: ") for k, row in enumerate(rows, start=1)
    ]
    if len(atoms) < size:
        raise ValueError(f"the file ends before atom {len(atoms) + 1} of {size}")
    positions = as_positions([atom[1:] for atom in atoms])
    return Molecule(positions, np.array([atom[0] for atom in atoms], np.uint8))


def _parse_atom(
    row: list[str], columns: Columns, place: str = ""
) -> tuple[int, float, float, float]:
    """Atomic number, x, y, z; `ValueError` begins with `place` and says what is wrong."""
    element, x, total = columns
    if total is not None and len(row) != total:
        found = "more" if len(row) > total else str(len(row))
        raise ValueError(f"{place}it has {found} columns, Properties names {total}")
    if len(row) < 4:
        raise ValueError(f"{place}expected element, x, y, z, found '{' '.join(row)[:40]}'")
    hint = ""
    try:
        number = atomic_number(row[element])
        hint = "" if total else _COLUMNS
        return (number, parse_number(row[x]), parse_number(row[x + 1]), parse_number(row[x + 2]))
    except ValueError as error:
        raise ValueError(f"{place}{error}{hint}") from None


def _check_plain(rows: list[list[str]], molecule: Molecule) -> None:
    """Raise `ValueError` where the second column is evidently not x.

    It counts the atoms, or holds nuclear charges as in files of GAMESS, with x, y, z after it.
    """
    if len(molecule) > 2 and all(row[1] == str(k) for k, row in enumerate(rows, start=1)):
        raise ValueError(f"column 2 counts the atoms and is not x{_COLUMNS}")
    numbers = molecule.atomic_numbers
    if (molecule.positions[:, 0] == numbers).all() and (numbers != numbers[0]).any():
        raise ValueError(f"column 2 holds nuclear charges and is not x{_COLUMNS}")


def _is_atom(line: str, columns: Columns) -> bool:
    try:
        _parse_atom(_words(line, columns), columns)
    except ValueError:
        return False
    return True


def _read_end_of_qm9(lines: Lines, fields: dict[str, str]) -> None:
    """Read what follows the atoms in a file of QM9: frequencies, SMILES, InChI, as far as it is
    there; the SMILES becomes a field."""
    frequencies = (lines.ahead(0) or "")[:_MOST_WORDS].split()
    if not frequencies or not all(map(_is_number, frequencies)) or frequencies[0].isdecimal():
        return
    lines.skip(1)
    smiles = (lines.ahead(0) or "").split(None, 2)
    if len(smiles) not in (1, 2) or smiles[0].isdecimal():
        return
    fields["smiles"] = smiles[0]
    lines.skip(1)
    if (lines.ahead(0) or "").startswith("InChI="):
        lines.skip(1)


def _is_number(text: str) -> bool:
    return not np.isnan(read_number(text))


def _skip_bad_frame(lines: Lines, size: int | None) -> None:
    """Read the lines of a bad frame of a named size, from the comment on.

    A frame with the right number of lines ends there, so that bad frames in a row are counted one
    by one. Otherwise the next frame begins with a number alone, or with two lines of which neither
    reads as an atom, before one that does.
    """
    comment = lines.ahead(0)
    if comment is None:
        return
    left = _length_by_size(lines, size)
    if _is_number_alone(comment) and not _resembles_atom(lines.ahead(1)):
        fits = _resembles_atom(lines.ahead(2)) and _is_boundary(lines, 2 + int(comment))
        if fits or _is_good_frame(lines):
            return  # the comment and all atoms are missing
    while True:
        lines.skip(1)
        left = None if left is None else left - 1
        line = lines.ahead(0)
        if line is None or left == 0 or _begins_without_number(lines, 0):
            return
        if _is_number_alone(line) and _begins_with_number(lines, int(line), left):
            return


def _length_by_size(lines: Lines, size: int | None) -> int | None:
    """How many lines the frame has by its size, None where they do not bear that out."""
    if size is None or not 0 <= size < _MOST_AHEAD:
        return None
    if size and _resembles_atom(lines.ahead(0)) and _is_boundary(lines, size):
        return size  # the comment is missing
    if not _is_boundary(lines, size + 1):
        return None
    others, has_number = 0, False
    for line in islice(lines.iter_ahead(size + 1), 1, None):
        others += not _resembles_atom(line)
        has_number = has_number or _is_number_alone(line)
        if others > 1 and has_number:
            return None
    return size + 1


def _is_good_frame(lines: Lines) -> bool:
    """Whether the next lines are a whole frame."""
    size = _size(lines.ahead(0) or "")
    if size is None or not 0 < size < _MOST_AHEAD or lines.ahead(size + 1) is None:
        return False
    if _resembles_atom(lines.ahead(size + 2)):
        return False
    try:
        columns = _columns_of(_comment_fields(lines.ahead(1) or ""))
        atoms = islice(lines.iter_ahead(size + 2), 2, None)
        _parse_carefully((_words(line, columns) for line in atoms), size, columns)
    except ValueError:
        return False
    return True


def _begins_with_number(lines: Lines, size: int, left: int | None) -> bool:
    """Whether the number in the next line is that of a frame, not what is left of an atom's line.

    Where it is known how many lines are left of the frame before it, a frame of that size must end
    well too.
    """
    if not 0 < size < _MOST_AHEAD:
        return left is None
    if _resembles_atom(lines.ahead(1)):  # the comment is missing
        atoms = islice(lines.iter_ahead(1 + size), 1, None)
        fits = all(map(_resembles_atom, atoms)) and _is_boundary(lines, 1 + size)
        return fits and left is None
    return left is None or (left != 1 and _is_boundary(lines, 2 + size))


def _is_boundary(lines: Lines, k: int) -> bool:
    """Whether the file ends k lines ahead, or a frame may begin there, after empty lines."""
    before = lines.ahead(k - 1)
    if before is None:
        return False
    last = k + _MOST_EMPTY
    while (line := lines.ahead(k)) is not None and not line.strip() and k < last:
        k += 1
    if line is None or k == last:
        return True
    if _is_number_alone(before):  # else this line may be the comment after it
        return _is_number_alone(line) and not _resembles_atom(lines.ahead(k + 1))
    return _is_number_alone(line) or _begins_without_number(lines, k)


def _begins_without_number(lines: Lines, k: int) -> bool:
    """Whether a frame begins k lines ahead whose first line is not the number that it should be."""
    line = lines.ahead(k)
    if line is None or not line.strip() or _is_number_alone(line) or _resembles_atom(line):
        return False
    return not _resembles_atom(lines.ahead(k + 1)) and _resembles_atom(lines.ahead(k + 2))


def _is_number_alone(line: str) -> bool:
    return re.fullmatch(r"\s*[0-9]{1,18}\s*", line) is not None


def _resembles_atom(line: str | None) -> bool:
    """Whether a line is that of an atom, perhaps of a damaged one."""
    return _has_coordinates((line or "")[:_MOST_WORDS])


@lru_cache(maxsize=1000)  # small packed files can hold a million equal lines
def _has_coordinates(line: str) -> bool:
    if _ATOM.fullmatch(line):
        return True
    first, *rest = line.split() or [""]
    if len(rest) < (2 if first.isalpha() else 3) or qm9.fields_of_comment(line):
        return False
    return 2 * sum(map(_is_number, rest)) >= len(rest)


def format_record(molecule: Molecule, fields: Mapping[str, str | float]) -> str:
    """A frame of a molecule with fields in the comment; text is quoted, numbers are not."""
    pairs = (f"{_key(name)}={_quoted(value)}" for name, value in fields.items() if value != "")
    comment = " ".join(pairs)
    atoms = (
        f"{symbol(z):<2} {x:14.6f} {y:14.6f} {z_:14.6f}"
        for z, (x, y, z_) in zip(
            molecule.atomic_numbers.tolist(), molecule.positions.tolist(), strict=True
        )
    )
    return "\n".join([str(len(molecule)), comment, *atoms]) + "\n"


def _key(name: str) -> str:
    return re.sub(r"[\s=\"']+", "_", name)


def _quoted(value: str | float) -> str:
    """A value as the comment can hold it: text in quotes, without line breaks."""
    if not isinstance(value, str):
        return repr(value)
    value = " ".join(value.split())
    if "'" not in value:
        return f"'{value}'"
    return '"' + value.replace('"', "'") + '"'
