"""Regular polygons: from a radius to the vertices (section 6.1 of Kaba et al., NeurIPS 2025).

The network's input does not contain the angle of a polygon. The minimum of the squared error is
therefore the mean over angles, which is a point if all angles occur. A loss that is invariant under
rotation of the prediction has a regular polygon as its minimum, at any angle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from molgen_energy.config import Config, OneOf
from molgen_energy.data.arrays import write_arrays
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError
from molgen_energy.formats.yaml import YAMLFormat
from molgen_energy.losses import LOSSES, SPIN_LOSSES, EnergyConfig, Loss, LossConfig
from molgen_energy.models import SHAPE_MODELS
from molgen_energy.models.mlp import MLPConfig
from molgen_energy.progress import ProgressCallback
from molgen_energy.systems.base import SamplingCallback, SamplingResult, System
from molgen_energy.systems.networks import build_network
from molgen_energy.systems.shapes.files import SHAPES, read_polygons
from molgen_energy.systems.supervised import (
    Examples,
    Predictor,
    SupervisedTask,
    check_loss,
    data_path,
    training_indices,
    without_unknown_loss_keys,
)
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.state import RunState

Radius = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_CALIBRATION_SIZE = 4096  # polygons for the mean stiffness of springs
_CHUNK = 256


class ShapeConfig(Config):
    """A run on regular polygons."""

    system: str = "shapes"
    model: Annotated[MLPConfig, OneOf("model", SHAPE_MODELS)] = MLPConfig()
    loss: Annotated[LossConfig, OneOf("loss", LOSSES, {"spins": SPIN_LOSSES})] = EnergyConfig()

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Today's keys: a loss has only its own."""
        return without_unknown_loss_keys(values, LOSSES)


class ShapeState(RunState):
    """The state of a run on regular polygons."""

    model_config = ConfigDict(extra="forbid")

    vertices: Annotated[int, Field(ge=3, le=1_000_000)]
    """Of each polygon."""
    radii: Annotated[list[Radius], Field(min_length=2, max_length=2)]
    """Smallest and largest radius of the training polygons."""

    @model_validator(mode="after")
    def _ascending(self) -> ShapeState:
        if self.radii[0] > self.radii[1]:
            raise ValueError("radii: expected the smallest before the largest radius")
        return self


SHAPE_STATE = YAMLFormat(
    "state.yaml of a run on polygons",
    "What a checkpoint holds besides configuration and weights.",
    ShapeState,
)


class ShapeSystem(System):
    """Regular polygons, predicted from their radius."""

    name = "shapes"
    samples = "polygons"
    config = ShapeConfig
    state = ShapeState
    sampling = MappingProxyType({"count": 100, "seed": 0, "batch_size": None})
    output = "shapes_predicted.h5"
    file_format = SHAPES

    def task(self, config: Any, device: torch.device, progress: ProgressCallback) -> SupervisedTask:
        """Training on a file of polygons."""
        path = data_path(config, self.name)
        file = read_polygons(path, "`molgen-energy preprocess shapes -o {path}`")
        positions, radius = file.columns["positions"], file.columns["radius"]
        in_train = training_indices(file)
        config = _resolved(config, torch.from_numpy(positions[in_train[:_CALIBRATION_SIZE]]))
        loss: Loss = config.loss.build(seed=config.training.seed)

        def examples(columns: dict[str, NDArray[Any]]) -> Examples:
            return Examples(
                torch.from_numpy(columns["radius"])[:, None], torch.from_numpy(columns["positions"])
            )

        def batch_loss(prediction: Tensor, batch: Examples, drawn: Tensor) -> Tensor:
            return loss(prediction, batch.targets, generator=drawn)

        vertices = int(positions.shape[1])
        radii = [float(radius[in_train].min()), float(radius[in_train].max())]
        model = build_model(config, vertices)
        state = {"vertices": vertices, "radii": radii}
        return SupervisedTask(config, device, file, examples, model, batch_loss, state)

    def generator(
        self, checkpoint: Checkpoint, device: torch.device, options: Mapping[str, Any]
    ) -> ShapeGenerator:
        """Prediction of polygons of random radii."""
        return ShapeGenerator(checkpoint, device, **options)

    def details(self, config: Any) -> str:
        """Springs and edges."""
        return str(config.loss.describe())


def build_model(config: ShapeConfig, vertices: int) -> nn.Module:
    """The configured network, with random weights of the run's seed."""
    return build_network(config.model, config.training.seed, 1, vertices, 2)


def _resolved(config: ShapeConfig, positions: Tensor) -> ShapeConfig:
    """The configuration without `auto`; positions (M, N, 2) are training data."""
    check_loss(config.loss, frozenset(), ShapeSystem.samples)
    if config.training.lr == "auto":
        config = config.replaced({"training.lr": config.model.learning_rate})

    def samples() -> list[Mapping[str, Tensor]]:
        return [{"target": chunk} for chunk in torch.split(positions.double(), _CHUNK)]

    loss = config.loss.resolve(samples, config.training.seed).config
    return config.replaced({"loss": loss.model_dump()})


class ShapeGenerator:
    """Prediction of polygons of random radii, uniform over the range of the training data."""

    distributed = False
    inputs: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    method = "one network evaluation each"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        count: int,
        seed: int,
        batch_size: int | None,
    ) -> None:
        config, state = checkpoint.config_as(ShapeConfig), checkpoint.state_as(ShapeState)
        if count < 1:
            raise InputError(f"-n {count}: expected at least 1 polygon")
        self.count, self.origin = count, checkpoint.origin
        self._config, self._state, self._seed = config, state, seed
        model = build_model(config, state.vertices)
        self._predict = Predictor(checkpoint, model, device, batch_size)

    def write(
        self, output: Path, callback: SamplingCallback, resume: bool = False
    ) -> SamplingResult:
        """Predict the polygons and write them."""
        smallest, largest = self._state.radii
        rng = np.random.default_rng(self._seed)
        radius = rng.uniform(smallest, largest, self.count).astype(np.float32)
        positions = self._predict(torch.from_numpy(radius)[:, None], callback.advance).numpy()
        provenance = {
            "checkpoint": self.origin,
            "seed": str(self._seed),
            "config": self._config.without_paths().to_yaml(),
        }
        write_arrays(
            output,
            "shapes",
            f"predicted by {self.origin}, seed {self._seed}",
            {
                "radius": radius,
                "positions": positions,
                "split": np.full(self.count, SPLITS.index("test"), np.uint8),
            },
            {"vertices": self._state.vertices},
            provenance,
        )
        return SamplingResult(output, self.count, self.count)
