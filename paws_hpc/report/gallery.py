"""Images in the report: the map of test images' representations, pictures of mistakes, and the labelled images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from paws_hpc.files import read_json
from paws_hpc.metrics import percent
from paws_hpc.report.panels import Panel
from paws_hpc.report.plots import SERIES
from paws_hpc.report.run_record import RunRecord
from paws_hpc.report.tables import METHODS

_WIDTH, _HEIGHT, _MARGIN = 800, 480, 16
_MOST_NAMES = 30
_MOST_PNG_BYTES = 100_000
_MAP_TITLE = "Map of the test images"


def gallery(record: RunRecord) -> dict[str, Any]:
    """The panels of images, each a reason why it is missing where selection wrote nothing for it.

    ``sheet`` holds all pictures, ``columns`` beside each other; one of them is a dict of its place there (``x``, ``y``)
    and of the words that stand for it (``text``).

    Raises:
        ValueError: the files contradict each other or result.json; they are named.
    """
    folder = record.folder / "selection"
    index, sheet_path = folder / "gallery.json", folder / "gallery.png"
    missing = ""
    if not record.result:  # selection writes it, with the names of classes, after the pictures
        state = record.state("selection")
        missing = f"No pictures yet: selection has not finished. Stage selection writes them; its state is: {state}."
    elif not index.exists() or not sheet_path.exists():
        missing = "No selection/gallery.json: there were no test images, or an older version scored them."
    if missing:
        return {"missing": missing, "labelled": [], "map": Panel("map", _MAP_TITLE, missing=missing)}
    sheet, contents = opened_png(sheet_path), read_json(index)
    try:
        columns, pixels = int(contents["columns"]), int(contents["tile_pixels"])
        places = [(x, y) for y in range(sheet.height // pixels) for x in range(columns)]
        classes = [str(name) for name in record.result.get("classes", [])]
        pairs = [
            {"name": METHODS[method], "method": method, "pairs": [_pair(places, classes, pair) for pair in confused]}
            for method, confused in contents["pairs"].items()
        ]
        mistakes = contents["mistakes"]
        if mistakes is not None:
            mistakes = [_mistake(places, classes, mistake) for mistake in mistakes]
        labelled = [
            {"name": (name := classes[own["class"]]), "images": own["images"],
             "pictures": [_tile(places, tile, f"Labelled image of class {name}") for tile in own["tiles"]]}
            for own in contents.get("labelled", [])
        ]  # fmt: skip
        panel = _map(contents["map"], classes)
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{folder}: gallery.json does not fit gallery.png or result.json ({error!r}). Remove both of gallery's "
            "files to report without them."
        ) from error
    shown = {"pairs": pairs, "mistakes": mistakes, "labelled": labelled, "map": panel, "factor": max(1, 48 // pixels)}
    return shown | {"missing": "", "columns": columns, "sheet": data_uri(sheet_path, sheet)}


def data_uri(path: Path, image: Image.Image) -> str:
    """A PNG for ``src`` or ``url()``; one that is large as WebP, which of photographs is a tenth."""
    content, kind = path.read_bytes(), "png"
    if len(content) > _MOST_PNG_BYTES:
        encoded, kind = BytesIO(), "webp"
        image.save(encoded, "WEBP", quality=80)
        content = encoded.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def opened_png(path: Path) -> Image.Image:
    """A picture of the run; raises ValueError where it is damaged."""
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except (OSError, SyntaxError) as error:  # PIL's words for a damaged file; they name none
        raise ValueError(
            f"{path} is not a whole PNG file ({error}). Restore it, or remove it (gallery.png: gallery.json "
            "too) to report without."
        ) from error


def _tile(places: Sequence[tuple[int, int]], tile: int, text: str) -> dict[str, Any]:
    x, y = places[tile]
    return {"x": x, "y": y, "text": text}


def _confused(classes: list[str], entry: dict[str, Any]) -> dict[str, Any]:
    true, predicted = classes[entry["true"]], classes[entry["predicted"]]
    return {"true": true, "predicted": predicted, "text": f"Test image of class {true}, taken for {predicted}"}


def _pair(places: Sequence[tuple[int, int]], classes: list[str], pair: dict[str, Any]) -> dict[str, Any]:
    """A class taken for another: the number of such images, and some, with the probability of the wrong class."""
    confused, tiles = _confused(classes, pair), pair["tiles"]
    sure = [percent(probability) for probability in pair.get("probabilities", [])] or [""] * len(tiles)
    pictures = [
        _tile(places, tile, confused["text"]) | {"probability": probability}
        for tile, probability in zip(tiles, sure, strict=True)
    ]
    return confused | {"images": int(pair["images"]), "pictures": pictures}


def _mistake(places: Sequence[tuple[int, int]], classes: list[str], mistake: dict[str, Any]) -> dict[str, Any]:
    """A mistake of PAWS-NN, and the labelled images that were nearest by cosine similarity."""
    supports = []
    for near in mistake["supports"]:
        name, similarity = classes[near["class"]], f"{near['similarity']:.2f}"
        tile = _tile(places, near["tile"], f"Labelled image of class {name}, similarity {similarity}")
        supports.append(tile | {"name": name, "similarity": similarity})
    confused = _confused(classes, mistake)
    own = {"probability": percent(mistake["probability"]), "supports": supports}
    return own | confused | _tile(places, mistake["tile"], confused["text"])


def _map(contents: dict[str, Any], classes: list[str]) -> Panel:
    if "missing" in contents:
        return Panel("map", _MAP_TITLE, missing=str(contents["missing"]))
    points, labelled = _scaled(contents["shown"]), _scaled(contents["labelled"])
    true, predicted = np.array(contents["true"]), np.array(contents["predicted"])
    marks = list(zip(points, true.tolist(), predicted.tolist(), strict=True))
    drawn = [_dot(point, own, own, classes) for point, own, guess in marks if own == guess]
    for (x, y), own in zip(labelled, contents["labelled_classes"], strict=True):
        drawn.append(
            f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z" class="labelled" stroke="var({_colour(own, classes)})">'
            f"<title>{escape(classes[own])}, labelled</title></path>"
        )
    drawn += [_dot(point, own, guess, classes) for point, own, guess in marks if own != guess]
    if len(classes) <= _MOST_NAMES:
        # Beside the middle image of a class, which unlike a mean is always where images are.
        for own in np.unique(true):
            members = points[true == own]
            x, y = members[np.abs(members - np.median(members, axis=0)).sum(axis=1).argmin()]
            drawn.append(f'<text x="{x:.0f}" y="{y:.0f}">{escape(classes[own])}</text>')
    shown = "All" if len(points) == contents["images"] else f"{len(points):,} of the"
    caption = (
        f"{shown} {contents['images']:,} test images by their representation (t-SNE; only who is near whom has a "
        f"meaning). {_colours(classes)} Circles with a strong rim are mistakes of PAWS-NN, diamonds labelled images."
    )
    mistakes = int((true != predicted).sum())
    description = f"{_MAP_TITLE}: {len(points):,} images of {len(classes)} classes, {mistakes} of them mistaken."
    svg = (
        f'<svg class="plot map" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">'
        f"{''.join(drawn)}</svg>"
    )
    return Panel("map", _MAP_TITLE, caption, Markup(svg))


def _scaled(points: list[list[float]]) -> np.ndarray:
    """From [0, 1] to the drawing, y upwards: (n, 2)."""
    size = np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN
    flat = np.array(points, dtype=np.float64).reshape(-1, 2)
    return _MARGIN + size * np.column_stack([flat[:, 0], 1 - flat[:, 1]])


def _colour(number: int, classes: list[str]) -> str:
    """The CSS variable of a class's colour; one for all where classes are too many to tell apart."""
    return f"--series-{number % SERIES + 1 if len(classes) <= _MOST_NAMES else 1}"


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
