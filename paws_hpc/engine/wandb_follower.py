"""The process beside training that shows a stage's ``metrics.jsonl`` in Weights & Biases.

    python -m paws_hpc.engine.wandb_follower        started by paws_hpc.engine.wandb_tracker, one per stage

It reads rows from the file that training writes anyway, so that training itself never calls W&B: whatever hangs, fails
or dies here costs the run nothing. It imports no torch.

The first line of its standard input says what to follow (:class:`paws_hpc.engine.wandb_tracker.Followed` as JSON). A
second one (:class:`paws_hpc.engine.wandb_tracker.Ending`), or the end of the input when training was killed, says that
the stage is over. What a person should know it prints as one JSON object per line: ``{"message": …, "offline": …}``,
``offline`` being whether it went offline by itself.

Every row goes to W&B under a step of its own, which :func:`paws_hpc.engine.wandb_rows.position` derives from the row
alone. So a row that is sent again, after a kill, is known to be the same; people see the axes
``trainer/global_step`` and ``trainer/epoch``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from paws_hpc.engine.wandb_file import history_steps
from paws_hpc.engine.wandb_rows import Row, position, shown, summary
from paws_hpc.files import read_json, write_json

_POLL_S = 0.25
_LATER = "`python -m paws_hpc.sync RUN` uploads what is on disk, from wherever there is a connection."
_STARTS_APART_S = 10  # over which the jobs of an array begin


class Follower:
    """One run of W&B that shows one file."""

    def __init__(self, followed: dict[str, Any], *, messages: TextIO) -> None:
        """Prepare to follow what the first line of the input says; ``messages`` are for the tracker."""
        self._followed, self._messages = followed, messages
        self._metrics, self._folder = Path(followed["metrics"]), Path(followed["metrics"]).parent
        self._ending: dict[str, Any] | None = None
        self._service_died = False
        self._over = threading.Event()

    def tell(self, message: str, *, offline: bool = False) -> None:
        """Say something to whoever watches training."""
        with suppress(BrokenPipeError):  # of a trainer that was killed
            print(json.dumps({"message": message, "offline": offline}), file=self._messages, flush=True)

    def await_ending(self, lines: TextIO) -> None:
        """Read the second line of the input, on a thread of its own; from then on time is limited."""
        line = lines.readline()
        self._ending = json.loads(line) if line else self._followed["killed"]
        guard = threading.Timer(self._ending["patience_s"], _give_up)
        guard.daemon = True
        guard.start()
        self._over.set()

    def follow(self) -> None:
        """Show the file until the stage is over, and begin once more if W&B's service process dies."""
        if int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) > 1:
            self._over.wait(zlib.crc32(self._followed["run"]["id"].encode()) % _STARTS_APART_S)
        try:
            self._session()
        except Exception as error:
            if not _is_of_service(error):
                raise
            self.tell(
                f"The service process of Weights & Biases ended ({_of(error)}); another is started. What went online "
                f"is not certain from here on: {_LATER}"
            )
            self._service_died = True
            _end_service()
            self._session()

    def _session(self) -> None:
        import wandb  # noqa: PLC0415 - as above

        run = self._start()
        offline = bool(run.offline)
        sent, rows = self._sent(offline=offline), 0
        for row in self._rows():
            if position(row) > sent:
                sent, rows = position(row), rows + 1
                run.log(shown(row), step=sent, commit=True)
        assert self._ending is not None, "rows end when the stage does"
        run.summary.update(summary(self._whole_rows(), self._followed["best"]))
        fault = self._log_made(run)
        if self._ending["preempted"]:
            run.mark_preempting()
        file = Path(run.settings.sync_file)
        run.finish(exit_code=self._ending["exit_code"])
        if fault is not None:  # else finish() has raised, and that is told instead
            self.tell(fault)
        if not offline:
            wandb.Api()  # raises if the server takes the key no more, for then finish() drops rows and says nothing
        _end_service()  # which writes the last block of its file then
        if offline:
            _check_written(file, rows)
        elif self._service_died:  # now and then rows of the second session never arrive, without a word
            return
        else:
            for segment in self._folder.glob("wandb/*run-*/run-*.wandb"):
                Path(f"{segment}.synced").write_text(str(sent))  # nothing up to this step is left to upload
        write_json(self._folder / "wandb" / "sent.json", {"position": sent, "offline": offline})

    def _start(self) -> Any:
        """A run: online if that is asked for and succeeds, otherwise offline."""
        import wandb  # noqa: PLC0415 - as above

        mode = self._followed["mode"] or os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if _logged_in() else "offline"
        try:
            run = self._init(mode)
        except (wandb.errors.Error, TimeoutError) as error:
            if mode != "online":
                raise
            self.tell(f"Weights & Biases cannot be reached ({error}), so runs are kept offline. {_LATER}", offline=True)
            _end_service()  # which still holds the run's id
            run = self._init("offline")
        for axis in ("trainer/global_step", "trainer/epoch"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="trainer/global_step")
        self._link(run)
        return run

    def _link(self, run: Any) -> None:
        """Say in the lineage with which network the stage began; the run's config says it in any case."""
        if (used := self._followed["used"]) is None or run.offline:
            return
        try:
            run.use_artifact(_artifact(used), aliases=[used["checksum"]])
        except Exception as error:
            if _is_of_service(error):
                raise
            self.tell(f"Weights & Biases does not show which network this run began with ({_of(error)}).")

    def _log_made(self, run: Any) -> str | None:
        """Say in the lineage which network the stage made; returns what to tell if W&B did not take that."""
        assert self._ending is not None, "the stage has ended"
        if (made := self._ending["made"]) is None:
            return None
        try:
            artifact = run.log_artifact(_artifact(made), aliases=[made["checksum"]])
            if not run.offline:
                artifact.wait(timeout=self._followed["artifact_timeout_s"])
        except Exception as error:
            if _is_of_service(error):
                raise
            return f"Weights & Biases does not show which network this run made ({_of(error)})."
        return None

    def _init(self, mode: Any) -> Any:
        import wandb  # noqa: PLC0415 - as above

        asked = self._followed
        return wandb.init(
            **asked["run"],
            dir=self._folder,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                program="paws_hpc",
                init_timeout=asked["init_timeout_s"],
                finish_timeout=asked["finish_timeout_s"],
                finish_timeout_raises=True,
                stop_fn=lambda: None,  # W&B's button would send SIGINT; a chain is ended with cancel=true
                x_disable_meta=True,
                x_save_requirements=False,  # paths of packages that are installed in place are among them
                x_stats_pid=asked["trainer"],
                x_stats_disk_paths=(),
            ),
        )

    def _sent(self, *, offline: bool) -> int:
        """The last step of W&B's that earlier starts of this stage are known to have handed over; -1 without any.

        An online run counts only what went online: rows of offline segments are sent again, so that those need no
        upload any more.
        """
        path = self._folder / "wandb" / "sent.json"
        told = read_json(path) if path.exists() else None
        return -1 if told is None or (told["offline"] and not offline) else int(told["position"])

    def _rows(self) -> Iterator[Row]:
        """Rows of the file as they come, until the stage is over; an unfinished line is not a row yet."""
        with open(self._metrics, "rb") as file:
            pending = b""
            while True:
                over = self._over.is_set()
                pending += file.read()
                *lines, pending = pending.split(b"\n")
                yield from map(json.loads, lines)
                if over:
                    return
                self._over.wait(_POLL_S)

    def _whole_rows(self) -> list[Row]:
        return [json.loads(line) for line in self._metrics.read_bytes().split(b"\n")[:-1]]


