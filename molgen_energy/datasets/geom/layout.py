"""What all layouts of GEOM-Drugs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import AROMATIC, Molecule
from molgen_energy.elements import ELEMENTS
from molgen_energy.errors import InputError, counted
from molgen_energy.formats.pickles import MARK, iterate_pickle, pickle_file

SPLIT_NAMES = ("train", "val", "test")
"""In names of files, in the order of the labels 0, 1, 2."""

ORDERS = np.array([0, 1, 2, 3, AROMATIC], np.uint8)
"""Bond orders by the code of MiDi and those after it, in which 4 is aromatic."""

_MOST_ATOMS = 10_000  # of a molecule; the largest of GEOM-Drugs has 181


class Entry(NamedTuple):
    """A molecule as a layout holds it, with conformers that need not be decoded yet."""

    place: str
    """Names it in messages: `train_data.pickle: molecule 7`."""
    conformers: Sequence[Any]
    """What the layout's `decode` takes; can be pickled."""
    energies: Sequence[float] = ()
    """Of the conformers in hartree, where the layout has them."""
    smiles: str = ""
    """Where the layout has one."""
    splits: Sequence[int] = ()
    """0 for training, 1 validation, 2 test, of each conformer, where the layout has a split."""


class Layout(ABC):
    """A form in which GEOM-Drugs is passed on."""

    name: ClassVar[str]
    """For the summary, and the source of the HDF5 file."""
    file_names: ClassVar[str]
    """The files by which it is recognised, for messages."""
    has_bonds: ClassVar[bool] = True
    has_smiles: ClassVar[bool] = False
    splits_molecules: bool = False
    """Whether it has a split that keeps the conformers of a molecule together."""

    total: int | None = None
    """Number of entries, where it is known before they are read."""

    @classmethod
    @abstractmethod
    def in_folder(cls, folder: Path) -> Layout | None:
        """The layout, if a folder holds it."""

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> Layout | None:
        """The layout, if a file is one; `start` are its first bytes."""
        return None

    def check_split(self) -> None:
        """Raise `InputError` where files are missing that the layout's own split needs."""
        raise InputError(f"--split-by layout: {self.name} has no split; pass --split-by random")

    @abstractmethod
    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules.

        Parameters
        ----------
        own_split
            Whether to say how the layout splits them.

        Raises
        ------
        InputError
            A file cannot be read or is damaged; names it.
        """

    @staticmethod
    @abstractmethod
    def decode(conformer: Any) -> Molecule:
        """A conformer as arrays; raises `ValueError` where it is none. Runs in worker processes."""


class SplitFiles:
    """The files of a set that is stored as training, validation and test, or one file."""

    def __init__(self, paths: Mapping[int, Path], folder: Path | None, pattern: str) -> None:
        self.paths = paths
        """By label."""
        self._folder, self._pattern = folder, pattern

    @classmethod
    def in_folder(cls, folder: Path, pattern: str) -> SplitFiles | None:
        """Those of a folder whose names are a pattern with `{}`, if there is any."""
        paths = {k: folder / pattern.format(name) for k, name in enumerate(SPLIT_NAMES)}
        paths = {k: path for k, path in paths.items() if path.exists()}
        return cls(paths, folder, pattern) if paths else None

    @classmethod
    def of_file(cls, path: Path) -> SplitFiles:
        """One file alone, without a split."""
        return cls({0: path}, None, "")

    @property
    def is_set(self) -> bool:
        """Whether it is a folder's set of files."""
        return self._folder is not None

    def check(self) -> None:
        """Raise `InputError` where a file of the set is missing."""
        missing = [
            self._pattern.format(name) for k, name in enumerate(SPLIT_NAMES) if k not in self.paths
        ]
        if missing:
            raise InputError(
                f"{self._folder} lacks {' and '.join(missing)}; add what is missing, or pass "
                "--split-by random to split the molecules that are there"
            )

    def each(self, own_split: bool) -> Iterator[tuple[Path, tuple[int, ...]]]:
        """Each file, and its label if the split of the set is wanted."""
        for label, path in self.paths.items():
            yield path, (label,) if own_split else ()


class SplitLayout(Layout):
    """A layout of a file for each split, or of one of these files alone."""

    file_pattern: ClassVar[str]
    """Names of the files, with `{}` for the name of the split."""

    def __init__(self, files: SplitFiles) -> None:
        self._files = files
        self.splits_molecules = files.is_set

    @classmethod
    def in_folder(cls, folder: Path) -> SplitLayout | None:
        """The files of these names."""
        files = SplitFiles.in_folder(folder, cls.file_pattern)
        return cls(files) if files else None

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> SplitLayout | None:
        """One of the files, by its first item."""
        first = cls.first_item(path, start)
        return cls(SplitFiles.of_file(path)) if cls.is_item(first) else None

    @classmethod
    @abstractmethod
    def first_item(cls, path: Path, start: bytes) -> Any:
        """The first item of a file that begins with `start`; None if it is of another format."""

    @staticmethod
    @abstractmethod
    def is_item(found: Any) -> bool:
        """Whether the first item of a file is of this layout."""

    def check_split(self) -> None:
        """All three files must be there."""
        self._files.check()


