"""Conversion to RDKit molecules, sanitisation, forms of aromatic bonds and canonical SMILES."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdqueries

from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules

BOND_TYPES = {
    1: Chem.BondType.SINGLE,
    2: Chem.BondType.DOUBLE,
    3: Chem.BondType.TRIPLE,
    AROMATIC: Chem.BondType.AROMATIC,
}
ORDERS = {kind: order for order, kind in BOND_TYPES.items()}

MAX_NEIGHBOURS = 12
"""Largest number of bonds at one atom that RDKit is called with: ring perception takes minutes on
molecules with more, which are chemically impossible anyway."""

# The clean-up rewrites some molecules, for instance a nitro group with two double bonds as one with
# charges. Bonds are checked as they are written.
_AS_WRITTEN = int(
    Chem.SanitizeFlags.SANITIZE_ALL
    ^ Chem.SanitizeFlags.SANITIZE_CLEANUP
    ^ Chem.SanitizeFlags.SANITIZE_CLEANUP_ORGANOMETALLICS
)
_AROMATICITY = int(
    Chem.SanitizeFlags.SANITIZE_SYMMRINGS
    | Chem.SanitizeFlags.SANITIZE_KEKULIZE
    | Chem.SanitizeFlags.SANITIZE_SETAROMATICITY
    | Chem.SanitizeFlags.SANITIZE_SETCONJUGATION
)


_VALENCE = re.compile(r"Explicit valence for atom # \d+ (\w+), (\d+), is greater than permitted")
_SULFURANIDE = {16, 34}
"""Elements of R₃S⁻, which RDKit accepts though it is no stable molecule."""


class BondForms(NamedTuple):
    """Orders of the bonds of a molecule in both forms, (E,), in the order of its bonds.

    They do not depend on which of the two forms the molecule had. Where RDKit cannot find them, as
    with an aromatic ring that it cannot Kekulise, both are the orders of the molecule.
    """

    aromatic: NDArray[np.uint8]
    """`AROMATIC` where RDKit's model finds aromaticity."""
    kekule: NDArray[np.uint8]
    """Alternating single and double bonds."""


@dataclass(frozen=True)
class SanitizationResult:
    """Result of `sanitize` for one molecule."""

    valid: bool
    """Whether RDKit sanitises the molecule with all its fragments."""
    fragments: int
    """Number of connected fragments."""
    smiles: str | None = None
    """Canonical SMILES of the largest fragment (EDM's protocol); None if invalid."""
    hydrogens_missing: bool = False
    """Whether it is valid only with implicit hydrogens or radical electrons."""
    reason: str = ""
    """RDKit's error message if invalid."""
    whole_smiles: str | None = None
    """SMILES of all fragments without stereochemistry (JODO's protocol for FCD), if requested."""
    forms: BondForms | None = None
    """If requested."""
    unstable_atoms: tuple[int, ...] = ()
    """Atoms that break the valence model `strict`, if requested."""
    whole_written: str | None = None
    """`whole_smiles` with all hydrogens of the molecule as atoms, which tells apart molecules that
    differ in missing hydrogens, as JODO does."""


@contextmanager
def preserved_logs() -> Iterator[None]:
    """Enable and disable RDKit's logs after the block as they were before it."""
    before = rdBase.LogStatus()
    try:
        yield
    finally:
        for line in before.splitlines():
            name, _, status = line.partition(":")
            (rdBase.EnableLog if status == "enabled" else rdBase.DisableLog)(name)


def build(molecule: Molecule, positions: bool = False) -> Chem.RWMol:
    """RDKit molecule with the given bonds and formal charges, not sanitised.

    Parameters
    ----------
    positions
        Whether to add the positions as a conformer.
    """
    built = Chem.RWMol()
    for number in molecule.atomic_numbers.tolist():
        built.AddAtom(_atom(number))
    if molecule.formal_charges is not None:
        for k in np.flatnonzero(molecule.formal_charges).tolist():
            built.GetAtomWithIdx(k).SetFormalCharge(int(molecule.formal_charges[k]))
    if molecule.bond_index is not None and molecule.bond_order is not None:
        for (i, j), order in zip(
            molecule.bond_index.tolist(), molecule.bond_order.tolist(), strict=True
        ):
            built.AddBond(i, j, BOND_TYPES[order])
    if positions:
        conformer = Chem.Conformer(len(molecule))
        conformer.SetPositions(np.ascontiguousarray(molecule.positions, np.float64))
        conformer.Set3D(True)
        built.AddConformer(conformer)
    return built


@cache
def _atom(number: int) -> Chem.Atom:
    """An atom of an element, which `AddAtom` copies."""
    return Chem.Atom(number)


