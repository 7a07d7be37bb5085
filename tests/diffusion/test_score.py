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


@pytest.mark.slow
def test_the_quadrature_against_importance_sampling(check):
    """At a noise of four times the spread of the data, where rotations are uncertain by 25°."""
    sigma, width = 0.2, 0.05
    alpha = (1 - sigma**2) ** 0.5
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    noisy = check.triangle(check.REST * 1.05) @ rotation.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, 2, 3, generator=generator, dtype=torch.float64)
    points = (noisy + sigma * (check.BASIS @ noise)) / alpha
    drawn = check.Posterior(points, check.log_density(points, width).softmax(dim=0))
    effective = 1 / float(drawn.weights.square().sum())
    assert effective > 5_000
    for order in (4, 6):
        given = check.posterior(noisy, alpha, sigma, width, order)
        for values in (lambda x: x, check.distances):
            found, expected = given.mean(values(given.points)), drawn.mean(values(points))
            error = (drawn.mean((values(points) - expected).square()) / effective).sqrt()
            assert ((found - expected).abs() < 4 * error).all()
            assert (error < 1e-2).all()


@pytest.mark.slow
def test_the_energys_minimiser_is_near_the_score_where_data_scatter_little(check):
    """Proposition 4.4, by the error relative to the score, which has a limit above 0."""
    sigma, errors = 0.002, {}
    for width in (0.02, 0.1):
        row = [check.measure(sigma, width, seed, order=4) for seed in range(3)]
        for one in row:
            assert one.residual < 1e-10  # it is the minimiser, by the library's own gradient
            assert one.error == pytest.approx(one.limit, rel=0.03)
        errors[width] = np.median([one.error for one in row])
    assert errors[0.02] < 0.05
    assert errors[0.1] / errors[0.02] == pytest.approx(5, rel=0.4)  # the limit grows with τ
    fine, coarse = (check.measure(s, 0.05, 0, order=4) for s in (0.001, 0.002))
    assert fine.error == pytest.approx(coarse.error, rel=0.02)  # and is not 0


@pytest.mark.slow
def test_a_prediction_of_nothing_is_not_near_the_score(check):
    """Its distance to the score vanishes with σ, as that of the minimiser does."""
    fine, coarse = (check.measure(s, 0.05, 0, order=4) for s in (0.001, 0.002))
    nothing = torch.zeros_like(fine.score)
    for prediction in ("minimiser", "nothing"):
        first, second = (
            float((getattr(one, prediction, nothing) - one.score).norm()) for one in (fine, coarse)
        )
        assert second / first == pytest.approx(2, rel=0.05)
    assert check.relative_error(nothing, fine.score) == 1
    assert fine.error < 0.1


@pytest.mark.slow
def test_the_energys_minimiser_scatters_less(check):
    """Proposition 4.5: its covariance is the squared error's, projected."""
    found = check.measure(0.005, seed=3, order=4)
    np.testing.assert_allclose(found.energy, found.projected, atol=5e-3)
    assert np.linalg.eigvalsh(found.mse - found.energy).min() > -1e-3
    assert np.linalg.matrix_rank(found.energy, tol=1e-2) == 3
    assert np.linalg.matrix_rank(found.mse, tol=1e-2) == 6
