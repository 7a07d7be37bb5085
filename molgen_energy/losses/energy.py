"""The energy loss: springs between the atoms, at rest where the data is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from molgen_energy.losses.base import PositionLoss, Samples, as_samples
from molgen_energy.losses.edges import EDGES, Block, Edges
from molgen_energy.losses.springs import SpringFamily, published_scale, spring_family


class PairwiseEnergy(PositionLoss):
    """E(ŷ, y) = Σ_{i≠j} ½ k_ij(y) (‖y_i − y_j‖ − ‖ŷ_i − ŷ_j‖)², with k_ij = (c/n)·f(‖y_i − y_j‖).

    Equation 7 of Kaba et al., NeurIPS 2025, over the ordered pairs that the edges join. It does not
    change when the prediction or the data is translated, rotated or mirrored, or when atoms that a
    symmetry of the data exchanges are exchanged, and is zero exactly where all joined pairs have
    the data's distances.

    Value and gradient are computed together and only the gradient, as large as the prediction, is
    kept for the backward pass. The gradient at coincident atoms is 0. The target is data, as are
    springs: they get no gradient, and there is no second derivative.

    Parameters
    ----------
    springs
        Name of a family in `SPRINGS`, a `SpringFamily`, or a function f of distances.
    scale
        c, or whose published one to take: `gdm`, `edm` or `jodo`.
    edges
        Name of a kind in `EDGES`, or an object of such a kind.
    distance
        What f takes: distances of `positions`, or of positions and `features` together, as the
        paper's code does. Springs are at rest at the distances of positions either way.

    Raises
    ------
    ValueError
        There is no such family or kind, or no published scale.
    """

    def __init__(
        self,
        springs: str | Callable[[Tensor], Tensor] | SpringFamily = "exponential",
        scale: float | str = 1.0,
        edges: str | Edges = "complete",
        distance: Literal["positions", "features"] = "positions",
    ) -> None:
        self.family = spring_family(springs)
        if not isinstance(scale, str) and not 0 < scale < float("inf"):
            raise ValueError(f"scale {scale}: expected a number above 0")
        self.scale = published_scale(self.family, scale) if isinstance(scale, str) else scale
        if isinstance(edges, str):
            if edges not in EDGES:
                raise ValueError(f"unknown edges '{edges}' (valid: {', '.join(EDGES)})")
            edges = EDGES[edges]()
        if not isinstance(edges, Edges):
            raise ValueError(f"edges {edges!r}: expected a name or an object such as SparseEdges()")
        self.edges = edges
        if distance not in ("positions", "features"):
            raise ValueError(f"unknown distance '{distance}' (valid: positions, features)")
        self.distance = distance

    def of(self, samples: Samples) -> Tensor:
        """Energy of each sample, (B,)."""
        if samples.neighbours is not None and not self.edges.takes_neighbours:
            raise ValueError("neighbours are for symmetrized edges; these edges find their own")
        if samples.target.requires_grad and torch.is_grad_enabled():
            raise ValueError("the target of an energy gets no gradient: detach it")
        tangent = forward_ad.unpack_dual(samples.prediction).tangent  # type: ignore[no-untyped-call]
        reverse = samples.prediction.requires_grad and torch.is_grad_enabled()
        differentiate = reverse or tangent is not None
        with torch.no_grad():
            pairs = self.edges.pairs(samples)
            least = torch.finfo(samples.prediction.dtype).tiny ** 0.5  # squares below it are 0
            energy = samples.prediction.new_zeros(len(samples.prediction))
            for block in pairs.blocks():
                rest = _lengths(block.differences("target"))
                stiffness = self._stiffness(block, rest, samples)
                apart = block.differences("prediction")
                length = _lengths(apart)
                extension = length - rest
                force = stiffness * extension  # f may be what it was given: not in place
                block.add(energy, extension.mul_(force))
                if differentiate:
                    # Differences of coincident atoms are 0, whatever they are multiplied by.
                    block.accumulate_forces(apart.mul_(force.div_(length.clamp_(min=least))))
            constant = self.scale / samples.counts
            energy *= 0.5 * constant
            if not differentiate:
                return energy
            gradient = pairs.forces().mul_(2 * constant[:, None, None])
        return _with_gradient(samples.prediction, energy, gradient)

    def _stiffness(self, block: Block, rest: Tensor, samples: Samples) -> Tensor:
        """f of the pairs of a block, times their weights; 0 where there is no pair."""
        distances = rest
        if self.distance == "features":
            if samples.features is None:
                raise ValueError("springs by feature distance: give features")
            distances = torch.hypot(rest, _lengths(block.differences("features")))
        bonded = block.bonded() if self.family.needs_bonds else None
        if block.weight is None:
            return self.family(distances, bonded)
        if not self.family.finite_at_zero:  # 0·∞ is no number, so f is asked for another distance
            distances = torch.where(block.weight > 0, distances, 1)
        return self.family(distances, bonded) * block.weight

    @torch.no_grad()
    def total_stiffness(
        self, target: Tensor, mask: Tensor | None = None, **given: Any
    ) -> Stiffness:
        """Σ f and the number of the ordered pairs that springs join, for each sample.

        Parameters are those of a call, without the prediction.
        """
        samples = as_samples(target, target, mask, **given)
        total = samples.target.new_zeros(len(samples.target))
        count = torch.zeros_like(total)
        for block in self.edges.pairs(samples).blocks():
            rest = _lengths(block.differences("target"))
            block.add(total, self._stiffness(block, rest, samples))
            ones = torch.ones_like(rest)
            block.add(count, ones if block.weight is None else ones * block.weight)
        return Stiffness(total, count)


def _lengths(differences: Tensor) -> Tensor:
    """Norms over the first dimension, for which PyTorch's own are slow."""
    total = differences[0].square()
    for coordinate in differences[1:]:
        total.addcmul_(coordinate, coordinate)
    return total.sqrt_()


