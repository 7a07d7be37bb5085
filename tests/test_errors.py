"""Words of messages."""

from __future__ import annotations

import pytest

from molgen_energy.errors import counted


@pytest.mark.parametrize(
    ("number", "plural", "expected"),
    [
        (1, "molecules", "1 molecule"), (0, "groups", "0 groups"), (1, "lattices", "1 lattice"),
        (1, "training molecules", "1 training molecule"), (1, "processes", "1 process"),
        (1, "uniform spin glasses", "1 uniform spin glass"), (1000, "steps", "1,000 steps"),
    ],
)  # fmt: skip
def test_one_thing_is_singular(number, plural, expected):
    assert counted(number, plural) == expected
