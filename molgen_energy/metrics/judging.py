"""What is found of each molecule: the work on one piece of a file, done in a worker process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import KINDS, measure
from molgen_energy.chemistry.rdkit import CROWD, SanitizationResult, judge, kekulised
from molgen_energy.chemistry.valence import stable_atoms, stable_charged_atoms, valences
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.elements import symbol

BOND_CHOICES = ("perceived", "single", "given")
"""Bonds behind RDKit's verdict, names and connectivity: perceived from distances; the same, each
taken as a single bond (EDM's validity on GEOM-Drugs); or those that a file carries."""


@dataclass(frozen=True)
class Settings:
    """How molecules are judged.

    ``bonds``: one of `BOND_CHOICES`; geometry rests on the given ones or, with their orders, on
    the perceived ones. ``valence``: model for given bonds (`molgen_energy.chemistry.bonds`).
    ``counting``: of angles (`molgen_energy.chemistry.geometry`). ``codes``: of the types of
    geometry that are wanted, for each kind; None takes all types, no kinds take none.
    ``whole_names``: whether names of whole molecules are wanted, for FCD. ``carried``: whether
    bonds that the file carries are judged.
    """

    bonds: str = "perceived"
    valence: str = "strict"
    counting: str = "once"
    codes: dict[str, tuple[int, ...]] | None = None
    whole_names: bool = False
    carried: bool = True


class Instances(NamedTuple):
    """Lengths, angles or dihedrals of the wanted types."""

    code: NDArray[np.int64]  # (V,), of the type
    value: NDArray[np.float32]  # (V,), Å or degrees
    record: NDArray[np.int64]  # (V,), of the molecule
    turn: NDArray[np.int64]  # (V,), counts within type and molecule


@dataclass(frozen=True)
class Carried:
    """What is found with the bonds that a file carries; arrays (M,)."""

    bonds: int  # in all
    unstable_atoms: NDArray[np.int64]
    valid: NDArray[np.bool_]
    connected: NDArray[np.bool_]


@dataclass(frozen=True)
class ChunkChecks:
    """What is found of a piece; arrays (M,) unless said otherwise."""

    piece: MoleculeChunk  # with the bonds that were judged
    unstable_atoms: NDArray[np.int64]
    valid: NDArray[np.bool_]
    fragments: NDArray[np.int64]
    hydrogens_added: NDArray[np.bool_]
    names: list[str | None]  # SMILES of the largest fragment
    whole_names: list[str | None]
    reasons: list[str]  # of the invalid ones
    timed_out: NDArray[np.bool_]
    faults: Counter[tuple[str, int]]  # unstable atoms by element and sum of orders
    geometry: dict[str, Instances]
    crowded: int  # molecules that geometry leaves out
    carried: Carried | None
    by_given_bonds: bool = False

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Valid and of one fragment."""
        complete: NDArray[np.bool_] = self.valid & (self.fragments == 1)
        return complete

    @property
    def faulty_atoms(self) -> NDArray[np.int64]:
        """Unstable atoms by the bonds that the verdict rests on."""
        if self.by_given_bonds and self.carried is not None:
            return self.carried.unstable_atoms
        return self.unstable_atoms

    @property
    def good(self) -> NDArray[np.bool_]:
        """Nothing is wrong with it that rules can find."""
        stable: NDArray[np.bool_] = self.faulty_atoms == 0
        return self.complete & stable & ~self.hydrogens_added


def judge_piece(piece: MoleculeChunk, settings: Settings) -> ChunkChecks:
    """Judge molecules; the part that takes RDKit is what can hang."""
    return _judgement(piece, settings, None)


def judge_without_rdkit(piece: MoleculeChunk, settings: Settings, reason: str) -> ChunkChecks:
    """What can be said where RDKit did not come to an end: counted as invalid."""
    return _judgement(piece, settings, reason)


def _judgement(piece: MoleculeChunk, settings: Settings, failed: str | None) -> ChunkChecks:
    molecules = piece.molecules
    perceived = perceive(molecules)
    given = molecules.bonds is not None and settings.carried
    judged = molecules if settings.bonds == "given" else perceived
    named = judged
    if settings.bonds == "single":
        assert perceived.bonds is not None
        ones = np.ones_like(perceived.bonds.order)
        named = replace(perceived, bonds=replace(perceived.bonds, order=ones))
    crowded = _crowded(judged)
    verdicts = _verdicts(named, settings.whole_names, failed)
    carried = None
    stable = stable_atoms(perceived)
    sums = valences(perceived)
    if given:
        carried = _carried(molecules, settings, verdicts, failed)
    unstable = ~stable
    faults: Counter[tuple[str, int]] = Counter()
    pairs, counts = np.unique(
        np.stack([perceived.atomic_numbers[unstable].astype(np.int64), sums[unstable]], axis=1),
        axis=0,
        return_counts=True,
    )
    for (z, valence), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        faults[symbol(z), valence] = count
    return ChunkChecks(
        piece=MoleculeChunk(piece.records, judged),
        unstable_atoms=_per_molecule(unstable, molecules),
        valid=np.array([v.valid for v in verdicts], bool),
        fragments=np.array([v.fragments for v in verdicts], np.int64),
        hydrogens_added=np.array([v.hydrogens_added for v in verdicts], bool),
        names=[v.smiles for v in verdicts],
        whole_names=[v.whole for v in verdicts],
        reasons=[v.reason for v in verdicts],
        timed_out=np.full(len(piece), failed is not None),
        faults=faults,
        geometry=_geometry(MoleculeChunk(piece.records, judged), crowded, settings),
        crowded=int(crowded.sum()),
        carried=carried,
        by_given_bonds=settings.bonds == "given",
    )


def _verdicts(molecules: Molecules, whole: bool, failed: str | None) -> list[SanitizationResult]:
    if failed is None:
        return [judge(molecule, whole) for molecule in molecules]
    return [
        SanitizationResult(False, count, reason=failed) for count in _fragments(molecules).tolist()
    ]


def _fragments(molecules: Molecules) -> NDArray[np.int64]:
    """Connected components of each molecule, (M,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = molecules.atoms_of_bonds().T
    atoms = len(molecules.atomic_numbers)
    graph = coo_array((np.ones(len(i), np.int8), (i, j)), shape=(atoms, atoms))
    _, label = connected_components(graph, directed=False)
    pairs = np.unique(np.stack([molecules.molecule_index, label], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=len(molecules))


def _carried(
    molecules: Molecules, settings: Settings, verdicts: list[SanitizationResult], failed: str | None
) -> Carried:
    if failed is not None:
        none = np.zeros(len(molecules), bool)
        everyone = molecules.sizes
        return Carried(len(molecules.bonds.order) if molecules.bonds else 0, everyone, none, none)
    if settings.bonds != "given":
        verdicts = _verdicts(molecules, False, None)
    kekule = [kekulised(molecule) for molecule in molecules]
    orders = np.concatenate([m.bond_order for m in kekule if m.bond_order is not None])
    assert molecules.bonds is not None
    changed = replace(molecules, bonds=replace(molecules.bonds, order=orders))
    stable = stable_charged_atoms(changed, settings.valence)
    return Carried(
        len(orders),
        _per_molecule(~stable, molecules),
        np.array([v.valid for v in verdicts], bool),
        np.array([v.fragments == 1 for v in verdicts], bool),
    )


def unstable_atoms(molecule: Molecule, valence: str | None = None) -> list[int]:
    """Numbers of a molecule's unstable atoms.

    By perceived bonds, or, with a model of valences for formal charges, by its own.
    """
    if valence is None:
        stable = stable_atoms(perceive(Molecules.from_list([molecule])))
    else:
        stable = stable_charged_atoms(Molecules.from_list([kekulised(molecule)]), valence)
    return [int(k) for k in np.flatnonzero(~stable)]


def _per_molecule(atoms: NDArray[np.bool_], molecules: Molecules) -> NDArray[np.int64]:
    """How many atoms of each molecule are marked."""
    return np.add.reduceat(atoms.astype(np.int64), molecules.offsets[:-1])


def _crowded(molecules: Molecules) -> NDArray[np.bool_]:
    """Molecules with an atom of more than `CROWD` bonds: their dihedrals would be billions."""
    bonds = np.bincount(molecules.atoms_of_bonds().ravel(), minlength=len(molecules.molecule_index))
    return _per_molecule(bonds > CROWD, molecules) > 0


def _geometry(
    piece: MoleculeChunk, crowded: NDArray[np.bool_], settings: Settings
) -> dict[str, Instances]:
    piece = piece.select(np.flatnonzero(~crowded))
    kinds = KINDS if settings.codes is None else [k for k in KINDS if k in settings.codes]
    found = {}
    for kind, measured in measure(piece.molecules, kinds, settings.counting).items():
        if settings.codes is not None:
            wanted = np.flatnonzero(np.isin(measured.code, settings.codes[kind]))
        else:
            wanted = np.arange(len(measured.code))
        code, molecule = measured.code[wanted], measured.molecule[wanted]
        order = np.lexsort((molecule, code))
        code, molecule = code[order], molecule[order]
        new = np.ones(len(code), bool)
        new[1:] = (np.diff(code) != 0) | (np.diff(molecule) != 0)
        start = np.maximum.accumulate(np.where(new, np.arange(len(code)), 0))
        turn = np.arange(len(code)) - start
        value = measured.value[wanted][order]
        found[kind] = Instances(code, value, piece.records[molecule], turn)
    return found


def name_hash(name: str) -> int:
    """64 bits that stand for a name; two of a million names coincide once in 30 million sets."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
