"""QM9: 134k small organic molecules, B3LYP/6-31G(2df,p) geometries.

Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022 (2014). Of its 133,885
molecules 3,054 are uncharacterised (the relaxed geometry is another molecule) and left out, as in
EDM (Hoogeboom et al., ICML 2022), whose split is used.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.fields import parse_integer, parse_number
from molgen_energy.chemistry.qm9 import INDEX, INDEX_UNIT, PROPERTIES
from molgen_energy.data.molecules import MoleculeChunk, Molecules, Property, offsets_from_sizes
from molgen_energy.data.splits import check_fractions, check_seed, parse_fractions, random_split
from molgen_energy.datasets.base import MoleculeDataset, option
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError
from molgen_energy.output import check_file, display_path
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.resources import asset

MOLECULES_WITH_UNCHARACTERISED = 133_885
MOLECULES = 130_831
TRAIN, VALID = 100_000, 17_748


_SPLIT_OF_A_PART = "0.8,0.1,0.1"

_NAME = re.compile(r"dsgdb9nsd_([0-9]{1,9})\.xyz", re.IGNORECASE)
_MOST_BYTES = 1 << 20  # of one file; those of QM9 have some 2 kB


@dataclass(frozen=True)
class QM9(MoleculeDataset):
    """QM9: 130,831 small organic molecules with 15 properties, and the split of EDM."""

    name = "qm9"
    output = "qm9.h5"

    source: Path | None = option(  # noqa: RUF009
        None,
        "The original archive or folder of dsgdb9nsd_*.xyz files; default: the installed package "
        "qm9pack.",
    )

    split: str | None = option(
        None,
        "Shares for training, validation, test, at random; default: EDM's split, or 0.8,0.1,0.1 "
        "where the source is only a part of QM9.",
    )
    seed: int = option(0, "Seed of a random split.")
    bonds: bool = option(False, "Add bonds and formal charges: those of each molecule's SMILES.")

    def check(self) -> None:
        """Raise `InputError` unless split and seed can be used."""
        check_seed(self.seed)
        check_fractions(parse_fractions(self.split or _SPLIT_OF_A_PART))

    def source_name(self) -> str:
        """Where QM9 is read from."""
        return f"QM9 ({'qm9pack' if self.source is None else display_path(Path(self.source.name))})"

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """All molecules at once, in index order."""
        molecules = read_qm9(self.source, log.progress)
        if self.bonds:
            molecules = _with_bonds(molecules, self.source_name(), log)
        if len(molecules) != MOLECULES and self.split is None:
            log.notes.append(
                f"{self.source} holds {len(molecules):,} of the {MOLECULES:,} characterised "
                f"molecules of QM9; they are split at random, {_SPLIT_OF_A_PART}, since EDM's "
                "split needs all"
            )
        yield MoleculeChunk(molecules.properties["index"].values.astype(np.int64), molecules)

    def split_labels(self, count: int, groups: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """EDM's split of all of QM9, else a random one."""
        if self.split is None and count == MOLECULES:
            return split_of_edm()
        fractions = parse_fractions(self.split or _SPLIT_OF_A_PART)
        return random_split(count, fractions, self.seed, groups)


def _with_bonds(molecules: Molecules, source: str, log: DatasetLog) -> Molecules:
    """The molecules with the bonds and formal charges of their SMILES."""
    from molgen_energy.chemistry.smiles_bonds import add_bonds_of_smiles

    try:
        found = add_bonds_of_smiles(molecules, lambda done: log.progress(done, len(molecules)))
    except ValueError as error:
        reason, k = error.args
        number = int(molecules.properties[INDEX].values[k])
        raise InputError(
            f"{source}: molecule {number}: {reason}; correct it, or leave out --bonds"
        ) from error
    log.facts.append("bonds and charges of the SMILES")
    return found


@dataclass
class _Columns:
    """What the readers collect; positions as text, which becomes an array at the end."""

    index: list[int] = field(default_factory=list)
    smiles: list[str] = field(default_factory=list)
    atomic_numbers: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)
    positions: list[NDArray[np.float32]] = field(default_factory=list)
    properties: list[list[float]] = field(default_factory=list)

    def molecules(self) -> Molecules:
        """The collected molecules in index order."""
        table = np.array(self.properties, np.float64).reshape(-1, len(PROPERTIES))
        properties = {
            name: Property(table[:, k].copy(), unit) for k, (name, unit, _) in enumerate(PROPERTIES)
        }
        index = np.array(self.index, np.float64)
        properties[INDEX] = Property(index, INDEX_UNIT)
        molecules = Molecules(
            np.concatenate(self.positions),
            np.frombuffer(bytes(self.atomic_numbers), np.uint8),
            offsets_from_sizes(self.sizes),
            smiles=np.array(self.smiles, dtype=object),
            properties=properties,
        )
        order = np.argsort(index, kind="stable")
        return molecules if bool((np.diff(order) == 1).all()) else molecules.select(order)


