"""Stereocentres of molecules from their positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import of_smiles
from rdkit import Chem

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.metrics.checks.chirality import count_stereocentres, stereocentres_failed
from molgen_energy.metrics.molecule_evaluation import evaluate_source
from molgen_energy.metrics.options import EvaluationOptions, with_types
from molgen_energy.metrics.sources import FileSource
from molgen_energy.workers import WorkerPool


def chunk_of(molecules):
    return MoleculeChunk(np.arange(len(molecules)), perceive(molecules))


def mirrored(molecules):
    return replace(molecules, positions=molecules.positions * np.array([1, 1, -1], "f4"))


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("C[C@H](O)F", None),
        ("C[C@@H](O)F", None),
        ("C[C@H](N)[C@@H](C)O", None),
        ("C1[C@H](O)CO[C@@H]1C", None),
        ("CCO", (0, 0)),
        ("OO", (0, 0)),  # chiral, without a stereocentre
        ("C[C@H](O)[C@@H](F)[C@@H](C)O", (1, 1)),  # and a pseudoasymmetric one
    ],
)
def test_labels_are_those_of_the_smiles(smiles, expected):
    """Which RDKit reads without positions."""
    labels = [k for _, k in Chem.FindMolChiralCenters(Chem.MolFromSmiles(smiles))]
    expected = expected or (labels.count("R"), labels.count("S"))
    found = count_stereocentres(chunk_of(Molecules.from_list([of_smiles(smiles)])))
    assert found == [expected]


def test_a_mirror_image_exchanges_r_and_s(molecules):
    some = molecules.select(np.arange(0, 2000, 5))
    ours = count_stereocentres(chunk_of(some))
    assert [(s, r) for r, s in ours] == count_stereocentres(chunk_of(mirrored(some)))
    assert sum(map(sum, ours)) > 300


def test_broken_molecules_have_none(molecules):
    crowded = molecules.select(np.arange(3))
    crowded = replace(crowded, positions=0.1 * crowded.positions)
    assert count_stereocentres(chunk_of(crowded)) == [(0, 0)] * 3
    assert stereocentres_failed(chunk_of(crowded), "timed out") == [(0, 0)] * 3


def test_the_rate_is_of_the_stereocentres_of_complete_molecules(sample_path):
    options = EvaluationOptions(frozenset({"rates", "geometry"}), subset=10_000)
    source = FileSource(sample_path, "valid")
    evaluation = evaluate_source("x", source, with_types(options, None), None, WorkerPool(0))
    complete = Molecules.from_list(
        [selected.molecule for selected in evaluation.accumulator.random_complete]
    )
    counts = np.array(count_stereocentres(chunk_of(complete)))
    rate = evaluation.rates["stereocentres_r"]
    assert (rate.count, rate.total) == (counts[:, 0].sum(), counts.sum())
    assert rate.effect >= 1
    assert rate.interval[0] < 0.5 < rate.interval[1]
    rates_only = EvaluationOptions(frozenset({"rates"}))
    other = evaluate_source("x", source, with_types(rates_only, None), None, WorkerPool(0))
    assert other.rates["stereocentres_r"] is None
