"""The energy loss: springs between the atoms, at rest at the distances of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.errors import InputError
from molgen_energy.losses.adaptive import AdaptiveSprings
from molgen_energy.losses.base import (
    LossConfig,
    Neighbours,
    PositionLoss,
    ResolvedLoss,
    Samples,
    as_samples,
)
from molgen_energy.losses.derivatives import (
    is_differentiated,
    once_differentiable,
    with_gradient,
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
Rest = Literal["distance", "projected", "vector"]
SpringsAt = Literal["target", "prediction", "noisy"]
Scale = float | str
"""c, `sample`, or the name of a model."""


class SpringsBetweenAtomsConfig(LossConfig):
    """Settings of a loss with springs between atoms."""

    extensive: ClassVar[bool] = True
    springs: SpringsConfig = SpringsConfig()
    edges: EdgesConfig = EdgesConfig()
    springs_at: str

    @property
    def requires(self) -> frozenset[str]:
        """Inputs that springs, distance and edges require together."""
        family, edges = SPRINGS[self.springs.family], EDGES[self.edges.kind]
        return _requirements(family, self.springs.distance, self.springs_at, edges.requires)

    @property
    def variant(self) -> str:
        """The spring family; adaptive springs have the published values of exponential ones."""
        family = self.springs.family
        return "exponential" if SPRINGS[family].adaptive else family

    def resolve(
        self, samples: Callable[[], Iterable[Mapping[str, Any]]], seed: int
    ) -> ResolvedLoss:
        """Replace `auto`, and the name of a model, by the scale c; see `LossConfig.resolve`.

        `auto` is 1 over the mean of f over the pairs of the samples, or `sample` where f depends
        on more than the data.
        """
        springs, mean = self.springs, None
        scale = springs.scale
        if scale == "auto" and not self._fixed:
            scale = "sample"
        if scale == "sample":
            mean = 1.0
        elif scale == "auto":
            mean = self._mean_stiffness(samples)
            scale = 1 / mean if mean else math.inf
            if not 0 < scale < math.inf:
                raise InputError(
                    f"loss.springs.scale: {springs.family} springs between all pairs of the data "
                    f"have the mean stiffness {mean:g}, so there is no scale; are distances in Å?"
                )
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
            factor = scale if isinstance(scale, float) else 1.0
            return complete * factor * self._share_of_complete(samples, seed)

        return ResolvedLoss(resolved, stiffness)

    @property
    def _fixed(self) -> bool:
        """Whether f is known from the data alone."""
        return self.springs_at == "target" and not SPRINGS[self.springs.family].adaptive

    def _unscaled(self, edges: Edges) -> PairwiseEnergy:
        """An energy to compare numbers and stiffnesses of pairs with; at rest at the data."""
        if self._fixed:
            scale: Scale = "sample" if self.springs.scale == "sample" else 1.0
            return PairwiseEnergy(self.springs.family, scale, edges, self.springs.distance)
        return PairwiseEnergy("constant", "sample", edges)

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

    def describe(self) -> str:
        """Springs and edges, and where the springs are taken, if not at the data."""
        text = f", {self.springs.family} springs on {self.edges.kind} edges"
        return text if self.springs_at == "target" else f"{text}, at the {self.springs_at}"


class EnergyConfig(SpringsBetweenAtomsConfig):
    """Energy of springs between atoms, see `PairwiseEnergy`."""

    name: str = "energy"
    rest: Rest = "distance"
    """What springs are at rest at: the distances of the data, their vectors projected on the
    predicted directions, or their vectors."""
    springs_at: SpringsAt = "target"
    """Where the distances are taken that f depends on: in the data, in the prediction (a constant
    for the gradient), or in the noisy positions."""

    def build(self, *, seed: int = 0, channels: int | None = None) -> PairwiseEnergy:
        """The loss; `channels` has no effect, as the energy is no mean over channels.

        Raises
        ------
        ValueError
            The scale is `auto`, or there is no such published scale.
        """
        springs, edges = self.springs, self.edges.build(seed)
        if springs.scale == "auto":
            raise ValueError("loss.springs.scale is auto: resolve the section first")
        return PairwiseEnergy(
            springs.family, springs.scale, edges, springs.distance, self.rest, self.springs_at
        )

    def describe(self) -> str:
        """Springs and edges, and what differs from the published energy."""
        text = super().describe()
        return text if self.rest == "distance" else f"{text}, {self.rest} rest lengths"


def _requirements(
    family: SpringFamily, distance: Distance, springs_at: str, edges: frozenset[str]
) -> frozenset[str]:
    needs = {
        "bonds": family.requires_bonds,
        "features": distance == "features",
        "noisy": springs_at == "noisy",
        "noise_level": family.adaptive,
    }
    return edges | {name for name, needed in needs.items() if needed}


class PairwiseEnergy(PositionLoss):
    """E(ŷ, y) = Σ_{i≠j} ½ k_ij(y) (‖y_i − y_j‖ − ‖ŷ_i − ŷ_j‖)², with k_ij = (c/n)·f(‖y_i − y_j‖).

    Equation 7 of Kaba et al., NeurIPS 2025, over the ordered pairs that the edges connect. The
    energy is invariant under translation, rotation and reflection of the prediction or the data,
    and under permutations of atoms that are symmetries of the data. It is zero exactly where all
    connected pairs have the distances of the data.

    Value and gradient are computed together, and only the gradient, as large as the prediction, is
    saved for the backward pass. The gradient at coincident atoms is 0. Target and springs get no
    gradient, and there is no second derivative.

    With `rest="projected"` the rest length is ⟨y_i − y_j, û_ij⟩, û_ij the unit vector along
    ŷ_i − ŷ_j. If f is not taken at the target, û and k depend on the noisy positions alone, and
    the gradient, Σ_j 2 k_ij û_ij û_ijᵀ ((ŷ_i − ŷ_j) − (y_i − y_j)), is linear in the data. Its mean
    over data is zero where ŷ is the posterior mean E[y | x_t], and, for a rigid graph, where ŷ and
    it differ by an infinitesimal rotation of ŷ. `ScoreEnergy` makes the first the only one.
    `rest="vector"` compares the vectors themselves, ½ k_ij |(ŷ_i − ŷ_j) − (y_i − y_j)|². These two
    are not invariant under rotations of the data relative to the prediction.

    Parameters
    ----------
    springs
        Name of a family in `SPRINGS`, a `SpringFamily`, or a function f of distances.
    scale
        c; `sample` for 1 over the mean of f over the connected pairs of each sample; or the name of
        the model whose published c to use: `gdm`, `edm` or `jodo`.
    edges
        Name of a kind in `EDGES`, or an object of such a kind.
    distance
        The argument of f: distances of `positions`, or of positions and `features` together, as in
        the paper's code. Springs are at rest at the distances of positions either way.
    rest
        `distance`, `projected` or `vector`, see above.
    springs_at
        Where the distances are taken that f depends on: `target`; `prediction`, without a gradient;
        or `noisy`, the positions of x_t.

    Raises
    ------
    ValueError
        There is no such family, kind or option, or no published scale; the springs adapt to errors
        and the scale is not `sample`.
    """

    Config: ClassVar[type[SpringsBetweenAtomsConfig]] = EnergyConfig

    def __init__(
        self,
        springs: str | Callable[[Tensor], Tensor] | SpringFamily = "exponential",
        scale: Scale = 1.0,
        edges: str | Edges = "complete",
        distance: Distance = "positions",
        rest: Rest = "distance",
        springs_at: SpringsAt = "target",
    ) -> None:
        self.family = spring_family(springs)
        self.adaptive = AdaptiveSprings() if self.family.adaptive else None
        if self.adaptive is not None and scale != "sample":
            raise ValueError(f"scale {scale}: springs that adapt have the scale 'sample'")
        if not isinstance(scale, str) and not 0 < scale < float("inf"):
            raise ValueError(f"scale {scale}: expected a number above 0")
        named = isinstance(scale, str) and scale != "sample"
        if named:
            scale = published_scale(self.family, str(scale))
        self.scale: float | None = None if isinstance(scale, str) else float(scale)
        """c; None is 1 over the mean of f over the pairs of each sample."""
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
        if rest not in get_args(Rest):
            raise ValueError(f"unknown rest '{rest}' (valid: {', '.join(get_args(Rest))})")
        self.rest: Rest = rest
        if springs_at not in get_args(SpringsAt):
            raise ValueError(
                f"unknown springs_at '{springs_at}' (valid: {', '.join(get_args(SpringsAt))})"
            )
        self.springs_at: SpringsAt = springs_at
        self.requires = _requirements(self.family, distance, springs_at, edges.requires)

    def prepare_neighbours(
        self,
        positions: Tensor,
        mask: Tensor | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Edges of padded samples as a table, see `Loss.prepare_neighbours`."""
        return self.edges.prepare_neighbours(positions, mask, numbers)

    def of(self, samples: Samples) -> Tensor:
        """Energy of each sample, (B,).

        Raises
        ------
        ValueError
            Neighbours are given, and the edges find their own.
        """
        if samples.neighbours is not None and "neighbours" not in self.edges.requires:
            raise ValueError("neighbours are for symmetrized edges; these edges find their own")
        samples = once_differentiable(samples, "an energy", {"target", *self.requires} - {"bonds"})
        reverse = samples.prediction.requires_grad and torch.is_grad_enabled()
        differentiate = is_differentiated(samples.prediction)
        with torch.no_grad():
            pairs = self.edges.pairs(samples)
            least = torch.finfo(samples.prediction.dtype).tiny ** 0.5  # squares below it are 0
            energy = samples.prediction.new_zeros(len(samples.prediction))
            sums = _StiffnessSums(energy)
            for block in pairs.blocks():
                displacement, data = block.differences("prediction"), block.differences("target")
                length = _lengths(displacement)
                data_length = _lengths(data) if self._uses_data_length else None
                distances = self._distances(block, length, data_length, samples)
                stiffness = self._stiffness(block, distances, samples)
                if self.scale is None:
                    sums.add(block, stiffness)
                if self.rest == "vector":
                    displacement.sub_(data)
                    extension, force = _lengths(displacement), stiffness
                    product = extension.square().mul_(stiffness)
                else:
                    if self.rest == "distance":
                        assert data_length is not None
                        extension = length - data_length
                    else:
                        extension = length - _projections(data, displacement, length, least)
                    force = stiffness * extension  # f may return its argument: not in place
                    product = extension * force
                    # The displacement of coincident atoms is 0, and so is its product.
                    force = force.div_(length.clamp_(min=least))
                block.add(energy, product)
                if self.adaptive is not None and reverse:
                    assert samples.noise_level is not None
                    self.adaptive.record(
                        distances, _numbers(block, samples), samples.noise_level,
                        extension.square_(), _weights(block, extension),
                    )  # fmt: skip
                if differentiate:
                    block.accumulate_forces(displacement.mul_(force))
            scale = 1 / sums.mean() if self.scale is None else self.scale
            constant = scale / samples.counts
            energy *= 0.5 * constant
            if not differentiate:
                return energy
            gradient = pairs.forces().mul_(2 * constant[:, None, None])
        return with_gradient(samples.prediction, energy, gradient)

    @property
    def _uses_data_length(self) -> bool:
        return self.rest == "distance" or self.springs_at == "target"

    def _distances(
        self, block: Block, length: Tensor, data_length: Tensor | None, samples: Samples
    ) -> Tensor:
        """Argument of f, for the lengths of the pairs in the prediction and in the data."""
        if self.springs_at == "prediction":
            distances = length.clone()
        elif self.springs_at == "target":
            assert data_length is not None
            distances = data_length
        elif samples.noisy is None:
            raise ValueError("springs at the noisy positions: give noisy")
        else:
            distances = _lengths(block.differences("noisy"))
        if self.distance == "features":
            if samples.features is None:
                raise ValueError("springs by feature distance: give features")
            return torch.hypot(distances, _lengths(block.differences("features")))
        return distances

    def _stiffness(self, block: Block, distances: Tensor, samples: Samples) -> Tensor:
        """f of the pairs of a block, times their weights."""
        if self.adaptive is not None:
            if samples.noise_level is None:
                raise ValueError("springs that adapt: give noise_level")
            stiffness = self.adaptive.stiffness(
                distances, _numbers(block, samples), samples.noise_level
            )
            return stiffness if block.weight is None else stiffness.mul_(block.weight)
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
        """Σ f over the ordered pairs that springs connect, for each sample; f is 1 on average over
        the pairs of a sample with the scale `sample`.

        Parameters are those of a call, without the prediction: `target` (B, N, D) with `mask`
        (B, N), or packed (ΣN, D) with `batch`.
        """
        samples = as_samples(target, target, mask, **inputs)
        sums = _StiffnessSums(samples.target.new_zeros(len(samples.target)))
        for block in self.edges.pairs(samples).blocks():
            data = block.differences("target")
            if self.scale is None:
                sums.add(block, _weights(block, data[0]))
            else:
                length = _lengths(data)
                distances = self._distances(block, length, length, samples)
                sums.add(block, self._stiffness(block, distances, samples))
        return Stiffness(sums.total, sums.pairs, sums.total / samples.counts)


