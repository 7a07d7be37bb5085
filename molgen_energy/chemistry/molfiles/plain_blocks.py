"""Mol blocks in the form that most programs write, many at a time, without a loop over lines.

That is V2000 with coordinates of four decimals, elements, bonds of order 1 to 4, and no properties
but charges. Any other block is left to RDKit's reader, which reads these in the same way (except
that it adds the digits of a number of ten columns, from 10,000 Å, to the one before).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from molgen_energy.chemistry.molfiles.columns import COUNTS, parse_charges
from molgen_energy.data.molecules import AROMATIC, Molecule, offsets_from_sizes
from molgen_energy.elements import ELEMENTS, symbol

_COUNTS_WIDTH, _ATOM_WIDTH, _BOND_WIDTH = 39, 69, 21  # columns of the longest lines
_COORDINATES, _POINT, _DECIMALS = 3, 5, 4  # in ten columns each, the point in the sixth
_ORDERS = np.array([0, 1, 2, 3, AROMATIC], np.uint8)  # by the number in the file
_END, _CHARGES = "M  END\n", "M  CHG"
_SPACE, _LINE_END, _MINUS, _DOT, _ZERO = (np.uint8(sign) for sign in b" \n-.0")


class _Lines(NamedTuple):
    """Some lines of each of B blocks, one after another."""

    columns: NDArray[np.uint8]  # (L, columns), spaces beyond the end of a line
    too_long: NDArray[np.bool_]  # (L,), whether a line has more columns
    block: NDArray[np.int64]  # (L,)
    offsets: NDArray[np.int64]  # (B+1,)


def read_plain_blocks(texts: Sequence[str]) -> list[Molecule | None]:
    """The molecule of each text that begins with such a mol block; None for any other text."""
    found: list[Molecule | None] = [None] * len(texts)
    usable = (k for k, text in enumerate(texts) if text.isascii() and text.endswith("\n"))
    which = np.array(list(usable), np.int64)
    chosen = [texts[k] for k in which.tolist()]
    data = np.frombuffer(("".join(chosen) + " " * _ATOM_WIDTH).encode(), np.uint8)
    ends = np.flatnonzero(data == _LINE_END)
    starts = np.append(0, ends + 1)
    begins = offsets_from_sizes([len(text) for text in chosen])
    first = np.searchsorted(starts, begins)  # lines
    has_counts = np.diff(first) > COUNTS
    which, begins, counts = which[has_counts], begins[:-1][has_counts], first[:-1][has_counts]
    lines_left = np.diff(first)[has_counts] - COUNTS - 1
    counts = counts + COUNTS

    def lines(start: NDArray[np.int64], number: NDArray[np.int64], width: int) -> _Lines:
        offsets = offsets_from_sizes(number)
        line = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], number)
        length = ends[line] - starts[line]
        columns = sliding_window_view(data, width)[starts[line]]
        columns[np.arange(width) >= length[:, None]] = _SPACE
        block = np.repeat(np.arange(len(number)), number)
        return _Lines(columns, length > width, block, offsets)

    fits, atoms, bonds = _parse_counts(lines(counts, np.ones_like(counts), _COUNTS_WIDTH))
    fits &= atoms + bonds < lines_left
    atoms, bonds = np.where(fits, atoms, 0), np.where(fits, bonds, 0)
    of_atoms = lines(counts + 1, atoms, _ATOM_WIDTH)
    of_bonds = lines(counts + 1 + atoms, bonds, _BOND_WIDTH)
    atom_fits, positions, numbers = _parse_atoms(of_atoms)
    bond_fits, index, order = _parse_bonds(of_bonds, atoms)
    for part, line_fits in ((of_atoms, atom_fits), (of_bonds, bond_fits)):
        fits &= np.bincount(part.block[~line_fits | part.too_long], minlength=len(fits)) == 0
    rest = np.where(fits, starts[np.where(fits, counts + 1 + atoms + bonds, 0)] - begins, 0)
    uncharged = np.zeros(len(numbers), np.int8)
    for m in np.flatnonzero(fits).tolist():
        text, place = texts[which[m]], int(rest[m])
        of_atom = slice(of_atoms.offsets[m], of_atoms.offsets[m + 1])
        of_bond = slice(of_bonds.offsets[m], of_bonds.offsets[m + 1])
        charges: NDArray[np.int8] | None = uncharged[of_atom]
        if not text.startswith(_END, place):
            charges = _parse_charges(text, place, int(atoms[m]))
        if charges is not None:
            found[which[m]] = Molecule(
                positions[of_atom], numbers[of_atom], charges, index[of_bond], order[of_bond]
            )
    return found


def _parse_counts(
    lines: _Lines,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Whether each line of counts is plain, and its numbers of atoms and bonds."""
    columns = lines.columns
    fits = (columns[:, 34:39] == np.frombuffer(b"V2000", np.uint8)).all(axis=1)
    fits &= (_is_digit(columns[:, :33]) | (columns[:, :33] == _SPACE)).all(axis=1)
    fields = [_integer(columns[:, start : start + 3]) for start in (0, 3, 6, 15)]
    for is_number, _ in fields:
        fits &= is_number
    (_, atoms), (_, bonds), (_, lists), (_, texts) = fields
    return fits & (atoms > 0) & (lists == 0) & (texts == 0), atoms, bonds


