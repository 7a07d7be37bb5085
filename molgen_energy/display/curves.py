"""Curves as SVG in the colours of the page around them, for notebooks and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from molgen_energy.display.html import render

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 30
COLOURS = ("#3b82e0", "#e0742c", "#2fa36b", "#a45bd0")
"""Of the curves of a plot in turn; clear on white and on black."""
_MOST_POINTS = 1000
_TICKS = 5


@dataclass(frozen=True)
class Curve:
    """One line of a plot: x and y (V,); points whose y is NaN are left out."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    dots: bool = False
    """Whether to mark the points."""

    @property
    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The finite points, at most a thousand of them."""
        finite = np.flatnonzero(np.isfinite(self.x) & np.isfinite(self.y))
        chosen = finite[:: max(1, math.ceil(len(finite) / _MOST_POINTS))]
        if len(finite) and chosen[-1] != finite[-1]:
            chosen = np.append(chosen, finite[-1])
        return self.x[chosen], self.y[chosen]


@dataclass(frozen=True)
class _Axis:
    """A scale from values to units of the drawing, with its ticks."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = self._scaled(np.array([self.low, self.high]))
        share: NDArray[np.float64] = (self._scaled(values) - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def _scaled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = np.log10(values) if self.logarithmic else values
        return scaled

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        values: list[float] = []
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5)):
                values = [d * 10.0**k for k in decades for d in digits]
                values = [v for v in values if self.low <= v <= self.high]
                if len(values) >= 3:
                    break
            values = values[:: math.ceil(len(values) / _TICKS) or 1]
        if len(values) < 3:  # of a logarithmic axis of less than a decade too
            rough = (self.high - self.low) / _TICKS
            size = 10.0 ** math.floor(math.log10(rough))
            step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            values = [step * k for k in range(first, last + 1)]
        places = self(np.array(values)).tolist()
        return [(place, _number(v)) for place, v in zip(places, values, strict=True)]


def plot(curves: Sequence[Curve], title: str, x_label: str, logarithmic: bool = False) -> Markup:
    """A plot of curves with axes and a legend, as SVG; empty where there is no point.

    Parameters
    ----------
    title
        What y is, for the caption and for readers of a screen.
    logarithmic
        Whether y is drawn on a logarithmic scale, where all its values are positive.
    """
    drawn = [(curve, *curve.points) for curve in curves]
    drawn = [item for item in drawn if len(item[1])]
    if not drawn:
        return Markup("")
    x = np.concatenate([item[1] for item in drawn])
    y = np.concatenate([item[2] for item in drawn])
    logarithmic = logarithmic and bool((y > 0).all())
    across = _Axis(*_range(x, False), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(*_range(y, logarithmic), _HEIGHT - _BOTTOM, _TOP, logarithmic)
    lines = [
        {
            "name": curve.name,
            "colour": COLOURS[k % len(COLOURS)],
            "points": [f"{a:.1f},{b:.1f}" for a, b in zip(across(xs), up(ys), strict=True)],
            "dots": curve.dots or len(xs) == 1,
        }
        for k, (curve, xs, ys) in enumerate(drawn)
    ]
    svg = render(
        "curves.svg.j2",
        width=_WIDTH, height=_HEIGHT, left=_LEFT, right=_WIDTH - _RIGHT, top=_TOP,
        bottom=_HEIGHT - _BOTTOM, title=title, x_label=x_label, lines=lines,
        x_ticks=across.ticks, y_ticks=up.ticks,
    )  # fmt: skip
    return Markup(svg)


def _range(values: NDArray[np.float64], logarithmic: bool) -> tuple[float, float]:
    """Lowest and highest value, with a margin where they are equal."""
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        return (low, high) if high > 1.01 * low else (low / 1.5, high * 1.5)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def _number(value: float) -> str:
    """A short number: 20k, 3.2M, 0.05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            shown = value / (1e3 if letter == "k" else size)
            return f"{shown:.3g}{letter}"
    return f"{value:.3g}" if value else "0"
