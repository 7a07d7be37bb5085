"""Bonds and formal charges of a SMILES, assigned to the atoms of a geometry.

A SMILES names heavy atoms, bond orders and charges, a geometry places them. Files such as those of
QM9 list heavy atoms in the order of their SMILES; where they do not, the graph of the SMILES is
matched with the graph of near atoms. Each hydrogen belongs to its nearest heavy atom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from molgen_energy.chemistry.anomalies import covalent_radii
from molgen_energy.chemistry.rdkit import ORDERS
from molgen_energy.data.molecules import Bonds, Molecule, Molecules, offsets_from_sizes

_NEAR = 1.3
"""Of the sum of covalent radii: two atoms nearer than this may be bonded."""
_STRAINED = 1.5
"""The same in strained cages, whose longest bond in QM9 is 2.19 Å, where the atoms of the file are
in the order of the SMILES."""
_MOST_MATCHED = 32
"""Heavy atoms of a molecule whose graph is matched, since matching can take exponential time."""


@dataclass(frozen=True)
class _Graph:
    """The heavy atoms of a SMILES in its order, Kekulised."""

    atomic_numbers: NDArray[np.uint8]
    charges: NDArray[np.int8]
    hydrogens: NDArray[np.int64]
    """Of each atom, as those of the next two, (n,)."""
    bonds: NDArray[np.int64]
    """(E, 2)."""
    orders: NDArray[np.uint8]
    """(E,)."""


def add_bonds_of_smiles(
    molecules: Molecules, progress: Callable[[int], None] = lambda done: None
) -> Molecules:
    """The molecules with the bonds and formal charges of their SMILES, Kekulised.

    Takes about 0.2 ms for a molecule of QM9.

    Parameters
    ----------
    molecules
        With SMILES; bonds and charges that they have are replaced.
    progress
        Called now and then with the number of finished molecules.

    Raises
    ------
    ValueError
        A SMILES cannot be read, or the atoms do not have its bonds; the first argument is the
        reason, the second one the number of the molecule.
    """
    indices, orders, charges = [], [], []
    with rdBase.BlockLogs():
        for k, molecule in enumerate(molecules):
            try:
                index, order, charge = _assigned(molecule)
            except ValueError as error:
                raise ValueError(str(error), k) from error
            indices.append(index)
            orders.append(order)
            charges.append(charge)
            if k % 1000 == 0:
                progress(k)
    return replace(
        molecules,
        formal_charges=np.concatenate([np.zeros(0, np.int8), *charges]),
        bonds=Bonds(
            np.concatenate([np.zeros((0, 2), np.uint32), *indices]),
            np.concatenate([np.zeros(0, np.uint8), *orders]),
            offsets_from_sizes([len(order) for order in orders]),
        ),
    )


def _assigned(
    molecule: Molecule,
) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.int8]]:
    """Bonds (E, 2), their orders (E,) and the formal charges (N,) of one molecule.

    Raises
    ------
    ValueError
        The SMILES cannot be read, or the atoms do not have its bonds.
    """
    graph = _graph(molecule.smiles or "")
    heavy = np.flatnonzero(molecule.atomic_numbers != 1)
    hydrogens = np.flatnonzero(molecule.atomic_numbers == 1)
    positions = molecule.positions.astype(np.float64)
    radii = covalent_radii()[molecule.atomic_numbers[heavy]]
    # Of each pair of heavy atoms, and of each hydrogen with each heavy atom.
    apart = _distances(positions[heavy], positions[heavy]) / (radii[:, None] + radii)
    owner = np.zeros(0, np.int64)
    if len(heavy) and len(hydrogens):
        owner = _distances(positions[hydrogens], positions[heavy]).argmin(axis=1)
    hydrogens_of = np.bincount(owner, minlength=len(heavy))
    place = _placed(graph, molecule.atomic_numbers[heavy], hydrogens_of, apart)
    if place is None or len(owner) != len(hydrogens):
        raise ValueError(f"the atoms do not have the bonds of the SMILES '{molecule.smiles}'")
    charges = np.zeros(len(molecule), np.int8)
    charges[heavy[place]] = graph.charges
    index = np.concatenate([heavy[place[graph.bonds]], np.stack([heavy[owner], hydrogens], axis=1)])
    orders = np.concatenate([graph.orders, np.ones(len(hydrogens), np.uint8)])
    return index.astype(np.uint32), orders, charges


def _distances(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3) and (M, 3) to (N, M) in Å."""
    distances: NDArray[np.float64] = np.linalg.norm(first[:, None] - second[None], axis=2)
    return distances


