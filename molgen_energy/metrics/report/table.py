"""The report as tables for the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from molgen_energy.metrics.statistics import Estimate, Mean, Rate
from molgen_energy.output import printable

if TYPE_CHECKING:
    from molgen_energy.metrics.report.model import EvaluatedFile, MetricValue, Report, ReportColumn

_UNLIMITED = 100_000  # characters in a line


def tables(report: Report, console: Console) -> list[Table]:
    """Tables with the columns of each file and, last, of the reference.

    Files that do not fit side by side on the console come in several tables, each with as many
    files as fit, at least one, and the reference. A file with several columns has its own table.
    """
    unlimited = console.options.update(max_width=_UNLIMITED)
    found: list[Table] = []
    rest = report.files
    while rest:
        count = 1 if any(len(file.columns) > 1 for file in rest) else len(rest)
        while count > 1:
            needed = Measurement.get(console, unlimited, _table(report, rest[:count])).maximum
            if needed <= console.width:
                break
            count -= 1
        found.append(_table(report, rest[:count]))
        rest = rest[count:]
    return found


def plain_tables(report: Report, width: int) -> str:
    """The tables as text without colours."""
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    for table in tables(report, console):
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(map(printable, text.rstrip("\n").split("\n")))


def _table(report: Report, files: list[EvaluatedFile]) -> Table:
    several = len(files[0].columns) > 1
    title = f"value {uncertainty(report)}"
    shown = Table(title=escape(f"{files[0].name}: {title}" if several else title))
    shown.title_justify = "left"
    shown.add_column("", overflow="fold")
    columns: list[tuple[EvaluatedFile, ReportColumn]] = []
    for file in files:
        for column in file.columns:
            names = (column.label,) if several else (file.name, column.label)
            header = escape("\n".join(filter(None, names)))
            shown.add_column(header, justify="right", overflow="fold")
            columns.append((file, column))
    if report.reference is not None:
        header = escape(f"data: {report.reference.name}")
        shown.add_column(header, justify="right", style="dim")
        columns.append((report.reference, report.reference.columns[0]))
    shown.add_row(report.samples, *(f"{file.count:,}" for file, _ in columns), end_section=True)
    for section in report.sections:
        indent = ""
        if section.title:
            indent = "  "
            shown.add_row(f"[bold]{section.title}[/]", *([""] * len(columns)))
        for row in section.rows:
            remarks = (f"\n  {indent}[dim]{escape(t)}[/]" for t in (row.hint, row.note) if t)
            values = (_cell(column.metrics.get(row.key), row.show_count) for _, column in columns)
            shown.add_row(
                f"{indent}{escape(row.heading)}{''.join(remarks)}",
                *values,
                end_section=row is section.rows[-1],
            )
    return shown


def _cell(metric: MetricValue | None, show_count: bool) -> str:
    real = real_text(metric)
    return escape(metric_text(metric, show_count)) + (f"\n[dim]{escape(real)}[/]" if real else "")


def uncertainty(report: Report) -> str:
    """What stands beside the values: intervals, standard errors, or both, and ranges below."""
    metrics = [
        metric
        for file in report.files
        for column in file.columns
        for metric in column.metrics.values()
        if metric is not None
    ]
    kinds = {isinstance(metric, Mean) for metric in metrics}
    texts = {True: "± standard error", False: "[95 % interval]"}
    found = " or ".join(texts[kind] for kind in (True, False) if kind in kinds)
    if any(real_text(metric) for metric in metrics):
        found += f"; second line: where 95 % of equally large sets of real {report.samples} lie"
    return found


def metric_text(metric: MetricValue | None, show_count: bool = False) -> str:
    """A value with its uncertainty, or n/a; rates in per cent.

    Bounds of an interval have two significant digits, or as many as it takes to tell them apart.

    Parameters
    ----------
    show_count
        Whether to add the number of samples.
    """
    if metric is None or metric.value is None:
        note = metric.note if isinstance(metric, Estimate) else ""
        return "n/a" if not note or note.startswith("pip ") else f"n/a ({note})"
    if isinstance(metric, Mean):
        error = f" ± {metric.error:.2g}" if math.isfinite(metric.error) else ""
        return f"{metric.value:.4g}{error}"
    interval = metric.interval or ()
    if isinstance(metric, Rate):
        value, *bounds = [f"{100 * number:.1f}" for number in (metric.value, *interval)]
    else:
        value, bounds = _rounded(metric.value, interval)
    text = f"{value} [{', '.join(bounds)}]" if bounds else value
    if not show_count:
        return text
    return f"{text} of {metric.total if isinstance(metric, Rate) else metric.count:,}"


def real_text(metric: MetricValue | None) -> str:
    """Where a distance lies among those of as many real molecules, and their range."""
    if not isinstance(metric, Estimate) or metric.real is None or metric.value is None:
        return ""
    _, bounds = _rounded(metric.real.median, metric.real.interval)
    return f"{metric.real.place(metric.value)} real [{', '.join(bounds)}]"


def _rounded(value: float, interval: Sequence[float]) -> tuple[str, list[str]]:
    """A number and its bounds, which have as many digits as it takes to tell them apart."""
    digits = next((d for d in (2, 3, 4) if len({f"{x:.{d}g}" for x in interval}) > 1), 2)
    return f"{value:.{digits + 1}g}", [f"{number:.{digits}g}" for number in interval]
