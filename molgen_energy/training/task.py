"""The interface between the training loop and a physical system."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from molgen_energy.config import Config
from molgen_energy.data.batches import BatchIndex, EpochStarts
from molgen_energy.distributed import all_reduce_sum, rank, world_size
from molgen_energy.losses import AdaptiveSprings
from molgen_energy.training.channels import FittedWeights
from molgen_energy.training.checkpoint import Checkpoint

Chunk = TypeVar("Chunk")


@dataclass
class Auxiliary:
    """A network that is trained beside the model; samples do not need it."""

    network: nn.Module
    lr: float = 1.0
    """Its learning rates relative to those of the model."""
    wrapper: nn.Module | None = None
    """What averages its gradients over the processes of a job, while there are several."""

    @property
    def called(self) -> nn.Module:
        """What the loss calls."""
        return self.network if self.wrapper is None else self.wrapper


class PreparedBatch(Protocol):
    """Samples of a batch on the device, with all that their loss depends on besides the network."""

    def tensors(self) -> dict[str, Tensor]:
        """All that differs between batches of the same shapes, on the device, by name."""
        ...

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PreparedBatch:
        """A batch of the same shapes with other tensors."""
        ...


class Task(Protocol):
    """Data, model and loss of a run."""

    @property
    def config(self) -> Config:
        """Without `auto`."""
        ...

    device: torch.device
    model: nn.Module
    state: dict[str, Any]
    """What sampling needs from a checkpoint. The key `data` holds `source` in words, the number of
    `training_samples`, and the `fingerprint` of the training data."""
    auxiliary: Auxiliary | None
    """Whose gradients the loss has too, if there is one."""
    loss_terms: tuple[str, ...]
    """Names of the parts of the loss: keys of `loss`, and columns of `metrics.csv`."""

    def fit_weights(self, checkpoint: Checkpoint) -> FittedWeights:
        """The EMA weights of a checkpoint, as tensors of `model`.

        Configurations agree in `model`, `process` and `scales`, where there are such sections.

        Raises
        ------
        InputError
            They have another meaning. Names and shapes are checked afterwards.
        """
        ...

    @property
    def starts(self) -> EpochStarts:
        """The step at which each epoch begins."""
        ...

    def epoch(self, epoch: int) -> Sequence[BatchIndex]:
        """The batches of an epoch, which depend on the seed of the run and on its number alone."""
        ...

    def loss(
        self, model: nn.Module, batch: BatchIndex, seed: int, rank: int = 0, world: int = 1
    ) -> dict[str, Tensor]:
        """The loss of the samples of a batch that process `rank` of `world` has, (B,), as `loss`.

        Then its terms by name, (B,) each, if there are `loss_terms`. Random numbers depend on the
        seed and on the place of a sample in the whole batch.
        """
        ...

    @property
    def validation_samples(self) -> int:
        """Evaluations of the network in a validation; 0 without validation data."""
        ...

    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean loss of the validation data; None if there are none."""
        ...

    @property
    def adaptive(self) -> AdaptiveSprings | None:
        """The springs of the loss that are learnt, if any."""
        ...

    def close(self) -> None:
        """Close the files of the data."""
        ...


@runtime_checkable
class Recordable(Protocol):
    """Of a task: the two parts of `Task.loss`, of which a GPU can record the second one."""

    def prepare(self, batch: BatchIndex, seed: int, rank: int = 0, world: int = 1) -> PreparedBatch:
        """The samples of a batch that process `rank` of `world` has."""
        ...

    def prepared_loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss of a batch of `prepare` and its terms, without waiting for the device."""
        ...


def mean_loss(
    chunks: Sequence[Chunk], losses: Callable[[Chunk], Tensor], samples: int, device: torch.device
) -> float:
    """Mean loss of validation data, whose chunks the processes of a job share.

    Parameters
    ----------
    chunks
        The same in every process.
    losses
        The losses (B,) of a chunk of B samples.
    samples
        Of all chunks.
    device
        Of the losses.
    """
    total = torch.zeros((), device=device, dtype=torch.float64)
    for chunk in chunks[rank() :: world_size()]:
        total += losses(chunk).double().sum()
    return float(all_reduce_sum(total)) / samples
