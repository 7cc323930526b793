"""Whose labels may be used, and where crops are cut; what they look like is in ``views.py``. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Placement = Literal["cpu-crop", "cpu-decode", "nvjpeg", "resident"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass
class LabelsConfig:
    """Whose labels may be used.

    Give each set either a number per class, drawn from the run's seed, or a file with one image per line: a key of the
    store, ImageNet's ``nXXXXXXXX_id.JPEG``, or an index (CIFAR).

    Attributes:
        per_class: labelled images of each class.
        file: or a list of them.
        validation_per_class: images of each class that choose between fine-tuned networks; never labelled ones.
        validation_file: or a list of them.
    """

    per_class: int | None = None
    file: str | None = None
    validation_per_class: int | None = None
    validation_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("per_class", "validation_per_class"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"labels.{name}={count} must be at least 1.")

    def check_complete(self) -> None:
        """Raise ValueError unless each set is given in exactly one way."""
        for count, file in (("per_class", "file"), ("validation_per_class", "validation_file")):
            numbers, listed = getattr(self, count), getattr(self, file)
            if (numbers is None) == (listed is None):
                raise ValueError(
                    f"labels.{count}={numbers} and labels.{file}={listed}: give exactly one of them, the other as null."
                )
