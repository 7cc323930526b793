"""Where numbers go: ``metrics.jsonl`` always, Weights & Biases beside it, and neither can hurt training."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from paws_hpc.engine.config import TrackingConfig
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.files import atomic_write

_LOG = logging.getLogger(__name__)
_INIT_TIMEOUT_S = 30.0
_PREEMPTED_FINISH_TIMEOUT_S = 5.0  # of a grace time that may be half a minute in all
_FINISH_TIMEOUT_S = 120.0  # the other ranks wait meanwhile, and what comes after this stage too

Row = dict[str, Any]


class Tracker(Protocol):
    """Takes rows of metrics and events of one stage; used as a context manager."""

    def log(self, step: int, row: Row) -> None:
        """Record ``row`` at a 0-based step."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullTracker:
    """For ranks that do not write, and for runs nobody watches."""

    def log(self, step: int, row: Row) -> None:
        """Do nothing."""

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, flushed line by line.

    Opening it for a run that resumes drops the rows past the checkpoint, which training is about to write again, and a
    line torn by a kill; the curve stays unbroken.
    """

    def __init__(self, path: Path, *, resume_step: int, awaits_validation: bool = False) -> None:
        """Keep the rows before ``resume_step`` (0-based) and append from there.

        Args:
            path: of the file.
            resume_step: steps of the checkpoint from which training goes on.
            awaits_validation: the checkpoint is from before the validation that follows its last step. A row of that
                validation, whose fields begin with ``validation``, is dropped: it is about to be written again.
        """
        kept = [row for row in read_rows(path) if row["step"] < resume_step] if path.exists() else []
        if awaits_validation:
            kept = [row for row in kept if row["step"] < resume_step - 1 or not _is_validation(row)]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def log(self, step: int, row: Row) -> None:
        """Append one row; values that JSON cannot hold (NaN, infinity) are written as their names."""
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _is_validation(row: Row) -> bool:
    return any(name.startswith("validation") for name in row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``; a last line torn by a kill is left out.

    Raises:
        ValueError: any other line is not a JSON object; file and line are named.
    """
    return parse_rows(path)[0]


def parse_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a ``metrics.jsonl``, the first of line 1, and whether a torn last line was left out.

    Raises:
        ValueError: any other line is not a JSON object; file and line are named.
    """
    *lines, last = path.read_bytes().split(b"\n")  # a whole line ends in a newline, so only a torn one is last here
    rows = [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]
    if not last:
        return rows, False
    try:
        return [*rows, _parse_line(path, len(lines) + 1, last)], False
    except ValueError:
        return rows, True


def _parse_line(path: Path, number: int, line: bytes) -> Row:
    remedy = "Only the last line may be torn. Restore the file or remove it."
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}). {remedy}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object but {line.decode()}. {remedy}")  # noqa: TRY004
    return row


class Trackers:
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, step: int, row: Row) -> None:
        """Record ``row`` with each."""
        for tracker in self._trackers:
            tracker.log(step, row)

    def __enter__(self) -> Trackers:
        for tracker in self._trackers:
            tracker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.__exit__(kind, error, trace)


class WandbTracker:
    """A Weights & Biases run that cannot raise: its first failure is logged once and ends it, and training goes on."""

    def __init__(
        self, config: TrackingConfig, *, folder: Path, run_id: str, group: str, job_type: str, settings: Row
    ) -> None:
        """Start or continue the run ``run_id``.

        Args:
            config: mode, project, tags.
            folder: of the stage; offline files go to its ``wandb/``.
            run_id: stable across restarts, so that a requeued job continues its run.
            group: the chain's name.
            job_type: the stage.
            settings: the frozen config, without secrets.
        """
        self._run: Any = None
        self._guarded(
            "start",
            lambda: self._start(
                config, folder=folder, run_id=run_id, group=group, job_type=job_type, settings=settings
            ),
        )

    def _start(
        self, config: TrackingConfig, *, folder: Path, run_id: str, group: str, job_type: str, settings: Row
    ) -> None:
        import wandb  # noqa: PLC0415 - a second of import time that a run without W&B need not pay

        def init(mode: Any) -> Any:
            return wandb.init(
                project=config.project,
                entity=config.entity,
                tags=config.tags,
                dir=folder,
                id=run_id,
                name=f"{group}/{job_type}",
                group=group,
                job_type=job_type,
                resume="allow",
                reinit="create_new",  # not a run that failed earlier in this process and so was never finished
                mode=mode,
                config=settings,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, x_disable_meta=True, init_timeout=_INIT_TIMEOUT_S
                ),
            )

        wandb.setup(wandb.Settings(silent=True))
        asked = os.environ.get("WANDB_MODE") if config.wandb == "auto" else config.wandb
        if asked is not None:
            self._run = init(asked)
        elif not wandb.login(prompt=False, verify=False):
            self._run = init("offline")
        else:
            try:
                self._run = init("online")
            except wandb.errors.CommError as error:
                _LOG.warning("W&B cannot be reached, so runs are kept offline for `wandb sync` (%s).", error)
                os.environ["WANDB_MODE"] = "offline"  # the other stages of this process need not wait again
                wandb.teardown()  # its service still holds the run id
                self._run = init("offline")
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")

    def log(self, step: int, row: Row) -> None:
        """Record ``row`` on the axis ``trainer/step``."""
        if self._run is not None:
            self._guarded("log", lambda: self._run.log({"trainer/step": step, **row}, step=step))

    def __enter__(self) -> WandbTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is None:
            return
        preempted = kind is not None and issubclass(kind, PreemptedError)
        what = "finish before the job is preempted" if preempted else "finish"
        self._guarded(what, lambda: self._finish(preempted=preempted, exit_code=0 if kind is None else 1))

    def _finish(self, *, preempted: bool, exit_code: int) -> None:
        """End the run, or say that it goes on later under its id; whatever does not answer is left behind.

        Raises:
            TimeoutError: it did not finish in time. What was logged is on disk, for ``wandb sync``.
        """
        errors: list[Exception] = []
        run = self._run

        def finish() -> None:
            try:
                if preempted:
                    run.mark_preempting()
                run.finish(exit_code=exit_code)  # 0 would mean that there is nothing to continue
            except Exception as error:  # noqa: BLE001 - handed to the guard
                errors.append(error)

        thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
        thread.start()
        timeout_s = _PREEMPTED_FINISH_TIMEOUT_S if preempted else _FINISH_TIMEOUT_S
        thread.join(timeout_s)
        if errors:
            raise errors[0]
        if thread.is_alive():
            raise TimeoutError(f"no answer within {timeout_s:g} s")

    def _guarded(self, what: str, call: Any) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - wandb raises anything from OSError to AssertionError; law 6
            self._run = None
            _LOG.warning(
                "Weights & Biases is off from here on: it could not %s (%s: %s).", what, type(error).__name__, error
            )
            if isinstance(error, ConnectionError):  # its service process is gone
                self._forget_service()

    def _forget_service(self) -> None:
        """Let the next stage start another service process, and spare the user complaints when this process ends."""
        import wandb  # noqa: PLC0415 - as above

        with suppress(Exception):  # it fails, but first takes itself off the list of what to do at exit
            wandb.teardown()
