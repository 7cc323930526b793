"""Weights & Biases beside training, in a process of its own that can neither hurt nor delay it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.tracking import Row

_LOG = logging.getLogger(__name__)
_INIT_TIMEOUT_S = 30.0
_PREEMPTED_PATIENCE_S = 5.0  # of a grace time that may be half a minute in all
_PATIENCE_S = 90.0  # the other ranks wait meanwhile, and what comes after this stage too
_UPLOAD_S = 60.0  # of which for what is not uploaded yet
_ARTIFACT_S = 15.0  # and of which for the server's answer to the network that a stage made
_AFTER_PATIENCE_S = 2.0  # for the follower to end itself
_OFF = "Weights & Biases is off from here on"


@dataclass(frozen=True)
class Network:
    """A file of weights, as the lineage names it.

    Attributes:
        name: of the W&B artifact, whose versions are the files.
        file: its name.
        checksum: :func:`paws_hpc.files.file_hash` of it.
    """

    name: str
    file: str
    checksum: str


@dataclass(frozen=True)
class WandbRun:
    """Arguments of ``wandb.init``.

    Attributes:
        project: W&B project.
        entity: user or team; the account's default if none.
        id: stable across restarts, so that a requeued job continues its run.
        name: for people.
        group: the chain's name.
        job_type: the stage.
        tags: of the run.
        config: the frozen config, without secrets.
    """

    project: str
    entity: str | None
    id: str
    name: str
    group: str
    job_type: str
    tags: list[str]
    config: Row


@dataclass(frozen=True)
class Ending:
    """How a stage ended.

    Attributes:
        exit_code: 0 if there is nothing to continue.
        preempted: it goes on later, under the same id.
        patience_s: after which the follower ends itself, whatever it does.
        made: the network that the stage made.
    """

    exit_code: int
    preempted: bool
    patience_s: float
    made: Network | None = None


@dataclass(frozen=True)
class Followed:
    """What the follower is told.

    Attributes:
        metrics: the ``metrics.jsonl`` to show, already there.
        run: that shows it.
        best: which value of a metric its summary keeps, by a regular expression of names.
        mode: ``online``, ``offline``, or None for what the environment and the login say.
        used: the network that the stage began with.
        trainer: id of the process whose use of the machine W&B samples.
        init_timeout_s: after which W&B counts as out of reach.
        finish_timeout_s: for the upload at the end.
        artifact_timeout_s: for the answer to the network that the stage made.
        killed: how the stage ended if nobody says how.
    """

    metrics: str
    run: WandbRun
    best: dict[str, str]
    mode: str | None
    used: Network | None
    trainer: int
    init_timeout_s: float
    finish_timeout_s: float
    artifact_timeout_s: float
    killed: Ending


class WandbTracker:
    """Follows a ``metrics.jsonl``; used as a context manager. It cannot raise: a failure is logged, once."""

    def __init__(
        self,
        metrics: Path,
        run: WandbRun,
        *,
        best: dict[str, str],
        mode: str,
        used: Network | None,
        made: Callable[[], Network | None],
    ) -> None:
        """Start following.

        Args:
            metrics: the file, in which the rows are that the stage keeps from earlier starts.
            run: to show it in; a run of this id goes on.
            best: regular expression of metrics → ``min`` or ``max``, which their summaries keep.
            mode: as ``TrackingConfig.wandb``.
            used: the network that the stage begins with.
            made: called at the end of a stage that ended well, for the network that it made.
        """
        self._made = made
        self._process: subprocess.Popen[str] | None = None
        followed = Followed(
            metrics=str(metrics.resolve()),
            run=run,
            best=best,
            mode=None if mode == "auto" else mode,
            used=used,
            trainer=os.getpid(),
            init_timeout_s=_INIT_TIMEOUT_S,
            finish_timeout_s=_UPLOAD_S,
            artifact_timeout_s=_ARTIFACT_S,
            killed=Ending(exit_code=1, preempted=False, patience_s=_PATIENCE_S),
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "paws_hpc.engine.wandb_follower"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a Ctrl-C on the terminal is for the stage, which then says how it ended
            )
        except OSError as error:
            _LOG.warning("%s: its process cannot be started (%s).", _OFF, error)
            return
        self._listener = threading.Thread(target=self._listen, args=(self._process,), name="wandb", daemon=True)
        self._listener.start()
        self._write(self._process, json.dumps(asdict(followed)))

    def log(self, step: int, row: Row) -> None:
        """Do nothing: the row is in the file."""

    def __enter__(self) -> WandbTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say how the stage ended, and give W&B a limited time to take the rest."""
        if (process := self._process) is None:
            return
        preempted = kind is not None and issubclass(kind, PreemptedError)
        patience_s = _PREEMPTED_PATIENCE_S if preempted else _PATIENCE_S
        made = self._made_network() if kind is None else None
        self._write(process, json.dumps(asdict(Ending(0 if kind is None else 1, preempted, patience_s, made))))
        with suppress(BrokenPipeError):
            assert process.stdin is not None, "it is a pipe"
            process.stdin.close()
        self._listener.join(patience_s + _AFTER_PATIENCE_S)
        if self._listener.is_alive():  # stopped, so that not even its own guard could end it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._listener.join(_AFTER_PATIENCE_S)

    def _made_network(self) -> Network | None:
        try:
            return self._made()
        except OSError as error:
            _LOG.warning("Weights & Biases is not told which network was made (%s).", error)
            return None

    def _write(self, process: subprocess.Popen[str], line: str) -> None:
        """Send a line: a few kilobytes into an empty pipe, so that it cannot block."""
        assert process.stdin is not None, "it is a pipe"
        with suppress(BrokenPipeError):  # it has ended; the listener has told why
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Log what the follower tells, on a thread of its own, until it ends."""
        told = False
        assert process.stdout is not None, "it is a pipe"
        with process.stdout as lines:
            for line in lines:
                message = json.loads(line)
                told = True
                _LOG.warning("%s", message["message"])
                if message["offline"]:
                    os.environ["WANDB_MODE"] = "offline"  # the other stages of this process need not wait again
        if process.wait() != 0 and not told:
            _LOG.warning("%s: its process ended with status %d.", _OFF, process.returncode)
            os.environ["WANDB_MODE"] = "offline"
