"""The evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rdkit import rdBase
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from molgen_energy import __version__
from molgen_energy.chemistry.geometry import KINDS, PERIODS, UNITS
from molgen_energy.metrics.comparison import Measure
from molgen_energy.metrics.evaluation import (
    EXTRAS,
    Evaluation,
    Options,
    how_to_get,
    lacking,
    over_regular,
)
from molgen_energy.metrics.rates import Rate
from molgen_energy.metrics.reference import Reference

_ENDLESS = 100_000  # columns of a terminal, more than any table has
_FAR = 5  # times the distance that real data have, where the data are met in stability
# Distances of few molecules are large by themselves (MMD is biased): of subsets of real data, some
# of 1,000 molecules are that far, none of 3,000.
_ENOUGH = 3000


@dataclass(frozen=True)
class Row:
    """A row of the report: what is shown, in which unit, and which of `--metrics` it is part of."""

    key: str
    label: str
    meaning: str
    unit: str = "%"
    metric: str = "rates"


@dataclass(frozen=True)
class Section:
    """Rows that belong together."""

    title: str
    rows: tuple[Row, ...]


def _geometry_rows() -> tuple[Row, ...]:
    by_mmd = [
        Row(f"mmd_{kind.replace(' ', '_')}", f"{kind}s, MMD",
            f"squared maximum mean discrepancy of {kind}s, mean over types", "", "geometry")
        for kind in KINDS
    ]  # fmt: skip
    by_wasserstein = [
        Row(f"wasserstein_{kind.replace(' ', '_')}", f"{kind}s, Wasserstein, {UNITS[kind]}",
            "first Wasserstein distance, mean over types; it does not saturate"
            + (", around the circle" if kind in PERIODS else ""),
            UNITS[kind], "geometry")
        for kind in KINDS
    ]  # fmt: skip
    return (*by_mmd, *by_wasserstein)


SECTIONS = (
    Section(
        "rates, %",
        (
            Row("molecule_stability", "molecule stability", "molecules whose atoms are all stable"),
            Row("atom_stability", "atom stability", "atoms with an allowed sum of bond orders"),
            Row("validity", "validity", "molecules that RDKit sanitises"),
            Row("uniqueness", "uniqueness", "distinct among the valid"),
            Row("novelty", "novelty", "not in the training set, among the distinct"),
            Row("connected", "connected", "molecules of one fragment"),
            Row("complete", "complete", "valid and connected"),
            Row("valid_unique", "valid × unique", "distinct valid among all"),
            Row("valid_unique_novel", "valid × unique × novel", "novel among all"),
            Row("hydrogens_assumed", "valid by added hydrogens",
                "valid with implicit H or radicals"),
            Row("good", "nothing wrong",
                "stable, valid, of one fragment, without added hydrogens"),
        ),
    ),
    Section(
        "rates by the bonds in the file, %",
        (
            Row("carried_molecule_stability", "molecule stability",
                "atoms' bonds fit their formal charges, after Kekulisation"),
            Row("carried_atom_stability", "atom stability", "the same, among atoms"),
            Row("carried_validity", "validity", "molecules that RDKit sanitises"),
            Row("carried_complete", "complete", "valid and of one fragment"),
        ),
    ),
    Section(
        "distance from the data",
        (
            *_geometry_rows(),
            Row("sizes", "sizes, Wasserstein, atoms", "of the numbers of atoms",
                "atoms", "composition"),
            Row("elements", "elements, total variation", "of the shares of elements",
                "", "composition"),
            Row("fcd", "FCD", "Fréchet ChemNet distance of distinct valid molecules", "", "fcd"),
        ),
    ),
    Section(
        "energy and plausibility",
        (
            Row("strain_energy", "MMFF94 strain, kcal/mol",
                "energy lost on relaxation, median over complete molecules", "kcal/mol", "strain"),
            Row("strain_rmsd", "MMFF94 relaxation RMSD, Å",
                "of all atoms after superposition, median", "Å", "strain"),
            Row("xtb_energy", "GFN2-xTB strain, kcal/mol",
                "energy lost on relaxation, median over complete molecules", "kcal/mol", "xtb"),
            Row("xtb_rmsd", "GFN2-xTB relaxation RMSD, Å",
                "of all atoms after superposition, median", "Å", "xtb"),
            Row("posebusters", "PoseBusters, %", "molecules that pass every check but the energy's",
                "%", "posebusters"),
        ),
    ),
)  # fmt: skip


@dataclass
class Report:
    """Everything that was found, for one table.

    ``novelty_against``: the training molecules, in words.
    """

    samples: list[Evaluation]
    reference: Reference
    options: Options
    novelty_against: str
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[Evaluation]:
        """Files and, last, the data."""
        return [*self.samples, self.reference.row]

    def figure(self, evaluation: Evaluation, key: str) -> Rate | Measure | None:
        """What stands in a row for a file or the data."""
        if key in evaluation.rates:
            return evaluation.rates[key]
        if evaluation is self.reference.row and key in self.reference.distances.measures:
            return self.reference.distances.measures[key]
        return evaluation.measures.get(key) or evaluation.comparison.measures.get(key)

    def sections(self) -> list[Section]:
        """The sections with the rows that apply."""
        shown = []
        for section in SECTIONS:
            rows = tuple(row for row in section.rows if self._applies(row))
            if rows:
                shown.append(Section(section.title, rows))
        return shown

    def _applies(self, row: Row) -> bool:
        if row.key.startswith("carried_"):
            return any(e.rates[row.key] is not None for e in self.samples)
        return row.metric in self.options.metrics or row.metric in EXTRAS

    def hint(self, row: Row) -> str:
        """How to get a row that is not there, or nothing."""
        if row.metric not in EXTRAS:
            return ""
        if lacking(row.metric):
            return how_to_get(row.metric)
        return "" if row.metric in self.options.metrics else f"--metrics {row.metric}"

    def warnings(self) -> list[str]:
        """What should not be overlooked, of the whole and of each column."""
        said = list(self.notes)
        for evaluation in self.columns:
            name, given_up = evaluation.name, evaluation.findings.counts.timed_out
            said += [f"{name}: {note}" for note in evaluation.notes]
            if evaluation.skipped:
                said.append(f"{name}: {evaluation.skipped:,} bad records left out of all figures")
            if given_up:
                said.append(f"{name}: {given_up:,} molecules given up, counted as invalid")
        return said

    def judge(self) -> None:
        """Add to each file's notes what its numbers mean together."""
        data = self.reference.row.rates["molecule_stability"]
        for evaluation in self.samples:
            if over_regular(evaluation, data):
                evaluation.notes.append(
                    "more often stable than real data: over-regular, not better than the data"
                )
            stable = evaluation.rates["molecule_stability"]
            near = (
                stable is not None
                and data is not None
                and stable.value is not None
                and data.interval is not None
                and stable.value >= data.interval[0]
            )
            far = self._far(evaluation) if evaluation.molecules >= _ENOUGH else []
            if near and far:
                evaluation.notes.append(
                    f"as stable as real data, but far from them in {', '.join(far)}: "
                    "stability hides that"
                )
            for kind, names in evaluation.comparison.missing.items():
                if names:
                    evaluation.notes.append(
                        f"no {kind} of type {', '.join(names)}: left out of the mean"
                    )

    def _far(self, evaluation: Evaluation) -> list[str]:
        far = []
        for row in SECTIONS[2].rows:
            ours = evaluation.comparison.measures.get(row.key)
            theirs = self.reference.distances.measures.get(row.key)
            if ours is None or theirs is None or ours.interval is None or theirs.value is None:
                continue
            if ours.interval[0] > _FAR * theirs.value > 0:
                far.append(f"{row.label} (×{(ours.value or 0) / theirs.value:.0f})")
        return far


