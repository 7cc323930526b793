"""Command: measure this program, side by side with what people use instead.

python -m paws_hpc.bench store
python -m paws_hpc.bench store --images 200 --rounds 1 --only reads
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from paws_hpc.bench.contender import ContenderError
from paws_hpc.bench.store import GROUPS, bench_store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 measured, 1 could not measure."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (OSError, ValueError, ContenderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: images and the figures of whole groups stay", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paws_hpc.bench", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    store = commands.add_parser("store", help="the image store and the CPU's part of the data path")
    store.add_argument("--images", type=_at_least(64), default=2400, help="photographs of 110 KB to make (2400)")
    store.add_argument("--rounds", type=_at_least(1), default=5, help="that count, after one that warms up (5)")
    store.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}"
    )
    store.add_argument("--folder", type=Path, default=Path("bench"), help="for images and packed copies (bench)")
    store.add_argument("--json", type=Path, help="file for the figures (FOLDER/store.json)")
    store.set_defaults(run=bench_store)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
