"""Augmentation as one graph of ``torch.compile`` per size of batch.

Written step by step (augment.py), each operation gets the rows that it changes, whose number differs from batch to
batch. Here every operation computes all rows and the result is taken where it is wanted: nothing depends on what was
drawn, so that one graph serves every step, and a handful of fused kernels replaces hundreds of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paws_hpc.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    JITTER,
    NO_JITTER,
    SATURATION,
    AugmentParameters,
    gaussian_blur,
    require_augmentable,
    to_grayscale,
)
from paws_hpc.data.config import AugmentConfig
from paws_hpc.data.devices import to_device
from paws_hpc.whole_graph import whole_graph


class CompiledAugmentation:
    """What :func:`paws_hpc.data.augment.augment` does, compiled at the first batch of each size.

    Values in [0, 1] agree with it to 5e-6. A graph break is an error that says where.
    """

    def __init__(self, config: AugmentConfig, *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Prepare; compiles nothing yet.

        Args:
            config: of all parameters to come; what it turns off is not in the graph.
            backend: of ``torch.compile``.
        """
        strengths = {
            BRIGHTNESS: config.brightness,
            CONTRAST: config.contrast,
            SATURATION: config.saturation,
            HUE: config.hue,
        }
        self._kinds = tuple(kind for kind, strength in strengths.items() if strength and config.jitter_probability)
        self._flips = config.flip_probability > 0
        self._grays = config.grayscale_probability > 0
        self._blurs = config.blur_probability > 0
        self._graph = whole_graph(self._all_rows, backend=backend)

    def __call__(
        self, images: Tensor, parameters: AugmentParameters, *, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """As of :func:`paws_hpc.data.augment.augment`; channels-last on a GPU."""
        require_augmentable(images, parameters, mean, std)
        packed = [parameters.flip, *parameters.jitter.T, *parameters.order.T, parameters.grayscale]
        rows = torch.stack([values.float() for values in (*packed, parameters.blur_sigma)])
        colours = torch.tensor((mean, std), dtype=torch.float32)
        result: Tensor = self._graph(images, to_device(rows, images.device), to_device(colours, images.device))
        return result

    def _all_rows(self, images: Tensor, rows: Tensor, colours: Tensor) -> Tensor:
        """(n, C, H, W) uint8, (11, n) parameters in the order of the class, (2, 3) mean and std → (n, 3, H, W)."""
        flip, jitter, order, gray, sigmas = rows[0], rows[1:5], rows[5:9], rows[9], rows[10]
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
        if self._flips:
            pixels = torch.where(_each(flip > 0), pixels.flip(-1), pixels)
        for kind_of_turn in order if self._kinds else ():
            pixels = self._jittered(pixels, kind_of_turn, jitter)
        if self._grays:
            pixels = torch.where(_each(gray > 0), to_grayscale(pixels), pixels)
        if self._blurs:
            blurred = gaussian_blur(pixels, torch.where(sigmas > 0, sigmas, 1))
            pixels = torch.where(_each(sigmas > 0), blurred, pixels)
        centre, scale = colours[:, :, None, None]
        layout = torch.channels_last if images.is_cuda else torch.contiguous_format
        return ((pixels - centre) / scale).contiguous(memory_format=layout)

    def _jittered(self, pixels: Tensor, kind_of_row: Tensor, jitter: Tensor) -> Tensor:
        """One turn: (n, C, H, W), each row by the operation whose turn it is there, by its amount among (4, n)."""
        changed = pixels
        for kind in self._kinds:
            wanted = (kind_of_row == kind) & (jitter[kind] != NO_JITTER[kind])
            changed = torch.where(_each(wanted), JITTER[kind](pixels, jitter[kind]), changed)
        return changed


def _each(values: Tensor) -> Tensor:
    """(n,) per image, to go with its pixels."""
    return values[:, None, None, None]
