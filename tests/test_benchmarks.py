"""`benchmarks/front.py` and `benchmarks/compare_losses.py`: comparing losses at equal FCD."""

from __future__ import annotations

import csv
import importlib
import math
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.errors import InputError
from molgen_energy.metrics.statistics import Estimate
from molgen_energy.training.checkpoint import load_checkpoint

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no benchmarks beside the tests")


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


PROGRAMS = sorted(
    path for name in ("benchmarks", "scripts") for path in (FOLDER.parent / name).glob("*.py")
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_finds_what_it_imports(path, monkeypatch):
    """A name that moved in the package is noticed here, not hours into a measurement."""
    monkeypatch.syspath_prepend(path.parent)
    runpy.run_path(str(path), run_name="program")


@pytest.fixture(scope="module")
def front(importable):
    return importlib.import_module("front")


@pytest.fixture(scope="module")
def losses(importable):
    return importlib.import_module("compare_losses")


@pytest.fixture
def point(front):
    """A point with errors of 0.1 in FCD and of 1 % in stability."""

    def make(label, weights, temperature, fcd, stability):
        metrics = {
            front.FCD_EQUAL: front.Measured(fcd, fcd - 0.196, fcd + 0.196),
            front.STABILITY: front.Measured(stability, stability - 0.0196, stability + 0.0196),
        }
        return front.Point(
            label,
            f"runs/{weights}",
            weights,
            temperature,
            1000,
            50,
            "quadratic",
            0,
            "eta=1",
            400,
            metrics,
        )

    return make


@pytest.fixture
def data(front):
    metrics = {
        front.FCD_EQUAL: front.Measured(0.7, 0.6, 0.8),
        front.STABILITY: front.Measured(0.952, 0.948, 0.956),
    }
    return front.Point(front.DATA, molecules=13083, fcd_molecules=400, metrics=metrics)


# -- benchmarks/front.py --------------------------------------------------------------------------


def test_values_between_points(front):
    line = np.array([[5.0, 0.9], [3.0, 0.8], [2.0, 0.5]])
    assert front.interpolated(line, 0, 4) == pytest.approx(0.85)
    assert front.interpolated(line, 0, 2.5) == pytest.approx(0.65)
    assert front.interpolated(line, 1, 0.65) == pytest.approx(2.5)
    for fcd, stability in line:  # at the points themselves
        assert front.interpolated(line, 0, fcd) == stability
        assert front.interpolated(line, 1, stability) == fcd


def test_curves_are_not_extrapolated(front):
    line = np.array([[5.0, 0.9], [3.0, 0.8]])
    for column, at in ((0, 2.99), (0, 5.01), (1, 0.79), (1, 0.91)):
        assert math.isnan(front.interpolated(line, column, at))
    assert front.interpolated(line[:1], 0, 5) == 0.9
    assert math.isnan(front.interpolated(line[:0], 0, 5))


def test_the_better_of_several_branches(front):
    """FCD falls and then rises as the temperature falls."""
    line = np.array([[4.0, 0.5], [2.0, 0.7], [4.0, 0.9]])
    assert front.interpolated(line, 0, 3) == pytest.approx(0.8)
    bent = np.array([[4.0, 0.5], [3.0, 0.7], [2.0, 0.5]])
    assert front.interpolated(bent, 1, 0.6) == pytest.approx(2.5)


def test_interval_of_one_run(front, point):
    """On a straight curve, that of the difference of both errors between two points."""
    run = [point("a", "w", t, 10 * t, 0.9 - 0.4 * t) for t in (0.5, 1.0)]
    found = front.interpolated_with_interval(run, 0, 7.5)
    assert found.value == pytest.approx(0.6)
    # half a standard error squared of each end, of stability and of slope × FCD
    expected = 1.96 * math.sqrt(0.5 * (0.01**2 + (0.04 * 0.1) ** 2))
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.15)
    assert found.low < found.value < found.high


def test_points_without_fcd_are_on_no_curve(front, point):
    run = [point("a", "w", 0.8, math.nan, 0.9), point("a", "w", 1.0, 3.0, 0.5)]
    values, errors = front.curve(run)
    assert values.tolist() == [[3.0, 0.5]]
    np.testing.assert_allclose(errors, [[0.1, 0.01]])


