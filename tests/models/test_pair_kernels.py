"""Triton's kernels: on the CPU through its interpreter, and on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molgen_energy.models import pair_network

pytest.importorskip("triton")
CHECK = Path(__file__).parent / "pair_kernels_check.py"


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_are_the_textbook_formula(device: str) -> None:
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(CHECK), device], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {result["case"][2] for result in found.values()} == set(pair_network._KERNEL_WIDTHS)
    for name, result in found.items():
        _, _, _, features, channels, bias, *fused = result["case"]
        wanted = bool(fused) and fused[1]
        # Two results, and gradients of two states and five weights, less those that are empty.
        assert len(result["errors"]) == 6 + bool(features) + bool(channels) + bias + wanted, name
        # The interpreter cuts bfloat16 off, not rounds it; fused kernels do that more often.
        bound = {"low precision": 2e-2, "fused, low precision": 3e-2}.get(name, 2e-6)
        assert max(result["errors"]) < bound, (name, result["errors"])


def test_on_a_cpu_blocks_are_taken() -> None:
    states = torch.randn(2, 5, 64)
    assert pair_network._function(states, None, True, torch.bfloat16, 1) is pair_network._in_blocks


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_taken_where_they_serve() -> None:
    from molgen_energy.models.pair_kernels import GatedSums

    def taken(states: torch.Tensor, features: torch.Tensor | None = None, gated: bool = True):
        return pair_network._function(states, features, gated, states.dtype, 1)

    states = torch.randn(2, 5, 64, device="cuda")
    assert taken(states) == GatedSums.apply
    for refused in (taken(states[..., :48].contiguous()), taken(states, gated=False)):
        assert refused is pair_network._in_blocks
    wanted = torch.randn(2, 5, 5, 3, device="cuda", requires_grad=True)
    assert taken(states, wanted) is pair_network._in_blocks
