"""What commands share: their names, options, numbers as arguments, and how they end.

An error that a user can cause or repair is one line, and no traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_REMEDIES = {
    errno.ENOSPC: "Free some space and give the same command again: what is complete stays.",
    errno.EDQUOT: "Free some of your quota and give the same command again: what is complete stays.",
    errno.EROFS: "Name a place that can be written.",
    errno.EACCES: "Ask for permission there, or name another place.",
}


def program(name: str) -> str:
    """How a command was called, for its usage: ``paws NAME`` where that is installed and was used."""
    return f"paws {name}" if Path(sys.argv[0]).name == "paws" else f"python -m paws_hpc {name}"


class Parser(argparse.ArgumentParser):
    """The options of a command; wrong ones end it with one line and status 2."""

    def error(self, message: str) -> NoReturn:
        """End the command."""
        self.exit(2, f"error: {message.rstrip('.')}. `{self.prog} --help` says more.\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below ``least``."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}, a whole number")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """An argparse type: a number above 0, such as a time to wait."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def exit_status(
    action: Callable[[], int | None], *, interrupted: str, errors: tuple[type[Exception], ...] = (OSError, ValueError)
) -> int:
    """Run a command; returns its exit status: the action's (0 for None), 1 after an error, 130 if it was interrupted.

    It is 141, as shells say of a program that SIGPIPE ended, if what read the output, such as ``head``, has ended.

    Args:
        action: the command; the text of its KeyboardInterrupt, if any, says what is left behind.
        interrupted: what is left behind where it has none.
        errors: that a user can cause or repair.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale without dashes must not lose a result
    try:
        status = action() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # Python would flush the rest of the output as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except errors as error:
        print(f"error: {printable(error_text(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted: {str(stop) or interrupted}", file=sys.stderr)
        return 130
    return status


def printable(text: str) -> str:
    """Replace control characters: the text may come from another user's files."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def error_text(error: BaseException) -> str:
    """An error as text: a file's path once, and what to do about a full disk or one that cannot be written."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return str(error)
    named = error.filename is None or str(error.filename) in error.strerror
    text = error.strerror if named else f"{error.filename}: {error.strerror}"
    return f"{text}. {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else text
