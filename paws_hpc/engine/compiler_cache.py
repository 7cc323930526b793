"""What the compiler has made for a run, kept in its folder: a later start does not compile again.

torch looks for compiled graphs and kernels in a cache folder, by keys of its own that cover code, versions and device.
Here each process has such a folder to itself on the node's disk. After the first step it is packed into ``compiled/``,
one tar for each kind of device and its number, with its checksum and versions in a JSON file beside it. The next start
unpacks that, and what it compiles itself takes its place.

What is unpacked is executed. Whoever can write a run folder can have code executed anyway, since jobs run the copy of
the code in it; a file that another user owns is not used.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir
from torch._inductor.utils import _set_env

from paws_hpc import distributed
from paws_hpc.files import atomic_write, file_hash, read_record, write_record

_LOG = logging.getLogger(__name__)


@contextmanager
def compiler_cache(folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """While the block runs, torch compiles into a folder of this process, which begins with what ``folder`` keeps.

    Args:
        folder: ``compiled`` of the run.
        device: of this rank. Compiled code holds its number: of the ranks with the same number, the first one writes.

    Yields:
        a function that keeps what has been compiled since the start, if anything was. A collective.
    """
    kept = folder / f"{_name(device)}.tar"
    with tempfile.TemporaryDirectory(prefix="paws-hpc-compiled-", ignore_cleanup_errors=True) as own:
        here = Path(own)
        _unpack(kept, here)
        before = _files(here)

        def keep() -> None:
            number = torch.tensor([[device.index or 0]], device=device)
            first = distributed.gather_rows(number).flatten().tolist().index(device.index or 0)
            if first == distributed.rank() and not _files(here) <= before:
                _pack(here, kept)

        # torch would set Triton's folder itself, where it is not set, and never take it back.
        with temporary_cache_dir(own), _set_env("TRITON_CACHE_DIR", str(here / "triton")):
            yield keep


def _name(device: torch.device) -> str:
    cuda = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.type}{device.index or 0} {kind}")


def _versions() -> dict[str, str | None]:
    """What other versions made is of no use. torch's own keys cover shapes, settings and code."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _unpack(kept: Path, folder: Path) -> None:
    """What cannot be used is left where it is, and said: the run compiles anew."""
    if not kept.exists():
        return
    try:
        _check_usable(kept)
        with tarfile.open(kept) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, ValueError, LookupError, TypeError, tarfile.TarError) as error:
        _LOG.warning("%s is not used, and what it held is compiled anew: %s", kept, error)


def check_whole(kept: Path) -> dict[str, Any]:
    """Raise ValueError or OSError unless the tar is whole; returns its record."""
    record = read_record(kept.with_suffix(".json"))
    if record["xxh3_128"] != file_hash(kept):
        raise ValueError("its checksum is another one")
    return record


def _check_usable(kept: Path) -> None:
    """Raise ValueError or OSError unless the tar is whole, of this user and these versions."""
    if (owner := kept.stat().st_uid) != os.getuid():
        remedy = "start the run as its owner, and where a container or file system maps users, without that mapping"
        raise ValueError(f"its owner is user {owner}, not {os.getuid()}: {remedy}")
    record = check_whole(kept)
    for name, here in _versions().items():
        if record[name] != here:
            raise ValueError(f"it was made by {name} {record[name]}, not {here}")


def _pack(folder: Path, kept: Path) -> None:
    """A disk that is full costs the next start its time, and this run nothing."""
    try:
        with atomic_write(kept) as file, tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(folder, arcname=".")
        write_record(kept.with_suffix(".json"), {"xxh3_128": file_hash(kept), **_versions()})
    except OSError as error:
        _LOG.warning("What was compiled is not kept for the next start: %s", error)
