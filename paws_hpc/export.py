"""Command: write a network of a finished run as a file of another library.

    python -m paws_hpc.export RUN --format torchvision                  the pre-trained backbone
    python -m paws_hpc.export RUN --format onnx --head classifier       the fine-tuned network that selection chose

Class names, normalisation and where the weights come from travel along.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paws_hpc.command import Parser, exit_status, program
from paws_hpc.deploy import FORMATS, HEADS, write_export
from paws_hpc.deploy.formats import check_packages
from paws_hpc.finished_run import load_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 with one line if the export is not possible."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _export(options), interrupted="nothing was written")


def _parser() -> argparse.ArgumentParser:
    formats = "; ".join(f"{name}: {kind.help}" for name, kind in FORMATS.items())
    heads = "; ".join(f"{name}: {output}" for name, output in HEADS.items())
    parser = Parser(prog=program("export"), description="Write a network of a finished run as a file.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its name under --runs")
    parser.add_argument("--format", required=True, choices=FORMATS, help=formats)
    parser.add_argument("--head", default="none", choices=HEADS, help=f"what comes out ({heads}; default %(default)s)")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: RUN/export/NAME-OUTPUT and a suffix")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--stores", type=Path, metavar="FOLDER", help="folder below which the run's stores are now")
    return parser


def _export(options: argparse.Namespace) -> None:
    check_packages(options.format)
    if options.to is not None and options.to.exists():
        raise FileExistsError(f"--to {options.to} is there already. Name another file, or remove that one first.")
    run = load_run(options.run, options.runs, options.stores)
    network = run.network(options.head)
    name = f"{run.config.name}-{HEADS[options.head]}{FORMATS[options.format].suffix}"
    for path in write_export(network, options.format, options.to or run.folder.path / "export" / name):
        print(path)
        if options.format == "safetensors":
            print(f"load it: network, card = paws_hpc.deploy.load_exported({str(path)!r})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
