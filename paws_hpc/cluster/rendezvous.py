"""How the ranks of one job find each other: rank 0 listens and publishes its address in the run directory."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paws_hpc.files import read_json, write_json

_POLL_S = 0.1


@dataclass(frozen=True)
class Address:
    """Where rank 0 can be reached, and where it listens.

    Attributes:
        host: name or number that the other ranks connect to.
        listen_on: address of the interface; empty for all of them.
    """

    host: str
    listen_on: str


def own_address(num_nodes: int) -> Address:
    """Of this machine: loopback on one node; MASTER_ADDR if the environment has it, for clusters where a node's name
    leads to the wrong network; otherwise the node's name, on all interfaces."""
    if num_nodes == 1:
        return Address("127.0.0.1", "127.0.0.1")
    if chosen := os.environ.get("MASTER_ADDR"):
        return Address(chosen, chosen)
    return Address(socket.gethostname(), "")


def join(
    folder: Path,
    *,
    start: str,
    rank: int,
    world_size: int,
    address: Address,
    device: torch.device,
    timeout_s: float = 600.0,
) -> None:
    """Form the process group of ``world_size`` ranks, over NCCL on GPUs and gloo on CPUs.

    Args:
        folder: seen by all ranks; holds ``<start>.json`` with rank 0's address.
        start: unique to this start of this job, so that no address of an earlier start is taken for it.
        rank: of this process.
        world_size: of the job; 1 is only ever asked for, never fallen back to.
        address: of this process's machine.
        device: of this rank.
        timeout_s: to wait for the others.

    Raises:
        ValueError: rank 0 published a loopback address, and is on another machine.
        TimeoutError: rank 0 published no address in time.
        RuntimeError: not all ranks arrived in time.
    """
    path = folder / f"{start}.json"
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:
        listener = socket.create_server((address.listen_on, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            address.host,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        write_json(path, {"host": address.host, "port": port, "node": socket.gethostname()})
    else:
        published = _wait_for(path, timeout_s)
        _check_reachable(published)
        store = dist.TCPStore(published["host"], published["port"], world_size, is_master=False, timeout=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        dist.barrier()
    finally:
        if rank == 0:  # nobody may take this address for that of a later start
            path.unlink()


def _check_reachable(published: dict[str, Any]) -> None:
    host, node = published["host"], published["node"]
    if (host == "localhost" or host.startswith("127.")) and node != socket.gethostname():
        raise ValueError(
            f"Rank 0 on {node} says that it is at {host}, which is this machine ({socket.gethostname()}) for everybody "
            "else. That comes from MASTER_ADDR in the environment of the launch: unset it, or set it to rank 0's own "
            "address in hydra.launcher.setup."
        )


def _wait_for(path: Path, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Rank 0 did not publish its address in {path} within {timeout_s:g} s. It failed to start (see its "
                "log), or the run directory is not on a file system that all ranks share."
            )
        time.sleep(_POLL_S)
    address: dict[str, Any] = read_json(path)
    return address