def max_neighbours(molecule: Molecule) -> int:
    """Largest number of bonds at one atom."""
    if molecule.bond_index is None or not len(molecule.bond_index):
        return 0
    return int(np.bincount(molecule.bond_index.ravel()).max())


def sanitize(
    molecule: Molecule, whole_smiles: bool = False, forms: bool = False, strict: bool = False
) -> SanitizationResult:
    """Sanitise a molecule with all its fragments, then name the largest one.

    Parameters
    ----------
    whole_smiles
        Whether to compute the SMILES of all fragments too. It is None where RDKit cannot parse its
        own output.
    forms
        Whether to find the aromatic and the Kekulé form of the bonds.
    strict
        Whether to list the atoms that are unstable by the valence model `strict`: those whose bonds
        RDKit refuses for their formal charge, that cannot be Kekulised, or that need implicit
        hydrogens or radical electrons. RDKit's clean-up of unusual valences does not count, except
        that bonds of metals to atoms without a valence left are dative. R₃S⁻ is unstable too.
    """
    built = build(molecule)
    parts = Chem.GetMolFrags(built)
    fragments = len(parts)
    if built.GetAtomsMatchingQuery(_crowded()):  # in C++, at a third of `max_neighbours`
        reason = f"an atom has more than {MAX_NEIGHBOURS} bonds"
        return SanitizationResult(
            False,
            fragments,
            reason=reason,
            forms=_as_they_are(molecule) if forms else None,
            unstable_atoms=_crowded_atoms(molecule) if strict else (),
        )
    smiles = whole = written = None
    missing, reason = False, ""
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            missing = any_lacks_hydrogens(built)
            largest = built
            if fragments > 1:  # `GetMolFrags(asMols=True)` takes an hour for 20,000 fragments
                largest = build(_part(molecule, max(parts, key=len)))
                Chem.SanitizeMol(largest)
            smiles = Chem.MolToSmiles(largest)
            if whole_smiles:
                written = str(Chem.MolToSmiles(built, isomericSmiles=False))
                whole = _with_implicit_hydrogens(written)
        except ValueError as error:  # raised by SanitizeMol
            reason = str(error).strip()
        except RuntimeError:  # the valence of an atom overflows RDKit's counter
            reason = "valence beyond what RDKit counts"
        valid = not reason
        return SanitizationResult(
            valid,
            fragments,
            smiles,
            missing,
            reason,
            whole,
            _forms(molecule, built if valid else None) if forms else None,
            _unstable_atoms(molecule, built if valid else None, missing) if strict else (),
            written if whole is not None else None,
        )


def bond_forms(molecule: Molecule) -> BondForms:
    """Both forms of the bonds, without RDKit's clean-up of unusual valences."""
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return _as_they_are(molecule)
    with rdBase.BlockLogs():
        return _forms(molecule, None)


def short_reason(reason: str) -> str:
    """RDKit's reason why a molecule is invalid, without the numbers of atoms."""
    if match := _VALENCE.fullmatch(reason):
        return f"{match[1]} of valence {match[2]}"
    if reason.startswith("Can't kekulize"):
        return "aromatic bonds that cannot be Kekulised"
    if reason.endswith("marked aromatic"):
        return "aromatic atoms outside of rings"
    return reason


@cache
def is_closed_shell(number: int, charge: int, valence: int) -> bool:
    """Whether RDKit accepts an atom with these bonds, without implicit hydrogens and radicals.

    Parameters
    ----------
    number
        Atomic number.
    valence
        Sum of bond orders.
    """
    if valence > MAX_NEIGHBOURS or (valence and charge >= number):  # no electron is left to bond
        return False
    built = Chem.RWMol()
    atom = Chem.Atom(number)
    atom.SetFormalCharge(charge)
    built.AddAtom(atom)
    for k in range(valence):
        built.AddAtom(_atom(1))
        built.AddBond(0, k + 1, Chem.BondType.SINGLE)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built, _AS_WRITTEN)
        except (ValueError, RuntimeError):
            return False
    return not lacks_hydrogens(built.GetAtomWithIdx(0))


def short_smiles(smiles: str) -> str:
    """A canonical SMILES of RDKit with its hydrogens implicit.

    Unchanged where RDKit cannot parse its own output.
    """
    parsed = Chem.MolFromSmiles(smiles)
    return smiles if parsed is None else str(Chem.MolToSmiles(parsed))


def lacks_hydrogens(atom: Chem.Atom) -> bool:
    """Whether an atom of a sanitised molecule needs implicit hydrogens or radical electrons."""
    return bool(atom.GetTotalNumHs() > 0 or atom.GetNumRadicalElectrons() > 0)


