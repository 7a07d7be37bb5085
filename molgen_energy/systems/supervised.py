"""Training of a network that predicts one configuration from its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.config import Config, resolved
from molgen_energy.data.arrays import ArrayFile
from molgen_energy.data.batches import (
    BatchIndex,
    EpochStarts,
    batches_per_epoch,
    epoch_batches,
    on_device,
)
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.errors import InputError
from molgen_energy.losses import AdaptiveSprings, LossConfig
from molgen_energy.paths import expand_home, portable_path
from molgen_energy.training.channels import FittedWeights
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.plan import planned_values
from molgen_energy.training.task import Auxiliary, mean_loss

_CHUNK = 1024  # samples in an evaluation without gradients


@dataclass(frozen=True)
class Examples:
    """Samples on a device."""

    inputs: Tensor
    """Inputs of the network, (M, …)."""
    targets: Tensor
    """Targets in the shape that the loss takes, (M, N, D)."""

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, which: NDArray[np.int64]) -> Examples:
        """The samples with these indices."""
        index = on_device(which, self.targets.device)
        return Examples(self.inputs[index], self.targets[index])

    def to(self, device: torch.device) -> Examples:
        """The same samples on another device."""
        return Examples(self.inputs.to(device), self.targets.to(device))


def training_indices(file: ArrayFile) -> NDArray[np.int64]:
    """Numbers of the training samples; raises `InputError` where there is none."""
    chosen = file.split_indices("train")
    if not len(chosen):
        raise InputError(f"{file.path} holds no training sample; make it with a larger train share")
    return chosen


class SupervisedTask:
    """Task of a network that predicts targets from inputs, for the training loop.

    Parameters
    ----------
    config
        The run, without `auto`.
    device
        Of data and model.
    file
        The data, with splits `train` and `valid`.
    examples
        Makes inputs and targets from columns of the file.
    model
        The network, called with inputs.
    loss
        Called with the network's output, its examples, and a random integer for each sample,
        (B,) int64, for losses that draw graphs; returns (B,).
    state
        What a checkpoint needs for sampling.

    Raises
    ------
    InputError
        The file has no training sample, or the learning rate is `auto`.
    """

    loss_terms: tuple[str, ...] = ()
    adaptive: AdaptiveSprings | None = None  # such springs need noise levels

    def __init__(
        self,
        config: Config,
        device: torch.device,
        file: ArrayFile,
        examples: Callable[[dict[str, NDArray[Any]]], Examples],
        model: nn.Module,
        loss: Callable[[Tensor, Examples, Tensor], Tensor],
        state: dict[str, Any],
    ) -> None:
        in_train, in_valid = training_indices(file), file.split_indices("valid")
        if config.training.lr == "auto":
            raise InputError("training.lr: auto is not supported here; set a number")
        if config.training.batch_size is None:
            raise InputError(
                "training.pairs_per_batch: only molecules have pairs of atoms; set "
                "training.batch_size"
            )
        planned = planned_values(config.training, len(in_train))
        self.config = config.replaced({"data.path": portable_path(file.path), **planned})
        batch_size = resolved(self.config.training.batch_size)
        assert batch_size is not None
        self._batch_size = batch_size
        self.device = device
        self.model = model.to(device)
        self.auxiliary: Auxiliary | None = None
        self._loss = loss
        self._train = examples(file.select(in_train)).to(device)
        self._valid = examples(file.select(in_valid)).to(device) if len(in_valid) else None
        self.state = state | {
            "data": {
                "source": file.source,
                "training_samples": len(in_train),
                "fingerprint": file.fingerprint(),
            }
        }

    def fit_weights(self, checkpoint: Checkpoint) -> FittedWeights:
        """The EMA weights of a checkpoint, of the same names and shapes."""
        return FittedWeights(checkpoint.tensors("ema", self.model))

    @property
    def starts(self) -> EpochStarts:
        """The first step of each pass over the training samples."""
        return EpochStarts(batches_per_epoch(len(self._train), self._batch_size))

    def epoch(self, epoch: int) -> Sequence[BatchIndex]:
        """The batches of an epoch; they depend on the seed and `epoch` alone."""
        sizes = np.full(len(self._train), self._train.targets.shape[1])
        batches = epoch_batches(sizes, self._batch_size, self.config.training.seed, epoch)
        return [BatchIndex(0, which, sizes[which]) for which in batches]

    def loss(
        self, model: nn.Module, batch: BatchIndex, seed: int, rank: int = 0, world: int = 1
    ) -> dict[str, Tensor]:
        """The loss of process `rank`'s shard of a batch, (B,), as `loss`.

        Random numbers depend on the seed and the place of a sample in the whole batch.
        """
        places = torch.arange(len(batch), device=self.device)[rank::world]
        examples = self._train.batch(batch.shard(rank, world).which)
        return {"loss": self._loss_of(model, examples, RandomNumbers(seed, places, len(batch)))}

    def _loss_of(self, model: nn.Module, examples: Examples, random: RandomNumbers) -> Tensor:
        return self._loss(model(examples.inputs), examples, random.integers(Stream.EDGES))

    @property
    def validation_samples(self) -> int:
        """Number of validation samples; 0 without any."""
        return 0 if self._valid is None else len(self._valid)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean loss over the validation samples, None without any; processes share the work."""
        if self._valid is None:
            return None
        valid, count = self._valid, len(self._valid)

        def losses(start: int) -> Tensor:
            which = np.arange(start, min(start + _CHUNK, count))
            numbers = torch.from_numpy(which).to(self.device)
            random = RandomNumbers(self.config.training.seed, numbers)
            return self._loss_of(model, valid.batch(which), random)

        return mean_loss(range(0, count, _CHUNK), losses, count, self.device)

    def close(self) -> None:
        """Nothing to close: the data are in memory."""


