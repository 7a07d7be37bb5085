"""Files damaged in known ways: lost records are counted, and the others keep their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from molgen_energy.chemistry.molfiles import MoleculeReader, MoleculeTextWriter
from molgen_energy.data.molecules import Molecules

Damage = Callable[[list[str], np.random.Generator], list[str]]
"""Takes the lines of a frame or record, returns other lines."""


def atom_line(lines: list[str], rng: np.random.Generator, first: int = 2) -> int:
    return int(rng.integers(first, len(lines)))


def replaced(lines: list[str], k: int, line: str) -> list[str]:
    return [*lines[:k], line, *lines[k + 1 :]]


XYZ_DAMAGES: dict[str, Damage] = {
    "bad first atom": lambda lines, rng: replaced(lines, 2, "Xx 0 0 0"),
    "bad atom": lambda lines, rng: replaced(lines, atom_line(lines, rng), "C zero 0 0"),
    "short atom": lambda lines, rng: replaced(lines, atom_line(lines, rng), "C 0 0"),
    "element alone": lambda lines, rng: replaced(lines, atom_line(lines, rng), "8"),
    "not finite": lambda lines, rng: replaced(lines, atom_line(lines, rng), "C nan 0 0"),
    "overflow of Fortran": lambda lines, rng: replaced(lines, atom_line(lines, rng), "C *** 0 0"),
    "all atoms bad": lambda lines, rng: [*lines[:2], *(f"Q{line}" for line in lines[2:])],
    "empty line within": lambda lines, rng: _with(lines, atom_line(lines, rng), ""),
    "text within": lambda lines, rng: _with(lines, atom_line(lines, rng), "warning: no progress"),
    "atom missing": lambda lines, rng: _without(lines, atom_line(lines, rng)),
    "two atoms missing": lambda lines, rng: lines[:-2],
    "all atoms missing": lambda lines, rng: lines[:2],
    "atom too many": lambda lines, rng: [*lines, "H 1.5 2.5 3.5"],
    "atoms too many": lambda lines, rng: [*lines, "H 1.5 2.5 3.5", "O 1.5 0.5 3.5"],
    "no number": lambda lines, rng: ["five", *lines[1:]],
    "number and text": lambda lines, rng: [f"{lines[0]} atoms", *lines[1:]],
    "number with a point": lambda lines, rng: [f"{lines[0]}.0", *lines[1:]],
    "negative number": lambda lines, rng: [f"-{lines[0]}", *lines[1:]],
    "zero atoms": lambda lines, rng: ["0", *lines[1:]],
    "far too many": lambda lines, rng: [f"9999999{lines[0]}", *lines[1:]],
    "no comment": lambda lines, rng: [lines[0], *lines[2:]],
    "first line alone": lambda lines, rng: lines[:1],
}
AMBIGUOUS = {"element alone", "all atoms missing", "first line alone"}
"""They leave a number alone, which between other damaged frames may be that of one of these."""
COMMENTS = ("", "step 7", "7", "energy=-1.5 name='a b'", "Properties=species:S:1:pos:R:3", "3 4 5")


def _with(lines: list[str], k: int, line: str) -> list[str]:
    return [*lines[:k], line, *lines[k:]]


def _without(lines: list[str], k: int) -> list[str]:
    return [*lines[:k], *lines[k + 1 :]]


def frame(number: int, comment: str, rng: np.random.Generator) -> list[str]:
    """A frame whose first x is its number."""
    size = int(rng.integers(4, 12))
    elements, positions = rng.choice(list("HCNOF"), size), rng.normal(size=(size, 3)).round(4)
    positions[0, 0] = number
    rows = (f"{e} {x} {y} {z}" for e, (x, y, z) in zip(elements, positions.tolist(), strict=True))
    return [str(size), comment, *rows]


def lost_of(path: Path) -> tuple[list[int], list[int]]:
    """Numbers of the records that are left out, and those of the molecules; checks the latter."""
    reader = MoleculeReader(path, skip_bad=True)
    numbers = []
    for molecule in reader:
        numbers.append(reader.number)
        assert round(float(molecule.positions[0, 0])) == reader.number
    assert reader.number == reader.count + reader.skipped_count
    return sorted(set(range(1, reader.number + 1)) - set(numbers)), numbers


@pytest.mark.parametrize("seed", range(100, 130))
def test_frames_damaged_at_random(tmp_path, seed):
    """Frames of any comment, some of them damaged, in rows too, and the last one cut off."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(sorted(XYZ_DAMAGES.keys() - AMBIGUOUS), 3)
    text, bad = [], []
    for number in range(1, 41):
        lines = frame(number, str(rng.choice(COMMENTS)), rng)
        if rng.random() < 0.4:
            lines = XYZ_DAMAGES[str(rng.choice(kinds))](lines, rng)
            bad.append(number)
        elif rng.random() < 0.2:
            lines += [""] * int(rng.integers(1, 3))
        text += lines
    text += frame(41, "cut off", rng)[: int(rng.integers(2, 5))]
    (tmp_path / "a.xyz").write_text("\n".join(text) + "\n")
    lost, numbers = lost_of(tmp_path / "a.xyz")
    assert lost == [*bad, 41]
    assert len(numbers) == 41 - len(lost)


