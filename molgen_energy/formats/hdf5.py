"""Opening HDF5 files: the one place that reads them, which checks them by their declaration.

A file may come from anyone. The HDF5 library follows links into other files, reads data sets from
other files, and takes the memory that a file declares. So nothing is opened by name through the
library's paths: each group on the way must be a hard link in this file, and each data set must lie
in it in full, uncompressed or compressed as this package does. What a file declares besides that
is never read.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import (
    AttributeSpec,
    DatasetSpec,
    HDF5Format,
    Relation,
    Size,
    check_relation,
    check_values,
    shape_text,
    shown,
)
from molgen_energy.formats.heaps import damaged_heap
from molgen_energy.formats.limits import check_memory
from molgen_energy.output import check_file

__all__ = [
    "AttributeSpec",
    "DatasetSpec",
    "HDF5File",
    "HDF5Format",
    "Relation",
    "Size",
    "check_relation",
    "check_values",
    "open_hdf5",
]

_CHUNK = 64 << 20  # bytes of a compressed chunk; this package writes 1 MB at most
_CACHE = 1 << 20  # bytes of chunks that stay in memory for each data set: one of this package
_ATTRIBUTE = 1 << 20  # bytes
_NUMBER = 8  # bytes; `long double` differs between machines
_ADDRESS = 8  # bytes of an address, and of a size, in the file
_CHECKSUM = 4  # bytes of Fletcher's checksum, at the end of a chunk
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}
_LAYOUTS = {h5d.COMPACT: "a compact layout", h5d.VIRTUAL: "data of other files (virtual)"}
_TYPES = {
    h5t.TypeEnumID: "an enumeration",
    h5t.TypeCompoundID: "a compound type",
    h5t.TypeReferenceID: "references",
    h5t.TypeVlenID: "sequences of any length",
    h5t.TypeArrayID: "arrays",
    h5t.TypeOpaqueID: "bytes of an opaque type",
    h5t.TypeBitfieldID: "bit fields",
}
_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}
_NUMBERS = {"integer": "iu", "float": "iuf"}  # kinds of NumPy that an attribute may have
_CLASSES = {"integer": h5t.TypeIntegerID, "float": h5t.TypeFloatID, "text": h5t.TypeStringID}


class HDF5File:
    """An open file whose structure is that of its format; as a context manager it closes itself.

    `open_hdf5` makes it. Structure means attributes, and for each declared data set its type,
    shape and storage. Values are checked by `read`, or by whoever reads a part of a data set.
    """

    def __init__(self, path: Path, format: HDF5Format, file: Any) -> None:
        self.path, self.format, self._file = path, format, file
        self.system = ""
        """The physical system that the file is of."""
        self.attributes: dict[str, Any] = {}
        """Declared attributes that the file has; of groups as `group/name`."""
        self.sizes: dict[str, int] = {}
        """The numbers that symbols of shapes stand for."""
        self.specs: dict[str, DatasetSpec] = {}
        """The declaration of each data set that the file has, by its name there."""
        self._attributes_of: dict[str, dict[str, Any]] = {}
        self._data: dict[str, Any] = {}
        self._whole: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def __getitem__(self, name: str) -> Any:
        """The `h5py.Dataset` of this name, to read parts of it; `InputError` without it."""
        if name not in self._data:
            raise self.error(f"lacks the data set '{shown(name)}'", colon=False)
        return self._data[name]

    def attributes_of(self, name: str) -> dict[str, Any]:
        """Declared attributes of a data set."""
        return self._attributes_of[name]

    def read(self, name: str) -> NDArray[Any]:
        """A whole data set, of the declared type of NumPy, with its values checked.

        Raises
        ------
        InputError
            The file lacks it, cannot be read, holds a value that is not allowed, or the data set
            is larger than the available memory.
        """
        if name in self._whole:
            return self._whole[name]
        data, spec = self[name], self.specs[name]
        what = f"data set '{shown(name)}'"
        check_memory(data.size * data.dtype.itemsize, f"{self.path}: {what}", self.format.remedy)
        with self.reading(what):
            values = data.asstr()[()] if spec.kind == "text" else data[()]
            if spec.kind == "float":
                with np.errstate(over="ignore"):  # infinity is refused
                    values = values.astype(spec.read_dtype, copy=False)
        check_values(self.path, spec, values, remedy=self.format.remedy)
        whole: NDArray[Any] = values.astype(spec.read_dtype, copy=False)
        return whole

    def total_bytes(self) -> int:
        """Memory that all declared data sets together take."""
        return sum(data.size * data.dtype.itemsize for data in self._data.values())

    @property
    def descriptor(self) -> int:
        """The operating system's number of the open file."""
        return int(self._file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> HDF5File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn errors of the library, which are of any type, into one that names the file."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = shown(error) or type(error).__name__
            raise self.error(f"{what} cannot be read ({reason})") from error

    def error(self, what: str, colon: bool = True) -> InputError:
        """The error that says what is wrong in this file, and the remedy."""
        return InputError(f"{self.path}{':' if colon else ''} {what}; {self.format.remedy}")

    # -- structure, at opening ------------------------------------------------------------------

    def check(self) -> None:
        """Check attributes, the structure of data sets, and the rules that hold at opening.

        Raises
        ------
        InputError
            The file is not what its format declares.
        """
        for attribute in self.format.attributes:
            place = self._object(attribute.of) if attribute.of else self._file.id
            if place is not None:
                value = self._attribute(place, attribute, attribute.of)
                if value is not None:
                    name = f"{attribute.of}/{attribute.name}" if attribute.of else attribute.name
                    self.attributes[name] = value
        absent = [spec.name for spec in self.format.datasets if not self._check_spec(spec)]
        if self.sizes.get("M") == 0:
            raise InputError(f"{self.path} holds no {self.format.records}; {self.format.remedy}")
        if absent:
            raise self._lacks(absent[0])
        for symbol, size in self.format.sizes.items():
            found = self.sizes.get(symbol, size.low)
            if found < size.low:
                raise self.error(f"expected {size.low} {size.meaning} or more, found {found}")
        for relation in self.format.relations:
            needs = {*relation.needs}
            if relation.at_opening and needs <= self._data.keys() | self.sizes.keys():
                self._whole |= {name: self.read(name) for name in needs & self._data.keys()}
                arrays = {**self._whole, **self.sizes}
                check_relation(self.path, relation, arrays, remedy=self.format.remedy)

    def _check_spec(self, spec: DatasetSpec) -> bool:
        """Check the data sets of a declaration; whether there is one or none is required."""
        found = False
        for name in self._names(spec.name):
            data = self._object(name)
            if data is None:
                continue
            found = True
            with self.reading(f"data set '{shown(name)}'"):
                self._check_dataset(name, spec, data)
                self._data[name] = h5py.Dataset(data)
            self.specs[name] = spec
            values = {a.name: self._attribute(data, a, name) for a in spec.attributes}
            self._attributes_of[name] = {k: v for k, v in values.items() if v is not None}
        there = bool(spec.required_with) and self._object(spec.required_with) is not None
        return found or not (spec.required or there)

    def _names(self, pattern: str) -> list[str]:
        """Names in the file that a pattern stands for; any other name stands for itself."""
        names = [""]
        for part in pattern.split("/"):
            children = []
            for name in names:
                among = [part] if part != "*" else self._children(name)
                children += [f"{name}/{child}" if name else child for child in among]
            names = children
        return names

    def _children(self, name: str) -> list[str]:
        """Names of what is in a group, if there is one."""
        group = self._object(name)
        if group is None:
            return []
        if not isinstance(group, h5g.GroupID):
            raise self.error(f"'{shown(name)}': expected a group, found {_object_name(group)}")
        with self.reading(f"group '{shown(name)}'"):
            return list(h5py.Group(group))

    def _object(self, name: str) -> Any:
        """A group or data set, by way of hard links in this file alone; None without it."""
        place: Any = self._file.id
        with self.reading(f"'{shown(name)}'"):
            for part in name.split("/"):
                if not isinstance(place, h5g.GroupID):
                    return None
                raw = part.encode("utf-8", "surrogateescape")
                if not place.links.exists(raw):
                    return None
                kind = place.links.get_info(raw).type
                if kind != h5l.TYPE_HARD:
                    found = _LINKS.get(kind, "a link of a user-defined type")
                    raise self.error(
                        f"'{shown(name)}': expected data in the file, found {found}, which is "
                        "not followed"
                    )
                place = h5o.open(place, raw)
        return place

    def _check_dataset(self, name: str, spec: DatasetSpec, data: Any) -> None:
        """Check where a data set is stored, its type, its shape, and that all of it is there."""
        if not isinstance(data, h5d.DatasetID):
            raise self.differs(name, spec, _object_name(data))
        # First of all, since asking for the shape of a virtual data set opens other files.
        properties = data.get_create_plist()
        layout = properties.get_layout()
        if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED):
            raise self.differs(name, spec, _LAYOUTS.get(layout, "an unknown layout"))
        if properties.get_external_count():
            raise self.differs(name, spec, "data in other files (external storage)")
        space = data.get_space()
        if space.get_simple_extent_type() == h5s.NULL:
            raise self.differs(name, spec, "nothing")
        kind, shape = data.get_type(), space.shape
        fits = isinstance(kind, _CLASSES[spec.kind]) and not kind.committed()
        if spec.kind != "text" and fits:
            # Numbers of other bits than usual have no type of NumPy, which raises an error.
            fits = kind.dtype.itemsize <= _NUMBER
        if not (fits and self._fits(shape, spec.shape)):
            raise self.differs(name, spec, f"{_type_text(kind)} {shape_text(shape)}")
        text = spec.kind == "text" and kind.is_variable_str()
        # A text of any length is a length, an address and a number.
        item = 4 + _ADDRESS + 4 if text else kind.get_size()
        _Storage(self, name, spec, data, properties, shape, item, text).check()

    def _fits(self, shape: tuple[int, ...], declared: tuple[int | str, ...]) -> bool:
        """Whether a shape is the declared one; a symbol gets its number where it is met first."""
        if len(shape) != len(declared):
            return False
        for length, expected in zip(shape, declared, strict=True):
            if isinstance(expected, int):
                fits = length == expected
            elif expected == "*":
                fits = True
            else:
                symbol = expected.removesuffix("+1")
                number = length - (symbol != expected)
                fits = number >= 0 and self.sizes.setdefault(symbol, number) == number
            if not fits:
                return False
        return True

    def _attribute(self, place: Any, spec: AttributeSpec, of: str) -> Any:
        """The checked value of an attribute; None without it."""
        where = f"attribute '{spec.name}'" + (f" of '{shown(of)}'" if of else "")
        try:
            value = read_attribute(place, spec.name)
            found = shown(value)
        except Exception as error:  # the library's, of any type
            value, found = error, shown(error)
        if value is None:
            if spec.required:
                raise self.error(f"lacks the {where}", colon=False)
            return None
        try:
            if spec.shape and not self._fits(np.shape(value), spec.shape):
                raise ValueError
            return _checked(spec, value)
        except (ValueError, TypeError):
            raise self.error(f"{where}: expected {spec.expected}, found {found}") from None

    def _lacks(self, name: str) -> InputError:
        return self.error(f"lacks the data set '{shown(name)}'", colon=False)

    def differs(self, name: str, spec: DatasetSpec, found: str) -> InputError:
        """The error that says what a data set should be and what it is."""
        symbols = {str(size).removesuffix("+1") for size in spec.shape} & self.sizes.keys()
        known = ", ".join(f"{symbol} = {self.sizes[symbol]}" for symbol in sorted(symbols))
        return self.error(
            f"data set '{shown(name)}': expected {spec.structure}"
            f"{f' with {known}' if known else ''}, found {found}"
        )