def _is_of_service(error: Exception) -> bool:
    """Whether an error says that W&B's service process has ended."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # noqa: PLC0415 - as above

    return isinstance(error, ConnectionError | HandleAbandonedError | MailboxClosedError)


def _of(error: Exception) -> str:
    return str(error) or type(error).__name__


def _end_service() -> None:
    """End W&B's service process; of one that is dead already wandb complains in many ways, or even asks to exit."""
    import wandb  # noqa: PLC0415 - as above

    with suppress(Exception, SystemExit):
        wandb.teardown()


def _give_up() -> None:
    """End W&B's service, which may hang in a way that nothing else ends, and this process."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _logged_in() -> bool:
    """Whether W&B finds a key; one that nobody could take counts too, so that it is told when it is refused."""
    import wandb  # noqa: PLC0415 - as above

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.Error, ValueError):
        return True


def _artifact(described: dict[str, str]) -> Any:
    """A network as W&B knows it: by its checksum, without its bytes and without the path where it lies."""
    import wandb  # noqa: PLC0415 - as above

    artifact = wandb.Artifact(described["name"], type="model", metadata=described)
    uri = f"paws-hpc:{described['name']}/{described['file']}?xxh3={described['checksum']}"
    artifact.add_reference(uri, name=described["file"], checksum=False)
    return artifact


def _check_written(path: Path, rows: int) -> None:
    """Raise OSError if W&B's file lacks some of the rows that it was given, which W&B itself does not tell."""
    written = len(history_steps(path)) if path.exists() else 0
    if written < rows:
        raise OSError(f"{path} holds {written} of {rows} rows; is the disk full?")


def main() -> None:
    """Follow what the input asks for; a failure is told, and ends this process alone."""
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, signal.SIG_IGN)  # the stage says when to end
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where wandb prints
    follower = Follower(json.loads(sys.stdin.readline()), messages=messages)
    threading.Thread(target=follower.await_ending, args=(sys.stdin,), daemon=True).start()
    status = 0
    try:
        follower.follow()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - wandb raises anything, from OSError to SystemExit; law 6
        follower.tell(f"Weights & Biases is off from here on ({type(error).__name__}: {error}). {_LATER}")
        status = 1
    messages.close()
    if status:
        os._exit(status)  # wandb's own clean-up would wait for what has just failed


if __name__ == "__main__":
    main()
