"""Molecules: what the trainer needs to train on them, and how a checkpoint generates them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.data.batches import (
    Batch,
    MoleculeBatch,
    ResidentData,
    ResidentMolecules,
    StreamedData,
    TrainingData,
)
from molgen_energy.data.hdf5 import DatasetSummary, MoleculeFile
from molgen_energy.data.molecules import Molecules, batch_by_size, offsets_from_sizes
from molgen_energy.diffusion.geometry import random_rotations, rotated
from molgen_energy.diffusion.noise import SeededNoise
from molgen_energy.diffusion.prediction import VelocityPrediction
from molgen_energy.diffusion.process import PROCESSES, Share, Terms, Times
from molgen_energy.diffusion.samplers import DEFAULT_SAMPLERS, build_sampler
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.distributed import all_reduce_sum, broadcast, local_world_size, rank, world_size
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError
from molgen_energy.losses import (
    POINTWISE_LOSSES,
    CompleteEdges,
    PositionLoss,
    mean_stiffness,
)
from molgen_energy.models import MODELS
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.base import build_with_seed
from molgen_energy.systems.energy import build_edges, build_energy, resolve_scale
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.encoding import MoleculeEncoding, vocabulary
from molgen_energy.systems.molecules.loss_inputs import LossInputs, needs_bonds, table_bytes
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.devices import available_memory, lower_precision

_SAMPLE = 100_000  # streamed molecules that means are taken over
_SMALL = 256_000_000  # bytes of training molecules that always fit


class Defaults(NamedTuple):
    """Learning rate and position weight w that `auto` stands for, w for springs of mean 1."""

    lr: float
    position_weight: float


# Kaba et al., NeurIPS 2025, for Lennard-Jones springs their code; for 9 layers of width 256 and
# batches of 512 (GDM) and 400 (EDM). There w = 0.05 (EDM, inverse square: 0.1) goes with springs
# whose mean on QM9's positions is 3.25 (exponential, c = 42), 1.87 (inverse, 5), 2.81 (inverse
# square, 16), 1.94 (Lennard-Jones, 9) and 1 (constant), and with features averaged over 29 padded
# atoms where we take the 18 real ones, a factor of 1.6; the product of the three stands here.
PAPER = {
    "gdm": {
        ("energy", "exponential"): Defaults(4e-4, 0.26),
        ("energy", "inverse"): Defaults(7e-4, 0.15),
        ("energy", "inverse_square"): Defaults(6e-4, 0.23),
        ("energy", "constant"): Defaults(9e-4, 0.08),
        ("energy", "lennard_jones"): Defaults(1.5e-3, 0.15),
        ("mse", None): Defaults(1e-3, 1.5),
        ("mae", None): Defaults(1e-3, 0.8),
        ("kabsch", None): Defaults(8e-4, 0.8),
    },
    "edm": {
        ("energy", "exponential"): Defaults(1e-4, 0.26),
        ("energy", "inverse"): Defaults(1e-4, 0.15),
        ("energy", "inverse_square"): Defaults(1e-4, 0.45),
        ("energy", "constant"): Defaults(1e-4, 0.08),
        ("energy", "lennard_jones"): Defaults(1.6e-4, 0.15),
        ("mse", None): Defaults(3e-4, 1.0),
        ("mae", None): Defaults(3e-4, 1.0),
        ("kabsch", None): Defaults(3e-4, 0.8),
    },
}
PAPER["gdm_pairs"] = PAPER["gdm"]  # not the paper's; the nearest


def build_model(config: MoleculeConfig, encoding: MoleculeEncoding) -> nn.Module:
    """The configured network, its weights drawn with the run's seed; what it gives is noise."""
    network = build_with_seed(
        config.training.seed,
        lambda: MODELS[config.model.name](
            features=encoding.features,
            layers=config.model.layers,
            width=config.model.width,
            normalization=config.model.normalization,
            low_precision=config.training.low_precision is True,
        ),
    )
    if config.diffusion.prediction == "velocity":
        schedule = PolynomialSchedule(config.diffusion.steps, config.diffusion.precision)
        return VelocityPrediction(network, schedule)
    return network


