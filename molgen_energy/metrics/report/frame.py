"""The report as a table for pandas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from molgen_energy.metrics.statistics import Estimate, Mean, Rate
from molgen_energy.tables import data_frame

if TYPE_CHECKING:
    from molgen_energy.metrics.report.model import MetricValue, Report

_COLUMNS = (
    "file", "variant", "metric", "label", "unit", "value", "low", "high", "standard_error",
    "samples", "real", "real_low", "real_high", "place",
)  # fmt: skip


def to_pandas(report: Report) -> Any:
    """See `Report.to_pandas`."""
    rows = {row.key: row for section in report.sections for row in section.rows}
    found: list[dict[str, Any]] = []
    for entry in report.entries:
        name = f"data: {entry.name}" if entry is report.reference else entry.name
        for column in entry.columns:
            for key, metric in column.metrics.items():
                row = rows.get(key)
                label = {"label": key, "unit": ""}
                if row is not None:  # the table shows rates in %
                    unit = "" if isinstance(metric, Rate) else row.unit
                    label = {"label": row.label, "unit": unit}
                found.append(
                    {"file": name, "variant": column.label, "metric": key} | label | _values(metric)
                )
    return data_frame({name: [row.get(name) for row in found] for name in _COLUMNS})


def _values(metric: MetricValue | None) -> dict[str, Any]:
    names = ("value", "low", "high", "standard_error", "samples", "real", "real_low", "real_high")
    values: dict[str, Any] = dict.fromkeys(names, math.nan) | {"place": ""}
    if metric is None or metric.value is None:
        return values
    values["value"] = metric.value
    if metric.interval is not None:
        values["low"], values["high"] = metric.interval
    if isinstance(metric, Rate):
        values["samples"] = float(metric.total)
    elif isinstance(metric, Mean):
        values["standard_error"] = metric.error
    elif isinstance(metric, Estimate):
        values["samples"] = float(metric.count) if metric.count else math.nan
        if metric.real is not None:
            values["real"] = metric.real.median
            values["real_low"], values["real_high"] = metric.real.interval
            values["place"] = metric.real.place(metric.value)
    return values
