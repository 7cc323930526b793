"""The code of a submission: a copy of the package in the run directory, which its jobs run whatever is edited later."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import paws_hpc

_DIGITS = 12


@dataclass(frozen=True)
class Snapshot:
    """A copy of the package, named by its contents.

    Attributes:
        digest: of all its files, 12 hexadecimal digits.
        path: the folder to import from, ``code/<digest>`` in the run directory.
    """

    digest: str
    path: Path

    @property
    def shield(self) -> Path:
        """The script through which ranks start."""
        return self.path / "paws_hpc" / "cluster" / "shield.py"


def plan_snapshot(run: Path) -> Snapshot:
    """What :func:`take_snapshot` would make; writes nothing."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(f"{path.relative_to(_package())}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    name = digest.hexdigest()[:_DIGITS]
    return Snapshot(name, run.resolve() / "code" / name)


def take_snapshot(run: Path) -> Snapshot:
    """Copy the package that runs now into the run directory, unless the same code is there already."""
    snapshot = plan_snapshot(run)
    if snapshot.path.exists():
        return snapshot
    snapshot.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".code-", dir=snapshot.path.parent) as folder:
        copy = Path(folder) / "copy"
        for path in _files():
            target = copy / "paws_hpc" / path.relative_to(_package())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        copy.rename(snapshot.path)  # whole or absent
    return snapshot


def _package() -> Path:
    return Path(paws_hpc.__file__).resolve().parent


def _files() -> list[Path]:
    paths = [*_package().rglob("*"), *(_package() / "conf").rglob("*")]  # rglob does not follow the link
    return sorted({path for path in paths if path.is_file() and "__pycache__" not in path.parts})
