"""An energy loss whose minimiser is the score at every noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, get_args

from pydantic import field_validator, model_validator
from torch import Tensor

from molgen_energy.config import PositiveFloat
from molgen_energy.losses.base import Samples
from molgen_energy.losses.edges import Edges
from molgen_energy.losses.energy import Distance, PairwiseEnergy, SpringsBetweenAtomsConfig
from molgen_energy.losses.springs import SpringFamily, SpringsConfig

SpringsOf = Literal["prediction", "noisy"]


def _check_requires(requires: frozenset[str]) -> None:
    """Raise `ValueError` if springs or edges depend on the target."""
    of_data = requires - {"noisy", "noise_level"}
    if of_data:
        raise ValueError(
            f"springs that depend on {', '.join(sorted(of_data))} of the data: the minimiser would "
            "not be the score; choose other springs, edges or distance"
        )


class ScoreEnergyConfig(SpringsBetweenAtomsConfig):
    """Energy whose minimiser is the score, see `ScoreEnergy`."""

    name: str = "score_energy"
    springs_at: SpringsOf = "prediction"
    """Where the distances are taken that f depends on: in the prediction (a constant for the
    gradient), or in the noisy positions."""
    external: PositiveFloat = 0.64
    """λ of the springs to the target."""

    @field_validator("springs")
    @classmethod
    def _scaled_by_sample(cls, springs: SpringsConfig) -> SpringsConfig:
        if springs.scale not in ("auto", "sample"):
            raise ValueError(
                f"score_energy has the scale sample, not {springs.scale}; set loss.springs.scale "
                "to sample"
            )
        return springs

    @model_validator(mode="after")
    def _independent_of_data(self) -> ScoreEnergyConfig:
        _check_requires(self.requires)
        return self

    @property
    def published_as(self) -> str:
        """Learning rate and weight are those of the energy."""
        return "energy"

    def build(self, *, seed: int = 0, channels: int | None = None) -> ScoreEnergy:
        """The loss; `channels` has no effect, as the energy is no mean over channels."""
        springs, edges = self.springs, self.edges.build(seed)
        return ScoreEnergy(springs.family, edges, springs.distance, self.springs_at, self.external)


class ScoreEnergy(PairwiseEnergy):
    """Projected springs between atoms, and a weak one from each atom to its target.

    E(ŷ, y) = Σ_{i≠j} ½ k_ij (‖ŷ_i − ŷ_j‖ − ⟨y_i − y_j, û_ij⟩)² + (λ/n) Σ_i |ŷ_i − y_i|²

    û_ij is the unit vector along ŷ_i − ŷ_j. It and k_ij = (c/n)·f(‖ŷ_i − ŷ_j‖) are constants for
    the gradient, which is then K(ŷ)(ŷ − y) with K = 2 Σ k_ij û_ij û_ijᵀ-blocks + 2λ/n. K depends on
    ŷ alone and is positive definite for λ > 0. So the mean gradient over the data that belong to a
    noisy x_t vanishes at the posterior mean ŷ = E[y | x_t] and nowhere else: at every noise level
    the loss has the minimiser of the squared error, which gives the score (Tweedie's formula: B.
    Efron, J. Am. Stat. Assoc. 106, 1602, 2011), but it weighs errors of distances by stiffness.
    Without λ, K is singular: any ŷ that differs from the posterior mean by an infinitesimal
    rotation of itself would do.

    The loss is not invariant under rotations of the data relative to the prediction, nor is the
    score. Its value is that of an energy with other springs at each prediction, so it need not
    decrease as the prediction improves.

    Parameters
    ----------
    springs, edges, distance
        See `PairwiseEnergy`; c is 1 over the mean of f over the connected pairs of a sample.
    springs_at
        Where the distances are taken that f depends on, `prediction` or `noisy`.
    external
        λ, relative to springs of mean 1/n between the atoms.

    Raises
    ------
    ValueError
        As for `PairwiseEnergy`; λ is not above 0; or f or the edges depend on the data: on its
        distances, bonds, features or symmetries.
    """

    Config: ClassVar[type[ScoreEnergyConfig]] = ScoreEnergyConfig

    def __init__(
        self,
        springs: str | Callable[[Tensor], Tensor] | SpringFamily = "exponential",
        edges: str | Edges = "complete",
        distance: Distance = "positions",
        springs_at: SpringsOf = "prediction",
        external: float = 0.64,
    ) -> None:
        super().__init__(springs, "sample", edges, distance, "projected", springs_at)
        if springs_at not in get_args(SpringsOf):
            raise ValueError(
                f"springs_at '{springs_at}': the minimiser would not be the score; choose "
                f"{' or '.join(get_args(SpringsOf))}"
            )
        _check_requires(self.requires)
        if not 0 < external < float("inf"):
            raise ValueError(f"external {external}: expected a number above 0")
        self.external = external

    def of(self, samples: Samples) -> Tensor:
        """Energy of each sample, (B,)."""
        squares = (samples.prediction - samples.target).square().sum(dim=(1, 2))
        return super().of(samples) + self.external / samples.counts * squares
