"""Files of arrays in the format of safetensors, checked before anything is allocated.

A file is the length of its header (8 bytes), the header, JSON with type, shape and place of each
array, and the data. They hold no code. NaN and infinity are refused, as are types that this package
does not write.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.formats.parts import check_part, read_part
from molgen_energy.formats.yaml import shown

if TYPE_CHECKING:
    from torch import Tensor

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of a number of each type, by its name in the header."""
Shapes = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""Type, such as `float32`, and shape of each array. A name in a shape stands for one length
in all of them. The name of an array that may be missing ends in `?`."""
_LENGTH = 8  # bytes of the length of the header
_MOST_HEADER = 10_000_000  # bytes
_MOST_DIMENSIONS = 8
_MOST_LENGTH = 2**48  # of a dimension; an empty array may declare any
_DIGITS = 16
_METADATA = "__metadata__"


def read_tensors(path: Path, remedy: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, by name.

    Parameters
    ----------
    path
        The file; no pipe or device.
    remedy
        For the end of messages.
    sha256
        The SHA-256 of the file as it was written, where it is known.

    Raises
    ------
    InputError
        The file is missing, cut off, damaged, or too large for the memory; or a value is not
        finite.
    """
    import safetensors.torch
    import torch

    size = check_part(path)
    check_memory(2 * size, f"reading {path}", remedy)
    content = read_part(path, size)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is not the one that was written with it; {remedy}"
        )
    _check_header(content, str(path), remedy)
    tensors = _loaded(safetensors.torch.load, content, str(path), remedy)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: tensor {shown(name)} holds NaN or infinity; {remedy}")
    return tensors


def parse_arrays(content: bytes, where: str, remedy: str) -> dict[str, NDArray[Any]]:
    """The arrays of a file's content, by name; its floating-point numbers may be of any value.

    Raises
    ------
    InputError
        The content is cut off or damaged.
    """
    import safetensors.numpy

    _check_header(content, where, remedy)
    return _loaded(safetensors.numpy.load, content, where, remedy)


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file of tensors."""
    import safetensors.torch

    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of a file of contiguous arrays."""
    import safetensors.numpy

    return safetensors.numpy.save(dict(arrays))


def check_shapes(arrays: Mapping[str, NDArray[Any]], declared: Shapes) -> None:
    """Check types and shapes of all arrays.

    Raises
    ------
    InputError
        An array is missing or not declared, or has another type or shape.
    """
    lengths: dict[str, int] = {}
    names = {name.removesuffix("?") for name in declared}
    if unknown := arrays.keys() - names:
        raise InputError(f"unknown array {shown(min(unknown))}")
    for declared_name, (dtype, shape) in declared.items():
        name = declared_name.removesuffix("?")
        array = arrays.get(name)
        if array is None:
            if name != declared_name:
                continue
            raise InputError(f"expected the array '{name}', which is missing")
        fits = array.dtype == np.dtype(dtype) and array.ndim == len(shape)
        for length, symbol in zip(array.shape, shape, strict=False):
            known = lengths.setdefault(symbol, length) if isinstance(symbol, str) else symbol
            fits &= known == length
        if not fits:
            wanted = ", ".join(map(str, shape))
            raise InputError(
                f"array '{name}': expected {dtype} ({wanted}), found {array.dtype} {array.shape}"
            )


def _loaded(load: Any, content: bytes, where: str, remedy: str) -> dict[str, Any]:
    import safetensors

    try:
        return dict(load(content))
    except safetensors.SafetensorError as error:
        raise InputError(f"{where} is cut off or damaged ({error}); {remedy}") from None


def _check_header(content: bytes, where: str, remedy: str) -> None:
    """Check that types, shapes and places of the arrays agree with the bytes that are there."""
    try:
        end = _check_entries(_header(content))
    except (ValueError, RecursionError, UnicodeError) as error:
        text = str(error) if isinstance(error, _Damaged) else "no header"
        raise InputError(f"{where} is cut off or damaged ({text}); {remedy}") from None
    length = int.from_bytes(content[:_LENGTH], "little")
    if _LENGTH + length + end != len(content):
        raise InputError(
            f"{where} is cut off or damaged (arrays of {end:,} bytes, {len(content):,} in all); "
            f"{remedy}"
        )


class _Damaged(ValueError):
    """What is wrong with a header."""


def _header(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:_LENGTH], "little")
    if len(content) < _LENGTH or length > min(_MOST_HEADER, len(content) - _LENGTH):
        raise _Damaged("no header")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise _Damaged("a name is there twice")
        return values

    def number(text: str) -> int:
        if len(text) > _DIGITS:
            raise _Damaged("an array is too large")
        return int(text)

    text = content[_LENGTH : _LENGTH + length].decode("utf-8")
    header = json.loads(text, object_pairs_hook=once, parse_int=number)
    if not isinstance(header, dict):
        raise _Damaged("no header")
    return header


def _check_entries(header: dict[str, Any]) -> int:
    """Check the entries of all arrays; returns the number of bytes that they take."""
    spans = []
    for name, entry in header.items():
        if name == _METADATA:
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _Damaged(f"{shown(name)} has no type, shape and place")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise _Damaged(f"{shown(name)} has the unknown type {shown(dtype)}")
        if not _is_list(shape, _MOST_DIMENSIONS) or not _is_list(span, 2) or len(span) != 2:
            raise _Damaged(f"{shown(name)} has no shape and place")
        if span[1] - span[0] != BYTES[dtype] * math.prod(shape):
            raise _Damaged(f"{shown(name)} does not fill its place")
        spans.append((span[0], span[1]))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise _Damaged("arrays overlap, or there is a gap")
        end = last
    return end


def _is_list(value: Any, most: int) -> bool:
    """Whether a value is a short list of lengths."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(length) is int and 0 <= length < _MOST_LENGTH for length in value)
    )
