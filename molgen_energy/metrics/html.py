"""The report as a folder: one page that opens offline, the numbers as JSON, pictures as PNG."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from rdkit import Chem, rdBase

from molgen_energy import __version__
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.elements import symbol
from molgen_energy.metrics.drawings import (
    SERIES,
    draw_piece,
    not_drawn,
    panel_svg,
    panels,
    panels_png,
)
from molgen_energy.metrics.evaluation import Evaluation
from molgen_energy.metrics.findings import Specimen
from molgen_energy.metrics.judging import unstable_atoms
from molgen_energy.metrics.report import Report, as_json, figure_text, findings_text
from molgen_energy.output import atomic_write, display_path
from molgen_energy.workers import WorkerPool

PAGE = "report.html"


def write_report(report: Report, folder: Path, files: list[Path], workers: WorkerPool) -> Path:
    """Write `report.html`, `report.json` and a PNG for each kind of plot; returns the page.

    Parameters
    ----------
    folder
        Is made where it is not there; other files in it stay.
    files
        The files that were evaluated, in the report's order, for their checksums.
    workers
        Draw the molecules.
    """
    folder.mkdir(exist_ok=True)
    shown = panels(report)
    for evaluation, path in zip(report.samples, files, strict=True):
        evaluation.provenance = {
            "file": display_path(Path(path.name)),
            "SHA-256": _sha256(path),
        } | evaluation.provenance
    names = [evaluation.name for evaluation in report.samples]
    for title, found in shown.items():
        picture = panels_png(found, names, f"data: {report.reference.name}")
        atomic_write(folder / f"{title.replace(' ', '_')}.png", picture)
    atomic_write(folder / "report.json", (json.dumps(as_json(report), indent=2) + "\n").encode())
    atomic_write(folder / PAGE, _page(report, shown, workers).encode())
    return folder / PAGE


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _page(report: Report, shown: dict[str, Any], workers: WorkerPool) -> str:
    loader = jinja2.PackageLoader("molgen_energy.metrics", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    settings = report.options.settings
    valence = settings.valence if settings.bonds == "given" else None
    galleries = []
    specimens: list[dict[str, Any]] = []
    for evaluation in report.samples:
        parts = []
        for title, chosen in (
            ("Nothing wrong with them", list(evaluation.findings.shown_good)),
            ("Something wrong with them", evaluation.findings.bad_specimens()),
        ):
            cards = _cards(chosen, workers, len(specimens), valence)
            specimens += [card.pop("model") for card in cards]
            parts.append({"title": title, "cards": cards})
        galleries.append({"name": evaluation.name, "parts": parts})
    return environment.get_template("report.html.j2").render(
        names=[e.name for e in report.samples],
        data_name=report.reference.name,
        molecules=[f"{e.molecules:,}" for e in report.columns],
        sections=_sections(report),
        notes=report.warnings(),
        findings=[
            {"name": e.name, "lines": findings_text(e)} for e in report.samples if findings_text(e)
        ],
        plots=[
            {"title": title, "panels": [Markup(panel_svg(panel)) for panel in found]}
            for title, found in shown.items()
        ],
        types_name=report.reference.types.name,
        galleries=galleries,
        specimens=Markup(json.dumps(specimens, separators=(",", ":")).replace("<", "\\u003c")),
        provenance=[_provenance(e) for e in report.samples],
        about=_about(report),
        series=SERIES,
        version=__version__,
    )


def _sections(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "title": section.title,
            "rows": [
                {
                    "label": row.label,
                    "meaning": row.meaning,
                    "hint": report.hint(row),
                    "cells": [
                        _cell(figure_text(report.figure(e, row.key), row.unit))
                        for e in report.columns
                    ],
                }
                for row in section.rows
            ],
        }
        for section in report.sections()
    ]


def _cell(text: str) -> tuple[str, str]:
    """The value, and its interval or note."""
    value, _, rest = text.partition(" ")
    return value, rest


def _cards(
    chosen: list[Specimen], workers: WorkerPool, first: int, valence: str | None
) -> list[dict[str, Any]]:
    if not chosen:
        return []
    records = np.array([s.record for s in chosen], np.int64)
    piece = MoleculeChunk(records, Molecules.from_list([s.molecule for s in chosen]))
    draw = partial(draw_piece, valence=valence)
    drawn: list[str] = []
    for _, part in workers.map(draw, piece.parts(1), not_drawn):
        drawn += part
    return [
        {
            "number": first + k,
            "record": specimen.record,
            "name": _short(specimen),
            "formula": _formula(specimen),
            "reasons": specimen.reasons,
            "drawing": Markup(svg),
            "model": _model(specimen, valence),
        }
        for k, (specimen, svg) in enumerate(zip(chosen, drawn, strict=True))
    ]


def _short(specimen: Specimen) -> str:
    """SMILES; without hydrogens where none is missing."""
    if specimen.name is None:
        return ""
    if specimen.reasons:
        return specimen.name
    return str(Chem.MolToSmiles(Chem.MolFromSmiles(specimen.name)))


def _formula(specimen: Specimen) -> str:
    """Hill's order: carbon, hydrogen, then by the alphabet."""
    symbols = [symbol(z) for z in specimen.molecule.atomic_numbers.tolist()]
    order = sorted(set(symbols), key=lambda s: ({"C": 0, "H": 1}.get(s, 2), s))
    return "".join(s + (str(symbols.count(s)) if symbols.count(s) > 1 else "") for s in order)


def _model(specimen: Specimen, valence: str | None) -> dict[str, Any]:
    """What the page turns in three dimensions: positions in Å, symbols, bonds, atoms at fault."""
    molecule = specimen.molecule
    positions = molecule.positions.astype(np.float64)
    centred = positions - positions.mean(axis=0)
    bonds: list[list[int]] = []
    if molecule.bond_index is not None and molecule.bond_order is not None:
        orders = molecule.bond_order.tolist()
        bonds = [[i, j, k] for (i, j), k in zip(molecule.bond_index.tolist(), orders, strict=True)]
    return {
        "p": np.round(centred, 3).tolist(),
        "e": [symbol(z) for z in molecule.atomic_numbers.tolist()],
        "b": bonds,
        "w": unstable_atoms(molecule, valence),
    }


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    long = {k: v for k, v in evaluation.provenance.items() if "\n" in v}
    short = {k: v for k, v in evaluation.provenance.items() if "\n" not in v}
    # What the writer says of the first molecule alone is no provenance of the file.
    for name in ("molecule", "status", "fragments"):
        short.pop(name, None)
    return {
        "name": evaluation.name,
        "short": short | {"bonds": evaluation.bonds},
        "long": long,
    }


def _about(report: Report) -> dict[str, str]:
    settings = report.options.settings
    return {
        "molgen-energy": __version__,
        "RDKit": rdBase.rdkitVersion,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "reference": report.reference.name,
        "novelty against": report.novelty_against,
        "metrics": ", ".join(sorted(report.options.metrics)),
        "bonds": settings.bonds,
        "valences of bonds in the file": settings.valence,
        "angles": settings.counting,
        "types of geometry": report.reference.types.name,
        "molecules for strain and PoseBusters": f"{report.options.drawn:,} at most",
    }
