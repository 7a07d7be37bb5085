"""Evaluation of polygons: how regular they are (section 6.1 of Kaba et al., NeurIPS 2025)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.metrics.report.model import (
    EvaluatedFile,
    MetricValue,
    Report,
    ReportBlock,
    ReportColumn,
    ReportRow,
)
from molgen_energy.metrics.report.pictures import picture_block
from molgen_energy.metrics.statistics import Estimate, Mean
from molgen_energy.output import display_path
from molgen_energy.systems.shapes.files import read_polygons

_DRAWN = 12
_ROWS = (
    ReportRow("quality", "quality", "−ln of the mean irregularity"),
    ReportRow("irregularity", "irregularity", "σ_Δangle/2π + σ_radius/r"),
    ReportRow("angles", "σ_Δangle/2π", "spread of the angles between neighbours"),
    ReportRow("radii", "σ_radius/r", "spread of the distances from the centre"),
    ReportRow("radius_error", "error of the radius", "|r − r₀|/r₀ for the requested radius r₀"),
)


class Regularity(NamedTuple):
    """Deviations of polygons from regular ones, each (M,)."""

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

    Centre and mean radius r are those of the polygon itself, so the result is invariant under
    translation, rotation and reflection. Angles from a vertex to the next are in [0, 2π), in the
    direction in which most of the polygon goes round.

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
    winding = np.sin(step).sum(axis=1, keepdims=True)
    step = np.where(winding < 0, -step, step) % (2 * math.pi)
    # A rounding error below zero is almost 2π after the modulo; it is zero.
    step = np.where(step > 2 * math.pi - 1e-9, 0.0, step)
    radius = distance.mean(axis=1)
    angles = step.std(axis=1) / (2 * math.pi)
    with np.errstate(invalid="ignore", divide="ignore"):
        radii = np.where(radius > 0, distance.std(axis=1) / radius, np.inf)
    return Regularity(angles + radii, angles, radii, radius)


def quality(positions: NDArray[Any]) -> float:
    """−ln of the mean irregularity of polygons (M, N, 2)."""
    return -math.log(float(regularity(positions).irregularity.mean()))


def evaluate_shapes(files: Sequence[Path]) -> Report:
    """Evaluate files of polygons, written by `sample` or `preprocess`.

    Raises
    ------
    InputError
        A file is missing, broken, or of another system.
    """
    return Report.of_files("shapes", "polygons", _ROWS, "polygons", files, _evaluate_file)


def _evaluate_file(path: Path, picture: str) -> tuple[EvaluatedFile, ReportBlock]:
    file = read_polygons(path, "`molgen-energy sample` from a run on shapes")
    positions = file.columns["positions"]
    deviations = regularity(positions)
    radius = file.columns["radius"].astype(np.float64)
    irregularity = Mean.of(deviations.irregularity)
    interval = None
    if irregularity.interval is not None and irregularity.interval[0] > 0:
        interval = -math.log(irregularity.interval[1]), -math.log(irregularity.interval[0])
    score = -math.log(irregularity.value) if irregularity.value > 0 else math.inf
    metrics: dict[str, MetricValue | None] = {
        "quality": Estimate(score, interval, len(file)),
        "irregularity": irregularity,
        "angles": Mean.of(deviations.angles),
        "radii": Mean.of(deviations.radii),
        "radius_error": Mean.of(np.abs(deviations.radius - radius) / radius),
    }
    notes = []
    if float(np.median(deviations.radius / radius)) < 0.5:
        notes.append(
            "half of the polygons have less than half of the requested radius: they collapsed to a "
            "point, where the quality means little"
        )
    name = display_path(Path(path.name))
    evaluated = EvaluatedFile(
        name,
        len(file),
        [ReportColumn(metrics, f"{positions.shape[1]}-gons")],
        notes=notes,
        provenance=dict(file.provenance),
        path=path,
    )
    first, first_radii = positions[:_DRAWN], radius[:_DRAWN]
    return evaluated, picture_block(name, picture, lambda: draw(first, first_radii))


def draw(positions: NDArray[Any], radius: NDArray[np.float64]) -> bytes:
    """Polygons (M, N, 2) side by side as PNG, centred, in units of the requested radius (M,)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(6, len(positions))
    rows = -(-len(positions) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.7 * rows), layout="constrained")
    for number, (points, r) in enumerate(zip(positions, radius, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw_polygon(axes, (points - points.mean(axis=0)) / r)
        axes.set_title(f"r = {r:.2g}", fontsize=8)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # type: ignore[no-untyped-call]
    return content.getvalue()


def draw_polygon(axes: Any, points: NDArray[Any], colour: str = "C0") -> None:
    """A polygon (N, 2) around the origin, of radius 1 if it is perfect."""
    closed = np.concatenate([points, points[:1]])
    axes.plot(*closed.T, "-", color=colour, linewidth=1)
    axes.plot(*points.T, "o", color=colour, markersize=2.5)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
