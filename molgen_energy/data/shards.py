"""Finished pieces of a file in the making, so that what was done is never done again.

Beside `samples.sdf` the folder `samples.sdf.parts` holds `manifest.yaml`, which says what is made,
and a file for each finished piece: 32 bytes, the SHA-256 of the manifest and of what follows, and a
safetensors file of arrays. The folder, the manifest in it and each piece appear under their names
when they are complete.

A piece of molecules is a batch that was drawn together: `numbers` (M,), `sizes` (M,), `positions`
(ΣN, 3) and `atomic_numbers` (ΣN,). Of several processes each leaves an empty file when its share is
done.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load, save

from molgen_energy.data.molecules import Molecules, offsets_from_sizes
from molgen_energy.errors import InputError
from molgen_energy.output import atomic_write, check_writable, lock_file, remove, with_filename

FORMAT = 1
_MANIFEST = "manifest.yaml"
_DONE = ".done"
_DIGEST = 32  # bytes

Own = TypeVar("Own", bound="ShardFolder")


@dataclass(frozen=True)
class SamplingJob:
    """What is drawn. Two jobs that are equal give the same molecules, in the same batches."""

    count: int
    seed: int
    sampler: str
    steps: int
    spacing: str | None
    """Of the sampler's levels; None where all are visited."""
    eta: float | None
    n_atoms: tuple[int, int] | None
    """Fewest and most atoms; None as in the training data."""
    low_precision: bool
    batch_size: int | None
    """Molecules at once; None takes as many as make `pairs` pairs of atoms."""
    pairs: int
    window: int
    """Molecules among which batches are made up by size."""
    weights: str
    """Fingerprint of the checkpoint."""
    checkpoint: str
    """Its absolute path."""
    origin: str
    """Run and step, for the molecules' own file."""
    version: str
    """Of this package."""


class Batch(NamedTuple):
    """Molecules that are drawn together."""

    window: int
    place: int
    """Among the batches of its window, by size."""
    numbers: NDArray[np.int64]
    """Of the molecules, (M,)."""

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.window:06d}-{self.place:05d}.part"


def shards_folder(output: Path) -> Path:
    """Where finished batches of a file wait for the rest."""
    return output.with_name(f"{output.name}.parts")


class ShardFolder:
    """The folder of finished pieces of a file, which nobody else may have for writing.

    As a context manager it lets go of the folder.

    Parameters
    ----------
    output
        The file.
    command
        Which command makes it.
    lead
        Whether to keep other processes from writing the file.

    Raises
    ------
    InputError
        There is no such folder, it is damaged, of another command, or another process has it.
    """

    def __init__(self, output: Path, command: str, lead: bool) -> None:
        self.folder = shards_folder(output)
        path, again = self.folder / _MANIFEST, f"{command} again"
        try:
            text = path.read_bytes()
            self.manifest: dict[str, Any] = yaml.safe_load(text)
            known = self.manifest.pop("format") == FORMAT
            if not self.manifest:
                raise KeyError
        except FileNotFoundError:
            raise InputError(_absent(output, again)) from None
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
            raise InputError(f"{path} is damaged; remove {self.folder} and {again}") from error
        if not known:
            raise InputError(f"{path} is of another version; remove {self.folder} or change back")
        begun = self.manifest.pop("command", "sample")
        if begun != command:
            raise InputError(
                f"{self.folder} holds what `molgen-energy {begun}` has finished of {output}; go on "
                "with that command, or remove the folder"
            )
        self._salt = hashlib.sha256(text).digest()
        self._lock: IO[bytes] | None = None
        if lead:
            self._lock = lock_file(path, str(self.folder))

    @staticmethod
    def begin(output: Path, command: str, manifest: Mapping[str, Any]) -> None:
        """Make the folder; the manifest says, in what YAML can hold, what the file will be."""
        folder = shards_folder(output)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir()
            text = yaml.safe_dump(
                {"format": FORMAT, "command": command} | dict(manifest), sort_keys=False
            )
            (temporary / _MANIFEST).write_text(text, encoding="utf-8")
            temporary.rename(folder)
        except OSError as error:
            raise with_filename(error, folder) from None
        finally:
            remove(temporary)

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    def holds(self, name: str) -> bool:
        """Whether a piece is finished; it may have been damaged since."""
        return (self.folder / name).exists()

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays of a piece; None where they are not there as they were kept."""
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        return dict(load(payload)) if digest == self._digest(payload) else None

    def keep(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a finished piece."""
        payload = save(dict(arrays))
        atomic_write(self.folder / name, self._digest(payload) + payload)

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.sha256(self._salt + payload).digest()

    def remove(self) -> None:
        """Remove the folder and what it holds."""
        remove(self.folder)


