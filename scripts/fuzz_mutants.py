"""Mutators of files: bytes, lines and numbers of text, YAML and NumPy's archives.

A mutator changes one file in place, and says what it did and what a command must do with it.
`fuzz_hdf5.py` has those of HDF5 files.
"""

from __future__ import annotations

import copy
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

Rng = np.random.Generator

REFUSED, SAME, ANY = "refused", "same", "any"
"""What a command must do with a mutant: exit with code 2; that, or make of it what it makes of the
file itself; that, or make anything of it. It must never fail in another way."""


class Mutation(NamedTuple):
    """What a mutator did."""

    text: str
    expected: str = ANY


Mutator = Callable[[Path, Rng], "Mutation | None"]
"""Changes a file in place; None where the file has nothing to change in this way."""


def pick(rng: Rng, items: Any) -> Any:
    """One of some items."""
    items = list(items)
    return items[int(rng.integers(len(items)))]


# Bytes


def damaged_bytes(expected: str = ANY) -> Mutator:
    """Flip, overwrite, cut off, insert, remove and repeat bytes at random places."""

    def mutate(path: Path, rng: Rng) -> Mutation:
        content, text = _damaged(path.read_bytes(), rng)
        path.write_bytes(content)
        return Mutation(text, expected)

    return mutate


def _damaged(content: bytes, rng: Rng) -> tuple[bytes, str]:
    if not content:
        return rng.bytes(16), "16 random bytes in an empty file"
    place, data = int(rng.integers(len(content))), bytearray(content)
    length = int(min(2 ** rng.integers(9), len(content) - place))
    kind = int(rng.integers(9))
    if kind <= 1:
        places = sorted(rng.integers(len(data), size=2 ** int(rng.integers(4))).tolist())
        for at in places:
            data[at] ^= 1 << int(rng.integers(8))
        return bytes(data), f"flipped a bit of each of the bytes {places}"
    if kind == 2:
        data[place : place + length] = pick(rng, (b"\0", b"\xff", b"\x7f", b" ")) * length
        return bytes(data), f"overwrote {length} bytes at {place}"
    if kind == 3:
        return content[:place], f"cut off at byte {place}"
    if kind == 4:
        inserted = rng.bytes(length)
        return content[:place] + inserted + content[place:], f"inserted {length} bytes at {place}"
    if kind == 5:
        return content[:place] + content[place + length :], f"removed {length} bytes at {place}"
    if kind == 6:
        block = content[place : place + length]
        return content[:place] + block + content[place:], f"repeated {length} bytes at {place}"
    if kind == 7:
        return content + rng.bytes(length), f"appended {length} bytes"
    # Numbers and lengths in binary headers are often 4 or 8 little-endian bytes.
    width = pick(rng, (2, 4, 8))
    value = pick(rng, (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width) - 1, 2 ** (4 * width)))
    data[place : place + width] = value.to_bytes(width, "little")
    return bytes(data[: len(content)]), f"wrote {value} into {width} bytes at {place}"


def emptied(path: Path, rng: Rng, expected: str = REFUSED) -> Mutation:
    """An empty file, or one of white space."""
    content = pick(rng, (b"", b"\n", b" " * 4096, b"\0" * 4096))
    path.write_bytes(content)
    return Mutation(f"nothing but {len(content)} bytes {content[:1]!r}", expected)


def emptied_or_same(path: Path, rng: Rng) -> Mutation:
    """As `emptied`, of a file that can be made again."""
    return emptied(path, rng, SAME)


# Lines of text


def damaged_lines(path: Path, rng: Rng) -> Mutation | None:
    """Drop, repeat, exchange, join, shift or lengthen a line."""
    lines = path.read_bytes().split(b"\n")
    k = int(rng.integers(len(lines)))
    kind = pick(rng, ("drop", "repeat", "exchange", "join", "indent", "long", "blank"))
    if kind == "drop":
        del lines[k]
    elif kind == "repeat":
        lines.insert(k, lines[k])
    elif kind == "exchange":
        other = int(rng.integers(len(lines)))
        lines[k], lines[other] = lines[other], lines[k]
    elif kind == "join":
        lines[k : k + 2] = [b"".join(lines[k : k + 2])]
    elif kind == "indent":
        lines[k] = b" " * int(rng.integers(1, 5)) + lines[k]
    elif kind == "long":
        lines[k] += pick(rng, (b"x", b" ", b"1", b"\t")) * 100_000
    else:
        lines.insert(k, b"")
    path.write_bytes(b"\n".join(lines))
    return Mutation(f"{kind}: line {k + 1}")


