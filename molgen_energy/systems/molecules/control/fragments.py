"""Fixed atoms: fragments that stay where they are, and new atoms around and between them.

Linkers between fragments: I. Igashov et al., "Equivariant 3D-conditional diffusion model for
molecular linker design", Nature Machine Intelligence 6, 417 (2024), with a network of their own.
Here the network is any unconditional one, by replacement and resampling (`AnchoredValues`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from torch import Tensor

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.rdkit import bond_forms, build, sanitize
from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules, Property
from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.inpainting import AnchoredValues
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError, counted
from molgen_energy.systems.molecules.control.base import (
    LONGEST_SMARTS,
    Batch,
    Control,
    Network,
    Record,
    Tally,
    encoded,
)
from molgen_energy.systems.molecules.control.composition import (
    check_elements,
    fixed_elements,
    formula_text,
)
from molgen_energy.systems.molecules.control.inputs import InputMolecules
from molgen_energy.systems.molecules.control.records import read_molecules
from molgen_energy.systems.molecules.sizes import SizeDistribution

_NEAREST = 0.5  # Å; two atoms that are closer are the same one, the shortest bond has 0.74
HELD_UNTIL = 0.2
"""Å; above this noise, new atoms are held near open valences. Of parts of 120 QM9 validation
molecules, so many became valid ones: 19 at 0.8, 39 at 0.6, 63 at 0.4, 72 at 0.3, 79 at 0.2, 32 at
0."""
_FIRST, _FURTHER = 1.2, 0.45  # Å; centroids of n atoms are 1.2 + 0.45·√n from the atom they bind to
_FIXED = "fixed_atoms"
_RECORD = "fragment_record"


class Fragments(Control):
    """Molecules with fixed atoms, which come first and where they were.

    Parameters
    ----------
    records
        The fixed atoms of each input, of all its fragments together.
    smarts
        The pattern that chose them.
    formula
        Atoms of each element of the whole molecule, by symbol; None leaves the new ones free.
    """

    def __init__(
        self,
        records: Sequence[Record],
        smarts: str | None = None,
        formula: Mapping[str, int] | None = None,
    ) -> None:
        self._asked, self._smarts = list(records), smarts
        self._formula = None if formula is None else dict(formula)
        self._fragments = [record.molecule for record in records]
        self._kept = np.array([len(record) for record in records])
        self._positions = np.concatenate([one.positions for one in self._fragments])
        self._offsets = np.concatenate([[0], np.cumsum(self._kept)])
        self._open = [OpenValences.of(molecule) for molecule in self._fragments]
        self.records = len(records)

    @classmethod
    def read(cls, value: Any, options: Mapping[str, Any]) -> list[Record]:
        several = isinstance(value, Iterable) and not isinstance(value, (str, Chem.Mol))
        pattern = _pattern(options.get("keep_smarts"))
        inputs = [
            [
                _chosen(source, molecule, pattern)
                for source, molecule in read_molecules(item, "--keep")
            ]
            for item in (value if several else [value])
        ]
        if not inputs:
            raise InputError("--keep: there is no fragment; name at least one")
        records = max(map(len, inputs))
        for found in inputs:
            if len(found) not in (1, records):
                raise InputError(
                    f"--keep: {found[0][0]} is one of {counted(len(found), 'records')}, and "
                    f"another file has {records:,}; files hold one record, or equally many"
                )
        return [
            _joined([found[k if len(found) > 1 else 0] for found in inputs]) for k in range(records)
        ]

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Fragments:
        formula = options["formula"]
        return cls(options["keep"], options["keep_smarts"], formula)

    @property
    def options(self) -> dict[str, Any]:
        return {"keep": self._asked, "keep_smarts": self._smarts, "formula": self._formula}

    @property
    def units(self) -> dict[str, str]:
        return {_FIXED: "atoms"} | ({_RECORD: ""} if self.records > 1 else {})

    def bind(self, network: Network) -> None:
        names = [f"--keep {record.source}" for record in self._asked]
        aromatic = network.statistics.aromatic
        fragments = [
            record.in_aromatic_form if aromatic else molecule
            for record, molecule in zip(self._asked, self._fragments, strict=True)
        ]
        self._inputs = InputMolecules(fragments, names, network)
        self._new = [
            self._new_elements(fragment, name, network)
            for fragment, name in zip(fragments, names, strict=True)
        ]
        self._sizes = [
            self._sizes_of(len(fragment), new, name, network)
            for fragment, new, name in zip(fragments, self._new, names, strict=True)
        ]

    def _new_elements(
        self, fragment: Molecule, name: str, network: Network
    ) -> NDArray[np.uint8] | None:
        """The elements of the new atoms that a formula asks for, in Hill's order."""
        if self._formula is None:
            return None
        asked = f"--formula {formula_text(self._formula)}"
        check_elements(self._formula, network, asked)
        there = Counter(map(symbol, fragment.atomic_numbers.tolist()))
        for element, count in there.items():
            if count > self._formula.get(element, 0):
                raise InputError(
                    f"{asked} is that of the whole molecule, and {name} alone has {count} "
                    f"{element}; ask for more, or fix fewer atoms"
                )
        new = {element: n - there[element] for element, n in self._formula.items()}
        if not any(new.values()):
            raise InputError(
                f"{asked} is that of {name}: no atom is left to generate; ask for more"
            )
        numbers = [atomic_number(element) for element in new]
        return np.repeat(np.array(numbers, np.uint8), list(new.values()))

    @staticmethod
    def _sizes_of(
        kept: int, new: NDArray[np.uint8] | None, name: str, network: Network
    ) -> SizeDistribution:
        """Numbers of atoms of molecules with `kept` fixed ones."""
        if new is not None:
            return SizeDistribution({kept + len(new): 1})
        if network.n_atoms is not None:
            low, high = network.n_atoms
            return SizeDistribution.uniform(kept + low, kept + high)
        sizes = network.sizes.at_least(kept + 1)
        if sizes is None:
            raise InputError(
                f"{name} has {counted(kept, 'atoms')}, and the molecules that {network.name} was "
                f"trained on have at most {network.sizes.largest}; fix fewer atoms, or name the "
                "number of new ones with --n-atoms"
            )
        return sizes

    @property
    def largest(self) -> int:
        return max(sizes.largest for sizes in self._sizes)

    def sizes(self, numbers: Tensor, uniform: Tensor) -> Tensor:
        records = self.record_of(numbers)
        sizes = torch.zeros_like(numbers)
        for record in np.unique(records.cpu().numpy()).tolist():
            own = records == record
            sizes[own] = self._sizes[record].draw(uniform[own])
        return sizes

    def hook(self, batch: Batch) -> SamplingHook:
        numbers = self.record_of(batch.numbers)
        records = numbers.numpy()
        device, atoms = batch.mask.device, batch.mask.shape[1]
        found = self._inputs.padded(numbers, device)
        more = atoms - found.mask.shape[1]
        fixed = torch.nn.functional.pad(found.mask, (0, more))
        data = {
            # Pairs have as many dimensions of atoms as of zeros to add.
            name: torch.nn.functional.pad(
                values,
                {
                    "positions": (0, 0, 0, more),
                    "bond_orders": (0, more, 0, more),
                }.get(name, (0, more)),
            )
            for name, values in found.data.items()
        }
        where = {
            name: (fixed[:, :, None] & fixed[:, None])[..., None] if name == "bonds"
            else fixed[..., None]
            for name in batch.layout.fields
        }  # fmt: skip
        if self._formula is not None:
            where |= fixed_elements(batch, batch.mask)
            elements = data["atomic_numbers"].cpu().numpy()
            for row, record in enumerate(records.tolist()):
                new = self._new[record]
                assert new is not None
                elements[row, self._kept[record] : self._kept[record] + len(new)] = new
            data["atomic_numbers"] = torch.from_numpy(elements).to(device)
        anchors, groups = self._anchored(batch, records, fixed)
        return AnchoredValues.of_fields(
            encoded(batch, data),
            where,
            anchors=anchors,
            groups=groups,
            until=HELD_UNTIL,
        )

    def _anchored(
        self, batch: Batch, records: NDArray[np.int64], fixed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Anchors in the units of the state, (B, G, 3), and the group of each atom, (B, N)."""
        new = (batch.mask & ~fixed).cpu().numpy()
        most = max(len(self._open[record].anchors) for record in records)
        anchors = np.zeros((len(records), most, 3), np.float32)
        groups = np.full(new.shape, -1)
        for row, record in enumerate(records.tolist()):
            found = self._open[record].anchors_of(int(new[row].sum()))
            anchors[row, : len(found)] = found
            groups[row, new[row]] = np.arange(new[row].sum()) % len(found)
        scale = batch.layout.fields["positions"].scale
        device = batch.mask.device
        return torch.from_numpy(anchors / scale).to(device), torch.from_numpy(groups).to(device)

    def finish(self, molecules: Molecules, numbers: Tensor) -> Molecules:
        """The molecules in the frame of their fragments, with exactly their coordinates."""
        records = self.record_of(numbers).cpu().numpy()
        kept = self._kept[records]
        # Places of the fixed atoms among all drawn ones, and among those of the input.
        within = _ranges(kept)
        drawn = np.repeat(molecules.offsets[:-1], kept) + within
        given = np.repeat(self._offsets[records], kept) + within
        wanted = self._positions[given]
        with np.errstate(invalid="ignore"):  # of diverged molecules
            apart = wanted.astype(np.float64) - molecules.positions[drawn]
            first = np.cumsum(kept) - kept
            moved = np.add.reduceat(apart, first) / kept[:, None]
            positions = molecules.positions + np.repeat(moved, molecules.sizes, axis=0)
        finite = np.repeat(molecules.finite(), kept)
        positions[drawn[finite]] = wanted[finite]
        properties = {_FIXED: Property(kept.astype(np.float64), "atoms")}
        if self.records > 1:
            properties[_RECORD] = Property(records + 1.0, "")
        return replace(
            molecules,
            positions=positions.astype(np.float32),
            properties={**molecules.properties, **properties},
        )

    def provenance(self) -> dict[str, str]:
        source = self._asked[0].source
        asked = {"fixed": source if self.records == 1 else f"{source} and others"}
        if self._smarts is not None:
            asked["fixed_smarts"] = self._smarts
        if self._formula is not None:
            asked["formula"] = formula_text(self._formula)
        return asked

    def tally(self) -> Tally:
        return _ValidTally()


class OpenValences(NamedTuple):
    """Where new atoms can bind to fixed ones."""

    anchors: NDArray[np.float64]
    """Atoms with open valences relative to the centroid of all, (G, 3), or one of all together."""
    directions: NDArray[np.float64]
    """Where their bonds would point to, (G, 3), mean of unit vectors."""

    @classmethod
    def of(cls, molecule: Molecule) -> OpenValences:
        """The open valences of fixed atoms, by RDKit's valence model.

        Those of one fragment are apart, for groups; those of several are one, for a linker. Without
        any, new atoms begin at the centroid.
        """
        positions = molecule.positions.astype(np.float64)
        positions = positions - positions.mean(axis=0)
        built = build(molecule)
        built.UpdatePropertyCache(strict=False)
        assert molecule.bond_index is not None
        bonds = molecule.bond_index.astype(np.int64)
        outward = positions / (np.linalg.norm(positions, axis=1, keepdims=True) + _NEAREST)
        atoms = [atom.GetIdx() for atom in built.GetAtoms() if atom.GetNumImplicitHs() > 0]
        directions = []
        for atom in atoms:
            others = np.concatenate([bonds[bonds[:, 0] == atom, 1], bonds[bonds[:, 1] == atom, 0]])
            toward = positions[others] - positions[atom]
            toward /= np.linalg.norm(toward, axis=1, keepdims=True)
            away = -toward.sum(axis=0)
            length = float(np.linalg.norm(away))
            # In a plane or on a line bonds cancel; then away from the centroid.
            directions.append(away / length if length > _NEAREST else outward[atom])
        if not atoms:
            return cls(np.zeros((1, 3)), np.zeros((1, 3)))
        found, pointing = positions[atoms], np.array(directions)
        if len(Chem.GetMolFrags(built)) > 1:
            found, pointing = found.mean(axis=0)[None], pointing.mean(axis=0)[None]
        return cls(found, pointing)

    def anchors_of(self, new: int) -> NDArray[np.float64]:
        """Centroids of groups of `new` atoms in all, at most as many groups, (G, 3)."""
        count = min(len(self.anchors), max(new, 1))
        length = _FIRST + _FURTHER * np.sqrt(new / count)
        centroids: NDArray[np.float64] = self.anchors + length * self.directions
        return centroids[:count]


class _ValidTally(Tally):
    """Counts molecules in which fixed and new atoms are one valid molecule."""

    def __init__(self) -> None:
        self._valid = self._all = 0

    def add(self, molecules: Molecules, numbers: NDArray[np.int64]) -> None:
        self._all += len(molecules)
        whole = molecules.select(np.flatnonzero(molecules.finite()))
        results = map(sanitize, perceive(whole) if whole.bonds is None else whole)
        self._valid += sum(result.valid and result.fragments == 1 for result in results)

    def notes(self) -> tuple[str, ...]:
        share = 100 * self._valid / max(self._all, 1)
        return (
            f"in {self._valid:,} of {counted(self._all, 'molecules')} ({share:.0f} %) fixed and "
            "new atoms are one valid molecule",
        )


def _ranges(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … n−1 for each count n, one after another."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)


def _pattern(smarts: str | None) -> Chem.Mol | None:
    """The pattern of a SMARTS."""
    if smarts is None:
        return None
    if not isinstance(smarts, str) or len(smarts) > LONGEST_SMARTS:
        raise InputError(f"--keep-smarts: expected a text of at most {LONGEST_SMARTS:,} characters")
    with rdBase.BlockLogs():
        pattern = Chem.MolFromSmarts(smarts)
    if pattern is None or not pattern.GetNumAtoms():
        raise InputError(
            f"--keep-smarts {smarts[:60]}: RDKit does not read it as SMARTS; a ring of benzene is "
            "c1ccccc1"
        )
    return pattern


class _Chosen(NamedTuple):
    """Fixed atoms of an input."""

    source: str
    molecule: Molecule
    """With bonds in a Kekulé form."""
    aromatic: NDArray[np.bool_]
    """Which bonds are aromatic, (E,)."""


def _chosen(source: str, molecule: Molecule, pattern: Chem.Mol | None) -> _Chosen:
    """The fixed atoms of an input: all, or those in any match of a pattern."""
    if molecule.bond_index is None:
        molecule = perceive(Molecules.from_list([molecule]))[0]
    forms = bond_forms(molecule)
    molecule = replace(molecule, bond_order=forms.kekule)
    aromatic = forms.aromatic == AROMATIC
    if pattern is None:
        return _Chosen(source, molecule, aromatic)
    whole = build(replace(molecule, bond_order=forms.aromatic))
    whole.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(whole)
    for bond in whole.GetBonds():
        if bond.GetIsAromatic() or bond.GetBondType() == Chem.BondType.AROMATIC:
            bond.SetIsAromatic(True)
            bond.GetBeginAtom().SetIsAromatic(True)
            bond.GetEndAtom().SetIsAromatic(True)
    matches = whole.GetSubstructMatches(pattern, maxMatches=max(1000, len(molecule)))
    if not matches:
        raise InputError(
            f"--keep-smarts {Chem.MolToSmarts(pattern)} matches nothing in {source}; change the "
            "pattern, or leave out that molecule"
        )
    kept = np.zeros(len(molecule), bool)
    kept[np.unique(np.concatenate(matches))] = True
    inside = kept[molecule.bond_index].all(axis=1)
    return _Chosen(source, Molecules.from_list([molecule]).keep_atoms(kept)[0], aromatic[inside])


def _joined(parts: Sequence[_Chosen]) -> Record:
    """The fixed atoms of several fragments as one record.

    Raises
    ------
    InputError
        Two atoms are in the same place, or nothing can bind to any atom.
    """
    sources = [part.source for part in parts]
    molecules = Molecules.from_list([part.molecule for part in parts])
    owner = molecules.molecule_index
    _check_apart(molecules.positions, owner, [sources[k] for k in owner])
    whole = Molecule(
        molecules.positions,
        molecules.atomic_numbers,
        molecules.formal_charges,
        molecules.atoms_of_bonds().astype(np.uint32),
        None if molecules.bonds is None else molecules.bonds.order,
    )
    source = " + ".join(sources)
    if (found := sanitize(whole)).valid and not found.hydrogens_missing:
        raise InputError(
            f"--keep {source}: every valence is filled, so that nothing can bind to it; remove the "
            "hydrogens in whose place new atoms are to bind, or choose atoms with --keep-smarts"
        )
    aromatic = np.concatenate([part.aromatic for part in parts])
    return Record.of_molecule(whole, source, aromatic)


def _check_apart(
    positions: NDArray[np.float32], owner: NDArray[np.int64], sources: Sequence[str]
) -> None:
    """Raise `InputError` if two fixed atoms are in the same place."""
    from scipy.spatial import cKDTree

    pairs = cKDTree(positions).query_pairs(_NEAREST, output_type="ndarray")
    if not len(pairs):
        return
    i, j = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))][0].tolist()
    distance = float(np.linalg.norm(positions[i] - positions[j]))
    numbers = [k - int(np.searchsorted(owner, owner[k])) + 1 for k in (i, j)]
    raise InputError(
        f"--keep: atom {numbers[0]} of {sources[i]} and atom {numbers[1]} of {sources[j]} are "
        f"{distance:.2f} Å apart; fixed atoms must not overlap: move one of the fragments"
    )