class PickledListLayout(SplitLayout):
    """Files that are pickled lists, of one molecule an item."""

    @classmethod
    def first_item(cls, path: Path, start: bytes) -> Any:
        """The first item of a pickled list."""
        if not start.startswith(MARK):
            return None
        with pickle_file(path) as (file, size):
            return next(iterate_pickle(file, size), None)

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, file by file."""
        for path, label in self._files.each(own_split):
            with pickle_file(path) as (file, size):
                for number, item in enumerate(iterate_pickle(file, size), start=1):
                    try:
                        entry = self.entry(item)
                    except ValueError as error:
                        raise InputError(
                            f"{path}: item {number} is {error}; fetch it again"
                        ) from None
                    yield entry._replace(
                        place=f"{path.name}: molecule {number}",
                        splits=label * len(entry.conformers),
                    )

    @staticmethod
    @abstractmethod
    def entry(item: Any) -> Entry:
        """The molecule of an item, without place and split; raises `ValueError` if it is none."""


def single_file(folder: Path, paths: Sequence[Path]) -> Path | None:
    """The one file of a folder that holds conformers; None without any.

    Raises
    ------
    InputError
        There are several.
    """
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths[:5])
        raise InputError(f"{folder} holds several sets of conformers, {names}; name one file")
    return paths[0] if paths else None


def arrays_to_molecule(
    positions: Any,
    atomic_numbers: Any,
    charges: Any = None,
    bond_index: Any = None,
    bond_code: Any = None,
) -> Molecule:
    """A molecule of arrays that a file holds, checked.

    Parameters
    ----------
    positions, atomic_numbers, charges
        (N, 3) in Å, (N,), (N,).
    bond_index, bond_code
        Both atoms of each bond, (E, 2), and 1, 2, 3 or 4 for aromatic, (E,).

    Raises
    ------
    ValueError
        An array is missing, has another shape, or holds what no molecule has.
    """
    places = _numbers("coordinates", positions, (None, 3))
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused by the screen
        places = places.astype(np.float32)
    count = len(places)
    if not 0 < count <= _MOST_ATOMS:
        raise ValueError(f"{counted(count, 'atoms')}, expected 1 to {_MOST_ATOMS:,}")
    elements = _integers("atomic numbers", atomic_numbers, (count,), 1, ELEMENTS)
    if charges is None:
        return Molecule(places, elements.astype(np.uint8))
    of_atoms = _integers("charges", charges, (count,), -128, 127)
    ends = _integers("bonds", bond_index, (None, 2), 0, count - 1)
    codes = _integers("types of bonds", bond_code, (len(ends),), 1, len(ORDERS) - 1)
    ordered = np.sort(ends, axis=1)
    if len(ends) and (ordered[:, 0] == ordered[:, 1]).any():
        raise ValueError("a bond joins an atom with itself")
    if len(np.unique(ordered @ [count, 1])) != len(ends):
        raise ValueError("two bonds join the same atoms")
    return Molecule(
        places,
        elements.astype(np.uint8),
        of_atoms.astype(np.int8),
        ends.astype(np.uint32),
        ORDERS[codes],
    )


def _numbers(what: str, values: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise ValueError(f"no {what}")
    if values.size == 0 and shape[0] is None:  # no bond is often an array of one axis
        return values.reshape(0, *(wanted or 0 for wanted in shape[1:]))
    fits = values.ndim == len(shape) and all(
        wanted is None or length == wanted
        for length, wanted in zip(values.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{what} of shape {values.shape}")
    return values


def _integers(
    what: str, values: Any, shape: tuple[int | None, ...], low: int, high: int
) -> NDArray[np.int64]:
    """Whole numbers of a range, also where they are stored with a decimal point."""
    found = _numbers(what, values, shape)
    if not ((found >= low) & (found <= high)).all() or (found != np.floor(found)).any():
        raise ValueError(f"{what} that are not whole numbers from {low} to {high}")
    return found.astype(np.int64)


RawMolecule = tuple[Any, ...]
"""The arguments of `arrays_to_molecule`, not checked."""


def joined(
    conformers: Iterable[tuple[str, RawMolecule, Sequence[int]]], most: int = 1000
) -> Iterator[Entry]:
    """Molecules of conformers that stand one after another, where nothing says what is one.

    Conformers of a molecule have the same atoms in the same order, and the same bonds. Isomers
    without bonds in the file can look like conformers; they only stay in one split then.

    Parameters
    ----------
    conformers
        Place, arrays, and split, if any.
    most
        Conformers in one entry, so that memory stays bounded.
    """
    group: list[tuple[str, RawMolecule, Sequence[int]]] = []
    for conformer in conformers:
        if group and (len(group) == most or not _same_molecule(group[0][1], conformer[1])):
            yield _entry(group)
            group = []
        group.append(conformer)
    if group:
        yield _entry(group)


def _entry(group: Sequence[tuple[str, RawMolecule, Sequence[int]]]) -> Entry:
    splits = [label for _, _, labels in group for label in labels]
    return Entry(group[0][0], [molecule for _, molecule, _ in group], splits=splits)


def _same_molecule(first: RawMolecule, second: RawMolecule) -> bool:
    """Whether all arrays but the positions are equal."""
    return len(first) == len(second) and all(
        isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
        for a, b in zip(first[1:], second[1:], strict=True)
    )
