"""Which code runs, and on what."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` where files were changed since, or modules are not in it.

    A recipe of one's own in conf/ does not count: a run's frozen config has all of it. None if the code is in no git
    tree: an installed package is in none, although a tree may be around its environment.
    """
    if shutil.which("git") is None or not _git("ls-files", "--", "paws_hpc/provenance.py"):
        return None
    described = _git("describe", "--always", "--dirty", "--abbrev=12")
    added = _git("status", "--porcelain", "--", "paws_hpc")  # untracked files, which ``describe`` passes over
    return f"{described}-dirty" if added and not described.endswith("-dirty") else described


def processor() -> str:
    """The model of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[1]
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
