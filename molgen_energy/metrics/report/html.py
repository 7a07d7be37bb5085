"""The report as a folder: a page that opens offline, the metrics as JSON, pictures as PNG."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from molgen_energy import __version__
from molgen_energy.display.html import display_templates
from molgen_energy.metrics.report.table import metric_text, real_text, uncertainty
from molgen_energy.output import atomic_write, display_path, remove_leftovers

if TYPE_CHECKING:
    import jinja2

    from molgen_energy.metrics.report.model import EvaluatedFile, MetricValue, Report, ReportColumn

PAGE, VALUES = "report.html", "report.json"
SERIES = 8
"""Number of colours for files, `--s0` to `--s7` in the page's style."""


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.html`, `report.json` and the pictures; returns the page's path.

    Adds file names and checksums to the report's provenance.

    Parameters
    ----------
    folder
        Created if it does not exist; other files in it are kept.
    """
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    for file in report.files:
        if file.path is not None and "SHA-256" not in file.provenance:
            file.provenance = {
                "file": display_path(Path(file.path.name)),
                "SHA-256": _sha256(file.path),
            } | file.provenance
    blocks = [(block.title, block.content()) for block in report.blocks]
    for _, content in blocks:
        for name, picture in content.pictures.items():
            atomic_write(folder / name, picture, own=True)
    values = json.dumps(report.to_dict(), indent=2) + "\n"
    atomic_write(folder / VALUES, values.encode(), own=True)
    page = render(
        "report.html.j2",
        report=report,
        columns=_columns(report),
        sections=_sections(report),
        uncertainty=uncertainty(report),
        blocks=[{"title": title, "html": Markup(content.html)} for title, content in blocks],
        provenance=[_provenance(file) for file in report.files if file.provenance],
        settings=_settings(report),
        version=__version__,
    )
    atomic_write(folder / PAGE, page.encode(), own=True)
    return folder / PAGE


def notebook_html(report: Report) -> str:
    """The table, the most frequent failures and the notes, in the colours of a notebook.

    It needs no network and has no script; text of files is escaped.
    """
    # Hints are options of the command line: in Python they are arguments.
    sections = _sections(report)
    for section in sections:
        for item in section["rows"]:
            option, _, value = item["row"].hint.partition(" ")
            is_option = option.startswith("--")
            item["hint"] = f'{option[2:]}="{value}"' if is_option else item["row"].hint
    return render(
        "notebook.html.j2",
        report=report,
        columns=_columns(report),
        sections=sections,
        uncertainty=uncertainty(report),
    )


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader("molgen_energy.metrics.report", "templates"),
                display_templates(),
            ]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["series"] = SERIES
    return environment


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder `templates`."""
    return _environment().get_template(template).render(**values)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _columns(report: Report) -> list[dict[str, Any]]:
    """Headers of the table: name, label, count, and the number of the file for its colour."""
    found: list[dict[str, Any]] = []
    for number, file in enumerate(report.files):
        for column in file.columns:
            header = {"name": file.name, "label": column.label, "count": f"{file.count:,}"}
            found.append(header | {"series": number % SERIES, "is_reference": False})
    if report.reference is not None:
        data = report.reference
        for column in data.columns:
            header = {"name": f"data: {data.name}", "label": column.label}
            header |= {"count": f"{data.count:,}"}
            found.append(header | {"series": None, "is_reference": True})
    return found


def _sections(report: Report) -> list[dict[str, Any]]:
    columns: list[ReportColumn] = [column for entry in report.entries for column in entry.columns]
    return [
        {
            "title": section.title,
            "rows": [
                {
                    "row": row,
                    "cells": [_cell(c.metrics.get(row.key), row.show_count) for c in columns],
                }
                for row in section.rows
            ],
        }
        for section in report.sections
    ]


def _cell(metric: MetricValue | None, show_count: bool) -> tuple[str, str, str]:
    """The value, its uncertainty or note, and the range of real molecules."""
    value, _, rest = metric_text(metric, show_count).partition(" ")
    return value, rest, real_text(metric)


def _provenance(file: EvaluatedFile) -> dict[str, Any]:
    long = {key: text for key, text in file.provenance.items() if "\n" in text}
    short = {key: text for key, text in file.provenance.items() if "\n" not in text}
    return {"name": file.name, "short": short, "long": long}


def _settings(report: Report) -> dict[str, str]:
    versions = {
        "molgen-energy": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    return versions | {
        setting.label: str(setting.value) if setting.text is None else setting.text
        for setting in report.settings
    }
