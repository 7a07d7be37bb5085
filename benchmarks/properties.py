"""Do samples have the properties that they were asked for? EDM's protocol, with its figures.

python benchmarks/properties.py --generator runs/conditional --predictor runs/predictor \
    --real half_b.h5 -n 500

The generator is trained on one half of QM9's training molecules, the predictor on the other half
(`preprocess part`). For each property, samples are asked for the value of a random training
molecule, with as many atoms as that has; then for all properties of one molecule at once. Real
molecules are those of the test split of `--real`. With `--xtb`, GFN2-xTB judges the same samples,
calibrated on the validation split. Samples that are there already are not drawn again.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from molgen_energy.api.evaluate import evaluate
from molgen_energy.api.sample import sample_to
from molgen_energy.cli.console import exit_on_error, say, show
from molgen_energy.cli.sample import SamplingBar
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.shards import shards_folder
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.metrics.property_errors import (
    MOST_REAL,
    Comparison,
    PropertyPredictor,
    compare_asked,
    property_metrics,
    property_rows,
    random_molecules,
    real_comparisons,
)
from molgen_energy.metrics.statistics import Estimate, Rate
from molgen_energy.metrics.xtb_predictor import XTBPredictor
from molgen_energy.output import atomic_replace
from molgen_energy.systems.molecules.state import MoleculeState
from molgen_energy.systems.properties.predictor import load_predictor
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device

ALL = "all"
MEV = 27211.386245988  # meV of a hartree, CODATA 2018
LABELS = {
    "alpha": "α, bohr³", "gap": "Δε, meV", "homo": "ε_HOMO, meV", "lumo": "ε_LUMO, meV",
    "mu": "μ, D", "Cv": "Cv, cal/(mol K)",
}  # fmt: skip
EDM = {
    "shuffled values (EDM's U-bound)": (9.01, 1470, 645, 1457, 1.616, 6.857),
    "number of atoms (EDM)": (3.86, 866, 426, 813, 1.053, 1.971),
    "EDM, a network for each property": (2.76, 655, 356, 584, 1.111, 1.101),
    "real molecules (EDM's L-bound)": (0.10, 64, 39, 36, 0.043, 0.040),
}
"""Hoogeboom et al., ICML 2022, table 3, in the order of `LABELS`."""


class Row(NamedTuple):
    """The errors of one set of molecules by one judge."""

    label: str
    errors: Mapping[str, Estimate]
    """By property, in its unit."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", type=Path, required=True, help="run of `train --condition`")
    parser.add_argument("--predictor", type=Path, required=True, help="run on properties")
    parser.add_argument("--real", type=Path, required=True, help="HDF5 file of real molecules")
    parser.add_argument("-n", "--molecules", type=int, default=500, help="for each property")
    parser.add_argument("--alone", help="properties to ask for alone, default: all; '' for none")
    parser.add_argument("--guidance", default="1", help="scales, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the sampler; default: as the checkpoint")
    parser.add_argument("--xtb", action="store_true", help="also judge by GFN2-xTB")
    parser.add_argument("--output", type=Path, default=Path("properties"), help="a folder")
    with exit_on_error():
        measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """Draw, judge and print."""
    network = load_predictor(arguments.predictor, choose_device("auto"))
    state = load_checkpoint(arguments.generator).state_as(MoleculeState)
    asked = [] if state.condition is None else state.condition.names
    names = [name for name in LABELS if name in network.units and name in asked]
    alone = names if arguments.alone is None else list(filter(None, arguments.alone.split(",")))
    if unknown := [name for name in alone if name not in names]:
        raise InputError(f"--alone {unknown_name('property', unknown[0], names)}")
    judges: dict[str, PropertyPredictor] = {"predictor": network}
    if arguments.xtb:
        judges["GFN2-xTB"] = XTBPredictor(arguments.real)
    arguments.output.mkdir(parents=True, exist_ok=True)
    scales = [float(text) for text in arguments.guidance.split(",")]
    drawn = {
        (what, scale): drawn_file(arguments, what, scale)
        for scale in scales
        for what in (*alone, ALL)
    }
    rows = [
        Row("another real molecule of as many atoms", of_other_molecules(arguments.real, names))
    ]
    for name, judge in judges.items():
        say(f"{name}: {judge.description}")
        rows += judged(name, judge, names, scales, drawn, arguments.real)
    show(markdown(names, rows))
    write_rows(arguments.output / "properties.csv", names, rows)
    for (what, scale), path in drawn.items():
        metrics = evaluate(path, metrics="rates", workers=0, per_molecule=False).files[0].metrics
        rates = (metrics[key] for key in ("molecule_stability", "validity"))
        texts = (percent(rate) for rate in rates if isinstance(rate, Rate))
        say(f"{what}, guidance {scale:g}: stable, valid: {', '.join(texts)} %")


