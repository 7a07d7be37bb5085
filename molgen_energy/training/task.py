"""What the training loop needs of a physical system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from molgen_energy.config import Config
from molgen_energy.data.batches import Batch


class Task(Protocol):
    """What the loop needs of a physical system."""

    @property
    def config(self) -> Config:
        """Without `auto`."""
        ...

    device: torch.device
    model: nn.Module
    state: dict[str, Any]
    """What a checkpoint carries so that it can be sampled from. Under `data`: `source` in words,
    the number of `training_samples`, and the `fingerprint` of what is trained on."""
    parts: tuple[str, ...]
    """Columns of `metrics.csv` for the parts of the objective."""

    @property
    def batches_per_epoch(self) -> int: ...

    def epoch(self, epoch: int) -> Sequence[Batch]: ...

    def loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, rank: int, world: int
    ) -> tuple[Tensor, ...]:
        """The objective of the samples that process `rank` of `world` takes of a batch, (B,).

        Behind it the parts that it is the sum of, if `parts` names any.
        """
        ...

    def validation_loss(self, model: nn.Module) -> float | None: ...

    def close(self) -> None: ...
