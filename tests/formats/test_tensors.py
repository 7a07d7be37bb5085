"""Files of safetensors: headers that lie, types, values, and the shapes of arrays."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch

from molgen_energy.errors import InputError
from molgen_energy.formats import limits
from molgen_energy.formats.tensors import (
    check_shapes,
    pack_arrays,
    pack_tensors,
    parse_arrays,
    read_tensors,
)


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), span=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


EIGHT = bytes(8)
DAMAGED = {
    "empty": b"",
    "short": b"\x01\x00",
    "length behind the end": file_of({}, length=10),
    "length of 2⁶⁴−1": file_of({"a": entry()}, EIGHT, length=2**64 - 1),
    "no JSON": file_of(b"{nonsense"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([1]),
    "deep": file_of(b"[" * 100_000),
    "a huge integer": file_of(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b"]}}"),
    "twice": file_of(b'{"a": 1, "a": 2}'),
    "null": file_of({"a": None}, EIGHT),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "negative shape": file_of({"a": entry(shape=(-2,))}, EIGHT),
    "fractional shape": file_of({"a": entry(shape=(2.0,))}, EIGHT),
    "true as shape": file_of({"a": entry(shape=(True, 2))}, EIGHT),
    "a thousand dimensions": file_of({"a": entry(shape=(1,) * 1000, span=(0, 4))}, bytes(4)),
    "declared 10⁹ atoms": file_of({"a": entry(shape=(10**9, 3))}, EIGHT),
    "overflowing shape": file_of({"a": entry(shape=(2**40, 2**40))}, EIGHT),
    "unknown type": file_of({"a": entry(dtype="F8_E4M3", shape=(8,))}, EIGHT),
    "type of a list": file_of({"a": entry(dtype=["F32"])}, EIGHT),
    "behind the end": file_of({"a": entry(span=(8, 16))}, EIGHT),
    "backwards": file_of({"a": entry(span=(8, 0))}, EIGHT),
    "overlap": file_of({"a": entry(), "b": entry()}, EIGHT),
    "gap": file_of({"a": entry(), "b": entry(span=(12, 20))}, bytes(20)),
    "data too long": file_of({"a": entry()}, bytes(9)),
    "data too short": file_of({"a": entry()}, bytes(7)),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files(tmp_path, what):
    (tmp_path / "a.safetensors").write_bytes(DAMAGED[what])
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.safetensors is cut off or damaged \(.*; mend it$"):
        read_tensors(tmp_path / "a.safetensors", "mend it")
    with pytest.raises(InputError, match=r"^x is cut off or damaged"):
        parse_arrays(DAMAGED[what], "x", "mend it")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_there_and_back(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).T, "half": torch.ones(2, dtype=torch.float16),
        "steps": torch.tensor(7), "none": torch.empty(0, 5), "bits": torch.ones(2).bfloat16(),
    }  # fmt: skip
    (tmp_path / "a").write_bytes(pack_tensors(tensors))
    assert safetensors.torch.load_file(tmp_path / "a").keys() == tensors.keys()
    for name, found in read_tensors(tmp_path / "a", "mend it").items():
        assert torch.equal(found, tensors[name]) and found.dtype == tensors[name].dtype
    arrays = {"a": np.array([[np.nan, 1.0]]), "b": np.arange(3, dtype=np.uint8)}
    found = parse_arrays(pack_arrays(arrays), "x", "mend it")
    assert all(np.array_equal(found[name], arrays[name], equal_nan=True) for name in arrays)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_finite(tmp_path, value, dtype):
    tensor = torch.zeros(5, dtype=dtype)
    tensor[3] = value
    (tmp_path / "a").write_bytes(pack_tensors({"x/y": tensor}))
    with pytest.raises(InputError, match="a: tensor 'x/y' holds NaN or infinity; mend it"):
        read_tensors(tmp_path / "a", "mend it")


def test_every_flipped_bit_is_found_with_a_checksum(tmp_path):
    import hashlib

    content = pack_tensors({"a": torch.arange(6.0)})
    known = hashlib.sha256(content).hexdigest()
    path = tmp_path / "a"
    path.write_bytes(content)
    assert torch.equal(read_tensors(path, "mend it", known)["a"], torch.arange(6.0))
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(InputError, match="a is damaged: its SHA-256 is not the one"):
            read_tensors(path, "mend it", known)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "available_memory", lambda: 10**6)
    with (tmp_path / "a").open("wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(InputError, match=r"reading .*a takes 2\.0 TB, 1\.0 MB of memory"):
        read_tensors(tmp_path / "a", "mend it")


DECLARED = {"x": ("float32", ("M", 3)), "n": ("int64", ("M",)), "y?": ("uint8", ("B",))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": None}, "expected the array 'n', which is missing"),
        ({"z": np.zeros(1)}, "unknown array 'z'"),
        ({"x": np.zeros((4, 3))}, r"array 'x': expected float32 \(M, 3\), found float64 \(4, 3\)"),
        ({"x": np.zeros((4, 2), "f4")}, r"array 'x': expected float32 \(M, 3\)"),
        ({"x": np.zeros(4, "f4")}, r"array 'x': expected float32 \(M, 3\), found float32 \(4,\)"),
        ({"n": np.zeros(5, "i8")}, r"array 'n': expected int64 \(M\), found int64 \(5,\)"),
        ({"n": np.zeros((4, 1), "i8")}, r"array 'n': expected int64 \(M\)"),
        ({"y": np.zeros(2, "i1")}, r"array 'y': expected uint8 \(B\)"),
    ],
)
def test_shapes_that_are_not_as_declared(changes, message):
    arrays = {"x": np.zeros((4, 3), "f4"), "n": np.zeros(4, "i8"), "y": np.zeros(9, "u1")}
    check_shapes(arrays, DECLARED)
    check_shapes({name: arrays[name] for name in "xn"}, DECLARED)
    changed = {name: array for name, array in (arrays | changes).items() if array is not None}
    with pytest.raises(InputError, match=message):
        check_shapes(changed, DECLARED)
