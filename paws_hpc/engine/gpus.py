"""How busy and how full the GPUs of each node are, so that a node that waits, or is about to run out, can be seen.

Every rank asks for its own GPU; rank 0 hears of all and logs them, so that other nodes need no tracker of their own.
"""

from __future__ import annotations

import logging
import math
import socket
import zlib
from collections.abc import Callable

import torch

from paws_hpc import distributed
from paws_hpc.engine.tracking import Row

_LOG = logging.getLogger(__name__)


class GpuMeter:
    """Reads this rank's GPU. What cannot be read is logged once and left out from then on; training goes on."""

    def __init__(self, device: torch.device) -> None:
        """Prepare to read ``device``; of a CPU there is nothing to read."""
        self._device = device
        self._readings: dict[str, Callable[[], float]] = {
            "utilisation": lambda: torch.cuda.utilization(device) / 100,
            "memory": lambda: _used_gb(device),
        }

    def read(self) -> Row:
        """A row of :func:`by_node`, on all ranks together; empty on CPUs."""
        if self._device.type != "cuda":
            return {}
        return by_node(socket.gethostname(), self._ask("utilisation"), self._ask("memory"), self._device)

    def _ask(self, what: str) -> float:
        if (reading := self._readings.get(what)) is None:
            return math.nan
        try:
            return reading()
        except Exception as error:  # noqa: BLE001 - drivers, and packages that wrap them, raise anything; law 6
            del self._readings[what]
            _LOG.warning(
                "The GPU's %s is not logged from here on (%s: %s).", what, type(error).__name__, error
            )  # fmt: skip
            return math.nan


def _used_gb(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e9


def by_node(host: str, utilisation: float, memory_gb: float, device: torch.device) -> Row:
    """Bring together what each rank read of its GPU; a collective.

    Args:
        host: name of this rank's node. Nodes are numbered from 0 in the order of ranks.
        utilisation: share of the time in which this rank's GPU worked, in [0, 1]; NaN if unknown.
        memory_gb: what is taken of its memory, by whomever, 1e9 bytes; NaN if unknown.
        device: of this rank's tensors.

    Returns:
        the same on every rank: ``gpu/node0/utilisation``, the mean over the node's ranks, and
        ``gpu/node0/memory_gb``, of the fullest; without what no rank of a node knows. (Names that begin with
        "system" are W&B's own.)
    """
    own = torch.tensor([[zlib.crc32(host.encode()), utilisation, memory_gb]], dtype=torch.float64, device=device)
    nodes: dict[float, list[list[float]]] = {}
    for node, *figures in distributed.gather_rows(own).tolist():
        nodes.setdefault(node, []).append(figures)
    row: Row = {}
    for number, gpus in enumerate(nodes.values()):
        busy, taken = ([value for value in column if not math.isnan(value)] for column in zip(*gpus, strict=True))
        if busy:
            row[f"gpu/node{number}/utilisation"] = sum(busy) / len(busy)
        if taken:
            row[f"gpu/node{number}/memory_gb"] = max(taken)
    return row
