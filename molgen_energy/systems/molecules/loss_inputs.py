"""Further inputs of losses on molecules, prepared once for a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.batches import MoleculeBatch, on_device
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError
from molgen_energy.losses import Edges, LossConfig, Neighbours
from molgen_energy.progress import ProgressCallback, no_progress

_PAIRS_AT_ONCE = 300_000


def with_required_bonds(molecules: Molecules, requires: frozenset[str]) -> Molecules:
    """The molecules, with perceived bonds if losses require bonds and they have none."""
    if "bonds" in requires and molecules.bonds is None:
        return perceive(molecules)
    return molecules


class LossInputs:
    """Inputs of losses besides positions: bonds, features, or tables of neighbours.

    Parameters
    ----------
    loss
        The loss on positions, whose edges tables of neighbours hold.
    requires
        Inputs that it and the terms beside it require.
    seed
        Seed of the random graphs of the edges.
    molecules
        The molecules of the data set.
    device
        Device of the tables.
    name, numbers
        Name of the data, and numbers of the molecules in it, for messages.
    ranks
        Numbers of the molecules among all training molecules (M,), which select their random
        graphs; None is 0, 1, 2 and so on.
    progress
        Called with the number of molecules whose symmetries are found.
    check_cancelled
        Called between steps; may raise to stop.

    Raises
    ------
    InputError
        The loss uses symmetries, and two atoms of a molecule coincide.
    """

    def __init__(
        self,
        loss: LossConfig,
        requires: frozenset[str],
        seed: int,
        molecules: Molecules,
        device: torch.device,
        name: str = "data",
        numbers: NDArray[np.int64] | None = None,
        ranks: NDArray[np.int64] | None = None,
        progress: ProgressCallback = no_progress,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> None:
        self._requires = requires
        self._neighbours: _NeighbourLists | None = None
        if "neighbours" in loss.requires:
            order = np.arange(len(molecules))
            edges = loss.build_edges(seed)
            assert edges is not None
            self._neighbours = _neighbour_lists(
                edges,
                molecules,
                name,
                order if numbers is None else numbers,
                order if ranks is None else ranks,
                progress,
                check_cancelled,
            ).to(device)

    def of(self, which: NDArray[np.int64], batch: MoleculeBatch, state: State) -> dict[str, Any]:
        """Arguments of the loss for a batch of the molecules with these numbers (B,)."""
        return self.prepared(which, batch) | feature_inputs(self._requires, state)

    def prepared(self, which: NDArray[np.int64], batch: MoleculeBatch) -> dict[str, Any]:
        """Those of the arguments that do not depend on a state."""
        inputs: dict[str, Any] = {}
        if "bonds" in self._requires:
            inputs["bonds"] = batch.bonds
        if self._neighbours is not None:
            inputs["neighbours"] = self._neighbours.padded(which, batch.mask)
        return inputs


def feature_inputs(requires: frozenset[str], state: State) -> dict[str, Any]:
    """The features of a state's atoms, if losses require them."""
    if "features" not in requires:
        return {}
    return {"features": state.atoms[..., state.layout.fields["positions"].channels :]}


def table_bytes(loss: LossConfig, pairs: int) -> int:
    """Memory that `LossInputs` takes at most, for molecules of so many pairs of atoms in all.

    Symmetries may connect an atom with all others, with an index of 1 byte and a weight of 4 bytes
    each. The lists are in memory twice while they are built.
    """
    return 2 * 5 * pairs if "neighbours" in loss.requires else 0


