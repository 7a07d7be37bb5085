"""Bond lengths, angles and dihedrals of many molecules at once, sorted by type.

A type is written as atoms and bond orders in turn, bonds divided by hyphens: ``C1H`` is a single
bond of carbon and hydrogen, ``C1C-C2O`` the angle at the middle carbon, ``H1C-C1C-C1H`` a dihedral.
12 is an aromatic bond. Both directions of reading are one type. The lists of types are those of
JODO (Huang et al., 2023).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecules
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError

KINDS = ("bond length", "angle", "dihedral")
UNITS = {"bond length": "Å", "angle": "°", "dihedral": "°"}
PERIODS = {"dihedral": 360.0}
"""Of kinds that are periodic: -179° and 179° are close."""

_ATOMS = {"bond length": 2, "angle": 3, "dihedral": 4}
_BASE = 128  # above every atomic number and bond order


@dataclass(frozen=True)
class GeometryTypes:
    """Types of bond lengths, angles and dihedrals to compare."""

    name: str
    types: dict[str, tuple[str, ...]]
    aromatic: bool = True
    """Whether they are of molecules in aromatic form, or in Kekulé form."""


QM9_TYPES = GeometryTypes(
    "qm9",
    {
        "bond length": ("C1H", "C1C", "C1O", "N1C", "N1H", "C2O", "O1H", "C2C"),
        "angle": (
            "C1C-C1H", "C1C-C1C", "C1C-C1O", "C1C-C1N", "C1N-N1C", "C1O-O1C", "O1C-C1H",
            "C2C-C1C",
        ),
        "dihedral": (
            "H1C-C1C-C1C", "C1C-C1C-C1C", "H1C-C1C-C1H", "H1C-C1C-C1O", "C1C-C1C-C1O",
            "C1N-N1C-C1C", "H1C-C1N-N1C", "H1C-C1C-C1N",
        ),
    },
    aromatic=False,
)  # fmt: skip
GEOM_TYPES = GeometryTypes(
    "geom",
    {
        "bond length": ("C1H", "C12C", "C1C", "C1N", "C12N", "C1O", "C2O", "H1N"),
        "angle": (
            "C12C-C12C", "C1C-C1H", "C12C-C1H", "N1C-C1C", "C1C-C1C", "C1C-C12C", "N1C-C1H",
            "C1N-N1C",
        ),
        "dihedral": (
            "C12C-C12C-C1H", "C12C-C12C-C12C", "H1C-C1C-C1C", "H1C-C1C-C1H", "C1N-N1C-C1H",
            "C1N-N1C-C1C", "H1C-C1C-C12C", "N1C-C1C-C1H",
        ),
    },
)  # fmt: skip
GEOMETRY_TYPES = {"qm9": QM9_TYPES, "geom": GEOM_TYPES}

COUNTINGS = ("once", "jodo")
"""How angles and dihedrals are listed. `once`: each one once. `jodo`: for each bond, the angles at
its end atom with the other bonds there, which misses an angle between the begin atoms of two bonds
and counts one between two end atoms twice; and dihedrals whose ends are one atom (three-membered
rings)."""


class Measured(NamedTuple):
    """All lengths, angles or dihedrals of some molecules."""

    code: NDArray[np.int64]  # (V,), of the type, the same in both directions
    value: NDArray[np.float32]  # (V,), Å or degrees
    molecule: NDArray[np.int64]  # (V,), ascending


def measure(
    molecules: Molecules, kinds: Iterable[str] = KINDS, counting: str = "once"
) -> dict[str, Measured]:
    """Every length, angle in [0, 180] and signed dihedral in (-180, 180] of bonded atoms.

    Parameters
    ----------
    molecules
        With bonds.
    kinds
        Some of `KINDS`.
    counting
        One of `COUNTINGS`.

    Returns
    -------
    Values of each kind. Angles that coincident atoms leave undefined are left out, and so are
    lengths beyond float32.
    """
    graph = _Graph(molecules)
    positions = molecules.positions.astype(np.float64)
    found = {}
    for kind in kinds:
        atoms, orders = graph.terms(kind, counting)
        found[kind] = _measured(molecules, atoms, orders, _VALUES[kind](positions[atoms]))
    return found


def absolute_changes(
    molecules: Molecules, positions: NDArray[np.floating[Any]]
) -> dict[str, Measured]:
    """By how much every length, angle and dihedral changes if atoms move to positions (ΣN, 3).

    Dihedrals about a bond at an atom of a triple bond are left out, since linear angles leave them
    undefined: the rule of GEOM-Drugs Revisited (F. Nikitin et al., arXiv 2505.00169).
    """
    graph = _Graph(molecules)
    before, after = molecules.positions.astype(np.float64), positions.astype(np.float64)
    found = {}
    for kind in KINDS:
        atoms, orders = graph.terms(kind)
        if kind == "dihedral":
            kept = ~graph.at_triple_bond[atoms[:, 1:3]].any(axis=1)
            atoms, orders = atoms[kept], orders[kept]
        values = _VALUES[kind]
        change = np.abs(values(after[atoms]) - values(before[atoms]))
        if kind in PERIODS:
            change = np.minimum(change, PERIODS[kind] - change)
        found[kind] = _measured(molecules, atoms, orders, change)
    return found


def _measured(
    molecules: Molecules,
    atoms: NDArray[np.int64],
    orders: NDArray[np.int64],
    values: NDArray[np.float64],
) -> Measured:
    """The finite values (V,) of bonded atoms (V, K), by molecule."""
    molecule = molecules.molecule_index[atoms[:, 0]]
    code = _codes(molecules.atomic_numbers[atoms], orders)
    with np.errstate(over="ignore"):
        kept = values.astype(np.float32)
    defined = np.isfinite(kept)
    ascending = np.flatnonzero(defined)[np.argsort(molecule[defined], kind="stable")]
    return Measured(code[ascending], kept[ascending], molecule[ascending])


class _Graph:
    """Bonds as lists of neighbours.

    Entry p of the lists is a bond from `start[p]` to `stop[p]`; those from atom v are the entries
    `first[v]:first[v+1]`.
    """

    def __init__(self, molecules: Molecules) -> None:
        pairs = molecules.atoms_of_bonds()
        self._begin, self._end = pairs.T
        self._order = (
            np.zeros(0, np.int64)
            if molecules.bonds is None
            else molecules.bonds.order.astype(np.int64)
        )
        start = np.concatenate([self._begin, self._end])
        stop = np.concatenate([self._end, self._begin])
        bond = np.tile(np.arange(len(pairs)), 2)
        order = np.argsort(start, kind="stable")
        self._start, self._stop, self._bond = start[order], stop[order], bond[order]
        counts = np.bincount(start, minlength=len(molecules.atomic_numbers))
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._count = counts.astype(np.int64)

    @property
    def at_triple_bond(self) -> NDArray[np.bool_]:
        """Whether an atom has a triple bond, (ΣN,)."""
        found = np.zeros(len(self._count), bool)
        triple = self._order == 3
        found[self._begin[triple]] = found[self._end[triple]] = True
        return found

    def terms(
        self, kind: str, counting: str = "once"
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Atoms (V, K) and orders (V, K-1) of a kind of geometry."""
        if kind == "bond length":
            return self.bonds()
        if kind == "angle":
            return self.angles_at_ends() if counting == "jodo" else self.angles()
        return self.dihedrals(rings_of_three=counting == "jodo")

    def bonds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Atoms (E, 2) and orders (E, 1)."""
        return np.stack([self._begin, self._end], axis=1), self._order[:, None]

    def angles(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each pair of bonds at one atom: atoms (A, 3), the vertex in the middle, and orders."""
        entry = np.arange(len(self._start))
        p, q = _ranges(entry, entry + 1, self._first[self._start + 1])
        return self._angle(p, q)

    def angles_at_ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each bond, the angles at its end atom with the other bonds there."""
        bond = np.arange(len(self._begin))
        own = np.empty(len(bond), np.int64)  # the entry that leads back from the end atom
        backward = self._start == self._end[self._bond]
        own[self._bond[backward]] = np.flatnonzero(backward)
        b, q = _ranges(bond, self._first[self._end], self._first[self._end + 1])
        other = q != own[b]
        return self._angle(own[b[other]], q[other])

    def _angle(
        self, p: NDArray[np.int64], q: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        atoms = np.stack([self._stop[p], self._start[p], self._stop[q]], axis=1)
        return atoms, self._order[np.stack([self._bond[p], self._bond[q]], axis=1)]

    def dihedrals(self, rings_of_three: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each chain of three bonds, by its middle one: atoms (T, 4) and orders (T, 3)."""
        bond = np.arange(len(self._begin))
        b, p = _ranges(bond, self._first[self._begin], self._first[self._begin + 1])
        other = self._bond[p] != b
        b, p = b[other], p[other]
        which, q = _ranges(
            np.arange(len(b)), self._first[self._end[b]], self._first[self._end[b] + 1]
        )
        b, p = b[which], p[which]
        other = self._bond[q] != b
        if not rings_of_three:
            other &= self._stop[p] != self._stop[q]
        b, p, q = b[other], p[other], q[other]
        atoms = np.stack([self._stop[p], self._begin[b], self._end[b], self._stop[q]], axis=1)
        return atoms, self._order[np.stack([self._bond[p], b, self._bond[q]], axis=1)]


