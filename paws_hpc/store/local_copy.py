"""Staging: copying a store to the node's own disk while training already reads it from the shared file system.

One process per node copies, whichever gets the lock first; if it dies, another one that waits, or a later one, goes on
where it stopped. Each shard is usable by itself as soon as it is copied, checked and marked (:mod:`.local`).
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import xxhash

from paws_hpc.files import atomic_write, exclusive, value_digest
from paws_hpc.store.format import MANIFEST_NAME, REMEDY, Manifest, ShardEntry, StoreError, read_manifest
from paws_hpc.store.index import load_index, read_cached_index, write_index
from paws_hpc.store.local import LocalFolder, evict_unused
from paws_hpc.store.progress import progress

DEFAULT_WORKERS = 4
DEFAULT_MIB_PER_S = 500.0
"""Of one node: many nodes begin at the same time, and the shared file system serves them all."""

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_COPY_BYTES = 4 * _MIB
_CLOSE_S = 5.0
_RESERVE_BYTES = 256 * _MIB
"""Left free on the local disk, for whoever else writes there."""


@dataclass
class StageReport:
    """What staging did.

    Attributes:
        path: the copy.
        present: shards that were there already.
        copied: shards that were copied now.
        left_out: shards for which there was no room; only with ``partial``.
        failed: what is wrong with shards of the store, which were not copied.
        evicted: copies of other stores that were removed.
        bytes: copied now.
        seconds: duration.
    """

    path: Path
    present: int = 0
    copied: int = 0
    left_out: int = 0
    failed: list[str] = field(default_factory=list)
    evicted: list[Path] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every shard has a copy."""
        return not self.left_out and not self.failed


def stage(
    store: Path,
    folder: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    mib_per_s: float = DEFAULT_MIB_PER_S,
    partial: bool = False,
    show_progress: bool = False,
) -> StageReport:
    """Copy a store to a folder on the node's own disk; waits while another process of the node is copying it.

    Copies of other stores in ``folder`` are removed, the least recently used first, if their room is needed and no
    process uses them. When all shards are there, the copy is a complete store itself.

    Args:
        store: the store.
        folder: on the local disk; may hold the copies of several stores.
        workers: shards that are copied at the same time.
        mib_per_s: most that all of them together read, MiB/s.
        partial: copy as many shards as there is room for, rather than none.

    Raises:
        StoreError: the store has no usable manifest, or there is not enough room.
        OSError: the local disk cannot be written or is full; copies that are complete stay.
    """
    if workers < 1 or mib_per_s <= 0:
        raise ValueError(f"stage: workers={workers} and mib_per_s={mib_per_s} must be positive.")
    started = time.monotonic()
    manifest = read_manifest(store)
    local = LocalFolder(folder, manifest)
    with local.use(), exclusive(local.leader_lock):
        report = StageReport(local.path)
        _remove_leftovers(local.path)
        missing = _missing(local, manifest)
        report.present = len(manifest.shards) - len(missing)
        chosen = _make_room(local, missing, report, partial=partial)
        _copy_all(store, local, chosen, report, workers=workers, mib_per_s=mib_per_s, show_progress=show_progress)
        if report.complete:
            _complete(store, local, manifest)
    report.seconds = time.monotonic() - started
    return report


class Staging:
    """A process that stages while this one trains; a context manager that ends it.

    It ends, too, when this process ends, however that happens.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Use :func:`start_staging`."""
        self._process = process

    @property
    def running(self) -> bool:
        """Whether it is still copying, or waiting for another process that copies."""
        return self._process.poll() is None

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; returns its exit status: 0 if every shard has a copy.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """End it. Copies that are complete stay, the others are begun anew next time."""
        assert self._process.stdin is not None, "start_staging opens it"
        self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:  # training must not wait for a file system that hangs
            _LOG.warning("The process that copies shards does not end yet; it will when its file system answers.")

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def start_staging(
    stores: Sequence[Path],
    folder: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    mib_per_s: float = DEFAULT_MIB_PER_S,
    partial: bool = True,
) -> Staging:
    """Begin to stage stores, in turn, in a process that yields the cores to others; arguments as in :func:`stage`.

    Any number of processes of a node may call this: one copies, the others wait to take its place. What goes wrong is
    printed on standard error; training then goes on reading from the shared file system.
    """
    root = str(Path(__file__).parents[2])  # the same copy of this package as runs here
    command = [sys.executable, "-P", "-m", "paws_hpc.shards", "stage", *map(str, stores), "--to", str(folder)]
    command += ["--background"]
    command += ["--workers", str(workers), "--mib-per-s", str(mib_per_s)] + ["--partial"] * partial
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    return Staging(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    )


def end_with_standard_input() -> None:
    """End this process when whoever started it is gone: nobody else holds the other end of its standard input."""

    descriptor = sys.stdin.fileno()  # not the file object: waiting in it would break the interpreter's own end

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)  # whatever is half copied is known as such

    threading.Thread(target=watch, daemon=True).start()


