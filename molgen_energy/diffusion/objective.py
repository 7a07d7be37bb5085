"""The training objective: a weighted sum of losses, one for each field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.given import GivenFields
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import Process, is_self_conditioned
from molgen_energy.diffusion.state import Domain, State, pairs_inside
from molgen_energy.losses import AdaptiveSprings, PositionLoss


class TimestepDistribution(NamedTuple):
    """How often each noise level is drawn in training.

    The share u^power of all levels, for u uniform in [0, 1): a power above 1 draws low noise levels
    more often.
    """

    power: float = 1.0
    stratified: bool = False
    """Whether a batch has one u in each of its equal parts of [0, 1), which reduces the variance of
    the mean loss."""

    def draw(self, random: RandomNumbers) -> Tensor:
        """Numbers in [0, 1] for `Process.draw_levels`, (B,)."""
        draw = random.stratified if self.stratified else random.uniform
        return draw(Stream.LEVEL) ** self.power


class Terms(NamedTuple):
    """The objective of each sample, (B,), and its terms by field or further loss, each (B,)."""

    total: Tensor
    parts: dict[str, Tensor]


class Weights(NamedTuple):
    """Weights of an objective.

    Parameters
    ----------
    positions
        w, the weight of the loss on positions.
    fields
        Weights of the errors of the other fields, by name; 1 for fields that are not named.
    terms
        Weights of the further losses on positions, by name; 1 for losses that are not named.
    """

    positions: float
    fields: Mapping[str, float] = MappingProxyType({})
    terms: Mapping[str, float] = MappingProxyType({})


class Objective:
    """½·[W(t)·w·L(s·x̂, s·x) + Σ_f w_f·|f − f̂|^p / (n·C)] for each sample, p the degree of L.

    Section 4.2 of Kaba et al., NeurIPS 2025. L is a loss on clean positions, and f̂ the prediction
    of every other field. The error of a field of atoms is averaged over the n atoms and the C
    channels of all fields of atoms, that of a field of pairs over pairs and channels of fields of
    pairs. Further losses on clean positions L_m add ½·W(t)·w_m·L_m(s·x̂, s·x).

    With `reduction="sum"` errors of fields are summed over atoms or ordered pairs, and averaged
    over the channels of the other fields of the domain, without positions. Losses that are a mean
    over atoms are multiplied by n. (JODO: Huang et al., 2023, arXiv:2305.12347.)

    Parameters
    ----------
    process
        Adds the noise.
    position_loss
        L, called with clean positions in Å, (B, N, 3).
    weights
        w, w_m and w_f.
    timesteps
        How often each level is drawn.
    weighting
        `noise`: f is the target of the process (noise for diffusion, velocity for flow matching)
        and W = (α/σ)^p, for flow matching 1/t^p, so that a small error of the target costs the same
        at every level. `clean`: f is clean data, and all terms have the weight √(α/σ) in place of
        ½ (JODO), which suits denoisers that predict clean data.
    self_condition_probability
        Probability that a self-conditioned denoiser gets its own first prediction, the same for
        the whole batch.
    self_condition_passes
        Evaluations without gradient that make this prediction, each with that of the one before.
    reduction
        `mean` or `sum` of the errors of fields over atoms or pairs.
    terms
        L_m, by names that no field has.
    given
        Fields that the denoiser gets without noise, see `GivenFields`; they have no error.
    """

    def __init__(
        self,
        process: Process,
        position_loss: PositionLoss,
        weights: Weights,
        timesteps: TimestepDistribution | None = None,
        weighting: Literal["noise", "clean"] = "noise",
        self_condition_probability: float = 0.5,
        self_condition_passes: int = 1,
        reduction: Literal["mean", "sum"] = "mean",
        terms: Mapping[str, PositionLoss] = MappingProxyType({}),
        given: Sequence[str] = (),
    ) -> None:
        self.process = process
        self.position_loss = position_loss
        self.weights = weights
        self.timesteps = TimestepDistribution() if timesteps is None else timesteps
        self.weighting = weighting
        self.self_condition_probability = self_condition_probability
        self.self_condition_passes = self_condition_passes
        self.reduction = reduction
        self.terms = dict(terms)
        self.given = tuple(given)

    @property
    def adaptive(self) -> AdaptiveSprings | None:
        """The springs of the loss on positions that are learnt, if any."""
        return self.position_loss.adaptive

    def __call__(
        self,
        model: nn.Module,
        clean: State,
        random: RandomNumbers,
        condition: Tensor | None = None,
        loss_inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Terms:
        """Draw a level and noise for each sample, and compute the losses of the prediction.

        Parameters
        ----------
        model
            A denoiser, called as model(state, time, mask, condition, self_condition).
        clean
            The data.
        random
            Random numbers of the samples.
        condition
            (B, K), or None.
        loss_inputs
            Further arguments of the loss on positions, such as bonds.
        """
        process = self.process
        level = process.draw_levels(self.timesteps.draw(random))
        noise = random.noise(clean.layout, clean.mask, 0)
        noisy = process.add_noise(clean, noise, level)
        if self.given:
            model = GivenFields(model, self.given, clean)
        previous = self._first_prediction(model, noisy, level, condition, random)
        prediction = process.predict(model, noisy, level, condition, previous)
        return self.compare(prediction, clean, noise, level, random, loss_inputs)

    def compare(
        self,
        prediction: Prediction,
        clean: State,
        noise: State,
        level: Tensor,
        random: RandomNumbers,
        loss_inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Terms:
        """The losses of a prediction at the noisy state of this data and noise, at levels (B,)."""
        parts = {
            **self._position_terms(prediction, clean, level, random, loss_inputs),
            **self._error_terms(prediction, clean, noise, level),
        }
        return Terms(torch.stack(list(parts.values())).sum(dim=0), parts)

    def _first_prediction(
        self,
        model: nn.Module,
        noisy: State,
        level: Tensor,
        condition: Tensor | None,
        random: RandomNumbers,
    ) -> State | None:
        """A clean prediction without gradient for a self-conditioned denoiser, or None."""
        if not is_self_conditioned(model):
            return None
        if random.uniform_of_batch(Stream.SELF_CONDITION) >= self.self_condition_probability:
            return None
        previous = None
        with torch.no_grad():
            for _ in range(self.self_condition_passes):
                prediction = self.process.predict(model, noisy, level, condition, previous)
                previous = prediction.clean.projected().detach()
        return previous

    def _signal_to_noise(self, level: Tensor) -> Tensor:
        """α/σ, for flow matching 1/t, (B,)."""
        if self.process.target == "velocity":
            return 1 / self.process.sigma(level)
        return self.process.alpha(level) / self.process.sigma(level)

    def _clean_weight(self, level: Tensor) -> Tensor:
        """√(α/σ), (B,)."""
        return (self.process.alpha(level) / self.process.sigma(level)).sqrt()

    def _position_terms(
        self,
        prediction: Prediction,
        clean: State,
        level: Tensor,
        random: RandomNumbers,
        loss_inputs: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The loss on positions and the further ones, weighted."""
        scale = clean.layout.fields["positions"].scale
        signal_to_noise = self._signal_to_noise(level) / scale
        predicted, true = scale * prediction.clean["positions"], scale * clean["positions"]
        inputs = {
            **loss_inputs,
            "noisy": scale * prediction.noisy["positions"].detach(),
            "noise_level": scale * self.process.sigma(level) / self.process.alpha(level),
        }
        losses = {"positions": (self.weights.positions, self.position_loss)}
        for name, term in self.terms.items():
            losses[name] = self.weights.terms.get(name, 1.0), term
        terms = {}
        for name, (weight, loss) in losses.items():
            values = loss(
                predicted,
                true,
                clean.mask,
                generator=random.integers(Stream.EDGES),
                **{key: value for key, value in inputs.items() if key in loss.requires},
            )
            if self.weighting == "noise":
                in_time = 0.5 * signal_to_noise**loss.degree
            else:
                in_time = self._clean_weight(level)
            if self.reduction == "sum" and not loss.Config.extensive:
                values = values * places("atom", clean.mask)
            terms[name] = weight * in_time * values
        return terms

    def _error_terms(
        self, prediction: Prediction, clean: State, noise: State, level: Tensor
    ) -> dict[str, Tensor]:
        """Error terms of all fields except positions and given ones."""
        if self.weighting == "noise":
            predicted, true = prediction.target, self.process.true_target(clean, noise, level)
            weight = torch.full_like(self.process.sigma(level), 0.5)
        else:
            predicted, true, weight = prediction.clean, clean, self._clean_weight(level)
        degree, terms = self.position_loss.degree, {}
        for name, field in clean.layout.fields.items():
            if name == "positions" or name in self.given:
                continue
            difference = without_padding(
                field.domain, predicted[name] - true[name], clean.mask
            ).flatten(1)
            error = difference.square() if degree == 2 else difference.abs() ** degree
            own = self.weights.fields.get(name, 1.0)
            terms[name] = own * weight * error.sum(dim=1) / self._count(clean, field.domain)
        return terms

    def _count(self, clean: State, domain: Domain) -> Tensor | int:
        """What the sum of a field's errors is divided by, a number or (B,)."""
        channels = clean.layout.channels[domain]
        if self.reduction == "mean":
            return places(domain, clean.mask) * channels
        positions = clean.layout.fields["positions"]
        return channels - positions.channels if domain == positions.domain else channels


def without_padding(domain: Domain, values: Tensor, mask: Tensor) -> Tensor:
    """Values with zero at padding, even where it holds NaN."""
    if domain == "graph":
        return values
    inside = mask if domain == "atom" else pairs_inside(mask)
    return torch.where(inside[..., None], values, 0)


def places(domain: Domain, mask: Tensor) -> Tensor:
    """Atoms, or ordered pairs of atoms, of each sample, at least 1, (B,)."""
    atoms = mask.sum(dim=1)
    count = {"atom": atoms, "pair": atoms * (atoms - 1), "graph": torch.ones_like(atoms)}[domain]
    return count.clamp(min=1)
