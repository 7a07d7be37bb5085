"""What denoisers predict, converted between noise, velocity and clean data."""

from __future__ import annotations

import pytest
import torch
from conftest import padded_batch
from states import atoms_state, layout_of, levels_at, seeded_noise

from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import PROCESSES, Diffusion
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError
from molgen_energy.models import GDM
from molgen_energy.systems.registry import load_config

KINDS = [(name, kind) for name, process in PROCESSES.items() for kind in process.predictions]


def known(output):
    """A denoiser that always returns the same state."""
    return lambda noisy, time, mask, condition, self_condition: output


@pytest.fixture
def clean(molecules):
    """Molecules of different sizes in float64, 0 at padding, with one feature."""
    positions, mask = padded_batch(molecules.select(torch.arange(0, 2000, 300).numpy()))
    atoms = torch.cat([positions, positions[..., :1] / 3], dim=-1)
    return atoms_state(layout_of(1), mask, torch.where(mask[..., None], atoms, 0))


def levels_of_process(process, count):
    """Levels from the lowest of the training to the highest that samplers visit, (B,)."""
    if process.continuous:
        return torch.linspace(process.first_level, 0.9946, count).double()
    return torch.linspace(process.first_level, process.steps, count).long()


def normal(state):
    torch.manual_seed(0)
    inside = state.mask[..., None]
    return state.map(lambda values: torch.where(inside, torch.randn_like(values), 0))


def test_noise_of_the_true_velocity_is_the_true_noise(clean):
    process = Diffusion(50, prediction="velocity")
    step = levels_of_process(process, len(clean))
    alpha = process.schedule.alpha(step).double()
    sigma = process.schedule.sigma(step).double()
    noise = normal(clean)
    noisy = alpha * clean + sigma * noise
    found = process.predict(known(alpha * noise - sigma * clean), noisy, step)
    torch.testing.assert_close(found.noise.atoms, noise.atoms, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_true_prediction_is_the_truth_in_each_parametrisation(clean, name, kind):
    process = PROCESSES[name](50, prediction=kind)
    level = levels_of_process(process, len(clean))
    alpha, sigma = process.alpha(level).double(), process.sigma(level).double()
    noise = normal(clean)
    velocity = noise - clean if name == "flow_matching" else alpha * noise - sigma * clean
    truth = {"noise": noise, "velocity": velocity, "clean": clean}
    noisy = process.add_noise(clean, noise, level)
    torch.testing.assert_close(noisy.atoms, (alpha * clean + sigma * noise).atoms)
    found = process.predict(known(truth[kind]), noisy, level)
    assert getattr(found, kind) is truth[kind]  # not computed again
    # x̂ of ε̂ divides by α, which is small at the highest level.
    for other, expected in truth.items():
        torch.testing.assert_close(getattr(found, other).atoms, expected.atoms, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        found.target.atoms, process.true_target(clean, noise, level).atoms, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_conversions_agree_with_each_other(clean, name):
    """The same wrong prediction, given as any of the three, is the same in all three."""
    flow = name == "flow_matching"
    process = PROCESSES[name](50)
    # In the middle, where no conversion divides by a small number.
    level = levels_at(process, torch.linspace(0.2, 0.8, len(clean)))
    noisy, wrong = normal(clean), clean + 0.1 * normal(clean)
    alpha, sigma = process.alpha(level).double(), process.sigma(level).double()
    noise = (noisy - alpha * wrong) / sigma
    velocity = noise - wrong if flow else alpha * noise - sigma * wrong
    outputs = {"noise": noise, "velocity": velocity, "clean": wrong}
    for kind in process.predictions:
        found = Prediction(PROCESSES[name](50, prediction=kind), noisy, level, outputs[kind])
        for other, expected in outputs.items():
            # α and σ are float32, so that α² + σ² = 1 holds to its precision.
            torch.testing.assert_close(
                getattr(found, other).atoms, expected.atoms, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", PROCESSES)
def test_scaled_noise_keeps_the_noisy_state(clean, name):
    """x_t = α x̂ + σ ε̂ with the scaled ε̂; the velocity changes by (f − 1) ε̂/α."""
    noisy, output = normal(clean), normal(clean)
    for kind in PROCESSES[name].predictions:
        process = PROCESSES[name](50, prediction=kind)
        level = levels_at(process, torch.linspace(0.2, 0.8, len(clean)))
        plain = Prediction(process, noisy, level, output)
        scaled = plain.with_noise_times(1.25)
        alpha, sigma = process.alpha(level), process.sigma(level)
        again = alpha * scaled.clean + sigma * scaled.noise
        torch.testing.assert_close(scaled.noise.atoms, 1.25 * plain.noise.atoms)
        torch.testing.assert_close(again.atoms, noisy.atoms, rtol=1e-5, atol=1e-5)
        change = 0.25 * plain.noise / alpha
        expected = plain.velocity + change
        torch.testing.assert_close(scaled.velocity.atoms, expected.atoms, rtol=1e-4, atol=1e-4)


def test_padding_is_zero_and_the_mean_stays():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    layout = layout_of(6)
    noisy = atoms_state(layout, mask, torch.randn(2, 3, 9)).projected()
    process = Diffusion(10, prediction="velocity")
    found = process.predict(GDM(layout, 1, 8), noisy, torch.tensor([3, 10]))
    for state in (found.noise, found.velocity, found.clean):
        assert (state.atoms[~mask] == 0).all()
        assert state["positions"].sum(dim=1).abs().max() < 1e-5


def test_a_flow_predicts_no_noise():
    config = load_config("quick").replaced({"process.prediction": "velocity"})
    assert config.replaced({"process.name": "flow_matching"}).process.prediction == "velocity"
    flow = config.replaced({"process.name": "flow_matching"})
    with pytest.raises(
        InputError, match=r"process\.prediction: Input should be 'velocity' or 'clean'"
    ):
        flow.replaced({"process.prediction": "noise"})
    with pytest.raises(ValueError, match="flow_matching has no prediction 'noise'"):
        PROCESSES["flow_matching"](50, prediction="noise")


def test_a_process_of_state_arguments_is_called_with_them(clean):
    """The denoiser gets the state, the time, the mask, the condition and its last prediction."""
    calls = []

    def model(*arguments):
        calls.append(arguments)
        return arguments[0]

    process, level = Diffusion(50), torch.full((len(clean),), 25)
    condition, before = torch.zeros(len(clean), 2), seeded_noise(clean.layout, clean.mask)
    process.predict(model, clean, level, condition, before)
    (state, time, mask, given, previous), *others = calls
    assert not others
    assert state is clean
    assert isinstance(state, State)
    assert (time == 0.5).all()
    assert mask is clean.mask
    assert given is condition
    assert previous is before
