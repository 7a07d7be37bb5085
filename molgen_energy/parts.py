"""Finished batches of molecules on disk, so that what was drawn is never drawn again.

Beside `samples.sdf` the folder `samples.sdf.parts` holds `manifest.yaml`, which says what is drawn,
and a file for each finished batch: 32 bytes, the SHA-256 of the manifest and of what follows, and a
safetensors file of `numbers` (M,), `sizes` (M,), `positions` (ΣN, 3) and `atomic_numbers` (ΣN,).
Of several processes each leaves an empty file when its share is done.
The folder, the manifest in it and each batch appear under their names when they are complete.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load, save

from molgen_energy.data.molecules import Molecules, offsets_of
from molgen_energy.errors import InputError
from molgen_energy.output import check_writable, hold, naming, remove, replacing

FORMAT = 1
_MANIFEST = "manifest.yaml"
_DONE = ".done"
_DIGEST = 32  # bytes


@dataclass(frozen=True)
class Job:
    """What is drawn. Two jobs that are equal give the same molecules, in the same batches."""

    count: int
    seed: int
    sampler: str
    steps: int
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


def parts_folder(output: Path) -> Path:
    """Where finished batches of a file wait for the rest."""
    return output.with_name(f"{output.name}.parts")


class Parts:
    """The folder of finished batches of a file.

    Made by `create` or `open`; as a context manager it lets go of the folder. While one process has
    a folder for writing the file in the end (`lead`), no other can.
    """

    def __init__(self, output: Path, lead: bool) -> None:
        self.folder = parts_folder(output)
        path = self.folder / _MANIFEST
        try:
            text = path.read_bytes()
            values = yaml.safe_load(text)
            sizes = values["n_atoms"]
            self.job = Job(
                **{f.name: values[f.name] for f in fields(Job) if f.name != "n_atoms"},
                n_atoms=None if sizes is None else (sizes[0], sizes[1]),
            )
            known = values["format"] == FORMAT
        except FileNotFoundError:
            raise InputError(_absent(output)) from None
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"{path} is damaged; remove {self.folder} and sample again") from error
        if not known:
            raise InputError(f"{path} is of another version; remove {self.folder} or change back")
        self._salt = hashlib.sha256(text).digest()
        self._lock: IO[bytes] | None = None
        if lead:
            self._lock = hold(path, str(self.folder))
            for stale in self.folder.glob(f"*{_DONE}"):
                stale.unlink()

    @classmethod
    def create(cls, output: Path, job: Job) -> Parts:
        """Begin a folder.

        Raises
        ------
        InputError
            There is one, or the output cannot be written.
        """
        check_writable(output)
        folder = parts_folder(output)
        if folder.exists():
            raise InputError(
                f"{folder} holds molecules of a run that was broken off; go on with "
                f"`molgen-energy sample --resume {output}`, or remove that folder"
            )
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir()
            text = yaml.safe_dump({"format": FORMAT} | _plain(job), sort_keys=False)
            (temporary / _MANIFEST).write_text(text, encoding="utf-8")
            temporary.rename(folder)
        except OSError as error:
            raise naming(error, folder) from None
        finally:
            remove(temporary)
        return cls(output, lead=True)

    @classmethod
    def open(cls, output: Path, lead: bool) -> Parts:
        """A folder that exists.

        Raises
        ------
        InputError
            There is none, it is damaged, or another process has it.
        """
        check_writable(output)
        return cls(output, lead)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    def has(self, batch: Batch) -> bool:
        """Whether a batch is finished; it may have been damaged since."""
        return (self.folder / batch.name).exists()

    def read(self, batch: Batch) -> Molecules | None:
        """The molecules of a batch; None where they are not there as they were written."""
        try:
            content = (self.folder / batch.name).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        if digest != self._digest(payload):
            return None
        arrays = load(payload)
        if not np.array_equal(arrays["numbers"], batch.numbers):
            return None
        offsets = offsets_of(arrays["sizes"])
        return Molecules(arrays["positions"], arrays["atomic_numbers"], offsets)

    def write(self, batch: Batch, molecules: Molecules) -> None:
        """Keep a batch that was drawn."""
        payload = save(
            {
                "numbers": batch.numbers,
                "sizes": molecules.sizes,
                "positions": molecules.positions,
                "atomic_numbers": molecules.atomic_numbers,
            }
        )
        with replacing(self.folder / batch.name) as replacement:
            replacement.temporary.write_bytes(self._digest(payload) + payload)

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.sha256(self._salt + payload).digest()

    def say_done(self, process: int) -> None:
        """Note that a process has drawn its share and needs the folder no more."""
        (self.folder / f"{process}{_DONE}").touch()

    def is_done(self, process: int) -> bool:
        """Whether a process has said so since the folder was taken for writing the file."""
        return (self.folder / f"{process}{_DONE}").exists()

    def remove(self) -> None:
        """Remove the folder and what it holds."""
        remove(self.folder)


def read_job(output: Path) -> Job:
    """What was begun for a file.

    Raises
    ------
    InputError
        Nothing was, or its manifest is damaged.
    """
    return Parts(output, lead=False).job


def check_same(begun: Job, now: Job, output: Path) -> None:
    """Refuse to go on with a job as another one; where the checkpoint lies may differ.

    Raises
    ------
    InputError
        Names what differs.
    """
    folder = parts_folder(output)
    if begun.weights != now.weights:
        raise InputError(
            f"{now.checkpoint} holds other weights ({now.origin}) than {folder} was begun with "
            f"({begun.origin}); name those with --checkpoint, or remove {folder} and sample again"
        )
    there, here = _plain(begun), _plain(now)
    for name in there:
        if name not in ("checkpoint", "origin") and there[name] != here[name]:
            raise InputError(
                f"{folder} was begun with {name.replace('_', ' ')} {there[name]}, which cannot "
                f"change to {here[name]}; go on as it was, or remove that folder and sample again"
            )


def _plain(job: Job) -> dict[str, Any]:
    """As YAML can hold it."""
    values = asdict(job)
    return values | {"n_atoms": None if job.n_atoms is None else list(job.n_atoms)}


def _absent(output: Path) -> str:
    folder = parts_folder(output)
    if folder.exists():
        return f"{folder} lacks {_MANIFEST}; remove it and sample again"
    if output.exists():
        return f"{output} is complete, there is nothing to go on with ({folder} does not exist)"
    return f"{folder} does not exist, there is nothing to go on with; leave out --resume"
