"""Molecules: what the trainer needs to train on them, and how a checkpoint generates them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.config import Config
from molgen_energy.data.batches import (
    ResidentMolecules,
    batches_per_epoch,
    epoch_batches,
)
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules, by_size, offsets_of
from molgen_energy.diffusion.encoding import MoleculeEncoding, vocabulary
from molgen_energy.diffusion.noise import SeededNoise
from molgen_energy.diffusion.process import DiffusionObjective, Terms
from molgen_energy.diffusion.samplers import AncestralSampler
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError
from molgen_energy.losses import Loss, MeanSquaredError, PairwiseEnergy, mean_stiffness
from molgen_energy.models import MODELS
from molgen_energy.models.geometry import random_rotations
from molgen_energy.resources import bundled_sample
from molgen_energy.training.checkpoint import Checkpoint


class Defaults(NamedTuple):
    """Learning rate and position weight w that `auto` stands for, w for springs of mean 1."""

    lr: float
    position_weight: float


# Kaba et al., NeurIPS 2025, for GDM with 9 layers of width 256 and batches of 512. There w = 0.05
# goes with springs whose mean on QM9's positions is 3.25 (exponential, c = 42), 1.87 (inverse, 5),
# 2.81 (inverse square, 16) and 1 (constant), and with features averaged over 29 padded atoms where
# we take the 18 real ones, a factor of 1.6; the product of the three stands here.
PAPER = {
    ("energy", "exponential"): Defaults(4e-4, 0.26),
    ("energy", "inverse"): Defaults(7e-4, 0.15),
    ("energy", "inverse_square"): Defaults(6e-4, 0.23),
    ("energy", "constant"): Defaults(9e-4, 0.08),
    ("mse", None): Defaults(1e-3, 1.5),
}


def build_model(config: Config, encoding: MoleculeEncoding) -> nn.Module:
    """The configured network, its weights drawn with the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return MODELS[config.model.name](
            features=encoding.features,
            layers=config.model.layers,
            width=config.model.width,
            low_precision=config.training.low_precision is True,
        )


def build_loss(config: Config, encoding: MoleculeEncoding) -> Loss:
    """The configured loss on positions; needs a config without `auto`."""
    if config.loss.name == "mse":
        return MeanSquaredError(channels=3 + encoding.features)
    scale = config.loss.springs.scale
    assert not isinstance(scale, str)
    return PairwiseEnergy(config.loss.springs.family, scale)


def _encoding(config: Config, elements: Sequence[int]) -> MoleculeEncoding:
    diffusion = config.diffusion
    return MoleculeEncoding(
        tuple(elements), diffusion.position_scale, diffusion.type_scale, diffusion.charge_scale
    )


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by instructions of the device rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # AVX-512 without its bfloat16 part means a slow emulation.
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return native is not None and bool(native())
    return False


