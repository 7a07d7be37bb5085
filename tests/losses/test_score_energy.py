"""The energy whose minimiser is the score, its parts, and springs learnt from errors."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch
from conftest import imported_script

from molgen_energy.losses import (
    AdaptiveSprings,
    CompleteEdges,
    MeanSquaredError,
    PairwiseEnergy,
    ScoreEnergy,
    ScoreEnergyConfig,
    SpringsConfig,
)
from molgen_energy.losses.energy import Rest, SpringsAt

LEVELS = (0.1, 0.3, 0.7, 1.0)


@pytest.fixture(scope="module")
def check():
    with imported_script("check_minimiser") as module:
        yield module


@pytest.fixture(scope="module")
def known(check):
    return check.density(torsions=3, order=3)


@pytest.fixture(scope="module", params=LEVELS)
def given(check, known, request):
    """Structures, their probabilities given a noisy x_t, and the posterior mean."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(known.points.shape[1:], generator=generator, dtype=torch.float64)
    noisy = known.points[7] + request.param * (noise - noise.mean(dim=0))
    weights = known.posterior(noisy, request.param)
    return known.points, weights, torch.einsum("q,qni->ni", weights, known.points)


def test_the_density_is_a_chain(check, known):
    """Bonds and angles are fixed; ends of the chain move; orientations are uniform."""
    bonds = known.points.diff(dim=1)
    torch.testing.assert_close(bonds.norm(dim=-1), torch.full_like(bonds[..., 0], check.BOND))
    cosines = (bonds[:, :-1] * bonds[:, 1:]).sum(-1) / check.BOND**2
    torch.testing.assert_close(
        cosines, torch.full_like(cosines, -float(torch.tensor(check.ANGLE).cos()))
    )
    ends = (known.points[:, 0] - known.points[:, -1]).norm(dim=-1)
    assert ends.max() - ends.min() > 1
    weights = known.log_weights.softmax(dim=0)
    mean = torch.einsum("q,qni->ni", weights, known.points)
    assert mean.abs().max() < 1e-12
    tensor = torch.einsum("q,qni,qnj->ij", weights, known.points, known.points)
    torch.testing.assert_close(tensor, tensor.trace() / 3 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("springs_at", ["prediction", "noisy"])
def test_the_mean_gradient_vanishes_at_the_posterior_mean(check, given, springs_at):
    points, weights, mean = given
    loss = ScoreEnergy(springs_at=springs_at)
    noisy = torch.linspace(0, 9, 15, dtype=torch.float64).view(5, 3).sin()

    def call(guess, targets):
        return loss(guess, targets, noisy=noisy.expand_as(targets))

    at_mean = check.mean_gradient(call, mean, points, weights)
    elsewhere = check.mean_gradient(call, mean + 0.1 * mean.flip(1), points, weights)
    assert at_mean.norm() < 1e-12
    assert elsewhere.norm() > 1e-2


def test_the_minimiser_is_the_posterior_mean_and_that_of_the_energy_is_not(check, given, request):
    points, weights, mean = given
    level = request.node.callspec.params["given"]
    start = mean + 0.2 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    for loss in (ScoreEnergy(), ScoreEnergy("inverse"), MeanSquaredError()):
        found = check.stationary_point(loss, start, points, weights)
        assert (found - mean).norm() / mean.norm() < 1e-5
    found = check.stationary_point(PairwiseEnergy("exponential"), mean, points, weights)
    changed = torch.pdist(found) / torch.pdist(mean) - 1  # a rotation does not change distances
    if level >= 0.7:  # below, this coarse density has nearly one structure at each x_t
        assert changed.abs().max() > 0.05


def test_without_external_springs_the_minimiser_is_not_unique(check, given):
    """ŷ with m = ŷ − ω × ŷ is stationary too: their difference is an infinitesimal rotation."""
    points, weights, mean = given
    turn = torch.tensor([[0, -0.3, 0.2], [0.3, 0, -0.1], [-0.2, 0.1, 0]], dtype=torch.float64)
    other = mean @ torch.linalg.inv(torch.eye(3, dtype=torch.float64) - turn).T
    alone = PairwiseEnergy("exponential", "sample", rest="projected", springs_at="prediction")
    assert check.mean_gradient(alone, other, points, weights).norm() < 1e-12
    assert check.mean_gradient(ScoreEnergy(), other, points, weights).norm() > 1e-2


def by_hand(prediction, target, noisy, rest, springs_at, scale):
    """The energy of one sample with exponential springs, by PyTorch's gradients."""
    n = len(prediction)
    distinct = ~torch.eye(n, dtype=torch.bool)
    predicted, data, other = ((x[:, None] - x[None])[distinct] for x in (prediction, target, noisy))
    place = {"prediction": predicted, "target": data, "noisy": other}[springs_at]
    stiffness = torch.exp(-place.norm(dim=-1)).detach()
    constant = 1 / stiffness.mean() if scale == "sample" else scale
    length = predicted.norm(dim=-1)
    direction = (predicted / length[:, None]).detach()
    squares = {
        "distance": (length - data.norm(dim=-1)).square(),
        "projected": (direction * (predicted - data)).sum(dim=-1).square(),
        "vector": (predicted - data).square().sum(dim=-1),
    }[rest]
    return 0.5 * constant / n * (stiffness * squares).sum()


@pytest.mark.parametrize(
    ("rest", "springs_at", "scale"),
    list(product(get_args(Rest), get_args(SpringsAt), [2.5, "sample"])),
)
def test_value_and_gradient_of_every_variant(rest, springs_at, scale):
    generator = torch.Generator().manual_seed(2)
    target, shift, noise = torch.randn(3, 4, 7, 3, generator=generator, dtype=torch.float64)
    prediction, noisy = (target + 0.3 * shift).requires_grad_(), target + noise
    mask = torch.rand(4, 7, generator=generator) < 0.8
    loss = PairwiseEnergy("exponential", scale, rest=rest, springs_at=springs_at)
    got = loss(prediction, target, mask, noisy=noisy)
    expected = torch.stack(
        [
            by_hand(*(x[k][mask[k]] for x in (prediction, target, noisy)), rest, springs_at, scale)
            for k in range(4)
        ]
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(values.sum(), prediction)[0] for values in (got, expected))
    )


