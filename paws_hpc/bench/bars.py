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

_STEP_BARS = (  # recipe, figure of its group "step", title, unit, bar, whether that is the most
    ("imagenet", "default step / compiled plain ResNet-50", "ImageNet step / device limit", "x", 0.90, False),
    ("imagenet", "from the store / step alone", "ImageNet from JPEG shards / step alone", "x", 0.97, False),
    ("cifar", "graphed / eager", "CIFAR step / eager step", "x", 2.0, False),
    ("cifar", "from the store / DataLoader", "CIFAR from the store / DataLoader", "x", 10.0, False),
    ("imagenet", "deterministic / default", "ImageNet deterministic / default", "x", 0.8, False),
    ("imagenet", "loss, gather and LARS, of the default step", "loss, gather and LARS, of the step", "%", 1.5, True),
)


def bench_bars(options: argparse.Namespace) -> int:
    """Print each bar with its value, or why there is none, and write them as JSON; the exit status is always 0."""
    folder, elsewhere = options.folder, None if options.device == "cuda" else "one H100 or H200"
    figures = []
    for recipe, name, title, unit, bar, at_most in _STEP_BARS:
        record = _read(folder / f"{recipe}-{options.device}-step.json")
        found = {each["name"]: each["value"] for each in record.get("groups", {}).get("step", {}).get("figures", [])}
        figures.append(Figure(title, found.get(name), unit, bar, at_most, elsewhere, absent=f"{recipe} has no figure"))
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
    """Empty where a part did not come to its end."""
    return dict(read_json(path)) if path.exists() else {}
