"""A run as an object: its metrics and curves."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

import molgen_energy as mg
from molgen_energy.display.curves import Curve, plot
from molgen_energy.errors import InputError
from molgen_energy.systems.registry import load_config

ROWS = """step,epoch,loss,valid_loss,lr,skipped
10,0,8.5,,0.1,0
20,0,2.0,3.5,0.2,0
30,1,nan,,0.3,1
40,1,0.5,1.5,0.4,1
"""


@pytest.fixture
def run(tmp_path) -> mg.Run:
    (tmp_path / "metrics.csv").write_text(ROWS)
    return mg.Run(tmp_path, 40, 12.0, 1.5, 1, load_config("quick"))


def test_metrics_are_the_columns_of_the_file(run):
    nan = np.nan
    np.testing.assert_array_equal(run.metrics["loss"], [8.5, 2, nan, 0.5])
    np.testing.assert_array_equal(run.metrics["valid_loss"], [nan, 3.5, nan, 1.5])
    assert list(run.metrics) == ["step", "epoch", "loss", "valid_loss", "lr", "skipped"]
    with (run.folder / "metrics.csv").open("a") as file:
        file.write("50,1,0.")  # a row that is being written
    assert len(run.metrics["step"]) == 4
    with (run.folder / "metrics.csv").open("a") as file:
        file.write("3,x,0.1,0\n")
    with pytest.raises(InputError, match=r"metrics\.csv is damaged"):
        run.metrics  # noqa: B018
    (run.folder / "metrics.csv").unlink()
    with pytest.raises(InputError, match="stopped before its first row"):
        run.metrics  # noqa: B018
    assert "validation loss" in run._repr_html_()  # what is known


def test_a_run_for_pandas_and_as_text(run, monkeypatch):
    pytest.importorskip("pandas")
    assert run.to_pandas()["loss"].tolist()[:2] == [8.5, 2.0]
    assert "steps 40" in str(run) and "skipped steps 1" in str(run)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pandas is not installed"):
        run.to_pandas()


def points(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, p.split(","))) for p in text.split()] for text in found]


def test_curves_are_drawn_to_scale(run):
    """Equal ratios of a logarithmic scale are equal lengths, and steps are even."""
    html = run._repr_html_()
    training, validation, rate = points(html)
    assert [len(training), len(validation), len(rate)] == [3, 2, 4]  # without NaN
    (x0, y0), (x1, y1), (x3, y3) = training
    assert (x3 - x1) / (x1 - x0) == pytest.approx(2, abs=0.01)
    expected = np.log(8.5 / 2) / np.log(2 / 0.5)
    assert (y1 - y0) / (y3 - y1) == pytest.approx(expected, abs=0.01)
    assert y0 < y1 < y3  # a loss that falls goes down the page
    gaps = np.diff([y for _, y in rate])
    np.testing.assert_allclose(gaps, gaps[0], atol=0.11)
    assert not re.search(r"<script|https?:|url\(", html)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e6])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_ticks_stand_at_their_values(scale, logarithmic):
    """Each label of the y axis is the value at its place, to the digits that it has."""
    values = scale * np.geomspace(1, 400, 9)
    svg = plot([Curve("a", np.arange(9.0), values)], "a", "step", logarithmic)
    ((first, *_, last),) = points(svg)
    ticks = re.findall(r'<text x="52" y="([\d.]+)" text-anchor="end">([^<]+)</text>', svg)
    assert 2 <= len(ticks) <= 8
    for place, label in ticks:
        letter = {"k": 1e3, "M": 1e6, "G": 1e9}.get(label[-1], 1)
        value = float(label.rstrip("kMG")) * letter
        share = (float(place) - 4 - first[1]) / (last[1] - first[1])
        low, high = values[0], values[-1]
        expected = low * (high / low) ** share if logarithmic else low + (high - low) * share
        assert value == pytest.approx(expected, rel=0.03, abs=0.003 * high)


def test_curves_without_a_shape():
    """No point, one point, equal values, and values that no logarithm has."""
    nothing = Curve("a", np.arange(3.0), np.full(3, np.nan))
    assert plot([nothing], "a", "step") == ""
    for y in ([2.0], [0.0, 0.0], [-1.0, 5.0]):
        svg = plot([Curve("<b>", np.arange(float(len(y))), np.array(y))], "<b>", "step", True)
        assert len(points(svg)[0]) == len(y) and "nan" not in svg and "<b>" not in svg
    many = Curve("a", np.arange(5001.0), np.arange(5001.0) + 1)
    assert len(many.points[0]) <= 1002 and many.points[0][-1] == 5000


def test_a_run_is_read_again(tmp_path, monkeypatch):
    """And takes the place of its folder."""
    monkeypatch.chdir(tmp_path)
    tiny = {"model.layers": 1, "model.width": 16, "process.steps": 20, "training.log_every": 1}
    run = mg.train(loss="mse", steps=2, batch_size=4, changes=tiny, output="run")
    again = mg.load_run("run")
    assert (again.steps, again.valid_loss, again.config) == (2, run.valid_loss, run.config)
    assert again.metrics["step"].tolist() == [1, 2]
    assert mg.load_checkpoint(run).origin == "run, step 2"
    assert len(mg.sample(1, checkpoint=run, steps=2, n_atoms=3)) == 1
    with pytest.raises(InputError, match="is a checkpoint; name its run, run"):
        mg.load_run("run/checkpoints/last")
    with pytest.raises(InputError, match="nowhere does not exist"):
        mg.load_run("nowhere")
