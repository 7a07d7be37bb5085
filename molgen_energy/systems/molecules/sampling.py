"""Sample molecules into a file, in memory that does not grow with their number.

Molecules are drawn in batches by one or several processes, and each finished batch is stored as a
shard. When all shards are there, the molecules are written into the file in the order of their
numbers. Sampling can be interrupted at any moment, and resumes to the same file.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy import __version__
from molgen_energy.chemistry.fields import TRAINED_ON
from molgen_energy.chemistry.molfiles import BondForm, MoleculeTextWriter, count_records
from molgen_energy.chemistry.rdkit import sanitize, short_reason
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules, batch_with_least_work
from molgen_energy.data.shards import FORMAT
from molgen_energy.diffusion.guidance import guidance_name
from molgen_energy.diffusion.spacing import levels_text
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.distributed import barrier, is_main, rank, world_size
from molgen_energy.errors import InputError, counted
from molgen_energy.formats.yaml import validate_as
from molgen_energy.output import check_writable, move_over, real_path, remove
from molgen_energy.systems.base import SamplingCallback, SamplingResult
from molgen_energy.systems.molecules.condition import where_text
from molgen_energy.systems.molecules.control.base import Control, Tally
from molgen_energy.systems.molecules.generate import CHARGE_COUNTS, MoleculeGenerator
from molgen_energy.systems.molecules.shards import (
    MoleculeShards,
    SamplingJob,
    Shard,
    check_same,
)
from molgen_energy.systems.molecules.threads import DrawingThreads
from molgen_energy.training.pretrained import checkpoint_name

SUFFIXES = (".sdf", ".xyz", ".h5")

# The molecules of a window are sorted by size and cut into batches: molecules of similar size need
# little padding, and memory is that of a window. On a CPU batches are small, so windows may be.
_WINDOW_CPU, _WINDOW_GPU = 1024, 4096
# Pairs of atoms in a batch. On a CPU, batches beyond the size of its cache are slower, and each
# thread draws its own, so a small job has smaller ones.
_PAIRS_CPU, _PAIRS_GPU = 20_000, 1_000_000
_FEWEST_PAIRS_CPU, _BATCHES_CPU = 4_000, 8
_OVERHEAD = 16  # batches in the work of which the calls of the interpreter are that of one batch
_MOST_REASONS = 3  # that are named at the end
_POLL = 0.2  # seconds between checks whether other processes have finished


def sample_to_file(
    generator: MoleculeGenerator,
    count: int,
    output: Path,
    callback: SamplingCallback,
    batch_size: int | None = None,
    resume: bool = False,
    aromatic: bool = False,
) -> SamplingResult:
    """Draw molecules 0 … count−1 of the generator's seed and write them in this order.

    Of several processes (`molgen_energy.distributed`) each draws its share of the batches, and the
    first one writes the file; the others return when they have finished their share.

    After any interruption, finished batches stay beside the output. On SIGINT their molecules are
    also written to a file with `.partial` in its name, which the result names. If no batch is
    finished, nothing stays.

    Parameters
    ----------
    generator
        Model, seed, sizes and sampler.
    count
        Number of molecules, at least 1.
    output
        File name that ends in .sdf, .xyz or .h5.
    callback
        Receives progress.
    batch_size
        Molecules in a batch; None chooses by their size and the device, or, when resuming, keeps
        the batch size of the job.
    resume
        Continue an interrupted job; the file is that of an uninterrupted one, bit for bit on a CPU
        with the same number of threads.
    aromatic
        Write the generated bonds of an SDF in aromatic form where RDKit finds aromaticity, instead
        of Kekulised.

    Raises
    ------
    InputError
        Aromatic bonds are asked for and the file is no SDF, or the model generates none. A number
        is below 1, the output cannot be written, there is an interrupted job and `resume` is
        false, or it has other options.
    OSError
        The disk is full; finished batches stay.
    """
    if count < 1:
        raise InputError(f"-n {count}: ask for at least one molecule")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: a batch holds at least one molecule")
    check_name(output)
    if aromatic:
        _check_aromatic(output, generator)
    job = _job(generator, count, batch_size, aromatic)
    with _open_shards(output, job, resume) as shards:
        work = _SamplingRun(generator, shards, output, callback)
        try:
            return work.draw_and_write()
        except KeyboardInterrupt:
            if not is_main() or not work.finished():
                raise
            return work.write_finished()
        finally:
            if is_main() and shards.folder.exists() and not work.finished():
                shards.remove()


def check_name(output: Path) -> None:
    """Raise `InputError` unless the name ends in one of `SUFFIXES`."""
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"{output}: the name must end in {', '.join(SUFFIXES)}")


def _check_aromatic(output: Path, generator: MoleculeGenerator) -> None:
    if output.suffix.lower() != ".sdf":
        raise InputError(
            f"--aromatic is for SDF, and {output} holds bonds as they are generated or none; leave "
            "it out"
        )
    if "bonds" not in generator.layout.fields:
        raise InputError(
            f"--aromatic: the model of {generator.checkpoint.path} generates no bonds; leave it out"
        )


def _job(
    generator: MoleculeGenerator, count: int, batch_size: int | None, aromatic: bool = False
) -> SamplingJob:
    on_cpu = generator.device.type == "cpu"
    path = real_path(generator.checkpoint.path)
    # While a trainer replaces a checkpoint, the old one has this name for a moment.
    path = path.with_name(path.name.removesuffix(".old"))
    options: dict[str, Any] = {
        "format": FORMAT,
        "count": count,
        "seed": generator.seed,
        "sampler": generator.sampler_name,
        "steps": generator.sampler.steps,
        "spacing": generator.sampler.spacing,
        "levels": generator.sampler.levels,
        "eta": generator.sampler.eta,
        **generator.sampler.temperature.options,
        "ancestral_positions": generator.sampler.ancestral_positions,
        "self_condition_passes": generator.sampler.self_condition_passes,
        "n_atoms": generator.n_atoms,
        "where": None if generator.where is None else dict(generator.where),
        "guidance": guidance_name(generator.guidance),
        **generator.control.options,
        "records": generator.control.records,
        "resample": generator.sampler.resample,
        "strength": None if generator.sampler.strength == 1 else generator.sampler.strength,
        "consistent_charges": generator.charges is not None,
        "aromatic": aromatic,
        "low_precision": generator.low_precision,
        "cuda_graphs": generator.cuda_graphs,
        "batch_size": batch_size,
        "pairs": pairs_in_batch(generator, count),
        "window": max(_WINDOW_CPU if on_cpu else _WINDOW_GPU, batch_size or 0),
        "weights": generator.fingerprint(),
        "checkpoint": checkpoint_name(path),
        "origin": generator.checkpoint.origin,
        "trained_on": generator.trained_on,
        "version": __version__,
        "units": generator.units,
    }
    return validate_as(SamplingJob, options, "the options", "choose other values")


def pairs_in_batch(generator: MoleculeGenerator, count: int) -> int:
    """Pairs of atoms in a batch of a job of `count` molecules; on a CPU several for each core."""
    if generator.device.type != "cpu":
        return _PAIRS_GPU
    some = torch.arange(min(count, _WINDOW_CPU))
    pairs = float(generator.sizes(some).double().square().mean()) * count
    return int(min(max(pairs // _BATCHES_CPU, _FEWEST_PAIRS_CPU), _PAIRS_CPU))


def _open_shards(output: Path, job: SamplingJob, resume: bool) -> MoleculeShards:
    """The folder of finished shards, made by the first process."""
    shards = None
    if is_main():
        shards = (
            MoleculeShards.open(output, lead=True) if resume else MoleculeShards.create(output, job)
        )
    barrier()
    if shards is None:
        try:
            shards = MoleculeShards.open(output, lead=False)
        except InputError as error:
            raise InputError(
                f"{error} (all processes must see the folder that the file is written into)"
            ) from error
    # Batches are cut as when the job began, on any device.
    begun = shards.job
    size = begun.batch_size if job.batch_size is None else job.batch_size
    as_begun: dict[str, Any] = {"batch_size": size, "window": begun.window, "pairs": begun.pairs}
    as_begun |= {"units": begun.units, "trained_on": begun.trained_on}
    job = job.model_copy(update=as_begun)
    try:
        check_same(begun, job, output)
    except InputError:
        shards.close()
        raise
    return shards


@dataclass
class _Written:
    """What is counted while molecules are written."""

    molecules: int = 0
    not_finite: int = 0
    """Molecules that diverged."""
    with_bonds: bool = False
    """Whether the model generates bonds."""
    invalid: Counter[str] = field(default_factory=Counter)
    """Molecules by the reason why RDKit cannot sanitise their generated bonds."""
    not_kekulised: int = 0
    """Molecules whose aromatic bonds stay, since RDKit cannot Kekulise them."""
    charges: NDArray[np.int64] | None = None
    """Of each of `CHARGE_COUNTS` atoms and molecules, (2, 2)."""
    tally: Tally = field(default_factory=Tally)
    """Of the generator's control."""

    def add(self, molecules: Molecules, numbers: NDArray[np.int64]) -> None:
        """Count molecules that were written, and their numbers, (M,)."""
        self.tally.add(molecules, numbers)
        self.molecules += len(molecules)
        self.not_finite += int((~molecules.finite()).sum())
        self.with_bonds = molecules.bonds is not None
        if CHARGE_COUNTS[0] in molecules.properties:
            atoms = np.stack([molecules.properties[name].values for name in CHARGE_COUNTS])
            counts = np.stack([atoms.sum(axis=1), (atoms > 0).sum(axis=1)], axis=1)
            self.charges = counts.astype(np.int64) + (0 if self.charges is None else self.charges)

    def sanitize(self, molecules: Molecules) -> None:
        """Count molecules that RDKit cannot sanitise."""
        results = map(sanitize, molecules)
        self.invalid.update(short_reason(result.reason) for result in results if not result.valid)

    def notes(self) -> tuple[str, ...]:
        """Lines for the end of `sample`."""
        if not self.molecules:
            return ()
        notes = list(self.tally.notes())
        if not self.with_bonds:
            return tuple(notes)
        of_all = f"of {counted(self.molecules, 'molecules')}"
        if count := self.invalid.total():
            most = [f"{reason} ({n:,})" for reason, n in self.invalid.most_common(_MOST_REASONS)]
            if others := len(self.invalid) - len(most):
                most.append(counted(others, "other reasons"))
            notes.append(f"RDKit cannot sanitise {count:,} {of_all}: {', '.join(most)}")
        if self.not_kekulised:
            notes.append(
                f"{self.not_kekulised:,} {of_all} keep aromatic bonds, since RDKit cannot Kekulise "
                "them"
            )
        if self.charges is not None:
            (changed, in_molecules), (without, there) = self.charges.tolist()
            notes.append(
                f"--consistent-charges changed the charges of {counted(changed, 'atoms')} in "
                f"{in_molecules:,} {of_all}; no charge fits the bonds of "
                f"{counted(without, 'atoms')} in {there:,}, which stay as generated"
            )
        return tuple(notes)


