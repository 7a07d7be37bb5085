"""Pickles of other programs, read without running anything that they name.

A pickle is a program for a small machine, and Python's own lets it call any function. The machine
here knows the opcodes of protocols 2 to 5 that data need, and a fixed list of names: those of NumPy
arrays and PyTorch tensors, which become arrays, of RDKit molecules, which stay the bytes of
`Mol.ToBinary`, and of `Data` of PyTorch Geometric, which becomes a plain record. No class or
function of another package is ever called. Sizes are compared with the rest of the file before
anything is allocated.

The items of a pickled list can be taken one after another (`iterate_pickle`), each forgotten before
the next, so that the list need not fit the memory.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.limits import available_memory
from molgen_energy.formats.parts import check_part
from molgen_energy.formats.yaml import shown

MARK = b"\x80"
"""The first byte of pickled data."""

_MOST_MARKS = 1000  # lists, tuples and mappings that are open at once
_MOST_DIMENSIONS = 8
_MOST_INTEGER = 16  # bytes
_MOST_LINE = 200  # bytes of the name of a module or class
_KEPT_TEXT = 64  # characters of texts that later items of a list may refer to
_MOST_KEPT = 1 << 20  # such texts and names
_OPCODE = 64  # bytes that an opcode may add to what is held, besides its data
_STEP = 64 << 20  # bytes after which the available memory is looked at again
_FETCH_AGAIN = "fetch it again"


class PickleError(ValueError):
    """What is wrong with a pickle; the message follows the name of the file."""


@dataclass(frozen=True)
class PickledMolecule:
    """An RDKit molecule as the bytes of `Mol.ToBinary`, which `Chem.Mol` takes."""

    content: bytes


@dataclass
class Record:
    """An object of a known class as its name and attributes."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.name})"  # attributes may lead back to the record


@dataclass
class Storage:
    """Numbers of tensors, (N,); `data` is read-only. Filled later in files of old PyTorch."""

    dtype: np.dtype[Any]
    data: NDArray[Any]


StorageLoader = Callable[["StorageKey"], Storage]
"""Finds the numbers that a tensor refers to by a persistent id."""


@dataclass(frozen=True)
class StorageKey:
    """Which numbers a tensor refers to."""

    dtype: np.dtype[Any]
    key: str
    count: int


