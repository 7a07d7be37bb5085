"""Choose sampler, noise levels and noise of a checkpoint for a number of network evaluations.

Candidates draw molecules of the same numbers and seed, so that they start from the same noise. They
are judged by real molecules of the training and validation split alone: the share of stable
molecules shall be that of the data, and the distances of bond lengths, angles and dihedrals from
the data must not grow. So a sampler whose molecules are merely more regular cannot win. The search
is successive halving (K. Jamieson and A. Talwalkar, AISTATS 2016): each round draws more molecules
of fewer candidates, and those that were drawn stay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molgen_energy.chemistry.geometry import KINDS, GeometryTypes
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.diffusion.process import Process
from molgen_energy.diffusion.samplers import (
    DEFAULT_SAMPLERS,
    Sampler,
    build_sampler,
    samplers_for,
)
from molgen_energy.diffusion.spacing import levels_text, power_levels
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError
from molgen_energy.metrics.distances.comparison import Distributions, wasserstein_distance
from molgen_energy.metrics.molecule_evaluation import MoleculeEvaluation, evaluate_source
from molgen_energy.metrics.options import EvaluationOptions, make_options, with_bonds, with_types
from molgen_energy.metrics.reference import frequent_types, select_types
from molgen_energy.metrics.sources import CHUNK_SIZE, ChunkSource, FileSource
from molgen_energy.metrics.statistics import Estimate, Rate
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.sampling import (
    at_origin,
    batches,
    most_threads,
    pairs_in_batch,
)
from molgen_energy.systems.molecules.state import MoleculeState, SamplingState
from molgen_energy.systems.molecules.threads import DrawingThreads
from molgen_energy.training.pretrained import checkpoint_name
from molgen_energy.workers import WorkerPool

SEED = 1_000_000
"""Of the molecules of a search, so that those of other seeds can judge what it finds."""
FEWEST = 3
"""Network evaluations that levels can be chosen for."""
_MOST_REAL = 5000  # molecules of each split
# Of distances in each round, relative to those of the sampler so far. Those of few molecules vary.
_TOLERANCES = (2.0, 1.5, 1.25)
_NOISE_TOLERANCE = 1.1  # relative to those of the same levels with all noise

# Second level in Å and power of `power_levels`, and its last level in Å.
_GRID = ((1.0, 2.0), (1.0, 3.0), (1.5, 3.0), (1.5, 5.0), (2.5, 3.0), (2.5, 5.0), (5.0, 3.0),
         (5.0, 5.0), (10.0, 7.0))  # fmt: skip
_LAST, _OTHER_LAST = 0.03, (0.0, 0.015, 0.06)
_NOISE = ((1.0, 0.5), (1.0, 0.0), (0.9, 1.0))  # temperature and final noise
_LEAST_DISTANCE = 1e-6  # that others are divided by
_SHARES = (4, 2, 1)  # of the molecules, in each round
_KEPT = (4, 2)  # candidates after each round but the last


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler with its levels and its noise."""

    sampler: str
    """Name."""
    steps: int | None = None
    spacing: str | None = None
    levels: tuple[float, ...] | None = None
    """In place of steps and spacing."""
    temperature: float = 1.0
    final_noise: float = 1.0
    label: str = field(default="", compare=False)
    """The levels in words."""

    def build(self, process: Process) -> Sampler:
        """The sampler of a process."""
        temperature = Temperature(self.temperature, final_noise=self.final_noise)
        return build_sampler(
            process, self.sampler, self.steps, None, self.spacing, temperature, levels=self.levels
        )

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, see `SamplingState`."""
        state = {
            "sampler": self.sampler,
            "steps": self.steps,
            "spacing": self.spacing,
            "levels": None if self.levels is None else list(self.levels),
            "temperature": None if self.temperature == 1 else self.temperature,
            "final_noise": None if self.final_noise == 1 else self.final_noise,
        }
        return {name: value for name, value in state.items() if value is not None}

    @property
    def options(self) -> str:
        """Options of the command `sample`."""
        parts = [f"--sampler {self.sampler}"]
        if self.steps is not None:
            parts.append(f"--steps {self.steps}")
        if self.spacing is not None:
            parts.append(f"--spacing {self.spacing}")
        if self.levels is not None:
            parts.append(f"--levels {levels_text(self.levels)}")
        if self.temperature != 1:
            parts.append(f"--temperature {self.temperature:g}")
        if self.final_noise != 1:
            parts.append(f"--final-noise {self.final_noise:g}")
        return " ".join(parts)

    @property
    def noise(self) -> str:
        """What differs from the noise of the sampler, in words; may be empty."""
        return Temperature(self.temperature, final_noise=self.final_noise).describe()


@dataclass(frozen=True)
class JudgedSampler:
    """What was measured of a candidate, or of real molecules."""

    choice: SamplerChoice | None
    """None for real molecules."""
    evaluations: int
    """Of the network, for each molecule."""
    molecule_stability: Rate
    atom_stability: Rate
    distances: dict[str, Estimate]
    """Wasserstein distance from the training molecules, by kind of geometry."""
    near: bool = True
    """Whether no distance is above its limit."""

    @property
    def molecules(self) -> int:
        """How many were judged."""
        return self.molecule_stability.total


@dataclass(frozen=True)
class TuningResult:
    """A sampler for a checkpoint, and what it was compared with."""

    chosen: JudgedSampler
    candidates: tuple[JudgedSampler, ...]
    """All, those of the last round first, by how close their stability is to that of the data."""
    before: JudgedSampler
    """The sampler of the checkpoint so far, with as many evaluations."""
    real: JudgedSampler
    """Validation molecules."""
    data: str
    """The real molecules, in words."""
    name: str
    """Of the checkpoint: its folder, or that of pretrained weights."""
    stored: Path | None = None
    """The checkpoint that `sample` takes the choice from; None if it was not stored."""


def sampler_so_far(state: MoleculeState, process: Process, evaluations: int) -> SamplerChoice:
    """The stored levels of a checkpoint, or its sampler with as many steps as evaluations allow.

    Raises
    ------
    InputError
        No number of steps takes so few.
    """
    stored = state.sampling or SamplingState()
    name = stored.sampler or DEFAULT_SAMPLERS[process.name]
    if stored.levels is not None:
        choice = SamplerChoice(
            name,
            levels=tuple(stored.levels),
            temperature=1.0 if stored.temperature is None else stored.temperature,
            final_noise=1.0 if stored.final_noise is None else stored.final_noise,
            label="stored",
        )
        if choice.build(process).evaluations <= evaluations:
            return choice
    for steps in range(min(evaluations, process.steps), 0, -1):
        sampler = build_sampler(process, name, steps, spacing=stored.spacing)
        if sampler.evaluations <= evaluations:
            label = "all" if sampler.spacing is None else sampler.spacing
            return SamplerChoice(name, steps, sampler.spacing, label=label)
    raise InputError(f"--steps {evaluations}: {name} needs more network evaluations")


class SamplerSearch:
    """The search for the sampler of a checkpoint.

    Parameters
    ----------
    generator
        Of the checkpoint, with the seed of the search.
    data
        Real molecules: HDF5 with a split, of which the test split is not read, or any file of
        molecules.
    evaluations
        Of the network for each molecule, at most.
    count
        Molecules of each candidate in the last round.
    work
        Folder for molecules that were drawn. A search that was interrupted takes them from there.
    workers
        Processes for the calls of RDKit.

    Raises
    ------
    InputError
        A number is out of range, or the data has no training molecules.
    """

    def __init__(
        self,
        generator: MoleculeGenerator,
        data: Path,
        evaluations: int,
        count: int,
        work: Path,
        workers: int,
    ) -> None:
        self._generator, self._data, self._work = generator, data, work
        self._process, self._evaluations = generator.sampler.process, evaluations
        most = self._process.steps
        if not FEWEST <= evaluations <= most:
            raise InputError(
                f"--steps {evaluations}: --tune chooses for {FEWEST} to {most:,} network "
                "evaluations of each molecule"
            )
        if count < 4 * _SHARES[0]:
            raise InputError(f"-n {count}: --tune compares {4 * _SHARES[0]} molecules or more")
        self._counts = [count // share for share in _SHARES]
        self._workers = workers
        self._training, self._validation = _splits(data)
        self._bonds = "given" if "bonds" in generator.layout.fields else "perceived"
        if self._bonds == "given" and not self._training.given_bonds.every:
            raise InputError(
                f"{data} has no bonds, which this network generates; name data with bonds by --data"
            )
        state = generator.checkpoint.state_as(MoleculeState)
        self.before = sampler_so_far(state, self._process, evaluations)
        self._drawn: dict[SamplerChoice, Molecules] = {}
        self._progress: ProgressCallback = no_progress
        self._done = 0

    @property
    def molecules(self) -> int:
        """Molecules that are drawn, at most."""
        few, some, many = self._counts
        first, second = len(self._grid), _KEPT[0] + len(_OTHER_LAST) + 1
        third = _KEPT[1] + len(_NOISE) + 1
        kept = (_KEPT[0] + 1) * few + (_KEPT[1] + 1) * some
        return first * few + second * some + third * many - kept

    @property
    def network_evaluations(self) -> int:
        """Evaluations of the network for all of them, at most."""
        return self.molecules * self._evaluations

    def run(self, progress: ProgressCallback = no_progress) -> TuningResult:
        """Draw and judge; `progress` gets the number of network evaluations."""
        self._progress = progress
        with WorkerPool(self._workers, timeout=20.0) as pool:
            judge = _Judge(self._training, self._validation, self._bonds, pool)
            every: dict[SamplerChoice, JudgedSampler] = {}
            candidates = self._grid
            for place, count in enumerate(self._counts):
                last = place + 1 == len(self._counts)
                judged = self._round(candidates, count, _TOLERANCES[place], judge)
                every |= {each.choice: each for each in judged if each.choice is not None}
                ranked = sorted(judged, key=lambda each: judge.rank(each, last))
                if last:
                    break
                plain = [each.choice for each in ranked if each.choice not in (None, self.before)]
                kept = [choice for choice in plain[: _KEPT[place]] if choice is not None]
                varied = self._other_ends(kept[0]) if place == 0 else self._less_noise(kept[0])
                candidates = list(dict.fromkeys([self.before, *kept, *varied]))
        final = {each.choice for each in ranked}
        others = sorted(
            (each for choice, each in every.items() if choice not in final),
            key=lambda each: (-each.molecules, judge.rank(each, False)),
        )
        return TuningResult(
            ranked[0],
            (*ranked, *others),
            every[self.before],
            judge.real,
            judge.description,
            checkpoint_name(self._generator.checkpoint.path),
        )

    @cached_property
    def _grid(self) -> list[SamplerChoice]:
        """The candidates of the first round, the sampler so far first."""
        names = samplers_for(self._process.name)
        found = [self.before]
        if self._process.name == "flow_matching":
            for name in names:
                for spacing in ("even", "quadratic"):
                    found += self._spaced(name, spacing)
            return list(dict.fromkeys(found))
        for spacing in ("quadratic", "log"):
            found += self._spaced("sde-dpm++", spacing)
        found += [self._powered("sde-dpm++", high, power) for high, power in _GRID]
        found += [self._powered("ancestral", 1.5, 3.0), self._powered("dpm++", 2.5, 5.0)]
        return list(dict.fromkeys(found))

    def _spaced(self, name: str, spacing: str) -> list[SamplerChoice]:
        """A sampler with steps of a spacing, if it has so few evaluations."""
        for steps in range(self._evaluations, 0, -1):
            choice = SamplerChoice(name, steps, spacing, label=spacing)
            if choice.build(self._process).evaluations <= self._evaluations:
                return [choice]
        return []

    def _powered(self, name: str, high: float, power: float, last: float = _LAST) -> SamplerChoice:
        """A sampler with levels of `power_levels`, in Å; last 0 ends at level 0."""
        scale = self._generator.layout.fields["positions"].scale
        levels = power_levels(
            self._process, self._evaluations, high / scale, power, last / scale or None
        )
        label = f"{high:g} to {last:g} Å, power {power:g}"
        return SamplerChoice(name, levels=tuple(levels), label=label)

    def _other_ends(self, choice: SamplerChoice) -> list[SamplerChoice]:
        """The same levels but for the last ones; none of a spacing, which ends at the data."""
        if choice.levels is None:
            return []
        for high, power in _GRID:
            if choice == self._powered(choice.sampler, high, power):
                return [self._powered(choice.sampler, high, power, last) for last in _OTHER_LAST]
        return []

    def _less_noise(self, choice: SamplerChoice) -> list[SamplerChoice]:
        """The same sampler with less noise, if it has any."""
        if not choice.build(self._process).adds_noise:
            return []
        return [
            replace(choice, temperature=temperature, final_noise=final_noise)
            for temperature, final_noise in _NOISE
        ]

    def _round(
        self, candidates: Sequence[SamplerChoice], count: int, tolerance: float, judge: _Judge
    ) -> list[JudgedSampler]:
        """Judge the first molecules of each candidate, with the limits of their distances."""
        judged: dict[SamplerChoice, JudgedSampler] = {}
        for choice in candidates:
            sampler = choice.build(self._process)
            molecules = self._draw(choice, sampler, count)
            found = judge.judge(molecules, choice, sampler.evaluations)
            plain = replace(choice, temperature=1.0, final_noise=1.0)
            limit, factor = judged.get(self.before, found), tolerance
            if plain != choice and plain in judged:
                limit, factor = judged[plain], _NOISE_TOLERANCE
            near = choice == self.before or all(
                _value(found.distances[kind]) <= factor * _value(limit.distances[kind])
                for kind in KINDS
            )
            judged[choice] = replace(found, near=near)
        return list(judged.values())

    def _draw(self, choice: SamplerChoice, sampler: Sampler, count: int) -> Molecules:
        """The first molecules of a candidate."""
        there = self._drawn.get(choice)
        start = 0 if there is None else len(there)
        parts = [] if there is None else [there]
        for low, high in pairwise([start, *(n for n in self._counts if start < n <= count)]):
            path = self._work / f"{self._key(choice)}-{low}-{high}.h5"
            parts.append(self._stored(path, sampler, low, high))
        self._drawn[choice] = Molecules.concatenate(parts)
        return self._drawn[choice]

    def _key(self, choice: SamplerChoice) -> str:
        """Distinguishes what molecules of a candidate depend on."""
        generator = self._generator
        inputs = (generator.fingerprint(), generator.seed, generator.low_precision, choice.options)
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]

    def _stored(self, path: Path, sampler: Sampler, low: int, high: int) -> Molecules:
        """Molecules of the numbers, from their file if it is whole, else drawn into it."""
        evaluations = sampler.evaluations * (high - low)
        molecules = _read_drawn(path, high - low)
        if molecules is None:
            began = self._done
            molecules = self._new(sampler, torch.arange(low, high))
            self._work.mkdir(parents=True, exist_ok=True)
            with MoleculeWriter(path, source="candidates of a sampler") as writer:
                writer.append(at_origin(molecules, ~molecules.finite()))
            with MoleculeFile(path) as file:
                molecules = file.load()
            self._done = began
        self._count(evaluations)
        return molecules

    def _new(self, sampler: Sampler, numbers: Tensor) -> Molecules:
        """The molecules of the numbers, drawn as `sample` does."""
        generator = self._generator
        generator.sampler = sampler
        sizes = generator.sizes(numbers).numpy()
        parts = list(batches(sizes, pairs_in_batch(generator, len(numbers))))
        drawn: dict[int, Molecules] = {}

        def draw(part: int) -> None:
            which = parts[part]

            def advance() -> None:
                threads.advance(len(which), 1.0)

            drawn[part] = generator.draw(numbers[torch.from_numpy(which)], advance)

        threads = DrawingThreads(draw, lambda molecules, _: self._count(molecules))
        threads.run(iter(range(len(parts))), min(most_threads(generator), len(parts)))
        molecules = Molecules.concatenate([drawn[part] for part in range(len(parts))])
        return molecules.select(np.argsort(np.concatenate(parts)))

    def _count(self, evaluations: int) -> None:
        self._done += evaluations
        self._progress(self._done, self.network_evaluations)


def _read_drawn(path: Path, count: int) -> Molecules | None:
    """The molecules of a file; None if it is missing or damaged, or holds others."""
    if not path.exists():
        return None
    try:
        with MoleculeFile(path) as file:
            return file.load() if len(file) == count else None
    except InputError:
        return None


class _Judge:
    """Compares drawn molecules with the training and validation molecules."""

    def __init__(
        self, training: FileSource, validation: FileSource, bonds: str, pool: WorkerPool
    ) -> None:
        options = with_bonds(make_options(("rates", "geometry"), bonds), bonds)
        self._pool = pool
        self._types = select_types(None, training.path) or frequent_types(training, options, pool)
        self._options = with_types(options, self._types)
        self._reference = _evaluate(training, self._options, pool)
        real = _evaluate(validation, self._options, pool)
        self.real = self._judged(real, None, 0)
        self.description = (
            f"{self._reference.molecules:,} training and {real.molecules:,} validation molecules "
            f"of {training.path.name}"
        )

    def judge(self, molecules: Molecules, choice: SamplerChoice, evaluations: int) -> JudgedSampler:
        """Stability of molecules, and the distances of their geometry."""
        found = _evaluate(_Drawn(molecules), self._options, self._pool)
        return self._judged(found, choice, evaluations)

    def _judged(
        self, found: MoleculeEvaluation, choice: SamplerChoice | None, evaluations: int
    ) -> JudgedSampler:
        molecules, atoms = (found.rates[f"{name}_stability"] for name in ("molecule", "atom"))
        assert molecules is not None and atoms is not None
        distances = _distances(found.distributions, self._reference.distributions, self._types)
        return JudgedSampler(choice, evaluations, molecules, atoms, distances)

    def rank(self, judged: JudgedSampler, last: bool) -> tuple[bool, float, float]:
        """Ascends with the distance of stability from that of the data, then with the others.

        Before the last round, of few molecules, it is that of atoms, which varies less.
        """
        name = "molecule_stability" if last else "atom_stability"
        found, real = (getattr(each, name).value for each in (judged, self.real))
        others = (
            _value(judged.distances[kind]) / max(_value(self.real.distances[kind]), _LEAST_DISTANCE)
            for kind in KINDS
        )
        return not judged.near, abs((found or 0.0) - (real or 0.0)), sum(others)


class _Drawn:
    """Molecules in memory as a `ChunkSource`."""

    def __init__(self, molecules: Molecules) -> None:
        self._molecules = molecules

    def chunks(self) -> Iterator[MoleculeChunk]:
        """Iterate over the molecules in chunks."""
        for start in range(0, len(self._molecules), CHUNK_SIZE):
            which = np.arange(start, min(start + CHUNK_SIZE, len(self._molecules)))
            yield MoleculeChunk(which + 1, self._molecules.select(which))


def _splits(data: Path) -> tuple[FileSource, FileSource]:
    """Training and validation molecules of a file, all of it for both if it has no splits.

    Raises
    ------
    InputError
        It has a test split and no training split.
    """
    training = FileSource(data, "train", limit=_MOST_REAL)
    if not training.has_split("train"):
        if training.has_split("test"):
            raise InputError(
                f"{data} has no training split, and --tune reads no test molecules; name the "
                "training data by --data"
            )
        training = FileSource(data, limit=_MOST_REAL)
    split = "valid" if training.has_split("valid") else training.split
    return training, FileSource(data, split, limit=_MOST_REAL)


def _evaluate(
    source: ChunkSource, options: EvaluationOptions, pool: WorkerPool
) -> MoleculeEvaluation:
    return evaluate_source("molecules", source, options, None, pool)


def _distances(
    source: Distributions | None, target: Distributions | None, types: GeometryTypes
) -> dict[str, Estimate]:
    """Wasserstein distances by kind of geometry."""
    assert source is not None and target is not None
    return {kind: wasserstein_distance(source, target, kind, types) for kind in KINDS}


def _value(estimate: Estimate) -> float:
    """A distance; infinite where molecules have nothing to compare."""
    return math.inf if estimate.value is None else estimate.value