def test_blocks_do_not_matter():
    generator = torch.Generator().manual_seed(2)
    target, shift = torch.randn(2, 3, 40, 3, generator=generator, dtype=torch.float64)
    results = []
    for size in (7, 10_000):
        prediction = (target + shift).requires_grad_()
        loss = ScoreEnergy(edges=CompleteEdges(size))(prediction, target)
        results.append((loss, torch.autograd.grad(loss.sum(), prediction)[0]))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other)


def test_external_springs_add_a_squared_error():
    target, shift = torch.randn(2, 3, 6, 3, dtype=torch.float64)
    inner = PairwiseEnergy("exponential", "sample", rest="projected", springs_at="prediction")
    for external in (0.1, 2.0):
        got = ScoreEnergy(external=external)(target + shift, target)
        squares = shift.square().sum(dim=(1, 2)) / 6
        torch.testing.assert_close(got, inner(target + shift, target) + external * squares)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"external": 0.0}, "external 0.0: expected a number above 0"),
        ({"springs_at": "target"}, "the minimiser would not be the score"),
        ({"springs": "stiff"}, "unknown springs 'stiff'"),
        ({"springs": "lennard_jones"}, "springs that depend on bonds of the data"),
        ({"distance": "features"}, "springs that depend on features of the data"),
        ({"edges": "bonds"}, "springs that depend on bonds of the data"),
        ({"edges": "symmetrized"}, "springs that depend on neighbours of the data"),
    ],
)
def test_bad_arguments_of_the_score_energy(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreEnergy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rest": "angle"}, "unknown rest 'angle'"),
        ({"springs_at": "start"}, "unknown springs_at 'start'"),
        ({"springs": "auto", "scale": 2.0}, "springs that adapt have the scale 'sample'"),
    ],
)
def test_bad_arguments_of_the_energy(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairwiseEnergy(**arguments)


def test_inputs_that_are_missing_or_have_other_shapes():
    target = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="give noisy"):
        ScoreEnergy(springs_at="noisy")(target, target)
    with pytest.raises(ValueError, match=r"prediction \(2, 5, 3\) and noisy \(2, 4, 3\) differ"):
        ScoreEnergy(springs_at="noisy")(target, target, noisy=target[:, 1:])
    with pytest.raises(ValueError, match="give noise_level"):
        ScoreEnergy("auto")(target, target)
    with pytest.raises(ValueError, match=r"expected noise_level \(2,\), not \(3,\)"):
        ScoreEnergy("auto")(target, target, noise_level=torch.ones(3))


