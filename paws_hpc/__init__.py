"""paws_hpc: PAWS pre-training on a Slurm cluster, from images to a report.

The layers; a module imports from the lines below its own and never from beside or above::

    launch, shards, status, doctor,
    report, sync, export, predict         commands
    finished_run                          a run opened by its name
    cluster | deploy                      where stages run (the only submitit imports) | a finished run put to use
    stages                                frozen config → files in the run directory
    config                                the whole schema, as dataclasses
    engine                                loops, optimiser, checkpoints, tracking
    data | models | objective             batches, encoders, losses
    store | distributed                   records on disk, ranks
    files                                 atomic writes, checksums

Below ``config`` nobody sees Hydra or OmegaConf: plain dataclasses arrive.

For notebooks and other programs: :func:`load_run`, :class:`ImageStore`, :class:`StoreDataset` and :func:`loss`
(docs/notebook.ipynb). Importing the package loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paws_hpc.data.dataset import StoreDataset
    from paws_hpc.finished_run import load_run
    from paws_hpc.objective.paws import loss
    from paws_hpc.store import ImageStore

__version__ = "0.3.0"
__all__ = ["ImageStore", "StoreDataset", "load_run", "loss"]

_HOMES = {"ImageStore": "store", "StoreDataset": "data.dataset", "load_run": "finished_run", "loss": "objective.paws"}


def __getattr__(name: str) -> object:
    """Import the public names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'paws_hpc' has no attribute {name!r}")
    return getattr(import_module(f"paws_hpc.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
