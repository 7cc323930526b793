"""A hundred million records open in an instant and take no memory; a few of them are found by a few looks."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from paws_hpc.files import value_digest
from paws_hpc.packing import ArraySource, PackOptions, pack
from paws_hpc.store import ImageStore
from paws_hpc.store.format import read_manifest
from paws_hpc.store.index import _BLOCK, _HEADER, _LABEL, _MAGIC, ROW, StoreIndex, load_index
from paws_hpc.store.verify import verify

RECORDS_PER_SHARD = 250_000


def sparse_store(folder: Path, count: int) -> Path:
    """A store of ``count`` records of one black pixel, whose files are holes: rows, labels and pixels are zeros."""
    folder.mkdir()
    header = _HEADER.pack(_MAGIC, count, 0)
    stop = len(header) + count * (ROW.itemsize + _LABEL.itemsize)
    blocks = -(-stop // _BLOCK)
    hashes = np.full(blocks, xxhash.xxh3_64_intdigest(bytes(_BLOCK)), "<u8")
    hashes[0] = xxhash.xxh3_64_intdigest(header + bytes(_BLOCK - len(header)))
    hashes[-1] = xxhash.xxh3_64_intdigest(bytes(stop - (blocks - 1) * _BLOCK))
    with open(folder / "index.bin", "wb") as file:
        file.write(header)
        file.seek(stop)
        file.write(hashes.tobytes())
    shards = []
    for number, start in enumerate(range(0, count, RECORDS_PER_SHARD)):
        records = min(RECORDS_PER_SHARD, count - start)
        entry = {"name": f"shard-{number:05d}.h5", "count": records, "bytes": 4096 + records, "data_offset": 4096}
        shards.append(entry | {"data_bytes": records, "file_hash": "", "uuid": ""})
        with open(folder / f"shard-{number:05d}.h5", "wb") as file:
            file.truncate(4096 + records)
    manifest = {"format": "paws-hpc-store", "version": 3, "encoding": "raw", "shape": [1, 1, 1], "count": count}
    manifest |= {"classes": ["black"], "class_counts": [count], "digest": "", "shards": shards, "reencoded": {}}
    manifest |= {"rewritten": {}, "recovered": [], "skipped": []}
    manifest |= {"index_hash": xxhash.xxh3_128_hexdigest(hashes.tobytes() + stop.to_bytes(8, "little"))}
    manifest |= {"statistics": {"mean": [0, 0, 0], "std": [1, 1, 1], "images": 1, "method": "sample"}}
    manifest |= {"origin": {"kind": "holes", "digest": "", "options": {}}}
    packing = {"packer": "0", "seed": 0, "shard_bytes": 1, "on_error": "stop"}
    manifest |= {"packing": packing | {"max_short_side": None, "transcoder": None}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": value_digest(manifest)}))
    return folder


def own_memory() -> int:
    """Bytes of this process that are not pages of files, which the system takes back when it needs them."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("RssAnon:"))) << 10


def test_opening_and_reading_cost_the_same_for_ten_and_a_hundred_million_records(tmp_path: Path) -> None:
    seconds, memory = {}, {}
    for count in (10_000_000, 100_000_000):
        path = sparse_store(tmp_path / str(count), count)
        before, durations = own_memory(), []
        for _ in range(3):
            started = time.perf_counter()
            store = ImageStore(path, check=False)
            durations.append(time.perf_counter() - started)
        seconds[count] = min(durations)
        for seed in range(20):
            places = np.random.default_rng(seed).integers(count, size=512)
            assert not store.read_raw(places).any()
        memory[count] = own_memory() - before
        assert len(store) == count
        store.close()
    assert seconds[100_000_000] < 1  # 0.04 s on an idle core
    assert memory[100_000_000] < memory[10_000_000] + (16 << 20)  # the index's hashes
    assert memory[100_000_000] < 40 << 20


def store_of(folder: Path, count: int, seed: int) -> Path:
    """A store of black images of one pixel, in three shards."""
    keys = [f"{number:06d}" for number in range(count)]
    source = ArraySource("black", np.zeros((count, 1, 1, 1), np.uint8), np.zeros(count, np.int64), keys, ("black",))
    return pack(source, folder / "store", options=PackOptions(shard_bytes=count // 3, seed=seed)).path


def index_and_keys(path: Path) -> tuple[StoreIndex, list[str]]:
    return load_index(path, read_manifest(path)), list(ImageStore(path).keys)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 60,000 records packed with seed 3."""
    return store_of(tmp_path_factory.mktemp("large"), 60_000, seed=3)


@pytest.fixture
def many(large: Path) -> tuple[StoreIndex, list[str]]:
    """That store's index and keys."""
    return index_and_keys(large)


@pytest.mark.parametrize("place", [_HEADER.size + 1234, -9, 2_000_000])
def test_damage_in_a_large_index_is_found_by_verification(
    large: Path, tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row, a key or a hash; a small index is checked when it is opened."""
    path = Path(shutil.copytree(large, tmp_path / "store"))
    content = bytearray((path / "index.bin").read_bytes())
    content[place] ^= 1
    (path / "index.bin").write_bytes(content)
    monkeypatch.setattr("paws_hpc.store.index.CHECKED_BYTES", 0)  # as for more than three million records
    [fault] = verify(path, level="full")[0]
    assert "damaged index.bin; remove it" in fault.problem


@pytest.mark.parametrize("wanted", [1, 100, 60_000])
def test_keys_are_found_and_strangers_are_not(many: tuple[StoreIndex, list[str]], wanted: int) -> None:
    index, keys = many
    places = np.random.default_rng(wanted).permutation(len(keys))[:wanted]
    assert np.array_equal(index.find([keys[place] for place in places], seed=3), places)
    strangers = [keys[place] + "x" for place in places] + ["", "ö"]
    assert (index.find(strangers, seed=3) == -1).all()


def test_a_few_keys_are_found_without_reading_the_others(
    many: tuple[StoreIndex, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, keys = many
    looked, keys_of = [], index.keys
    monkeypatch.setattr(index, "keys", lambda positions: looked.extend(positions) or keys_of(positions))
    assert np.array_equal(index.find(keys[5:6000:600], seed=3), np.arange(5, 6000, 600))
    assert len(looked) < 10 * 25


def test_another_seed_is_noticed(many: tuple[StoreIndex, list[str]]) -> None:
    index, keys = many
    assert index.in_order(seed=3)
    assert not index.in_order(seed=4)
    assert (index.find(keys[:50], seed=4) == -1).any()


def test_keys_with_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit hashes of real keys hardly collide; hashes cut to 6 bits do."""

    def short(content: bytes, seed: int) -> int:
        return xxhash.xxh3_64_intdigest(content, seed) >> 58 << 58

    index, keys = index_and_keys(store_of(tmp_path, 500, seed=1))
    monkeypatch.setattr("paws_hpc.store.index.xxhash", SimpleNamespace(xxh3_64_intdigest=short))
    for wanted in (range(500), range(0, 500, 60)):
        assert index.find([keys[place] for place in wanted], seed=1).tolist() == list(wanted)
    assert index.find(["stranger", "another"], seed=1).tolist() == [-1, -1]
