"""Fixed values: part of every sample is given, and a sampler generates the rest around it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.state import Domain, State


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
        self._moving: list[tuple[slice, Tensor]] = []  # channels with zero mean, where fixed
        for name, field in layout.fields.items():
            if field.projection == "zero_mean" and field.domain in self.fixed:
                channels = layout.slices[name]
                self._moving.append((channels, self.fixed[field.domain][..., channels]))

    @classmethod
    def of_fields(cls, values: State, fixed: Mapping[str, Tensor]) -> FixedValues:
        """Fixed values by field.

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
        return cls(values, where)

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        clean = self._with_values(prediction.clean).projected()
        return Prediction(prediction.process, prediction.noisy, prediction.level, clean, "clean")

    def after_sampling(self, state: State) -> State:
        return self._with_values(state)

    def _with_values(self, state: State) -> State:
        tensors = dict(state.tensors)
        for domain, where in self.fixed.items():
            values = self.values.tensors[domain]
            if domain == "atom" and self._moving:
                values = self._moved(values, tensors[domain])
            tensors[domain] = torch.where(where, values, tensors[domain])
        return State(state.layout, state.mask, tensors)

    def _moved(self, values: Tensor, there: Tensor) -> Tensor:
        """The values of atoms, those with zero mean moved to the centroid of the fixed ones."""
        values = values.clone()
        for channels, where in self._moving:
            apart = torch.where(where, there[..., channels] - values[..., channels], 0)
            count = where.sum(dim=1, keepdim=True).clamp(min=1)
            values[..., channels] += apart.sum(dim=1, keepdim=True) / count
        return values
