"""Mutators of HDF5 files, made from the declaration of a format.

A new data set or attribute of a format is fuzzed without further code.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fuzz_mutants import ANY, REFUSED, Mutation, Mutator, Rng, pick

from molgen_energy.formats.declaration import AttributeSpec, DatasetSpec, HDF5Format

Change = tuple[Callable[[], Any], str]
"""What changes the file, and what a command must do with it."""


def damaged_dataset(declared: HDF5Format, checks_values: bool = True) -> Mutator:
    """A data set that is not as the format declares it.

    Parameters
    ----------
    declared
        The format.
    checks_values
        Whether the commands read every value, so that one outside of its range must be refused.
    """

    def mutate(path: Path, rng: Rng) -> Mutation:
        with h5py.File(path, "r+") as file:
            name, spec = pick(rng, present(file, declared))
            dataset = _Declared(file, path, name, spec, declared)
            kind = pick(rng, ("shapes", "types", "links", "values"))
            changes = getattr(dataset, kind)(rng)
            text, (change, expected) = pick(rng, changes.items())
            change()
        if kind == "values" and not checks_values:
            expected = ANY
        return Mutation(f"data set {name}: {text}", expected)

    return mutate


def present(file: h5py.File, declared: HDF5Format) -> list[tuple[str, DatasetSpec]]:
    """The data sets of a file that are declared, with their declarations."""
    names: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            names.append(name)

    file.visititems(visit)
    found = []
    for name in names:
        with contextlib.suppress(StopIteration):  # not declared
            found.append((name, declared.spec(name)))
    return found


class _Declared:
    """A data set of an open file, and the ways to make another one of it."""

    def __init__(
        self, file: h5py.File, path: Path, name: str, spec: DatasetSpec, declared: HDF5Format
    ) -> None:
        self.file, self.path, self.name, self.spec = file, path, name, spec
        self.old: Any = file[name][()]
        self.declared = declared

    def replaced(self, values: Any, expected: str = REFUSED, **options: Any) -> Change:
        """Other values under the same name."""

        def change() -> None:
            attributes = dict(self.file[self.name].attrs)
            del self.file[self.name]
            data = self.file.create_dataset(self.name, data=values, **options)
            data.attrs.update(attributes)

        return change, expected

    def shapes(self, rng: Rng) -> dict[str, Change]:
        old = self.old
        length = REFUSED if self._is_given(0) else ANY
        among = self.spec.required_with
        needed = self.spec.required or (among and len(self.file[among]) > 1)
        changes = {
            "missing": (lambda: self.file.__delitem__(self.name), REFUSED if needed else ANY),
            "a scalar": self.replaced(old.ravel()[0] if old.size else 0),
            "a further axis": self.replaced(old[..., None]),
            "shorter": self.replaced(old[:-1], length),
            "longer": self.replaced(np.concatenate([old, old[-1:]]), length),
            "empty": self.replaced(old[:0], length),
            "without a data space": self.replaced(h5py.Empty("f4")),
            "ten billion rows that are not stored": (self._declare_rows, REFUSED),
        }  # fmt: skip
        if old.ndim > 1:
            changes["flat"] = self.replaced(old.ravel())
            width = REFUSED if self._is_given(-1) else ANY
            changes["narrower"] = self.replaced(old[..., :-1], width)
        return changes

    def _is_given(self, axis: int) -> bool:
        """Whether other axes or the declaration say how long an axis is."""
        length = self.spec.shape[axis]
        if not isinstance(length, str) or length == "*":
            return length != "*"
        symbols = Counter(
            symbol.removesuffix("+1")
            for _, spec in present(self.file, self.declared)
            for symbol in spec.shape
            if isinstance(symbol, str)
        )
        return symbols[length.removesuffix("+1")] > 1

    def _declare_rows(self) -> None:
        """A data set in chunks that declares many rows, of which none is stored."""
        old = self.old
        del self.file[self.name]
        dtype = h5py.string_dtype() if old.dtype == object else old.dtype
        shape, chunks = (10**10, *old.shape[1:]), (65536, *old.shape[1:])
        self.file.create_dataset(self.name, shape, dtype, chunks=chunks, compression="gzip")

    def types(self, rng: Rng) -> dict[str, Change]:
        old, spec = self.old, self.spec
        changes = {
            "compound": self.replaced(np.zeros(old.shape, [("a", "f4"), ("b", "i4")])),
            "opaque": self.replaced(np.zeros(old.shape, "V8")),
            "enumerated": self.replaced(
                np.zeros(old.shape, "i1"), dtype=h5py.enum_dtype({"a": 0}, "i1")
            ),
            "arrays": self.replaced(None, shape=old.shape, dtype=np.dtype(("f4", (2,)))),
            "references": self.replaced(
                np.full(old.shape, self.file.ref, object), dtype=h5py.ref_dtype
            ),
        }
        if spec.kind == "text":
            changes |= {
                "numbers": self.replaced(np.zeros(old.shape)),
                "not UTF-8": self.replaced(np.full(old.shape, b"\xff\xfe", "S2"), ANY),
                "terminal escapes": self.replaced(np.full(old.shape, b"\x1b[31m", "S5"), ANY),
            }
            return changes
        changes |= {
            "text": self.replaced(old.astype("S"), dtype=h5py.string_dtype()),
            "booleans": self.replaced(old > 0),
            "complex": self.replaced(old.astype(complex)),
        }
        if spec.kind == "float":
            changes |= {
                "integers": self.replaced(np.nan_to_num(old).astype("i8")),
                "double precision": self.replaced(old.astype("f8"), ANY),
                "big endian": self.replaced(old.astype(">f4"), ANY),
            }
        else:
            changes |= {
                "floating-point": self.replaced(old.astype("f8")),
                "of 64 bits": self.replaced(old.astype("i8"), ANY),
                "big endian": self.replaced(old.astype(">i8"), ANY),
            }
        return changes

    def links(self, rng: Rng) -> dict[str, Change]:
        """What stands under the name instead of a data set of this file."""
        outside, name = self.path.with_name("outside.h5"), self.name

        def external() -> Any:
            with h5py.File(outside, "w") as other:
                other["secret"] = self.old
            return h5py.ExternalLink(outside.name, "secret")

        def inside() -> Any:
            self.file.copy(self.file[name], "elsewhere")
            return h5py.SoftLink("/elsewhere")

        def linked(made: Callable[[], Any]) -> Change:
            def change() -> None:
                link = made()
                del self.file[name]
                self.file[name] = link

            return change, REFUSED

        def group() -> None:
            del self.file[name]
            self.file.create_group(name)

        changes = {
            "a dangling link": linked(lambda: h5py.SoftLink("/nowhere")),
            "a link to itself": linked(lambda: h5py.SoftLink(f"/{name}")),
            "a link in the file": linked(inside),
            "a link to another file": linked(external),
            "a link to no file": linked(lambda: h5py.ExternalLink("nowhere.h5", "a")),
            "a link to a device": linked(lambda: h5py.ExternalLink("/dev/zero", "a")),
            "a type": linked(lambda: np.dtype("f4")),
            "a group": (group, REFUSED),
        }
        if self.spec.kind != "text":
            changes["virtual"] = (self._virtual, REFUSED)
            changes["stored in another file"] = (self._stored_outside, REFUSED)
        return changes

    def _virtual(self) -> None:
        outside = self.path.with_name("outside.h5")
        with h5py.File(outside, "w") as other:
            other["secret"] = self.old
        layout = h5py.VirtualLayout(self.old.shape, self.old.dtype)
        layout[...] = h5py.VirtualSource(outside.name, "secret", self.old.shape)
        del self.file[self.name]
        self.file.create_virtual_dataset(self.name, layout)

    def _stored_outside(self) -> None:
        raw = self.path.with_name("outside.bin")
        raw.write_bytes(np.ascontiguousarray(self.old).tobytes())
        del self.file[self.name]
        self.file.create_dataset(
            self.name, self.old.shape, self.old.dtype,
            external=[(str(raw), 0, h5py.h5f.UNLIMITED)],
        )  # fmt: skip

    def values(self, rng: Rng) -> dict[str, Change]:
        """One value, or all, outside of the range, and rows in another order."""
        old, spec = self.old, self.spec
        if spec.kind == "text" or not old.size:
            return {"longer texts": self.replaced([b"x" * 100_000] * len(old), ANY)}
        place = int(rng.integers(old.size))

        def one(value: Any, expected: str = REFUSED) -> Change:
            new = old.astype("f8" if spec.kind == "float" else "i8")
            new.ravel()[place] = value
            if expected == ANY or spec.kind == "integer" or not np.isfinite(value):
                new = new.astype(old.dtype) if np.can_cast(new.dtype, old.dtype) else new
            return self.replaced(new, expected)

        changes = {"zeros": self.replaced(np.zeros_like(old), ANY)}
        if spec.kind == "float":
            finite = REFUSED if spec.finite else ANY
            changes |= {
                "NaN": one(np.nan, finite), "infinite": one(-np.inf, finite),
                "1e300": one(1e300, ANY), "-1e30": one(-1e30, ANY), "a denormal": one(5e-324, ANY),
            }  # fmt: skip
        else:
            numbers = np.iinfo(spec.read_dtype)
            changes |= {
                str(value): one(value, ANY if numbers.min <= value <= numbers.max else REFUSED)
                for value in (-(2**62), -200, -1, 0, 1, 300, 2**31, 2**62)
            }
        if spec.low is not None:
            changes["below the lowest"] = one(spec.low - 1)
        if spec.high is not None:
            changes["above the highest"] = one(spec.high + 1)
        if spec.choices is not None:
            changes["no choice"] = one(max(spec.choices) + 1)
        if self.name.endswith("offsets") and len(old) > 2:
            swapped = old.copy()
            k = 1 + int(rng.integers(len(old) - 2))
            swapped[[k, k - 1]] = swapped[[k - 1, k]]
            same = np.array_equal(swapped, old)
            changes["two in the wrong order"] = self.replaced(swapped, ANY if same else REFUSED)
            changes["from 1"] = self.replaced(old + 1)
        return changes


def damaged_attribute(declared: HDF5Format) -> Mutator:
    """An attribute that is not as the format declares it."""

    def mutate(path: Path, rng: Rng) -> Mutation:
        with h5py.File(path, "r+") as file:
            places = [(spec.of or "/", spec) for spec in declared.attributes]
            places += [(name, one) for name, spec in present(file, declared)
                       for one in spec.attributes]  # fmt: skip
            there = [(of, s) for of, s in places if of in file and s.name in file[of].attrs]
            of, spec = pick(rng, there)
            attributes = file[of].attrs
            value, expected = pick(rng, _other_attributes(spec))
            del attributes[spec.name]
            if value is not None:
                attributes[spec.name] = value
        return Mutation(f"attribute {spec.name} of {of}: {str(value)[:60]!r}", expected)

    return mutate


def _other_attributes(spec: AttributeSpec) -> list[tuple[Any, str]]:
    """Other values of an attribute; None removes it."""
    changes = [
        (None, REFUSED if spec.required else ANY),
        (h5py.Empty("f4"), REFUSED),
        (np.zeros((), [("a", "f4")]), REFUSED),
        (np.zeros((2, 2, 2)), REFUSED),
        (np.array([b"a", b"b"]), REFUSED),
    ]
    if spec.kind in ("text", "json"):
        free = ANY if spec.kind == "text" and spec.choices is None else REFUSED
        texts = ("", "unknown", "\x1b[31m[bold]", np.bytes_(b"\xff\xfe"), "x" * 60_000, "[1, 2]",
                 "[" * 30_000, "null", json.dumps({"a": [1, {"b": None}]}), "NaN")  # fmt: skip
        return [*changes, (1.5, REFUSED), *((text, free) for text in texts)]
    changes += [("text", REFUSED), (np.nan, REFUSED)]
    changes += [(2**62, ANY if spec.high is None and not spec.shape else REFUSED)]
    if spec.low is not None and not spec.shape:
        changes.append((spec.low - 1, REFUSED))
    if spec.high is not None and not spec.shape:
        changes.append((spec.high + 1, REFUSED))
    return changes
