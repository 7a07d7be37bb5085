from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import padded_batch
from scipy import stats
from states import atoms_state, layout_of, levels_at, seeded_noise

from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.diffusion.geometry import centred, rotations_from_quaternions
from molgen_energy.diffusion.noise import RandomNumbers, Stream, philox
from molgen_energy.diffusion.objective import Objective, TimestepDistribution, Weights
from molgen_energy.diffusion.process import PROCESSES, CosineDiffusion, Diffusion, FlowMatching
from molgen_energy.diffusion.schedule import CosineSchedule, PolynomialSchedule
from molgen_energy.diffusion.state import State
from molgen_energy.losses import LOSSES, MeanAbsoluteError, MeanSquaredError, PairwiseEnergy
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout

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


def test_a_seed_on_the_device_gives_the_same_numbers():
    seed, samples = 2**62 + 12345, torch.tensor([3, 77, 2**31 + 5])
    words = torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
    for of in (lambda r: r.integers(Stream.EDGES), lambda r: r.uniform(Stream.LEVEL)):
        assert torch.equal(of(RandomNumbers(seed, samples)), of(RandomNumbers(words, samples)))


def mask_of(count, atoms):
    return torch.ones(count, atoms, dtype=torch.bool)


def test_noise_depends_on_molecule_and_level_only():
    layout = layout_of(6)
    alone = RandomNumbers(7, torch.tensor([41]))._normal(layout, "atom", mask_of(1, 10), 3)
    together = RandomNumbers(7, torch.arange(100))._normal(layout, "atom", mask_of(100, 29), 3)
    assert torch.equal(together[41, :10], alone[0])
    for other in (
        RandomNumbers(8, torch.tensor([41]))._normal(layout, "atom", mask_of(1, 10), 3),
        RandomNumbers(7, torch.tensor([42]))._normal(layout, "atom", mask_of(1, 10), 3),
        RandomNumbers(7, torch.tensor([41]))._normal(layout, "atom", mask_of(1, 10), 4),
    ):
        assert (other - alone).abs().min() > 0


def test_noise_is_normal_and_uncorrelated():
    random = RandomNumbers(0, torch.arange(200))
    noise = random._normal(layout_of(6), "atom", mask_of(200, 20), 1)
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    matrix = np.corrcoef(noise.reshape(-1, 9).numpy().T)
    assert np.abs(matrix - np.eye(9)).max() < 0.06


@pytest.mark.parametrize("stream", Stream)
def test_numbers_of_samples_are_uniform_and_streams_are_independent(stream):
    random = RandomNumbers(0, torch.arange(5000))
    uniform = random.uniform(stream)
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01
    assert ((uniform >= 0) & (uniform < 1)).all()
    integers = random.integers(stream)
    assert integers.dtype == torch.int64
    assert ((integers >= 0) & (integers < 1 << 62)).all()
    assert stats.kstest(integers.numpy() / 2**62, "uniform").pvalue > 0.01
    for other in set(Stream) - {stream}:
        assert abs(np.corrcoef(uniform, random.uniform(other))[0, 1]) < 0.06


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


