"""What every registered loss, model and sampler must obey. Registering one tests it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import padded_batch
from scipy.spatial.transform import Rotation

from molgen_energy.diffusion.noise import SeededNoise
from molgen_energy.diffusion.samplers import SAMPLERS
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.losses import LOSSES, SPRINGS, MeanSquaredError, PairwiseEnergy
from molgen_energy.models import MODELS

ENERGIES = {f"energy-{name}": PairwiseEnergy(name, 1.7) for name in SPRINGS}
ALL_LOSSES = ENERGIES | {"mse": MeanSquaredError()}


def test_every_registered_loss_is_here():
    assert {name.split("-")[0] for name in ALL_LOSSES} == set(LOSSES)


@pytest.fixture(scope="module")
def pair(molecules):
    """A prediction near the data, the data, and the mask, in float64 with NaN at padding."""
    target, mask = padded_batch(molecules.select(np.arange(0, 2000, 250)))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).double()
    return target + 0.3 * noise, target, mask


def naive_energy(prediction, target, mask, family, scale):
    """Equation 7 as it is written, pair by pair."""
    energies = []
    for k in range(len(mask)):
        n = int(mask[k].sum())
        total = 0.0
        for i in range(n):
            for j in range(n):
                if i != j:
                    rest = (target[k, i] - target[k, j]).norm()
                    now = (prediction[k, i] - prediction[k, j]).norm()
                    total += 0.5 * scale / n * float(family(rest)) * (rest - now) ** 2
        energies.append(float(total))
    return torch.tensor(energies, dtype=torch.float64)


@pytest.mark.parametrize("name", SPRINGS)
def test_energy_is_the_equation(pair, name):
    prediction, target, mask = pair
    expected = naive_energy(prediction, target, mask, SPRINGS[name], 1.7)
    torch.testing.assert_close(ENERGIES[f"energy-{name}"](*pair), expected)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("constant", lambda d: 1.0),
        ("exponential", lambda d: np.exp(-d)),
        ("inverse", lambda d: 1 / (d + 1e-5)),
        ("inverse_square", lambda d: 1 / (d**2 + 1e-5)),
    ],
)
def test_spring_families(name, formula):
    d = np.array([0.0, 0.7, 1.1, 1.54, 5.0])
    expected = np.broadcast_to(formula(d), d.shape)
    np.testing.assert_allclose(SPRINGS[name](torch.from_numpy(d)).numpy(), expected)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_zero_at_the_data_positive_elsewhere(pair, loss):
    prediction, target, mask = pair
    assert loss(target, target, mask).abs().max() == 0
    assert (loss(prediction, target, mask) > 0).all()


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_padding_has_no_effect(pair, loss):
    prediction, target, mask = pair
    together = loss(prediction, target, mask)
    assert together.shape == (len(mask),)
    for k in range(len(mask)):
        n = int(mask[k].sum())
        alone = loss(prediction[k : k + 1, :n], target[k : k + 1, :n], mask[k : k + 1, :n])
        torch.testing.assert_close(together[k : k + 1], alone)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_gradient_against_finite_differences(pair, loss):
    prediction, target, mask = pair
    value = prediction[:1].clone()
    value[~mask[:1]] = 0  # gradcheck perturbs the padding too
    value.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target[:1], mask[:1]), value)


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_gradient_is_finite_everywhere(loss):
    """Coincident atoms, one atom, two atoms, and NaN at padding."""
    nan = torch.nan
    target = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0]], [[1, 2, 3], [nan] * 3, [nan] * 3],
                           [[0, 0, 0], [0, 0, 1.1], [nan] * 3]])  # fmt: skip
    mask = ~target.isnan().any(-1)
    prediction = torch.where(mask[..., None], 0.0, torch.nan).requires_grad_()
    loss(prediction, target, mask).sum().backward()
    assert torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES)
def test_degree(pair, loss):
    """A small displacement twice as large gives 2^degree times the loss."""
    prediction, target, mask = pair
    step = prediction - target
    near = loss(target + 1e-5 * step, target, mask)
    far = loss(target + 2e-5 * step, target, mask)
    torch.testing.assert_close(
        far / near, torch.full_like(near, 2.0**loss.degree), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("loss", ENERGIES.values(), ids=ENERGIES)
@pytest.mark.parametrize("mirror", [1, -1])
def test_energy_is_invariant_in_both_arguments(pair, loss, mirror):
    prediction, target, mask = pair
    rotation = mirror * torch.from_numpy(Rotation.random(random_state=1).as_matrix())
    moved = prediction @ rotation.T + torch.tensor([5.0, -3.0, 1.0]).double()
    expected = loss(prediction, target, mask)
    torch.testing.assert_close(loss(moved, target, mask), expected)
    moved = target @ rotation.T - 7
    torch.testing.assert_close(loss(prediction, moved, mask), expected)


@pytest.mark.parametrize("loss", ENERGIES.values(), ids=ENERGIES)
def test_minimisers_of_the_energy_are_images_of_the_data(pair, loss):
    """From a start nearby, descent ends where all distances agree (corollary 4.3)."""
    prediction, target, mask = (x[:2] for x in pair)
    value = torch.where(mask[..., None], prediction, 0).clone().requires_grad_()
    optimiser = torch.optim.LBFGS([value], max_iter=500, tolerance_grad=1e-10,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimiser.zero_grad()
        energy = loss(value, target, mask).sum()
        energy.backward()
        return energy

    optimiser.step(closure)
    for k in range(2):
        n = int(mask[k].sum())
        torch.testing.assert_close(
            torch.pdist(value[k, :n].detach()), torch.pdist(target[k, :n]), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def inputs(self, molecules, name):
        target, mask = padded_batch(molecules.select(np.arange(0, 2000, 300)), torch.float32)
        torch.manual_seed(0)
        model = MODELS[name](features=6, layers=2, width=16)
        features = torch.randn(*mask.shape, 6)
        noisy = torch.cat([target, torch.where(mask[..., None], features, torch.nan)], dim=-1)
        return model, noisy, torch.rand(len(mask)), mask

    def test_permuting_atoms_permutes_the_result(self, molecules, name):
        model, noisy, time, mask = self.inputs(molecules, name)
        order = torch.randperm(mask.shape[1])
        straight = model(noisy, time, mask)[:, order]
        torch.testing.assert_close(model(noisy[:, order], time, mask[:, order]), straight)

    def test_padding_has_no_effect(self, molecules, name):
        model, noisy, time, mask = self.inputs(molecules, name)
        together = model(noisy, time, mask)
        assert (together[~mask] == 0).all()
        for k in range(len(mask)):
            n = int(mask[k].sum())
            alone = model(noisy[k : k + 1, :n], time[k : k + 1], mask[k : k + 1, :n])
            torch.testing.assert_close(together[k : k + 1, :n], alone)

    def test_position_noise_has_zero_mean(self, molecules, name):
        model, noisy, time, mask = self.inputs(molecules, name)
        sums = model(noisy, time, mask)[..., :3].sum(dim=1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-5)

    def test_gradient_is_finite(self, molecules, name):
        model, noisy, time, mask = self.inputs(molecules, name)
        model(noisy, time, mask).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_low_precision_is_the_same_function(self, molecules, name):
        model, noisy, time, mask = self.inputs(molecules, name)
        exact = model(noisy, time, mask)
        model.low_precision = True
        rough = model(noisy, time, mask)
        assert rough.dtype == torch.float32
        assert (rough - exact).norm() / exact.norm() < 0.02

    def test_single_atom(self, molecules, name):
        model = MODELS[name](features=6, layers=2, width=16)
        mask = torch.ones(1, 1, dtype=torch.bool)
        assert torch.isfinite(model(torch.randn(1, 1, 9), torch.rand(1), mask)).all()


def test_gdm_is_the_textbook_formula():
    """Against the message network written atom by atom, with the first layer not split."""
    torch.manual_seed(0)
    model = MODELS["gdm"](features=2, layers=2, width=8).double()
    noisy, time = torch.randn(1, 4, 5).double(), torch.tensor([0.3]).double()
    silu = torch.nn.functional.silu
    h = model.embed(torch.cat([noisy[0], time.expand(4, 1)], dim=1))
    for layer in model.layers:
        joint = torch.cat([layer.receiver.weight, layer.sender.weight], dim=1)
        new = []
        for i in range(4):
            total = torch.zeros(8).double()
            for j in range(4):
                if j != i:
                    m = joint @ torch.cat([h[i], h[j]]) + layer.receiver.bias
                    m = silu(layer.message(silu(m)))
                    total = total + m * torch.sigmoid(layer.gate(m))
            update = layer.update_out(silu(layer.update_in(torch.cat([h[i], total]))))
            new.append(h[i] + update)
        h = torch.stack(new)
    expected = model.readout(h)
    expected[:, :3] -= expected[:, :3].mean(dim=0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(model(noisy, time, mask)[0], expected)


def test_gdm_has_the_papers_size():
    assert sum(p.numel() for p in MODELS["gdm"](features=6).parameters()) == 3_555_602


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
class TestSamplers:
    def test_the_exact_denoiser_gives_the_data(self, molecules, sampler):
        """For data of a single point the best noise prediction is known; it leads to the point."""
        positions, mask = padded_batch(molecules.select(np.array([3, 700])), torch.float32)
        clean = torch.where(mask[..., None], torch.cat([positions, positions * 0.1], dim=-1), 0)
        centre = clean[..., :3].sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        clean[..., :3] = torch.where(mask[..., None], clean[..., :3] - centre, 0)
        schedule = PolynomialSchedule(100)

        def exact(noisy, time, mask):
            step = (time * 100).round().long()
            alpha, sigma = schedule.alpha(step), schedule.sigma(step)
            return (noisy - alpha[:, None, None] * clean) / sigma[:, None, None]

        drawn = sampler(schedule).sample(exact, SeededNoise(0, torch.arange(2)), mask, 6)
        last = float(schedule.sigma2[0].sqrt())
        assert (drawn - clean).abs().max() < 6 * last
        assert (drawn - clean).abs().max() > 0.1 * last  # it is drawn, not copied

    def test_gaussian_data_keep_their_spread(self, sampler):
        """For normal data of spread s the best prediction is linear; samples have spread s."""
        spread, schedule = 0.5, PolynomialSchedule(200)
        mask = torch.ones(400, 10, dtype=torch.bool)

        def best(noisy, time, mask):
            step = (time * 200).round().long()
            alpha, sigma = schedule.alpha(step), schedule.sigma(step)
            share = sigma / (alpha**2 * spread**2 + sigma**2)
            return share[:, None, None] * noisy

        drawn = sampler(schedule).sample(best, SeededNoise(1, torch.arange(400)), mask, 5)
        # positions live on the zero-mean subspace: 9 of 10 atoms are free
        free = (drawn[..., :3].square().sum(1) / 9).mean().sqrt()
        assert float(free) == pytest.approx(spread, rel=0.03)
        assert float(drawn[..., 3:].std()) == pytest.approx(spread, rel=0.03)
