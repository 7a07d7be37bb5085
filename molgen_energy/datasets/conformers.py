"""Conformers of many records, from worker processes, kept in FILE.shards until the file is there.

`preprocess smiles` embeds them, `preprocess ccd` relaxes those that it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.conformers import Conformers
from molgen_energy.data.molecules import SHAPES as MOLECULES
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.shards import Manifest, ShardFolder, check_unchanged, shards_folder
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.distributed import worker_count
from molgen_energy.errors import InputError
from molgen_energy.formats.tensors import Shapes
from molgen_energy.workers import WorkerPool

SHAPES: Shapes = {
    **{f"{name.removesuffix('?')}?": shape for name, shape in MOLECULES.items()},
    "which": ("int64", ("conformers",)),
    "energies?": ("float64", ("conformers",)),
    "failures": ("uint8", ("bytes",)),
    "lost": ("bool", ("records",)),
}
"""Of the arrays of a shard: conformers, none of which need be there; the record of each; what each
lost on relaxation (kcal/mol); and failures as JSON."""

_PRELOAD = ("molgen_energy.chemistry.conformers",)
R = TypeVar("R")
Item = TypeVar("Item")


class ConformerManifest(Manifest):
    """The declaration of `manifest.yaml`: what conformers depend on, besides the molecules."""

    relax: str
    """The relaxation."""
    rdkit: str
    """Version of RDKit."""


@dataclass(frozen=True)
class Computed:
    """Conformers of some records."""

    molecules: Molecules | None
    """None where there is no conformer."""
    which: NDArray[np.int64]
    """Of each conformer the number of its record among these, ascending."""
    energies: NDArray[np.float64] | None
    """kcal/mol that each conformer lost on relaxation, if it was given."""
    failures: list[tuple[int, str]]
    """Records without conformers, and why."""


@dataclass(frozen=True)
class ConformerWork(Generic[R, Item]):
    """How the conformers of records are computed."""

    manifest: ConformerManifest
    item: Callable[[R], Item]
    """What a worker process needs of a record."""
    compute: Callable[[Item], Conformers]
    """The work; a function of a module."""
    shard_name: Callable[[Sequence[R]], str]
    """Of some records; changes with all that their conformers depend on."""
    timeout: float
    """Most seconds for one record."""
    workers: int | None = None
    """Processes; None for one on each processor."""
    fits: Callable[[Sequence[R], Computed], bool] = lambda part, found: True
    """Whether a stored shard can be that of some records."""

    def run(
        self, parts: Sequence[Sequence[R]], log: DatasetLog
    ) -> Generator[tuple[Sequence[R], Computed], None, None]:
        """The conformers of all records, in order; the same for any number of processes.

        Takes those that are in FILE.shards, and stores the others there, a shard for each part. A
        part in which a record exceeded the time limit is not stored, so that another try may allow
        more.
        """
        records = sum(map(len, parts))
        if not shards_folder(log.output).exists():
            ShardFolder.begin(log.output, self.manifest)
        with ShardFolder(
            log.output, self.manifest.command, type(self.manifest), lead=True
        ) as shards:
            check_unchanged(shards.manifest, self.manifest, shards.folder, "preprocess")
            names = [self.shard_name(part) for part in parts]
            missing = {
                k for k, part in enumerate(parts) if self._stored(shards, names[k], part) is None
            }
            stored = len(parts) - len(missing)
            done = 0
            try:
                wanted = (record for k in sorted(missing) for record in parts[k])
                with closing(self._results(wanted)) as results:
                    for k, part in enumerate(parts):
                        if k in missing:
                            arrays = _arrays([next(results) for _ in part])
                            if not arrays["lost"].any():
                                shards.store(names[k], arrays)
                                stored += 1
                            found = _computed(arrays)
                        else:
                            again = self._stored(shards, names[k], part)
                            if again is None:  # by another program, since the folder is locked
                                raise InputError(
                                    f"{shards.folder / names[k]} was changed while it was read; "
                                    "run the same command again"
                                )
                            found = again
                        done += len(part)
                        log.progress(done, records)
                        yield part, found
            finally:
                if not stored:
                    shards.remove()

    def _results(self, records: Iterator[R]) -> Generator[Conformers, None, None]:
        """Of each record, in order."""

        def lost(item: Item, reason: str) -> Conformers:
            return Conformers(failure=f"{reason}; --timeout allows more", lost=True)

        workers = worker_count(self.workers)
        with WorkerPool(workers, self.timeout, preload=_PRELOAD) as pool:
            for _, result in pool.map(self.compute, map(self.item, records), lost):
                yield result

    def _stored(self, shards: ShardFolder[Any], name: str, part: Sequence[R]) -> Computed | None:
        """The conformers of some records from their shard; None if it is missing or damaged."""
        arrays = shards.load(name, SHAPES)
        if arrays is None:
            return None
        records = range(len(part))
        try:
            found = _computed(arrays)
            sound = all(
                type(k) is int and k in records and type(text) is str for k, text in found.failures
            )
            if found.molecules is not None:
                found.molecules.check()
                sound &= len(found.molecules) == len(found.which)
                sound &= bool(np.isin(found.which, records).all())
            sound = sound and self.fits(part, found)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return found if sound else None


def _arrays(results: list[Conformers]) -> dict[str, NDArray[Any]]:
    """Conformers of some records, as a shard holds them."""
    failures = [(k, result.failure) for k, result in enumerate(results) if result.failure]
    sizes = [len(result.conformers) for result in results]
    found = [conformer for result in results for conformer in result.conformers]
    energies = [energy for result in results for energy in result.energies]
    return {
        **(Molecules.from_list(found).to_arrays() if found else {}),
        **({"energies": np.array(energies)} if energies else {}),
        "which": np.repeat(np.arange(len(results)), sizes),
        "failures": np.frombuffer(json.dumps(failures).encode(), np.uint8),
        "lost": np.array([result.lost for result in results]),
    }


def _computed(arrays: dict[str, NDArray[Any]]) -> Computed:
    """What a shard holds."""
    which = arrays["which"]
    return Computed(
        Molecules.from_arrays(arrays) if len(which) else None,
        which,
        arrays.get("energies"),
        [(k, text) for k, text in json.loads(arrays["failures"].tobytes())],
    )
