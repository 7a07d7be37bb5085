"""Variants of given molecules: they get noise up to a level, and a sampler removes it.

SDEdit (C. Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
Equations", ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.identity import Identity, identify
from molgen_energy.chemistry.substructures import Substructures, substructures_of
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.diffusion.state import State
from molgen_energy.errors import counted
from molgen_energy.systems.molecules.control.base import Batch, Network, Record, Tally
from molgen_energy.systems.molecules.control.inputs import InputMolecules, WholeMolecules
from molgen_energy.systems.molecules.control.records import read_records

DEFAULT_STRENGTH = 0.3
_COMPARED = 1000
"""Variants whose similarity is computed for the notes, a millisecond each."""


class Variants(WholeMolecules):
    """Variants of molecules, with as many atoms, in the frame of the molecule.

    Parameters
    ----------
    records
        The molecules.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        super().__init__([len(record) for record in records])
        self._asked = list(records)
        self._molecules = [record.molecule for record in records]
        self._centres = np.stack([m.positions.mean(axis=0) for m in self._molecules])

    @classmethod
    def read(cls, value: Any, options: Mapping[str, Any]) -> list[Record]:
        return read_records(value, "--like")

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Variants:
        return cls(options["like"])

    @property
    def options(self) -> dict[str, Any]:
        return {"like": self._asked}

    def bind(self, network: Network) -> None:
        names = [f"--like {record.source}" for record in self._asked]
        self._inputs = InputMolecules(self._molecules, names, network)

    def start(self, batch: Batch) -> State:
        return self.given(batch)

    def finish(self, molecules: Molecules, numbers: Tensor) -> Molecules:
        """The variants where their molecule is."""
        records = self.record_of(numbers).cpu().numpy()
        moved = np.repeat(self._centres[records], molecules.sizes, axis=0)
        return replace(molecules, positions=molecules.positions + moved)

    def label(self, molecules: Molecules, numbers: NDArray[np.int64]) -> Molecules:
        return replace(molecules, groups=self.record_of(torch.from_numpy(numbers)).numpy())

    def provenance(self) -> dict[str, str]:
        source = self._asked[0].source
        return {"variants_of": source if self.records == 1 else f"{source} and others"}

    def tally(self) -> Tally:
        return _SimilarityTally(self, self._molecules)


class _SimilarityTally(Tally):
    """Compares variants with their molecules."""

    def __init__(self, control: Variants, molecules: Sequence[Molecule]) -> None:
        self._control, self._inputs = control, molecules
        self._known: dict[int, tuple[Identity, Substructures | None]] = {}
        self._seen = self._valid = self._same = 0
        self._similarities: list[float] = []

    def add(self, molecules: Molecules, numbers: NDArray[np.int64]) -> None:
        some = np.arange(min(len(molecules), _COMPARED - self._seen))
        self._seen += len(some)
        records = self._control.record_of(torch.from_numpy(numbers[some])).tolist()
        compared = molecules.select(some)
        if compared.bonds is None:
            compared = perceive(compared)
        for molecule, record in zip(compared, records, strict=True):
            if record not in self._known:
                self._known[record] = _named(self._inputs[record])
            own, parts = _named(molecule)
            there, theirs = self._known[record]
            # In no more pieces than the input, which may be a salt.
            valid = bool(own.smiles) and own.fragments <= there.fragments
            self._valid += valid
            self._same += valid and own.smiles == there.smiles
            if parts is not None and theirs is not None:
                self._similarities.append(tanimoto(parts.fingerprint, theirs.fingerprint))

    def notes(self) -> tuple[str, ...]:
        if not self._seen:
            return ()
        of_all = f"of {counted(self._seen, 'variants')}"
        if self._seen == _COMPARED:
            of_all = f"of the first {self._seen:,} variants"
        note = f"{self._valid:,} {of_all} are valid, and {self._same:,} the molecule itself"
        if self._similarities:
            mean = float(np.mean(self._similarities))
            note += f"; mean Tanimoto similarity to it: {mean:.2f} (Morgan fingerprints)"
        return (note,)


def _named(molecule: Molecule) -> tuple[Identity, Substructures | None]:
    """SMILES without stereochemistry and fingerprint; empty and None where RDKit fails."""
    own = identify(molecule)
    return own, substructures_of(own.smiles) if own.smiles else None


def tanimoto(first: bytes, second: bytes) -> float:
    """Bits that both fingerprints have, of those that at least one has; 1 if none has any."""
    a, b = (np.unpackbits(np.frombuffer(bits, np.uint8)).astype(bool) for bits in (first, second))
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0