def test_the_section_has_no_other_scale():
    with pytest.raises(ValueError, match=r"set loss\.springs\.scale to sample"):
        ScoreEnergyConfig(springs=SpringsConfig(scale=2.0))
    for scale in (2.0, "gdm"):
        with pytest.raises(ValueError, match=f"scale sample, not {scale}; set it to sample"):
            SpringsConfig(family="auto", scale=scale)


@pytest.mark.parametrize("distance", [80.0, 90.0, 100.0, 120.0])
def test_springs_that_vanish_leave_the_external_ones(distance):
    """exp(−d) of all pairs is near the smallest number, or below: its inverse would overflow."""
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])[None] / 2**0.5
    prediction = (distance * corners).requires_grad_()
    energy = ScoreEnergy()(prediction, corners)
    energy.sum().backward()
    external = 0.64 / 4 * (prediction - corners).square().sum()
    assert external * (1 - 1e-6) <= energy < 10 * external
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(
    "values",
    [
        {"springs": {"family": "lennard_jones"}},
        {"springs": {"distance": "features"}},
        {"edges": {"kind": "bonds"}},
        {"edges": {"kind": "symmetrized"}},
    ],
)
def test_the_section_has_no_springs_that_depend_on_the_data(values):
    with pytest.raises(ValueError, match="choose other springs, edges or distance"):
        ScoreEnergyConfig(**values)


# ---- springs that are learnt ---------------------------------------------------------------------


def learnt(steps=300, errors=lambda d, s: 0.1 * d * s, levels=(0.1, 1.0)):
    """Springs after errors of known spread: normal, of the given standard deviation."""
    springs = AdaptiveSprings()
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor(levels, dtype=torch.float64)
    sample = torch.arange(len(levels))[:, None]
    for _ in range(steps):
        uniform = torch.rand(len(levels), 4000, generator=generator, dtype=torch.float64)
        distances = 0.8 * 10**uniform  # 0.8 to 8
        noise = torch.randn(uniform.shape, generator=generator, dtype=torch.float64)
        squares = (noise * errors(distances, level[:, None])).square()
        springs.record(distances, sample, level, squares, torch.ones_like(distances))
        springs.finish_step()
    return springs


def test_stiffness_is_one_over_the_variance_of_the_errors():
    springs = learnt()
    d = torch.tensor([1.0, 1.5, 2.5, 4.0, 7.0], dtype=torch.float64)
    for level in (0.1, 1.0):
        variance = springs.variance(d, level)
        torch.testing.assert_close(variance / variance[0], (d / d[0]) ** 2, rtol=0.05, atol=0)


def test_stiffness_depends_on_the_noise_level():
    levels = (0.1, 0.1 * 10**0.25)  # neighbours in the grid
    springs = learnt(
        errors=lambda d, s: torch.where(s < 0.15, 0.1 * torch.ones_like(d), 0.1 * d), levels=levels
    )
    d = torch.tensor([1.0, 4.0], dtype=torch.float64)
    low, high = (springs.variance(d, level) for level in levels)
    assert low[1] / low[0] == pytest.approx(1, rel=0.05)
    assert high[1] / high[0] == pytest.approx(16, rel=0.05)
    between = springs.variance(d, (levels[0] * levels[1]) ** 0.5)
    assert between[1] / between[0] == pytest.approx(4, rel=0.05)  # log v is linear in log s


def test_stiffness_is_smooth_and_finite_everywhere():
    springs = learnt(steps=20)
    d = torch.logspace(-3, 3, 4001, dtype=torch.float64)
    for level in (0.0, 1e-5, 0.3, 1e5):
        values = 1 / springs.variance(d, level)
        assert torch.isfinite(values).all() and (values > 0).all()
        assert values.log().diff().abs().max() < 0.05


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("springs_at", ["target", "prediction"])
def test_a_prediction_that_is_not_finite_gives_such_a_loss(spoilt, springs_at):
    """So that training skips the step."""
    target = torch.randn(2, 5, 3)
    loss = PairwiseEnergy("auto", "sample", springs_at=springs_at)
    prediction = torch.full_like(target, spoilt).requires_grad_()
    assert not loss(prediction, target, noise_level=torch.ones(2)).isfinite().any()


