"""Training of a network that predicts properties: data, network and loss for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.config import resolved
from molgen_energy.data.batches import (
    BatchIndex,
    DeviceMolecules,
    EpochStarts,
    MoleculeBatch,
    PairBudget,
    ResidentData,
)
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.elements import ELEMENTS, symbol
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.losses import AdaptiveSprings
from molgen_energy.models.invariant import InvariantNetwork
from molgen_energy.paths import portable_path
from molgen_energy.systems.networks import build_network
from molgen_energy.systems.properties.config import PropertyConfig, PropertyState
from molgen_energy.systems.supervised import data_path
from molgen_energy.training.channels import FittedWeights
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.plan import planned_values
from molgen_energy.training.task import Auxiliary, mean_loss

PAIRS = 200_000
"""Pairs of atoms of a batch without gradients."""


class PropertyTask:
    """Training of a network that predicts properties of molecules.

    Parameters
    ----------
    config
        Configuration of the run; `self.config` is the same without `auto`.
    device
        Device of data and model.

    Raises
    ------
    InputError
        The data is missing or broken, has no training molecule, or lacks a property; or no
        training molecule has a value of one.
    """

    adaptive: AdaptiveSprings | None = None

    def __init__(self, config: PropertyConfig, device: torch.device) -> None:
        path = data_path(config, "qm9")
        training = config.training
        if training.lr == "auto":
            config = config.replaced({"training.lr": config.model.learning_rate})
        with MoleculeFile(path) as file:
            units = _units(config, file)
            summary, source = file.summarize(), file.source
            columns = [f"properties/{name}" for name in config.properties]
            in_valid = file.split_indices("valid")
            order = np.random.default_rng(training.seed).permutation(len(in_valid))
            chosen = np.sort(in_valid[order[: training.validation_molecules]])
            train = file.read(file.split_indices("train"), columns)
            valid = file.read(chosen, columns)
        if not len(train):
            raise InputError(
                f"{path} holds no training molecule; make it with a larger train share"
            )
        numbers = np.unique(np.concatenate([train.atomic_numbers, valid.atomic_numbers])).tolist()
        planned = planned_values(training, len(train))
        self.config = config.replaced({"data.path": portable_path(path), **planned})
        training = self.config.training
        self.device = device
        self.auxiliary: Auxiliary | None = None
        self.loss_terms = tuple(f"{name}_error" for name in config.properties)
        self.places = element_places(numbers).to(device)
        """By atomic number, see `element_places`."""
        model = build_network(config.model, training.seed, len(numbers), len(columns))
        assert isinstance(model, InvariantNetwork)
        model.fit(_counts(train, numbers), self._values(train, str(path)))
        self.model: nn.Module = model.to(device)
        self._scale = model.scale.clone()
        data = DeviceMolecules(train, device)
        pairs = training.pairs_per_batch
        size = resolved(training.batch_size) if pairs is None else PairBudget(pairs)
        assert size is not None
        self._train = ResidentData(data, train.sizes, size, training.seed)
        self._valid = DeviceMolecules(valid, device) if len(valid) else None
        self.state: dict[str, Any] = {
            "elements": [symbol(z) for z in numbers],
            "names": list(config.properties),
            "units": units,
            "data": {
                "source": source,
                "training_samples": summary.training_molecules,
                "fingerprint": summary.fingerprint,
            },
        }

    def _values(self, molecules: Molecules, where: str) -> Tensor:
        """The properties (M, P) float64; `InputError` where one has no two different values."""
        names = self.config.properties
        values = np.stack([molecules.properties[name].values for name in names], axis=1)
        for name, column in zip(names, values.T, strict=True):
            known = column[np.isfinite(column)]
            if not len(known) or known.min() == known.max():
                raise InputError(
                    f"{where}: property {name} has no two different values in the training "
                    "molecules; leave it out of --set properties=[…]"
                )
        return torch.from_numpy(np.where(np.isfinite(values), values, np.nan))

    # -- the interface `Task` -------------------------------------------------------------------

    def fit_weights(self, checkpoint: Checkpoint) -> FittedWeights:
        """The EMA weights of a checkpoint for the same elements and properties, in their order.

        The linear part comes with them.
        """
        theirs = checkpoint.state_as(PropertyState)
        for what, there in (
            ("elements", theirs.elements), ("names", theirs.names), ("units", theirs.units),
        ):  # fmt: skip
            if there != self.state[what]:
                what = "properties" if what == "names" else what
                raise InputError(
                    f"{checkpoint.path} has the {what} {', '.join(there)}, the run "
                    f"{', '.join(self.state['names' if what == 'properties' else what])}; train "
                    "without --from"
                )
        return FittedWeights(checkpoint.tensors("ema", self.model))

    @property
    def starts(self) -> EpochStarts:
        """The first step of each epoch, in which every training molecule occurs once."""
        return self._train.starts

    def epoch(self, epoch: int) -> Sequence[BatchIndex]:
        """The batches of an epoch; depends on the seed and `epoch` alone."""
        return self._train.epoch(epoch)

    def loss(
        self, model: nn.Module, batch: BatchIndex, seed: int, rank: int = 0, world: int = 1
    ) -> dict[str, Tensor]:
        """The loss of process `rank`'s shard of a batch, and the absolute errors, (B,) each.

        The loss is the mean over properties of absolute errors in units of `scale`; missing values
        count as errors of zero. No random numbers are drawn.
        """
        errors = self._errors(model, self._train.window(0), batch.shard(rank, world).which)
        named = dict(zip(self.loss_terms, errors.unbind(dim=1), strict=True))
        return {"loss": (errors / self._scale).mean(dim=1), **named}

    def molecules(self, batch: BatchIndex) -> MoleculeBatch:
        """The molecules of a batch, padded."""
        return self._train.window(batch.window).batch(batch.which)

    def _errors(self, model: nn.Module, data: DeviceMolecules, which: NDArray[np.int64]) -> Tensor:
        """Absolute errors (B, P) in the units of the properties; 0 where a value is missing."""
        batch = data.batch(which)
        elements = self.places[batch.data["atomic_numbers"].long()]
        found = model(elements, batch.data["positions"], batch.mask)
        values = torch.stack([batch.properties[name] for name in self.config.properties], dim=1)
        known = values.isfinite()
        # Values of large magnitude, such as total energies, are subtracted in float64.
        return torch.where(known, found.double() - torch.where(known, values, 0), 0).abs().float()

    @property
    def validation_samples(self) -> int:
        """Number of validation molecules; 0 without any."""
        return 0 if self._valid is None else len(self._valid)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean loss over validation molecules; None without any; processes share the work."""
        if self._valid is None:
            return None
        valid = self._valid

        def losses(which: NDArray[np.int64]) -> Tensor:
            return (self._errors(model, valid, which) / self._scale).mean(dim=1)

        chunks = list(batch_by_size(valid.sizes, PAIRS))
        return mean_loss(chunks, losses, len(valid), self.device)

    def close(self) -> None:
        """Nothing to close: the data are in memory."""


