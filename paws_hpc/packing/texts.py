"""What commands about stores print for people, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paws_hpc.packing.finishing import PackReport
from paws_hpc.packing.underway import CHANGES_NAME
from paws_hpc.packing.writer import Part, PartReport
from paws_hpc.store.format import Manifest, Omission
from paws_hpc.store.local_copy import CopyReport

_LISTED = 20


def part_lines(report: PartReport, part: Part) -> list[str]:
    """What packing a part did, for people."""
    lines = [
        f"part {part.number}/{part.of} of {report.path}: {report.packed:,} shards packed, {report.kept:,} were done, "
        f"{report.seconds:.1f} s"
    ]
    if report.store is not None:
        return lines + pack_lines(report.store)
    return [*lines, f"{report.missing:,} shards of other parts are not done; who packs the last makes the store"]


def pack_lines(report: PackReport) -> list[str]:
    """What packing did, for people."""
    manifest = report.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    contents = (
        f"{manifest.count:,} images of {len(manifest.classes):,} classes in {len(manifest.shards):,} shards, "
        f"{_bytes_text(size)}, digest {manifest.digest}"
    )
    if not report.packed:
        lines = [f"{report.path} already holds this store: {contents}. Nothing was done."]
        if report.newer:
            lines.append(
                f"NOTE: {report.newer:,} source images were written after it, with the same names and sizes. If their "
                "contents changed, pack again with --force."
            )
        return lines
    lines = [f"packed {report.path}: {contents}, {report.seconds:.1f} s"]
    if report.kept:
        lines.append(f"{report.kept:,} shards were done before")
    lines += [f"{count:,} images: {what}, pixels unchanged" for what, count in manifest.rewritten.items()]
    lines += _omission_lines("encoded anew as JPEG (quality 95, 4:4:4)", report.reencoded, all_in=CHANGES_NAME)
    if report.progressive:
        lines.append(
            f"{report.progressive:,} images stayed progressive JPEGs, which take about three times as long to decode: "
            "with turbojpeg installed (pip install turbojpeg), pack --force makes them baseline without loss"
        )
    if not all(manifest.statistics.std):
        lines.append(
            "NOTE: a colour channel has the same value in every pixel that was counted (std 0): there is nothing to "
            "learn from it, and training divides it by 1"
        )
    lines += _omission_lines("LEFT OUT", manifest.skipped)
    return lines


def _omission_lines(what: str, omissions: Sequence[Omission], *, all_in: str | None = None) -> list[str]:
    """Say how many images were changed or left out, and list them: the first few, if a file has all."""
    if not omissions:
        return []
    listed = omissions if all_in is None else omissions[:_LISTED]
    lines = [f"{len(omissions):,} images {what}:", *(f"  {omission.key}: {omission.reason}" for omission in listed)]
    rest = len(omissions) - len(listed)
    return [*lines, f"  ... and {rest:,} more, all of them in {all_in}"] if rest else lines


def info_lines(path: Path, manifest: Manifest) -> list[str]:
    """A table of what is in the store."""
    sizes, counts = [shard.bytes for shard in manifest.shards], manifest.class_counts
    statistics = manifest.statistics
    shape = "" if manifest.shape is None else " " + " x ".join(map(str, manifest.shape))
    split = " ".join(
        f"{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in manifest.origin.options.items()
    )
    rows = {
        "store": str(path),
        "digest": manifest.digest,
        "images": f"{manifest.count:,}",
        "encoding": manifest.encoding + shape,
        "size": f"{_bytes_text(sum(sizes))} in {len(sizes):,} shards of "
        f"{_bytes_text(min(sizes))} to {_bytes_text(max(sizes))}",
        "source": f"{manifest.origin.kind} {split}".strip() + f", digest {manifest.origin.digest[:16]}",
        "packed": f"by version {manifest.packing.packer}, seed {manifest.packing.seed}",
        "mean": " ".join(f"{value:.4f}" for value in statistics.mean),
        "std": " ".join(f"{value:.4f}" for value in statistics.std)
        + f" ({statistics.method}, {statistics.images:,} images)",
        "re-encoded": ", ".join(f"{count:,} {reason}" for reason, count in manifest.reencoded.items()) or "none",
        "rewritten": ", ".join(f"{count:,} {what}" for what, count in manifest.rewritten.items()) or "none",
        "skipped": ", ".join(omission.key for omission in manifest.skipped) or "none",
        "classes": f"{len(manifest.classes):,}, of {min(counts):,} to {max(counts):,} images",
    }
    lines = [f"{name:<11} {value}" for name, value in rows.items()]
    counted = list(zip(manifest.classes, counts, strict=True))
    lines += [f"  {name:<20} {count:>9,}" for name, count in counted[:_LISTED]]
    return lines + ([f"  ... and {len(counted) - _LISTED:,} more (--json has all)"] if len(counted) > _LISTED else [])


def copy_lines(report: CopyReport) -> list[str]:
    """What copying a store to a node did."""
    return [
        f"{report.path}: {report.copied:,} shards copied ({_bytes_text(report.bytes)}, {report.seconds:.1f} s), "
        f"{report.present:,} were there",
        *(f"removed to make room: {copy}" for copy in report.evicted),
    ]


def _bytes_text(count: int) -> str:
    """Bytes in a readable unit."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
