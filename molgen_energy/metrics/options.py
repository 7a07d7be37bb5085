"""Options of the evaluation of molecules."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from molgen_energy.chemistry.geometry import COUNTINGS, GeometryTypes, code_of
from molgen_energy.chemistry.valence import VALENCE_MODELS
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.metrics.checks.chunk import CheckSettings

METRIC_GROUPS = (
    "rates", "geometry", "composition", "strain", "descriptors", "similarity", "fcd",
    "posebusters", "xtb",
)  # fmt: skip
"""Names for `metrics`, beside `default` and `all`; rates are always computed."""
DEFAULT_METRICS = ("rates", "geometry", "composition", "strain")
EXTRAS = {"fcd": ("fcd",), "posebusters": ("posebusters",), "xtb": ("tblite", "ase")}
"""Packages that a metric needs. The optional dependencies of this package have the same names."""

BOND_CHOICES = ("auto", "perceived", "single", "given", "both")
"""Bonds of all checks: perceived from distances; perceived, but all taken as single for validity,
SMILES and connectivity (EDM's validity on GEOM-Drugs); or given in the file. `auto` takes given
bonds where every record of every file has them, else perceived ones. `both` evaluates given and
perceived bonds, and compares them."""
BOTH = ("given", "perceived")
"""The choices of bonds that `both` shows side by side."""
BOND_DESCRIPTIONS = {
    "perceived": "perceived from distances",
    "single": "perceived from distances, all taken as single",
    "given": "given in the file",
}


@dataclass(frozen=True)
class EvaluationOptions:
    """How molecules are evaluated."""

    metrics: frozenset[str] = frozenset(DEFAULT_METRICS)
    """Some of `METRIC_GROUPS`."""
    checks: CheckSettings = field(default_factory=CheckSettings)
    bonds: str = "auto"
    """One of `BOND_CHOICES`; `with_bonds` resolves it."""
    valence: str | None = None
    """One of `VALENCE_MODELS`; None is `strict` for given bonds and `edm` for perceived ones. With
    both bonds it is for given ones alone."""
    subset: int = 1000
    """Number of random molecules for strain and PoseBusters; xTB takes a tenth of them."""
    skip_bad: bool = False
    """Whether to skip broken records and elements without a known valence, rather than raise."""
    kept: int = 0
    """Number of random molecules whose values are kept, to draw sets from real molecules."""

    @property
    def available(self) -> frozenset[str]:
        """The chosen metrics whose packages are installed."""
        return frozenset(name for name in self.metrics if not is_missing(name))


def make_options(
    metrics: str | Iterable[str] = DEFAULT_METRICS,
    bonds: str = "auto",
    valence: str | None = None,
    angles: str = "once",
    subset: int = 1000,
    skip_bad: bool = False,
) -> EvaluationOptions:
    """Options from their names, as the command and the API take them.

    Raises
    ------
    InputError
        A name is unknown.
    """
    for option, name, valid in (
        ("bonds", bonds, BOND_CHOICES),
        ("valence", valence, VALENCE_MODELS),
        ("angles", angles, COUNTINGS),
    ):
        if name is not None and name not in valid:
            raise InputError(unknown_name(f"choice of --{option}", name, valid))
    checks = CheckSettings(counting=angles)
    return EvaluationOptions(parse_metrics(metrics), checks, bonds, valence, subset, skip_bad)


def with_bonds(options: EvaluationOptions, bonds: str) -> EvaluationOptions:
    """The options with the checks of `perceived`, `single` or `given` bonds."""
    valence = options.valence or ("strict" if bonds == "given" else "edm")
    if options.checks.agreement and bonds == "perceived":
        valence = "edm"
    return replace(options, checks=replace(options.checks, bonds=bonds, valence=valence))


def of_both(options: EvaluationOptions, bonds: str) -> EvaluationOptions:
    """The options for one of `BOTH`, with the comparison of the two."""
    return replace(options, bonds=bonds, checks=replace(options.checks, agreement=True))


def parse_metrics(metrics: str | Iterable[str]) -> frozenset[str]:
    """Metrics from their names, a text with commas or a sequence.

    `default` stands for `DEFAULT_METRICS`, `all` for all of them.

    Rates are always included.

    Raises
    ------
    InputError
        A name is unknown.
    """
    names = metrics.split(",") if isinstance(metrics, str) else metrics
    names = [name.strip().lower() for name in names if name.strip()]
    if "all" in names:
        return frozenset(METRIC_GROUPS)
    found = {"rates"}
    for name in names:
        if name not in (*METRIC_GROUPS, "default"):
            raise InputError(unknown_name("metric", name, [*METRIC_GROUPS, "default", "all"]))
        found.update(DEFAULT_METRICS if name == "default" else (name,))
    return frozenset(found)


def is_missing(metric: str) -> bool:
    """Whether a package that the metric needs is not installed."""
    return any(importlib.util.find_spec(name) is None for name in EXTRAS.get(metric, ()))


def install_command(metric: str) -> str:
    """The command that installs the packages of a metric."""
    return f"pip install 'molgen-energy[{metric}]'"


def with_types(options: EvaluationOptions, types: GeometryTypes | None) -> EvaluationOptions:
    """The options with the geometry types to collect; None collects no geometry."""
    codes: dict[str, tuple[int, ...]] = {}
    if types is not None:
        codes = {k: tuple(code_of(k, name) for name in names) for k, names in types.types.items()}
    similarity = "similarity" in options.metrics
    checks = replace(
        options.checks,
        type_codes=codes,
        aromatic=types is None or types.aromatic,
        whole_smiles=similarity or "fcd" in options.available,
        substructures=similarity,
        descriptors="descriptors" in options.metrics,
    )
    return replace(options, checks=checks)