def test_seeds_of_a_label_are_one_curve(front, point, data):
    points = [
        point("b", "w3", 1.0, 4.0, 0.5),
        data,
        point("a", "w1", 1.0, 3.0, 0.6),
        point("a", "w2", 0.9, 5.0, 0.9),
        point("a", "w1", 0.9, 5.0, 0.8),
        point("a", "w2", 1.0, 3.5, 0.7),
    ]
    by_label = front.fronts(points)
    assert list(by_label) == ["b", "a"]
    shapes = {
        label: [[p.temperature for p in run] for run in runs] for label, runs in by_label.items()
    }
    assert shapes == {"b": [[1.0]], "a": [[0.9, 1.0], [0.9, 1.0]]}
    both, one = front.at_equal({"a": by_label["a"]}, 0, [4.0, 3.2])
    assert (both.metric, both.at, both.reached, both.runs) == (front.STABILITY, 4.0, 2, 2)
    first, second = 0.7, 0.7 + 0.2 / 3
    assert both.value == pytest.approx((first + second) / 2)
    assert (both.low, both.high) == (pytest.approx(first), pytest.approx(second))
    assert math.isnan(one.value) and (one.reached, one.runs) == (1, 2)
    assert front.equal_cell(one, 100, 1) == "by 1 of 2"
    assert front.equal_cell(replace(one, reached=0, runs=1), 100, 1) == "not reached"


def test_round_levels_lie_on_curves(front, point):
    by_label = front.fronts([point("a", "w", t, 5 * t, 1 - t / 2) for t in (0.5, 1.0)])
    levels = front.round_levels(by_label, 0)
    assert len(levels) > 3 and min(levels) >= 2.5 and max(levels) <= 5
    assert all(level == round(level, 2) for level in levels)


def test_points_there_and_back(front, point, data, tmp_path):
    points = [
        replace(point("a, b", "w1", 0.85, 3.5, 0.625), seed=3),
        point("a, b", "w2", 1.0, math.nan, 0.5),
        data,
    ]
    front.write_points(tmp_path / "points.csv", points)
    again = front.read_points(tmp_path / "points.csv")
    assert repr(again) == repr(points)  # NaN is not equal to itself
    front.write_points(tmp_path / "again.csv", again)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "points.csv").read_bytes()


