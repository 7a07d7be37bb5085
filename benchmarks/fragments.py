"""Molecules with fixed atoms: how many are valid, and how many are the molecule they come from.

    python benchmarks/fragments.py --checkpoint qm9_energy --data qm9.h5 --work work
    python benchmarks/fragments.py --checkpoint ccd_energy --data ccd.h5 --work work --kinds part

Cuts held-out molecules (test split) into atoms that stay and atoms to generate, of three kinds:
`part`, one side of a single bond outside of rings; `linker`, what joins two ends; `groups`, all but
the scaffold of Bemis and Murcko with its hydrogens. Hydrogens go with their atom. `sample --keep`
gets the fixed atoms and the number of the others, once for each number in --resample. Beside the
samples: `replacement`, without the anchors at open valences and without repeats (--replacement);
`substituents`, which puts in place of the side that is cut off one of a training molecule with as
many atoms, at random, in the direction of the bond (parts alone).

Measures, with 95 % intervals of bootstraps over molecules: `valid`, samples that RDKit sanitises in
one fragment; `complete`, those without missing hydrogens; `unique`, distinct ones among the
complete samples of a molecule; `recovered`, molecules of which a sample has the SMILES; `novel`,
complete ones that are no training molecule; QED, SA score and rings of complete ones. These are the
measures of DiffLinker (Igashov et al., Nat. Mach. Intell. 6, 417, 2024). The last column is the
largest distance of a fixed atom from its place, in Å. Samples stay in --work, and those that are
there are not drawn again.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem.Scaffolds.MurckoScaffold import GetScaffoldForMol
from rich.console import Console
from rich.table import Table

from molgen_energy.api.sample import sample_to
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.chemistry.descriptors import DESCRIPTORS, describe
from molgen_energy.chemistry.identity import Identity, identify
from molgen_energy.chemistry.rdkit import build
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.output import atomic_write
from molgen_energy.systems.molecules.control import fragments

Bool = NDArray[np.bool_]
KINDS = ("part", "linker", "groups")
_SHOWN = ("qed", "sa_score", "rings")
COLUMNS = ("valid", "complete", "unique", "recovered", "novel", *_SHOWN, "moved")
_FEWEST_NEW, _FEWEST_KEPT = 2, 3  # atoms without hydrogens
_DRAWS = 1000  # of the bootstrap
_HELD_UNTIL = fragments.HELD_UNTIL
_TRIED = 3000  # training molecules with substituents


class Cut(NamedTuple):
    """A molecule and which of its atoms stay."""

    molecule: Molecule
    kept: Bool
    bond: tuple[int, int] | None = None
    """Of a part: the atom that stays, and the one that does not."""


class Measured(NamedTuple):
    """Of the samples of each of M molecules, (M, S), and of the molecules, (M,)."""

    valid: NDArray[np.float64]
    complete: NDArray[np.float64]
    novel: NDArray[np.float64]
    """NaN of incomplete ones."""
    descriptors: NDArray[np.float64]
    """Of `_SHOWN`, (3, M, S)."""
    moved: float
    """Å."""
    unique: NDArray[np.float64]
    recovered: NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="qm9_energy")
    parser.add_argument("--data", type=Path, required=True, help="HDF5 with splits")
    parser.add_argument("--work", type=Path, required=True, help="folder of the samples")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--molecules", type=int, default=100, help="of each kind")
    parser.add_argument("--samples", type=int, default=5, help="of each molecule")
    parser.add_argument("--resample", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--replacement", action="store_true", help="also without anchors")
    parser.add_argument("--steps", type=int, help="of the sampler; default: of the checkpoint")
    parser.add_argument("--sampler", help="default: of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="file for the table")
    arguments = parser.parse_args()
    with exit_on_error():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Cut, draw, measure, and show a table."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    with MoleculeFile(arguments.data) as file:
        held_out, training = file.load("test"), file.load("train")
    rng = np.random.default_rng(arguments.seed)
    known = _known(training, arguments.work / f"{arguments.data.stem}.smiles")
    rows: list[tuple[str, ...]] = []
    for kind in arguments.kinds:
        cuts = list(_cuts(held_out, kind, arguments.molecules, rng))
        say(f"{kind}: {len(cuts)} molecules")
        for resample in arguments.resample:
            drawn = _drawn(cuts, kind, resample, arguments)
            rows.append(_row(kind, f"resample {resample}", measure(cuts, drawn, known), rng))
        if arguments.replacement:
            drawn = _drawn(cuts, kind, 0, arguments)
            rows.append(_row(kind, "replacement", measure(cuts, drawn, known), rng))
        if kind == "part":
            attached = list(_attached(cuts, training, arguments.samples, rng))
            rows.append(_row(kind, "substituents", measure(cuts, attached, known), rng))
    table = Table(title=f"{arguments.checkpoint}, {arguments.samples} samples of each molecule")
    for name in ("kind", "method", *COLUMNS):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    if arguments.csv is not None:
        text = io.StringIO()
        csv.writer(text).writerows([("kind", "method", *COLUMNS), *rows])
        atomic_write(arguments.csv, text.getvalue().encode())


def _some(molecules: Molecules, rng: np.random.Generator, count: int) -> Iterator[Molecule]:
    """Molecules in random order, with bonds."""
    order = rng.permutation(len(molecules))[:count]
    for place in range(0, len(order), 1000):
        some = molecules.select(order[place : place + 1000])
        yield from perceive(some) if some.bonds is None else some


def _known(molecules: Molecules, path: Path) -> set[str]:
    """The SMILES of training molecules, which a file keeps."""
    if not path.exists():
        every = _some(molecules, np.random.default_rng(0), len(molecules))
        atomic_write(path, "\n".join(sorted(set(map(_smiles, every)))).encode())
    return set(path.read_text().split("\n"))


def _smiles(molecule: Molecule) -> str:
    return identify(molecule).smiles


def _cuts(molecules: Molecules, kind: str, count: int, rng: np.random.Generator) -> Iterator[Cut]:
    """The first molecules, in random order, that can be cut so."""
    found = 0
    for molecule in _some(molecules, rng, len(molecules)):
        identity = identify(molecule)
        if not identity.smiles or identity.fragments > 1 or identity.incomplete:
            continue
        cuts = list(cuts_of(molecule, kind))
        if cuts:
            yield cuts[rng.integers(len(cuts))]
            found += 1
        if found == count:
            return


def cuts_of(molecule: Molecule, kind: str) -> Iterator[Cut]:
    """All cuts of a kind."""
    built = build(molecule)
    Chem.SanitizeMol(built)
    heavy = molecule.atomic_numbers > 1
    if kind == "groups":
        scaffold = built.GetSubstructMatch(GetScaffoldForMol(Chem.RemoveHs(built)))
        kept = np.zeros(len(molecule), bool)
        kept[list(scaffold)] = True
        kept |= _hydrogens_of(built, kept)
        if scaffold and (heavy & ~kept).sum() >= _FEWEST_NEW:
            yield Cut(molecule, kept)
        return
    bonds = [
        bond
        for bond in built.GetBonds()
        if bond.GetBondType() == Chem.BondType.SINGLE
        and not bond.IsInRing()
        and heavy[[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]].all()
    ]
    sides = [_sides(built, bond) for bond in bonds]
    if kind == "part":
        for bond, (begin, end) in zip(bonds, sides, strict=True):
            ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            for kept, (stays, goes) in ((begin, ends), (end, ends[::-1])):
                if _large_enough(heavy, kept, ~kept) and kept.sum() >= (~kept).sum():
                    yield Cut(molecule, kept, (stays, goes))
        return
    for k, first in enumerate(sides):
        for second in sides[:k]:
            for one in first:
                for other in second:
                    kept = one | other
                    if (
                        not (one & other).any()
                        and _large_enough(heavy, one, ~kept)
                        and _large_enough(heavy, other, ~kept)
                    ):
                        yield Cut(molecule, kept)


def _large_enough(heavy: Bool, kept: Bool, new: Bool) -> bool:
    return bool((heavy & kept).sum() >= _FEWEST_KEPT and (heavy & new).sum() >= _FEWEST_NEW)


def _sides(molecule: Chem.Mol, bond: Chem.Bond) -> tuple[Bool, Bool]:
    """Which atoms are on the side of the first and of the second atom of a bond."""
    begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
    seen, ahead = {begin}, [begin]
    while ahead:
        here = molecule.GetAtomWithIdx(ahead.pop())
        for neighbour in here.GetNeighbors():
            index = neighbour.GetIdx()
            if {here.GetIdx(), index} != {begin, end} and index not in seen:
                seen.add(index)
                ahead.append(index)
    first = np.zeros(molecule.GetNumAtoms(), bool)
    first[list(seen)] = True
    return first, ~first


def _hydrogens_of(molecule: Chem.Mol, atoms: Bool) -> Bool:
    """The hydrogens that are bound to some atoms."""
    found = np.zeros(len(atoms), bool)
    for index in np.flatnonzero(atoms).tolist():
        for neighbour in molecule.GetAtomWithIdx(index).GetNeighbors():
            found[neighbour.GetIdx()] = neighbour.GetAtomicNum() == 1
    return found


def _drawn(
    cuts: Sequence[Cut], kind: str, resample: int, arguments: argparse.Namespace
) -> list[Molecules]:
    """Samples of each cut, the cuts with equally many new atoms in one job.

    `resample` 0 is replacement without anchors.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, cut in enumerate(cuts):
        groups[int((~cut.kept).sum())].append(number)
    found: dict[int, Molecules] = {}
    for new, numbers in sorted(groups.items()):
        some = [_kept(cuts[number]) for number in numbers]
        sampler = arguments.sampler or "default"
        how = f"{sampler}-{arguments.steps}-{resample}-{arguments.samples}"
        path = arguments.work / f"{kind}-{arguments.checkpoint}-{how}-{new}.h5".replace("/", "_")
        if not path.exists():
            fragments.HELD_UNTIL = np.inf if resample == 0 else _HELD_UNTIL
            sample_to(
                path,
                arguments.samples,
                checkpoint=arguments.checkpoint,
                keep=_written(some, path.with_suffix(".keep.sdf")),
                n_atoms=new,
                resample=max(resample, 1),
                steps=arguments.steps,
                sampler=arguments.sampler,
                seed=arguments.seed,
            )
        with MoleculeFile(path) as file:
            molecules = file.load()
        if molecules.bonds is None:
            molecules = perceive(molecules)
        for place, number in enumerate(numbers):
            own = np.arange(place * arguments.samples, (place + 1) * arguments.samples)
            found[number] = molecules.select(own)
    return [found[number] for number in range(len(cuts))]