def test_springs_learn_the_same_from_a_transform():
    """Sums of `torch.func.grad` outlive it."""
    prediction, target = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    by_backward, by_transform = (PairwiseEnergy("auto", "sample") for _ in range(2))
    level = torch.ones(2)
    for _ in range(2):
        by_backward(prediction.clone().requires_grad_(), target, noise_level=level)
        torch.func.grad(lambda x: by_transform(x, target, noise_level=level).sum())(prediction)
    for loss in (by_backward, by_transform):
        loss.adaptive.finish_step()
    for expected, found in zip(
        by_backward.adaptive.state().values(), by_transform.adaptive.state().values(), strict=True
    ):
        assert torch.equal(found, expected)
    assert by_transform.adaptive.state()["squares"].sum() > 0


def test_springs_are_equal_before_the_first_step():
    d = torch.linspace(0.1, 30, 50, dtype=torch.float64)
    torch.testing.assert_close(AdaptiveSprings().variance(d, 0.5), torch.ones_like(d))


def test_shards_together_learn_what_the_whole_does():
    def recorded(springs, part):
        generator = torch.Generator().manual_seed(3)
        d = 1 + torch.rand(4, 50, generator=generator, dtype=torch.float64)
        squares, level = d.square() / 100, torch.tensor([0.1, 0.2, 1.0, 3.0]).double()
        d, squares, level = d[part], squares[part], level[part]
        sample = torch.arange(len(level))[:, None]
        springs.record(d, sample, level, squares, torch.ones_like(d))

    whole, halves = AdaptiveSprings(), [AdaptiveSprings(), AdaptiveSprings()]
    recorded(whole, slice(None))
    whole.finish_step()
    sums = []
    for k, half in enumerate(halves):
        recorded(half, slice(k, None, 2))
        half.finish_step(lambda new: sums.append(new) or new)
    both = AdaptiveSprings()
    recorded(both, slice(0, None, 2))
    both.finish_step(lambda new: new + sums[1])
    for key, value in whole.state().items():
        torch.testing.assert_close(both.state()[key], value)


def test_state_continues_bit_for_bit():
    springs, copy = learnt(steps=5), AdaptiveSprings()
    copy.load_state({key: value.clone() for key, value in springs.state().items()})
    d = torch.linspace(0.6, 9, 30, dtype=torch.float64)
    for one in (springs, copy):
        one.record(
            d[None], torch.zeros(1, 1).long(), torch.ones(1).double(), d[None] / 50, 1 + 0 * d[None]
        )
        one.finish_step()
    assert torch.equal(springs.variance(d, 0.4), copy.variance(d, 0.4))


def test_only_training_is_recorded_and_a_step_can_be_discarded():
    target = torch.randn(2, 6, 3)
    level = torch.full((2,), 0.5)
    loss = ScoreEnergy("auto")
    before = loss.adaptive.state()["pairs"].clone()
    with torch.no_grad():
        loss(target + 1, target, noise_level=level)
    loss(target + 1, target, noise_level=level)  # nothing requires a gradient
    loss.adaptive.finish_step()
    assert torch.equal(loss.adaptive.state()["pairs"], before)
    prediction = (target + torch.randn_like(target)).requires_grad_()
    loss(prediction, target, noise_level=level)
    loss.adaptive.discard_step()
    loss.adaptive.finish_step()
    assert torch.equal(loss.adaptive.state()["pairs"], before)
    loss(prediction, target, noise_level=level)
    loss.adaptive.finish_step()
    assert loss.adaptive.state()["pairs"].sum() == pytest.approx(2 * 6 * 5)


def test_errors_of_the_loss_are_recorded():
    """The squares of the extensions: a prediction stretched by 10 % is off by 10 % of distances."""
    target = torch.randn(8, 12, 3, dtype=torch.float64)
    loss = PairwiseEnergy("auto", "sample")
    level = torch.full((8,), 0.5, dtype=torch.float64)
    for _ in range(30):
        loss((1.1 * target).requires_grad_(), target, noise_level=level)
        loss.adaptive.finish_step()
    state = loss.adaptive.state()
    pairs = torch.cat([torch.pdist(one) for one in target])
    expected = 0.01 * pairs.square().mean()
    assert state["squares"].sum() / state["pairs"].sum() == pytest.approx(float(expected))
