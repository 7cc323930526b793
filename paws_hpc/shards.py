"""Command: pack, describe, verify, repair and copy image stores.

python -m paws_hpc.shards pack digits --split train --to shards/digits/train
python -m paws_hpc.shards info shards/digits/train
python -m paws_hpc.shards verify --full shards/digits/train
python -m paws_hpc.shards repair shards/digits/train
python -m paws_hpc.shards copy shards/digits/train --to /local/disk
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from paws_hpc.command import Parser, above_zero, at_least, exit_status, printable, program
from paws_hpc.packing import (
    SOURCES,
    PackOptions,
    PackReport,
    SourceConfig,
    open_source,
    pack,
    plan_pack,
    planned_listing,
    repair,
)
from paws_hpc.packing.job import CHANGES_NAME
from paws_hpc.packing.sources import SourceKind
from paws_hpc.packing.write import Change
from paws_hpc.store.format import FLAG_REENCODED, INDEX_NAME, Manifest, Omission, read_manifest
from paws_hpc.store.local_copy import DEFAULT_WORKERS, copy_store
from paws_hpc.store.verify import verify

_LISTED = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 an error or faults, 130 interrupted."""
    options = _parser().parse_args(arguments)
    left = "what is complete stays, the same command goes on or begins anew"
    return exit_status(lambda: options.run(options), interrupted=left)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("shards"), description="Image stores: pack, info, verify, repair, copy.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    packing = commands.add_parser("pack", help="pack a data set into shards")
    sources = packing.add_subparsers(required=True, metavar="SOURCE", dest="kind")
    for name, kind in SOURCES.items():
        _add_pack_options(sources.add_parser(name, help=kind.help, description=f"{kind.help}. {_PACKING}"), kind)

    info = commands.add_parser("info", help="describe a store")
    info.add_argument("store", type=Path, help="folder of the store")
    info.add_argument("--json", action="store_true", help="print the manifest, which has everything")
    info.set_defaults(run=_info)
    check = commands.add_parser("verify", help="look for damage; exit status 1 if there is any")
    check.set_defaults(run=_verify)
    mend = commands.add_parser("repair", help="build the damaged shards again from the source")
    mend.set_defaults(run=_repair)
    for command in (check, mend):
        command.add_argument("store", type=Path, help="folder of the store")
        levels = command.add_mutually_exclusive_group()
        for level, depth in _LEVELS.items():
            levels.add_argument(
                f"--{level}", dest="level", action="store_const", const=level, default="full", help=depth
            )
        command.add_argument("--workers", type=at_least(1), help="threads (default: one per usable core)")
        command.add_argument("--json", action="store_true", help="print the report as JSON")
    mend.add_argument("--root", type=Path, help="where the source is now, as for pack; if its kind needs one")
    mend.add_argument("--labels", type=Path, help="the file of labels, if pack was given one")
    copy = commands.add_parser("copy", help="copy a store to this node's own disk, for data.copy_to")
    copy.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="folder of a store; several in turn")
    copy.add_argument("--to", type=Path, required=True, help="folder on the local disk, for the copies of all stores")
    copy.add_argument(
        "--workers",
        type=at_least(1),
        default=DEFAULT_WORKERS,
        help="shards that are copied at the same time (%(default)s)",
    )
    copy.add_argument("--json", action="store_true", help="print the report as JSON")
    copy.set_defaults(run=_copy)
    return parser


_LEVELS = {
    "quick": "sizes, headers and indexes against the manifest",
    "full": "also every record's CRC32C and every file's hash (default)",
    "deep": "also decode every image",
}
_PACKING = (
    "The same command goes on after an interruption, without packing finished shards again. Images become upright and "
    "lose their metadata; JPEGs keep their coefficients where possible, other formats and small data sets their pixels."
)
_SOURCE_OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"metavar": "CLASS", "help": "package.module:Class, or a torchvision.datasets name"},
    "--size": {"type": int, "default": SourceConfig.size, "help": "side in pixels (%(default)s)"},
    "--labels": {"metavar": "FILE", "help": "lines '<image>,<class>', where no folder is a class"},
    "--label-field": {"metavar": "FIELD", "default": SourceConfig.label_field, "help": "of .json files (%(default)s)"},
}
"""Options of some kinds of source."""

