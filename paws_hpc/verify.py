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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from paws_hpc import shards
from paws_hpc.cluster.frozen import read_config
from paws_hpc.cluster.snapshot import check_snapshot
from paws_hpc.command import Parser, error_text, exit_status, printable, program
from paws_hpc.engine.checkpoint import check_checkpoint
from paws_hpc.engine.compiler_cache import check_whole
from paws_hpc.engine.tracking import read_rows
from paws_hpc.files import read_json, read_record, sealed_digest
from paws_hpc.finished_run import stores_of
from paws_hpc.stages.prepare import open_stores
from paws_hpc.stages.run_folder import RunFolder, find_run, is_done
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
    Check(
        "chain", "chain.json", read_record, "restore it; without it a launch knows neither its jobs nor its runs in W&B"
    ),
    Check("code", "code/[!.]*", check_snapshot, "cancel the jobs that wait with it, remove it and launch again"),
    Check("checkpoint", "**/step-*.pt", check_checkpoint, "a start passes it over and takes the one before"),
    Check("network", "*/*/best.pt", sealed_digest, f"remove DONE beside it, and {_AGAIN}"),
    Check("network", "tuned.pt", sealed_digest, f"remove it and selected.json, and {_AGAIN}"),
    Check("network", "calibrate/references.pt", sealed_digest, f"remove DONE beside it, and {_AGAIN}"),
    Check("predictions", "selection/predictions.npz", sealed_digest, "remove it: comparisons go on without"),
    Check("record", "*/**/DONE", read_record, f"remove it and {_AGAIN}"),
    Check("record", "**/result.json", read_record, f"remove it and DONE beside it, if there is one, and {_AGAIN}"),
    Check("record", "selected.json", read_record, f"remove it and result.json, and {_AGAIN}"),
    Check("record", "*/[!.]*.json", read_json, f"remove it and DONE beside it, if there is one, and {_AGAIN}"),
    Check("attempt", "jobs/**/[!.]*.json", read_json, "remove it: what became of one start is lost, and nothing else"),
    Check("rows", "**/metrics.jsonl", read_rows, "curves lack these rows; no result depends on them"),
    Check("compiled", "compiled/*.tar", check_whole, "the next start compiles anew"),
)
"""The first that matches a file is the one that counts."""


def main() -> int:
    """Run the command; returns its exit status: 0 if all is whole, 1 if not."""
    parser = Parser(prog=program("verify"), description="Look for damage in a run and its stores, or in a store.")
    parser.add_argument("path", metavar="RUN|STORE", help="folder or name of a run, or folder of a store")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--stores", type=Path, metavar="FOLDER", help="folder below which the run's stores are now")
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
    level: Level = "deep" if options.deep else "full"
    for kind, fault, remedy in (*_files(run), *_missing(run), *_stores(run, options.stores, level)):
        whole[kind] += fault is None
        if fault is not None:
            faults += 1
            print(printable(f"FAULT {kind}: {fault}\n  {remedy}"))
    print("whole: " + ", ".join(f"{count:,} {kind}" for kind, count in whole.items() if count))
    print(f"{run.path}: {faults or 'no'} fault{'s' * (faults != 1)}")
    return 1 if faults else 0


Finding = tuple[str, str | None, str]
"""A kind, what is wrong, None if nothing is, and the remedy."""


def _files(run: RunFolder) -> Iterator[Finding]:
    """For each file of the run."""
    seen = set[Path]()
    for each in CHECKS:
        for path in sorted(set(run.path.glob(each.pattern)) - seen):
            seen.add(path)
            try:
                each.check(path)
            except (ValueError, OSError) as error:
                text = error_text(error)
                yield each.kind, text if str(run.path) in text else f"{path}: {text}", each.remedy
            else:
                yield each.kind, None, ""


def _missing(run: RunFolder) -> Iterator[Finding]:
    """For each file that others say is there, and is not."""
    for path, because in _expected(run):
        if not path.exists():
            yield "missing", f"{path} is missing, though {because}", f"restore it, or remove that and {_AGAIN}"


def _expected(run: RunFolder) -> Iterator[tuple[Path, str]]:
    """What must be there, and which file says so; a damaged one says nothing, and is a fault already."""
    yield run.config, "every run has it"
    with suppress(FileNotFoundError, ValueError):
        last = run.checkpoint(read_record(run.pretrain / "DONE")["steps"])
        yield from ((path, f"{run.pretrain / 'DONE'} is there") for path in (last, last.with_suffix(".json")))
    for done in run.path.glob("*/*=*/DONE"):
        yield from ((done.parent / name, f"{done} is there") for name in ("result.json", "best.pt"))
    if run.result.exists():
        yield run.selected, f"{run.result} is there"
    with suppress(FileNotFoundError, ValueError):
        if read_record(run.selected).get("suncet") is not None:
            yield run.tuned, f"{run.selected} has its score"
    if (run.path / "calibrate" / "calibration.json").exists():
        yield run.path / "calibrate" / "references.pt", "calibration.json is there"


def _stores(run: RunFolder, folder: Path | None, level: Level) -> Iterator[Finding]:
    """For the stores and splits of the run: that they are whole, and those on which it was trained."""
    try:
        config = read_config(run.config)
    except (ValueError, OSError):  # which is a fault already
        return
    try:
        config = replace(config, data=stores_of(run, config, folder))
    except (ValueError, OSError) as error:
        yield "store", error_text(error), "restore it, or say where it is with --stores"
    for name, path in config.data.stores.items():
        faults, _ = verify(Path(path), level=level, show_progress=True)
        remedy = f"`{program('shards')} repair {path}` builds damaged shards again from the source"
        yield from ((f"store {name}", f"{path}: {fault}", remedy) for fault in faults)
        if not faults:
            yield f"store {name}", None, ""
    try:
        digests = open_stores(config, save_splits=False).digests
        then = read_record(run.prepare / "DONE")["digests"] if is_done(run.prepare) else digests
    except (ValueError, OSError) as error:
        yield "splits", error_text(error), "restore the split: drawing again from a changed store gives other labels"
        return
    for name in sorted(digests.keys() & then.keys()):
        other = digests[name] != then[name]
        yield "splits", f"{name} is not what the run was prepared with" if other else None, "restore the store or split"


if __name__ == "__main__":
    sys.exit(main())
