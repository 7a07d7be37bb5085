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

from molgen_energy.models import fused_kernels, pair_kernels
from molgen_energy.models.fused_kernels import FusedSums, Tile
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

FUSED_CASES = {
    # and whether there are gates, and features get a gradient
    "fused": (2, 7, 64, 12, 8, True, torch.float32, True, False),
    "fused, wide": (1, 3, 256, 5, 1, True, torch.float32, True, False),
    "fused, parts": (1, 17, 32, 0, 0, False, torch.float32, True, False),
    "fused, one atom": (4, 1, 32, 17, 15, True, torch.float32, True, False),
    "fused, values": (2, 6, 32, 2, 1, False, torch.float32, False, True),
    "fused, gradients of features": (2, 4, 32, 2, 0, True, torch.float32, True, True),
    "fused, low precision": (2, 7, 128, 12, 8, True, torch.bfloat16, True, True),
}
INTERPRETED = {"fused, parts": (Tile(16, 1), Tile(16, 1), Tile(16, 1), 16)}
"""Smaller tiles in the interpreter: of two parts, where the GPU has one."""


def textbook(
    receiver: Tensor,
    sender: Tensor,
    features: Tensor | None,
    pairs: Tensor | None,
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
    if pairs is None:
        return numbers[..., 0], numbers[..., 1:]
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
    gated: bool = True,
    wanted: bool = False,
    kernels: type[torch.autograd.Function] = GatedSums,
) -> list[float]:
    """Largest errors of results and gradients, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(batch + atoms)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    states = [drawn(batch, atoms, width), drawn(batch, atoms, width)]
    weights = [
        drawn(width, width) / width**0.5, drawn(width), drawn(1 + channels, width) / width**0.5,
        drawn(1 + channels) if biased else None, drawn(width, count) if count else None,
    ]  # fmt: skip
    features = drawn(batch, atoms, atoms, count) if count else None
    pairs = (drawn(batch, atoms, atoms) > -0.5).float() if gated else None
    outer = drawn(batch, atoms, width if gated else atoms), drawn(batch, atoms, atoms, channels)

    def put(tensor: Tensor | None, like: Tensor, leaf: bool = True) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(like).requires_grad_(leaf)

    found = []
    for like in (torch.empty(0, device=device), torch.empty(0, dtype=torch.float64)):
        own, ours = [put(t, like) for t in states], [put(t, like) for t in weights]
        given = put(features, like, wanted), put(pairs, like, False)
        if like.dtype == torch.float32:
            results = kernels.apply(*own, *given, dtype, *ours)
        else:
            results = textbook(*own, *given, *ours)
        torch.autograd.backward(results, [put(t, like, False) for t in outer])
        every = [
            *results,
            *(t.grad for t in (*own, *ours, given[0]) if t is not None and t.requires_grad),
        ]
        found.append([t.detach().cpu().double() for t in every])
    return [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(*found, strict=True)
        if b.numel()
    ]


if __name__ == "__main__":
    device, found, default = sys.argv[1], {}, pair_kernels._PROGRAMS
    for name, case in CASES.items():
        pair_kernels._PROGRAMS = PROGRAMS.get(name, default)
        found[name] = {"case": case[:-1], "errors": errors(device, *case)}
    names = ("_FORWARD", "_MESSAGE", "_HIDDEN", "_SENDERS")
    tiles = tuple(getattr(fused_kernels, name) for name in names)
    for name, case in FUSED_CASES.items():
        chosen = INTERPRETED.get(name, tiles) if device == "cpu" else tiles
        for key, value in zip(names, chosen, strict=True):
            setattr(fused_kernels, key, value)
        kept = [*case[:6], *case[7:]]
        found[name] = {"case": kept, "errors": errors(device, *case, kernels=FusedSums)}
    print(json.dumps(found))