class MoleculeShards(ShardFolder):
    """The folder of finished batches of a file of molecules; made by `create` or `open`."""

    def __init__(self, output: Path, lead: bool) -> None:
        super().__init__(output, "sample", lead)
        path = self.folder / _MANIFEST
        try:
            values = self.manifest
            sizes = values["n_atoms"]
            self.job = SamplingJob(
                **{f.name: values[f.name] for f in fields(SamplingJob) if f.name != "n_atoms"},
                n_atoms=None if sizes is None else (sizes[0], sizes[1]),
            )
        except (TypeError, KeyError, IndexError) as error:
            self.close()
            raise InputError(f"{path} is damaged; remove {self.folder} and sample again") from error
        if lead:
            for stale in self.folder.glob(f"*{_DONE}"):
                stale.unlink()

    @classmethod
    def create(cls, output: Path, job: SamplingJob) -> MoleculeShards:
        """Begin a folder.

        Raises
        ------
        InputError
            There is one, or the output cannot be written.
        """
        check_writable(output)
        folder = shards_folder(output)
        if folder.exists():
            raise InputError(
                f"{folder} holds molecules of a run that was broken off; go on with "
                f"`molgen-energy sample --resume {output}`, or remove that folder"
            )
        cls.begin(output, "sample", _plain(job))
        return cls(output, lead=True)

    @classmethod
    def open(cls, output: Path, lead: bool) -> MoleculeShards:
        """A folder that exists.

        Raises
        ------
        InputError
            There is none, it is damaged, or another process has it.
        """
        check_writable(output)
        return cls(output, lead)

    def has(self, batch: Batch) -> bool:
        """Whether a batch is finished; it may have been damaged since."""
        return self.holds(batch.name)

    def read(self, batch: Batch) -> Molecules | None:
        """The molecules of a batch; None where they are not there as they were written."""
        arrays = self.load(batch.name)
        if arrays is None or not np.array_equal(arrays["numbers"], batch.numbers):
            return None
        offsets = offsets_from_sizes(arrays["sizes"])
        return Molecules(arrays["positions"], arrays["atomic_numbers"], offsets)

    def write(self, batch: Batch, molecules: Molecules) -> None:
        """Keep a batch that was drawn."""
        arrays: dict[str, NDArray[Any]] = {
            "numbers": batch.numbers,
            "sizes": molecules.sizes,
            "positions": molecules.positions,
            "atomic_numbers": molecules.atomic_numbers,
        }
        self.keep(batch.name, arrays)

    def say_done(self, process: int) -> None:
        """Note that a process has drawn its share and needs the folder no more."""
        (self.folder / f"{process}{_DONE}").touch()

    def is_done(self, process: int) -> bool:
        """Whether a process has said so since the folder was taken for writing the file."""
        return (self.folder / f"{process}{_DONE}").exists()


def read_sampling_job(output: Path) -> SamplingJob:
    """What was begun for a file.

    Raises
    ------
    InputError
        Nothing was, or its manifest is damaged.
    """
    return MoleculeShards(output, lead=False).job


def check_same(begun: SamplingJob, now: SamplingJob, output: Path) -> None:
    """Refuse to go on with a job as another one; where the checkpoint lies may differ.

    Raises
    ------
    InputError
        Names what differs.
    """
    folder = shards_folder(output)
    if begun.weights != now.weights:
        raise InputError(
            f"{now.checkpoint} holds other weights ({now.origin}) than {folder} was begun with "
            f"({begun.origin}); name those with --checkpoint, or remove {folder} and sample again"
        )
    elsewhere = {"checkpoint", "origin"}
    there, here = (
        {name: value for name, value in _plain(job).items() if name not in elsewhere}
        for job in (begun, now)
    )
    check_unchanged(there, here, folder, "sample")


def check_unchanged(
    there: Mapping[str, Any], here: Mapping[str, Any], folder: Path, command: str
) -> None:
    """Refuse to go on with what was begun otherwise; names the first thing that differs."""
    for name in here:
        if there.get(name) != here[name]:
            raise InputError(
                f"{folder} was begun with {name.replace('_', ' ')} {there.get(name)}, which cannot "
                f"change to {here[name]}; go on as it was, or remove that folder and {command} "
                "again"
            )


def _plain(job: SamplingJob) -> dict[str, Any]:
    """As YAML can hold it."""
    values = asdict(job)
    return values | {"n_atoms": None if job.n_atoms is None else list(job.n_atoms)}


def _absent(output: Path, again: str) -> str:
    folder = shards_folder(output)
    if folder.exists():
        return f"{folder} lacks {_MANIFEST}; remove it and {again}"
    if output.exists():
        return f"{output} is complete, there is nothing to go on with ({folder} does not exist)"
    return f"{folder} does not exist, there is nothing to go on with; leave out --resume"
