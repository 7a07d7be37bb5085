"""How rough the ideal coordinates of the Chemical Component Dictionary are, and what relaxation
changes.

    python scripts/measure_relaxation.py --mmff 500 --xtb 32

prints two tables for `docs/how_to/data.md`: faults of the coordinates as they are, of all ligands
that `preprocess ccd` keeps, and energies, positions and bond lengths of a random sample before and
after relaxation, with 95 % intervals by 2,000 bootstrap samples of molecules. 500 molecules of
MMFF94 take half a minute of one core, 32 of GFN2-xTB four minutes.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from biotite.structure.io.pdbx import BinaryCIFFile
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdCIPLabeler

from molgen_energy.chemistry.anomalies import BOND, Neighbours, find_anomalies
from molgen_energy.chemistry.cleaning import TOLERANCE, length_deviations, lengths_fit
from molgen_energy.chemistry.conformers import Conformers, GivenConformer, relax
from molgen_energy.chemistry.geometry import type_name
from molgen_energy.chemistry.rdkit import build
from molgen_energy.chemistry.relaxation_changes import displacements, length_changes
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.datasets.ccd import ChemicalComponents, dictionary_path
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.workers import WorkerPool

_TYPES = 8  # of bonds
_KILOCALORIE = 23.0605  # kcal/mol in an eV


@dataclass(frozen=True)
class Timed:
    """A relaxed conformer, or why there is none, and the CPU time that it took (s)."""

    result: Conformers
    seconds: float


def timed(item: GivenConformer) -> Timed:
    start = time.process_time()
    result = relax(item)
    return Timed(result, time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mmff", type=int, default=500, help="molecules for MMFF94")
    parser.add_argument("--xtb", type=int, default=32, help="of these, for GFN2-xTB")
    parser.add_argument("--stereo", type=int, default=4000, help="molecules for stereochemistry")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chunks = list(ChemicalComponents(workers=options.workers).chunks(DatasetLog()))
    records = np.concatenate([chunk.records for chunk in chunks])
    molecules = Molecules.concatenate([chunk.molecules for chunk in chunks])
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(molecules))
    faults(molecules)
    few = order[: options.stereo]
    stereochemistry(MoleculeChunk(records[few], molecules.select(few)))
    some = molecules.select(order[: options.mmff])
    by_mmff = relaxed(some, "mmff94", options.workers)
    report(some, by_mmff, "MMFF94", len(molecules), rng)
    some = molecules.select(order[: options.xtb])
    report(some, relaxed(some, "gfn2-xtb", options.workers), "GFN2-xTB", len(molecules), rng)
    gains = [
        _KILOCALORIE * (xtb_energy(before) - xtb_energy(one.result.conformers[0]))
        for before, one in zip(some, by_mmff, strict=False)
        if one.result.conformers
    ]
    print(
        f"\nGFN2-xTB energy of the ideal coordinates over that of the minima of MMFF94: median "
        f"{interval(np.median, np.array(gains), rng)} kcal/mol of {len(gains)}, lower in "
        f"{sum(gain < 0 for gain in gains)}"
    )


def faults(molecules: Molecules) -> None:
    """Print what is wrong with the coordinates of all molecules."""
    bonds = length_deviations(molecules)
    bare = Molecules(molecules.positions, molecules.atomic_numbers, molecules.offsets)
    near = {tuple(sorted(pair)) for pair in Neighbours(bare).edges.tolist()}
    given = {tuple(sorted(pair)) for pair in molecules.atoms_of_bonds().tolist()}
    owner = molecules.molecule_index
    partners: dict[int, set[int]] = {}
    for i, j in given:
        partners.setdefault(i, set()).add(j)
        partners.setdefault(j, set()).add(i)
    clashes = {(i, j) for i, j in near - given if not partners[i] & partners[j]}
    kinds = {
        f"bonds off the sum of covalent radii by more than {TOLERANCE:.0%}": (
            (bonds > TOLERANCE).sum(), len(bonds), (~lengths_fit(molecules)).sum(),
        ),
        f"bonds longer than {BOND} times the sum": owners(given - near, owner, len(bonds)),
        f"pairs without a bond below {BOND} times the sum": owners(near - given, owner, None),
        "of these, with no common neighbour": owners(clashes, owner, None),
        "pairs below half of the sum": (
            None, None, find_anomalies(molecules).kinds["overlapping"].sum()
        ),
    }  # fmt: skip
    print(f"{len(molecules):,} molecules\n\n| | pairs | molecules |\n|---|---|---|")
    for what, (count, total, affected) in kinds.items():
        of = "" if count is None else f"{count:,}" if total is None else f"{count:,} of {total:,}"
        print(f"| {what} | {of} | {affected:,} |")


def owners(
    pairs: Iterable[tuple[int, ...]], owner: NDArray[np.int64], total: int | None
) -> tuple[int, int | None, int]:
    """How many pairs, of how many, and in how many molecules."""
    found = list(pairs)
    return len(found), total, len({int(owner[i]) for i, _ in found})


def stereochemistry(chunk: MoleculeChunk) -> None:
    """Print how often R, S, E and Z of the coordinates are those of the dictionary."""
    block = BinaryCIFFile.read(dictionary_path()).block
    atoms, bonds = block["chem_comp_atom"], block["chem_comp_bond"]
    names, of_atom = np.unique(atoms["comp_id"].as_array(str), return_inverse=True)
    order = np.argsort(of_atom, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(of_atom))])
    centres = atoms["pdbx_stereo_config"].as_array(str)[order]
    numbers = {
        key: k
        for k, key in enumerate(
            zip(of_atom[order].tolist(), atoms["atom_id"].as_array(str)[order].tolist(),
                strict=True)
        )
    }  # fmt: skip
    labels = bonds["pdbx_stereo_config"].as_array(str)
    component = np.searchsorted(names, bonds["comp_id"].as_array(str))
    ends = [bonds[f"atom_id_{k}"].as_array(str) for k in (1, 2)]
    doubles = {}
    for k in np.flatnonzero(np.isin(labels, ["E", "Z"])).tolist():
        i, j = (numbers[int(component[k]), str(end[k])] for end in ends)
        doubles[min(i, j), max(i, j)] = str(labels[k])
    equal = Counter[str]()
    counts = Counter[str]()
    for record, molecule in zip(chunk.records.tolist(), chunk.molecules, strict=True):
        start = int(first[record - 1])
        found_centres, found_doubles = perceived(molecule)
        for k, label in found_centres.items():
            if centres[start + k] in ("R", "S"):
                counts["centres"] += 1
                equal["centres"] += centres[start + k] == label
        for (i, j), label in found_doubles.items():
            expected = doubles.get((start + i, start + j))
            if expected is not None:
                counts["double bonds"] += 1
                equal["double bonds"] += expected == label
    for what, count in counts.items():
        print(
            f"\n{what} of {len(chunk):,} molecules with a label in both: {equal[what]:,} of "
            f"{count:,} agree ({equal[what] / count:.2%})"
        )


def perceived(molecule: Molecule) -> tuple[dict[int, str], dict[tuple[int, int], str]]:
    """R and S of atoms, and E and Z of bonds, by RDKit from the coordinates."""
    built = build(molecule, positions=True)
    with rdBase.BlockLogs():
        Chem.SanitizeMol(built)
        Chem.AssignStereochemistryFrom3D(built)
        try:
            rdCIPLabeler.AssignCIPLabels(built)
        except RuntimeError:  # too many branches
            return {}, {}
    centres = {
        atom.GetIdx(): atom.GetProp("_CIPCode").upper()
        for atom in built.GetAtoms()
        if atom.HasProp("_CIPCode")
    }
    bonds = {}
    for bond in built.GetBonds():
        if bond.HasProp("_CIPCode"):
            i, j = sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))
            bonds[i, j] = bond.GetProp("_CIPCode").upper()
    return centres, bonds


def relaxed(molecules: Molecules, relaxation: str, workers: int) -> list[Timed]:
    """Each molecule relaxed, by worker processes."""
    bare = Molecules(
        molecules.positions, molecules.atomic_numbers, molecules.offsets,
        molecules.formal_charges, molecules.bonds,
    )  # fmt: skip
    items = (
        GivenConformer(f"molecule {k + 1}", molecule, relaxation) for k, molecule in enumerate(bare)
    )
    preload = ["molgen_energy.chemistry.conformers", "ase", "tblite.ase"]
    with WorkerPool(workers, preload=preload) as pool:
        return [found for _, found in pool.map(timed, items)]


def xtb_energy(molecule: Molecule) -> float:
    """eV by GFN2-xTB."""
    from ase import Atoms
    from tblite.ase import TBLite

    assert molecule.formal_charges is not None
    atoms = Atoms(molecule.atomic_numbers, molecule.positions.astype(np.float64))
    charge = int(molecule.formal_charges.sum())
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
    return float(atoms.get_potential_energy())


def interval(
    statistic: Callable[..., NDArray[np.float64]],
    values: NDArray[np.float64],
    rng: np.random.Generator,
) -> str:
    """A statistic of values (M,) or (M, K) over the first axis, with its bootstrap interval."""
    samples = [
        statistic(values[rng.integers(0, len(values), len(values))], axis=0) for _ in range(2000)
    ]
    low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    return f"{float(statistic(values, axis=0)):.3g} [{low:.3g}, {high:.3g}]"


def ratio(values: NDArray[np.float64], axis: int = 0) -> NDArray[np.float64]:
    """Sum of the first column over that of the second."""
    first, second = values.sum(axis=axis)
    return np.asarray(first / second if second else np.nan)


def report(
    molecules: Molecules,
    found: list[Timed],
    name: str,
    all_molecules: int,
    rng: np.random.Generator,
) -> None:
    """Print what a relaxation changes, how often it fails, and what it takes."""
    kept = [k for k, one in enumerate(found) if one.result.conformers]
    before = molecules.select(np.array(kept))
    after = Molecules.from_list([found[k].result.conformers[0] for k in kept])
    energies = np.array([found[k].result.energies[0] for k in kept])
    seconds = np.array([one.seconds for one in found])
    print(f"\n{name}: {len(kept)} of {len(found)} molecules relaxed")
    for reason, count in Counter(o.result.failure for o in found if o.result.failure).items():
        print(f"  {count} {reason}")
    print(
        f"  energy lost, kcal/mol: median {interval(np.median, energies, rng)}, by atom "
        f"{interval(np.median, energies / before.sizes, rng)}\n"
        f"  RMSD, Å: median {interval(np.median, displacements(before, after), rng)}\n"
        f"  CPU s of a molecule: mean {interval(np.mean, seconds, rng)}, most {seconds.max():.3g}; "
        f"of {all_molecules:,}: {seconds.mean() * all_molecules / 3600:.3g} h"
    )
    changes = length_changes(before, after)
    codes, counts = np.unique(changes.code, return_counts=True)
    common = codes[np.argsort(-counts)][:_TYPES]
    print("\n| bond | number | mean abs. change, Å | mean change, Å |\n|---|---|---|---|")
    for code in (None, *common.tolist()):
        which = np.ones(len(changes.code), bool) if code is None else changes.code == code
        owner, value = changes.molecule[which], changes.value[which].astype(np.float64)
        cells = []
        for values in (np.abs(value), value):
            sums = [np.bincount(owner, w, len(before)) for w in (values, np.ones(len(values)))]
            cells.append(interval(ratio, np.stack(sums, axis=1), rng))
        label = "all" if code is None else type_name("bond length", code)
        print(f"| {label} | {which.sum():,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
