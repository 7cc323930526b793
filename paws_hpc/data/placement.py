"""``data.placement``: where decoding and cropping run, as asked for or as a short probe finds best."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from paws_hpc import distributed
from paws_hpc.data.config import FIRST_SMALL_VIEW, PLACEMENTS, Placement, ViewsConfig
from paws_hpc.data.images import StoreImages
from paws_hpc.data.multicrop import Crops, MultiCrop, make_strategy
from paws_hpc.store import ImageStore

_LOG = logging.getLogger(__name__)

_PROBED = 32  # images; with warm page cache about 0.2 s
_ROUNDS = 2  # the first warms up
_RESIDENT_SHARE = 0.25  # of the device's free memory: weights and activations come later
_CLEARLY = 1.5  # how much faster a placement that takes from the GPU must be to be chosen


@dataclass(frozen=True)
class Rates:
    """What one rank could do with one placement, images per second by stage; all stages run at the same time."""

    placement: Placement
    stages: dict[str, float]

    @property
    def limit(self) -> str:
        """The slowest stage."""
        return min(self.stages, key=lambda stage: self.stages[stage])

    @property
    def images_per_s(self) -> float:
        """Of the slowest stage."""
        return self.stages[self.limit]


def check_possible(placement: Placement, stores: Sequence[ImageStore], device: torch.device) -> None:
    """Raise ValueError, with the remedy, where a placement cannot work.

    Args:
        placement: asked for.
        stores: of the unlabelled and of the labelled images.
        device: of training.
    """
    if placement == "nvjpeg" and device.type != "cuda":
        raise ValueError(
            f"data.placement=nvjpeg decodes on a GPU, but training runs on {device.type}. Use data.placement=auto."
        )
    for store in stores:
        if placement == "nvjpeg" and store.encoding != "jpeg":
            raise ValueError(
                f"data.placement=nvjpeg decodes JPEG files, but {store.path} holds raw pixels. Use data.placement=auto."
            )
        if placement == "nvjpeg" and store.manifest.packing.check != "decode":
            raise ValueError(
                f"data.placement=nvjpeg takes damaged JPEG files for whole ones, and {store.path} was packed with "
                f"--check {store.manifest.packing.check}. Use data.placement=cpu-decode, or pack with --check decode."
            )
        if placement == "resident" and store.encoding != "raw":
            raise ValueError(
                f"data.placement=resident holds decoded images of one size, but {store.path} holds JPEG files. Use "
                "data.placement=auto."
            )
    if placement == "resident" and resident_bytes(stores) > (free := free_bytes(device)):
        raise ValueError(
            f"data.placement=resident needs {resident_bytes(stores) / 1e9:.2f} GB on {device}, where {free / 1e9:.2f} "
            "GB are free. Use data.placement=auto."
        )


def choose(
    asked: str, stores: Sequence[ImageStore], *, views: ViewsConfig, threads: int, device: torch.device
) -> Placement:
    """The placement of a run; the same on every rank, for which all ranks must call this together.

    ``auto`` on a CPU is ``cpu-crop``: elsewhere the same cores would do the same work. On a GPU, raw stores are
    ``resident`` where they take at most a quarter of its free memory, and otherwise ``cpu-decode``. JPEG stores are
    probed, and get the first of ``cpu-crop``, ``cpu-decode`` and ``nvjpeg`` than which no later one is clearly
    faster. Timings differ from start to start, so a caller that wants the choice to stay keeps it.

    Args:
        asked: ``auto`` or a placement.
        stores: of the unlabelled and of the labelled images.
        views: crops that the probe cuts.
        threads: of one rank.
        device: of training.

    Raises:
        ValueError: the placement does not exist or cannot work.
        OtherRankError: it cannot work for another rank, or rank 0 failed when it probed.
    """
    with distributed.failing_together(device):
        if asked != "auto":
            chosen = named(asked)
            check_possible(chosen, stores, device)
        else:
            chosen = _automatic(stores, views, threads, device) if distributed.is_main() else PLACEMENTS[0]
    everyone = distributed.gather_rows(torch.tensor([PLACEMENTS.index(chosen)], device=device))
    return PLACEMENTS[int(everyone[0])]


def named(placement: str) -> Placement:
    """A placement by its name.

    Raises:
        ValueError: there is none of this name.
    """
    for known in PLACEMENTS:
        if known == placement:
            return known
    raise ValueError(f"data.placement={placement!r} must be auto or one of {', '.join(PLACEMENTS)}.")


def _automatic(stores: Sequence[ImageStore], views: ViewsConfig, threads: int, device: torch.device) -> Placement:
    possible = candidates(stores, device)
    if possible == ["resident"]:  # nothing to time: no stage is left to the CPU
        _LOG.info("data.placement=auto: resident; %.2f GB live on %s.", resident_bytes(stores) / 1e9, device)
        return "resident"
    rates = []
    for placement in possible:
        try:
            rates.append(probe(stores[0], placement, views=views, threads=threads, device=device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            if placement != "nvjpeg":  # which needs parts of the driver that some containers and slices of GPUs lack
                raise
            _LOG.warning("data.placement=auto does without nvjpeg, which failed at the first images: %s", error)
    best = preferred(rates)
    _LOG.info(
        "data.placement=auto: %s; this rank can prepare about %.0f unlabelled images/s, limited by %s (%s).",
        best.placement,
        best.images_per_s,
        best.limit,
        "; ".join(
            f"{rate.placement}: " + ", ".join(f"{stage} {value:.0f}/s" for stage, value in rate.stages.items())
            for rate in rates
        ),
    )
    return best.placement


def candidates(stores: Sequence[ImageStore], device: torch.device) -> list[Placement]:
    """The placements between which ``auto`` decides, those first that leave most of the device to training.

    Args:
        stores: of the unlabelled and of the labelled images.
        device: of training; free memory is asked of it where all stores are raw.
    """
    if device.type != "cuda":
        return ["cpu-crop"]
    if all(store.encoding == "raw" for store in stores):
        fits = resident_bytes(stores) <= _RESIDENT_SHARE * free_bytes(device)
        return ["resident"] if fits else ["cpu-decode"]
    if all(store.encoding == "jpeg" and store.manifest.packing.check == "decode" for store in stores):
        return ["cpu-crop", "cpu-decode", "nvjpeg"]
    return ["cpu-crop", "cpu-decode"]


def preferred(rates: Sequence[Rates]) -> Rates:
    """The first, unless a later one is clearly faster: it takes from the device what training could use."""
    best = rates[0]
    for other in rates[1:]:
        if other.images_per_s > _CLEARLY * best.images_per_s:
            best = other
    return best


def probe(store: ImageStore, placement: Placement, *, views: ViewsConfig, threads: int, device: torch.device) -> Rates:
    """Time the stages of a placement on the first images of a store."""
    records, images = np.arange(min(_PROBED, len(store))), StoreImages(store)
    kinds = [(views.large, 0)] + ([(views.small, FIRST_SMALL_VIEW)] if views.small.count else [])
    cutter = MultiCrop(make_strategy(images, placement, threads=threads, device=device), seed=0)

    def prepare() -> list[Crops]:
        return cutter.begin(records, kinds, epoch=0, config=views.augment)()

    def finish() -> None:
        for crops in prepare():
            crops.pixels.on(device)

    def timed(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        return best

    reading, host = timed(lambda: store.read(records)), timed(prepare)
    stages = {"reading": threads * len(records) / reading, _HOST_STAGE[placement]: len(records) / host}
    if placement != "cpu-crop":
        stages["the device"] = len(records) / max(timed(finish) - host, 1e-9)
    return Rates(placement, stages)


_HOST_STAGE = {
    "cpu-crop": "decoding and cropping on the CPU",
    "cpu-decode": "decoding on the CPU",
    "nvjpeg": "handing files over",
    "resident": "drawing boxes",
}


def resident_bytes(stores: Sequence[ImageStore]) -> int:
    """Memory that raw stores take on the device; one that is given twice counts once."""
    by_digest = {store.digest: int(np.prod((len(store), *store.shape))) for store in stores if store.shape is not None}
    return sum(by_digest.values())


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say how much memory is available")
