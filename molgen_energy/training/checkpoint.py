"""Checkpoints: safetensors and YAML in one folder, enough to sample from.

`model.safetensors`, `ema.safetensors`, `optimizer.safetensors`, `config.yaml`, `state.yaml`. No
pickles: loading runs no code. `state.yaml` holds the SHA-256 of each file of weights. A folder
appears under its name only when it is complete; while a new one replaces an old one, the old one is
kept as `<name>.old`.

Checkpoints of format 2 are read as well: `Config.upgrade` translates their configuration, and
`network.` at the start of a tensor's name, of networks that predict the velocity, is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molgen_energy import __version__
from molgen_energy.config import Config, RawConfig, Self, read_config
from molgen_energy.errors import InputError
from molgen_energy.formats.parts import check_part, read_part
from molgen_energy.formats.tensors import pack_tensors, read_tensors
from molgen_energy.formats.yaml import MOST_BYTES, dump_yaml, load_yaml, shown, validate_as
from molgen_energy.output import (
    atomic_write,
    display_path,
    flush_to_disk,
    real_path,
    remove,
    temporary_folder,
    with_filename,
)
from molgen_energy.training.pretrained import DEFAULT, SUMS, verify_checksums, weights_directory
from molgen_energy.training.state import Progress, RunState, State

FORMAT = 3
_OLDEST = 2
_REMEDY = "train again, or name another checkpoint"
_HALF = (torch.float16, torch.bfloat16)
_ATTEMPTS = 5  # at reading a checkpoint that a trainer may replace at the same time


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configuration and state were read; weights are read on demand."""

    path: Path
    raw_config: RawConfig
    """The configuration, not yet validated; see `config_as`."""
    state: dict[str, Any]
    read: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Weights that were read together with configuration and state, by name."""

    def tensors(self, name: str, model: nn.Module) -> dict[str, Tensor]:
        """Tensors of `model`, `ema` or `optimizer`, on the CPU, by the names of a model.

        Shapes are those of the model's parameters.

        Raises
        ------
        InputError
            As of `read_tensors`.
        """
        tensors = self.read_tensors(name)
        if self.state["format"] < FORMAT:
            own = model.state_dict().keys()
            return {
                key if key.split("/")[0] in own else key.removeprefix("network."): value
                for key, value in tensors.items()
            }
        return tensors

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of `model`, `ema` or `optimizer`, on the CPU, by their names in the file.

        Shapes are those that the file states.

        Raises
        ------
        InputError
            The file is missing, damaged, or not the one that was written; or a value is not finite.
        """
        if name in self.read:
            return dict(self.read[name])
        path = self.path / f"{name}.safetensors"
        if not path.exists() and not path.is_symlink():
            raise InputError(f"{self.path} lacks {path.name}; {_REMEDY}")
        return read_tensors(path, _REMEDY, (self.state.get("sha256") or {}).get(name))

    @property
    def system(self) -> str:
        """The physical system of the run."""
        return self.raw_config.system

    def config_as(self, schema: type[Self]) -> Self:
        """The configuration of the run, as one of a physical system.

        Raises
        ------
        InputError
            The run is on another system, or a key or a value is not valid.
        """
        if self.system != schema.of_system():
            raise InputError(f"{self.path} is not a checkpoint of a run on {schema.of_system()}")
        raw = self.raw_config
        if self.state["format"] < FORMAT:
            raw = raw._replace(values=schema.upgrade(dict(raw.values)))
        return schema.of(raw)

    def state_as(self, declaration: type[State]) -> State:
        """The state of the run, as one of a physical system.

        Raises
        ------
        InputError
            A key is missing or unknown, or a value is not the declared one.
        """
        return validate_as(declaration, self.state, str(self.path / "state.yaml"), _REMEDY)

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return Progress.model_validate(self.state["progress"])

    @property
    def origin(self) -> str:
        """Run and step of the weights; `runs/x/checkpoints/last` is of run x."""
        path = real_path(self.path)
        run = path.parents[1] if path.parent.name == "checkpoints" else path
        return f"{display_path(Path(run.name))}, step {self.progress.step}"

    @property
    def name(self) -> str:
        """For messages: the name of pretrained weights, else the path."""
        shipped = real_path(self.path).parent == real_path(weights_directory())
        return self.path.name if shipped else display_path(self.path)

    def load_weights(self, model: nn.Module, name: str) -> None:
        """Load the weights `model` or `ema` into a model of the same architecture.

        Raises
        ------
        InputError
            Names, shapes or types differ; names the first.
        """
        load_weights(model, self.tensors(name, model), self.path)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into a model.

    Raises
    ------
    InputError
        Names, shapes or types differ. Weights may be in half precision.
    """
    check_alike(tensors, model.state_dict(), where, half_precision=True)
    model.load_state_dict(dict(tensors))


def check_alike(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    where: Path,
    half_precision: bool = False,
) -> None:
    """Check that tensors of a file have the names, shapes and types of others.

    Raises
    ------
    InputError
        They differ, in more than the precision of float32 where that may be half; names the first.
    """
    for name in sorted(own.keys() | tensors.keys()):
        there, here = (
            tuple(every[name].shape) if name in every else "no such tensor"
            for every in (tensors, own)
        )
        if there != here:
            raise InputError(
                f"{where} is a checkpoint of another model: {shown(name)} is {there} in the file "
                f"and {here} in the configured model"
            )
        found, wanted = tensors[name].dtype, own[name].dtype
        if found != wanted and not (half_precision and found in _HALF and wanted == torch.float32):
            raise InputError(
                f"{where}: tensor '{name}': expected {_name(wanted)}, found {_name(found)}; "
                f"{_REMEDY}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save_checkpoint(
    path: Path,
    config: Config,
    state: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a checkpoint folder, which replaces the one at `path`.

    A kill at any moment leaves either the old or the new checkpoint complete. `state` must hold
    YAML types; format and versions are added to it.

    Raises
    ------
    OSError
        It cannot be written, for example on a full disk; the old checkpoint stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    remove(temporary)
    try:
        temporary.mkdir()
        sha256 = {}
        for name, tensors in weights.items():
            content = pack_tensors(tensors)
            sha256[name] = hashlib.sha256(content).hexdigest()
            (temporary / f"{name}.safetensors").write_bytes(content)
        versions = {"molgen-energy": __version__, "torch": str(torch.__version__)}
        text = dump_yaml({"format": FORMAT, "versions": versions, "sha256": sha256} | dict(state))
        (temporary / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (temporary / "state.yaml").write_text(text, encoding="utf-8")
        for file in temporary.iterdir():
            flush_to_disk(file)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError):
            raise with_filename(error, path) from None
        raise
    if path.exists():
        remove(old)
        path.rename(old)
    temporary.rename(path)
    remove(old)


def is_released(folder: Path) -> bool:
    """Whether a checkpoint's folder lists the SHA-256 of its files, as pretrained weights do."""
    return (folder / SUMS).exists()


