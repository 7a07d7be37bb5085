"""The energy loss: springs between the atoms, at rest at the distances of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from molgen_energy.errors import InputError
from molgen_energy.losses.base import (
    LossConfig,
    Neighbours,
    PositionLoss,
    ResolvedLoss,
    Samples,
    as_samples,
)
from molgen_energy.losses.edges import EDGES, Block, CompleteEdges, Edges, EdgesConfig
from molgen_energy.losses.springs import (
    SPRINGS,
    SpringFamily,
    SpringsConfig,
    published_scale,
    spring_family,
)

Distance = Literal["positions", "features"]


class EnergyConfig(LossConfig):
    """Energy of springs between atoms, see `PairwiseEnergy`."""

    name: str = "energy"
    springs: SpringsConfig = SpringsConfig()
    edges: EdgesConfig = EdgesConfig()

    @property
    def requires(self) -> frozenset[str]:
        """Inputs that springs, distance and edges require together."""
        family, edges = SPRINGS[self.springs.family], EDGES[self.edges.kind]
        return _requirements(family, self.springs.distance, edges.requires)

    @property
    def variant(self) -> str:
        """The spring family."""
        return self.springs.family

    def resolve(
        self, samples: Callable[[], Iterable[Mapping[str, Any]]], seed: int
    ) -> ResolvedLoss:
        """Replace `auto`, and the name of a model, by the scale c; see `LossConfig.resolve`.

        `auto` is 1 over the mean of f over the pairs of the samples.
        """
        springs, mean = self.springs, None
        scale = springs.scale
        if scale == "auto":
            mean = self._mean_stiffness(samples)
            scale = 1 / mean
        elif isinstance(scale, str):
            try:
                scale = published_scale(SPRINGS[springs.family], scale)
            except ValueError as error:
                raise InputError(
                    f"loss.springs.scale: {springs.family}: {error}; set a number or auto"
                ) from None
        resolved = self.model_copy(update={"springs": springs.model_copy(update={"scale": scale})})

        def stiffness() -> float:
            complete = self._mean_stiffness(samples) if mean is None else mean
            return complete * scale * self._share_of_complete(samples, seed)

        return ResolvedLoss(resolved, stiffness)

    def _unscaled(self, edges: Edges) -> PairwiseEnergy:
        return PairwiseEnergy(self.springs.family, 1.0, edges, self.springs.distance)

    def _mean_stiffness(self, samples: Callable[[], Iterable[Mapping[str, Any]]]) -> float:
        return mean_stiffness(self._unscaled(CompleteEdges()), samples())

    def _share_of_complete(
        self, samples: Callable[[], Iterable[Mapping[str, Any]]], seed: int
    ) -> float:
        """Energy of small random errors on the configured edges, relative to that on all pairs."""
        edges = self.edges.build(seed)
        if edges.connects_all:
            return 1.0
        generator = torch.Generator().manual_seed(seed)
        configured, complete = self._unscaled(edges), self._unscaled(CompleteEdges())
        own = all_pairs = 0.0
        for chunk in samples():
            own += float(configured.total_stiffness(**chunk, generator=generator).per_atom.sum())
            all_pairs += float(complete.total_stiffness(**chunk).per_atom.sum())
        return own / all_pairs if own and all_pairs else 1.0

    def build_edges(self, seed: int) -> Edges:
        """The configured edges."""
        return self.edges.build(seed)

    def build(self, *, seed: int = 0, channels: int | None = None) -> PairwiseEnergy:
        """The loss; `channels` has no effect, as the energy is no mean over channels.

        Raises
        ------
        ValueError
            The scale is `auto`, or there is no such published scale.
        """
        springs = self.springs
        if springs.scale == "auto":
            raise ValueError("loss.springs.scale is auto: resolve the section first")
        return PairwiseEnergy(
            springs.family, springs.scale, self.edges.build(seed), springs.distance
        )

    def describe(self) -> str:
        """Springs and edges."""
        return f", {self.springs.family} springs on {self.edges.kind} edges"


def _requirements(
    family: SpringFamily, distance: Distance, edges: frozenset[str]
) -> frozenset[str]:
    bonds = {"bonds"} if family.requires_bonds else set()
    features = {"features"} if distance == "features" else set()
    return edges | bonds | features


class PairwiseEnergy(PositionLoss):
    """E(ŷ, y) = Σ_{i≠j} ½ k_ij(y) (‖y_i − y_j‖ − ‖ŷ_i − ŷ_j‖)², with k_ij = (c/n)·f(‖y_i − y_j‖).

    Equation 7 of Kaba et al., NeurIPS 2025, over the ordered pairs that the edges connect. The
    energy is invariant under translation, rotation and reflection of the prediction or the data,
    and under permutations of atoms that are symmetries of the data. It is zero exactly where all
    connected pairs have the distances of the data.

    Value and gradient are computed together, and only the gradient, as large as the prediction, is
    saved for the backward pass. The gradient at coincident atoms is 0. Target and springs get no
    gradient, and there is no second derivative.

    Parameters
    ----------
    springs
        Name of a family in `SPRINGS`, a `SpringFamily`, or a function f of distances.
    scale
        c, or the name of the model whose published c to use: `gdm`, `edm` or `jodo`.
    edges
        Name of a kind in `EDGES`, or an object of such a kind.
    distance
        The argument of f: distances of `positions`, or of positions and `features` together, as in
        the paper's code. Springs are at rest at the distances of positions either way.

    Raises
    ------
    ValueError
        There is no such family or kind, or no published scale.
    """

    Config: ClassVar[type[EnergyConfig]] = EnergyConfig

    def __init__(
        self,
        springs: str | Callable[[Tensor], Tensor] | SpringFamily = "exponential",
        scale: float | str = 1.0,
        edges: str | Edges = "complete",
        distance: Distance = "positions",
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
        self.distance: Distance = distance
        self.requires = _requirements(self.family, distance, edges.requires)

    def prepare_neighbours(
        self,
        positions: Tensor,
        mask: Tensor | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Edges of padded samples as a table, see `Loss.prepare_neighbours`."""
        return self.edges.prepare_neighbours(positions, mask, numbers)

    def of(self, samples: Samples) -> Tensor:
        """Energy of each sample, (B,)."""
        if samples.neighbours is not None and "neighbours" not in self.edges.requires:
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
                displacement = block.differences("prediction")
                length = _lengths(displacement)
                extension = length - rest
                force = stiffness * extension  # f may return its argument: not in place
                block.add(energy, extension.mul_(force))
                if differentiate:
                    # The displacement of coincident atoms is 0, and so is its product.
                    force.div_(length.clamp_(min=least))
                    block.accumulate_forces(displacement.mul_(force))
            constant = self.scale / samples.counts
            energy *= 0.5 * constant
            if not differentiate:
                return energy
            gradient = pairs.forces().mul_(2 * constant[:, None, None])
        return _with_gradient(samples.prediction, energy, gradient)

    def _stiffness(self, block: Block, rest: Tensor, samples: Samples) -> Tensor:
        """f of the pairs of a block, times their weights."""
        distances = rest
        if self.distance == "features":
            if samples.features is None:
                raise ValueError("springs by feature distance: give features")
            distances = torch.hypot(rest, _lengths(block.differences("features")))
        bonded = block.bonded() if self.family.requires_bonds else None
        if block.weight is None:
            return self.family(distances, bonded)
        if not self.family.finite_at_zero:  # 0·∞ is NaN: evaluate f at 1 where the weight is 0
            distances = torch.where(block.weight > 0, distances, 1)
        return self.family(distances, bonded) * block.weight

    @torch.no_grad()
    def total_stiffness(
        self, target: Tensor, mask: Tensor | None = None, **inputs: Any
    ) -> Stiffness:
        """Σ f over the ordered pairs that springs connect, for each sample.

        Parameters are those of a call, without the prediction.
        """
        samples = as_samples(target, target, mask, **inputs)
        total = samples.target.new_zeros(len(samples.target))
        count = torch.zeros_like(total)
        for block in self.edges.pairs(samples).blocks():
            rest = _lengths(block.differences("target"))
            block.add(total, self._stiffness(block, rest, samples))
            ones = torch.ones_like(rest)
            block.add(count, ones if block.weight is None else ones * block.weight)
        return Stiffness(total, count, total / samples.counts)


