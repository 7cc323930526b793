"""Each depth of verification finds what it promises, names it, and costs no more than it promises."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import google_crc32c
import h5py

from paws_hpc.files import file_hash
from paws_hpc.packing import pack
from paws_hpc.store import ImageStore
from paws_hpc.store.format import read_manifest
from paws_hpc.store.index import dataset_digest, join_indexes
from paws_hpc.store.shard import read_shard
from paws_hpc.store.verify import verify
from tests.stores import edit_manifest, flip_bit, noise, place_in_file


def faults(path: Path, level: str) -> list[tuple[str | None, str | None, str]]:
    found, _ = verify(path, level=level, workers=2)  # type: ignore[arg-type]
    return [(fault.shard, fault.key, fault.problem) for fault in found]


def test_full_names_every_damaged_record_and_only_those(jpeg_store: Path) -> None:
    first, second = [shard.count for shard in read_manifest(jpeg_store).shards[:2]]
    places, keys = (first, first + 2, first + second + 1), ImageStore(jpeg_store).keys
    files = [place_in_file(jpeg_store, place) for place in places]
    for file, offset, _ in files:
        flip_bit(file, offset + 100)
    assert faults(jpeg_store, "quick") == []  # sizes, headers and indexes are whole
    damage = "is damaged: its CRC32C differs from the index"
    assert faults(jpeg_store, "full") == [
        (file.name, keys[place], damage) for (file, _, _), place in zip(files, places, strict=True)
    ]


def test_quick_reads_no_records(tmp_path: Path) -> None:
    path = pack(noise(100, (200, 200, 1)), tmp_path / "store").path

    def bytes_read(level: str) -> int:
        def counter() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])  # rchar: all read calls, cached or not

        before = counter()
        assert faults(path, level) == []
        return counter() - before

    assert bytes_read("quick") < 400_000
    assert bytes_read("full") > 100 * 200 * 200


def test_quick_names_truncated_missing_and_replaced_shards(jpeg_store: Path) -> None:
    keys = ImageStore(jpeg_store).keys
    first, second, third = read_manifest(jpeg_store).shards[:3]
    os.truncate(jpeg_store / first.name, first.bytes // 2)
    (jpeg_store / second.name).unlink()
    (jpeg_store / third.name).write_bytes(bytes(third.bytes))
    found = faults(jpeg_store, "quick")
    assert [shard for shard, _, _ in found] == [first.name, second.name, third.name]
    assert found[0][1] in keys[: first.count]
    assert "the shard was truncated" in found[0][2]
    assert found[1][2] == "is missing"
    assert "cannot be opened" in found[2][2]
    # The other shards are still read.
    _, records = verify(jpeg_store, level="full")
    assert records == 30 - first.count - second.count - third.count


def test_quick_names_shards_that_were_exchanged(jpeg_store: Path) -> None:
    edit_manifest(jpeg_store, lambda manifest: manifest["shards"].insert(0, manifest["shards"].pop(1)))
    first, second = [problem for _, _, problem in faults(jpeg_store, "quick")]
    assert first.startswith("has digest")
    assert second.startswith("has index_hash")


def test_a_missing_manifest_is_a_fault(jpeg_store: Path) -> None:
    (jpeg_store / "manifest.json").unlink()
    assert [(shard, "no usable manifest" in problem) for shard, _, problem in faults(jpeg_store, "quick")] == [
        (None, True)
    ]


def test_only_deep_finds_a_record_that_was_packed_undecodable(jpeg_store: Path) -> None:
    """Spoil a record and make CRC, identity and hashes fit, as a faulty packer would."""
    file, key = jpeg_store / "shard-00000.h5", ImageStore(jpeg_store).keys[1]
    with h5py.File(file, "r+", locking=False) as shard:
        length, start = int(shard["index/length"][1]), int(shard["index/offset"][1])
        shard["data"][start + length // 2 : start + length] = 0
        shard["index/crc32c"][1] = google_crc32c.value(shard["data"][start : start + length].tobytes())
    _make_consistent(jpeg_store)
    assert faults(jpeg_store, "full") == []
    found = faults(jpeg_store, "deep")
    assert [(shard, name) for shard, name, _ in found] == [(file.name, key)]
    assert found[0][2].startswith("cannot be decoded")


def test_deep_finds_a_size_that_the_index_has_wrong(jpeg_store: Path) -> None:
    file, key = jpeg_store / "shard-00000.h5", ImageStore(jpeg_store).keys[0]
    with h5py.File(file, "r+", locking=False) as shard:
        shard["index/width"][0] = 101
    _make_consistent(jpeg_store)
    assert faults(jpeg_store, "full") == []
    assert faults(jpeg_store, "deep") == [(file.name, key, "cannot be decoded: it is 100 x 80 pixels, not 101 x 80")]


def _make_consistent(store: Path) -> None:
    """Write the first shard's identity and the manifest's hashes anew."""
    path = store / "shard-00000.h5"
    index = read_shard(path).index
    with h5py.File(path, "r+", locking=False) as shard:
        shard.attrs.modify("uuid", index.uuid)
    joined = join_indexes(lambda: [read_shard(path).index for path in sorted(store.glob("*.h5"))])

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][0] |= {"uuid": index.uuid, "bytes": path.stat().st_size, "file_hash": file_hash(path)}
        digest = dataset_digest(joined, encoding="jpeg", shape=None, classes=manifest["classes"])
        manifest |= {"index_hash": joined.hash, "digest": digest}

    edit_manifest(store, change)
    (store / "index.bin").unlink()
