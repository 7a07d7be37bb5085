"""Frames of XYZ files, whose comment may hold the `key=value` pairs of an extended XYZ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from molgen_energy.chemistry.convert import as_positions
from molgen_energy.chemistry.molfiles.lines import Lines, Record
from molgen_energy.data.molecules import Molecule
from molgen_energy.elements import atomic_number, symbol

_PAIR = re.compile(r"""([^\s=]+)=(?:"([^"]*)"|'([^']*)'|(\S*))""")


def read_records(lines: Lines) -> Iterator[Record]:
    """Each frame.

    After a bad frame the next one is looked for: a line with a number alone, a comment, and a line
    that reads as an atom.
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
        yield Record(start, parsed, _comment_fields(record[1] if len(record) > 1 else ""))
        if isinstance(parsed, str):
            lines.put_back(record[1:])
            _seek_frame(lines)


def _comment_fields(comment: str) -> dict[str, str]:
    """`key=value`, `key="value with spaces"` and `key='value'` of a comment line."""
    if "=" not in comment:
        return {}
    pairs = (match.groups("") for match in _PAIR.finditer(comment))
    return {key: double or single or plain for key, double, single, plain in pairs}


def _parse_frame(lines: Lines, record: list[str]) -> Molecule | str:
    """Read one frame after its first line; every line read is added to `record`."""
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
    return Molecule(as_positions(positions), np.array(numbers, np.uint8))


def _parse_atom(line: str) -> tuple[int, float, float, float] | str:
    fields = line.split()
    if len(fields) < 4:
        return f"expected element, x, y, z, found '{line.strip()[:40]}'"
    try:
        return (atomic_number(fields[0]), float(fields[1]), float(fields[2]), float(fields[3]))
    except ValueError as error:
        return str(error)


def _seek_frame(lines: Lines) -> None:
    while (line := lines.next()) is not None:
        if not line.strip().isdigit():
            continue
        ahead = [text for text in (lines.next(), lines.next()) if text is not None]
        is_frame = len(ahead) == 2 and not isinstance(_parse_atom(ahead[1]), str)
        lines.put_back([line, *ahead] if is_frame else ahead)
        if is_frame:
            return


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
