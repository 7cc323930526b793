"""Which code runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` where files were changed since; None outside git or without it."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
