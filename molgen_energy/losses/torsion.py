"""Torsions and signed volumes along bonds: what distances hardly see, and mirror images change.

Both losses are terms beside a loss on positions. They have no effect on bond lengths, and alone
they do not determine a configuration. They need three dimensions, and take time and memory
proportional to the number of torsions, or of triples of neighbours.

Directions of bonds are v = b/√(b² + δ²) with δ = 0.1 Å, for a bond vector b. They are smooth where
atoms coincide, with derivatives of at most 1/δ, and as good as unit vectors at bond lengths.

`rest` is where a term is at rest, for an internal coordinate q such as a torsion:

- **value**: where q has the value of the target. The minimiser over random targets is a mean of q,
  for torsions a circular one, which is not the q of the mean configuration.
- **projected**: ½(g·(ŷ − y))², where g = ∂q/∂ŷ is a constant, evaluated at the prediction. The
  gradient is linear in the target y, so its mean over random targets with the same bonds vanishes
  at the mean of these: a denoiser that is trained with it has the posterior mean E[y|x_t] as its
  stationary point, as with the squared error, at noise levels where x_t determines the bonds.
  Prediction and target must be in one frame, as in denoising: this form is invariant under
  motions of both together only. It agrees with *value* to second order in ŷ − y.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from molgen_energy.losses.base import LossConfig, PositionLoss, Samples
from molgen_energy.losses.derivatives import once_differentiable

Rest = Literal["value", "projected"]
RESTS: tuple[Rest, ...] = ("value", "projected")

_SOFTENING = 0.1  # δ, Å


class _Bonds(NamedTuple):
    """Bonds of real atoms as lists of neighbours.

    Atoms are numbered through all samples, b·N + i. Entry p is a bond from `start[p]` to `stop[p]`;
    those from atom a are the entries `first[a]:first[a + 1]`. Each bond has an entry from either
    atom.
    """

    start: Tensor  # (P,)
    stop: Tensor  # (P,)
    first: Tensor  # (B·N + 1,)
    atoms: int
    """N."""

    @classmethod
    def of(cls, samples: Samples) -> _Bonds:
        assert samples.bonds is not None
        count, atoms = samples.prediction.shape[:2]
        pairs = torch.unique_consecutive(samples.bonds.pairs)
        start, other = pairs // max(1, atoms), pairs % max(1, atoms)
        stop = start - start % max(1, atoms) + other
        kept = start != stop
        if samples.mask is not None:
            real = samples.mask.flatten()
            kept &= real[start] & real[stop]
        start, stop = start[kept], stop[kept]
        first = start.new_zeros(count * atoms + 1)
        first[1:] = torch.bincount(start, minlength=count * atoms).cumsum(0)
        return cls(start, stop, first, atoms)

    def torsions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Chains of three bonds i–j–k–l with distinct atoms, each once: three entries, (T,) each.

        They lead from j to i, from k to j and from k to l.
        """
        middle = (self.start < self.stop).nonzero().squeeze(1)
        which, left = _ranges(self.first[self.stop[middle]], self.first[self.stop[middle] + 1])
        middle = middle[which]
        kept = self.stop[left] != self.start[middle]
        left, middle = left[kept], middle[kept]
        which, right = _ranges(self.first[self.start[middle]], self.first[self.start[middle] + 1])
        left, middle = left[which], middle[which]
        end = self.stop[right]
        kept = (end != self.stop[middle]) & (end != self.stop[left])  # the latter in rings of three
        return left[kept], middle[kept], right[kept]

    def triples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every three bonds at an atom: three ascending entries, (V,) each."""
        entry = torch.arange(len(self.start), device=self.start.device)
        one, two = _ranges(entry + 1, self.first[self.start + 1])
        which, three = _ranges(two + 1, self.first[self.start[one] + 1])
        return one[which], two[which], three

    def differences(self, values: Tensor) -> Tensor:
        """x_stop − x_start of values (B, N, 3), (3, P): faster with the coordinate first."""
        flat = values.reshape(-1, 3).T.contiguous()
        return flat.index_select(1, self.stop) - flat.index_select(1, self.start)

    def sample(self, entries: Tensor) -> Tensor:
        """The sample of each entry."""
        return self.start[entries] // max(1, self.atoms)


def _ranges(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each range, repeated, beside every number from its start to its stop."""
    counts = stops - starts
    which = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts - starts
    return which, torch.arange(len(which), device=counts.device) - first[which]