def foreign_characters(path: Path, rng: Rng) -> Mutation:
    """Bytes that no text has: terminal escapes, markup of rich, invalid UTF-8, other line ends."""
    content = path.read_bytes()
    place = int(rng.integers(len(content) + 1))
    foreign = pick(
        rng,
        (
            b"\x1b[31m", b"\x1b]0;title\x07", b"\x08\x08", b"[bold]", b"[/]", b"\x00", b"\xff\xfe",
            b"\xc3\x28", b"\r", b"\x85", "\u2028".encode(), "\u202e".encode(), b"\x9b2J", b"\x7f",
        ),
    )  # fmt: skip
    path.write_bytes(content[:place] + foreign + content[place:])
    return Mutation(f"inserted {foreign!r} at {place}")


def damaged_numbers(path: Path, rng: Rng) -> Mutation | None:
    """Replace one number of a text by another text, which is or is not a number."""
    text = path.read_text(encoding="utf-8")
    numbers = list(re.finditer(r"(?<![\w.+-])[-+]?\d+(\.\d+)?(?![\w.])", text))
    if not numbers:
        return None
    at = pick(rng, numbers)
    new = pick(
        rng,
        (
            "nan", "inf", "-inf", "1e999", "-1", "0", "00", "999", "1_0", "1e5", "0x10", "", "x",
            "1.2.3", "--1", "1,5", "9" * 400, "999999999999", "-0", "1d3", "٣", "½", "1 2",
        ),
    )  # fmt: skip
    if rng.integers(2):  # in the same columns
        new = new[: len(at[0])].rjust(len(at[0]))
    path.write_text(text[: at.start()] + new + text[at.end() :], encoding="utf-8")
    return Mutation(f"{at[0]!r} at {at.start()} is now {new[:30]!r}")


_COORDINATES = re.compile(r"-?\d+\.\d{3,}")


def _replaced_coordinate(path: Path, rng: Rng, new: Callable[[str], str]) -> Mutation | None:
    """Replace a number that is a coordinate by what is none, in as many columns."""
    text = path.read_text(encoding="utf-8")
    found = [m for m in _COORDINATES.finditer(text) if _is_atom_line(text, m.start())]
    if not found:
        return None
    at = pick(rng, found)
    value = new(at[0])
    path.write_text(text[: at.start()] + value + text[at.end() :], encoding="utf-8")
    return Mutation(f"coordinate {at[0]!r} at {at.start()} is now {value!r}", REFUSED)


def _is_atom_line(text: str, place: int) -> bool:
    """Whether there are at least three coordinates in the line of a place."""
    line = text[text.rfind("\n", 0, place) + 1 : (text + "\n").find("\n", place)]
    return len(_COORDINATES.findall(line)) >= 3 and "=" not in line


def no_coordinate(path: Path, rng: Rng) -> Mutation | None:
    """A coordinate that is no number, or a number of Python or of another script."""

    def new(old: str) -> str:
        digits = [k for k, c in enumerate(old) if c.isdigit()]
        k = digits[-1]
        return pick(
            rng,
            (
                "x".rjust(len(old)), "nan".rjust(len(old)), "inf".rjust(len(old)),
                f"{old[: k - 1]}_{old[k]}", f"{old[:k]}{chr(0x0660 + int(old[k]))}",
                f"{old[:k]}{chr(0xFF10 + int(old[k]))}", old.replace(".", ","), f"{old[:-1]}x",
            ),
        )  # fmt: skip

    return _replaced_coordinate(path, rng, new)


