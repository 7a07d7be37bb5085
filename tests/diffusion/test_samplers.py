"""Samplers against known scores: orders of convergence, moments, and single steps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from states import ExactRandomNumbers, layout_of

from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.process import PROCESSES, Diffusion
from molgen_energy.diffusion.samplers import (
    DEFAULT_SAMPLERS,
    SAMPLERS,
    AncestralSampler,
    DDIMSampler,
    build_sampler,
    samplers_for,
)
from molgen_energy.diffusion.spacing import DEFAULT_SPACINGS, power_levels
from molgen_energy.errors import InputError

SERVED = [(process, name) for process in DEFAULT_SAMPLERS for name in samplers_for(process)]
served = pytest.mark.parametrize(("process", "name"), SERVED)


LAYOUT = layout_of(2)


def noise_of(random, mask, level):
    """Noise (B, N, 5) of a level."""
    return random.noise(LAYOUT, mask, level).atoms


def levels_of(sampler):
    """The levels that it visits."""
    return [at.level for at in sampler.visited]


def cosine(time):
    """α and σ of the cosine schedule, with s = 0.008."""
    alpha = math.cos((time + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    return alpha, math.sqrt(1 - alpha**2)


class Gaussian:
    """The best network for normal data of given means (N, C) and covariance of channels (C, C)."""

    def __init__(self, process, mean, covariance):
        self.process, self.mean = process, mean
        self.flow = process.name == "flow_matching"
        self.variances, self.axes = torch.linalg.eigh(covariance)

    def level(self, time):
        if self.process.name == "cosine":
            return cosine(float(time))
        t = round(float(time) * self.process.steps)
        if not self.flow:
            schedule = self.process.schedule
            return float(schedule.alpha2[t].sqrt()), float(schedule.sigma2[t].sqrt())
        return 1 - t / self.process.steps, t / self.process.steps

    def __call__(self, state, time, mask, condition=None, self_condition=None):
        return state.with_atoms(self.output(state.atoms, time))

    def output(self, x, time):
        alpha, sigma = self.level(time[0])
        deviation = (x - alpha * self.mean) @ self.axes
        total = alpha**2 * self.variances + sigma**2
        if not self.flow:
            return sigma / total * deviation @ self.axes.T
        slope = (sigma - alpha * self.variances) / total * deviation @ self.axes.T
        return slope - self.mean

    def flow_of(self, noise, time):
        """Where the ODE takes the noise at the start."""
        alpha, sigma = self.level(time)
        first = self.level(0.9946 if self.process.name == "cosine" else 1.0)
        gain = (alpha**2 * self.variances + sigma**2) / (
            first[0] ** 2 * self.variances + first[1] ** 2
        )
        start = (noise - first[0] * self.mean) @ self.axes
        return alpha * self.mean + gain.sqrt() * start @ self.axes.T


PREDICTIONS = {"diffusion": "noise", "flow_matching": "velocity", "cosine": "noise"}
"""What `Gaussian` predicts."""


def gaussian(process, steps, atoms=6):
    """Positions of spread 0.5 about a triangle, and two features that go together."""
    mean = torch.zeros(atoms, 5).double()
    mean[:, :3] = torch.randn(atoms, 3, generator=torch.Generator().manual_seed(1)).double()
    mean[:, :3] -= mean[:, :3].mean(dim=0)
    mean[:, 3:] = torch.tensor([0.2, -0.4])
    covariance = torch.diag(torch.tensor([0.25, 0.25, 0.25, 0, 0])).double()
    covariance[3:, 3:] = torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    trained_with = PROCESSES[process](steps, prediction=PREDICTIONS[process])
    return Gaussian(trained_with, mean, covariance)


ORDERS = {
    ("diffusion", "ddim"): 1,
    ("diffusion", "dpm++"): 2,
    ("diffusion", "heun"): 2,
    ("cosine", "ddim"): 1,
    ("cosine", "dpm++"): 2,
    ("cosine", "heun"): 2,
    ("flow_matching", "euler"): 1,
    ("flow_matching", "heun"): 2,
}


@pytest.mark.parametrize(("process", "name"), ORDERS)
def test_order_of_convergence(process, name):
    """Twice the steps, 2^order less error, against the solution of the ODE in closed form."""
    best = gaussian(process, 20_000)
    mask, noise = torch.ones(8, 6, dtype=torch.bool), ExactRandomNumbers(0, torch.arange(8))
    cosine = process == "cosine"
    first, last = (Stream.START, 1e-3) if cosine else (best.process.steps + 1, 0.0)
    end = best.flow_of(noise_of(noise, mask, first), last)
    if process != "flow_matching":
        alpha, sigma = best.level(last)
        clean = (end - sigma * best.output(end, torch.tensor([last]))) / alpha
        end = clean if cosine else torch.cat([clean[..., :3], end[..., 3:]], dim=-1)
    errors = []
    for steps in (50, 100, 200):
        sampler = build_sampler(best.process, name, steps, spacing="log" if cosine else None)
        drawn = sampler.sample(best, noise, LAYOUT, mask).atoms
        errors.append(float((drawn - end).square().mean().sqrt()))
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    assert found == pytest.approx([ORDERS[process, name]] * 2, abs=0.1)
    assert errors[-1] < {1: 0.02, 2: 5e-4}[ORDERS[process, name]]


@pytest.mark.parametrize(
    ("process", "name", "steps"),
    [
        (process, name, steps)
        for process, name in SERVED
        for steps in (80, 400)
        if process != "cosine" or (name == "ancestral") == (steps == 400)
    ],
)
def test_mean_and_covariance_of_a_gaussian(process, name, steps):
    """To 8 % where steps are many or of second order; few others spread too little, up to 14 %."""
    best, count = gaussian(process, 400), 500
    mask, noise = torch.ones(count, 6, dtype=torch.bool), ExactRandomNumbers(0, torch.arange(count))
    sampler = build_sampler(best.process, name, steps)
    drawn = sampler.sample(best, noise, LAYOUT, mask).atoms
    torch.testing.assert_close(drawn.mean(dim=0), best.mean, rtol=0, atol=0.1)
    deviation = drawn - best.mean
    positions = deviation[..., :3].square().sum(dim=1).mean(dim=0) / 5  # 5 of 6 atoms are free
    features = deviation[..., 3:].flatten(0, 1)
    covariance = features.T @ features / len(features)
    near = 0.08 if steps == 400 or name in ("dpm++", "sde-dpm++", "heun") else 0.18
    expected = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()
    torch.testing.assert_close(positions, torch.full((3,), 0.25).double(), rtol=near, atol=0)
    torch.testing.assert_close(covariance, expected, rtol=near, atol=0)


def evaluations(sampler, model, noise, mask):
    """The network's input and output by level, and the samples; all as tensors of atoms."""
    seen = {}

    def watched(x, time, *others):
        output = model(x, time, *others)
        seen[round(float(time[0]) * sampler.process.steps)] = x.atoms, output.atoms
        return output

    return seen, sampler.sample(watched, noise, LAYOUT, mask).atoms


