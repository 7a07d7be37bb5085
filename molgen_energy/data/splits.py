"""Splits of data into training, validation and test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError

SPLITS = ("train", "valid", "test")
"""Names of the labels 0, 1, 2 of the data set `split`."""


def check_seed(seed: int) -> None:
    """Raise `InputError` unless a seed is from 0 to 2⁶³ − 1."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Three shares of a text such as 0.8,0.1,0.1; raises `InputError` for other text."""
    try:
        train, valid, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--split {text}: expected three shares such as 0.8,0.1,0.1") from error
    return train, valid, test


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raise `InputError` unless three shares, none negative, add up to 1, with some to train on."""
    # Written so that NaN is refused too.
    if not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6 and fractions[0] > 0):
        raise InputError(
            f"the split {','.join(f'{x:g}' for x in fractions)} must be three shares, train above "
            "zero, that add up to 1, such as 0.8,0.1,0.1"
        )


def random_split(
    count: int,
    fractions: tuple[float, float, float],
    seed: int,
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """Labels 0, 1, 2 in the given shares in random order, (count,); at least one is 0.

    Parameters
    ----------
    groups
        Samples of equal numbers (count,) get the same label, such as the conformers of a molecule.
        The shares are then as near to the given ones as whole groups allow.
    """
    train = max(1, round(fractions[0] * count))
    valid = min(count - train, round(fractions[1] * count))
    if groups is None:
        labels = np.repeat(np.array([0, 1, 2], np.uint8), [train, valid, count - train - valid])
        return np.random.default_rng(seed).permutation(labels)
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    # In random order, a group goes where its middle falls.
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    label_of_group = np.empty(len(sizes), np.uint8)
    label_of_group[order] = np.searchsorted([train, train + valid], middle, side="right")
    if count:
        label_of_group[order[0]] = 0
    return label_of_group[member.reshape(-1)]
