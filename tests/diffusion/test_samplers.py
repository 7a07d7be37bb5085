"""Samplers against known scores: orders of convergence, moments, and single steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from molgen_energy.diffusion.geometry import on_subspace
from molgen_energy.diffusion.noise import SeededNoise
from molgen_energy.diffusion.process import clean_prediction
from molgen_energy.diffusion.samplers import (
    DEFAULT_SAMPLERS,
    DEFAULT_SPACINGS,
    SAMPLERS,
    AncestralSampler,
    DDIMSampler,
    build_sampler,
    samplers_for,
)
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.errors import InputError

SERVED = [(process, name) for process in DEFAULT_SAMPLERS for name in samplers_for(process)]
served = pytest.mark.parametrize(("process", "name"), SERVED)


class ExactNoise(SeededNoise):
    """In float64, so that rounding is far below what is measured."""

    def normal(self, *arguments):
        return super().normal(*arguments).double()


class Gaussian:
    """The best network for normal data of given means (N, C) and covariance of channels (C, C)."""

    def __init__(self, schedule, process, mean, covariance):
        self.schedule, self.process, self.mean = schedule, process, mean
        self.variances, self.axes = torch.linalg.eigh(covariance)

    def level(self, time):
        t = round(float(time) * self.schedule.steps)
        if self.process == "diffusion":
            return float(self.schedule.alpha2[t].sqrt()), float(self.schedule.sigma2[t].sqrt())
        return 1 - t / self.schedule.steps, t / self.schedule.steps

    def __call__(self, x, time, mask):
        alpha, sigma = self.level(time[0])
        deviation = (x - alpha * self.mean) @ self.axes
        total = alpha**2 * self.variances + sigma**2
        if self.process == "diffusion":
            return sigma / total * deviation @ self.axes.T
        slope = (sigma - alpha * self.variances) / total * deviation @ self.axes.T
        return slope - self.mean

    def flow_of(self, noise, time):
        """Where the ODE takes noise of t = T."""
        alpha, sigma = self.level(time)
        first = self.level(1.0)
        gain = (alpha**2 * self.variances + sigma**2) / (
            first[0] ** 2 * self.variances + first[1] ** 2
        )
        start = (noise - first[0] * self.mean) @ self.axes
        return alpha * self.mean + gain.sqrt() * start @ self.axes.T


def gaussian(process, steps, atoms=6):
    """Positions of spread 0.5 about a triangle, and two features that go together."""
    mean = torch.zeros(atoms, 5).double()
    mean[:, :3] = torch.randn(atoms, 3, generator=torch.Generator().manual_seed(1)).double()
    mean[:, :3] -= mean[:, :3].mean(dim=0)
    mean[:, 3:] = torch.tensor([0.2, -0.4])
    covariance = torch.diag(torch.tensor([0.25, 0.25, 0.25, 0, 0])).double()
    covariance[3:, 3:] = torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    return Gaussian(PolynomialSchedule(steps), process, mean, covariance)


ORDERS = {
    ("diffusion", "ddim"): 1,
    ("diffusion", "dpm++"): 2,
    ("diffusion", "heun"): 2,
    ("flow_matching", "euler"): 1,
    ("flow_matching", "heun"): 2,
}


@pytest.mark.parametrize(("process", "name"), ORDERS)
def test_order_of_convergence(process, name):
    """Twice the steps, 2^order less error, against the solution of the ODE in closed form."""
    best = gaussian(process, 20_000)
    mask, noise = torch.ones(8, 6, dtype=torch.bool), ExactNoise(0, torch.arange(8))
    start = on_subspace(noise.normal(best.schedule.steps + 1, 6, 5), mask)
    end = best.flow_of(start, 0.0)
    if process == "diffusion":
        alpha, sigma = best.level(0.0)
        clean = (end - sigma * best(end, torch.zeros(1), mask)) / alpha
        end = torch.cat([clean[..., :3], end[..., 3:]], dim=-1)
    errors = []
    for steps in (50, 100, 200):
        sampler = build_sampler(best.schedule, process, name, steps)
        drawn = sampler.sample(best, noise, mask, 5)
        errors.append(float((drawn - end).square().mean().sqrt()))
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    assert found == pytest.approx([ORDERS[process, name]] * 2, abs=0.1)
    assert errors[-1] < {1: 0.02, 2: 5e-4}[ORDERS[process, name]]


@served
@pytest.mark.parametrize("steps", [80, 400])
def test_mean_and_covariance_of_a_gaussian(process, name, steps):
    """To 8 % where steps are many or of second order; few others spread too little, up to 14 %."""
    best, count = gaussian(process, 400), 500
    mask, noise = torch.ones(count, 6, dtype=torch.bool), ExactNoise(0, torch.arange(count))
    drawn = build_sampler(best.schedule, process, name, steps).sample(best, noise, mask, 5)
    torch.testing.assert_close(drawn.mean(dim=0), best.mean, rtol=0, atol=0.1)
    deviation = drawn - best.mean
    positions = deviation[..., :3].square().sum(dim=1).mean(dim=0) / 5  # 5 of 6 atoms are free
    features = deviation[..., 3:].flatten(0, 1)
    covariance = features.T @ features / len(features)
    near = 0.08 if steps == 400 or name in ("dpm++", "heun") else 0.18
    expected = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()
    torch.testing.assert_close(positions, torch.full((3,), 0.25).double(), rtol=near, atol=0)
    torch.testing.assert_close(covariance, expected, rtol=near, atol=0)


def passed(sampler, model, noise, mask, channels):
    """What the network was shown, and what it said, by level."""
    seen = {}

    def watched(x, time, mask):
        seen[round(float(time[0]) * sampler.schedule.steps)] = x, (said := model(x, time, mask))
        return said

    drawn = sampler.sample(watched, noise, mask, channels)
    return seen, drawn


@pytest.mark.parametrize("steps", [20, 7])
@pytest.mark.parametrize("eta", ["ancestral", 1.0, 0.5, 0.0])
def test_each_step_has_the_mean_and_variance_of_the_papers(eta, steps):
    """DDIM's equation 7 with the predicted x̂; for η = 1, and the ancestral sampler, q(x_s|x_t, x̂).

    The noise of a step is known, so it must be found to the last digits.
    """
    best = gaussian("diffusion", 20)
    schedule, mask = best.schedule, torch.ones(4, 6, dtype=torch.bool)
    noise = ExactNoise(3, torch.arange(4))
    sampler = (
        AncestralSampler(schedule, steps=steps)
        if eta == "ancestral"
        else DDIMSampler(schedule, steps=steps, eta=eta)
    )
    seen, drawn = passed(sampler, best, noise, mask, 5)
    assert list(seen) == sampler.levels
    alpha, sigma2 = schedule.alpha2.sqrt(), schedule.sigma2
    for t, s in pairwise(sampler.levels):
        x, said = seen[t]
        clean = (x - sigma2[t].sqrt() * said) / alpha[t]
        ratio = alpha[t] / alpha[s]
        step = sigma2[t] - ratio**2 * sigma2[s]
        if eta in ("ancestral", 1.0):
            mean = (ratio * sigma2[s] * x + alpha[s] * step * clean) / sigma2[t]
            spread = (step * sigma2[s] / sigma2[t]).sqrt()
        else:
            spread = eta * (step * sigma2[s] / sigma2[t]).sqrt()
            mean = alpha[s] * clean + (sigma2[s] - spread**2).sqrt() * said
        added = on_subspace(noise.normal(t, 6, 5), mask)
        torch.testing.assert_close(seen[s][0], mean + spread * added)
    x, said = seen[0]
    end = (x - sigma2[0].sqrt() * said) / alpha[0]
    if eta == "ancestral":
        end = end + sigma2[0].sqrt() / alpha[0] * on_subspace(noise.normal(0, 6, 5), mask)
    torch.testing.assert_close(drawn, torch.cat([end[..., :3], x[..., 3:]], dim=-1))


def test_all_levels_are_edms_algorithm_to_the_last_bit():
    """As it was before there were fewer steps: molecules of a seed stay what they are."""
    schedule, mask = PolynomialSchedule(30), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    noise, atoms, channels = SeededNoise(2, torch.arange(2)), 4, 5
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def model(x, time, mask):
        return on_subspace(torch.tanh(x @ weight) + time[:, None, None], mask)

    alpha2, sigma2 = schedule.alpha2, schedule.sigma2
    x = on_subspace(noise.normal(31, atoms, channels), mask)
    for t in range(30, 0, -1):
        s = t - 1
        ratio2 = alpha2[t] / alpha2[s]
        variance = sigma2[t] - ratio2 * sigma2[s]
        toward = float(variance / (ratio2 * sigma2[t]).sqrt())
        spread = float((variance * sigma2[s] / sigma2[t]).sqrt())
        said = model(x, torch.full((2,), t / 30), mask)
        added = on_subspace(noise.normal(t, atoms, channels), mask)
        x = on_subspace(x / float(ratio2.sqrt()) - toward * said + spread * added, mask)
    alpha, sigma = float(alpha2[0].sqrt()), float(sigma2[0].sqrt())
    said = model(x, torch.zeros(2), mask)
    clean = clean_prediction(x, said, torch.tensor([alpha]), torch.tensor([sigma]))
    clean = clean + sigma / alpha * on_subspace(noise.normal(0, atoms, channels), mask)
    expected = torch.cat([clean[..., :3], x[..., 3:]], dim=-1)
    assert torch.equal(AncestralSampler(schedule).sample(model, noise, mask, channels), expected)


@served
@pytest.mark.parametrize("trained", [2, 7, 100, 1000])
def test_levels_are_distinct_and_run_from_noise_to_data(process, name, trained):
    schedule = PolynomialSchedule(trained)
    for steps in {1, 2, trained // 3 or 1, trained - 1, trained}:
        levels = build_sampler(schedule, process, name, steps).levels
        assert len(levels) == steps + 1
        assert (levels[0], levels[-1]) == (trained, 0)
        assert all(a > b for a, b in pairwise(levels))
    assert levels == list(range(trained, -1, -1)) or steps != trained
    assert build_sampler(schedule, process, name).levels == list(range(trained, -1, -1))


def test_few_levels_are_equally_far_apart_in_log_snr():
    schedule = PolynomialSchedule(100_000)
    levels = torch.tensor(build_sampler(schedule, "diffusion", "ddim", 9).levels)
    distances = (schedule.alpha2 / schedule.sigma2).log()[levels].diff()
    assert float(distances.max() / distances.min()) < 1.01
    flow = build_sampler(schedule, "flow_matching", "euler", 10).levels
    assert flow == list(range(100_000, -1, -10_000))


@served
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_calls_of_the_network_are_counted(process, name, steps):
    schedule, mask = PolynomialSchedule(20), torch.ones(2, 3, dtype=torch.bool)
    calls, told, times = 0, 0, []

    def model(x, time, mask):
        nonlocal calls
        calls += 1
        times.append(float(time[0]))
        return torch.zeros_like(x)

    def advance():
        nonlocal told
        told += 1

    sampler = build_sampler(schedule, process, name, steps)
    sampler.sample(model, SeededNoise(0, torch.arange(2)), mask, 5, advance)
    expected = {"heun": 2 * steps, "euler": steps - 1}.get(name, steps) + (process == "diffusion")
    if process == "flow_matching":
        expected = {"heun": 2 * steps - 1, "euler": steps}[name]
        assert min(times) > 0  # where the network of a flow was never trained
    assert calls == told == sampler.evaluations == expected


@served
def test_only_what_is_random_draws_noise(process, name):
    """Of the ODE's samplers the start alone is random, and no noise is drawn for nothing."""
    drawn = []

    class Counted(SeededNoise):
        def normal(self, step, atoms, channels):
            drawn.append(step)
            return super().normal(step, atoms, channels)

    sampler = build_sampler(PolynomialSchedule(10), process, name)
    mask = torch.ones(1, 3, dtype=torch.bool)
    sampler.sample(lambda x, t, m: torch.zeros_like(x), Counted(0, torch.arange(1)), mask, 5)
    assert drawn == ([11, *range(10, -1, -1)] if name == "ancestral" else [11])


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        ("diffusion", {"name": "ddmi"}, "unknown sampler 'ddmi'; did you mean 'ddim'"),
        ("diffusion", {"name": "euler"}, "--sampler euler is for networks of flow_matching"),
        ("flow_matching", {"name": "ddim"}, "take heun or euler"),
        ("diffusion", {"steps": 21}, "--steps 21: the network was trained with 20 steps"),
        ("diffusion", {"steps": 0}, "--steps 0: the network was trained with 20 steps"),
        (
            "diffusion",
            {"spacing": "quadric"},
            "unknown spacing 'quadric'; did you mean 'quadratic'",
        ),
        ("flow_matching", {"spacing": "log"}, "unknown spacing 'log'"),
        ("diffusion", {"eta": 0.5}, "--eta goes with --sampler ddim, not ancestral"),
        ("flow_matching", {"eta": 0.5}, "--eta goes with --sampler ddim, not euler"),
        ("diffusion", {"name": "ddim", "eta": 1.5}, "--eta 1.5: expected a number from 0"),
        ("diffusion", {"name": "ddim", "eta": math.nan}, "--eta nan: expected a number from 0"),
    ],
)
def test_bad_requests(process, options, message):
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        build_sampler(PolynomialSchedule(20), process, **options)


@pytest.mark.parametrize("process", DEFAULT_SAMPLERS)
def test_spacing_of_levels(process):
    schedule = PolynomialSchedule(400)
    quadratic = build_sampler(schedule, process, steps=20, spacing="quadratic")
    assert quadratic.levels == [(20 - k) ** 2 for k in range(21)]
    assert quadratic.spacing == "quadratic"
    even = build_sampler(schedule, process, steps=20, spacing="even")
    assert even.levels == list(range(400, -1, -20))
    own = build_sampler(schedule, process, steps=20)
    named = build_sampler(schedule, process, steps=20, spacing=DEFAULT_SPACINGS[process])
    assert own.levels == named.levels
    assert own.spacing == named.spacing == DEFAULT_SPACINGS[process]
    assert own.levels != quadratic.levels
    assert build_sampler(schedule, process, spacing="quadratic").spacing is None  # all levels


def test_each_process_has_a_default_and_each_sampler_a_process():
    for process, name in DEFAULT_SAMPLERS.items():
        assert type(build_sampler(PolynomialSchedule(5), process)) is SAMPLERS[name]
        assert samplers_for(process)[0] in SAMPLERS
    assert {name for _, name in SERVED} == set(SAMPLERS)
