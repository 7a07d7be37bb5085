"""Does the energy loss learn the score? Propositions 4.4 and 4.5 of Kaba et al., NeurIPS 2025.

    python scripts/check_score.py --draw docs/images

checks both on a density whose score is known: three atoms held by springs, p(x) ∝ exp(−½ Σ_{i<j}
(‖x_i − x_j‖ − r_ij)²/τ²) on centred positions, which is invariant under rotations and reflections,
noised as x_t = α x + σ ε with α² + σ² = 1. Expectations over p(x | x_t) are integrals over six
dimensions, done by Gauss–Hermite quadrature around the mode, in float64, with no sampling.

- 4.4: the minimiser of the mean energy loss with constant springs, of least norm, is the noise
  prediction −σ ∇log p_t(x_t) up to O(σ).
- 4.5: the minimiser for a single x ~ p(x | x_t) scatters less than that of the squared error: its
  covariance is the latter's, projected on what changes distances.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molgen_energy.losses import PairwiseEnergy
from molgen_energy.losses.pointwise import best_rotation

REST = torch.tensor([0.96, 0.96, 1.51], dtype=torch.float64)  # Å, a molecule of water
WIDTH = 0.05  # τ, Å
PAIRS = torch.tensor([[0, 1], [0, 2], [1, 2]])
# An orthonormal basis of centred positions of three atoms, in each coordinate.
BASIS = (
    torch.tensor([[1, 1], [-1, 1], [0, -2]], dtype=torch.float64) / torch.tensor([2.0, 6]).sqrt()
)


def distances(positions: Tensor) -> Tensor:
    """Distances (…, 3) of the pairs of (…, 3, 3)."""
    return (positions[..., PAIRS[:, 0], :] - positions[..., PAIRS[:, 1], :]).norm(dim=-1)


def triangle(sides: Tensor) -> Tensor:
    """Centred positions (3, 3) of three atoms with given distances."""
    first, second, third = sides
    x = (first**2 + second**2 - third**2) / (2 * first)
    y = (second**2 - x**2).clamp(min=0).sqrt()
    zero = torch.zeros_like(x)
    corners = [torch.stack([zero, zero, zero]), torch.stack([first, zero, zero])]
    positions = torch.stack([*corners, torch.stack([x, y, zero])])
    return positions - positions.mean(0)


def log_density(positions: Tensor, width: float) -> Tensor:
    """log p up to a constant, (…,)."""
    return -0.5 * ((distances(positions) - REST) / width).square().sum(-1)


@dataclass
class Posterior:
    """Points (Q, 3, 3) and weights (Q,) that integrate over p(x | x_t)."""

    points: Tensor
    weights: Tensor

    def mean(self, values: Tensor) -> Tensor:
        return torch.tensordot(self.weights, values, dims=1)


def posterior(noisy: Tensor, alpha: float, sigma: float, width: float, order: int) -> Posterior:
    """p(x | x_t) ∝ p(x) N(x_t; αx, σ²) by quadrature in the coordinates of its curvature."""

    def log_posterior(z: Tensor) -> Tensor:
        x = (BASIS @ z.view(*z.shape[:-1], 2, 3)).to(noisy.dtype)
        return log_density(x, width) - ((noisy - alpha * x) / sigma).square().sum((-1, -2)) / 2

    mode = (BASIS.T @ noisy / alpha).flatten()
    for _ in range(50):  # Newton's method, the curvature kept positive
        gradient = torch.func.grad(log_posterior)(mode)
        values, vectors = torch.linalg.eigh(-torch.func.hessian(log_posterior)(mode))
        values = values.clamp(min=0.1 * (alpha / sigma) ** 2)
        mode = mode + vectors @ ((vectors.T @ gradient) / values)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * 6)
    factor = torch.cartesian_prod(*[weights.log()] * 6).sum(-1)
    z = mode + (grid / values.sqrt()) @ vectors.T
    total = factor + log_posterior(z) + grid.square().sum(-1) / 2
    return Posterior(BASIS @ z.view(-1, 2, 3), torch.softmax(total, dim=0))


def aligned(positions: Tensor, noisy: Tensor) -> Tensor:
    """Images of positions (…, 3, 3) under rotations that come nearest to x_t.

    A triangle turned over in space is its own mirror image, so proper rotations are enough.
    """
    flat = positions.reshape(-1, 3, 3)
    return (flat @ best_rotation(flat, noisy.expand_as(flat))).view_as(positions)


@dataclass
class Finding:
    """What came out at one noise level."""

    sigma: float
    score: float
    """Norm of the noise prediction −σ ∇log p_t(x_t)."""
    difference: float
    """Norm of the energy's minimiser of least norm minus that."""
    residual: float
    """Norm of the gradient of the mean energy loss at its minimiser, by the loss library."""
    mse: np.ndarray
    """Covariance (6, 6) of the minimiser of a single sample, squared error."""
    energy: np.ndarray
    """The same, energy loss."""
    projected: np.ndarray
    """The covariance of the squared error on the range of the Jacobian of distances."""


