"""Low precision on a CPU: when it is used, and that faster products are the same function."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from molgen_energy.models import pair_network, precision
from molgen_energy.models.pair_network import PairNetwork
from molgen_energy.models.precision import is_bfloat16_faster

CPU = torch.device("cpu")


@pytest.fixture
def by_onednn():
    """Float32 products by oneDNN, as on an AMD processor with AVX-512."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("block", [1 << 18, 5000])
@pytest.mark.parametrize(("low_precision", "tolerance"), [(False, 1e-5), (True, 0.02)])
@pytest.mark.parametrize("channels", [0, 8])
def test_without_gradients_the_same(
    monkeypatch, by_onednn, channels, low_precision, tolerance, block
):
    """Against float64 with its gradient recorded, which takes the plain operations."""
    monkeypatch.setattr(pair_network, "_BLOCK_PER_THREAD", block)
    torch.manual_seed(0)
    network = PairNetwork(32, 5, channels=channels)
    h, e = torch.randn(7, 9, 32), torch.rand(7, 9, 9, 5)
    pairs = (torch.rand(7, 9, 9) < 0.8).float()
    with torch.no_grad():
        ours = network.gated_sum_and_channels(h, pairs, e, low_precision)
    exact = network.double().gated_sum_and_channels(h.double(), pairs.double(), e.double())
    assert exact[0].requires_grad
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == torch.float32
        if found.numel():
            assert (found - expected).abs().max() < tolerance * expected.std()


def test_onednn_computes_silu_in_a_product(by_onednn):
    """Where it does; elsewhere there is nothing to compare."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        if pair_network._fuses_silu(CPU, dtype):
            forward = pair_network._Forward(
                torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), None,
                torch.randn(64, 64) / 8, torch.randn(64), None, dtype,
            )  # fmt: skip
            hidden = torch.randn(2, 3, 4, 64, dtype=dtype)
            plain = torch.empty_like(hidden)
            forward.linear(hidden, plain)
            expected = F.silu(plain.double())
            difference = forward.activated(hidden).double() - expected
            assert difference.norm() < tolerance * expected.norm()


def test_what_pytorch_does_not_have_is_not_used(monkeypatch):
    pair_network._has_fused_silu.cache_clear()
    monkeypatch.setattr(pair_network, "has_onednn", lambda: False)
    assert not pair_network._fuses_silu(CPU, torch.bfloat16)
    pair_network._has_fused_silu.cache_clear()
    monkeypatch.setattr(precision, "has_onednn", lambda: False)
    assert not is_bfloat16_faster(CPU, training=False)


@pytest.mark.parametrize(
    ("speedup", "sampling", "training"), [(0.6, 0, 0), (1.2, 0, 0), (1.9, 1, 0), (4, 1, 1)]
)
def test_margins(monkeypatch, speedup, sampling, training):
    monkeypatch.setattr(precision, "_speedup_of_cpu", lambda: speedup)
    assert is_bfloat16_faster(CPU, training=False) == sampling
    assert is_bfloat16_faster(CPU, training=True) == training


def test_the_measurement_is_of_one_thread_and_repeatable(monkeypatch):
    threads = torch.get_num_threads()
    precision._speedup_of_cpu.cache_clear()
    first = precision._speedup_of_cpu()
    precision._speedup_of_cpu.cache_clear()
    assert 0 < first < 100
    assert (first > 1.4) == (precision._speedup_of_cpu() > 1.4)
    assert torch.get_num_threads() == threads
