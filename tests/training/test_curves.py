"""The picture of a run's curves: what it shows is what `metrics.csv` holds."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from molgen_energy.training.curves import draw_curves, write_curves
from molgen_energy.training.metrics import MetricsLog

SVG = "{http://www.w3.org/2000/svg}"


def rows_of(**columns):
    count = len(columns["step"])
    names = ("step", "epoch", "loss", "atoms_loss", "valid_loss", "lr", "skipped")
    return [{name: str(columns.get(name, [""] * count)[k]) for name in names} for k in range(count)]


def drawn_values(picture, logarithmic):
    """The values of each line, from its points and the labels of the two axes beside it."""
    root = ElementTree.fromstring(picture)
    lines, axes, found = [], [], []
    for element in root:
        if element.tag == f"{SVG}text" and element.get("text-anchor") == "end":
            axes.append((float(element.get("y")) - 4, float(element.text)))
        elif element.tag == f"{SVG}rect" and element.get("class") == "frame":
            panel = axes
            axes = []
        elif element.tag == f"{SVG}polyline":
            points = [tuple(map(float, p.split(","))) for p in element.get("points").split()]
            lines.append((panel, points))
    for panel, points in lines:
        (y0, v0), (y1, v1) = panel[0], panel[-1]
        if logarithmic:
            v0, v1 = math.log(v0), math.log(v1)
        values = [v0 + (v1 - v0) * (y - y0) / (y1 - y0) for _, y in points]
        found.append(np.exp(values) if logarithmic else np.array(values))
    return found


@pytest.mark.parametrize("logarithmic", [False, True])
def test_lines_are_at_the_values_of_the_axes(rng, logarithmic):
    low, high = (1e-3, 50.0) if logarithmic else (4.0, 9.0)
    loss = np.exp(rng.uniform(math.log(low), math.log(high), 40))
    loss[[3, 4]] = low, high
    valid = [f"{value:.6g}" if k % 8 == 7 else "" for k, value in enumerate(loss)]
    picture = draw_curves(rows_of(step=range(10, 410, 10), loss=loss, valid_loss=valid), "run")
    training, validation = drawn_values(picture, logarithmic)
    tolerance = 0.01 if logarithmic else 0.004  # a tenth of a pixel
    np.testing.assert_allclose(training, loss, rtol=tolerance)
    np.testing.assert_allclose(validation, loss[7::8], rtol=tolerance)
    assert f"training {loss[-1]:.3g}</text>" in picture
    assert ">loss</text>" in picture
    assert "terms" not in picture


def test_bad_values_and_names_and_long_runs():
    """NaN, infinity, one row, a constant, no positive value, markup, a million steps."""
    picture = draw_curves(rows_of(step=[1, 2, 3], loss=["nan", "inf", "2.5"], lr=[0, 0, 0]), "<b>&")
    assert [len(values) for values in drawn_values(picture, False)] == [1, 3]
    assert "&lt;b&gt;&amp;" in picture
    negative = rows_of(step=[1, 2], loss=[-3, 40], atoms_loss=[-1.0, 2])
    assert [v.round(2).tolist() for v in drawn_values(draw_curves(negative, ""), False)] == [
        [-3, 40], [-1, 2],
    ]  # fmt: skip
    assert "polyline" not in draw_curves(rows_of(step=[1], loss=["nan"]), "")
    steps = np.arange(1, 2001) * 500
    picture = draw_curves(rows_of(step=steps, loss=1 / steps, lr=[1e-3] * len(steps)), "long")
    assert len(picture) < 40_000
    assert ">1,000,000</text>" in picture or ">1e+06</text>" in picture


def test_the_picture_is_in_the_run(tmp_path):
    log = MetricsLog(tmp_path, 0, ("positions_loss",))
    write_curves(tmp_path)
    assert not (tmp_path / "curves.svg").exists()
    log.write(step=5, epoch=0, loss=1.5, positions_loss=1.0, valid_loss=1.25, lr=1e-3, skipped=0)
    log.close()
    write_curves(tmp_path)
    text = (tmp_path / "curves.svg").read_text()
    assert re.findall(r">(positions|training|validation) ([\d.]+)</text>", text) == [
        ("training", "1.5"), ("validation", "1.25"), ("positions", "1"),
    ]  # fmt: skip
    assert tmp_path.name in text