@pytest.mark.parametrize("steps", [20, 7])
@pytest.mark.parametrize("eta", ["ancestral", 1.0, 0.5, 0.0])
def test_each_step_has_the_mean_and_variance_of_the_papers(eta, steps):
    """DDIM's equation 7 with the predicted x̂; for η = 1, and the ancestral sampler, q(x_s|x_t, x̂).

    The noise of a step is known, so it must be found to the last digits.
    """
    best = gaussian("diffusion", 20)
    schedule, mask = best.process.schedule, torch.ones(4, 6, dtype=torch.bool)
    noise = ExactRandomNumbers(3, torch.arange(4))
    sampler = (
        AncestralSampler(best.process, steps=steps)
        if eta == "ancestral"
        else DDIMSampler(best.process, steps=steps, eta=eta)
    )
    seen, drawn = evaluations(sampler, best, noise, mask)
    assert list(seen) == levels_of(sampler)
    alpha, sigma2 = schedule.alpha2.sqrt(), schedule.sigma2
    for t, s in pairwise(levels_of(sampler)):
        x, output = seen[t]
        clean = (x - sigma2[t].sqrt() * output) / alpha[t]
        ratio = alpha[t] / alpha[s]
        step = sigma2[t] - ratio**2 * sigma2[s]
        if eta in ("ancestral", 1.0):
            mean = (ratio * sigma2[s] * x + alpha[s] * step * clean) / sigma2[t]
            spread = (step * sigma2[s] / sigma2[t]).sqrt()
        else:
            spread = eta * (step * sigma2[s] / sigma2[t]).sqrt()
            mean = alpha[s] * clean + (sigma2[s] - spread**2).sqrt() * output
        added = noise_of(noise, mask, t)
        torch.testing.assert_close(seen[s][0], mean + spread * added)
    x, output = seen[0]
    end = (x - sigma2[0].sqrt() * output) / alpha[0]
    if eta == "ancestral":
        end = end + sigma2[0].sqrt() / alpha[0] * noise_of(noise, mask, 0)
    torch.testing.assert_close(drawn, torch.cat([end[..., :3], x[..., 3:]], dim=-1))


