"""Bars in a notebook, and none elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

import molgen_energy as mg
from molgen_energy.display import progress

TINY = {"model.layers": 1, "model.width": 16, "process.steps": 20}


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """The HTML that a kernel was told to show, as IPython's `display` does."""
    texts: list[str] = []

    def display(html, display_id):
        texts.append(html)
        return SimpleNamespace(update=texts.append)

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "_SECONDS", 0)
    return texts


def test_work_shows_a_bar_and_removes_it(shown, tmp_path, capsys):
    molecules = mg.sample(2, checkpoint="qm9_energy", steps=3, n_atoms=4)
    assert "2 of 2 molecules" in shown[-2] and shown[-1] == ""
    mg.evaluate(molecules, metrics="rates", workers=0)
    assert any("evaluating" in text and "2 of 2 molecules" in text for text in shown)
    assert shown[-1] == ""
    mg.train(loss="mse", steps=2, batch_size=4, changes=TINY, output=tmp_path / "run")
    assert "2 of 2 steps, loss " in shown[-2] and shown[-1] == ""
    assert capsys.readouterr() == ("", "")


def test_no_bar_beside_a_callback_or_after_an_error(shown, molecules):
    calls: list[int] = []
    mg.evaluate(
        mg.MoleculeList(mg.sample(1, checkpoint="qm9_energy", steps=2, n_atoms=4)),
        metrics="rates", workers=0, progress=lambda done, total: calls.append(done),
    )  # fmt: skip
    assert calls and not any("evaluating" in text for text in shown)
    with pytest.raises(mg.InputError):
        mg.evaluate([None], metrics="rates", workers=0)
    assert shown[-1] == ""


def test_a_terminal_is_no_notebook(monkeypatch):
    assert not progress.in_notebook()
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not progress.in_notebook()
