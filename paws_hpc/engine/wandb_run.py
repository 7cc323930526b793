"""Weights & Biases beside training: a process of its own shows the ``metrics.jsonl`` of a stage as a run.

    python -m paws_hpc.engine.wandb_run TASK    started by WandbTracker, one per stage, and by paws_hpc.sync

Training never calls W&B, so whatever hangs, fails or dies in it costs the run nothing (decision page 0008). The task is
JSON. A line of JSON on the process's input says how the stage ended; the end of the input without it means that
training was killed. It prints messages for the user, one JSON object per line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from paws_hpc.command import program
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.tracking import Row, Tracker
from paws_hpc.files import file_hash, read_json, write_json
from paws_hpc.metrics import is_validation

_LOG = logging.getLogger(__name__)
_INIT_TIMEOUT_S = 30.0
_PREEMPTED_PATIENCE_S = 5.0  # of a grace time that may be half a minute in all
_PATIENCE_S = 90.0  # the other ranks and the next stage wait meanwhile
_ARRIVAL_S = 5.0  # for the server to count rows that it took
_POLL_S = 0.25
_STARTS_APART_S = 10  # over which the jobs of an array begin
_LATER = f"`{program('sync')} RUN` uploads what is missing, from wherever there is a connection."
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def position(row: Row) -> int:
    """The step of a row in W&B, which drops rows whose step is not larger than its last one.

    A training step has up to three rows, in this order: losses, an event, a validation.
    """
    return 3 * int(row["step"]) + (2 if any(map(is_validation, row)) else int("event" in row))


def logged(row: Row) -> Row:
    """A row of ``metrics.jsonl`` as W&B gets it."""
    values = {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
    axes = {"step": "trainer/global_step", "epoch": "trainer/epoch"}
    return {axes.get(name, name): value for name, value in values.items()}


def summarise(rows: list[Row], best: Mapping[str, str]) -> Row:
    """The summary of a run, of all its rows, as W&B would know only those of the latest start.

    The last value of each metric, and of those in ``best`` (a regular expression of names → ``min`` or ``max``)
    ``{"last": …, "max": …, "mean": …}``.
    """
    columns: dict[str, list[Any]] = {}
    for row in map(logged, rows):
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    summary: Row = {}
    for name, values in columns.items():
        summary[name] = values[-1]
        finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        which = next((which for names, which in best.items() if re.fullmatch(names, name)), None)
        if finite and which is not None:
            extreme = {"min": min, "max": max}[which](finite)
            summary[name] = {"last": values[-1], which: extreme, "mean": sum(finite) / len(finite)}
    return summary


def reached(folder: Path) -> dict[str, int]:
    """The positions up to which the server (``online``) and offline files (``offline``) have a stage's rows, or -1."""
    path = folder / "wandb" / "sent.json"
    return {"online": -1, "offline": -1} | (read_json(path) if path.exists() else {})


