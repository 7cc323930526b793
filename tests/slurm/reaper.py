"""Ends a test cluster, whatever became of the test.

Run as a process, it waits until its standard input closes: because the test is over, or because the process that ran
the test is gone. Then it kills all processes of the cluster, known by the path of their slurm.conf, and removes the
cluster's folder.

    python reaper.py /tmp/slurm-xyz
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path


def environment_of(pid: int) -> dict[str, str]:
    """Environment with which a process was started; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def parent_of(pid: int) -> int:
    """Number of a process's parent; 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name before may hold anything, blanks and brackets included


def processes_of(conf: Path) -> list[int]:
    """Numbers of all living processes that were started with this SLURM_CONF: daemons, commands, jobs' tasks."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in numbers if environment_of(pid).get("SLURM_CONF") == str(conf)]


def end(folder: Path) -> None:
    """Kill what runs on the cluster of ``folder`` until nothing is left, then remove the folder.

    Raises:
        TimeoutError: processes are left after 20 s.
    """
    deadline = time.monotonic() + 20
    while left := [pid for pid in processes_of(folder / "slurm.conf") if pid != os.getpid()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"Processes {left} of {folder} cannot be killed.")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # an interrupted test run closes the pipe, which is enough
    sys.stdin.read()
    end(Path(sys.argv[1]))
