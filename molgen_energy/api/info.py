"""What is installed: versions, devices, optional packages, weights, and folders of caches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from molgen_energy import __version__
from molgen_energy.config import config_names
from molgen_energy.distributed import default_workers
from molgen_energy.errors import InputError
from molgen_energy.training.checkpoint import newest_run
from molgen_energy.training.devices import available_memory
from molgen_energy.training.pretrained import pretrained_weights, verify_checksums

EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qm9": ("preprocess qm9", ("qm9pack",)),
    "ccd": ("preprocess ccd", ("biotite",)),
    "geom": ("preprocess geom-drugs of drugs_crude.msgpack", ("msgpack",)),
    "tensorboard": ("curves of a run in TensorBoard", ("tensorboard",)),
    "fcd": ("evaluate --metrics fcd", ("fcd",)),
    "posebusters": ("evaluate --metrics posebusters", ("posebusters",)),
    "xtb": ("evaluate --metrics xtb, GFN2-xTB conformers", ("tblite", "ase")),
    "notebook": ("molecules of ASE, tables of pandas", ("ase", "pandas")),
    "spins": ("preprocess spins", ("pymatching", "highspy")),
}
"""By name of the optional dependencies: what they are for, and their packages."""

_CORE = ("torch", "rdkit", "numpy", "scipy", "h5py", "safetensors", "triton")


@dataclass(frozen=True)
class Device:
    """A device that models can run on."""

    name: str
    """Value of `--device`."""
    description: str
    free_memory: int | None
    """Bytes; None where it is unknown."""


@dataclass(frozen=True)
class Extra:
    """A group of optional packages."""

    name: str
    purpose: str
    versions: dict[str, str | None]
    """By package; None of one that is not installed."""

    @property
    def is_installed(self) -> bool:
        """Whether all of its packages are."""
        return None not in self.versions.values()

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install 'molgen-energy[{self.name}]'"


@dataclass(frozen=True)
class Weights:
    """Pretrained weights that ship with the package."""

    name: str
    summary: str
    size: int
    """Bytes."""
    is_intact: bool
    """Whether the files have their SHA-256 sums."""


@dataclass(frozen=True)
class Installation:
    """What is installed here."""

    version: str
    python: str
    system: str
    folder: Path
    """Of the package."""
    packages: dict[str, str | None]
    devices: list[Device]
    extras: list[Extra]
    weights: list[Weights]
    configurations: list[str]
    caches: dict[str, Path]
    """Folders that this package's dependencies write to, by what is in them."""
    newest_run: Path | None
    """The run in `runs/` that `sample` takes by default."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists and text, for JSON."""
        content = asdict(self)
        content["folder"] = str(self.folder)
        content["caches"] = {name: str(path) for name, path in self.caches.items()}
        content["newest_run"] = None if self.newest_run is None else str(self.newest_run)
        return content


def installation() -> Installation:
    """Find out what is installed; nothing is downloaded or written."""
    return Installation(
        __version__,
        platform.python_version(),
        f"{platform.system()} {platform.machine()}, {default_workers()} processors",
        Path(__file__).parents[1],
        {name: _version(name) for name in _CORE},
        list(_devices()),
        [
            Extra(name, purpose, {package: _version(package) for package in packages})
            for name, (purpose, packages) in EXTRAS.items()
        ],
        list(_weights()),
        config_names(),
        dict(_caches()),
        newest_run(Path("runs")),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Device]:
    cpu = torch.device("cpu")
    threads = torch.get_num_threads()
    yield Device("cpu", f"{threads} thread{'s' if threads > 1 else ''}", available_memory(cpu))
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        free = torch.cuda.mem_get_info(index)[0]
        yield Device(f"cuda:{index}", f"{name}, CUDA {torch.version.cuda}", free)
    if torch.backends.mps.is_available():
        yield Device("mps", "GPU of Apple", None)


def _weights() -> Iterator[Weights]:
    for name, weights in pretrained_weights().items():
        size = sum(file.stat().st_size for file in weights.path.iterdir())
        try:
            verify_checksums(weights.path)
            is_intact = True
        except InputError:
            is_intact = False
        yield Weights(name, weights.summary, size, is_intact)


def _caches() -> Iterator[tuple[str, Path]]:
    """This package itself has no cache. A folder is listed only if it exists."""
    import matplotlib

    candidates = {
        "Triton, compiled kernels": Path(
            os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")
        ),
        "Matplotlib, fonts": Path(matplotlib.get_cachedir()),
    }
    for what, folder in candidates.items():
        if folder.is_dir():
            yield what, folder
