"""Checkpoints that are whole or absent, and that refuse to continue a different experiment.

A checkpoint is two files: ``step-00001234.pt`` (tensors and plain values, read with ``weights_only=True``) and, written
after it, ``step-00001234.json`` with its checksum and the identity of the experiment. Without a fitting second file the
first one counts as damaged. Nothing that is read can execute anything.

Every file of tensors is sealed (:func:`paws_hpc.files.sealed_write`); ``torch.load`` passes over the seal.

Training stands still only while its state is copied to host memory: a thread writes the copy.
"""

from __future__ import annotations

import errno
import logging
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist

from paws_hpc import distributed
from paws_hpc.engine.hostcopy import HostCopy
from paws_hpc.engine.preemption import UNATTENDED
from paws_hpc.files import UnsealedError, make_folder, read_record, sealed_digest, sealed_write, write_record

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: training steps completed when it was written, and the state."""

    step: int
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one stage of one run. Rank 0 writes and chooses; every rank reads.

    One checkpoint at most is being written, and it takes as much host memory as the state. An error in writing is
    raised by the next call of :meth:`save`, :meth:`check` or :meth:`wait`. As a context manager the folder waits for
    the writing when an error ends the block, and logs the writing's own error.

    Attributes:
        lost: whether the last checkpoint could not be written, as was logged when the block ended.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: dict[str, Any],
        keep: int = 2,
        accept_changes: tuple[str, ...] = (),
        fence: Callable[[], None] = UNATTENDED.fence,
    ) -> None:
        """Open or make the folder and clear what a killed writer left.

        Args:
            path: the folder.
            identity: flat ``{field: value}`` of all that determines the run (config fields, data-set digests).
            keep: how many checkpoints to keep; more than one, since the newest can be damaged.
            accept_changes: identity fields that may differ from the checkpoint's.
            fence: called, on the writing thread, before a written file becomes visible and before old ones are removed;
                raises if another attempt of the job has taken over.
        """
        self.path, self.identity, self.keep, self.accept_changes = path, identity, keep, accept_changes
        self._fence = fence
        self.lost = False
        self._host_copy = HostCopy()
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if distributed.is_main():
            make_folder(path)
            for leftover in path.glob(".step-*.tmp"):
                leftover.unlink()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None and error is not None and (fault := self._writing.exception()) is not None:
            _LOG.error("The last checkpoint could not be written: %s", fault)
            self._writing, self.lost = None, True

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state on rank 0 and begin to write it; the other ranks return at once.

        Waits for the checkpoint before it, if that is still being written. When this one is whole, older ones past
        ``keep`` are removed, and so are damaged ones of later steps. The record has the seconds that writing took: a
        job that must stop needs that long, and as long again if the checkpoint before is still being written.

        Args:
            step: training steps completed.
            state: tensors, numbers, strings, and lists and dicts of them; it may change as soon as this returns.

        Raises:
            OSError: the checkpoint before it could not be written; older ones stay and no temporary file does.
            TypeError: the state holds something else.
        """
        if distributed.is_main():
            self._finish()
            snapshot = self._host_copy.take(state)
            self._writing = self._writer.submit(lambda: self._write(step, snapshot()))

    def check(self) -> None:
        """Raise what :meth:`wait` would, if it is known by now."""
        if self._writing is not None and self._writing.done():
            self._finish()

    def wait(self) -> None:
        """Return, on all ranks, which call this together, when what was saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._finish()
        distributed.barrier()

    def _finish(self) -> None:
        """Wait for the writing, if there is any, and raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        began, weights = time.monotonic(), self._weights(step)
        digest = save_tensors(weights, state, fence=self._fence)
        seconds = round(time.monotonic() - began, 3)
        record = {"step": step, "xxh3_128": digest, "seconds": seconds, "identity": self.identity}
        self._fence()
        try:
            write_record(weights.with_suffix(".json"), record)
        except OSError:
            weights.unlink()  # worth nothing without its record, and the disk may be full
            raise
        self._fence()
        until_now = [other for other in self._steps() if other <= step]
        for other in set(self._steps()) - set(until_now[-self.keep :]):
            self._weights(other).with_suffix(".json").unlink(missing_ok=True)
            self._weights(other).unlink()

    def newest(self, device: torch.device) -> Checkpoint | None:
        """Read the newest valid checkpoint, or None where there is none; all ranks call this together.

        Damaged ones are passed over with a warning that names them. The state lies in host memory, once per rank:
        loading it moves each tensor to where it belongs, which for the counts of AdamW's steps is not the device.

        Args:
            device: of this rank's tensors, over which the ranks agree.

        Raises:
            OSError: the folder cannot be read.
            OtherRankError: reading failed on another rank only.
            ValueError: the newest valid checkpoint belongs to another experiment, whose differing fields are named, or
                holds objects that could execute code.
        """
        chosen: list[int | None] = [None]
        with distributed.failing_together(device):
            self._finish()
            if distributed.is_main():
                chosen = [self._newest_valid()]
        if distributed.world_size() > 1:
            dist.broadcast_object_list(chosen)
        step = chosen[0]
        if step is None:
            return None
        with distributed.failing_together(device):
            weights = self._weights(step)
            self._check_identity(weights, read_record(weights.with_suffix(".json"))["identity"])
            checkpoint = Checkpoint(step, load_tensors(weights, torch.device("cpu")))
        return checkpoint

    def resume(self, load: Callable[[dict[str, Any]], None], device: torch.device) -> int:
        """Load the newest valid state and return its steps, 0 if there is none; errors as of :meth:`newest`."""
        checkpoint = self.newest(device)
        if checkpoint is None:
            return 0
        load(checkpoint.state)
        return checkpoint.step

    def _weights(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.pt"

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in self.path.glob(f"step-{'[0-9]' * 8}.pt"))

    def _newest_valid(self) -> int | None:
        for step in reversed(self._steps()):
            weights = self._weights(step)
            try:
                check_checkpoint(weights)
            except UnsealedError:
                raise  # of an older version: to train anew in its place would lose it
            except (OSError, ValueError) as fault:
                if isinstance(fault, OSError) and fault.errno != errno.EIO:
                    raise  # nothing is wrong with the file
                _LOG.warning("%s is passed over: %s", weights, fault)
            else:
                return step
        return None

    def _check_identity(self, weights: Path, saved: dict[str, Any]) -> None:
        fields = sorted(saved.keys() | self.identity.keys())
        differing = [
            f"{field}: {saved.get(field)!r} there, {self.identity.get(field)!r} now"
            for field in fields
            if saved.get(field) != self.identity.get(field) and field not in self.accept_changes
        ]
        if differing:
            names = ",".join(line.partition(":")[0] for line in differing)
            raise ValueError(
                f"{weights} belongs to another experiment ({'; '.join(differing)}). Give this run another name, "
                f"restore the values, or continue all the same with accept_changes=[{names}]."
            )


