"""What Weights & Biases kept on disk of a stage: a file for each of its starts, and how these become one run online.

``wandb sync`` stops at a file whose end was torn off by a kill, ends with status 0 all the same, and gives rows that
two files have in common a second time, under other steps. So each file goes up by itself, in order, as a copy that
lacks the torn end and the rows of the files before it; whether it arrived, the marker says that wandb writes beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paws_hpc.engine.tracking import Row, read_rows
from paws_hpc.engine.wandb_file import history_steps, parse, read_contents, steps_of, write_contents
from paws_hpc.engine.wandb_rows import position
from paws_hpc.files import write_text
from paws_hpc.stages.run_folder import is_done
from paws_hpc.stages.wandb_mending import holds_run, mended

NOTHING = -1
"""W&B's step before any row."""

_STILL_WRITTEN_S = 60.0  # a file without an end that changed so recently may belong to a run that goes on


@dataclass(frozen=True)
class Segment:
    """The file of one start."""

    path: Path

    @property
    def marker(self) -> Path:
        """There once the server has all of it."""
        return Path(f"{self.path}.synced")

    @property
    def is_synced(self) -> bool:
        """Whether the server has all of it."""
        return self.marker.exists()

    @property
    def online_to(self) -> int:
        """W&B's step up to which everything is online once this file is; as the marker says, or else its last row."""
        if text := self.marker.read_text() if self.is_synced else "":
            return int(text)
        return max(history_steps(self.path), default=NOTHING)

    @property
    def stage(self) -> Path:
        """The folder of the stage or trial."""
        return self.path.parents[2]

    @property
    def began(self) -> str:
        """When it was begun, as its folder's name tells; in the order of time."""
        return self.path.parent.name.removeprefix("offline-")


def find_segments(run: Path) -> dict[str, list[Segment]]:
    """The files of each stage or trial of a run directory, in the order in which they were begun."""
    found: dict[str, list[Segment]] = {}
    for folder in sorted(path for path in run.glob("**/wandb") if path.is_dir()):
        files = [path for path in folder.glob("*run-*/run-*.wandb") if not path.parent.is_symlink()]
        if files:
            stage = folder.parent.relative_to(run).as_posix()
            found[stage] = sorted(map(Segment, files), key=lambda segment: segment.began)
    return found


class ServerError(Exception):
    """Nothing can be uploaded from here at present; the text says why."""


def upload_next(
    segments: list[Segment], *, timeout_s: float, unusable: Callable[[], str | None] = lambda: None
) -> str | None:
    """Upload the first file that is not online yet; returns what keeps it from being, None if it is.

    A file without anything that W&B could take, of a start that was killed in its first moments, counts as online.

    Args:
        segments: of one stage, in order.
        timeout_s: after which an upload that hangs is given up; seconds.
        unusable: why nothing can be uploaded from here; asked before something is.

    Raises:
        ServerError: nothing can.
    """
    index = next(number for number, segment in enumerate(segments) if not segment.is_synced)
    segment = segments[index]
    if any(later.is_synced for later in segments[index:]):
        return f"{segment.path} is older than what is online, which takes nothing older; metrics.jsonl has its rows"
    if _is_written(segment.path):
        return f"{segment.path} is still being written; run this again later"
    known = max((earlier.online_to for earlier in segments[:index]), default=NOTHING)
    try:
        contents = mended(
            read_contents(segment.path)[0],
            _rows(segment),
            known=known,
            is_last=not any(holds_run(read_contents(later.path)[0]) for later in segments[index + 1 :]),
            is_done=is_done(segment.stage),
        )
    except ValueError as error:
        return str(error)
    if contents:
        if server_fault := unusable():
            raise ServerError(server_fault)
        copy = _copy(segment, contents)
        said = _wandb_sync(copy, timeout_s)
        if not Path(f"{copy}.synced").exists():
            return f"{segment.path} did not arrive. {said}"
        shutil.rmtree(copy.parent)
    write_text(segment.marker, str(max(known, *steps_of(contents), NOTHING)))
    return None


def rows_left(segments: list[Segment]) -> str | None:
    """What to tell of rows of ``metrics.jsonl`` that are not online although all files of a stage are; None if none."""
    known = max((segment.online_to for segment in segments), default=NOTHING)
    try:
        rows = _rows(segments[-1])
    except ValueError as error:
        return str(error)
    if not (missing := sum(position(row) > known for row in rows)):
        return None
    return f"{missing} rows of {segments[-1].stage / 'metrics.jsonl'} are not online, and no file can bring them"


def _rows(segment: Segment) -> list[Row]:
    path = segment.stage / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def _is_written(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > _STILL_WRITTEN_S:
        return False
    return not any(parse(content).HasField("exit") for content in read_contents(path)[0][-3:])


def _copy(segment: Segment, contents: list[bytes]) -> Path:
    """The file that is uploaded; one that was begun before is left as it is.

    Beside it wandb notes how far it has come, so that an upload that was interrupted goes on and repeats nothing.
    """
    copy = segment.path.parent.parent / "upload" / f"offline-{segment.began}" / segment.path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if copy.exists() and read_contents(copy) == (contents, False):
        return copy
    write_contents(copy, contents)
    if (progress := Path(f"{segment.path}.syncstate")).exists():  # of a run that was online
        shutil.copy(progress, f"{copy}.syncstate")
    return copy


def _wandb_sync(path: Path, timeout_s: float) -> str:
    """Let wandb upload one file; returns what to tell if it did not arrive: the last of what wandb said."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--include-online", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Without a folder it makes one where the user stands; runs may be kept offline, and this is the upload.
            env=os.environ | {"WANDB_DIR": str(path.parent), "WANDB_MODE": "online"},
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"no answer from {_server()} within {timeout_s:g} s; is there a connection?"
    return f"wandb said: {' '.join(done.stdout.splitlines()[-3:])}"


def _server() -> str:
    """Whom W&B's environment variables and settings files name; in a process of its own, as asking starts a service."""
    asked = [sys.executable, "-c", "import wandb; print(wandb.setup().settings.base_url)"]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "the server"