class _SamplingRun:
    """The execution of a job that writes a file."""

    def __init__(
        self,
        generator: MoleculeGenerator,
        shards: MoleculeShards,
        output: Path,
        callback: SamplingCallback,
    ) -> None:
        self._generator, self._shards, self._callback = generator, shards, callback
        self._output, self._job = output, shards.job
        self._threads = DrawingThreads(self._draw, callback.advance)

    def windows(self) -> Iterator[list[Shard]]:
        """The shards of each window, by ascending size; the same in every process."""
        for window in range(-(-self._job.count // self._job.window)):
            yield self.window(window)

    def window(self, window: int) -> list[Shard]:
        """The shards of a window; none behind the last one."""
        job, start = self._job, window * self._job.window
        if start >= job.count:
            return []
        numbers = torch.arange(start, min(start + job.window, job.count))
        sizes = self._generator.sizes(numbers).numpy()
        return [
            Shard(window, place, numbers.numpy()[which])
            for place, which in enumerate(_by_size(sizes, job))
        ]

    def in_turn(self) -> Iterator[Shard]:
        """All shards, those of a window mixed.

        So at any moment the finished shards have about the sizes of the whole, and processes that
        draw every K-th shard have about the same work.
        """
        for shards in self.windows():
            # Multiples of the golden ratio, modulo 1, are evenly spread for any number of them.
            spread = (0.5 + np.arange(len(shards)) * (5**0.5 - 1) / 2) % 1
            for place in np.argsort(np.argsort(spread)):
                yield shards[place]

    def finished(self) -> int:
        """Molecules in finished shards."""
        begun = self._shards.windows()  # the only ones whose batches need to be known
        return sum(
            len(shard.numbers)
            for window in sorted(begun)
            for shard in self.window(window)
            if self._shards.has(shard)
        )

    def draw_and_write(self) -> SamplingResult:
        """Draw missing shards; in the first process, wait for the others and write the file."""
        before = self.finished()
        if before:
            self._callback.found(before)
        missing = (
            shard
            for place, shard in enumerate(self.in_turn())
            if place % world_size() == rank() and self._shards.read(shard) is None
        )
        self._threads.run(missing, min(most_threads(self._generator), len(self.window(0))))
        drawn = self._job.count - before
        if not is_main():
            self._shards.mark_done(rank())
            return SamplingResult(None, 0, drawn)
        # A barrier would time out; a process that fails ends the job for all.
        for other in range(1, world_size()):
            while not self._shards.is_done(other):
                time.sleep(_POLL)
        written = self._write(self._output, complete=True)
        self._shards.remove()
        if before:
            self._partial().unlink(missing_ok=True)
        return SamplingResult(
            self._output, written.molecules, drawn, written.not_finite, notes=written.notes()
        )

    def _partial(self) -> Path:
        """Where finished molecules are written after an interruption."""
        return self._output.with_name(f"{self._output.stem}.partial{self._output.suffix}")

    def write_finished(self) -> SamplingResult:
        """Write finished molecules into a separate file, unless a second SIGINT comes.

        The shards stay, so that the job can be resumed.
        """
        target = self._partial()
        finished, path, written = self.finished(), None, _Written()
        with contextlib.suppress(KeyboardInterrupt, OSError):
            self._callback.interrupted(finished)
            written = self._write(target, complete=False)
            path = target
        return SamplingResult(
            path, finished, 0, written.not_finite, interrupted=True, notes=written.notes()
        )

    def _draw(self, shard: Shard) -> Molecules:
        molecules = self._in_memory(torch.from_numpy(shard.numbers))
        self._shards.write(shard, molecules)
        return molecules

    def _in_memory(self, numbers: Tensor) -> Molecules:
        """Draw; when out of memory, draw halves, since molecules do not depend on the batch."""
        # The first process reports the progress of all, assuming equal speed.
        size, share = len(numbers) * world_size(), 1 / self._generator.sampler.evaluations

        def advance() -> None:
            self._threads.advance(size, share)

        try:
            return self._generator.draw(numbers, advance)
        except torch.OutOfMemoryError:
            if len(numbers) == 1:
                raise
        # The memory of the attempt is only free here, after the exception.
        half = len(numbers) // 2
        return Molecules.concatenate(
            [self._in_memory(numbers[:half]), self._in_memory(numbers[half:])]
        )

    def _write(self, target: Path, complete: bool) -> _Written:
        """Write all or the finished molecules in order; returns what was written."""
        # Written in the folder of the shards, so that a kill leaves no other file.
        check_writable(target)
        merged, in_order = self._shards.folder / target.name, True
        found = _Written(tally=self._generator.control.tally())
        remove(merged)
        config = self._generator.config.without_paths().to_yaml()
        asked = self._generator.control.provenance()
        with _writer(merged, self._job, config, asked) as writer:
            for shards in self.windows():
                drawn, numbers = [], []
                for shard in shards:
                    molecules = self._shards.read(shard)
                    if molecules is None and complete:  # damaged or lost since it was drawn
                        molecules = self._draw(shard)
                    if molecules is not None:
                        drawn.append(molecules)
                        numbers.append(shard.numbers)
                if drawn:
                    every = np.concatenate(numbers)
                    expected = np.arange(writer.count, writer.count + len(every))
                    in_order &= np.array_equal(np.sort(every), expected)
                    molecules = _append(writer, drawn, every, self._generator.control)
                    found.add(molecules, np.sort(every))
                    if molecules.bonds is not None and merged.suffix.lower() != ".sdf":
                        found.sanitize(molecules)
            written = writer.count
            if isinstance(writer, MoleculeTextWriter):  # which sanitises the records of an SDF
                found.invalid += writer.invalid
                found.not_kekulised = writer.not_kekulised
        readable = _count(merged)
        if readable != written or (complete and (written != self._job.count or not in_order)):
            raise OSError(
                errno.EIO,
                f"of {self._job.count:,} molecules {written:,} were written and {readable:,} can "
                "be read back; finished shards stay, sample again with --resume",
                str(target),
            )
        move_over(merged, target)
        return found


def batches(sizes: NDArray[np.int64], pairs: int) -> Iterator[NDArray[np.int64]]:
    """Places of molecules of some sizes, in batches of at most so many pairs of atoms."""
    yield from batch_with_least_work(sizes, pairs, pairs // _OVERHEAD)


def most_threads(generator: MoleculeGenerator) -> int:
    """Threads that may draw batches, each with its share of the cores."""
    if generator.device.type != "cpu":
        return 1
    return torch.get_num_threads()


def _by_size(sizes: NDArray[np.int64], job: SamplingJob) -> Iterator[NDArray[np.int64]]:
    if job.batch_size is None:
        yield from batches(sizes, job.pairs)
        return
    order = np.argsort(sizes, kind="stable")
    for start in range(0, len(order), job.batch_size):
        yield order[start : start + job.batch_size]


def _writer(
    path: Path, job: SamplingJob, config: str, asked: Mapping[str, str]
) -> AbstractContextManager[MoleculeTextWriter | MoleculeWriter]:
    origin = {
        "created_by": f"molgen-energy {job.version}",
        "checkpoint": job.origin,
        **({TRAINED_ON: job.trained_on} if job.trained_on else {}),
        "seed": str(job.seed),
        "sampler": job.sampler,
        "steps": str(job.steps),
    }
    if job.spacing is not None:
        origin["spacing"] = job.spacing
    if job.levels is not None:
        origin["levels"] = levels_text(job.levels)
    if job.eta is not None:
        origin["eta"] = f"{job.eta:g}"
    origin |= Temperature.from_options(job.model_dump()).provenance()
    if job.where is not None:
        origin["where"] = where_text(job.where)
    if job.guidance != 1:
        origin["guidance"] = job.guidance if isinstance(job.guidance, str) else f"{job.guidance:g}"
    if job.consistent_charges:
        origin["consistent_charges"] = "yes"
    if job.ancestral_positions:
        origin["ancestral_positions"] = "yes"
    if job.low_precision:
        origin["precision"] = "bfloat16 for pairs of atoms"
    if job.self_condition_passes != 1:
        origin["self_condition_passes"] = str(job.self_condition_passes)
    if job.resample != 1:
        origin["resample"] = str(job.resample)
    if job.strength is not None:
        origin["strength"] = f"{job.strength:g}"
    origin |= asked
    if path.suffix.lower() == ".h5":
        source = f"sampled from {job.origin}, seed {job.seed}"
        return MoleculeWriter(path, source=source, provenance=origin | {"config": config})
    form: BondForm = "aromatic" if job.aromatic else "kekule"
    return MoleculeTextWriter(path, origin, {"config": config}, form)


def _append(
    writer: MoleculeTextWriter | MoleculeWriter,
    drawn: list[Molecules],
    numbers: NDArray[np.int64],
    control: Control,
) -> Molecules:
    """Write molecules of a window in the order of their numbers, and return them so."""
    order = np.argsort(numbers)
    molecules = control.label(Molecules.concatenate(drawn).select(order), numbers[order])
    if isinstance(writer, MoleculeWriter):
        writer.append(at_origin(molecules, ~molecules.finite()))  # text formats have a field
    else:
        writer.append(molecules, numbers[order])
    return molecules


def _count(path: Path) -> int:
    """Molecules of a written file, counted by reading it."""
    if path.suffix.lower() == ".h5":
        with MoleculeFile(path) as file:
            return len(file)
    return count_records(path)


def at_origin(molecules: Molecules, which: NDArray[np.bool_]) -> Molecules:
    """The molecules, with all atoms of the chosen ones at the origin."""
    atoms = np.repeat(which, molecules.sizes)[:, None]
    return replace(molecules, positions=np.where(atoms, np.float32(0), molecules.positions))
