"""Batches made ahead arrive in order; an error arrives where its batch would have, and nothing stays behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from paws_hpc.data.workers import Prefetch


class BrokenImageError(Exception):
    pass


class Batches:
    """Makes numbers as batches, and notes which it began, made and abandoned."""

    def __init__(self, *, broken: int | None = None, while_beginning: bool = False, wait_at: int | None = None) -> None:
        self.begun: list[int] = []
        self.made: list[int] = []
        self.abandoned: list[list[int]] = []
        self.go_on = threading.Event()
        self._broken, self._while_beginning, self._wait_at = broken, while_beginning, wait_at

    def prefetch(self, start: int, stop: int, **options: Any) -> Prefetch[int]:
        return Prefetch(self.begin, start, stop, abandon=self.abandon, **options)

    def begin(self, step: int) -> Callable[[], int]:
        self.begun.append(step)
        if step == self._broken and self._while_beginning:
            raise BrokenImageError(f"image {step}")
        return partial(self.finish, step)

    def finish(self, step: int) -> int:
        self.made.append(step)
        if step == self._broken:
            raise BrokenImageError(f"image {step}")
        if step == self._wait_at:
            assert self.go_on.wait(10)
        return step

    def abandon(self) -> None:
        time.sleep(0.1)  # the block has ended meanwhile, if it does not wait
        self.abandoned.append(list(self.begun))


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(("start", "stop"), [(3, 20), (0, 3), (5, 6), (7, 7)])
def test_batches_arrive_in_order_and_once(start: int, stop: int) -> None:
    source = Batches()
    with source.prefetch(start, stop) as batches:
        assert list(batches) == list(range(start, stop))
        assert list(batches) == []
    assert source.made == list(range(start, stop))
    assert not running()


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_work_goes_on_while_the_consumer_is_busy_but_not_without_bound(ahead: int) -> None:
    source = Batches()
    with source.prefetch(0, 1000, ahead=ahead) as batches:
        for number in range(1, 5):
            next(batches)
            wait_until(lambda number=number: len(source.begun) > number + ahead)
            time.sleep(0.05)
            assert (len(source.made), len(source.begun)) == (number + ahead, number + ahead + 1)


def test_a_batch_is_begun_while_the_one_before_is_waited_for() -> None:
    source = Batches(wait_at=1)
    with source.prefetch(0, 10) as batches:
        assert next(batches) == 0
        wait_until(lambda: len(source.begun) == 3)
        assert source.begun == [0, 1, 2], "1 is waited for, 2 is begun, 3 waits its turn"
        source.go_on.set()
        assert list(batches) == list(range(1, 10))


@pytest.mark.parametrize("while_beginning", [False, True])
def test_an_error_is_raised_where_its_batch_would_have_been_taken(while_beginning: bool) -> None:
    source, taken = Batches(broken=5, while_beginning=while_beginning), []

    def consume() -> None:
        with source.prefetch(0, 10) as batches:
            for batch in batches:
                taken.append(batch)
                time.sleep(0.01)  # the maker is at step 5 long before the consumer

    with pytest.raises(BrokenImageError, match="image 5") as caught:
        consume()
    assert taken == [0, 1, 2, 3, 4]
    assert caught.traceback[-1].name == ("begin" if while_beginning else "finish"), "the traceback leads to the fault"
    assert source.abandoned == [source.begun]
    assert not running()


@pytest.mark.parametrize("how", ["break", "raise"])
def test_a_consumer_that_breaks_off_leaves_no_thread_and_what_was_begun_is_abandoned_once(how: str) -> None:
    source = Batches()

    def consume() -> None:
        with source.prefetch(0, 10**9) as batches:
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
    assert source.abandoned == [source.begun]
    assert not running()


def test_batches_that_nobody_makes_are_an_error_and_not_waited_for() -> None:
    ahead = Batches().prefetch(0, 10)
    with pytest.raises(TypeError, match="'Prefetch' object is not iterable"):
        iter(ahead)  # type: ignore[call-overload]
    with ahead as batches:
        assert next(batches) == 0
    with pytest.raises(ValueError, match="wanted outside the with block"):
        next(batches)
