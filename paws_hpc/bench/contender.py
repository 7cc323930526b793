"""A contender in a process of its own, on the cores that it is given, which works when told to.

Interleaving many programs in rounds, each in a process that keeps nothing of the others, makes the rates of one round
comparable on a machine whose speed drifts. A program that cannot be imported, or fails, is reported and hurts no other.

    python -m paws_hpc.bench.contender MODULE FUNCTION ARGUMENTS CORES

``FUNCTION(**ARGUMENTS)`` prepares and returns the work; for every line on standard input the work is done once, and one
line of JSON says how much was done (whatever the work returns) and in how many seconds. Work that returns a dictionary
says what was ``done`` in it, may time itself (``seconds``), and adds whatever else it saw.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_READY = "ready"


class ContenderError(RuntimeError):
    """A contender cannot be imported or failed; the last line of what it printed is the message."""


class Contender:
    """The parent's end of one contender; whoever starts one closes it."""

    def __init__(
        self, function: str, arguments: dict[str, Any], *, cores: Sequence[int], limit_s: float = 1200
    ) -> None:
        """Start it and wait until it has prepared.

        Args:
            function: ``module:function``.
            arguments: of the function, as JSON can hold them.
            cores: to which all of its threads and processes are bound.
            limit_s: for each answer; one that takes longer hangs, and is killed.

        Raises:
            ContenderError: it cannot be prepared.
        """
        module, _, name = function.partition(":")
        parts = [module, name, json.dumps(arguments), json.dumps(list(cores))]
        self.seen: dict[str, Any] = {}  # what the last work said beside what was done and the seconds
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._limit_s = limit_s
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with it; a pipe that nobody reads could fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paws_hpc.bench.contender", *parts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | one_thread,
            start_new_session=True,  # so that it can be ended with the processes that it starts
        )
        try:
            self._expect(_READY)
        except ContenderError:
            self.close()
            raise

    def work(self) -> tuple[float, float]:
        """Do the work once; returns how much was done, and the seconds.

        Raises:
            ContenderError: it failed.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended is said below
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        answer = json.loads(self._expect(None))
        done, seconds = answer.pop("done"), answer.pop("seconds")
        self.seen = answer
        return done, seconds

    def _expect(self, line: str | None) -> str:
        """The next line of the contender, which is ``line`` or, for None, begins as JSON does; others are skipped."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._limit_s
        late = threading.Timer(self._limit_s, self._kill)  # at which its output ends
        late.start()
        try:
            for said in self._process.stdout:  # libraries print what they like
                if said.strip() == line or (line is None and said.startswith('{"done"')):
                    return said
        finally:
            late.cancel()
        self._process.wait()
        if time.monotonic() >= deadline and self._process.returncode == -signal.SIGKILL:
            raise ContenderError(f"gave no answer within {self._limit_s:g} s")
        self._errors.seek(0)
        lines = [text for text in self._errors.read().splitlines() if text.strip()]
        raise ContenderError(lines[-1].strip() if lines else f"ended with status {self._process.returncode}")

    def _kill(self) -> None:
        """End it and all that it started, which may hold its output open."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=10)  # closes its standard input, at which it ends
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.communicate()
        self._errors.close()


def main(module: str, function: str, arguments: str, cores: str) -> None:
    """Be a contender; see the module's docstring."""
    os.sched_setaffinity(0, json.loads(cores))  # before threads exist: they inherit it
    work = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(_READY, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        done = work()
        said = done if isinstance(done, dict) else {"done": done}
        answer = {"done": said["done"], "seconds": time.perf_counter() - began} | said
        _share_gpu()
        print(json.dumps(answer), flush=True)


def _share_gpu() -> None:
    """Leave the memory of a GPU that is kept for reuse to those whose turn it is."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
