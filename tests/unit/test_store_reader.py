"""Reading gives the packed bytes from any thread, or says which record of which shard is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paws_hpc.files import value_digest
from paws_hpc.packing import PackOptions, pack
from paws_hpc.packing.sources.arrays import digits
from paws_hpc.store import ImageStore, RecordError, StoreError
from tests.stores import edit_manifest, flip_bit, place_in_file

KIB = 1 << 10


@pytest.fixture
def raw_store(tmp_path: Path) -> Path:
    """The digits' test split in six shards."""
    return pack(digits(split="test", size=32), tmp_path / "raw", options=PackOptions(shard_bytes=70 * KIB)).path


def test_records_come_one_by_one_in_a_buffer_that_is_used_again(jpeg_store: Path, raw_store: Path) -> None:
    for path in (jpeg_store, raw_store):
        store = ImageStore(path)
        order = np.random.default_rng(0).permutation(30)
        whole = store.read_raw(order) if store.shape else store.read_encoded(order)
        assert [record.tobytes() for record in store.each(order)] == [bytes(record) for record in whole]
    places = [record.__array_interface__["data"][0] for record in store.each(range(9))]
    assert len(set(places)) == 1
    with pytest.raises(ValueError, match="outside the store"):
        next(store.each([400]))


def test_a_store_is_a_sequence_of_images(jpeg_store: Path, raw_store: Path) -> None:
    for path in (str(jpeg_store), raw_store):
        store = ImageStore(path)
        images = store.images(range(len(store)))
        assert len(list(store)) == len(images)
        assert all(np.array_equal(store[place], image) for place, image in enumerate(images))
        assert np.array_equal(store[-1], images[-1])
        with pytest.raises(IndexError, match=rf"index {len(store)} is outside the store's {len(store)} images"):
            store[len(store)]


def test_many_tiny_records_are_read_in_milliseconds(raw_store: Path) -> None:
    store = ImageStore(raw_store)
    indices = np.random.default_rng(0).integers(400, size=1000)
    durations = []
    for _ in range(9):
        started = time.perf_counter()
        store.images(indices)
        durations.append(time.perf_counter() - started)
    assert min(durations) < 0.03  # 3 ms on an idle core; one h5py access each would take 40


def test_keys_are_found_wherever_they_lie(jpeg_store: Path) -> None:
    store = ImageStore(jpeg_store)
    order = np.random.default_rng(0).permutation(30)
    assert np.array_equal(store.find([store.keys[place] for place in order]), order)
    assert store.find([]).tolist() == []
    assert store.keys[2:5] == [store.keys[2], store.keys[3], store.keys[4]]
    # A beginning of a key, or a key with something behind it, is another key.
    for unknown in ("a/0", store.keys[0] + "x", "zzz", "ö"):
        with pytest.raises(ValueError, match=r"is not in the store .*store's look like '"):
            store.find([store.keys[0], unknown])


@pytest.mark.parametrize("indices", [[0, 30], [-1], [0.5], [[1, 2]]])
def test_indices_outside_the_store_are_refused(jpeg_store: Path, indices: list[int]) -> None:
    store = ImageStore(jpeg_store)
    with pytest.raises(ValueError, match="ind"):
        store.read_encoded(indices)
    assert store.read_encoded([]) == []


def test_raw_and_encoded_stores_are_not_confused(jpeg_store: Path, raw_store: Path) -> None:
    with pytest.raises(ValueError, match="holds encoded images"):
        ImageStore(jpeg_store).read_raw([0])
    with pytest.raises(ValueError, match="holds raw pixels"):
        ImageStore(raw_store).read_encoded([0])


