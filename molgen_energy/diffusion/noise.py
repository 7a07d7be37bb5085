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
from functools import cached_property, lru_cache
from typing import NamedTuple

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
    STUDENT = _WORD - 10
    """Whether a student learns from a batch."""
    SINGLE_DROPOUT = _WORD - 11
    """Which single properties of a condition are withheld."""
    WANTED = _WORD - 12
    """Values of properties in the ranges that were asked for."""


class _Constants(NamedTuple):
    """Of the ten rounds, on a device: copying them at every call would make a GPU wait."""

    multipliers: Tensor
    """(10, 2)."""
    order: Tensor
    """Which words of the key a round takes, (10, 2)."""
    steps: Tensor
    """What is added to them, (10, 2)."""


@lru_cache
def _constants(device: torch.device) -> _Constants:
    # The halves of the counter swap places in every round, and multipliers and keys with them.
    turns = range(_ROUNDS)
    order = [(1, 0) if turn % 2 == 0 else (0, 1) for turn in turns]
    multipliers = [[_MULTIPLIERS[1 - word] for word in words] for words in order]
    steps = [[turn * _KEY_STEPS[k] for k in order[turn]] for turn in turns]
    return _Constants(*(torch.tensor(rows, device=device) for rows in (multipliers, order, steps)))


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int] | Tensor
) -> list[Tensor]:
    """Four tensors of random 32-bit words (int64) from counters (broadcast together) and a key.

    The key is two words, or a tensor of them on the device, (2,) int64.
    """
    a, b, c, d = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    if not isinstance(key, Tensor):
        key = _key_on(key, a.device)
    constants = _constants(a.device)
    shape = (_ROUNDS, 2, *[1] * a.ndim)
    keys = ((key[constants.order] + constants.steps) & _WORD).view(shape)
    multipliers = constants.multipliers.view(shape)
    # Both multiplications of a round are one operation on stacked words.
    first, second = torch.stack([a, c]), torch.stack([b, d])
    for turn in range(_ROUNDS):
        product = first * multipliers[turn]
        # The product of two 32-bit words fits 64 bits; the mask undoes the sign of int64.
        first = ((product >> 32) & _WORD).bitwise_xor_(second.flip(0)).bitwise_xor_(keys[turn])
        second = product & _WORD
    return [first[0], second[0], first[1], second[1]]  # an even number of rounds: as at the start


def _key_on(key: tuple[int, int], device: torch.device) -> Tensor:
    """A key on a device, filled there: a copy would make a GPU wait."""
    words = torch.full((2,), key[0], device=device)
    words[1].fill_(key[1])
    return words


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
        An integer of 64 bits; or its lower and upper 32 bits on the device of the samples,
        (2,) int64.
    samples
        (B,) int64, the number that identifies each sample, below 2³².
    population
        Number of samples in all shards of the batch; None is B. Stratified numbers
        require that `samples` are below it.
    """

    def __init__(self, seed: int | Tensor, samples: Tensor, population: int | None = None) -> None:
        self.seed = seed
        self.samples = samples
        self.population = len(samples) if population is None else population

    @cached_property
    def key(self) -> Tensor:
        """The lower and upper 32 bits of the seed, on the device of the samples, (2,) int64."""
        if isinstance(self.seed, Tensor):
            return self.seed
        return _key_on((self.seed & _WORD, (self.seed >> 32) & _WORD), self.samples.device)

    def _words(self, streams: int | Tensor, items: int | Tensor, domain: int = 0) -> Tensor:
        """Words (B, K, 4) of K items of a stream, or of one item of K streams."""
        device = self.samples.device
        item, place, stream = (
            values[None] if isinstance(values, Tensor) else torch.full((), values, device=device)
            for values in (items, domain, streams)
        )
        counter = item, place, stream, self.samples[:, None]
        return torch.stack(philox(counter, self.key), dim=-1)

    @cached_property
    def _singles(self) -> Tensor:
        """Words (B, S, 4) of all streams of one number, computed together."""
        streams = torch.arange(_WORD, _WORD - len(Stream), -1, device=self.samples.device)
        return self._words(streams, 0)

    def _single(self, stream: Stream) -> Tensor:
        """Words (B, 4)."""
        return self._singles[:, _WORD - stream]

    def uniform(self, stream: Stream) -> Tensor:
        """A number in [0, 1) for each sample, (B,) float32."""
        return (self._single(stream)[:, 0] >> 8).float() * 2.0**-24

    def uniforms(self, stream: Stream, count: int) -> Tensor:
        """Some numbers in [0, 1) for each sample, (B, count) float32."""
        words = self._words(stream, torch.arange(count, device=self.samples.device))
        return (words[..., 0] >> 8).float() * 2.0**-24

    def uniform_of_batch(self, stream: Stream) -> float:
        """A number in [0, 1) for all samples together, the same in all shards of a batch."""
        # On the CPU, since Python would wait for the number of another device.
        one = RandomNumbers(self.seed, torch.zeros(1, dtype=torch.long))
        return float(one.uniform(stream))

    def stratified(self, stream: Stream) -> Tensor:
        """A number in [0, 1) for each sample, (B,) float32, stratified over the population.

        Each of the `population` equal parts of the interval holds the number of one sample.
        """
        everyone = torch.arange(self.population, device=self.samples.device)
        words = RandomNumbers(self.key, everyone)._words(Stream.STRATUM, everyone[:1])
        order = words[:, 0, 0].argsort()
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
