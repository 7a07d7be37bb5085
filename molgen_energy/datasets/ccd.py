"""The wwPDB's Chemical Component Dictionary: every ligand of the Protein Data Bank.

Westbrook et al., Bioinformatics 31, 1274 (2015); CC0. Each component has bonds with orders, formal
charges, all hydrogens, and two geometries: *ideal*, of a program such as Corina or OpenEye Omega,
and *model*, as in a crystal structure. Read from the copy inside the package biotite (BSD-3).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.molecules import (
    Bonds,
    MoleculeChunk,
    Molecules,
    gather_ragged,
    offsets_from_sizes,
)
from molgen_energy.datasets.base import PreprocessResult, RandomSplitDataset, option, workers_option
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.datasets.screening import Screen, allowed_elements
from molgen_energy.distributed import check_workers, worker_count
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.output import remove
from molgen_energy.progress import ProgressCallback, no_progress

if TYPE_CHECKING:
    from molgen_energy.chemistry.conformers import GivenConformer
    from molgen_energy.chemistry.identity import Identity
    from molgen_energy.datasets.ccd_shards import ComponentManifest
    from molgen_energy.datasets.conformers import Computed

_CHUNK = 200  # molecules that a worker process takes at a time
_TIMEOUT = 60.0  # s for the chemistry of one molecule, without relaxation
_SHARDS = {"mmff94": 100, "gfn2-xtb": 10}  # molecules: some seconds and a minute of work
_COORDINATES = {"ideal": "pdbx_model_Cartn_{}_ideal", "model": "model_Cartn_{}"}
_SPLITS = ("scaffold", "random")
_ORDERS = {"SING": 1, "DOUB": 2, "TRIP": 3}


@dataclass(frozen=True, kw_only=True)
class ChemicalComponents(RandomSplitDataset):
    """CCD: 46,000 drug-like ligands of the Protein Data Bank, with bonds and formal charges.

    Relaxed molecules are kept in FILE.shards. After an interruption the same command continues
    there.
    """

    name = "ccd"
    output = "ccd.h5"

    elements: str = option("H,C,N,O,F,P,S,Cl,Br,I", "The elements that may occur.")
    min_atoms: int = option(5, "Least number of atoms, hydrogens included.")
    max_atoms: int = option(181, "Largest number of atoms, hydrogens included.")
    coordinates: str = option(
        "ideal", "ideal (of a program, all hydrogens) or model (of a crystal structure)."
    )
    keep_obsolete: bool = option(False, "Keep components that the wwPDB has withdrawn.")
    keep_fragments: bool = option(False, "Keep components of several fragments, such as salts.")
    keep_incomplete: bool = option(
        False, "Keep components that lack hydrogens or have unpaired electrons."
    )
    clean: bool = option(
        False,
        "Leave out molecules that the cleaning of GEOM-Drugs Revisited would: of several "
        "fragments, or with a bond far from the sum of covalent radii.",
    )
    relax: str = option(
        "none",
        "Move the molecules to a minimum: mmff94 (or mmff), gfn2-xtb (or xtb; extra `xtb`), none.",
    )
    keep_unrelaxed: bool = option(
        False, "Keep molecules that cannot be relaxed, with the coordinates that they have."
    )
    timeout: float = option(600.0, "Most seconds for the relaxation of one molecule.")
    split_by: str = option(
        "scaffold",
        "scaffold: molecules with the same ring system stay in one split; random: those that "
        "differ in stereochemistry alone.",
    )
    split: str = option("0.8,0.1,0.1", "Shares for training, validation, test.")
    seed: int = option(0, "Seed of the split.")
    workers: int | None = workers_option()

    def __post_init__(self) -> None:
        from molgen_energy.chemistry.conformers import relaxation_named

        object.__setattr__(self, "relax", relaxation_named(self.relax))

    def source_name(self) -> str:
        """The dictionary, which of its coordinates, and their relaxation."""
        relaxed = "" if self.relax == "none" else f", {self.relax}"
        return f"Chemical Component Dictionary of the wwPDB (biotite), {self.coordinates}{relaxed}"

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value or biotite is missing."""
        from molgen_energy.chemistry.conformers import check_relaxation

        super().check()
        check_relaxation(self.relax, self.timeout)
        allowed_elements(self.elements)
        if self.coordinates not in _COORDINATES:
            raise InputError(unknown_name("--coordinates", self.coordinates, _COORDINATES))
        if self.split_by not in _SPLITS:
            raise InputError(unknown_name("--split-by", self.split_by, _SPLITS))
        if not 1 <= self.min_atoms <= self.max_atoms:
            raise InputError(
                f"--min-atoms {self.min_atoms} and --max-atoms {self.max_atoms}: expected 1 or "
                "more, and no more than --max-atoms"
            )
        check_workers(self.workers)
        dictionary_path()

    def screen(self) -> Screen:
        """Components with two atoms in one place are left out."""
        return Screen(skip_bad=True)

    def make(self, output: Path, progress: ProgressCallback = no_progress) -> PreprocessResult:
        """Write the molecules; relaxation continues from what is in FILE.shards."""
        from molgen_energy.data.shards import shards_folder

        result = super().make(output, progress)
        if self.relax != "none":
            remove(shards_folder(output))
        return result

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The components that pass the filters, in the order of their identifiers."""
        from molgen_energy.chemistry.cleaning import FAULTS, lengths_fit

        components = read_components(dictionary_path(), self.coordinates)
        log.names = components.names
        log.locate = lambda number: f"component {components.names[number - 1]}"
        found = self._identified(components, log)
        if self.relax != "none":
            found = self._relaxed(list(found), components.names, log)
        for chunk in found:
            if self.clean:  # its other tests are among the filters
                fits = lengths_fit(chunk.molecules)
                log.counts[f"left out by cleaning: {FAULTS[2]}"] += int((~fits).sum())
                chunk = chunk.select(np.flatnonzero(fits))
            if len(chunk):
                yield chunk

    def _identified(self, components: Components, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The components that pass the filters, with SMILES and groups."""
        from molgen_energy.chemistry.identity import identify_all
        from molgen_energy.workers import WorkerPool

        chosen = self._passing(components, log)
        parts = (
            components.molecules.select(chosen[k : k + _CHUNK])
            for k in range(0, len(chosen), _CHUNK)
        )
        workers = worker_count(self.workers)
        preload = ["molgen_energy.chemistry.identity"]
        groups: dict[str, int] = {}
        done = 0
        with WorkerPool(workers, _TIMEOUT * _CHUNK, preload=preload) as pool:
            for part, found in pool.map(identify_all, parts, _identification_failed):
                numbers = chosen[done : done + len(part)]
                done += len(part)
                log.progress(done, len(chosen))
                kept = np.flatnonzero([self._keeps(one, log) for one in found])
                if not len(kept):
                    continue
                molecules = part.select(kept)
                names = [found[k] for k in kept.tolist()]
                numbered = [groups.setdefault(self._group(one), len(groups)) for one in names]
                yield MoleculeChunk(
                    numbers[kept] + 1,
                    replace(
                        molecules,
                        smiles=np.array([one.smiles for one in names], object),
                        groups=np.array(numbered, np.int64),
                    ),
                )

    def _relaxed(
        self, chunks: list[MoleculeChunk], names: NDArray[np.str_], log: DatasetLog
    ) -> Iterator[MoleculeChunk]:
        """The molecules at minima; those that fail are counted, and left out or kept as given."""
        from molgen_energy.chemistry.conformers import GivenConformer, relax
        from molgen_energy.chemistry.relaxation_changes import RelaxationChanges
        from molgen_energy.datasets.conformers import ConformerWork

        if not chunks:
            return
        records = np.concatenate([chunk.records for chunk in chunks])
        molecules = Molecules.concatenate([chunk.molecules for chunk in chunks])
        bare = replace(molecules, smiles=None, groups=None)  # what relaxation needs

        def given(number: int) -> GivenConformer:
            return GivenConformer(
                f"component {names[records[number] - 1]}", bare[number], self.relax
            )

        def shard_name(part: Sequence[int]) -> str:
            return _shard_name(bare.select(np.array(part)))

        def fits(part: Sequence[int], found: Computed) -> bool:
            return _is_relaxed(bare.select(np.array(part)), found)

        changes, size = RelaxationChanges(), _SHARDS[self.relax]
        parts = [
            range(start, min(start + size, len(molecules)))
            for start in range(0, len(molecules), size)
        ]
        work = ConformerWork(
            self._manifest(), given, relax, shard_name, self.timeout, self.workers, fits
        )
        done = "kept unrelaxed" if self.keep_unrelaxed else "left out"
        with closing(work.run(parts, log)) as results:
            for part, found in results:
                before = molecules.select(np.array(part))
                positions = before.positions.copy()
                if found.molecules is not None and found.energies is not None:
                    atoms, _ = gather_ragged(before.offsets, found.which)
                    positions[atoms] = found.molecules.positions
                    changes.add(before.select(found.which), found.molecules, found.energies)
                for _, reason in found.failures:
                    log.counts[f"{done}: {reason}"] += 1
                chunk = MoleculeChunk(records[list(part)], replace(before, positions=positions))
                yield chunk if self.keep_unrelaxed else chunk.select(found.which)
        if len(changes):
            log.facts.append(f"relaxed by {self.relax}: {changes.summary()}")

    def _manifest(self) -> ComponentManifest:
        """What relaxed molecules depend on, besides those that are given."""
        from rdkit import rdBase

        from molgen_energy.data.shards import FORMAT
        from molgen_energy.datasets.ccd_shards import ComponentManifest

        return ComponentManifest(
            format=FORMAT, relax=self.relax, rdkit=rdBase.rdkitVersion, version=__version__
        )

    def _group(self, one: Identity) -> str:
        """Molecules of the same group stay in one split; those without a ring have no scaffold."""
        return (one.scaffold if self.split_by == "scaffold" else "") or one.smiles

    def _keeps(self, one: Identity, log: DatasetLog) -> bool:
        """Whether a component passes the checks of RDKit; counts one that does not."""
        if one.failure:
            log.counts["left out as RDKit refuses their valences"] += 1
        elif one.fragments > 1 and (self.clean or not self.keep_fragments):
            log.counts["left out with several fragments"] += 1
        elif one.incomplete and not self.keep_incomplete:
            log.counts["left out for missing hydrogens or unpaired electrons"] += 1
        else:
            return True
        return False

    def _passing(self, components: Components, log: DatasetLog) -> NDArray[np.int64]:
        """Numbers of the components that pass all filters that need no chemistry; counts others."""
        molecules = components.molecules
        sizes = molecules.sizes
        foreign = ~allowed_elements(self.elements)[molecules.atomic_numbers]
        filters = {
            "left out as obsolete": components.obsolete & (not self.keep_obsolete),
            f"left out without {self.coordinates} coordinates": ~molecules.finite(),
            "left out with other elements": np.logical_or.reduceat(foreign, molecules.offsets[:-1]),
            f"left out with fewer than {self.min_atoms} atoms": sizes < self.min_atoms,
            f"left out with more than {self.max_atoms} atoms": sizes > self.max_atoms,
        }
        kept = np.ones(len(molecules), bool)
        for what, refused in filters.items():
            log.counts[what] += int((kept & refused).sum())
            kept &= ~refused
        return np.flatnonzero(kept)


