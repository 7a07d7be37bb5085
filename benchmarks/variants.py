"""Similarity of variants to their molecule, and their validity, by the strength of the noise.

    python benchmarks/variants.py --checkpoint qm9_energy --data qm9.h5 --image variants.png

Takes molecules of the test split at random, draws variants of each at every strength
(`sample --like --strength`), and compares them with their molecule: whether RDKit sanitises them in
one fragment, how many are the molecule itself, Tanimoto similarity of Morgan fingerprints, and how
far the atoms moved. Bonds are those that the network generates, else perceived. Two rows are for
comparison: new molecules of as many atoms, which begin with pure noise (strength 1), and other test
molecules. Intervals are of means over molecules. Variants stay in --work; those that are there are
not drawn again.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from molgen_energy.api.sample import sample_to
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.chemistry.geometry import rmsd
from molgen_energy.chemistry.identity import Identity, identify
from molgen_energy.chemistry.substructures import substructures_of
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.metrics.statistics import Mean
from molgen_energy.output import atomic_replace, atomic_write
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules.control.variants import tanimoto

Array = NDArray[np.float64]
COLOURS = ("#2563c9", "#d9651b", "#1f9254")
COLUMNS = ("strength", "valid", "itself", "unique", "similarity", "moved")


class Compared(NamedTuple):
    """Of the variants of each of M molecules, means (M,); NaN where no variant counts."""

    valid: Array
    """Share that RDKit sanitises in one fragment without missing hydrogens."""
    itself: Array
    """Share of valid ones with the SMILES of the molecule."""
    unique: Array
    """Distinct SMILES of valid ones, relative to their number."""
    similarity: Array
    """Tanimoto similarity of valid ones to the molecule."""
    moved: Array
    """RMSD of all atoms to those of the molecule after alignment, in their order, Å."""


def with_bonds(molecules: Molecules) -> Molecules:
    return perceive(molecules) if molecules.bonds is None else molecules


def is_valid(identity: Identity) -> bool:
    return bool(identity.smiles) and identity.fragments == 1 and not identity.incomplete


def fingerprint(smiles: str) -> bytes:
    found = substructures_of(smiles)
    return b"" if found is None else found.fingerprint


def compare(variants: Sequence[Sequence[Molecule]], molecules: Molecules) -> Compared:
    """Variants of each molecule beside it."""
    rows = []
    for drawn, molecule in zip(variants, molecules, strict=True):
        name = identify(molecule).smiles
        bits = fingerprint(name)
        found = [identity.smiles for one in drawn if is_valid(identity := identify(one))]
        similar = [tanimoto(fingerprint(smiles), bits) for smiles in found]
        moved = [
            rmsd(one.positions.astype(np.float64), molecule.positions.astype(np.float64))
            for one in drawn
            if len(one) == len(molecule) and np.isfinite(one.positions).all()
        ]
        rows.append(
            (
                len(found) / len(drawn),
                _mean([smiles == name for smiles in found]),
                len(set(found)) / len(found) if found else math.nan,
                _mean(similar),
                _mean(moved),
            )
        )
    return Compared(*np.array(rows, np.float64).T)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def drawn_variants(options: argparse.Namespace, molecules: Molecules, strength: float) -> Molecules:
    """The variants of all molecules, one molecule after another; drawn once."""
    path = options.work / f"variants_{strength:g}.h5"
    if not path.exists():
        sample_to(
            path,
            options.variants,
            checkpoint=options.checkpoint,
            like=to_rdkit(molecules),
            strength=strength,
            steps=options.steps,
            sampler=options.sampler,
            seed=options.seed,
            device=options.device,
        )
    with MoleculeFile(path) as file:
        return with_bonds(file.load())


def strengths_compared(
    options: argparse.Namespace, molecules: Molecules, others: Molecules
) -> Iterator[tuple[str, Compared]]:
    """Name and values of each row of the table."""
    each = options.variants
    for strength in (*options.strengths, 1.0):
        drawn = list(drawn_variants(options, molecules, strength))
        groups = [drawn[k * each : (k + 1) * each] for k in range(len(molecules))]
        yield (f"{strength:g}" if strength < 1 else "new molecules"), compare(groups, molecules)
        say(f"strength {strength:g} is done")
    real = list(others)
    groups = [real[k * each : (k + 1) * each] for k in range(len(molecules))]
    yield "other test molecules", compare(groups, molecules)


def table(rows: Sequence[tuple[str, Compared]]) -> str:
    """Markdown; means over molecules with 95 % intervals."""
    lines = [
        "| strength | valid, % | the molecule itself, % | unique, % | similarity | moved, Å |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows:
        cells = [mean_text(100 * values, 1, 100) for values in found[:3]]
        cells += [mean_text(found.similarity, 2, 1)]
        cells += ["" if name == "other test molecules" else mean_text(found.moved, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_text(values: Array, digits: int, most: float = math.inf) -> str:
    """A mean with its interval, from 0 to `most`; nothing where no molecule has a value."""
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    mean = Mean.of(known)
    if mean.interval is None:
        return f"{mean.value:.{digits}f}"
    low, high = (min(max(bound, 0.0), most) for bound in mean.interval)
    return f"{mean.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def draw_curves(
    path: Path, strengths: Sequence[float], rows: Sequence[tuple[str, Compared]]
) -> None:
    """Similarity, the molecule itself and validity by strength; dotted: new molecules."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = (("similarity", "similarity"), ("the molecule itself", "itself"), ("valid", "valid"))
    for (label, name), colour in zip(curves, COLOURS, strict=True):
        found = [Mean.of(v[np.isfinite(v)]) for v in (getattr(row, name) for _, row in rows)]
        here = found[: len(strengths)]
        values = [mean.value for mean in here]
        bounds = [mean.interval or (mean.value, mean.value) for mean in here]
        axes.plot(strengths, values, marker="o", markersize=3.5, color=colour, label=label)
        axes.fill_between(strengths, *zip(*bounds, strict=True), color=colour, alpha=0.15, lw=0)
        axes.axhline(found[len(strengths)].value, color=colour, lw=0.9, ls=":")
    axes.set(xlabel="strength", xlim=(0, None), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_replace(path) as output:
        figure.savefig(output.temporary, format="png", dpi=160)


def run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    path = bundled_sample() if options.data is None else options.data
    random = np.random.default_rng(options.seed)
    with MoleculeFile(path) as file:
        test = random.permutation(file.split_indices("test"))
        columns = file.columns & {"bonds", "formal_charges"}
        count = options.molecules
        molecules = with_bonds(_read(file, test[:count], columns))
        others = with_bonds(_read(file, test[count : count * (1 + options.variants)], columns))
    rows = list(strengths_compared(options, molecules, others))
    say(
        f"{options.checkpoint}: {len(molecules)} test molecules of {path.name}, "
        f"{options.variants} variants each, seed {options.seed}"
    )
    print(table(rows))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, found in rows:
        means = (Mean.of(values[np.isfinite(values)]).value for values in found)
        writer.writerow([name, *(f"{value:.5g}" for value in means)])
    atomic_write(options.work / "variants.csv", text.getvalue().encode())
    if options.image is not None:
        draw_curves(options.image, options.strengths, rows)


def _read(file: MoleculeFile, which: NDArray[np.int64], columns: frozenset[str]) -> Molecules:
    """Molecules in the order of their numbers in the file."""
    return file.read(np.sort(which), columns)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default="qm9_energy", help="a run, or the name of pretrained weights")
    add("--data", type=Path, help="HDF5 file with a test split; default: the bundled sample")
    add("--molecules", type=int, default=50, help="test molecules (default: %(default)s)")
    add("--variants", type=int, default=10, help="of each (default: %(default)s)")
    add(
        "--strengths",
        type=numbers,
        default=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
        help="with commas, below 1 (default: 0.05 to 0.5)",
    )
    add("--steps", type=int, default=100, help="of the sampler (default: %(default)s)")
    add("--sampler", help="default: that of the checkpoint")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--work", type=Path, default=Path("variants"), help="folder (default: %(default)s)")
    add("--image", type=Path, help="picture of the curves, PNG")
    with exit_on_error():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
