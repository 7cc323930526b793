"""One rank that is asked to stop stops all of them at the same boundary, and nobody waits for the agreement."""

from __future__ import annotations

import itertools
import logging
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from paws_hpc.engine import preemption
from paws_hpc.engine.preemption import UNATTENDED, Interrupted, JobControl
from tests.ranks import results_of, run_on_ranks

STEPS = 8


def stopped_at(control: JobControl) -> int | None:
    """The call of check() that raised, None if none of ``STEPS`` did."""
    for call in range(STEPS):
        try:
            control.check()
        except Interrupted:
            return call
    return None


def asked_at(call: int | None) -> JobControl:
    """A control of a process that is asked to stop just before its check number ``call``, and stays asked."""
    calls = itertools.count()
    return JobControl(lambda: call is not None and next(calls) >= call)


def test_alone_a_request_is_granted_at_the_boundary_that_follows_it() -> None:
    assert [stopped_at(asked_at(call)) for call in (0, 5, None)] == [0, 5, None]
    assert stopped_at(UNATTENDED) is None


def agreed(rank: int, world: int) -> list[int | None]:
    """Where each rank stops: asked at start-up, in the middle, one after the other, at the last call, and never."""
    stops = []
    for asked in ([None, 0, None], [3, None, None], [4, 2, 6], [None, None, STEPS - 1], [None, None, None]):
        control = asked_at(asked[rank])
        stops.append(stopped_at(control))
        control.close()
        control.close()
    stops.append(stopped_at(UNATTENDED))
    return stops


def test_ranks_stop_at_the_same_call_the_one_after_the_first_request(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {3: [agreed]})
    for stops in results_of(agreed, 3, tmp_path):
        assert stops == [1, 4, 3, None, None, None]


def fenced(rank: int, world: int) -> int:
    calls = []
    control = JobControl(fence=lambda: calls.append(rank))
    control.fence()
    return len(calls)


def left_alone(rank: int, world: int) -> list[str]:
    """Rank 1 never comes to the boundary, because it failed, say; rank 0 leaves all the same and says so."""
    control, told = JobControl(lambda: False), []
    if rank == 0:
        control.check()
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger(preemption.__name__).addHandler(handler)
        preemption._CLOSE_TIMEOUT = timedelta(seconds=0.2)
        control.close()
    dist.barrier()
    return told


def test_only_the_rank_that_writes_asks_whether_it_may(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {2: [fenced, left_alone]})
    assert results_of(fenced, 2, tmp_path) == [1, 0]
    (told,), silent = results_of(left_alone, 2, tmp_path)
    assert "Another rank ended before this one" in told
    assert silent == []