@pytest.mark.parametrize("levels", [None, (20, 13, 9, 5, 2)])
def test_stochastic_dpm_solver_is_the_papers(levels):
    """SDE-DPM-Solver++(2M) with x̂ and λ = log(α/σ), r at least 1/2, and its first step that of the
    first order."""
    best = gaussian("diffusion", 20)
    schedule, mask = best.process.schedule, torch.ones(4, 6, dtype=torch.bool)
    noise = ExactRandomNumbers(3, torch.arange(4))
    steps = 7 if levels is None else None
    sampler = build_sampler(best.process, "sde-dpm++", steps, levels=levels)
    seen, drawn = evaluations(sampler, best, noise, mask)
    alpha, sigma = schedule.alpha2.sqrt(), schedule.sigma2.sqrt()
    clean = {t: (x - sigma[t] * output) / alpha[t] for t, (x, output) in seen.items()}
    visited = list(seen)
    for k, (t, s) in enumerate(pairwise(visited)):
        h = (alpha[s] / sigma[s] * sigma[t] / alpha[t]).log()
        toward = clean[t]
        if k:
            before = visited[k - 1]
            r = (alpha[t] / sigma[t] * sigma[before] / alpha[before]).log() / h
            r = r.clamp(min=0.5)
            toward = toward + (clean[t] - clean[before]) / (2 * r)
        removed = 1 - (-2 * h).exp()
        expected = sigma[s] / sigma[t] * (-h).exp() * seen[t][0] + alpha[s] * removed * toward
        expected = expected + sigma[s] * removed.sqrt() * noise_of(noise, mask, t)
        torch.testing.assert_close(seen[s][0], expected, rtol=1e-5, atol=1e-5)
    end = clean[visited[-1]]
    if levels is None:
        end = end + sigma[0] / alpha[0] * noise_of(noise, mask, 0)
        end = torch.cat([end[..., :3], seen[0][0][..., 3:]], dim=-1)
    torch.testing.assert_close(drawn, end, rtol=1e-5, atol=1e-5)


CHOSEN = {
    "diffusion": (400, 250, 120, 40, 9),
    "cosine": (0.995, 0.7, 0.4, 0.1, 0.02),
    "flow_matching": (400, 250, 120, 40, 9),
}


