"""Springs whose stiffness is learnt from the errors of the predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Nodes in log d and log s, in the unit of positions: 0.5 to 32 Å in steps of 7 %, and 10⁻³ to 10³ Å
# with four nodes in each factor of ten. Outside, the stiffness is that of the nearest node.
_DISTANCES = (0.5, 32.0, 64)
_LEVELS = (1e-3, 1e3, 25)
_MEMORY = 0.999  # factor of earlier errors at each step
_PRIOR = 10.0  # pairs with the mean error of their level that each node begins with


class AdaptiveSprings:
    """f = 1/v(d, s): v is the mean squared error of pairs of distance d at the noise level s = σ/α.

    If the errors r of the lengths of pairs are independent and normal with variance v, their
    negative log-likelihood is Σ r²/(2v) + ½ log v. So 1/v is the maximum-likelihood estimate of
    the stiffness: a pair that the network cannot know yet gets a soft spring, one that it should
    know a stiff one (Kendall, Gal, Cipolla, CVPR 2018, weigh tasks in this way).

    log v is linear between the nodes of a grid in log d and log s. v at a node is the mean squared
    error of the pairs near it over about the last thousand steps, with linear weights. Where few
    pairs were seen it is the mean of the level, so at first all springs are equal.
    """

    def __init__(self) -> None:
        shape = _LEVELS[2], _DISTANCES[2]
        self._squares = torch.zeros(shape, dtype=torch.float64)  # Σ r² near a node
        self._pairs = torch.zeros(shape, dtype=torch.float64)
        self._steps = torch.zeros((), dtype=torch.long)
        self._new: Tensor | None = None  # (2, levels, distances), since the previous step
        self._log_variance = self._fit()

    def stiffness(self, distances: Tensor, sample: Tensor, noise_level: Tensor) -> Tensor:
        """f of pairs.

        Parameters
        ----------
        distances
            Of any shape.
        sample
            The number of each pair's sample, of a shape that broadcasts to that of `distances`.
        noise_level
            s of each sample, (B,).
        """
        below, above = self._level_weights(noise_level)
        table = self._log_variance.to(noise_level)
        rows = below.weight[:, None] * table[below.node] + above.weight[:, None] * table[above.node]
        rows = -(rows - rows.mean(dim=1, keepdim=True))  # only ratios matter: stays in range
        node, share = _locate(distances, _DISTANCES)
        flat, at = rows.flatten(), sample * rows.shape[1] + node
        return torch.lerp(flat[at], flat[at + 1], share).exp_()

    def record(
        self,
        distances: Tensor,
        sample: Tensor,
        noise_level: Tensor,
        squares: Tensor,
        weight: Tensor,
    ) -> None:
        """Add squared errors of pairs, with weights.

        Parameters
        ----------
        distances, sample, noise_level
            As in `stiffness`: of any shape, that of the pairs; the number of each pair's sample;
            and the noise level of each sample, (B,).
        squares, weight
            The squared error of each pair, and its weight in the sums, which may be broadcast.
        """
        count, nodes = len(noise_level), _DISTANCES[2]
        node, share = _locate(distances, _DISTANCES)
        at = (sample * nodes + node).flatten()
        totals = []
        for values in (squares * weight, weight.expand_as(squares)):
            total = values.new_zeros(count * nodes)
            upper = (values * share).flatten()
            total.index_add_(0, at, values.flatten() - upper)
            total.index_add_(0, at + 1, upper)
            totals.append(total.view(count, nodes).double())
        grid = torch.zeros(2, _LEVELS[2], nodes, dtype=torch.float64, device=distances.device)
        for level in self._level_weights(noise_level):
            for row, total in zip(grid, totals, strict=True):
                row.index_add_(0, level.node, level.weight[:, None].double() * total)
        _OutsideOfTransforms.apply(grid, self._add)  # type: ignore[no-untyped-call]

    def _add(self, grid: Tensor) -> None:
        self._new = grid if self._new is None else self._new + grid

    def finish_step(
        self,
        reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
        accepted: Tensor | None = None,
    ) -> None:
        """Learn from what was recorded since the previous step.

        Parameters
        ----------
        reduce
            Adds a tensor, (2, levels, distances), over the processes of a job.
        accepted
            Whether to learn at all, () bool on the device: else what was recorded is forgotten.
            None learns.
        """
        if self._new is None:
            self._new = self._pairs.new_zeros(2, *self._pairs.shape)
        new = reduce(self._new)
        for name in ("_squares", "_pairs", "_steps", "_log_variance"):
            if getattr(self, name).device != new.device:
                setattr(self, name, getattr(self, name).to(new.device))
        keep = ((1 + self._steps).double() / (10 + self._steps)).clamp(max=_MEMORY)
        if accepted is not None:
            new = torch.where(accepted, new, 0)
            keep = torch.where(accepted, keep, 1)
        # In place, for steps that are recorded as a CUDA graph.
        self._squares.mul_(keep).add_(new[0])
        self._pairs.mul_(keep).add_(new[1])
        self._steps += 1 if accepted is None else accepted
        self._new = None
        self._log_variance.copy_(self._fit())

    def discard_step(self) -> None:
        """Forget what was recorded since the previous step."""
        if self._new is not None:
            self._new.zero_()  # keeps the device, for the sum over processes

    def _fit(self) -> Tensor:
        """log v at the nodes."""
        total, pairs = self._squares.sum(1, keepdim=True), self._pairs.sum(1, keepdim=True)
        level = torch.where(pairs > 0, total / pairs.clamp(min=1e-300), 1.0)
        variance = (self._squares + _PRIOR * level) / (self._pairs + _PRIOR)
        return variance.clamp(min=1e-30).log()

    def variance(self, distances: Tensor, noise_level: float) -> Tensor:
        """v of distances (V,) at a noise level, up to a factor that depends on the level alone."""
        levels = torch.full((1,), noise_level, dtype=distances.dtype)
        return 1 / self.stiffness(distances, torch.zeros((), dtype=torch.long), levels)

    def state(self) -> dict[str, Tensor]:
        """The sums over past steps: `squares` and `pairs`, (levels, distances), and `steps`, ()."""
        tensors = {"squares": self._squares, "pairs": self._pairs, "steps": self._steps}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`, with its shapes."""
        self._squares, self._pairs = state["squares"].clone(), state["pairs"].clone()
        self._steps, self._new = state["steps"].clone(), None
        self._log_variance = self._fit()

    def _level_weights(self, noise_level: Tensor) -> tuple[_Nodes, _Nodes]:
        node, share = _locate(noise_level, _LEVELS)
        return _Nodes(node, 1 - share), _Nodes(node + 1, share)


class _OutsideOfTransforms(torch.autograd.Function):
    """Calls a function with a tensor that outlives a transform such as `torch.func.grad`."""

    @staticmethod
    def forward(values: Tensor, function: Callable[[Tensor], None]) -> Tensor:
        function(values)
        return values.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        pass


class _Nodes(NamedTuple):
    """A node of the levels for each sample, and its weight in the interpolation, (B,) each."""

    node: Tensor
    weight: Tensor


def _locate(values: Tensor, grid: tuple[float, float, int]) -> tuple[Tensor, Tensor]:
    """The node at or below each value in a logarithmic grid, and the share of the next node."""
    first, last, nodes = grid
    place = values.clamp(first, last).div(first).log_()
    place.mul_((nodes - 1) / math.log(last / first)).clamp_(0, nodes - 1)
    node = place.long().clamp_(0, nodes - 2)  # NaN has no integer, and remains in the share
    return node, place.sub_(node)