def _parse_atoms(
    lines: _Lines,
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.uint8]]:
    """Whether each line is a plain atom, positions (L, 3) and atomic numbers (L,)."""
    columns = lines.columns
    fields = columns[:, : 10 * _COORDINATES].reshape(-1, _COORDINATES, 10)
    before, after = fields[..., :_POINT], fields[..., _POINT + 1 :]
    is_whole, whole = _integer(before)
    fits = (is_whole & (fields[..., _POINT] == _DOT) & _is_digit(after).all(axis=-1)).all(axis=-1)
    decimals = _number(after - _ZERO)
    # Both are exact, so the quotient is the number nearest to the decimal, as RDKit reads it.
    value = (np.abs(whole) * 10**_DECIMALS + decimals) / 10**_DECIMALS
    negative = (before == _MINUS).any(axis=-1)  # of -0.5 too
    positions = np.where(negative, -value, value).astype(np.float32)
    names = columns[:, 31:33]
    numbers = _elements()[names[:, 0], names[:, 1]]
    rest = columns[:, 33:].copy()
    parity = rest[:, 41 - 33]
    rest[:, 41 - 33] = np.where((parity >= _ZERO) & (parity <= _ZERO + 3), _ZERO, parity)
    is_last = (np.arange(33, _ATOM_WIDTH) - 35) % 3 == 0
    fits &= (numbers > 0) & (columns[:, 30] == _SPACE)
    fits &= ((rest == _SPACE) | ((rest == _ZERO) & is_last)).all(axis=1)
    return fits, positions, numbers


def _parse_bonds(
    lines: _Lines, atoms: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.uint32], NDArray[np.uint8]]:
    """Whether each line is a plain bond, its atoms (L, 2) and orders (L,).

    A bond that occurs twice in a block is not plain. `atoms`, (B,), are numbers of atoms.
    """
    columns, block = lines.columns, lines.block
    (first_fits, first), (second_fits, second), (order_fits, order), (stereo_fits, stereo) = (
        _integer(columns[:, start : start + 3]) for start in (0, 3, 6, 9)
    )
    rest = columns[:, 12:]
    fits = first_fits & second_fits & order_fits
    fits &= (stereo_fits & np.isin(stereo, (0, 1, 3, 4, 6))) | (columns[:, 9:] == _SPACE).all(
        axis=1
    )
    fits &= ((rest == _SPACE) | (rest == _ZERO)).all(axis=1)
    fits &= (order >= 1) & (order <= 4) & (first != second)
    fits &= (np.minimum(first, second) >= 1) & (np.maximum(first, second) <= atoms[block])
    key = (block * 1000 + np.minimum(first, second)) * 1000 + np.maximum(first, second)
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    fits &= count[place] == 1
    index = np.stack([first, second], axis=1) - 1
    return fits, index.astype(np.uint32), _ORDERS[np.where(fits, order, 0)]


def _parse_charges(text: str, place: int, atoms: int) -> NDArray[np.int8] | None:
    """The charges (N,) of the lines from a place on; None unless these are followed by the end."""
    charges = np.zeros(atoms, np.int8)
    while text.startswith(_CHARGES, place):
        end = text.find("\n", place)
        pairs = parse_charges(text[place:end])
        if end < 0 or pairs is None or not all(1 <= atom <= atoms for atom, _ in pairs):
            return None
        for atom, charge in pairs:
            charges[atom - 1] = charge
        place = end + 1
    return charges if text.startswith(_END, place) else None


def _is_digit(signs: NDArray[np.uint8]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = signs - _ZERO < 10  # others are large: the difference wraps around
    return found


def _integer(fields: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether fields (…, W) are whole numbers at their ends, after spaces and a sign, and these."""
    digit = _is_digit(fields)
    space, minus = fields == _SPACE, fields == _MINUS
    joined = space[..., :-1] | digit[..., 1:]  # after a sign or a digit comes a digit
    value = _number(np.where(digit, fields - _ZERO, np.uint8(0)))
    value = np.where(minus.any(axis=-1), -value, value)
    return digit[..., -1] & joined.all(axis=-1) & (digit | space | minus).all(axis=-1), value


def _number(digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The numbers (…) of decimal digits (…, W)."""
    value = np.zeros(digits.shape[:-1], np.int64)
    for k in range(digits.shape[-1]):
        value = 10 * value + digits[..., k]
    return value


@cache
def _elements() -> NDArray[np.uint8]:
    """(256, 256): the atomic number of a symbol by its two characters, 0 where there is none."""
    numbers = np.zeros((256, 256), np.uint8)
    for number in range(1, ELEMENTS + 1):
        first, second = f"{symbol(number):<2}".encode()
        numbers[first, second] = number
    return numbers
