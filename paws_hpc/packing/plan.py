"""What is packed and how, and which image goes into which shard: decided before any image is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc import __version__
from paws_hpc.files import value_digest
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.standard import transcoder
from paws_hpc.packing.write import ShardTask
from paws_hpc.sizes import check_ranges
from paws_hpc.store.format import Encoding, Origin, Packing, StoreError
from paws_hpc.store.index import key_hashes

_LARGEST_SHARD = 1 << 36
_STATISTICS_IMAGES = 2_000


@dataclass
class PackOptions:
    """How to pack; all but ``force`` and ``workers`` decide the store's bytes."""

    shard_bytes: int = 256 << 20
    """Bytes of the source's images that make a shard: it ends before the image that would exceed it."""
    seed: int = 0
    """Shuffles the images before they are divided into shards, so that reading in order is reading at random."""
    on_error: str = "stop"
    """stop at an image that cannot be read, or skip it and report it."""
    max_short_side: int | None = None
    """Shrinks images whose short side has more pixels, at some loss; None keeps all as they are."""
    encoding: str = "lossless"
    """lossless keeps the pixels of grey JPEGs and of formats without loss; jpeg encodes them as colour JPEGs."""
    transcode: bool = False
    """Write progressive JPEGs as baseline ones, which decode three times as fast, and turn images upright, both without
    loss. Needs the extra ``paws-hpc[transcode]``."""
    force: bool = False
    """Replace a different or damaged store at the destination, once the new one is whole."""
    workers: int | None = None
    """Processes that each build one shard at a time, or threads where there are fewer shards; None: one per core."""

    def __post_init__(self) -> None:
        most = {"shard_bytes": f"[1, {_LARGEST_SHARD}]", "seed": f"[0, {1 << 64})"}
        check_ranges("pack", self, **most, max_short_side="[1, inf)", workers="[1, inf)")
        for name, allowed in (("on_error", ("stop", "skip")), ("encoding", ("lossless", "jpeg"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"pack.{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        if self.transcode and transcoder() is None:
            raise ValueError(
                "pack.transcode=true needs turbojpeg, which is not installed: pip install 'paws-hpc[transcode]' "
                "(x86-64 only). Without this option progressive JPEGs stay as they are."
            )


class Plan:
    """The division of a source into shards; a function of the source's list and the options only.

    A shard ends before the image that would take the *source's* bytes beyond the shard size: what images take in the
    store is known only after they were read.

    Attributes:
        origin, packing: what decides the bytes of the store, as the manifest has it.
        identity: both as JSON values: packs of equal identity make equal stores.
        order: (N,) int64 positions in the source, shuffled.
    """

    def __init__(self, source: Source, options: PackOptions) -> None:
        """Divide the source; StoreError if it has no images, or keys by which they could not be looked up."""
        for name in ("max_short_side", "encoding"):
            value = getattr(options, name)
            if source.encoding == "raw" and value != getattr(PackOptions, name):
                raise ValueError(
                    f"pack.{name}={value} does not apply to the {source.kind} source, which gives raw pixels: remove "
                    "it."
                )
        if not len(source.keys):
            raise StoreError(f"the {source.kind} source has no images.")
        assert len(source.labels) == len(source.keys), "a source gives one label per key"
        if len(set(source.keys)) < len(source.keys):
            key, times = Counter(source.keys).most_common(1)[0]
            raise StoreError(f"key {key!r} occurs {times} times in the {source.kind} source: keys must be distinct.")
        for key in source.keys:
            # File names that are not UTF-8 reach Python as lone surrogates.
            if not key or "\0" in key or not (key.isascii() or key.encode(errors="ignore").decode() == key):
                raise StoreError(
                    f"key {key!r} cannot be stored: it is empty, has a zero byte or is not UTF-8. Rename it."
                )
        self.source = source
        self.origin = Origin(kind=source.kind, digest=source.digest, options=source.options)
        self.packing = Packing(
            packer=__version__,
            seed=options.seed,
            shard_bytes=options.shard_bytes,
            on_error="skip" if options.on_error == "skip" else "stop",
            max_short_side=options.max_short_side,
            transcoder=transcoder() if options.transcode and source.encoding == "jpeg" else None,
        )
        self.lossless = options.encoding == "lossless"
        self.identity: dict[str, Any] = asdict(self.origin) | asdict(self.packing) | {"encoding": options.encoding}
        self._identity_digest = value_digest(
            {name: value for name, value in self.identity.items() if name != "on_error"}
        )
        self.order = packing_order(source.keys, seed=options.seed)
        self.bounds = shard_bounds(source.sizes[self.order], options.shard_bytes)
        self.stride = statistics_stride(source.encoding, len(self.order))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, number: int) -> NDArray[np.int64]:
        """Positions (n,) in the source of the images of a shard, in order."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]

    def fingerprint(self, number: int) -> str:
        """Of the pack and of the modification times of a shard's files: a shard with another one is built again."""
        digest = xxhash.xxh3_128(self._identity_digest.encode())
        digest.update(np.ascontiguousarray(self.source.stamps[self.members(number)]).tobytes())
        return digest.hexdigest()

    def task(self, number: int, path: Path) -> ShardTask:
        """What a worker needs to build a shard into ``path``."""
        members = self.members(number)
        return ShardTask(
            number=number,
            path=path,
            images=self.source.select(members),
            keys=[self.source.keys[position] for position in members.tolist()],
            labels=self.source.labels[members],
            counted=np.arange(self.bounds[number], self.bounds[number + 1]) % self.stride == 0,
            fingerprint=self.fingerprint(number),
            encoding=self.source.encoding,
            lossless=self.lossless,
            source_digest=self.origin.digest,
            packing=self.packing,
        )


def differences(wanted: dict[str, Any], there: dict[str, Any], *, but: str = "") -> list[str]:
    """How the identity ``there`` differs from the wanted one, in fields other than ``but``."""
    return [
        f"{name}={there.get(name)!r} (wanted {value!r})"
        for name, value in wanted.items()
        if name != but and there.get(name) != value
    ]


def statistics_stride(encoding: Encoding, count: int) -> int:
    """Every so many-th of ``count`` images in packing order is counted in the statistics; all of a raw store."""
    return 1 if encoding == "raw" else -(-count // _STATISTICS_IMAGES)


def packing_order(keys: Sequence[str], *, seed: int) -> NDArray[np.int64]:
    """The shuffled order (N,) int64: images sorted by a hash of (seed, key), so it depends on nothing else."""
    return np.argsort(key_hashes([key.encode() for key in keys], seed), kind="stable")


def shard_bounds(sizes: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """Where shards begin and end (shards + 1,): each as many images of ``sizes`` (N,) bytes as fit, at least one."""
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        before = 0 if bounds[-1] == 0 else int(ends[bounds[-1] - 1])
        fitting = int(np.searchsorted(ends, before + shard_bytes, side="right"))
        bounds.append(max(fitting, bounds[-1] + 1))
    return np.array(bounds, dtype=np.int64)
