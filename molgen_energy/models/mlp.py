"""A multilayer perceptron from a few numbers to the positions of points."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from molgen_energy.config import Layers, PositiveInt, Section


class MLPConfig(Section):
    """Multilayer perceptron, see `MLP`."""

    name: str = "mlp"
    layers: Layers = 2
    width: PositiveInt = 64
    learning_rate: ClassVar[float] = 3e-2
    """`training.lr: auto`. Of 1e-2, 3e-2 and 1e-1 the best or close to it for every loss on regular
    polygons, see `assets/shapes.csv`."""

    def build(self, inputs: int, points: int, dimension: int) -> MLP:
        """The network with random weights; parameters are those of `MLP`."""
        return MLP(inputs, points, dimension, self.layers, self.width)


class MLP(nn.Module):
    """N points in D dimensions from C numbers, with hidden layers and SiLU.

    Parameters
    ----------
    inputs
        C.
    points, dimension
        N and D.
    layers, width
        Number of hidden layers, and their width.
    """

    Config: ClassVar[type[MLPConfig]] = MLPConfig

    def __init__(
        self, inputs: int, points: int, dimension: int, layers: int = 2, width: int = 64
    ) -> None:
        super().__init__()
        self.shape = points, dimension
        widths = [inputs, *[width] * layers]
        parts: list[nn.Module] = []
        for previous, following in pairwise(widths):
            parts += [nn.Linear(previous, following), nn.SiLU()]
        self.network = nn.Sequential(*parts, nn.Linear(widths[-1], points * dimension))

    def forward(self, inputs: Tensor) -> Tensor:
        """Points (B, N, D) from numbers (B, C)."""
        points: Tensor = self.network(inputs)
        return points.view(len(inputs), *self.shape)
