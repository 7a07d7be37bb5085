"""Molecules in three dimensions: what a page shows is what the molecules are, and only that."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

import molgen_energy as mg
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_ase, to_rdkit
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError

EVIL = "</script><img src=x onerror=alert(1)>'\"&"


class Tags(HTMLParser):
    """Names of all elements, values of attributes that load, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        found = dict(attributes)
        self.loads += [found[key] for key in ("src", "href", "srcset", "data") if key in found]
        self.loads += [key for key in found if key.startswith("on")]

    def handle_data(self, data):
        self.text += data


def models(view) -> list[dict]:
    return json.loads(re.search(r"const shown = (.*?);\n", view._repr_html_())[1])


def embedded(smiles: str) -> Chem.Mol:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=7)
    return molecule


def test_positions_are_those_of_the_molecule_up_to_a_rotation():
    """All distances, and the handedness."""
    molecule = embedded("C[C@H](N)C(=O)O")
    (model,) = models(mg.show(molecule))
    theirs = molecule.GetConformer().GetPositions()
    ours = np.array(model["positions"])
    distances = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (ours, theirs)]
    np.testing.assert_allclose(*distances, atol=2e-3)
    volumes = [np.linalg.det(p[1:4] - p[0]) for p in (ours, theirs)]
    assert volumes[0] == pytest.approx(volumes[1], abs=5e-3)
    extents = np.ptp(ours, axis=0)
    assert extents[0] > extents[2]  # seen from its broad side
    assert model["formula"] == "C3H7NO2"
    bonds = {(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()}
    assert {(i, j) for i, j, _ in model["bonds"]} == bonds
    assert model["smiles"] == "C[C@H](N)C(=O)O" or model["smiles"] == "CC(N)C(=O)O"


def test_checks_are_those_of_evaluate(molecules):
    """Of molecules in memory, with perceived and with given bonds."""
    some = molecules.select(np.arange(0, 1600, 100))
    shaken = some.positions + np.random.default_rng(0).normal(0, 0.03, some.positions.shape)
    some = Molecules(shaken.astype("f4"), some.atomic_numbers, some.offsets)
    built = to_rdkit(perceive(some))
    for origin, bonds in (("perceived", "perceived from distances"), ("given", "")):
        for molecule in built:
            molecule.SetProp("bonds", origin)
        view = mg.show(built, per_page=4)
        rows = list(mg.evaluate(built, metrics="rates", workers=0).molecules)
        shown = models(view)
        assert [not model["bad"] for model in shown] == [row["passes_all"] for row in rows]
        assert ["; ".join(model["bad"]) for model in shown] == [row["reason"] for row in rows]
        assert [len(model["unstable"]) for model in shown] == [r["unstable_atoms"] for r in rows]
        assert 0 < sum(bool(model["bad"]) for model in shown) < len(shown)
        assert (bonds in view._repr_html_()) and "16 molecules" in repr(view)
    assert all(not m["good"] + m["bad"] for m in models(mg.show(built, checks=False)))


def test_text_of_files_is_never_html(tmp_path):
    """Names, properties and file names; nothing is loaded, and no script but the view's own."""
    molecule = embedded("CO")
    molecule.SetProp("_Name", EVIL)
    molecule.SetProp(f"gap{EVIL.replace('/', '')}", "0.25")
    path = tmp_path / "a <b onclick=x>.sdf"
    with Chem.SDWriter(str(path)) as writer:
        writer.write(molecule)
    for view in (mg.show(molecule), mg.show([molecule, None]), mg.show(path)):
        html = view._repr_html_()
        found = Tags(html)
        assert found.names.count("script") == 1 and html.count("</script>") == 1
        assert not {"img", "b", "iframe", "link", "object"} & set(found.names)
        assert found.loads == []
        assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|eval\(", html)
    titles = [model["title"] for model in models(mg.show([molecule, None]))]
    assert titles == [f"1 · {EVIL}", "2"]
    assert "gap" in models(mg.show(molecule))[0]["properties"][0]


def test_sources_of_molecules(molecules, tmp_path):
    """Arrays, RDKit, ASE and files show the same molecules."""
    some = perceive(molecules.select(np.arange(5)))
    in_rdkit = mg.MoleculeList(to_rdkit(some))
    views = [mg.show(some, limit=3), mg.show(in_rdkit, limit=3)]
    pytest.importorskip("ase")
    views.append(mg.show(to_ase(some), limit=3))
    paths = [in_rdkit.save(tmp_path / f"a.{suffix}") for suffix in ("sdf", "xyz", "h5")]
    views += [mg.show(path, limit=3) for path in paths]
    shown = [models(view) for view in views]
    assert all([m["formula"] for m in one] == [m["formula"] for m in shown[0]] for one in shown)
    assert all([m["smiles"] for m in one] == [m["smiles"] for m in shown[0]] for one in shown)
    for other in shown[1:]:
        np.testing.assert_allclose(other[0]["positions"], shown[0][0]["positions"], atol=0.01)
    assert "the first 3 of 5 molecules of a.h5" in repr(views[-1])
    assert "the first 3 molecules of a.xyz" in repr(views[-2])
    assert models(mg.show(to_ase(some)[0]))[0]["formula"] == shown[0][0]["formula"]
    (tmp_path / "b.xyz").write_text("1\n\nX 0 0 0\n" + (tmp_path / "a.xyz").read_text())
    skipping = mg.show(tmp_path / "b.xyz", limit=2)
    assert "1 bad record skipped" in skipping._repr_html_()
    assert [model["title"] for model in models(skipping)] == ["2", "3"]
    page = views[0].save(tmp_path / "view.html").read_text(encoding="utf-8")
    assert views[0]._repr_html_() in page and page.startswith("<!doctype html>")
    assert in_rdkit[:2]._repr_html_().count('class="mm-card"') == 2


def test_what_cannot_be_drawn_says_why():
    lost, flat = embedded("C"), Chem.MolFromSmiles("CC")
    lost.GetConformer().SetAtomPosition(0, (float("nan"), 0, 0))
    found = models(mg.show([lost, flat, None]))
    assert [model["problem"] for model in found] == [
        "coordinates are not finite", "no coordinates (no conformer)",
        "RDKit could not read this molecule",
    ]  # fmt: skip
    salt = Molecule(np.eye(2, 3, dtype="f4"), np.array([11, 17], "u1"))
    (model,) = models(mg.show(Molecules.from_list([salt])))
    assert model["properties"] == ["not checked: bonds of Na are not perceived from distances"]
    assert model["bad"] == model["bonds"] == []
    large = Molecules.from_list([Molecule(np.zeros((2200, 3), "f4"), np.ones(2200, "u1"))])
    assert "2,200 atoms are more than this view draws" in models(mg.show(large))[0]["problem"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no molecule to show"),
        (5, "cannot show a int"),
        ([embedded("C"), "C"], "molecule 2 is a str"),
        ("nowhere.sdf", "nowhere.sdf does not exist"),
    ],
    ids=["none", "number", "text", "path"],
)
def test_what_is_no_molecule(given, message):
    with pytest.raises(InputError, match=message):
        mg.show(given)
    with pytest.raises(InputError, match="expected numbers from 1"):
        mg.show(embedded("C"), limit=0)
    with pytest.raises(InputError, match=r"name a file \.html"):
        mg.show(embedded("C")).save("a.png")
