"""Spring families: the stiffness of the spring between two atoms, by their distance in the data.

The spring constant of a pair is k_ij = (c/n)·f(d_ij), with n the number of atoms and a scale c. A
family is f: distances of any shape, in the unit of the data (Å for molecules), to values of the
same shape. Kaba et al., "Energy Loss Functions for Physical Systems", NeurIPS 2025, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from molgen_energy.config import Section, one_of, positive_or

_EPSILON = 1e-5  # of the paper's code; keeps the inverse families finite at distance 0


@dataclass(frozen=True)
class SpringFamily:
    """f(d), or f(d, bonded) of a family that distinguishes bonded pairs.

    function
        Takes distances and, with `requires_bonds`, a bool tensor of the same shape.
    scales
        Published c by the model that it was used with; the c of `gdm` holds for EDM too.
    requires_bonds
        Whether f depends on which pairs are bonded.
    finite_at_zero
        Whether f(0) is known to be finite.
    adaptive
        Whether a loss replaces the function by `AdaptiveSprings`, learnt from its predictions.
    """

    function: Callable[..., Tensor]
    scales: Mapping[str, float] = field(default_factory=dict)
    requires_bonds: bool = False
    finite_at_zero: bool = False
    adaptive: bool = False

    def __call__(self, distances: Tensor, bonded: Tensor | None = None) -> Tensor:
        """f of distances (any shape).

        Raises
        ------
        ValueError
            The family distinguishes bonded pairs, and `bonded` is missing.
        """
        if not self.requires_bonds:
            return self.function(distances)
        if bonded is None:
            raise ValueError("these springs distinguish bonded pairs: give bonds")
        return self.function(distances, bonded)


@dataclass(frozen=True)
class _UserFunction:
    """A user's function: it may write into its argument, or return a number."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, distances: Tensor) -> Tensor:
        value = torch.as_tensor(self.function(distances.clone()), device=distances.device)
        return value.to(distances.dtype).expand_as(distances)


def constant(distances: Tensor) -> Tensor:
    """f(d) = 1: a Morse potential to second order, all pairs alike."""
    return torch.ones_like(distances)


def exponential(distances: Tensor) -> Tensor:
    """f(d) = exp(−d): the paper's best for coordinate and equivariant graph networks."""
    return torch.exp(-distances)


def inverse(distances: Tensor) -> Tensor:
    """f(d) = 1/(d + ε): the paper's best trade-off for JODO."""
    return 1 / (distances + _EPSILON)


def inverse_square(distances: Tensor) -> Tensor:
    """f(d) = 1/(d² + ε): a Lennard-Jones potential to second order."""
    return 1 / (distances.square() + _EPSILON)


def lennard_jones(distances: Tensor, bonded: Tensor) -> Tensor:
    """f(d) = 1 on bonded pairs, 1/(d² + ε) on the others."""
    return torch.where(bonded, 1, inverse_square(distances))


SPRINGS: dict[str, SpringFamily] = {
    "constant": SpringFamily(constant, {"gdm": 1.0, "jodo": 1.0}, finite_at_zero=True),
    "exponential": SpringFamily(exponential, {"gdm": 42.0, "jodo": 24.0}, finite_at_zero=True),
    "inverse": SpringFamily(inverse, {"gdm": 5.0, "jodo": 3.7}, finite_at_zero=True),
    "inverse_square": SpringFamily(inverse_square, {"gdm": 16.0, "jodo": 9.0}, finite_at_zero=True),
    "lennard_jones": SpringFamily(
        lennard_jones, {"gdm": 9.0}, requires_bonds=True, finite_at_zero=True
    ),
    "auto": SpringFamily(constant, finite_at_zero=True, adaptive=True),
}
"""Families of springs, with their published scales by model."""

PUBLISHED_SCALES = ("gdm", "edm", "jodo")
"""Models with published scales c."""


class SpringsConfig(Section):
    """Springs of the energy loss."""

    family: Annotated[str, one_of("spring family", SPRINGS)] = "exponential"
    scale: Annotated[float | str, positive_or("auto", "sample", *PUBLISHED_SCALES)] = "auto"
    """c of k_ij = (c/n)·f(d_ij). `auto` makes the mean of c·f over the training pairs 1, `sample`
    over the pairs of each sample; the name of a model stands for the c published with it. `auto`
    is `sample` where f does not depend on the data alone."""
    distance: Literal["positions", "features"] = "positions"
    """The argument of f: the distance in positions, or in positions and encoded features."""

    @field_validator("scale")
    @classmethod
    def _of_adaptive_springs(cls, scale: float | str, info: ValidationInfo) -> float | str:
        family = SPRINGS.get(info.data.get("family", ""))
        if family is not None and family.adaptive and scale not in ("auto", "sample"):
            raise ValueError(f"springs auto have the scale sample, not {scale}; set it to sample")
        return scale


def spring_family(springs: str | Callable[[Tensor], Tensor] | SpringFamily) -> SpringFamily:
    """A family by its name in `SPRINGS`, of a function of distances, or the family itself.

    Raises
    ------
    ValueError
        There is no family of that name.
    """
    if isinstance(springs, SpringFamily):
        return springs
    if not isinstance(springs, str):
        if not callable(springs):
            raise ValueError(f"springs {springs!r}: expected a name or a function of distances")
        return SpringFamily(_UserFunction(springs))
    if springs not in SPRINGS:
        raise ValueError(f"unknown springs '{springs}' (valid: {', '.join(SPRINGS)})")
    return SPRINGS[springs]


def published_scale(family: SpringFamily, model: str) -> float:
    """The published scale c for a model, one of `PUBLISHED_SCALES`.

    Raises
    ------
    ValueError
        No scale is published.
    """
    if model not in PUBLISHED_SCALES:
        raise ValueError(f"scale '{model}': expected a number or {', '.join(PUBLISHED_SCALES)}")
    name = "gdm" if model == "edm" else model
    if name not in family.scales:
        known = ", ".join(family.scales) or "none"
        raise ValueError(f"these springs have no published scale for '{model}' (known: {known})")
    return family.scales[name]
