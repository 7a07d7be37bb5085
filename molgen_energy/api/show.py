"""Molecules in three dimensions, in a notebook or as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rdkit import Chem, rdBase

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import molecule_from_ase, molecule_from_rdkit
from molgen_energy.chemistry.fields import FieldSelection
from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.chemistry.valence import has_valence
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.display.html import page
from molgen_energy.display.molecules import ShownMolecule, molecules_html
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError
from molgen_energy.metrics.accumulator import failure_reasons
from molgen_energy.metrics.checks.chunk import CheckSettings, check_chunk
from molgen_energy.metrics.report.gallery import shown_smiles
from molgen_energy.metrics.sources import RDKitSource
from molgen_energy.output import atomic_write, display_path, named_path

_MOST_PROPERTIES = 6  # properties below a molecule
_MOST_ATOMS = 2000  # of a molecule that is drawn
_MOST_CHECKED = 300  # atoms; RDKit takes minutes for some large molecules


class MoleculeView:
    """Molecules that a notebook shows in three dimensions; `show` makes it.

    The HTML holds its own script and needs no network. Text of files is escaped.
    """

    def __init__(self, molecules: Sequence[ShownMolecule], head: str, note: str, per_page: int):
        self._molecules, self._head, self._note = molecules, head, note
        self._per_page = per_page

    def __repr__(self) -> str:
        return f"MoleculeView: {self._head or self._molecules[0].title}"

    def _repr_html_(self) -> str:
        return molecules_html(self._molecules, self._head, self._note, self._per_page)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a page that opens offline in any browser; returns its path.

        Raises
        ------
        InputError
            The name does not end in `.html`, or the file cannot be written.
        """
        target = named_path(Path(path))
        if target.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"{target}: name a file .html for the page")
        atomic_write(target, page(self._head or "molecule", self._repr_html_()).encode())
        return target


class _Given(NamedTuple):
    """A molecule as it was given, or why it cannot be shown."""

    title: str
    molecule: Molecule | None
    problem: str = ""


class _Input(NamedTuple):
    """The first molecules of an input."""

    molecules: list[_Given]
    total: int | None
    """Number of all; None if it takes reading the whole file."""
    source: str
    """Name of the file; empty for molecules in memory."""
    bonds: str
    """`given` or `perceived`, as `evaluate` chooses."""
    note: str = ""


def show(
    molecules: Any, *, limit: int = 50, per_page: int = 6, checks: bool = True
) -> MoleculeView:
    """Show molecules in three dimensions, with the checks that they pass or fail.

    A notebook displays the result; `show(…).save("molecules.html")` writes a page. Drag a molecule
    to rotate it. Click two, three or four atoms to read their distance (Å), angle or dihedral (°).
    Atoms are counted from 0, as RDKit and ASE do.

    >>> molgen_energy.show(molgen_energy.sample(12, seed=0))
    >>> molgen_energy.show("mine.sdf", limit=12)

    Parameters
    ----------
    molecules
        An RDKit molecule with a conformer, or several; ASE `Atoms`, one or several; `Molecules`; or
        the path of an SDF, XYZ or HDF5 file, a folder or a pattern.
    limit
        The largest number of molecules to show; the first ones.
    per_page
        Molecules that stand side by side; the others follow on further pages.
    checks
        Whether to name stability and validity below each molecule and to mark unstable atoms. They
        rest on the bonds that `evaluate` takes: given ones where every molecule has them, else
        perceived from distances.

    Returns
    -------
    An object with `_repr_html_`, for notebooks, and `save`.

    Raises
    ------
    InputError
        There is no molecule, an object is of another kind, or a file cannot be read.
    """
    if limit < 1 or per_page < 1:
        raise InputError(f"limit={limit}, per_page={per_page}: expected numbers from 1")
    given = _read(molecules, limit)
    if not given.molecules:
        raise InputError("there is no molecule to show")
    shown = [_shown(one, given.bonds, checks) for one in given.molecules]
    count = len(shown)
    if given.total is not None and given.total > count:
        first = "the first" if count == 1 else f"the first {count}"
        head = f"{first} of {given.total:,} molecules"
    else:
        head = "1 molecule" if count == 1 else f"{count} molecules"
        if given.total is None and count == limit:
            head = f"the first {head}"
    if given.source:
        head += f" of {given.source}"
    notes = ["" if given.bonds == "given" else "bonds perceived from distances", given.note]
    note = "; ".join(filter(None, notes))
    if count == 1 and given.total == 1:
        head = given.source
    return MoleculeView(shown, head, note, per_page)


def _read(molecules: Any, limit: int) -> _Input:
    if isinstance(molecules, (str, PathLike)):
        return _read_file(named_path(Path(molecules)), limit)
    if isinstance(molecules, Molecules):
        bonds = "perceived" if molecules.bonds is None else "given"
        part = molecules.select(np.arange(min(limit, len(molecules))))
        return _Input([*_numbered(part)], len(molecules), "", bonds)
    several = [molecules] if _is_molecule(molecules) else molecules
    try:
        every = list(several)
    except TypeError:
        raise InputError(
            f"cannot show a {type(molecules).__name__}; give RDKit molecules, ASE Atoms or a file"
        ) from None
    for number, molecule in enumerate(every, start=1):
        if not _is_molecule(molecule) and molecule is not None:
            raise InputError(
                f"molecule {number} is a {type(molecule).__name__}; give RDKit molecules or ASE "
                "Atoms, or a single path"
            )
    first = every[:limit]
    of_rdkit = [m for m in first if m is None or isinstance(m, Chem.Mol)]
    given = len(of_rdkit) == len(first) and RDKitSource(first).given_bonds.every
    return _Input([*_converted(first)], len(every), "", "given" if given else "perceived")