def drawn_file(arguments: argparse.Namespace, what: str, scale: float) -> Path:
    """Samples that were asked for one property, or for all."""
    path: Path = arguments.output / f"{what}_{scale:g}.h5"
    if path.exists():
        return path
    with SamplingBar(arguments.molecules, "molecules", "repeat the command", str(path)) as bar:
        if shards_folder(path).exists():
            drawn = sample_to(resume=path, callback=bar)
        else:
            drawn = sample_to(
                path,
                arguments.molecules,
                checkpoint=arguments.generator,
                where=None if what == ALL else {what: None},
                guidance=scale,
                seed=arguments.seed,
                steps=arguments.steps,
                callback=bar,
            )
    if drawn is None or drawn.interrupted:
        raise KeyboardInterrupt
    return path


def judged(
    name: str,
    judge: PropertyPredictor,
    names: list[str],
    scales: list[float],
    drawn: Mapping[tuple[str, float], Path],
    real: Path,
) -> list[Row]:
    """Rows of real molecules and of samples, by one judge."""
    own = [each for each in names if each in judge.units]
    held_out = {each: metrics_of(each, v) for each, v in real_comparisons(real, judge, own).items()}
    rows = [
        Row(f"{text}, {name}", {each: held_out[each][key] for each in held_out})
        for key, text in (
            ("shuffled", "shuffled values"),
            ("by_atoms", "number of atoms"),
            ("error", "real molecules"),
        )
    ]
    for scale in scales:
        alone = {
            each: compare_asked(each, drawn[each, scale], judge).get(each)
            for each in own
            if (each, scale) in drawn
        }
        together = compare_asked(ALL, drawn[ALL, scale], judge)
        for text, found in (("asked for it alone", alone), ("asked for all", together)):
            errors = {
                each: metrics_of(each, values)["error"]
                for each, values in found.items()
                if values is not None and each in own
            }
            if errors:
                rows.append(Row(f"ours, {text}, guidance {scale:g}, {name}", errors))
    return rows


def of_other_molecules(real: Path, names: list[str]) -> dict[str, Estimate]:
    """Errors of the value of another test molecule with as many atoms, chosen at random.

    So samples err that have the right number of atoms and nothing else of what was asked for.
    """
    with MoleculeFile(real) as file:
        molecules = random_molecules(file, "test", MOST_REAL, names)
    order = np.lexsort([np.random.default_rng(0).random(len(molecules)), molecules.sizes])
    same = np.flatnonzero(np.diff(molecules.sizes[order]) == 0)
    one, other = order[same], order[same + 1]
    found = {}
    for name in names:
        values = molecules.properties[name].values
        found[name] = metrics_of(name, Comparison(values[one], values[other]))["error"]
    return found


def metrics_of(name: str, values: Comparison) -> dict[str, Estimate]:
    """The metrics of a property by the last part of their keys."""
    found = property_metrics(name, values)
    start = len(property_rows(name, "")[0].key) - len("error")
    return {key[start:]: estimate for key, estimate in found.items()}


def markdown(names: list[str], rows: list[Row]) -> str:
    """The table for the page of results."""
    lines = [
        f"| mean absolute error | {' | '.join(LABELS[name] for name in names)} |",
        f"|{'---|' * (1 + len(names))}",
    ]
    for row in rows:
        cells = (shown(name, row.errors.get(name)) for name in names)
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    for label, values in EDM.items():
        by_name = dict(zip(LABELS, values, strict=True))
        lines.append(f"| {label} | {' | '.join(f'{by_name[name]:g}' for name in names)} |")
    return "\n".join(lines)


def shown(name: str, estimate: Estimate | None) -> str:
    """A value with its interval, orbital energies in meV."""
    if estimate is None or estimate.value is None:
        return ""
    factor = MEV if "meV" in LABELS[name] else 1.0
    digits = ".0f" if factor > 1 else ".2f"
    text = f"{factor * estimate.value:{digits}}"
    if estimate.interval is None:
        return text
    low, high = (f"{factor * value:{digits}}" for value in estimate.interval)
    return f"{text} [{low}, {high}]"


def percent(rate: Rate) -> str:
    """A rate with its interval, in per cent."""
    assert rate.value is not None and rate.interval is not None
    low, high = (f"{100 * value:.1f}" for value in rate.interval)
    return f"{100 * rate.value:.1f} [{low}, {high}]"


def write_rows(path: Path, names: list[str], rows: list[Row]) -> None:
    """All errors as CSV, in the units of the data."""
    with atomic_replace(path) as output, output.temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "property", "error", "low", "high", "samples"])
        for row in rows:
            for name in names:
                found = row.errors.get(name)
                if found is not None and found.value is not None:
                    low, high = found.interval or (None, None)
                    writer.writerow([row.label, name, found.value, low, high, found.count])


if __name__ == "__main__":
    main()
