"""The curves of a run, `curves.svg` in its folder: loss, its terms, and learning rate by step.

The picture is plain SVG, made in milliseconds without Matplotlib, so that training can write it at
every validation. Browsers, editors and file managers show it, on light and dark backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.output import atomic_write, printable
from molgen_energy.training.metrics import loss_terms, read_metrics

NAME = "curves.svg"

_WIDTH, _LEFT, _RIGHT, _TOP, _GAP = 780, 76, 180, 58, 50  # pixels
_HEIGHTS = (230, 130)  # of the first panel and of the others
_POINTS = 500  # in a line; more cannot be told apart
_MARKED = 60  # points; lines of fewer have a circle at each
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-size: 14px; font-weight: 600 }
.back { fill: #fff } .frame { fill: none; stroke: #999 } .grid { stroke: #e4e4e4 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .back { fill: #16181c } .frame { stroke: #666 } .grid { stroke: #2c2f36 }
}
"""


def write_curves(run: Path) -> None:
    """Draw `metrics.csv` of a run into `curves.svg`; writes nothing before the first row.

    Raises
    ------
    OSError
        The picture cannot be written.
    """
    rows = read_metrics(run / "metrics.csv")
    if rows:
        atomic_write(run / NAME, draw_curves(rows, printable(run.resolve().name)).encode())


def draw_curves(rows: Sequence[Mapping[str, str]], title: str) -> str:
    """The curves of rows of `metrics.csv`, as a picture in SVG.

    Parameters
    ----------
    rows
        See `molgen_energy.training.metrics.read_metrics`; values that are missing or not finite
        are left out.
    title
        Stands above the curves.
    """
    steps = _column(rows, "step")
    terms = {name: _column(rows, name) for name in loss_terms(rows)}
    panels = [
        ("loss", {"training": _column(rows, "loss"), "validation": _column(rows, "valid_loss")}),
        ("terms of the loss", terms),
        ("learning rate", {"learning rate": _column(rows, "lr")}),
    ]
    drawn: list[str] = []
    top = _TOP
    for name, lines in panels:
        kept = {key: values for key, values in lines.items() if np.isfinite(values).any()}
        if kept:
            height = _HEIGHTS[bool(drawn)]
            drawn.append(_panel(name, steps, kept, top, height, name != "learning rate"))
            top += height + _GAP
    bottom = top - _GAP + 18
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 24}" '
        f'width="{_WIDTH}" role="img" aria-label="Training curves of {escape(title)}">'
        f'<style>{_STYLE}</style><rect class="back" width="100%" height="100%"/>'
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>{"".join(drawn)}'
        f'<text x="{middle:.0f}" y="{bottom + 14}" text-anchor="middle">step</text></svg>\n'
    )


def _column(rows: Sequence[Mapping[str, str]], name: str) -> NDArray[np.float64]:
    """The values of a column, (number of rows,); NaN where it is empty."""
    return np.array([float(row.get(name) or "nan") for row in rows])


def _panel(
    name: str, steps: NDArray[np.float64], lines: Mapping[str, NDArray[np.float64]],
    top: int, height: int, by_decades: bool,
) -> str:  # fmt: skip
    """Axes and lines of one quantity by step.

    With `by_decades` the axis is logarithmic if values span more than a factor of ten.
    """
    finite = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
    low, high = float(finite.min()), float(finite.max())
    logarithmic = by_decades and low > 0 and high > 10 * low
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    across = _ticks(0, float(steps.max()))
    right, bottom = _WIDTH - _RIGHT, top + height

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / max(across[-1], 1)

    def y(value: float) -> float:
        if logarithmic:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return bottom - height * share

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    parts += [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,g}</text>'
        for tick in across
    ]
    parts.append(
        f'<rect class="frame" x="{_LEFT}" y="{top}" width="{right - _LEFT}" height="{height}"/>'
        f'<text x="{_LEFT}" y="{top - 7}">{escape(name)}</text>'
    )
    label = top + 12
    for (key, values), colour in zip(lines.items(), _COLOURS * len(lines), strict=False):
        there = np.flatnonzero(np.isfinite(values))
        shown = there[np.unique(np.linspace(0, len(there) - 1, _POINTS).round().astype(int))]
        points = [(x(float(steps[k])), y(float(values[k]))) for k in shown]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if len(points) <= _MARKED:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4" fill="{colour}"/>'
                      for a, b in points]  # fmt: skip
        last = float(values[there[-1]])
        shown_name = escape(key.removesuffix("_loss").replace("_", " "))
        parts.append(
            f'<rect x="{right + 10}" y="{label - 6}" width="12" height="3" fill="{colour}"/>'
            f'<text x="{right + 27}" y="{label}">{shown_name} {last:.3g}</text>'
        )
        label += 18
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose a range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose a range, thinned out if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / 6)
    return [10.0**k for k in range(first, last + every, every)]