def figure_text(figure: Rate | Measure | None, unit: str = "%") -> str:
    """A value with its interval, or n/a."""
    if figure is None or figure.value is None:
        note = figure.note if isinstance(figure, Measure) else ""
        return "n/a" if not note or note.startswith("pip ") else f"n/a ({note})"
    if isinstance(figure, Rate):
        values = [figure.value, *(figure.interval or ())]
        shown = [f"{100 * value:.1f}" for value in values]
    else:
        shown = [f"{figure.value:.3g}", *(f"{value:.2g}" for value in figure.interval or ())]
    return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def tables(report: Report, console: Console) -> list[Table]:
    """A table with one column for each file and one for real data, or several.

    Where the files do not fit beside each other on the console, each table holds as many as fit
    with their labels, one at least, and the data.
    """
    wide = console.options.update(max_width=_ENDLESS)
    found: list[Table] = []
    rest = report.samples
    while rest:
        count = len(rest)
        while count > 1:
            needed = Measurement.get(console, wide, _table(report, rest[:count])).maximum
            if needed <= console.width:
                break
            count -= 1
        found.append(_table(report, rest[:count]))
        rest = rest[count:]
    return found


def _table(report: Report, samples: list[Evaluation]) -> Table:
    columns = [*samples, report.reference.row]
    shown = Table(title="value [95 % interval]", title_justify="left")
    shown.add_column("", overflow="fold")
    for evaluation in samples:
        shown.add_column(escape(evaluation.name), justify="right", overflow="fold")
    shown.add_column(escape(f"data: {report.reference.name}"), justify="right", style="dim")
    shown.add_row("molecules", *(f"{e.molecules:,}" for e in columns), end_section=True)
    for section in report.sections():
        shown.add_row(f"[bold]{section.title}[/]", *([""] * len(columns)))
        for row in section.rows:
            hint = report.hint(row)
            label = f"  {row.label}" + (f"\n    [dim]{escape(hint)}[/]" if hint else "")
            shown.add_row(
                label,
                *(figure_text(report.figure(e, row.key), row.unit) for e in columns),
                end_section=row is section.rows[-1],
            )
    return shown


