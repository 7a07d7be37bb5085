"""Mol blocks as other programs write them, and what is said of those that cannot be read."""

from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, rdBase

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.molfiles import MoleculeReader, MoleculeTextWriter
from molgen_energy.chemistry.rdkit import build, sanitize
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError

V3000 = """
     Test

  0  0  0     0  0            999 V3000
M  V30 BEGIN CTAB
M  V30 COUNTS 2 1 0 0 0
M  V30 BEGIN ATOM
M  V30 1 {symbol} {x} 0.2 0.3 0
M  V30 2 C 1 2 3 0
M  V30 END ATOM
M  V30 BEGIN BOND
M  V30 1 {order} 1 2
M  V30 END BOND
M  V30 END CTAB
M  END
$$$$
"""


def v2000(
    symbol: str = "N", x: str = "0.1000", order: int = 1, count: int = 2, end: str = "M  END\n"
) -> str:
    """Two atoms and a bond."""
    rest = "0  0  0  0  0  0  0  0  0  0  0  0"
    return (
        f"\n     Test    3D\n\n{count:>3}  1  0  0  0  0  0  0  0  0999 V2000\n"
        f"{x:>10}    0.2000    0.3000 {symbol:<3} {rest}\n"
        f"    1.0000    2.0000    3.0000 C   {rest}\n"
        f"  1  2{order:>3}  0\n{end}$$$$\n"
    )


def read(tmp_path: Path, text: str) -> Molecule:
    (tmp_path / "a.sdf").write_text(text)
    (molecule,) = MoleculeReader(tmp_path / "a.sdf")
    return molecule


@pytest.mark.parametrize("block", ["v2000", "v3000"])
@pytest.mark.parametrize(
    ("symbol", "number"),
    [("br", 35), ("CL", 17), ("c", 6), ("SI", 14), ("D", 1), ("T", 1), ("d", 1), ("Og", 118)],
)
def test_symbols_in_any_case_and_isotopes_of_hydrogen(tmp_path, block, symbol, number):
    text = v2000(symbol) if block == "v2000" else V3000.format(symbol=symbol, x="0.1", order=1)
    molecule = read(tmp_path, text)
    assert molecule.atomic_numbers.tolist() == [number, 6]
    np.testing.assert_allclose(molecule.positions, [[0.1, 0.2, 0.3], [1, 2, 3]], atol=1e-6)
    assert molecule.bond_index.tolist() == [[0, 1]]


@pytest.mark.parametrize("block", ["v2000", "v3000"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.50E-02", 0.015), ("1.50D-02", 0.015), ("-1.5d+01", -15.0), ("-6.4*^-2", -0.064),
        ("7.29479528D-03", 0.0072948), ("1234.5678", 1234.5678), ("-99.123456789", -99.12346),
    ],
)  # fmt: skip
def test_numbers_with_exponents_and_of_any_width(tmp_path, block, text, value):
    block = v2000(x=text) if block == "v2000" else V3000.format(symbol="N", x=text, order=1)
    molecule = read(tmp_path, block)
    assert molecule.positions[0, 0] == pytest.approx(value, abs=1e-5)
    np.testing.assert_allclose(molecule.positions[0, 1:], [0.2, 0.3], atol=1e-6)
    assert len(molecule.bond_order) == 1


@pytest.mark.parametrize("empty", ["\n", "  \n\n"])
def test_empty_lines_before_the_end(tmp_path, empty):
    fields = "M  CHG  1   1   1\nM  RAD  1   2   2\n"
    molecule = read(tmp_path, v2000(end=f"{fields}{empty}M  END\n> <gap>\n1.5D+00\n\n"))
    assert len(molecule) == 2
    assert molecule.formal_charges.tolist() == [1, 0]
    reader = MoleculeReader(tmp_path / "a.sdf")
    assert reader.detect_fields().properties == {"gap": "gap"}


BAD = {
    "no element": (v2000("Du"), r"Element 'Du' not found on line 5"),
    "atoms missing": (v2000(count=4), r"line 7: expected an atom .*, found ' *. *. *. *.'"),
    "not finite": (v2000(x="nan"), "line 5: expected an atom .*, found '       nan"),
    "overflow": (v2000(x="**********"), r"line 5: expected an atom .*, found '\*\*\*"),
    "cut off in a charge": (v2000(end="M  CHG  1   \n"), "line 8: expected pairs of an atom and"),
    "no end": (v2000(end=""), r"on line 8|at line 8|around line 8"),
    "an atom that is not there": (v2000().replace("  1  2  1", "  1  7  1"), "not there"),
    "a bond to itself": (v2000().replace("  1  2  1", "  1  1  1"), "self-bond"),
    "no counts": ("\n\n\nhello\nM  END\n$$$$\n", "line 4: expected the numbers .*, found 'hello'"),
    "a line too many": ("\n" + v2000(), "line 4: expected the numbers .*, found ''"),
    "v3000": (V3000.format(symbol="Du", x="0.1", order=1), "Element 'Du' not found on line 8"),
}
GOOD = v2000()


@pytest.mark.parametrize("what", BAD)
def test_the_reason_of_rdkit_and_the_line_in_the_file(tmp_path, capfd, what):
    text, reason = BAD[what]
    # The line in the block, of a block that begins after GOOD.
    for digits in set(filter(str.isdigit, reason)):
        reason = reason.replace(f"line {digits}", f"line {int(digits) + GOOD.count(chr(10))}")
    (tmp_path / "a.sdf").write_text(GOOD + text + GOOD)
    with pytest.raises(
        InputError, match=rf"record 2 \(line 10\): no readable mol block: .*({reason})"
    ) as error:
        list(MoleculeReader(tmp_path / "a.sdf"))
    assert "\n" not in str(error.value)
    assert len(list(MoleculeReader(tmp_path / "a.sdf", skip_bad=True))) == 2
    assert capfd.readouterr().err == ""


