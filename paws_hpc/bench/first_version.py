"""This program beside an older commit of itself: both pre-train for real, each with its own code, in turns.

All that both need to have in common is the command and ``metrics.jsonl``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paws_hpc.bench.rounds import Rates
from paws_hpc.engine.tracking import read_rows

FIRST = "74450a2"
"""The first version: the last commit before work on Slurm began."""

_ROOT = Path(__file__).parents[2]
_EPOCHS = 4


def beside(commit: str, *, rounds: int, tell: Callable[[str], None]) -> dict[str, Rates]:
    """Pre-train the demo with this code and with a commit's, once each per round.

    Args:
        commit: anything that git knows a commit by.
        rounds: how often; none warms up, as every run begins anew and its first row of metrics is left out.
        tell: is told what is being done.

    Returns:
        rates of this code and of the other, with ``data_wait`` of each round.

    Raises:
        ValueError: git does not know the commit, or a run failed.
    """
    with TemporaryDirectory(prefix="paws-hpc-bench-") as scratch, _checkout(commit, Path(scratch)) as older:
        sides = {"paws_hpc": _ROOT, f"commit {commit}": older}
        results = {name: Rates(name) for name in sides}
        for number in range(rounds):
            for name, code in list(sides.items())[:: -1 if number % 2 else 1]:  # nobody always follows the other
                tell(f"{name}: round {number + 1} of {rounds}")
                found = _pretrain(code, Path(scratch) / f"runs-{number}-{code.name}")
                results[name].per_s.append(found.pop("images_per_s"))
                results[name].seen.append(found)
    return results


@contextmanager
def _checkout(commit: str, scratch: Path) -> Iterator[Path]:
    tree = scratch / "older"
    _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        yield tree
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)} failed in {_ROOT}: {done.stderr.strip()}")


def _pretrain(code: Path, runs: Path) -> dict[str, Any]:
    """Run a short pre-training of the digits with the code of one folder; its rate and its share of waiting."""
    command = [
        sys.executable,
        "-m",
        "paws_hpc.launch",
        "experiment=digits",
        "stages=[prepare,pretrain]",
        f"runs={runs}",
    ]
    own = [f"data.train={runs}/train", f"data.test={runs}/test", "name=bench", "device=cpu", "tracking.wandb=disabled"]
    done = subprocess.run(
        [*command, *own, f"pretrain.epochs={_EPOCHS}"], cwd=code, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ValueError(f"pre-training with the code of {code} failed: {said[-1]}")
    return whole_loop(read_rows(runs / "bench" / "pretrain" / "metrics.jsonl"))


def whole_loop(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Images per second and share of waiting over all windows of a ``metrics.jsonl`` but the first, which warms up.

    A window is what one ``throughput`` tells of: the steps since the one before, without scoring and saving.
    """
    windows, steps = [], 0
    for row in rows:
        steps += "loss/total" in row
        if "throughput/images_per_s" in row:
            windows.append((steps, row["throughput/images_per_s"], row["throughput/data_wait"]))
            steps = 0
    if len(windows) < 2:
        raise ValueError(f"pre-training logged {len(windows)} windows of metrics; at least 2 are needed")
    seconds = [count / rate for count, rate, _ in windows[1:]]  # in units of one step's images
    waited = sum(spent * wait for spent, (_, _, wait) in zip(seconds, windows[1:], strict=True))
    return {
        "images_per_s": sum(count for count, _, _ in windows[1:]) / sum(seconds),
        "data_wait": waited / sum(seconds),
        "median_window_images_per_s": statistics.median(rate for _, rate, _ in windows[1:]),
    }