@dataclass(frozen=True)
class _Storage:
    """How a data set lies in its file.

    What is declared can be far larger than the file. Each byte must be stored, once: chunks that
    are not there would be zeros, and a compressed chunk could take a thousand times the memory
    that it declares.
    """

    file: HDF5File
    name: str
    spec: DatasetSpec
    data: Any
    properties: Any
    """Those that the data set was made with."""
    shape: tuple[int, ...]
    item: int
    """Bytes of an element."""
    texts: bool
    """Whether the elements are texts of any length, which stand elsewhere in the file."""

    def check(self) -> None:
        """Raise `InputError` unless all of the data set is stored, and no text twice."""
        size = math.prod(self.shape) * self.item
        if not size:
            return
        end = os.fstat(self.file.descriptor).st_size
        chunked = self.properties.get_layout() == h5d.CHUNKED
        parts = self._chunks(end) if chunked else self._contiguous(size, end)
        # Texts that share their bytes could take any memory.
        total = 0
        for part in parts:
            record = np.dtype([("length", "<u4"), ("place", f"V{self.item - 4}")])
            total += int(np.frombuffer(part, record)["length"].sum(dtype=np.int64))
        if total > end:
            raise self._error(f"texts of {total:,} bytes in a file of {end:,}")

    def _contiguous(self, size: int, end: int) -> Iterator[bytes]:
        """Check a data set in one piece; yields it where it holds texts."""
        start = self.data.get_offset()
        stored = self.data.get_storage_size()
        if start is None or stored < size or start + size > end:
            raise self._error(f"{stored:,} of {size:,} bytes in the file")
        if self.texts:
            with self.file.path.open("rb") as raw:
                raw.seek(start)
                yield raw.read(size)

    def _chunks(self, end: int) -> Iterator[bytes]:
        """Check a data set in chunks; yields the used part of each where it holds texts."""
        chunk = self.properties.get_chunk()
        bytes_ = math.prod(chunk) * self.item
        if bytes_ > _CHUNK:
            raise self._error(f"chunks of {bytes_:,} bytes")
        filters = [self.properties.get_filter(k) for k in range(self.properties.get_nfilters())]
        if {code for code, *_ in filters} - _FILTERS:
            raise self._error("a filter other than gzip, shuffle and fletcher32")
        if self.spec.fill and not filters and not self.texts:
            return
        count = math.prod(-(-n // c) for n, c in zip(self.shape, chunk, strict=True))
        there = self.data.get_num_chunks()
        stored = self.data.get_storage_size()
        whole = there >= count and (bool(filters) or stored >= count * bytes_)
        if stored > end or not (whole or self.spec.fill):
            raise self._error(f"{there:,} of {count:,} chunks, {stored:,} bytes, in the file")
        if self.texts and self.properties.fill_value_defined() == h5d.FILL_VALUE_USER_DEFINED:
            raise self._error("a text for each row that was not written")
        if not filters and not self.texts:
            return
        for place in product(*(range(0, n, c) for n, c in zip(self.shape, chunk, strict=True))):
            info = self.data.get_chunk_info_by_coord(place)
            if info.byte_offset is None:
                if not self.spec.fill:
                    raise self._error(f"no chunk at {place}")
                continue
            if info.size > bytes_ + bytes_ // 64 + 64:  # gzip adds less to random bytes
                raise self._error(f"a chunk of {info.size:,} bytes for {bytes_:,}")
            skipped, content = self.data.read_direct_chunk(place)
            applied = [each for k, each in enumerate(filters) if not skipped >> k & 1]
            content = self._decoded(content, applied, bytes_)
            if self.texts:
                yield content[: min(chunk[0], self.shape[0] - place[0]) * self.item]

    def _decoded(self, content: bytes, filters: list[Any], size: int) -> bytes:
        """The content of a chunk, of `size` bytes; in the order of its bytes where it is texts."""
        for code, _, options, _ in reversed(filters):
            if code == h5z.FILTER_DEFLATE:
                inflate = zlib.decompressobj()
                content = inflate.decompress(content, size + 1)
                if not inflate.eof:
                    raise self._error(f"a damaged chunk, or one of more than {size:,} bytes")
            elif code == h5z.FILTER_FLETCHER32:
                content = content[:-_CHECKSUM]
            elif self.texts:
                if options[:1] != (self.item,) or len(content) != size:
                    raise self._error("a chunk that is shuffled in another way")
                content = np.frombuffer(content, np.uint8).reshape(self.item, -1).T.tobytes()
        if len(content) != size:
            raise self._error(f"a chunk of {len(content):,} bytes for {size:,}")
        return content

    def _error(self, found: str) -> InputError:
        return self.file.differs(self.name, self.spec, found)


def open_hdf5(path: Path, format: HDF5Format, remedy: str = "") -> HDF5File:
    """Open a file for reading and check its structure by its declaration.

    Parameters
    ----------
    remedy
        The command that makes such a file, for the message where it does not exist.

    Raises
    ------
    InputError
        It does not exist, is no regular file, no HDF5, cut off, of another schema or another
        physical system, or not what the format declares.
    """
    try:
        path.lstat()
    except (FileNotFoundError, ValueError):
        made = remedy.format(path=path) or "`molgen-energy preprocess`"
        raise InputError(f"{path} does not exist; make it with {made}") from None
    except OSError:
        pass  # what follows says why
    check_file(path)
    try:
        opened = h5py.File(path, "r", rdcc_nbytes=_CACHE)
    except Exception as error:  # the library's, of any type
        why = "is cut off" if "truncated" in str(error) else "is not a readable HDF5 file"
        raise InputError(f"{path} {why}; {format.remedy}") from error
    file = HDF5File(path, format, opened)
    try:
        with file.reading("its attributes"):
            if opened.id.get_create_plist().get_sizes() != (8, 8):
                raise file.error("addresses or lengths are not of 8 bytes")
            heap = damaged_heap(path)
            if heap is not None:
                raise file.error(f"the heap of texts at byte {heap:,} is damaged")
            file.system = _check_kind(path, format, opened)
        file.check()
    except BaseException:
        file.close()
        raise
    return file


def _check_kind(path: Path, format: HDF5Format, file: Any) -> str:
    """The attribute `system`, checked as `schema` is, with remedies that differ from others'."""
    if format.schema is None:
        return ""
    schema = read_attribute(file.id, "schema")
    if schema is None:
        raise InputError(f"{path} was not written by molgen-energy (no schema attribute)")
    if type(schema) is not int or schema != format.schema:
        newer = type(schema) is int and schema > format.schema
        remedy = "upgrade molgen-energy" if newer else format.remedy
        raise InputError(
            f"{path} has schema {shown(schema)}, this version reads schema {format.schema}; "
            f"{remedy}"
        )
    found = str(read_attribute(file.id, "system") or "molecules")  # files of molecules may lack it
    if format.system not in (None, found):
        raise InputError(
            f"{path} holds {shown(found)}, not {format.system}; name a file of {format.system}, or "
            f"a --config or a --checkpoint of {shown(found)}"
        )
    return found


def read_attribute(place: Any, name: str) -> Any:
    """An attribute as text, int, float or an array of these; None without it.

    Raises
    ------
    ValueError
        It is of another type, or too large; the message says what it is.
    """
    raw = name.encode()
    if not h5a.exists(place, raw):
        return None
    attribute = h5a.open(place, raw)
    kind: Any = attribute.get_type()
    space = attribute.get_space()
    if type(kind) not in _CLASSES.values():
        raise ValueError(_type_text(kind))
    if space.get_simple_extent_type() == h5s.NULL:
        raise ValueError("nothing")
    size = math.prod(attribute.shape) * kind.get_size()
    if size > _ATTRIBUTE:
        raise ValueError(f"{size:,} bytes")
    value = h5py.AttributeManager(_Owner(place))[name]
    if isinstance(value, bytes):
        value = value.decode()
    return value.item() if isinstance(value, np.generic) else value


class _Owner(NamedTuple):
    """What h5py's attributes ask of the object that has them."""

    id: Any


def _checked(spec: AttributeSpec, value: Any) -> Any:
    """The value of an attribute; `ValueError` or `TypeError` unless it is as declared."""
    if spec.kind in ("integer", "float"):
        numbers = np.asarray(value)
        if numbers.ndim != len(spec.shape) or numbers.dtype.kind not in _NUMBERS[spec.kind]:
            raise TypeError
        low = -np.inf if spec.low is None else spec.low
        high = np.inf if spec.high is None else spec.high
        if not (np.isfinite(numbers) & (low <= numbers) & (numbers <= high)).all():
            raise ValueError
        return value
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # raises where bytes are not UTF-8
    if spec.kind == "json":
        from pydantic import TypeAdapter

        return TypeAdapter(spec.json).validate_json(value, strict=True)
    if spec.choices is not None and value not in spec.choices:
        raise ValueError
    return value


def _type_text(kind: Any) -> str:
    """The type of numbers as NumPy names it, of anything else in words."""
    if kind.committed():
        return "a named type"
    if isinstance(kind, h5t.TypeStringID):
        return "texts"
    if isinstance(kind, (h5t.TypeIntegerID, h5t.TypeFloatID)):
        return str(kind.dtype)
    if isinstance(kind, h5t.TypeEnumID) and kind.dtype == bool:
        return "bool"
    names = (name for known, name in _TYPES.items() if isinstance(kind, known))
    return next(names, "an unknown type")


def _object_name(thing: Any) -> str:
    return {h5g.GroupID: "a group", h5d.DatasetID: "a data set"}.get(type(thing), "a named type")