@served
@pytest.mark.parametrize("count", [1, 2, 5])
def test_chosen_levels_end_with_the_clean_prediction(process, name, count):
    """K levels are K evaluations (Heun's method 2K − 1), and the sample is x̂ of all fields."""
    best, mask = gaussian(process, 400), torch.ones(2, 6, dtype=torch.bool)
    levels = CHOSEN[process][:count]
    sampler = build_sampler(best.process, name, levels=levels)
    expected = levels if process == "cosine" else tuple(map(int, levels))
    assert sampler.levels == tuple(levels_of(sampler)) == expected
    calls = []

    def watched(state, time, *others):
        calls.append((state, time))
        return best(state, time, *others)

    drawn = sampler.sample(watched, RandomNumbers(0, torch.arange(2)), LAYOUT, mask)
    made = 2 * count - 1 if name == "heun" else count
    assert len(calls) == sampler.evaluations == made
    assert sampler.steps == count
    x, time = calls[-1]
    alpha, sigma = best.level(time[0])
    output = best.output(x.atoms, time)
    clean = x.atoms - sigma * output if best.flow else (x.atoms - sigma * output) / alpha
    torch.testing.assert_close(drawn.atoms, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("process", "name"), [pair for pair in SERVED if pair[0] != "cosine"])
def test_chosen_levels_that_end_at_0_are_those_of_steps(process, name):
    best, mask = gaussian(process, 400), torch.ones(2, 6, dtype=torch.bool)
    random = RandomNumbers(0, torch.arange(2))
    spaced = build_sampler(best.process, name, 12, spacing="quadratic")
    chosen = build_sampler(best.process, name, levels=levels_of(spaced))
    assert (chosen.steps, chosen.spacing, chosen.evaluations) == (12, None, spaced.evaluations)
    drawn = [each.sample(best, random, LAYOUT, mask) for each in (spaced, chosen)]
    assert torch.equal(drawn[0].atoms, drawn[1].atoms)


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        ("diffusion", {"levels": ()}, "--levels : expected noise levels in descending order"),
        ("diffusion", {"levels": (20, 5, 5)}, "--levels 20,5,5: expected noise levels in desc"),
        ("diffusion", {"levels": (19, 5)}, "expected whole numbers from 20 (pure noise) to 0"),
        ("diffusion", {"levels": (20, 2.5)}, "--levels 20,2.5: expected whole numbers"),
        ("flow_matching", {"levels": (20, -1)}, "--levels 20,-1: expected whole numbers"),
        ("diffusion", {"levels": (math.nan, 1)}, "--levels nan,1: expected noise levels"),
        ("diffusion", {"levels": (math.nan,)}, "--levels nan: expected whole numbers"),
        ("flow_matching", {"levels": (math.inf, 1)}, "--levels inf,1: expected whole numbers"),
        ("cosine", {"levels": (0.9, 0.1)}, "expected times, the first from 0.99 to 1"),
        ("cosine", {"levels": (0.995, 0)}, "expected times, the first from 0.99 to 1"),
        ("diffusion", {"levels": (20, 5), "steps": 2}, "names every noise level; leave out --st"),
        ("cosine", {"levels": (1, 0), "spacing": "log"}, "noise level; leave out --spacing"),
    ],
)
def test_bad_levels(process, options, message):
    with pytest.raises(InputError) as refused:
        build_sampler(PROCESSES[process](20), **options)
    assert message in str(refused.value)


@pytest.mark.parametrize("low", [None, 0.03])
def test_levels_by_a_power_of_the_noise_level(low):
    """Equal distances in (σ/α)^{1/ρ} from the second level on, and all different."""
    process = Diffusion(100_000)
    levels = power_levels(process, 9, 2.5, 3.0, low)
    schedule = process.schedule
    roots = (schedule.sigma2 / schedule.alpha2).sqrt()[levels] ** (1 / 3)
    assert levels[0] == 100_000 and (levels[-1] == 0) == (low is None)
    assert float(roots[1]) == pytest.approx(2.5 ** (1 / 3), rel=1e-3)
    np.testing.assert_allclose(roots[1:].diff()[:-1], float(roots[1:].diff().mean()), rtol=0.01)
    times = power_levels(PROCESSES["cosine"](), 9, 2.5, 3.0, low)
    ratios = [math.sqrt(1 / cosine(time)[0] ** 2 - 1) for time in times[1:]]
    assert ratios[0] == pytest.approx(2.5)
    np.testing.assert_allclose(np.diff(np.cbrt(ratios), 2), 0, atol=1e-6)
    few = power_levels(Diffusion(12), 12, 2.5, 3.0, low)
    assert sorted(set(few), reverse=True) == few and len(few) == 12
    build_sampler(Diffusion(12), levels=few)


