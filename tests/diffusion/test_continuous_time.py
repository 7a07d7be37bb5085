"""Samplers in continuous time, mixed steps, and self-conditioning, against plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from states import ExactRandomNumbers, layout_of

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.process import CosineDiffusion, Diffusion
from molgen_energy.diffusion.samplers import build_sampler, samplers_for
from molgen_energy.diffusion.state import Field, Layout, State
from molgen_energy.errors import InputError

LAYOUT = layout_of(2)
PAIRS = Layout([*LAYOUT.fields.values(), Field("bonds", "pair", 2, 1.0, "symmetric", True)])
FIRST, LAST = 0.9946, 1e-3
COSINE = samplers_for("cosine")


def alpha_sigma(time):
    """α and σ at a time, from the formula of the schedule."""
    alpha = math.cos((time + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    return alpha, math.sqrt(1 - alpha**2)


class Network(torch.nn.Module):
    """Neither linear nor the same for all atoms, for every domain; keeps inputs and outputs."""

    def __init__(self, self_conditioned=False, separate=False):
        super().__init__()
        self.self_conditioned, self.separate = self_conditioned, separate
        self.states, self.inputs, self.outputs, self.times = [], [], [], []

    def forward(self, state, time, mask, condition, self_condition):
        tensors = {}
        for domain, values in state.tensors.items():
            mixed = values if self.separate else values.cumsum(dim=-1) + values.flip(-1)
            tensors[domain] = torch.tanh(mixed) + 0.1 * time.view(-1, *[1] * (values.ndim - 1))
            if self_condition is not None:
                tensors[domain] = tensors[domain] + 0.2 * self_condition.tensors[domain]
        # With a centre that is not 0, and pairs that are not symmetric.
        output = State(state.layout, mask, tensors)
        self.states.append(state)
        self.inputs.append(self_condition)
        self.outputs.append(output)
        self.times.append(float(time[0]))
        return output


def draw(name, steps, network, layout=LAYOUT, process=None, numbers=(0, 1, 2), atoms=5, **options):
    process = CosineDiffusion() if process is None else process
    mask = torch.arange(atoms)[None] < torch.tensor([4 if n == 1 else 5 for n in numbers])[:, None]
    random = RandomNumbers(3, torch.tensor(numbers))
    sampler = build_sampler(process, name, steps, **options)
    return sampler.sample(network, random, layout, mask)


# ---- the times -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 1000, 2500])
def test_times_are_those_of_jodo_in_any_number(steps):
    visited = build_sampler(CosineDiffusion(1000), steps=steps).visited
    expected = np.linspace(FIRST, LAST, steps)
    assert [at.level for at in visited] == pytest.approx(expected, rel=1e-12)
    assert [at.stream for at in visited] == list(range(steps - 1, -1, -1))
    for at in visited[:: max(steps // 7, 1)]:
        alpha, sigma = alpha_sigma(at.level)
        assert (at.alpha2, at.sigma2) == pytest.approx((alpha**2, sigma**2), rel=1e-9)


def test_spacings_of_times():
    process = CosineDiffusion(400)
    log = [at.level for at in build_sampler(process, steps=12, spacing="log").visited]
    snr = [math.log(alpha / sigma) for alpha, sigma in map(alpha_sigma, log)]
    np.testing.assert_allclose(np.diff(snr), (snr[-1] - snr[0]) / 11, rtol=1e-8)
    quadratic = [at.level for at in build_sampler(process, steps=9, spacing="quadratic").visited]
    np.testing.assert_allclose(np.diff(np.sqrt(quadratic), 2), 0, atol=1e-12)
    assert {log[0], quadratic[0]} == {FIRST} and {log[-1], quadratic[-1]} == {LAST}
    own = build_sampler(process)
    assert (own.steps, own.spacing, own.evaluations) == (400, "even", 400)


@pytest.mark.parametrize(
    ("name", "steps"), [("ancestral", 1), ("ancestral", 7), ("dpm++", 1000), ("ddim", 2500)]
)
def test_any_number_of_steps_gives_the_data_of_the_exact_network(name, steps):
    """Data of one point: x̂ is always the point, so it is drawn after every number of steps."""
    point = RandomNumbers(9, torch.arange(1)).noise(LAYOUT, torch.ones(1, 2).bool(), 0)
    calls = []

    def exact(state, *others):
        calls.append(float(others[0][0]))
        return point

    random, mask = RandomNumbers(0, torch.arange(1)), torch.ones(1, 2, dtype=torch.bool)
    drawn = build_sampler(CosineDiffusion(), name, steps).sample(exact, random, LAYOUT, mask)
    torch.testing.assert_close(drawn.atoms, point.atoms)
    assert len(calls) == steps
    assert calls == pytest.approx(np.linspace(FIRST, LAST, steps), rel=1e-6)


# ---- ancestral steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("prediction", ["clean", "noise"])
def test_ancestral_steps_are_jodos_loop(prediction, steps):
    """z_s = (a σ_s²/σ_t²) z + (α_s v/σ_t²) x̂ + √v σ_s/σ_t ε with a = α_t/α_s, v = σ_t² − a² σ_s².

    The last step, to t = 0, returns its mean, x̂. α and σ of the conversion between x̂ and ε̂ are
    float32.
    """
    network, process = Network(), CosineDiffusion(prediction=prediction)
    mask, random = torch.ones(2, 4, dtype=torch.bool), ExactRandomNumbers(4, torch.arange(2))
    drawn = build_sampler(process, steps=steps).sample(network, random, PAIRS, mask)
    z = random.noise(PAIRS, mask, Stream.START)
    times = [*np.linspace(FIRST, LAST, steps).tolist(), 0.0]
    for k, (t, s) in enumerate(pairwise(times)):
        for domain in z.tensors:
            torch.testing.assert_close(
                network.states[k].tensors[domain], z.tensors[domain], rtol=5e-6, atol=5e-6
            )
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        output = network.outputs[k]
        clean = output if prediction == "clean" else (z - sigma_t * output) / alpha_t
        a = alpha_t / alpha_s
        v = sigma_t**2 - a**2 * sigma_s**2
        mean = (a * sigma_s**2 / sigma_t**2) * z + (alpha_s * v / sigma_t**2) * clean
        if s:
            noise = random.noise(PAIRS, mask, steps - 1 - k)
            mean = mean + (math.sqrt(v) * sigma_s / sigma_t) * noise
        z = mean.projected()
    for domain in z.tensors:
        torch.testing.assert_close(drawn.tensors[domain], z.tensors[domain], rtol=5e-6, atol=5e-6)


def test_the_end_is_the_clean_prediction_of_all_fields():
    for name in COSINE:
        network = Network()
        drawn = draw(name, 5, network, PAIRS)
        expected = network.outputs[-1].projected()
        for domain in drawn.tensors:
            assert torch.equal(drawn.tensors[domain], expected.tensors[domain])


@pytest.mark.parametrize("name", COSINE)
def test_molecules_do_not_depend_on_the_batch_and_start_alike(name):
    together = draw(name, 9, Network(True), PAIRS)
    for number in range(3):
        alone = draw(name, 9, Network(True), PAIRS, numbers=(number,), atoms=6)
        for domain, values in alone.tensors.items():
            index = (number, *[slice(5)] * (values.ndim - 2))
            torch.testing.assert_close(values[(0, *index[1:])], together.tensors[domain][index])
    starts = []
    for steps in (1, 4, 30):
        network = Network()
        draw(name, steps, network)
        starts.append(network.states[0].atoms)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


# ---- DPM-Solver++ with ancestral positions -------------------------------------------------------


class Separate(Network):
    """Predicts each field from that field alone."""

    def __init__(self):
        super().__init__(separate=True)


@pytest.mark.parametrize("process", [CosineDiffusion(), Diffusion(30)], ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_mixed_steps_are_those_of_both_samplers(process, steps):
    """If no field depends on another, each is drawn as by its own sampler, to the last bit."""
    options = {"layout": PAIRS, "process": process}
    ancestral, dpm = (draw(name, steps, Separate(), **options) for name in ("ancestral", "dpm++"))
    mixed = draw("dpm++", steps, Separate(), ancestral_positions=True, **options)
    assert torch.equal(mixed["positions"], ancestral["positions"])
    assert torch.equal(mixed["features"], dpm["features"])
    assert torch.equal(mixed["bonds"], dpm["bonds"])
    if steps > 1:
        assert not torch.equal(mixed["positions"], dpm["positions"])
        assert not torch.equal(mixed["features"], ancestral["features"])


def test_each_mixed_step_sees_the_state_of_all_fields():
    """A network of all fields gets the mixed state; DPM-Solver++(2M) as its authors print it."""
    network, steps = Network(), 8
    mask, random = torch.ones(2, 4, dtype=torch.bool), ExactRandomNumbers(4, torch.arange(2))
    process = CosineDiffusion()
    sampler = build_sampler(process, "dpm++", steps, ancestral_positions=True)
    drawn = sampler.sample(network, random, LAYOUT, mask)
    assert sampler.adds_noise and sampler.evaluations == steps
    z = random.noise(LAYOUT, mask, Stream.START)
    times, before = np.linspace(FIRST, LAST, steps).tolist(), None
    for k, (t, s) in enumerate(pairwise(times)):
        torch.testing.assert_close(network.states[k].atoms, z.atoms, rtol=1e-6, atol=1e-6)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        clean = network.outputs[k]
        step = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)
        toward = clean
        if before is not None:
            r = before[1] / step
            toward = (1 + 1 / (2 * r)) * clean - (1 / (2 * r)) * before[0]
        solved = (sigma_s / sigma_t) * z - alpha_s * (math.exp(-step) - 1) * toward
        a = alpha_t / alpha_s
        v = sigma_t**2 - a**2 * sigma_s**2
        noise = random.noise(LAYOUT, mask, steps - 1 - k)
        positions = (
            a * sigma_s**2 / sigma_t**2 * z["positions"]
            + alpha_s * v / sigma_t**2 * clean["positions"]
            + math.sqrt(v) * sigma_s / sigma_t * noise["positions"]
        )
        z, before = solved.replace(positions=positions).projected(), (clean, step)
    assert torch.equal(drawn.atoms, network.outputs[-1].projected().atoms)


# ---- self-conditioning ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", COSINE)
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("prediction", ["clean", "noise"])
def test_the_previous_clean_prediction_is_passed_on(name, passes, prediction):
    """Projected; none in the first evaluation. All passes of a step see the same state."""
    network, process = Network(self_conditioned=True), CosineDiffusion(prediction=prediction)
    sampler = build_sampler(process, name, 4, self_condition_passes=passes)
    mask, random = torch.ones(2, 4, dtype=torch.bool), ExactRandomNumbers(4, torch.arange(2))
    reported = []
    sampler.sample(network, random, PAIRS, mask, advance=lambda: reported.append(1))
    predictions = 7 if name == "heun" else 4
    assert sampler.evaluations == len(reported) == len(network.inputs) == predictions * passes
    assert network.inputs[0] is None
    for k in range(1, len(network.inputs)):
        clean = network.outputs[k - 1]
        if prediction == "noise":
            alpha, sigma = alpha_sigma(network.times[k - 1])
            clean = (network.states[k - 1] - sigma * clean) / alpha
        for domain, values in clean.projected().tensors.items():
            found = network.inputs[k].tensors[domain]
            torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5)
        if k % passes:
            assert network.times[k] == network.times[k - 1]
            assert network.states[k] is network.states[k - 1]


def test_more_passes_change_samples_and_one_changes_none():
    plain = draw("ancestral", 6, Network(True)).atoms
    assert torch.equal(draw("ancestral", 6, Network(True), self_condition_passes=1).atoms, plain)
    assert not torch.equal(
        draw("ancestral", 6, Network(True), self_condition_passes=2).atoms, plain
    )


def test_passes_of_a_network_that_is_not_self_conditioned_are_refused():
    message = "--self-condition-passes 2 is for self-conditioned networks, which this one is not"
    with pytest.raises(InputError, match=message):
        draw("ancestral", 6, Network(), self_condition_passes=2)


def test_a_hook_gets_the_times_of_every_pass():
    """Each pass is conditioned on what it returned of the one before; the samples have t = 0."""
    network, seen = Network(self_conditioned=True), []

    class Hook(SamplingHook):
        def after_prediction(self, prediction, level):
            seen.append(("prediction", level))
            return prediction

        def after_step(self, state, level):
            seen.append(("state", level))
            return state

    sampler = build_sampler(CosineDiffusion(), steps=3, self_condition_passes=2)
    mask = torch.ones(2, 4, dtype=torch.bool)
    sampler.sample(network, RandomNumbers(0, torch.arange(2)), LAYOUT, mask, hook=Hook())
    a, b, c = (at.level for at in sampler.visited)
    assert [level for what, level in seen if what == "prediction"] == [a, a, b, b, c, c]
    assert [level for what, level in seen if what == "state"] == [b, c, 0.0]