def start_process(folder: Path, mode: str, *, patience_s: float) -> subprocess.Popen[str]:
    """Show ``metrics.jsonl`` in the folder of a stage, with ``wandb/run.json``.

    With the modes ``auto``, ``online`` and ``offline`` a run that cannot be online is kept offline; with ``upload`` it
    is not. If the stage is killed, the process ends within ``patience_s`` seconds.
    """
    limits = {"init_timeout": min(_INIT_TIMEOUT_S, patience_s / 2), "finish_timeout": patience_s * 2 / 3}
    task = {"folder": str(folder), "mode": mode, "patience_s": patience_s, "limits": limits}
    return subprocess.Popen(
        [sys.executable, "-m", "paws_hpc.engine.wandb_run", json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a Ctrl-C on the terminal is for the stage, which then says how it ended
    )


def end_process(process: subprocess.Popen[str], *, exit_code: int, preempted: bool, patience_s: float) -> None:
    """Say how the stage ended: from then on the process has ``patience_s`` seconds."""
    assert process.stdin is not None, "it is a pipe"
    with suppress(BrokenPipeError):  # the process has ended; its last message said why
        print(
            json.dumps({"exit_code": exit_code, "preempted": preempted, "patience_s": patience_s}), file=process.stdin
        )
        process.stdin.close()


class WandbTracker(Tracker):
    """Shows a stage's ``metrics.jsonl`` in W&B, as a context manager. A failure is logged once and never raised."""

    def __init__(self, folder: Path, spec: dict[str, Any], *, mode: str) -> None:
        """Start the process for the folder of a stage, where ``metrics.jsonl`` is already.

        The spec is kept as ``wandb/run.json``, for ``paws_hpc.sync`` too: the arguments of ``wandb.init`` under
        ``run``, and ``best`` as in :func:`summarise`. ``used`` is the network that the stage begins with: its name,
        file and checksum; ``made`` is the one that it makes: its name and its path below ``folder``. Each may be None.
        The mode is that of ``TrackingConfig.wandb``.
        """
        self._process: subprocess.Popen[str] | None = None
        try:
            write_json(folder / "wandb" / "run.json", spec)
            self._process = start_process(folder.resolve(), mode, patience_s=_PATIENCE_S)
        except OSError as error:
            _LOG.warning("Weights & Biases is off from here on: its process cannot be started (%s).", error)
            return
        self._listener = threading.Thread(target=self._listen, args=(self._process,), name="wandb", daemon=True)
        self._listener.start()

    def close(self, error: BaseException | None) -> None:
        """Say how the stage ended, and give W&B a limited time to take the rest."""
        if (process := self._process) is None:
            return
        preempted = isinstance(error, PreemptedError)
        patience_s = _PREEMPTED_PATIENCE_S if preempted else _PATIENCE_S
        end_process(process, exit_code=0 if error is None else 1, preempted=preempted, patience_s=patience_s)
        self._listener.join(patience_s + 2)
        if self._listener.is_alive():  # stopped, so that it could not end itself
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._listener.join(2)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Log what the process says until it ends."""
        silent = True
        assert process.stdout is not None, "it is a pipe"
        with process.stdout as lines:
            for line in lines:
                message, silent = json.loads(line), False
                _LOG.warning("%s", message["message"])
                if message["unreachable"]:
                    os.environ["WANDB_MODE"] = "offline"  # the other stages of this process need not wait again
        if process.wait() != 0 and silent:
            _LOG.warning("Weights & Biases is off from here on: its process ended with status %d.", process.returncode)
            os.environ["WANDB_MODE"] = "offline"


class Follower:
    """The process: one run of W&B that shows one file."""

    def __init__(self, task: dict[str, Any], messages: TextIO) -> None:
        self._task, self._messages, self._folder = task, messages, Path(task["folder"])
        self._spec: dict[str, Any] = read_json(self._folder / "wandb" / "run.json")
        self._ending: dict[str, Any] = {"exit_code": 1, "preempted": False, "patience_s": task["patience_s"]}
        self._over = threading.Event()

    def say(self, message: str, *, unreachable: bool = False) -> None:
        """Send a message to the process that started this one."""
        with suppress(BrokenPipeError):  # it was killed
            print(json.dumps({"message": message, "unreachable": unreachable}), file=self._messages, flush=True)

    def await_ending(self, lines: TextIO) -> None:
        """Read the input, on a thread of its own; from then on time is limited."""
        self._ending = json.loads(lines.readline() or "null") or self._ending
        guard = threading.Timer(self._ending["patience_s"], _give_up)
        guard.daemon = True
        guard.start()
        self._over.set()

    def follow(self) -> None:
        """Show the file until the stage is over, and begin once more if W&B's service process dies."""
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # noqa: PLC0415 - slow to import

        if int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) > 1:
            self._over.wait(zlib.crc32(self._spec["run"]["id"].encode()) % _STARTS_APART_S)
        try:
            self._show()
        except (ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            reason = str(error) or type(error).__name__
            self.say(f"The service process of Weights & Biases ended ({reason}); another is started. {_LATER}")
            _end_service()
            self._show()

    def _show(self) -> None:
        run = self._start()
        before = reached(self._folder)
        sent = max(before.values()) if run.offline else _server_step(run)
        for row in self._rows():
            if position(row) > sent:
                sent = position(row)
                run.log(logged(row), step=sent, commit=True)
        rows = [json.loads(line) for line in (self._folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
        run.summary.update(summarise(rows, self._spec["best"]))
        if self._ending["exit_code"] == 0 and (made := self._spec["made"]) is not None:
            path = self._folder / made["path"]
            self._link(run, {"name": made["name"], "file": path.name, "checksum": file_hash(path)}, used=False)
        if self._ending["preempted"]:
            run.mark_preempting()
        run.finish(exit_code=self._ending["exit_code"])
        if not run.offline:
            deadline = time.monotonic() + _ARRIVAL_S
            while (arrived := _server_step(run)) < sent and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            if arrived < sent:
                raise OSError(f"rows after step {max(arrived, 0) // 3} did not arrive")
        write_json(self._folder / "wandb" / "sent.json", before | {"offline" if run.offline else "online": sent})
        _end_service()

    def _start(self) -> Any:
        """A run: online if that is wanted and succeeds, otherwise offline."""
        import wandb  # noqa: PLC0415 - as above

        mode = self._task["mode"]
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        try:
            run = self._init("online" if mode == "upload" else mode)
        except (wandb.errors.Error, TimeoutError) as error:
            if mode != "online":
                self.say(str(error), unreachable=True)
                raise
            message = f"Weights & Biases cannot be reached ({error}), so runs are kept offline. {_LATER}"
            self.say(message, unreachable=True)
            _end_service()  # which still holds the run's id
            run = self._init("offline")
        run.define_metric("trainer/*")
        run.define_metric("*", step_metric="trainer/global_step")
        if (used := self._spec["used"]) is not None and not run.offline:
            self._link(run, used, used=True)
        return run

    def _init(self, mode: Any) -> Any:
        import wandb  # noqa: PLC0415 - as above

        settings = wandb.Settings(
            **self._task["limits"],
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            program="paws_hpc",
            finish_timeout_raises=True,
            stop_fn=lambda: None,  # W&B's button would send SIGINT; a chain is ended with cancel=true
            x_disable_meta=True,
            x_save_requirements=False,  # paths of packages that are installed in place are among them
            x_stats_pid=os.getppid(),
            x_stats_disk_paths=(),
        )
        return wandb.init(**self._spec["run"], dir=self._folder, resume="allow", mode=mode, settings=settings)

    def _link(self, run: Any, network: dict[str, str], *, used: bool) -> None:
        """Say in the lineage which network the stage used or made; the config names the used one in any case."""
        import wandb  # noqa: PLC0415 - as above

        artifact = wandb.Artifact(network["name"], type="model", metadata=network)
        uri = f"paws-hpc:{network['name']}/{network['file']}?xxh3={network['checksum']}"
        artifact.add_reference(uri, name=network["file"], checksum=False)
        try:
            if used:
                run.use_artifact(artifact, aliases=[network["checksum"]])
            else:
                made = run.log_artifact(artifact, aliases=[network["checksum"]])
                if not run.offline:
                    made.wait(timeout=self._task["limits"]["finish_timeout"] / 4)
        except (wandb.errors.Error, ValueError, TimeoutError) as error:
            self.say(f"Weights & Biases does not show which network this run {'used' if used else 'made'} ({error}).")

    def _rows(self) -> Iterator[Row]:
        """Rows of the file as they come, until the stage is over; an unfinished line is not a row yet."""
        with open(self._folder / "metrics.jsonl", "rb") as file:
            pending = b""
            while True:
                over = self._over.is_set()
                pending += file.read()
                *lines, pending = pending.split(b"\n")
                yield from map(json.loads, lines)
                if over:
                    return
                self._over.wait(_POLL_S)


def _server_step(run: Any) -> int:
    """The step of the last row that the server has of a run; -1 if it has none."""
    import wandb  # noqa: PLC0415 - as above

    return int(wandb.Api().run(f"{run.entity}/{run.project}/{run.id}").lastHistoryStep)


def _logged_in() -> bool:
    """Whether W&B finds a key; a bad one is reported when the server refuses it."""
    import wandb  # noqa: PLC0415 - as above

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.Error, ValueError):
        return True


def _end_service() -> None:
    """End W&B's service process; if it is dead already, wandb raises in many ways or exits."""
    import wandb  # noqa: PLC0415 - as above

    with suppress(Exception, SystemExit):
        wandb.teardown()


def _give_up() -> None:
    """Kill W&B's service, which may hang in a way that nothing else ends, and this process."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Show what the argument names; a failure is reported, and ends this process alone."""
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, signal.SIG_IGN)  # the stage says when to end
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where wandb prints
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_RESUME"):
        os.environ.pop(name, None)  # of a sweep's agent, say: all stages would be one run
    follower = Follower(json.loads(sys.argv[1]), messages)
    threading.Thread(target=follower.await_ending, args=(sys.stdin,), daemon=True).start()
    try:
        follower.follow()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - wandb raises anything, and training must not suffer
        follower.say(f"Weights & Biases is off from here on ({type(error).__name__}: {error}). {_LATER}")
        messages.close()
        os._exit(1)  # wandb's own clean-up would wait for what has just failed


if __name__ == "__main__":
    main()
