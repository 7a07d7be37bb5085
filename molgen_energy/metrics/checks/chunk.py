"""Stability, validity and geometry of a chunk of molecules: the work of one task of the pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import KINDS, measure
from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, SanitizationResult, kekulised, sanitize
from molgen_energy.chemistry.valence import stable_atoms, stable_charged_atoms, valences
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.elements import symbol


@dataclass(frozen=True)
class CheckSettings:
    """How each molecule is checked."""

    bonds: str = "perceived"
    """Bonds for validity, SMILES and connectivity, one of
    `molgen_energy.metrics.options.BOND_CHOICES`. Geometry uses the given bonds or the perceived
    ones with their orders."""
    valence: str = "strict"
    """Valence model for given bonds, one of `molgen_energy.chemistry.bonds.VALENCE_MODELS`."""
    counting: str = "once"
    """How angles are counted, one of `molgen_energy.chemistry.geometry.COUNTINGS`."""
    type_codes: dict[str, tuple[int, ...]] | None = None
    """Codes of the geometry types to collect, by kind. None collects all types of all kinds, an
    empty dictionary none."""
    whole_smiles: bool = False
    """Whether to compute SMILES of whole molecules, which FCD needs."""
    check_given_bonds: bool = True
    """Whether to check the bonds given in the file beside the perceived ones."""


class GeometryValues(NamedTuple):
    """Bond lengths, angles or dihedrals of the collected types."""

    code: NDArray[np.int64]  # (V,), of the type
    value: NDArray[np.float32]  # (V,), Å or degrees
    record: NDArray[np.int64]  # (V,), of the molecule
    position: NDArray[np.int64]  # (V,), among the values of one type and molecule


@dataclass(frozen=True)
class GivenBondChecks:
    """Checks with the bonds given in the file; arrays (M,)."""

    bonds: int
    """Number of bonds of all molecules."""
    unstable_atoms: NDArray[np.int64]
    valid: NDArray[np.bool_]
    connected: NDArray[np.bool_]


@dataclass(frozen=True)
class ChunkChecks:
    """Results for the M molecules of a chunk; arrays (M,), lists of length M."""

    chunk: MoleculeChunk
    """The molecules with the bonds that were checked."""
    unstable_atoms: NDArray[np.int64]
    """Number of unstable atoms with perceived bonds."""
    valid: NDArray[np.bool_]
    fragments: NDArray[np.int64]
    hydrogens_added: NDArray[np.bool_]
    smiles: list[str | None]
    """SMILES of the largest fragment; None if invalid."""
    whole_smiles: list[str | None]
    invalid_reasons: list[str]
    """RDKit's error message; empty if valid."""
    timed_out: NDArray[np.bool_]
    unstable_valences: Counter[tuple[str, int]]
    """Number of unstable atoms by element and sum of bond orders."""
    geometry: dict[str, GeometryValues]
    """By kind."""
    without_geometry: int
    """Number of molecules with an atom of more than `MAX_NEIGHBOURS` bonds, which have no
    geometry."""
    given_bonds: GivenBondChecks | None
    use_given_bonds: bool = False
    """Whether stability for `passes_all` comes from the given bonds."""

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Valid and connected."""
        complete: NDArray[np.bool_] = self.valid & (self.fragments == 1)
        return complete

    @property
    def checked_unstable_atoms(self) -> NDArray[np.int64]:
        """Number of unstable atoms with the bonds that validity is checked with."""
        if self.use_given_bonds and self.given_bonds is not None:
            return self.given_bonds.unstable_atoms
        return self.unstable_atoms

    @property
    def passes_all(self) -> NDArray[np.bool_]:
        """Stable, valid, connected, without implicit hydrogens or radicals."""
        stable: NDArray[np.bool_] = self.checked_unstable_atoms == 0
        return self.complete & stable & ~self.hydrogens_added


def check_chunk(chunk: MoleculeChunk, settings: CheckSettings) -> ChunkChecks:
    """Check the molecules of a chunk. The calls of RDKit can hang: run it in a worker process."""
    return _check(chunk, settings, None)


def check_chunk_without_rdkit(
    chunk: MoleculeChunk, settings: CheckSettings, reason: str
) -> ChunkChecks:
    """The checks that do not need RDKit, for molecules it failed on; they count as invalid."""
    return _check(chunk, settings, reason)


def _check(chunk: MoleculeChunk, settings: CheckSettings, failure: str | None) -> ChunkChecks:
    molecules = chunk.molecules
    perceived = perceive(molecules)
    checked = molecules if settings.bonds == "given" else perceived
    sanitized = checked
    if settings.bonds == "single":
        assert perceived.bonds is not None
        ones = np.ones_like(perceived.bonds.order)
        sanitized = replace(perceived, bonds=replace(perceived.bonds, order=ones))
    overbonded = _overbonded(checked)
    results = _sanitize_all(sanitized, settings.whole_smiles, failure)
    given_bonds = None
    if molecules.bonds is not None and settings.check_given_bonds:
        given_bonds = _check_given_bonds(molecules, settings, results, failure)
    unstable = ~stable_atoms(perceived)
    checked_chunk = MoleculeChunk(chunk.records, checked)
    return ChunkChecks(
        chunk=checked_chunk,
        unstable_atoms=_count_per_molecule(unstable, molecules),
        valid=np.array([r.valid for r in results], bool),
        fragments=np.array([r.fragments for r in results], np.int64),
        hydrogens_added=np.array([r.hydrogens_added for r in results], bool),
        smiles=[r.smiles for r in results],
        whole_smiles=[r.whole_smiles for r in results],
        invalid_reasons=[r.reason for r in results],
        timed_out=np.full(len(chunk), failure is not None),
        unstable_valences=_count_valences(perceived, unstable),
        geometry=_geometry(checked_chunk, overbonded, settings),
        without_geometry=int(overbonded.sum()),
        given_bonds=given_bonds,
        use_given_bonds=settings.bonds == "given",
    )


def _count_valences(molecules: Molecules, unstable: NDArray[np.bool_]) -> Counter[tuple[str, int]]:
    """Number of unstable atoms by element and sum of bond orders."""
    numbers = molecules.atomic_numbers[unstable].astype(np.int64)
    pairs, counts = np.unique(
        np.stack([numbers, valences(molecules)[unstable]], axis=1), axis=0, return_counts=True
    )
    found: Counter[tuple[str, int]] = Counter()
    for (z, valence), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        found[symbol(z), valence] = count
    return found


def _sanitize_all(
    molecules: Molecules, whole_smiles: bool, failure: str | None
) -> list[SanitizationResult]:
    if failure is None:
        return [sanitize(molecule, whole_smiles) for molecule in molecules]
    return [
        SanitizationResult(False, count, reason=failure)
        for count in _count_fragments(molecules).tolist()
    ]


def _count_fragments(molecules: Molecules) -> NDArray[np.int64]:
    """Number of connected components of each molecule, (M,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = molecules.atoms_of_bonds().T
    atoms = len(molecules.atomic_numbers)
    graph = coo_array((np.ones(len(i), np.int8), (i, j)), shape=(atoms, atoms))
    _, label = connected_components(graph, directed=False)
    pairs = np.unique(np.stack([molecules.molecule_index, label], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=len(molecules))


def _check_given_bonds(
    molecules: Molecules,
    settings: CheckSettings,
    results: list[SanitizationResult],
    failure: str | None,
) -> GivenBondChecks:
    assert molecules.bonds is not None
    if failure is not None:
        none = np.zeros(len(molecules), bool)
        return GivenBondChecks(len(molecules.bonds.order), molecules.sizes, none, none)
    if settings.bonds != "given":
        results = _sanitize_all(molecules, False, None)
    kekule = [kekulised(molecule) for molecule in molecules]
    orders = np.concatenate([m.bond_order for m in kekule if m.bond_order is not None])
    changed = replace(molecules, bonds=replace(molecules.bonds, order=orders))
    stable = stable_charged_atoms(changed, settings.valence)
    return GivenBondChecks(
        len(orders),
        _count_per_molecule(~stable, molecules),
        np.array([r.valid for r in results], bool),
        np.array([r.fragments == 1 for r in results], bool),
    )


def unstable_atoms(molecule: Molecule, valence: str | None = None) -> list[int]:
    """Indices of a molecule's unstable atoms.

    Parameters
    ----------
    valence
        None perceives bonds from distances. A valence model takes the given bonds and formal
        charges.
    """
    if valence is None:
        stable = stable_atoms(perceive(Molecules.from_list([molecule])))
    else:
        stable = stable_charged_atoms(Molecules.from_list([kekulised(molecule)]), valence)
    return [int(k) for k in np.flatnonzero(~stable)]


def _count_per_molecule(atoms: NDArray[np.bool_], molecules: Molecules) -> NDArray[np.int64]:
    """Number of marked atoms (ΣN,) of each molecule, (M,)."""
    return np.add.reduceat(atoms.astype(np.int64), molecules.offsets[:-1])


def _overbonded(molecules: Molecules) -> NDArray[np.bool_]:
    """Molecules with an atom of more than `MAX_NEIGHBOURS` bonds, (M,).

    Their dihedrals could number billions.
    """
    bonds = np.bincount(molecules.atoms_of_bonds().ravel(), minlength=len(molecules.molecule_index))
    return _count_per_molecule(bonds > MAX_NEIGHBOURS, molecules) > 0


def _geometry(
    chunk: MoleculeChunk, overbonded: NDArray[np.bool_], settings: CheckSettings
) -> dict[str, GeometryValues]:
    chunk = chunk.select(np.flatnonzero(~overbonded))
    type_codes = settings.type_codes
    kinds = KINDS if type_codes is None else [k for k in KINDS if k in type_codes]
    found = {}
    for kind, measured in measure(chunk.molecules, kinds, settings.counting).items():
        if type_codes is not None:
            chosen = np.flatnonzero(np.isin(measured.code, type_codes[kind]))
        else:
            chosen = np.arange(len(measured.code))
        code, molecule = measured.code[chosen], measured.molecule[chosen]
        order = np.lexsort((molecule, code))
        code, molecule = code[order], molecule[order]
        first = np.ones(len(code), bool)  # of a type and molecule
        first[1:] = (np.diff(code) != 0) | (np.diff(molecule) != 0)
        start = np.maximum.accumulate(np.where(first, np.arange(len(code)), 0))
        position = np.arange(len(code)) - start
        value = measured.value[chosen][order]
        found[kind] = GeometryValues(code, value, chunk.records[molecule], position)
    return found


def smiles_hash(smiles: str) -> int:
    """64-bit hash of a SMILES; a million have a collision with a probability of 3e-8."""
    return int.from_bytes(blake2b(smiles.encode(), digest_size=8).digest(), "little")