def reasons_of(path: Path) -> list[str]:
    reader = MoleculeReader(path, skip_bad=True)
    list(reader)
    return [bad.reason for bad in reader.skipped]


def test_the_reason_is_there_in_worker_processes_and_logs_stay_as_they_are(tmp_path, capfd):
    (tmp_path / "a.sdf").write_text(GOOD + BAD["no element"][0])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        (reason,) = pool.submit(reasons_of, tmp_path / "a.sdf").result()
    assert "Element 'Du' not found" in reason
    before = rdBase.LogStatus()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("rdkit").addHandler(handler)
    rdBase.LogToPythonLogger()
    try:
        assert len(reasons_of(tmp_path / "a.sdf")) == 1
        assert not records
        assert Chem.MolFromMolBlock(BAD["no element"][0]) is None
        assert records
    finally:
        rdBase.LogToCppStreams()
        logging.getLogger("rdkit").removeHandler(handler)
    assert rdBase.LogStatus() == before
    capfd.readouterr()


@pytest.mark.parametrize(
    ("order", "what"),
    [
        (0, "of order 0"),
        (5, "a bond of a query"),  # single or double
        (6, "a bond of a query"),  # single or aromatic
        (7, "a bond of a query"),  # double or aromatic
        (8, "a bond of a query"),  # any
        (9, "dative"),
    ],
)
@pytest.mark.parametrize("block", ["v2000", "v3000"])
def test_bonds_without_an_order_are_a_bad_record(tmp_path, block, order, what):
    text = v2000(order=order) if block == "v2000" else V3000.format(symbol="N", x=1, order=order)
    with pytest.raises(InputError, match=f"bond of atoms 1 and 2 has no order .*: it is {what}"):
        read(tmp_path, text)


def test_zero_order_and_hydrogen_bonds_are_named(tmp_path):
    with pytest.raises(InputError, match="it is of order 0"):
        read(tmp_path, v2000(end="M  ZBO  1   1   0\nM  END\n"))
    with pytest.raises(InputError, match="it is a hydrogen bond"):
        read(tmp_path, V3000.format(symbol="N", x=1, order=10))


@pytest.mark.parametrize(("order", "stored"), [(1, 1), (2, 2), (3, 3), (4, 12)])
def test_bonds_with_an_order_are_kept(tmp_path, order, stored):
    assert read(tmp_path, v2000(order=order)).bond_order.tolist() == [stored]


@pytest.mark.parametrize("symbol", ["A", "Q", "R#", "*", "L", "X", "M", "LP", "R1", "AH"])
def test_atoms_of_queries_are_a_bad_record(tmp_path, symbol):
    with pytest.raises(InputError, match="atom 1 is no chemical element"):
        read(tmp_path, v2000(symbol))


def waters(count: int) -> Molecules:
    """One molecule of so many waters, 4 Å apart."""
    side = int(np.ceil(count ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:count]
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    positions = (4.0 * grid[:, None] + water).reshape(-1, 3).astype(np.float32)
    numbers = np.tile(np.array([8, 1, 1], np.uint8), count)
    return perceive(Molecules.from_list([Molecule(positions, numbers)]))


@pytest.mark.parametrize(("count", "suffix"), [(400, "sdf"), (21_900, "sdf"), (21_900, "xyz")])
def test_big_systems_keep_atoms_and_bonds(tmp_path, count, suffix):
    """More than 999 atoms need V3000, more than 65,535 need 32 bits for a bond."""
    given = waters(count)
    with MoleculeTextWriter(tmp_path / f"a.{suffix}", {}) as writer:
        writer.append(given)
    (molecule,) = MoleculeReader(tmp_path / f"a.{suffix}")
    back = Molecules.from_list([molecule])
    back = perceive(back) if suffix == "xyz" else back
    np.testing.assert_array_equal(back.atomic_numbers, given.atomic_numbers)
    np.testing.assert_allclose(back.positions, given.positions, atol=1e-6)
    oxygen = 3 * np.arange(count)[:, None]
    expected = np.stack([np.hstack([oxygen, oxygen]), oxygen + np.array([1, 2])], -1).reshape(-1, 2)
    np.testing.assert_array_equal(back.bonds.index, expected)
    assert (back.bonds.order == 1).all()
    if suffix == "sdf":
        assert "V3000" in (tmp_path / "a.sdf").read_text()[:200]
        assert f">  <fragments>\n{count}\n" in (tmp_path / "a.sdf").read_text()


def test_the_largest_fragment_is_that_of_rdkit(molecules):
    """Of unions of molecules whose atoms are shuffled."""
    some, rng = perceive(molecules.select(np.arange(60))), np.random.default_rng(0)
    for k in range(0, 60, 3):
        parts = [some[k], some[k + 1], some[k + 2]]
        offsets = np.cumsum([0, *map(len, parts)])
        shuffled = rng.permutation(offsets[-1])
        bonds = [part.bond_index.astype(int) + o for part, o in zip(parts, offsets, strict=False)]
        union = Molecule(
            np.concatenate([part.positions for part in parts])[shuffled],
            np.concatenate([part.atomic_numbers for part in parts])[shuffled],
            bond_index=np.argsort(shuffled)[np.concatenate(bonds)],
            bond_order=np.concatenate([part.bond_order for part in parts]),
        )
        found = sanitize(union)
        if not found.valid:
            continue
        assert found.fragments == 3
        whole = build(union)
        Chem.SanitizeMol(whole)
        largest = max(Chem.GetMolFrags(whole, asMols=True), key=lambda mol: mol.GetNumAtoms())
        assert found.smiles == Chem.MolToSmiles(largest)
