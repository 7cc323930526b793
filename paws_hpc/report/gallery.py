"""Test images in the report: the map of their representations, and pictures of those that were mistaken."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from paws_hpc.report.panels import Panel
from paws_hpc.report.plots import SERIES
from paws_hpc.report.run_record import RunRecord
from paws_hpc.report.tables import METHODS, percent

_WIDTH, _HEIGHT, _MARGIN = 800, 480, 16
_MOST_NAMES = 30


@dataclass(frozen=True)
class Picture:
    """An image with the words that stand for it; ``data`` is a PNG as base64."""

    data: str
    text: str


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another; ``images`` counts all of them."""

    true: str
    predicted: str
    images: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Mistake:
    """A mistake of PAWS-NN beside the labelled images that were nearest: (picture, class, cosine similarity)."""

    picture: Picture
    true: str
    predicted: str
    probability: str
    supports: list[tuple[Picture, str, str]]


def gallery(record: RunRecord) -> dict[str, Any]:
    """The panels of test images, each a reason why it is missing where selection wrote nothing for it.

    Raises:
        ValueError: the files contradict each other or result.json; they are named.
    """
    if not record.result or not record.gallery or record.gallery_sheet is None:
        missing = _missing(record)
        return {"missing": missing, "map": Panel("map", "Map of the test images", "", missing=missing)}
    sheet = _opened(record.folder / "selection" / "gallery.png", record.gallery_sheet)
    try:
        tiles = _tiles(record.gallery, sheet)
        classes = [str(name) for name in record.result.get("classes", [])]
        pairs = [
            {"method": method, "name": METHODS[method], "pairs": [_pair(tiles, classes, pair) for pair in found]}
            for method, found in record.gallery["pairs"].items()
        ]
        told = record.gallery["mistakes"]
        mistakes = None if told is None else [_mistake(tiles, classes, entry) for entry in told]
        panel = _map(record.gallery["map"], classes)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{record.folder / 'selection'}: gallery.json does not fit gallery.png or result.json ({error!r}). Remove "
            "both of gallery's files to report without them."
        ) from error
    return {"missing": "", "pairs": pairs, "mistakes": mistakes, "map": panel, "factor": max(1, 48 // tiles.pixels)}


def _missing(record: RunRecord) -> str:
    """Why there are no pictures. Selection writes result.json, which names the classes, after them."""
    if not record.result:
        state = record.state("selection")
        return f"No pictures yet: selection has not finished. Stage selection writes them; its state is: {state}."
    return "No selection/gallery.json: the test split was scored before selection wrote one."


@dataclass(frozen=True)
class _Sheet:
    pictures: list[str]
    pixels: int


def _opened(path: Path, png: bytes) -> Image.Image:
    try:
        with Image.open(BytesIO(png)) as file:
            file.load()
            return file
    except (OSError, SyntaxError) as error:  # PIL's words for a damaged file; they name none
        raise ValueError(
            f"{path} is not a whole PNG file ({error}). Restore it, or remove it and gallery.json beside it to report "
            "without pictures."
        ) from error


def _tiles(told: dict[str, Any], sheet: Image.Image) -> _Sheet:
    pixels, columns = int(told["tile_pixels"]), int(told["columns"])
    pictures = []
    for place in range(columns * (sheet.height // pixels)):
        y, x = divmod(place, columns)
        encoded = BytesIO()
        sheet.crop((x * pixels, y * pixels, (x + 1) * pixels, (y + 1) * pixels)).save(encoded, "PNG", optimize=True)
        pictures.append(base64.b64encode(encoded.getvalue()).decode("ascii"))
    return _Sheet(pictures, pixels)


def _pair(tiles: _Sheet, classes: list[str], told: dict[str, Any]) -> Pair:
    true, predicted = classes[told["true"]], classes[told["predicted"]]
    text = f"Test image of class {true}, taken for {predicted}"
    return Pair(true, predicted, int(told["images"]), [Picture(tiles.pictures[place], text) for place in told["tiles"]])


def _mistake(tiles: _Sheet, classes: list[str], told: dict[str, Any]) -> Mistake:
    true, predicted = classes[told["true"]], classes[told["predicted"]]
    supports = [
        (
            Picture(
                tiles.pictures[near["tile"]],
                f"Labelled image of class {classes[near['class']]}, similarity {near['similarity']:.2f}",
            ),
            classes[near["class"]],
            f"{near['similarity']:.2f}",
        )
        for near in told["supports"]
    ]
    picture = Picture(tiles.pictures[told["tile"]], f"Test image of class {true}, taken for {predicted}")
    return Mistake(picture, true, predicted, percent(told["probability"]), supports)


def _map(told: dict[str, Any], classes: list[str]) -> Panel:
    title = "Map of the test images"
    if "missing" in told:
        return Panel("map", title, "", missing=str(told["missing"]))
    points, labelled = _places(told["shown"]), _places(told["labelled"])
    true, predicted = np.array(told["true"]), np.array(told["predicted"])
    marks = list(zip(points, true.tolist(), predicted.tolist(), strict=True))
    drawn = [_dot(point, kind, kind, classes) for point, kind, guess in marks if kind == guess]
    drawn += [_diamond(point, kind, classes) for point, kind in zip(labelled, told["labelled_classes"], strict=True)]
    drawn += [_dot(point, kind, guess, classes) for point, kind, guess in marks if kind != guess]
    if len(classes) <= _MOST_NAMES:
        # Beside the middle image of a class, which unlike a mean is always where images are.
        for kind in np.unique(true):
            own = points[true == kind]
            x, y = own[np.abs(own - np.median(own, axis=0)).sum(axis=1).argmin()]
            drawn.append(f'<text x="{x:.0f}" y="{y:.0f}">{escape(classes[kind])}</text>')
    shown = "All" if len(points) == told["images"] else f"{len(points):,} of the"
    caption = (
        f"{shown} {told['images']:,} test images by their representation (t-SNE; only who is near whom has a meaning). "
        f"{_colours(classes)} Circles with a strong rim are mistakes of PAWS-NN, diamonds labelled images."
    )
    description = (
        f"{title}: {len(points):,} images of {len(classes)} classes, {int((true != predicted).sum())} of them mistaken."
    )
    svg = (
        f'<svg class="plot map" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">'
        f"{''.join(drawn)}</svg>"
    )
    return Panel("map", title, caption, Markup(svg))


def _places(points: list[list[float]]) -> np.ndarray:
    """From [0, 1] to the drawing, y upwards: (n, 2)."""
    size = np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN
    flat = np.array(points, dtype=np.float64).reshape(-1, 2)
    return _MARGIN + size * np.column_stack([flat[:, 0], 1 - flat[:, 1]])


def _colour(kind: int, classes: list[str]) -> str:
    """The name of a class's colour; one for all where classes are too many to tell apart."""
    return f"--series-{kind % SERIES + 1 if len(classes) <= _MOST_NAMES else 1}"


def _colours(classes: list[str]) -> str:
    """What the colours mean."""
    if len(classes) > _MOST_NAMES:
        return "All have one colour, for the classes are too many to tell apart so."
    if len(classes) > SERIES:
        return f"Colours are true classes; they repeat after {SERIES}, so names stand beside them."
    return "Colours are true classes."


def _dot(point: np.ndarray, true: int, predicted: int, classes: list[str]) -> str:
    kind, radius, text = "right", 3.0, classes[true]
    if true != predicted:
        kind, radius, text = "wrong", 4.5, f"{classes[true]}, taken for {classes[predicted]}"
    return (
        f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{radius:g}" class="{kind}" '
        f'fill="var({_colour(true, classes)})"><title>{escape(text)}</title></circle>'
    )


def _diamond(point: np.ndarray, kind: int, classes: list[str]) -> str:
    return (
        f'<path d="M{point[0]:.1f} {point[1] - 6:.1f}l6 6l-6 6l-6-6z" class="labelled" '
        f'stroke="var({_colour(kind, classes)})"><title>{escape(classes[kind])}, labelled</title></path>'
    )
