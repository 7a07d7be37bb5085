"""Regular polygons: from a radius to the vertices (section 6.1 of Kaba et al., NeurIPS 2025).

The network knows nothing of the angle that a polygon is turned by, so the squared error has it
predict the mean over angles, which is a point when all angles occur. A loss that does not change
when the prediction is turned has a regular polygon as its minimum, at whatever angle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.config import (
    Config,
    EdgesConfig,
    PositiveInt,
    Section,
    SpringsConfig,
    TrainingConfig,
    loss_on,
    one_of,
)
from molgen_energy.data.arrays import write_arrays
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError
from molgen_energy.losses import (
    LOSSES,
    POINTWISE_LOSSES,
    SPIN_LOSSES,
    CompleteEdges,
    PositionLoss,
    mean_stiffness,
)
from molgen_energy.models import SHAPE_MODELS
from molgen_energy.systems.base import Observer, SamplingResult, System, build_with_seed
from molgen_energy.systems.energy import build_edges, build_energy, describe_springs, resolve_scale
from molgen_energy.systems.shapes.files import read_polygons
from molgen_energy.systems.supervised import (
    Examples,
    Predictor,
    SupervisedTask,
    data_path,
)
from molgen_energy.training.checkpoint import Checkpoint

_LR = 3e-2  # the best or nearly so for every loss
_SAMPLE = 4096  # polygons that the mean spring is taken over


class ShapeModelConfig(Section):
    """Network from a radius to vertices."""

    name: Annotated[str, one_of("model", SHAPE_MODELS)] = "mlp"
    layers: PositiveInt = 2
    width: PositiveInt = 64


class ShapeEdgesConfig(EdgesConfig):
    """Pairs that springs join: all, or those of a random 4-regular graph."""

    kind: Literal["complete", "sparse"] = "complete"


class ShapeLossConfig(Section):
    """Loss on vertices."""

    name: Annotated[str, loss_on("shapes", LOSSES, {"spins": SPIN_LOSSES})] = "energy"
    springs: SpringsConfig = SpringsConfig()
    edges: ShapeEdgesConfig = ShapeEdgesConfig()


class ShapeConfig(Config):
    """A run on regular polygons."""

    system: str = "shapes"
    model: ShapeModelConfig = ShapeModelConfig()
    loss: ShapeLossConfig = ShapeLossConfig()
    training: TrainingConfig = TrainingConfig()


class ShapeSystem(System):
    """Regular polygons, predicted from their radius."""

    name = "shapes"
    samples = "polygons"
    config = ShapeConfig
    sampling = MappingProxyType({"count": 100, "seed": 0, "batch_size": None})
    output = "shapes_predicted.h5"

    def task(
        self, config: Any, device: torch.device, progress: Callable[[int, int], None]
    ) -> SupervisedTask:
        """What the training loop needs."""
        path = data_path(config, self.name)
        file = read_polygons(path, "`molgen-energy preprocess shapes -o {path}`")
        positions, radius = file.columns["positions"], file.columns["radius"]
        config = _settled(
            config, torch.from_numpy(positions[file.split_indices("train")[:_SAMPLE]])
        )
        loss = build_loss(config)

        def examples(columns: dict[str, NDArray[Any]]) -> Examples:
            return Examples(
                torch.from_numpy(columns["radius"])[:, None], torch.from_numpy(columns["positions"])
            )

        def judge(prediction: Tensor, batch: Examples, draws: Tensor) -> Tensor:
            return loss(prediction, batch.targets, generator=draws)

        vertices = int(positions.shape[1])
        in_train = file.split_indices("train")
        radii = [float(radius[in_train].min()), float(radius[in_train].max())]
        model = build_model(config, vertices)
        state = {"vertices": vertices, "radii": radii}
        return SupervisedTask(config, device, file, examples, model, judge, state)

    def generator(
        self, checkpoint: Checkpoint, device: torch.device, asked: Mapping[str, Any]
    ) -> _ShapeSampling:
        """What predicts polygons of random radii."""
        return _ShapeSampling(checkpoint, device, **asked)

    def details(self, config: Any) -> str:
        """Springs."""
        return describe_springs(config.loss)


def build_model(config: ShapeConfig, vertices: int) -> nn.Module:
    """The configured network, its weights drawn with the run's seed."""
    section = config.model
    return build_with_seed(
        config.training.seed,
        lambda: SHAPE_MODELS[section.name](1, vertices, 2, section.layers, section.width),
    )


def build_loss(config: ShapeConfig) -> PositionLoss:
    """The configured loss on vertices; needs a config without `auto`."""
    section = config.loss
    if section.name != "energy":
        return POINTWISE_LOSSES[section.name]()
    assert not isinstance(section.springs.scale, str)
    edges = build_edges(section.edges, config.training.seed)
    return build_energy(section.springs, section.springs.scale, edges)


def _settled(config: ShapeConfig, positions: Tensor) -> ShapeConfig:
    """Without `auto`: springs of mean 1 over pairs of the data."""
    if config.training.lr == "auto":
        config = config.replaced({"training.lr": _LR})
    springs = config.loss.springs
    if springs.distance == "features":
        raise InputError("loss.springs.distance: polygons have no features; take positions")
    if config.loss.name != "energy":
        return config

    def mean() -> float:
        pieces = torch.split(positions.double(), 256)
        complete = build_energy(springs, 1.0, CompleteEdges())
        return mean_stiffness(complete, [{"target": piece} for piece in pieces])

    return config.replaced({"loss.springs.scale": resolve_scale(springs, mean)})


class _ShapeSampling:
    """Polygons of radii that are drawn as those of the training data were."""

    shared = False
    inputs: tuple[Path, ...] = ()
    method = "one network evaluation each"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        count: int,
        seed: int,
        batch_size: int | None,
    ) -> None:
        config, state = checkpoint.config_as(ShapeConfig), checkpoint.state
        if not {"vertices", "radii"} <= state.keys():
            raise InputError(f"{checkpoint.path} is no checkpoint of a run on shapes")
        if count < 1:
            raise InputError(f"-n {count}: ask for at least one polygon")
        self.count, self.origin = count, checkpoint.origin
        self._config, self._state, self._seed = config, state, seed
        model = build_model(config, state["vertices"])
        self._predict = Predictor(checkpoint, model, device, batch_size)

    def write(self, output: Path, observer: Observer, resume: bool = False) -> SamplingResult:
        """Predict the polygons and write them."""
        smallest, largest = self._state["radii"]
        rng = np.random.default_rng(self._seed)
        radius = rng.uniform(smallest, largest, self.count).astype(np.float32)
        positions = self._predict(torch.from_numpy(radius)[:, None], observer.advance).numpy()
        provenance = {
            "checkpoint": self.origin,
            "seed": str(self._seed),
            "config": self._config.to_yaml(),
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
            {"vertices": self._state["vertices"]},
            provenance,
        )
        return SamplingResult(output, self.count, self.count)