def _kept(cut: Cut) -> Molecule:
    return Molecules.from_list([cut.molecule]).keep_atoms(cut.kept)[0]


def _written(molecules: Sequence[Molecule], path: Path) -> Path:
    """An SDF of fixed atoms."""
    with Chem.SDWriter(str(path)) as writer:
        writer.SetKekulize(False)
        for molecule in to_rdkit(Molecules.from_list(molecules)):
            writer.write(molecule)
    return path


def _attached(
    cuts: Sequence[Cut], training: Molecules, samples: int, rng: np.random.Generator
) -> Iterator[Molecules]:
    """Parts with the cut-off sides of training molecules in the direction of the bond."""
    sides: dict[int, list[Cut]] = defaultdict(list)
    for molecule in _some(training, rng, _TRIED):
        identity = identify(molecule)
        if identity.smiles and identity.fragments == 1 and not identity.incomplete:
            for cut in cuts_of(molecule, "part"):
                sides[int((~cut.kept).sum())].append(cut)
    sizes = np.array(sorted(sides))
    for cut in cuts:
        new = int((~cut.kept).sum())
        others = sides[int(sizes[np.abs(sizes - new).argmin()])]
        chosen = rng.integers(len(others), size=samples)
        yield Molecules.from_list([_joined(cut, others[k]) for k in chosen])


