"""Reading ahead: in order, a bounded number, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from reward_models.read_ahead import read_ahead


def slow(number: int) -> Callable[[], int]:
    def job() -> int:
        time.sleep(0.002 * (number % 3))
        return number

    return job


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs(ahead: int) -> None:
    units = [[slow(4 * unit + place) for place in range(unit % 5)] for unit in range(12)]
    found = list(read_ahead(units, threads=4, ahead=ahead))
    assert found == [[4 * unit + place for place in range(unit % 5)] for unit in range(12)]


def test_no_more_units_are_begun_than_are_allowed() -> None:
    begun: list[int] = []

    def units() -> Iterator[list[Callable[[], int]]]:
        for unit in range(10):
            begun.append(unit)
            yield [slow(unit)]

    with closing(read_ahead(units(), threads=2, ahead=1)) as found:
        for unit in range(5):
            assert next(found) == [unit]
            assert len(begun) == unit + 2
    assert len(begun) == 6


def test_the_next_unit_is_read_while_the_current_is_used() -> None:
    read_second = threading.Event()
    jobs: list[list[Callable[[], object]]] = [[slow(0)], [read_second.set]]
    found = read_ahead(jobs, threads=1)
    next(found)
    assert read_second.wait(timeout=5)
    assert list(found) == [[None]]


def test_an_error_is_raised_at_its_unit_and_not_before() -> None:
    def fail() -> int:
        raise KeyError("second")

    found = read_ahead([[slow(0)], [fail], [slow(2)]], threads=2)
    assert next(found) == [0]
    with pytest.raises(KeyError, match="second"):
        next(found)


def test_threads_end_with_the_iterator() -> None:
    before = threading.active_count()
    found = read_ahead([[slow(number)] for number in range(50)], threads=3)
    next(found)
    found.close()
    assert threading.active_count() == before
