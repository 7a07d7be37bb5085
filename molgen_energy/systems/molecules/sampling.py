"""Sample molecules into a file, in memory that does not grow with their number.

Molecules are drawn in batches, each of which is kept on disk as it is finished (`parts`), by one
process or several. When all are there they are written into the file in order of their numbers. So
sampling can be broken off at any moment, and goes on to the same file.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy import __version__
from molgen_energy.chemistry.molfiles import MoleculeTextWriter, count_records
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules, batch_by_size, offsets_from_sizes
from molgen_energy.data.shards import Batch, MoleculeShards, SamplingJob, check_same
from molgen_energy.distributed import barrier, is_main, rank, world_size
from molgen_energy.errors import InputError
from molgen_energy.output import check_writable
from molgen_energy.systems.base import SamplingCallback, SamplingResult
from molgen_energy.systems.molecules.task import MoleculeGenerator
from molgen_energy.training.pretrained import checkpoint_name

SUFFIXES = (".sdf", ".xyz", ".h5")

# Batches are made up by size within a window of molecules: of about one size they waste little on
# padding, and memory is that of a window. On a CPU a batch is small, so the window may be.
_WINDOW_CPU, _WINDOW_GPU = 1024, 4096
# Pairs of atoms in a batch. On a CPU more than its cache holds is slower, not faster.
_PAIRS_CPU, _PAIRS_GPU = 20_000, 1_000_000
_LOOK = 0.2  # seconds between looks at what other processes have finished


def sample_to_file(
    generator: MoleculeGenerator,
    count: int,
    output: Path,
    observer: SamplingCallback,
    batch_size: int | None = None,
    resume: bool = False,
) -> SamplingResult:
    """Draw molecules 0 … count−1 of the generator's seed and write them in this order.

    Of several processes (`molgen_energy.distributed`) each draws its share of the batches, and the
    first one writes the file; the others return when their share is done.

    Broken off in any way, it leaves finished batches beside the output. On SIGINT they are also
    written under a name with `.partial` in it, and the outcome says so; where nothing is finished,
    nothing is left.

    Parameters
    ----------
    generator
        Model, seed, sizes and sampler.
    count
        How many, at least 1.
    output
        Ends in .sdf, .xyz or .h5.
    observer
        Told of progress.
    batch_size
        Molecules at once; None takes what suits their size and the device, or, when resuming,
        what was begun with.
    resume
        Go on with what was broken off; the file is that of an unbroken run, bit for bit on a CPU
        with the same number of threads.

    Raises
    ------
    InputError
        A number is below 1, the output cannot be written, something was broken off there and is
        not to be resumed, or was begun otherwise.
    OSError
        The disk takes no more; what is finished stays.
    """
    if count < 1:
        raise InputError(f"-n {count}: ask for at least one molecule")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: a batch holds at least one molecule")
    check_name(output)
    job = _job(generator, count, batch_size)
    with _begun(output, job, resume) as parts:
        work = _Work(generator, parts, output, observer)
        try:
            return work.draw_and_write()
        except KeyboardInterrupt:
            if not is_main() or not work.finished():
                raise
            return work.write_finished()
        finally:
            if is_main() and parts.folder.exists() and not work.finished():
                parts.remove()


def check_name(output: Path) -> None:
    """Raise `InputError` unless the name is that of a kind of file that can be written."""
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"{output}: the name must end in {', '.join(SUFFIXES)}")


def _job(generator: MoleculeGenerator, count: int, batch_size: int | None) -> SamplingJob:
    on_cpu = generator.device.type == "cpu"
    path = generator.checkpoint.path.resolve()
    # While a trainer replaces a checkpoint the old one has this name for a moment.
    path = path.with_name(path.name.removesuffix(".old"))
    return SamplingJob(
        count=count,
        seed=generator.seed,
        sampler=generator.sampler_name,
        steps=generator.sampler.steps,
        spacing=generator.sampler.spacing,
        eta=generator.sampler.eta,
        n_atoms=generator.n_atoms,
        low_precision=generator.low_precision,
        batch_size=batch_size,
        pairs=_PAIRS_CPU if on_cpu else _PAIRS_GPU,
        window=max(_WINDOW_CPU if on_cpu else _WINDOW_GPU, batch_size or 0),
        weights=generator.fingerprint(),
        checkpoint=checkpoint_name(path),
        origin=generator.checkpoint.origin,
        version=__version__,
    )


def _begun(output: Path, job: SamplingJob, resume: bool) -> MoleculeShards:
    """The folder of finished batches, made by the first process."""
    parts = None
    if is_main():
        parts = (
            MoleculeShards.open(output, lead=True) if resume else MoleculeShards.create(output, job)
        )
    barrier()
    if parts is None:
        try:
            parts = MoleculeShards.open(output, lead=False)
        except InputError as error:
            raise InputError(
                f"{error} (all processes must see the folder that the file is written into)"
            ) from error
    # How batches are made up is as it was begun, on whatever device.
    begun = parts.job
    size = begun.batch_size if job.batch_size is None else job.batch_size
    job = replace(job, batch_size=size, window=begun.window, pairs=begun.pairs)
    try:
        check_same(begun, job, output)
    except InputError:
        parts.close()
        raise
    return parts


class _Work:
    """A job on its way into a file."""

    def __init__(
        self,
        generator: MoleculeGenerator,
        parts: MoleculeShards,
        output: Path,
        observer: SamplingCallback,
    ) -> None:
        self._generator, self._parts, self._observer = generator, parts, observer
        self._output, self._job = output, parts.job

    def windows(self) -> Iterator[list[Batch]]:
        """The batches of each window, by ascending size; the same in every process."""
        job = self._job
        for window, start in enumerate(range(0, job.count, job.window)):
            numbers = torch.arange(start, min(start + job.window, job.count))
            sizes = self._generator.sizes(numbers).numpy()
            yield [
                Batch(window, place, numbers.numpy()[which])
                for place, which in enumerate(_by_size(sizes, job))
            ]

    def in_turn(self) -> Iterator[Batch]:
        """All batches, those of a window mixed.

        So what is finished at any moment has about the sizes of the whole, and processes that draw
        every K-th have about the same to do.
        """
        for batches in self.windows():
            # Multiples of the golden ratio, modulo 1, are spread evenly however few are taken.
            spread = (0.5 + np.arange(len(batches)) * (5**0.5 - 1) / 2) % 1
            for place in np.argsort(np.argsort(spread)):
                yield batches[place]

    def finished(self) -> int:
        """Molecules in finished batches."""
        return sum(len(batch.numbers) for batch in self.in_turn() if self._parts.has(batch))

    def draw_and_write(self) -> SamplingResult:
        """Draw what is missing; in the first process, wait for the others and write the file."""
        before = self.finished()
        if before:
            self._observer.found(before)
        for place, batch in enumerate(self.in_turn()):
            if place % world_size() == rank() and self._parts.read(batch) is None:
                self._draw(batch)
        drawn = self._job.count - before
        if not is_main():
            self._parts.say_done(rank())
            return SamplingResult(None, 0, drawn)
        # Without the limit in time of a barrier: a process that fails ends the job for all.
        for other in range(1, world_size()):
            while not self._parts.is_done(other):
                time.sleep(_LOOK)
        written, not_finite = self._write(self._output, complete=True)
        self._parts.remove()
        if before:
            self._partial().unlink(missing_ok=True)
        return SamplingResult(self._output, written, drawn, not_finite)

    def _partial(self) -> Path:
        """Where what is finished is written when it is broken off."""
        return self._output.with_name(f"{self._output.stem}.partial{self._output.suffix}")

    def write_finished(self) -> SamplingResult:
        """Write what is finished into a file of its own; a second SIGINT, or a full disk, skip it.

        Batches stay, to go on with.
        """
        target = self._partial()
        finished, path, not_finite = self.finished(), None, 0
        with contextlib.suppress(KeyboardInterrupt, OSError):
            self._observer.interrupted(finished)
            _, not_finite = self._write(target, complete=False)
            path = target
        return SamplingResult(path, finished, 0, not_finite, interrupted=True)

    def _draw(self, batch: Batch) -> Molecules:
        molecules = self._in_memory(torch.from_numpy(batch.numbers))
        self._parts.write(batch, molecules)
        return molecules

    def _in_memory(self, numbers: Tensor) -> Molecules:
        """Draw, in halves where memory does not suffice: molecules do not depend on the batch."""
        # The first process shows the progress of all, at its own pace.
        size, share = len(numbers) * world_size(), 1 / self._generator.sampler.evaluations

        def advance() -> None:
            self._observer.advance(size, share)

        try:
            return self._generator.draw(numbers, advance)
        except torch.OutOfMemoryError:
            if len(numbers) == 1:
                raise
        # Only here, behind the exception, is what the attempt held free.
        half = len(numbers) // 2
        return _concatenate([self._in_memory(numbers[:half]), self._in_memory(numbers[half:])])

    def _write(self, target: Path, complete: bool) -> tuple[int, int]:
        """Write all molecules, or the finished ones, in order; how many, and how many diverged."""
        # Written in the folder of the parts, so that a kill leaves nothing elsewhere.
        check_writable(target)
        merged, not_finite, in_order = self._parts.folder / target.name, 0, True
        with _writer(merged, self._job, self._generator.config.to_yaml()) as writer:
            for batches in self.windows():
                pieces, numbers = [], []
                for batch in batches:
                    piece = self._parts.read(batch)
                    if piece is None and complete:  # damaged or lost since it was drawn
                        piece = self._draw(batch)
                    if piece is not None:
                        pieces.append(piece)
                        numbers.append(batch.numbers)
                if pieces:
                    every = np.concatenate(numbers)
                    expected = np.arange(writer.count, writer.count + len(every))
                    in_order &= np.array_equal(np.sort(every), expected)
                    not_finite += _append(writer, pieces, every)
            written = writer.count
        readable = _count(merged)
        if readable != written or (complete and (written != self._job.count or not in_order)):
            raise OSError(
                errno.EIO,
                f"of {self._job.count:,} molecules {written:,} were written and {readable:,} can "
                "be read back; what is finished stays, sample again with --resume",
                str(target),
            )
        merged.replace(target)
        return written, not_finite


def _by_size(sizes: NDArray[np.int64], job: SamplingJob) -> Iterator[NDArray[np.int64]]:
    if job.batch_size is None:
        yield from batch_by_size(sizes, job.pairs)
        return
    order = np.argsort(sizes, kind="stable")
    for start in range(0, len(order), job.batch_size):
        yield order[start : start + job.batch_size]


def _writer(
    path: Path, job: SamplingJob, config: str
) -> AbstractContextManager[MoleculeTextWriter | MoleculeWriter]:
    origin = {
        "created_by": f"molgen-energy {job.version}",
        "checkpoint": job.origin,
        "seed": str(job.seed),
        "sampler": job.sampler,
        "steps": str(job.steps),
    }
    if job.spacing is not None:
        origin["spacing"] = job.spacing
    if job.eta is not None:
        origin["eta"] = f"{job.eta:g}"
    if path.suffix.lower() == ".h5":
        source = f"sampled from {job.origin}, seed {job.seed}"
        return MoleculeWriter(path, source=source, provenance=origin | {"config": config})
    return MoleculeTextWriter(path, origin, {"config": config})


def _append(
    writer: MoleculeTextWriter | MoleculeWriter,
    pieces: list[Molecules],
    numbers: NDArray[np.int64],
) -> int:
    """Write molecules of a window in order of their numbers; how many of them diverged."""
    order = np.argsort(numbers)
    drawn = _concatenate(pieces).select(order)
    finite = drawn.finite()
    if isinstance(writer, MoleculeWriter):
        writer.append(_at_origin(drawn, ~finite))  # the text formats say so in a field
    else:
        writer.append(drawn, numbers[order])
    return int((~finite).sum())


def _count(path: Path) -> int:
    """Molecules of a file that was written, counted by reading it."""
    if path.suffix.lower() == ".h5":
        with MoleculeFile(path) as file:
            return len(file)
    return count_records(path)


def _concatenate(pieces: list[Molecules]) -> Molecules:
    return Molecules(
        np.concatenate([p.positions for p in pieces]),
        np.concatenate([p.atomic_numbers for p in pieces]),
        offsets_from_sizes(np.concatenate([p.sizes for p in pieces])),
    )


def _at_origin(molecules: Molecules, which: NDArray[np.bool_]) -> Molecules:
    """The molecules with the atoms of some put at the origin, for lack of finite coordinates."""
    atoms = np.repeat(which, molecules.sizes)[:, None]
    return replace(molecules, positions=np.where(atoms, np.float32(0), molecules.positions))