class MoleculeTask:
    """Training molecules with a diffusion model, as the training loop wants it.

    Parameters
    ----------
    config
        The run; what is `auto` is settled here and stands in `self.config`.
    device
        Where data and model live.

    Raises
    ------
    InputError
        The data is missing or broken, has no molecule to train on, or holds an element outside
        the configured vocabulary.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        path = Path(config.data.path) if config.data.path else bundled_sample()
        with MoleculeFile(path) as file:
            self.source = file.source
            everything = file.load()
            train = everything.select(file.members("train"))
            valid = everything.select(file.members("valid"))
        elements = _elements(config, everything, path)
        if len(train) == 0:
            raise InputError(
                f"{path} holds no training molecule; make it with a larger train share"
            )
        self.encoding = _encoding(config, elements)
        lookup = self.encoding.type_lookup()
        self._train = ResidentMolecules(train, lookup, device)
        # Files are often sorted by size, so the molecules to validate on are drawn at random.
        order = np.random.default_rng(config.training.seed).permutation(len(valid))
        valid = valid.select(order[: config.training.validation_molecules])
        self._valid = ResidentMolecules(valid, lookup, device) if len(valid) else None
        self.config = self._settle(config)
        self._schedule = PolynomialSchedule(
            self.config.diffusion.steps, self.config.diffusion.precision
        )
        weight = self.config.loss.position_weight
        assert not isinstance(weight, str)
        self._objective = DiffusionObjective(
            self._schedule,
            build_loss(self.config, self.encoding),
            weight,
            self.config.diffusion.position_scale,
        )
        self.model = build_model(self.config, self.encoding).to(device)
        sizes, counts = np.unique(train.sizes, return_counts=True)
        self.state: dict[str, Any] = {
            "elements": [symbol(z) for z in elements],
            "size_histogram": dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
            "data": {
                "source": self.source,
                "training_molecules": len(train),
                "fingerprint": _fingerprint(train),
            },
        }

    def _settle(self, config: Config) -> Config:
        """Replace every `auto` by what it stands for."""
        springs, training = config.loss.springs, config.training
        weight, family, stiffness = config.loss.position_weight, None, 1.0
        changes: dict[str, Any] = {"data.elements": [symbol(z) for z in self.encoding.elements]}
        if config.data.path is not None:  # a run is resumed from any folder
            changes["data.path"] = str(Path(config.data.path).resolve())
        if config.loss.name == "energy":
            family = springs.family
            if "auto" in (springs.scale, weight):  # a resumed run has both settled
                stiffness = mean_stiffness(family, self._pieces())
            scale = 1 / stiffness if springs.scale == "auto" else springs.scale
            changes["loss.springs.scale"] = scale
            stiffness *= scale
        if "auto" in (weight, training.lr):
            if (config.loss.name, family) not in PAPER:
                raise InputError(
                    f"the paper gives no training.lr and loss.position_weight for "
                    f"{config.loss.name} {family or ''}; set both"
                )
            paper = PAPER[config.loss.name, family]
            if weight == "auto":
                changes["loss.position_weight"] = paper.position_weight / stiffness
            if training.lr == "auto":
                changes["training.lr"] = paper.lr
        if training.low_precision == "auto":
            changes["training.low_precision"] = has_native_bfloat16(self.device)
        return config.replaced(changes)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for which in by_size(self._train.sizes, pairs=1_000_000):
            batch = self._train.batch(which)
            yield batch.positions.cpu(), batch.mask.cpu()

    @property
    def batches_per_epoch(self) -> int:
        """Steps that show every training molecule once."""
        return batches_per_epoch(len(self._train), self.config.training.batch_size)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch, as molecule numbers; depends on the seed and `epoch` alone."""
        training = self.config.training
        return epoch_batches(self._train.sizes, training.batch_size, training.seed, epoch)

    def loss(self, model: nn.Module, which: NDArray[np.int64], generator: torch.Generator) -> Terms:
        """The objective on training molecules, each part (B,)."""
        augment = self.config.training.augment_rotations
        return self._loss(model, self._train, which, generator, augment)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean objective over validation molecules, at the same noise each time; None without."""
        if self._valid is None:
            return None
        training = self.config.training
        generator = torch.Generator(self.device).manual_seed(training.seed)
        total = 0.0
        for which in by_size(self._valid.sizes, pairs=training.batch_size * 400):
            total += float(self._loss(model, self._valid, which, generator, False).total.sum())
        return total / len(self._valid)

    def _loss(
        self,
        model: nn.Module,
        data: ResidentMolecules,
        which: NDArray[np.int64],
        generator: torch.Generator,
        augment: bool,
    ) -> Terms:
        positions, types, mask = data.batch(which)
        if augment:
            rotations = random_rotations(len(which), generator, positions)
            positions = positions @ rotations.transpose(1, 2)
        clean = self.encoding.encode(positions, types, mask)
        return self._objective(model, clean, mask, generator)


def _elements(config: Config, molecules: Molecules, path: Path) -> tuple[int, ...]:
    """The vocabulary; every atom of the file must be in it."""
    present = vocabulary(np.unique(molecules.atomic_numbers).tolist())
    if config.data.elements == "auto":
        return present
    elements = vocabulary([atomic_number(name) for name in config.data.elements])
    foreign = np.flatnonzero(~np.isin(molecules.atomic_numbers, elements))
    if len(foreign):
        number = int(np.searchsorted(molecules.offsets, foreign[0], side="right"))
        raise InputError(
            f"{path}: molecule {number} holds "
            f"{symbol(int(molecules.atomic_numbers[foreign[0]]))}, which is outside the vocabulary "
            f"{', '.join(symbol(z) for z in elements)}; add it with --set data.elements=[...]"
        )
    return elements


def _fingerprint(molecules: Molecules) -> str:
    digest = hashlib.sha256()
    for array in (molecules.offsets, molecules.atomic_numbers, molecules.positions):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


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

    Raises
    ------
    InputError
        The checkpoint is damaged or of another model, or a size is below 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        seed: int = 0,
        sizes: tuple[int, int] | None = None,
        low_precision: bool = False,
    ) -> None:
        config, state = checkpoint.config, checkpoint.state
        missing = [key for key in ("elements", "size_histogram") if key not in state]
        if config.system != "molecules" or missing:
            raise InputError(f"{checkpoint.path} is no checkpoint of a run on molecules")
        if sizes is not None and not 1 <= sizes[0] <= sizes[1]:
            raise InputError(f"sizes {sizes[0]}-{sizes[1]}: expected 1 or more atoms, ascending")
        elements = [atomic_number(name) for name in state["elements"]]
        self.encoding = _encoding(config, elements)
        config = config.replaced({"training.low_precision": low_precision})
        self.model = build_model(config, self.encoding)
        checkpoint.load_weights(self.model, "ema")
        self.model.to(device).eval()
        self.device = device
        self.seed = seed
        histogram = (
            state["size_histogram"]
            if sizes is None
            else dict.fromkeys(range(sizes[0], sizes[1] + 1), 1)
        )
        self._sizes = torch.tensor(list(histogram))
        counts = torch.tensor(list(histogram.values()), dtype=torch.float64)
        self._cumulated = counts.cumsum(0) / counts.sum()
        schedule = PolynomialSchedule(config.diffusion.steps, config.diffusion.precision)
        self._sampler = AncestralSampler(schedule)

    @property
    def steps(self) -> int:
        """Network evaluations for each molecule."""
        return self._sampler.evaluations

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
        clean = self._sampler.sample(self.model, noise, mask, 3 + self.encoding.features, advance)
        positions, atomic_numbers = self.encoding.decode(clean, mask)
        return Molecules(
            positions[mask].cpu().numpy().astype(np.float32),
            atomic_numbers[mask].cpu().numpy(),
            offsets_of(sizes.cpu().numpy()),
        )
