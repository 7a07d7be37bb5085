"""Pickles and files of PyTorch: read as they were written, and never run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem

from molgen_energy.errors import InputError
from molgen_energy.formats import pickles
from molgen_energy.formats.pickles import PickledMolecule, PickleError, iterate_pickle, read_pickle
from molgen_energy.formats.torch_files import TorchFile

CALLED: list[str] = []


def record_call(text: str) -> str:
    CALLED.append(text)
    return text


class Hostile:
    """Pickles to a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


class Plain:
    """A class that no file may name."""


def arrays() -> list[np.ndarray]:
    return [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3)),
        np.arange(3, dtype=">i8"),
        np.zeros((0, 4), "f4"),
        np.array([True, False]),
        np.arange(24, dtype="u1").reshape(2, 3, 4)[:, ::2],
    ]


def some_data(rng: random.Random, depth: int = 4) -> Any:
    """Nested data of all kinds that are read."""
    kind = rng.randrange(9 if depth else 6)
    if kind < 6:
        text = "".join(rng.choices("aäΩ𝄞\n", k=rng.randrange(300)))
        return (None, rng.random() < 0.5, rng.randrange(-(2**70), 2**70), rng.gauss(0, 1e9),
                text, text.encode())[kind]  # fmt: skip
    items = [some_data(rng, depth - 1) for _ in range(rng.randrange(6))]
    if kind == 6:
        return items * 2  # refers to the same objects again
    if kind == 7:
        return tuple(items)
    return {str(k): item for k, item in enumerate(items)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_data_are_what_the_module_pickle_reads(protocol: int) -> None:
    rng = random.Random(0)
    for _ in range(40):
        data = some_data(rng)
        assert read_pickle(pickle.dumps(data, protocol)) == data
    long = [list(range(5000)), {str(k): k for k in range(3000)}, "x" * 70_000, b"y" * 300]
    assert read_pickle(pickle.dumps(long, protocol)) == long
    for array in arrays():
        found = read_pickle(pickle.dumps([array, array[:1]], protocol))[0]
        assert found.dtype == array.dtype.newbyteorder("=") or found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert read_pickle(pickle.dumps(np.float32(1.5), protocol)) == 1.5
    molecule = Chem.MolFromSmiles("CCO")
    molecule.SetProp("name", "ethanol")
    found = read_pickle(pickle.dumps({"a": molecule}, protocol))["a"]
    assert Chem.MolToSmiles(Chem.Mol(found.content)) == "CCO"


@pytest.mark.parametrize("protocol", [2, 4])
def test_items_come_one_after_another_and_are_forgotten(protocol: int) -> None:
    rng = random.Random(1)
    data = [{"coords": some_data(rng), "array": arrays()[k % 6], "name": f"m{k}"}
            for k in range(1700)]  # fmt: skip
    content = pickle.dumps(data, protocol)
    machine = pickles._Machine(io.BytesIO(content), len(content))
    count = most = 0
    for found, wanted in zip(machine.items(), data, strict=True):
        count += 1
        most = max(most, len(machine._memo))
        assert found["coords"] == wanted["coords"]
        np.testing.assert_array_equal(found["array"], wanted["array"])
    assert count == len(data)
    # Short texts and names are kept, of 1,000 items at a time everything.
    assert most < 0.8 * machine._memoized
    assert list(iterate_pickle(io.BytesIO(pickle.dumps({"a": [1]})), 30)) == [{"a": [1]}]


def tensors() -> dict[str, torch.Tensor]:
    table = torch.arange(12.0).reshape(4, 3)
    return {
        "table": table,
        "view": table[1:, ::2],
        "transposed": table.T,
        "long": torch.tensor([[1, 2]]),
        "empty": torch.zeros(0, 2, dtype=torch.int32),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([0.5], dtype=torch.float16),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
    }


def test_tensors_of_both_kinds_of_files(tmp_path: Path) -> None:
    """Of `torch.save`, and inside a plain pickle."""
    data = tensors()
    torch.save({"tensors": data, "hooks": OrderedDict()}, tmp_path / "a.pt")
    torch.save([data, {"table": data["table"] + 1}], tmp_path / "list.pt")
    whole = TorchFile(tmp_path / "a.pt").load()["tensors"]
    first, second = TorchFile(tmp_path / "list.pt").items()
    for found in (whole, first, read_pickle(pickle.dumps(data))):
        assert found.keys() == data.keys()
        for name, tensor in data.items():
            np.testing.assert_array_equal(found[name], tensor.numpy())
            assert found[name].dtype == tensor.numpy().dtype
    np.testing.assert_array_equal(second["table"], data["table"].numpy() + 1)


def test_nothing_is_called(tmp_path: Path) -> None:
    marker = tmp_path / "called"
    hostile = [
        Hostile(os.system, f"touch {marker}"),
        Hostile(eval, f"open({str(marker)!r}, 'w')"),
        Hostile(exec, f"open({str(marker)!r}, 'w')"),
        Hostile(getattr, "a", "upper"),
        Hostile(record_call, "x"),
        Hostile(__import__, "os"),
        Hostile(torch.load, str(marker)),
        Hostile(np.load, str(marker)),
        Hostile(np.memmap, str(marker), "u1", "w+", 0, (3,)),
        Hostile(Chem.SDWriter, str(marker)),
        Hostile(open, str(marker), "w"),
        Hostile(pickle.loads, b"N."),
        Hostile(io.FileIO, str(marker), "w"),
        Plain(),
        np.array([Hostile(os.system, f"touch {marker}")], object),
        {1, 2},
    ]
    for protocol in (2, 4, 5):
        for item in hostile:
            content = pickle.dumps([("CC", [item])], protocol)
            with pytest.raises(PickleError, match=r"it names '|holds no numbers|no pickle of"):
                read_pickle(content)
            with pytest.raises(PickleError):
                list(iterate_pickle(io.BytesIO(content), len(content)))
    for content in (
        b"cos\nsystem\n(S'ls'\ntR.",
        b"(S'ls'\nios\nsystem\n.",
        b"(cos\nsystem\nX\x02\0\0\0lso.",
    ):
        with pytest.raises(PickleError):
            read_pickle(b"\x80\x02" + content)
    path = tmp_path / "hostile.pt"
    torch.save([Hostile(os.system, f"touch {marker}")], path)
    with pytest.raises(InputError, match=r"hostile\.pt is not read: it names '(os|posix)\.system'"):
        list(TorchFile(path).items())
    assert not marker.exists()
    assert not CALLED


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


DTYPE = named("numpy", "dtype")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
HEAD = b"\x80\x04"
DAMAGED = {
    "nothing": b"",
    "text": b"C1CC1\n",
    "protocol 0": pickle.dumps([1, "a"], 0),
    "a later protocol": b"\x80\x09N.",
    "a text of 2^60 bytes": HEAD + b"\x8d" + struct.pack("<Q", 1 << 60) + b"a.",
    "a text of 4 GB": HEAD + b"X" + struct.pack("<I", (1 << 32) - 1) + b"a.",
    "bytes of 2^60": HEAD + b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "a bytearray of 2^60": HEAD + b"\x96" + struct.pack("<Q", 1 << 60) + b".",
    "a frame of 2^60": HEAD + b"\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "an integer of 255 bytes": HEAD + b"\x8a\xff" + b"\1" * 255 + b".",
    "an integer of 2 GB": HEAD + b"\x8b" + struct.pack("<I", 1 << 31) + b".",
    "too many marks": HEAD + b"(" * 10_000 + b".",
    "no mark": HEAD + b"]e.",
    "a mark as object": HEAD + b"(.",
    "a mark in a tuple": HEAD + b"N(\x86.",
    "two objects": HEAD + b"NN.",
    "a list of None": HEAD + b"NNa.",
    "a key that is a list": HEAD + b"}]Ns.",
    "a key of nested tuples": HEAD + b"}" + b")" + b"\x85" * 30_000 + b"Ns.",
    "half an item": HEAD + b"}(Nu.",
    "a memo that is not there": HEAD + b"j" + struct.pack("<I", 4_000_000_000) + b".",
    "a call of a text": HEAD + text("os") + b")R.",
    "a call of a class": HEAD + named("numpy", "ndarray") + b")R.",
    "an object of a function": HEAD + named("_codecs", "encode") + b")\x81.",
    "another encoding": HEAD + named("_codecs", "encode") + text("a") + text("rot13") + b"\x86R.",
    "a molecule of a text": HEAD + named("rdkit.Chem.rdchem", "Mol") + text("CC") + b"\x85R.",
    "a type of objects": HEAD + DTYPE + text("O8") + b"\x89\x88\x87R.",
    "a type of texts": HEAD + DTYPE + text("U9") + b"\x89\x88\x87R.",
    "an array larger than its bytes": HEAD + named("numpy.core.numeric", "_frombuffer") + b"("
    + b"C\x08" + bytes(8) + DTYPE + text("f8") + b"\x89\x88\x87R" + b"J\xff\xff\xff\x7f\x85"
    + text("C") + b"tR.",
    "a tensor of a text": HEAD + REBUILD + b"(" + text("a") + b"K\0K\1\x85K\1\x85\x89}tR.",
    "a tensor in another file": HEAD + b"(" + text("storage") + named("torch", "FloatStorage")
    + text("0") + text("cpu") + b"K\3tQ.",
    "a surrogate": HEAD + b"\x8c\3\xed\xa0\x80.",
    "build of a text": HEAD + text("a") + b"}b.",
    "a bare opcode": HEAD + b"R.",
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_pickles_are_refused_at_once(what: str) -> None:
    began = time.process_time()
    with pytest.raises(PickleError) as caught:
        read_pickle(DAMAGED[what])
    assert time.process_time() - began < 2
    assert "\n" not in str(caught.value)


def test_shared_objects_take_no_time() -> None:
    """A list of lists of lists …, 2^60 items if it were unfolded."""
    laughs: Any = ["ha"] * 2
    for _ in range(60):
        laughs = [laughs, laughs]
    found = read_pickle(pickle.dumps(laughs))
    assert found[0] is found[1]
    deep = read_pickle(HEAD + b")" + b"\x85" * 50_000 + b".")
    assert len(deep) == 1
    del deep


def test_every_cut_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps([("CC", [Chem.MolFromSmiles("CC"), arrays()[0], 1.5, tensors()])])
    for k in range(0, len(content), 7):
        with pytest.raises(PickleError):
            read_pickle(content[:k])
    torch.save([tensors()], tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for k in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:k])
        with pytest.raises(InputError, match=r"cut\.pt"):
            list(TorchFile(tmp_path / "cut.pt").items())
    place = whole.index(tensors()["table"].numpy().tobytes())
    for at in (whole.index(b"ctorch._utils"), place):
        flipped = bytearray(whole)
        flipped[at + 2] ^= 1
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(InputError, match=r"flipped\.pt .* checksum"):
            list(TorchFile(tmp_path / "flipped.pt").items())


def rebuilt(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Any:
    """What is read of a tensor that declares another view of its 12 numbers."""
    path = tmp_path / "a.pt"
    torch.save(torch.arange(12.0), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    old = b"K\x00K\x0c\x85q\x06K\x01\x85q\x07"
    assert members["a/data.pkl"].count(old) == 1

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    new = b"J" + struct.pack("<i", offset) + numbers(size) + numbers(stride)
    members["a/data.pkl"] = members["a/data.pkl"].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return TorchFile(path).load()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((13,), (1,), 0),
        ((6,), (1,), 7),
        ((4, 4), (3, 1), 0),
        ((2,), (12,), 0),
        ((2**31 - 1,), (0,), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 5),
        ((2,), (1,), -1),
        ((3,), (1, 1), 0),
        ((1,) * 40, (1,) * 40, 0),
    ],
)
def test_tensors_beyond_their_numbers_are_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(InputError, match=r"a\.pt is not read"):
        rebuilt(tmp_path, size, stride, offset)
    np.testing.assert_array_equal(rebuilt(tmp_path, (2, 3), (6, 2), 1), [[1, 3, 5], [7, 9, 11]])


def test_packed_archives_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps([1] * 1000))
    with pytest.raises(InputError, match=r"is no file of torch\.save"):
        TorchFile(path)
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"is no file of torch\.save"):
        TorchFile(path)


def test_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "available_memory", lambda: 1 << 10)
    monkeypatch.setattr(pickles, "_STEP", 1 << 16)
    with pytest.raises(PickleError, match="more memory than is available"):
        read_pickle(HEAD + b"]" + b"]" * 3000)


def test_molecules_stay_bytes() -> None:
    """What RDKit makes of them is for worker processes."""
    found = read_pickle(HEAD + named("rdkit.Chem.rdchem", "Mol") + b"C\3abc\x85R.")
    assert found == PickledMolecule(b"abc")
