"""Block of a report with the distributions of geometry and composition."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.geometry import KINDS, UNITS
from molgen_energy.elements import symbol
from molgen_energy.metrics.distances.comparison import Distributions
from molgen_energy.metrics.report.html import SERIES, render
from molgen_energy.metrics.report.model import BlockContent, ReportBlock
from molgen_energy.metrics.results import MoleculeResults

# Placeholder colours, which the page replaces by CSS variables with a light and a dark value.
_TEXT, _MUTED, _DATA = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0404{k:02x}" for k in range(SERIES))
_LIGHT = {
    _TEXT: "#1f2933", _MUTED: "#8b97a3", _DATA: "#c9d2db", _SERIES[0]: "#2563c9",
    _SERIES[1]: "#d9651b", _SERIES[2]: "#1d8a5b", _SERIES[3]: "#9440c4", _SERIES[4]: "#b8860b",
    _SERIES[5]: "#c22f5c", _SERIES[6]: "#0e7f95", _SERIES[7]: "#6b5b3e",
}  # fmt: skip
_CSS_VARIABLES = {
    _TEXT: "var(--ink)",
    _MUTED: "var(--muted)",
    _DATA: "var(--data)",
    **{colour: f"var(--s{k})" for k, colour in enumerate(_SERIES)},
}
_BINS = 60


@dataclass(frozen=True)
class Histogram:
    """One plot: the reference's histogram and those of each file, in per cent."""

    title: str
    edges: NDArray[np.float64]  # (B+1,)
    reference: NDArray[np.float64]  # (B,)
    files: list[NDArray[np.float64]]  # of each file, (B,)
    unit: str
    ticks: list[str] | None = None  # names of the bins, for categories


def distributions_block(results: MoleculeResults, bonds: str = "") -> ReportBlock:
    """Plots of lengths, angles, dihedrals, sizes and elements, over those of the reference.

    Parameters
    ----------
    bonds
        `given` or `perceived`, where a page has a block of both.
    """
    names = [evaluation.name for evaluation in results.samples]
    data_name = results.reference.name
    prefix = f"{bonds}_" if bonds else ""

    def content() -> BlockContent:
        groups = histograms(results)
        html = render(
            "distributions.html.j2",
            names=names,
            data_name=data_name,
            types_name=results.reference.types.name,
            groups=[
                {"title": title, "plots": [Markup(plot_svg(plot, bonds)) for plot in plots]}
                for title, plots in groups.items()
            ],
        )
        pictures = {
            f"{prefix}{title.replace(' ', '_')}.png": plots_png(plots, names, f"data: {data_name}")
            for title, plots in groups.items()
        }
        return BlockContent(html, pictures)

    return ReportBlock(f"Distributions, bonds {bonds}" if bonds else "Distributions", content)


def histograms(results: MoleculeResults) -> dict[str, list[Histogram]]:
    """All plots, grouped under titles."""
    metrics, reference = results.options.metrics, results.reference
    every = [reference.distributions]
    every += [e.distributions for e in results.samples if e.distributions is not None]
    groups: dict[str, list[Histogram]] = {}
    if "geometry" in metrics:
        for kind in KINDS:
            plots = [_geometry(every, kind, name) for name in reference.types.types[kind]]
            groups[f"{kind}s"] = [plot for plot in plots if plot is not None]
    if "composition" in metrics:
        groups["composition"] = [_sizes(every), _elements(every)]
    if "descriptors" in metrics:
        drawn = [_descriptor(every, key) for key in DESCRIPTORS]
        groups["descriptors"] = [plot for plot in drawn if plot is not None]
    return {title: plots for title, plots in groups.items() if plots}


def _geometry(every: list[Distributions], kind: str, name: str) -> Histogram | None:
    reference, *files = [d.values(kind, name).value for d in every]
    present = [v for v in (reference, *files) if len(v)]
    if not present:
        return None
    if kind == "dihedral":
        low, high = -180.0, 180.0
    else:
        low = min(float(np.quantile(v, 0.002)) for v in present)
        high = max(float(np.quantile(v, 0.998)) for v in present)
        margin = 0.05 * (high - low) or 0.01 * max(1.0, abs(high))
        low, high = low - margin, high + margin
    edges = np.linspace(low, high, _BINS + 1, dtype=np.float64)
    shares = [_shares(v, edges) for v in (reference, *files)]
    return Histogram(name, edges, shares[0], shares[1:], UNITS[kind])


