"""A store as large as ImageNet's whose shards are all the same file: its index is of full size, its records are few."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from paws_hpc.files import write_json
from paws_hpc.store.format import MANIFEST_NAME, read_manifest, shard_name
from paws_hpc.store.index import build_index, dataset_digest
from paws_hpc.store.shard import read_shard


def repeat_store(store: Path, target: Path, records: int) -> Path:
    """Make a store of at least ``records`` records out of the first shard of another, by hard links.

    Keys repeat too, so nothing can be found by its key.
    """
    manifest = read_manifest(store)
    entry = manifest.shards[0]
    times = -(-records // entry.count)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    entries = []
    for number in range(times):
        name = shard_name(number)
        os.link(store / entry.name, target / name)
        entries.append(replace(entry, name=name))
    joined = build_index(target, [read_shard(store / entry.name).index] * times)
    counts = np.bincount(joined.labels, minlength=len(manifest.classes)).tolist()
    digest = dataset_digest(joined, encoding=manifest.encoding, shape=manifest.shape, classes=manifest.classes)
    whole = replace(
        manifest, count=len(joined), class_counts=tuple(counts), digest=digest, index_hash=joined.hash,
        shards=tuple(entries),
    )  # fmt: skip
    write_json(target / MANIFEST_NAME, whole.to_json())
    return target