def _ranges(
    keys: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every key with every number from its start to its stop."""
    counts = stops - starts
    first = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(first - starts, counts)
    return np.repeat(keys, counts), numbers


def rmsd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Root-mean-square deviation of atoms (N, 3) after optimal superposition.

    W. Kabsch, Acta Crystallographica A 32, 922 (1976).
    """
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    u, s, v = np.linalg.svd(a.T @ b)
    s[-1] *= np.sign(np.linalg.det(u @ v)) or 1.0
    squared = (a**2).sum() + (b**2).sum() - 2 * s.sum()
    return float(np.sqrt(max(0.0, squared) / len(a)))


def _lengths(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(V, 2, 3) → (V,)."""
    lengths: NDArray[np.float64] = np.linalg.norm(points[:, 1] - points[:, 0], axis=1)
    return lengths


def _angles(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees at the middle of three points, (V, 3, 3) → (V,); NaN where it is undefined."""
    u, v = points[:, 0] - points[:, 1], points[:, 2] - points[:, 1]
    lengths = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.clip(np.einsum("vd,vd->v", u, v) / lengths, -1, 1)
    degrees: NDArray[np.float64] = np.degrees(np.arccos(cosine))
    return degrees


def _dihedrals(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed degrees about the middle bond, (V, 4, 3) → (V,); IUPAC's sign, NaN if undefined."""
    u, v, w = np.moveaxis(np.diff(points, axis=1), 1, 0)
    left, right = np.cross(u, v), np.cross(v, w)
    sine = np.einsum("vd,vd->v", u, right) * np.linalg.norm(v, axis=1)
    cosine = np.einsum("vd,vd->v", left, right)
    undefined = (np.abs(left).max(axis=1) == 0) | (np.abs(right).max(axis=1) == 0)
    degrees: NDArray[np.float64] = np.degrees(np.arctan2(sine, cosine))
    return np.where(undefined, np.nan, degrees)


_VALUES = {"bond length": _lengths, "angle": _angles, "dihedral": _dihedrals}


def _codes(elements: NDArray[np.uint8], orders: NDArray[np.int64]) -> NDArray[np.int64]:
    """A code for each type, of elements (V, K) and orders (V, K-1), the same when reversed."""
    forward = _code(elements.astype(np.int64), orders)
    backward = _code(elements[:, ::-1].astype(np.int64), orders[:, ::-1])
    return np.minimum(forward, backward)


def _code(elements: NDArray[np.int64], orders: NDArray[np.int64]) -> NDArray[np.int64]:
    code = elements[:, 0]
    for k in range(orders.shape[1]):
        code = (code * _BASE + orders[:, k]) * _BASE + elements[:, k + 1]
    return code


def code_of(kind: str, name: str) -> int:
    """Code of a type such as ``C1C-C1H``, as `measure` gives it.

    Raises
    ------
    InputError
        The name is not a type of that kind.
    """
    parts = [re.fullmatch(r"([A-Z][a-z]?)(\d+)([A-Z][a-z]?)", part) for part in name.split("-")]
    bonds = [match.groups() for match in parts if match]
    chained = all(a[2] == b[0] for a, b in pairwise(bonds))
    if len(bonds) != len(parts) or len(bonds) + 1 != _ATOMS[kind] or not chained:
        raise InputError(f"'{name}' is no type of {kind} (such as {QM9_TYPES.types[kind][0]})")
    elements = np.array([[atomic_number(b[0]) for b in bonds] + [atomic_number(bonds[-1][2])]])
    orders = np.array([[int(b[1]) for b in bonds]])
    return int(_codes(elements.astype(np.uint8), orders)[0])


def type_name(kind: str, code: int) -> str:
    """Name of the type with a code, as `measure` gives it."""
    digits = []
    for _ in range(2 * _ATOMS[kind] - 1):
        code, digit = divmod(code, _BASE)
        digits.append(digit)
    elements = [symbol(z) for z in digits[::-1][::2]]
    orders = digits[::-1][1::2]
    return "-".join(f"{elements[k]}{order}{elements[k + 1]}" for k, order in enumerate(orders))
