"""Which files hold molecules, and of which kind each is."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rdkit import Chem, rdBase

from molgen_energy.chemistry.molfiles.lines import DAMAGED, Lines, TooLargeError
from molgen_energy.errors import InputError
from molgen_energy.output import check_file, real_path

SDF, XYZ = "sdf", "xyz"

_KINDS = {
    "sdf": SDF,
    "sd": SDF,
    "mol": SDF,
    "mdl": SDF,
    "xyz": XYZ,
    "extxyz": XYZ,
    "exyz": XYZ,
    "allxyz": XYZ,
}
_COMPRESSED = ("gz", "bz2", "xz")
_READABLE = "an SDF or XYZ file (.sdf, .mol, .xyz, .extxyz, .txt, also .gz)"

_MOL_BLOCK = re.compile(r"V[23]000\s*$", re.MULTILINE)
_HEADER_LINES = 10  # of a mol block the fourth line names the version; some writers add or lose one
_CONVERT = "convert it to SDF, for instance with Open Babel"
# Beginnings of other files, without the white space before them, and what to do.
_BINARY = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x89HDF": "an HDF5 file; give it the ending .h5",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
}
_TEXTS = {
    r"<!doctype|<html|<\?xml|<svg": "a web page or XML; download the file itself",
    r"(#[^\n]*\n\s*)*@<TRIPOS>": f"a MOL2 file; {_CONVERT}",
    r"data_\S*\s": f"a CIF file; {_CONVERT}",
    r"(?-i:HEADER|TITLE |COMPND|REMARK|CRYST1|MODEL |ATOM  |HETATM)": f"a PDB file; {_CONVERT}",
    r"version https://git-lfs": "a pointer of Git LFS; run `git lfs pull`",
    r"\$RXN|\$RDFILE": "a file of reactions, not of molecules",
    r"[\[{]\s*[\"\[{]": f"JSON; {_CONVERT}",
}
_FIRST_LINES = 5
_MOST_WORDS = 1000  # characters of a line that tell its kind


class FileSet(NamedTuple):
    """The files that a path stands for."""

    files: list[Path]
    is_set: bool
    """Whether the path is a folder or a pattern."""
    notes: list[str]
    """What is left out of the set, or may surprise."""


def molecule_files(path: Path) -> FileSet:
    """The files of a path: of a file itself, of a folder or a pattern all that hold molecules.

    A pattern has `*`, `?` or `[…]`, as a shell's. A set is in natural order, `molecule_2` before
    `molecule_10`. Folders within a folder and hidden files do not belong to it; neither do files
    of other kinds, and `.txt` files only if their content is that of an SDF or XYZ. The files of a
    pattern may have any ending.

    Raises
    ------
    InputError
        The path does not exist, or holds or matches no such file.
    """
    try:
        is_folder = path.is_dir()
        is_pattern = not is_folder and not path.exists() and glob.has_magic(str(path))
        if not is_folder and not is_pattern:
            check_file(path)
            return FileSet([path], False, [])
        # Unlike `Path.glob`, `*` of `glob.glob` matches no hidden files.
        found = list(path.iterdir() if is_folder else map(Path, glob.glob(str(path))))  # noqa: PTH207
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if is_pattern and not found:
        raise InputError(f"no file matches {path}")
    files = sorted(filter(_belongs if is_folder else _matches, found), key=_natural_order)
    if not files:
        what = f"the folder {path} holds" if is_folder else f"{path} matches"
        raise InputError(f"{what} no molecule file; name {_READABLE}")
    notes = []
    if left := len(found) - len(files):
        notes.append(f"{left:,} folders, hidden files or files of other kinds are left out")
    if {_kind_of_name(file) for file in files} >= {SDF, XYZ}:
        notes.append("both SDF and XYZ files are read; are these the same molecules?")
    return FileSet(files, True, notes)


def base_name(path: Path) -> str:
    """The name of a file without the endings of its kind, of a folder or pattern the folder's."""
    if path.is_dir():
        return real_path(path).name or "molecules"
    if not path.exists() and glob.has_magic(path.name):
        return base_name(path.parent)
    stem, _, suffix = _unpacked(path.name).rpartition(".")
    return (stem if stem else suffix) or "molecules"


