"""Named fields of a sample, and the state that batches, processes, models and samplers pass on.

A field is a named quantity of the atoms, of the pairs of atoms, or of the whole sample. A `Layout`
puts the fields of one domain side by side into one contiguous tensor, so that adding noise takes
one operation for each domain, for any number of fields:

========  =================  ==============================================
domain    tensor             examples
========  =================  ==============================================
`atom`    (B, N, C)          positions, elements, formal charges
`pair`    (B, N, N, C)       bonds
`graph`   (B, C)             a periodic cell
========  =================  ==============================================

B samples, N atoms of the largest one, C channels of all fields of the domain. Tensors are zero
at padding, and tensors of pairs on the diagonal as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molgen_energy.diffusion.geometry import centred

Domain = Literal["atom", "pair", "graph"]
DOMAINS: tuple[Domain, ...] = ("atom", "pair", "graph")
Projection = Literal["none", "zero_mean", "symmetric"]


@dataclass(frozen=True)
class Field:
    """A named quantity that a process adds noise to and a model predicts.

    Subclasses encode other data than plain numbers, such as elements; `encode` and `decode` of
    this class divide and multiply by the scale.

    Parameters
    ----------
    name
        Unique in a layout.
    domain
        `atom`, `pair` or `graph`.
    channels
        Numbers for each atom, pair or sample.
    scale
        Data are divided by it.
    projection
        Subspace on which the field and its noise lie: `zero_mean` over the atoms of a sample,
        `symmetric` in the two atoms of a pair, or `none`.
    discrete
        Whether values are classes or integers. Samplers return the last noisy state of a discrete
        field, whose remaining noise rounding removes, and the clean prediction of the others.
    """

    name: str
    domain: Domain
    channels: int
    scale: float = 1.0
    projection: Projection = "none"
    discrete: bool = False

    def __post_init__(self) -> None:
        allowed = {"atom": ("none", "zero_mean"), "pair": ("none", "symmetric"), "graph": ("none",)}
        if self.projection not in allowed[self.domain]:
            raise ValueError(
                f"field {self.name}: projection {self.projection} is not defined for {self.domain}"
            )

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What each channel means, unique in a layout; channels of two data sets are the same if
        their names are."""
        if self.channels == 1:
            return (self.name,)
        return tuple(f"{self.name} {number}" for number in range(1, self.channels + 1))

    @property
    def columns(self) -> frozenset[str]:
        """Optional columns of the data that `encode` reads."""
        return frozenset({self.name})

    @property
    def midpoint(self) -> float:
        """Value halfway between no and yes, in the units of the state, of a field of classes."""
        return 0.5 / self.scale

    def encode(self, data: Mapping[str, Tensor]) -> Tensor:
        """Values in the units of the state, (B, N, C), (B, N, N, C) or (B, C), from named data."""
        return data[self.name] / self.scale

    def decode(self, values: Tensor) -> dict[str, Tensor]:
        """Named data from values in the units of the state."""
        return {self.name: values * self.scale}


class _Segment:
    """Neighbouring channels of a domain with the same projection."""

    def __init__(self, projection: Projection, channels: slice) -> None:
        self.projection, self.channels = projection, channels


class Layout:
    """Fields, and their channels in the tensors of their domains.

    Raises
    ------
    ValueError
        Two fields have the same name.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields: dict[str, Field] = {field.name: field for field in fields}
        if len(self.fields) != len(fields):
            raise ValueError("two fields of a layout have the same name")
        self.slices: dict[str, slice] = {}
        self.channels: dict[Domain, int] = {}
        self._segments: dict[Domain, list[_Segment]] = {}
        for field in fields:
            start = self.channels.get(field.domain, 0)
            place = slice(start, start + field.channels)
            self.slices[field.name] = place
            self.channels[field.domain] = place.stop
            segments = self._segments.setdefault(field.domain, [])
            # Fields without a projection are handled together.
            if segments and segments[-1].projection == field.projection == "none":
                segments[-1].channels = slice(segments[-1].channels.start, place.stop)
            else:
                segments.append(_Segment(field.projection, place))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self.fields.values()) == list(
            other.fields.values()
        )

    def __hash__(self) -> int:
        return hash(tuple(self.fields.values()))

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def channel_names(self, domain: Domain) -> tuple[str, ...]:
        """What each channel of a domain's tensor means."""
        fields = (field for field in self.fields.values() if field.domain == domain)
        return tuple(name for field in fields for name in field.channel_names)

    def shape(self, domain: Domain, mask: Tensor) -> tuple[int, ...]:
        """Shape of a domain's tensor for a mask (B, N)."""
        batch, atoms = mask.shape
        place = {"atom": (batch, atoms), "pair": (batch, atoms, atoms), "graph": (batch,)}[domain]
        return (*place, self.channels[domain])

    def project(self, domain: Domain, values: Tensor, mask: Tensor) -> Tensor:
        """The orthogonal projection of a domain's tensor onto the subspaces of its fields."""
        inside = _inside(domain, mask)
        parts = []
        for segment in self._segments[domain]:
            part = values[..., segment.channels]
            if segment.projection == "zero_mean":
                part = centred(part, mask)
            else:
                part = part if inside is None else torch.where(inside, part, 0)
                if segment.projection == "symmetric":
                    part = (part + part.transpose(1, 2)) / 2
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def standard_noise(self, domain: Domain, normal: Tensor, mask: Tensor) -> Tensor:
        """Standard normal noise on the subspaces, from independent normal numbers of its shape.

        Noise of symmetric fields is that of the lower triangle, mirrored: each entry has unit
        variance, which a projection would halve.
        """
        symmetric = [s for s in self._segments[domain] if s.projection == "symmetric"]
        if symmetric:
            atoms = torch.arange(mask.shape[1], device=mask.device)
            lower = (atoms[:, None] > atoms)[None, :, :, None]
            normal = normal.clone()
            for segment in symmetric:
                part = normal[..., segment.channels]
                normal[..., segment.channels] = torch.where(lower, part, part.transpose(1, 2))
        return self.project(domain, normal, mask)


