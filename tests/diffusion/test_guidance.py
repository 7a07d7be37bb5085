"""Guidance against densities that are known in closed form."""

from __future__ import annotations

import pytest
import torch
from states import ExactRandomNumbers, atoms_state, layout_of
from torch import nn

from molgen_energy.diffusion.guidance import (
    ClassifierFreeGuidance,
    FunctionGuidance,
    guidance_name,
)
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import (
    PROCESSES,
    Diffusion,
    is_self_conditioned,
    takes_log_snr,
)
from molgen_energy.diffusion.samplers import build_sampler
from molgen_energy.errors import InputError

LAYOUT = layout_of(1)
SPREAD = 0.8
MASK = torch.ones(2000, 2, dtype=torch.bool)
OTHER = torch.nn.Parameter(torch.ones(()))


class NormalData(nn.Module):
    """The best network for coordinates of spread `SPREAD` about a mean along x, ±c on two atoms.

    c is the condition, and 0 without one; `scale` is the unit of length of the states.
    """

    def __init__(self, process, scale=1.0):
        super().__init__()
        self.process, self.scale = process, scale

    def forward(self, state, time, mask, condition=None, self_condition=None):
        level = (time[0] * self.process.steps).round().long()
        alpha, sigma = (float(f(level[None])[0]) for f in (self.process.alpha, self.process.sigma))
        mean, spread = torch.zeros_like(state.atoms), SPREAD / self.scale
        if condition is not None:
            mean[:, 0, 0], mean[:, 1, 0] = condition[:, 0], -condition[:, 0]
        noise = sigma * (state.atoms - alpha * mean) / (alpha**2 * spread**2 + sigma**2)
        return atoms_state(state.layout, mask, noise)


def drawn(model, steps=100, hook=None, condition=None, name="ddim", scale=1.0):
    layout = layout_of(1, scale)
    random = ExactRandomNumbers(0, torch.arange(len(MASK)))
    sampler = build_sampler(model.process, name, steps)
    return sampler.sample(model, random, layout, MASK, condition, hook)["positions"] * scale


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_conditional_densities_are_normal_with_s_times_the_mean(scale):
    """p(x|c)^S p(x)^(1-S) has the mean S·c, if both have the same spread."""
    process = Diffusion(1000, prediction="noise")
    model = ClassifierFreeGuidance(NormalData(process), scale)
    model.process = process
    condition = torch.full((len(MASK), 1), 0.7, dtype=torch.float64)
    x = drawn(model, condition=condition)
    assert x[:, 0, 0].mean().item() == pytest.approx(scale * 0.7, abs=0.03)
    assert x[:, 0, 1:].mean().item() == pytest.approx(0, abs=0.03)
    # Of two atoms with their centre at the origin, each has half the variance.
    assert x[:, 0].std(dim=0).mean().item() == pytest.approx(SPREAD / 2**0.5, rel=0.03)


@pytest.mark.parametrize("process", PROCESSES)
def test_guidance_is_the_same_in_noise_velocity_and_clean_data(process):
    """All three are affine functions of each other at a noisy state."""
    process = PROCESSES[process](10)
    mask = torch.ones(3, 2, dtype=torch.bool)
    level = torch.full((3,), 0.4 if process.continuous else 4)
    noisy, known, unknown = (
        atoms_state(LAYOUT, mask, torch.randn(3, 2, 4).double()) for _ in range(3)
    )

    def prediction(output):
        return Prediction(process, noisy, level, output)

    guided = prediction(unknown + 2.5 * (known - unknown))
    for name in ("noise", "clean", "velocity"):
        u, c = (getattr(prediction(output), name).atoms for output in (unknown, known))
        expected = u + 2.5 * (c - u)
        torch.testing.assert_close(getattr(guided, name).atoms, expected, rtol=1e-4, atol=1e-4)


def test_the_network_is_asked_with_and_without_the_condition():
    seen = []

    class Network(nn.Module):
        self_conditioned, noise_input = True, "log_snr"

        def forward(self, state, time, mask, condition, self_condition):
            seen.append((condition.tolist(), self_condition))
            return float(condition.sum()) * state

    model = ClassifierFreeGuidance(Network(), 2.0)
    assert is_self_conditioned(model) and takes_log_snr(model)
    state = atoms_state(LAYOUT, MASK[:1], torch.ones(1, 2, 4))
    result = model(state, torch.zeros(1), MASK[:1], torch.tensor([[3.0, 1.0]]), state)
    assert [condition for condition, _ in seen] == [[[3.0, 1.0]], [[0.0, 0.0]]]
    assert all(previous is state for _, previous in seen)
    assert (result.atoms == 8).all()  # 0 + 2·(4 − 0)


