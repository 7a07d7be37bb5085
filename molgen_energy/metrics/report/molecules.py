"""The report of molecules: which metrics it has, and what they mean together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rdkit import rdBase

from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.geometry import KINDS, PERIODS, UNITS
from molgen_energy.errors import counted
from molgen_energy.metrics.checks.posebusters import CHECKS as POSEBUSTERS
from molgen_energy.metrics.distances.comparison import Comparison, distance_key
from molgen_energy.metrics.molecule_evaluation import (
    MoleculeEvaluation,
    is_over_regular,
    mean_key,
    posebusters_key,
    relaxation_keys,
)
from molgen_energy.metrics.options import (
    BOND_DESCRIPTIONS,
    EXTRAS,
    EvaluationOptions,
    install_command,
    is_missing,
)
from molgen_energy.metrics.report.distributions import distributions_block
from molgen_energy.metrics.report.gallery import gallery_block
from molgen_energy.metrics.report.model import (
    EvaluatedFile,
    MetricValue,
    Report,
    ReportBlock,
    ReportColumn,
    ReportRow,
    ReportSection,
    Setting,
)
from molgen_energy.metrics.results import MoleculeResults
from molgen_energy.workers import WorkerPool

_BONDS_UNUSED = "with perceived bonds, though a file has its own"
_BY_BONDS = ("strain", "posebusters")  # metrics whose published values are of given bonds
_STABILITY = (("molecules", "molecule_stability"), ("atoms", "atom_stability"))
_LOW_STABILITY = 0.9  # of real molecules; a table that refuses more is no measure of them
_FAR = 5  # times the distance of as many real molecules, for a file that is as stable as they
_MAX_FAILURES = 4


@dataclass(frozen=True)
class MetricRow:
    """A row, and the group of `--metrics` that computes its metric."""

    key: str
    label: str
    meaning: str
    unit: str = ""
    metric: str = "rates"
    always: bool = True
    """Whether it is shown, with a hint, if an extra is missing or its metric was not chosen."""


def _geometry_rows() -> tuple[MetricRow, ...]:
    by_mmd = [
        MetricRow(distance_key("mmd", kind), f"{kind}s, MMD",
            f"squared maximum mean discrepancy of {kind}s, mean over types", "", "geometry")
        for kind in KINDS
    ]  # fmt: skip
    by_reference = [
        MetricRow(distance_key("mmd_reference", kind), f"{kind}s, MMD, unbiased",
            "with the reference's bandwidth; does not depend on the number of molecules",
            "", "geometry")
        for kind in KINDS
    ]  # fmt: skip
    by_wasserstein = [
        MetricRow(distance_key("wasserstein", kind), f"{kind}s, Wasserstein",
            "first Wasserstein distance, mean over types; it does not saturate"
            + (", on the circle" if kind in PERIODS else ""),
            UNITS[kind], "geometry")
        for kind in KINDS
    ]  # fmt: skip
    return (*by_mmd, *by_reference, *by_wasserstein)


def _descriptor_rows() -> tuple[tuple[MetricRow, ...], tuple[MetricRow, ...]]:
    """Means, and distances of the distributions."""
    means = tuple(
        MetricRow(mean_key(key), d.label, d.meaning, d.unit, "descriptors")
        for key, d in DESCRIPTORS.items()
    )
    distances = tuple(
        MetricRow(distance_key("wasserstein", key), f"{d.label}, Wasserstein",
            "first Wasserstein distance of the distributions", d.unit, "descriptors")
        for key, d in DESCRIPTORS.items()
    )  # fmt: skip
    return means, distances


def _relaxation_rows(metric: str, method: str) -> tuple[MetricRow, ...]:
    energy, mean, distance, *changes = relaxation_keys(metric)
    return (
        MetricRow(energy, f"{method} strain",
            "energy lost on relaxation, median over complete molecules", "kcal/mol", metric),
        MetricRow(mean, f"{method} strain, mean", "as published by GEOM-Drugs Revisited",
            "kcal/mol", metric, always=False),
        MetricRow(distance, f"{method} relaxation RMSD",
            "of all atoms after superposition, median", "Å", metric),
        *(MetricRow(key, f"{method} relaxation, {kind}s",
            "mean absolute change, over those of all molecules", UNITS[kind], metric, always=False)
          for key, kind in zip(changes, KINDS, strict=True)),
    )  # fmt: skip


_DESCRIPTOR_MEANS, _DESCRIPTOR_DISTANCES = _descriptor_rows()
_ON_SUBSETS = "energy and plausibility"
_AGREEMENT = "agreement"  # in place of a metric: rows of both bonds
_DISTANCES = (
    *_geometry_rows(),
    MetricRow("sizes", "sizes, Wasserstein", "of the numbers of atoms", "atoms", "composition"),
    MetricRow("elements", "elements, total variation", "of the shares of elements", "",
        "composition"),
    MetricRow("fcd", "FCD", "Fréchet ChemNet distance of distinct valid molecules", "", "fcd"),
    MetricRow("fcd_infinite", "FCD, extrapolated",
        "to infinitely many molecules; does not depend on their number", "", "fcd"),
)  # fmt: skip
_SIMILARITIES = (
    MetricRow("snn", "SNN", "largest Tanimoto similarity of fingerprints, mean over molecules",
        "", "similarity"),
    MetricRow("fragments", "Frag", "cosine of the counts of BRICS fragments", "", "similarity"),
    MetricRow("scaffolds", "Scaf", "cosine of the counts of scaffolds", "", "similarity"),
)  # fmt: skip
_SECTIONS = {
    "rates, %": (
        MetricRow("molecule_stability", "molecule stability",
            "molecules whose atoms are all stable"),
        MetricRow("atom_stability", "atom stability",
            "atoms whose bonds the valence model allows"),
        MetricRow("validity", "validity", "molecules that RDKit sanitises"),
        MetricRow("uniqueness", "uniqueness", "distinct among the valid"),
        MetricRow("novelty", "novelty", "not in the training set, among the distinct"),
        MetricRow("connected", "connected", "molecules of one fragment"),
        MetricRow("complete", "complete", "valid and connected"),
        MetricRow("valid_unique", "valid × unique", "distinct valid among all"),
        MetricRow("valid_unique_novel", "valid × unique × novel", "novel among all"),
        MetricRow("hydrogens_assumed", "hydrogens missing",
            "valid only with implicit hydrogens or radical electrons"),
        MetricRow("good", "passes all checks",
            "stable, valid, connected, no hydrogens missing"),
    ),
    "distance from the data": _DISTANCES,
    "similarity to the data, from 0 to 1": _SIMILARITIES,
    "descriptors, mean over complete molecules": _DESCRIPTOR_MEANS,
    "descriptors, distance from the data": _DESCRIPTOR_DISTANCES,
    "given and perceived bonds, %": (
        MetricRow("same_bonds", "same bonds",
            "molecules whose given and perceived bonds are equal, aromatic ones as aromatic", "",
            _AGREEMENT),
        MetricRow("same_connectivity", "same connectivity",
            "molecules with bonds between the same atoms, whatever their orders", "", _AGREEMENT),
        MetricRow("bonds_only_given", "bonds only given",
            "given bonds whose atoms perception does not bond", "", _AGREEMENT),
        MetricRow("bonds_only_perceived", "bonds only perceived",
            "perceived bonds whose atoms are not bonded in the file", "", _AGREEMENT),
    ),
    _ON_SUBSETS: (
        *_relaxation_rows("strain", "MMFF94"),
        *_relaxation_rows("xtb", "GFN2-xTB"),
        MetricRow("stereocentres_r", "R among stereocentres",
            "the rest is S; 50 % if mirror images are equally frequent", "%", "geometry"),
        MetricRow("posebusters", "PoseBusters",
            "molecules that pass every check except the energy ratio", "%", "posebusters"),
    ),
    "PoseBusters by check, %": tuple(
        MetricRow(posebusters_key(check), check.replace("_", " "), meaning, "", "posebusters",
            always=False)
        for check, meaning in POSEBUSTERS.items()
    ),
}  # fmt: skip


def molecule_report(results: MoleculeResults, open_pool: Callable[[], WorkerPool]) -> Report:
    """The report of evaluated molecules.

    Parameters
    ----------
    open_pool
        Starts the processes that draw molecules when the page is written.
    """
    reference = results.reference
    data = reference.evaluation
    files = [
        _evaluated_file(e, e.comparison, _notes(e, results), _failures(e)) for e in results.samples
    ]
    blocks: list[ReportBlock] = []
    if {"geometry", "composition", "descriptors"} & results.options.metrics:
        blocks.append(distributions_block(results))
    accumulators = {e.name: e.accumulator for e in results.samples}
    blocks.append(gallery_block(accumulators, open_pool))
    return Report(
        "molecules",
        "molecules",
        files,
        _sections(results),
        _evaluated_file(data, reference.distances, _own_notes(data), []),
        _settings(results),
        _summary(results),
        [*results.notes, *_on_stability(data)],
        blocks,
        results.table,
    )


def side_by_side(
    results: Mapping[str, MoleculeResults], open_pool: Callable[[], WorkerPool]
) -> Report:
    """The report of the same molecules with given and with perceived bonds, in two columns each.

    Parameters
    ----------
    results
        By choice of bonds.
    open_pool
        As for `molecule_report`.
    """
    reports = {bonds: molecule_report(each, open_pool) for bonds, each in results.items()}
    first = next(iter(reports.values()))
    files = [
        _in_columns({bonds: report.files[k] for bonds, report in reports.items()})
        for k in range(len(first.files))
    ]
    references = {b: report.reference for b, report in reports.items() if report.reference}
    blocks = [
        distributions_block(each, bonds)
        for bonds, each in results.items()
        if {"geometry", "composition", "descriptors"} & each.options.metrics
    ]
    accumulators = {
        f"{evaluation.name}, bonds {bonds}": evaluation.accumulator
        for bonds, each in results.items()
        for evaluation in each.samples
    }
    settings = zip(*(report.settings for report in reports.values()), strict=True)
    return replace(
        first,
        files=files,
        reference=_in_columns(references),
        settings=[_joined_setting(dict(zip(reports, each, strict=True))) for each in settings],
        summary=_joined_summary([report.summary for report in reports.values()]),
        notes=_joined({bonds: report.notes for bonds, report in reports.items()}),
        blocks=[*blocks, gallery_block(accumulators, open_pool)],
    )


def _in_columns(files: Mapping[str, EvaluatedFile]) -> EvaluatedFile:
    """One file with a column for each choice of bonds."""
    first = next(iter(files.values()))
    return replace(
        first,
        columns=[replace(file.columns[0], label=bonds) for bonds, file in files.items()],
        notes=_joined({bonds: file.notes for bonds, file in files.items()}),
        failures=_joined({bonds: file.failures for bonds, file in files.items()}),
        details={"by_bonds": {bonds: file.details for bonds, file in files.items()}},
    )


def _joined(lines: Mapping[str, list[str]]) -> list[str]:
    """Lines that all choices of bonds have, then those of each."""
    each = list(lines.values())
    common = [line for line in each[0] if all(line in other for other in each)]
    return common + [
        f"bonds {bonds}: {line}"
        for bonds, own in lines.items()
        for line in own
        if line not in common
    ]


def _joined_setting(settings: Mapping[str, Setting]) -> Setting:
    first = next(iter(settings.values()))
    if all(setting == first for setting in settings.values()):
        return first
    texts = [str(s.value) if s.text is None else s.text for s in settings.values()]
    return Setting(
        first.key, first.label, {bonds: s.value for bonds, s in settings.items()},
        " | ".join(texts),
    )  # fmt: skip


def _joined_summary(summaries: list[str]) -> str:
    parts = [summary.split("; ") for summary in summaries]
    if len({len(each) for each in parts}) > 1:
        return " | ".join(summaries)
    return "; ".join(" | ".join(dict.fromkeys(same)) for same in zip(*parts, strict=True))


def _sections(results: MoleculeResults) -> list[ReportSection]:
    """The sections with the rows that apply."""
    options = results.options
    shown = []
    for title, rows in _SECTIONS.items():
        applicable = [
            ReportRow(
                row.key,
                row.label,
                row.meaning,
                row.unit,
                _hint(row.metric, options),
                _BONDS_UNUSED if results.bonds_unused and row.metric in _BY_BONDS else "",
                title == _ON_SUBSETS,
            )
            for row in rows
            if _applies(row, results)
        ]
        if applicable:
            shown.append(ReportSection(title, applicable))
    return shown


def _applies(row: MetricRow, results: MoleculeResults) -> bool:
    if row.metric == _AGREEMENT:
        return results.options.checks.agreement
    chosen = row.metric in results.options.available
    return chosen or (
        row.always and (row.metric in results.options.metrics or row.metric in EXTRAS)
    )


def _hint(metric: str, options: EvaluationOptions) -> str:
    if metric not in EXTRAS:
        return ""
    if is_missing(metric):
        return install_command(metric)
    return "" if metric in options.metrics else f"--metrics default,{metric}"


def _evaluated_file(
    evaluation: MoleculeEvaluation, distances: Comparison, notes: list[str], failures: list[str]
) -> EvaluatedFile:
    available: dict[str, MetricValue | None] = {
        **distances.estimates,
        **evaluation.estimates,
        **evaluation.rates,
    }
    metrics = {row.key: available.get(row.key) for rows in _SECTIONS.values() for row in rows}
    return EvaluatedFile(
        evaluation.name,
        evaluation.molecules,
        [ReportColumn(metrics)],
        evaluation.skipped,
        notes,
        failures,
        evaluation.provenance,
        _details(evaluation, distances),
        evaluation.path,
    )


def _details(evaluation: MoleculeEvaluation, distances: Comparison) -> dict[str, Any]:
    accumulator = evaluation.accumulator
    return {
        "timed_out": accumulator.counts.timed_out,
        "bonds": evaluation.bonds,
        "by_type": {
            kind: {name: {"mmd": m, "wasserstein": w} for name, (m, w) in by_type.items()}
            for kind, by_type in distances.by_type.items()
        },
        "missing_types": distances.missing,
        "worst": [worst._asdict() for worst in evaluation.worst],
        "unstable_atoms": [
            {"element": element, "valence": valence, "count": count}
            for (element, valence), count in accumulator.unstable_valences.most_common()
        ],
        "invalid": [
            {"reason": reason, "count": count, "first_record": accumulator.first_records[reason]}
            for reason, count in accumulator.invalid_reasons.most_common()
        ],
        "relaxation_changes": {
            metric: {
                kind: {
                    name: {"mean": mean, "count": count} for name, (mean, count) in types.items()
                }
                for kind, types in kinds.items()
            }
            for metric, kinds in evaluation.relaxation_changes.items()
        },
        "posebusters_failures": dict(Counter(evaluation.posebusters_failures).most_common()),
    }


def _notes(evaluation: MoleculeEvaluation, results: MoleculeResults) -> list[str]:
    """Restrictions of a file's metrics, and what they mean together."""
    notes = _own_notes(evaluation)
    reference = results.reference.evaluation
    data = reference.rates["molecule_stability"]
    above = [what for what, key in _STABILITY if is_over_regular(evaluation, reference, key)]
    if above:
        notes.append(
            f"{' and '.join(above)} more often stable than those of real data: over-regular, not "
            "better than the data"
        )
    rate = evaluation.rates["molecule_stability"]
    as_stable = (
        evaluation.shares_stability(reference)
        and rate is not None
        and data is not None
        and rate.value is not None
        and data.interval is not None
        and rate.value >= data.interval[0]
    )
    far = _far_distances(evaluation)
    if as_stable and far:
        notes.append(
            f"as stable as real data, but far from them in {', '.join(far)}, which stability does "
            "not show"
        )
    for kind, names in evaluation.comparison.missing.items():
        if names:
            notes.append(f"no {kind} of type {', '.join(names)}: not in the mean")
    return notes