class Components(NamedTuple):
    """All components of a dictionary, in its order."""

    names: NDArray[np.str_]
    """Identifiers, (M,), such as ATP."""
    obsolete: NDArray[np.bool_]
    """(M,)"""
    molecules: Molecules
    """With bonds and formal charges; coordinates that are missing are NaN, elements that are not
    known 0."""


def dictionary_path() -> Path:
    """The file of the installed package biotite; raises `InputError` without it."""
    spec = importlib.util.find_spec("biotite")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the Chemical Component Dictionary is not installed: run `pip install "
            "'molgen-energy[ccd]'` (package biotite, 56 MB)"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / "structure" / "info" / "components.bcif"
    if not path.is_file():
        raise InputError(f"{path} does not exist; install biotite again")
    return path


def read_components(path: Path, coordinates: str = "ideal") -> Components:
    """Read a dictionary in BinaryCIF with the categories `chem_comp`, `_atom` and `_bond`.

    Parameters
    ----------
    coordinates
        `ideal` or `model`.

    Raises
    ------
    InputError
        It is damaged, or has a bond between atoms that it lacks.
    """
    from biotite.structure.io.pdbx import BinaryCIFFile

    try:
        block = BinaryCIFFile.read(path).block
        about, atoms, bonds = (block[f"chem_comp{part}"] for part in ("", "_atom", "_bond"))
        names, of_atom = np.unique(_texts(atoms, "comp_id"), return_inverse=True)
        order = np.argsort(of_atom, kind="stable")
        of_atom = of_atom[order]
        withdrawn = _texts(about, "id")[_texts(about, "pdbx_release_status") == "OBS"]
        columns = [_floats(atoms, _COORDINATES[coordinates].format(axis)) for axis in "xyz"]
        symbols, which = np.unique(_texts(atoms, "type_symbol"), return_inverse=True)
        numbers = np.array([_number(str(name)) for name in symbols], np.uint8)
        charges = atoms["charge"].as_array(np.int64, masked_value=0)
        atom_keys = _keys(of_atom, _texts(atoms, "atom_id")[order])
        component = np.searchsorted(names, _texts(bonds, "comp_id"))
        ends = [_keys(component, _texts(bonds, f"atom_id_{k}")) for k in (1, 2)]
        kinds, of_bond = np.unique(_texts(bonds, "value_order"), return_inverse=True)
        orders = np.array([_ORDERS[str(kind)] for kind in kinds], np.uint8)[of_bond]
    except (KeyError, ValueError, OSError, AttributeError, IndexError, TypeError) as error:
        raise InputError(f"{path} is no dictionary of chemical components ({error})") from error
    offsets = offsets_from_sizes(np.bincount(of_atom, minlength=len(names)))
    by_key = np.argsort(atom_keys)
    index = [by_key[np.searchsorted(atom_keys[by_key], keys) % len(by_key)] for keys in ends]
    if any((atom_keys[found] != keys).any() for found, keys in zip(index, ends, strict=True)):
        raise InputError(f"{path} has a bond of an atom that it lacks; install biotite again")
    by_component = np.argsort(component, kind="stable")
    return Components(
        names,
        np.isin(names, withdrawn),
        Molecules(
            np.stack(columns, axis=1)[order],
            numbers[which][order],
            offsets,
            charges[order].astype(np.int8),
            Bonds(
                (np.stack(index, axis=1) - offsets[component][:, None])[by_component].astype("u4"),
                orders[by_component],
                offsets_from_sizes(np.bincount(component, minlength=len(names))),
            ),
        ),
    )


