"""Does the energy loss learn the score? Propositions 4.4 and 4.5 of Kaba et al., NeurIPS 2025.

    python scripts/check_score.py --draw docs/images

checks both on a density whose score is known: three atoms held by springs, p(x) ∝ exp(−½ Σ_{i<j}
(‖x_i − x_j‖ − r_ij)²/τ²) on centred positions, which is invariant under rotations and reflections,
noised as x_t = α x + σ ε with α² + σ² = 1. Expectations over p(x | x_t) are integrals over three
distances and a rotation, done by Gauss–Hermite quadrature around the mode, in float64, with no
sampling.

- 4.4: the minimiser of the mean energy loss with constant springs, of least norm, is the noise
  prediction −σ ∇log p_t(x_t) at small σ. Both vanish with σ, so their difference does too, as it
  does for a network that predicts nothing. So the script gives the error relative to the score,
  which is 1 for such a network. Its limit for σ → 0 is not 0, see `limit_of_error`.
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
SEEDS = 9  # x_t at each noise level
PAIRS = torch.tensor([[0, 1], [0, 2], [1, 2]])
# An orthonormal basis of centred positions of three atoms, in each coordinate.
BASIS = (
    torch.tensor([[1, 1], [-1, 1], [0, -2]], dtype=torch.float64) / torch.tensor([2.0, 6]).sqrt()
)


def distances(positions: Tensor) -> Tensor:
    """Distances (…, 3) of the pairs of (…, 3, 3)."""
    return (positions[..., PAIRS[:, 0], :] - positions[..., PAIRS[:, 1], :]).norm(dim=-1)


def triangle(sides: Tensor) -> Tensor:
    """Centred positions (…, 3, 3) of three atoms with given distances (…, 3)."""
    first, second, third = sides.unbind(-1)
    x = (first**2 + second**2 - third**2) / (2 * first)
    # No distances of a triangle: any finite derivative will do, as the density is 0 there.
    y = (second**2 - x**2).clamp(min=1e-12).sqrt()
    zero = torch.zeros_like(x)
    corners = [(zero, zero, zero), (first, zero, zero), (x, y, zero)]
    positions = torch.stack([torch.stack(corner, dim=-1) for corner in corners], dim=-2)
    return positions - positions.mean(-2, keepdim=True)


def is_triangle(sides: Tensor) -> Tensor:
    """Whether there are positions with distances (…, 3)."""
    return (2 * sides.amax(-1) < sides.sum(-1)) & (sides.amin(-1) > 0)


def turn(vector: Tensor) -> Tensor:
    """Rotations (…, 3, 3) about vectors (…, 3) of length sin(angle/2), parts of quaternions."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [(zero, -z, y), (z, zero, -x), (-y, x, zero)]
    cross = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    scalar = (1 - vector.square().sum(-1)).clamp(min=1e-12).sqrt()[..., None, None]
    return torch.eye(3, dtype=vector.dtype) + 2 * (scalar * cross + cross @ cross)


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
    """p(x | x_t) ∝ p(x) N(x_t; αx, σ²) by quadrature around its mode.

    The six coordinates are the distances d of a triangle and the vector part q of the quaternion of
    its rotation from x_t. The exponent is quadratic in q, however uncertain the rotation is. The
    volume element is d₁₂ d₁₃ d₂₃ (1 − q²)^−½; the quadrature is along the axes of the curvature.
    """
    sides = distances(noisy) / alpha
    frame = triangle(sides)
    base = best_rotation(frame[None], noisy[None])[0]

    def log_posterior(z: Tensor) -> tuple[Tensor, Tensor]:
        sides, vector = z[..., :3], z[..., 3:]
        x = triangle(sides) @ base @ turn(vector)
        left = (1 - vector.square().sum(-1)).clamp(min=1e-12)
        volume = sides.clamp(min=1e-12).log().sum(-1) - left.log() / 2
        prior = -0.5 * ((sides - REST) / width).square().sum(-1)
        value = prior + volume - ((noisy - alpha * x) / sigma).square().sum((-1, -2)) / 2
        return torch.where(is_triangle(sides) & (left > 1e-12), value, -torch.inf), x

    def value(z: Tensor) -> Tensor:
        return log_posterior(z)[0]

    mode = torch.cat([sides, torch.zeros_like(sides)])
    for _ in range(30):  # Newton's method, the curvature kept positive, in steps that ascend
        gradient = torch.func.grad(value)(mode)
        values, vectors = torch.linalg.eigh(-torch.func.hessian(value)(mode))
        values = values.clamp(min=0.01 * (alpha / sigma) ** 2)
        step = vectors @ ((vectors.T @ gradient) / values)
        if step.norm() < 1e-8 * sigma:
            break
        steps = step * 0.5 ** torch.arange(8)[:, None]
        mode = mode + steps[value(mode + steps).argmax()]
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * 6)
    factor = torch.cartesian_prod(*[weights.log()] * 6).sum(-1)
    density, points = log_posterior(mode + (grid / values.sqrt()) @ vectors.T)
    return Posterior(points, torch.softmax(factor + density + grid.square().sum(-1) / 2, dim=0))