def _placed(
    graph: _Graph,
    atomic_numbers: NDArray[np.uint8],
    hydrogens: NDArray[np.int64],
    apart: NDArray[np.float64],
) -> NDArray[np.int64] | None:
    """Which heavy atom of the geometry each atom of the graph is, (n,); None if there is no way.

    Parameters
    ----------
    atomic_numbers, hydrogens
        Of the heavy atoms of the geometry, (n,).
    apart
        Their distances over sums of covalent radii, (n, n).
    """
    if len(graph.atomic_numbers) != len(atomic_numbers):
        return None
    as_they_are = np.arange(len(atomic_numbers))
    in_order = bool(
        (graph.atomic_numbers == atomic_numbers).all() and (graph.hydrogens == hydrogens).all()
    )
    longest = apart[graph.bonds[:, 0], graph.bonds[:, 1]].max(initial=0)
    if in_order and longest < _NEAR:
        return as_they_are
    if (found := _matched(graph, atomic_numbers, hydrogens, apart)) is not None:
        return found
    return as_they_are if in_order and longest < _STRAINED else None


def _matched(
    graph: _Graph,
    atomic_numbers: NDArray[np.uint8],
    hydrogens: NDArray[np.int64],
    apart: NDArray[np.float64],
) -> NDArray[np.int64] | None:
    """As `_placed`, by matching the graph with that of near atoms."""
    if not 0 < len(atomic_numbers) <= _MOST_MATCHED:
        return None
    near = np.argwhere(np.triu(apart < _NEAR, 1))
    whole = _skeleton(atomic_numbers, hydrogens, near)
    match = whole.GetSubstructMatch(
        _skeleton(graph.atomic_numbers, graph.hydrogens, graph.bonds), useChirality=False
    )
    return np.array(match, np.int64) if match else None


def _skeleton(
    atomic_numbers: NDArray[np.uint8], hydrogens: NDArray[np.int64], bonds: NDArray[np.int64]
) -> Chem.Mol:
    """Atoms and single bonds; the isotope of an atom says how many hydrogens it has."""
    skeleton = Chem.RWMol()
    for number, count in zip(atomic_numbers.tolist(), hydrogens.tolist(), strict=True):
        atom = Chem.Atom(number)
        atom.SetIsotope(count + 1)  # 0 would match any
        skeleton.AddAtom(atom)
    for i, j in bonds.tolist():
        skeleton.AddBond(i, j, Chem.BondType.SINGLE)
    return skeleton.GetMol()


def _graph(smiles: str) -> _Graph:
    """The graph of a SMILES; raises `ValueError` if it cannot be read."""
    parsed = Chem.MolFromSmiles(smiles, sanitize=False) if smiles else None
    if parsed is None:
        raise ValueError(f"RDKit cannot read the SMILES '{smiles}'")
    try:
        Chem.Cleanup(parsed)  # QM9 writes the nitro group as O=N(=O)
        parsed.UpdatePropertyCache(strict=True)
        if any(bond.GetIsAromatic() for bond in parsed.GetBonds()):
            Chem.FastFindRings(parsed)
            Chem.Kekulize(parsed, clearAromaticFlags=True)
    except ValueError as error:
        raise ValueError(f"RDKit cannot read the SMILES '{smiles}' ({error})") from error
    numbers = np.array([atom.GetAtomicNum() for atom in parsed.GetAtoms()], np.uint8)
    kept = numbers != 1
    place = np.cumsum(kept) - 1
    ends = np.array(
        [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in parsed.GetBonds()], np.int64
    ).reshape(-1, 2)
    between = kept[ends].all(axis=1)
    orders = [ORDERS.get(bond.GetBondType(), 0) for bond in parsed.GetBonds()]
    if not all(orders):
        raise ValueError(f"the SMILES '{smiles}' has a bond that is not single, double or triple")
    atoms = [atom for atom in parsed.GetAtoms() if atom.GetAtomicNum() != 1]
    return _Graph(
        numbers[kept],
        np.array([atom.GetFormalCharge() for atom in atoms], np.int8),
        np.array([atom.GetTotalNumHs(includeNeighbors=True) for atom in atoms], np.int64),
        place[ends[between]],
        np.array(orders, np.uint8)[between],
    )
