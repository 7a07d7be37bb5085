"""Do samples have the properties that were asked for? By a predictor that the generator never saw.

The protocol of EDM (Hoogeboom et al., ICML 2022, section 5.2): a network that was trained on one
half of the molecules predicts the property of samples of a generator that was trained on the other
half. The error of samples lies between the predictor's own error on real molecules and that of
properties which are shuffled among the molecules. A generator that takes nothing but the number of
atoms from the property comes out at the error of the median of molecules of that size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.chemistry.fields import FieldSelection
from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError, counted
from molgen_energy.metrics.report.model import Report, ReportRow, ReportSection, Setting
from molgen_energy.metrics.statistics import Estimate, Mean

ASKED = "condition_"
"""Names of the properties that samples were asked for begin with this."""
MOST_REAL = 5000
"""Real molecules of the rows to compare with."""
MOST_TRAINING = 50_000
"""Training molecules whose properties by number of atoms are a row to compare with."""
_MOST_ATOMS = 1000
_CHUNK = 2000
_SEED = 0  # of the order in which properties are shuffled, and of the choice of real molecules
_HDF5 = (".h5", ".hdf5")
_FEWEST = 4  # molecules of a correlation
_Z = 1.959963984540054  # two-sided 95 % of the normal distribution
_NEARLY = 1 - 1e-12  # of a correlation of 1, whose transform is infinite


class PropertyPredictor(Protocol):
    """What judges samples: a network, or a quantum-chemical method."""

    description: str
    """In a few words."""
    units: Mapping[str, str]
    """Of the properties that it predicts, by name."""
    limit: int | None
    """How many molecules of a file it judges, the first ones; None judges all."""

    def __call__(self, molecules: Molecules) -> Mapping[str, NDArray[np.float64]]:
        """Each property of molecules, (M,), NaN where it cannot tell."""
        ...


class Comparison(NamedTuple):
    """Values of one property of molecules, asked for or true, and predicted, (M,) each."""

    asked: NDArray[np.float64]
    predicted: NDArray[np.float64]
    by_atoms: NDArray[np.float64] | None = None
    """What the number of atoms alone tells of real molecules."""


def property_metrics(name: str, values: Comparison) -> dict[str, Estimate]:
    """Errors and correlation of predictions, by the keys of `property_rows`.

    Parameters
    ----------
    name
        Of the property.
    values
        Molecules with a missing value on either side do not count.
    """
    known = np.isfinite(values.asked) & np.isfinite(values.predicted)
    asked, predicted = values.asked[known], values.predicted[known]
    shuffled = np.random.default_rng(_SEED).permutation(asked)
    sizes = Estimate(None, note="of real molecules")
    if values.by_atoms is not None:
        sizes = _mean_absolute(asked - values.by_atoms[known])
    keys = (row.key for row in property_rows(name, ""))
    metrics = (
        _mean_absolute(asked - predicted),
        _mean_absolute(shuffled - predicted),
        sizes,
        _correlation(asked, predicted),
    )
    return dict(zip(keys, metrics, strict=True))


def property_rows(name: str, unit: str) -> tuple[ReportRow, ...]:
    """The rows of a property."""
    key = f"property_{name}"
    return (
        ReportRow(f"{key}_error", name, "mean absolute difference of the value that was asked for "
            "and the predicted one; of real molecules, the predictor's own error", unit),
        ReportRow(f"{key}_shuffled", f"{name}, shuffled", "the same with the values in random "
            "order: a generator that ignores them", unit),
        ReportRow(f"{key}_by_atoms", f"{name}, by atoms", "of the median of real molecules with "
            "as many atoms: a generator that takes nothing but their number from the value", unit),
        ReportRow(f"{key}_correlation", f"{name}, correlation", "of the value that was asked for "
            "and the predicted one (Pearson)"),
    )  # fmt: skip


def _mean_absolute(differences: NDArray[np.float64]) -> Estimate:
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return Estimate(None, note="no molecule has both values")
    mean = Mean.of(np.abs(differences))
    return Estimate(mean.value, mean.interval, mean.count)


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> Estimate:
    """Pearson's coefficient with Fisher's 95 % interval (R. A. Fisher, Metron 1, 3, 1921)."""
    if len(x) < _FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(None, note="too few different values")
    value = float(np.corrcoef(x, y)[0, 1])
    centre, half = np.arctanh(np.clip(value, -_NEARLY, _NEARLY)), _Z / np.sqrt(len(x) - 3)
    return Estimate(value, (float(np.tanh(centre - half)), float(np.tanh(centre + half))), len(x))


def asked_properties(source: Path | Sequence[Any], skip_bad: bool = False) -> Iterator[Molecules]:
    """Molecules with the properties that they were asked for, under these names, in chunks.

    Parameters
    ----------
    source
        An HDF5, SDF or XYZ file of samples, or RDKit molecules.
    skip_bad
        Leave out bad records rather than raise.
    """
    if not isinstance(source, Path):
        yield _renamed(from_rdkit(source))
    elif source.suffix.lower() in _HDF5:
        with MoleculeFile(source) as file:
            for chunk in file.chunks(_CHUNK, skip_bad=skip_bad):
                yield _renamed(chunk.molecules)
    else:
        reader = MoleculeReader(source, skip_bad)
        found = reader.detect_fields()
        chosen = {name: found.units[name] for name in found.units if name.startswith(ASKED)}
        reader.selection = FieldSelection.of(chosen)
        for chunk in reader.chunks(_CHUNK):
            yield _renamed(chunk.molecules)


def _renamed(molecules: Molecules) -> Molecules:
    """The molecules with the properties that they were asked for alone."""
    properties = {
        name.removeprefix(ASKED): column
        for name, column in molecules.properties.items()
        if name.startswith(ASKED)
    }
    return Molecules(
        molecules.positions,
        molecules.atomic_numbers,
        molecules.offsets,
        molecules.formal_charges,
        properties=properties,
    )


def random_molecules(
    file: MoleculeFile, split: str, count: int, names: Collection[str]
) -> Molecules:
    """At most so many random molecules of a split, with some of its properties."""
    members = file.split_indices(split)
    chosen = np.random.default_rng(_SEED).permutation(members)[:count]
    return file.read(np.sort(chosen), [f"properties/{name}" for name in names])


def real_comparisons(
    path: Path, predictor: PropertyPredictor, names: Collection[str]
) -> dict[str, Comparison]:
    """True and predicted properties of held-out real molecules, of the test split if there is one.

    What the number of atoms tells is the median of the training molecules, of those with as many
    atoms.
    """
    with MoleculeFile(path) as file:
        names = [name for name in names if file.property_units.get(name) == predictor.units[name]]
        split = "test" if len(file.split_indices("test")) else "valid"
        limit = MOST_REAL if predictor.limit is None else min(MOST_REAL, predictor.limit)
        if not names or not len(file.split_indices(split)):
            return {}
        real = random_molecules(file, split, limit, names)
        train = random_molecules(file, "train", MOST_TRAINING, names)
    found = predictor(real)
    return {
        name: Comparison(
            real.properties[name].values,
            found[name],
            _medians_by_atoms(train, name)[np.minimum(real.sizes, _MOST_ATOMS)],
        )
        for name in names
    }


def _medians_by_atoms(molecules: Molecules, name: str) -> NDArray[np.float64]:
    """Median of a property by number of atoms, up to `_MOST_ATOMS`; of all where there is none."""
    values, sizes = molecules.properties[name].values, molecules.sizes
    known = np.isfinite(values)
    medians = np.full(_MOST_ATOMS + 1, np.median(values[known]) if known.any() else np.nan)
    for size in np.unique(sizes[known & (sizes < _MOST_ATOMS)]).tolist():
        medians[size] = np.median(values[known & (sizes == size)])
    return medians


def compare_sources(
    sources: Sequence[Path | Sequence[Any]], predictor: PropertyPredictor, skip_bad: bool = False
) -> list[dict[str, Comparison]]:
    """Asked and predicted values of several sets of samples, as `compare_asked`.

    Raises
    ------
    InputError
        No sample was asked for a property that the predictor knows, or in another unit.
    """
    names = [str(s) if isinstance(s, Path) else "molecules" for s in sources]
    compared = [
        compare_asked(name, source, predictor, skip_bad)
        for name, source in zip(names, sources, strict=True)
    ]
    if not any(name in each for each in compared for name in predictor.units):
        raise InputError(
            f"{names[0]} has no property {ASKED}NAME that the predictor knows (it knows "
            f"{', '.join(predictor.units)}); draw samples with `sample --where`"
        )
    return compared


def add_properties(
    report: Report,
    compared: Sequence[Mapping[str, Comparison]],
    predictor: PropertyPredictor,
    real: Path | None,
) -> None:
    """Add to a report how well samples have the properties that they were asked for.

    Parameters
    ----------
    report
        Of the same samples.
    compared
        Values of the samples of each of `report.files`.
    predictor
        What told the properties of samples.
    real
        HDF5 file of real molecules with these properties; None leaves out figures to compare with.
    """
    names = [name for name in predictor.units if any(name in each for each in compared)]
    held_out = {} if real is None else real_comparisons(real, predictor, names)
    rows = [row for name in names for row in property_rows(name, predictor.units[name])]
    report.sections = [*report.sections, ReportSection("properties asked for", rows)]
    report.settings = [
        *report.settings,
        Setting("predictor", "predictor of properties", predictor.description),
    ]
    for file, values in zip(report.files, compared, strict=True):
        for column in file.columns:
            column.metrics |= _metrics(names, values)
        file.notes += _not_predicted(values, predictor)
    if report.reference is not None:
        for column in report.reference.columns:
            column.metrics |= _metrics(names, held_out)
    if missing := [name for name in names if name not in held_out]:
        report.notes.append(
            f"no real molecules to compare {', '.join(missing)} with; name some that have them, "
            "and that neither network was trained on, with --reference FILE.h5"
        )


def compare_asked(
    name: str, source: Path | Sequence[Any], predictor: PropertyPredictor, skip_bad: bool = False
) -> dict[str, Comparison]:
    """Asked and predicted values of samples, by property; NaN for what the predictor cannot tell.

    Raises
    ------
    InputError
        A property was asked for in another unit than the predictor's.
    """
    parts: dict[str, list[Comparison]] = {}
    count = 0
    for molecules in asked_properties(source, skip_bad):
        left = len(molecules) if predictor.limit is None else predictor.limit - count
        if left < len(molecules):
            molecules = molecules.select(np.arange(max(0, left)))
        count += len(molecules)
        if not molecules.properties or not len(molecules):
            continue
        found = predictor(molecules)
        for key, column in molecules.properties.items():
            unit = predictor.units.get(key, "")
            if column.unit and unit and column.unit != unit:
                raise InputError(
                    f"{name}: {ASKED}{key} is in {column.unit}, the predictor's {key} in {unit}; "
                    "train a predictor on data in the same unit"
                )
            if np.isfinite(column.values).any():
                predicted = found.get(key, np.full(len(molecules), np.nan))
                parts.setdefault(key, []).append(Comparison(column.values, predicted))
    return {
        key: Comparison(*(np.concatenate([part[k] for part in each]) for k in range(2)))
        for key, each in parts.items()
    }


def _metrics(names: Sequence[str], values: Mapping[str, Comparison]) -> dict[str, Any]:
    """The metrics of all properties, None where there are no values."""
    found: dict[str, Any] = {}
    for name in names:
        keys = [row.key for row in property_rows(name, "")]
        own = values.get(name)
        found |= dict.fromkeys(keys) if own is None else property_metrics(name, own)
    return found


def _not_predicted(values: Mapping[str, Comparison], predictor: PropertyPredictor) -> list[str]:
    """What the predictor does not know, and how many samples it cannot tell a property of."""
    notes = []
    if unknown := [name for name in values if name not in predictor.units]:
        notes.append(f"asked for {', '.join(unknown)} too, which the predictor does not know")
    for name, each in values.items():
        if name in unknown:
            continue
        missing = int((np.isfinite(each.asked) & ~np.isfinite(each.predicted)).sum())
        if missing:
            notes.append(
                f"{name}: {counted(missing, 'molecules')} left out, which the predictor cannot "
                "judge (other elements, or no result)"
            )
    return notes
