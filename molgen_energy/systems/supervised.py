"""Training a network that predicts one configuration for given conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.config import Config
from molgen_energy.data.arrays import ArrayFile
from molgen_energy.data.batches import Batch, batches_per_epoch, epoch_batches
from molgen_energy.distributed import all_reduce_sum, rank, world_size
from molgen_energy.errors import InputError
from molgen_energy.training.checkpoint import Checkpoint

_DRAWS = 1 << 62  # losses take them modulo what they choose from
_PIECE = 1024  # samples at once where no gradient is taken


@dataclass(frozen=True)
class Examples:
    """Samples on a device, in their order."""

    inputs: Tensor
    """What the network is given, (M, …)."""
    targets: Tensor
    """What it should predict, in the shape that the loss takes, (M, N, D)."""

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, which: NDArray[np.int64]) -> Examples:
        """Some of them."""
        index = torch.from_numpy(which).to(self.targets.device)
        return Examples(self.inputs[index], self.targets[index])

    def to(self, device: torch.device) -> Examples:
        """The same on another device."""
        return Examples(self.inputs.to(device), self.targets.to(device))


class SupervisedTask:
    """What the training loop needs where a network predicts targets from inputs.

    Parameters
    ----------
    config
        The run, without `auto`.
    device
        Where data and model live.
    file
        The data; its training samples are trained on, its validation samples validated on.
    examples
        Inputs and targets of some columns of the file.
    model
        The network, called with inputs.
    loss
        Called with the network's output, the examples that it is of, and a random number of each,
        (B,) int64, for losses that draw; returns (B,).
    state
        What a checkpoint needs for sampling.

    Raises
    ------
    InputError
        The file has no training sample, or the learning rate is `auto`.
    """

    parts: tuple[str, ...] = ()

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
        in_train, in_valid = file.split_indices("train"), file.split_indices("valid")
        if not len(in_train):
            raise InputError(
                f"{file.path} holds no training sample; make it with a larger train share"
            )
        if config.training.lr == "auto":
            raise InputError("training.lr: auto stands for nothing here; give a number")
        self.config = config.replaced({"data.path": str(file.path.resolve())})
        self.device = device
        self.model = model.to(device)
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

    @property
    def batches_per_epoch(self) -> int:
        """Steps that show every training sample once."""
        return batches_per_epoch(len(self._train), self.config.training.batch_size)

    def epoch(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch; depends on the seed and `epoch` alone."""
        training = self.config.training
        sizes = np.full(len(self._train), self._train.targets.shape[1])
        batches = epoch_batches(sizes, training.batch_size, training.seed, epoch)
        return [Batch(0, which, sizes[which]) for which in batches]

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        generator: torch.Generator,
        rank: int = 0,
        world: int = 1,
    ) -> tuple[Tensor, ...]:
        """The loss of the samples that process `rank` of `world` takes of a batch, (B,).

        What is random is drawn for the whole batch, so that all processes together do what one
        would do.
        """
        draws = _draws(len(batch), generator)[rank::world]
        examples = self._train.batch(batch.share(rank, world).which)
        return (self._loss(model(examples.inputs), examples, draws),)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean loss over the validation samples; None without. Several processes share the work."""
        if self._valid is None:
            return None
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        pieces = range(0, len(self._valid), _PIECE)
        for number in range(rank(), len(pieces), world_size()):
            which = np.arange(len(self._valid))[pieces[number] :][:_PIECE]
            generator = torch.Generator(self.device)
            generator.manual_seed(self.config.training.seed + number)
            examples = self._valid.batch(which)
            draws = _draws(len(which), generator)
            total += self._loss(model(examples.inputs), examples, draws).double().sum()
        return float(all_reduce_sum(total)) / len(self._valid)

    def close(self) -> None:
        """Nothing is read after the start."""


def _draws(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(_DRAWS, (count,), generator=generator, device=generator.device)


def data_path(config: Config, system: str) -> Path:
    """The data of a run; `InputError` where none are named."""
    if config.data.path is None:
        raise InputError(
            f"name the data with --data FILE; make them with `molgen-energy preprocess {system}`"
        )
    return Path(config.data.path)


class Predictor:
    """The network of a checkpoint with its EMA weights, called in pieces.

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
        self._batch_size = batch_size or _PIECE

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, advance: Callable[[int, float], None] = lambda samples, share: None
    ) -> Tensor:
        """The network's output for inputs (M, …), on the CPU; `advance` as of an `Observer`.

        Raises
        ------
        InputError
            It is not finite.
        """
        pieces = []
        for piece in torch.split(inputs, self._batch_size):
            pieces.append(self._model(piece.to(self._device)).cpu())
            advance(len(piece), 1.0)
        output = torch.cat(pieces)
        wrong = int((~torch.isfinite(output).flatten(1).all(dim=1)).sum())
        if wrong:
            raise InputError(
                f"{self._path}: of {wrong:,} of {len(output):,} samples the network makes what is "
                "no number; training diverged, train anew with a lower --lr"
            )
        return output
