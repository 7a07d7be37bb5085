"""Molecules in three dimensions, as HTML with its own script: no network, no other package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from molgen_energy.data.molecules import AROMATIC, Molecule
from molgen_energy.display.html import render, script_value
from molgen_energy.elements import symbol

_DRAWING = 220  # size of a static drawing, in units of its own
_TILT = (0.25, 0.35)  # of the first view about x and y, as in `viewer.js`
_COLOURS = {
    "H": "#e8edf1", "B": "#f0aaa2", "C": "#5a6570", "N": "#3f62e0", "O": "#dd3b33", "F": "#5fb84a",
    "Si": "#d8b48c", "P": "#e0862b", "S": "#d9b52c", "Cl": "#2fa84f", "Br": "#99402f",
    "I": "#7b3fa6",
}  # fmt: skip
_OTHER = "#c05fb0"


@dataclass(frozen=True)
class ShownMolecule:
    """One molecule of a view, and the text below it."""

    title: str
    molecule: Molecule | None = None
    """None if there is nothing to draw; `problem` says why."""
    problem: str = ""
    smiles: str = ""
    good: tuple[str, ...] = ()
    """Checks that it passes, a few words each."""
    bad: tuple[str, ...] = ()
    """Checks that it fails."""
    properties: tuple[str, ...] = ()
    """Properties, such as `gap 0.25 eV`."""
    unstable_atoms: tuple[int, ...] = field(default=())
    """Atoms that get a red ring, counted from 0."""


def molecules_html(
    molecules: Sequence[ShownMolecule], head: str = "", note: str = "", per_page: int = 6
) -> str:
    """Molecules that rotate by dragging, in a grid with pages.

    Without JavaScript, the first page is there as drawings. All text is escaped.

    Parameters
    ----------
    head, note
        Text above the molecules, the second in a quiet colour.
    per_page
        Molecules on a page.
    """
    models = [_model(shown) for shown in molecules]
    data = script_value(models)
    first = list(molecules[:per_page])
    return render(
        "molecules.html.j2",
        key=blake2b(data.encode(), digest_size=8).hexdigest(),
        molecules=models,
        drawings=[_drawing(shown) for shown in first],
        data=data,
        head=head,
        note=note,
        per_page=per_page,
    )


def molecular_formula(molecule: Molecule) -> str:
    """Molecular formula in Hill order: carbon, hydrogen, then alphabetically."""
    symbols = [symbol(z) for z in molecule.atomic_numbers.tolist()]
    first = {"C": 0, "H": 1} if "C" in symbols else {}
    order = sorted(set(symbols), key=lambda s: (first.get(s, 2), s))
    return "".join(s + (str(symbols.count(s)) if symbols.count(s) > 1 else "") for s in order)


def viewer_model(molecule: Molecule, unstable_atoms: Sequence[int] = ()) -> dict[str, Any]:
    """What `viewer.js` draws: positions around 0 in Å, elements, charges, bonds, unstable atoms."""
    bonds: list[list[int]] = []
    if molecule.bond_index is not None and molecule.bond_order is not None:
        orders = molecule.bond_order.tolist()
        bonds = [[i, j, k] for (i, j), k in zip(molecule.bond_index.tolist(), orders, strict=True)]
    charges = molecule.formal_charges
    return {
        "positions": np.round(_oriented(molecule), 3).tolist(),
        "elements": [symbol(z) for z in molecule.atomic_numbers.tolist()],
        "charges": [] if charges is None or not charges.any() else charges.tolist(),
        "bonds": bonds,
        "unstable": list(unstable_atoms),
    }


def _oriented(molecule: Molecule) -> NDArray[np.float64]:
    """Positions around 0, turned so that the longest extent is along x and the shortest along z."""
    positions = molecule.positions.astype(np.float64)
    centred = positions - positions.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    axes *= np.where(((centred @ axes) ** 3).sum(axis=0) < 0, -1, 1)  # eigenvectors have no sign
    axes[:, 2] *= np.linalg.det(axes)  # a rotation, no reflection
    turned: NDArray[np.float64] = centred @ axes
    return turned


def _first_view(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    (c, s), (d, t) = ((np.cos(angle), np.sin(angle)) for angle in _TILT)
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_y = np.array([[d, 0, t], [0, 1, 0], [-t, 0, d]])
    turned: NDArray[np.float64] = positions @ (about_x @ about_y).T
    return turned


def _model(shown: ShownMolecule) -> dict[str, Any]:
    text = {
        "title": shown.title,
        "problem": shown.problem,
        "smiles": shown.smiles,
        "good": list(shown.good),
        "bad": list(shown.bad),
        "properties": list(shown.properties),
    }
    if shown.molecule is None:
        empty: dict[str, Any] = {"positions": [], "elements": [], "bonds": [], "unstable": []}
        return text | empty | {"formula": ""}
    formula = molecular_formula(shown.molecule)
    return text | {"formula": formula} | viewer_model(shown.molecule, shown.unstable_atoms)


def _bond_colour(element: str) -> str:
    """That of the atom, but darker for hydrogen, which has no outline here."""
    return "#a9b4be" if element == "H" else _COLOURS.get(element, _OTHER)


def _drawing(shown: ShownMolecule) -> Markup:
    """The molecule as SVG without a script, seen as in the first view of `viewer.js`."""
    molecule = shown.molecule
    if molecule is None:
        return Markup("")
    turned = _first_view(_oriented(molecule))
    extent = max(1.2, float(np.linalg.norm(turned, axis=1).max())) + 0.6
    scale = _DRAWING / 2 / extent
    x, y = _DRAWING / 2 + turned[:, 0] * scale, _DRAWING / 2 - turned[:, 1] * scale
    names = [symbol(z) for z in molecule.atomic_numbers.tolist()]
    colours = [_COLOURS.get(name, _OTHER) for name in names]
    shapes: list[tuple[float, str]] = []
    if molecule.bond_index is not None and molecule.bond_order is not None:
        for (i, j), order in zip(
            molecule.bond_index.tolist(), molecule.bond_order.tolist(), strict=True
        ):
            width = 0.15 * scale * (1.6 if order in (2, 3, AROMATIC) else 1)
            middle = (x[i] + x[j]) / 2, (y[i] + y[j]) / 2
            lines = "".join(
                f'<line x1="{x[k]:.1f}" y1="{y[k]:.1f}" x2="{middle[0]:.1f}" y2="{middle[1]:.1f}" '
                f'stroke="{_bond_colour(names[k])}" stroke-width="{width:.1f}"/>'
                for k in (i, j)
            )
            shapes.append(((turned[i, 2] + turned[j, 2]) / 2 - 0.05, lines))
    for k, name in enumerate(names):
        size = (0.24 if name == "H" else 0.36) * scale
        ring = "#d64540" if k in shown.unstable_atoms else "#55606b"
        shapes.append(
            (
                turned[k, 2],
                f'<circle cx="{x[k]:.1f}" cy="{y[k]:.1f}" r="{size:.1f}" fill="{colours[k]}" '
                f'stroke="{ring}"/>',
            )
        )
    drawn = "".join(text for _, text in sorted(shapes, key=lambda shape: shape[0]))
    # Every part is a number or a colour of this file: nothing to escape.
    return Markup(f'<svg viewBox="0 0 {_DRAWING} {_DRAWING}" role="img">{drawn}</svg>')