def test_all_levels_are_edms_algorithm_to_the_last_bit():
    """As it was before there were fewer steps: molecules of a seed stay what they are."""
    process, mask = Diffusion(30), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    noise = RandomNumbers(2, torch.arange(2))
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def projected(atoms):
        return LAYOUT.project("atom", atoms, mask)

    def output(x, time):
        return projected(torch.tanh(x @ weight) + time[:, None, None])

    def model(state, time, mask, condition, self_condition):
        return state.with_atoms(output(state.atoms, time))

    alpha2, sigma2 = process.schedule.alpha2, process.schedule.sigma2
    x = noise_of(noise, mask, 31)
    for t in range(30, 0, -1):
        s = t - 1
        ratio2 = alpha2[t] / alpha2[s]
        variance = sigma2[t] - ratio2 * sigma2[s]
        toward = float(variance / (ratio2 * sigma2[t]).sqrt())
        spread = float((variance * sigma2[s] / sigma2[t]).sqrt())
        predicted = output(x, torch.full((2,), t / 30))
        added = noise_of(noise, mask, t)
        x = projected(x / float(ratio2.sqrt()) - toward * predicted + spread * added)
    alpha, sigma = float(alpha2[0].sqrt()), float(sigma2[0].sqrt())
    clean = (x - torch.tensor(sigma) * output(x, torch.zeros(2))) / torch.tensor(alpha)
    clean = clean + sigma / alpha * noise_of(noise, mask, 0)
    expected = projected(torch.cat([clean[..., :3], x[..., 3:]], dim=-1))
    drawn = AncestralSampler(process).sample(model, noise, LAYOUT, mask)
    assert torch.equal(drawn.atoms, expected)


