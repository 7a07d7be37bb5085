"""SNN, Frag and Scaf against the code of MOSES, RDKit's loops and sums in float64."""

from __future__ import annotations

import math
from collections import Counter

import h5py
import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from rdkit.DataStructs import BulkTanimotoSimilarity

from molgen_energy.chemistry.substructures import substructures_of
from molgen_energy.metrics.bundled import BUNDLED
from molgen_energy.metrics.distances.similarity import (
    SIMILARITY_KEYS,
    SubstructureCounts,
    compare_substructures,
    cosines_without_groups,
    nearest_similarity,
)
from molgen_energy.metrics.packed_text import pack, unpack
from molgen_energy.resources import asset
from molgen_energy.workers import WorkerPool

HERE = WorkerPool(0)
GENERATED = (
    "CCO", "CC(=O)Nc1ccccc1", "c1ccc(-c2ccccn2)cc1", "O=C(NCc1ccccc1)C1CCNCC1",
    "COc1ccc2ccccc2c1", "CC(C)CN.O", "C1CC2CCC1N2", "CCOC(=O)c1ccc(N)cc1",
)  # fmt: skip
TEST = (
    "CCCO", "CC(=O)Nc1ccc(O)cc1", "c1ccc(-c2ccncc2)cc1", "O=C(NC1CCCCC1)c1ccccc1",
    "c1ccc2ccccc2c1", "CCN", "C1CC2CCC1C2", "CCOC(=O)c1ccccc1N", "O=C(c1ccccc1)N1CCNCC1",
    "c1ccc(-c2ccccn2)cc1",
)  # fmt: skip


def counts_of(smiles) -> SubstructureCounts:
    found = SubstructureCounts()
    found.add(smiles, [None if text is None else substructures_of(text) for text in smiles])
    return found


def test_the_values_of_moses():
    """Computed by `SNNMetric`, `FragMetric` and `ScafMetric` of molsets 0.3.1."""
    found = compare_substructures(counts_of([*GENERATED, None, "CCO"]), counts_of(TEST))
    expected = {
        "snn": 0.49578203074634075, "fragments": 0.7324670207647144,
        "scaffolds": 0.40824829046386313,
    }  # fmt: skip
    assert set(found) == set(SIMILARITY_KEYS)
    for key, value in expected.items():
        assert found[key].value == pytest.approx(value, rel=1e-6), key
        assert found[key].count == len(GENERATED) and found[key].interval is None  # too few


def test_stored_molecules_against_loops_of_rdkit():
    """60 molecules of CCD against 100: the value, and each part without a group."""
    with h5py.File(asset(BUNDLED["ccd"].statistics)) as file:
        smiles = unpack(file["perceived/smiles"][:])
    ours, theirs = smiles[::15], smiles[4:404:4]
    source, target = counts_of(ours), SubstructureCounts.of_smiles(theirs, HERE)
    assert len(target) == 100
    found = compare_substructures(source, target)
    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    bits, others = (
        [morgan.GetFingerprint(Chem.MolFromSmiles(text)) for text in texts]
        for texts in (ours, theirs)
    )
    best = np.array([max(BulkTanimotoSimilarity(one, others)) for one in bits])
    computed = nearest_similarity(source.fingerprints, target.fingerprints)
    assert computed == pytest.approx(best, abs=1e-6)
    assert found["snn"].value == pytest.approx(best.mean())
    for key in ("fragments", "scaffolds"):
        mine, other = getattr(source, key), getattr(target, key)
        values = cosines_without_groups(mine, other)
        for g, value in enumerate(values[1:]):
            kept = sum((c for k, c in enumerate(mine) if k != g), Counter())
            whole = sum(other, Counter())
            dot = sum(kept[name] * whole[name] for name in kept)
            norms = math.hypot(*kept.values()) * math.hypot(*whole.values())
            assert value == pytest.approx(dot / norms)
        low, high = found[key].interval
        assert 0 <= low < found[key].value < high <= 1
    half = np.arange(10) < 5
    parts = [source.select(half), source.select(~half)]
    assert sum(map(len, parts)) == len(source)
    assert sum(parts[0].fragments, Counter()) + sum(parts[1].fragments, Counter()) == sum(
        source.fragments, Counter()
    )


def test_nothing_to_compare():
    found = compare_substructures(counts_of(["CCO", "C"]), counts_of(["CO"]))
    assert found["scaffolds"].value is None and "scaffold" in found["scaffolds"].note
    assert compare_substructures(counts_of([]), counts_of(["CO"]))["snn"].value is None
    empty = np.zeros((1, 128), np.uint8)
    assert nearest_similarity(empty, empty).tolist() == [1.0]  # as in MOSES


def test_packed_texts(monkeypatch):
    texts = ["CCO", "CCO", "", "CCOC" * 40, "CCOC" * 40 + "N", "c1ccccc1", "[O-]"]
    packed = pack(texts)
    assert unpack(packed) == sorted(texts)
    for damaged in (
        packed[:-3], np.append(packed, packed), np.roll(packed, 1), np.zeros(0, np.uint8),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"compressed|cut off"):
            unpack(damaged)
    monkeypatch.setattr("molgen_energy.metrics.packed_text._MOST_BYTES", 20)
    with pytest.raises(ValueError, match="too long"):
        unpack(packed)


def test_the_bundled_statistics():
    """Small files with a SMILES of each valid molecule, and what real molecules reach."""
    assert all(asset(one.statistics).stat().st_size <= 2_000_000 for one in BUNDLED.values())
    qm9 = BUNDLED["qm9"].load()
    valid, distinct = (qm9.evaluation.rates[key].count for key in ("validity", "uniqueness"))
    assert distinct - 200 < len(qm9.smiles) <= valid
    # JODO's table of all training molecules with their own bonds: 0.490, 0.992 and 0.946.
    for key, published in zip(SIMILARITY_KEYS, (0.490, 0.992, 0.946), strict=True):
        assert qm9.distances.estimates[key].value == pytest.approx(published, abs=0.006)
    single = BUNDLED["ccd"].load("single", "edm")
    assert not single.smiles and not set(SIMILARITY_KEYS) & set(single.distances.estimates)
    same = single.evaluation.rates["same_bonds"]
    assert (same.count, same.total) == (704, 4639)
