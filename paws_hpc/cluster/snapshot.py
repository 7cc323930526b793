"""The code of a submission: a copy of the package in the run directory, which its jobs run whatever is edited later."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import paws_hpc
from paws_hpc.files import make_folder, sync

_DIGITS = 12


def plan_snapshot(run: Path) -> Path:
    """The folder that :func:`take_snapshot` would make, ``code/<digest of all files>``; writes nothing."""
    return run.resolve() / "code" / _digest(_package())


def take_snapshot(run: Path) -> Path:
    """Copy the package that runs now into the run directory, unless the same code is there already.

    Raises:
        ValueError: what is there has another digest than its name: it is damaged or was edited.
    """
    snapshot = plan_snapshot(run)
    if snapshot.exists():
        check_snapshot(snapshot)
        return snapshot
    make_folder(snapshot.parent)
    with tempfile.TemporaryDirectory(prefix=".code-", dir=snapshot.parent) as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(_package(), copy / "paws_hpc", ignore=_left_out)
        for path in (copy, *copy.rglob("*")):
            sync(path)
        copy.rename(snapshot)  # whole or absent
    sync(snapshot.parent)
    return snapshot


def check_snapshot(snapshot: Path) -> None:
    """Raise ValueError unless the files of a snapshot are those that its name stands for."""
    if _digest(snapshot / "paws_hpc") != snapshot.name:
        raise ValueError(f"{snapshot} is damaged or was edited: its digest is not its name. Remove it.")


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    paths = [*package.rglob("*"), *(package / "conf").rglob("*")]  # rglob does not follow the link
    for path in sorted({path for path in paths if path.is_file() and "__pycache__" not in path.parts}):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:_DIGITS]


def shield(snapshot: Path) -> Path:
    """The script of a snapshot through which ranks start."""
    return snapshot / "paws_hpc" / "cluster" / "shield.py"


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Caches, and links without a target, as editors make them beside a file that is open."""
    return [name for name in names if name == "__pycache__" or not Path(folder, name).exists()]


def _package() -> Path:
    return Path(paws_hpc.__file__).resolve().parent
