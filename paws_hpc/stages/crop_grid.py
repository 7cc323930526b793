"""A picture of the crops as the network sees them: what to look at first when training does not work."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from paws_hpc.data.augment import augment
from paws_hpc.data.streams import PawsStream
from paws_hpc.files import atomic_write

_ROWS = 8
_GAP = 2


def write_crop_grid(path: Path, stream: PawsStream) -> None:
    """Write the crops of the first images of step 0 as PNG: a row per image; large crops, then small ones."""
    micro_batch, store = stream.batch(0).micro_batches[0], stream.store
    views = [
        augment(crops.on(torch.device("cpu")), crops.parameters, mean=store.mean, std=store.std)
        for crops in micro_batch.crop_groups[1:]
    ]
    count = len(micro_batch.large) // 2
    columns = [column for view in views for column in view.split(count)]
    mean, std = (torch.tensor(value)[:, None, None] for value in (store.mean, store.std))
    side, rows = columns[0].shape[-1], min(_ROWS, count)
    grid = Image.new("RGBA", (len(columns) * (side + _GAP) - _GAP, rows * (side + _GAP) - _GAP))
    for x, column in enumerate(columns):
        offset = (side - column.shape[-1]) // 2
        for y in range(rows):
            pixels = (255 * (column[y] * std + mean).clamp(0, 1)).round().byte().permute(1, 2, 0)
            grid.paste(Image.fromarray(pixels.numpy()), (x * (side + _GAP) + offset, y * (side + _GAP) + offset))
    write_png(path, grid)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as a small file, atomically."""
    encoded = BytesIO()
    picture.save(encoded, "PNG", optimize=True)
    with atomic_write(path) as file:
        file.write(encoded.getvalue())
