"""Whether the work on pairs of atoms is faster in bfloat16 on a device."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.models.pair_network import has_onednn

_ROWS, _WIDTH = 1024, 256  # of the timed product, the one of `PairNetwork`
_ROUNDS = 8
# How many times as fast this product must be. Measured: 1.9 with AVX512_BF16 on a Zen 4, where all
# work on pairs is then 1.4 times as fast in sampling and 1.2 times in training; 0.6 with
# AVX512_BF16 on a Xeon; 0.3 where bfloat16 is emulated. The margins are far from these, so that a
# machine decides alike each time. For training it takes tiles (AMX), which compute far more.
_MARGIN, _MARGIN_TRAINING = 1.4, 3.0


def is_bfloat16_faster(device: torch.device, training: bool) -> bool:
    """Whether networks with wide messages are faster with their work on pairs in bfloat16.

    With `training` gradients are computed, too. A CPU is timed, once a process, in about 20 ms:
    processors with the same instructions differ.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not has_onednn():
        return False
    return _speedup_of_cpu() >= (_MARGIN_TRAINING if training else _MARGIN)


@lru_cache
def _speedup_of_cpu() -> float:
    """Time of a product in float32, divided by that in bfloat16, on one core."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, _WIDTH, generator=generator)
    matrix = torch.randn(_WIDTH, _WIDTH, generator=generator)
    rough_rows, rough_matrix = rows.bfloat16(), matrix.bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # In turns, and the fastest of each: other processes may use the cores.
        times = [
            (_seconds(rows, matrix), _seconds(rough_rows, rough_matrix)) for _ in range(_ROUNDS + 1)
        ]
    finally:
        torch.set_num_threads(threads)
    exact, rough = (min(column) for column in zip(*times[1:], strict=True))
    return float(exact / rough)


@torch.no_grad()
def _seconds(rows: Tensor, matrix: Tensor) -> float:
    """Processor time of this thread for a product."""
    began = time.thread_time()
    F.linear(rows, matrix)
    return time.thread_time() - began