def _on_stability(data: MoleculeEvaluation) -> list[str]:
    """What stability is worth where many real molecules are not stable."""
    molecules, atoms = (data.rates[key] for _, key in _STABILITY)
    if molecules is None or atoms is None or molecules.value is None or atoms.value is None:
        return []
    if molecules.value >= _LOW_STABILITY:
        return []
    given = data.bonds == BOND_DESCRIPTIONS["given"]
    remedy = "another --valence" if given else "--bonds given, where a model generates bonds"
    return [
        f"with bonds {data.bonds} and valences {data.valence}, only {100 * molecules.value:.1f} % "
        f"of {data.name}'s own molecules and {100 * atoms.value:.1f} % of their atoms are stable: "
        f"stability above that means nothing; {remedy} says more"
    ]


def _own_notes(evaluation: MoleculeEvaluation) -> list[str]:
    notes = [*evaluation.notes]
    timed_out = evaluation.accumulator.counts.timed_out
    if evaluation.skipped:
        notes.append(f"{counted(evaluation.skipped, 'bad records')} skipped")
    if timed_out:
        notes.append(f"{counted(timed_out, 'molecules')} timed out, counted as invalid")
    return notes


def _far_distances(evaluation: MoleculeEvaluation) -> list[str]:
    """Distances that are several times those of as many real molecules."""
    far = []
    for row in (*_DISTANCES, *_DESCRIPTOR_DISTANCES):
        ours = evaluation.comparison.estimates.get(row.key)
        if ours is None or ours.value is None or ours.interval is None or ours.real is None:
            continue
        # Distances without bias are about 0 for real molecules: no number of times says how far.
        real, is_positive = ours.real, ours.real.interval[0] > 0
        if is_positive and ours.interval[0] > max(_FAR * real.median, real.interval[1]):
            far.append(f"{row.label} (×{ours.value / real.median:.0f})")
    return far


