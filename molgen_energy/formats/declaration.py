"""What a structured file of arrays holds: data sets, attributes, and rules between them.

A format is declared once. The declaration checks files when they are opened and read
(`molgen_energy.formats.hdf5`, `molgen_energy.formats.npz`), and documents the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError

Kind = Literal["float", "integer", "text"]
Shape = tuple[int | str, ...]
"""Numbers and symbols; see `DatasetSpec`."""

SCHEMA = 1
AGAIN = "make it again with `molgen-energy preprocess` or `molgen-energy sample`"
_KINDS = {
    "float": "floating-point numbers",
    "integer": "integers",
    "text": "texts",
    "json": "JSON",
}
_DTYPES = {"float": "f8", "integer": "i8", "text": "O"}
_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Size:
    """What a symbol in shapes counts, and the least number of them."""

    meaning: str
    low: int = 1


@dataclass(frozen=True)
class AttributeSpec:
    """An attribute of the file, or of a group or data set in it."""

    name: str
    kind: Literal["float", "integer", "text", "json"]
    meaning: str
    required: bool = True
    choices: tuple[str, ...] | None = None
    """The texts that it may be."""
    low: float | None = None
    high: float | None = None
    shape: Shape = ()
    """As in `DatasetSpec`; () for a single value."""
    of: str = ""
    """Path of the group that has it; empty for the file, and for attributes of a data set."""
    json: Any = None
    """The type that JSON must be of, such as ``dict[str, str]``."""

    @property
    def expected(self) -> str:
        """What a valid value is, in words."""
        if self.choices is not None:
            return " or ".join(self.choices)
        if self.kind == "json":
            return f"JSON of {type_name(self.json)}"
        single = {"float": "a number", "integer": "an integer", "text": "a text"}[self.kind]
        what = f"{_KINDS[self.kind]} {shape_text(self.shape)}" if self.shape else single
        return what + _range_text(self.low, self.high)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of a file, or an array of an archive.

    A pattern such as `properties/*` stands for every data set of a group. A symbol in `shape`, such
    as "M", stands for one number in the whole file, "M+1" for that number plus one, and "*" for any
    number.
    """

    name: str
    shape: Shape
    kind: Kind
    meaning: str
    unit: str = ""
    required: bool = True
    required_with: str = ""
    """Group that makes it required where the file has that group."""
    low: float | None = None
    """The least value."""
    high: float | None = None
    """The largest value."""
    finite: bool = True
    """Whether floating-point numbers must be finite."""
    choices: tuple[int, ...] | None = None
    """The values that integers may have."""
    dtype: str = ""
    """Type of NumPy that is written, and that reading returns; by default float64 or int64."""
    fill: bool = False
    """Whether rows that were never written have the fill value; otherwise they are refused."""
    attributes: tuple[AttributeSpec, ...] = ()

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """The type that reading returns."""
        return np.dtype(self.dtype or _DTYPES[self.kind])

    @property
    def structure(self) -> str:
        """Kind and shape in words: `integers (B, 2)`."""
        return f"{_KINDS[self.kind]} {shape_text(self.shape)}"

    @property
    def values(self) -> str:
        """What valid values are, in words."""
        if self.choices is not None:
            return f"{', '.join(map(str, self.choices[:-1]))} or {self.choices[-1]}"
        finite = "finite " if self.kind == "float" and self.finite else ""
        noun = {"float": "numbers", "integer": "integers", "text": "texts"}[self.kind]
        return f"{finite}{noun}{_range_text(self.low, self.high)}"


@dataclass(frozen=True)
class Relation:
    """A rule between data sets that their shapes do not say."""

    text: str
    """What holds, as a message continues "expected": `bond indices inside their molecule`."""
    needs: tuple[str, ...]
    """Data sets that `check` takes; a symbol stands for its number. Without one of them the rule
    does not apply."""
    check: Callable[..., NDArray[np.bool_]]
    """Takes arrays in the order of `needs`, of the file or of consecutive records, and returns
    which records break the rule."""
    at_opening: bool = False
    """Whether the data sets are read and checked when the file is opened."""


