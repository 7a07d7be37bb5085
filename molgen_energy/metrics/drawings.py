"""Pictures of a report: distributions over the reference, and molecules in two dimensions."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D

from molgen_energy.chemistry.geometry import KINDS, UNITS
from molgen_energy.chemistry.rdkit import CROWD, build, most_neighbours
from molgen_energy.data.molecules import Molecule, MoleculeChunk
from molgen_energy.elements import symbol
from molgen_energy.metrics.judging import unstable_atoms
from molgen_energy.metrics.report import Report

# Colours stand for CSS variables of the page, which differ in light and dark.
_INK, _MUTED, _DATA = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0404{k:02x}" for k in range(8))
LIGHT = {
    _INK: "#1f2933", _MUTED: "#8b97a3", _DATA: "#c9d2db", _SERIES[0]: "#2563c9",
    _SERIES[1]: "#d9651b", _SERIES[2]: "#1d8a5b", _SERIES[3]: "#9440c4", _SERIES[4]: "#b8860b",
    _SERIES[5]: "#c22f5c", _SERIES[6]: "#0e7f95", _SERIES[7]: "#6b5b3e",
}  # fmt: skip
VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _DATA: "var(--data)",
    **{colour: f"var(--s{k})" for k, colour in enumerate(_SERIES)},
}
SERIES = len(_SERIES)

_BINS = 60
_PICTURE = (280, 210)  # pixels of a molecule


@dataclass(frozen=True)
class Panel:
    """One plot: bins, the data's shares and those of each file."""

    title: str
    edges: NDArray[np.float64]  # (B+1,)
    data: NDArray[np.float64]  # (B,)
    series: list[NDArray[np.float64]]  # of each file, (B,)
    unit: str
    ticks: list[str] | None = None  # names of the bins, where they are categories


def panels(report: Report) -> dict[str, list[Panel]]:
    """All plots of a report, by what they show."""
    shown: dict[str, list[Panel]] = {}
    if "geometry" in report.options.metrics:
        for kind in KINDS:
            found = [
                _geometry_panel(report, kind, name) for name in report.reference.types.types[kind]
            ]
            shown[f"{kind}s"] = [panel for panel in found if panel is not None]
    if "composition" in report.options.metrics:
        shown["composition"] = [_sizes(report), _elements(report)]
    return {name: found for name, found in shown.items() if found}


def _geometry_panel(report: Report, kind: str, name: str) -> Panel | None:
    data, *series = [d.values(kind, name).value for d in _all_distributions(report)]
    present = [v for v in (data, *series) if len(v)]
    if not present:
        return None
    if kind == "dihedral":
        low, high = -180.0, 180.0
    else:
        low = min(float(np.quantile(v, 0.002)) for v in present)
        high = max(float(np.quantile(v, 0.998)) for v in present)
        room = 0.05 * (high - low) or 0.01 * max(1.0, abs(high))
        low, high = low - room, high + room
    edges = np.linspace(low, high, _BINS + 1, dtype=np.float64)
    return Panel(
        name, edges, _shares(data, edges), [_shares(v, edges) for v in series], UNITS[kind]
    )