def read_pickle(content: bytes | IO[bytes], size: int | None = None) -> Any:
    """The object that a pickle holds.

    Parameters
    ----------
    content
        The pickle, or a file that begins with it.
    size
        Bytes of the file.

    Raises
    ------
    PickleError
        It is cut off or damaged, or names what is not read.
    InputError
        It takes more memory than is available.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    if size is None:
        assert isinstance(content, bytes)
        size = len(content)
    return _Machine(stream, size).run()


def iterate_pickle(
    stream: IO[bytes], size: int, load_storage: StorageLoader | None = None
) -> Iterator[Any]:
    """The items of the list that a file holds, one after another; any other object as one item.

    An item must not refer to earlier ones, but for short texts. Raises as `read_pickle`.
    """
    yield from _Machine(stream, size, load_storage).items()


def read_pickle_with(stream: IO[bytes], size: int, load_storage: StorageLoader) -> Any:
    """The object of a pickle whose tensors are elsewhere; raises as `read_pickle`."""
    return _Machine(stream, size, load_storage).run()


@contextmanager
def pickle_file(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """An open file and its bytes, for `iterate_pickle` and `read_pickle`.

    Raises
    ------
    InputError
        It cannot be read, or the block raises `PickleError`; names the file.
    """
    size = check_part(path)
    try:
        with path.open("rb") as file:
            yield file, size
    except PickleError as error:
        raise damaged_pickle(path, error) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def damaged_pickle(path: Path, error: PickleError) -> InputError:
    """The error of a file whose pickle cannot be read."""
    return InputError(f"{path} is not read: {error}")


def _check_memory(size: int) -> None:
    if size > available_memory():
        raise PickleError("its next item takes more memory than is available; free some")


def _unknown(code: bytes) -> PickleError:
    """The error of an opcode; empty at the end of the file."""
    if not code:
        return PickleError(f"it is cut off; {_FETCH_AGAIN}")
    return PickleError(
        f"it is no pickle of protocol 2 to 5, or damaged (byte {code[0]:#04x}); {_FETCH_AGAIN}"
    )


class _Mark:
    """Where a list, tuple or mapping begins on the stack."""


_MARK = _Mark()


@dataclass
class _NumberType:
    """A type of NumPy, whose byte order is set after it was made."""

    code: str
    order: str = "<"

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass(frozen=True)
class _Named:
    """A function or class that pickles may name."""

    name: str
    call: Callable[[_Machine, tuple[Any, ...]], Any] | None = None
    """Makes what calling it would make; None where it is never called."""
    is_record: bool = False
    dtype: str = ""
    """Of the class of a storage."""


class _Machine:
    """Runs one pickle, opcode by opcode."""

    def __init__(
        self,
        stream: IO[bytes],
        size: int,
        load_storage: StorageLoader | None = None,
        names: Mapping[tuple[str, str], _Named] | None = None,
    ) -> None:
        self._stream = stream
        self._left = size - stream.tell()
        self._load_storage = load_storage
        self._names = _NAMES if names is None else names
        self._stack: list[Any] = []
        self._marks = 0
        self._memo: dict[int, Any] = {}
        self._memoized = 0
        self._recent: list[int] = []
        self._kept = 0
        self._held = 0
        self._checked = _STEP
        self._ended = False

    def run(self) -> Any:
        """The object."""
        for _ in self._steps():
            pass
        return self._result()

    def items(self) -> Iterator[Any]:
        """The items of a list as they become complete, or the object."""
        for _ in self._steps():
            stack = self._stack
            # The list itself is at the bottom, and nothing else is open.
            if len(stack) == 1 and type(stack[0]) is list and stack[0]:
                found = stack[0][:]
                stack[0].clear()
                self._forget()
                yield from found
        if type(self._stack[0]) is not list:
            yield self._result()

    def _result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise PickleError(f"it is damaged (no object at its end); {_FETCH_AGAIN}")
        return self._stack[0]

    def _steps(self) -> Iterator[None]:
        """Run opcode by opcode; pauses where a list may have grown."""
        read = self._stream.read
        while not self._ended:
            code = read(1)
            self._left -= 1
            self._held += _OPCODE
            if self._held > self._checked:
                self._checked = self._held + _STEP
                _check_memory(2 * _STEP)
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise _unknown(code)
            try:
                operation(self)
            except PickleError:
                raise
            except (IndexError, TypeError, ValueError, KeyError, AttributeError, struct.error):
                raise PickleError(f"it is cut off or damaged; {_FETCH_AGAIN}") from None
            if code in _GROWS:
                yield
        self._result()

    def _forget(self) -> None:
        """Drop what the next item of the list does not refer to."""
        memo = self._memo
        for key in self._recent:
            value: Any = memo.get(key)
            short = isinstance(value, (str, bytes)) and len(value) <= _KEPT_TEXT
            keep = short or isinstance(value, (_Named, _NumberType))
            if keep and self._kept < _MOST_KEPT:
                self._kept += 1
            else:
                memo.pop(key, None)
        self._recent.clear()
        self._held = 0
        self._checked = _STEP

    # Reading

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise PickleError(f"it is cut off or damaged; {_FETCH_AGAIN}")
        if count > _STEP:
            _check_memory(5 * count)  # a character of a text takes up to 4 bytes more
        content = self._stream.read(count)
        self._left -= count
        self._held += count
        if len(content) != count:
            raise PickleError(f"it is cut off; {_FETCH_AGAIN}")
        return content

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        content = self._stream.readline(_MOST_LINE)
        self._left -= len(content)
        if not content.endswith(b"\n"):
            raise PickleError(f"it is cut off or damaged; {_FETCH_AGAIN}")
        return content[:-1].decode()

    def _text(self, count: int) -> None:
        self._stack.append(self._take(count).decode())
        self._held += 3 * count

    # Opcodes

    def _proto(self) -> None:
        if not 2 <= self._number(1) <= 5:
            raise PickleError("it is no pickle of protocol 2 to 5; write it with protocol 4")

    def _frame(self) -> None:
        if self._number(8) > self._left:
            raise PickleError(f"it is cut off; {_FETCH_AGAIN}")

    def _stop(self) -> None:
        self._ended = True

    def _mark(self) -> None:
        self._marks += 1
        if self._marks > _MOST_MARKS:
            raise PickleError(f"more than {_MOST_MARKS:,} lists lie in one another, as in no data")
        self._stack.append(_MARK)

    def _to_mark(self) -> list[Any]:
        stack = self._stack
        k = len(stack) - 1
        while stack[k] is not _MARK:
            k -= 1
            if k < 0:
                raise IndexError
        items = stack[k + 1 :]
        del stack[k:]
        self._marks -= 1
        return items

    def _top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise IndexError
        return value

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_mark(self) -> None:
        self._to_mark()

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _int4(self) -> None:
        self._stack.append(struct.unpack("<i", self._take(4))[0])

    def _int1(self) -> None:
        self._stack.append(self._number(1))

    def _int2(self) -> None:
        self._stack.append(self._number(2))

    def _long1(self) -> None:
        count = self._number(1)
        if count > _MOST_INTEGER:
            raise PickleError(f"an integer has {count} bytes, as no number of molecules")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _text1(self) -> None:
        self._text(self._number(1))

    def _text4(self) -> None:
        self._text(self._number(4))

    def _text8(self) -> None:
        self._text(self._number(8))

    def _bytes1(self) -> None:
        self._stack.append(self._take(self._number(1)))

    def _bytes4(self) -> None:
        self._stack.append(self._take(self._number(4)))

    def _bytes8(self) -> None:
        self._stack.append(self._take(self._number(8)))

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _tuple(self) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _tuple1(self) -> None:
        self._stack[-1] = (self._top(),)

    def _tuple2(self) -> None:
        self._last(2)

    def _tuple3(self) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) != count or any(value is _MARK for value in values):
            raise IndexError
        self._stack[-count:] = [values]

    def _append(self) -> None:
        value = self._pop()
        self._list().append(value)

    def _appends(self) -> None:
        items = self._to_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target = self._top()
        if type(target) is not list:
            raise TypeError
        return target

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bytes)):  # the hash of a tuple may recurse
                raise TypeError
            target[key] = value

    def _put1(self) -> None:
        self._put(self._number(1))

    def _put4(self) -> None:
        self._put(self._number(4))

    def _memoize(self) -> None:
        self._put(self._memoized)

    def _put(self, key: int) -> None:
        if key not in self._memo:
            self._memoized += 1
            self._recent.append(key)
        self._memo[key] = self._top()

    def _get1(self) -> None:
        self._get(self._number(1))

    def _get4(self) -> None:
        self._get(self._number(4))

    def _get(self, key: int) -> None:
        try:
            self._stack.append(self._memo[key])
        except KeyError:
            raise PickleError(
                "an item of its list refers to an earlier one, which is not kept, or it is "
                "damaged; write the pickle again from copies of its items"
            ) from None

    def _global(self) -> None:
        self._name(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        found = self._names.get((module, name))
        if found is None:
            text = shown(f"{module}.{name}"[:_MOST_LINE])
            raise PickleError(
                f"it names {text}; only RDKit molecules, numbers, texts, lists, arrays and tensors "
                "are read from pickles, because anything else could run code"
            )
        self._stack.append(found)

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if type(called) is not _Named or type(arguments) is not tuple or called.call is None:
            raise TypeError
        self._stack.append(called.call(self, arguments))

    def _new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if type(kind) is not _Named or not kind.is_record or arguments != ():
            raise TypeError
        self._stack.append(Record(kind.name))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if type(target) is PickledMolecule:
            return  # attributes that Python code gave to a molecule
        if type(target) is Record:
            if type(state) is not dict:
                raise TypeError
            target.state.update(state)
        elif type(target) is _NumberType:
            target.order = {"<": "<", ">": ">", "|": "|"}[state[1]]
            target.resolve()
        elif type(target) is np.ndarray:
            _set_array(target, state)
        else:
            raise TypeError

    def _persistent(self) -> None:
        found = self._pop()
        if self._load_storage is None:
            raise PickleError("its tensors are in another file")
        kind, named, key, _, count = found[:5]
        if kind != "storage" or type(named) is not _Named or not named.dtype:
            raise TypeError
        if type(key) is not str or type(count) is not int or count < 0:
            raise TypeError
        self._stack.append(self._load_storage(StorageKey(np.dtype(named.dtype), key, count)))


_GROWS = frozenset((b"a", b"e", b"."))
"""Opcodes after which a list may have grown, or the pickle ended."""

_OPCODES = {
    b"\x80": "proto", b"\x95": "frame", b".": "stop", b"(": "mark", b"0": "pop", b"1": "pop_mark",
    b"N": "none", b"\x88": "true", b"\x89": "false", b"J": "int4", b"K": "int1", b"M": "int2",
    b"\x8a": "long1", b"G": "float", b"\x8c": "text1", b"X": "text4", b"\x8d": "text8",
    b"C": "bytes1", b"B": "bytes4", b"\x8e": "bytes8", b"\x96": "bytes8", b")": "empty_tuple",
    b"]": "empty_list", b"}": "empty_dict", b"t": "tuple", b"\x85": "tuple1", b"\x86": "tuple2",
    b"\x87": "tuple3",
    b"a": "append", b"e": "appends", b"s": "set_item", b"u": "set_items", b"q": "put1",
    b"r": "put4", b"\x94": "memoize", b"h": "get1", b"j": "get4", b"c": "global",
    b"\x93": "stack_global", b"R": "reduce", b"\x81": "new_object", b"b": "build",
    b"Q": "persistent",
}  # fmt: skip
"""The names of methods of `_Machine` by opcode, as in Python's module pickletools."""

_OPERATIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    code: getattr(_Machine, f"_{name}") for code, name in _OPCODES.items()
}


# What names in pickles stand for


def _molecule(machine: _Machine, arguments: tuple[Any, ...]) -> PickledMolecule:
    (content,) = arguments
    if type(content) is not bytes:
        raise TypeError
    return PickledMolecule(content)


def _encode(machine: _Machine, arguments: tuple[Any, ...]) -> bytes:
    """Bytes, which protocol 2 writes as a text of latin-1."""
    text, encoding = arguments
    if encoding != "latin1" or type(text) is not str:
        raise TypeError
    machine._held += len(text)
    return text.encode("latin-1")


def _no_bytes(machine: _Machine, arguments: tuple[Any, ...]) -> bytes:
    """Empty bytes, which protocol 2 writes as `bytes()`."""
    if arguments:
        raise TypeError
    return b""


def _empty_mapping(machine: _Machine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """The hooks of a tensor."""
    if arguments:
        raise TypeError
    return {}


def _number_type(machine: _Machine, arguments: tuple[Any, ...]) -> _NumberType:
    code = arguments[0]
    if type(code) is not str or len(code) > 3 or np.dtype(code).kind not in "biuf":
        raise PickleError("an array holds no numbers; arrays of objects and texts are not read")
    return _NumberType(code.lstrip("<>|="))


def _reconstruct(machine: _Machine, arguments: tuple[Any, ...]) -> NDArray[Any]:
    """An empty array; `_set_array` fills it."""
    kind, _, _ = arguments
    if type(kind) is not _Named or kind.name != "numpy.ndarray":
        raise TypeError
    return np.zeros(0, np.uint8)


def _set_array(target: NDArray[Any], state: Any) -> None:
    _, shape, kind, by_column, content = state
    array = _shaped(content, kind, shape)
    order: Any = bool(by_column)
    target.__setstate__((1, array.shape, array.dtype, order, content))


def _from_buffer(machine: _Machine, arguments: tuple[Any, ...]) -> NDArray[Any]:
    """An array of protocol 5."""
    content, kind, shape, order = arguments
    return _shaped(content, kind, shape, "F" if order == "F" else "C")


def _scalar(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    kind, content = arguments
    return _shaped(content, kind, ())[()].item()


def _shaped(content: Any, kind: Any, shape: Any, order: Any = "C") -> NDArray[Any]:
    """Bytes as an array, whose size must be that of the bytes."""
    if type(content) is not bytes or type(kind) is not _NumberType:
        raise TypeError
    dtype = kind.resolve()
    if math.prod(_lengths(shape)) * dtype.itemsize != len(content):
        raise ValueError
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _lengths(shape: Any) -> tuple[int, ...]:
    """A shape or strides, of few and no negative numbers."""
    if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS:
        raise TypeError
    if any(type(length) is not int or length < 0 for length in shape):
        raise TypeError
    return shape


def _tensor(machine: _Machine, arguments: tuple[Any, ...]) -> NDArray[Any]:
    """A tensor as a read-only view of its storage."""
    storage, offset, size, stride = arguments[:4]
    if type(storage) is not Storage or type(offset) is not int or offset < 0:
        raise TypeError
    size, stride = _lengths(size), _lengths(stride)
    data = storage.data
    if len(size) != len(stride) or math.prod(size) > len(data):
        raise ValueError
    if not math.prod(size):
        return np.zeros(size, data.dtype)
    if offset + sum((n - 1) * k for n, k in zip(size, stride, strict=True)) >= len(data):
        raise ValueError
    return np.lib.stride_tricks.as_strided(
        data[offset:], size, [data.itemsize * k for k in stride], writeable=False
    )


_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which files of old PyTorch begin


def _storage_of_bytes(machine: _Machine, arguments: tuple[Any, ...]) -> Storage:
    """A storage inside a plain pickle: a file of PyTorch before 1.6, of this storage alone."""
    (content,) = arguments
    if type(content) is not bytes:
        raise TypeError
    stream = io.BytesIO(content)
    wanted: dict[str, Storage] = {}

    def later(key: StorageKey) -> Storage:
        return wanted.setdefault(key.key, Storage(key.dtype, np.zeros(0, key.dtype)))

    def read() -> Any:
        return _Machine(stream, len(content), later, _STORAGE_NAMES).run()

    magic, protocol, system = read(), read(), read()
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or system.get("little_endian") is not True:
        raise ValueError
    storage, keys = read(), read()
    if type(storage) is not Storage or keys != list(wanted):
        raise ValueError
    count = int.from_bytes(stream.read(8), "little")
    data = stream.read()
    if count * storage.dtype.itemsize != len(data):
        raise ValueError
    storage.data = np.frombuffer(data, storage.dtype)
    return storage


_STORAGES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip
_STORAGE_NAMES = {
    ("torch", f"{name}Storage"): _Named(f"torch.{name}Storage", dtype=dtype)
    for name, dtype in _STORAGES.items()
}
_CALLS: Mapping[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "rdkit.Chem.rdchem Mol": _molecule,
    "_codecs encode": _encode,
    "__builtin__ bytes": _no_bytes,
    "collections OrderedDict": _empty_mapping,
    "numpy dtype": _number_type,
    "numpy.core.multiarray _reconstruct": _reconstruct,
    "numpy._core.multiarray _reconstruct": _reconstruct,
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "numpy.core.numeric _frombuffer": _from_buffer,
    "numpy._core.numeric _frombuffer": _from_buffer,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch.storage _load_from_bytes": _storage_of_bytes,
}
_RECORDS = (
    "torch_geometric.data.data Data",
    "torch_geometric.data.storage GlobalStorage",
)
_MARKERS = (
    "numpy ndarray",
    "torch_geometric.data.data DataEdgeAttr",
    "torch_geometric.data.data DataTensorAttr",
)
_NAMES: Mapping[tuple[str, str], _Named] = {
    **_STORAGE_NAMES,
    **{
        (module, name): _Named(f"{module}.{name}", _CALLS.get(text), text in _RECORDS)
        for text in (*_CALLS, *_RECORDS, *_MARKERS)
        for module, _, name in [text.partition(" ")]
    },
}
"""All names that pickles may hold."""