def _shard_name(molecules: Molecules) -> str:
    """Of some molecules when they are relaxed: changes with their atoms, bonds and positions."""
    digest = hashlib.sha256()
    for name, values in molecules.to_arrays().items():
        digest.update(f"{name} {values.shape};".encode() + values.tobytes())
    return f"{digest.hexdigest()[:24]}.shard"


def _is_relaxed(given: Molecules, found: Computed) -> bool:
    """Whether conformers are some of the given molecules, with energies and other positions."""
    if found.molecules is None:
        return True
    if found.energies is None or not (np.diff(found.which) > 0).all():
        return False
    expected, there = (m.to_arrays() for m in (given.select(found.which), found.molecules))
    return bool(np.isfinite(found.molecules.positions).all()) and all(
        name == "positions" or np.array_equal(values, there.get(name, np.zeros(0)))
        for name, values in expected.items()
    )


def _identification_failed(part: Molecules, reason: str) -> list[Identity]:
    """The result for molecules at which a worker process died or timed out."""
    from molgen_energy.chemistry.identity import Identity

    return [Identity(failure=reason)] * len(part)


def _number(symbol: str) -> int:
    """Atomic number; 0 of what is no element, such as X."""
    try:
        return atomic_number(symbol)
    except InputError:
        return 0


def _texts(category: Any, column: str) -> NDArray[np.str_]:
    texts: NDArray[np.str_] = category[column].as_array(str)
    return texts


def _floats(category: Any, column: str) -> NDArray[np.float32]:
    """NaN where there is no value."""
    values: NDArray[np.float32] = category[column].as_array(np.float64, np.nan).astype(np.float32)
    return values


def _keys(component: NDArray[np.int64], names: NDArray[np.str_]) -> NDArray[np.uint64]:
    """A number for each atom of all components: its component, and its name of four characters."""
    name = np.char.encode(names, "latin-1").astype("S4").view("<u4")
    return component.astype(np.uint64) << np.uint64(32) | name.astype(np.uint64)
