"""Finished shards of a file that a long command writes, so that no work is done twice.

Beside `samples.sdf` the folder `samples.sdf.shards` holds `manifest.yaml`, which describes the job,
and a file for each finished shard. Its first 32 bytes are the SHA-256 of the manifest and of the
rest, which is a safetensors file of arrays. The folder with its manifest, and each shard, get their
names when they are complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from numpy.typing import NDArray
from safetensors.numpy import load, save

from molgen_energy.errors import InputError
from molgen_energy.output import (
    atomic_write,
    check_own_file,
    lock_file,
    remove,
    remove_leftovers,
    temporary_folder,
    with_filename,
)

FORMAT = 2
MANIFEST = "manifest.yaml"
_DIGEST = 32  # bytes

Own = TypeVar("Own", bound="ShardFolder")


def shards_folder(output: Path) -> Path:
    """The folder of the finished shards of a file."""
    return output.with_name(f"{output.name}.shards")


class ShardFolder:
    """The folder of the finished shards of a file; as a context manager it releases its lock.

    Parameters
    ----------
    output
        The file.
    command
        Name of the command that writes it.
    lead
        Whether to lock the folder, so that no other process writes the file.

    Raises
    ------
    InputError
        There is no such folder, it is damaged or of another command, or another process locks it.
    """

    def __init__(self, output: Path, command: str, lead: bool) -> None:
        self.folder = shards_folder(output)
        path, again = self.folder / MANIFEST, f"{command} again"
        check_own_file(self.folder)
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            check_own_file(file)
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
            raise InputError(
                f"{path} was written by another version of molgen-energy; remove {self.folder}, or "
                "use that version"
            )
        begun = self.manifest.pop("command", "sample")
        if begun != command:
            raise InputError(
                f"{self.folder} holds finished shards of `molgen-energy {begun}` for {output}; "
                "continue with that command, or remove the folder"
            )
        self._salt = hashlib.sha256(text).digest()
        self._lock: IO[bytes] | None = None
        if lead:
            self._lock = lock_file(path, str(self.folder))
            remove_leftovers(self.folder)

    @staticmethod
    def begin(output: Path, command: str, manifest: Mapping[str, Any]) -> None:
        """Make the folder with a manifest that describes the job in YAML types."""
        folder = shards_folder(output)
        check_own_file(folder)
        text = yaml.safe_dump(
            {"format": FORMAT, "command": command} | dict(manifest), sort_keys=False
        )
        try:
            with temporary_folder(folder) as temporary:
                (temporary / MANIFEST).write_text(text, encoding="utf-8")
                temporary.rename(folder)
        except OSError as error:
            raise with_filename(error, folder) from None

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def holds(self, name: str) -> bool:
        """Whether a shard is finished; it may have been damaged since."""
        return (self.folder / name).exists()

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays of a shard; None if it is missing or damaged."""
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        return dict(load(payload)) if digest == self._digest(payload) else None

    def store(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a finished shard."""
        payload = save(dict(arrays))
        atomic_write(self.folder / name, self._digest(payload) + payload, own=True)

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.sha256(self._salt + payload).digest()

    def remove(self) -> None:
        """Remove the folder and its files."""
        remove(self.folder)


def check_unchanged(
    there: Mapping[str, Any], here: Mapping[str, Any], folder: Path, command: str
) -> None:
    """Raise `InputError` if the options of a job differ from those it began with."""
    for name in here:
        if there.get(name) != here[name]:
            raise InputError(
                f"{folder} was begun with {name.replace('_', ' ')} {there.get(name)}, which cannot "
                f"change to {here[name]}; use the same options, or remove that folder and "
                f"{command} again"
            )


def _absent(output: Path, again: str) -> str:
    folder = shards_folder(output)
    if folder.exists():
        return f"{folder} lacks {MANIFEST}; remove it and {again}"
    if output.exists():
        return f"{output} is complete; there is nothing to resume ({folder} does not exist)"
    return f"{folder} does not exist; there is nothing to resume: leave out --resume"
