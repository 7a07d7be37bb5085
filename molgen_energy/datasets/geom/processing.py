"""What worker processes do with the molecules of a layout: decode, filter and identify them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.cleaning import faults
from molgen_energy.chemistry.identity import Identity, identify, identify_smiles
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.datasets.geom.layout import Entry


class Rules(NamedTuple):
    """Which conformers are kept."""

    decode: Callable[[Any], Molecule]
    conformers: int
    """The most of a molecule; 0 keeps all."""
    allowed: NDArray[np.bool_]
    """(256,) by atomic number."""
    max_atoms: int
    clean: bool


@dataclass(frozen=True)
class EntryChunk:
    """Molecules that a worker process takes at a time."""

    entries: Sequence[Entry]
    rules: Rules

    def __len__(self) -> int:
        return len(self.entries)

    def parts(self, size: int) -> Iterator[EntryChunk]:
        """The molecules in parts of at most `size`."""
        for k in range(0, len(self), size):
            yield EntryChunk(self.entries[k : k + size], self.rules)


class ProcessedEntry(NamedTuple):
    """The result for one molecule."""

    molecules: Sequence[Molecule] = ()
    """The conformers that are kept."""
    chosen: Sequence[int] = ()
    """Their numbers among all of the entry."""
    identity: Identity = Identity()
    filtered: str = ""
    """Why an option leaves the molecule out."""
    failure: str = ""
    """What is wrong with the molecule."""


def process_entries(chunk: EntryChunk) -> list[ProcessedEntry]:
    """The result for each molecule of a chunk."""
    return [_process(entry, chunk.rules) for entry in chunk.entries]


def processing_failed(chunk: EntryChunk, reason: str) -> list[ProcessedEntry]:
    """The result for molecules at which a process died or timed out."""
    return [ProcessedEntry(failure=reason)] * len(chunk)


def _process(entry: Entry, rules: Rules) -> ProcessedEntry:
    if not entry.conformers:
        return ProcessedEntry(failure="it has no conformers")
    chosen = lowest(entry, rules.conformers)
    # The cleaning drops a molecule for any of its conformers, chosen or not.
    wanted = range(len(entry.conformers)) if rules.clean else chosen
    try:
        decoded = {k: rules.decode(entry.conformers[k]) for k in wanted}
    except ValueError as error:
        return ProcessedEntry(failure=str(error))
    molecules = [decoded[k] for k in chosen]
    elements = np.concatenate([molecule.atomic_numbers for molecule in molecules])
    if not rules.allowed[elements].all():
        return ProcessedEntry(filtered="left out with other elements")
    if max(map(len, molecules)) > rules.max_atoms:
        return ProcessedEntry(filtered=f"left out with more than {rules.max_atoms} atoms")
    if rules.clean:
        fault = next(filter(None, faults(Molecules.from_list(list(decoded.values())))), "")
        if fault:
            return ProcessedEntry(filtered=f"left out by the cleaning: {fault}")
    return ProcessedEntry(molecules, chosen, _identity(molecules[0], entry.smiles))


def lowest(entry: Entry, count: int) -> list[int]:
    """Numbers of the conformers of lowest energy, or of the first where energies are missing.

    In ascending order of energy; 0 keeps all, in the order of the layout.
    """
    everything = list(range(len(entry.conformers)))
    if not count:
        return everything
    if entry.energies:  # NaN comes last
        everything = np.argsort(entry.energies, kind="stable").tolist()
    return everything[:count]


def _identity(molecule: Molecule, smiles: str) -> Identity:
    """By the bonds where there are any, else by the SMILES of the layout."""
    if molecule.bond_index is not None:
        found = identify(molecule)
        return found if not found.failure else found._replace(smiles=smiles)
    return identify_smiles(smiles) if smiles else Identity()
