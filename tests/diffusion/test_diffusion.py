from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import padded_batch
from scipy import stats

from molgen_energy.diffusion.geometry import centred, random_rotations
from molgen_energy.diffusion.noise import SeededNoise, philox
from molgen_energy.diffusion.process import (
    DiffusionObjective,
    FlowMatchingObjective,
    Share,
    Times,
    molecule_noise,
)
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.losses import LOSSES, MeanAbsoluteError, MeanSquaredError, PairwiseEnergy
from molgen_energy.systems.molecules.encoding import MoleculeEncoding

CPU = torch.device("cpu")


# Known answers of philox4x32-10 from the Random123 distribution (Salmon et al. 2011).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_seeded_noise_depends_on_molecule_and_step_only():
    alone = SeededNoise(7, torch.tensor([41])).normal(3, 10, 9)
    together = SeededNoise(7, torch.arange(100)).normal(3, 29, 9)
    assert torch.equal(together[41, :10], alone[0])
    for other in (
        SeededNoise(8, torch.tensor([41])).normal(3, 10, 9),
        SeededNoise(7, torch.tensor([42])).normal(3, 10, 9),
        SeededNoise(7, torch.tensor([41])).normal(4, 10, 9),
    ):
        assert (other - alone).abs().min() > 0


def test_seeded_noise_is_normal_and_uncorrelated():
    noise = SeededNoise(0, torch.arange(200)).normal(1, 20, 9)
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    matrix = np.corrcoef(noise.reshape(-1, 9).numpy().T)
    assert np.abs(matrix - np.eye(9)).max() < 0.06
    uniform = SeededNoise(0, torch.arange(5000)).uniform()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01


def test_schedule():
    """Against the published definition, computed the other way round."""
    schedule = PolynomialSchedule(1000)
    assert schedule.alpha2.shape == (1001,)
    torch.testing.assert_close(schedule.alpha2 + schedule.sigma2, torch.ones(1001).double())
    assert schedule.sigma2[0] == pytest.approx(1e-5)
    u = np.arange(1001) / 1000
    free = (1 - 2e-5) * (1 - u**2) ** 2 + 1e-5
    np.testing.assert_allclose(schedule.alpha2[:-1], free[:-1])  # the clip acts at the end only
    ratio = (schedule.alpha2[-1] - 1e-5) / (schedule.alpha2[-2] - 1e-5)
    assert float(ratio) == pytest.approx(0.001)
    step = torch.tensor([[0, 500], [1000, 3]])
    assert schedule.alpha(step).shape == (2, 2)
    assert schedule.time(step)[1, 0] == 1


