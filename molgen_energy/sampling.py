"""Sample molecules into a file, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy import __version__
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import Molecules, by_size, offsets_of
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules import MoleculeGenerator

SUFFIXES = (".sdf", ".xyz", ".h5")

# Molecules are drawn in windows, within which they are sorted by size: batches of about one size
# waste little on padding, and a window is small enough to wait for.
_WINDOW_CPU, _WINDOW_GPU = 256, 4096
# Pairs of atoms in a batch. On a CPU more than its cache holds is slower, not faster.
_PAIRS_CPU, _PAIRS_GPU = 20_000, 1_000_000


class Writer(Protocol):
    """A file that takes molecules piece by piece."""

    count: int

    def append(self, molecules: Molecules) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What was written where, and how many molecules diverged."""

    path: Path
    written: int
    not_finite: int
    interrupted: bool


class Observer(Protocol):
    """Who is told how sampling goes: each call of the network, weighted by its molecules."""

    def advance(self, molecules: int, share: float) -> None: ...


def sample_to_file(
    generator: MoleculeGenerator,
    count: int,
    output: Path,
    observer: Observer,
    batch_size: int | None = None,
    provenance: str = "",
    config: str = "",
) -> Outcome:
    """Draw molecules 0 … count−1 of the generator's seed and write them in this order.

    Interrupted by SIGINT, it keeps what is finished under a name with `.partial` in it.

    Parameters
    ----------
    generator
        Model, seed and sizes.
    count
        How many, at least 1.
    output
        Ends in .sdf, .xyz or .h5.
    observer
        Told of progress.
    batch_size
        Molecules at once; None takes what suits their size and the device.
    provenance
        What the molecules were sampled from, written into the file with the seed, the steps and
        the version.
    config
        The run's configuration as YAML, written once into SDF and HDF5.

    Raises
    ------
    InputError
        The count is below 1, or the output cannot be written.
    """
    if count < 1:
        raise InputError(f"-n {count}: ask for at least one molecule")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: a batch holds at least one molecule")
    not_finite, interrupted = 0, False
    origin = {
        "created_by": f"molgen-energy {__version__}",
        "checkpoint": provenance,
        "seed": str(generator.seed),
        "steps": str(generator.steps),
    }
    with _writer(output, origin, config) as writer:
        window = _WINDOW_CPU if generator.device.type == "cpu" else _WINDOW_GPU
        for start in range(0, count, window):
            numbers = torch.arange(start, min(start + window, count))
            try:
                drawn = _draw_window(generator, numbers, batch_size, observer)
                finite = drawn.finite()
                if isinstance(writer, MoleculeWriter):
                    drawn = _at_origin(drawn, ~finite)  # the text formats say so in a field
                writer.append(drawn)
                not_finite += int((~finite).sum())
            except KeyboardInterrupt:
                if writer.count == 0:
                    raise
                interrupted = True
                writer.output.target = output.with_suffix(f".partial{output.suffix}")
                break
        target, written = writer.output.target, writer.count
    return Outcome(target, written, not_finite, interrupted)


def _writer(
    output: Path, origin: dict[str, str], config: str
) -> AbstractContextManager[MoleculeTextWriter | MoleculeWriter]:
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{output}: the name must end in {', '.join(SUFFIXES)}")
    if suffix == ".h5":
        source = f"sampled from {origin['checkpoint']}, seed {origin['seed']}"
        return MoleculeWriter(output, source=source, provenance=origin | {"config": config})
    return MoleculeTextWriter(output, origin, {"config": config})


def _draw_window(
    generator: MoleculeGenerator, numbers: Tensor, batch_size: int | None, observer: Observer
) -> Molecules:
    """Molecules of the given numbers, drawn by ascending size, returned in the given order."""
    sizes = generator.sizes(numbers).numpy()
    pieces, drawn = [], []
    for which in _batches(sizes, batch_size, generator.device.type == "cpu"):
        share = 1 / generator.steps

        def advance(size: int = len(which), share: float = share) -> None:
            observer.advance(size, share)

        pieces.append(generator.draw(numbers[torch.from_numpy(which)], advance))
        drawn.append(which)
    return _concatenate(pieces).select(np.argsort(np.concatenate(drawn)))


def _batches(
    sizes: NDArray[np.int64], batch_size: int | None, on_cpu: bool
) -> Iterator[NDArray[np.int64]]:
    if batch_size is None:
        yield from by_size(sizes, _PAIRS_CPU if on_cpu else _PAIRS_GPU)
        return
    order = np.argsort(sizes, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _concatenate(pieces: list[Molecules]) -> Molecules:
    return Molecules(
        np.concatenate([p.positions for p in pieces]),
        np.concatenate([p.atomic_numbers for p in pieces]),
        offsets_of(np.concatenate([p.sizes for p in pieces])),
    )


def _at_origin(molecules: Molecules, which: NDArray[np.bool_]) -> Molecules:
    """The molecules with the atoms of some put at the origin, for lack of finite coordinates."""
    atoms = np.repeat(which, molecules.sizes)[:, None]
    return replace(molecules, positions=np.where(atoms, np.float32(0), molecules.positions))