@pytest.mark.parametrize(
    ("name", "steps", "scale"),
    [("ddim", 100, 1.0), ("sde-dpm++", 100, 1.0), ("heun", 50, 1.0), ("ddim", 100, 2.0)],
)
def test_a_linear_function_moves_normal_data_by_its_variance(name, steps, scale):
    """N(0, s²)·exp(−g·x) is N(−s² g, s²), also where the state has another unit of length."""

    def function(positions, mask, numbers):
        assert positions.shape == (len(MASK), 2, 3) and not numbers.any()
        return 0.6 * (positions[:, 0, 0] - positions[:, 1, 0])

    model = NormalData(Diffusion(1000, prediction="noise"), scale)
    x = drawn(model, steps, FunctionGuidance(function, SPREAD), None, name, scale)
    assert x[:, 0, 0].mean().item() == pytest.approx(-0.6 * SPREAD**2, abs=0.03)
    assert x[:, 0, 1:].mean().item() == pytest.approx(0, abs=0.03)
    assert x[:, 0].std(dim=0).mean().item() == pytest.approx(SPREAD / 2**0.5, rel=0.04)


@pytest.mark.parametrize("stiffness", [30.0, 1e4])
def test_a_steep_function_does_not_overshoot(stiffness):
    """A spring to a distance of 1.5 Å between two atoms, far stiffer than the data are."""

    def spring(positions, mask, numbers):
        distance = (positions[:, 0] - positions[:, 1]).norm(dim=1)
        return stiffness * (distance - 1.5) ** 2

    model = NormalData(Diffusion(1000, prediction="noise"))
    distances = [
        (x[:, 0] - x[:, 1]).norm(dim=1)
        for x in (drawn(model), drawn(model, hook=FunctionGuidance(spring)))
    ]
    assert distances[0].std() > 0.4
    assert distances[1].mean().item() == pytest.approx(1.5, abs=0.05)
    assert distances[1].std() < 0.15


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, mask, numbers: x.sum(), r"one number for each of 2000 molecules, found \(\)"),
        (lambda x, mask, numbers: 1.0, "found float"),
        (lambda x, mask, numbers: mask.sum(dim=1).double(), "does not depend on the positions"),
        (lambda x, mask, numbers: OTHER.expand(len(x)), "does not depend on the positions"),
        (lambda x, mask, numbers: (x + 0j).sum(dim=(1, 2)), "found complex ones"),
        (lambda x, mask, numbers: x.sum(dim=(1, 2)) / 0, "not finite at a molecule of 2 atoms"),
        (lambda x, mask, numbers: (0 * x).sum(dim=(1, 2)).sqrt(), "its gradient is not finite"),
    ],
)
def test_functions_that_give_no_number_for_each_molecule(function, message):
    model = NormalData(Diffusion(10, prediction="noise"))
    with pytest.raises(InputError, match=message):
        drawn(model, 2, FunctionGuidance(function))


def test_gradients_that_are_not_finite_at_padding_change_nothing():
    process, mask = Diffusion(10, prediction="noise"), torch.tensor([[True, True, False]])
    clean = atoms_state(LAYOUT, mask, torch.ones(1, 3, 4).double() * mask[..., None])
    positions = torch.tensor([[[1.0, 2, 3], [-1, -2, -3], [0, 0, 0]]]).double()
    clean = clean.replace(positions=positions)
    prediction = Prediction(process, clean, torch.tensor([5]), clean, "clean")
    guide = FunctionGuidance(lambda x, mask, numbers: x.square().sum(dim=2).sqrt().sum(dim=1))
    guided = guide.after_prediction(prediction, 5).clean["positions"]
    assert guided.isfinite().all()
    assert (guided[:, :2].norm(dim=2) < positions[:, :2].norm(dim=2)).all()


def test_functions_have_names():
    class Spring:
        def __call__(self, positions, mask, numbers):
            return positions.sum(dim=(1, 2))

    assert guidance_name(2.5) == 2.5
    assert guidance_name(test_functions_have_names).endswith(".test_functions_have_names")
    assert guidance_name(Spring()).startswith("function ")
    assert guidance_name(Spring()).endswith("Spring")
    with pytest.raises(InputError, match="expected a number or a function, found 'spring'"):
        guidance_name("spring")