def test_cosine_schedule():
    """Against the closed form in NumPy, at both ends too, and the inverse of λ."""
    schedule, time = CosineSchedule(), np.linspace(0, 1, 1001)
    angle = np.longdouble(np.pi) / 2 * (time + np.longdouble(0.008)) / np.longdouble(1.008)
    start = np.longdouble(np.pi) / 2 * np.longdouble(0.008) / np.longdouble(1.008)
    alpha = np.cos(angle) / np.cos(start)
    sigma = np.sqrt(np.cos(start) ** 2 - np.cos(angle) ** 2) / np.cos(start)
    found = schedule.alpha(torch.from_numpy(time)), schedule.sigma(torch.from_numpy(time))
    np.testing.assert_allclose(found[0][:-1], alpha[:-1].astype(float), rtol=1e-11)
    np.testing.assert_allclose(found[1], sigma.astype(float), rtol=1e-9, atol=1e-12)
    assert float(found[0][-1]) == 1e-9  # cos π/2: α and λ stay finite
    assert found[1][0] == 0
    squares = [CosineDiffusion().squares(t) for t in (1e-3, 0.5, 0.9946)]
    np.testing.assert_allclose(np.sum(squares, axis=1), 1, rtol=1e-14)
    inner = time[1:-1]
    log_snr = 2 * np.log(alpha[1:-1] / sigma[1:-1]).astype(float)
    np.testing.assert_allclose(schedule.time(torch.from_numpy(log_snr)), inner, atol=1e-12)
    process = CosineDiffusion()
    level = torch.from_numpy(inner)
    np.testing.assert_allclose(process.log_snr(level), log_snr, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(process.log_snr(torch.tensor([0.0, 1.0]))).all()
    assert process.log_snr(level).dtype == process.alpha(level).dtype == torch.float32


def test_rotations_are_proper_and_uniform():
    quaternions = RandomNumbers(0, torch.arange(4000)).quaternions().double()
    rotations = rotations_from_quaternions(quaternions)
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


def test_noise_is_on_the_subspace():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    noise = seeded_noise(layout_of(2), mask)
    torch.testing.assert_close(noise["positions"].sum(1), torch.zeros(2, 3))
    assert (noise.atoms[~mask] == 0).all()


def test_encoding_and_back(molecules):
    names, elements = ("positions", "elements", "nuclear_charges"), (1, 6, 7, 8, 9)
    layout = build_layout(names, ScalesConfig(), MoleculeStatistics(elements))
    batch = DeviceMolecules(molecules, CPU).batch(np.arange(0, 2000, 100))
    mask, numbers = batch.mask, batch.data["atomic_numbers"]
    values = {name: field.encode(batch.data) for name, field in layout.fields.items()}
    clean = State.from_fields(layout, mask, values)
    assert clean.atoms.shape[-1] == layout.channels["atom"] == 9
    assert float(clean["elements"][0, 0].max()) == 0.25
    assert float(clean["nuclear_charges"][0, 0]) == pytest.approx(float(numbers[0, 0]) / 10)
    back = clean.decode()
    assert (torch.where(mask, back["atomic_numbers"], 0) == numbers).all()
    assert (clean.atoms[~mask] == 0).all()
    pairs = mask[:, :, None] & mask[:, None, :]
    positions, original = back["positions"], batch.data["positions"]
    torch.testing.assert_close(
        torch.cdist(positions, positions)[pairs], torch.cdist(original, original)[pairs],
        rtol=0, atol=1e-4,
    )  # fmt: skip


class Noisy(torch.nn.Module):
    """A model that is wrong by a fixed amount."""

    def __init__(self, wrong: State):
        super().__init__()
        self.wrong = wrong
        self.seen = None

    def forward(self, noisy, time, mask, condition, self_condition):
        self.seen = noisy, time
        return self.wrong


def evaluated(process, molecules, loss, weight, scale):
    """Terms of a wrong prediction, the model's inputs and output, clean molecules and mask."""
    layout = layout_of(3, scale)
    positions, mask = padded_batch(molecules.select(np.arange(0, 2000, 250)), torch.float32)
    positions = centred(positions, mask) / scale
    clean = atoms_state(layout, mask, torch.cat([positions, positions * 0.1], dim=-1))
    wrong = seeded_noise(layout, mask, 5)
    model = Noisy(wrong)
    objective = Objective(process, loss, Weights(weight))
    terms = objective(model, clean, RandomNumbers(1, torch.arange(len(mask))))
    noisy, time = model.seen
    return terms, (noisy.atoms, time), wrong.atoms, clean.atoms, mask


def objective_setup(molecules, loss, weight, scale=1.0):
    terms, (noisy, time), wrong, clean, mask = evaluated(
        Diffusion(100), molecules, loss, weight, scale
    )
    schedule, step = PolynomialSchedule(100), (time * 100).round().long()
    alpha, sigma = schedule.alpha(step)[:, None, None], schedule.sigma(step)[:, None, None]
    noise = torch.where(mask[..., None], (noisy - alpha * clean) / sigma, 0)
    return terms, noise, wrong, clean, mask, alpha, sigma


def flow_setup(molecules, loss, weight, scale=1.0):
    """Terms, the true velocity, the model's, clean molecules, mask and times."""
    terms, (noisy, time), wrong, clean, mask = evaluated(
        FlowMatching(100), molecules, loss, weight, scale
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
    torch.testing.assert_close(terms.parts["positions"], expected, rtol=1e-3, atol=1e-5)


def test_objective_with_mae_is_the_absolute_error_of_the_noise(molecules):
    """Of features as well."""
    loss = MeanAbsoluteError(channels=6)
    terms, noise, wrong, _, mask, _, _ = objective_setup(molecules, loss, 1.0)
    difference = torch.where(mask[..., None], noise - wrong, 0).abs()
    expected = 0.5 * difference.sum((1, 2)) / (mask.sum(1) * 6)
    torch.testing.assert_close(terms.total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_weight_makes_all_times_alike(molecules, process, name):
    """A given small error of the prediction costs about the same at every time."""
    positions, mask = padded_batch(molecules.select(np.full(64, 700)))
    layout = layout_of(3)
    zeros = torch.zeros(64, mask.shape[1], 3)
    clean = atoms_state(layout, mask, torch.cat([centred(positions, mask), zeros], dim=-1))
    error = 1e-3 * seeded_noise(layout, mask[:1], 5).atoms.double()
    velocity = process == "flow_matching"
    built = PROCESSES[process](100, prediction="velocity" if velocity else "noise")
    seen = []

    def model(state, time, mask, condition, self_condition):
        seen.append(time)
        level = levels_at(built, time)
        noise = (state - built.alpha(level) * clean) / built.sigma(level)
        return state.with_atoms((noise - clean if velocity else noise).atoms + error)

    objective = Objective(built, LOSSES[name](), Weights(1.0))
    terms = objective(model, clean, RandomNumbers(0, torch.arange(64)))
    small = seen[0] < 0.6  # later the error is no longer small against the molecule
    values = terms.parts["positions"][small]
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
    torch.testing.assert_close(terms.parts["positions"] + terms.parts["features"], terms.total)


def test_objective_with_energy(molecules):
    loss = PairwiseEnergy("exponential", 3.0)
    terms, noise, wrong, clean, mask, alpha, sigma = objective_setup(molecules, loss, 0.05)
    noisy = alpha * clean + sigma * noise
    guess = ((noisy - sigma * wrong) / alpha)[..., :3]
    expected = 0.5 * 0.05 * (alpha / sigma).square().flatten() * loss(guess, clean[..., :3], mask)
    torch.testing.assert_close(terms.parts["positions"], expected, rtol=1e-3, atol=1e-5)
    count = mask.sum(1) * 6
    features = 0.5 * (noise - wrong)[..., 3:].square().sum((1, 2)) / count
    torch.testing.assert_close(terms.parts["features"], features, rtol=1e-3, atol=1e-5)


def test_objective_does_not_see_padding(molecules):
    """Poisoned padding changes nothing, and gradients stay finite."""
    layout = layout_of(2)
    positions, mask = padded_batch(molecules.select(np.arange(0, 2000, 500)), torch.float32)
    atoms = torch.cat([centred(positions, mask), torch.zeros(*mask.shape, 2)], dim=-1)
    weight = torch.ones(5, requires_grad=True)

    def model(noisy, time, mask, condition, self_condition):
        return noisy.with_atoms(torch.where(mask[..., None], noisy.atoms * weight, torch.nan))

    objective = Objective(Diffusion(10), PairwiseEnergy(), Weights(0.05))
    random = RandomNumbers(0, torch.arange(len(mask)))
    terms = objective(model, atoms_state(layout, mask, atoms), random)
    terms.total.sum().backward()
    assert torch.isfinite(terms.total).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_timesteps_have_their_distribution(power, stratified):
    timesteps, levels = TimestepDistribution(power, stratified), 101
    shares = torch.cat([timesteps.draw(RandomNumbers(k, torch.arange(64))) for k in range(1000)])
    found = torch.bincount(Diffusion(100).draw_levels(shares), minlength=levels).double() / 64_000
    edges = (torch.arange(levels + 1).double() / levels) ** (1 / power)
    torch.testing.assert_close(found, edges.diff(), rtol=0, atol=0.006)
    times = CosineDiffusion().draw_levels(shares)
    assert times.dtype == torch.float64
    assert ((times >= 1e-5) & (times <= 1)).all()
    assert stats.kstest(times.numpy() ** (1 / power), "uniform").statistic < 0.01


def test_stratified_timesteps_are_one_in_each_part():
    shares = TimestepDistribution(1.0, True).draw(RandomNumbers(0, torch.arange(64)))
    step = Diffusion(639).draw_levels(shares)
    assert sorted((step // 10).tolist()) == list(range(64))
    assert (step.diff() < 0).any()  # not in order, as molecules of a batch may be


@pytest.mark.parametrize(
    "timesteps",
    [
        TimestepDistribution(),
        TimestepDistribution(1.5),
        TimestepDistribution(1.5, True),
    ],
)
def test_shards_draw_the_timesteps_of_the_whole_batch(timesteps):
    drawn = [
        timesteps.draw(RandomNumbers(0, torch.arange(7)[first::every], 7))
        for first, every in [(0, 1), (0, 3), (1, 3), (2, 3)]
    ]
    whole = drawn[0]
    for first in range(3):
        assert torch.equal(drawn[1 + first], whole[first::3])
