"""Block of a report with random molecules in two and three dimensions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D

from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.elements import symbol
from molgen_energy.metrics.accumulator import SelectedMolecule
from molgen_energy.metrics.report.html import render
from molgen_energy.metrics.report.model import BlockContent, ReportBlock
from molgen_energy.metrics.results import MoleculeResults
from molgen_energy.workers import WorkerPool

_SIZE = (280, 210)  # pixels


def gallery_block(results: MoleculeResults, open_pool: Callable[[], WorkerPool]) -> ReportBlock:
    """Random molecules of each file that pass all checks, and that fail some.

    Parameters
    ----------
    open_pool
        Starts the processes that draw the molecules, since RDKit can hang.
    """

    def content() -> BlockContent:
        galleries: list[dict[str, Any]] = []
        models: list[dict[str, Any]] = []
        with open_pool() as workers:
            for evaluation in results.samples:
                accumulator = evaluation.accumulator
                for title, selected in (
                    ("passing all checks", list(accumulator.gallery_passing)),
                    ("failing a check", accumulator.gallery_failing()),
                ):
                    cards = _cards(selected, workers, len(models))
                    models += [_model(s) for s in selected]
                    galleries.append({"title": f"{evaluation.name}: {title}", "cards": cards})
        encoded = json.dumps(models, separators=(",", ":")).replace("<", "\\u003c")
        return BlockContent(render("gallery.html.j2", galleries=galleries, models=Markup(encoded)))

    return ReportBlock("Molecules", content)


def _cards(
    selected: list[SelectedMolecule], workers: WorkerPool, first: int
) -> list[dict[str, Any]]:
    """Contents of the gallery's cards, numbered from `first`."""
    if not selected:
        return []
    records = np.array([s.record for s in selected], np.int64)
    chunk = MoleculeChunk(records, Molecules.from_list([s.molecule for s in selected]))
    draw = partial(draw_chunk, unstable={s.record: s.unstable_atoms for s in selected})
    drawings: list[str] = []
    for _, part in workers.map(draw, chunk.parts(1), drawing_failed):
        drawings += part
    return [
        {
            "number": first + k,
            "record": item.record,
            "smiles": _short_smiles(item),
            "formula": molecular_formula(item.molecule),
            "failure_reasons": item.failure_reasons,
            "drawing": Markup(svg),
        }
        for k, (item, svg) in enumerate(zip(selected, drawings, strict=True))
    ]


def _short_smiles(selected: SelectedMolecule) -> str:
    """SMILES, with implicit hydrogens if the molecule passes all checks."""
    if selected.smiles is None:
        return ""
    if selected.failure_reasons:
        return selected.smiles
    return str(Chem.MolToSmiles(Chem.MolFromSmiles(selected.smiles)))


def molecular_formula(molecule: Molecule) -> str:
    """Molecular formula in Hill order: carbon, hydrogen, then alphabetically."""
    symbols = [symbol(z) for z in molecule.atomic_numbers.tolist()]
    order = sorted(set(symbols), key=lambda s: ({"C": 0, "H": 1}.get(s, 2), s))
    return "".join(s + (str(symbols.count(s)) if symbols.count(s) > 1 else "") for s in order)


def _model(selected: SelectedMolecule) -> dict[str, Any]:
    """Data of the page's 3D viewer: positions in Å, elements, bonds, unstable atoms."""
    molecule = selected.molecule
    positions = molecule.positions.astype(np.float64)
    centred = positions - positions.mean(axis=0)
    bonds: list[list[int]] = []
    if molecule.bond_index is not None and molecule.bond_order is not None:
        orders = molecule.bond_order.tolist()
        bonds = [[i, j, k] for (i, j), k in zip(molecule.bond_index.tolist(), orders, strict=True)]
    return {
        "positions": np.round(centred, 3).tolist(),
        "elements": [symbol(z) for z in molecule.atomic_numbers.tolist()],
        "bonds": bonds,
        "unstable": list(selected.unstable_atoms),
    }


def draw_chunk(chunk: MoleculeChunk, unstable: Mapping[int, tuple[int, ...]]) -> list[str]:
    """2D drawings of molecules as SVG with marked unstable atoms; empty where RDKit fails.

    Parameters
    ----------
    unstable
        Indices of the unstable atoms of each molecule, by record.
    """
    records = chunk.records.tolist()
    return [_draw(m, unstable[k]) for k, m in zip(records, chunk.molecules, strict=True)]


def drawing_failed(chunk: MoleculeChunk, reason: str) -> list[str]:
    """Result for molecules whose drawing did not finish."""
    return [""] * len(chunk)


def _draw(molecule: Molecule, unstable: tuple[int, ...]) -> str:
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return ""
    built = build(molecule)
    with rdBase.BlockLogs():
        try:
            if not unstable:
                Chem.SanitizeMol(built)
                drawn = Chem.RemoveHs(built)
            else:
                for atom in built.GetAtoms():
                    atom.SetNoImplicit(True)  # do not draw hydrogens that are missing
                built.UpdatePropertyCache(strict=False)
                drawn = built
            rdDepictor.Compute2DCoords(drawn)
            drawer = rdMolDraw2D.MolDraw2DSVG(*_SIZE)
            options: Any = drawer.drawOptions()
            options.clearBackground = False
            options.prepareMolsBeforeDrawing = False
            options.setHighlightColour((0.9, 0.25, 0.25, 0.45))
            drawer.DrawMolecule(drawn, highlightAtoms=unstable, highlightBonds=[])
            drawer.FinishDrawing()
        except (ValueError, RuntimeError):
            return ""
    text: str = drawer.GetDrawingText()
    text = text[text.index("<svg") :]
    for colour, variable in (("#000000", "ink"), ("#0000FF", "nitrogen"), ("#FF0000", "oxygen")):
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"<!--.*?-->|xmlns:rdkit='[^']*'", "", text, flags=re.DOTALL)
    return re.sub(r"width='\d+px' height='\d+px'", "role='img'", text, count=1)