def store_in_state(checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
    """Add keys to the `state.yaml` of a checkpoint, in one step.

    Raises
    ------
    InputError
        Another checkpoint has replaced it since it was read.
    OSError
        It cannot be written; the old state stays.
    """
    _check_unchanged(checkpoint)
    content = dump_yaml(checkpoint.state | dict(values)).encode()
    atomic_write(checkpoint.path / "state.yaml", content, own=True)


def copy_for_sampling(checkpoint: Checkpoint, values: Mapping[str, Any], path: Path) -> None:
    """Write the configuration, EMA weights and state of a checkpoint, with more keys of the state.

    Raises
    ------
    InputError
        Another checkpoint has replaced it since it was read.
    OSError
        The folder cannot be written.
    """
    content = pack_tensors(checkpoint.read_tensors("ema"))
    sha256 = {"ema": hashlib.sha256(content).hexdigest()}
    config = read_part(checkpoint.path / "config.yaml", MOST_BYTES)
    _check_unchanged(checkpoint)
    files = {
        "ema.safetensors": content,
        "config.yaml": config,
        "state.yaml": dump_yaml(checkpoint.state | {"sha256": sha256} | dict(values)).encode(),
    }
    try:
        with temporary_folder(path) as temporary:
            for name, text in files.items():
                (temporary / name).write_bytes(text)
                flush_to_disk(temporary / name)
            temporary.rename(path)
    except OSError as error:
        raise with_filename(error, path) from None


def _check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise `InputError` if the files are not those that were read."""
    if _read(checkpoint.path).state != checkpoint.state:
        raise InputError(
            f"{checkpoint.path} was replaced meanwhile; try again when its training has ended"
        )


def find_checkpoint(path: Path, which: str = "last") -> Path:
    """The checkpoint folder at `path`, which is one itself or a run's folder.

    Raises
    ------
    InputError
        `path` does not exist or holds no checkpoint.
    """
    for candidate in (path, path / "checkpoints" / which):
        # A kill between two renames leaves the old one under its second name.
        whole = real_path(candidate)
        for folder in (candidate, whole.parent / f"{whole.name}.old"):
            if (folder / "state.yaml").is_file():
                return folder
    if not path.exists():
        raise InputError(f"{path} does not exist; name a run's folder or a checkpoint in one")
    raise InputError(f"{path} holds no checkpoint (it is not a run, or stopped before its first)")


def sampled_checkpoint(path: Path) -> str:
    """`last` or `best`: the checkpoint that stands for a run, see `training.sample_from`.

    Without a validation there is no best one.

    Raises
    ------
    InputError
        As of `find_checkpoint`, or the configuration is damaged.
    """
    config = read_config(find_checkpoint(path) / "config.yaml")
    training = config.values.get("training")
    best = isinstance(training, Mapping) and training.get("sample_from") == "best"
    folder = path / "checkpoints"
    found = any((folder / name / "state.yaml").is_file() for name in ("best", "best.old"))
    return "best" if best and found else "last"


def newest_run(root: Path) -> Path | None:
    """The run under `root` with the newest last checkpoint; None if there is no run."""
    states = [
        *root.glob("*/checkpoints/last/state.yaml"),
        *root.glob("*/checkpoints/last.old/state.yaml"),
    ]
    youngest = max(states, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if youngest is None else youngest.parents[2]


def default_checkpoint() -> Path:
    """What is sampled or tuned without a name: the newest run in `runs/`, else shipped weights."""
    return newest_run(Path("runs")) or Path(DEFAULT)


def load_checkpoint(
    path: Path, which: str | None = None, weights: Sequence[str] = ()
) -> Checkpoint:
    """Read a checkpoint from its own folder or a run's.

    Parameters
    ----------
    path
        A checkpoint's folder, or a run's.
    which
        `last` or `best` of a run; by default the one that stands for it.
    weights
        Names of the weights to read now; others are read on demand.

    Everything read here is of one checkpoint, even while a trainer replaces it.

    Raises
    ------
    InputError
        There is none, it is cut off or of another format, or its files do not match its
        `SHA256SUMS`.
    """
    for attempt in range(_ATTEMPTS):
        identity = None
        try:
            folder = find_checkpoint(path, which or sampled_checkpoint(path))
            identity = _identity(folder)
            loaded = _read(folder)
            loaded = replace(loaded, read={name: loaded.read_tensors(name) for name in weights})
        except (InputError, OSError):
            changed = identity is None or _identity(folder) != identity
            if attempt + 1 == _ATTEMPTS or not changed:
                raise
            continue
        if _identity(folder) == identity:
            return loaded
    raise InputError(f"{path} is replaced faster than it can be read; copy it and name the copy")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Distinguishes a folder from one that replaced it; None if there is no folder."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read(folder: Path) -> Checkpoint:
    """Configuration and state of a checkpoint's folder."""
    verify_checksums(folder)
    path = folder / "state.yaml"
    try:
        state = load_yaml(read_part(path, MOST_BYTES), str(path))
    except InputError as error:
        raise InputError(f"{error}; {_REMEDY}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise InputError(f"{folder} is not a checkpoint of molgen-energy")
    known = state["format"]
    if type(known) is not int:
        raise InputError(
            f"{path}: key 'format': expected a number, found {shown(known)}; {_REMEDY}"
        )
    if not _OLDEST <= known <= FORMAT:
        raise InputError(
            f"{folder} has checkpoint format {known}, this version reads {_OLDEST} to {FORMAT}; "
            f"{'upgrade molgen-energy' if known > FORMAT else _REMEDY}"
        )
    validate_as(RunState, state, str(path), _REMEDY)
    check_part(folder / "config.yaml")
    return Checkpoint(folder, read_config(folder / "config.yaml"), state)
