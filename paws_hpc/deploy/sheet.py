"""The contact sheet: predictions as one self-contained page, beside the labelled images that explain them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from paws_hpc.deploy.files import shown
from paws_hpc.deploy.predicting import Failure, Prediction, Predictor
from paws_hpc.files import write_text
from paws_hpc.report.page import render

_HERE = Path(__file__).parent
_MOST_PIXELS = 128  # of the side of a picture: twice what is shown, for dense screens
_EXACT_PIXELS = 64  # up to which pictures are kept to the pixel
_QUALITY = 80


@dataclass
class Sheet:
    """A page about predictions; pictures are encoded at once, so that no pixels are held."""

    predictor: Predictor
    title: str
    facts: Sequence[str]  # below the title
    _cards: list[dict[str, Any]] = field(default_factory=list)
    _failures: list[tuple[str, str]] = field(default_factory=list)
    _supports: dict[int, str] = field(default_factory=dict)

    def add(self, item: Prediction | Failure) -> None:
        """Show one more file."""
        if isinstance(item, Failure):
            self._failures.append((shown(item.path), item.reason))
            return
        for record in item.records:
            if record not in self._supports:
                self._supports[record] = _data_uri(self.predictor.support_crop(record))
        pictures = [self._supports[record] for record in item.records]
        nearest = [one | {"picture": picture} for one, picture in zip(item.nearest, pictures, strict=True)]
        card = {"path": shown(item.path), "picture": _data_uri(item.crop), "doubt": item.doubt}
        self._cards.append(card | {"classes": item.classes, "nearest": nearest})

    def write(self, path: Path) -> None:
        """Write the page, atomically."""
        context = {
            "sheet_style": Markup((_HERE / "sheet.css").read_text(encoding="utf-8")),
            "title": self.title,
            "facts": [f"{len(self._cards):,} images", *self.facts],
            "cards": self._cards,
            "failures": self._failures,
        }
        write_text(path, render(_HERE / "sheet.html.j2", context))


def _data_uri(crop: Tensor) -> str:
    """(3, s, s) uint8 → a picture for ``src``."""
    if crop.shape[1] > _MOST_PIXELS:
        crop = F.interpolate(crop[None], size=(_MOST_PIXELS, _MOST_PIXELS), mode="bilinear", antialias=True)[0]
    pixels = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
    if crop.shape[1] > _EXACT_PIXELS:
        content, kind = simplejpeg.encode_jpeg(pixels, quality=_QUALITY, colorspace="RGB"), "jpeg"
    else:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        content, kind = file.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
