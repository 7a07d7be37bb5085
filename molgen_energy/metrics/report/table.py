"""The report as tables for the terminal."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from molgen_energy.metrics.statistics import Estimate, Mean, Rate
from molgen_energy.output import printable

if TYPE_CHECKING:
    from molgen_energy.metrics.report.model import EvaluatedFile, MetricValue, Report, ReportColumn

_UNLIMITED = 100_000  # characters in a line
_MAX_BEFORE = 6  # digits before the point; larger numbers have an exponent
_NAME = 26  # characters of a file's name in a line of a narrow table


@dataclass(frozen=True)
class _Layout:
    """What a table leaves out or puts elsewhere so that it fits a narrow terminal."""

    data_intervals: bool = True
    """Whether values of the reference have intervals."""
    remarks_below: bool = False
    """Whether remarks on rows stand below the table, and long names of files have several lines."""
    borders: bool = True
    stacked: bool = False
    """Whether an interval stands below its value."""


_LAYOUTS = (
    _Layout(),
    _Layout(remarks_below=True),
    _Layout(remarks_below=True, data_intervals=False),
    _Layout(remarks_below=True, data_intervals=False, borders=False),
    _Layout(remarks_below=True, data_intervals=False, borders=False, stacked=True),
)
"""From wide to narrow; the last one is also for terminals that it does not fit."""


def tables(report: Report, console: Console) -> list[Table]:
    """Tables with the columns of each file and, last, of the reference.

    Files that do not fit side by side on the console come in several tables, each with as many
    files as fit, at least one, and the reference. A file with several columns has its own table. A
    narrow table leaves out the intervals of the reference rather than break lines.
    """
    unlimited = console.options.update(max_width=_UNLIMITED)

    def width(files: list[EvaluatedFile], layout: _Layout) -> int:
        return Measurement.get(console, unlimited, _table(report, files, layout)).maximum

    @cache
    def widths(layout: _Layout) -> tuple[int, list[int]]:
        """Of the columns without any file, and of each file."""
        alone = [width([file], layout) for file in report.files]
        without = 2 * alone[0] - width([report.files[0]] * 2, layout)
        return without, [own - without for own in alone]

    def fits(files: slice, layout: _Layout) -> bool:
        without, own = widths(layout)
        return without + sum(own[files]) <= console.width

    found: list[Table] = []
    start = 0
    while start < len(report.files):
        left = len(report.files) - start
        most = 1 if any(len(file.columns) > 1 for file in report.files) else left
        choices = ((k, layout) for k in range(most, 0, -1) for layout in _LAYOUTS)
        count, layout = next(
            (choice for choice in choices if fits(slice(start, start + choice[0]), choice[1])),
            (1, _LAYOUTS[-1]),
        )
        found.append(_table(report, report.files[start : start + count], layout))
        start += count
    return found


def plain_tables(report: Report, width: int) -> str:
    """The tables as text without colours."""
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    for table in tables(report, console):
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(map(printable, text.rstrip("\n").split("\n")))


def _table(report: Report, files: list[EvaluatedFile], layout: _Layout) -> Table:
    several = len(files[0].columns) > 1
    title = f"value {uncertainty(report)}"
    if not layout.data_intervals and report.reference is not None:
        title += "; of the data the value alone"
    shown = Table(title=escape(f"{files[0].name}: {title}" if several else title))
    shown.title_justify = shown.caption_justify = "left"
    if not layout.borders:
        shown.box, shown.pad_edge = box.SIMPLE_HEAD, False
    shown.add_column("", overflow="fold")
    columns: list[tuple[EvaluatedFile, ReportColumn]] = []
    for file in files:
        for column in file.columns:
            name = _in_lines(file.name) if layout.remarks_below else file.name
            names = (column.label,) if several else (name, column.label)
            header = escape("\n".join(filter(None, names)))
            shown.add_column(header, justify="right", overflow="fold")
            columns.append((file, column))
    if report.reference is not None:
        space = " " if layout.data_intervals else "\n"
        for column in report.reference.columns:
            names = (f"data:{space}{report.reference.name}", column.label)
            header = escape("\n".join(filter(None, names)))
            shown.add_column(header, justify="right", style="dim")
            columns.append((report.reference, column))
    shown.add_row(report.samples, *(f"{file.count:,}" for file, _ in columns), end_section=True)
    below: dict[str, list[str]] = {}
    for section in report.sections:
        indent = ""
        if section.title:
            indent = "  "
            shown.add_row(f"[bold]{section.title}[/]", *([""] * len(columns)))
        for row in section.rows:
            heading = f"{indent}{escape(row.heading)}"
            for remark in filter(None, (row.hint, row.note)):
                if layout.remarks_below:
                    below.setdefault(remark, []).append(row.label)
                else:
                    heading += f"\n  {indent}[dim]{escape(remark)}[/]"
            values = (
                _cell(column.metrics.get(row.key), row.show_count, layout, file is report.reference)
                for file, column in columns
            )
            shown.add_row(heading, *values, end_section=row is section.rows[-1])
    if below:
        lines = (f"{'; '.join(labels)}: {remark}" for remark, labels in below.items())
        shown.caption = escape("\n".join(lines))
    return shown


def _in_lines(name: str) -> str:
    """A long name of a file in several lines, which end behind a dash, a dot or the like."""
    lines = [""]
    for part in re.findall(r"[^-_./ ]*[-_./ ]?", name):
        if len(lines[-1]) + len(part) > _NAME and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _cell(metric: MetricValue | None, show_count: bool, layout: _Layout, is_data: bool) -> str:
    text, real = metric_text(metric, show_count), real_text(metric)
    if is_data and not layout.data_intervals:
        text = text.partition(" ")[0]
    if layout.stacked:
        text, real = (part.replace(" [", "\n[") for part in (text, real))
    return escape(text) + (f"\n[dim]{escape(real)}[/]" if real else "")


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
        found += f"; below: where 95 % of equally large sets of real {report.samples} lie"
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
    return _digits(value, digits + 1), [_digits(number, digits) for number in interval]


def _digits(number: float, digits: int) -> str:
    """A number with significant digits, and all those before the decimal point."""
    before = len(f"{abs(number):.0f}")
    return f"{number:.0f}" if digits < before <= _MAX_BEFORE else f"{number:.{digits}g}"