@dataclass(frozen=True)
class HDF5Format:
    """The declaration of HDF5 files."""

    system: str | None
    """The attribute `system` of the file; None for files of any system."""
    title: str
    purpose: str
    datasets: tuple[DatasetSpec, ...] = ()
    attributes: tuple[AttributeSpec, ...] = ()
    relations: tuple[Relation, ...] = ()
    remedy: str = AGAIN
    """How to get a good file, the end of every message."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """What symbols stand for."""
    records: str = "records"
    """Plural noun of what M counts."""
    schema: int | None = SCHEMA
    """The attribute `schema`; None for files that have none."""

    def spec(self, name: str) -> DatasetSpec:
        """The declaration of a data set, by its name in the file or the format."""
        return next(spec for spec in self.datasets if _matches(spec.name, name))


FILE_ATTRIBUTES = (
    AttributeSpec("source", "text", "what the file was made from", required=False),
    AttributeSpec("created_by", "text", "program and version", required=False),
    AttributeSpec(
        "provenance",
        "json",
        "checkpoint, seed and configuration that samples come from",
        required=False,
        json=dict[str, str],
    ),
)
"""Attributes of the file that every physical system writes."""

SPLIT = DatasetSpec(
    "split",
    ("M",),
    "integer",
    "0 training, 1 validation, 2 test; without it all are for training",
    required=False,
    low=0,
    high=2,
    dtype="u1",
)
"""The data set `split` of files of every physical system."""


def shape_text(shape: Shape) -> str:
    """A shape as it is written in NumPy: `(M,)`, `(B, 2)`."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def type_name(kind: Any) -> str:
    """A type of JSON as Python writes it: `dict[str, str]`."""
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def shown(value: Any) -> str:
    """A value in a message: on one line, and not longer than a line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def wrong_rows(spec: DatasetSpec, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows of a data set hold a value that its declaration does not allow, (rows,)."""
    wrong = np.zeros(values.shape, bool)
    if spec.kind == "float" and spec.finite:
        np.logical_not(np.isfinite(values), out=wrong)
    low, high = spec.low, spec.high
    if spec.kind == "integer" and not np.can_cast(values.dtype, spec.read_dtype):
        limits = np.iinfo(spec.read_dtype)
        low = limits.min if low is None else low
        high = limits.max if high is None else high
    with np.errstate(invalid="ignore"):  # NaN where it is allowed
        if low is not None:
            wrong |= values < low
        if high is not None:
            wrong |= values > high
    if spec.choices is not None:
        right = np.zeros(values.shape, bool)
        for choice in spec.choices:  # few, and far faster than `np.isin`
            right |= values == choice
        wrong |= ~right
    if not wrong.any():
        return np.zeros(len(wrong), bool)
    return np.asarray(wrong.any(axis=tuple(range(1, wrong.ndim))))


def check_values(
    path: Path,
    spec: DatasetSpec,
    values: NDArray[Any],
    first_record: int = 1,
    remedy: str = AGAIN,
    offsets: NDArray[np.int64] | None = None,
) -> None:
    """Raise `InputError` where an array that was just read holds a value that is not allowed.

    Parameters
    ----------
    values
        Rows of the data set.
    first_record
        Number of their first record, from 1.
    offsets
        Row at which each record begins, and the number of rows, (M+1,); by default each row is a
        record.
    """
    wrong = wrong_rows(spec, values)
    if not wrong.any():
        return
    row = int(wrong.argmax())
    record = row if offsets is None else int(np.searchsorted(offsets, row, "right")) - 1
    bad = np.atleast_1d(values[row]).reshape(-1)
    found = bad[wrong_rows(spec, bad)][0]
    raise InputError(
        f"{path}: record {first_record + record}: data set '{shown(spec.name)}': expected "
        f"{spec.values}, found {found}; {remedy}"
    )


def check_relation(
    path: Path,
    relation: Relation,
    arrays: Mapping[str, Any],
    first_record: int = 1,
    remedy: str = AGAIN,
) -> None:
    """Raise `InputError` where records break a rule; `arrays` by the names that it needs."""
    if any(name not in arrays for name in relation.needs):
        return
    wrong = relation.check(*(arrays[name] for name in relation.needs))
    if wrong.any():
        raise InputError(
            f"{path}: record {first_record + int(wrong.argmax())}: data set '{relation.needs[0]}': "
            f"expected {relation.text}; {remedy}"
        )


def _range_text(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" of at least {low:g}"
    return f" of at most {high:g}" if low is None else f" from {low:g} to {high:g}"


def _matches(pattern: str, name: str) -> bool:
    """Whether a name is that of a declaration; `*` stands for one part of it."""
    parts, given = pattern.split("/"), name.split("/")
    return len(parts) == len(given) and all(
        a in ("*", b) for a, b in zip(parts, given, strict=True)
    )
