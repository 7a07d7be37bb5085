"""Temperature of samplers, against closed formulas for normal data, whose best network is linear.

In y = x/α and r = σ/α a level has y = x̂ + r ε, and the best prediction of data with variance v is
ε̂ = r y/(v + r²).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from states import ExactRandomNumbers, layout_of

from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.process import PROCESSES, Diffusion, FlowMatching
from molgen_energy.diffusion.samplers import (
    SAMPLERS,
    AncestralSampler,
    build_sampler,
)
from molgen_energy.diffusion.spacing import noise_levels
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError

VARIANCE = 0.3
LAYOUT = layout_of(2)
SERVED = [(process, name) for name, kind in SAMPLERS.items() for process in kind.processes]
served = pytest.mark.parametrize(("process", "name"), SERVED)


class Linear:
    """The best network for normal data of variance v in each channel and mean 0, in float64."""

    def __init__(self, process):
        self.process = process

    def __call__(self, state, time, mask, condition=None, self_condition=None):
        level = (time.double() * self.process.steps).round().long()[0]
        if isinstance(self.process, FlowMatching):
            sigma = float(level) / self.process.steps
            alpha = 1 - sigma
            factor = (sigma - alpha * VARIANCE) / (alpha**2 * VARIANCE + sigma**2)
        elif self.process.continuous:
            alpha2 = math.cos((float(time[0]) + 0.008) / 1.008 * math.pi / 2) ** 2
            alpha2 /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
            factor = math.sqrt(1 - alpha2) / (alpha2 * VARIANCE + 1 - alpha2)
        else:
            schedule = self.process.schedule
            alpha2, sigma2 = float(schedule.alpha2[level]), float(schedule.sigma2[level])
            factor = math.sqrt(sigma2) / (alpha2 * VARIANCE + sigma2)
        return factor * state


class Nonlinear:
    """A network that is neither linear nor the same for all atoms, in float32."""

    def __call__(self, state, time, mask, condition=None, self_condition=None):
        atoms = torch.tanh(state.atoms.cumsum(dim=-1) + state.atoms.flip(-1)) + time[:, None, None]
        return state.with_atoms(atoms).projected()


def ratios_of(process):
    """r = σ/α of a diffusion, (T+1,) float64, from the variances."""
    return np.sqrt(process.schedule.sigma2.numpy() / process.schedule.alpha2.numpy())


def factors(level, ratios, temperature):
    """Factors of noise and of ε̂ at a level, as the documentation defines them."""
    low = 0 if temperature.low is None else temperature.low
    high = math.inf if temperature.high is None else temperature.high
    inside, value = low <= ratios[level] <= high, temperature.value
    noise = value if inside and temperature.of == "noise" else 1
    if level == 0 or ratios[level] < low:
        noise = temperature.final_noise
    return noise, 1 / value if inside and temperature.of == "score" else 1


def gains(sampler, temperature):
    """Positions and features of samples as sums of noise: the factor of each level's noise.

    A step keeps a part of r ε̂ and replaces the rest: y_s = x̂ + √(r_s² − c²) ε̂ + c ε.
    """
    ratios, eta = ratios_of(sampler.process), 1.0 if sampler.eta is None else sampler.eta
    top = sampler.process.steps
    alpha_top = math.sqrt(float(sampler.process.schedule.alpha2[top]))
    y = {top + 1: 1 / alpha_top}
    for t, s in pairwise(at.level for at in sampler.visited):
        noise, score = factors(t, ratios, temperature)
        spread = eta * ratios[s] * math.sqrt(1 - (ratios[s] / ratios[t]) ** 2)
        predicted = score * ratios[t] / (VARIANCE + ratios[t] ** 2)
        kept = 1 + (math.sqrt(ratios[s] ** 2 - spread**2) - ratios[t]) * predicted
        y = {level: kept * gain for level, gain in y.items()} | {t: noise * spread}
    noise, score = factors(0, ratios, temperature)
    clean = 1 - score * ratios[0] ** 2 / (VARIANCE + ratios[0] ** 2)
    positions = {level: clean * gain for level, gain in y.items()}
    if isinstance(sampler, AncestralSampler):
        positions[0] = noise * ratios[0]
    alpha = math.sqrt(float(sampler.process.schedule.alpha2[0]))
    return positions, {level: alpha * gain for level, gain in y.items()}


RANDOM = {
    "ancestral": {"name": "ancestral", "eta": None},
    "eta 1": {"name": "ddim", "eta": 1.0},
    "eta 0.4": {"name": "ddim", "eta": 0.4},
}
TEMPERATURES = [
    Temperature(),
    Temperature(0.8),
    Temperature(0.0),
    Temperature(1.3, low=None),
    Temperature(0.7, low=0.5, high=4.0, final_noise=0.0),
    Temperature(final_noise=0.5),
    Temperature(0.8, "score"),
    Temperature(1.2, "score", None, 2.0),
    Temperature(0.6, "score", 0.2, 3.0, final_noise=0.1),
]


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
@pytest.mark.parametrize("options", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("steps", [40, 9])
def test_samples_are_the_closed_sum_of_the_noise(options, temperature, steps):
    process, mask = Diffusion(40), torch.ones(3, 4, dtype=torch.bool)
    random = ExactRandomNumbers(5, torch.arange(3))
    sampler = build_sampler(process, steps=steps, temperature=temperature, **options)
    drawn = sampler.sample(Linear(process), random, LAYOUT, mask)
    positions, features = gains(sampler, temperature)
    for name, sums in (("positions", positions), ("features", features)):
        expected = sum(
            gain * random.noise(LAYOUT, mask, level)[name] for level, gain in sums.items()
        )
        # The conversion to clean data has α and σ in float32.
        torch.testing.assert_close(drawn[name], expected, rtol=1e-6, atol=1e-6)


def variance_of(process, levels, temperature):
    """Variance of positions of ancestral samples, from the recursion of the variance alone.

    x_s given x_t and x̂ is normal with mean α_s[q y_t + (1 − q) x̂'] and variance α_s² r_s² (1 − q),
    q = r_s²/r_t², where x̂' = y_t − r_t ε̂'.
    """
    ratios = ratios_of(process)
    variance = 1 / float(process.schedule.alpha2[-1])
    for t, s in pairwise(levels):
        noise, score = factors(t, ratios, temperature)
        clean = 1 - score * ratios[t] ** 2 / (VARIANCE + ratios[t] ** 2)
        q = (ratios[s] / ratios[t]) ** 2
        variance *= (q + (1 - q) * clean) ** 2
        variance += noise**2 * ratios[s] ** 2 * (1 - q)
    noise, score = factors(0, ratios, temperature)
    clean = 1 - score * ratios[0] ** 2 / (VARIANCE + ratios[0] ** 2)
    return clean**2 * variance + (noise * ratios[0]) ** 2


@pytest.mark.parametrize("of", ["noise", "score"])
def test_variance_follows_the_recursion_and_falls_with_the_temperature(of):
    """400 samples of 12 atoms have a standard error of 1.2 % in the variance."""
    process, mask = Diffusion(60), torch.ones(400, 12, dtype=torch.bool)
    random, found, expected = ExactRandomNumbers(1, torch.arange(400)), [], []
    for value in (0.4, 0.7, 0.9, 1.0, 1.2):
        temperature = Temperature(value, of)
        sampler = build_sampler(process, temperature=temperature)
        drawn = sampler.sample(Linear(process), random, LAYOUT, mask)["positions"]
        found.append(float(drawn.square().sum() / (400 * 11 * 3)))
        levels = [at.level for at in sampler.visited]
        expected.append(variance_of(process, levels, temperature))
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert found == sorted(found)
    assert expected[0] < 0.75 * expected[3]


@pytest.mark.parametrize("options", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("of", ["noise", "score"])
def test_variance_falls_with_the_temperature_in_every_range(options, of):
    for low, high in ((None, None), (0.3, None), (None, 0.3), (0.3, 2.0)):
        variances = []
        for value in (0.6, 0.8, 0.95, 1.0, 1.1):
            temperature = Temperature(value, of, low, high, final_noise=1.0)
            sampler = build_sampler(Diffusion(200), temperature=temperature, **options)
            positions, _ = gains(sampler, temperature)
            variances.append(sum(gain**2 for gain in positions.values()))
        assert variances == sorted(variances), (low, high)


SOLVERS = [pair for pair in SERVED if pair[1] not in ("ancestral", "sde-dpm++")]
ORDERS = {"dpm++": 5e-3, "heun": 5e-3, "ddim": 2e-2, "euler": 2e-2}


@pytest.mark.parametrize(("process", "name"), SOLVERS)
@pytest.mark.parametrize("value", [0.8, 1.25])
def test_solvers_converge_to_the_ode_of_the_scaled_score(process, name, value):
    """dy/dr = ε̂/τ = r y/(τ (v + r²)) in the range, so y² ∝ (v + r²)^{1/τ} there."""
    low, high = 0.3, 3.0
    prediction = "velocity" if process == "flow_matching" else "noise"
    trained, mask = PROCESSES[process](4000, prediction=prediction), torch.ones(2, 3).bool()
    random = ExactRandomNumbers(2, torch.arange(2))
    temperature = Temperature(value, "score", low, high)
    sampler = build_sampler(trained, name, 1000, temperature=temperature)
    drawn = sampler.sample(Linear(trained), random, LAYOUT, mask)["positions"]
    start = random.noise(LAYOUT, mask, Stream.START if trained.continuous else 4001)["positions"]
    gain2 = VARIANCE + high**2
    gain2 *= ((VARIANCE + low**2) / (VARIANCE + high**2)) ** (1 / value)
    gain2 *= VARIANCE / (VARIANCE + low**2)
    torch.testing.assert_close(drawn, math.sqrt(gain2) * start, rtol=ORDERS[name], atol=1e-4)


def draw(process, name, temperature, numbers=(0, 1, 2), layout=LAYOUT, **options):
    sampler = build_sampler(PROCESSES[process](30), name, 12, temperature=temperature, **options)
    mask = torch.ones(len(numbers), 5, dtype=torch.bool)
    random = RandomNumbers(3, torch.tensor(numbers))
    return sampler.sample(Nonlinear(), random, layout, mask).atoms


@served
@pytest.mark.parametrize(
    "temperature",
    [
        Temperature(),
        Temperature(1.0, "score", None, 5.0),
        Temperature(0.5, "score", 1e-9, 1e-8),
        Temperature(3.0, "score", 1e6, 1e7),
    ],
    ids=str,
)
def test_one_and_a_range_without_levels_change_no_bit(process, name, temperature):
    plain = build_sampler(PROCESSES[process](30), name, 12)
    mask = torch.ones(3, 5, dtype=torch.bool)
    drawn = plain.sample(Nonlinear(), RandomNumbers(3, torch.arange(3)), LAYOUT, mask).atoms
    assert torch.equal(draw(process, name, temperature), drawn)


def test_noise_of_a_range_without_levels_changes_no_bit():
    plain = draw("diffusion", "ancestral", None)
    assert torch.equal(draw("diffusion", "ancestral", Temperature(0.5, low=1e6)), plain)
    assert torch.equal(draw("diffusion", "ancestral", Temperature(0.5, "noise", 0, 1e-9)), plain)
    assert not torch.equal(draw("diffusion", "ancestral", Temperature(0.5)), plain)


@served
def test_samples_do_not_depend_on_the_batch(process, name):
    of = "noise" if name == "ancestral" else "score"
    temperature = Temperature(0.7, of, 0.3, 4.0)
    together = draw(process, name, temperature)
    for number in range(3):
        alone = draw(process, name, temperature, numbers=(number,))
        torch.testing.assert_close(alone[0], together[number])


@pytest.mark.parametrize("of", ["noise", "score"])
def test_levels_are_in_the_unit_of_the_positions(of):
    """Positions with a scale of 2 have twice the noise in Å at each level."""
    narrow, wide = (Temperature(0.6, of, 0.4 * k, 3.0 * k, final_noise=0.5) for k in (1, 2))
    scaled = layout_of(2, scale=2.0)
    expected = draw("diffusion", "ancestral", narrow)
    assert torch.equal(draw("diffusion", "ancestral", wide, layout=scaled), expected)
    assert not torch.equal(draw("diffusion", "ancestral", narrow, layout=scaled), expected)


def test_noise_levels():
    process = Diffusion(50)
    found = noise_levels(process, layout_of(2, scale=3.0), torch.arange(51)).numpy()
    np.testing.assert_allclose(found, 3 * ratios_of(process), rtol=1e-4)
    flow = noise_levels(FlowMatching(4), LAYOUT, torch.arange(5))
    torch.testing.assert_close(flow, torch.tensor([0, 1 / 3, 1, 3, math.inf]).double())


def test_no_final_noise_and_no_temperature_leave_the_start_alone_random():
    """τ = 0 at all levels is the ancestral sampler without noise: two seeds differ by the start."""
    process, mask = Diffusion(20), torch.ones(1, 4, dtype=torch.bool)
    temperature = Temperature(0.0, low=None, final_noise=0.0)
    sampler = build_sampler(process, temperature=temperature)
    random = ExactRandomNumbers(0, torch.arange(1))
    drawn = sampler.sample(Linear(process), random, LAYOUT, mask)["positions"]
    ratio = drawn / random.noise(LAYOUT, mask, 21)["positions"]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_self_conditioned_models_get_the_prediction_before_the_temperature():
    seen = []

    class Model(torch.nn.Module):
        self_conditioned = True

        def forward(self, state, time, mask, condition, self_condition):
            seen.append(self_condition)
            return state * 0 + state

    process, mask = Diffusion(10, prediction="clean"), torch.ones(1, 3, dtype=torch.bool)
    sampler = build_sampler(process, "ddim", temperature=Temperature(0.5, "score", None, 500.0))
    random = RandomNumbers(0, torch.arange(1))
    sampler.sample(Model(), random, LAYOUT, mask)
    start = random.noise(LAYOUT, mask, 11)
    torch.testing.assert_close(seen[1].atoms, start.atoms)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), "--temperature -0.1: expected a number from 0"),
        ((math.nan,), "--temperature nan: expected a number from 0"),
        ((math.inf,), "--temperature inf: expected a number from 0"),
        ((0.0, "score"), "--temperature 0 is for --temperature-of noise"),
        ((1.0, "nose"), "unknown --temperature-of 'nose'; did you mean 'noise'"),
        ((1.0, "noise", 2.0, 1.0), "--temperature-range 2:1: expected two ascending noise levels"),
        ((1.0, "noise", 1.0, 1.0), "--temperature-range 1:1: expected two ascending"),
        ((1.0, "noise", -1.0), "--temperature-range -1:: expected two ascending"),
        ((1.0, "noise", math.nan), "--temperature-range nan:: expected two ascending"),
        ((1.0, "noise", None, math.inf), "--temperature-range :inf: expected two ascending"),
        ((1.0, "noise", None, math.nan), "--temperature-range :nan: expected two ascending"),
        ((1.0, "noise", 0.3, None, -1.0), "--final-noise -1: expected a number from 0"),
        ((1.0, "noise", 0.3, None, math.nan), "--final-noise nan: expected a number from 0"),
    ],
)
def test_bad_temperatures(arguments, message):
    with pytest.raises(InputError) as refused:
        Temperature(*arguments)
    assert str(refused.value).startswith(message)


ADDS_NONE = "--temperature 0.9 is that of the noise of steps, and {} adds none; use "
SCORE = "--temperature-of score with --temperature-range 0.3:2"
NO_END = (
    "--temperature-of score: {} adds no noise, so high noise levels would change the size of "
    "molecules; give --temperature-range an upper end, such as 0.3:2"
)
FINAL = "--final-noise 0 scales the noise of steps, and {} adds none; leave it out"
REFUSED = [
    (
        "diffusion",
        "dpm++",
        Temperature(0.9),
        f"{ADDS_NONE}{SCORE} or --ancestral-positions or --sampler ancestral",
    ),
    (
        "diffusion",
        "ddim",
        Temperature(0.9),
        f"{ADDS_NONE}{SCORE} or an --eta above 0 or --sampler ancestral",
    ),
    ("flow_matching", "euler", Temperature(0.9), f"{ADDS_NONE}{SCORE}"),
    ("diffusion", "heun", Temperature(final_noise=0.0), f"{FINAL}, or use --sampler ancestral"),
    ("flow_matching", "euler", Temperature(final_noise=0.0), FINAL),
    ("flow_matching", "heun", Temperature(0.9, "score"), NO_END),
    ("diffusion", "dpm++", Temperature(0.9, "score"), NO_END),
]


@pytest.mark.parametrize(("process", "name", "temperature", "message"), REFUSED)
def test_what_does_not_suit_a_sampler_is_refused_with_the_remedy(
    process, name, temperature, message
):
    with pytest.raises(InputError) as refused:
        build_sampler(PROCESSES[process](20), name, temperature=temperature)
    assert str(refused.value) == message.format(name)


def test_words_and_provenance():
    assert Temperature().describe() == ""
    assert Temperature().provenance() == {}
    assert Temperature(0.9).describe() == "temperature 0.9 of the noise from 0.3 Å"
    assert Temperature(0.9).provenance() == {"sampling_temperature": "0.9"}
    full = Temperature(1.1, "score", None, 5.0, 0.0)
    assert full.describe() == "temperature 1.1 of the score to 5 Å, final noise 0"
    assert full.provenance() == {
        "sampling_temperature": "1.1",
        "sampling_temperature_of": "score",
        "sampling_temperature_range": ":5",
        "sampling_final_noise": "0",
    }
    assert Temperature.from_options(full.options | {"seed": 3}) == full
