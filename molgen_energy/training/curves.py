"""The curves of a run, `curves.svg` in its folder: loss, its terms, learning rate and gradient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.display.curves import COLOURS, Curve, plot
from molgen_energy.display.html import render
from molgen_energy.output import atomic_write, printable
from molgen_energy.training.metrics import loss_terms, read_columns

NAME = "curves.svg"
_MOST_VALUES = 4  # in a legend


def write_curves(run: Path) -> None:
    """Draw `metrics.csv` of a run into `curves.svg`; writes nothing before the first row.

    Takes milliseconds, so that training can call it at every validation.

    Raises
    ------
    InputError
        The metrics cannot be read, or the picture is a link, a pipe or a device.
    OSError
        The picture cannot be written.
    """
    columns = read_columns(run / "metrics.csv")
    if columns:
        picture = draw_curves(columns, printable(run.resolve().name))
        atomic_write(run / NAME, picture.encode(), own=True)


def draw_curves(columns: Mapping[str, NDArray[np.float64]], title: str) -> str:
    """The curves of a run as a picture in SVG that opens alone, on light and dark backgrounds.

    Parameters
    ----------
    columns
        Those of `metrics.csv`, (R,) each; see `molgen_energy.training.metrics.read_columns`.
    title
        Stands above the curves.
    """
    terms = {
        name.removesuffix("_loss").replace("_", " "): columns[name] for name in loss_terms(columns)
    }
    quantities = (
        ("loss", {"training": columns["loss"], "validation": columns["valid_loss"]}, True),
        ("terms of the loss", terms, True),
        ("norm of the gradient", {"": columns["gradient_norm"]}, True),
        ("learning rate", {"": columns["lr"]}, False),
    )
    plots = []
    for name, lines, logarithmic in quantities:
        curves = [
            Curve(line, columns["step"], values, dots=line == "validation")
            for line, values in lines.items()
            if np.isfinite(values).any()
        ]
        if svg := plot(curves, name, "step", logarithmic):
            legend = [
                (_legend(curve, len(curves)), COLOURS[k % len(COLOURS)])
                for k, curve in enumerate(curves)
            ]
            plots.append({"name": name, "legend": legend, "svg": svg})
    return render("run.svg.j2", title=title, plots=plots)


def _legend(curve: Curve, count: int) -> str:
    """Name and last value; names alone where there are many."""
    last = "" if count > _MOST_VALUES else f"{curve.points[1][-1]:.3g}"
    return f"{curve.name} {last}".strip()