def split_of_edm() -> NDArray[np.uint8]:
    """EDM's split of the 130,831 molecules in index order: 100,000 / 17,748 / 13,083, (M,)."""
    order = np.random.RandomState(0).permutation(MOLECULES)
    split = np.full(MOLECULES, 2, np.uint8)
    split[order[:TRAIN]] = 0
    split[order[TRAIN : TRAIN + VALID]] = 1
    return split


def read_qm9(source: Path | None, progress: ProgressCallback = no_progress) -> Molecules:
    """QM9 in index order, with SMILES and 15 properties: all 130,831 molecules, or those there are.

    Parameters
    ----------
    source
        The archive `dsgdb9nsd.xyz.tar.bz2` or a folder of its `dsgdb9nsd_*.xyz` files; None reads
        the installed package `qm9pack`.

    Raises
    ------
    InputError
        There is neither, a file is broken, or molecules are missing in the package.
    """
    if source is not None:
        return read_dsgdb9nsd(source, progress)
    molecules = read_qm9pack(progress)
    if len(molecules) != MOLECULES:
        raise InputError(
            f"qm9pack holds {len(molecules):,} characterised molecules of QM9, expected "
            f"{MOLECULES:,}; install it again"
        )
    return molecules


def read_qm9pack(progress: ProgressCallback = no_progress) -> Molecules:
    """QM9 from the tables inside the installed package qm9pack (its loader is not run)."""
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "QM9 is not installed: run `pip install 'molgen-energy[qm9]'` (package qm9pack, 230 "
            "MB), or name the original archive or folder of files dsgdb9nsd_*.xyz with --source"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    columns = _Columns()
    for part in sorted(folder.glob("qm9_part*.csv")):
        with part.open(newline="", encoding="utf-8") as file:
            _read_table(part, file, columns, progress)
    if not columns.index:
        raise InputError(f"no table qm9_part*.csv in {folder}; install qm9pack again")
    return columns.molecules()


def _read_table(
    path: Path, file: Iterable[str], columns: _Columns, progress: ProgressCallback
) -> None:
    rows = csv.reader(file)
    header = next(rows)
    where = {name: header.index(name) for name in header}
    scalars = [where[column] for _, _, column in PROPERTIES]
    index, smiles = where["Index"], where["SMILES"]
    elements, positions = where["Elements"], where["XYZ_Ang"]
    # One letter each in QM9, so a list such as ['C','H'] is read by dropping its punctuation.
    to_number = {ord(symbol): atomic_number(symbol) for symbol in "HCNOF"} | {
        ord(mark): None for mark in "[]' ,"
    }
    brackets = str.maketrans("", "", "[]")
    texts: list[str] = []
    for row in rows:
        try:
            numbers = row[elements].translate(to_number)
            columns.atomic_numbers += numbers.encode("latin-1")
            columns.sizes.append(len(numbers))
            columns.index.append(parse_integer(row[index]))
            columns.smiles.append(row[smiles])
            columns.properties.append([parse_number(row[k]) for k in scalars])
            texts.append(row[positions].translate(brackets))
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: row {len(texts) + 2} is broken ({error})") from error
        if len(texts) % 2000 == 0:
            progress(len(columns.index), MOLECULES)
    # As `parse_number` does, for the whole table in one step.
    text = ",".join(texts)
    if "_" in text or not text.isascii():
        raise InputError(f"{path} has coordinates that are no numbers; install qm9pack again")
    flat = np.array(text.replace("*^", "e").split(","), dtype=np.float32)
    columns.positions.append(flat.reshape(-1, 3))
    progress(len(columns.index), MOLECULES)


def read_dsgdb9nsd(source: Path, progress: ProgressCallback = no_progress) -> Molecules:
    """QM9, or a part of it, from its original files, without the uncharacterised molecules.

    Parameters
    ----------
    source
        A tar archive (any compression) or a folder, with folders inside, of `dsgdb9nsd_*.xyz`
        files. The names may differ: a file of another name counts if it is one of QM9 by its
        second line, which then gives the number.

    Raises
    ------
    InputError
        The source is missing, holds no such file, one of them is broken, or two have one number;
        names it.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist; name the archive or the folder of QM9's files")
    if not source.is_dir():
        check_file(source)
    skip = uncharacterised()
    columns = _Columns()
    names: dict[int, str] = {}
    for done, (name, text) in enumerate(_original_files(source), start=1):
        try:
            number = _number_in_qm9(name, text)
            if number in names:
                raise ValueError(f"{names[number]} has the number {number} too")
            names[number] = name
            if number not in skip:
                _read_original(number, text, columns)
        except (ValueError, IndexError) as error:
            raise InputError(f"{source}: {name} is broken ({error})") from error
        progress(done, MOLECULES_WITH_UNCHARACTERISED)
    if not columns.index:
        raise InputError(f"no dsgdb9nsd_*.xyz file in {source}")
    return columns.molecules()


def _original_files(source: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the files of QM9 in a folder or an archive."""
    for name, content in _xyz_files(source):
        text = content.decode("utf-8", "replace")
        if _NAME.fullmatch(name) or _tagged_number(text) is not None:
            if len(content) > _MOST_BYTES:
                raise InputError(
                    f"{source}: {name} is broken (more than {_MOST_BYTES:,} bytes, files of QM9 "
                    "have some 2,000)"
                )
            yield name, text