def kind_of(path: Path, lines: Lines) -> str:
    """`SDF` or `XYZ`, by the content of a file, or by its name where the content does not say.

    Raises
    ------
    InputError
        It is neither; names what it is, if that can be told. Or it is packed and damaged.
    """
    head = lines.head
    for start, what in _BINARY.items():
        if head.startswith(start):
            raise InputError(f"{path} is {what}")
    if b"\0" in head and not lines.is_utf16:
        raise InputError(f"{path} is a binary file; name {_READABLE}")
    try:
        first = lines.peek(_HEADER_LINES)
    except DAMAGED as error:
        raise InputError(
            f"{path} is cut off or damaged at its beginning ({error}); make it again"
        ) from error
    except TooLargeError as error:
        raise InputError(f"{path}: {error}") from error
    first = [line[:_MOST_WORDS] for line in first]
    if _MOL_BLOCK.search("".join(first)):
        return SDF
    if _begins_frame(first):
        return XYZ
    text = "".join(first).lstrip()
    for pattern, what in _TEXTS.items():
        if re.match(pattern, text, re.IGNORECASE):
            raise InputError(f"{path} is {what}")
    kind = _kind_of_name(path)
    if kind != XYZ and _are_smiles(first):
        raise InputError(
            f"{path} holds SMILES, which have no coordinates; `preprocess smiles` makes "
            "conformers of them"
        )
    if kind is not None:
        return kind
    if b"M  END" in head or b"$$$$" in head:
        return SDF
    raise InputError(f"{path} is no SDF or XYZ file; name {_READABLE}")


def _begins_frame(first: list[str]) -> bool:
    """Whether the first lines are a number, a comment, and an atom with three coordinates."""
    rows = [line.split() for line in first]
    while rows and not rows[0]:
        rows = rows[1:]
    if len(rows) < 3 or len(rows[0]) != 1 or not re.fullmatch("[0-9]+", rows[0][0]):
        return False
    return len(rows[2]) >= 4


def _are_smiles(first: list[str]) -> bool:
    """Whether the first word of each line is a SMILES, and the other words are no numbers."""
    rows = [row for row in (line.split() for line in first[:_FIRST_LINES]) if row]
    if rows and rows[0][0].lower() in ("smiles", "canonical_smiles"):
        return True
    with rdBase.BlockLogs():
        return bool(rows) and all(
            len(row) < 4 and Chem.MolFromSmiles(row[0], sanitize=False) is not None for row in rows
        )


def _suffix(name: str) -> str:
    return name.lower().rpartition(".")[2] if "." in name else ""


def _unpacked(name: str) -> str:
    """The name without the ending of a packed file."""
    return name.rpartition(".")[0] if _suffix(name) in _COMPRESSED else name


def _kind_of_name(path: Path) -> str | None:
    return _KINDS.get(_suffix(_unpacked(path.name)))


def _belongs(path: Path) -> bool:
    """Whether a member of a folder is a file of molecules."""
    if path.name.startswith(".") or path.is_dir():
        return False
    is_text = _suffix(_unpacked(path.name)) == "txt"
    return _kind_of_name(path) is not None or (is_text and _may_hold_molecules(path))


def _matches(path: Path) -> bool:
    """Whether a match of a pattern is a file of molecules."""
    return not path.is_dir() and (_kind_of_name(path) is not None or _may_hold_molecules(path))


def _may_hold_molecules(path: Path) -> bool:
    """By its content. An empty file is a bad record: a program may have failed to write it."""
    if not path.is_file():
        return False
    try:
        if path.stat().st_size == 0:
            return True
        lines = Lines(path)
        try:
            kind_of(path, lines)
        finally:
            lines.close()
    except (InputError, OSError):
        return False
    return True


def _natural_order(path: Path) -> tuple[list[int | str], str]:
    """Numbers within names count as numbers."""
    return list(_parts(str(path))), str(path)


def _parts(name: str) -> Iterator[int | str]:
    for k, part in enumerate(re.split(r"(\d+)", name)):
        yield int(part) if k % 2 else part.casefold()
