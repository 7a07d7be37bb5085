"""What does a network learn that minimises a loss perfectly?

    python scripts/check_minimiser.py --csv minimiser.csv --image minimiser.png

A density with a known posterior: a chain of five carbon atoms with fixed bonds and angles, its two
torsions on a grid with weights exp(−U), in orientations of a product quadrature over rotations. It
is a finite mixture, so expectations over p(y | x_t) are exact sums. At random x_t = y + s ε (s is
σ/α in Å) the script finds the stationary point of the mean loss, ŷ, in float64, and compares it
with the posterior mean m = E[y | x_t], which gives the score:

- error: ‖ŷ − m‖ / ‖m‖, ŷ rotated as near to m as it comes: energies of distances do not fix that;
- bonds, ends: distance of bonded atoms, and of the two ends, in ŷ relative to those in m.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molgen_energy.losses import MeanSquaredError, PairwiseEnergy, PositionLoss, ScoreEnergy
from molgen_energy.losses.pointwise import best_rotation

BOND, ANGLE = 1.53, np.deg2rad(112)  # Å
LEVELS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0)
CHUNK = 1 << 15  # structures at a time
RATE, MOMENTUM = 0.2, 0.8  # of the descent
# The torsions of the chain are soft, so a descent ends slowly; 10⁻³ is far below the forces at x_t.
MOST_STEPS, PRECISION, ENOUGH = 800, 1e-7, 1e-3  # of the gradient of the mean loss
LOSSES: dict[str, Callable[[], PositionLoss]] = {
    "mse": MeanSquaredError,
    "energy": lambda: PairwiseEnergy("exponential", "sample"),
    "energy, constant springs": lambda: PairwiseEnergy("constant", "sample"),
    "energy, springs at the prediction": lambda: PairwiseEnergy(
        "exponential", "sample", springs_at="prediction"
    ),
    "energy, projected, springs at the data": lambda: PairwiseEnergy(
        "exponential", "sample", rest="projected"
    ),
    "score_energy": ScoreEnergy,
}
STYLES = {"mse": ("-", 4.0), "score_energy": ("--", 2.0)}


@dataclass
class Density:
    """A finite mixture of structures."""

    points: Tensor
    """(Q, n, 3), centred, Å."""
    log_weights: Tensor
    """(Q,)."""

    def posterior(self, noisy: Tensor, level: float) -> Tensor:
        """p(y | x_t) of the structures, (Q,), for x_t / α = `noisy` (n, 3)."""
        squares = (noisy - self.points).square().sum(dim=(1, 2))
        return torch.softmax(self.log_weights - squares / (2 * level**2), dim=0)


def chain(first: float, second: float) -> np.ndarray:
    """Five atoms with two torsions (radians), (5, 3)."""
    atoms = [np.zeros(3), np.array([BOND, 0, 0])]
    atoms.append(atoms[1] + BOND * np.array([-np.cos(ANGLE), np.sin(ANGLE), 0]))
    for torsion in (first, second):
        a, b, c = atoms[-3:]
        along = (c - b) / BOND
        normal = np.cross(b - a, along)
        normal /= np.linalg.norm(normal)
        frame = np.stack([along, np.cross(normal, along), normal])
        step = np.array(
            [-np.cos(ANGLE), np.sin(ANGLE) * np.cos(torsion), np.sin(ANGLE) * np.sin(torsion)]
        )
        atoms.append(c + BOND * step @ frame)
    positions = np.stack(atoms)
    return positions - positions.mean(axis=0)


def rotations(order: int) -> tuple[Tensor, Tensor]:
    """Rotations (R, 3, 3) and weights (R,) of a product quadrature in Euler angles."""
    around = 2 * np.pi * np.arange(2 * order) / (2 * order)
    cosines, weights = np.polynomial.legendre.leggauss(order)
    a, b, c = (x.ravel() for x in np.meshgrid(around, np.arccos(cosines), around, indexing="ij"))
    weight = np.broadcast_to(weights[None, :, None], (2 * order, order, 2 * order)).ravel()

    def turn(angle: np.ndarray, i: int, j: int) -> np.ndarray:
        matrix = np.tile(np.eye(3), (len(angle), 1, 1))
        matrix[:, i, i] = matrix[:, j, j] = np.cos(angle)
        matrix[:, i, j], matrix[:, j, i] = -np.sin(angle), np.sin(angle)
        return matrix

    matrices = turn(a, 0, 1) @ turn(b, 0, 2) @ turn(c, 0, 1)
    return torch.from_numpy(matrices), torch.from_numpy(weight.copy())


def density(torsions: int = 4, order: int = 6) -> Density:
    """The chain, with a grid of torsions (squared) in 4·`order`³ orientations."""
    angles = 2 * np.pi * np.arange(torsions) / torsions
    first, second = (x.ravel() for x in np.meshgrid(angles, angles))
    shapes = torch.from_numpy(np.stack([chain(a, b) for a, b in zip(first, second, strict=True)]))
    log_shapes = torch.from_numpy(0.7 * (np.cos(first - np.pi) + np.cos(second - np.pi)))
    matrices, weights = rotations(order)
    points = torch.einsum("rij,snj->rsni", matrices, shapes).flatten(0, 1)
    return Density(points, (weights.log()[:, None] + log_shapes).flatten())


def mean_gradient(
    loss: PositionLoss, prediction: Tensor, points: Tensor, weights: Tensor
) -> Tensor:
    """Gradient at a prediction (n, 3) of the mean loss over weighted structures, (n, 3)."""
    total = torch.zeros_like(prediction)
    for start in range(0, len(points), CHUNK):
        targets, share = points[start : start + CHUNK], weights[start : start + CHUNK]
        guess = prediction.expand_as(targets).clone().requires_grad_()
        (gradient,) = torch.autograd.grad((share * loss(guess, targets)).sum(), guess)
        total += gradient.sum(dim=0)
    return total


def stationary_point(loss: PositionLoss, start: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Where the mean gradient vanishes, (n, 3): the end of a descent from a start.

    Raises
    ------
    RuntimeError
        No such point is found.
    """
    probable = weights > 1e-12 * weights.max()  # the others change nothing
    points, weights = points[probable], weights[probable]

    position, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(MOST_STEPS):
        gradient = mean_gradient(loss, position, points, weights)
        if gradient.abs().max() < PRECISION:
            return position - position.mean(dim=0)
        velocity = MOMENTUM * velocity - RATE * gradient
        position = position + velocity
    if gradient.abs().max() > ENOUGH:
        raise RuntimeError(f"no stationary point after {MOST_STEPS} steps")
    return position - position.mean(dim=0)


