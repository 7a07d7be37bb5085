"""Propositions 4.4 and 4.5 of Kaba et al., NeurIPS 2025, on a density whose score is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import imported_script


@pytest.fixture(scope="module")
def check():
    with imported_script("check_score") as module:
        yield module


@pytest.mark.slow
def test_the_score_of_the_check(check):
    """Tweedie's formula by quadrature, against the derivative of log p_t by other quadratures."""
    alpha, sigma, width = (1 - 0.05**2) ** 0.5, 0.05, 0.05
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    noisy = check.triangle(check.REST * 1.05) @ rotation.double()

    def log_p(position):
        # a Monte Carlo with fixed noise: log E_ε p((x_t + σ ε)/α)
        noise = torch.randn(400_000, 2, 3, generator=torch.Generator().manual_seed(0)).double()
        noise = torch.cat([noise, -noise])
        around = (position + sigma * (check.BASIS @ noise)) / alpha
        return torch.logsumexp(check.log_density(around, width), dim=0)

    given = check.posterior(noisy, alpha, sigma, width, 4)
    score = (alpha * given.mean(given.points) - noisy) / sigma**2
    position = noisy.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_p(position), position)
    expected = expected - expected.mean(0)  # centred positions alone
    assert float((score - expected).norm() / expected.norm()) < 0.02
    finer = check.posterior(noisy, alpha, sigma, width, 6)
    finer_score = (alpha * finer.mean(finer.points) - noisy) / sigma**2
    assert float((score - finer_score).norm() / score.norm()) < 1e-3


@pytest.mark.slow
def test_the_energys_minimiser_is_the_score(check):
    """Proposition 4.4: the difference falls in proportion to σ."""
    found = [check.measure(sigma, seed=2, order=4) for sigma in (0.002, 0.004, 0.02)]
    for one in found:
        assert one.residual < 1e-10  # it is the minimiser, by the library's own gradient
        assert one.difference < 4 * one.sigma
    assert found[1].difference / found[0].difference == pytest.approx(2, rel=0.05)
    assert found[2].score > 0.1  # there is something to predict


@pytest.mark.slow
def test_the_energys_minimiser_scatters_less(check):
    """Proposition 4.5: its covariance is the squared error's, projected."""
    found = check.measure(0.005, seed=3, order=4)
    np.testing.assert_allclose(found.energy, found.projected, atol=5e-3)
    assert np.linalg.eigvalsh(found.mse - found.energy).min() > -1e-3
    assert np.linalg.matrix_rank(found.energy, tol=1e-2) == 3
    assert np.linalg.matrix_rank(found.mse, tol=1e-2) == 6