_PACK_OPTIONS: dict[str, dict[str, Any]] = {
    "--seed": {"type": int, "help": "seed of the shuffle (%(default)s)"},
    "--on-error": {"choices": ("stop", "skip"), "help": "what to do about an unreadable image (%(default)s)"},
    "--encoding": {
        "choices": ("lossless", "jpeg"),
        "help": "keep the pixels of PNG, TIFF, BMP, GIF, lossless WebP and grey JPEG, or make them colour JPEGs of "
        "quality 95, which take less room and decode more slowly (%(default)s)",
    },
    "--max-short-side": {
        "type": int,
        "metavar": "PIXELS",
        "help": "shrink images whose short side is longer, at some loss (default: keep all as they are)",
    },
    "--transcode": {
        "action": "store_true",
        "help": "make progressive JPEGs baseline, which decode three times as fast, and turn images, both without loss "
        "(needs pip install 'paws-hpc[transcode]'; default: progressive ones stay, turned ones are encoded anew)",
    },
    "--force": {
        "action": "store_true",
        "help": "replace another store that is there, once the new one is whole; discard another unfinished one",
    },
    "--workers": {
        "type": at_least(1),
        "help": "processes, of one shard each at a time, or threads for fewer shards (default: one per usable core)",
    },
}


def _field(option: str) -> str:
    """The name that argparse gives an option's value."""
    return option.removeprefix("--").replace("-", "_")


def _add_pack_options(source: argparse.ArgumentParser, kind: SourceKind) -> None:
    """Add the options of one kind of source, and those of packing."""
    source.set_defaults(run=_pack)
    if kind.root_help:
        source.add_argument("--root", required=kind.needs_root, help=kind.root_help)
    if kind.has_splits:
        source.add_argument("--split", required=True, choices=("train", "test"))
    if kind.names_splits:
        source.add_argument("--split", help="as the class calls it, or train or test")
    for option, settings in _SOURCE_OPTIONS.items():
        if _field(option) in kind.extra:
            source.add_argument(option, **settings)
    source.add_argument(
        "--classes", nargs="+", metavar="NAME", help="the only classes to take, in the order of their labels"
    )
    source.add_argument("--to", type=Path, required=True, help="folder of the store, made if needed")
    mib = PackOptions.shard_bytes / (1 << 20)
    source.add_argument(
        "--shard-mib", type=above_zero, default=mib, help="bytes of the source's images per shard (%(default)g MiB)"
    )
    for option, settings in _PACK_OPTIONS.items():
        source.add_argument(option, default=getattr(PackOptions, _field(option)), **settings)
    parts = source.add_mutually_exclusive_group()
    parts.add_argument(
        "--part",
        type=_task,
        metavar="I/N",
        help="pack the I-th of N parts (1/N to N/N), for the tasks of a job array; the last to end makes the store",
    )
    parts.add_argument(
        "--plan-only",
        action="store_true",
        help="only list the source and keep the list, so that the parts need not list it again",
    )


