"""How regular polygons are (section 6.1 of Kaba et al., NeurIPS 2025)."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.metrics.rates import Mean
from molgen_energy.metrics.scores import Derived, Row, Scores, file_name
from molgen_energy.systems.shapes.files import read_polygons

_DRAWN = 12


class Regularity(NamedTuple):
    """How far polygons are from regular ones, each (M,)."""

    irregularity: NDArray[np.float64]
    """σ_Δangle/2π + σ_radius/r."""
    angles: NDArray[np.float64]
    """σ_Δangle/2π."""
    radii: NDArray[np.float64]
    """σ_radius/r."""
    radius: NDArray[np.float64]
    """r."""


def regularity(positions: NDArray[Any]) -> Regularity:
    """Standard deviations of the angles between neighbours and of the distances from the centre.

    Centre and mean radius r are those of the polygon itself, so neither where it lies nor how it is
    turned or mirrored matters. Angles are taken from a vertex to the next, in the sense in which
    most of the polygon goes round, from 0 to 2π.

    Parameters
    ----------
    positions
        (M, N, 2).
    """
    points = positions.astype(np.float64)
    points = points - points.mean(axis=1, keepdims=True)
    distance = np.hypot(points[..., 0], points[..., 1])
    angle = np.arctan2(points[..., 1], points[..., 0])
    step = np.roll(angle, -1, axis=1) - angle
    turned = np.sin(step).sum(axis=1, keepdims=True)
    step = np.where(turned < 0, -step, step) % (2 * math.pi)
    # A step back by less than rounding is one of almost 2π above, but is none.
    step = np.where(step > 2 * math.pi - 1e-9, 0.0, step)
    radius = distance.mean(axis=1)
    angles = step.std(axis=1) / (2 * math.pi)
    with np.errstate(invalid="ignore", divide="ignore"):
        radii = np.where(radius > 0, distance.std(axis=1) / radius, np.inf)
    return Regularity(angles + radii, angles, radii, radius)


def quality(positions: NDArray[Any]) -> float:
    """−ln of the mean irregularity of polygons (M, N, 2); the score of a model."""
    return -math.log(float(regularity(positions).irregularity.mean()))


def evaluate_shapes(path: Path) -> Scores:
    """Judge a file of polygons: of `sample`, or of `preprocess`.

    Raises
    ------
    InputError
        The file is missing, broken, or of another system.
    """
    file = read_polygons(path, "`molgen-energy sample` from a run on shapes")
    positions = file.columns["positions"]
    found = regularity(positions)
    wanted = file.columns["radius"].astype(np.float64)
    off = np.abs(found.radius - wanted) / wanted
    mean = Mean.of(found.irregularity)
    interval = None
    if mean.interval is not None and mean.interval[0] > 0:
        interval = -math.log(mean.interval[1]), -math.log(mean.interval[0])
    score = -math.log(mean.value) if mean.value > 0 else math.inf
    rows = [
        Row("quality", "quality", "−ln of the mean irregularity", [Derived(score, interval)]),
        Row("irregularity", "irregularity", "σ_Δangle/2π + σ_radius/r", [mean]),
        Row("angles", "σ_Δangle/2π", "spread of the angles between neighbours",
            [Mean.of(found.angles)]),
        Row("radii", "σ_radius/r", "spread of the distances from the centre",
            [Mean.of(found.radii)]),
        Row("radius_error", "error of the radius", "|r − r₀|/r₀, r₀ the radius that was asked for",
            [Mean.of(off)]),
    ]  # fmt: skip
    notes = []
    if float(np.median(found.radius / wanted)) < 0.5:
        notes.append(
            "half of the polygons have less than half of the radius asked for: collapsed to a "
            "point, where the quality says little"
        )
    return Scores(
        file_name(path),
        "shapes",
        "polygons",
        len(file),
        (f"{positions.shape[1]}-gons",),
        rows,
        notes,
        file.provenance,
        {"polygons": lambda: draw(positions[:_DRAWN], wanted[:_DRAWN])},
    )


def draw(positions: NDArray[Any], radius: NDArray[np.float64]) -> bytes:
    """Polygons (M, N, 2) side by side, centred, in units of the radius asked for; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(6, len(positions))
    rows = -(-len(positions) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.7 * rows), layout="constrained")
    for number, (points, wanted) in enumerate(zip(positions, radius, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw_polygon(axes, (points - points.mean(axis=0)) / wanted)
        axes.set_title(f"r = {wanted:.2g}", fontsize=8)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # type: ignore[no-untyped-call]
    return content.getvalue()


def draw_polygon(axes: Any, points: NDArray[Any], colour: str = "C0") -> None:
    """A polygon (N, 2) around the origin, of radius 1 if it is as it should be."""
    closed = np.concatenate([points, points[:1]])
    axes.plot(*closed.T, "-", color=colour, linewidth=1)
    axes.plot(*points.T, "o", color=colour, markersize=2.5)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
