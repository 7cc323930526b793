"""A store as a data set of torch, for programs that are not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from paws_hpc.store import ImageStore


class StoreDataset(Dataset[tuple[Any, int]]):
    """``dataset[i]`` is ``(image, label)`` as in torchvision: an RGB ``PIL.Image`` or what ``transform`` makes of it.

    The workers of a DataLoader may share it. ``classes`` are names by number, and ``store`` has keys and all labels.
    """

    def __init__(self, path: Path | str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        """Open the store at ``path``; errors as of :class:`~paws_hpc.store.ImageStore`."""
        self.store, self.transform = ImageStore(path), transform
        self.classes = self.store.classes

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.store[index])
        return image if self.transform is None else self.transform(image), int(self.store.labels[index])
