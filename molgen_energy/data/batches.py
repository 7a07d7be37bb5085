"""Training data on the device, and batches of molecules of about the same size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.data.molecules import Molecules

_BATCHES_PER_BLOCK = 32


class MoleculeBatch(NamedTuple):
    """Padded molecules: positions (B, N, 3) Å, types (B, N), mask (B, N) true at real atoms."""

    positions: Tensor
    types: Tensor
    mask: Tensor


class ResidentMolecules:
    """Molecules that stay on the device; a batch is an index into them.

    Parameters
    ----------
    molecules
        All in memory; QM9's positions take 35 MB.
    type_lookup
        Type by atomic number, (256,).
    device
        Where they are kept.
    """

    def __init__(self, molecules: Molecules, type_lookup: Tensor, device: torch.device) -> None:
        self.sizes = molecules.sizes
        positions, numbers = molecules.padded()
        types = type_lookup[torch.from_numpy(numbers).long()].clamp(min=0)
        self._positions = torch.from_numpy(positions).to(device)
        self._types = types.to(device)
        self._sizes = torch.from_numpy(self.sizes).to(device)

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, which: NDArray[np.int64]) -> MoleculeBatch:
        """The chosen molecules, padded to the largest of them."""
        largest = int(self.sizes[which].max())
        index = torch.from_numpy(which).to(self._sizes.device)
        mask = torch.arange(largest, device=index.device)[None] < self._sizes[index, None]
        return MoleculeBatch(self._positions[index, :largest], self._types[index, :largest], mask)


def batches_per_epoch(molecules: int, batch_size: int) -> int:
    """Number of batches that hold every molecule once."""
    return -(-molecules // batch_size)


def epoch_batches(
    sizes: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Every molecule once in random batches of similar size; depends on seed and epoch alone.

    A random order is cut into blocks of 32 batches; within a block molecules are sorted by size
    and dealt into batches, whose order is random again. Padding stays small, and which molecules
    meet in a batch still changes from epoch to epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    block = batch_size * _BATCHES_PER_BLOCK
    # Blocks hold a whole number of batches, so only the epoch's last batch can be smaller.
    batches = []
    for start in range(0, len(order), block):
        members = order[start : start + block]
        members = members[np.argsort(sizes[members], kind="stable")]
        batches += [members[k : k + batch_size] for k in range(0, len(members), batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]
