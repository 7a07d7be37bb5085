"""A report as a pandas table and in a notebook."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

import molgen_energy as mg
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.errors import InputError


@pytest.fixture(scope="module")
def report(molecules, tmp_path_factory) -> mg.Report:
    path = tmp_path_factory.mktemp("report") / "a<img src=x>.sdf"
    mg.MoleculeList(to_rdkit(perceive(molecules.select(np.arange(30))))).save(path)
    return mg.evaluate(path, metrics="rates,composition", workers=0)


def test_a_table_for_pandas(report, monkeypatch):
    """The numbers of `to_dict`."""
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    values = report.to_dict()
    for name, entry in (
        (report.files[0].name, values["files"][0]), ("data: QM9 test", values["reference"])
    ):  # fmt: skip
        rows = frame[frame["file"] == name].set_index("metric")
        assert set(rows.index) == set(entry["metrics"])
        for key, metric in entry["metrics"].items():
            row = rows.loc[key]
            if metric is None or metric["value"] is None:
                assert pandas.isna(row["value"])
                continue
            assert row["value"] == metric["value"]
            if metric["interval"]:
                assert [row["low"], row["high"]] == metric["interval"]
            if "total" in metric:
                assert row["samples"] == metric["total"] and row["unit"] == ""
            if "real" in metric:
                assert [row["real_low"], row["real_high"]] == metric["real"]["range"]
                assert row["place"] == metric["real"]["place"]
    assert frame.loc[frame["metric"] == "sizes", "unit"].tolist() == ["atoms", "atoms"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    for table in (report.to_pandas, report.molecules.to_pandas):
        with pytest.raises(InputError, match="pandas is not installed; pip install"):
            table()


def test_a_notebook_shows_what_the_terminal_shows(report):
    """Every number of the table, escaped names, and nothing that loads or runs."""
    html = report._repr_html_()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))
    for line in report.table(200).splitlines():
        for number in re.findall(r"\d+\.\d+|like|above", line):
            assert number in text, line
    assert "&lt;img src=x&gt;.sdf" in html and "<img" not in html
    assert not re.search(r"<script|<link|https?:|url\(|\son\w+=", html)
    assert "metrics=&#34;default,fcd&#34;" in html or "pip install" in html
    assert report.summary.split(";")[0] in text
    for line in report.files[0].failures:
        assert line.split(" (")[0] in text