@pytest.mark.parametrize("position", [0, 17, 29])
def test_a_flipped_bit_is_named_with_shard_and_key(jpeg_store: Path, position: int) -> None:
    store = ImageStore(jpeg_store)
    file, offset, length = place_in_file(jpeg_store, position)
    flip_bit(file, offset + length // 2)
    message = rf"record '{store.keys[position]}' in .*{file.name} is damaged: its CRC32C .*verify"
    damaged = ImageStore(jpeg_store)
    with pytest.raises(RecordError, match=message) as caught:
        damaged.images([position])
    assert (caught.value.key, caught.value.shard) == (store.keys[position], file.name)
    others = [place for place in range(30) if place != position]
    assert len(damaged.read_encoded(others)) == 29
    assert len(ImageStore(jpeg_store, check=False).read_encoded([position])) == 1


def test_a_record_that_cannot_be_decoded_is_named(jpeg_store: Path) -> None:
    store = ImageStore(jpeg_store, check=False)
    file, offset, _ = place_in_file(jpeg_store, 4)
    flip_bit(file, offset)
    with pytest.raises(RecordError, match=rf"'{store.keys[4]}' in .* cannot be decoded"):
        store.images([4])


def test_a_truncated_or_missing_shard_is_refused_and_the_first_lost_record_named(jpeg_store: Path) -> None:
    store = ImageStore(jpeg_store)
    file, offset, _ = place_in_file(jpeg_store, 12)
    os.truncate(file, offset + 10)
    with pytest.raises(StoreError, match=rf"{file.name} record '{store.keys[12]}' is the first of \d+ that are lost"):
        ImageStore(jpeg_store)
    # A store that was open when it happened names the record too.
    with pytest.raises(RecordError, match=rf"'{store.keys[12]}' in .*{file.name} is cut off: 10 of"):
        store.read_encoded([12])
    file.unlink()
    with pytest.raises(StoreError, match=rf"{file.name} is missing"):
        ImageStore(jpeg_store)


def test_the_cached_index_is_made_again_when_it_is_absent_damaged_or_of_another_store(
    jpeg_store: Path, raw_store: Path
) -> None:
    index = jpeg_store / "index.bin"
    whole = index.read_bytes()
    keys = list(ImageStore(jpeg_store).keys)
    damaged = bytearray(whole)
    damaged[-60] ^= 4
    for content in (None, b"", whole[:500], bytes(damaged), (raw_store / "index.bin").read_bytes()):
        if content is None:
            index.unlink()
        else:
            index.write_bytes(content)
        assert list(ImageStore(jpeg_store).keys) == keys
        assert index.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    jpeg_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list(ImageStore(jpeg_store).keys)
    (jpeg_store / "index.bin").unlink()

    def refuse(path: Path) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr("paws_hpc.store.index.atomic_write", refuse)  # root may write anywhere: modes do not stop it
    assert list(ImageStore(jpeg_store).keys) == keys
    assert not (jpeg_store / "index.bin").exists()


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with a checksum that fits it."""
    manifest.pop("checksum")
    return json.dumps(manifest | {"checksum": value_digest(manifest)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-30], r"manifest.json is damaged"),
        (lambda text: sealed(json.loads(text) | {"format": "other"}), r"is not the manifest of an image store"),
        (lambda text: sealed(json.loads(text) | {"version": 2}), r"store version 2, this program reads \(3, 4\)"),
        (lambda text: text.replace('"count": 30', '"count": 31'), r"manifest.json .* does not fit its checksum"),
        (lambda text: text.replace('"mean": [', '"mean": [NaN, '), r"manifest.json .* NaN is no number"),
        (lambda text: text.replace('"checksum"', '"chocksum"'), r"manifest.json has no checksum"),
    ],
)
def test_a_manifest_that_is_not_right_is_named(jpeg_store: Path, change: Callable[[str], str], message: str) -> None:
    path = jpeg_store / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(StoreError, match=message):
        ImageStore(jpeg_store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("digest"), r"manifest.json is damaged: field 'digest'"),
        (lambda manifest: manifest.update(count=31), r"count=31 is not the sum"),
        (lambda manifest: manifest.update(encoding="avif"), r"encoding='avif' is not one of jpeg, raw"),
        (lambda manifest: manifest.update(statistics=[]), r"manifest.json is damaged"),
        (lambda manifest: manifest["shards"][0].update(name="../x.h5"), r"shard '../x.h5' is not the name of a file"),
    ],
)
def test_a_manifest_of_other_programs_is_named(
    jpeg_store: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """The checksum fits, as others can make it fit."""
    edit_manifest(jpeg_store, change)
    with pytest.raises(StoreError, match=message):
        ImageStore(jpeg_store)


def test_a_closed_store_refuses_to_read(jpeg_store: Path) -> None:
    with ImageStore(jpeg_store) as store:
        store.read_encoded([0])
    with pytest.raises(ValueError, match="was closed"):
        store.read_encoded([0])
    store.close()


_OPENS_UNDER_LIMITS = """
import os, resource, sys
from paws_hpc.store import ImageStore, StoreError

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
while len(os.listdir("/proc/self/fd")) < int(sys.argv[2]) - 2:  # room for two more, below the soft limit
    os.open(os.devnull, os.O_RDONLY)
try:
    print(len(ImageStore(sys.argv[1]).read_encoded([0, 1])))
except StoreError as error:
    message = str(error)  # the error itself keeps what was opened
else:
    sys.exit()
print(message, len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize(
    ("hard", "expected"), [(4096, r"^2$"), (64, r"\d+ shards, more files than .*ulimit -Hn.*--shard-mib.* 6\d$")]
)
def test_the_soft_limit_of_open_files_is_raised_and_the_hard_one_named(
    jpeg_store: Path, hard: int, expected: str
) -> None:
    """Most systems start with 1,024 of many more; what was opened before the hard limit was met is closed again."""
    command = [sys.executable, "-c", _OPENS_UNDER_LIMITS, str(jpeg_store), "64", str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = done.stdout.strip()
    assert done.returncode == 0, done.stderr
    assert re.search(expected, found), found
