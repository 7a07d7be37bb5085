"""Finished shards of a file that a long command writes, so that no work is done twice.

Beside `samples.sdf` the folder `samples.sdf.shards` holds `manifest.yaml`, which describes the job,
and a file for each finished shard. Its first 32 bytes are the SHA-256 of the manifest and of the
rest, which is a safetensors file of arrays. The folder with its manifest, and each shard, get their
names when they are complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Generic, TypeVar

from numpy.typing import NDArray
from pydantic import Field

from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.formats.parts import check_part, read_part
from molgen_energy.formats.tensors import Shapes, check_shapes, pack_arrays, parse_arrays
from molgen_energy.formats.yaml import (
    MOST_BYTES,
    Schema,
    dump_yaml,
    load_yaml,
    shown,
    validate_as,
)
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


class Manifest(Schema):
    """The declaration of `manifest.yaml`: what the shards of a file depend on.

    Each command declares its own in a subclass, with `command`.
    """

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    """Of the folder."""
    command: str
    """The command that writes the file."""
    version: Annotated[str, Field(max_length=100)]
    """Version of this package."""


Job = TypeVar("Job", bound=Manifest)
Own = TypeVar("Own", bound="ShardFolder[Any]")


def shards_folder(output: Path) -> Path:
    """The folder of the finished shards of a file; raises `InputError` where it has no name."""
    if not output.name:
        raise InputError(f"{output} is a folder; name a file")
    return output.with_name(f"{output.name}.shards")


class ShardFolder(Generic[Job]):
    """The folder of the finished shards of a file; as a context manager it releases its lock.

    Parameters
    ----------
    output
        The file.
    command
        Name of the command that writes it.
    declaration
        Of the manifest.
    lead
        Whether to lock the folder, so that no other process writes the file.

    Raises
    ------
    InputError
        There is no such folder, it is damaged or of another command, or another process locks it.
    """

    def __init__(self, output: Path, command: str, declaration: type[Job], lead: bool) -> None:
        self.folder = shards_folder(output)
        path, again = self.folder / MANIFEST, f"{command} again"
        check_own_file(self.folder)
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            check_own_file(file)
        if not path.exists():
            raise InputError(_absent(output, again))
        content = read_part(path, MOST_BYTES)
        damaged = f"the manifest is damaged; remove {self.folder} and {again}"
        try:
            values = load_yaml(content, str(path))
        except InputError as error:
            raise InputError(f"{error}; {damaged}") from None
        head = values if isinstance(values, dict) else {}
        known, begun = head.get("format"), head.get("command", command)
        if known != FORMAT:
            raise InputError(
                f"{path} was written by another version of molgen-energy; remove {self.folder}, or "
                "use that version"
                if type(known) is int
                else f"{path}: key 'format': expected {FORMAT}, found {shown(known)}; {damaged}"
            )
        if begun != command:
            raise InputError(
                f"{self.folder} holds finished shards of `molgen-energy {shown(begun)[1:-1]}` for "
                f"{output}; continue with that command, or remove the folder"
                if isinstance(begun, str)
                else f"{path}: key 'command': expected text, found {shown(begun)}; {damaged}"
            )
        self.manifest = validate_as(declaration, values, str(path), damaged)
        self._salt = hashlib.sha256(content).digest()
        self._lock: IO[bytes] | None = None
        if lead:
            self._lock = lock_file(path, str(self.folder))
            remove_leftovers(self.folder)

    @staticmethod
    def begin(output: Path, manifest: Manifest) -> None:
        """Make the folder with the manifest of a job."""
        folder = shards_folder(output)
        check_own_file(folder)
        text = dump_yaml(manifest.model_dump(mode="json"))
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

    def load(self, name: str, declared: Shapes) -> dict[str, NDArray[Any]] | None:
        """The arrays of a shard; None if it is missing, damaged, or not as `check_shapes` wants.

        Raises
        ------
        InputError
            It is a pipe or a device, or too large for the memory.
        """
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return None
        size = check_part(path)
        check_memory(2 * size, f"reading {path}", "remove it, and it is made again")
        content = read_part(path, size)
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        if digest != self._digest(payload):
            return None
        try:
            arrays = parse_arrays(payload, str(path), "remove it")
            check_shapes(arrays, declared)
        except InputError:
            return None
        return arrays

    def store(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a finished shard."""
        payload = pack_arrays(arrays)
        atomic_write(self.folder / name, self._digest(payload) + payload, own=True)

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.sha256(self._salt + payload).digest()

    def remove(self) -> None:
        """Remove the folder and its files."""
        remove(self.folder)


def check_unchanged(
    there: Manifest, here: Manifest, folder: Path, command: str, free: Collection[str] = ()
) -> None:
    """Raise `InputError` if a job differs from the one that was begun in keys that are not free."""
    begun = there.model_dump(mode="json")
    for name, value in here.model_dump(mode="json").items():
        if name not in free and begun.get(name) != value:
            raise InputError(
                f"{folder} was begun with {name.replace('_', ' ')} {begun.get(name)}, which cannot "
                f"change to {value}; use the same options, or remove that folder and "
                f"{command} again"
            )


def _absent(output: Path, again: str) -> str:
    folder = shards_folder(output)
    if folder.exists():
        return f"{folder} lacks {MANIFEST}; remove it and {again}"
    if output.exists():
        return f"{output} is complete; there is nothing to resume ({folder} does not exist)"
    return f"{folder} does not exist; there is nothing to resume: leave out --resume"
