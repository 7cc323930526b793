"""``bench bars``: the bars of training on one GPU, from the figures that jobs/gpu_check.sh left in a folder."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from paws_hpc.bench.figures import WIDTH, Figure, describe_machine, print_table
from paws_hpc.files import read_json, write_json

DEVICE_LIMIT, FROM_STORE, BASELINE, LOSS = 0.90, 0.97, 10.0, 1.5  # of one H100 or H200; LOSS in percent, at most
PLAIN = "default step / (plain ResNet-50 / what an image is worth)"
_CIFAR_H200 = 4869.0  # images/s of the CIFAR recipe's eager step on one H200 at b96581b, biases of convolutions added
_STEP_BARS = (  # recipe, figure of its group "step", title, unit, bar, whether that is the most
    ("imagenet", PLAIN, "ImageNet step / device limit", "x", DEVICE_LIMIT, False),
    ("imagenet", "from the store / step alone", "ImageNet from JPEG shards / step alone", "x", FROM_STORE, False),
    ("cifar", "graphed / eager", "CIFAR step / eager step of this commit, without biases", "x", 2.0, False),
    ("cifar", "from the store / DataLoader", "CIFAR from the store / DataLoader", "x", BASELINE, False),
    ("imagenet", "deterministic / default", "ImageNet deterministic / default", "x", 0.8, False),
    (
        "imagenet",
        "loss, gather and LARS, of the default step",
        "loss, gather and LARS, at their eager time, of the default step",
        "%",
        LOSS,
        True,
    ),
)


def bench_bars(options: argparse.Namespace) -> int:
    """Print each bar with its value, or why there is none, and write them as JSON; returns the exit status, 0.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not options.folder.is_dir():
        raise FileNotFoundError(f"{options.folder} is no folder. Name the OUT of jobs/gpu_check.sh with --folder.")
    folder, elsewhere = options.folder, None if options.device == "cuda" else "one H100 or H200"
    records = {name: _read(folder / f"{name}-{options.device}-step.json") for name in ("imagenet", "cifar")}
    steps = {name: record.get("groups", {}).get("step", {}) for name, record in records.items()}
    figures = []
    for recipe, name, title, unit, bar, at_most in _STEP_BARS:
        found = {each["name"]: each["value"] for each in steps[recipe].get("figures", [])}
        figures.append(Figure(title, found.get(name), unit, bar, at_most, elsewhere, absent=f"{recipe} has no figure"))
    per_s = steps["cifar"].get("rates", {}).get("paws_hpc, data on the device, graphed", {}).get("median")
    reference = f"CIFAR step / {_CIFAR_H200:,.0f} images/s (an H200, eager, b96581b, with biases)"
    on_h200 = any("H200" in name for name in records["cifar"].get("machine", {}).get("gpus", []))
    times, only_on = per_s and per_s / _CIFAR_H200, None if on_h200 else "one H200"
    figures.append(Figure(reference, times, "x", 2.0, only_on=only_on, absent="cifar has no graphed step"))
    start, checks = _read(folder / "start.json"), _read(folder / "checks.json")
    later = start["warm"] - start["eager"] if {"warm", "eager"} <= start.keys() else None
    figures.append(Figure("second start, compiled - eager", later, "s", 20.0, True, elsewhere, absent="no such starts"))
    figures += [Figure(f"start, {name}", seconds, "s") for name, seconds in start.items()]
    for name, title in (
        ("equal", "killed and resumed = uninterrupted, to the bit"),
        ("tests", "files of GPU tests passed"),
    ):
        value = float(checks[name]) if name in checks else None
        figures.append(Figure(title, value, "", 1.0, only_on=elsewhere, absent="it did not end"))
    write_json(options.json or folder / "bars.json", {
        "machine": describe_machine(),
        "bars": [asdict(figure) | {"reached": figure.reached} for figure in figures],
    })  # fmt: skip
    print_table(Console(width=None if sys.stdout.isatty() else WIDTH), "bars of one GPU", {}, figures)
    return 0


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, since what writes it failed or was cut short."""
    return dict(read_json(path)) if path.exists() else {}
