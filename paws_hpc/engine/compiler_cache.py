"""What the compiler has made for a run, kept in its folder: a later start does not compile again.

torch looks for compiled graphs and kernels in a cache folder, by keys of its own that cover code, versions and device.
Here each process has such a folder to itself on the node's disk. After the first steps it is packed into
``compiled/KEY.tar``, with its checksum in ``KEY.json`` beside it, and the next start unpacks that.

What is unpacked is executed. Whoever can write a run folder can have code executed anyway, since jobs run the copy of
the code in it; a file that another user owns is not used.
"""

from __future__ import annotations

import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

from paws_hpc import distributed
from paws_hpc.files import atomic_write, file_hash, read_json, value_digest, write_json

_LOG = logging.getLogger(__name__)


@contextmanager
def compiler_cache(folder: Path, shapes: dict[str, Any], device: torch.device) -> Iterator[Callable[[], None]]:
    """While the block runs, torch compiles into a folder of this process, which begins with what ``folder`` keeps.

    Args:
        folder: ``compiled`` of the run.
        shapes: the config that decides what is compiled.
        device: of this rank. Compiled code holds its number: of the ranks with the same number, the first one writes.

    Yields:
        a function that keeps what has been compiled since the start, if anything was. A collective.
    """
    facts = _facts(shapes, device)
    kept = folder / f"{value_digest(facts)[:16]}.tar"
    with tempfile.TemporaryDirectory(prefix="paws-hpc-compiled-", ignore_cleanup_errors=True) as own:
        here = Path(own)
        _unpack(kept, here)
        before = _files(here)

        def keep() -> None:
            number = torch.tensor([[device.index or 0]], device=device)
            first = distributed.gather_rows(number).flatten().tolist().index(device.index or 0)
            if first == distributed.rank() and not _files(here) <= before:
                _pack(here, kept, facts)

        with temporary_cache_dir(own):
            yield keep


def _facts(shapes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What compiled code is for; other facts have another file."""
    cuda = device.type == "cuda"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "device": [device.type, device.index or 0],
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "ranks": distributed.world_size(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "config": value_digest(shapes),
    }


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _unpack(kept: Path, folder: Path) -> None:
    """What cannot be used is left where it is, and said: the run compiles anew."""
    if not kept.exists():
        if others := sorted(kept.parent.glob("*.tar")):
            _LOG.info("%s is of other versions, devices or settings and not used: compiling.", others[-1])
        return
    try:
        fault = _fault(kept)
        if fault is None:
            with tarfile.open(kept) as archive:
                archive.extractall(folder, filter="data")
            return
    except (OSError, ValueError, LookupError, TypeError, tarfile.TarError) as error:
        fault = str(error)
    _LOG.warning("%s is not used, and what it held is compiled anew: %s", kept, fault)


def _fault(kept: Path) -> str | None:
    if (owner := kept.stat().st_uid) != os.getuid():
        return f"its owner is user {owner}, not {os.getuid()}"
    if read_json(kept.with_suffix(".json"))["xxh3_128"] != file_hash(kept):
        return "its checksum is another one"
    return None


def _pack(folder: Path, kept: Path, facts: dict[str, Any]) -> None:
    """A disk that is full costs the next start its time, and this run nothing."""
    try:
        with atomic_write(kept) as file, tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(folder, arcname=".")
        write_json(kept.with_suffix(".json"), {"xxh3_128": file_hash(kept), **facts})
    except OSError as error:
        _LOG.warning("What was compiled is not kept for the next start: %s", error)
