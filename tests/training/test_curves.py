"""The picture of a run's curves: what it shows is what `metrics.csv` holds."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from molgen_energy.api.train import train
from molgen_energy.errors import InputError
from molgen_energy.training import loop
from molgen_energy.training.curves import draw_curves, write_curves
from molgen_energy.training.metrics import MetricsLog

SVG = "{http://www.w3.org/2000/svg}"


def columns_of(**columns):
    nothing = np.full(len(columns["step"]), np.nan)
    names = ("step", "loss", "valid_loss", "gradient_norm", "lr")
    return {name: np.asarray(columns.get(name, nothing), float) for name in (*names, *columns)}


def number(label):
    """The value of a label such as 20k."""
    return float(label.replace("k", "e3").replace("M", "e6"))


def drawn_values(picture, logarithmic):
    """The values of the lines of each plot, by the labels of the axis beside them."""
    found = []
    for plot in ElementTree.fromstring(picture).iter(f"{SVG}svg"):
        labels = [text for text in plot.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
        axis = [(float(t.get("y")) - 4, number(t.text)) for t in labels if t.text != "step"]
        lines = plot.findall(f"{SVG}polyline")
        if not lines:
            continue
        (y0, v0), (y1, v1) = axis[0], axis[-1]
        if logarithmic:
            v0, v1 = math.log(v0), math.log(v1)
        for line in lines:
            y = np.array([float(point.split(",")[1]) for point in line.get("points").split()])
            values = v0 + (v1 - v0) * (y - y0) / (y1 - y0)
            found.append(np.exp(values) if logarithmic else values)
    return found


def test_lines_are_at_the_values_of_the_axes(rng):
    loss = np.exp(rng.uniform(math.log(1e-3), math.log(50), 40))
    loss[[3, 4]] = 1e-3, 50.0
    valid = np.where(np.arange(40) % 8 == 7, loss, np.nan)
    picture = draw_curves(
        columns_of(step=np.arange(1, 41) * 10, loss=loss, valid_loss=valid), "run"
    )
    training, validation = drawn_values(picture, True)
    np.testing.assert_allclose(training, loss, rtol=0.01)  # a tenth of a pixel
    np.testing.assert_allclose(validation, loss[7::8], rtol=0.01)
    assert f"training {loss[-1]:.3g}</tspan>" in picture
    assert f"validation {loss[-1]:.3g}</tspan>" in picture
    assert "terms" not in picture
    rates = np.linspace(0, 3e-3, 40)
    (drawn,) = drawn_values(draw_curves(columns_of(step=np.arange(40), lr=rates), "run"), False)
    np.testing.assert_allclose(drawn, rates, atol=2e-6)


def test_bad_values_and_names_and_long_runs():
    """NaN, infinity, a constant, no value at all, markup, a million steps."""
    bad = columns_of(step=[1, 2, 3], loss=[np.nan, np.inf, 2.5], atoms_loss=[-1, 2, np.nan])
    picture = draw_curves(bad, "<b>&")
    assert [len(values) for values in drawn_values(picture, False)] == [1, 2]
    assert "&lt;b&gt;&amp;" in picture
    assert "polyline" not in draw_curves(columns_of(step=[1]), "")
    steps = np.arange(1, 20_001) * 50
    picture = draw_curves(columns_of(step=steps, loss=1 / steps, lr=steps * 0 + 1e-3), "long")
    assert len(picture) < 60_000
    assert ">1M</text>" in picture


def test_the_picture_is_in_the_run(tmp_path):
    log = MetricsLog(tmp_path, 0, ("nuclear_charges_loss",))
    write_curves(tmp_path)
    assert not (tmp_path / "curves.svg").exists()
    row = {"nuclear_charges_loss": 1.0, "valid_loss": 1.25, "lr": 1e-3, "gradient_norm": 3.0}
    log.write(step=5, epoch=0, loss=1.5, skipped=0, **row)
    log.close()
    write_curves(tmp_path)
    text = (tmp_path / "curves.svg").read_text()
    assert re.findall(r">([a-z ]*[\d.]+)</tspan>", text) == [
        "training 1.5", "validation 1.25", "nuclear charges 1", "3", "0.001",
    ]  # fmt: skip
    assert tmp_path.name in text
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("1.25", "low"))
    with pytest.raises(InputError, match="damaged"):
        write_curves(tmp_path)


def test_a_run_goes_on_without_its_picture(tmp_path, monkeypatch):
    def fail(run):
        raise OSError(28, "No space left on device", str(run))

    small = {"model.layers": 1, "model.width": 8, "process.steps": 10}
    drawn = train(changes=small, steps=1, output=tmp_path / "drawn")
    assert "training" in (drawn.folder / "curves.svg").read_text()
    monkeypatch.setattr(loop, "write_curves", fail)
    run = train(changes=small, steps=1, output=tmp_path / "run")
    assert run.steps == 1
    assert "no picture of the curves: [Errno 28]" in (run.folder / "log.txt").read_text()
    assert not (run.folder / "curves.svg").exists()
