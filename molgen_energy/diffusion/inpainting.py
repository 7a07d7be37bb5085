"""Fixed values: part of every sample is given, and a sampler generates the rest around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import levels_of
from molgen_energy.diffusion.spacing import noise_levels
from molgen_energy.diffusion.state import Domain, State

Fixed = TypeVar("Fixed", bound="FixedValues")


class FixedValues(SamplingHook):
    """Holds part of the samples at given values.

    The clean prediction x̂ is replaced by the values where they are fixed. A step of any sampler to
    a level s then has, in the fixed part, the distribution q(x_s | x_t, values): the noise of the
    sampler's own levels, which ends at the values (replacement: Song et al., ICLR 2021, appendix
    I.2, and Lugmayr et al., CVPR 2022). After sampling the fixed part is exactly the values, also
    of discrete fields, which otherwise are those of the last noisy state.

    Fields with zero mean, such as positions, are fixed up to a translation of all fixed atoms
    together: the values are moved to where their centroid is predicted, and the whole is centred.

    Parameters
    ----------
    values
        The values, in the units of the state; where they are not fixed, any finite numbers.
    fixed
        For some domains, true at fixed values; a bool tensor that broadcasts to that of the domain,
        such as (B, N, 1) or (B, N, C).
    """

    def __init__(self, values: State, fixed: Mapping[Domain, Tensor]) -> None:
        self.values = values
        self.fixed = {
            domain: where.expand_as(values.tensors[domain]) for domain, where in fixed.items()
        }
        layout = values.layout
        self._moving = [
            layout.slices[name]
            for name, field in layout.fields.items()
            if field.projection == "zero_mean" and field.domain in self.fixed
        ]
        """Channels of atoms with zero mean."""

    @classmethod
    def of_fields(
        cls: type[Fixed], values: State, fixed: Mapping[str, Tensor], **options: Any
    ) -> Fixed:
        """Fixed values by field, with further options of the class.

        Parameters
        ----------
        values
            As above.
        fixed
            For some fields, true at fixed values, (B, N, C), (B, N, N, C) or (B, C), where C may be
            1 for all channels of the field.
        """
        layout, where = values.layout, {}
        for domain in {layout.fields[name].domain for name in fixed}:
            where[domain] = torch.zeros_like(values.tensors[domain], dtype=torch.bool)
        for name, inside in fixed.items():
            where[layout.fields[name].domain][..., layout.slices[name]] = inside
        return cls(values, where, **options)

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        clean = self._with_values(prediction.clean).projected()
        return Prediction(prediction.process, prediction.noisy, prediction.level, clean, "clean")

    def after_sampling(self, state: State) -> State:
        return self._with_values(state)

    def _with_values(self, state: State) -> State:
        return _replaced(state, self.values.tensors, self.fixed, self._moving)


class MatchedValues(FixedValues):
    """Fixed values of atoms that may be any atoms of a sample, as those of a composition.

    A denoiser without an order of the atoms draws sets of them, and does not know early which atom
    will have which values. So the values are places, and at every level each atom takes one: those
    at the least squared distance in all between the fixed values and x̂ (linear assignment: D. F.
    Crouse, IEEE Trans. Aerosp. Electron. Syst. 52, 1679, 2016). Atoms without a fixed value take
    the places that are free. After sampling atoms are in the order of their places.

    One object serves one batch of samples.
    """

    def __init__(self, values: State, fixed: Mapping[Domain, Tensor]) -> None:
        super().__init__(values, fixed)
        self._places: Tensor | None = None
        """Of each atom, (B, N)."""

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        self._match(prediction.clean)
        return super().after_prediction(prediction, level)

    def after_sampling(self, state: State) -> State:
        if self._places is None:
            return super().after_sampling(state)
        atoms = self._places.argsort(dim=1)
        own = self._with_values(state).tensors
        return State(state.layout, state.mask, {name: _taken(t, atoms) for name, t in own.items()})

    def _with_values(self, state: State) -> State:
        if self._places is None:
            return super()._with_values(state)
        values, fixed = (
            {domain: _taken(tensor, self._places) for domain, tensor in tensors.items()}
            for tensors in (self.values.tensors, self.fixed)
        )
        return _replaced(state, values, fixed, self._moving)

    def _match(self, clean: State) -> None:
        """Give each atom a place."""
        values, fixed = self.values.tensors["atom"], self.fixed["atom"]
        for _ in range(_MATCHES if self._moving else 1):
            places = self._places
            if places is None:  # the centroid of fixed atoms is that of all
                there = torch.zeros_like(values)
            else:
                there = _taken(clean.atoms, places.argsort(dim=1))
            for channels in self._moving:
                values = _moved(values, fixed, there, channels)
            self._places = _assigned(values, fixed, clean, clean.mask)


class AnchoredValues(MatchedValues):
    """Fixed atoms in their places, and the others near anchors while noise is high.

    A denoiser does not know at high noise which atoms are fixed, and spreads the others among them,
    where they later find no place. So down to a noise level, x̂ of the other atoms is moved so that
    the mean of each group of them is at its anchor. Only the others may take each other's places.

    Parameters
    ----------
    anchors
        Of G groups, relative to the centroid of the fixed atoms, in the units of the state,
        (B, G, 3).
    groups
        The group of each atom, (B, N) int64; negative for fixed atoms and padding.
    until
        The noise level, σ/α in Å.
    """

    def __init__(
        self,
        values: State,
        fixed: Mapping[Domain, Tensor],
        anchors: Tensor,
        groups: Tensor,
        until: float,
    ) -> None:
        super().__init__(values, fixed)
        self._anchors, self._until = anchors, until
        self._free = groups >= 0
        members = torch.nn.functional.one_hot(groups.clamp(min=0), anchors.shape[1])
        self._members = (members * self._free[..., None]).to(anchors.dtype)  # (B, N, G)
        self._others_fixed = bool((self.fixed["atom"] & self._free[..., None]).any())

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        prediction = super().after_prediction(prediction, level)
        clean = prediction.clean
        at = levels_of(1, level, torch.device("cpu"))  # a GPU would make each step wait
        if noise_levels(prediction.process, clean.layout, at) < self._until:
            return prediction
        positions = clean["positions"]
        held = clean.mask & ~self._free
        fixed = torch.where(held[..., None], positions, 0).sum(dim=1)
        centroid = fixed / held.sum(dim=1, keepdim=True).clamp(min=1)
        counts = self._members.sum(dim=1)[..., None].clamp(min=1)
        means = self._members.transpose(1, 2) @ positions / counts
        apart = centroid[:, None] + self._anchors - means
        moved = clean.replace(positions=positions + self._members @ apart).projected()
        noisy, process = prediction.noisy, prediction.process
        return Prediction(process, noisy, prediction.level, moved, "clean")

    def _match(self, clean: State) -> None:
        if self._others_fixed:
            values, fixed = self.values.tensors["atom"], self.fixed["atom"]
            self._places = _assigned(values, fixed, clean, self._free)


_MATCHES = 2  # before and after fixed atoms are moved to the predicted centroid


def _assigned(values: Tensor, fixed: Tensor, clean: State, movable: Tensor) -> Tensor:
    """The place of each atom, (B, N), at the least squared distance from values of places.

    Atoms that are not movable, (B, N), keep their place.
    """
    weight = fixed.to(values.dtype)
    there = clean.atoms
    fixed_values = weight * values
    # |v − x|² over fixed channels, of places and atoms, (B, N, N).
    cost = (fixed_values * values).sum(dim=-1)[:, :, None]
    cost = cost - 2 * fixed_values @ there.transpose(1, 2) + weight @ (there**2).transpose(1, 2)
    places = torch.arange(values.shape[1]).expand(values.shape[:2]).clone()
    # Of a sample that diverged, any assignment.
    rows = cost.double().nan_to_num(0.0, 0.0, 0.0).cpu().numpy()
    for sample, chosen in enumerate(movable.cpu().numpy()):
        (own,) = np.nonzero(chosen)
        _, atoms = linear_sum_assignment(rows[sample][np.ix_(own, own)])
        places[sample, own[atoms]] = torch.from_numpy(own)
    return places.to(values.device)


def _taken(tensor: Tensor, order: Tensor) -> Tensor:
    """A tensor of atoms (B, N, C) or pairs (B, N, N, C) with atoms in an order (B, N)."""
    samples = torch.arange(len(order), device=order.device)
    if tensor.ndim == 4:
        return tensor[samples[:, None, None], order[:, :, None], order[:, None, :]]
    return tensor[samples[:, None], order] if tensor.ndim == 3 else tensor


def _replaced(
    state: State,
    values: Mapping[Domain, Tensor],
    fixed: Mapping[Domain, Tensor],
    moving: Sequence[slice],
) -> State:
    """A state with values where they are fixed, those with zero mean moved."""
    tensors = dict(state.tensors)
    for domain, where in fixed.items():
        own = values[domain]
        if domain == "atom":
            for channels in moving:
                own = _moved(own, where, tensors[domain], channels)
        tensors[domain] = torch.where(where, own, tensors[domain])
    return State(state.layout, state.mask, tensors)


def _moved(values: Tensor, fixed: Tensor, there: Tensor, channels: slice) -> Tensor:
    """Values (B, N, C) of atoms, some channels moved to the centroid of the fixed ones."""
    where = fixed[..., channels]
    apart = torch.where(where, there[..., channels] - values[..., channels], 0)
    count = where.sum(dim=1, keepdim=True).clamp(min=1)
    moved = values.clone()
    moved[..., channels] += apart.sum(dim=1, keepdim=True) / count
    return moved
