"""Files that are not what their format declares, and files that mean harm."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from molgen_energy.data import hdf5 as molecule_files
from molgen_energy.data.hdf5 import MOLECULES, MoleculeFile, MoleculeWriter, system_of
from molgen_energy.data.molecules import Bonds, Molecules, Property, offsets_from_sizes
from molgen_energy.errors import InputError
from molgen_energy.formats import heaps, limits
from molgen_energy.formats.declaration import DatasetSpec, HDF5Format, check_values
from molgen_energy.formats.hdf5 import open_hdf5
from molgen_energy.metrics.reference import Reference
from molgen_energy.progress import no_progress
from molgen_energy.resources import asset
from molgen_energy.systems.shapes.dataset import Polygons
from molgen_energy.systems.shapes.files import read_polygons


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """Two waters and a hydrogen molecule with every column."""
    path = tmp_path_factory.mktemp("formats") / "a.h5"
    rng = np.random.default_rng(0)
    molecules = Molecules(
        rng.standard_normal((8, 3)).astype("f4"),
        np.array([8, 1, 1, 8, 1, 1, 1, 1], "u1"),
        np.array([0, 3, 6, 8]),
        np.zeros(8, "i1"),
        Bonds(
            np.array([[0, 1], [0, 2], [0, 1], [0, 2], [0, 1]], "u4"),
            np.ones(5, "u1"),
            np.array([0, 2, 4, 5]),
        ),
        np.array(["O", "O", "[H][H]"], object),
        {"gap": Property(np.array([1.0, np.nan, 3.0]), "eV")},
        np.array([1, 1, 2]),
    )
    with MoleculeWriter(path, source="test", provenance={"seed": "1"}) as writer:
        writer.append(molecules)
        writer.set_split(np.array([0, 1, 2], "u1"))
    return path.read_bytes()


@pytest.fixture
def edited(tmp_path, content):
    """Write the file with a change and return its path."""

    def write(edit) -> Path:
        path = tmp_path / "a.h5"
        path.write_bytes(content)
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return write


def refused(path: Path) -> str:
    """The message, one line that names the file and a remedy."""
    with pytest.raises(InputError) as caught, MoleculeFile(path) as file:
        file.load()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert "; " in message
    return message.removeprefix(str(path))


def put(name: str, values, **options):
    """An edit that replaces a data set."""

    def edit(file):
        if name in file:
            del file[name]
        file.create_dataset(name, data=values, **options)

    return edit


def at(name: str, place, value):
    """An edit that changes one value."""
    return lambda file: file[name].__setitem__(place, value)


@pytest.mark.parametrize("size", [0, 8, 2**64 - 16, 2**40])
def test_a_damaged_heap_of_texts_does_not_hang(edited, size):
    """The library never ends at an object of no size, so that the heap is refused before."""
    path = edited(lambda file: None)
    content = bytearray(path.read_bytes())
    place = content.find(b"GCOL") + 16
    content[place : place + 2] = b"\0\0" if size < 16 else content[place : place + 2]
    content[place + 8 : place + 16] = size.to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"the heap of texts at byte .* is damaged"):
        MoleculeFile(path)


def test_the_whole_file_is_read(edited):
    with MoleculeFile(edited(lambda file: None)) as file:
        found = file.load()
        assert (len(found), file.provenance, file.property_units) == (
            3,
            {"seed": "1"},
            {"gap": "eV"},
        )
        assert found.smiles.tolist() == ["O", "O", "[H][H]"]
        np.testing.assert_equal(found.properties["gap"].values, [1, np.nan, 3])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            put("positions", np.ones((8, 1), "f4")),
            "'positions': expected .*, 3) .* found float32 (8, 1)",
        ),
        (put("positions", np.ones((8, 3), "i4")), "'positions': expected .* found int32 (8, 3)"),
        (put("positions", np.ones((8, 3), bool)), "'positions': expected .* found bool (8, 3)"),
        (put("positions", np.ones((7, 3), "f4")), "'positions': expected .* N_total = 8, found"),
        (put("positions", np.zeros((8, 3), complex)), "'positions': expected .* found"),
        (put("positions", np.float32(1)), "'positions': expected .* found float32 ()"),
        (put("positions", h5py.Empty("f4")), "'positions': expected .* found nothing"),
        (put("positions", np.full((8, 3), 1e300)), "record 1: .* finite numbers, found inf"),
        (put("atomic_numbers", np.ones(8)), "'atomic_numbers': expected integers .* found float64"),
        (put("atomic_numbers", np.ones((8, 1), "u1")), "expected integers .* found uint8 (8, 1)"),
        (at("atomic_numbers", 4, 0), "record 2: .* expected integers from 1 to 118, found 0"),
        (put("atomic_numbers", np.array([8, 1, 1, 8, 1, 1, 1, 257])), "record 3: .* found 257"),
        (at("split", 1, 9), "record 2: .*'split': expected integers from 0 to 2, found 9"),
        (
            put("split", np.zeros((3, 1), "u1")),
            "'split': expected integers (M,), found uint8 (3, 1)",
        ),
        (put("split", np.zeros(2, "u1")), "'offsets': expected .* M = 2, found int64 (4,)"),
        (put("offsets", np.array([0, 6, 3, 8])), "record 2: .* to the number of atoms"),
        (put("offsets", np.array([0, 3, 3, 8])), "record 2: .* ascend"),
        (put("offsets", np.array([1, 3, 6, 8])), "record 1: .* ascend"),
        (put("offsets", np.array([0, 3, 6, 9])), "record 3: .* ascend"),
        (put("offsets", np.array([0, 3, -6, 8])), "record 3: .* integers of at least 0"),
        (put("bonds/offsets", np.array([0, 4, 2, 5])), "record 2: .* to the number of bonds"),
        (put("bonds/offsets", np.array([0, 2, 4])), "'bonds/offsets': expected .* M = 3"),
        (
            at("bonds/index", 4, [0, 2]),
            "record 3: .* expected bonds of two atoms of their mol",
        ),
        (
            at("bonds/index", 2, [1, 1]),
            "record 2: .* expected bonds of two atoms of their mol",
        ),
        (at("bonds/index", 3, [1, 0]), "record 2: .* expected bonds .* none twice"),
        (put("bonds/index", np.full((5, 2), -1)), "record 1: .* integers of at least 0"),
        (put("bonds/index", np.zeros(5, "u4")), "'bonds/index': expected integers (B, 2)"),
        (at("bonds/order", 3, 4), "record 2: .*'bonds/order': expected 1, 2, 3 or 12, found 4"),
        (put("bonds/order", np.ones(4, "u1")), "'bonds/order': expected .* B = 5"),
        (lambda file: file.__delitem__("bonds/order"), "lacks the data set 'bonds/order'"),
        (put("formal_charges", np.full(8, 200)), "record 1: .*'formal_charges'"),
        (put("smiles", np.arange(3)), "'smiles': expected texts (M,) .* found int64"),
        (put("smiles", np.array([b"C", b"\xff", b"C"])), "molecules 1 to 3 cannot be read"),
        (put("group", ["a", "b", "c"]), "'group': expected integers .* found texts"),
        (put("properties/x", np.ones(2)), "'properties/x': expected .* M = 3"),
        (lambda file: file.create_group("properties/y"), "'properties/y': .* found a group"),
        (lambda file: file.__setitem__("properties/t", np.dtype("f4")), "found a named type"),
        (
            lambda file: file["properties/gap"].attrs.__setitem__("unit", 3),
            "'unit' of 'properties/gap': expected a text",
        ),
    ],
)
def test_structure_and_values(edited, edit, message):
    found = refused(edited(edit))
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), found), found


# -- files that mean harm -----------------------------------------------------------------------


def linked(name: str, target):
    def edit(file):
        del file[name]
        file[name] = target(file)

    return edit


def outside(file, kind: str) -> Path:
    """A file with what an attack wants to read."""
    path = Path(file.filename).with_name("secret.h5")
    with h5py.File(path, "w") as secret:
        secret["positions"] = np.ones((8, 3), "f4")
    path.with_name("secret.bin").write_bytes(bytes(96))
    return path.with_name("secret.bin") if kind == "raw" else path


def virtual(file):
    path = outside(file, "hdf5")
    layout = h5py.VirtualLayout((8, 3), "f4")
    layout[:] = h5py.VirtualSource(path, "positions", shape=(8, 3))
    del file["positions"]
    file.create_virtual_dataset("positions", layout)


def external(file):
    del file["positions"]
    storage = [(str(outside(file, "raw")), 0, 96)]
    file.create_dataset("positions", (8, 3), "f4", external=storage)


def compact(file):
    del file["positions"]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((8, 3))
    h5py.h5d.create(file.id, b"positions", h5py.h5t.IEEE_F32LE, space, properties)


def named_type(file):
    del file["positions"]
    file["mine"] = np.dtype("f4")
    file.create_dataset("positions", (8, 3), file["mine"], data=np.ones((8, 3)))


def with_chunk(size: int, stored: bytes, mask: int = 0):
    """An edit that stores a chunk of (8, 3) numbers as it is."""

    def edit(file):
        del file["positions"]
        data = file.create_dataset(
            "positions", (8, 3), "f4", chunks=(size, 3), compression="gzip", fillvalue=0
        )
        data.id.write_direct_chunk((0, 0), stored, mask)

    return edit


TEXT = h5py.string_dtype()
WHOLE = zlib.compress(np.ones((8, 3), "f4").tobytes())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (linked("positions", lambda f: h5py.ExternalLink(str(outside(f, "hdf5")), "/positions")),
         "found a link to another file, which is not followed"),
        (linked("bonds", lambda f: h5py.ExternalLink(str(outside(f, "hdf5")), "/")),
         "found a link to another file"),
        (linked("properties", lambda f: h5py.ExternalLink("no.h5", "/")),
         "found a link to another file"),
        (linked("positions", lambda f: h5py.SoftLink("/atomic_numbers")), "found a soft link"),
        (linked("positions", lambda f: h5py.SoftLink("/nowhere")), "found a soft link"),
        (virtual, "'positions': expected .* found data of other files (virtual)"),
        (external, "'positions': expected .* found data in other files (external storage)"),
        (compact, "'positions': expected .* found a compact layout"),
        (named_type, "'positions': expected .* found a named type"),
        (put("positions", np.ones((8, 3), "f4"), compression="lzf"), "a filter other than gzip"),
        (put("positions", None, shape=(8, 3), dtype="f4"), "found 0 of 96 bytes in the file"),
        (put("positions", None, shape=(8, 3), dtype="f4", chunks=(4, 3)), "found 0 of 2 chunks"),
        (put("atomic_numbers", None, shape=(10**9,), dtype="u1", chunks=(1000,)), "0 of 1,000,000"),
        (put("split", None, shape=(10**12,), dtype="u1", chunks=(10**9,)), "chunks of 1,000,000,"),
        (with_chunk(8, zlib.compress(bytes(10**5))), "a damaged chunk, or one of more than 96"),
        (with_chunk(8, WHOLE[:-3]), "a damaged chunk"),
        (put("smiles", None, shape=(3,), dtype=TEXT, fillvalue="C" * 10**5, chunks=(3,)),
         "'smiles': expected texts .* found a text for each row"),
        (with_chunk(8, zlib.compress(bytes(95))), "a chunk of 95 bytes for 96"),
        (with_chunk(8, bytes(95), mask=1), "a chunk of 95 bytes for 96"),
        (with_chunk(4, zlib.compress(bytes(48))), "found 1 of 2 chunks"),
        (with_chunk(8, os.urandom(500)), "a chunk of 500 bytes for 96"),
    ],
)  # fmt: skip
def test_data_must_be_in_the_file(edited, edit, message):
    found = refused(edited(edit))
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), found), found


@pytest.mark.parametrize(
    "edit",
    [
        with_chunk(8, WHOLE),
        put("positions", np.ones((8, 3), "f4"), fletcher32=True, compression="gzip", shuffle=True),
    ],
    ids=["gzip", "with checksums"],
)
def test_a_good_chunk_is_read(edited, edit):
    with MoleculeFile(edited(edit)) as file:
        assert (file.load().positions == 1).all()


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 16])
def test_a_heap_of_texts_that_does_not_end(tmp_path, content, length):
    """The library would step over the free space for ever."""
    content, path = bytearray(content), tmp_path / "a.h5"
    place = content.index(b"GCOL") + 16
    while content[place : place + 2] != bytes(2):
        place += 16 + (int.from_bytes(content[place + 8 : place + 16], "little") + 7) // 8 * 8
    content[place + 8 : place + 16] = length.to_bytes(8, "little")
    path.write_bytes(content)
    assert "the heap of texts at byte" in refused(path)


def test_numbers_without_a_type_of_numpy(edited):
    def odd(file):
        del file["positions"]
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_ebias(65535)
        space = h5py.h5s.create_simple((8, 3))
        h5py.h5d.create(file.id, b"positions", kind, space).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.ones((8, 3), "f4")
        )

    assert "data set 'positions' cannot be read" in refused(edited(odd))


@pytest.mark.parametrize("packed", [None, False, True], ids=["in one piece", "chunks", "packed"])
def test_texts_that_share_their_bytes(tmp_path, packed):
    """Each of 3,000 texts is the same 100 kB of the file: 300 MB."""
    path = tmp_path / "a.h5"
    options = (
        {} if packed is None else {"chunks": (1000,), "compression": "gzip" if packed else None}
    )
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = 1
        texts = ["C" * 100_000] + ["C"] * 2999
        data = file.create_dataset("t", data=texts, dtype=TEXT, **options).id
        file.flush()
        if packed is None:
            start = data.get_offset()
            content = path.read_bytes()
            one = content[start : start + 16]
        else:
            _, chunk = data.read_direct_chunk((0,))
            one = (zlib.decompress(chunk) if packed else chunk)[:16]
            for k in range(3):
                chunk = zlib.compress(one * 1000) if packed else one * 1000
                data.write_direct_chunk((1000 * k,), chunk)
    if packed is None:
        path.write_bytes(content[:start] + one * 3000 + content[start + 16 * 3000 :])
    declared = HDF5Format("molecules", "", "", (DatasetSpec("t", ("*",), "text", ""),))
    with pytest.raises(InputError, match=r"'t': .* found texts of 300,000,000 bytes in a file of"):
        open_hdf5(path, declared)


def test_rows_that_were_never_written(edited):
    """Of a property that only later molecules have; other data sets must be whole."""

    def edit(file):
        data = file.create_dataset("properties/late", (3,), "f8", chunks=(2,), fillvalue=np.nan)
        data[2] = 5

    with MoleculeFile(edited(edit)) as file:
        assert file.load().properties["late"].values[2] == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("one", "has schema one, this version reads schema 1"),
        (2, "has schema 2, .* upgrade molgen-energy"),
        ([1, 1], r"has schema \[1 1\]"),
        (True, "its attributes cannot be read .*bool"),
        (h5py.Empty("f4"), "its attributes cannot be read .*nothing"),
    ],
)
def test_schemas(edited, value, message):
    path = edited(lambda file: file.attrs.__setitem__("schema", value))
    assert re.search(message, refused(path))
    with pytest.raises(InputError, match=message):
        system_of(path)


def test_attributes_are_finite(tmp_path):
    Polygons(count=3, vertices=4).write(tmp_path / "a.h5", no_progress)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["smallest"] = np.nan
    with pytest.raises(InputError, match="'smallest': expected a number, found nan"):
        read_polygons(tmp_path / "a.h5", "")


@pytest.mark.parametrize(
    "value", ["", "[]", "{", '{"a": 1}', "[" * 100_000, 3, b"\xff", '{"a": "b"} x', ["{}"]]
)
def test_provenance_is_texts(edited, value):
    path = edited(lambda file: file.attrs.__setitem__("provenance", value))
    message = refused(path)
    assert "attribute 'provenance': expected JSON of dict[str, str], found" in message
    assert len(message) < 300


def test_memory_is_compared_before_it_is_taken(edited, tmp_path, monkeypatch):
    Polygons(count=1000, vertices=40).write(tmp_path / "s.h5", no_progress)
    monkeypatch.setattr(limits, "available_memory", lambda: 100_000)
    with pytest.raises(InputError, match=r"s\.h5 takes 1\.3 MB, 100,000 bytes of memory are avail"):
        read_polygons(tmp_path / "s.h5", "")
    monkeypatch.setattr(limits, "available_memory", lambda: 20)
    with pytest.raises(InputError, match=r"a\.h5: data set 'offsets' takes 32 bytes"):
        MoleculeFile(edited(lambda file: None))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(InputError, match="is a device or a pipe"):
        open_hdf5(tmp_path / "a.h5", MOLECULES)
    (tmp_path / "b.h5").symlink_to("b.h5")
    with pytest.raises(InputError, match=r"b\.h5"):
        open_hdf5(tmp_path / "b.h5", MOLECULES)


def test_bytes_flipped_anywhere(tmp_path, content):
    """No error but `InputError`; or a file that is read, as its values are as good as others."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.h5"
    refused_files = 0
    for _ in range(60):
        spoilt = bytearray(content)
        for place in rng.integers(0, 6000, 3):
            spoilt[place] ^= int(rng.integers(1, 256))
        path.write_bytes(spoilt)
        try:
            with MoleculeFile(path) as file:
                file.load()
        except InputError as error:
            assert "\n" not in str(error)
            refused_files += 1
    assert refused_files > 10