def build_loss(config: MoleculeConfig, encoding: MoleculeEncoding) -> PositionLoss:
    """The configured loss on positions; needs a config without `auto`."""
    section = config.loss
    if section.name == "energy":
        assert not isinstance(section.springs.scale, str)
        edges = build_edges(section.edges, config.training.seed)
        return build_energy(section.springs, section.springs.scale, edges)
    # One mean over positions and features together, of which this is the positions' part.
    return POINTWISE_LOSSES[section.name](channels=3 + encoding.features)


def _encoding(config: MoleculeConfig, elements: Sequence[int]) -> MoleculeEncoding:
    diffusion = config.diffusion
    return MoleculeEncoding(
        tuple(elements), diffusion.position_scale, diffusion.type_scale, diffusion.charge_scale
    )


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for products in bfloat16, which make them the faster ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Only tiles (AMX) make bfloat16 faster: without AVX512_BF16 it is emulated, and with it
        # alone products take 1.7 times as long as in float32 (Xeon, PyTorch 2.13).
        native = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return native is not None and bool(native())
    return False


class _Split(NamedTuple):
    """Molecules on the device and what the loss is called with besides them."""

    data: ResidentMolecules
    inputs: LossInputs


class MoleculeTask:
    """Training molecules with a diffusion model, as the training loop wants it.

    Parameters
    ----------
    config
        The run; what is `auto` is settled here and stands in `self.config`.
    device
        Where data and model live.
    progress
        Told how many of how many molecules are prepared, where that takes long.

    Raises
    ------
    InputError
        The data is missing or broken, has no molecule to train on, or holds an element outside
        the configured vocabulary.
    """

    parts: tuple[str, ...] = ("position_loss", "feature_loss")

    def __init__(
        self,
        config: MoleculeConfig,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.device = device
        path = Path(config.data.path) if config.data.path else bundled_sample()
        with ExitStack() as stack:
            file = stack.enter_context(MoleculeFile(path))
            self.source = file.source
            summary = file.summarize()
            elements = _elements(config, summary, file)
            if not summary.training_molecules:
                raise InputError(
                    f"{path} holds no training molecule; make it with a larger train share"
                )
            self.encoding = _encoding(config, elements)
            # Every loss needs the same inputs whatever its scale.
            unscaled = build_loss(config.replaced({"loss.springs.scale": 1.0}), self.encoding)
            config = config.replaced(
                {"data.in_memory": broadcast(_in_memory(config, summary, unscaled, device))}
            )
            self._open(config, file, unscaled, progress)
            # Processes on unlike machines must not settle it differently.
            self.config = broadcast(self._settle(config))
            if self.config.training.low_precision is True:
                lower_precision(device)
            if not config.data.in_memory:
                stack.pop_all()  # read until `close`
        self._schedule = PolynomialSchedule(
            self.config.diffusion.steps, self.config.diffusion.precision
        )
        weight = self.config.loss.position_weight
        assert not isinstance(weight, str)
        self._objective = PROCESSES[self.config.diffusion.process](
            self._schedule,
            build_loss(self.config, self.encoding),
            weight,
            self.config.diffusion.position_scale,
            Times(self.config.diffusion.time_power, self.config.diffusion.spread_times),
        )
        self.model = build_model(self.config, self.encoding).to(device)
        self.state: dict[str, Any] = {
            "elements": [symbol(z) for z in elements],
            "size_histogram": summary.size_histogram,
            "data": {
                "source": self.source,
                "training_samples": summary.training_molecules,
                "fingerprint": summary.fingerprint,
            },
        }

    def _open(
        self,
        config: MoleculeConfig,
        file: MoleculeFile,
        loss: PositionLoss,
        progress: Callable[[int, int], None],
    ) -> None:
        """Make training data and validation molecules, with what the loss needs."""
        training, lookup = config.training, self.encoding.type_lookup()
        bonds = needs_bonds(loss)
        columns = ("bonds",) if bonds and "bonds" in file.columns else ()

        def split(
            molecules: Molecules,
            numbers: NDArray[np.int64],
            ranks: NDArray[np.int64] | None,
            **told: Any,
        ) -> _Split:
            name = str(file.path)
            inputs = LossInputs(loss, molecules, self.device, name, numbers, ranks, **told)
            return _Split(ResidentMolecules(molecules, lookup, self.device), inputs)

        def window(
            molecules: Molecules,
            numbers: NDArray[np.int64],
            ranks: NDArray[np.int64],
            go_on: Callable[[], None],
        ) -> _Split:
            return split(molecules, numbers, ranks, go_on=go_on)

        self._train: TrainingData[_Split]
        if config.data.in_memory:
            numbers = file.split_indices("train")
            whole = split(file.read(numbers, columns), numbers, None, progress=progress)
            self._train = ResidentData(whole, whole.data.sizes, training.batch_size, training.seed)
        else:
            self._train = StreamedData(
                file,
                window,
                molecules=config.data.window,
                batch_size=training.batch_size,
                seed=training.seed,
                bonds=bonds,
            )
        # Files are often sorted by size, so the molecules to validate on are drawn at random.
        in_valid = file.split_indices("valid")
        order = np.random.default_rng(training.seed).permutation(len(in_valid))
        in_valid = in_valid[order[: training.validation_molecules]]
        self._valid: _Split | None = None
        if len(in_valid):
            ascending = np.argsort(in_valid)
            molecules = file.read(in_valid[ascending], columns).select(np.argsort(ascending))
            self._valid = split(molecules, in_valid, None, progress=progress)

    def _settle(self, config: MoleculeConfig) -> MoleculeConfig:
        """Replace every `auto` by what it stands for.

        What is a mean over the training molecules is one over a sample of them where they are
        streamed: runs of the file, chosen by the seed, of 100,000 molecules or less.
        """
        springs, training = config.loss.springs, config.training
        weight, family, stiffness = config.loss.position_weight, None, 1.0
        changes: dict[str, Any] = {"data.elements": [symbol(z) for z in self.encoding.elements]}
        if config.data.path is not None:  # a run is resumed from any folder
            changes["data.path"] = str(Path(config.data.path).resolve())
        if config.loss.name == "energy":
            family = springs.family
            if isinstance(springs.scale, str) or weight == "auto":  # a resumed run has both
                sample = self._train.sample(_SAMPLE)
                complete = build_energy(springs, 1.0, CompleteEdges())
                stiffness = mean_stiffness(complete, self._pieces(sample))
            mean = stiffness
            scale = resolve_scale(springs, lambda: mean)
            changes["loss.springs.scale"] = scale
            stiffness *= scale
            if weight == "auto" and config.loss.edges.kind != "complete":
                stiffness *= self._share_of_springs(config, sample)
        if "auto" in (weight, training.lr):
            # The registries and the configuration allow no other names than are here.
            paper = PAPER[config.model.name][config.loss.name, family]
            if weight == "auto":
                changes["loss.position_weight"] = paper.position_weight / stiffness
            if training.lr == "auto":
                changes["training.lr"] = paper.lr
        if training.low_precision == "auto":
            changes["training.low_precision"] = has_native_bfloat16(self.device)
        return config.replaced(changes)

    def _share_of_springs(self, config: MoleculeConfig, sample: _Split) -> float:
        """Energy of the configured edges for small random errors, as a share of all pairs'."""
        generator = torch.Generator().manual_seed(config.training.seed)
        totals = []
        configured = build_edges(config.loss.edges, config.training.seed)
        for edges in (configured, CompleteEdges()):
            energy, total = build_energy(config.loss.springs, 1.0, edges), 0.0
            for piece in self._pieces(sample):
                stiffness = energy.total_stiffness(**piece, generator=generator).total
                total += float((stiffness / piece["mask"].sum(dim=1)).sum())
            totals.append(total)
        return totals[0] / totals[1] if all(totals) else 1.0

    def _pieces(self, split: _Split) -> Iterator[dict[str, Any]]:
        """Molecules in pieces, as arguments of `total_stiffness`."""
        for which in batch_by_size(split.data.sizes, pairs=1_000_000):
            positions, types, mask = split.data.batch(which)
            features = self.encoding.encode(positions, types, mask)[..., 3:]
            yield {
                "target": positions.double(),
                "mask": mask,
                **split.inputs.of(which, features.double()),
            }

    @property
    def batches_per_epoch(self) -> int:
        """Steps that show every training molecule once."""
        return self._train.batches_per_epoch

    @property
    def seconds_waited(self) -> float:
        """Time that steps have waited for molecules to be read."""
        return self._train.seconds_waited

    def epoch(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch; depends on the seed and `epoch` alone."""
        return self._train.epoch(epoch)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        rank: int = 0,
        world: int = 1,
    ) -> Terms:
        """The objective of the molecules that process `rank` of `world` takes of a batch, (B,).

        What is random is drawn for the whole batch, so that all processes together do what one
        would do.

        Raises
        ------
        InputError
            The molecules are read only now, and the file breaks off or is damaged.
        """
        augment = self.config.training.augment_rotations
        split = self._train.window(batch.window)
        share = Share(len(batch), int(batch.sizes.max()), rank, world)
        own = batch.share(rank, world)
        return self._loss(model, split, own.which, generator, augment, share)

    def molecules(self, batch: Batch) -> MoleculeBatch:
        """The molecules of a batch, padded."""
        return self._train.window(batch.window).data.batch(batch.which)

    def close(self) -> None:
        """Stop reading, where training molecules are streamed: they are not to be had any more."""
        self._train.close()

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean objective over validation molecules, at the same noise each time; None without.

        Several processes share the work.
        """
        if self._valid is None:
            return None
        training = self.config.training
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        pieces = list(batch_by_size(self._valid.data.sizes, pairs=training.batch_size * 400))
        for number in range(rank(), len(pieces), world_size()):
            which = pieces[number]
            # Each piece has its own noise, whoever takes it.
            generator = torch.Generator(self.device).manual_seed(training.seed + number)
            share = Share(len(which), int(self._valid.data.sizes[which].max()))
            terms = self._loss(model, self._valid, which, generator, False, share)
            total += terms.total.double().sum()
        return float(all_reduce_sum(total)) / len(self._valid.data)

    def _loss(
        self,
        model: nn.Module,
        split: _Split,
        which: NDArray[np.int64],
        generator: torch.Generator,
        augment: bool,
        share: Share,
    ) -> Terms:
        positions, types, mask = split.data.batch(which)
        if augment:
            rotations = random_rotations(share.samples, generator, positions)
            rotations = rotations[share.first :: share.every]
            positions = rotated(positions, rotations)
        clean = self.encoding.encode(positions, types, mask)
        given = split.inputs.of(which, clean[..., 3:])
        return self._objective(model, clean, mask, generator, given, share)


def _in_memory(
    config: MoleculeConfig, summary: DatasetSummary, loss: PositionLoss, device: torch.device
) -> bool:
    """Whether training molecules stay in memory; `auto` wants them to take a quarter at most.

    What is small stays there in any case, so that a run does not depend on what else is running.
    """
    if config.data.in_memory != "auto":
        return config.data.in_memory
    available = available_memory(device)
    if available is None:
        return True
    atoms = sum(size * count for size, count in summary.size_histogram.items())
    molecules, largest = summary.training_molecules, max(summary.size_histogram)
    # Positions and a type for each atom; sizes, offsets and numbers in the file for each molecule.
    needed = 13 * atoms + 40 * molecules + table_bytes(loss, molecules, largest)
    return needed <= _SMALL or 4 * needed * local_world_size() <= available


def _elements(
    config: MoleculeConfig, summary: DatasetSummary, file: MoleculeFile
) -> tuple[int, ...]:
    """The vocabulary; every atom of the file must be in it."""
    present = vocabulary(list(summary.first_atoms))
    if config.data.elements == "auto":
        return present
    elements = vocabulary([atomic_number(name) for name in config.data.elements])
    foreign = [(atom, z) for z, atom in summary.first_atoms.items() if z not in elements]
    if foreign:
        atom, z = min(foreign)
        number = int(np.searchsorted(file.offsets, atom, side="right"))
        raise InputError(
            f"{file.path}: molecule {number} holds {symbol(z)}, which is outside the vocabulary "
            f"{', '.join(symbol(z) for z in elements)}; add it with --set data.elements=[...]"
        )
    return elements


class MoleculeGenerator:
    """Draws molecules from a checkpoint; needs no data set.

    Molecule i of a seed is the same whichever batch it is drawn in, to float tolerance.

    Parameters
    ----------
    checkpoint
        Of a run on molecules; its EMA weights are used.
    device
        Where to run the network.
    seed
        Together with a molecule's number it settles its size and all its noise.
    sizes
        Fewest and most atoms of a molecule, each size in the range as frequent as the others;
        None draws from the training molecules' histogram.
    low_precision
        Run the work on pairs in bfloat16.
    sampler
        One of `SAMPLERS` that serves the process; None takes the process's own.
    steps
        Of the sampler, at most those of the training; None takes those that shipped weights
        were judged with, else all.
    eta
        Noise of the sampler `ddim`, 0 to 1; None elsewhere.
    spacing
        Of the levels that the sampler visits, one of `SPACINGS`; None takes that which shipped
        weights were judged with, else the process's own.

    Raises
    ------
    InputError
        The checkpoint is damaged or of another model, a size is below 1, or the sampler does not
        serve.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        seed: int = 0,
        sizes: tuple[int, int] | None = None,
        low_precision: bool = False,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        spacing: str | None = None,
    ) -> None:
        self.config, state = checkpoint.config_as(MoleculeConfig), checkpoint.state
        if not {"elements", "size_histogram"} <= state.keys():
            raise InputError(f"{checkpoint.path} is no checkpoint of a run on molecules")
        if sizes is not None and not 1 <= sizes[0] <= sizes[1]:
            raise InputError(f"sizes {sizes[0]}-{sizes[1]}: expected 1 or more atoms, ascending")
        elements = [atomic_number(name) for name in state["elements"]]
        self.encoding = _encoding(self.config, elements)
        if low_precision:
            lower_precision(device)
        config = self.config.replaced({"training.low_precision": low_precision})
        self.model = build_model(config, self.encoding)
        checkpoint.load_weights(self.model, "ema")
        self.model.to(device).eval()
        self.checkpoint, self.device, self.seed = checkpoint, device, seed
        self.n_atoms, self.low_precision = sizes, low_precision
        histogram = (
            state["size_histogram"]
            if sizes is None
            else dict.fromkeys(range(sizes[0], sizes[1] + 1), 1)
        )
        self._sizes = torch.tensor(list(histogram))
        counts = torch.tensor(list(histogram.values()), dtype=torch.float64)
        self._cumulated = counts.cumsum(0) / counts.sum()
        schedule = PolynomialSchedule(config.diffusion.steps, config.diffusion.precision)
        process = config.diffusion.process
        self.sampler_name = DEFAULT_SAMPLERS[process] if sampler is None else sampler
        judged_with = state.get("sampling", {})
        steps = judged_with.get("steps") if steps is None else steps
        spacing = judged_with.get("spacing") if spacing is None else spacing
        self.sampler = build_sampler(schedule, process, self.sampler_name, steps, eta, spacing)

    def fingerprint(self) -> str:
        """Of everything in the checkpoint that the molecules depend on, 32 hexadecimal digits."""
        state = self.checkpoint.state
        digest = hashlib.sha256(self.config.to_yaml().encode())
        digest.update(repr((state["elements"], list(state["size_histogram"].items()))).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def sizes(self, numbers: Tensor) -> Tensor:
        """Atoms of the molecules with the given numbers, (B,)."""
        uniform = SeededNoise(self.seed, numbers).uniform().cpu().double()
        place = torch.searchsorted(self._cumulated, uniform, right=True)
        return self._sizes[place.clamp(max=len(self._sizes) - 1)]

    @torch.no_grad()
    def draw(self, numbers: Tensor, advance: Any = lambda: None) -> Molecules:
        """The molecules with the given numbers (B,), in their order.

        `advance` is called behind each evaluation of the network. Positions that are not finite
        (the network diverged) are returned as they are.
        """
        sizes = self.sizes(numbers).to(self.device)
        largest = int(sizes.max())
        mask = torch.arange(largest, device=self.device)[None] < sizes[:, None]
        noise = SeededNoise(self.seed, numbers.to(self.device))
        clean = self.sampler.sample(self.model, noise, mask, 3 + self.encoding.features, advance)
        positions, atomic_numbers = self.encoding.decode(clean, mask)
        return Molecules(
            positions[mask].cpu().numpy().astype(np.float32),
            atomic_numbers[mask].cpu().numpy(),
            offsets_from_sizes(sizes.cpu().numpy()),
        )