def test_rotations_are_proper_and_uniform():
    rotations = random_rotations(4000, torch.Generator().manual_seed(0), torch.zeros(()).double())
    eye = torch.eye(3).double().expand(4000, 3, 3)
    torch.testing.assert_close(rotations @ rotations.transpose(1, 2), eye)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(4000).double())
    # Under Haar measure the image of an axis has each coordinate uniform on [−1, 1].
    assert stats.kstest(rotations[:, 2, 0].numpy(), "uniform", args=(-1, 2)).pvalue > 0.01
    angle = torch.arccos(((rotations.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
    cdf = lambda a: (a - np.sin(a)) / np.pi  # noqa: E731
    assert stats.kstest(angle.numpy(), cdf).pvalue > 0.01


def test_centred_ignores_padding():
    values, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    values[~mask] = torch.nan
    result = centred(values, mask)
    torch.testing.assert_close(result[0, :3], values[0, :3] - values[0, :3].mean(0))
    assert (result[~mask] == 0).all()


def test_molecule_noise_lives_on_the_subspace():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    noise = molecule_noise(mask, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise[..., :3].sum(1), torch.zeros(2, 3))
    assert (noise[~mask] == 0).all()


def test_encoding_there_and_back(molecules):
    encoding = MoleculeEncoding((1, 6, 7, 8, 9))
    positions, numbers = molecules.select(np.arange(0, 2000, 100)).padded()
    mask = torch.from_numpy(numbers > 0)
    types = encoding.type_lookup()[torch.from_numpy(numbers).long()].clamp(min=0)
    clean = encoding.encode(torch.from_numpy(positions), types, mask)
    assert clean.shape[-1] == 3 + encoding.features == 9
    assert float(clean[0, 0, 3:8].max()) == 0.25
    assert float(clean[0, 0, 8]) == pytest.approx(numbers[0, 0] / 10)
    back, atomic_numbers = encoding.decode(clean, mask)
    assert (atomic_numbers.numpy() == numbers).all()
    pairs = mask[:, :, None] & mask[:, None, :]
    original = torch.from_numpy(positions)
    torch.testing.assert_close(
        torch.cdist(back, back)[pairs], torch.cdist(original, original)[pairs], rtol=0, atol=1e-4
    )


class Noisy(torch.nn.Module):
    """A model that is wrong by a fixed amount."""

    def __init__(self, wrong: torch.Tensor):
        super().__init__()
        self.wrong = wrong
        self.seen = None

    def forward(self, noisy, time, mask):
        self.seen = noisy, time
        return self.wrong


def judged(process, molecules, loss, weight, scale):
    """Terms of a wrong prediction, what the model saw and said, clean molecules and mask."""
    positions, mask = padded_batch(molecules.select(np.arange(0, 2000, 250)), torch.float32)
    positions = centred(positions, mask) / scale
    clean = torch.cat([positions, positions * 0.1], dim=-1)
    wrong = molecule_noise(mask, 6, torch.Generator().manual_seed(5))
    model = Noisy(wrong)
    objective = process(PolynomialSchedule(100), loss, weight, scale)
    terms = objective(model, clean, mask, torch.Generator().manual_seed(1))
    return terms, model.seen, wrong, clean, mask


def objective_setup(molecules, loss, weight, scale=1.0):
    terms, (noisy, time), wrong, clean, mask = judged(
        DiffusionObjective, molecules, loss, weight, scale
    )
    schedule, step = PolynomialSchedule(100), (time * 100).round().long()
    alpha, sigma = schedule.alpha(step)[:, None, None], schedule.sigma(step)[:, None, None]
    noise = torch.where(mask[..., None], (noisy - alpha * clean) / sigma, 0)
    return terms, noise, wrong, clean, mask, alpha, sigma


def flow_setup(molecules, loss, weight, scale=1.0):
    """Terms, the true velocity, the model's, clean molecules, mask and times."""
    terms, (noisy, time), wrong, clean, mask = judged(
        FlowMatchingObjective, molecules, loss, weight, scale
    )
    assert ((time > 0) & (time <= 1)).all()
    time = time[:, None, None]
    noise = (noisy - (1 - time) * clean) / time
    assert float(noise.sum(1)[..., :3].abs().max()) < 1e-3  # on the subspace
    return terms, noise - clean, wrong, clean, mask, time


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_flow_matching_with_mse_is_the_error_of_the_velocity(molecules, scale):
    """MSE(x̂, x)/t² is the squared error of the velocity."""
    loss = MeanSquaredError(channels=6)
    terms, velocity, wrong, _, mask, _ = flow_setup(molecules, loss, 1.0, scale)
    difference = torch.where(mask[..., None], velocity - wrong, 0)
    expected = 0.5 * difference.square().sum((1, 2)) / (mask.sum(1) * 6)
    torch.testing.assert_close(terms.total, expected, rtol=1e-3, atol=1e-4)


def test_flow_matching_with_energy(molecules):
    """E(x̂, x)/t² with x̂ = x_t − t û (appendix A.7)."""
    loss = PairwiseEnergy("exponential", 3.0)
    terms, velocity, wrong, clean, mask, time = flow_setup(molecules, loss, 0.05)
    guess = clean + time * (velocity - wrong)
    expected = 0.5 * 0.05 * loss(guess[..., :3], clean[..., :3], mask) / time.flatten() ** 2
    torch.testing.assert_close(terms.positions, expected, rtol=1e-3, atol=1e-5)


def test_objective_with_mae_is_the_absolute_error_of_the_noise(molecules):
    """Of features as well."""
    loss = MeanAbsoluteError(channels=6)
    terms, noise, wrong, _, mask, _, _ = objective_setup(molecules, loss, 1.0)
    difference = torch.where(mask[..., None], noise - wrong, 0).abs()
    expected = 0.5 * difference.sum((1, 2)) / (mask.sum(1) * 6)
    torch.testing.assert_close(terms.total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("process", [DiffusionObjective, FlowMatchingObjective])
@pytest.mark.parametrize("name", LOSSES)
def test_the_weight_makes_all_times_alike(molecules, process, name):
    """A given small error of the prediction costs about the same at every time."""
    positions, mask = padded_batch(molecules.select(np.full(64, 700)))
    clean = torch.cat([centred(positions, mask), torch.zeros(64, mask.shape[1], 3)], dim=-1)
    error = 1e-3 * molecule_noise(mask[:1], 6, torch.Generator().manual_seed(5)).double()
    schedule = PolynomialSchedule(100)
    seen = []

    def model(noisy, time, mask):
        seen.append(time)
        if process is DiffusionObjective:
            step = (time * 100).round().long()
            alpha, sigma = (x(step)[:, None, None] for x in (schedule.alpha, schedule.sigma))
            return (noisy - alpha * clean) / sigma + error
        t = time[:, None, None]
        return (noisy - (1 - t) * clean) / t - clean + error

    objective = process(schedule, LOSSES[name](), 1.0)
    terms = objective(model, clean, mask, torch.Generator().manual_seed(0))
    small = seen[0] < 0.6  # later the error is no longer small against the molecule
    values = terms.positions[small]
    assert len(values) > 10
    assert float(values.max() / values.min()) < 1.1


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_objective_with_mse_is_edms(molecules, scale):
    """(α/σ)²·MSE on clean positions is the squared error of the noise, so EDM's L2 comes back."""
    loss = MeanSquaredError(channels=6)
    terms, noise, wrong, _, mask, _, _ = objective_setup(molecules, loss, 1.0, scale)
    count = mask.sum(1) * 6
    expected = 0.5 * (noise - wrong).square().sum((1, 2)) / count
    torch.testing.assert_close(terms.total, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(terms.positions + terms.features, terms.total)


def test_objective_with_energy(molecules):
    loss = PairwiseEnergy("exponential", 3.0)
    terms, noise, wrong, clean, mask, alpha, sigma = objective_setup(molecules, loss, 0.05)
    noisy = alpha * clean + sigma * noise
    guess = ((noisy - sigma * wrong) / alpha)[..., :3]
    expected = 0.5 * 0.05 * (alpha / sigma).square().flatten() * loss(guess, clean[..., :3], mask)
    torch.testing.assert_close(terms.positions, expected, rtol=1e-3, atol=1e-5)
    count = mask.sum(1) * 6
    features = 0.5 * (noise - wrong)[..., 3:].square().sum((1, 2)) / count
    torch.testing.assert_close(terms.features, features, rtol=1e-3, atol=1e-5)


def test_objective_does_not_see_padding(molecules):
    """Poisoned padding changes nothing, and gradients stay finite."""
    positions, mask = padded_batch(molecules.select(np.arange(0, 2000, 500)), torch.float32)
    clean = torch.cat([centred(positions, mask), torch.zeros(*mask.shape, 2)], dim=-1)
    weight = torch.ones(5, requires_grad=True)

    def model(noisy, time, mask):
        return torch.where(mask[..., None], noisy * weight, torch.nan)

    objective = DiffusionObjective(PolynomialSchedule(10), PairwiseEnergy(), 0.05)
    terms = objective(model, clean, mask, torch.Generator().manual_seed(0))
    terms.total.sum().backward()
    assert torch.isfinite(terms.total).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_times_have_their_distribution(power, spread):
    times, levels, generator = Times(power, spread), 101, torch.Generator().manual_seed(0)
    draws = [times.draw(levels, Share(64, 1), generator, CPU) for _ in range(1000)]
    found = torch.bincount(torch.cat(draws), minlength=levels).double() / 64_000
    edges = (torch.arange(levels + 1).double() / levels) ** (1 / power)
    torch.testing.assert_close(found, edges.diff(), rtol=0, atol=0.006)


def test_spread_times_are_one_in_each_part():
    step = Times(1.0, True).draw(640, Share(64, 1), torch.Generator().manual_seed(0), CPU)
    assert sorted((step // 10).tolist()) == list(range(64))
    assert (step.diff() < 0).any()  # not in order, as molecules of a batch may be


@pytest.mark.parametrize("times", [Times(), Times(1.5), Times(1.5, True)])
def test_processes_draw_the_times_of_the_whole_batch(times):
    drawn = [
        times.draw(50, Share(7, 1, first, every), torch.Generator().manual_seed(0), CPU)
        for first, every in [(0, 1), (0, 3), (1, 3), (2, 3)]
    ]
    whole = drawn[0]
    for first in range(3):
        assert torch.equal(drawn[1 + first], whole[first::3])