def measure(sigma: float, width: float = WIDTH, seed: int = 0, order: int = 6) -> Finding:
    """Both propositions at a random x_t.

    Parameters
    ----------
    sigma
        Noise level.
    width
        τ, how far distances scatter in the data.
    seed
        Of x_t.
    order
        Points of the quadrature in each of six dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    alpha = (1 - sigma**2) ** 0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    data = triangle(REST + width * normal(3)) @ torch.linalg.qr(normal(3, 3))[0]
    noisy = alpha * data + sigma * (BASIS @ normal(2, 3))
    given = posterior(noisy, alpha, sigma, width, order)

    # 4.4: with constant springs the mean energy is least where distances are the mean distances.
    score = (noisy - alpha * given.mean(given.points)) / sigma  # −σ ∇log p_t, by Tweedie
    best = aligned(triangle(given.mean(distances(given.points)))[None], noisy)[0]
    minimiser = (noisy - alpha * best) / sigma
    guess = best.expand_as(given.points).clone().requires_grad_()
    energy = PairwiseEnergy("constant")(guess, given.points)
    (gradient,) = torch.autograd.grad((given.weights * energy).sum(), guess)

    # 4.5: the minimisers for single samples
    def covariance(minimisers: Tensor) -> Tensor:
        z = (BASIS.T @ minimisers).flatten(1)
        z = z - given.mean(z)
        return (given.weights[:, None] * z).T @ z

    mse = covariance((noisy - alpha * given.points) / sigma)
    single = covariance((noisy - alpha * aligned(given.points, noisy)) / sigma)
    jacobian = torch.func.jacrev(lambda z: distances(BASIS @ z.view(2, 3)))(
        (BASIS.T @ noisy).flatten()
    )
    projector = torch.linalg.pinv(jacobian) @ jacobian
    return Finding(
        sigma,
        float(score.norm()),
        float((minimiser - score).norm()),
        float(gradient.sum(0).norm()),
        mse.numpy(),
        single.numpy(),
        (projector @ mse @ projector).numpy(),
    )


def draw(sweep: list[list[Finding]], folder: Path) -> None:
    """Figures of both propositions."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sigmas = [found[0].sigma for found in sweep]
    for name, style, label in (
        ("score", "o-", r"$\|\sigma\nabla\log p_t\|$, the noise to predict"),
        ("difference", "s-", "distance of the energy's minimiser from it"),
    ):
        values = np.array([[getattr(found, name) for found in row] for row in sweep])
        left.loglog(sigmas, np.median(values, axis=1), style, label=label)
        left.fill_between(sigmas, values.min(1), values.max(1), alpha=0.15)
    left.loglog(sigmas, sigmas, "k:", label="slope 1")
    left.axvline(WIDTH, color="grey", lw=0.8)
    left.text(WIDTH, 0.93, " τ", color="grey", transform=left.get_xaxis_transform())
    left.set(xlabel="σ", title="The minimiser of the mean energy is the score (4.4)")
    left.legend(loc="lower right")
    found = min((row[0] for row in sweep), key=lambda f: abs(f.sigma - 0.02))
    place = np.arange(1, 7)
    for k, (name, label) in enumerate(
        (("mse", "squared error"), ("energy", "energy"), ("projected", "projected"))
    ):
        values = np.sort(np.linalg.eigvalsh(getattr(found, name)))[::-1]
        right.bar(place + 0.27 * (k - 1), values, 0.25, label=label)
    right.set(
        xlabel="eigenvalue",
        title=f"Scatter of a single sample's minimiser (4.5), σ = {found.sigma}",
    )
    right.set_ylabel("variance")
    right.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "score.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write score.png there")
    parser.add_argument("--order", type=int, default=6)
    options = parser.parse_args()
    sweep = []
    print("    σ    ‖σ∇log p‖  ‖difference‖  gradient   trace mse  energy  projected")
    for sigma in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        row = [measure(sigma, seed=seed, order=options.order) for seed in range(9)]
        sweep.append(row)
        median = {
            name: np.median([getattr(found, name) for found in row])
            for name in ("score", "difference", "residual")
        }
        traces = [
            np.mean([np.trace(getattr(found, name)) for found in row])
            for name in ("mse", "energy", "projected")
        ]
        print(
            f"{sigma:6.3f}  {median['score']:9.4f}  {median['difference']:11.5f}  "
            f"{median['residual']:9.1e}  {traces[0]:8.3f}  {traces[1]:8.3f}  {traces[2]:8.3f}"
        )
    if options.draw:
        draw(sweep, options.draw)


if __name__ == "__main__":
    main()
