"""Batches made ahead arrive in order; an error arrives where its batch would have, and no thread stays behind."""

from __future__ import annotations

import threading
import time

import pytest

from paws_hpc.data.prefetch import Prefetch


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_arrive_in_order_and_once() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with Prefetch(make, 3, 20) as batches:
        assert list(batches) == [step * step for step in range(3, 20)]
    assert made == list(range(3, 20))
    assert not running()


def test_work_goes_on_while_the_consumer_is_busy_but_not_without_bound() -> None:
    made: list[int] = []
    with Prefetch(made.append, 0, 1000) as batches:
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
        with Prefetch(make, 0, 10) as batches:
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
        with Prefetch(lambda step: step, 0, 10**9) as batches:
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
    with Prefetch(lambda step: step, 7, 7) as batches:
        assert list(batches) == []
    assert not running()


def test_batches_that_nobody_makes_are_an_error_and_not_waited_for() -> None:
    prefetch = Prefetch(lambda step: step, 0, 10)
    with pytest.raises(TypeError, match="'Prefetch' object is not iterable"):
        iter(prefetch)  # type: ignore[call-overload]
    with prefetch as batches:
        assert next(batches) == 0
    with pytest.raises(ValueError, match="the batch of step 1 was asked for outside the with block"):
        next(batches)


def test_batches_come_once() -> None:
    with Prefetch(lambda step: step, 0, 3) as batches:
        assert list(batches) == [0, 1, 2]
        assert list(batches) == []


@pytest.mark.parametrize(("size", "ahead"), [(1, 3), (10, 2), (25, 1), (100, 1)])
def test_batches_ahead_fit_the_budget_in_bytes(size: int, ahead: int) -> None:
    """A budget of 25 bytes holds two batches of 10, the one in the making included, and any single larger one."""
    made: list[bytes] = []

    def make(step: int) -> bytes:
        made.append(bytes(size))
        return made[-1]

    with Prefetch(make, 0, 20, size=len, budget_bytes=25) as batches:
        taken = iter(batches)
        for number in range(4):
            next(taken)
            time.sleep(0.1)  # the maker goes as far as it may
            assert len(made) == number + 1 + ahead
