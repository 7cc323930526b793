"""Stopping a job between two steps, on all ranks at the same one.

Training calls :meth:`JobControl.check` at every boundary: between steps, and between the batches of an evaluation. The
ranks agree: a request to one rank stops all of them, at the same boundary, where they save one state together.
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


class Interrupted(Exception):  # noqa: N818 - a request, no error
    """A rank got a request to stop. Raised at the same boundary on all ranks."""


def _never() -> bool:
    return False


class JobControl:
    """Tells a stage whether to stop, and whether it may still write."""

    def __init__(self, requested: Callable[[], bool] = _never, fence: Callable[[], object] = _never) -> None:
        """Prepare, after the ranks have joined.

        A collective operation if there are several ranks and ``requested`` is given: the ranks' requests travel through
        a gloo group of their own, also where training uses NCCL, so that no request waits for a device.

        Args:
            requested: whether this process got a request to stop. Called at every boundary: it must only read a flag.
            fence: raises if another attempt of this job has taken over; it is called on rank 0, before every write.
        """
        self.requested, self._fence = requested, fence
        self._ranks = 1 if requested is _never else distributed.world_size()
        self._group = dist.new_group(backend="gloo") if self._ranks > 1 else None
        self._outstanding: tuple[dist.Work, Tensor] | None = None

    def check(self) -> None:
        """Raise Interrupted if a rank got a request to stop; every rank calls this at every boundary.

        With several ranks each call begins an all-reduce of the requests and takes the result of the previous call's,
        so that no step waits for it: a request made before a call is granted by the next one. Alone it is granted at
        once.

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
        """Call before a write that others rely on: raises, on rank 0, if another attempt has taken over."""
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
"""Never stops and refuses no write, on any number of ranks."""
