"""An energy loss whose minimiser is the score at every noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from molgen_energy.config import PositiveFloat
from molgen_energy.losses.base import Samples
from molgen_energy.losses.edges import Edges
from molgen_energy.losses.energy import (
    Distance,
    EnergyConfig,
    PairwiseEnergy,
    Rest,
    Scale,
    SpringsAt,
)
from molgen_energy.losses.springs import SpringFamily, SpringsConfig

_EXTERNAL = 0.64


class ScoreEnergyConfig(EnergyConfig):
    """Energy whose minimiser is the score, see `ScoreEnergy`."""

    name: str = "score_energy"
    springs: SpringsConfig = SpringsConfig(scale="sample")
    rest: Rest = "projected"
    springs_at: SpringsAt = "prediction"
    external: PositiveFloat = Field(_EXTERNAL, description="λ of the springs to the target.")

    @property
    def published_as(self) -> str:
        """Learning rate and weight are those of the energy."""
        return "energy"

    def _arguments(self, seed: int) -> dict[str, Any]:
        return {**super()._arguments(seed), "external": self.external}

    def build(self, *, seed: int = 0, channels: int | None = None) -> ScoreEnergy:
        """The loss; see `EnergyConfig.build`."""
        return ScoreEnergy(**self._arguments(seed))


class ScoreEnergy(PairwiseEnergy):
    """Projected springs between atoms, and a weak one from each atom to its target.

    E(ŷ, y) = Σ_{i≠j} ½ k_ij (‖ŷ_i − ŷ_j‖ − ⟨y_i − y_j, û_ij⟩)² + (λ/n) Σ_i |ŷ_i − y_i|²

    û_ij is the unit vector along ŷ_i − ŷ_j. It and k_ij = (c/n)·f(‖ŷ_i − ŷ_j‖) are constants for
    the gradient, which is then K(ŷ)(ŷ − y) with K = 2 Σ k_ij û_ij û_ijᵀ-blocks + 2λ/n. K depends on
    ŷ alone and is positive definite for λ > 0. So the mean gradient over the data that belong to a
    noisy x_t vanishes at the posterior mean ŷ = E[y | x_t] and nowhere else: at every noise level
    the loss has the minimiser of the squared error, which gives the score (Tweedie's formula), but
    it weighs errors of distances by stiffness. Without λ, K is singular: any ŷ that differs from
    the posterior mean by an infinitesimal rotation of itself would do.

    The loss is not invariant under rotations of the data relative to the prediction, nor is the
    score. Its value is that of an energy with other springs at each prediction, so it need not
    decrease as the prediction improves.

    Parameters
    ----------
    springs, scale, edges, distance, rest, springs_at
        See `PairwiseEnergy`. `springs_at="target"` and `rest="distance"` are for ablations: with
        either the minimiser is another one.
    external
        λ, relative to springs of mean 1/n between the atoms.

    Raises
    ------
    ValueError
        As for `PairwiseEnergy`, or λ is not above 0.
    """

    Config: ClassVar[type[ScoreEnergyConfig]] = ScoreEnergyConfig

    def __init__(
        self,
        springs: str | Callable[[Tensor], Tensor] | SpringFamily = "exponential",
        scale: Scale = "sample",
        edges: str | Edges = "complete",
        distance: Distance = "positions",
        rest: Rest = "projected",
        springs_at: SpringsAt = "prediction",
        external: float = _EXTERNAL,
    ) -> None:
        super().__init__(springs, scale, edges, distance, rest, springs_at)
        if not 0 < external < float("inf"):
            raise ValueError(f"external {external}: expected a number above 0")
        self.external = external

    def of(self, samples: Samples) -> Tensor:
        """Energy of each sample, (B,)."""
        squares = (samples.prediction - samples.target).square().sum(dim=(1, 2))
        return super().of(samples) + self.external / samples.counts * squares
