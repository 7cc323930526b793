"""Command: look for damage in a run and in all that its result depends on, or in a store.

python -m paws_hpc.verify digits-seed0
python -m paws_hpc.verify digits-seed0 --deep          # also decodes every image of its stores
python -m paws_hpc.verify shards/digits/train --quick  # a store: python -m paws_hpc.shards verify, with its options
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paws_hpc import shards
from paws_hpc.cluster.frozen import read_config
from paws_hpc.cluster.snapshot import check_snapshot
from paws_hpc.command import Parser, error_text, exit_status, printable, program
from paws_hpc.engine.checkpoint import check_checkpoint, checked_digest
from paws_hpc.engine.compiler_cache import check_kept
from paws_hpc.engine.tracking import check_rows
from paws_hpc.files import read_json
from paws_hpc.stages.prepare import changed_images, open_stores
from paws_hpc.stages.run_folder import RunFolder, find_run
from paws_hpc.store.format import MANIFEST_NAME
from paws_hpc.store.verify import Level, verify

_AGAIN = "launch again: it is made anew"


class Check(NamedTuple):
    """What is checked of files of one kind.

    Attributes:
        kind: of what is checked.
        pattern: of the files, below the run.
        check: raises ValueError or OSError if such a file is not what was written.
        remedy: how it can be made again, or that it cannot.
    """

    kind: str
    pattern: str
    check: Callable[[Path], Any]
    remedy: str


CHECKS = (
    Check("config", "config.yaml", read_config, "restore it from submissions/, or launch the run with its settings"),
    Check("config", "submissions/*/config.yaml", read_config, "jobs that wait with it fail: cancel and launch again"),
    Check("code", "code/*", check_snapshot, "cancel the jobs that wait with it, remove it and launch again"),
    Check("checkpoint", "**/step-*.pt", check_checkpoint, "a start passes it over and takes the one before"),
    Check("network", "*/*/best.pt", checked_digest, f"remove DONE beside it, and {_AGAIN}"),
    Check("network", "tuned.pt", checked_digest, f"remove it and selected.json, and {_AGAIN}"),
    Check("references", "calibrate/references.pt", checked_digest, f"remove DONE beside it, and {_AGAIN}"),
    Check("record", "**/[!.]*.json", read_json, f"remove it and DONE beside it, if there is one, and {_AGAIN}"),
    Check("record", "**/DONE", read_json, f"remove it and {_AGAIN}"),
    Check("rows", "**/metrics.jsonl", check_rows, "curves lack these rows; no result depends on them"),
    Check("compiled", "compiled/*.tar", check_kept, "the next start compiles anew"),
)


def main() -> int:
    """Run the command; returns its exit status: 0 if all is whole, 1 if not."""
    parser = Parser(prog=program("verify"), description="Look for damage in a run and its stores, or in a store.")
    parser.add_argument("path", metavar="RUN|STORE", help="folder or name of a run, or folder of a store")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--deep", action="store_true", help="decode every image, too")
    if any((Path(word) / MANIFEST_NAME).exists() for word in sys.argv[1:]):
        sys.argv.insert(1, "verify")
        return shards.main()
    options = parser.parse_args()
    return exit_status(lambda: _verify(options), interrupted="nothing was changed")


def _verify(options: argparse.Namespace) -> int:
    try:
        run = RunFolder(find_run(options.path, options.runs))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Nor is it a store, which has a {MANIFEST_NAME}.") from error
    whole, faults = Counter[str](), 0
    for kind, fault, remedy in (*_files(run), *_stores(run, "deep" if options.deep else "full")):
        whole[kind] += fault is None
        if fault is not None:
            faults += 1
            print(printable(f"FAULT {kind}: {fault}\n  {remedy}"))
    print("whole: " + ", ".join(f"{count:,} {kind}" for kind, count in whole.items()))
    print(f"{run.path}: {faults or 'no'} fault{'s' * (faults != 1)}")
    return 1 if faults else 0


def _files(run: RunFolder) -> Iterator[tuple[str, str | None, str]]:
    """Kind, fault if there is one, and remedy, for each file of the run."""
    for each in CHECKS:
        for path in sorted(run.path.glob(each.pattern)):
            try:
                each.check(path)
            except (ValueError, OSError) as error:
                text = error_text(error)
                yield each.kind, text if str(run.path) in text else f"{path}: {text}", each.remedy
            else:
                yield each.kind, None, ""


def _stores(run: RunFolder, level: Level) -> Iterator[tuple[str, str | None, str]]:
    """The same for the stores and splits of the run: whole, and those on which it was trained."""
    try:
        config = read_config(run.config)
    except (ValueError, OSError):  # which is a fault already
        return
    for name, path in config.data.stores.items():
        faults, _ = verify(Path(path), level=level, show_progress=True)
        remedy = f"`{program('shards')} repair {path}` builds damaged shards again from the source"
        yield from ((f"store {name}", f"{path}: {fault}", remedy) for fault in faults)
        if not faults:
            yield f"store {name}", None, ""
    try:
        open_stores(config, save_splits=False)
        changed = changed_images(config, run)
    except (ValueError, OSError) as error:
        yield "splits", error_text(error), "restore it: labels that are drawn again are others if the store is another"
        return
    yield "splits", None, ""
    for field, path in changed.items():
        yield "images", f"{path} holds other images than the run was made from ({field})", "restore the store"


if __name__ == "__main__":
    sys.exit(main())
