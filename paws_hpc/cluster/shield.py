"""Starts a rank so that no signal can end it and none is lost: run by path, before anything is imported.

    python -I -S shield.py COMMAND [ARGUMENT ...]

SIGUSR2 and SIGTERM are blocked, which the command, its threads and its children inherit. They stay pending until
``cluster/signals.py`` takes them on a thread of its own, however long torch takes to import. They never end a worker or
service process. The package beside this file, which is the one frozen at submission,
goes in front of any other of its name.
"""

import os
import signal
import sys
from pathlib import Path

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


def main() -> None:
    """Block, point to the frozen package, and become the command."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    frozen = str(Path(__file__).resolve().parents[2])
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{frozen}{os.pathsep}{others}" if others else frozen
    os.environ["PYTHONSAFEPATH"] = "1"  # the folder of the submission, perhaps a checkout, comes in front otherwise
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
