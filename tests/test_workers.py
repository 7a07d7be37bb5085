"""The process pool: order, division, time limits, deaths, errors and what it leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from molgen_energy.errors import InputError, PeerLostError
from molgen_energy.workers import WorkerError, WorkerPool


@dataclass(frozen=True)
class Numbers:
    """An item that the pool can divide."""

    values: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values)

    def parts(self, size: int) -> Iterator[Numbers]:
        for start in range(0, len(self), size):
            yield Numbers(self.values[start : start + size])


def square(number: int) -> int:
    return number * number


def exit_at_seven(numbers: Numbers) -> list[int]:
    if 7 in numbers.values:
        os._exit(3)
    return list(numbers.values)


def exit_at_zero(number: int) -> int:
    if not number:
        os._exit(3)
    return number


def sleep_tenths(number: int) -> int:
    time.sleep(number / 10)
    return number


def raise_error(error: Exception) -> None:
    raise error


def preloaded(_: int) -> bool:
    import sys

    return "graphlib" in sys.modules


@pytest.mark.parametrize("count", [0, 2])
def test_results_are_in_order(count):
    """Of any objects that can be pickled; the pool serves more than one `map`."""
    with WorkerPool(count) as pool:
        for _ in range(2):
            assert list(pool.map(square, range(20))) == [(k, k * k) for k in range(20)]
        assert list(pool.map(square, [])) == []
    assert not multiprocessing.active_children()


def test_unordered_results_come_when_they_are_finished():
    with WorkerPool(2) as pool:
        list(pool.map(square, range(2)))
        found = [item for item, _ in pool.map(sleep_tenths, [8, 0, 0, 0], ordered=False)]
        assert found == [0, 0, 0, 8]
        assert [item for item, _ in pool.map(sleep_tenths, [3, 0, 0])] == [3, 0, 0]


def test_items_are_read_only_as_fast_as_results():
    read = []

    def items() -> Iterator[int]:
        for k in range(1000):
            read.append(k)
            yield k

    with WorkerPool(2) as pool:
        results = pool.map(square, items())
        for k in range(5):
            next(results)
            assert len(read) <= 6 + k
        results.close()
        assert next(pool.map(square, [4])) == (4, 16)


def test_a_failing_item_is_divided():
    with WorkerPool(2) as pool:
        results = list(
            pool.map(exit_at_seven, [Numbers(tuple(range(12)))], lambda item, reason: [reason])
        )
    assert [value for item, _ in results for value in item.values] == list(range(12))
    failed = [(item, result) for item, result in results if list(item.values) != result]
    assert failed == [(Numbers((7,)), ["the worker process died (exit code 3)"])]


def test_an_item_that_cannot_be_divided_fails_at_once():
    with WorkerPool(1) as pool:
        found = dict(pool.map(exit_at_zero, [1, 0, 2], lambda item, reason: -1))
        assert found == {1: 1, 0: -1, 2: 2}
        with pytest.raises(PeerLostError, match=r"^0: the worker process died \(exit code 3\)$"):
            list(pool.map(exit_at_zero, [1, 0, 2]))


def test_time_limit():
    with WorkerPool(2, timeout=0.5) as pool:
        found = dict(pool.map(sleep_tenths, [600, 0], lambda item, reason: reason))
    assert found == {600: "not finished within 0.5 s", 0: 0}


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("bad file"), InputError, "^bad file$"),
        (RuntimeError("no way"), RuntimeError, "^no way$"),
        (MemoryError("too large"), MemoryError, "^too large$"),
        (KeyError("key"), WorkerError, "^KeyError: 'key'$"),
        (FileNotFoundError(2, "gone"), WorkerError, r"^FileNotFoundError: \[Errno 2\] gone$"),
    ],
)
def test_errors_of_the_work(count, error, kind, message):
    with WorkerPool(count) as pool, pytest.raises(kind, match=message) as caught:
        list(pool.map(raise_error, [error]))
    assert type(caught.value) is kind


def test_preloaded_modules():
    with WorkerPool(1, preload=["graphlib"]) as pool:
        assert list(pool.map(preloaded, [0])) == [(0, True)]
    with (
        pytest.raises(WorkerError, match="No module named 'missing'"),
        WorkerPool(1, preload=["missing"]) as pool,
    ):
        list(pool.map(square, [1]))
