"""Figures of a file of samples, as a table, as JSON, and as a page: for every system alike.

Molecules have a report of their own (`molgen_energy.metrics.report`).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.markup import escape
from rich.table import Table

from molgen_energy import __version__
from molgen_energy.metrics.rates import Mean, Rate
from molgen_energy.output import atomic_write, display_path


@dataclass(frozen=True)
class Derived:
    """A number with its 95 % interval."""

    value: float
    interval: tuple[float, float] | None = None


Cell = Mean | Rate | Derived | None


@dataclass(frozen=True)
class Row:
    """A measure and its values, one for each column."""

    key: str
    label: str
    meaning: str
    cells: Sequence[Cell]


@dataclass
class Scores:
    """What is found about a file.

    ``pictures``: PNG by name, drawn when asked for.
    """

    name: str
    system: str
    samples: str
    """What there are many of."""
    count: int
    columns: tuple[str, ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    provenance: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def row(self, key: str) -> Row:
        """The row of a measure."""
        return next(row for row in self.rows if row.key == key)


def cell_text(cell: Cell) -> tuple[str, str]:
    """A value and its error or interval, as text."""
    if cell is None or cell.value is None:
        return "–", ""
    if isinstance(cell, Mean):
        return f"{cell.value:.4g}", f"± {cell.error:.2g}" if math.isfinite(cell.error) else ""
    factor, form = (100.0, "{:.1f}") if isinstance(cell, Rate) else (1.0, "{:.4g}")
    interval = cell.interval
    shown = "" if interval is None else ", ".join(form.format(factor * x) for x in interval)
    unit = " %" if isinstance(cell, Rate) else ""
    return form.format(factor * cell.value) + unit, f"[{shown}]" if shown else ""


def table(scores: Scores) -> Table:
    """For people: a row for each measure, a column for each thing that is judged."""
    shown = Table(
        title=escape(
            f"{scores.name}: {scores.count:,} {scores.samples}; "
            "value ± standard error or [95 % interval]"
        ),
        title_justify="left",
    )
    shown.add_column("", overflow="fold")
    for column in scores.columns:
        shown.add_column(escape(column), justify="right", overflow="fold")
    for row in scores.rows:
        shown.add_row(row.label, *(escape(" ".join(cell_text(c)).strip()) for c in row.cells))
    return shown


def as_json(found: Sequence[Scores]) -> dict[str, Any]:
    """For programs."""
    return {
        "created_by": f"molgen-energy {__version__}",
        "numpy": np.__version__,
        "files": [
            {
                "name": scores.name,
                "system": scores.system,
                scores.samples: scores.count,
                "notes": scores.notes,
                "provenance": dict(scores.provenance),
                "metrics": {
                    row.key: {
                        column: _plain(cell)
                        for column, cell in zip(scores.columns, row.cells, strict=True)
                    }
                    for row in scores.rows
                },
            }
            for scores in found
        ],
    }


def _plain(cell: Cell) -> dict[str, Any] | None:
    if cell is None or cell.value is None:
        return None
    interval = cell.interval
    plain: dict[str, Any] = {
        "value": _finite(cell.value),
        "interval": None if interval is None else [_finite(x) for x in interval],
    }
    if isinstance(cell, Rate):
        plain |= {"count": cell.count, "total": cell.total}
    elif isinstance(cell, Mean):
        plain |= {"standard_error": _finite(cell.error)}
    return plain


def _finite(value: float) -> float | None:
    """What JSON has a word for."""
    return value if math.isfinite(value) else None


def write_report(found: Sequence[Scores], folder: Path) -> Path:
    """Write `report.html`, `report.json` and the pictures; returns the page.

    `folder` is made where it is not there; other files in it stay.
    """
    folder.mkdir(exist_ok=True)
    shown = []
    for number, scores in enumerate(found):
        pictures = []
        for name, draw in scores.pictures.items():
            content = draw()
            prefix = f"{number + 1}_" if len(found) > 1 else ""
            atomic_write(folder / f"{prefix}{name}.png", content)
            pictures.append({"name": name, "data": base64.b64encode(content).decode()})
        shown.append({"scores": scores, "pictures": pictures})
    loader = jinja2.PackageLoader("molgen_energy.metrics", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = cell_text
    page = environment.get_template("scores.html.j2").render(files=shown, version=__version__)
    atomic_write(folder / "report.json", (json.dumps(as_json(found), indent=2) + "\n").encode())
    atomic_write(folder / "report.html", page.encode())
    return folder / "report.html"


def file_name(path: Path) -> str:
    """A file's name as it can be shown."""
    return display_path(Path(path.name))
