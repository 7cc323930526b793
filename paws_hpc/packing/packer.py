"""Packing: a source of labelled images → a store. The same source, seed and shard size give the same bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from paws_hpc.packing.job import PackJob
from paws_hpc.packing.plan import PackOptions, Plan, differences
from paws_hpc.packing.pool import build_shards
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.packing.write import Change
from paws_hpc.progress import Progress
from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import MANIFEST_NAME, VERSIONS, Manifest, StoreError, read_manifest
from paws_hpc.store.workers import usable_cores

_OTHERS_FINISH_S = 10.0


@dataclass(frozen=True)
class PackReport:
    """What packing did."""

    path: Path
    manifest: Manifest | None
    """Of the store, with the images that were left out; None as long as shards of other tasks are missing."""
    made: bool = False
    """Whether this call made the store; else it was there already, or others made it."""
    packed: int = 0
    """Shards that this call built."""
    kept: int = 0
    """Shards of this call that were built before, such as by an interrupted run."""
    missing: int = 0
    """Shards of other tasks that are not built."""
    changes: Sequence[Change] = ()
    """Images whose pixels or coding are not the source's, with the reason; empty unless this call made the store.

    Images that only lost metadata are counted in the manifest and flagged in the index.
    """
    progressive: int = 0
    """JPEGs that stayed progressive."""
    newer: int = 0
    """Images whose files were written after the store that was there; names and sizes are the same."""
    seconds: float = 0.0


def pack(
    source: Source,
    destination: Path,
    *,
    options: PackOptions | None = None,
    task: tuple[int, int] | None = None,
    show_progress: bool = False,
) -> PackReport:
    """Pack ``source`` into the folder ``destination``.

    A complete store of the same source and options is left as it is. Shards that an interrupted run finished are kept.
    The manifest is written last, so that an interrupted run never looks like a store, and a former store at the
    destination (``options.force``) stays until the new one is whole.

    ``task`` (i, n) packs every n-th shard from the i-th on, 1 <= i <= n; whoever finishes the last shard of all makes
    the store. Any number of processes on any nodes that share the folder may pack tasks at once, in any order, again
    after being killed, and twice at the same time: their files are equal.

    Raises:
        RecordError: an image cannot be read and ``options.on_error`` is ``stop``; its key is named.
        SourceChangedError: the source changed while it was packed.
        StoreError: the source has no images or ambiguous keys, or another store, whole or unfinished, is at
            ``destination``.
        ValueError: ``options.force`` with a task.
        OSError: the disk is full or the folder cannot be written; finished shards stay, temporary files go.
    """
    options = options or PackOptions()
    if task is not None and options.force:
        raise ValueError(
            "parts cannot be packed with --force: one that starts late would begin a finished store anew. "
            "Pack into a new folder, or remove the former store first."
        )
    started = time.monotonic()
    plan, job = Plan(source, options), PackJob(destination)
    former = _stamp(destination)
    if not options.force and (manifest := _same_store(job, plan)) is not None:
        newer = int(np.count_nonzero(source.stamps > (destination / MANIFEST_NAME).stat().st_mtime_ns))
        return PackReport(destination, manifest, newer=newer, seconds=time.monotonic() - started)
    job.begin(plan.identity, force=options.force)
    number, of = task or (1, 1)
    assert 1 <= number <= of, "tasks are numbered from 1"
    if of > 1:
        job.keep_listing(source)
    report = PackReport(destination, None)
    try:
        numbers = range(len(plan))[number - 1 :: of]
        unbuilt = [number for number in numbers if job.result(plan, number) is None]
        report = replace(report, kept=len(numbers) - len(unbuilt))
        _build(plan, job, unbuilt, options, show_progress)
        report = replace(report, packed=len(unbuilt), missing=len(set(range(len(plan))) - job.noted()))
        # Others may have finished all of it between this task's first look and its beginning.
        if report.missing and of > 1:
            report = replace(report, manifest=_finished_by_others(plan, job, former))
        else:
            manifest, changes, progressive = job.finish(plan)
            report = replace(report, manifest=manifest, made=True, changes=changes, progressive=progressive)
    except (FileNotFoundError, StoreError):
        report = replace(report, manifest=_finished_by_others(plan, job, former))
        if report.manifest is None:
            raise
    return replace(report, seconds=time.monotonic() - started)


def plan_pack(source: Source, destination: Path, *, options: PackOptions | None = None) -> tuple[int, int]:
    """Begin packing in tasks: keep the list of the source, so that no task need make it again.

    Returns the numbers of shards and of images; errors as in :func:`pack`.
    """
    options = options or PackOptions()
    plan, job = Plan(source, options), PackJob(destination)
    if _same_store(job, plan) is None:
        job.begin(plan.identity, force=options.force)
        job.keep_listing(source, anew=True)
    return len(plan), len(plan.order)


def planned_listing(destination: Path, kind: str) -> Listing | None:
    """The list of files that the unfinished pack at ``destination`` began with; None if there is none of this kind."""
    job = PackJob(destination)
    identity = job.identity()
    return job.listing() if identity is not None and identity.get("kind") == kind else None


def _build(plan: Plan, job: PackJob, numbers: Sequence[int], options: PackOptions, show_progress: bool) -> None:
    """Build these shards."""
    if not numbers:
        return
    workers = options.workers or usable_cores()
    processes = min(workers, len(numbers))
    images = sum(len(plan.members(number)) for number in numbers)
    tasks = (plan.task(number, job.shard_path(number)) for number in numbers)
    with Progress(f"packing {job.destination.name}", total=images, show=show_progress) as shown:
        for result in build_shards(tasks, processes=processes, threads=workers // processes, advance=shown.advance):
            job.keep(result)


def _same_store(job: PackJob, plan: Plan) -> Manifest | None:
    """The manifest of the complete store that is there, if packing would only repeat it; None if there is none."""
    if job.is_ending() or not (job.destination / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(job.destination)
    # Another version of this program stores the same images; so do another transcoder, and one that is not wanted now.
    like = replace(manifest.packing, packer=plan.packing.packer)
    if plan.packing.transcoder is None or like.transcoder is not None:
        like = replace(like, transcoder=plan.packing.transcoder)
    # A store of the older version may have had nothing to keep.
    encoding = "lossless" if manifest.version > VERSIONS[0] else plan.identity["encoding"]
    differing = differences(plan.identity, asdict(manifest.origin) | asdict(like) | {"encoding": encoding})
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


def _finished_by_others(plan: Plan, job: PackJob, former: tuple[int, int] | None) -> Manifest | None:
    """The manifest of the store, if another process has finished it meanwhile; else None.

    ``former`` is the stamp of the store that was there in the beginning, such as one that is to be replaced.
    """
    deadline = time.monotonic() + _OTHERS_FINISH_S
    while job.is_ending() and time.monotonic() < deadline:
        time.sleep(0.1)
    if _stamp(job.destination) == former or (manifest := _same_store(job, plan)) is None:
        return None
    job.discard()  # what this process wrote since
    return manifest