def any_lacks_hydrogens(molecule: Chem.Mol) -> bool:
    """Whether `lacks_hydrogens` holds for an atom of a sanitised molecule; in C++ throughout."""
    return any(molecule.GetAtomsMatchingQuery(query) for query in _lacking())


@cache
def _crowded() -> Chem.QueryAtom:
    return rdqueries.ExplicitDegreeGreaterQueryAtom(MAX_NEIGHBOURS)


@cache
def _lacking() -> tuple[Chem.QueryAtom, ...]:
    hydrogens = Chem.AtomFromSmarts("[!h0]")
    return hydrogens, rdqueries.NumRadicalElectronsGreaterQueryAtom(0)


def _crowded_atoms(molecule: Molecule) -> tuple[int, ...]:
    assert molecule.bond_index is not None
    bonds = np.bincount(molecule.bond_index.ravel(), minlength=len(molecule))
    return tuple(np.flatnonzero(bonds > MAX_NEIGHBOURS).tolist())


def _sulfuranides(molecule: Molecule) -> set[int]:
    if molecule.formal_charges is None or molecule.bond_index is None:
        return set()
    assert molecule.bond_order is not None
    found = set()
    for k in np.flatnonzero(molecule.formal_charges == -1).tolist():
        order = int(molecule.bond_order[(molecule.bond_index == k).any(axis=1)].sum())
        if order == 3 and int(molecule.atomic_numbers[k]) in _SULFURANIDE:
            found.add(k)
    return found


def _unstable_atoms(
    molecule: Molecule, sanitized: Chem.Mol | None, hydrogens_missing: bool
) -> tuple[int, ...]:
    """The atoms that break `strict`; `sanitized` is None for an invalid molecule."""
    unstable = _sulfuranides(molecule)
    if sanitized is not None:
        if hydrogens_missing:
            unstable |= {a.GetIdx() for a in sanitized.GetAtoms() if lacks_hydrogens(a)}
        charges = [sanitized.GetAtomWithIdx(k).GetFormalCharge() for k in range(len(molecule))]
        given = molecule.formal_charges
        if charges == ([0] * len(charges) if given is None else given.tolist()):
            return tuple(sorted(unstable))
    built = build(molecule)
    try:
        for problem in Chem.DetectChemistryProblems(built, _AS_WRITTEN):
            if problem.GetType() == "KekulizeException":
                unstable.update(problem.GetAtomIndices())
            else:
                unstable.add(problem.GetAtomIdx())
        built.UpdatePropertyCache(strict=False)
        unstable.update(a.GetIdx() for a in built.GetAtoms() if a.GetTotalNumHs() > 0)
    except (ValueError, RuntimeError):
        pass
    if not unstable and sanitized is None:
        return tuple(range(len(molecule)))  # invalid, and RDKit does not say at which atom
    return tuple(sorted(unstable))


def _part(molecule: Molecule, atoms: tuple[int, ...]) -> Molecule:
    """A molecule's atoms of these indices, in ascending order."""
    kept = np.zeros(len(molecule), bool)
    kept[list(atoms)] = True
    return Molecules.from_list([molecule]).keep_atoms(kept)[0]


def _with_implicit_hydrogens(smiles: str) -> str | None:
    """A SMILES without stereochemistry and hydrogen atoms; None if RDKit cannot parse its own."""
    parsed = Chem.MolFromSmiles(smiles)
    return None if parsed is None else str(Chem.MolToSmiles(parsed, isomericSmiles=False))


def _forms(molecule: Molecule, sanitized: Chem.Mol | None) -> BondForms:
    """The forms of the bonds, of the molecule that RDKit sanitised if it did."""
    found = sanitized
    try:
        if found is None:
            found = build(molecule)
            found.UpdatePropertyCache(strict=False)
            Chem.SanitizeMol(found, _AROMATICITY)
        aromatic = _orders(found)
        kekule = aromatic
        if (aromatic == AROMATIC).any():
            copy = Chem.RWMol(found)
            Chem.Kekulize(copy, clearAromaticFlags=True)
            kekule = _orders(copy)
    except (ValueError, RuntimeError):
        return _as_they_are(molecule)
    return BondForms(aromatic, kekule)


def _orders(molecule: Chem.Mol) -> NDArray[np.uint8]:
    # The clean-up of organometallic compounds makes dative bonds of single ones.
    bonds = map(molecule.GetBondWithIdx, range(molecule.GetNumBonds()))
    return np.array([ORDERS.get(bond.GetBondType(), 1) for bond in bonds], np.uint8)


def _as_they_are(molecule: Molecule) -> BondForms:
    orders = molecule.bond_order
    if orders is None:
        orders = np.zeros(0, np.uint8)
    return BondForms(orders, orders)
