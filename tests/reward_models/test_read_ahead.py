"""Reading ahead: in order, bounded in number and in bytes, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from reward_models.read_ahead import Reserve, read_ahead


def slow(number: int, size: int = 0) -> Callable[[Reserve], int]:
    def job(reserve: Reserve) -> int:
        reserve(size)
        time.sleep(0.002 * (number % 3))
        return number

    return job


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("size", [0, 4, 100])
def test_results_come_in_the_order_of_the_jobs(ahead: int, size: int) -> None:
    jobs = [slow(number, size) for number in range(40)]
    assert list(read_ahead(jobs, threads=4, ahead=ahead, room=10)) == list(range(40))


def test_no_more_jobs_are_begun_than_are_allowed() -> None:
    begun: list[int] = []

    def jobs() -> Iterator[Callable[[Reserve], int]]:
        for number in range(10):
            begun.append(number)
            yield slow(number)

    with closing(read_ahead(jobs(), threads=2, ahead=1)) as found:
        for number in range(5):
            assert next(found) == number
            assert len(begun) == number + 2
    assert len(begun) == 6


def test_bytes_of_files_that_wait_stay_below_the_room() -> None:
    lock, held, most = threading.Lock(), [0], [0]
    sizes = [3, 9, 1, 4, 4, 25, 2, 6, 6, 1] * 6

    def job(size: int) -> Callable[[Reserve], int]:
        def read(reserve: Reserve) -> int:
            reserve(size)
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            time.sleep(0.0005)
            return size

        return read

    found = read_ahead([job(size) for size in sizes], threads=6, ahead=20, room=12)
    for size, wanted in zip(found, sizes, strict=True):
        assert size == wanted
        with lock:
            held[0] -= size
    # The one that is asked for next gets its bytes beside what the room holds.
    assert 9 < most[0] <= 12 + 25
    assert held == [0]


def test_a_file_larger_than_all_the_room_is_read_alone() -> None:
    order: list[str] = []

    def job(name: str, size: int) -> Callable[[Reserve], str]:
        def read(reserve: Reserve) -> str:
            reserve(size)
            order.append(name)
            return name

        return read

    found = read_ahead([job("a", 1), job("large", 99), job("b", 1)], threads=3, ahead=2, room=10)
    assert list(found) == ["a", "large", "b"]
    assert sorted(order) == ["a", "b", "large"]


def test_the_next_job_is_read_while_the_current_is_used() -> None:
    read_second = threading.Event()
    jobs: list[Callable[[Reserve], object]] = [slow(0), lambda reserve: read_second.set()]
    found = read_ahead(jobs, threads=1)
    next(found)
    assert read_second.wait(timeout=5)
    assert list(found) == [None]


def test_an_error_is_raised_at_its_job_and_not_before() -> None:
    def fail(reserve: Reserve) -> int:
        raise KeyError("second")

    found = read_ahead([slow(0), fail, slow(2)], threads=2)
    assert next(found) == 0
    with pytest.raises(KeyError, match="second"):
        next(found)


def test_threads_end_with_the_iterator() -> None:
    before = threading.active_count()
    # The second waits for room that never comes.
    found = read_ahead([slow(number, 8) for number in range(50)], threads=3, ahead=3, room=10)
    next(found)
    found.close()
    assert threading.active_count() == before
