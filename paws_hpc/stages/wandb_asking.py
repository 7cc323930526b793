"""Asking Weights & Biases something in a process of its own.

    python -m paws_hpc.stages.wandb_asking      started by :func:`unusable`

What its package does with a server that takes a connection and never answers cannot be ended in any other way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

NOT_ONLINE = ("offline", "disabled", "dryrun")
"""Modes of W&B in which nothing goes to a server."""


def unusable(*, timeout_s: float) -> str | None:
    """Why nothing can be sent to Weights & Biases from here, for people to read; None if it can.

    Args:
        timeout_s: to wait for the server's word; seconds.
    """
    try:
        return ask("paws_hpc.stages.wandb_asking", [], timeout_s=timeout_s).get("fault")
    except TimeoutError as error:
        return f"{error}; is there a connection?"


def ask(module: str, arguments: Sequence[str], *, timeout_s: float) -> dict[str, str]:
    """Run ``python -m module arguments``, a module that ends with :func:`answer`.

    Returns:
        what it answered; or only ``fault``, for people to read, if it broke off.

    Raises:
        TimeoutError: there was no answer in time. The process has been ended.
    """
    with tempfile.TemporaryFile("w+") as complaints:  # no pipe: wandb's service would keep it open
        with subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"no answer within {timeout_s:g} s") from None
            finally:
                if process.returncode is None:  # also where a person gave up first
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode != 0:
            complaints.seek(0)
            last = complaints.read().strip().rpartition("\n")[2] or "without a word"
            return {"fault": f"its process ended with status {process.returncode}: {last}"}
    told: dict[str, str] = json.loads(said)
    return told


def answer(main: Callable[[Sequence[str]], dict[str, str]]) -> None:
    """Be the process that :func:`ask` starts: hand over what ``main`` makes of the arguments, and end."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where wandb prints, and its service after it
    try:
        told = main(sys.argv[1:])
    except Exception as error:  # noqa: BLE001 - wandb raises anything, and this is told
        told = {"fault": f"{type(error).__name__}: {error}".strip()}
    print(json.dumps(told), file=answers, flush=True)
    os._exit(0)  # wandb's own clean-up would wait for what has just failed


def why_not() -> str | None:
    """Why this process cannot be online, before any server is asked; None if W&B finds a key, good or not."""
    import wandb  # noqa: PLC0415 - slow to import

    if (mode := wandb.setup().settings.mode) in NOT_ONLINE:
        return f"W&B's settings say mode={mode}"  # with which login() finds no key either
    return None if wandb.login(prompt=False, verify=False) else "nobody is logged in: run `wandb login`"


def main(_: Sequence[str]) -> dict[str, str]:
    """Ask the server whether it takes the key; returns ``fault`` if there is none to take."""
    os.environ["WANDB_MODE"] = "online"  # runs may be kept offline; to upload them is what is asked for
    import wandb  # noqa: PLC0415 - slow to import

    if fault := why_not():
        return {"fault": fault}
    wandb.Api()  # raises if it does not
    return {}


if __name__ == "__main__":
    answer(main)
