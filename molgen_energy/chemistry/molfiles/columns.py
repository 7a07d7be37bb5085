"""Lines of a mol block that RDKit reads otherwise than they are meant, without an error.

Of V2000 it cuts columns out of each line; shifted by one column, a line has other values. Of V3000
it reads the beginning of a word that is no number: `x` is 0, and `1_0` is 1. The columns are those
of "CTfile Formats" (BIOVIA, 2020).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from molgen_energy.chemistry.fields import parse_number

COUNTS = 3
"""The line of the counts in a mol block, from 0."""

_COORDINATE_ENDS = (0, 10, 20, 30)
_NUMBER_ENDS = (34, 36, *range(39, 70, 3))
_BOND_ENDS = (0, 3, 6, 9)
_COUNTS_LINE = "the numbers of atoms and bonds in columns 1-3 and 4-6"
_ATOM_LINE = "an atom (x in columns 1-10, y 11-20, z 21-30, the element 32-34, then numbers)"
_BOND_LINE = "a bond (its atoms and order in columns 1-3, 4-6 and 7-9)"
_CHARGE_LINE = "pairs of an atom and a charge in columns of four"
_PROPERTY_LINE = "a property (its name in columns 4-6)"
_SHOWN = 40  # characters of a line
_THREE = r"(?:  [0-9]| [0-9]{2}|[0-9]{3})"  # columns
_COUNT_FIELDS = re.compile(_THREE * 2)
_PROPERTY = re.compile(r"M  [A-Z0-9$]{3}(?: |$)")
# RDKit reads +1 as 0.
_CHARGES = re.compile(rf"M  CHG{_THREE}(?: {_THREE} (?:  [0-9]| [-0-9][0-9]|[-0-9][0-9]{{2}}))*\s*")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_MOST_CHARGE = 127  # RDKit keeps 8 bits, and has no message for more

# A line with 0 for each digit; files have few such shapes, so that looking them up is enough.
_SHAPE = bytes.maketrans(b"123456789", b"000000000")
_MOST_SHAPES = 50_000

_V30 = "M  V30 "
_COUNT = re.compile(r"[0-9]{1,18}")
# What most programs write; other lines are looked at word by word.
_PLAIN_ATOMS = re.compile(
    r"M  V30 BEGIN ATOM\n"
    r"(?:M  V30 [0-9]+ [A-Za-z]+(?: -?[0-9]+(?:\.[0-9]+)?){3} [0-9]+(?: [A-Z]+=[0-9]+)*\n)*"
    r"M  V30 END ATOM"
)
_PLAIN_BONDS = re.compile(
    r"M  V30 BEGIN BOND\n"
    r"(?:M  V30 [0-9]+ [0-9]+ [0-9]+ [0-9]+(?: [A-Z]+=[0-9]+)*\n)*"
    r"M  V30 END BOND"
)


class Fault(NamedTuple):
    """The first line of a mol block that RDKit reads otherwise than it is meant."""

    line: int
    """In the block, from 0."""
    reason: str
    by_words: bool = False
    """Whether the atoms are not meant to be in columns, so that their words can be read."""


def find_fault(block: str) -> Fault | None:
    """The first fault of a mol block, V2000 or V3000; None if there is none.

    Atoms need not be in the columns of V2000 where none of them is, as in files that were written
    by hand, or where a coordinate is wider than its columns.
    """
    end = block.find("\nM  END")
    head = block[: end + 1] if end >= 0 else block
    if "V3000" in head:
        return _fault_of_v3000(head)
    counts = head.split("\n", COUNTS + 1)[COUNTS:-1]
    if not counts:  # RDKit says so
        return None
    if not _COUNT_FIELDS.match(counts[0]):
        return _unexpected(_COUNTS_LINE, COUNTS, counts[0])
    bonds = COUNTS + 1 + int(counts[0][:3])
    rest = bonds + int(counts[0][3:6])
    shapes = head.encode("utf-8", "replace").translate(_SHAPE).split(b"\n")
    if misplaced := _atoms.misplaced(shapes[COUNTS + 1 : bonds]):
        k = COUNTS + 1 + misplaced[0]
        by_words = len(misplaced) == bonds - COUNTS - 1 or all(
            _is_wide(shapes[COUNTS + 1 + m].decode()) for m in misplaced
        )
        return _unexpected(_ATOM_LINE, k, head.split("\n")[k], by_words)
    if misplaced := _bonds.misplaced(shapes[bonds:rest]):
        k = bonds + misplaced[0]
        return _unexpected(_BOND_LINE, k, head.split("\n")[k])
    if len(shapes) > rest + 1:  # after the last line break there is an empty one
        return _fault_of_properties(head.split("\n"), rest)
    return None


def _unexpected(expected: str, line: int, text: str, by_words: bool = False) -> Fault:
    return Fault(line, f"expected {expected}, found '{text[:_SHOWN].rstrip()}'", by_words)


class _Shapes:
    """The shapes of lines that are in the columns of the format, as far as they were met."""

    def __init__(self, in_columns: Callable[[str], bool]) -> None:
        self._in_columns = in_columns
        self._known: set[bytes] = set()

    def misplaced(self, shapes: list[bytes]) -> list[int]:
        """Which of some lines are not in the columns."""
        if self._known.issuperset(shapes):
            return []
        if len(self._known) > _MOST_SHAPES:
            self._known.clear()
        found = []
        for k, shape in enumerate(shapes):
            if shape not in self._known:
                if self._in_columns(shape.decode()):
                    self._known.add(shape)
                else:
                    found.append(k)
        return found


def _is_atom(shape: str) -> bool:
    """Coordinates end in columns 10, 20, 30; the element is in 32-34; then numbers, or nothing."""
    for start, end in pairwise(_COORDINATE_ENDS):
        if not _is_coordinate(shape[start:end]):
            return False
    name = shape[31:34].strip()
    if not shape.isascii() or shape[30:31] != " " or not name or " " in name:
        return False
    return has_numbers_in_columns(shape)


def has_numbers_in_columns(atom: str) -> bool:
    """Whether the numbers after the element are in the columns, as far as there are any."""
    return all(_is_integer(atom[start:end]) for start, end in pairwise(_NUMBER_ENDS))


def _is_coordinate(field: str) -> bool:
    try:
        parse_number(field)
    except ValueError:
        return False
    return not field[-1].isspace()


def _is_integer(field: str) -> bool:
    """Whether a field is empty or a number at its end."""
    return not field.strip(" ") or _INTEGER.fullmatch(field.lstrip(" ")) is not None


def _is_bond(shape: str) -> bool:
    fields = [shape[start:end] for start, end in pairwise(_BOND_ENDS)]
    return all(field.strip(" ") and _is_integer(field) for field in fields) and not (
        shape[9:].strip(" 0-+")
    )


_atoms = _Shapes(_is_atom)
_bonds = _Shapes(_is_bond)


def _is_wide(shape: str) -> bool:
    """Whether a coordinate does not fit its columns, so that all after it is shifted."""
    return any(len(word) > _COORDINATE_ENDS[1] for word in shape.split()[:3])


def _fault_of_properties(lines: list[str], first: int) -> Fault | None:
    """Names of properties in other columns have no meaning for RDKit, charges another one."""
    is_text = False
    for k, line in enumerate(lines[first:], start=first):
        if line.startswith("M ") and not is_text:
            if not _PROPERTY.match(line):
                return _unexpected(_PROPERTY_LINE, k, line)
            if line.startswith("M  CHG") and parse_charges(line) is None:
                return _unexpected(_CHARGE_LINE, k, line)
        is_text = line.startswith(("A  ", "G  ")) and not is_text
    return None


def parse_charges(line: str) -> list[tuple[int, int]] | None:
    """The atoms and charges of a line `M  CHG`; None unless it has as many as it says."""
    if not _CHARGES.fullmatch(line):
        return None
    values = [int(line[start : start + 4]) for start in range(9, len(line.rstrip()), 4)]
    pairs = list(zip(values[::2], values[1::2], strict=True))
    if len(pairs) != int(line[6:9]) or any(abs(charge) > _MOST_CHARGE for _, charge in pairs):
        return None
    return pairs


def _fault_of_v3000(head: str) -> Fault | None:
    atoms, bonds = _PLAIN_ATOMS.search(head), _PLAIN_BONDS.search(head)
    plain = atoms is not None and (bonds is not None or "BEGIN BOND" not in head)
    section = ""
    count = head.count("\n")
    for k, line in _logical_lines(head):
        words = line.split()
        if words[:1] in (["BEGIN"], ["END"]):
            section = words[1] if words[0] == "BEGIN" and len(words) > 1 else ""
            if plain and section == "ATOM" and "CHG=" not in head:
                return None
            continue
        reason = ""
        if words[:1] == ["COUNTS"]:
            reason = _fault_of_counts(words, count)
        elif section == "ATOM":
            reason = _fault_of_atom(words)
        elif section == "BOND" and not all(map(_INTEGER.fullmatch, words[:4])):
            reason = "number, order and two atoms of a bond are not integers"
        if reason:
            return Fault(k, reason)
    return None


def _logical_lines(head: str) -> Iterator[tuple[int, str]]:
    """What follows `M  V30 `, with the number of the line; a line that ends in `-` goes on."""
    parts: list[str] = []
    for k, line in enumerate(head.split("\n")):
        if line.startswith(_V30):
            parts.append(line[len(_V30) :].rstrip())
            if not parts[-1].endswith("-"):
                yield k + 1 - len(parts), "".join(part.removesuffix("-") for part in parts)
                parts = []


def _fault_of_counts(words: list[str], lines: int) -> str:
    """RDKit takes memory for all the atoms that a block names."""
    if not all(map(_COUNT.fullmatch, words[1:3])):
        return f"'{' '.join(words[1:3])[:40]}' are no numbers of atoms and bonds"
    named = max(map(int, words[1:3]), default=0)
    return f"it names {named:,} atoms or bonds in {lines:,} lines" if named > lines else ""


def _fault_of_atom(words: list[str]) -> str:
    if words and not _COUNT.fullmatch(words[0]):
        return f"'{words[0][:40]}' is no number of an atom"
    try:
        for word in words[2:5]:
            parse_number(word)
    except ValueError as error:
        return f"the coordinate {error}"
    for word in words[6:]:
        name, _, value = word.partition("=")
        if name == "CHG" and not (_INTEGER.fullmatch(value) and abs(int(value)) <= _MOST_CHARGE):
            return f"the charge '{value[:40]}' is none"
    return ""
