"""Stability, validity and geometry of a chunk of molecules: the work of one task of the pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.agreement import BondAgreement, compare_bonds
from molgen_energy.chemistry.anomalies import (
    COINCIDENT,
    Anomalies,
    Neighbours,
    find_anomalies,
    fragments,
)
from molgen_energy.chemistry.anomalies import KINDS as ANOMALIES
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.descriptors import DESCRIPTORS, describe
from molgen_energy.chemistry.geometry import KINDS, measure
from molgen_energy.chemistry.rdkit import (
    MAX_NEIGHBOURS,
    SanitizationResult,
    sanitize,
    short_smiles,
)
from molgen_energy.chemistry.substructures import Substructures, substructures_of
from molgen_energy.chemistry.valence import stable_atoms, valences
from molgen_energy.data.molecules import AROMATIC, MoleculeChunk, Molecules
from molgen_energy.elements import symbol


@dataclass(frozen=True)
class CheckSettings:
    """How each molecule is checked."""

    bonds: str = "perceived"
    """The bonds of all checks: `perceived`, `given`, or `single`, which takes perceived bonds as
    single for validity, SMILES and connectivity alone (EDM's validity on GEOM-Drugs)."""
    valence: str = "edm"
    """One of `molgen_energy.chemistry.valence.VALENCE_MODELS`."""
    counting: str = "once"
    """How angles are counted, one of `molgen_energy.chemistry.geometry.COUNTINGS`."""
    type_codes: dict[str, tuple[int, ...]] | None = None
    """Codes of the geometry types to collect, by kind. None collects all types of all kinds, an
    empty dictionary none."""
    aromatic: bool = True
    """Whether geometry types are of given bonds in aromatic form, or else in Kekulé form. Perceived
    bonds are never aromatic."""
    whole_smiles: bool = False
    """Whether to compute SMILES of whole molecules, which FCD needs."""
    substructures: bool = False
    """Whether to find fingerprints, fragments and scaffolds of these SMILES."""
    short_smiles: bool = False
    """Whether to write SMILES with implicit hydrogens too."""
    descriptors: bool = False
    """Whether to compute the descriptors of complete molecules."""
    names_only: bool = False
    """Whether only validity and SMILES are needed; stability is then undefined."""
    agreement: bool = False
    """Whether to compare the given bonds with the perceived ones."""


class GeometryValues(NamedTuple):
    """Bond lengths, angles or dihedrals of the collected types."""

    code: NDArray[np.int64]  # (V,), of the type
    value: NDArray[np.float32]  # (V,), Å or degrees
    record: NDArray[np.int64]  # (V,), of the molecule
    independent: NDArray[np.int64]  # (V,), see `MoleculeChunk.independent`
    position: NDArray[np.int64]  # (V,), among the values of one type and molecule


@dataclass(frozen=True)
class ChunkChecks:
    """Results for the M molecules of a chunk; arrays (M,), lists of length M."""

    chunk: MoleculeChunk
    """The molecules with the bonds that were checked."""
    unstable: NDArray[np.bool_]
    """Which atoms are unstable, (ΣN,)."""
    valid: NDArray[np.bool_]
    fragments: NDArray[np.int64]
    hydrogens_missing: NDArray[np.bool_]
    """Valid only with implicit hydrogens or radical electrons."""
    smiles: list[str | None]
    """SMILES of the largest fragment; None if invalid."""
    short_smiles: list[str | None]
    """The same SMILES with implicit hydrogens; None where it was not requested."""
    whole_smiles: list[str | None]
    """SMILES of all fragments with implicit hydrogens, without stereochemistry."""
    whole_written: list[str | None]
    """The same with all hydrogens as atoms, which tells molecules apart."""
    substructures: list[Substructures | None]
    """Of `whole_smiles`, where they were requested."""
    invalid_reasons: list[str]
    """RDKit's error message; empty if valid."""
    timed_out: NDArray[np.bool_]
    unstable_valences: Counter[tuple[str, int]]
    """Number of unstable atoms by element with its charge, such as `N+`, and sum of bond orders."""
    geometry: dict[str, GeometryValues]
    """By kind."""
    without_geometry: int
    """Number of molecules with an atom of more than `MAX_NEIGHBOURS` bonds, which have no
    geometry."""
    anomalies: Anomalies
    """What is probably a fault of the file. Molecules with coincident atoms are invalid, and these
    atoms are unstable."""
    descriptors: NDArray[np.float32]
    """`DESCRIPTORS` of complete molecules, (M, D); NaN elsewhere and where they were not
    requested."""
    agreement: BondAgreement | None
    """Of given bonds, first, with perceived ones; None where there are no given bonds, or where it
    was not requested."""

    @cached_property
    def unstable_atoms(self) -> NDArray[np.int64]:
        """Number of unstable atoms of each molecule."""
        return _count_per_molecule(self.unstable, self.chunk.molecules)

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Valid and connected."""
        complete: NDArray[np.bool_] = self.valid & (self.fragments == 1)
        return complete

    @property
    def passes_all(self) -> NDArray[np.bool_]:
        """Stable, valid, connected, without implicit hydrogens or radicals."""
        stable: NDArray[np.bool_] = self.unstable_atoms == 0
        return self.complete & stable & ~self.hydrogens_missing


def check_chunk(chunk: MoleculeChunk, settings: CheckSettings) -> ChunkChecks:
    """Check the molecules of a chunk. The calls of RDKit can hang: run it in a worker process."""
    return _check(chunk, settings, None)


def check_chunk_without_rdkit(
    chunk: MoleculeChunk, settings: CheckSettings, reason: str
) -> ChunkChecks:
    """The checks that do not need RDKit, for molecules it failed on; they count as invalid."""
    return _check(chunk, settings, reason)


def _check(chunk: MoleculeChunk, settings: CheckSettings, failure: str | None) -> ChunkChecks:
    given = chunk.molecules
    agreement = None
    if settings.agreement and given.bonds is not None:
        perceived = perceive(given)
        agreement = compare_bonds(given, perceived, with_rdkit=failure is None)
        checked = given if settings.bonds == "given" else perceived
    else:
        checked = given if settings.bonds == "given" else perceive(given)
    overbonded = _overbonded(checked)
    results = _sanitize_all(checked, settings, failure)
    aromatic, kekule = _forms(checked, results)
    unstable = _unstable_atoms(aromatic, kekule, results, settings.valence)
    if settings.bonds == "single":
        assert checked.bonds is not None
        ones = np.ones_like(checked.bonds.order)
        single = replace(checked, bonds=replace(checked.bonds, order=ones))
        results = _sanitize_all(single, replace(settings, valence="edm"), failure)
    typed, as_given = checked, replace(checked, bonds=None)
    if settings.bonds == "given":
        typed, as_given = aromatic if settings.aromatic else kekule, checked
    anomalies = find_anomalies(as_given)
    coincident, results = _fail_coincident(as_given, anomalies, results)
    complete = np.array([r.valid and r.fragments == 1 for r in results], bool)
    return ChunkChecks(
        chunk=MoleculeChunk(chunk.records, checked),
        unstable=unstable | coincident,
        valid=np.array([r.valid for r in results], bool),
        fragments=np.array([r.fragments for r in results], np.int64),
        hydrogens_missing=np.array([r.hydrogens_missing for r in results], bool),
        smiles=[r.smiles for r in results],
        short_smiles=[
            short_smiles(r.smiles) if settings.short_smiles and r.smiles else None for r in results
        ],
        whole_smiles=[r.whole_smiles for r in results],
        whole_written=[r.whole_written for r in results],
        substructures=[
            substructures_of(r.whole_smiles) if settings.substructures and r.whole_smiles else None
            for r in results
        ],
        invalid_reasons=[r.reason for r in results],
        timed_out=np.full(len(chunk), failure is not None),
        unstable_valences=_count_valences(_as_written(checked, kekule), unstable),
        geometry=_geometry(MoleculeChunk(chunk.records, typed), overbonded, settings),
        without_geometry=int(overbonded.sum()),
        anomalies=anomalies,
        descriptors=_describe_all(checked, complete & settings.descriptors),
        agreement=agreement,
    )


def _describe_all(molecules: Molecules, chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Descriptors of the chosen molecules (M,), (M, D); NaN of the others."""
    found = np.full((len(molecules), len(DESCRIPTORS)), np.nan, np.float32)
    for k in np.flatnonzero(chosen).tolist():
        found[k] = describe(molecules[k])
    return found


def _fail_coincident(
    molecules: Molecules, anomalies: Anomalies, results: list[SanitizationResult]
) -> tuple[NDArray[np.bool_], list[SanitizationResult]]:
    """Which atoms are in one place with another, (ΣN,), and the results with these as invalid.

    RDKit looks at bonds alone, and perception finds bonds of length 0.
    """
    atoms = np.zeros(len(molecules.atomic_numbers), bool)
    results = results.copy()
    for kind in ("coincident", "one_place"):
        which = np.flatnonzero(anomalies.kinds[kind])
        if not len(which):
            continue
        closest = Neighbours(molecules.select(which)).closest
        atoms[np.isin(molecules.molecule_index, which)] = closest < COINCIDENT
        for k in which.tolist():
            reason = ANOMALIES[kind].removeprefix("have ")
            count, forms = results[k].fragments, results[k].forms
            results[k] = SanitizationResult(False, count, reason=reason, forms=forms)
    return atoms, results


def _forms(molecules: Molecules, results: list[SanitizationResult]) -> tuple[Molecules, Molecules]:
    """The molecules in aromatic and in Kekulé form; unchanged where these were not requested."""
    forms = [result.forms for result in results if result.forms is not None]
    if molecules.bonds is None or not forms:
        return molecules, molecules
    aromatic, kekule = (np.concatenate(orders) for orders in zip(*forms, strict=True))
    bonds = molecules.bonds
    return (
        replace(molecules, bonds=replace(bonds, order=aromatic)),
        replace(molecules, bonds=replace(bonds, order=kekule)),
    )


def _as_written(molecules: Molecules, kekule: Molecules) -> Molecules:
    """The bonds without RDKit's clean-up, such as that of N(=O)=O; aromatic ones in Kekulé form."""
    if molecules.bonds is None or kekule.bonds is None:
        return molecules
    given = molecules.bonds.order
    order = np.where(given == AROMATIC, kekule.bonds.order, given)
    return replace(molecules, bonds=replace(molecules.bonds, order=order))


def _unstable_atoms(
    aromatic: Molecules, kekule: Molecules, results: list[SanitizationResult], valence: str
) -> NDArray[np.bool_]:
    """Which atoms the valence model refuses, (ΣN,)."""
    if valence == "strict":
        unstable = np.zeros(len(kekule.atomic_numbers), bool)
        starts = kekule.offsets[:-1].tolist()
        for start, result in zip(starts, results, strict=True):
            unstable[start + np.array(result.unstable_atoms, np.int64)] = True
        return unstable
    return ~stable_atoms(aromatic if valence == "geom" else kekule, valence)


def _count_valences(molecules: Molecules, unstable: NDArray[np.bool_]) -> Counter[tuple[str, int]]:
    """Number of unstable atoms by element with charge and sum of bond orders."""
    numbers = molecules.atomic_numbers[unstable].astype(np.int64)
    charges = np.zeros_like(numbers)
    if molecules.formal_charges is not None:
        charges = molecules.formal_charges[unstable].astype(np.int64)
    kinds, counts = np.unique(
        np.stack([numbers, charges, valences(molecules)[unstable]], axis=1),
        axis=0,
        return_counts=True,
    )
    found: Counter[tuple[str, int]] = Counter()
    for (z, charge, valence), count in zip(kinds.tolist(), counts.tolist(), strict=True):
        found[symbol(z) + _charge_text(charge), valence] = count
    return found


def _charge_text(charge: int) -> str:
    """`+`, `2-`, … as chemists write it; empty for 0."""
    if charge == 0:
        return ""
    return ("" if abs(charge) == 1 else str(abs(charge))) + ("+" if charge > 0 else "-")


def _sanitize_all(
    molecules: Molecules, settings: CheckSettings, failure: str | None
) -> list[SanitizationResult]:
    strict = settings.valence == "strict" and not settings.names_only
    forms = settings.bonds == "given" or settings.valence == "geom"
    forms = forms and not settings.names_only
    if failure is None:
        return [sanitize(m, settings.whole_smiles, forms, strict) for m in molecules]
    unstable = [tuple(range(size)) if strict else () for size in molecules.sizes.tolist()]
    counts = fragments(molecules, molecules.atoms_of_bonds())[1].tolist()
    return [
        SanitizationResult(False, count, reason=failure, unstable_atoms=atoms)
        for count, atoms in zip(counts, unstable, strict=True)
    ]


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
        found[kind] = GeometryValues(
            code, value, chunk.records[molecule], chunk.independent[molecule], position
        )
    return found


def smiles_hash(smiles: str) -> int:
    """64-bit hash of a SMILES; a million have a collision with a probability of 3e-8."""
    return int.from_bytes(blake2b(smiles.encode(), digest_size=8).digest(), "little")


def smiles_hashes(smiles: Iterable[str]) -> NDArray[np.uint64]:
    """`smiles_hash` of M SMILES, (M,)."""
    digests = [blake2b(text.encode(), digest_size=8).digest() for text in smiles]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
