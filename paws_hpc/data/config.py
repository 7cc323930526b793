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
    store, ImageNet's ``nXXXXXXXX_id.JPEG``, or an index (CIFAR). In a file's name ``{seed}`` stands for the run's seed,
    so that several lists are several seeds of one setting.

    Attributes:
        per_class: labelled images of each class.
        file: or a list of them.
        all: or all images but those for validation.
        validation_per_class: images of each class that choose between fine-tuned networks; never labelled ones.
        validation_file: or a list of them.
    """

    per_class: int | None = None
    file: str | None = None
    all: bool = False
    validation_per_class: int | None = None
    validation_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("per_class", "validation_per_class"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"labels.{name}={count} must be at least 1.")

    def check_complete(self) -> None:
        """Raise ValueError unless each set is given in exactly one way."""
        if [self.per_class is not None, self.file is not None, self.all].count(True) != 1:
            raise ValueError(
                f"labels.per_class={self.per_class}, labels.file={self.file}, labels.all={self.all}: give exactly one "
                "of them, and null or false for the others."
            )
        if (self.validation_per_class is None) == (self.validation_file is None):
            raise ValueError(
                f"labels.validation_per_class={self.validation_per_class} and labels.validation_file="
                f"{self.validation_file}: give exactly one of them, the other as null."
            )
