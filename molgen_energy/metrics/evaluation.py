"""Judge molecules by the field's protocol: stability, validity, uniqueness, novelty, connectivity.

EDM's protocol (Hoogeboom et al., ICML 2022): bonds are perceived from distances. An atom is stable
when its bond orders add up to an allowed valence, a molecule when all its atoms are. A molecule is
valid when RDKit sanitises it whole, and is named by the canonical SMILES of its largest fragment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from molgen_energy.chemistry.bonds import has_valence, perceive, stable_atoms
from molgen_energy.chemistry.rdkit import build, judge
from molgen_energy.data.molecules import Molecules
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError
from molgen_energy.metrics.rates import Rate


@dataclass(frozen=True)
class Metric:
    """A row of the report."""

    key: str
    label: str
    meaning: str


METRICS = (
    Metric("molecule_stability", "molecule stability", "molecules whose atoms are all stable"),
    Metric("atom_stability", "atom stability", "atoms with an allowed sum of bond orders"),
    Metric("validity", "validity", "molecules that RDKit sanitises"),
    Metric("uniqueness", "uniqueness", "distinct among the valid"),
    Metric("novelty", "novelty", "not in the training set, among the distinct"),
    Metric("connected", "connected", "molecules of one fragment"),
    Metric("complete", "complete", "valid and connected"),
    Metric("valid_unique", "valid × unique", "distinct valid among all"),
    Metric("valid_unique_novel", "valid × unique × novel", "novel among all"),
    Metric("hydrogens_assumed", "valid by added hydrogens", "valid with implicit H or radicals"),
)


@dataclass
class Evaluation:
    """What was found of one set of molecules: a rate for each of `METRICS`, None if not known."""

    name: str
    molecules: int
    rates: dict[str, Rate | None]
    bonds: str = "perceived from distances"
    skipped: int = 0
    notes: list[str] = field(default_factory=list)


class _Tally:
    def __init__(self) -> None:
        self.molecules = self.atoms = self.stable_molecules = self.stable_atoms = 0
        self.valid = self.connected = self.complete = self.hydrogens = 0
        self.smiles: set[str] = set()

    def add(self, molecules: Molecules) -> None:
        """Count one piece; memory grows with the distinct SMILES only."""
        for _, numbers, orders in perceive(molecules):
            inside = numbers > 0
            stable = stable_atoms(numbers, orders)
            self.stable_atoms += int(stable.sum())
            self.stable_molecules += int((stable | ~inside).all(axis=1).sum())
            for z, order, size in zip(numbers, orders, inside.sum(axis=1).tolist(), strict=True):
                verdict = judge(build(z[:size], order[:size, :size]))
                self.valid += verdict.valid
                self.connected += verdict.fragments == 1
                self.complete += verdict.valid and verdict.fragments == 1
                self.hydrogens += verdict.hydrogens_added
                if verdict.smiles is not None:
                    self.smiles.add(verdict.smiles)
        self.molecules += len(molecules)
        self.atoms += len(molecules.atomic_numbers)

    def rates(self, known: Collection[str] | None) -> dict[str, Rate | None]:
        """All rates; those that need a training set are None without one."""
        novel = None if known is None else sum(s not in known for s in self.smiles)
        distinct = len(self.smiles)
        return {
            "molecule_stability": Rate(self.stable_molecules, self.molecules),
            "atom_stability": Rate(self.stable_atoms, self.atoms),
            "validity": Rate(self.valid, self.molecules),
            "uniqueness": Rate(distinct, self.valid),
            "novelty": None if novel is None else Rate(novel, distinct),
            "connected": Rate(self.connected, self.molecules),
            "complete": Rate(self.complete, self.molecules),
            "valid_unique": Rate(distinct, self.molecules),
            "valid_unique_novel": None if novel is None else Rate(novel, self.molecules),
            "hydrogens_assumed": Rate(self.hydrogens, self.molecules),
        }


def evaluate(
    name: str, pieces: Iterable[Molecules], known: Collection[str] | None, skip_bad: bool = False
) -> Evaluation:
    """Judge molecules that come in pieces.

    Parameters
    ----------
    name
        What the molecules are called in the report and in errors.
    pieces
        The molecules; one piece is in memory at a time.
    known
        SMILES of the training molecules, by the same perception; None leaves novelty open.
    skip_bad
        Leave out molecules with an element that no valence is known for, rather than raise.

    Raises
    ------
    InputError
        An atom is of an element that the table of valences does not hold, and `skip_bad` is false.
    """
    tally = _Tally()
    skipped = seen = 0
    for piece in pieces:
        foreign = np.flatnonzero(~has_valence(piece.atomic_numbers))
        if len(foreign):
            owners = np.unique(np.searchsorted(piece.offsets, foreign, side="right") - 1)
            if not skip_bad:
                raise InputError(
                    f"{name}: molecule {seen + int(owners[0]) + 1} holds "
                    f"{symbol(int(piece.atomic_numbers[foreign[0]]))}, for which no valence is "
                    "known; pass --skip-bad to leave out such molecules"
                )
            skipped += len(owners)
        seen += len(piece)
        if len(foreign):
            piece = piece.select(np.setdiff1d(np.arange(len(piece)), owners))
        if len(piece):
            tally.add(piece)
    return Evaluation(name, tally.molecules, tally.rates(known), skipped=skipped)


def training_smiles(pieces: Iterable[Molecules]) -> set[str]:
    """SMILES of molecules as `evaluate` names them, for novelty against them."""
    tally = _Tally()
    for piece in pieces:
        tally.add(piece)
    return tally.smiles


def over_regular(samples: Evaluation, reference: Evaluation) -> bool:
    """Whether samples are more often stable than real data beyond both intervals."""
    ours, data = samples.rates["molecule_stability"], reference.rates["molecule_stability"]
    if ours is None or data is None or ours.interval is None or data.interval is None:
        return False
    return ours.interval[0] > data.interval[1]
