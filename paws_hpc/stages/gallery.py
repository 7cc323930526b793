"""What the report shows of test images: a map of their representations, and pictures of those that were mistaken.

Selection writes it while it has images, representations and predictions at hand; the report then needs no store.
Legend: N test images, M labelled images (supports), K classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from paws_hpc.data.streams import EvaluationSet
from paws_hpc.files import write_record
from paws_hpc.stages.crop_grid import write_png
from paws_hpc.stages.probing import NearestNeighbours

_MAP_IMAGES, _MAP_SUPPORTS = 1000, 300
_PAIRS, _IMAGES_OF_A_PAIR = 5, 6
_LABELLED, _LABELLED_OF_A_CLASS = 120, 8
_MISTAKES, _NEAREST = 12, 4
_TILE_PIXELS = 48
_COLUMNS = 16
_UNTRAINED = "There was no pre-training, whose representations it would show."

Json = dict[str, Any]


class _Tiles:
    """Pictures side by side in one PNG, each once."""

    def __init__(self, images: EvaluationSet, supports: EvaluationSet) -> None:
        self._sets = {"test": images, "support": supports}
        self._indices: dict[tuple[str, int], int] = {}
        self.pixels = min(images.crop.size, _TILE_PIXELS)

    def add(self, kind: str, position: int) -> int:
        """The index of the tile that shows an image, by its position in its set."""
        return self._indices.setdefault((kind, position), len(self._indices))

    def write(self, path: Path) -> None:
        """Write the PNG, sixteen pictures in a row."""
        rows = -(-max(len(self._indices), 1) // _COLUMNS)
        sheet = Image.new("RGB", (_COLUMNS * self.pixels, rows * self.pixels))
        for (kind, position), index in self._indices.items():
            images = self._sets[kind]
            crop = images.crops(images.records[position : position + 1])[0].permute(1, 2, 0).numpy()
            picture = Image.fromarray(crop).resize((self.pixels, self.pixels), Image.Resampling.LANCZOS)
            y, x = divmod(index, _COLUMNS)
            sheet.paste(picture, (x * self.pixels, y * self.pixels))
        write_png(path, sheet)


def write_gallery(
    folder: Path,
    images: EvaluationSet,
    supports: EvaluationSet,
    nearest: NearestNeighbours | None,
    predictions: Mapping[str, Tensor],
) -> None:
    """Write ``gallery.png`` and then ``gallery.json``, which refers to it, into ``folder``: some 100 KB in all.

    ``nearest`` is PAWS-NN of the test images, None without pre-training; ``predictions`` are (N, K) probabilities by
    method.
    """
    tiles, truth, classes = _Tiles(images, supports), images.labels, supports.labels
    gallery = {
        "map": {"missing": _UNTRAINED} if nearest is None else representation_map(nearest, truth, classes),
        "pairs": {method: _pairs(tiles, values, truth) for method, values in predictions.items()},
        "mistakes": None if nearest is None else _mistakes(tiles, nearest, truth, classes),
        "labelled": _labelled(tiles, classes),
        "tile_pixels": tiles.pixels,
        "columns": _COLUMNS,
    }
    tiles.write(folder / "gallery.png")
    write_record(folder / "gallery.json", gallery)


def _pairs(tiles: _Tiles, predictions: Tensor, truth: Tensor) -> list[Json]:
    """The most confused pairs of classes, each with the mistakes of which the method was surest, these first."""
    classes, guess = predictions.shape[1], predictions.argmax(1)
    confusion = torch.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes).numpy()
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_PAIRS]
    pairs = []
    for true, wrong in (divmod(int(pair), classes) for pair in order if mistakes.flat[pair] > 0):
        members = torch.nonzero((truth == true) & (guess == wrong))[:, 0]
        surest = members[predictions[members, wrong].argsort(descending=True, stable=True)][:_IMAGES_OF_A_PAIR]
        pairs.append({
            "true": true,
            "predicted": wrong,
            "images": int(mistakes[true, wrong]),
            "tiles": [tiles.add("test", position) for position in surest.tolist()],
            "probabilities": [round(float(probability), 4) for probability in predictions[surest, wrong]],
        })  # fmt: skip
    return pairs


def _mistakes(tiles: _Tiles, nearest: NearestNeighbours, truth: Tensor, classes: Tensor) -> list[Json]:
    """The mistakes of PAWS-NN of which it was surest, with the nearest labelled images; ``classes`` are theirs."""
    probability, guess = nearest.predictions.max(1)
    wrong = torch.nonzero(guess != truth)[:, 0]
    wrong = wrong[probability[wrong].argsort(descending=True, stable=True)][:_MISTAKES]
    queries, supports = normalize(nearest.queries[wrong]), normalize(nearest.supports)
    similarity, positions = (queries @ supports.T).topk(min(_NEAREST, len(supports)), dim=1)
    return [
        {
            "tile": tiles.add("test", position),
            "true": int(truth[position]),
            "predicted": int(guess[position]),
            "probability": round(float(probability[position]), 4),
            "supports": [
                {"tile": tiles.add("support", other), "class": int(classes[other]), "similarity": round(cosine, 4)}
                for other, cosine in zip(positions[row].tolist(), similarity[row].tolist(), strict=True)
            ],
        }
        for row, position in enumerate(wrong.tolist())
    ]


def _labelled(tiles: _Tiles, classes: Tensor) -> list[Json]:
    """Some labelled images of each class that has any, with their number; of very many classes some."""
    present = classes.unique()
    shown = present[torch.from_numpy(_evenly(len(present), _LABELLED))].tolist()
    each = min(_LABELLED // len(shown), _LABELLED_OF_A_CLASS)
    members = {own: torch.nonzero(classes == own)[:, 0].tolist() for own in shown}
    return [
        {"class": own, "images": len(records), "tiles": [tiles.add("support", position) for position in records[:each]]}
        for own, records in members.items()
    ]


def representation_map(nearest: NearestNeighbours, truth: Tensor, classes: Tensor) -> Json:
    """The representations in the plane, in [0, 1] to three digits; or why there is no such map.

    ``truth`` are the (N,) classes of the test images, ``classes`` the (M,) classes of the labelled images.
    """
    queries, supports = nearest.queries, nearest.supports
    images, labelled = _evenly(len(queries), _MAP_IMAGES), _evenly(len(supports), _MAP_SUPPORTS)
    vectors = normalize(torch.cat([queries[images], supports[labelled]]).double()).numpy()
    if not np.isfinite(vectors).all():
        return {"missing": "Some representations are not finite."}
    if len(vectors) < 10 or vectors.var(axis=0).sum() < 1e-9:
        return {"missing": "There are too few images, or all have the same representation, as after a collapse."}
    points = plane(vectors)
    low, high = points.min(axis=0), points.max(axis=0)
    points = np.round((points - low) / np.maximum(high - low, 1e-12), 3)
    count = len(images)
    return {
        "images": len(queries),
        "shown": points[:count].tolist(),
        "true": truth[images].tolist(),
        "predicted": nearest.predictions[images].argmax(1).tolist(),
        "labelled": points[count:].tolist(),
        "labelled_classes": classes[labelled].tolist(),
    }


def _evenly(total: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of ``range(total)``, evenly spaced."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)


def plane(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """t-SNE of (n, D) unit vectors, at least 10 that are not all the same, from their principal components: (n, 2)."""
    from sklearn.manifold import TSNE  # noqa: PLC0415 - half a second of import time

    centred = vectors - vectors.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    components = left[:, :50] * scale[:50]
    start = components[:, :2] / components[:, 0].std() * 1e-4
    if start.shape[1] < 2:
        start = np.pad(start, ((0, 0), (0, 1)))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    # One thread: where others use the cores too, OpenMP's wait for each other at every of many short steps.
    with threadpool_limits(1):
        tsne = TSNE(perplexity=perplexity, init=start.astype(np.float32), max_iter=500, random_state=0)
        mapped: NDArray[np.float64] = tsne.fit_transform(components.astype(np.float32))
    return mapped
