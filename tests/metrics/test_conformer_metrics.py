"""Coverage and matching of conformers, against their definitions and a search by brute force."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

import molgen_energy as mg
from molgen_energy.chemistry.geometry import rmsd
from molgen_energy.errors import InputError
from molgen_energy.metrics.conformers import ConformerScores, conformer_rmsd, heavy_atoms


def conformers(smiles: str, count: int, seed: int = 0) -> list[Chem.Mol]:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    ids = rdDistGeom.EmbedMultipleConfs(molecule, count, randomSeed=seed)
    return [Chem.Mol(molecule, confId=k) for k in ids]


def test_the_rmsd_is_the_least_over_all_symmetries():
    """Of propan-2-yl and phenyl: ends of the chain and sides of the ring exchange places."""
    smiles = "CC(C)Cc1ccccc1"
    found = [heavy_atoms(m) for m in conformers(smiles, 4)]
    symmetries = []
    bonds = {frozenset((b.GetBeginAtomIdx(), b.GetEndAtomIdx())) for b in found[0].GetBonds()}
    for ends, sides in product(permutations((0, 2)), permutations((5, 9))):
        inner = (6, 8) if sides == (5, 9) else (8, 6)
        order = [ends[0], 1, ends[1], 3, 4, sides[0], inner[0], 7, inner[1], sides[1]]
        assert {frozenset((order[i], order[j])) for i, j in bonds} == bonds
        symmetries.append(order)
    x = [m.GetConformer().GetPositions() for m in found]
    expected = [[min(rmsd(a[order], b) for order in symmetries) for b in x[2:]] for a in x[:2]]
    np.testing.assert_allclose(conformer_rmsd(found[:2], found[2:]), expected, atol=1e-6)
    turned = Chem.RenumberAtoms(found[2], [9, 3, 1, 0, 2, 8, 7, 6, 5, 4])
    np.testing.assert_allclose(conformer_rmsd(found[:2], [turned])[:, 0], np.array(expected)[:, 0])
    with pytest.raises(ValueError, match="samples and references are different molecules"):
        conformer_rmsd(found[:1], [heavy_atoms(conformers("CCO", 1)[0])])


def test_scores_are_those_of_the_definitions():
    generator = np.random.default_rng(0)
    rmsd_of = tuple(generator.uniform(0, 2, (4, k)) for k in (1, 2, 3))
    scores = ConformerScores(("C", "CC", "CCC"), rmsd_of, 0.6)
    for number, values in enumerate(rmsd_of):
        k, size = values.shape
        best = [min(values[i, j] for i in range(k)) for j in range(size)]
        nearest = [min(values[i, j] for j in range(size)) for i in range(k)]
        assert scores.coverage_recall[number] == sum(b <= 0.6 for b in best) / size
        assert scores.matching_recall[number] == pytest.approx(sum(best) / size)
        assert scores.coverage_precision[number] == sum(b <= 0.6 for b in nearest) / k
        assert scores.matching_precision[number] == pytest.approx(sum(nearest) / k)
    assert scores.with_threshold(3).to_dict()["COV-R mean"] == 1
    lines = str(scores).splitlines()
    assert lines[-1] == "3 molecules, threshold 0.6 Å"
    assert f"{100 * scores.coverage_recall.mean():.1f}" in lines[1]
    assert f"{np.median(scores.matching_precision):.3f}" in lines[4]


def test_conformers_of_files_and_molecules_are_brought_together(tmp_path):
    reference = conformers("CCCO", 2) + conformers("c1ccccc1C", 1) + conformers("CO", 1)
    samples = conformers("OCCC", 3, seed=5) + conformers("Cc1ccccc1", 2) + conformers("CC", 1)
    scores = mg.compare_conformers(samples, reference, 0.5)
    assert scores.smiles == ("CCCO", "Cc1ccccc1")
    assert [values.shape for values in scores.rmsd] == [(3, 2), (2, 1)]
    assert (scores.without_samples, scores.without_reference) == (1, 1)
    assert "1 molecules of the reference have no sample" in str(scores)
    # The conformer of toluene is rigid, of the same molecule as one with other atom numbers.
    assert scores.coverage_precision[1] == 1
    writer = Chem.SDWriter(str(tmp_path / "reference.sdf"))
    for molecule in reference:
        writer.write(molecule)
    writer.close()
    again = mg.compare_conformers(samples, tmp_path / "reference.sdf", 0.5)
    for ours, theirs in zip(again.rmsd, scores.rmsd, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_conformers_that_cannot_be_compared(tmp_path):
    molecules = conformers("CCO", 1)
    (tmp_path / "bare.xyz").write_text("1\n\nHe 0 0 0\n")
    for samples, reference, threshold, message in (
        (molecules, conformers("CCC", 1), 1.25, "no sample belongs to a molecule of the reference"),
        (molecules, molecules, 0, "threshold 0: expected a length above 0"),
        (molecules, [Chem.MolFromSmiles("CCO")], 1, "molecule 1 of reference: no coordinates"),
        (tmp_path / "bare.xyz", molecules, 1, "bare.xyz has no bonds"),
        (tmp_path / "none.sdf", molecules, 1, "none.sdf"),
    ):
        with pytest.raises(InputError, match=message):
            mg.compare_conformers(samples, reference, threshold)
