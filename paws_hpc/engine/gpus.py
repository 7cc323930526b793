"""How busy and how full the GPUs of each node are, so that a node that waits or is about to run out of memory shows.

Every rank reads its own GPU and rank 0 logs them all, so that other nodes need no tracker.
"""

from __future__ import annotations

import logging
import math
import socket
import zlib

import torch

from paws_hpc import distributed
from paws_hpc.engine.tracking import Row

_LOG = logging.getLogger(__name__)


class GpuMeter:
    """Reads this rank's GPU. A value that cannot be read is logged once and left out from then on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readable = {"utilisation", "memory"}

    def read(self) -> Row:
        """A row of :func:`by_node`, on all ranks together; empty on CPUs."""
        if self._device.type != "cuda":
            return {}
        return by_node(socket.gethostname(), self._value("utilisation"), self._value("memory"), self._device)

    def _value(self, what: str) -> float:
        """Utilisation in [0, 1], or gigabytes in use; NaN if unknown."""
        if what not in self._readable:
            return math.nan
        try:
            if what == "utilisation":
                return torch.cuda.utilization(self._device) / 100
            free, total = torch.cuda.mem_get_info(self._device)
            return (total - free) / 1e9
        except Exception as error:  # noqa: BLE001 - drivers and their wrappers raise anything, and training must not suffer
            self._readable.remove(what)
            _LOG.warning("The GPU's %s is not logged from here on (%s: %s).", what, type(error).__name__, error)
            return math.nan


def by_node(host: str, utilisation: float, memory_gb: float, device: torch.device) -> Row:
    """Bring together what each rank read; a collective.

    ``host`` names this rank's node; nodes are numbered from 0 in the order of ranks. What is unknown is NaN.

    Returns:
        the same on every rank: ``gpu/node0/utilisation``, the mean over the node's ranks, and ``gpu/node0/memory_gb``,
        of the fullest GPU; without what no rank of a node knows.
    """
    own = torch.tensor([[zlib.crc32(host.encode()), utilisation, memory_gb]], dtype=torch.float64, device=device)
    nodes: dict[float, list[list[float]]] = {}
    for node, *values in distributed.gather_rows(own).tolist():
        nodes.setdefault(node, []).append(values)
    row: Row = {}
    for number, gpus in enumerate(nodes.values()):
        busy, taken = ([value for value in column if not math.isnan(value)] for column in zip(*gpus, strict=True))
        if busy:
            row[f"gpu/node{number}/utilisation"] = sum(busy) / len(busy)
        if taken:
            row[f"gpu/node{number}/memory_gb"] = max(taken)
    return row
