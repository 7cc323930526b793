"""Batches made ahead arrive in order; an error arrives where its batch would have, and nothing stays behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pytest

from paws_hpc.data.workers import Prefetch

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, stop: int, **options: Any) -> Prefetch[T]:
    """Of batches that are made when they are waited for."""
    return Prefetch(lambda step: partial(make, step), start, stop, **options)


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_arrive_in_order_and_once() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with prefetch(make, 3, 20) as batches:
        assert list(batches) == [step * step for step in range(3, 20)]
    assert made == list(range(3, 20))
    assert not running()


def test_work_goes_on_while_the_consumer_is_busy_but_not_without_bound() -> None:
    made: list[int] = []
    with prefetch(made.append, 0, 1000) as batches:
        next(iter(batches))
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:  # one taken, two waiting, one in hand
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(made) == 4


class BrokenImageError(Exception):
    pass


def test_an_error_is_raised_where_its_batch_would_have_been_taken() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 5:
            raise BrokenImageError("image 5")
        return step

    taken: list[int] = []

    def consume() -> None:
        with prefetch(make, 0, 10) as batches:
            for batch in batches:
                taken.append(batch)
                time.sleep(0.01)  # the maker is at step 5 long before the consumer

    with pytest.raises(BrokenImageError, match="image 5") as caught:
        consume()
    assert taken == [0, 1, 2, 3, 4]
    assert made[-1] == 5
    assert caught.traceback[-1].name == "make", "the traceback leads to the fault"
    assert not running()


@pytest.mark.parametrize("how", ["break", "raise"])
def test_a_consumer_that_breaks_off_leaves_no_thread(how: str) -> None:
    def consume() -> None:
        with prefetch(lambda step: step, 0, 10**9) as batches:
            for batch in batches:
                if batch == 3:
                    if how == "raise":
                        raise KeyboardInterrupt
                    break

    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            consume()
    else:
        consume()
    assert not running()


def test_nothing_to_make_is_no_error() -> None:
    with prefetch(lambda step: step, 7, 7) as batches:
        assert list(batches) == []
    assert not running()


def test_batches_that_nobody_makes_are_an_error_and_not_waited_for() -> None:
    ahead = prefetch(lambda step: step, 0, 10)
    with pytest.raises(TypeError, match="'Prefetch' object is not iterable"):
        iter(ahead)  # type: ignore[call-overload]
    with ahead as batches:
        assert next(batches) == 0
    with pytest.raises(ValueError, match="the batch of step 1 is wanted outside the with block"):
        next(batches)


def test_batches_come_once() -> None:
    with prefetch(lambda step: step, 0, 3) as batches:
        assert list(batches) == [0, 1, 2]
        assert list(batches) == []


@pytest.mark.parametrize(("size", "ahead"), [(1, 3), (10, 2), (25, 1), (100, 1)])
def test_batches_ahead_fit_the_budget_in_bytes(size: int, ahead: int) -> None:
    """A budget of 25 bytes holds two batches of 10, the one in the making included, and any single larger one."""
    made: list[bytes] = []

    def make(step: int) -> bytes:
        made.append(bytes(size))
        return made[-1]

    with prefetch(make, 0, 20, size=len, budget_bytes=25) as batches:
        taken = iter(batches)
        for number in range(4):
            next(taken)
            time.sleep(0.1)  # the maker goes as far as it may
            assert len(made) == number + 1 + ahead


def test_a_batch_is_begun_while_the_one_before_is_waited_for() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def begin(step: int) -> Callable[[], int]:
        begun.append(step)
        return partial(finish, step)

    def finish(step: int) -> int:
        if step:
            assert go_on.wait(10)
        return step

    with Prefetch(begin, 0, 10) as batches:
        assert next(batches) == 0
        deadline = time.monotonic() + 10
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert begun == [0, 1, 2], "1 is waited for, 2 is begun, 3 waits its turn"
        go_on.set()
        assert list(batches) == list(range(1, 10))


def test_an_error_while_beginning_is_raised_where_its_batch_would_have_been_taken() -> None:
    def begin(step: int) -> Callable[[], int]:
        if step == 3:
            raise BrokenImageError("image 3")
        return lambda: step

    taken: list[int] = []

    def consume() -> None:
        with Prefetch(begin, 0, 10) as batches:
            for batch in batches:
                taken.append(batch)
                time.sleep(0.01)

    with pytest.raises(BrokenImageError, match="image 3"):
        consume()
    assert taken == [0, 1, 2]
    assert not running()


@pytest.mark.parametrize("fault", [None, BrokenImageError("image 1")])
def test_what_was_begun_is_abandoned_once_before_the_block_ends(fault: Exception | None) -> None:
    begun, abandoned = [], []

    def begin(step: int) -> Callable[[], int]:
        begun.append(step)
        return partial(finish, step)

    def finish(step: int) -> int:
        if fault is not None and step:
            raise fault
        return step

    def abandon() -> None:
        time.sleep(0.3)  # the block has ended meanwhile, if it does not wait
        abandoned.append(list(begun))

    with Prefetch(begin, 0, 10, abandon=abandon) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while 2 not in begun and time.monotonic() < deadline:
            time.sleep(0.01)
    assert abandoned == [begun]
    assert 2 in begun
    assert not running()
