"""The report as dictionaries and lists, for programs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from molgen_energy import __version__
from molgen_energy.metrics.statistics import Mean, Rate

if TYPE_CHECKING:
    from molgen_energy.metrics.report.model import EvaluatedFile, MetricValue, Report


def to_dict(report: Report) -> dict[str, Any]:
    """Settings, and the metrics and details of every file and of the reference."""
    content: dict[str, Any] = {
        "created_by": f"molgen-energy {__version__}",
        "numpy": np.__version__,
        **{setting.key: setting.value for setting in report.settings},
        "notes": report.notes,
        "files": [_file(report, file) for file in report.files],
    }
    if report.reference is not None:
        content["reference"] = _file(report, report.reference)
    return content


def _file(report: Report, file: EvaluatedFile) -> dict[str, Any]:
    columns = {
        column.label: {key: _metric(report, metric) for key, metric in column.metrics.items()}
        for column in file.columns
    }
    metrics: dict[str, Any]
    if set(columns) == {""}:
        metrics = columns[""]
    else:
        keys = file.metrics
        metrics = {key: {label: c[key] for label, c in columns.items()} for key in keys}
    return {
        "name": file.name,
        "system": report.system,
        report.samples: file.count,
        "skipped": file.skipped,
        "notes": file.notes,
        "provenance": file.provenance,
        "metrics": metrics,
        **file.details,
    }


def _metric(report: Report, metric: MetricValue | None) -> dict[str, Any] | None:
    if metric is None:
        return None
    interval = metric.interval
    found: dict[str, Any] = {
        "value": _finite(metric.value),
        "interval": None if interval is None else [_finite(bound) for bound in interval],
    }
    if isinstance(metric, Rate):
        return found | {"count": metric.count, "total": metric.total}
    if isinstance(metric, Mean):
        return found | {"standard_error": _finite(metric.error)}
    found |= {report.samples: metric.count, "note": metric.note}
    if metric.real is not None and metric.value is not None:
        found["real"] = {
            "median": metric.real.median,
            "range": list(metric.real.interval),
            "place": metric.real.place(metric.value),
        }
    return found


def _finite(value: float | None) -> float | None:
    """None for infinite numbers and NaN, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
