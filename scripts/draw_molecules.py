"""Picture of the first molecules of a file, in three dimensions, with unstable atoms marked.

python scripts/draw_molecules.py samples.sdf -o molecules.png --columns 6 --rows 3

Spheres and cylinders are rendered by ray casting with a depth buffer. Bonds are perceived from
distances; unstable atoms have a red ring. Molecules are rotated so that they are widest along the
axes of the picture.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.valence import stable_atoms
from molgen_energy.cli.console import exit_on_error
from molgen_energy.data.molecules import Molecule, Molecules, offsets_from_sizes
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError
from molgen_energy.metrics.sources import FileSource
from molgen_energy.output import atomic_replace

Array = NDArray[np.float64]

COLOURS = {
    "H": (0.93, 0.94, 0.95), "C": (0.33, 0.36, 0.40), "N": (0.22, 0.42, 0.86),
    "O": (0.87, 0.24, 0.22), "F": (0.38, 0.74, 0.42), "S": (0.92, 0.78, 0.25),
    "Cl": (0.25, 0.68, 0.30), "Br": (0.62, 0.28, 0.18), "P": (0.95, 0.55, 0.15),
}  # fmt: skip
OTHER, BOND, MARK = (0.80, 0.45, 0.75), (0.62, 0.65, 0.69), (0.86, 0.16, 0.16)
RADIUS, HYDROGEN, STICK = 0.40, 0.26, 0.11  # Å
APART = 0.17  # Å between the sticks of a double bond
TILE, FINER = 260, 3  # pixels of a molecule; so many rays each way in a pixel
LIGHT = np.array([-0.45, 0.60, 0.66])
MOST_ELEMENTS = ("C", "H")  # of a formula, first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="SDF, XYZ or HDF5")
    parser.add_argument("-o", "--output", type=Path, default=Path("molecules.png"))
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--rows", type=int, default=3)
    arguments = parser.parse_args()
    with exit_on_error():
        picture = draw(first(arguments.file, arguments.columns * arguments.rows), arguments.columns)
        with atomic_replace(arguments.output) as output:
            picture.savefig(output.temporary, format="png", metadata={"Software": None})


def first(path: Path, count: int) -> list[Molecule]:
    """The first molecules of a file."""
    chunks = (perceive(chunk.molecules) for chunk in FileSource(path).chunks())
    found = list(itertools.islice(itertools.chain.from_iterable(chunks), count))
    if len(found) < count:
        raise InputError(f"{path} holds {len(found)} molecules, expected at least {count}")
    return found


def draw(molecules: list[Molecule], columns: int) -> Figure:
    """All molecules in rows, each with its formula."""
    rows = -(-len(molecules) // columns)
    figure = Figure(figsize=(columns * TILE / 100, rows * TILE / 100), dpi=100)
    FigureCanvasAgg(figure)
    for k, molecule in enumerate(molecules):
        row, column = divmod(k, columns)
        axes = figure.add_axes(
            (column / columns, 1 - (row + 1) / rows, 1 / columns, 1 / rows), frameon=False
        )
        bad = np.flatnonzero(~stable_atoms(Molecules.from_list([molecule]))).tolist()
        axes.imshow(rendered(molecule, bad), interpolation="lanczos")
        axes.set_axis_off()
        text = formula(molecule) + (", not stable" if bad else "")
        colour = MARK if bad else (0.35, 0.38, 0.42)
        axes.text(
            0.5, 0.015, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=9,
            color=colour,
        )  # fmt: skip
    return figure


def formula(molecule: Molecule) -> str:
    """C and H first, then by the alphabet, with numbers as indices."""
    counts = Counter(symbol(int(z)) for z in molecule.atomic_numbers)
    names = [n for n in MOST_ELEMENTS if n in counts]
    names += sorted(set(counts) - set(MOST_ELEMENTS))
    return "".join(f"{n}$_{{{counts[n]}}}$" if counts[n] > 1 else n for n in names)


def rendered(molecule: Molecule, bad: list[int]) -> Array:
    """The molecule on white, (TILE, TILE, 3) in [0, 1]."""
    positions = turned(molecule.positions.astype(np.float64))
    single = Molecules(
        molecule.positions, molecule.atomic_numbers, offsets_from_sizes(np.array([len(positions)]))
    )
    bonds = perceive(single).bonds
    assert bonds is not None
    scene = Scene(positions)
    for (i, j), order in zip(bonds.index, bonds.order, strict=True):
        scene.add_bond(positions[i], positions[j], int(order))
    for atom, z in enumerate(molecule.atomic_numbers):
        name = symbol(int(z))
        radius = HYDROGEN if name == "H" else RADIUS
        scene.add_sphere(positions[atom], radius, COLOURS.get(name, OTHER))
        if atom in bad:
            scene.add_ring(positions[atom], radius + 0.22)
    return scene.picture()


def turned(positions: Array) -> Array:
    """Positions around their middle, spread most along x, then y; turned a little from there."""
    centred = positions - (positions.max(axis=0) + positions.min(axis=0)) / 2
    _, _, axes = np.linalg.svd(centred - centred.mean(axis=0), full_matrices=True)
    if np.linalg.det(axes) < 0:  # a mirror image would be another molecule
        axes[2] = -axes[2]
    a, b = np.radians([18, 24])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    result: Array = centred @ axes.T @ about_y.T @ about_x.T
    return result - (result.max(axis=0) + result.min(axis=0)) / 2


class Scene:
    """Rays along −z onto a square; the nearest surface of each so far, with its shade."""

    def __init__(self, positions: Array) -> None:
        half = max(3.1, 0.75 + np.abs(positions[:, :2]).max())
        side = TILE * FINER
        line = (np.arange(side) + 0.5) / side * 2 * half - half
        self.x, self.y = line[None, :], -line[:, None]
        self.depth = np.full((side, side), -np.inf)
        self.colour = np.ones((side, side, 3))
        self.ring = np.zeros((side, side), bool)
        self.span = max(1.5, float(np.abs(positions[:, 2]).max()))

    def add_sphere(self, centre: Array, radius: float, colour: tuple[float, ...]) -> None:
        """A ball."""
        x, y = self.x - centre[0], self.y - centre[1]
        rest = radius**2 - x**2 - y**2
        z = np.sqrt(np.maximum(rest, 0))
        shape = rest.shape
        normal = np.stack([np.broadcast_to(x, shape), np.broadcast_to(y, shape), z], axis=-1)
        self._put(rest > 0, centre[2] + z, normal / radius, colour)

    def add_bond(self, start: Array, end: Array, order: int) -> None:
        """One, two or three sticks side by side in the plane of the picture."""
        across = np.array([start[1] - end[1], end[0] - start[0], 0.0])
        length = np.linalg.norm(across)
        across = across / length if length > 1e-6 else np.array([1.0, 0, 0])
        count = min(max(order, 1), 3)
        radius = STICK if count == 1 else 0.62 * STICK
        for k in range(count):
            shift = (k - (count - 1) / 2) * APART * across
            self._add_stick(start + shift, end + shift, radius)

    def _add_stick(self, start: Array, end: Array, radius: float) -> None:
        length = float(np.linalg.norm(end - start))
        d = (end - start) / length
        x, y = self.x - start[0], self.y - start[1]
        # |w − (w·d) d|² = r² for w = (x, y, z), as a square equation in z.
        a = max(1 - d[2] ** 2, 1e-9)
        along = x * d[0] + y * d[1]
        b = -2 * along * d[2]
        c = x**2 + y**2 - along**2 - radius**2
        rest = b**2 - 4 * a * c
        z = (-b + np.sqrt(np.maximum(rest, 0))) / (2 * a)
        t = along + z * d[2]
        shape = rest.shape
        w = np.stack([np.broadcast_to(x, shape), np.broadcast_to(y, shape), z], axis=-1)
        normal = (w - t[..., None] * d) / radius
        self._put((rest > 0) & (t > 0) & (t < length), start[2] + z, normal, BOND)

    def add_ring(self, centre: Array, radius: float) -> None:
        """A mark around an atom, in front of everything."""
        distance = np.hypot(self.x - centre[0], self.y - centre[1])
        self.ring |= np.abs(distance - radius) < 0.035

    def _put(self, hit: NDArray[np.bool_], z: Array, normal: Array, colour: object) -> None:
        hit = hit & (z > self.depth)
        n = normal[hit]
        lit = np.clip(n @ (LIGHT / np.linalg.norm(LIGHT)), 0, None)
        half = LIGHT / np.linalg.norm(LIGHT) + np.array([0.0, 0, 1])
        shine = 0.35 * np.clip(n @ (half / np.linalg.norm(half)), 0, 1) ** 40
        edge = 0.72 + 0.28 * np.clip(n[:, 2], 0, 1) ** 0.5
        shade = (0.46 + 0.60 * lit) * edge
        surface = np.asarray(colour) * shade[:, None] + shine[:, None]
        far = 0.30 * np.clip((self.span - z[hit]) / (2 * self.span), 0, 1)[:, None]
        self.depth[hit] = z[hit]
        self.colour[hit] = np.clip(surface, 0, 1) * (1 - far) + far

    def picture(self) -> Array:
        """The mean of the rays of each pixel."""
        colour = np.where(self.ring[..., None], np.asarray(MARK), self.colour)
        result: Array = colour.reshape(TILE, FINER, TILE, FINER, 3).mean(axis=(1, 3))
        return result


if __name__ == "__main__":
    main()