# -- statistics of a reference --------------------------------------------------------------------


def narrower_sizes(file):
    sizes = file["sizes"][:, :-1]
    del file["sizes"]
    file["sizes"] = sizes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.attrs.__setitem__("rates", '{"a": [1, 2]}'), "'rates': expected JSON of"),
        (lambda f: f.attrs.__delitem__("types"), "lacks the attribute 'types'"),
        (lambda f: f.attrs.__setitem__("molecules", -1), "'molecules': expected an integer of at"),
        (lambda f: f["fcd"].attrs.__setitem__("count", [1, 2, 3]), "'fcd/mean': expected .* H = 3"),
        (lambda f: f["fcd"].__delitem__("mean"), "lacks the data set 'fcd/mean'"),
        (lambda f: f["geometry/angle/C1C-C1H"].attrs.__setitem__("groups", [1] * 10),
         "'groups' of 'geometry/angle/C1C-C1H': expected 20000 in all"),
        (lambda f: f["ranges/counts"].__setitem__(3, 1), "record 3: .* numbers that ascend"),
        (narrower_sizes, "'sizes': expected as many atoms as in 'elem"),
    ],
)  # fmt: skip
def test_statistics(tmp_path, edit, message):
    path = tmp_path / "a.h5"
    path.write_bytes(asset("qm9_test_statistics.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(InputError, match=message):
        Reference.load(path)


def test_values_by_hand():
    """Against a plain loop."""
    spec = DatasetSpec("x", ("M", 2), "float", "", low=0, high=2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.uniform(-0.1, 2.1, (4, 2))
        values[rng.integers(4), 0] = rng.choice([0, 1, np.nan, np.inf])
        bad = [k for k, row in enumerate(values) if not all(0 <= x <= 2 for x in row)]
        if not bad:
            check_values(Path("a"), spec, values)
            continue
        with pytest.raises(InputError, match=f"a: record {bad[0] + 7}: data set 'x': expected"):
            check_values(Path("a"), spec, values, first_record=7)


def test_bonds_by_hand(monkeypatch):
    """Random bonds, with the table of pairs and by sorting, against plain sets."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes, counts = rng.integers(1, 7, 6), rng.integers(0, 3, 6)
        index = rng.integers(0, np.repeat(sizes, counts) + 1, (2, counts.sum())).T
        expected, start = [], 0
        for size, count in zip(sizes, counts, strict=True):
            pairs = [frozenset(pair) for pair in index[start : start + count].tolist()]
            good = all(len(pair) == 2 and max(pair) < size for pair in pairs)
            expected.append(not good or len(set(pairs)) < len(pairs))
            start += count
        for table in (0, 10**6):
            monkeypatch.setattr(molecule_files, "_TABLE", table)
            found = molecule_files._unfit_bonds(
                index.astype("u4"), offsets_from_sizes(sizes), offsets_from_sizes(counts)
            )
            assert found.tolist() == expected


@pytest.mark.parametrize("place", [0, 4090, 4096, 9000])
def test_heaps_are_searched_in_stretches(tmp_path, monkeypatch, place):
    """Also one that begins in a stretch and ends in the next."""
    monkeypatch.setattr(heaps, "_STRETCH", 4096)
    size = (80).to_bytes(8, "little")
    heap = b"GCOL\1\0\0\0" + size + b"\0" * 8 + (64).to_bytes(8, "little") + b"\0" * 48
    for number, content in enumerate((heap, heap.replace(size, (96).to_bytes(8, "little")))):
        path = tmp_path / f"{number}.h5"
        path.write_bytes(b"\0" * place + content + b"\0" * 5000)
        assert heaps.damaged_heap(path) == (place if number else None)
