"""A picture of the crops as the network sees them: what to look at first when training does not work."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from paws_hpc.data.streams import PawsStream, apply
from paws_hpc.files import atomic_write

_ROWS = 8
_GAP = 2


def write_crop_grid(path: Path, stream: PawsStream) -> None:
    """Write the crops of the first images of step 0 as PNG: a row per image; large crops, then small ones."""
    part = stream.batch(0).micro_batches[0]
    views = [apply(crops, stream.store, torch.device("cpu"), torch.float32) for crops in part.crop_groups[1:]]
    count = len(part.large) // 2
    columns = [column for view in views for column in view.split(count)]
    mean, std = (torch.tensor(value)[:, None, None] for value in (stream.store.mean, stream.store.std))
    cell = columns[0].shape[-1]
    rows = min(_ROWS, count)
    grid = Image.new("RGBA", (len(columns) * (cell + _GAP) - _GAP, rows * (cell + _GAP) - _GAP))
    for x, column in enumerate(columns):
        for y in range(rows):
            tile = _picture(column[y] * std + mean)
            offset = (cell - tile.width) // 2
            grid.paste(tile, (x * (cell + _GAP) + offset, y * (cell + _GAP) + offset))
    encoded = BytesIO()
    grid.save(encoded, "PNG", optimize=True)
    with atomic_write(path) as file:
        file.write(encoded.getvalue())


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