def element_places(numbers: Sequence[int]) -> Tensor:
    """(119,) int64: the place of each atomic number among some, −1 of others."""
    places = torch.full((ELEMENTS + 1,), -1)
    places[torch.tensor(numbers)] = torch.arange(len(numbers))
    return places


def _counts(molecules: Molecules, numbers: Sequence[int]) -> Tensor:
    """Atoms of each element, (M, E)."""
    places = element_places(numbers).numpy()[molecules.atomic_numbers]
    flat = molecules.molecule_index * len(numbers) + places
    counts = np.bincount(flat, minlength=len(molecules) * len(numbers))
    return torch.from_numpy(counts.reshape(len(molecules), len(numbers)))


def _units(config: PropertyConfig, file: MoleculeFile) -> list[str]:
    """Units of the configured properties; `InputError` where there are none, or not in the file."""
    known = sorted(file.property_units)
    if not known:
        raise InputError(
            f"{file.path} holds no properties; keep some with `molgen-energy preprocess`, or "
            "compute them with its option --property"
        )
    if not config.properties:
        raise InputError(
            f"name the properties to predict, such as --set properties=[{', '.join(known[:2])}] of "
            f"{file.path}"
        )
    for name in config.properties:
        if name not in known:
            raise InputError(f"{file.path}: {unknown_name('property', name, known)}")
    return [file.property_units[name] for name in config.properties]
