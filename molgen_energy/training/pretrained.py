"""Pretrained weights that ship with the package: checkpoints in `assets/weights/`, by name.

Each is a folder such as `assets/weights/qm9_energy`: the part of a checkpoint that sampling needs,
with EMA weights in half precision, its `SHA256SUMS`, and a card, `card.md`, with the training and
the measured quality of the samples. `scripts/release_weights.py` makes one from a run.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.formats.parts import has_part, read_part
from molgen_energy.formats.yaml import MOST_BYTES, load_yaml
from molgen_energy.output import real_path, valid_unicode
from molgen_energy.resources import resource_directory

DEFAULT = "qm9_energy"
"""The weights of `sample` without a run."""
SUMS = "SHA256SUMS"
_MOST_SUMS = 100_000  # bytes
CHECKED = ("config.yaml", "ema.safetensors", "state.yaml")


@dataclass(frozen=True)
class PretrainedWeights:
    """One set of pretrained weights."""

    name: str
    path: Path

    @property
    def summary(self) -> str:
        """One line about them, from the head of their card; empty if it has none."""
        path = self.path / "card.md"
        if not has_part(path):
            return ""
        text = read_part(path, MOST_BYTES).decode("utf-8", "replace")
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        values = {} if head is None else load_yaml(head[1], f"the head of {path}")
        summary = values.get("summary", "") if isinstance(values, dict) else ""
        return " ".join(str(summary).split())


def weights_directory() -> Path:
    """The folder of all pretrained weights."""
    return resource_directory("assets") / "weights"


def pretrained_weights() -> dict[str, PretrainedWeights]:
    """All pretrained weights by name, the default first."""
    folders = {file.parent.name: file.parent for file in weights_directory().glob(f"*/{SUMS}")}
    names = sorted(folders, key=lambda name: (name != DEFAULT, name))
    return {name: PretrainedWeights(name, folders[name]) for name in names}


def resolve_checkpoint(name: Path, option: str = "--checkpoint") -> Path:
    """The folder of a run or checkpoint, or of the pretrained weights of a name.

    A folder takes precedence over pretrained weights of the same name. A message names the
    command-line option.

    Raises
    ------
    InputError
        There is neither.
    """
    if name.exists():
        return name
    shipped = pretrained_weights()
    if str(name) in shipped:
        return shipped[str(name)].path
    near = difflib.get_close_matches(str(name), shipped, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise InputError(
        f"{option} {name} does not exist{hint}; name a run's folder, a checkpoint in one, or "
        f"pretrained weights: {', '.join(shipped)}"
    )


def checkpoint_name(path: Path) -> str:
    """Name of a checkpoint's folder for `resolve_checkpoint`, valid in every installation."""
    path = real_path(path)
    return path.name if path.parent == real_path(weights_directory()) else valid_unicode(path)


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` of the files that sampling reads, in the format of `sha256sum -c`."""
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in CHECKED]
    (folder / SUMS).write_text("".join(lines), encoding="ascii")


def verify_checksums(folder: Path) -> None:
    """Compare a folder's files with its `SHA256SUMS`, which all that ship with the package have.

    Raises
    ------
    InputError
        The list is damaged, or lacks a file that sampling reads; or a file is missing or differs.
    """
    listed = folder / SUMS
    shipped = folder.resolve().parent == weights_directory().resolve()
    if not shipped and not listed.exists() and not listed.is_symlink():
        return
    again = "install molgen-energy again, or name another --checkpoint"
    lines = read_part(listed, _MOST_SUMS).decode("utf-8", "replace").splitlines()
    sums = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line, re.ASCII)
        if match is None:
            raise InputError(f"{listed} is damaged; {again}")
        sums[match[2]] = match[1]
    missing = [name for name in CHECKED if name not in sums]
    if missing:
        raise InputError(f"{listed} lacks {', '.join(missing)}; {again}")
    for name in CHECKED:
        file = folder / name
        if has_part(file):
            check_memory(file.stat().st_size, f"reading {file}", again)
        if not has_part(file) or file_digest(file) != sums[name]:
            raise InputError(
                f"{file} is not the file that was released (its SHA-256 is not the one in "
                f"{SUMS}); {again}"
            )


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
