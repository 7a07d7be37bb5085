"""The table of `sample --tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from molgen_energy.metrics.statistics import Estimate, Rate
    from molgen_energy.systems.molecules.tuning import JudgedSampler, TuningResult

_UNITS = {"bond length": "Å", "angle": "°", "dihedral": "°"}
_WIDE = 150
"""Columns from which on distances have their intervals too."""


def tuning_table(result: TuningResult, width: int) -> Table:
    """All candidates, the best first, below the real molecules.

    Parameters
    ----------
    width
        Columns of the terminal.
    """
    title = f"judged by {result.data}; 95 % intervals"
    caption = (
        "stable: molecules; atoms: stable atoms; the rest: Wasserstein distances from the training "
        "molecules. The best sampler comes nearest to the data in stability. Too far: a distance "
        "is above its limit, relative to the sampler so far"
    )
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("sampler")
    for name in ("n", "stable, %", "atoms, %", *(f"{k}s, {u}" for k, u in _UNITS.items())):
        table.add_column(name, justify="right")
    for judged in (result.real, *result.candidates):
        chosen = judged is result.chosen
        table.add_row(*_cells(judged, width >= _WIDE), style="bold" if chosen else None)
    return table


def _cells(judged: JudgedSampler, wide: bool) -> list[str]:
    choice = judged.choice
    name = "data"
    if choice is not None:
        name = ", ".join(filter(None, (choice.sampler, choice.label, choice.noise)))
        name += "" if judged.near else ", too far"
    return [
        name,
        f"{judged.molecules:,}",
        _share(judged.molecule_stability, True),
        _share(judged.atom_stability, wide),
        *(_distance(judged.distances[kind], wide) for kind in _UNITS),
    ]


def _share(rate: Rate, wide: bool) -> str:
    value, interval = rate.value, rate.interval
    if value is None or interval is None:
        return "n/a"
    ends = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if wide else ""
    return f"{100 * value:.1f}{ends}"


def _distance(estimate: Estimate, wide: bool) -> str:
    if estimate.value is None:
        return "n/a"
    ends = estimate.interval if wide else None
    return f"{estimate.value:.2g}" + (f" [{ends[0]:.2g}, {ends[1]:.2g}]" if ends else "")