@pytest.mark.parametrize("damage", XYZ_DAMAGES)
@pytest.mark.parametrize("comment", COMMENTS)
def test_several_frames_with_the_same_damage(tmp_path, damage, comment):
    rng = np.random.default_rng(0)
    frames = [frame(number, comment, rng) for number in range(1, 8)]
    damaged = (1, 3, 5) if damage == "first line alone" else (1, 2, 3, 5)
    for k in damaged:
        frames[k] = XYZ_DAMAGES[damage](frames[k], rng)
    (tmp_path / "a.xyz").write_text("\n".join(line for lines in frames for line in lines) + "\n")
    lost, _ = lost_of(tmp_path / "a.xyz")
    assert lost == [k + 1 for k in damaged]


def test_lines_between_frames_are_a_bad_record_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    first, second, third = (frame(k, "3", rng) for k in (1, 3, 5))
    text = [*first, "***", *second, "", "two lines", "of text", "", *third]
    (tmp_path / "a.xyz").write_text("\n".join(text))
    assert lost_of(tmp_path / "a.xyz")[0] == [2, 4]


SDF_DAMAGES: dict[str, Damage] = {
    "bad element": lambda lines, rng: replaced(lines, 4, lines[4][:31] + "Qq" + lines[4][33:]),
    "query": lambda lines, rng: replaced(lines, 5, lines[5][:31] + "A " + lines[5][33:]),
    "not finite": lambda lines, rng: replaced(lines, 4, "       nan" + lines[4][10:]),
    "atom missing": lambda lines, rng: _without(lines, 5),
    "cut off": lambda lines, rng: [*lines[:7], "$$$$"],
    "empty": lambda lines, rng: ["$$$$"],
    "no end": lambda lines, rng: [line for line in lines if not line.startswith("M  END")],
    "text": lambda lines, rng: ["no conformer", "$$$$"],
    "line in front": lambda lines, rng: ["", *lines],
}


@pytest.mark.parametrize("seed", range(6))
def test_records_damaged_at_random(tmp_path, molecules, seed):
    rng = np.random.default_rng(seed)
    some: Molecules = molecules.select(np.arange(30))
    some.positions[some.offsets[:-1], 0] = np.arange(1, 31)
    with MoleculeTextWriter(tmp_path / "good.sdf", {}) as writer:
        writer.append(some)
    records = (tmp_path / "good.sdf").read_text().split("$$$$\n")[:-1]
    text, bad = [], []
    for number, record in enumerate(records, start=1):
        lines = [*record.splitlines(), "$$$$"]
        if rng.random() < 0.4:
            lines = SDF_DAMAGES[str(rng.choice(list(SDF_DAMAGES)))](lines, rng)
            bad.append(number)
        text += lines
    (tmp_path / "a.sdf").write_text("\n".join(text) + "\n")
    lost, _ = lost_of(tmp_path / "a.sdf")
    assert lost == bad
