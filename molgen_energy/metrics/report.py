"""The evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from rdkit import rdBase
from rich.markup import escape
from rich.table import Table

from molgen_energy import __version__
from molgen_energy.metrics.evaluation import METRICS, Evaluation
from molgen_energy.metrics.rates import Rate


def rate_text(rate: Rate | None) -> str:
    """Per cent and its interval, or n/a."""
    if rate is None or rate.value is None or rate.interval is None:
        return "n/a"
    low, high = rate.interval
    return f"{100 * rate.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(samples: list[Evaluation], reference: Evaluation) -> Table:
    """One column for each file and one for real data."""
    shown = Table(title="per cent [95 % interval]", title_justify="left")
    shown.add_column("")
    for evaluation in samples:
        shown.add_column(escape(evaluation.name), justify="right")
    shown.add_column(escape(f"data: {reference.name}"), justify="right", style="dim")
    columns = [*samples, reference]
    shown.add_row("molecules", *(f"{e.molecules:,}" for e in columns), end_section=True)
    for metric in METRICS:
        shown.add_row(metric.label, *(rate_text(e.rates[metric.key]) for e in columns))
    return shown


def as_json(
    samples: list[Evaluation], reference: Evaluation, novelty_against: str
) -> dict[str, Any]:
    """Counts, shares and intervals of every file and of the data."""
    return {
        "created_by": f"molgen-energy {__version__}",
        "rdkit": rdBase.rdkitVersion,
        "novelty_against": novelty_against,
        "files": [_evaluation(e) for e in samples],
        "reference": _evaluation(reference),
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "molecules": evaluation.molecules,
        "skipped": evaluation.skipped,
        "bonds": evaluation.bonds,
        "notes": evaluation.notes,
        "metrics": {key: _rate(rate) for key, rate in evaluation.rates.items()},
    }


def _rate(rate: Rate | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    interval = None if rate.interval is None else list(rate.interval)
    return {"value": rate.value, "interval": interval, "count": rate.count, "total": rate.total}