def _xyz_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names of all XYZ files, and their content as far as one of QM9 can be long."""
    if not source.is_dir():
        yield from _members(source)
        return
    for path in sorted(source.rglob("*")):
        if _is_wanted(path.name) and not path.is_dir():
            check_file(path)
            with path.open("rb") as file:
                yield path.name, file.read(_MOST_BYTES + 1)


def _is_wanted(name: str) -> bool:
    """Whether a name is that of an XYZ file; hidden ones are resource forks, which macOS adds."""
    return name.lower().endswith(".xyz") and not name.startswith(".")


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names and content of the XYZ files in an archive, as `_xyz_files`."""
    from molgen_energy.chemistry.molfiles.lines import DAMAGED, TooLargeError, open_unpacked

    if source.suffix.lower() == ".xyz":
        raise InputError(
            f"{source} is one XYZ file, no archive; `molgen-energy preprocess {source}` reads it"
        )
    with closing(open_unpacked(source)) as unpacked:
        try:
            with tarfile.open(fileobj=_Steps(unpacked), mode="r:") as archive:
                for member in archive:
                    archive.members.clear()  # type: ignore[attr-defined] # it keeps them all
                    name = member.name.rsplit("/", 1)[-1]
                    if (
                        _is_wanted(name)
                        and member.isreg()
                        and (file := archive.extractfile(member))
                    ):
                        yield name, file.read(_MOST_BYTES + 1)
        except TooLargeError as error:
            raise InputError(f"{source}: {error}") from error
        # A header that is damaged on purpose ends in other errors too.
        except (tarfile.TarError, *DAMAGED, ValueError, RecursionError) as error:
            raise InputError(f"{source} is not a complete tar archive ({error})") from error


class _Steps(io.RawIOBase):
    """An archive that is read in small steps: `tarfile` takes memory for any size in a header."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """So many bytes, fewer at the end."""
        if not 0 <= size <= 2 * _MOST_BYTES:
            raise tarfile.ReadError(f"a header names {size:,} bytes")
        return self._file.read(size)

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)


def _number_in_qm9(name: str, text: str) -> int:
    """That of the original name, else that of the second line."""
    match = _NAME.fullmatch(name)
    if match:
        return int(match[1])
    number = _tagged_number(text)
    assert number is not None
    return number


def _tagged_number(text: str) -> int | None:
    """The number in a second line such as `gdb 17 157.7 …`."""
    words = text[:200].partition("\n")[2].split(maxsplit=2)
    if len(words) < 2 or words[0] != "gdb":
        return None
    try:
        return parse_integer(words[1])
    except ValueError:
        return None


def _read_original(number: int, text: str, columns: _Columns) -> None:
    if "\0" in text:
        raise ValueError("it holds NUL bytes")
    lines = iter(text.split("\n"))
    size = parse_integer(next(lines, ""))
    if not 0 < size <= text.count("\n"):
        raise ValueError(f"{size:,} atoms in {text.count(chr(10)):,} lines")
    scalars = next(lines, "").split()[2:]  # after the tag "gdb" and the number
    if len(scalars) != len(PROPERTIES):
        raise ValueError(f"{len(scalars)} properties, expected {len(PROPERTIES)}")
    atoms = [next(lines, "").split() for _ in range(size)]
    if any(len(atom) != 5 for atom in atoms):
        raise ValueError("an atom's line does not hold element, x, y, z, charge")
    next(lines, "")  # frequencies
    smiles = next(lines, "").split()
    if not smiles:
        raise ValueError("no SMILES line")
    with np.errstate(over="ignore"):
        positions = np.array([[parse_number(x) for x in atom[1:4]] for atom in atoms], np.float32)
    if not np.isfinite(positions).all():
        raise ValueError("the coordinates are not finite")
    columns.atomic_numbers += bytes(atomic_number(atom[0]) for atom in atoms)
    columns.sizes.append(size)
    columns.positions.append(positions)
    columns.properties.append([parse_number(x) for x in scalars])
    columns.smiles.append(smiles[0])
    columns.index.append(number)


def uncharacterised() -> frozenset[int]:
    """Numbers (from 1) of the 3,054 molecules that failed the data set's consistency check."""
    return frozenset(map(int, asset("qm9_uncharacterized.txt").read_text().split()))