def measure(known: Density, level: float, seed: int) -> dict[str, dict[str, float]]:
    """Error and relative distances of the stationary point of each loss at a random x_t."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(known.log_weights.exp(), 1, generator=generator)[0]
    shape = known.points.shape[1:]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    noisy = known.points[which] + level * (noise - noise.mean(dim=0))
    weights = known.posterior(noisy, level)
    mean = torch.einsum("q,qni->ni", weights, known.points)
    result, start = {}, mean + 0.1 * (noise - noise.mean(dim=0))
    for name, build in LOSSES.items():
        found = stationary_point(build(), start, known.points, weights)[None]
        found = (found @ best_rotation(found, mean[None]))[0]
        bonds, ends = bond_lengths(found) / bond_lengths(mean), end_to_end(found) / end_to_end(mean)
        result[name] = {
            "error": float((found - mean).norm() / mean.norm()),
            "bonds": float(bonds.mean()),
            "ends": float(ends),
        }
    return result


def bond_lengths(positions: Tensor) -> Tensor:
    """(4,), Å."""
    return positions.diff(dim=0).norm(dim=1)


def end_to_end(positions: Tensor) -> Tensor:
    """Distance of the first and the last atom, Å."""
    return (positions[0] - positions[-1]).norm()


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Errors and relative distances against the noise level."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    panels = {
        "error": "relative error of the minimiser",
        "bonds": "bond lengths / those of the posterior mean",
        "ends": "end-to-end / that of the posterior mean",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(LOSSES):
            own = [row for row in rows if row["loss"] == name]
            levels = [float(row["level"]) for row in own]
            values = np.array([float(row[key]) for row in own])
            if key == "error":
                values = values.clip(1e-9)
            style = {"lw": 2.5} if name in ("mse", "score_energy") else {"lw": 1.5}
            dashes = {"mse": "-", "score_energy": "--"}.get(name, "-")
            axis.plot(
                levels, values, dashes, marker="o", ms=3, label=name, color=f"C{place}", **style
            )
        axis.set(xscale="log", xlabel="noise level σ/α, Å", title=title)
        axis.set_xticks(LEVELS, [f"{level:g}" for level in LEVELS], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].set(yscale="log", ylim=(3e-10, 3))
    for axis in axes[1:]:
        axis.axhline(1, color="grey", lw=0.8, zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="x_t at each level")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--only-draw", type=Path, metavar="CSV", help="what --csv wrote")
    options = parser.parse_args()
    if options.only_draw:
        with options.only_draw.open(newline="", encoding="utf-8") as file:
            draw(list(csv.DictReader(file)), options.image)
        return
    known, rows = density(), []
    for level in LEVELS:
        found = [measure(known, level, seed) for seed in range(options.seeds)]
        for name in LOSSES:
            row = {"level": f"{level:g}", "loss": name} | {
                key: f"{np.mean([one[name][key] for one in found]):.3g}"
                for key in ("error", "bonds", "ends")
            }
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.image:
        draw(rows, options.image)


if __name__ == "__main__":
    main()
