"""The folders of runs, by name."""

from __future__ import annotations

import difflib
from pathlib import Path


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run.

    Args:
        name: of the run, or its folder.
        runs: folder of all runs.

    Raises:
        FileNotFoundError: there is none; names that are spelled alike are in the message.
    """
    for path in (runs / name, Path(name)):
        if _is_run(path):
            return path
    known = [path.name for path in all_runs(runs)] if runs.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, known, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known[:10]) or 'none'}."
    raise FileNotFoundError(f"There is no run {name}, neither as a folder nor under {runs}. {hint}")


def all_runs(runs: Path) -> list[Path]:
    """The folders of all runs, the newest last.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"{runs} is no folder. Name the folder of all runs with --runs.")
    paths = [path for path in runs.iterdir() if _is_run(path)]
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("chain.json", "config.yaml", "jobs"))