def shifted_atom(path: Path, rng: Rng) -> Mutation | None:
    """An atom of a V2000 table shifted by a column: refused, or read as if it was not."""
    lines = path.read_text(encoding="utf-8").split("\n")
    atoms = [k for k, line in enumerate(lines) if re.match(r" *-?\d+\.\d{4} *-?\d+\.\d{4}", line)]
    if not atoms:
        return None
    k = pick(rng, atoms)
    columns = int(rng.integers(1, 4))
    left = bool(rng.integers(2)) and lines[k].startswith(" " * columns)
    lines[k] = lines[k][columns:] if left else " " * columns + lines[k]
    path.write_text("\n".join(lines), encoding="utf-8")
    where = "left" if left else "right"
    return Mutation(f"shifted line {k + 1} by {columns} columns to the {where}", SAME)


def missing_separator(path: Path, rng: Rng) -> Mutation | None:
    """An SDF file without the line between two records."""
    records = path.read_text(encoding="utf-8").split("$$$$\n")
    if len(records) < 3:
        return None
    k = int(rng.integers(len(records) - 2))
    records[k : k + 2] = [records[k] + records[k + 1]]
    path.write_text("$$$$\n".join(records), encoding="utf-8")
    return Mutation(f"no $$$$ after record {k + 1}", REFUSED)


def atom_lines(path: Path, rng: Rng) -> Mutation | None:
    """One atom more or fewer than the record declares."""
    lines = path.read_text(encoding="utf-8").split("\n")
    atoms = [k for k in range(len(lines)) if _is_atom_line(lines[k], 0)]
    if not atoms:
        return None
    k = pick(rng, atoms)
    if rng.integers(2):
        lines.insert(k, lines[k])
    else:
        del lines[k]
    path.write_text("\n".join(lines), encoding="utf-8")
    return Mutation(f"an atom more or fewer at line {k + 1}", REFUSED)


# YAML


def damaged_yaml(accepts: Callable[[Any], bool]) -> Mutator:
    """A value of the tree replaced, removed or added; refused where the declaration refuses it.

    Values of another type are always to be refused: a list for a number, a number for a mapping.
    """

    def mutate(path: Path, rng: Rng) -> Mutation:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        place = pick(rng, list(_places(tree)))
        new, text, foreign = _other_value(tree, place, rng)
        path.write_text(yaml.safe_dump(new, sort_keys=False), encoding="utf-8")
        expected = REFUSED if foreign or not accepts(copy.deepcopy(new)) else ANY
        return Mutation(f"{'.'.join(map(str, place))}: {text}", expected)

    return mutate


def _places(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value of a tree, but for the tree itself."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield (*prefix, key)
        yield from _places(value, (*prefix, key))


_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -1e308, 2**31, 2**63 - 1, 2**64, -(2**63) - 1, 10**11,
    float("nan"), float("inf"), "", "text", "1", "auto", "x" * 100_000, "\x1b[31m", "[bold]x[/]",
    "../../x", "/etc/passwd", "a\nb", [], [None], [[[]]], {}, {"a": 1}, {"name": "text"},
)  # fmt: skip


def _other_value(tree: Any, place: tuple[Any, ...], rng: Rng) -> tuple[Any, str, bool]:
    """The tree with another value, what it is, and whether its type is foreign to the key."""
    new = copy.deepcopy(tree)
    parent = new
    for key in place[:-1]:
        parent = parent[key]
    old = parent[place[-1]]
    kind = int(rng.integers(12))
    if kind == 0:
        del parent[place[-1]]
        return new, "removed", False
    if kind == 1 and isinstance(parent, dict):
        parent[pick(rng, ("unknown", 7, None, "\x1b[2J", "x" * 5000))] = old
        return new, "a further key beside it", False
    if kind == 2:
        nested: Any = old
        for _ in range(int(rng.integers(1, 60))):
            nested = [nested] if rng.integers(2) else {"a": nested}
        parent[place[-1]] = nested
        return new, "nested", isinstance(old, (int, float))
    if kind == 3 and isinstance(old, (list, dict)):
        parent[place[-1]] = old * 2 if isinstance(old, list) else {**old, **dict.fromkeys(range(5))}
        return new, "longer", False
    value = pick(rng, _VALUES)
    parent[place[-1]] = value
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    foreign = (
        (number and (isinstance(value, (bool, list, dict)) or value in ("text", "", "1")))
        or (isinstance(old, dict) and isinstance(value, (bool, int, float, list)))
        or (isinstance(old, str) and isinstance(value, (list, dict)))
        or (isinstance(value, int) and not -(2**63) <= value < 2**64)
    )
    return new, repr(value)[:60], foreign