class Stiffness(NamedTuple):
    """Total f of each sample and the number of ordered pairs that it is over, both (B,)."""

    total: Tensor
    pairs: Tensor


def mean_stiffness(energy: PairwiseEnergy, pieces: Iterable[Mapping[str, Any]]) -> float:
    """Mean of f over the ordered pairs of the data: c = 1/mean makes springs of mean 1/n.

    Parameters
    ----------
    energy
        Whose springs and edges.
    pieces
        The data, in pieces: arguments of `total_stiffness`.

    Returns
    -------
    The mean; 1.0 where there is no pair (single atoms only).
    """
    total = count = 0.0
    for piece in pieces:
        stiffness = energy.total_stiffness(**piece)
        total += float(stiffness.total.sum())
        count += float(stiffness.pairs.sum())
    return total / count if count else 1.0


def _with_gradient(at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The value (B,) of a function of (B, N, D), with its gradient there."""
    result: Tensor = _KnownGradient.apply(at, value, gradient)  # type: ignore[no-untyped-call]
    return result


class _KnownGradient(torch.autograd.Function):
    """A value (B,) of something (B, N, D) whose gradient is known already."""

    @staticmethod
    def forward(at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        at, _, gradient = inputs
        ctx.save_for_backward(at, gradient)
        ctx.save_for_forward(at, gradient)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        at, gradient = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return outer[:, None, None] * gradient, None, None
        pulled: Tensor = _FirstDerivative.apply(at, outer, gradient)  # type: ignore[no-untyped-call]
        return pulled, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        _, gradient = ctx.saved_tensors
        change: Tensor = (gradient * tangent).sum(dim=(1, 2))
        return change


class _FirstDerivative(torch.autograd.Function):
    """A gradient that depends on where it was taken, and cannot be differentiated again."""

    @staticmethod
    def forward(at: Tensor, outer: Tensor, gradient: Tensor) -> Tensor:
        return outer[:, None, None] * gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> None:
        raise RuntimeError("the energy has no second derivative")
