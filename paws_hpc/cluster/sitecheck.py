"""Whether files, devices and packages are where jobs will look for them, as seen from this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from paws_hpc.config import Config
from paws_hpc.data.config import DataConfig
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore

Parameters = Mapping[str, Any]
"""What submitit.SlurmExecutor.update_parameters takes."""

SHARED = "shared folders"
_LOCAL = {"btrfs", "devtmpfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs"}


@dataclass(frozen=True)
class Check:
    """A question and its answer.

    Attributes:
        name: what was looked at.
        verdict: ``problem`` keeps a chain from running, ``warning`` may.
        found: what is so.
        remedy: what to do about it; empty if there is nothing to do.
    """

    name: str
    verdict: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Check:
    """May keep a chain from running."""
    return Check(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Check:
    """Keeps a chain from running."""
    return Check(name, "problem", found, remedy)


def check_site(config: Config, asked: Mapping[str, Parameters], run: RunFolder) -> Iterator[Check]:
    """Devices asked for, folders, stores and versions."""
    yield from _devices(config, asked)
    yield _folder("run directory", run.path)
    for what, path in config.data.stores.items():
        yield _store(what, path, config.data)
    yield _versions()
    yield _shared(Path(config.runs), *map(Path, config.data.stores.values()), Path(sys.prefix))


def _devices(config: Config, asked: Mapping[str, Parameters]) -> Iterator[Check]:
    """One GPU per rank, where training is to have GPUs."""
    shapes: dict[tuple[int, int, bool], list[str]] = {}
    for stage in (name for name, row in STAGES.items() if row.trains):
        if stage in asked and config.device != "cpu":
            parameters = asked[stage]
            otherwise = any(parameters.get(name) for name in ("gpus_per_task", "gres"))
            shape = int(parameters.get("gpus_per_node", 0)), int(parameters.get("tasks_per_node", 1)), otherwise
            shapes.setdefault(shape, []).append(stage)
    for (gpus, tasks, otherwise), stages in shapes.items():
        fields = f"{', '.join(stages)}: gpus_per_node={gpus}, tasks_per_node={tasks}"
        if gpus == 0 and not otherwise:
            verdict = problem if config.device == "cuda" else warning
            yield verdict("devices", f"{fields}, so no GPU", "Set hydra.launcher.gpus_per_node, or device=cpu.")
        elif 0 < gpus < tasks:
            yield problem("devices", f"{fields}, so some ranks would find no GPU", "Ask for one GPU per task.")
        elif gpus > tasks:
            yield warning("devices", f"{fields}, so {gpus - tasks} GPUs per node idle", "Ask for one task per GPU.")
        elif gpus:
            yield ok("devices", f"{fields}: one GPU per rank")


def _folder(name: str, path: Path) -> Check:
    there = _existing(path)
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(name, f"{there} cannot be written", "Choose another with runs=….")
    return ok(name, f"{path} can be written here")


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.resolve().parents) if parent.exists())


def _shared(*paths: Path) -> Check:
    """Whether compute nodes see these folders too, as far as their mounts tell."""
    kinds = {path: file_system(_existing(path)) for path in paths}
    local = [f"{path} on {kind}" for path, kind in kinds.items() if kind in _LOCAL]
    if local:
        return warning(
            SHARED,
            f"compute nodes may not see {', '.join(local)}",
            "Move them to a file system that the nodes share, or make sure with --probe that they see them.",
        )
    return ok(SHARED, ", ".join(f"{path} on {kind}" for path, kind in kinds.items()))


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as the kernel names it: ``nfs4``, ``lustre``, ``ext4``, …"""
    target, best, kind = str(path.resolve()), "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # blanks are written \040
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def _store(name: str, path: str, data: DataConfig) -> Check:
    if data.source is not None and not (Path(path) / "manifest.json").exists():
        return ok(name, f"{path} is not there yet; the stage prepare packs it from {data.source}")
    try:
        store = ImageStore.open(Path(path))
    except (OSError, ValueError) as error:
        return problem(name, str(error), "Look closer with `python -m paws_hpc.shards verify`.")
    with store:
        return ok(name, f"{path}: {len(store):,} images of {len(store.classes):,} classes")


def _versions() -> Check:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    cuda = torch.version.cuda or "none"
    return ok("packages", f"torch {torch.__version__}, CUDA {cuda}, NCCL {nccl}, as installed here")
