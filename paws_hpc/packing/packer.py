"""Packing: a source of labelled images → a store. The same source, seed and shard size give the same bytes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from paws_hpc.packing.job import PackJob, PackReport
from paws_hpc.packing.plan import PackOptions, Plan, differences
from paws_hpc.packing.pool import build_shards
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import MANIFEST_NAME, Manifest, StoreError, read_manifest
from paws_hpc.store.progress import progress
from paws_hpc.store.workers import usable_cores

_OTHERS_FINISH_S = 10.0


@dataclass(frozen=True)
class TaskReport:
    """What packing a task did."""

    packed: int
    """Shards that were built."""
    kept: int
    """Shards of this task that were done before."""
    missing: int
    """Shards of other tasks that are not done."""
    store: PackReport | None
    """The whole store, where this task was the last; else None."""
    seconds: float


def pack(
    source: Source, destination: Path, *, options: PackOptions | None = None, show_progress: bool = False
) -> PackReport:
    """Pack ``source`` into the folder ``destination``.

    A complete store of the same source and options is left as it is. Shards that an interrupted run finished are kept.
    The manifest is written last, so that an interrupted run never looks like a store, and a former store at the
    destination (``options.force``) stays until the new one is whole.

    Raises:
        RecordError: an image cannot be read and ``options.on_error`` is ``stop``; its key is named.
        SourceChangedError: the source changed while it was packed.
        StoreError: the source has no images or ambiguous keys, or another store, whole or unfinished, is at
            ``destination``.
        OSError: the disk is full or the folder cannot be written; finished shards stay, temporary files go.
    """
    report = _pack(source, destination, (1, 1), options or PackOptions(), show_progress)
    assert report.store is not None, "a pack of all shards ends with the store"
    return replace(report.store, kept=report.kept, seconds=report.seconds)


def pack_task(
    source: Source,
    destination: Path,
    task: tuple[int, int],
    *,
    options: PackOptions | None = None,
    show_progress: bool = False,
) -> TaskReport:
    """Pack the shards of task (i, n): every n-th one from the i-th on, 1 <= i <= n.

    The process that finishes the last shard of all makes the store. Any number of tasks may be packed at once by
    processes on any nodes that share the folder, in any order, again after being killed, and twice at the same time:
    their files are equal.

    Raises:
        ValueError: ``options.force`` is set: a task that starts late would begin a finished store anew.
        RecordError, SourceChangedError, StoreError, OSError: as :func:`pack`.
    """
    options = options or PackOptions()
    if options.force:
        raise ValueError(
            "parts cannot be packed with --force: one that starts late would begin a finished store anew. "
            "Pack into a new folder, or remove the former store first."
        )
    return _pack(source, destination, task, options, show_progress)


def plan_pack(source: Source, destination: Path, *, options: PackOptions | None = None) -> tuple[int, int]:
    """Begin packing in tasks: keep the list of the source, so that no task need make it again.

    Returns:
        The numbers of shards and of images.

    Raises:
        StoreError: as :func:`pack`.
    """
    options = options or PackOptions()
    plan, job = Plan(source, options), PackJob(destination)
    if _same_store(job, plan) is None:
        job.begin(plan.identity, force=options.force)
        job.keep_listing(source, anew=True)
    return len(plan), len(plan.order)


def planned_listing(destination: Path, kind: str) -> Listing | None:
    """The list of files that the unfinished pack at ``destination`` began with; None if there is none of this kind.

    Raises:
        StoreError, ValueError: the record or the list is damaged.
    """
    job = PackJob(destination)
    identity = job.identity()
    return job.listing() if identity is not None and identity.get("kind") == kind else None


def _pack(
    source: Source, destination: Path, task: tuple[int, int], options: PackOptions, show_progress: bool
) -> TaskReport:
    started = time.monotonic()
    plan, job = Plan(source, options), PackJob(destination)
    former = _stamp(destination)
    if not options.force and (manifest := _same_store(job, plan)) is not None:
        newer = int(np.count_nonzero(source.stamps > (destination / MANIFEST_NAME).stat().st_mtime_ns))
        store: PackReport | None = PackReport(destination, manifest, packed=False, newer=newer)
        return TaskReport(0, 0, 0, store, time.monotonic() - started)
    job.begin(plan.identity, force=options.force)
    number, of = task
    assert 1 <= number <= of, "tasks are numbered from 1"
    if of > 1:
        job.keep_listing(source)
    numbers = range(len(plan))[number - 1 :: of]
    kept = missing = 0
    try:
        kept = _build(plan, job, numbers, options, show_progress)
        missing = len(set(range(len(plan))) - job.noted())
        # Others may have finished all of it between this task's first look and its beginning.
        store = _finished_by_others(plan, job, former) if missing and of > 1 else job.finish(plan)
    except (FileNotFoundError, StoreError):
        store = _finished_by_others(plan, job, former)
        if store is None:
            raise
    return TaskReport(len(numbers) - kept, kept, missing, store, time.monotonic() - started)


def _build(plan: Plan, job: PackJob, numbers: range, options: PackOptions, show_progress: bool) -> int:
    """Build those shards that are not done; returns how many were."""
    missing = [number for number in numbers if job.result(plan, number) is None]
    if missing:
        workers = options.workers or usable_cores()
        processes = min(workers, len(missing))
        images = sum(len(plan.members(number)) for number in missing)
        tasks = (plan.task(number, job.shard_path(number)) for number in missing)
        with progress(f"packing {job.destination.name}", images, show=show_progress) as advance:
            for result in build_shards(tasks, processes=processes, threads=workers // processes, advance=advance):
                job.keep(result)
    return len(numbers) - len(missing)


def _same_store(job: PackJob, plan: Plan) -> Manifest | None:
    """The manifest of the complete store that is there, if packing would only repeat it; None if there is none."""
    if job.is_ending() or not (job.destination / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(job.destination)
    # Another version of this program stores the same images; so do another transcoder, and one that is not wanted now.
    like = replace(manifest.packing, packer=plan.packing.packer)
    if plan.packing.transcoder is None or like.transcoder is not None:
        like = replace(like, transcoder=plan.packing.transcoder)
    differing = differences(plan.identity, asdict(manifest.origin) | asdict(like))
    if differing:
        raise StoreError(
            f"{job.destination} already holds another store: {', '.join(differing)}. "
            "Choose another folder, or replace the store with --force."
        )
    check_sizes(job.destination, manifest)
    job.remove_leftovers()
    return manifest


def _stamp(destination: Path) -> tuple[int, int] | None:
    """Distinguishes the manifest that is there from another, though equal, one that is written later; None if none."""
    try:
        status = (destination / MANIFEST_NAME).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _finished_by_others(plan: Plan, job: PackJob, former: tuple[int, int] | None) -> PackReport | None:
    """The store, if another process has finished it meanwhile, so that there is nothing left to do; else None.

    ``former`` is the stamp of the store that was there in the beginning, such as one that is to be replaced.
    """
    deadline = time.monotonic() + _OTHERS_FINISH_S
    while job.is_ending() and time.monotonic() < deadline:
        time.sleep(0.1)
    if _stamp(job.destination) == former or (manifest := _same_store(job, plan)) is None:
        return None
    job.discard()  # what this process wrote since
    return PackReport(job.destination, manifest, packed=False)
