"""Size and decode rate of images without loss as PNG, WebP and pixels, by one thread (docs/benchmarks.md).

pip install scikit-image
python -m tests.numerics.lossless_encodings
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from importlib.resources import files

import google_crc32c
import numpy as np
import sklearn.datasets
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import decode_png, decode_webp

from paws_hpc.store.decode import decode_record
from paws_hpc.store.format import FLAG_GREY, FLAG_PIXELS, FLAG_PNG

Pixels = NDArray[np.uint8]
ROUNDS = 7
COLOUR = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
          "retina.jpg", "rocket.jpg")  # fmt: skip
GREY = ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png", "page.png", "text.png")
LINES = ("chessboard_GRAY.png", "horse.png", "phantom.png")


def encoded(pixels: Pixels, kind: str, **options: object) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def by_torchvision(decode: Callable[..., torch.Tensor]) -> Callable[[Pixels, Pixels], Pixels]:
    return lambda record, _: decode(torch.from_numpy(record.copy()), "RGB").permute(1, 2, 0).contiguous().numpy()


def from_store(flag: int) -> Callable[[Pixels, Pixels], Pixels]:
    """As training reads them, CRC32C included."""

    def decode(record: Pixels, pixels: Pixels) -> Pixels:
        google_crc32c.value(record)
        flags = flag | FLAG_GREY * (pixels.shape[2] == 1)
        return decode_record(record, flags=flags, size=pixels.shape[:2])

    return decode


def by_pil(record: Pixels, _: Pixels) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(bytes(record))).convert("RGB"))


FORMS: dict[str, tuple[Callable[[Pixels], Pixels], Callable[[Pixels, Pixels], Pixels]]] = {
    "PNG, torchvision": (lambda pixels: encoded(pixels, "PNG"), by_torchvision(decode_png)),
    "PNG, PIL": (lambda pixels: encoded(pixels, "PNG"), from_store(FLAG_PNG)),
    "WebP, torchvision": (lambda pixels: encoded(pixels, "WEBP", lossless=True), by_torchvision(decode_webp)),
    "WebP, PIL": (lambda pixels: encoded(pixels, "WEBP", lossless=True), by_pil),
    "pixels": (lambda pixels: np.frombuffer(pixels.tobytes(), np.uint8), from_store(FLAG_PIXELS)),
}


def main() -> None:
    torch.set_num_threads(1)
    folder, photos = files("skimage.data"), files("sklearn.datasets.images")
    sets = {
        "colour": [Image.open(folder / name).convert("RGB") for name in COLOUR]
        + [Image.open(photos / name) for name in ("china.jpg", "flower.jpg")],
        "grey": [Image.open(folder / name).convert("L") for name in GREY],
        "line drawings": [Image.open(folder / name).convert("L") for name in LINES],
        "digits, 32 x 32": [
            Image.fromarray(digit.astype(np.uint8) * 15).resize((32, 32), Image.Resampling.BICUBIC)
            for digit in sklearn.datasets.load_digits().images[:200]
        ],
    }
    for name, images in sets.items():
        pixels = [np.asarray(image).reshape(image.height, image.width, -1) for image in images]
        total = sum(each.size for each in pixels)
        for form, (encode, decode) in FORMS.items():
            records, seconds = [encode(each) for each in pixels], float("inf")
            for record, each in zip(records, pixels, strict=True):
                assert np.array_equal(decode(record, each), np.broadcast_to(each, (*each.shape[:2], 3))), form
            for _ in range(ROUNDS):
                start = time.process_time()
                for record, each in zip(records, pixels, strict=True):
                    decode(record, each)
                seconds = min(seconds, time.process_time() - start)
            size = sum(map(len, records))
            print(
                f"{name:16} {form:18} {size / total:6.3f} of the pixels' bytes  {total / seconds / 1e6:7,.0f} MB/s  "
                f"pays below {(1 - size / total) * total / seconds / 1e6:6,.0f} MB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
