"""Fixed values: exact for every sampler, with the law of the rest that resampling converges to."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from states import ExactRandomNumbers, levels_at

from molgen_energy.diffusion.inpainting import AnchoredValues, FixedValues, MatchedValues
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import PROCESSES, Diffusion
from molgen_energy.diffusion.samplers import MOST_REPEATS, SAMPLERS, build_sampler, samplers_for
from molgen_energy.diffusion.spacing import levels_below
from molgen_energy.diffusion.state import Field, Layout, State
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError

LAYOUT = Layout(
    [
        Field("positions", "atom", 3, 1.0, "zero_mean"),
        Field("elements", "atom", 4, 4.0, discrete=True),
        Field("bonds", "pair", 2, 4.0, "symmetric", discrete=True),
        Field("cell", "graph", 2, 1.0),
    ]
)
MASK = torch.arange(6) < torch.tensor([[6], [4]])
SERVED = [(process, sampler) for process in PROCESSES for sampler in samplers_for(process)]


def random_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        domain: torch.randn(LAYOUT.shape(domain, MASK), generator=generator).double()
        for domain in LAYOUT.channels
    }
    return State(LAYOUT, MASK, tensors).projected()


class Knows:
    """A denoiser that is sure of some clean data."""

    def __init__(self, process, clean):
        self.process, self.clean = process, clean

    def __call__(self, noisy, time, mask, condition, self_condition):
        level = levels_at(self.process, time)
        alpha, sigma = self.process.alpha(level), self.process.sigma(level)
        noise = (noisy - alpha * self.clean) / sigma
        clean, kind = self.clean, self.process.prediction
        return {
            "noise": noise,
            "clean": clean,
            "velocity": self.process.velocity(clean, noise, alpha, sigma),
        }[kind]


def fixed_fields() -> dict[str, torch.Tensor]:
    """Of three atoms, some pairs, and one number of the cell."""
    atoms = (torch.arange(6) < 3) & MASK
    pairs = atoms[:, :, None] & atoms[:, None]
    cell = torch.tensor([True, False]).expand(2, 2)
    atoms, pairs = atoms[..., None], pairs[..., None]
    return {"positions": atoms, "elements": atoms, "bonds": pairs, "cell": cell}


@pytest.mark.parametrize(("process", "name"), SERVED)
def test_fixed_values_come_out_exactly(process, name):
    """Against a network that is sure of something else; all samplers, all domains."""
    trained_with = PROCESSES[process](20)
    known, belief = random_state(1), random_state(2)
    hook = FixedValues.of_fields(known, fixed_fields())
    sampler = build_sampler(trained_with, name)
    random = ExactRandomNumbers(0, torch.arange(2))
    drawn = sampler.sample(Knows(trained_with, belief), random, LAYOUT, MASK, hook=hook)
    for field, where in fixed_fields().items():
        ours, theirs = drawn[field], known[field]
        where = where.expand_as(ours)
        if field == "positions":  # up to a translation
            kept = where[..., :1]
            ours = ours - torch.where(kept, ours, 0).sum(dim=1, keepdim=True) / 3
            theirs = theirs - torch.where(kept, theirs, 0).sum(dim=1, keepdim=True) / 3
            torch.testing.assert_close(ours[where], theirs[where], rtol=0, atol=1e-9)
        else:
            assert torch.equal(ours[where], theirs[where])
            assert (ours[~where & (ours != 0)] != theirs[~where & (ours != 0)]).all()
    # The part that is free is what the network is sure of, moved as the fixed part was.
    free = MASK & ~fixed_fields()["positions"][..., 0]
    for sample in range(2):
        ours, theirs = (x["positions"][sample, free[sample]] for x in (drawn, belief))
        torch.testing.assert_close(torch.diff(ours, dim=0), torch.diff(theirs, dim=0),
                                   rtol=0, atol=0.05)  # fmt: skip


def test_the_score_temperature_leaves_fixed_values():
    process = Diffusion(20)
    temperature = Temperature(0.7, "score", 0.3, 2.0)
    hook = FixedValues.of_fields(random_state(1), fixed_fields())
    sampler = build_sampler(process, "heun", temperature=temperature)
    seen = []

    class Sees(Knows):
        def __call__(self, noisy, *others):
            seen.append(noisy["cell"][:, 0])
            return super().__call__(noisy, *others)

    random = ExactRandomNumbers(0, torch.arange(2))
    sampler.sample(Sees(process, random_state(2)), random, LAYOUT, MASK, hook=hook)
    # Before the end, too: along a line from its noise to the value.
    last = sampler.visited[-1]
    apart = seen[-1] - last.alpha2**0.5 * random_state(1)["cell"][:, 0]
    assert apart.abs().max() < 5 * last.sigma2**0.5


# -- resampling ----------------------------------------------------------------------------------

PLANE = Layout([Field("positions", "atom", 3, 1.0, "zero_mean"), Field("cell", "graph", 2, 1.0)])
CORRELATION, VALUE = 0.9, 1.5


class Gaussian:
    """The exact denoiser of two numbers with unit variance and a correlation."""

    def __init__(self, process):
        self.process = process
        self.covariance = torch.tensor([[1, CORRELATION], [CORRELATION, 1]]).double()

    def __call__(self, noisy, time, mask, condition, self_condition):
        level = levels_at(self.process, time)[:1]
        alpha, sigma = (f(level).double() for f in (self.process.alpha, self.process.sigma))
        spread = alpha**2 * self.covariance + sigma**2 * torch.eye(2).double()
        score = -torch.linalg.solve(spread, noisy["cell"].T).T
        return noisy.replace(cell=-sigma * score, positions=torch.zeros_like(noisy["positions"]))


def conditional_error(name: str, resample: int, steps: int = 40) -> tuple[float, float]:
    """Errors of mean and standard deviation of the second number, given the first."""
    count, process = 1500, Diffusion(1000)
    mask = torch.ones(count, 1, dtype=torch.bool)
    tensors = {
        "atom": torch.zeros(count, 1, 3).double(),
        "graph": torch.full((count, 2), VALUE).double(),
    }
    where = torch.tensor([True, False]).expand(count, 2)
    hook = FixedValues.of_fields(State(PLANE, mask, tensors), {"cell": where})
    sampler = build_sampler(process, name, steps, resample=resample)
    random = ExactRandomNumbers(5, torch.arange(count))
    cell = sampler.sample(Gaussian(process), random, PLANE, mask, hook=hook)["cell"]
    assert (cell[:, 0] == VALUE).all()
    expected = (1 - CORRELATION**2) ** 0.5
    return float(cell[:, 1].mean()) - CORRELATION * VALUE, float(cell[:, 1].std()) - expected


@pytest.mark.parametrize("name", ["ancestral", "sde-dpm++"])
def test_resampling_converges_to_the_conditional(name):
    """p(second | first) of a Gaussian is known: mean ρ·v and variance 1 − ρ²."""
    once, often = conditional_error(name, 1), conditional_error(name, 10)
    assert abs(once[0]) > 0.1  # replacement alone is biased
    assert abs(often[0]) < abs(once[0]) / 3
    assert abs(often[0]) < 0.06
    assert abs(often[1]) < abs(once[1])


def test_random_numbers_of_repeats_are_their_own():
    """Each step of each repeat and each way back has other numbers, in every batch the same."""
    process, seen = Diffusion(6), []

    class Random(RandomNumbers):
        def noise(self, layout, mask, level):
            seen.append(level)
            return super().noise(layout, mask, level)

    sampler = build_sampler(process, "ancestral", resample=4)
    clean = random_state(3).map(torch.Tensor.float)
    whole = sampler.sample(Knows(process, clean), Random(0, torch.arange(2)), LAYOUT, MASK)
    assert len(set(seen)) == len(seen) == 2 + 6 * (4 + 3)
    assert max(seen) < 2**32 - 100
    assert sampler.evaluations == 6 * 4 + 1
    one = State(LAYOUT, MASK[1:], {d: t[1:] for d, t in clean.tensors.items()})
    alone = sampler.sample(
        Knows(process, one), RandomNumbers(0, torch.tensor([1])), LAYOUT, MASK[1:]
    )
    torch.testing.assert_close(alone.atoms, whole.atoms[1:])


def test_once_is_as_without():
    process, clean = Diffusion(10), random_state(3)
    drawn = [
        build_sampler(process, "ancestral", **options).sample(
            Knows(process, clean), ExactRandomNumbers(0, torch.arange(2)), LAYOUT, MASK
        )
        for options in ({}, {"resample": 1})
    ]
    assert torch.equal(drawn[0].atoms, drawn[1].atoms)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_without_random_steps_are_not_resampled(name):
    process = PROCESSES[SAMPLERS[name].processes[0]](10)
    if name in ("ancestral", "sde-dpm++"):
        build_sampler(process, name, resample=MOST_REPEATS)
        with pytest.raises(InputError, match="--resample 1001: expected a number from 1 to 1,000"):
            build_sampler(process, name, resample=MOST_REPEATS + 1)
        return
    remedy = "leave it out" if name == "euler" else "choose --sampler ancestral or sde-dpm"
    with pytest.raises(InputError, match=f"--resample 3 repeats random steps.*{remedy}"):
        build_sampler(process, name, resample=3)


# -- beginning with samples ----------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_levels_below_a_strength(process):
    built = PROCESSES[process](100)
    whole = build_sampler(built, steps=20).visited
    below = levels_below(built, whole, 0.3)
    assert below[0].level == pytest.approx(0.3 if built.continuous else 30)
    assert below[1:] == [at for at in whole if at.level < below[0].level]
    assert len({at.stream for at in below}) == len(below)
    for strength in (0, -1, 1.5, float("nan"), 1e-9):
        with pytest.raises(InputError, match="--strength"):
            levels_below(built, whole, strength)


def test_sampling_begins_with_noisy_samples():
    """A network that predicts no change returns samples with the noise of the strength."""
    process, clean = Diffusion(1000), random_state(4)

    class Nothing:
        def __call__(self, noisy, *_):
            return noisy * 0

    sampler = build_sampler(process, "ddim", 10, strength=0.2)
    random = ExactRandomNumbers(0, torch.arange(2))
    drawn = sampler.sample(Nothing(), random, LAYOUT, MASK, clean=clean)
    at = sampler.visited[0]
    noise = random.noise(LAYOUT, MASK, 1001)
    expected = clean["cell"] + (at.sigma2 / at.alpha2) ** 0.5 * noise["cell"]
    torch.testing.assert_close(drawn["cell"], expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="go with a strength below 1"):
        sampler.sample(Nothing(), random, LAYOUT, MASK)


# -- values of any atoms -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ancestral", "heun"])
def test_atoms_take_the_values_that_fit_them(name):
    """A network is sure of a set of atoms; the values are some of them in another order."""
    process, belief = Diffusion(20), random_state(2)
    order = torch.tensor([[5, 3, 0, 1, 2, 4], [2, 3, 0, 1, 4, 5]])
    rows = torch.arange(2)[:, None]
    values = State(
        LAYOUT,
        MASK,
        {
            "atom": belief.atoms[rows, order] + torch.tensor([7.0, 0, 0, 0, 0, 0, 0]),
            "pair": belief["bonds"][rows[..., None], order[:, :, None], order[:, None]],
            "graph": belief["cell"],
        },
    )
    fixed = {name: where for name, where in fixed_fields().items() if name != "cell"}
    random = ExactRandomNumbers(0, torch.arange(2))
    drawn = build_sampler(process, name).sample(
        Knows(process, belief), random, LAYOUT, MASK, hook=MatchedValues.of_fields(values, fixed)
    )
    for sample, size in enumerate((6, 4)):
        ours = drawn["positions"][sample, :size]
        theirs = belief["positions"][sample, order[sample, :size]]
        # Places that are not fixed may hold the other atoms in any order.
        distance = torch.cdist(ours, theirs)
        assert distance[:3].argmin(dim=1).tolist() == [0, 1, 2]
        assert distance.min(dim=0).values.max() < 0.05
        assert torch.equal(drawn["bonds"][sample, :3, :3], values["bonds"][sample, :3, :3])
        assert torch.equal(drawn["elements"][sample, :3], values["elements"][sample, :3])


def test_places_are_those_of_the_least_distance():
    """Against all permutations of atoms, for elements alone, whose sum does not move."""
    clean = random_state(6)
    values = random_state(7)
    where = MASK[..., None] & (torch.arange(6) < 5)[None, :, None]
    hook = MatchedValues.of_fields(values, {"elements": where})
    hook._match(clean)
    assert hook._places is not None
    for sample, size in enumerate((6, 4)):
        places = hook._places[sample, :size].tolist()
        assert sorted(places) == list(range(size))
        wanted, have = values["elements"][sample].numpy(), clean["elements"][sample].numpy()
        kept = [place for place in range(size) if place < 5]

        def cost(atoms, wanted=wanted, have=have, kept=kept):
            return sum(((wanted[place] - have[atoms[place]]) ** 2).sum() for place in kept)

        best = min(map(cost, permutations(range(size))))
        assert cost(np.argsort(places)) == pytest.approx(best, rel=1e-6)
        assert hook._places[sample, size:].tolist() == list(range(size, 6))


# -- anchors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_groups_are_held_at_their_anchors_above_a_noise(process):
    """Means of the groups, relative to the fixed atoms; below, x̂ is that of the network."""
    built = PROCESSES[process](1000, prediction="clean") if process != "diffusion" else Diffusion()
    clean, values = random_state(2), random_state(1)
    groups = torch.tensor([[-1, -1, -1, 0, 1, 0], [-1, -1, -1, 0, -1, -1]])
    anchors = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    fixed = {name: where for name, where in fixed_fields().items() if name != "cell"}
    hook = AnchoredValues.of_fields(values, fixed, anchors=anchors, groups=groups, until=0.4)
    for time, held in ((0.9, True), (0.05, False)):
        level = levels_at(built, torch.full((2,), time))
        prediction = Prediction(built, random_state(3), level, clean, "clean")
        found = hook.after_prediction(prediction, level[0].item()).clean["positions"]
        centroid = found[:, :3].mean(dim=1)
        for sample in range(2):
            for group in range(2):
                members = groups[sample] == group
                if not members.any():
                    continue
                mean = found[sample, members].mean(dim=0) - centroid[sample]
                if held:
                    torch.testing.assert_close(mean, anchors[sample, group])
                else:
                    theirs = clean["positions"][sample]
                    expected = theirs[members].mean(dim=0) - theirs[:3].mean(dim=0)
                    torch.testing.assert_close(mean, expected)
        apart = found[:, :3] - centroid[:, None]
        wanted = values["positions"][:, :3]
        torch.testing.assert_close(apart, wanted - wanted.mean(dim=1, keepdim=True))


def test_only_the_other_atoms_take_each_others_places():
    clean, values = random_state(6), random_state(7)
    groups = torch.where(MASK & (torch.arange(6) >= 2), 0, -1)
    hook = AnchoredValues.of_fields(
        values, {"elements": MASK[..., None]}, anchors=torch.zeros(2, 1, 3).double(),
        groups=groups, until=0.4,
    )  # fmt: skip
    hook._match(clean)
    assert hook._places is not None
    for sample, size in enumerate((6, 4)):
        places = hook._places[sample].tolist()
        assert places[:2] == [0, 1] and places[size:] == list(range(size, 6))
        wanted, have = (x["elements"][sample].numpy() for x in (values, clean))

        def cost(order, wanted=wanted, have=have):
            return sum(((wanted[place] - have[atom]) ** 2).sum() for atom, place in order)

        best = min(cost(enumerate(order, 2)) for order in permutations(range(2, size)))
        assert cost(enumerate(places[2:size], 2)) == pytest.approx(best, rel=1e-6)