def _remove_leftovers(path: Path) -> None:
    """Remove what a leader that died had begun; only the leader calls this."""
    for temporary in path.glob(".*.tmp"):
        temporary.unlink()


def _missing(local: LocalFolder, manifest: Manifest) -> list[ShardEntry]:
    """Shards without a usable copy; each node begins elsewhere, so that nodes read different shards at a time."""
    there = {number for number, path in local.marked().items() if _size(path) == manifest.shards[number].bytes}
    first = int(value_digest(socket.gethostname())[:8], 16) % len(manifest.shards)
    numbers = [*range(first, len(manifest.shards)), *range(first)]
    return [manifest.shards[number] for number in numbers if number not in there]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _make_room(
    local: LocalFolder, missing: Sequence[ShardEntry], report: StageReport, *, partial: bool
) -> list[ShardEntry]:
    """Check the free space before anything is written, evict if that helps, and say which shards fit."""
    needed = sum(entry.bytes for entry in missing) + _RESERVE_BYTES
    free = shutil.disk_usage(local.path).free
    if missing and needed > free:
        report.evicted = [copy for copy, _ in evict_unused(local.root, keep=local.path, needed=needed - free)]
        free = shutil.disk_usage(local.path).free
    if not missing or needed <= free:
        return list(missing)
    if not partial:
        raise StoreError(
            f"{local.root} has {free / _MIB:,.0f} MiB free, the copy needs {needed / _MIB:,.0f} MiB "
            f"({_RESERVE_BYTES / _MIB:,.0f} MiB of them stay free). Make room, name another folder, or copy what fits "
            "with --partial."
        )
    chosen, room = [], free - _RESERVE_BYTES
    for entry in missing:
        if entry.bytes <= room:
            chosen.append(entry)
            room -= entry.bytes
    report.left_out = len(missing) - len(chosen)
    return chosen


def _copy_all(
    store: Path,
    local: LocalFolder,
    entries: Sequence[ShardEntry],
    report: StageReport,
    *,
    workers: int,
    mib_per_s: float,
    show_progress: bool,
) -> None:
    """Copy shards side by side; a damaged one is reported and left out, a disk that fails ends it all."""
    pace = _Pace(mib_per_s * _MIB)
    total = sum(entry.count for entry in entries)
    stop = threading.Event()

    def copy(entry: ShardEntry) -> str | None:
        try:
            _copy(store / entry.name, local, entry, pace, stop)
        except StoreError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers) as pool, progress(f"staging {store.name}", total, show=show_progress) as advance:
        try:
            for entry, problem in zip(entries, pool.map(copy, entries), strict=True):
                if problem is None:
                    report.copied += 1
                    report.bytes += entry.bytes
                else:
                    report.failed.append(problem)
                advance(entry.count)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _copy(source: Path, local: LocalFolder, entry: ShardEntry, pace: _Pace, stop: threading.Event) -> None:
    """Copy one shard, comparing it with the manifest's hash on the way, and mark it."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_COPY_BYTES))
    try:
        file = open(source, "rb", buffering=0)  # noqa: SIM115 - closed below; errors of the two files differ
    except OSError as error:
        raise StoreError(f"{source} cannot be opened: {error.strerror}. {REMEDY}") from error
    with file, atomic_write(local.path / entry.name) as copy:
        while read := _read_some(file.fileno(), buffer, source):
            if stop.is_set():
                raise StoreError("staging was stopped")
            pace.spend(read)
            digest.update(buffer[:read])
            copy.write(buffer[:read])
        if digest.hexdigest() != entry.file_hash:
            raise StoreError(f"{source} is not the file that was packed: its hash differs. {REMEDY}")
    local.mark(entry)


def _read_some(descriptor: int, buffer: memoryview, source: Path) -> int:
    try:
        return os.readv(descriptor, [buffer])
    except OSError as error:  # not the local disk's fault, so other shards may do
        raise StoreError(f"{source} cannot be read: {error.strerror}. {REMEDY}") from error


def _complete(store: Path, local: LocalFolder, manifest: Manifest) -> None:
    """Add what makes the copy a store of its own."""
    if read_cached_index(local.path, manifest) is None:
        index = load_index(store, manifest)
        index.check()
        write_index(local.path, index)
    with atomic_write(local.path / MANIFEST_NAME) as file:
        file.write((store / MANIFEST_NAME).read_bytes())


class _Pace:
    """Holds threads back so that together they stay below a rate."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def spend(self, count: int) -> None:
        """Wait for the turn of ``count`` bytes."""
        with self._lock:
            turn = max(self._free_at, time.monotonic())
            self._free_at = turn + count / self._bytes_per_s
        time.sleep(max(0.0, turn - time.monotonic()))
