"""What test_tracking examines: python -m tests.wandb_session FOLDER uses Weights & Biases in every way that can fail.

A process of its own, because W&B starts threads and a service that would outlive a test. Writes ``FOLDER/report.json``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paws_hpc.engine import tracking
from paws_hpc.engine.config import TrackingConfig
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.tracking import MetricsFile, NullTracker, Tracker, Trackers, WandbTracker

FAKE_KEY = "0123456789" * 4
_BLOCK = 1 << 15


class Messages(logging.Handler):
    """Collects what was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def tracker(mode: str, folder: Path, run_id: str) -> WandbTracker:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"seed": 3, "optimizer": {"peak_lr": 6.4}}
    return WandbTracker(
        TrackingConfig(wandb=mode), folder=folder, run_id=run_id, group="chain", job_type="pretrain", settings=settings
    )


def row(step: int) -> dict[str, Any]:
    return {"loss/total": 1 / (step + 1), "loss/me_max": math.nan if step == 4 else -0.5, "epoch": step}


def two_segments(folder: Path) -> None:
    """Steps 0 to 5, of which 4 and 5 come after the checkpoint; then the run resumes at 4 and goes on to 7."""
    for start, stop in ((0, 6), (4, 8)):
        folder.mkdir(exist_ok=True)
        files = MetricsFile(folder / "metrics.jsonl", resume_step=start)
        with Trackers(files, tracker("offline", folder, "chain-pretrain")) as both:
            for step in range(start, stop):
                both.log(step, row(step))
                both.log(step, {"validation/paws_nn": 0.1 * step})


def service_process() -> int:
    """Process id of the wandb-core that this process started."""
    mine = f"--pid\0{os.getpid()}\0".encode()
    (found,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"wandb-core" in (command := path.read_bytes()) and mine in command
    ]
    return found


def kill_service(folder: Path) -> None:
    """W&B's service dies in the middle of a run."""
    with tracker("offline", folder, "killed") as killed:
        killed.log(0, row(0))
        service = service_process()
        os.kill(service, signal.SIGKILL)
        os.waitpid(service, 0)
        for step in range(1, 50):
            killed.log(step, row(step))
    with tracker("offline", folder, "next") as after:
        after.log(0, row(0))


def preempt(folder: Path) -> None:
    """A job is stopped in the middle of a run."""
    with suppress(PreemptedError), tracker("offline", folder, "preempted") as preempted:
        preempted.log(0, row(0))
        raise PreemptedError(1)


def preempt_without_answer(folder: Path) -> float:
    """The same while W&B's service is stopped, as by a network that hangs; returns the seconds that leaving took."""
    with suppress(PreemptedError), tracker("offline", folder, "silent") as preempted:
        preempted.log(0, row(0))
        service = service_process()
        os.kill(service, signal.SIGSTOP)
        began = time.monotonic()
        raise PreemptedError(1)
    seconds = time.monotonic() - began
    os.kill(service, signal.SIGCONT)
    return seconds


def train(watched: Tracker) -> str:
    """A loop that draws from every global random state; returns its weights as text."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(), torch.nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with watched:
        for step in range(30):
            loss = model(torch.randn(8, 6) * random.random() + np.random.rand()).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watched.log(step, {"loss/total": loss.item()})
    return str([parameter.tolist() for parameter in model.parameters()])


def history(folder: Path) -> list[dict[str, Any]]:
    """The runs that lie in a folder's ``wandb``: id, config and rows, in the order of their start."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        found: dict[str, Any] = {"rows": []}
        for content in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                found |= {"id": record.run.run_id, "config": config, "group": record.run.run_group}
            if record.HasField("history"):
                items = record.history.item
                found["rows"].append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            if record.HasField("preempting"):
                found["preempting"] = True
            if record.HasField("exit"):
                found["exit_code"] = record.exit.exit_code
        runs.append(found)
    return runs


def _records(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format after seven bytes of its own."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        if (left := _BLOCK - position % _BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def main(folder: Path) -> None:
    """Run every session and write what came of it."""
    messages = Messages()
    logging.getLogger().addHandler(messages)
    report: dict[str, Any] = {"messages": {}}

    def heard(name: str) -> None:
        report["messages"][name], messages.texts = messages.texts, []

    report["weights"] = [train(NullTracker()), train(tracker("offline", folder / "weights", "weights"))]
    two_segments(folder / "segments")
    heard("fine")
    preempt(folder / "preempted")
    heard("preempted")
    tracking._PREEMPTED_FINISH_TIMEOUT_S = 1.0
    report["seconds"] = preempt_without_answer(folder / "silent")
    heard("silent")
    with tracker("online", folder / "online", "online") as online:
        online.log(0, row(0))
        online.log(1, row(1))
    heard("online without a key")
    (folder / "unwritable").mkdir()
    (folder / "unwritable" / "wandb").write_text("a file where W&B wants a folder")
    with tracker("offline", folder / "unwritable", "unwritable") as unwritable:
        unwritable.log(0, row(0))
        unwritable.log(1, row(1))
    heard("unwritable")
    kill_service(folder / "killed")
    heard("killed")
    with tracker("auto", folder / "auto", "auto") as offline:
        offline.log(0, row(0))
    heard("auto, not logged in")
    os.environ["WANDB_API_KEY"] = FAKE_KEY  # logged in, and nobody answers at WANDB_BASE_URL
    tracking._INIT_TIMEOUT_S = 1.0
    for run_id in ("first", "second"):
        with tracker("auto", folder / "unreachable", run_id) as offline:
            offline.log(0, row(0))
    heard("unreachable")
    names = ("segments", "preempted", "killed", "auto", "unreachable")
    report["runs"] = {name: history(folder / name) for name in names}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
