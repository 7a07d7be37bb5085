"""Regular polygons (section 6.1 of Kaba et al., NeurIPS 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.splits import check_fractions, check_seed, parse_fractions, random_split
from molgen_energy.datasets.base import Dataset, option
from molgen_energy.errors import InputError
from molgen_energy.progress import ProgressCallback

_SMALLEST_RADIUS = 1e-6
_STREAM = 1  # radii and angles are independent of the split, which has the same seed


def polygons(
    radius: NDArray[np.float64], angle: NDArray[np.float64], vertices: int
) -> NDArray[np.float32]:
    """Regular polygons around the origin, (M, N, 2), counterclockwise.

    Parameters
    ----------
    radius
        Of the circle through the vertices, (M,).
    angle
        Polar angle of the first vertex, (M,) radians.
    vertices
        N.
    """
    turns = angle[:, None] + 2 * math.pi * np.arange(vertices) / vertices
    points = radius[:, None, None] * np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    return np.asarray(points, np.float32)


@dataclass(frozen=True)
class Polygons(Dataset):
    """Regular polygons of random radius, rotated by random angles."""

    name = "shapes"
    samples = "polygons"
    output = "shapes.h5"

    vertices: int = option(20, "Vertices of each polygon.")
    augment_angle: float = option(
        math.pi, "Largest rotation in either direction, in radians; 0 to π."
    )
    count: int = option(100_000, "Number of polygons.")
    smallest: float = option(0.3, "Smallest radius.")
    largest: float = option(5.0, "Largest radius.")
    split: str = option("0.9,0.05,0.05", "Shares for training, validation, test.")
    seed: int = option(0, "Seed of radii, angles and split.")

    def check(self) -> None:
        """Raise `InputError` if an option has a bad value."""
        if self.vertices < 3:
            raise InputError(f"--vertices {self.vertices}: a polygon has 3 or more")
        # A little above π is accepted, such as 3.1416.
        if not 0 <= self.augment_angle <= math.pi + 1e-3:
            raise InputError(f"--augment-angle {self.augment_angle:g}: expected 0 to π (3.1416)")
        if self.count < 1:
            raise InputError(f"--count {self.count}: expected at least 1 polygon")
        if not _SMALLEST_RADIUS <= self.smallest <= self.largest <= 1 / _SMALLEST_RADIUS:
            raise InputError(
                f"--smallest {self.smallest:g} --largest {self.largest:g}: expected ascending "
                f"radii from {_SMALLEST_RADIUS:g} to {1 / _SMALLEST_RADIUS:g}"
            )
        check_seed(self.seed)
        check_fractions(parse_fractions(self.split))

    def write(self, output: Path, progress: ProgressCallback) -> str:
        """Draw the polygons and write them."""
        from molgen_energy.data.arrays import write_arrays

        self.check()
        rng = np.random.default_rng([self.seed, _STREAM])
        radius = rng.uniform(self.smallest, self.largest, self.count)
        angle = rng.uniform(-self.augment_angle, self.augment_angle, self.count)
        write_arrays(
            output,
            "shapes",
            f"regular {self.vertices}-gons, rotated by ±{self.augment_angle:.4g}, seed {self.seed}",
            {
                "radius": radius.astype(np.float32),
                "positions": polygons(radius, angle, self.vertices),
                "split": random_split(self.count, parse_fractions(self.split), self.seed),
            },
            {
                "vertices": self.vertices,
                "augment_angle": self.augment_angle,
                "smallest": self.smallest,
                "largest": self.largest,
                "seed": self.seed,
            },
        )
        progress(self.count, self.count)
        return f"radius {self.smallest:g} to {self.largest:g}, angle ±{self.augment_angle:.4g}"