class _NeighbourLists:
    """Neighbours of the atoms of many molecules: of each n·k, as wide as this molecule needs.

    Few molecules have symmetries that need more than 2D neighbours, and few are as large as the
    largest; a padded table of drug-like molecules would take ten times as much memory.

    Parameters
    ----------
    index, weight
        Neighbours of the atoms, one molecule after another, and their weights, (T,).
    starts, widths
        Where each molecule begins in them, and its k, (M,).
    """

    def __init__(self, index: Tensor, weight: Tensor, starts: Tensor, widths: Tensor) -> None:
        self.index, self.weight, self.starts, self.widths = index, weight, starts, widths

    def to(self, device: torch.device) -> _NeighbourLists:
        """The lists on a device."""
        return _NeighbourLists(
            self.index.to(device), self.weight.to(device), self.starts.to(device), self.widths
        )

    def padded(self, which: NDArray[np.int64], mask: Tensor) -> Neighbours:
        """The table of molecules (B,) with real atoms (B, N); free places hold the atom itself."""
        device, atoms = mask.device, mask.shape[1]
        widths = self.widths[which]
        most = int(widths.max()) if len(widths) else 0
        width = on_device(widths.numpy(), device)[:, None, None]
        row, place = torch.arange(atoms, device=device)[:, None], torch.arange(most, device=device)
        used = mask[:, :, None] & (place < width)
        at = on_device(which, device)
        source = torch.where(used, self.starts[at, None, None] + row * width + place, 0)
        if not len(self.index):  # no molecule has a pair
            return Neighbours(row.expand(source.shape), torch.zeros(source.shape, device=device))
        return Neighbours(
            torch.where(used, self.index[source].long(), row),
            torch.where(used, self.weight[source], 0),
        )


def _index_type(molecules: Molecules) -> type[np.integer[Any]]:
    return np.uint8 if molecules.sizes.max(initial=0) < 256 else np.int16


def _neighbour_lists(
    edges: Edges,
    molecules: Molecules,
    name: str,
    numbers_in_data: NDArray[np.int64],
    ranks: NDArray[np.int64],
    progress: ProgressCallback,
    check_cancelled: Callable[[], None],
) -> _NeighbourLists:
    """Neighbours and weights of each atom of the molecules."""
    indices, weights = [np.empty(0, _index_type(molecules))], [np.empty(0, np.float32)]
    starts, widths = np.empty((2, len(molecules)), np.int64)
    done = total = 0
    for which in batch_by_size(molecules.sizes, _PAIRS_AT_ONCE):
        check_cancelled()
        positions, numbers = molecules.select(which).padded()
        mask = torch.from_numpy(numbers > 0)
        try:
            table = edges.prepare_neighbours(torch.from_numpy(positions), mask, ranks[which])
        except ValueError as error:
            raise _too_close(molecules, which, name, numbers_in_data, edges, error) from None
        assert table.weight is not None
        weight = table.weight.numpy()
        # The neighbours of an atom come first in its row.
        widths[which] = (weight > 0).sum(axis=2).max(axis=1, initial=0)
        place = np.arange(weight.shape[2])
        used = (numbers > 0)[:, :, None] & (place < widths[which, None, None])
        indices.append(table.index.numpy()[used].astype(_index_type(molecules)))
        weights.append(weight[used])
        ends = total + np.cumsum(molecules.sizes[which] * widths[which])
        starts[which] = ends - molecules.sizes[which] * widths[which]
        total = int(ends[-1])
        done += len(which)
        progress(done, len(molecules))
    flat = (np.concatenate(indices), np.concatenate(weights), starts, widths)
    return _NeighbourLists(*map(torch.from_numpy, flat))


def _too_close(
    molecules: Molecules,
    which: NDArray[np.int64],
    name: str,
    numbers_in_data: NDArray[np.int64],
    edges: Edges,
    error: ValueError,
) -> InputError:
    """The error of the first molecule whose neighbours cannot be found."""
    where = name
    for number in which.tolist():
        positions = torch.from_numpy(molecules[number].positions)[None]
        mask = torch.ones(positions.shape[:2], dtype=torch.bool)
        try:
            edges.prepare_neighbours(positions, mask, np.zeros(1, np.int64))
        except ValueError as own:
            where, error = f"{name}: molecule {numbers_in_data[number] + 1}", own
            break
    return InputError(f"{where}: {error} (loss.edges.tolerance); remove it, or lower the tolerance")
