"""Noise that depends on a seed and on the number of a molecule, not on the batch it is in.

Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011): four random words are a function of a key and a counter, so all of a batch are
computed at once, on any device, with the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four tensors of random 32-bit words (int64) from counters (broadcast together) and a key."""
    zero = sum(counter) * 0  # of the shape that all broadcast to
    a, b, c, d = (word + zero for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit words fits 64 bits; the mask undoes the sign of int64.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _WORD) ^ b ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ d ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [a, b, c, d]


class SeededNoise:
    """Random numbers for molecules of given numbers.

    Parameters
    ----------
    seed
        At most 64 bits count.
    numbers
        (B,) int64, the number of each molecule; at most 2³².
    """

    def __init__(self, seed: int, numbers: Tensor) -> None:
        self.key = (seed & _WORD, (seed >> 32) & _WORD)
        self.numbers = numbers

    def _words(self, stream: int, items: int) -> Tensor:
        """Words (B, items·4) of a stream, a number for each purpose and step."""
        counter = (
            torch.arange(items, device=self.numbers.device)[None],
            torch.zeros((), dtype=torch.long, device=self.numbers.device),
            torch.full((), stream, dtype=torch.long, device=self.numbers.device),
            self.numbers[:, None],
        )
        return torch.stack(philox(counter, self.key), dim=-1).flatten(1)

    def uniform(self) -> Tensor:
        """One number in [0, 1) for each molecule, (B,) float32; its own stream."""
        return (self._words(_WORD, 1)[:, 0] >> 8).float() * 2.0**-24

    def normal(self, step: int, atoms: int, channels: int) -> Tensor:
        """Standard normal numbers (B, atoms, channels), float32, by Box and Muller.

        Those of an atom depend on the seed, the molecule, the step and the atom's number alone.
        """
        blocks = -(-channels // 4)
        words = self._words(step, atoms * blocks).view(len(self.numbers), atoms, blocks * 4)
        first, second = words[..., 0::2], words[..., 1::2]
        # 24 bits each, in (0, 1], so that the logarithm is finite
        radius = torch.sqrt(-2 * torch.log(((first >> 8) + 1).float() * 2.0**-24))
        angle = (second >> 8).float() * (2 * math.pi * 2.0**-24)
        pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        return pairs.flatten(2)[..., :channels]
