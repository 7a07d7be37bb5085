"""Coverage and matching of conformers on test molecules: networks beside RDKit's ETKDG.

    python benchmarks/conformers.py --data ccd.h5 --checkpoint runs/conformers
    python benchmarks/conformers.py --data qm9.h5 --threshold 0.5 --checkpoint runs/jodo

Takes molecules of the test split at random. Each method gets the SMILES of a molecule with the
stereochemistry of its positions, and draws --samples conformers of it: twice as many as there are
references, which is one in both data sets. Rows: each checkpoint (`sample --smiles`), ETKDG version
3, and both with a relaxation by MMFF94, which keeps what has no minimum as it was. "stereo" is the
share of conformers that have all stereocentres and double bonds of the SMILES, of those that
specify some. Intervals are of means over molecules. Samples stay in --work and are not drawn again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom
from variants import mean_text

from molgen_energy.api.sample import sample_to
from molgen_energy.chemistry.conformers import parse_smiles
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.chemistry.relaxation import relax_mmff
from molgen_energy.chemistry.stereo import Stereochemistry
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.errors import InputError
from molgen_energy.metrics.conformers import (
    DRUG_THRESHOLD,
    ConformerScores,
    conformer_rmsd,
    heavy_atoms,
)
from molgen_energy.metrics.statistics import Rate


class Target(NamedTuple):
    """A test molecule."""

    smiles: str
    """With the stereochemistry of its positions."""
    reference: Chem.Mol
    """Without hydrogens."""


class Drawn(NamedTuple):
    """The conformers of a method."""

    conformers: list[list[Chem.Mol]]
    """Of each target, with hydrogens; none where the method failed."""
    seconds: float
    """Of processor time, for all; 0 where they were there."""


def targets_of(path: Path, count: int, most_atoms: int, seed: int) -> list[Target]:
    """Random test molecules that have one fragment and a SMILES that gives them back."""
    found: dict[str, Target] = {}
    with MoleculeFile(path) as file:
        test = np.random.default_rng(seed).permutation(file.split_indices("test"))
        sizes = file.sizes(test)
        for number in test[sizes <= most_atoms]:
            one = file.read(np.array([number]), frozenset({"bonds", "formal_charges"}))
            target = _target(to_rdkit(one)[0])
            if target is not None:
                found.setdefault(target.smiles, target)
            if len(found) == count:
                break
    return list(found.values())


def _target(molecule: Chem.Mol) -> Target | None:
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(molecule)
            Chem.AssignStereochemistryFrom3D(molecule)
            smiles = Chem.MolToSmiles(Chem.RemoveHs(molecule))
            parsed, _ = parse_smiles(smiles)
        except ValueError:
            return None
    if parsed.GetNumAtoms() != molecule.GetNumAtoms():
        return None
    return Target(smiles, heavy_atoms(molecule))


def embedded(targets: Sequence[Target], count: int, seed: int) -> Drawn:
    """Conformers by ETKDG."""
    began, found = time.process_time(), []
    for target in targets:
        molecule, _ = parse_smiles(target.smiles)
        parameters: Any = rdDistGeom.ETKDGv3()
        parameters.randomSeed = seed + 1  # with 0 all conformers are the same
        with rdBase.BlockLogs():
            ids = list(rdDistGeom.EmbedMultipleConfs(molecule, count, parameters))
        found.append([Chem.Mol(molecule, confId=k) for k in ids])
    return Drawn(found, time.process_time() - began)


def sampled(checkpoint: str, targets: Sequence[Target], options: argparse.Namespace) -> Drawn:
    """Conformers by a network."""
    path = options.work / f"{Path(checkpoint).name}_{options.data.stem}.h5"
    began = time.process_time()
    there = path.exists()
    if not there:
        sample_to(
            path,
            options.samples,
            checkpoint=checkpoint,
            smiles=[target.smiles for target in targets],
            steps=options.steps,
            sampler=options.sampler,
            seed=options.seed,
            device=options.device,
        )
    seconds = 0.0 if there else time.process_time() - began
    with MoleculeFile(path) as file:
        drawn = to_rdkit(file.load())
    if len(drawn) != options.samples * len(targets):
        raise InputError(f"{path} is of other options; remove it")
    each = options.samples
    return Drawn([drawn[k * each : (k + 1) * each] for k in range(len(targets))], seconds)


def relaxed(drawn: Drawn) -> Drawn:
    """The same at minima of MMFF94, where there are some."""
    began, found = time.process_time(), []
    for group in drawn.conformers:
        copies = [Chem.Mol(molecule) for molecule in group]
        for molecule in copies:
            _relax(molecule)
        found.append(copies)
    return Drawn(found, drawn.seconds + time.process_time() - began)


def _relax(molecule: Chem.Mol) -> None:
    before = molecule.GetConformer().GetPositions()
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(molecule)
            relax_mmff(molecule, -1)
        except (ValueError, RuntimeError):
            molecule.GetConformer().SetPositions(before)


def stereo_rate(targets: Sequence[Target], drawn: Drawn) -> Rate:
    """Conformers with all stereochemistry of their SMILES, of those that specify some."""
    right = total = 0
    for target, group in zip(targets, drawn.conformers, strict=True):
        stereo = Stereochemistry.of(parse_smiles(target.smiles)[0])
        if len(stereo) and group:
            positions = np.stack([m.GetConformer().GetPositions() for m in group])
            right += int(stereo.matches(positions).all.sum())
            total += len(group)
    return Rate(right, total)


def scores_of(targets: Sequence[Target], drawn: Drawn, threshold: float) -> ConformerScores:
    """Scores of the molecules of which there are conformers."""
    pairs = [(t, group) for t, group in zip(targets, drawn.conformers, strict=True) if group]
    return ConformerScores(
        tuple(target.smiles for target, _ in pairs),
        tuple(
            conformer_rmsd([heavy_atoms(m) for m in group], [target.reference])
            for target, group in pairs
        ),
        threshold,
        len(targets) - len(pairs),
    )


def methods(targets: Sequence[Target], options: argparse.Namespace) -> Iterator[tuple[str, Drawn]]:
    for checkpoint in options.checkpoint:
        drawn = sampled(checkpoint, targets, options)
        yield Path(checkpoint).name, drawn
        yield f"{Path(checkpoint).name}, MMFF94", relaxed(drawn)
    drawn = embedded(targets, options.samples, options.seed)
    yield "ETKDG", drawn
    yield "ETKDG, MMFF94", relaxed(drawn)


def row(name: str, targets: Sequence[Target], drawn: Drawn, threshold: float) -> str:
    scores, stereo = scores_of(targets, drawn, threshold), stereo_rate(targets, drawn)
    count = sum(map(len, drawn.conformers))
    cells = [
        mean_text(100 * scores.coverage_recall, 1, 100),
        mean_text(scores.matching_recall, 3),
        f"{np.median(scores.matching_recall):.3f}",
        mean_text(100 * scores.coverage_precision, 1, 100),
        mean_text(scores.matching_precision, 3),
        f"{np.median(scores.matching_precision):.3f}",
        "" if stereo.value is None else f"{100 * stereo.value:.1f}",
        f"{scores.without_samples}",
        "" if not drawn.seconds else f"{drawn.seconds / max(count, 1):.3f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    targets = targets_of(options.data, options.molecules, options.most_atoms, options.seed)
    if not targets:
        raise InputError(
            f"{options.data} has no test molecules of at most {options.most_atoms} atoms"
        )
    atoms = [target.reference.GetNumAtoms() for target in targets]
    say(
        f"{len(targets)} test molecules of {options.data.name}, {np.mean(atoms):.1f} heavy atoms "
        f"on average, {options.samples} conformers each, threshold {options.threshold:g} Å, seed "
        f"{options.seed}"
    )
    print(
        "| method | COV-R, % | MAT-R, Å | median | COV-P, % | MAT-P, Å | median | stereo, % | "
        "molecules without any | s each |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for name, drawn in methods(targets, options):
        print(row(name, targets, drawn, options.threshold), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="HDF5 file with bonds and a test split")
    add("--checkpoint", action="append", default=[], help="a run with bonds; repeat for several")
    add("--molecules", type=int, default=100, help="test molecules (default: %(default)s)")
    add("--most-atoms", type=int, default=1000, help="of a molecule (default: %(default)s)")
    add("--samples", type=int, default=2, help="of a molecule (default: %(default)s)")
    add("--threshold", type=float, default=DRUG_THRESHOLD, help="Å (default: %(default)s)")
    add("--steps", type=int, default=50, help="of the sampler (default: %(default)s)")
    add("--sampler", help="default: that of the checkpoint")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--work", type=Path, default=Path("conformers"), help="folder (default: %(default)s)")
    with exit_on_error():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
