"""Launching the real command against a test cluster, and looking at the run that comes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from paws_hpc.engine.tracking import read_rows
from paws_hpc.stages.attempts import Attempt, read_attempts
from tests.integration.launching import command
from tests.slurm.cluster import ASK_EVERY_S, Cluster, wait_until
from tests.tiny import WALL_CLOCK

ROOT = Path(__file__).parents[2]
ON_SLURM = (
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.partition=low",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=20",
    "hydra.launcher.signal_delay_s=60",
    "resources.pretrain.nodes=2",  # two ranks on two nodes
    "data.threads=1",
    "finetune.sweep.learning_rate=[0.1]",  # and so two elements
)
_LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # both nodes are this machine
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Run:
    """A run directory, and the chain of jobs that fills it."""

    def __init__(
        self, cluster: Cluster, folder: Path, *overrides: str, name: str = "run", checkout: Path = ROOT
    ) -> None:
        """Prepare; nothing is launched.

        Args:
            cluster: to run on.
            folder: of the stores and of the folder ``runs``, shared by all runs that name it.
            overrides: added to every launch.
            name: of the run.
            checkout: the code to launch.
        """
        self.cluster, self.folder, self.name, self.overrides, self.checkout = cluster, folder, name, overrides, checkout
        self.path = folder / "runs" / name

    # Launching

    def launch(self, *overrides: str) -> str:
        """Run the launch command, which must succeed; returns what it printed."""
        command, env = self.command(*overrides), self.environment()
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=240, cwd=self.checkout
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command(self, *overrides: str) -> list[str]:
        """The launch command."""
        return [*command(self.folder, *ON_SLURM), f"name={self.name}", *self.overrides, *overrides]

    def environment(self) -> dict[str, str]:
        """Of the launch command, and through it of the jobs."""
        return {**self.cluster.environment, **_LOOPBACK}

    # Jobs

    def job_ids(self) -> dict[str, str]:
        """Job name → id under which it was last submitted."""
        chain = json.loads((self.path / "chain.json").read_text())
        return {job["job"]: job["job_id"] for each in chain["submissions"] for job in each["jobs"]}

    def states(self) -> dict[str, str]:
        """Job name → what Slurm says of it now."""
        return {job: self.cluster.state(job_id) for job, job_id in self.job_ids().items()}

    def wait_running(self, job: str) -> str:
        """Wait until a job runs; returns its id."""
        job_id = self.job_ids()[job]
        self._wait(lambda: self.cluster.state(job_id) == "RUNNING", f"{job} does not run", ASK_EVERY_S)
        return job_id

    def wait_start(self, job: str, number: int) -> None:
        """Wait until the ranks of a job have begun its attempt ``number`` (counted from 1)."""
        self._wait(lambda: len(self.attempts(job)) >= number, f"{job} has no attempt {number}")

    def wait_rows(self, job: str, count: int) -> None:
        """Wait until a job has logged so many rows of metrics."""
        self._wait(lambda: len(self.rows(job)) >= count, f"{job} has not logged {count} rows")

    def wait_over(self) -> dict[str, str]:
        """Wait until no job of the chain waits or runs; returns their last states."""

        def over() -> bool:  # the last one first: as a rule it is the only one to be asked about
            return all(self.cluster.state(job_id) in _OVER for job_id in reversed(self.job_ids().values()))

        self._wait(over, "the chain does not end", ASK_EVERY_S)
        return self.states()

    def wait_done(self) -> None:
        """Wait until the chain has ended; all of its jobs must have succeeded."""
        states = self.wait_over()
        assert set(states.values()) == {"COMPLETED"}, self.report()

    def _wait(self, condition: Any, otherwise: str, every_s: float = 0.1) -> None:
        wait_until(condition, 400, lambda: f"{otherwise}\n{self.report()}", every_s=every_s)

    def attempts(self, job: str) -> list[Attempt]:
        """The attempts of a job, oldest first."""
        return read_attempts(self.path / "jobs" / job)

    def ends(self, job: str) -> list[str | None]:
        """How the attempts of a job ended; None for one that was killed."""
        return [attempt.end["how"] if attempt.end else None for attempt in self.attempts(job)]

    def span(self, job: str) -> tuple[datetime, datetime]:
        """When the first attempt of a job began, and when its last one ended."""
        first, last = self.attempts(job)[0], self.attempts(job)[-1]
        ended = datetime.fromisoformat(last.began) + timedelta(seconds=last.seconds)
        return datetime.fromisoformat(first.began), ended

    # Ranks

    def ranks(self, job: str, rank: int) -> list[int]:
        """Numbers of the processes of one rank, the oldest first."""
        return self.cluster.tasks(self._raw_id(job), rank)

    def signal_rank(self, job: str, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank alone."""
        os.kill(self.ranks(job, rank)[0], number)

    def wait_start_slowly(self, job: str, number: int) -> None:
        """Wait until attempt ``number`` of pre-training has begun; while the one before trains, stop its ranks for most
        of the time."""

        def arrived() -> bool:
            attempts = self.attempts(job)
            if len(attempts) < number and attempts[-1].end is None:
                with suppress(IndexError, ProcessLookupError):  # they have just left
                    for sent, pause_s in ((signal.SIGSTOP, 1.0), (signal.SIGCONT, 0.0)):
                        for rank in (0, 1):
                            self.signal_rank(job, rank, sent)
                        time.sleep(pause_s)
            return len(attempts) >= number

        self._wait(arrived, f"{job} has no attempt {number}")

    def wait_shielded(self, job: str, rank: int) -> None:
        """Wait until a rank has come so far that no signal is lost, which is long before it has imported torch."""

        def shielded() -> bool:
            return any(_blocks(pid, signal.SIGUSR2) for pid in self.ranks(job, rank))

        self._wait(shielded, f"rank {rank} of {job} does not start")

    def _raw_id(self, job: str) -> str:
        return self.cluster.show(self.job_ids()[job])["JobId"]  # an array's element has one of its own

    # Results

    def rows(self, job: str) -> list[dict[str, Any]]:
        """Rows of metrics of a job, without how long things took."""
        path = self.path / job / "metrics.jsonl"
        rows = read_rows(path) if path.exists() else []
        return [{name: row[name] for name in row if name not in WALL_CLOCK} for row in rows]

    def weights(self) -> dict[str, Any]:
        """All tensors that training left: the last checkpoint of pre-training and the best of every trial."""
        paths = [*sorted(self.path.glob("pretrain/checkpoints/*.pt"))[-1:], *sorted(self.path.glob("*/lr=*/best.pt"))]
        states = {str(path.relative_to(self.path)): torch.load(path, weights_only=True) for path in paths}
        for state in states.values():
            state.pop("validated", None)  # whether the last score was before or after the last checkpoint
        return states

    def log(self, job: str) -> str:
        """What the ranks of a job's stage and their batch scripts said, of all attempts."""
        folder = self.path / "logs" / job.partition("/")[0]
        return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.out")))

    def report(self) -> str:
        """For messages: queue, attempts, and the last lines of the logs, the controller's too."""
        parts = [self.cluster.queue()]
        for path in sorted((self.path / "jobs").rglob("*-*.json")):
            parts.append(f"{path.relative_to(self.path)}: {' '.join(path.read_text().split())}")
        for path in sorted((self.path / "logs").rglob("*.out")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            parts.append("\n".join([f"---- {path.relative_to(self.path)}", *lines]))
        parts.append(f"---- slurmctld\n{self.cluster.log('slurmctld')}")
        return "\n".join(parts)


def assert_same_results(found: Run, expected: Run, jobs: Sequence[str]) -> None:
    """Weights are the same to the bit, and so are curves but for how long things took."""
    torch.testing.assert_close(found.weights(), expected.weights(), rtol=0, atol=0)
    for job in jobs:
        assert found.rows(job), f"{job} has logged nothing"
        assert found.rows(job) == expected.rows(job), f"the curves of {job} differ"
    result = "result.json"
    if (expected.path / result).exists():
        assert json.loads((found.path / result).read_text()) == json.loads((expected.path / result).read_text())


def _blocks(pid: int, number: signal.Signals) -> bool:
    """Whether a process has blocked a signal; False if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))
    return bool(mask >> (number - 1) & 1)