def _failures(evaluation: MoleculeEvaluation) -> list[str]:
    """The most frequent failures and the worst records of a file, one line each."""
    accumulator = evaluation.accumulator
    lines = []
    if accumulator.unstable_valences:
        shown = ", ".join(
            f"{element} with {valence} ({count:,})"
            for (element, valence), count in accumulator.unstable_valences.most_common(
                _MAX_FAILURES
            )
        )
        lines.append(f"unstable atoms: {shown}")
    if accumulator.invalid_reasons:
        shown = ", ".join(
            f"{reason} ({count:,}, first in record {accumulator.first_records[reason]})"
            for reason, count in accumulator.invalid_reasons.most_common(_MAX_FAILURES)
        )
        lines.append(f"invalid: {shown}")
    if evaluation.posebusters_failures:
        failures = evaluation.posebusters_failures.most_common(_MAX_FAILURES)
        shown = ", ".join(f"{name} ({count:,})" for name, count in failures)
        lines.append(f"failed PoseBusters checks: {shown}")
    for kind, by_type in evaluation.comparison.by_type.items():
        ranked = sorted(by_type.items(), key=lambda item: -item[1][0])[:3]
        if ranked:
            shown = ", ".join(f"{name} (MMD {mmd:.3g})" for name, (mmd, _) in ranked)
            lines.append(f"{kind}s farthest from the data: {shown}")
    if evaluation.worst:
        shown = "; ".join(f"{worst.record} ({worst.what})" for worst in evaluation.worst)
        lines.append(f"worst records: {shown}")
    return lines


