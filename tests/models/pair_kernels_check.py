"""Compare gated sums by Triton's kernels with the textbook formula in float64.

    TRITON_INTERPRET=1 python tests/models/pair_kernels_check.py cpu   # through the interpreter
    python tests/models/pair_kernels_check.py cuda

A program, because Triton reads TRITON_INTERPRET when it is imported. Prints the cases and the
relative errors of results and gradients as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.models import pair_kernels
from molgen_energy.models.pair_kernels import GatedSums

CASES = {
    # B, N, W, K, C, whether numbers have a bias, precision
    "features": (3, 7, 32, 12, 8, True, torch.float32),
    "plain": (2, 19, 64, 0, 0, False, torch.float32),
    "two parts": (1, 33, 32, 3, 2, True, torch.float32),
    "full padding": (1, 5, 32, 16, 15, True, torch.float32),
    "next padding": (1, 5, 32, 17, 16, True, torch.float32),
    "width 128": (1, 3, 128, 5, 1, True, torch.float32),
    "width 256": (1, 3, 256, 5, 1, True, torch.float32),
    "width 512": (1, 3, 512, 5, 1, True, torch.float32),
    "few programs": (2, 11, 32, 4, 3, True, torch.float32),
    "one atom": (4, 1, 32, 12, 8, True, torch.float32),
    "low precision": (2, 9, 32, 12, 8, True, torch.bfloat16),
}
PROGRAMS = {"few programs": 3}
"""Programs of the kernel that sums over all pairs, where each must do several tiles of them."""


def textbook(
    receiver: Tensor,
    sender: Tensor,
    features: Tensor | None,
    pairs: Tensor,
    *weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weight, bias, read, offset, feature = weights
    p = receiver[:, :, None] + sender[:, None]
    if features is not None:
        p = p + features @ feature.t()
    message = F.silu(F.silu(p) @ weight.t() + bias)
    numbers = message @ read.t()
    if offset is not None:
        numbers = numbers + offset
    gate = pairs * numbers[..., 0].sigmoid()
    return (gate[..., None] * message).sum(dim=2), numbers[..., 1:]


def errors(
    device: str,
    batch: int,
    atoms: int,
    width: int,
    count: int,
    channels: int,
    biased: bool,
    dtype: torch.dtype,
) -> list[float]:
    generator = torch.Generator().manual_seed(batch + atoms)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    states = [drawn(batch, atoms, width), drawn(batch, atoms, width)]
    weights = [
        drawn(width, width) / width**0.5, drawn(width), drawn(1 + channels, width) / width**0.5,
        drawn(1 + channels) if biased else None, drawn(width, count) if count else None,
    ]  # fmt: skip
    features = drawn(batch, atoms, atoms, count) if count else None
    pairs = (drawn(batch, atoms, atoms) > -0.5).float()
    outer = drawn(batch, atoms, width), drawn(batch, atoms, atoms, channels)

    def put(tensor: Tensor | None, like: Tensor, leaf: bool = True) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(like).requires_grad_(leaf)

    found = []
    for like in (torch.empty(0, device=device), torch.empty(0, dtype=torch.float64)):
        own, ours = [put(t, like) for t in states], [put(t, like) for t in weights]
        given = put(features, like, False), put(pairs, like, False)
        if like.dtype == torch.float32:
            results = GatedSums.apply(*own, *given, dtype, *ours)
        else:
            results = textbook(*own, *given, *ours)
        torch.autograd.backward(results, [put(t, like, False) for t in outer])
        every = [*results, *(t.grad for t in (*own, *ours) if t is not None)]
        found.append([t.detach().cpu().double() for t in every])
    return [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(*found, strict=True)
        if b.numel()
    ]


if __name__ == "__main__":
    found, default = {}, pair_kernels._PROGRAMS
    for name, case in CASES.items():
        pair_kernels._PROGRAMS = PROGRAMS.get(name, default)
        found[name] = {"case": case[:-1], "errors": errors(sys.argv[1], *case)}
    print(json.dumps(found))
