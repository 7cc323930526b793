"""torchvision, LitData, Mosaic Streaming, WebDataset and PIL on the same images, with the same crops.

All decode with torchvision's libjpeg-turbo and crop with torchvision v2 on uint8 tensors, which is the fastest that
they offer on a CPU, from boxes that were drawn beforehand. They run without worker processes, so that one core does
nothing else. All of that is in their favour.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io as vision_io
from torchvision.transforms.v2 import functional as vision

from paws_hpc.bench.data_path import BATCH, CROP_GROUPS, VIEWS, shuffled
from paws_hpc.bench.images import jpegs, read_again
from paws_hpc.bench.peers.pil import pil_view
from paws_hpc.bench.rounds import Work
from paws_hpc.data.crops import draw_boxes

Sample = list[Tensor]


class Cutter:
    """Crops the images of a folder; an image has the same boxes in every pass.

    Attributes:
        boxes: per crop group (N, count, 4), of the N images.
    """

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        sizes = []
        for path in jpegs(folder):
            with Image.open(path) as image:
                sizes.append((image.height, image.width))
        (heights, widths), n, self.boxes = np.array(sizes, np.int64).T, len(sizes), []
        for crop, first in CROP_GROUPS:
            samples, view = np.tile(np.arange(n), crop.count), np.repeat(np.arange(first, first + crop.count), n)
            boxes = draw_boxes(
                crop, seed=0, epoch=0, samples=samples, view=view, heights=heights[samples], widths=widths[samples]
            )
            self.boxes.append(boxes.reshape(crop.count, n, 4).transpose(1, 0, 2))

    def cut(self, jpeg: bytes, number: int) -> Sample:
        """Decode and crop an image: (count, 3, s, s) uint8 per crop group."""
        encoded = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
        image = vision_io.decode_image(encoded, vision_io.ImageReadMode.RGB)
        return [
            torch.stack([
                vision.resized_crop(image, *box, size=[crop.size, crop.size], antialias=True)
                for box in of_group[number].tolist()
            ])
            for (crop, _), of_group in zip(CROP_GROUPS, self.boxes, strict=True)
        ]  # fmt: skip


def _through(loader: Iterable[Sample]) -> Work:
    return lambda: sum(len(batch[0]) for batch in loader)


class _Files(Dataset[Sample]):
    def __init__(self, folder: str) -> None:
        self._paths, self._cutter = jpegs(folder), Cutter(folder)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Sample:
        return self._cutter.cut(self._paths[number].read_bytes(), number)


def torchvision_v2(folder: str) -> Work:
    """A DataLoader over the files."""
    return _through(DataLoader(_Files(folder), batch_size=BATCH, shuffle=True))


def _record(path: Path) -> dict[str, Any]:
    return {"number": int(path.stem), "jpeg": path.read_bytes()}


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is made once; one that was left half made is made anew."""
    if not target.exists():
        unfinished = target.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        make(unfinished)
        unfinished.rename(target)
    return target


def _optimize(folder: str, target: Path, *, workers: int) -> None:
    import litdata  # noqa: PLC0415 - a peer, which need not be installed

    options = {"chunk_bytes": "64MB", "num_workers": workers, "verbose": False}
    litdata.optimize(fn=_record, inputs=jpegs(folder), output_dir=str(target), **options)


def litdata_crops(folder: str, scratch: str) -> Work:
    """LitData's StreamingDataset from a local folder, shuffled."""
    import litdata  # noqa: PLC0415

    class Cropped(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Sample:
            return cutter.cut(**super().__getitem__(index))

    target = _made(Path(scratch) / "litdata", lambda new: _optimize(folder, new, workers=1))
    cutter, data = Cutter(folder), Cropped(str(target), shuffle=True)
    return _through(litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=0))


def litdata_packing(folder: str, scratch: str) -> Work:
    """LitData's ``optimize`` with two processes; what was packed before is removed first."""
    import litdata  # noqa: F401, PLC0415 - whether it is there

    target, count = Path(scratch) / "litdata-packed", len(jpegs(folder))

    def work() -> int:
        shutil.rmtree(target, ignore_errors=True)
        _optimize(folder, target, workers=2)
        return count

    return work


def mosaic_crops(folder: str, scratch: str) -> Work:
    """Mosaic's StreamingDataset from local MDS shards, shuffled."""
    from streaming import MDSWriter, StreamingDataset  # noqa: PLC0415
    from streaming.base.util import clean_stale_shared_memory  # noqa: PLC0415

    def write(new: Path) -> None:
        with MDSWriter(out=str(new), columns={"number": "int", "jpeg": "bytes"}, size_limit="64mb") as writer:
            for path in jpegs(folder):
                writer.write(_record(path))

    class Cropped(StreamingDataset):
        def __getitem__(self, at: Any) -> Sample:
            return cutter.cut(**super().__getitem__(at))

    target = _made(Path(scratch) / "mosaic", write)
    clean_stale_shared_memory()
    cutter, data = Cutter(folder), Cropped(local=str(target), shuffle=True, batch_size=BATCH)
    return _through(DataLoader(data, batch_size=BATCH, num_workers=0))


def _tar_shards(folder: str, scratch: str) -> list[str]:
    import webdataset  # noqa: PLC0415

    def write(new: Path) -> None:
        new.mkdir()
        paths = jpegs(folder)
        with webdataset.ShardWriter(str(new / "%05d.tar"), maxsize=64 << 20, verbose=0) as writer:
            for position in shuffled(len(paths)).tolist():
                writer.write({"__key__": paths[position].stem, "jpg": paths[position].read_bytes()})

    return sorted(map(str, _made(Path(scratch) / "webdataset", write).glob("*.tar")))


def webdataset_reads(folder: str, scratch: str) -> Work:
    """WebDataset's samples one after the other, undecoded."""
    import webdataset  # noqa: PLC0415

    shards = _tar_shards(folder, scratch)
    read_again(shards)
    data = webdataset.WebDataset(shards, shardshuffle=False)
    return lambda: sum(len(sample["jpg"]) > 0 for sample in data)


def webdataset_crops(folder: str, scratch: str) -> Work:
    """WebDataset, its shards and samples shuffled."""
    import webdataset  # noqa: PLC0415

    shards, cutter = _tar_shards(folder, scratch), Cutter(folder)
    data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(256)
    samples = data.map(lambda sample: cutter.cut(sample["jpg"], int(sample["__key__"])))
    return _through(DataLoader(samples, batch_size=BATCH, num_workers=0))


def pil_augmentation(folder: str, supports: bool = False) -> Work:
    """PIL's crops and augmentation, image by image, as in the paper's code; with ``supports`` one 224 crop of each."""
    torch.set_num_threads(1)
    paths = jpegs(folder)
    chosen = [(1, VIEWS.large)] if supports else [(crop.count, crop) for crop, _ in CROP_GROUPS]
    groups = [(count, pil_view(crop, VIEWS.augment)) for count, crop in chosen]

    def work() -> int:
        some = shuffled(len(paths))[: max(BATCH, len(paths) // 8)].tolist()  # it is slow, and always the same
        for position in some:
            with Image.open(paths[position]) as file:
                image = file.convert("RGB")
            for count, view in groups:
                torch.stack([view(image) for _ in range(count)])
        return len(some)

    return work