class _StiffnessSums:
    """Σ f and the number of ordered pairs of each sample, (B,), over blocks."""

    def __init__(self, like: Tensor) -> None:
        self.total, self.pairs = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, block: Block, stiffness: Tensor) -> None:
        block.add(self.total, stiffness)
        block.add(self.pairs, _weights(block, stiffness).expand_as(stiffness))

    def mean(self) -> Tensor:
        """Mean of f, (B,); 1 without pairs, and where it is too small for its inverse."""
        mean = self.total / self.pairs.clamp(min=1e-9)
        return torch.where(mean < torch.finfo(mean.dtype).tiny, 1.0, mean)


def _projections(data: Tensor, displacement: Tensor, length: Tensor, least: float) -> Tensor:
    """⟨Δ, û⟩ of vectors Δ of the data, û the directions of predicted vectors of given lengths."""
    projections = displacement[0] * data[0]
    for own, other in zip(displacement[1:], data[1:], strict=True):
        projections.addcmul_(own, other)
    return projections.div_(length.clamp(min=least))


def _weights(block: Block, like: Tensor) -> Tensor:
    return torch.ones_like(like) if block.weight is None else block.weight


def _numbers(block: Block, samples: Samples) -> Tensor:
    """The number of each pair's sample, of a shape that broadcasts to the pairs."""
    return block.of_samples(torch.arange(len(samples.prediction), device=samples.prediction.device))


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