def _inside(domain: Domain, mask: Tensor) -> Tensor | None:
    """True at real atoms (B, N, 1), or at pairs of different real atoms (B, N, N, 1)."""
    if domain == "atom":
        return mask[..., None]
    if domain == "pair":
        return pairs_inside(mask)[..., None]
    return None


def pairs_inside(mask: Tensor) -> Tensor:
    """(B, N, N) from (B, N): true for pairs of different real atoms."""
    distinct = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask[:, :, None] & mask[:, None, :] & distinct


# A dataclass, since DistributedDataParallel finds the tensors of a result in fields alone.
@dataclass(init=False, repr=False, eq=False)
class State:
    """The values of all fields of a batch of samples.

    Supports `+` and `-` with another state, and `*` and `/` with a number or with one number for
    each sample, a tensor (B,).

    Parameters
    ----------
    layout
        The fields.
    mask
        (B, N), true at real atoms.
    tensors
        One tensor for each domain of the layout.
    """

    __slots__ = ("layout", "mask", "tensors")
    layout: Layout
    mask: Tensor
    tensors: dict[Domain, Tensor]

    def __init__(self, layout: Layout, mask: Tensor, tensors: Mapping[Domain, Tensor]) -> None:
        self.layout, self.mask, self.tensors = layout, mask, dict(tensors)

    @classmethod
    def from_fields(cls, layout: Layout, mask: Tensor, values: Mapping[str, Tensor]) -> State:
        """A state on the subspaces of its fields, from the values of all fields by name.

        Raises
        ------
        ValueError
            A field is missing, unknown, or of another shape.
        """
        if values.keys() != layout.fields.keys():
            raise ValueError(
                f"expected the fields {', '.join(layout.fields)}, found {', '.join(values)}"
            )
        for name, field in layout.fields.items():
            expected = (*layout.shape(field.domain, mask)[:-1], field.channels)
            if values[name].shape != expected:
                raise ValueError(
                    f"field {name}: expected shape {expected}, found {tuple(values[name].shape)}"
                )
        tensors: dict[Domain, Tensor] = {}
        for domain in layout.channels:
            own = [values[name] for name, f in layout.fields.items() if f.domain == domain]
            tensors[domain] = own[0] if len(own) == 1 else torch.cat(own, dim=-1)
        return cls(layout, mask, tensors).projected()

    @property
    def atoms(self) -> Tensor:
        """All fields of atoms in one tensor, (B, N, C)."""
        return self.tensors["atom"]

    def __getitem__(self, name: str) -> Tensor:
        """The values of a field, a view."""
        field = self.layout.fields[name]
        return self.tensors[field.domain][..., self.layout.slices[name]]

    def __len__(self) -> int:
        return len(self.mask)

    def replace(self, **values: Tensor) -> State:
        """A copy with other values of some fields; the result is not projected."""
        tensors = dict(self.tensors)
        for domain in {self.layout.fields[name].domain for name in values}:
            own = [name for name, f in self.layout.fields.items() if f.domain == domain]
            parts = [values[name] if name in values else self[name] for name in own]
            tensors[domain] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return State(self.layout, self.mask, tensors)

    def with_atoms(self, atoms: Tensor) -> State:
        """A copy with another tensor of all fields of atoms, (B, N, C)."""
        return State(self.layout, self.mask, {**self.tensors, "atom": atoms})

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """A state with a function applied to the tensor of each domain."""
        tensors = {domain: function(values) for domain, values in self.tensors.items()}
        return State(self.layout, self.mask, tensors)

    def projected(self) -> State:
        """The state projected onto the subspaces of its fields, zero at padding."""
        tensors = {
            domain: self.layout.project(domain, values, self.mask)
            for domain, values in self.tensors.items()
        }
        return State(self.layout, self.mask, tensors)

    def detach(self) -> State:
        """The same values without gradients."""
        return self.map(Tensor.detach)

    def decode(self) -> dict[str, Tensor]:
        """Named data of all fields; see `Field.decode`."""
        data: dict[str, Tensor] = {}
        for name, field in self.layout.fields.items():
            data |= field.decode(self[name])
        return data

    def __add__(self, other: State) -> State:
        return self._with(other, torch.add)

    def __sub__(self, other: State) -> State:
        return self._with(other, torch.sub)

    def _with(self, other: State, function: Callable[[Tensor, Tensor], Tensor]) -> State:
        tensors = {
            domain: function(values, other.tensors[domain])
            for domain, values in self.tensors.items()
        }
        return State(self.layout, self.mask, tensors)

    def __mul__(self, factor: float | Tensor) -> State:
        return self.map(lambda values: _aligned(factor, values) * values)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> State:
        return self.map(lambda values: values / _aligned(divisor, values))


def _aligned(factor: float | Tensor, values: Tensor) -> float | Tensor:
    """A factor for each sample, (B,), with the dimensions to multiply a tensor (B, …)."""
    if not isinstance(factor, Tensor):
        return factor
    return factor.view(-1, *[1] * (values.ndim - 1))