def _joined(cut: Cut, other: Cut) -> Molecule:
    """The atoms of one cut that stay, with those of another that do not, without bonds."""
    assert cut.bond is not None and other.bond is not None
    stays, goes = (cut.molecule.positions[k].astype(np.float64) for k in cut.bond)
    there, begins = (other.molecule.positions[k].astype(np.float64) for k in other.bond)
    turn = rotation_between(begins - there, goes - stays)
    new = other.molecule.positions[~other.kept] - begins
    length = np.linalg.norm(begins - there) / np.linalg.norm(goes - stays)
    place = stays + (goes - stays) * length
    return perceive(
        Molecules.from_list(
            [
                Molecule(
                    np.concatenate([cut.molecule.positions[cut.kept], new @ turn.T + place]).astype(
                        np.float32
                    ),
                    np.concatenate(
                        [
                            cut.molecule.atomic_numbers[cut.kept],
                            other.molecule.atomic_numbers[~other.kept],
                        ]
                    ),
                )
            ]
        )
    )[0]


def rotation_between(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The rotation (3, 3) about their normal that turns one vector into the direction of another.

    Rodrigues' formula.
    """
    a, b = first / np.linalg.norm(first), second / np.linalg.norm(second)
    cross, cosine = np.cross(a, b), float(a @ b)
    if cosine < -1 + 1e-9:  # any half turn about a normal
        normal = np.cross(a, np.eye(3)[np.abs(a).argmin()])
        normal /= np.linalg.norm(normal)
        return 2 * np.outer(normal, normal) - np.eye(3)
    skew = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    turn: NDArray[np.float64] = np.eye(3) + skew + skew @ skew / (1 + cosine)
    return turn


def measure(cuts: Sequence[Cut], drawn: Sequence[Molecules], known: set[str]) -> Measured:
    """Compare the samples of each cut with its molecule."""
    shape = len(cuts), len(drawn[0])
    valid, complete, novel = np.zeros((3, *shape))
    numbers = np.full((len(_SHOWN), *shape), np.nan)
    unique, recovered, moved = np.full(len(cuts), np.nan), np.zeros(len(cuts)), 0.0
    places = [list(DESCRIPTORS).index(name) for name in _SHOWN]
    for k, (cut, molecules) in enumerate(zip(cuts, drawn, strict=True)):
        wanted = _smiles(cut.molecule)
        fixed = cut.molecule.positions[cut.kept]
        texts = []
        for sample, molecule in enumerate(molecules):
            identity: Identity = identify(molecule)
            moved = max(moved, float(np.abs(molecule.positions[: len(fixed)] - fixed).max()))
            valid[k, sample] = bool(identity.smiles) and identity.fragments == 1
            complete[k, sample] = valid[k, sample] and not identity.incomplete
            novel[k, sample] = identity.smiles not in known
            if complete[k, sample]:
                texts.append(identity.smiles)
                numbers[:, k, sample] = describe(molecule)[places]
        recovered[k] = wanted in texts
        if texts:
            unique[k] = len(set(texts)) / len(texts)
    novel[complete == 0] = np.nan
    return Measured(valid, complete, novel, numbers, moved, unique, recovered)


def _row(kind: str, method: str, found: Measured, rng: np.random.Generator) -> tuple[str, ...]:
    shares = [
        _interval(values, rng, 100)
        for values in (found.valid, found.complete, found.unique, found.recovered, found.novel)
    ]
    numbers = [_interval(values, rng) for values in found.descriptors]
    return (kind, method, *shares, *numbers, f"{found.moved:.0e}")


def _interval(values: NDArray[np.float64], rng: np.random.Generator, factor: float = 1) -> str:
    """Mean and 95 % interval of values of molecules (M,) or their samples (M, S); NaN is absent."""
    rows = values.reshape(len(values), -1)
    if np.isnan(rows).all():
        return "—"
    total, count = np.nansum(rows, axis=1), (~np.isnan(rows)).sum(axis=1)
    drawn = rng.integers(len(rows), size=(_DRAWS, len(rows)))
    with np.errstate(invalid="ignore"):
        means = total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    low, high = np.nanquantile(means, [0.025, 0.975])
    mean = total.sum() / count.sum()
    digits = 1 if factor == 100 else 2
    return f"{factor * mean:.{digits}f} ({factor * low:.{digits}f}–{factor * high:.{digits}f})"


if __name__ == "__main__":
    main()
