"""Draws the figures of docs/explanation/losses.md.

    python scripts/draw_losses.py docs/images --rigidity docs/data/rigidity.csv

landscape.png (Figure 1 of Kaba et al., NeurIPS 2025: losses of two atoms in a plane), motions.png
(their Figure 2: losses of a molecule that is rotated, reflected and stretched), springs.png,
rigidity.png (their Figure 5) from the table of `scripts/measure_rigidity.py`, and with `--learnt
RUN` learnt_springs.png from a run with springs `auto`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.losses import (
    SPRINGS,
    AdaptiveSprings,
    KabschError,
    MeanSquaredError,
    PairwiseEnergy,
)
from molgen_energy.resources import bundled_sample
from molgen_energy.training.checkpoint import load_checkpoint

LOSSES = {"mse": MeanSquaredError(), "kabsch": KabschError(), "energy": PairwiseEnergy("constant")}


def landscape(folder: Path) -> None:
    """One atom is fixed at the origin, the other moves in the plane; the data is at (1, 0)."""
    side = np.linspace(-2, 2, 201)
    x, y = np.meshgrid(side, side)
    moving = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2))
    prediction = torch.stack([torch.zeros_like(moving), moving], dim=1)
    target = torch.tensor([[0.0, 0], [1, 0]]).double().expand_as(prediction)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    shown = {"mse": "squared error", "energy": "energy"}
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        value = LOSSES[name](prediction, target)
        loss = (value / value.max()).view(x.shape).numpy()
        drawn = axis.contourf(x, y, loss**0.5, levels=24, cmap="viridis")
        position = torch.tensor([[0.0, 0], [0.2, 1.5]]).double()
        path = [position.clone()]
        for _ in range(400):  # gradient descent of both atoms
            step = position.clone().requires_grad_()
            LOSSES[name](step[None], target[:1]).backward()
            position = position - 0.05 * step.grad
            path.append(position)
        trace = torch.stack(path).numpy()
        axis.plot(*(trace[:, 1] - trace[:, 0]).T, "w-", lw=1.5)
        axis.plot(*(trace[0, 1] - trace[0, 0]), "wo", ms=5)
        axis.plot(0, 0, "o", color="tab:red", ms=9)
        axis.plot(1, 0, "*", color="tab:orange", ms=14, mec="k", mew=0.5)
        axis.set(title=title, xlabel="x (Å)", aspect="equal")
    axes[0].set_ylabel("y (Å)")
    figure.colorbar(drawn, ax=axes, label="√loss, scaled to 1", shrink=0.85)
    figure.savefig(folder / "landscape.png", dpi=120)
    plt.close(figure)


def motions(folder: Path) -> None:
    """A chiral molecule of QM9 is rotated, stretched, and reflected."""
    with MoleculeFile(bundled_sample()) as file:
        molecules = file.load()
    sizes = molecules.sizes
    positions = molecules[int(np.flatnonzero(sizes == 18)[3])].positions.astype(np.float64)
    positions -= positions.mean(axis=0)
    axis = np.array([1, 2, 3]) / 14**0.5
    angles = np.linspace(0, 2 * np.pi, 121)
    factors = np.linspace(0.7, 1.3, 121)
    shares = np.linspace(-1.2, 1.2, 121)
    panels = {
        "rotated by an angle (°)": (
            np.degrees(angles),
            [Rotation.from_rotvec(a * axis).apply(positions) for a in angles],
        ),
        "stretched by a factor": (factors, [f * positions for f in factors]),
        "one coordinate times (−1: mirror image)": (
            shares,
            [positions * [1, 1, s] for s in shares],
        ),
    }
    stretched = torch.from_numpy(1.3 * positions)[None], torch.from_numpy(positions)[None]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for drawn, (label, (values, images)) in zip(axes, panels.items(), strict=True):
        prediction = torch.from_numpy(np.stack(images))
        target = torch.from_numpy(positions).expand_as(prediction)
        for style, (name, loss) in zip(("--", "-.", "-"), LOSSES.items(), strict=True):
            unit = loss(*stretched)
            drawn.plot(values, loss(prediction, target) / unit, style, label=name)
        drawn.set(xlabel=label)
    axes[0].set_ylabel("loss, 1 where stretched by 1.3")
    axes[0].legend()
    figure.savefig(folder / "motions.png", dpi=120)
    plt.close(figure)


def springs(folder: Path) -> None:
    """Spring families, scaled to mean 1 over the pairs of the bundled sample."""
    with MoleculeFile(bundled_sample()) as file:
        molecules = file.load()
    everything = []
    for molecule in molecules.select(np.arange(0, len(molecules), 10)):
        difference = molecule.positions[:, None] - molecule.positions[None]
        everything.append(np.linalg.norm(difference, axis=-1)[np.triu_indices(len(molecule), 1)])
    data = torch.from_numpy(np.concatenate(everything)).double()
    d = torch.linspace(0.8, 7, 400).double()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, family in SPRINGS.items():
        if not family.requires_bonds and not family.adaptive:
            axis.plot(d, family(d) / family(data).mean(), label=name)
    axis.set(xlabel="distance in the data (Å)", ylabel="stiffness, mean 1 over pairs", ylim=(0, 8))
    axis.legend(loc="upper right")
    counts = axis.twinx()
    counts.hist(data.numpy(), bins=200, range=(0.8, 7), color="grey", alpha=0.25)
    counts.set_yticks([])
    figure.savefig(folder / "springs.png", dpi=120)
    plt.close(figure)


def rigidity(folder: Path, table: Path) -> None:
    """The share of random 2D-regular graphs that are globally rigid."""
    with table.open(newline="") as file:
        rows = [[int(value) for value in row.values()] for row in csv.DictReader(file)]
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for dimension, style in ((2, "o-"), (3, "s-")):
        n, graphs, rigid = np.array([row[1:] for row in rows if row[0] == dimension]).T
        axis.plot(n, rigid / graphs, style, ms=3, lw=0.8, label=f"random, D = {dimension}")
    axis.axhline(1, color="k", ls=":", lw=1, label="powers of cycles (ours), any D")
    axis.set(xlabel="atoms", ylabel="globally rigid, share of 1000", ylim=(0.985, 1.0008))
    axis.legend(loc="lower right")
    figure.savefig(folder / "rigidity.png", dpi=120)
    plt.close(figure)


def learnt(folder: Path, run: Path) -> None:
    """Springs `auto` of a run at some noise levels, beside exponential ones."""
    springs = AdaptiveSprings()
    springs.load_state(load_checkpoint(run).read_tensors("springs"))
    d = torch.linspace(0.9, 7, 400).double()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for place, level in enumerate((0.03, 0.1, 0.3, 1.0)):
        stiffness = 1 / springs.variance(d, level)
        axis.plot(d, stiffness / stiffness.mean(), color=f"C{place}", label=f"σ/α = {level:g} Å")
    exponential = SPRINGS["exponential"](d)
    axis.plot(d, exponential / exponential.mean(), "k--", lw=1, label="exp(−d)")
    axis.set(xlabel="predicted distance (Å)", ylabel="stiffness / its mean over the axis")
    axis.set_yscale("log")
    axis.legend()
    figure.savefig(folder / "learnt_springs.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rigidity", type=Path, metavar="CSV")
    parser.add_argument("--learnt", type=Path, metavar="RUN", help="a run with springs `auto`")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    landscape(options.folder)
    motions(options.folder)
    springs(options.folder)
    if options.rigidity:
        rigidity(options.folder, options.rigidity)
    if options.learnt:
        learnt(options.folder, options.learnt)


if __name__ == "__main__":
    main()
