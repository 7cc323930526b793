"""Command: classify image files by a finished run, and show the labelled images that they resemble most.

    python -m paws_hpc.predict RUN photo.jpg FOLDER             by PAWS-NN
    python -m paws_hpc.predict RUN FOLDER --method fine-tuned --html sheet.html
    python -m paws_hpc.predict RUN FOLDER --json -              - is standard output

Files go through the decoder and the crop of the run's own evaluation. One that is no image is named, and the others go
on; the exit status is then 3.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paws_hpc.command import Parser, at_least, exit_status, printable, program
from paws_hpc.deploy.files import image_files, shown
from paws_hpc.deploy.predicting import METHODS, Failure, Prediction, Predictor
from paws_hpc.deploy.sheet import Sheet
from paws_hpc.files import write_json
from paws_hpc.finished_run import load_run

SOME_FAILED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if nothing could be done, 3 if some files are no images."""
    options = _parser().parse_intermixed_args(arguments)
    return exit_status(lambda: _predict(options), interrupted="no file was written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("predict"), description="Classify image files by a finished run.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its name under --runs")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder of images")
    parser.add_argument("--method", default=METHODS[0], choices=METHODS, help="which network answers (%(default)s)")
    parser.add_argument("--top", type=at_least(1), default=5, metavar="N", help="classes to name (%(default)s)")
    parser.add_argument("--nearest", type=at_least(1), default=5, metavar="N", help="labelled images (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - is standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a contact sheet, one page without a network")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--stores", type=Path, metavar="FOLDER", help="folder below which the run's stores are now")
    return parser


def _predict(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here. Use --device cpu.")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    run = load_run(options.run, options.runs, options.stores)
    config, commit = run.config, run.folder.describe().get("commit")
    paths = list(image_files(options.images))
    predictor = Predictor(run.folder, run.data, method=options.method, device=device)
    sheet = None
    if options.html is not None:
        method = {"paws-nn": "PAWS-NN", "fine-tuned": "fine-tuned network"}[options.method]
        sheet = Sheet(predictor, config.name, [f"by {method}", f"commit {commit or 'unknown'}", f"seed {config.seed}"])
    images: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for item in predictor.predict(paths, top=options.top, nearest=options.nearest):
        if sheet is not None:
            sheet.add(item)
        if isinstance(item, Failure):
            failed.append({"path": str(item.path), "reason": item.reason})
            print(f"error: {shown(item.path)}: {printable(item.reason)}", file=sys.stderr)
            continue
        if options.json is not None:
            answer = {"path": str(item.path), "doubt": item.doubt, "classes": item.classes, "nearest": item.nearest}
            images.append(answer)
        if options.json != "-":
            print(_as_text(item))
    if sheet is not None:
        sheet.write(options.html)
    if options.json is not None:
        whole = {"run": config.name, "commit": commit, "seed": config.seed, "method": options.method}
        whole |= {"images": images, "failed": failed}
        if options.json == "-":
            print(json.dumps(whole, indent=2, allow_nan=False))
        else:
            write_json(Path(options.json), whole)
    return SOME_FAILED if failed else 0


def _as_text(item: Prediction) -> str:
    classes = ", ".join(f"{printable(one['name'])} {100 * one['probability']:.1f} %" for one in item.classes)
    nearest = ", ".join(
        f"{printable(one['key'])} ({printable(one['class'])}) {one['similarity']:.2f}" for one in item.nearest
    )
    return f"{shown(item.path)}: {item.doubt or classes}\n    nearest: {nearest}"


if __name__ == "__main__":
    sys.exit(main())