def test_other_tables_are_refused(front, tmp_path):
    with pytest.raises(InputError, match="does not exist; name a CSV that this program wrote"):
        front.read_points(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is no table of points of this program"):
        front.read_points(tmp_path / "other.csv")


def test_a_table_is_drawn_again(front, point, data, tmp_path, capsys):
    points = [point("a", f"w{k}", t, 5 * t + k / 4, 1 - t / 2) for k in (0, 1) for t in (0.8, 1.0)]
    front.write_points(tmp_path / "front.csv", [*points, point("b", "w", 1, 4, 0.5), data])
    table = str(tmp_path / "front.csv")
    front.redraw(front.parser().parse_args(["--only-draw", table, "--at-fcd", "4.5"]))
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "real molecules have 0.70 and are stable in 95.2 %" in shown
    assert "not reached" in shown
    with (tmp_path / "front_equal.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == front.STABILITY]
    assert [(row["label"], row["at"], row["reached"]) for row in rows] == [
        ("a", "4.5", "2"),
        ("b", "4.5", "0"),
    ]
    with pytest.raises(InputError, match="--only-draw takes no checkpoint"):
        front.redraw(front.parser().parse_args(["qm9_mse", "--only-draw", table]))


def test_labels_of_checkpoints(front, tmp_path):
    parse = front.parse_checkpoints
    assert parse(["qm9_mse", "x=runs/a", "x=runs/b"]) == [
        ("qm9_mse", "qm9_mse"), ("x", "runs/a"), ("x", "runs/b"),
    ]  # fmt: skip
    odd = tmp_path / "lr=1"
    odd.mkdir()
    assert parse([str(odd)]) == [("lr=1", str(odd))]
    with pytest.raises(InputError, match="a/run and b/run have the same name; write LABEL=b/run"):
        parse(["a/run", "b/run"])
    with pytest.raises(InputError, match="with a label other than data"):
        parse(["data=runs/a"])
    with pytest.raises(InputError, match="name at least one checkpoint"):
        parse([])


def test_further_options_of_sampling(front):
    options = front.parse_options(["temperature_of=score", "temperature_range=[null, 5]"])
    assert options == {"temperature_of": "score", "temperature_range": [None, 5]}
    for own in ("steps=3", "final_nose=0"):
        with pytest.raises(InputError, match="unknown option of samples for --set"):
            front.parse_options([own])


def test_numbers_of_options(front):
    assert front.parse_numbers("--temperatures", "1,0.8,1") == [1, 0.8]
    for text in ("", "0.9,x", "0", "-1", "inf", "nan"):
        with pytest.raises(InputError, match=r"--temperatures .*: expected numbers above 0"):
            front.parse_numbers("--temperatures", text)


# -- benchmarks/compare_losses.py -----------------------------------------------------------------


def planned(losses, monkeypatch, tmp_path, *options):
    """The runs of a plan from the command line."""
    found = []
    monkeypatch.setattr(losses, "compare", found.append)
    monkeypatch.setattr(sys, "argv", ["compare_losses.py", *options, "--work", str(tmp_path)])
    losses.main()
    return losses.planned_runs(found[0])


def test_labels_of_plans(losses):
    """Labels select rows, name curves and separate options."""
    for plan, rows in losses.PLANS.items():
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels), plan
        assert not any(set("=,") & set(label) for label in labels), plan
    assert len(losses.PLANS["torsions"]) == 12
    assert [row.percent for row in losses.PLANS["data"]][:4] == [100, 50, 25, 10]


def test_a_plan_becomes_runs(losses, monkeypatch, tmp_path):
    runs = planned(
        losses, monkeypatch, tmp_path, "springs", "--rows", "mse,inverse", "--seeds", "0,4",
        "--data", "qm9.h5", "--steps", "7", "--set", "model.width=32",
    )  # fmt: skip
    assert [run.label for run in runs] == ["mse", "mse", "inverse", "inverse"]
    assert all(run.steps == 7 for run in runs)
    assert len({run.folder for run in runs}) == 4
    assert losses.command(runs[3], "cpu") == [
        "train", "--config", "qm9_gdm_pairs_small", "--data", "qm9.h5", "--seed", "4",
        "--set", "model.width=32", "--set", "training.steps=7", "--set", "loss.name=energy",
        "--set", "loss.springs.family=inverse", "--device", "cpu", "--output", str(runs[3].folder),
    ]  # fmt: skip
    assert losses.command(runs[3], "cpu", resume=True)[:3] == [
        "train", "--resume", str(runs[3].folder),
    ]  # fmt: skip


def test_runs_are_named_after_their_training(losses, monkeypatch, tmp_path):
    """Plans share equal rows, and other settings are other runs."""
    of = lambda *options: planned(losses, monkeypatch, tmp_path, *options, "--seeds", "0")  # noqa: E731
    (first,) = of("springs", "--rows", "mse")
    assert first.folder == of("torsions", "--rows", "mse")[0].folder
    assert first.folder != of("springs", "--rows", "mse", "--steps", "9")[0].folder
    assert first.folder != of("springs", "--rows", "mse", "--data", "other.h5")[0].folder


def test_fractions_have_files_of_their_own(losses, monkeypatch, tmp_path):
    runs = planned(
        losses, monkeypatch, tmp_path, "data", "--rows", "mse 100 %,mse 10 %", "--seeds", "0",
        "--data", "some/qm9.h5",
    )  # fmt: skip
    whole, tenth = (Path(run.options[run.options.index("--data") + 1]) for run in runs)
    assert whole == Path("some/qm9.h5")
    assert tenth.parent == tmp_path / "data" and tenth.name.endswith("-10.h5")


def test_refused_rows_are_named(losses, monkeypatch, tmp_path):
    rows = (losses.Row("mse", losses.MSE), losses.Row("new", {"loss.nothing": 1}))
    monkeypatch.setitem(losses.PLANS, "mine", rows)
    message = r"refuses rows of mine: new \(unknown config key 'loss.nothing'\); --rows mse leaves"
    with pytest.raises(InputError, match=message):
        planned(losses, monkeypatch, tmp_path, "mine")
    with pytest.raises(InputError, match=r"unknown row of mine 'ms'; did you mean 'mse'"):
        planned(losses, monkeypatch, tmp_path, "mine", "--rows", "ms")
    with pytest.raises(InputError, match="unknown plan 'spring'; did you mean 'springs'"):
        planned(losses, monkeypatch, tmp_path, "spring")
    with pytest.raises(InputError, match="--seeds a: expected whole numbers"):
        planned(losses, monkeypatch, tmp_path, "mine", "--rows", "mse", "--seeds", "a")


def test_fractions_are_nested(losses):
    members = np.flatnonzero(np.random.default_rng(1).random(1000) < 0.7)
    parts = {percent: losses.nested(members, percent) for percent in (100, 50, 25, 10, 0.01)}
    assert np.array_equal(parts[100], members)
    assert [len(part) for part in parts.values()] == [
        max(1, round(len(members) * percent / 100)) for percent in parts
    ]
    for larger, smaller in zip(list(parts.values()), list(parts.values())[1:], strict=False):
        assert np.isin(smaller, larger).all()
        assert (np.diff(smaller) > 0).all()


def test_a_fraction_keeps_the_other_splits(losses, sample_path, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 333)
    losses.write_fraction(sample_path, 25, tmp_path / "quarter.h5")
    with MoleculeFile(sample_path) as whole, MoleculeFile(tmp_path / "quarter.h5") as part:
        assert np.bincount(part.split).tolist() == [250, 200, 800]
        assert part.columns == whole.columns
        assert part.property_units == whole.property_units
        assert "QM9" in part.source and "25 %" in part.source
        for split in ("valid", "test"):
            assert np.array_equal(part.load(split).positions, whole.load(split).positions)
        chosen = losses.nested(whole.split_indices("train"), 25)
        ours, theirs = part.load("train"), whole.read(chosen, whole.columns)
        assert np.array_equal(ours.positions, theirs.positions)
        assert np.array_equal(ours.atomic_numbers, theirs.atomic_numbers)


@pytest.mark.slow
def test_one_command_trains_and_compares(losses, sample_path, tmp_path, monkeypatch, capfd):
    """Two losses, and nothing is trained or drawn again by the same command."""
    words = [
        "compare_losses.py", "springs", "--rows", "mse,constant",
        "--seeds", "0", "--config", "quick", "--data", str(sample_path), "--steps", "2",
        "--set", "model.layers=1", "--set", "model.width=8", "--set", "training.warmup_steps=0",
        "--jobs", "2", "--device", "cpu", "--work", str(tmp_path / "work"), "--front",
        "-n 3 --steps 2 --temperatures 1 --metrics rates --workers 0",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    handler = signal.getsignal(signal.SIGTERM)

    def said() -> str:
        try:
            losses.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return capfd.readouterr().err

    first = said()
    assert "2 runs, 0 of them finished" in first
    assert "is on no curve" in first
    runs = [path for path in (tmp_path / "work" / "runs").iterdir() if path.is_dir()]
    assert [load_checkpoint(path).state["progress"]["step"] for path in runs] == [2, 2]
    samples = sorted((tmp_path / "work" / "fronts").glob("*.h5"))
    assert len(samples) == 2
    written = [path.stat().st_mtime_ns for path in samples]
    assert "2 runs, 2 of them finished" in said()
    assert [path.stat().st_mtime_ns for path in samples] == written
    assert (tmp_path / "work" / "springs.png").exists()
    with (tmp_path / "work" / "springs.csv").open(newline="") as file:
        rows = [(row["label"], row["temperature"]) for row in csv.DictReader(file)]
    assert rows == [("mse", "1"), ("constant", "1"), ("data", "")]


# -- benchmarks/properties.py ---------------------------------------------------------------------


def test_the_table_of_properties(importable):
    """Orbital energies in meV, others as they are, and EDM's figures below."""
    properties = importlib.import_module("properties")
    found = Estimate(0.01, (0.009, 0.012), 50)
    row = properties.Row("ours", {"gap": found, "mu": Estimate(1.234, (1.1, 1.3), 50)})
    lines = properties.markdown(["gap", "mu"], [row]).splitlines()
    assert lines[0] == "| mean absolute error | Δε, meV | μ, D |"
    assert lines[2] == "| ours | 272 [245, 327] | 1.23 [1.10, 1.30] |"
    assert "| EDM, a network for each property | 655 | 1.111 |" in lines