def _is_molecule(value: Any) -> bool:
    return isinstance(value, Chem.Mol) or hasattr(value, "get_atomic_numbers")


def _read_file(path: Path, limit: int) -> _Input:
    """The first molecules of a file, without reading the others."""
    name = display_path(Path(path.name))
    if path.suffix.lower() in (".h5", ".hdf5"):
        with MoleculeFile(path) as file:
            part = file.slice(0, min(limit, len(file)))
            bonds = "perceived" if part.bonds is None else "given"
            return _Input([*_numbered(part)], len(file), name, bonds)
    reader = MoleculeReader(path, skip_bad=True)
    reader.selection = reader.detect_fields()
    found = [_Given(f"{reader.number}", molecule) for molecule in islice(reader, limit)]
    given = all(one.molecule is not None and _has_bonds(one.molecule) for one in found)
    bad = reader.skipped_count
    skipped = f"{bad:,} bad record{'' if bad == 1 else 's'} skipped" if bad else ""
    return _Input(found, None, name, "given" if given else "perceived", skipped)


def _has_bonds(molecule: Molecule) -> bool:
    """Whether it has bonds of its own, or needs none as a single atom or as ions."""
    if molecule.bond_index is None:
        return False
    charged = molecule.formal_charges is not None and bool(molecule.formal_charges.any())
    return len(molecule.bond_index) > 0 or len(molecule) == 1 or charged


def _numbered(molecules: Molecules) -> Iterator[_Given]:
    for number, molecule in enumerate(molecules, start=1):
        yield _Given(f"{number}", molecule)


def _converted(molecules: Iterable[Any]) -> Iterator[_Given]:
    """Molecules of RDKit or ASE as arrays, numbered from 1, with their names and properties."""
    for number, molecule in enumerate(molecules, start=1):
        title = f"{number}"
        try:
            if molecule is None:
                raise ValueError("RDKit could not read this molecule")
            if not isinstance(molecule, Chem.Mol):
                yield _Given(title, _with_data(molecule_from_ase(molecule), molecule.info))
                continue
            if molecule.HasProp("_Name") and molecule.GetProp("_Name").strip():
                title += f" · {molecule.GetProp('_Name').strip()}"
            converted = molecule_from_rdkit(molecule)
            yield _Given(title, _with_data(converted, molecule.GetPropsAsDict(False, False)))
        except ValueError as error:
            yield _Given(title, None, str(error))


def _with_data(molecule: Molecule, data: Any) -> Molecule:
    """The molecule with the numbers among its data as properties."""
    fields = {str(name): str(value) for name, value in data.items()}
    columns = FieldSelection.detect([fields]).columns(fields)
    return replace(molecule, **columns)


def _shown(given: _Given, bonds: str, checks: bool) -> ShownMolecule:
    molecule, problem = given.molecule, given.problem
    if molecule is not None and not np.isfinite(molecule.positions).all():
        molecule, problem = None, "coordinates are not finite"
    if molecule is None:
        return ShownMolecule(given.title, problem=problem)
    properties = tuple(
        f"{name} {value:.6g} {molecule.units.get(name, '')}".strip().replace(" ", "\u00a0")
        for name, value in islice(molecule.properties.items(), _MOST_PROPERTIES)
        if np.isfinite(value)
    )
    size = len(molecule)
    if size > _MOST_ATOMS:
        problem = f"{size:,} atoms are more than this view draws ({_MOST_ATOMS:,})"
        return ShownMolecule(given.title, problem=problem)
    strange = _unknown_elements(molecule) if bonds == "perceived" else ""
    if strange:
        properties = (
            f"not checked: bonds of {strange} are not perceived from distances",
            *properties,
        )
        return ShownMolecule(given.title, molecule, properties=properties)
    if bonds == "perceived":
        molecule = perceive(Molecules.from_list([molecule]))[0]
    if not checks or size > _MOST_CHECKED:
        return ShownMolecule(given.title, molecule, properties=properties)
    chunk = MoleculeChunk(np.array([1]), Molecules.from_list([molecule]))
    # As `evaluate` does by default. The bonds are those of the molecule now.
    valence = "strict" if bonds == "given" else "edm"
    with rdBase.BlockLogs():
        found = check_chunk(chunk, CheckSettings("given", valence, type_codes={}))
    reasons = failure_reasons(found, 0)
    return ShownMolecule(
        given.title,
        molecule,
        smiles=shown_smiles(found.smiles[0], bool(reasons)),
        good=() if reasons else ("stable, valid, connected",),
        bad=reasons,
        properties=properties,
        unstable_atoms=tuple(np.flatnonzero(found.unstable).tolist()),
    )


def _unknown_elements(molecule: Molecule) -> str:
    """Elements that the perception of bonds does not know."""
    numbers = molecule.atomic_numbers
    unknown = np.unique(numbers[~has_valence(numbers, "edm")])
    return ", ".join(symbol(z) for z in unknown.tolist())