def _descriptor(every: list[Distributions], key: str) -> Histogram | None:
    reference, *files = [
        d.descriptors[key].value if key in d.descriptors else np.zeros(0, np.float32) for d in every
    ]
    present = [v for v in (reference, *files) if len(v)]
    if not present:
        return None
    whole = DESCRIPTORS[key].digits == 0
    low = min(float(v.min() if whole else np.quantile(v, 0.002)) for v in present)
    high = max(float(np.quantile(v, 0.998)) for v in present)
    if whole:
        # Bins of one or more whole numbers, each centred on them.
        step = max(1, round((high - low) / _BINS))
        edges = np.arange(low - 0.5, high + 0.5 + step, step, dtype=np.float64)
    else:
        margin = 0.05 * (high - low) or 0.01 * max(1.0, abs(high))
        edges = np.linspace(low - margin, high + margin, _BINS + 1, dtype=np.float64)
    shares = [_shares(v, edges) for v in (reference, *files)]
    label, unit = DESCRIPTORS[key].label, DESCRIPTORS[key].unit
    return Histogram(label, edges, shares[0], shares[1:], unit)


def _shares(values: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per cent of the values in each bin."""
    return 100 * np.histogram(values, edges)[0] / max(1, len(values))


def _sizes(every: list[Distributions]) -> Histogram:
    counts = [d.sizes.sum(axis=0) for d in every]
    present = np.flatnonzero(_padded_sum(counts))
    low, high = int(present.min(initial=0)), int(present.max(initial=1))
    shares = [_normalised(h, high + 1)[low:] for h in counts]
    edges = np.linspace(low - 0.5, high + 0.5, high - low + 2, dtype=np.float64)
    return Histogram("atoms in a molecule", edges, shares[0], shares[1:], "atoms")


def _elements(every: list[Distributions]) -> Histogram:
    counts = [d.elements.sum(axis=0) for d in every]
    present = np.flatnonzero(_padded_sum(counts))
    shares = [_normalised(h, len(h))[present] for h in counts]
    edges = np.linspace(-0.5, len(present) - 0.5, len(present) + 1, dtype=np.float64)
    names = [symbol(int(z)) for z in present]
    return Histogram("elements", edges, shares[0], shares[1:], "", names)


def _padded_sum(counts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    total = np.zeros(max(map(len, counts)), np.int64)
    for histogram in counts:
        total[: len(histogram)] += histogram
    return total


def _normalised(counts: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    """Per cent of each bin, cut or padded to a length."""
    padded = np.zeros(length)
    padded[: min(length, len(counts))] = counts[:length]
    shares: NDArray[np.float64] = 100 * padded / max(1, padded.sum())
    return shares


def _draw(axes: Any, plot: Histogram, colours: dict[str, str]) -> None:
    axes.stairs(plot.reference, plot.edges, fill=True, color=colours[_DATA], zorder=1)
    for k, shares in enumerate(plot.files):
        colour = colours[_SERIES[k % SERIES]]
        axes.stairs(shares, plot.edges, color=colour, linewidth=1.4, zorder=2)
    axes.set_title(plot.title, fontsize=10, color=colours[_TEXT], loc="left", pad=4)
    axes.set_xlabel(plot.unit, fontsize=8, color=colours[_MUTED], labelpad=1)
    axes.set_xlim(plot.edges[0], plot.edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    if plot.ticks is not None:
        axes.set_xticks(range(len(plot.ticks)), plot.ticks)
    elif plot.unit == "°" and plot.edges[0] == -180:
        axes.set_xticks([-180, -90, 0, 90, 180])
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.tick_params(colors=colours[_MUTED], labelsize=8, length=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours[_MUTED])


def plot_svg(plot: Histogram, block: str = "") -> str:
    """A plot as SVG with the page's CSS variables as colours.

    Parameters
    ----------
    block
        Tells apart plots of one title on a page.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title}):
        figure = Figure(figsize=(2.9, 1.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        _draw(axes, plot, {colour: colour for colour in _LIGHT})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    # Ids of clip paths must be unique on the page.
    salt = block + re.sub(r"\W", "", plot.title)
    text = re.sub(r'(id="|#)(p[0-9a-f]{10})', rf"\1{salt}\2", text)
    text = re.sub(r'\bid="(figure|axes|matplotlib|patch|xtick|ytick|text|line2d)[^"]*"', "", text)
    text = re.sub(r"font: ?([^;\"]*)", _page_font, text)
    for colour, variable in _CSS_VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _page_font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match[1])
    return f"font: {size[0] if size else '10px'} system-ui, sans-serif"


def plots_png(plots: list[Histogram], names: list[str], data_name: str) -> bytes:
    """Plots side by side as one PNG on white, with a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(4, len(plots))
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(3 * columns, 2 * rows + 0.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for k, plot in enumerate(plots):
        _draw(figure.add_subplot(rows, columns, k + 1), plot, _LIGHT)
    # Matplotlib reads dollars as formulas, and omits labels that begin with an underscore.
    data_name, *names = [f"\u200b{name}".replace("$", r"\$") for name in (data_name, *names)]
    handles: list[Any] = [Patch(color=_LIGHT[_DATA], label=data_name)]
    handles += [
        Line2D([], [], color=_LIGHT[_SERIES[k % SERIES]], label=name)
        for k, name in enumerate(names)
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
