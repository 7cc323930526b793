"""A look from a compute node: a tiny job that reports what it finds there.

As a program (``python probe.py ANSWER STORE…``) it is that job, and needs nothing but Python to begin.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "numpy", "h5py", "submitit", "hydra", "simplejpeg", "paws_hpc")
_POLL_S = 1.0
_ARRIVAL_S = 30.0  # network file systems show other machines' files late


def look_from_node(folder: Path, stores: Sequence[Path], flags: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """Submit the job, wait for it, in the queue too, and return its answer; nothing of it stays.

    Args:
        folder: that both sides must see and write: the folder of all runs.
        stores: image stores to open there.
        flags: of sbatch, for partition, account and one GPU.
        timeout_s: after which the job is cancelled.

    Returns:
        ``host``, ``python``, ``packages`` (version or error by name), ``cuda`` and ``nccl``, ``devices``, ``stores``
        (images or error by path).

    Raises:
        TimeoutError: no answer in time; the message says what Slurm said of the job.
        SchedulerError: Slurm refused the job, or cannot be reached.
    """
    from paws_hpc.cluster import scheduler  # noqa: PLC0415 - on the node this file must load without the package

    folder.mkdir(parents=True, exist_ok=True)
    answer, log = (folder.resolve() / f".probe-{secrets.token_hex(8)}{suffix}" for suffix in (".json", ".out"))
    log.touch()  # in a folder that cannot be written nothing is submitted
    command = [sys.executable, str(Path(__file__).resolve()), str(answer), *map(str, stores)]
    root = Path(__file__).resolve().parents[2]
    wrapped = f"PYTHONPATH={shlex.quote(str(root))} {shlex.join(command)}"
    own = ["--job-name=probe", "--time=5", "--nodes=1", "--ntasks=1", f"--output={log}"]
    deadline, ended, job_id = time.monotonic() + timeout_s, None, None
    try:
        job_id = scheduler.ask(["sbatch", "--parsable", *own, *flags, f"--wrap={wrapped}"]).strip().partition(";")[0]
        while not answer.exists():
            state = scheduler.job_state(job_id)
            ended = ended or (time.monotonic() if state is None or state in scheduler.ENDED else None)
            if time.monotonic() > deadline or (ended is not None and time.monotonic() > ended + _ARRIVAL_S):
                reason = scheduler.queue()[job_id].reason if job_id in scheduler.queue() else ""
                said = (log.read_text(errors="replace")[-1000:].strip() if log.exists() else "") or "nothing"
                raise TimeoutError(f"job {job_id} is {state} {reason} and left no answer in {folder}; it said: {said}")
            time.sleep(_POLL_S)
        seen: dict[str, Any] = json.loads(answer.read_text())
        return seen
    finally:
        if job_id is not None:
            scheduler.cancel([job_id])
        answer.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def main(answer: Path, stores: Sequence[str]) -> None:
    """The job."""
    seen: dict[str, Any] = {"host": socket.gethostname(), "python": sys.version.split()[0]}
    seen["packages"] = {name: _version(name) for name in _PACKAGES}
    seen |= _devices()
    seen["stores"] = {path: _images(path) for path in stores}
    temporary = answer.with_suffix(".tmp")
    temporary.write_text(json.dumps(seen))
    os.replace(temporary, answer)


def _version(name: str) -> str:
    try:
        return str(getattr(importlib.import_module(name), "__version__", "there"))
    except ImportError as error:
        return f"cannot be imported: {error}"


def _devices() -> dict[str, Any]:
    try:
        import torch  # noqa: PLC0415
    except ImportError:
        return {"cuda": None, "nccl": None, "devices": []}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cuda": torch.version.cuda, "nccl": nccl, "devices": names}


def _images(path: str) -> int | str:
    try:
        from paws_hpc.store import ImageStore  # noqa: PLC0415

        with ImageStore(path) as store:
            return len(store)
    except (ImportError, OSError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
