"""What a dataset does about bad and suspicious molecules before it writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import MEND_OR_SKIP, InputError

if TYPE_CHECKING:
    from molgen_energy.chemistry.anomalies import Anomalies

_REMEDIES = {
    "scale": "convert the coordinates to Å",
    "drawing": "write their SMILES to a .smi file, of which `preprocess smiles` makes conformers",
    "no_hydrogens": "add them, models here take hydrogens as atoms",
    "few_hydrogens": "add them, models here take hydrogens as atoms",
    "far": "move the molecules to the origin",
}
_BAD = {
    "coincident": "two atoms are in one place",
    "one_place": "all atoms are in one place, as after a failed embedding",
}


class Screen:
    """Checks the molecules of a dataset, chunk by chunk, and counts what is suspicious.

    Parameters
    ----------
    allowed
        (256,): which atomic numbers may occur; None allows all.
    skip_bad
        Leave out bad records and report them; None refuses them where no option could do so.
    largest_fragment, require_hydrogens, drop_duplicates
        The options of `ScreenedDataset`.
    remedies
        For kinds of `molgen_energy.chemistry.anomalies`, beside those that need no option.
    """

    def __init__(
        self,
        allowed: NDArray[np.bool_] | None = None,
        skip_bad: bool | None = None,
        largest_fragment: bool = False,
        require_hydrogens: bool = False,
        drop_duplicates: bool = False,
        remedies: Mapping[str, str] | None = None,
    ) -> None:
        from molgen_energy.chemistry.anomalies import AnomalyCounts, Repetitions

        self._allowed = np.ones(256, bool) if allowed is None else allowed
        self._skip_bad = skip_bad
        self._largest_fragment = largest_fragment
        self._require_hydrogens = require_hydrogens
        self._drop_duplicates = drop_duplicates
        self._remedies = _REMEDIES | dict(remedies or {})
        self._anomalies = AnomalyCounts()
        self._seen = Repetitions()

    def apply(self, chunk: MoleculeChunk, source: str, log: DatasetLog) -> MoleculeChunk:
        """The molecules to write of some that a dataset has.

        Raises
        ------
        InputError
            A record is bad, and the options do not leave it out.
        """
        from molgen_energy.chemistry.anomalies import find_anomalies, largest_fragments

        if broken := _broken(chunk.molecules):
            chunk = chunk.select(self._usable(chunk, broken, source, log))
        if self._largest_fragment:
            molecules, changed = largest_fragments(chunk.molecules)
            chunk = replace(chunk, molecules=molecules)
            log.counts["reduced to the largest fragment"] += int(changed.sum())
        found = find_anomalies(chunk.molecules)
        kept = self._usable(chunk, self._refused(chunk.molecules, found, log), source, log)
        if self._require_hydrogens:
            lacking = (found.kinds["no_hydrogens"] | found.kinds["few_hydrogens"])[kept]
            log.counts["left out for missing hydrogens"] += int(lacking.sum())
            kept = kept[~lacking]
        if self._drop_duplicates:
            repeated = self._seen.add(chunk.molecules.select(kept))
            log.counts["left out as duplicates"] += int(repeated.sum())
            kept = kept[~repeated]
        if len(kept) < len(chunk):
            chunk, found = chunk.select(kept), found.select(kept)
        records = chunk.records if log.names is None else log.names[chunk.records - 1]
        self._anomalies.add(chunk.molecules, records, log.file, found)
        return chunk

    def notes(self) -> list[str]:
        """A line for each kind of anomaly among the molecules to write."""
        return self._anomalies.notes(self._remedies)

    def _usable(
        self, chunk: MoleculeChunk, bad: Mapping[int, str], source: str, log: DatasetLog
    ) -> NDArray[np.int64]:
        """The numbers of all molecules but the bad ones, by number with the reason."""
        for k, reason in sorted(bad.items()):
            record = f"{log.locate(int(chunk.records[k]))}: {reason}"
            if not self._skip_bad:
                remedy = "" if self._skip_bad is None else f"; {MEND_OR_SKIP}"
                raise InputError(f"{log.file or source}: {record}{remedy}")
            log.skip(f"{log.file}: {record}" if log.file else record)
        return np.setdiff1d(np.arange(len(chunk)), list(bad))

    def _refused(self, molecules: Molecules, found: Anomalies, log: DatasetLog) -> dict[int, str]:
        """Molecules that cannot be or must not be, with the reason."""
        bad = {}
        foreign = np.flatnonzero(~self._allowed[molecules.atomic_numbers])
        for k in np.unique(molecules.molecule_index[foreign]).tolist():
            names = foreign_elements(molecules[k].atomic_numbers, self._allowed)
            bad[k] = foreign_reason(names, self._allowed)
            log.counts.update(f"left out with {name}" for name in names)
        for kind, reason in _BAD.items():
            bad |= dict.fromkeys(np.flatnonzero(found.kinds[kind]).tolist(), reason)
        return bad


def allowed_elements(names: str | None) -> NDArray[np.bool_]:
    """(256,): which atomic numbers may occur by a text such as H,C,N; None allows all.

    Raises
    ------
    InputError
        The text names something else, or nothing.
    """
    allowed = np.full(256, names is None)
    for name in filter(None, map(str.strip, (names or "").split(","))):
        allowed[atomic_number(name)] = True
    if not allowed.any():
        raise InputError(f"--elements '{names}' names no element, such as H,C,N,O,F")
    return allowed


def foreign_elements(atomic_numbers: NDArray[np.uint8], allowed: NDArray[np.bool_]) -> list[str]:
    """Symbols of the elements of a molecule that may not occur; `allowed` is (256,)."""
    elements = np.unique(atomic_numbers)
    return [symbol(z) for z in elements[~allowed[elements]].tolist()]


def foreign_reason(names: list[str], allowed: NDArray[np.bool_]) -> str:
    """Why a molecule with these elements is a bad record."""
    among = ", ".join(symbol(z) for z in np.flatnonzero(allowed[:119]).tolist())
    return f"it holds {', '.join(names)}, which is not among {among}"


def _broken(molecules: Molecules) -> dict[int, str]:
    """Molecules without atoms or with coordinates that are not finite, with the reason."""
    bad = dict.fromkeys(np.flatnonzero(molecules.sizes == 0).tolist(), "no atoms")
    atoms = ~np.isfinite(molecules.positions).all(axis=1)
    nowhere = np.unique(molecules.molecule_index[atoms]).tolist()
    return bad | dict.fromkeys(nowhere, "the coordinates are not finite")
