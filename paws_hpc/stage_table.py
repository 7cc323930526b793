"""The table of stages: what each one runs, needs and leaves behind. What other modules know of stages derives from it.

A new stage is a row here and a file ``stages/NAME.py`` with ``run(context)``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A step of the chain.

    Attributes:
        name: of the stage, its folder in the run directory, its field in ``resources``, and its Slurm jobs.
        function: ``module:function`` that runs the stage; ``paws_hpc.stages.NAME:run`` if empty. It is called with a
            ``StageContext``, or with a ``TorchContext`` if ``torch``. A name, so that the table loads without torch.
        needs: stages that must succeed before it begins; it is cancelled when one of them fails.
        follows: stages whose end it waits for, however they end.
        by_default: whether a launch that does not name stages runs it.
        trains: whether it has steps: it can be stopped between two of them and continues from a checkpoint. Any other
            stage starts over.
        sweep: whether it is one job per trial of the config section of its name.
        torch: whether it loads torch, joins the other ranks and gets a device; otherwise it is one process.
        gpu: whether it gets GPUs where the launcher has some.
        one_task: whether it has one node and one task, whatever shape the launcher gives to training.
        refreshed: whether it runs again after any stage before it, although it is done; it takes moments then.
        marker: file in the run directory that says it is done; ``NAME/DONE`` if empty.
    """

    name: str
    description: str
    function: str = ""
    needs: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    by_default: bool = True
    trains: bool = False
    sweep: bool = False
    torch: bool = True
    gpu: bool = True
    one_task: bool = False
    refreshed: bool = False
    marker: str = ""

    @property
    def load(self) -> Callable[[Any], None]:
        """Its function, imported now.

        Raises:
            RuntimeError: it needs torch, which cannot be imported here; on another node it may be.
        """
        if self.torch:
            import_torch()
        function: Callable[[Any], None] = resolve_name(self.function or f"paws_hpc.stages.{self.name}:run")
        return function


def import_torch() -> None:
    """Import torch as what trains wants it; raise RuntimeError, with the node's name, if that is not possible here."""
    # OpenMP's threads spin where they wait for one another, which on cores that others use too keeps from running just
    # those that they wait for: a step took 11 s instead of 60 ms. GNU's library reads this as torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch  # noqa: F401, PLC0415 - takes seconds
    except (ImportError, OSError) as error:
        raise RuntimeError(f"torch cannot be imported on {socket.gethostname()}: {error}") from error


_BEFORE_THE_REPORT = (
    Stage("prepare", "pack missing stores, draw the splits", torch=False, gpu=False, one_task=True),
    Stage("pretrain", "train the encoder with PAWS", needs=("prepare",), trains=True),
    Stage(
        "finetune", "fine-tune the encoder once per trial of the sweep", needs=("pretrain",), trains=True, sweep=True
    ),
    Stage(
        "baseline",
        "train on the same labels without pre-training, once per trial",
        "paws_hpc.stages.finetune:run",
        needs=("prepare",),
        trains=True,
        sweep=True,
    ),
    Stage(
        "selection",
        "choose trials by the validation split, score the test split once",
        needs=("pretrain",),
        follows=("finetune", "baseline"),  # it makes do with the trials that succeeded
        one_task=True,
        refreshed=True,
        marker="result.json",
    ),
    Stage(
        "calibrate",
        "calibrate probabilities, learn which images are unlike the training images",
        needs=("selection",),
        one_task=True,
        refreshed=True,
    ),
)
_REPORT = Stage(
    "report",
    "write the HTML report",
    "paws_hpc.report.page:run",
    follows=tuple(stage.name for stage in _BEFORE_THE_REPORT),  # a broken chain needs its report most
    torch=False,
    gpu=False,
    one_task=True,
    refreshed=True,
    marker="report/index.html",
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in (*_BEFORE_THE_REPORT, _REPORT)}
"""All stages, in the order of the chain."""

DEFAULT_STAGES = tuple(name for name, stage in STAGES.items() if stage.by_default)
SWEEPS = tuple(name for name, stage in STAGES.items() if stage.sweep)
