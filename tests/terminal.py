"""A program in a terminal, and what a person would see there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_PARTS = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """Runs a command in a new session whose controlling terminal has ``columns``, as a context manager.

    Attributes:
        written: all that came from it, control sequences included.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], folder: Path, columns: int = 80) -> None:
        self._fd, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, start_new_session=True, cwd=folder,
            env={**env, "TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - it takes no lock
        )  # fmt: skip
        os.close(child)
        self.written = ""

    def wait_for(self, text: str, *, timeout_s: float = 240) -> None:
        """Until ``text`` was written; AssertionError if it is not."""
        deadline = time.monotonic() + timeout_s
        while text not in self.written:
            assert self._read(deadline), f"{text!r} was not written:\n{self.written[-2000:]}"

    def press_ctrl_c(self) -> None:
        """As a person does: the terminal sends SIGINT to all processes of the session."""
        os.write(self._fd, b"\x03")

    def end(self, *, timeout_s: float = 240) -> list[str]:
        """Wait for the command; the lines that it leaves on the screen."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        self.process.wait(timeout=10)
        return screen(self.written)

    def frames(self) -> list[str]:
        """Every line that stood on the screen at any time, without colours."""
        return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.written)) if line]

    def _read(self, deadline: float) -> bool:
        """Take in more; False at the end, or when time is over."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        try:
            new = os.read(self._fd, 1 << 16).decode(errors="replace") if ready else ""
        except OSError:  # how a terminal says that nobody writes to it any more
            new = ""
        self.written += new
        return bool(new)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def screen(written: str) -> list[str]:
    """The lines that are left of what was written, by the control sequences that progress uses."""
    rows, row, column = [""], 0, 0
    for argument, command, move, text in _PARTS.findall(written):
        if command == "A":
            row = max(0, row - int(argument or 1))
        elif command == "K":
            rows[row] = "" if argument == "2" else rows[row][:column]
        elif move == "\r":
            column = 0
        elif move == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif text:
            rows[row] = rows[row].ljust(column)[:column] + text + rows[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in rows if line.strip()]
