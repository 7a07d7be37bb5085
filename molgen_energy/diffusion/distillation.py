"""Distillation: a student that draws samples in a few evaluations of the network.

Multistep moment matching (Salimans et al., NeurIPS 2024, arXiv:2406.04103, algorithm 2), with the
normalised gradient of distribution matching (Yin et al., CVPR 2024, arXiv:2311.18828, equation 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.objective import Objective, places, without_padding
from molgen_energy.diffusion.process import Process, VariancePreserving
from molgen_energy.diffusion.spacing import levels_near, noise_to_signal, power_levels
from molgen_energy.diffusion.state import Domain, State
from molgen_energy.errors import InputError

_LEAST_DISTANCE = 1e-3
"""In the units of the state, added to the distance that gradients are divided by."""
_ABOVE, _BELOW = 4.0, 0.1
"""Networks are compared at levels from `_BELOW` times the lowest one of the student, where little
noise is left, to `_ABOVE` times its second one, above which little is left of the data."""


DISTANCES = ("teacher_distance", "moment_distance")
"""What `DistillationTerms` holds besides the losses."""


class DistillationTerms(NamedTuple):
    """The losses of each sample, (B,), and what there is to know about them, (B,) each."""

    student: Tensor
    auxiliary: Tensor
    teacher_distance: Tensor
    """Mean |x̃ − x̂_teacher| over the coordinates of atoms, Å."""
    moment_distance: Tensor
    """Mean |x̂_φ − x̂_teacher| likewise, which is 0 if the student draws what the teacher would."""


class Distillation:
    """The losses of a student and of the auxiliary network that learns what the student draws.

    Data with noise at one of the student's K levels, x_t, give the student's clean prediction x̃,
    and this a state at a lower level, x_s ~ q(x_s | x_t, x̃). There the auxiliary network φ learns
    E[x̃ | x_s], by the objective that the teacher had on data. If the student draws what the teacher
    would, this is what the teacher predicts, so the student's loss is, for every field f,

        ½·Σ_c mean over atoms of (x̃ − c)²,  c = x̃ − (x̂_φ(x_s) − x̂_teacher(x_s))/mean|x̃ − x̂_teacher|

    with c constant: its gradient with respect to x̃ is the difference of both networks, divided by
    the number of atoms (of pairs, for fields of pairs) and by the distance of the prediction.

    Parameters
    ----------
    objective
        That of the teacher, with its process, a diffusion.
    teacher
        A denoiser that is not self-conditioned. It gets no gradient.
    levels
        The K levels of the student, descending; see `student_levels`.
    regulariser
        Weight of the same objective between φ and the prediction of the teacher in the loss of φ,
        which keeps φ near the teacher (1 in the paper).
    student_share
        Share of batches whose loss has a gradient for the student; φ learns from all of them.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: nn.Module,
        levels: Sequence[float],
        regulariser: float = 0.0,
        student_share: float = 1.0,
    ) -> None:
        self.objective, self.process = objective, objective.process
        self.teacher = teacher.eval().requires_grad_(False)
        self.levels, self.regulariser = tuple(levels), regulariser
        self.student_share = student_share
        # Of the device that is used, since a copy to a GPU would wait for it.
        self._segments = torch.tensor(self._bounds(), dtype=torch.float64)

    def _bounds(self) -> list[Sequence[float]]:
        """Each level t, and the lowest and highest level s that goes with it, (3, K)."""
        process, levels = self.process, self.levels
        bounds = [
            _ABOVE * noise_to_signal(process, levels[1]),
            _BELOW * noise_to_signal(process, levels[-1]),
        ]
        high, low = levels_near(process, torch.tensor(bounds, dtype=torch.float64))
        low = max(low, process.first_level)
        # Of numbered levels s is below t, so that no segment is empty.
        unit = 0 if process.continuous else 1
        lows = [*levels[1:], min(low, levels[-1] - unit)]
        highs = [
            max(min(level, high), below + unit) for level, below in zip(levels, lows, strict=True)
        ]
        return [levels, lows, highs]

    def __call__(
        self,
        student: nn.Module,
        auxiliary: nn.Module,
        clean: State,
        random: RandomNumbers,
        condition: Tensor | None = None,
        loss_inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> DistillationTerms:
        """Draw levels and noise for each sample, and compute the losses of both networks.

        The gradient of `student` reaches the student alone, that of `auxiliary` φ alone.

        Parameters
        ----------
        student, auxiliary
            Denoisers, called as model(state, time, mask, condition, self_condition).
        clean
            The data.
        random
            Random numbers of the samples.
        condition
            (B, K), or None.
        loss_inputs
            Further arguments of the losses, which must not belong to the molecules of the data.
        """
        process = self.process
        t, s = self.draw_levels(random)
        noisy = process.add_noise(clean, random.noise(clean.layout, clean.mask, 0), t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._student_learns(random)):
            drawn = process.predict(student, noisy, t, condition).clean.projected()
        fixed = drawn.detach()
        lower = self.posterior(fixed, noisy, t, s, random.noise(clean.layout, clean.mask, 1))
        # Neither its weights nor its input need a gradient. It is computed as φ is, since products
        # without gradients round otherwise, and equal networks shall give equal predictions.
        expected = process.predict(self.teacher, lower, s, condition).clean.projected()
        prediction = process.predict(auxiliary, lower, s, condition)
        moment = prediction.clean.projected().detach()

        def loss_towards(target: State) -> Tensor:
            noise = (lower - process.alpha(s) * target) / process.sigma(s)
            return self.objective.compare(prediction, target, noise, s, random, loss_inputs).total

        auxiliary_loss = loss_towards(fixed)
        if self.regulariser:
            auxiliary_loss = auxiliary_loss + self.regulariser * loss_towards(expected)
        scale = clean.layout.fields["positions"].scale
        distances = [
            scale * _mean_distance(state, expected, "positions") for state in (fixed, moment)
        ]
        return DistillationTerms(
            _student_loss(drawn, moment, expected), auxiliary_loss, distances[0], distances[1]
        )

    def _student_learns(self, random: RandomNumbers) -> bool:
        """Whether the student gets a gradient from this batch."""
        share = self.student_share
        return share == 1 or random.uniform_of_batch(Stream.STUDENT) < share

    def draw_levels(self, random: RandomNumbers) -> tuple[Tensor, Tensor]:
        """Levels t and s of the samples, (B,), int64 or of a continuous process float64.

        t is one of the student's levels, each for about as many samples of a batch, and s is
        uniform between the next one and t.
        """
        count, device = len(self.levels), random.samples.device
        if self._segments.device != device:
            self._segments = self._segments.to(device)
        place = (count * random.stratified(Stream.LEVEL)).long().clamp(max=count - 1)
        t, low, high = self._segments[:, place]
        s = low + (high - low) * random.uniform(Stream.LOWER_LEVEL).double()
        return (t, s) if self.process.continuous else (t.long(), s.long())

    def posterior(self, clean: State, noisy: State, t: Tensor, s: Tensor, noise: State) -> State:
        """A state from q(x_s | x_t, x), levels s below t (B,), the step of `AncestralSampler`."""
        alpha_t, sigma_t, alpha_s, sigma_s = (
            factor(level).double()
            for level in (t, s)
            for factor in (self.process.alpha, self.process.sigma)
        )
        ratio = alpha_t / alpha_s
        of_noisy = ratio * sigma_s.square() / sigma_t.square()
        step_variance = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0)
        factors = (alpha_s - of_noisy * alpha_t, of_noisy, step_variance.sqrt() * sigma_s / sigma_t)
        of_clean, of_noisy, of_noise = (factor.to(noisy.atoms.dtype) for factor in factors)
        return (of_clean * clean + of_noisy * noisy + of_noise * noise).projected()


