"""Which code runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` where files were changed since or are not in it.

    None outside git or without it.
    """
    if shutil.which("git") is None or not (described := _git("describe", "--always", "--dirty", "--abbrev=12")):
        return None
    added = _git("status", "--porcelain", "--", "paws_hpc", "conf")  # untracked files, which ``describe`` passes over
    return f"{described}-dirty" if added and not described.endswith("-dirty") else described


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[1]
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