def _mean(values: Tensor, sample: Tensor, samples: int) -> Tensor:
    """Mean of the values of each sample, (B,); 0 without any."""
    count = torch.bincount(sample, minlength=samples).clamp_(min=1)
    return values.new_zeros(samples).index_add(0, sample, values / count[sample])


class _Directions(NamedTuple):
    """Directions v of bonds, and the softened lengths √(b² + δ²)."""

    v: Tensor  # (3, …)
    length: Tensor  # (…)

    @classmethod
    def of(cls, differences: Tensor) -> _Directions:
        length = (_dot(differences, differences) + _SOFTENING**2).sqrt()
        return cls(differences / length, length)

    def at(self, entries: Tensor) -> _Directions:
        return _Directions(self.v.index_select(1, entries), self.length[entries])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the first dimension."""
    return (a * b).sum(dim=0)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Over the first dimension; with its gradient three times as fast as `torch.linalg.cross`."""
    return a.roll(-1, 0) * b.roll(1, 0) - a.roll(1, 0) * b.roll(-1, 0)


def _norm(values: Tensor) -> Tensor:
    """Over the first dimension, with gradient 0 at 0."""
    return _dot(values, values).clamp(min=torch.finfo(values.dtype).tiny).sqrt()


class _InternalCoordinateError(PositionLoss):
    """Error of internal coordinates, each along three bonds of a sample."""

    requires = frozenset({"bonds"})

    def __init__(self, rest: Rest = "value") -> None:
        if rest not in RESTS:
            raise ValueError(f"unknown rest '{rest}' (valid: {', '.join(RESTS)})")
        self.rest: Rest = rest

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        count, _, dimension = samples.prediction.shape
        if dimension != 3:
            raise ValueError(f"torsions and signed volumes need 3 dimensions, not {dimension}")
        if samples.bonds is None:
            raise ValueError("torsions and signed volumes follow bonds: give bonds")
        if self.rest == "projected":
            samples = once_differentiable(samples, "a projected term", ["target"])
        bonds = _Bonds.of(samples)
        entries = self._entries(bonds)
        if self.rest == "value":
            prediction, target = (
                _Directions.of(bonds.differences(x)) for x in (samples.prediction, samples.target)
            )
            now, rest = ([d.v.index_select(1, e) for e in entries] for d in (prediction, target))
            errors = self._errors(now, rest)
        else:
            directions = _Directions.of(bonds.differences(samples.prediction.detach()))
            gradients = self._gradients([directions.at(e) for e in entries])
            change = bonds.differences(samples.prediction - samples.target)
            projections = [
                _dot(g, change.index_select(1, e)) for g, e in zip(gradients, entries, strict=True)
            ]
            errors = 0.5 * sum(projections[1:], projections[0]).square()
        return self._average(errors, entries, bonds, count)

    @abstractmethod
    def _entries(self, bonds: _Bonds) -> tuple[Tensor, Tensor, Tensor]:
        """The three bonds of each coordinate."""

    @abstractmethod
    def _errors(self, prediction: list[Tensor], target: list[Tensor]) -> Tensor:
        """The error of each coordinate by the directions of its bonds (3, T), (T,)."""

    @abstractmethod
    def _gradients(self, prediction: list[_Directions]) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted gradient of each coordinate by its bond vectors, (3, T) each."""

    @abstractmethod
    def _average(
        self, errors: Tensor, entries: tuple[Tensor, Tensor, Tensor], bonds: _Bonds, count: int
    ) -> Tensor:
        """The mean of the errors (T,) of each sample, (B,)."""


class _InternalCoordinateConfig(LossConfig):
    """Settings of the error of an internal coordinate."""

    rest: Rest = "value"

    @property
    def requires(self) -> frozenset[str]:
        """Bonds."""
        return _InternalCoordinateError.requires

    def describe(self) -> str:
        """Where the coordinates are at rest."""
        return f", rest {self.rest}"


class TorsionConfig(_InternalCoordinateConfig):
    """Error of torsions, see `TorsionError`."""

    name: str = "torsion"

    def build(self, *, seed: int = 0, channels: int | None = None) -> TorsionError:
        """The loss; `channels` has no effect."""
        return TorsionError(self.rest)


class TorsionError(_InternalCoordinateError):
    """Mean of w·(1 − cos(φ̂ − φ)) over the torsions φ of a sample.

    A torsion is a chain of three bonds i–j–k–l with four different atoms. The weight is

    w = sin²θ̂_ijk · sin²θ̂_jkl · sin²θ_ijk · sin²θ_jkl

    of the angles of prediction and target, times a factor for softened directions, within 10 % of 1
    at bond lengths. With v₁, v₂, v₃ the directions of r_i − r_j, r_j − r_k and r_l − r_k,

    Z = (v₁×v₂)·(v₃×v₂) − i·|v₂|·v₁·(v₃×v₂) = |Z|·exp(iφ),

    and |Z| = sinθ_ijk · sinθ_jkl. So w·(1 − cos(φ̂ − φ)) = ½·| |Z|·Ẑ − |Ẑ|·Z |², without
    trigonometric functions and without loss of digits near the target. Z and |Ẑ|·Ẑ are continuously
    differentiable, so loss and gradient are continuous everywhere, at straight angles and
    coincident atoms of either argument too, where a torsion has no effect. The loss is at most 2.
    |∂L/∂Ẑ| ≤ 4, |∂Z/∂v₁| and |∂Z/∂v₃| ≤ 1, |∂Z/∂v₂| ≤ √20 and |∂v/∂b| ≤ 1/δ, so a torsion's
    gradient at an atom is at most 22/δ.

    The weight depends on the predicted angles: a wrong torsion also pushes them away from 90°, with
    a force that vanishes with the error. A loss on positions beside it holds the angles.

    With `rest="projected"` a torsion costs ½·w·(g·(ŷ − y))² with w = sin⁴θ̂_ijk · sin⁴θ̂_jkl and
    g = ∂φ̂/∂ŷ at the detached prediction, in closed form: A. Blondel, M. Karplus, "New formulation
    for derivatives of torsion angles and improper torsion angles in molecular mechanics", Journal
    of Computational Chemistry 17, 1996, equation 27. √w·g is continuous and at most 2/δ.

    Parameters
    ----------
    rest
        `value` or `projected`, see `molgen_energy.losses.torsion`.

    Raises
    ------
    ValueError
        `rest` is unknown. In a call: there are no bonds, or not three dimensions.
    """

    Config: ClassVar[type[TorsionConfig]] = TorsionConfig

    def _entries(self, bonds: _Bonds) -> tuple[Tensor, Tensor, Tensor]:
        return bonds.torsions()

    def _errors(self, prediction: list[Tensor], target: list[Tensor]) -> Tensor:
        now, rest = _weighted_phase(*prediction), _weighted_phase(*target)
        return 0.5 * (_norm(rest) * now - _norm(now) * rest).square().sum(dim=0)

    def _gradients(self, prediction: list[_Directions]) -> tuple[Tensor, Tensor, Tensor]:
        (v1, n1), (v2, n2), (v3, n3) = prediction
        left, right = _cross(v1, v2), _cross(v3, v2)
        left_squared, right_squared = _dot(left, left), _dot(right, right)
        middle = _norm(v2)
        return (
            -middle * right_squared * left / n1,
            (_dot(v1, v2) * right_squared * left - _dot(v3, v2) * left_squared * right)
            / (middle * n2),
            middle * left_squared * right / n3,
        )

    def _average(
        self, errors: Tensor, entries: tuple[Tensor, Tensor, Tensor], bonds: _Bonds, count: int
    ) -> Tensor:
        return _mean(errors, bonds.sample(entries[1]), count)


def _weighted_phase(v1: Tensor, v2: Tensor, v3: Tensor) -> Tensor:
    """Real and imaginary part of Z, see `TorsionError`; three (3, T) to (2, T)."""
    left, right = _cross(v1, v2), _cross(v3, v2)
    return torch.stack([_dot(left, right), -_norm(v2) * _dot(v1, right)])


class ChiralityConfig(_InternalCoordinateConfig):
    """Error of signed volumes, see `ChiralityError`."""

    name: str = "chirality"

    def build(self, *, seed: int = 0, channels: int | None = None) -> ChiralityError:
        """The loss; `channels` has no effect."""
        return ChiralityError(self.rest)


class ChiralityError(_InternalCoordinateError):
    """Mean of ½(V̂ − V)² over the atoms with three or more bonds, V = v₁·(v₂×v₃) of three of them.

    At an atom with more than three bonds the error is the mean over all triples of them: the square
    does not depend on the order in a triple, so not on the order of atoms. (The alternating sum of
    four volumes is stationary at a regular tetrahedron, so its error would have degree 4 there; for
    five bonds there is no such sum.) At a planar atom V is 0, and the error resists
    pyramidalisation.

    Directions rather than vectors in Å: |V| ≤ 1, so the error is bounded by 2 and does not repeat
    bond lengths, of which V in Å³ has the third power. The gradient of V by a bond vector is
    (v₂×v₃ − V·v₁)/√(b² + δ²), smooth everywhere and at most 2/δ.

    With `rest="projected"` a triple costs ½(g·(ŷ − y))² with g = ∂V̂/∂ŷ at the detached prediction.

    Parameters
    ----------
    rest
        `value` or `projected`, see `molgen_energy.losses.torsion`.

    Raises
    ------
    ValueError
        `rest` is unknown. In a call: there are no bonds, or not three dimensions.
    """

    Config: ClassVar[type[ChiralityConfig]] = ChiralityConfig

    def _entries(self, bonds: _Bonds) -> tuple[Tensor, Tensor, Tensor]:
        return bonds.triples()

    def _errors(self, prediction: list[Tensor], target: list[Tensor]) -> Tensor:
        return 0.5 * (_volume(*prediction) - _volume(*target)).square()

    def _gradients(self, prediction: list[_Directions]) -> tuple[Tensor, Tensor, Tensor]:
        (v1, n1), (v2, n2), (v3, n3) = prediction
        normals = [_cross(a, b) for a, b in ((v2, v3), (v3, v1), (v1, v2))]
        volume = _dot(v1, normals[0])
        return (
            (normals[0] - volume * v1) / n1,
            (normals[1] - volume * v2) / n2,
            (normals[2] - volume * v3) / n3,
        )

    def _average(
        self, errors: Tensor, entries: tuple[Tensor, Tensor, Tensor], bonds: _Bonds, count: int
    ) -> Tensor:
        degree = bonds.first.diff()
        per_atom = _mean(errors, bonds.start[entries[0]], len(degree))
        centre = (degree > 2).nonzero().squeeze(1)
        return _mean(per_atom[centre], centre // max(1, bonds.atoms), count)


def _volume(v1: Tensor, v2: Tensor, v3: Tensor) -> Tensor:
    """Signed volumes of three (3, V), (V,)."""
    return _dot(v1, _cross(v2, v3))