def student_levels(
    process: Process, scale: float, count: int, highest: float, lowest: float, power: float
) -> tuple[float, ...]:
    """The levels at which a student is evaluated: pure noise, then others down to a low one.

    Parameters
    ----------
    process
        The process of the teacher.
    scale
        Å in the unit of the positions.
    count
        K, at least 3.
    highest, lowest
        Noise of the second and of the last level, σ/α in Å.
    power
        In between levels have equal distances in (σ/α)^{1/power}, see `power_levels`.

    Raises
    ------
    InputError
        The process is no diffusion, or has fewer levels.
    """
    if not isinstance(process, VariancePreserving):
        raise InputError(
            f"a student draws with the sampler ancestral, which is not for {process.name}; name a "
            "teacher that was trained with diffusion or cosine"
        )
    if not process.continuous and count > process.steps:
        raise InputError(
            f"distillation.evaluations: the teacher has {process.steps:,} noise levels; choose at "
            "most as many"
        )
    return tuple(power_levels(process, count, highest / scale, power, lowest / scale))


def _student_loss(drawn: State, moment: State, expected: State) -> Tensor:
    """The loss of each sample's prediction x̃ (B,), given what both networks expect."""
    total = drawn.mask.new_zeros(len(drawn), dtype=drawn.atoms.dtype)
    for name, field in drawn.layout.fields.items():
        distance = _mean_distance(drawn.detach(), expected, name) + _LEAST_DISTANCE
        value = drawn[name]
        direction = (moment[name] - expected[name]) / distance.view(-1, *[1] * (value.ndim - 1))
        squares = (value - (value - direction).detach()).square()
        total = total + 0.5 * _mean_over_places(field.domain, squares, drawn.mask)
    return total


def _mean_distance(a: State, b: State, name: str) -> Tensor:
    """Mean |a − b| of a field over atoms or pairs and over channels, (B,)."""
    field = a.layout.fields[name]
    distances = (a[name] - b[name]).abs()
    return _mean_over_places(field.domain, distances, a.mask) / field.channels


def _mean_over_places(domain: Domain, values: Tensor, mask: Tensor) -> Tensor:
    """The sum over channels and the mean over atoms or pairs, (B,)."""
    return without_padding(domain, values, mask).flatten(1).sum(dim=1) / places(domain, mask)
