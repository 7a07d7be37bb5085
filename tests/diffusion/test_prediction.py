"""What networks give, turned into noise."""

from __future__ import annotations

import pytest
import torch
from conftest import padded_batch
from torch import nn

from molgen_energy.diffusion.prediction import VelocityPrediction
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.errors import InputError
from molgen_energy.models import GDM
from molgen_energy.systems.registry import load_config


class Known(nn.Module):
    """Gives what it is told, and remembers what it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, noisy, time, mask):
        return self.answer


def test_noise_of_the_true_velocity_is_the_true_noise(molecules):
    positions, mask = padded_batch(molecules.select(torch.arange(0, 2000, 300).numpy()))
    clean = torch.where(mask[..., None], positions, 0)
    schedule = PolynomialSchedule(50)
    step = torch.arange(len(mask)) * 50 // (len(mask) - 1)
    alpha = schedule.alpha(step).double()[:, None, None]
    sigma = schedule.sigma(step).double()[:, None, None]
    noise = torch.where(mask[..., None], torch.randn_like(clean), 0)
    noisy = alpha * clean + sigma * noise
    model = VelocityPrediction(Known(alpha * noise - sigma * clean), schedule)
    found = model(noisy, schedule.time(step), mask)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-5)


def test_padding_is_zero_and_the_mean_stays():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    noisy = torch.randn(2, 3, 9)
    noisy[..., :3] -= (
        torch.where(mask[..., None], noisy[..., :3], 0).sum(1, keepdim=True)
        / mask.sum(1)[:, None, None]
    )
    model = VelocityPrediction(GDM(6, 1, 8), PolynomialSchedule(10))
    found = model(noisy, torch.tensor([0.3, 1.0]), mask)
    assert (found[~mask] == 0).all()
    assert found[..., :3].sum(dim=1).abs().max() < 1e-5


def test_a_flow_has_its_own_velocity():
    config = load_config("quick").replaced({"diffusion.prediction": "velocity"})
    with pytest.raises(InputError, match="prediction is of the process diffusion"):
        config.replaced({"diffusion.process": "flow_matching"})