def findings_text(evaluation: Evaluation, most: int = 4) -> list[str]:
    """What is worst about a file, in lines."""
    findings = evaluation.findings
    lines = []
    if findings.faults:
        shown = ", ".join(
            f"{element} with {valence} ({count:,})"
            for (element, valence), count in findings.faults.most_common(most)
        )
        lines.append(f"unstable atoms: {shown}")
    if findings.reasons:
        shown = ", ".join(
            f"{reason} ({count:,}, first in record {findings.examples[reason]})"
            for reason, count in findings.reasons.most_common(most)
        )
        lines.append(f"invalid: {shown}")
    if evaluation.failed_checks:
        shown = ", ".join(f"{n} ({c:,})" for n, c in evaluation.failed_checks.most_common(most))
        lines.append(f"PoseBusters' failed checks: {shown}")
    for kind, by_type in evaluation.comparison.by_type.items():
        ranked = sorted(by_type.items(), key=lambda item: -item[1][0])[:3]
        if ranked:
            shown = ", ".join(f"{name} (MMD {mmd:.3g})" for name, (mmd, _) in ranked)
            lines.append(f"{kind}s farthest from the data: {shown}")
    if evaluation.worst:
        shown = "; ".join(f"{w.record} ({w.what})" for w in evaluation.worst)
        lines.append(f"worst records: {shown}")
    return lines


def as_json(report: Report) -> dict[str, Any]:
    """Counts, shares and intervals of every file and of the data."""
    options = report.options
    return {
        "created_by": f"molgen-energy {__version__}",
        "rdkit": rdBase.rdkitVersion,
        "numpy": np.__version__,
        "novelty_against": report.novelty_against,
        "metrics": sorted(options.metrics),
        "bonds": options.settings.bonds,
        "valence": options.settings.valence,
        "angles": options.settings.counting,
        "types": {"name": report.reference.types.name, **report.reference.types.types},
        "notes": report.notes,
        "files": [_evaluation(report, e) for e in report.samples],
        "reference": _evaluation(report, report.reference.row),
    }


def _evaluation(report: Report, evaluation: Evaluation) -> dict[str, Any]:
    findings = evaluation.findings
    comparison = evaluation.comparison
    if evaluation is report.reference.row:
        comparison = report.reference.distances
    return {
        "name": evaluation.name,
        "molecules": evaluation.molecules,
        "skipped": evaluation.skipped,
        "timed_out": findings.counts.timed_out,
        "bonds": evaluation.bonds,
        "notes": evaluation.notes,
        "provenance": evaluation.provenance,
        "metrics": {
            row.key: _figure(report.figure(evaluation, row.key))
            for section in SECTIONS
            for row in section.rows
        },
        "by_type": {
            kind: {name: {"mmd": m, "wasserstein": w} for name, (m, w) in by_type.items()}
            for kind, by_type in comparison.by_type.items()
        },
        "missing_types": comparison.missing,
        "worst": [w._asdict() for w in evaluation.worst],
        "unstable_atoms": [
            {"element": element, "valence": valence, "count": count}
            for (element, valence), count in findings.faults.most_common()
        ],
        "invalid": [
            {"reason": reason, "count": count, "first_record": findings.examples[reason]}
            for reason, count in findings.reasons.most_common()
        ],
        "posebusters_failures": dict(Counter(evaluation.failed_checks).most_common()),
    }


def _figure(figure: Rate | Measure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    interval = None if figure.interval is None else list(figure.interval)
    if isinstance(figure, Rate):
        return {
            "value": figure.value,
            "interval": interval,
            "count": figure.count,
            "total": figure.total,
        }
    return {
        "value": figure.value,
        "interval": interval,
        "molecules": figure.count,
        "note": figure.note,
    }
