"""Archives of couplings that are not as declared, and archives that mean harm."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from molgen_energy.errors import InputError
from molgen_energy.formats import limits
from molgen_energy.systems.spins.files import read_couplings

ONES = np.ones((3, 4, 4))


def archive(path: Path, method: int = zipfile.ZIP_DEFLATED, **arrays: np.ndarray | bytes) -> Path:
    """Arrays, or the bytes of a file, under names without their suffix."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, array in arrays.items():
            file.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def declared(shape: tuple[int, ...], content: bytes = b"", kind: str = "<f8") -> bytes:
    """An array whose header declares another shape than its content has."""
    buffer = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


def test_what_numpy_writes_is_read(tmp_path):
    right = np.random.default_rng(0).integers(-3, 4, (5, 4, 4))
    down = np.asfortranarray(np.random.default_rng(1).standard_normal((5, 4, 4)))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", right=right, down=down, other=np.array([None]))
        found = read_couplings(tmp_path / "a.npz", periodic=True)
        np.testing.assert_array_equal(found.right, right)
        np.testing.assert_array_equal(found.down, down.astype("f4"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "lacks the array 'down'"),
        ({"down": np.array([None] * 3)}, "found objects, which are not read"),
        ({"down": declared((3, 4, 4), b"cos\nsystem\n(S'true'\ntR.", "|O")}, "found objects"),
        ({"down": ONES > 0}, "expected floating-point numbers (M, L, L), found bool"),
        ({"down": ONES.astype(complex)}, "found complex128"),
        ({"down": np.array("text")}, "found <U4"),
        ({"down": np.ones((3, 4, 5))}, "found float64 (3, 4, 5)"),
        ({"down": np.ones((2, 4, 4))}, "found float64 (2, 4, 4)"),
        ({"down": np.ones((3, 16))}, "found float64 (3, 16)"),
        ({"down": np.float64(1)}, "found float64 ()"),
        ({"down": ONES * np.nan}, "record 1: .*'down': expected finite numbers, found nan"),
        ({"down": ONES * 1e300}, "record 1: .* found inf"),
        ({"down": declared((3, 4, 4), bytes(8 * 47))}, "found float64 (3, 4, 4) in 504 bytes"),
        ({"down": declared((3, 4, 4), bytes(8 * 49))}, "found float64 (3, 4, 4) in 520 bytes"),
        ({"right": declared((-3, 4, 4)), "down": ONES}, "found float64 (-3, 4, 4)"),
        ({"right": np.ones((0, 4, 4)), "down": ONES}, "found float64 (0, 4, 4)"),
        ({"right": declared((10**9, 4, 4)), "down": ONES}, "found float64 (1000000000, 4, 4) in"),
        ({"down": b"no array"}, "is not an .npz of NumPy"),
        ({"down": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}, "version 2.0 of the .npy format"),
    ],
)
def test_arrays_are_as_declared(tmp_path, arrays, message):
    path = archive(tmp_path / "a.npz", **{"right": ONES, **arrays})
    with pytest.raises(InputError) as caught:
        read_couplings(path, periodic=True)
    found = str(caught.value)
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), found), found
    assert "\n" not in found
    assert found.endswith("; save `right` and `down`, (M, L, L) each, with numpy.savez")


def test_bombs_take_no_memory(tmp_path, monkeypatch):
    """Four megabytes of zeros in four kilobytes, refused for the memory that there is."""
    zeros = declared((1 << 13, 8, 8), bytes(1 << 22))
    path = archive(tmp_path / "a.npz", right=zeros, down=zeros)
    monkeypatch.setattr(limits, "available_memory", lambda: 1 << 23)
    tracemalloc.start()
    with pytest.raises(
        InputError, match=r"'right' takes 16\.8 MB, 8\.4 MB of memory are available"
    ):
        read_couplings(path, periodic=True)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_other_archives(tmp_path):
    path = archive(tmp_path / "a.npz", zipfile.ZIP_BZIP2, right=ONES, down=ONES)
    with pytest.raises(InputError, match="a compression other than that of NumPy"):
        read_couplings(path, periodic=True)
    with zipfile.ZipFile(path, "w") as file:
        for k in range(200):
            file.writestr(f"{k}.npy", b"")
    with pytest.raises(InputError, match="holds more than 100 files"):
        read_couplings(path, periodic=True)
    archive(path, right=ONES, down=ONES)
    spoilt = bytearray(path.read_bytes())
    place = spoilt.index(b"PK\x01\x02") + 16  # the checksum of the first, in the directory
    spoilt[place] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match="Bad CRC-32"):
        read_couplings(path, periodic=True)
    with pytest.raises(InputError, match="does not exist"):
        read_couplings(tmp_path / "b.npz", periodic=True)
