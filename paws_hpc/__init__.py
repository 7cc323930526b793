"""paws_hpc: PAWS pre-training on a Slurm cluster, from images to a report.

The layers; a module imports from the lines below its own and never from beside or above::

    launch, shards, status, doctor,
    report, sync, export, predict         commands
    cluster | deploy                      where stages run (the only submitit imports) | a finished run put to use
    stages                                frozen config → files in the run directory
    config                                the whole schema, as dataclasses
    engine                                loops, optimiser, checkpoints, tracking
    data | models | objective             batches, encoders, losses
    store | distributed                   records on disk, ranks
    files                                 atomic writes, checksums

Below ``config`` nobody sees Hydra or OmegaConf: plain dataclasses arrive.
"""

__version__ = "0.3.0"
