"""Random numbers that depend on a seed, the sample, the field and the noise level alone.

Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011): four random words are a function of a key and a counter, so that all numbers of a
batch are computed at once, on any device, with the same bits. The key is the seed; the counter
holds the sample, the level, the domain, and the atom or pair with the channel. A sample therefore
gets the same numbers in every batch, on every process and for every padding. Training and sampling
draw noise, levels, sizes, rotations and random graphs from this generator.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from molgen_energy.diffusion.state import DOMAINS, Domain, Layout, State

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """Streams of one number for each sample, far above all noise levels, which start at 0."""

    SIZE = _WORD
    LEVEL = _WORD - 1
    STRATUM = _WORD - 2
    EDGES = _WORD - 3
    ROTATION = _WORD - 4
    CONDITION = _WORD - 5
    CONDITION_DROPOUT = _WORD - 6
    SELF_CONDITION = _WORD - 7
    START = _WORD - 8
    """Of the noise that samplers in continuous time start with."""
    LOWER_LEVEL = _WORD - 9
    """Of the second level of distillation."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four tensors of random 32-bit words (int64) from counters (broadcast together) and a key."""
    a, b, c, d = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    device = a.device
    # Both multiplications of a round are one operation on stacked words. The halves swap places
    # in every round, and multipliers and keys swap with them.
    first, second = torch.stack([a, c]), torch.stack([b, d])
    shape = (2, *[1] * a.ndim)
    multipliers = torch.tensor(_MULTIPLIERS, device=device).view(shape)
    k0, k1 = key
    for turn in range(_ROUNDS):
        keys = torch.tensor([k1, k0] if turn % 2 == 0 else [k0, k1], device=device).view(shape)
        product = first * multipliers
        # The product of two 32-bit words fits 64 bits; the mask undoes the sign of int64.
        first = ((product >> 32) & _WORD) ^ second.flip(0) ^ keys
        second = product & _WORD
        multipliers = multipliers.flip(0)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [first[0], second[0], first[1], second[1]]  # an even number of rounds: as at the start


def pair_numbers(atoms: int, device: torch.device) -> Tensor:
    """A number for each ordered pair of atoms, (N, N), independent of N (pairing of M. Szudzik)."""
    i = torch.arange(atoms, device=device)[:, None]
    j = torch.arange(atoms, device=device)[None]
    return torch.where(i >= j, i * i + i + j, j * j + i)


class RandomNumbers:
    """Random numbers for a batch of samples.

    Parameters
    ----------
    seed
        An integer of 64 bits.
    samples
        (B,) int64, the number that identifies each sample, below 2³².
    population
        Number of samples in all shards of the batch; None is B. Stratified numbers
        require that `samples` are below it.
    """

    def __init__(self, seed: int, samples: Tensor, population: int | None = None) -> None:
        self.seed = seed
        self._key = (seed & _WORD, (seed >> 32) & _WORD)
        self.samples = samples
        self.population = len(samples) if population is None else population

    def _words(self, stream: int, items: Tensor, domain: int = 0) -> Tensor:
        """Words (B, items, 4) of a stream."""
        device = self.samples.device
        counter = (
            items[None],
            torch.full((), domain, device=device),
            torch.full((), stream, device=device),
            self.samples[:, None],
        )
        return torch.stack(philox(counter, self._key), dim=-1)

    def _single(self, stream: Stream) -> Tensor:
        """Words (B, 4)."""
        return self._words(stream, torch.zeros(1, dtype=torch.long, device=self.samples.device))[
            :, 0
        ]

    def uniform(self, stream: Stream) -> Tensor:
        """A number in [0, 1) for each sample, (B,) float32."""
        return (self._single(stream)[:, 0] >> 8).float() * 2.0**-24

    def stratified(self, stream: Stream) -> Tensor:
        """A number in [0, 1) for each sample, (B,) float32, stratified over the population.

        Each of the `population` equal parts of the interval holds the number of one sample.
        """
        everyone = torch.arange(self.population, device=self.samples.device)
        order = RandomNumbers(self.seed, everyone)._single(Stream.STRATUM)[:, 0].argsort()
        stratum = torch.empty_like(order)
        stratum[order] = everyone
        return (stratum[self.samples] + self.uniform(stream)) / self.population

    def integers(self, stream: Stream) -> Tensor:
        """A number in [0, 2⁶²) for each sample, (B,) int64."""
        words = self._single(stream)
        return ((words[:, 0] & (_WORD >> 2)) << 32) | words[:, 1]

    def quaternions(self) -> Tensor:
        """Four standard normal numbers for each sample, (B, 4) float32."""
        return _box_muller(self._single(Stream.ROTATION))

    def noise(self, layout: Layout, mask: Tensor, level: int) -> State:
        """Standard normal noise on the subspaces of a layout's fields.

        Parameters
        ----------
        layout
            The fields.
        mask
            (B, N), true at real atoms.
        level
            Noise level, at least 0. Each level has its own numbers.
        """
        tensors = {
            domain: layout.standard_noise(domain, self._normal(layout, domain, mask, level), mask)
            for domain in layout.channels
        }
        return State(layout, mask, tensors)

    def _normal(self, layout: Layout, domain: Domain, mask: Tensor, level: int) -> Tensor:
        """Independent standard normal numbers of the shape of a domain's tensor, float32."""
        shape = layout.shape(domain, mask)
        channels, atoms, device = shape[-1], mask.shape[1], mask.device
        blocks = -(-channels // 4)
        places = {
            "atom": lambda: torch.arange(atoms, device=device),
            "pair": lambda: pair_numbers(atoms, device).flatten(),
            "graph": lambda: torch.zeros(1, dtype=torch.long, device=device),
        }[domain]()
        items = (places[:, None] * blocks + torch.arange(blocks, device=device)).flatten()
        words = self._words(level, items, DOMAINS.index(domain))
        normal = _box_muller(words).reshape(len(self.samples), len(places), blocks * 4)
        return normal[..., :channels].reshape(shape)


def _box_muller(words: Tensor) -> Tensor:
    """Standard normal numbers (…, 4) float32 of random words (…, 4)."""
    first, second = words[..., 0::2], words[..., 1::2]
    # 24 bits each, the first in (0, 1], so that the logarithm is finite.
    radius = torch.sqrt(-2 * torch.log(((first >> 8) + 1).float() * 2.0**-24))
    angle = (second >> 8).float() * (2 * math.pi * 2.0**-24)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(-2)
