"""The shards of a file of sampled molecules; a shard is a batch that was drawn together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecules
from molgen_energy.data.shards import MANIFEST, ShardFolder, check_unchanged, shards_folder
from molgen_energy.errors import InputError
from molgen_energy.output import check_writable, open_to_append

_DONE = ".done"
_PAIRS = ("n_atoms", "temperature_range")


@dataclass(frozen=True)
class SamplingJob:
    """What to draw. Two equal jobs give the same molecules, in the same batches."""

    count: int
    seed: int
    sampler: str
    steps: int
    spacing: str | None
    """Of the sampler's levels; None if it visits all."""
    eta: float | None
    n_atoms: tuple[int, int] | None
    """Fewest and most atoms; None draws sizes from the histogram of the training molecules."""
    condition: dict[str, float] | None
    """Values of properties; None draws them from the training molecules."""
    low_precision: bool
    batch_size: int | None
    """Molecules in a batch; None makes batches of `pairs` pairs of atoms."""
    pairs: int
    window: int
    """Molecules that are sorted by size and cut into batches together."""
    weights: str
    """Fingerprint of the checkpoint."""
    checkpoint: str
    """Absolute path of the checkpoint, or the name of pretrained weights."""
    origin: str
    """Run and step of the weights, for the file of molecules."""
    version: str
    """Version of this package."""
    # Options with a default may be missing in the manifest of an earlier version.
    temperature: float = 1.0
    temperature_of: str = "noise"
    temperature_range: tuple[float | None, float | None] = (0.3, None)
    """Å; None is an open end."""
    final_noise: float = 1.0


class Shard(NamedTuple):
    """A batch of molecules that is drawn, and stored, together."""

    window: int
    place: int
    """Index among the shards of its window, by size."""
    numbers: NDArray[np.int64]
    """Numbers of the molecules, (M,)."""

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.window:06d}-{self.place:05d}.shard"


class MoleculeShards(ShardFolder):
    """The folder of finished shards of a file of molecules; made by `create` or `open`.

    A shard holds all columns of its molecules (`Molecules.to_arrays`) and their numbers.
    """

    def __init__(self, output: Path, lead: bool) -> None:
        super().__init__(output, "sample", lead)
        path = self.folder / MANIFEST
        try:
            values = self.manifest
            own = {f.name: values[f.name] for f in fields(SamplingJob) if f.name in values}
            pairs = {name: _pair(own[name]) for name in _PAIRS if name in own}
            self.job = SamplingJob(**own | pairs)
        except (TypeError, KeyError, IndexError) as error:
            self.close()
            raise InputError(f"{path} is damaged; remove {self.folder} and sample again") from error
        self._units: dict[str, str] = values.get("units", {})
        if lead:
            for stale in self.folder.glob(f"*{_DONE}"):
                stale.unlink()

    @classmethod
    def create(cls, output: Path, job: SamplingJob, units: dict[str, str]) -> MoleculeShards:
        """Begin a folder; `units` are those of the properties that molecules will have.

        Raises
        ------
        InputError
            The folder exists, or the output cannot be written.
        """
        check_writable(output)
        folder = shards_folder(output)
        if folder.exists():
            raise InputError(
                f"{folder} holds molecules of an interrupted run; continue with "
                f"`molgen-energy sample --resume {output}`, or remove that folder"
            )
        cls.begin(output, "sample", _plain(job) | {"units": units})
        return cls(output, lead=True)

    @classmethod
    def open(cls, output: Path, lead: bool) -> MoleculeShards:
        """Open an existing folder.

        Raises
        ------
        InputError
            There is none, it is damaged, or another process locks it.
        """
        check_writable(output)
        return cls(output, lead)

    def has(self, shard: Shard) -> bool:
        """Whether a shard is finished; it may have been damaged since."""
        return self.holds(shard.name)

    def read(self, shard: Shard) -> Molecules | None:
        """The molecules of a shard; None if it is missing or damaged."""
        arrays = self.load(shard.name)
        if arrays is None or not np.array_equal(arrays.pop("numbers"), shard.numbers):
            return None
        return Molecules.from_arrays(arrays, self._units)

    def write(self, shard: Shard, molecules: Molecules) -> None:
        """Store a shard that was drawn."""
        arrays: dict[str, NDArray[Any]] = molecules.to_arrays(encode_text=True)
        self.store(shard.name, arrays | {"numbers": shard.numbers})

    def mark_done(self, process: int) -> None:
        """Mark that a process has drawn its shards and does not need the folder any more."""
        open_to_append(self.folder / f"{process}{_DONE}").close()

    def is_done(self, process: int) -> bool:
        """Whether a process has finished since the folder was locked."""
        return (self.folder / f"{process}{_DONE}").exists()


def read_sampling_job(output: Path) -> SamplingJob:
    """The interrupted job of a file.

    Raises
    ------
    InputError
        There is none, or its manifest is damaged.
    """
    return MoleculeShards(output, lead=False).job


def check_same(begun: SamplingJob, now: SamplingJob, output: Path) -> None:
    """Raise `InputError` if two jobs differ in more than the checkpoint's path."""
    folder = shards_folder(output)
    if begun.weights != now.weights:
        raise InputError(
            f"{now.checkpoint} holds other weights ({now.origin}) than {folder} was begun with "
            f"({begun.origin}); name those with --checkpoint, or remove {folder} and sample again"
        )
    paths = {"checkpoint", "origin"}
    there, here = (
        {name: value for name, value in _plain(job).items() if name not in paths}
        for job in (begun, now)
    )
    check_unchanged(there, here, folder, "sample")


def _plain(job: SamplingJob) -> dict[str, Any]:
    """The job in YAML types."""
    values = asdict(job)
    return values | {name: list(values[name]) for name in _PAIRS if values[name] is not None}


def _pair(values: Any) -> tuple[Any, Any] | None:
    """A pair from its YAML type."""
    return None if values is None else (values[0], values[1])