@pytest.mark.parametrize(("process", "name"), [pair for pair in SERVED if pair[0] != "cosine"])
@pytest.mark.parametrize("trained", [2, 7, 100, 1000])
def test_levels_are_distinct_and_run_from_noise_to_data(process, name, trained):
    trained_with = PROCESSES[process](trained)
    for steps in {1, 2, trained // 3 or 1, trained - 1, trained}:
        levels = levels_of(build_sampler(trained_with, name, steps))
        assert len(levels) == steps + 1
        assert (levels[0], levels[-1]) == (trained, 0)
        assert all(a > b for a, b in pairwise(levels))
    assert levels == list(range(trained, -1, -1)) or steps != trained
    assert levels_of(build_sampler(trained_with, name)) == list(range(trained, -1, -1))


def test_few_levels_are_equally_far_apart_in_log_snr():
    process = Diffusion(100_000)
    schedule = process.schedule
    levels = torch.tensor(levels_of(build_sampler(process, "ddim", 9)))
    distances = (schedule.alpha2 / schedule.sigma2).log()[levels].diff()
    assert float(distances.max() / distances.min()) < 1.01
    flow = build_sampler(PROCESSES["flow_matching"](100_000), "euler", 10)
    assert levels_of(flow) == list(range(100_000, -1, -10_000))


@served
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_calls_of_the_network_are_counted(process, name, steps):
    mask = torch.ones(2, 3, dtype=torch.bool)
    calls, reported, times = 0, 0, []

    def model(state, time, mask, condition, self_condition):
        nonlocal calls
        calls += 1
        times.append(float(time[0]))
        return 0 * state

    def advance():
        nonlocal reported
        reported += 1

    sampler = build_sampler(PROCESSES[process](20), name, steps)
    random = RandomNumbers(0, torch.arange(2))
    sampler.sample(model, random, LAYOUT, mask, advance=advance)
    expected = {"heun": 2 * steps, "euler": steps - 1}.get(name, steps) + (process == "diffusion")
    if process == "cosine":
        expected = 2 * steps - 1 if name == "heun" else steps
    if process == "flow_matching":
        expected = {"heun": 2 * steps - 1, "euler": steps}[name]
        assert min(times) > 0  # where the network of a flow was never trained
    assert calls == reported == sampler.evaluations == expected


@served
def test_only_random_steps_draw_noise(process, name):
    """Of the ODE's samplers the start alone is random, and no noise is drawn for nothing."""
    drawn = []

    class Counted(RandomNumbers):
        def noise(self, layout, mask, level):
            drawn.append(level)
            return super().noise(layout, mask, level)

    sampler = build_sampler(PROCESSES[process](10), name)
    mask = torch.ones(1, 3, dtype=torch.bool)
    sampler.sample(lambda x, *others: 0 * x, Counted(0, torch.arange(1)), LAYOUT, mask)
    random = name in ("ancestral", "sde-dpm++")
    if process == "cosine":
        assert drawn == [Stream.START, *(range(9, 0, -1) if random else ())]
    else:
        assert drawn == ([11, *range(10, -1, -1)] if random else [11])


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        ("diffusion", {"name": "ddmi"}, "unknown sampler 'ddmi'; did you mean 'ddim'"),
        (
            "diffusion",
            {"name": "euler"},
            "--sampler euler is for networks trained with flow_matching",
        ),
        ("flow_matching", {"name": "ddim"}, "choose heun or euler"),
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
        ("cosine", {"name": "euler"}, "choose ancestral or ddim or dpm++ or sde-dpm++ or heun"),
        ("cosine", {"steps": 0}, "--steps 0: choose 1 to 1,000,000"),
        ("cosine", {"steps": 10**12}, "--steps 1000000000000: choose 1 to 1,000,000"),
        ("cosine", {"spacing": "lgo"}, "unknown spacing 'lgo'; did you mean 'log'"),
        (
            "cosine",
            {"ancestral_positions": True},
            "--ancestral-positions goes with --sampler dpm++, not ancestral",
        ),
        (
            "flow_matching",
            {"ancestral_positions": True},
            "--ancestral-positions goes with --sampler dpm++, not euler",
        ),
        ("cosine", {"self_condition_passes": 0}, "--self-condition-passes 0: expected a number"),
    ],
)
def test_bad_requests(process, options, message):
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        build_sampler(PROCESSES[process](20), **options)


@pytest.mark.parametrize("process", ["diffusion", "flow_matching"])
def test_spacing_of_levels(process):
    trained_with = PROCESSES[process](400)
    quadratic = build_sampler(trained_with, steps=20, spacing="quadratic")
    assert levels_of(quadratic) == [(20 - k) ** 2 for k in range(21)]
    assert quadratic.spacing == "quadratic"
    even = build_sampler(trained_with, steps=20, spacing="even")
    assert levels_of(even) == list(range(400, -1, -20))
    own = build_sampler(trained_with, steps=20)
    named = build_sampler(trained_with, steps=20, spacing=DEFAULT_SPACINGS[process])
    assert own.visited == named.visited
    assert own.spacing == named.spacing == DEFAULT_SPACINGS[process]
    assert own.visited != quadratic.visited
    assert build_sampler(trained_with, spacing="quadratic").spacing is None  # all levels


def test_each_process_has_a_default_and_each_sampler_a_process():
    for process, name in DEFAULT_SAMPLERS.items():
        assert type(build_sampler(PROCESSES[process](5))) is SAMPLERS[name]
        assert samplers_for(process)[0] in SAMPLERS
    assert {name for _, name in SERVED} == set(SAMPLERS)
