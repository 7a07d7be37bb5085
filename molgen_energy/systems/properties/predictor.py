"""A trained network that predicts properties of molecules."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.metrics.property_errors import PropertyPredictor
from molgen_energy.metrics.xtb_predictor import XTBPredictor
from molgen_energy.output import named_path
from molgen_energy.paths import find_again
from molgen_energy.systems.networks import build_network
from molgen_energy.systems.properties.config import PropertyConfig, PropertyState
from molgen_energy.systems.properties.task import PAIRS, element_places
from molgen_energy.training.checkpoint import Checkpoint, load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.pretrained import resolve_checkpoint

XTB = "xtb"
"""The name of GFN2-xTB for `--predictor`."""
_HDF5 = (".h5", ".hdf5")
_BYTES_OF_PAIR = 1000  # features and messages of a pair of atoms


class NetworkPredictor:
    """Properties by the EMA weights of a run.

    Parameters
    ----------
    checkpoint
        Of a run on properties.
    device
        To run on.

    Raises
    ------
    InputError
        The checkpoint is damaged, or of another system.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        config = checkpoint.config_as(PropertyConfig)
        state = checkpoint.state_as(PropertyState)
        numbers = [atomic_number(symbol) for symbol in state.elements]
        self._model = build_network(
            config.model, config.training.seed, len(numbers), len(state.names)
        )
        checkpoint.load_weights(self._model, "ema")
        self._model.to(device).eval()
        self._device = device
        self.limit: int | None = None
        self._places = element_places(numbers).to(device)
        self._known = element_places(numbers).numpy() >= 0
        self.names = tuple(state.names)
        self.units: Mapping[str, str] = dict(zip(state.names, state.units, strict=True))
        source = "" if state.data is None else f", trained on {state.data.source}"
        self.description = f"{checkpoint.origin}{source}"
        path = config.data.path
        self.data = None if path is None else find_again(path, checkpoint.path.parent.parent)
        """The file that it was trained on, which may be gone."""

    @torch.no_grad()
    def __call__(self, molecules: Molecules) -> dict[str, NDArray[np.float64]]:
        """Each property of molecules, (M,).

        NaN where a molecule has other elements than the training data, or its coordinates are not
        finite.

        Raises
        ------
        InputError
            A molecule is too large for the memory.
        """
        values = np.full((len(molecules), len(self.names)), np.nan)
        foreign = molecules.molecule_index[~self._known[molecules.atomic_numbers]]
        usable = molecules.finite()
        usable[foreign] = False
        chosen = np.flatnonzero(usable)
        if len(chosen):
            largest = int(molecules.sizes[chosen].max())
            what = f"predicting properties of a molecule of {largest:,} atoms"
            check_memory(_BYTES_OF_PAIR * largest**2, what, "leave it out")
        data = DeviceMolecules(molecules.select(chosen), self._device) if len(chosen) else None
        for which in batch_by_size(molecules.sizes[chosen], PAIRS):
            assert data is not None
            batch = data.batch(which)
            places = self._places[batch.data["atomic_numbers"].long()]
            found = self._model(places, batch.data["positions"], batch.mask)
            values[chosen[which]] = found.double().cpu().numpy()
        return dict(zip(self.names, values.T, strict=True))


def load_predictor(name: Path, device: torch.device) -> NetworkPredictor:
    """The predictor of a run, by its best checkpoint if it has one.

    Parameters
    ----------
    name
        A run or one of its checkpoints.
    device
        To run on.

    Raises
    ------
    InputError
        There is none, or it predicts no properties.
    """
    folder = resolve_checkpoint(name, "--predictor")
    best = folder / "checkpoints" / "best" / "state.yaml"
    checkpoint = load_checkpoint(folder, "best" if best.is_file() else "last")
    if checkpoint.system != PropertyConfig.of_system():
        raise InputError(
            f"--predictor {name} is a run on {checkpoint.system} and predicts no properties; train "
            "one with `molgen-energy train --config qm9_properties --data FILE.h5`"
        )
    return NetworkPredictor(checkpoint, device)


def choose_predictor(
    name: str | PathLike[str], reference: Path | None, subset: int | None = None
) -> tuple[PropertyPredictor, Path | None]:
    """What judges properties, and the file of real molecules to compare with, if there is one.

    Parameters
    ----------
    name
        A run on properties, one of its checkpoints, or `xtb`.
    reference
        HDF5 file of real molecules; by default the data of the run, where it still exists.
    subset
        How many molecules of a file GFN2-xTB judges, 1000 by default.

    Raises
    ------
    InputError
        There is no such run, or GFN2-xTB lacks its package or real molecules.
    """
    real = reference if reference is not None and reference.suffix.lower() in _HDF5 else None
    if str(name) == XTB:
        if real is None:
            raise InputError(
                "--predictor xtb is calibrated on real molecules; name an HDF5 file of them that "
                "has the properties, with --reference FILE.h5"
            )
        return (XTBPredictor(real) if subset is None else XTBPredictor(real, subset)), real
    network = load_predictor(named_path(Path(name)), choose_device("auto"))
    if real is None and network.data is not None and network.data.is_file():
        real = network.data
    return network, real