def hostile_yaml(path: Path, rng: Rng) -> Mutation:
    """What YAML allows and no file of this package has: aliases, tags, repeated keys, depth."""
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    name, attack = pick(
        rng,
        {
            "repeated key": f"{text}{first}\n",
            "anchor": f"{text}extra: &a 1\n",
            "alias": f"{text}extra: &a 1\nmore: *a\n",
            "merge": f"{text}extra: &a {{x: 1}}\nmore:\n  <<: *a\n",
            "alias bomb": text + _alias_bomb(),
            "nested lists": f"{text}extra: {'[' * 5000}{']' * 5000}\n",
            "nested mappings": f"{text}extra: {'{a: ' * 3000}1{'}' * 3000}\n",
            "nested blocks": text + "".join(f"{' ' * k}a:\n" for k in range(1500)),
            "tag": f"{text}extra: !!python/object/apply:os.getcwd []\n",
            "own tag": f"{text}extra: !x 1\n",
            "huge integer": f"{text}extra: {'9' * 100_000}\n",
            "huge hexadecimal": f"{text}extra: 0x{'f' * 100_000}\n",
            "huge base 60": f"{text}extra: 1{':59' * 50_000}\n",
            "huge text": f"{text}extra: {'x' * 2_000_000}\n",
            "huge comment": f"{text}#{'x' * 2_000_000}\n",
            "many keys": text + "".join(f"k{k}: 1\n" for k in range(100_000)),
            "second document": f"{text}---\na: 1\n",
            "a list": "- 1\n- 2\n",
            "a number": "12\n",
            "nothing": "",
            "null": "null\n",
            "NUL": f"{text}\0",
            "open bracket": f"{text}extra: [\n",
            "complex key": f"{text}? [1, 2]\n: 3\n",
            "directive": f"%YAML 9.9\n---\n{text}",
        }.items(),
    )
    path.write_text(attack, encoding="utf-8")
    return Mutation(name, ANY if name in ("directive", "nothing", "null") else REFUSED)


def _alias_bomb() -> str:
    lines = [f"b0: &b0 [{', '.join(['x'] * 9)}]"]
    lines += [f"b{k}: &b{k} [{', '.join([f'*b{k - 1}'] * 9)}]" for k in range(1, 10)]
    return "\n".join(lines) + "\n"


# Archives of NumPy


def damaged_npz(path: Path, rng: Rng) -> Mutation:
    """Arrays of another shape or type, or a member that declares more than it holds."""
    with np.load(path) as stored:
        arrays = dict(stored)
    name = pick(rng, list(arrays))
    old = arrays[name]
    kind, value = pick(
        rng,
        {
            "a scalar": old.ravel()[0],
            "another rank": old[0],
            "a further axis": old[..., None],
            "a shorter axis": old[:-1],
            "a narrower lattice": old[:, :, :-1],
            "empty": old[:0],
            "text": old.astype(str),
            "booleans": old > 0,
            "complex": old.astype(complex),
            "objects": old.astype(object),
            "dates": old.astype("i8").astype("M8[s]"),
            "records": np.zeros(old.shape, [("a", "f4"), ("b", "f4")]),
            "NaN": np.where(np.arange(old.size).reshape(old.shape) == 0, np.nan, old),
            "infinite": np.full(old.shape, np.inf),
            "beyond float32": np.full(old.shape, 1e300),
        }.items(),
    )
    arrays[name] = value
    np.savez(path, **arrays)
    return Mutation(f"{name}: {kind}", REFUSED)


def declared_npz(path: Path, rng: Rng) -> Mutation:
    """A header that declares an array of terabytes, or of no sensible shape."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(rng, list(members))
    shape = pick(
        rng,
        ("(1000000000, 6, 6)", "(10000000, 300, 300)", "(-1, 6, 6)", "(6,)", "()", "(0, 0, 0)",
         "(99999999999999999999,)", "(6, 6, 6" + ", 1" * 60 + ")", "'6'", "(6, 6, True)"),
    )  # fmt: skip
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (117 - len(header) % 64) + "\n"
    body = members[name][128:]
    members[name] = (
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return Mutation(f"{name}: declares the shape {shape[:40]}", REFUSED)
