"""A perceptron: from a few numbers to a configuration."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """N points in D dimensions from C numbers, by hidden layers with SiLU.

    Parameters
    ----------
    inputs
        C.
    points, dimension
        N and D.
    layers, width
        Hidden layers and their width.
    """

    def __init__(
        self, inputs: int, points: int, dimension: int, layers: int = 2, width: int = 64
    ) -> None:
        super().__init__()
        self.shape = points, dimension
        widths = [inputs, *[width] * layers]
        parts: list[nn.Module] = []
        for before, behind in pairwise(widths):
            parts += [nn.Linear(before, behind), nn.SiLU()]
        self.network = nn.Sequential(*parts, nn.Linear(widths[-1], points * dimension))

    def forward(self, given: Tensor) -> Tensor:
        """Points (B, N, D) for numbers (B, C)."""
        points: Tensor = self.network(given)
        return points.view(len(given), *self.shape)