def _shares(values: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per cent of the values in each bin."""
    return 100 * np.histogram(values, edges)[0] / max(1, len(values))


def _sizes(report: Report) -> Panel:
    histograms = [d.sizes.sum(axis=0) for d in _all_distributions(report)]
    present = np.flatnonzero(_padded_sum(histograms))
    low, high = int(present.min(initial=0)), int(present.max(initial=1))
    shares = [_of_histogram(h, high + 1)[low:] for h in histograms]
    edges = np.linspace(low - 0.5, high + 0.5, high - low + 2, dtype=np.float64)
    return Panel("atoms in a molecule", edges, shares[0], shares[1:], "atoms")


def _elements(report: Report) -> Panel:
    histograms = [d.elements.sum(axis=0) for d in _all_distributions(report)]
    present = np.flatnonzero(_padded_sum(histograms))
    shares = [_of_histogram(h, len(h))[present] for h in histograms]
    edges = np.linspace(-0.5, len(present) - 0.5, len(present) + 1, dtype=np.float64)
    names = [symbol(int(z)) for z in present]
    return Panel("elements", edges, shares[0], shares[1:], "", names)


def _all_distributions(report: Report) -> list[Any]:
    return [report.reference.distributions, *(e.distributions for e in report.samples)]


def _padded_sum(histograms: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    total = np.zeros(max(map(len, histograms)), np.int64)
    for histogram in histograms:
        total[: len(histogram)] += histogram
    return total


def _of_histogram(histogram: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    padded = np.zeros(length)
    padded[: min(length, len(histogram))] = histogram[:length]
    shares: NDArray[np.float64] = 100 * padded / max(1, padded.sum())
    return shares


def _draw(axes: Any, panel: Panel, colours: dict[str, str]) -> None:
    axes.stairs(panel.data, panel.edges, fill=True, color=colours[_DATA], zorder=1)
    for k, shares in enumerate(panel.series):
        colour = colours[_SERIES[k % SERIES]]
        axes.stairs(shares, panel.edges, color=colour, linewidth=1.4, zorder=2)
    axes.set_title(panel.title, fontsize=10, color=colours[_INK], loc="left", pad=4)
    axes.set_xlabel(panel.unit, fontsize=8, color=colours[_MUTED], labelpad=1)
    axes.set_xlim(panel.edges[0], panel.edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    if panel.ticks is not None:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
    elif panel.unit == "°" and panel.edges[0] == -180:
        axes.set_xticks([-180, -90, 0, 90, 180])
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.tick_params(colors=colours[_MUTED], labelsize=8, length=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours[_MUTED])


def panel_svg(panel: Panel) -> str:
    """A plot as SVG for a page that defines the colours."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(2.9, 1.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        _draw(axes, panel, {colour: colour for colour in LIGHT})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    # Names of clip paths are the page's: they must differ from plot to plot.
    salt = re.sub(r"\W", "", panel.title)
    text = re.sub(r'(id="|#)(p[0-9a-f]{10})', rf"\1{salt}\2", text)
    text = re.sub(r'\bid="(figure|axes|matplotlib|patch|xtick|ytick|text|line2d)[^"]*"', "", text)
    text = re.sub(r"font: ?([^;\"]*)", _own_font, text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _own_font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match[1])
    return f"font: {size[0] if size else '10px'} system-ui, sans-serif"


def panels_png(shown: list[Panel], names: list[str], data_name: str) -> bytes:
    """Plots side by side as one picture on white, with a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3 * columns, 2 * rows + 0.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for k, panel in enumerate(shown):
        _draw(figure.add_subplot(rows, columns, k + 1), panel, LIGHT)
    # A dollar would begin a formula, and a legend leaves out what begins with an underscore.
    data_name, *names = [f"\u200b{name}".replace("$", r"\$") for name in (data_name, *names)]
    handles: list[Any] = [Patch(color=LIGHT[_DATA], label=data_name)]
    handles += [
        Line2D([], [], color=LIGHT[_SERIES[k % SERIES]], label=name) for k, name in enumerate(names)
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw_piece(piece: MoleculeChunk, valence: str | None) -> list[str]:
    """Molecules in two dimensions as SVG; empty where RDKit cannot draw one.

    Unstable atoms are marked (see `unstable_atoms` for `valence`).
    """
    return [_drawing(molecule, valence) for molecule in piece.molecules]


def not_drawn(piece: MoleculeChunk, reason: str) -> list[str]:
    """Molecules that RDKit came to no end with."""
    return [""] * len(piece)


def _drawing(molecule: Molecule, valence: str | None) -> str:
    if most_neighbours(molecule) > CROWD:
        return ""
    bad = unstable_atoms(molecule, valence)
    built = build(molecule)
    with rdBase.BlockLogs():
        try:
            if not bad:
                Chem.SanitizeMol(built)
                drawn = Chem.RemoveHs(built)
            else:
                for atom in built.GetAtoms():
                    atom.SetNoImplicit(True)  # what is missing must not be drawn
                built.UpdatePropertyCache(strict=False)
                drawn = built
            rdDepictor.Compute2DCoords(drawn)
            drawer = rdMolDraw2D.MolDraw2DSVG(*_PICTURE)
            options: Any = drawer.drawOptions()
            options.clearBackground = False
            options.prepareMolsBeforeDrawing = False
            options.setHighlightColour((0.9, 0.25, 0.25, 0.45))
            drawer.DrawMolecule(drawn, highlightAtoms=bad, highlightBonds=[])
            drawer.FinishDrawing()
        except (ValueError, RuntimeError):
            return ""
    text: str = drawer.GetDrawingText()
    text = text[text.index("<svg") :]
    for colour, variable in (("#000000", "ink"), ("#0000FF", "nitrogen"), ("#FF0000", "oxygen")):
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"<!--.*?-->|xmlns:rdkit='[^']*'", "", text, flags=re.DOTALL)
    return re.sub(r"width='\d+px' height='\d+px'", "role='img'", text, count=1)
