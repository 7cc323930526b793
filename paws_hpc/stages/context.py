"""What a stage is given when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from paws_hpc.config import Config
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.trial import Trial

if TYPE_CHECKING:
    import torch

    from paws_hpc.engine.preemption import JobControl


@dataclass(frozen=True)
class StageContext:
    """Of any stage.

    Attributes:
        config: of the run.
        run: its folder.
        stage: name of the stage.
        trial: the point of the sweep, for a stage that is one.
        fence: raises if another attempt of this job has taken over; call it before every write that others rely on.
    """

    config: Config
    run: RunFolder
    stage: str = ""
    trial: Trial | None = None
    fence: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class TorchContext(StageContext):
    """Of a stage that loads torch; by then the ranks have joined (``paws_hpc.distributed`` has rank and world size).

    The defaults import torch only when they are needed: stages without it import this module too.

    Attributes:
        device: of this rank.
        control: says whether to stop, and whether this attempt may still write (its ``fence`` counts on rank 0 only).
    """

    device: torch.device = field(default_factory=lambda: resolve_name("torch:device")("cpu"))
    control: JobControl = field(default_factory=lambda: resolve_name("paws_hpc.engine.preemption:UNATTENDED"))