def aligned(positions: Tensor, noisy: Tensor) -> Tensor:
    """Images of positions (…, 3, 3) under rotations that come nearest to x_t.

    A triangle turned over in space is its own mirror image, so proper rotations are enough.
    """
    flat = positions.reshape(-1, 3, 3)
    return (flat @ best_rotation(flat, noisy.expand_as(flat))).view_as(positions)


def limit_of_error(positions: Tensor, width: float) -> float:
    """Limit for σ → 0 of the relative error of the energy's minimiser, at x_t (3, 3).

    Then p(x | x_t) is N(x_t, σ²). A difference of two atoms has variance 2σ² in each of the two
    directions across it, so a mean distance is d + 2σ²/d, while the distance of the mean is d up to
    a difference that both have. A minimiser with such distances, of least norm, predicts σ J⁺(2/d)
    less noise, J the Jacobian of the distances; the score predicts σ Jᵀ(d − r)/τ². Both are
    proportional to σ, and their ratio to τ, since d − r is.
    """
    jacobian = distance_jacobian(positions)
    sides = distances(positions)
    error = torch.linalg.pinv(jacobian) @ (2 / sides)
    return float(error.norm() / (jacobian.T @ (sides - REST) / width**2).norm())


def distance_jacobian(positions: Tensor) -> Tensor:
    """Derivatives (3, 6) of the distances by the coordinates in `BASIS`."""
    jacobian: Tensor = torch.func.jacrev(lambda z: distances(BASIS @ z.view(2, 3)))(
        (BASIS.T @ positions).flatten()
    )
    return jacobian


def relative_error(prediction: Tensor, score: Tensor) -> float:
    """‖prediction − score‖ / ‖score‖: 1 for a prediction of 0."""
    return float((prediction - score).norm() / score.norm())


@dataclass
class Finding:
    """What came out at one noise level."""

    sigma: float
    score: Tensor
    """The noise to predict, −σ ∇log p_t(x_t), (3, 3)."""
    minimiser: Tensor
    """What the energy's minimiser of least norm predicts, (3, 3)."""
    limit: float
    """`limit_of_error` at x_t/α."""
    residual: float
    """Norm of the gradient of the mean energy loss at its minimiser, by the loss library."""
    mse: np.ndarray
    """Covariance (6, 6) of the minimiser of a single sample, squared error."""
    energy: np.ndarray
    """The same, energy loss."""
    projected: np.ndarray
    """The covariance of the squared error on the range of the Jacobian of distances."""

    @property
    def error(self) -> float:
        """Relative error of the energy's minimiser."""
        return relative_error(self.minimiser, self.score)


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

    sides = REST + width * normal(3)
    while not is_triangle(sides):
        sides = REST + width * normal(3)
    data = triangle(sides) @ torch.linalg.qr(normal(3, 3))[0]
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
    jacobian = distance_jacobian(noisy)
    projector = torch.linalg.pinv(jacobian) @ jacobian
    return Finding(
        sigma,
        score,
        minimiser,
        limit_of_error(noisy / alpha, width),
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
    errors = np.array([[found.error for found in row] for row in sweep])
    left.loglog(sigmas, np.median(errors, axis=1), "o-", label="the energy's minimiser")
    left.fill_between(sigmas, errors.min(1), errors.max(1), alpha=0.15)
    limit = float(np.median([found.limit for found in sweep[0]]))
    left.axhline(limit, color="C0", ls="--", label="its limit for σ → 0")
    left.axhline(1, color="k", ls=":", label="predicting nothing")
    left.axvline(WIDTH, color="grey", lw=0.8)
    left.text(WIDTH, 0.93, " τ", color="grey", transform=left.get_xaxis_transform())
    left.set(xlabel="σ", ylim=(0.004, 2), title="Error relative to the score (4.4), τ = 0.05 Å")
    left.legend(loc="lower left")
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
    print("    σ    ‖σ∇log p‖  relative error (of 0)  gradient   trace mse  energy  projected")
    for sigma in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        row = [measure(sigma, seed=seed, order=options.order) for seed in range(SEEDS)]
        sweep.append(row)
        norm = np.median([float(found.score.norm()) for found in row])
        error = np.median([found.error for found in row])
        nothing = relative_error(torch.zeros_like(row[0].score), row[0].score)
        residual = max(found.residual for found in row)
        traces = [
            np.mean([np.trace(getattr(found, name)) for found in row])
            for name in ("mse", "energy", "projected")
        ]
        print(
            f"{sigma:6.3f}  {norm:9.4f}  {error:14.4f}  ({nothing:.0f})  {residual:9.1e}  "
            f"{traces[0]:8.3f}  {traces[1]:8.3f}  {traces[2]:8.3f}",
            flush=True,
        )
    print("    τ    relative error at σ = 0.001  its limit for σ → 0")
    for width in (0.02, 0.05, 0.1, 0.2):
        row = [measure(0.001, width, seed, order=4) for seed in range(SEEDS)]
        error, limit = (np.median([getattr(found, k) for found in row]) for k in ("error", "limit"))
        print(f"{width:6.3f}  {error:27.4f}  {limit:20.4f}", flush=True)
    if options.draw:
        draw(sweep, options.draw)


if __name__ == "__main__":
    main()