def check_checkpoint(weights: Path) -> None:
    """Raise ValueError unless a checkpoint is whole and its ``.json`` is its own.

    Raises:
        UnsealedError: neither has a checksum: an older version wrote them.
        ValueError: anything else.
    """
    try:
        record = read_record(weights.with_suffix(".json"))
    except FileNotFoundError as error:
        raise ValueError("its .json is missing, so writing it was interrupted.") from error
    except UnsealedError as error:
        sealed_digest(weights)
        raise ValueError(str(error)) from error
    try:
        digest = sealed_digest(weights)
    except UnsealedError as error:
        raise ValueError(str(error)) from error
    if record["xxh3_128"] != digest:
        raise ValueError(f"{weights.with_suffix('.json')} belongs to another file.")


def save_tensors(path: Path, value: Any, *, fence: Callable[[], None] = UNATTENDED.fence) -> str:
    """Write tensors and plain values to ``path``, atomically, and return their checksum (32 hexadecimal digits).

    Args:
        path: of the file.
        value: to write.
        fence: called when all is on disk but nothing is visible yet; if it raises, ``path`` stays as it was.

    Raises:
        OSError: the folder cannot be written, the disk is full, or what was written reads back otherwise; ``path`` is
            named.
    """
    with sealed_write(path, fence=fence) as file:
        try:
            torch.save(value, cast("BinaryIO", file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the disk's error behind "unexpected pos"
                raise error.__context__ from error
            raise
    return file.hash.hexdigest()


def load_tensors(path: Path, device: torch.device) -> Any:
    """Read what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit its checksum; or see :func:`load_foreign`.
    """
    sealed_digest(path)
    return load_foreign(path, device)


def load_foreign(path: Path, device: torch.device) -> Any:
    """Read a file of ``torch.save`` from anywhere.

    Raises:
        ValueError: the file asks for anything but tensors and plain values, which is not executed.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values. That could execute code, so it is never loaded, and "
            "nothing was executed. Remove the file and find out who wrote it."
        ) from error
