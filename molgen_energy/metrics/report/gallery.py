"""Block of a report with random molecules in two and three dimensions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor

from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours, short_smiles
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.display.html import script_value
from molgen_energy.display.molecules import molecular_formula, viewer_model
from molgen_energy.metrics.accumulator import EvaluationAccumulator, SelectedMolecule
from molgen_energy.metrics.report.html import render
from molgen_energy.metrics.report.model import BlockContent, ReportBlock
from molgen_energy.workers import WorkerPool

_SIZE = (280, 210)  # pixels


def gallery_block(
    accumulators: Mapping[str, EvaluationAccumulator], open_pool: Callable[[], WorkerPool]
) -> ReportBlock:
    """Random molecules of each file that pass all checks, and that fail some.

    Parameters
    ----------
    accumulators
        Of the files, by the name that stands above their molecules.
    open_pool
        Starts the processes that draw the molecules, since RDKit can hang.
    """

    def content() -> BlockContent:
        galleries: list[dict[str, Any]] = []
        models: list[dict[str, Any]] = []
        with open_pool() as workers:
            for name, accumulator in accumulators.items():
                for title, selected in (
                    ("passing all checks", list(accumulator.gallery_passing)),
                    ("failing a check", accumulator.gallery_failing()),
                ):
                    cards = _cards(selected, workers, len(models))
                    models += [viewer_model(s.molecule, s.unstable_atoms) for s in selected]
                    galleries.append({"title": f"{name}: {title}", "cards": cards})
        data = script_value(models)
        return BlockContent(render("gallery.html.j2", galleries=galleries, models=data))

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
            "smiles": shown_smiles(item.smiles, bool(item.failure_reasons)),
            "formula": molecular_formula(item.molecule),
            "failure_reasons": item.failure_reasons,
            "drawing": Markup(svg),
        }
        for k, (item, svg) in enumerate(zip(selected, drawings, strict=True))
    ]


def shown_smiles(smiles: str | None, fails: bool) -> str:
    """A SMILES with implicit hydrogens, or as it is if the molecule fails a check."""
    if smiles is None or fails:
        return smiles or ""
    return short_smiles(smiles)


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
    from rdkit.Chem.Draw import rdMolDraw2D  # imports much of RDKit

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
