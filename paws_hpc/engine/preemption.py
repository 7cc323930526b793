"""Stopping a job between two steps, on all ranks at the same one.

Whoever runs a stage hands it a :class:`JobControl`. Training asks it at every boundary, between steps and between the
batches of an evaluation, whether to stop. The ranks agree: one rank that was asked to stop stops all of them, at the
same boundary, where they save one state together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from paws_hpc import distributed

_LOG = logging.getLogger(__name__)
_CLOSE_TIMEOUT = timedelta(seconds=30)


class Interrupted(Exception):  # noqa: N818 - no error: a request that reached a place where it can be granted
    """Some rank was asked to stop. Raised at the same boundary on all ranks."""


def _never() -> bool:
    return False


def _nothing() -> None:
    pass


class JobControl:
    """What a stage asks of whoever runs it: whether to stop, and whether it may still write."""

    def __init__(self, requested: Callable[[], bool] = _never, fence: Callable[[], None] = _nothing) -> None:
        """Prepare, after the ranks have joined.

        A collective operation if there are several ranks and ``requested`` is given: the ranks' requests travel through
        a gloo group of their own, also where training uses NCCL, so that no request waits for a device.

        Args:
            requested: whether this process was asked to stop. Called at every boundary: it must only look at a flag.
            fence: raises if another start of this job has taken over; it is called on rank 0, before every write.
        """
        self.requested, self._fence = requested, fence
        self._ranks = 1 if requested is _never else distributed.world_size()
        self._group = dist.new_group(backend="gloo") if self._ranks > 1 else None
        self._outstanding: tuple[dist.Work, Tensor] | None = None

    def check(self) -> None:
        """Raise Interrupted if a rank was asked to stop; every rank calls this at every boundary.

        With several ranks each call begins an all-reduce of the requests and takes the result of the one that the
        previous call began, so that no step waits for it. The answer is therefore the same on all ranks and one call
        old: a request made before a call is granted by the next one. Alone it is granted at once.

        Raises:
            Interrupted: on all ranks at the same call.
            RuntimeError: another rank has died.
        """
        if self._group is None:
            assert self.requested is _never or distributed.world_size() == 1, "made before the ranks joined"
            if self.requested():
                raise Interrupted
            return
        before, self._outstanding = self._outstanding, None
        if before is not None:
            work, stop = before
            work.wait()
            if stop.item():
                raise Interrupted
        stop = torch.tensor([self.requested()], dtype=torch.uint8)
        self._outstanding = dist.all_reduce(stop, dist.ReduceOp.MAX, group=self._group, async_op=True), stop

    def fence(self) -> None:
        """Call before a write that others rely on: raises, on rank 0, if another start of this job has taken over."""
        if distributed.is_main():
            self._fence()

    def close(self) -> None:
        """Wait for the outstanding all-reduce, so that the process group can be destroyed; may follow any error."""
        before, self._outstanding = self._outstanding, None
        if before is None:
            return
        try:
            before[0].wait(_CLOSE_TIMEOUT)
        except RuntimeError as error:  # not raised: it would hide why the job ends
            _LOG.warning("Another rank ended before this one (%s).", error)


UNATTENDED = JobControl()
"""Never asks anybody to stop and refuses no write, on any number of ranks."""