def data_path(config: Config, system: str) -> Path:
    """The data file of a run; `InputError` without one."""
    if config.data.path is None:
        raise InputError(
            f"name the data with --data FILE; make them with `molgen-energy preprocess {system}`"
        )
    return expand_home(config.data.path)


def check_loss(loss: LossConfig, inputs: frozenset[str], samples: str) -> None:
    """Raise `InputError` if a loss requires inputs that the samples do not have.

    Parameters
    ----------
    loss
        The section, with `auto` or without.
    inputs
        Those of `Loss.requires` that the samples have.
    samples
        Their name, for the message.
    """
    missing = sorted(loss.requires - inputs)
    if missing:
        raise InputError(
            f"loss {loss.name}{loss.describe()}: {samples} have no {' and no '.join(missing)}; "
            "choose a loss, springs and edges that do not require them"
        )


def without_unknown_loss_keys(
    values: Mapping[str, Any], registry: Mapping[str, Any]
) -> dict[str, Any]:
    """Raw values of a configuration, without the keys of `loss` that the named loss does not have.

    Until format 2 of checkpoints, one section held the keys of all losses.
    """
    loss = values.get("loss")
    if not isinstance(loss, Mapping) or loss.get("name") not in registry:
        return dict(values)
    known = registry[loss["name"]].Config.model_fields
    return {**values, "loss": {key: value for key, value in loss.items() if key in known}}


class Predictor:
    """The network of a checkpoint with its EMA weights.

    Parameters
    ----------
    checkpoint
        Its weights are loaded.
    model
        The configured network.
    device
        To run on.
    batch_size
        Samples in an evaluation of the network; None is 1024.

    Raises
    ------
    InputError
        The checkpoint is damaged or of another model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        device: torch.device,
        batch_size: int | None = None,
    ) -> None:
        checkpoint.load_weights(model, "ema")
        self._path = checkpoint.path
        self._model, self._device = model.to(device).eval(), device
        self._batch_size = batch_size or _CHUNK

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, advance: Callable[[int, float], None] = lambda samples, share: None
    ) -> Tensor:
        """The network's output for inputs (M, …), on the CPU; `advance` as in `SamplingCallback`.

        Raises
        ------
        InputError
            An output is not finite.
        """
        outputs = []
        for chunk in torch.split(inputs, self._batch_size):
            outputs.append(self._model(chunk.to(self._device)).cpu())
            advance(len(chunk), 1.0)
        output = torch.cat(outputs)
        diverged = int((~torch.isfinite(output).flatten(1).all(dim=1)).sum())
        if diverged:
            raise InputError(
                f"{self._path}: the network's output for {diverged:,} of {len(output):,} samples "
                "is not finite; training diverged, train again with a lower --lr"
            )
        return output
