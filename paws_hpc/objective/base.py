"""What pre-training needs of an objective, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Step(Protocol):
    """What an objective reads of a batch (``paws_hpc.data.streams.PawsBatch``)."""

    @property
    def step(self) -> int:
        """0-based."""

    @property
    def support_classes(self) -> Tensor:
        """(S,) int64 in host memory, of all ranks' support rows: positions among the K classes of this step."""

    @property
    def known(self) -> Tensor:
        """(n,) bool, which unlabelled images are labelled images of one of the K classes."""

    @property
    def known_classes(self) -> Tensor:
        """(n,) int64, their classes' positions among the K; 0 where unknown."""


class Objective(ABC):
    """Turns the representations of a step's crops into a loss.

    Rows of h and z are this rank's: supports, then both large crops and m small crops of n images, view-major. The
    config declares the metrics.
    """

    @abstractmethod
    def inputs(self, batch: Step) -> dict[str, Tensor]:
        """Whatever differs from step to step beside the crops, in host memory: labels, and numbers on a schedule, 0-d.

        The loss is recorded once for each set of names and shapes and replayed with other values
        (``paws_hpc.engine.graphs``). So a term that a schedule turns off leaves its number out.
        """

    @abstractmethod
    def __call__(
        self, inputs: Mapping[str, Tensor], h: Tensor, z: Tensor, *, images: int, diagnosed: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step.

        Args:
            inputs: what :meth:`inputs` gave for the step, on the device; the host never waits to read them.
            h: (R, D) representations, for targets.
            z: (R, D) representations, for anchors; gradients flow here.
            images: n, the unlabelled images of this rank.
            diagnosed: whether to measure, too, what is watched and not trained on.

        Returns:
            The total, 0-dimensional, to be differentiated; and other metrics of this rank by name. Their mean over
            ranks is that of one process.
        """

    @abstractmethod
    def collapsed(self, metrics: Mapping[str, float]) -> bool:
        """Whether a step's metrics, as means over all ranks, are those of representations that have collapsed."""

    @abstractmethod
    def collapse_message(self, step: int, steps: int) -> str:
        """What to tell a user after ``steps`` collapsed steps, the last of which is ``step``; ends with the remedy."""