def _lengths(differences: Tensor) -> Tensor:
    """Norms over the first dimension, faster than `torch.linalg.vector_norm`."""
    total = differences[0].square()
    for coordinate in differences[1:]:
        total.addcmul_(coordinate, coordinate)
    return total.sqrt_()


class Stiffness(NamedTuple):
    """Σ f over the ordered pairs of each sample, (B,)."""

    total: Tensor
    pairs: Tensor
    """Number of pairs, weighted as the edges are, (B,)."""
    per_atom: Tensor
    """`total` divided by the number of atoms, (B,)."""


def mean_stiffness(energy: PairwiseEnergy, chunks: Iterable[Mapping[str, Any]]) -> float:
    """Mean of f over the ordered pairs of the data: c = 1/mean makes springs of mean 1/n.

    Parameters
    ----------
    energy
        Its springs and edges are used.
    chunks
        The data, in chunks: keyword arguments of `total_stiffness`.

    Returns
    -------
    The mean; 1.0 without any pair (single atoms only).
    """
    total = count = 0.0
    for chunk in chunks:
        stiffness = energy.total_stiffness(**chunk)
        total += float(stiffness.total.sum())
        count += float(stiffness.pairs.sum())
    return total / count if count else 1.0


def _with_gradient(point: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The value (B,) of a function at a point (B, N, D), with its gradient at this point."""
    result: Tensor = _KnownGradient.apply(point, value, gradient)  # type: ignore[no-untyped-call]
    return result


class _KnownGradient(torch.autograd.Function):
    """A function of (B, N, D) whose value (B,) and gradient were computed together."""

    @staticmethod
    def forward(point: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        point, _, gradient = inputs
        ctx.save_for_backward(point, gradient)
        ctx.save_for_forward(point, gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        point, gradient = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return upstream[:, None, None] * gradient, None, None
        product: Tensor = _FirstDerivative.apply(point, upstream, gradient)  # type: ignore[no-untyped-call]
        return product, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        _, gradient = ctx.saved_tensors
        change: Tensor = (gradient * tangent).sum(dim=(1, 2))
        return change


class _FirstDerivative(torch.autograd.Function):
    """The gradient as a function of the point, which cannot be differentiated again."""

    @staticmethod
    def forward(point: Tensor, upstream: Tensor, gradient: Tensor) -> Tensor:
        return upstream[:, None, None] * gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        raise RuntimeError("the energy has no second derivative")
