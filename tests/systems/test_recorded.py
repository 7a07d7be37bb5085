"""Evaluations of a network that a GPU records, on the CPU by a recorder that lists operations."""

from __future__ import annotations

import pytest
import torch
from graph_recorder import ListRecorder
from runs import CPU, run_command

from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.pretrained import weights_directory


@pytest.mark.parametrize("sampler", ["ancestral", "dpm++"])
def test_recorded_evaluations_draw_the_same_molecules(sampler):
    checkpoint = load_checkpoint(weights_directory() / "qm9_energy")
    generator = MoleculeGenerator(checkpoint, CPU, sizes=(3, 4), sampler=sampler, steps=3)
    recorder = ListRecorder()
    drawn = []
    for generator._recorder in (None, recorder):
        drawn += [generator.draw(torch.arange(start, start + 2)) for start in (0, 2)]
    assert recorder.recorded == 2
    for plain, recorded in zip(drawn[:2], drawn[2:], strict=True):
        assert (plain.positions == recorded.positions).all()
        assert (plain.atomic_numbers == recorded.atomic_numbers).all()


def test_graphs_are_for_a_gpu(tmp_path, monkeypatch, capsys):
    command = ["sample", "-n", "1", "--cuda-graphs", "--device", "cpu", "-o", tmp_path / "a.sdf"]
    assert run_command(command, monkeypatch) == 2
    assert "--cuda-graphs is for GPUs, not cpu; leave it out" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_repeats_evaluations():
    checkpoint = load_checkpoint(weights_directory() / "qm9_energy")
    drawn = [
        MoleculeGenerator(
            checkpoint, torch.device("cuda"), sampler="dpm++", steps=8, cuda_graphs=recorded
        ).draw(torch.arange(16))
        for recorded in (False, True)
    ]
    torch.testing.assert_close(*(torch.from_numpy(x.positions) for x in drawn), rtol=0, atol=1e-3)