def _summary(results: MoleculeResults) -> str:
    checks = results.options.checks
    jodo = checks.counting == "jodo"
    compared = f"compared with {results.reference_choice}; " if results.reference_choice else ""
    return (
        f"{compared}bonds {results.samples[0].bonds}; valences {checks.valence}; "
        f"novelty against {results.novelty_against}; types: {results.reference.types.name}"
        + ("; angles as JODO lists them" if jodo else "")
    )


def _settings(results: MoleculeResults) -> list[Setting]:
    options, types = results.options, results.reference.types
    checks = options.checks
    metrics = sorted(options.metrics)
    choice = results.reference_choice or "named or by default"
    bonds, description = checks.bonds, BOND_DESCRIPTIONS[checks.bonds]
    if checks.agreement:
        bonds, description = "both", "given in the file, and perceived from distances"
    return [
        Setting("rdkit", "RDKit", rdBase.rdkitVersion),
        Setting("reference_choice", "reference", choice, f"{results.reference.name}, {choice}"),
        Setting("novelty_against", "novelty against", results.novelty_against),
        Setting("metrics", "metrics", metrics, ", ".join(metrics)),
        Setting("bonds", "bonds", bonds, description),
        Setting("valence", "valence model", checks.valence),
        Setting("angles", "angles", checks.counting),
        Setting("types", "geometry types", {"name": types.name, **types.types}, types.name),
        Setting("subset", "molecules for strain and PoseBusters", options.subset,
            f"{options.subset:,} at most"),
    ]  # fmt: skip