def _task(text: str) -> tuple[int, int]:
    """Parse "3/8"."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 3/8")
    if not 1 <= int(number) <= int(of):
        raise argparse.ArgumentTypeError(f"part {text}: parts are numbered from 1/{of} to {of}/{of}.")
    return int(number), int(of)


def _pack(options: argparse.Namespace) -> int:
    given = vars(options)
    config = SourceConfig(**{field.name: given[field.name] for field in fields(SourceConfig) if field.name in given})
    inside = config.kind in ("folder", "flat") and options.to.resolve().is_relative_to(
        Path(config.root or "").resolve()
    )
    if inside:
        raise ValueError(f"--to {options.to} is inside --root {config.root}, where it would be listed. Choose another.")
    pack_options = PackOptions(
        shard_bytes=round(options.shard_mib * (1 << 20)),
        **{field: given[field] for field in map(_field, _PACK_OPTIONS)},
    )
    if options.plan_only:
        shards, images = plan_pack(open_source(config), options.to, options=pack_options)
        print(f"{options.to}: {images:,} images make {shards:,} shards; pack them with --part I/N")
        return 0
    source = open_source(config, planned_listing(options.to, config.kind) if options.part else None)
    report = pack(source, options.to, options=pack_options, task=options.part, show_progress=True)
    if options.part is not None:
        print(
            f"part {'{}/{}'.format(*options.part)} of {options.to}: {report.packed:,} shards packed, "
            f"{report.kept:,} were done, {report.seconds:.1f} s"
        )
    if report.manifest is None:
        print(f"{report.missing:,} shards of other parts are not done; the part that packs the last makes the store")
    else:
        _print_pack(report, report.manifest)
    return 0


def _print_pack(report: PackReport, manifest: Manifest) -> None:
    """Print what packing did."""
    contents = (
        f"{manifest.count:,} images of {len(manifest.classes):,} classes in {len(manifest.shards):,} shards, "
        f"{_bytes_text(sum(shard.bytes for shard in manifest.shards))}, digest {manifest.digest}"
    )
    if not report.made:
        print(f"{report.path} already holds this store: {contents}. Nothing was done.")
        if report.newer:
            print(
                f"NOTE: {report.newer:,} source images were written after it, with the same names and sizes. If their "
                "contents changed, pack again with --force."
            )
        return
    print(f"packed {report.path}: {contents}, {report.seconds:.1f} s")
    if report.kept:
        print(f"{report.kept:,} shards were done before")
    for what, count in manifest.rewritten.items():
        print(f"{count:,} images: {what}, pixels unchanged")
    reencoded = [change for change in report.changes if change.flags & FLAG_REENCODED]
    _print_images(
        "changed at some loss (JPEG of quality 95 and 4:4:4, shrunk, or scaled from 16 bits)",
        reencoded,
        all_in=CHANGES_NAME,
    )
    if report.progressive:
        print(
            f"{report.progressive:,} images stayed progressive JPEGs, which take about three times as long to decode: "
            "pack --transcode --force makes them baseline without loss (pip install 'paws-hpc[transcode]')"
        )
    if not all(manifest.statistics.std):
        print(
            "NOTE: a colour channel has the same value in every pixel that was counted (std 0): there is nothing to "
            "learn from it, and training divides it by 1"
        )
    _print_images("LEFT OUT", manifest.skipped)


def _print_images(what: str, images: Sequence[Change | Omission], *, all_in: str | None = None) -> None:
    """Print how many images were changed or left out, and which: the first few, if the file ``all_in`` has all."""
    if not images:
        return
    listed = images if all_in is None else images[:_LISTED]
    print(f"{len(images):,} images {what}:")
    for image in listed:
        print(printable(f"  {image.key}: {image.reason}"))
    if len(listed) < len(images):
        print(f"  ... and {len(images) - len(listed):,} more, all of them in {all_in}")


def _bytes_text(count: int) -> str:
    """Bytes in a readable unit."""
    if count < 1024:
        return f"{count:,} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:,.1f} {'KMGT'[power - 1]}iB"


def _info(options: argparse.Namespace) -> int:
    """Print a table of what is in the store, of which the manifest has more."""
    manifest = read_manifest(options.store)
    if options.json:
        print(json.dumps(manifest.to_json(), indent=2))
        return 0
    sizes, counts = [shard.bytes for shard in manifest.shards], manifest.class_counts
    rows = {
        "store": str(options.store),
        "digest": manifest.digest,
        "images": f"{manifest.count:,}, {len(manifest.skipped):,} skipped",
        "encoding": manifest.encoding + ("" if manifest.shape is None else " " + " x ".join(map(str, manifest.shape))),
        "size": f"{_bytes_text(sum(sizes))} in {len(sizes):,} shards",
        "source": f"{manifest.origin.kind}, digest {manifest.origin.digest[:16]}",
        "classes": f"{len(manifest.classes):,}, of {min(counts):,} to {max(counts):,} images",
    }
    for name, value in rows.items():
        print(f"{name:<9} {printable(value)}")
    for name, count in list(zip(manifest.classes, counts, strict=True))[:_LISTED]:
        print(f"  {printable(name):<20} {count:>9,}")
    if len(counts) > _LISTED:
        print(f"  ... and {len(counts) - _LISTED:,} more")
    print("--json has all else: mean and std, shards, changed and skipped images, how it was packed")
    return 0


def _verify(options: argparse.Namespace) -> int:
    faults, records = verify(options.store, level=options.level, workers=options.workers, show_progress=True)
    if options.json:
        report = {"store": str(options.store), "level": options.level, "records": records}
        print(json.dumps(report | {"faults": [asdict(fault) for fault in faults]}, indent=2))
        return 1 if faults else 0
    for fault in faults:
        print(f"FAULT {printable(str(fault))}")
    looked_at = f"{records:,} records read" if options.level != "quick" else "no records read"
    print(f"{options.store}: {options.level} verification found {len(faults) or 'no'} faults ({looked_at})")
    return 1 if faults else 0


def _repair(options: argparse.Namespace) -> int:
    settings = {name: getattr(options, name) for name in ("labels", "level", "workers")}
    report = repair(options.store, options.root, **settings, show_progress=True)
    if options.json:
        print(json.dumps(asdict(report), indent=2))
        return 0 if report.whole else 1
    for fault in report.faults:
        print(f"FAULT {printable(str(fault))}")
    for name in report.repaired:
        print(f"repaired {name}: it is what was packed")
    for name, problem in report.refused.items():
        print(f"NOT REPAIRED {name}: {problem}")
    if report.index_made:
        print(f"made {INDEX_NAME} anew")
    print(f"{options.store}: {'the store is whole' if report.whole else 'the store is still damaged'}")
    return 0 if report.whole else 1


def _copy(options: argparse.Namespace) -> int:
    for store in options.stores:
        report = copy_store(store, options.to, workers=options.workers, show_progress=True)
        if options.json:
            print(json.dumps(asdict(report), indent=2, default=str))
            continue
        print(
            f"{report.path}: {report.copied:,} shards copied ({_bytes_text(report.bytes)}, {report.seconds:.1f} s), "
            f"{report.present:,} were there"
        )
        for copy in report.evicted:
            print(f"removed to make room: {copy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
