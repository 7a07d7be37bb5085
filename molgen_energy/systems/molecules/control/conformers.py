"""Conformers of given molecules: elements, charges and bonds are fixed, positions are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from torch import Tensor

from molgen_energy.chemistry.conformers import parse_smiles
from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.stereo import Stereochemistry, StereoMatches
from molgen_energy.data.molecules import Molecules
from molgen_energy.datasets.smiles import is_smiles_file, smiles_rows
from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.inpainting import FixedValues
from molgen_energy.errors import InputError
from molgen_energy.output import check_file, named_path
from molgen_energy.systems.molecules.control.base import (
    MOST_RECORDS,
    Batch,
    Network,
    Tally,
)
from molgen_energy.systems.molecules.control.inputs import (
    GRAPH_FIELDS,
    InputMolecules,
    WholeMolecules,
    everywhere,
)

_COLUMN = "call that of the SMILES so"


class Conformers(WholeMolecules):
    """Conformers of SMILES, with all hydrogens.

    An E(3)-equivariant network draws a conformer and its mirror image equally often, so of the two
    the one is taken that has more of the specified stereocentres.

    Parameters
    ----------
    smiles
        SMILES that `parse_smiles` accepts.
    """

    def __init__(self, smiles: Sequence[str]) -> None:
        self._smiles = np.array(smiles, object)
        try:
            self._parsed = [parse_smiles(text)[0] for text in smiles]
        except ValueError as error:  # in a manifest that was edited
            raise InputError(f"--smiles: {error}") from None
        super().__init__([molecule.GetNumAtoms() for molecule in self._parsed])
        self._stereo = [Stereochemistry.of(molecule) for molecule in self._parsed]

    @classmethod
    def read(cls, value: Any, options: Mapping[str, Any]) -> list[str]:
        found = _texts(value)
        if not found:
            raise InputError(f"--smiles {value} holds no SMILES; name at least one")
        if len(found) > MOST_RECORDS:
            raise InputError(
                f"--smiles: {len(found):,} SMILES, and a job takes at most {MOST_RECORDS:,}; "
                "divide them"
            )
        for place, text in found:
            _check(place, text)
        return [text for _, text in found]

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Conformers:
        return cls(options["smiles"])

    @property
    def options(self) -> dict[str, Any]:
        return {"smiles": self._smiles.tolist()}

    def bind(self, network: Network) -> None:
        if "bonds" not in network.layout:
            raise InputError(
                f"--smiles: the model of {network.name} has no bonds, so it cannot take those of a "
                "SMILES; name another with --checkpoint, such as one of `train --config "
                "ccd_jodo_conformers_cpu`"
            )
        names = [f"--smiles {text}" for text in self._smiles]
        molecules = [molecule_from_rdkit(_at_origin(molecule)) for molecule in self._parsed]
        self._inputs = InputMolecules(molecules, names, network)
        graph = [name for name in network.layout.fields if name in GRAPH_FIELDS]
        self._fixed = [name for name in graph if name not in network.given]
        self._mirror = network.equivariant

    def hook(self, batch: Batch) -> SamplingHook | None:
        if not self._fixed:
            return None
        return FixedValues.of_fields(self.given(batch), everywhere(batch, self._fixed))

    def finish(self, molecules: Molecules, numbers: Tensor) -> Molecules:
        """The conformers, or their mirror images, with the bonds and charges of the SMILES."""
        records = self.record_of(numbers).cpu().numpy()
        graphs = self._inputs.molecules.select(records)
        positions = molecules.positions.copy()
        if self._mirror:
            for places, matches in self._matches(molecules, records):
                turned = matches.mirrored.sum(axis=1) > matches.centres.sum(axis=1)
                positions[places[turned]] *= -1
        return replace(
            molecules,
            positions=positions,
            formal_charges=graphs.formal_charges,
            bonds=graphs.bonds,
        )

    def _matches(
        self, molecules: Molecules, records: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], StereoMatches]]:
        """For each record with stereochemistry among those of molecules (M,): the places of the
        atoms of its K conformers, (K, N), and what they have of it."""
        for record in np.unique(records).tolist():
            stereo = self._stereo[record]
            if len(stereo):
                first = molecules.offsets[:-1][records == record]
                places = first[:, None] + np.arange(int(self._sizes[record]))
                yield places, stereo.matches(molecules.positions[places])

    def stereo_found(self, molecules: Molecules, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Of the molecules whose SMILES specify stereochemistry, which have all of it."""
        records = self.record_of(torch.from_numpy(numbers)).numpy()
        found = [matches.all for _, matches in self._matches(molecules, records)]
        return np.concatenate([np.zeros(0, bool), *found])

    def label(self, molecules: Molecules, numbers: NDArray[np.int64]) -> Molecules:
        records = self.record_of(torch.from_numpy(numbers)).numpy()
        return replace(molecules, smiles=self._smiles[records], groups=records)

    def provenance(self) -> dict[str, str]:
        asked = str(self._smiles[0]) if self.records == 1 else f"{self.records:,} SMILES"
        return {"conformers_of": asked}

    def tally(self) -> Tally:
        return _StereoTally(self)


class _StereoTally(Tally):
    """Counts conformers with the stereochemistry that is asked."""

    def __init__(self, control: Conformers) -> None:
        self._control = control
        self._found = self._asked = 0

    def add(self, molecules: Molecules, numbers: NDArray[np.int64]) -> None:
        found = self._control.stereo_found(molecules, numbers)
        self._found += int(found.sum())
        self._asked += len(found)

    def notes(self) -> tuple[str, ...]:
        if not self._asked:
            return ()
        share = 100 * self._found / self._asked
        return (
            f"of {self._asked:,} conformers whose SMILES specify stereocentres or double bonds, "
            f"{self._found:,} ({share:.1f} %) have them",
        )


def _texts(value: Any) -> list[tuple[str, str]]:
    """SMILES with their places: of a text, of several, or of a file."""
    if isinstance(value, PathLike) or (isinstance(value, str) and is_smiles_file(value)):
        path = named_path(Path(value))
        check_file(path)
        return [
            (f"{path}: line {line}", text) for line, text, _ in smiles_rows(path, remedy=_COLUMN)
        ]
    if isinstance(value, str):
        return [("", value.strip())]
    if not isinstance(value, Iterable):
        raise InputError(f"--smiles: expected texts or a path, found {type(value).__name__}")
    return [(f"number {k}", str(text).strip()) for k, text in enumerate(value, start=1)]


def _check(place: str, text: str) -> None:
    """Raise `InputError` unless RDKit reads a SMILES as one molecule with bonds of known orders."""
    where = f"--smiles: {place}" if place else "--smiles"
    try:
        molecule, _ = parse_smiles(text, remedy="draw conformers of one of them")
        molecule_from_rdkit(_at_origin(molecule))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _at_origin(molecule: Chem.Mol) -> Chem.Mol:
    """A copy with a conformer whose atoms are all at the origin."""
    copy = Chem.Mol(molecule)
    copy.AddConformer(Chem.Conformer(copy.GetNumAtoms()))
    return copy
