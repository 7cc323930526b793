"""Repair gives back the very bytes that were packed, or leaves everything as it is and says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from paws_hpc.files import file_hash
from paws_hpc.packing import ImageFolder, PackOptions, SourceConfig, open_source, pack
from paws_hpc.shards import main
from paws_hpc.store import ImageStore
from paws_hpc.store.format import Packing, read_manifest
from paws_hpc.store.verify import verify
from tests.stores import file_hashes, flip_bit

KIB = 1 << 10


@pytest.fixture
def store(jpeg_store: Path) -> Path:
    return jpeg_store


@pytest.fixture
def source(photo_folder: Path, tmp_path: Path) -> Path:
    """A copy of the source, elsewhere and with other times."""
    return Path(shutil.copytree(photo_folder / "source", tmp_path / "source", copy_function=shutil.copyfile))


def repair(store: Path, source: Path, *options: str) -> int:
    return main(["repair", str(store), "--root", str(source), *options])


@pytest.mark.parametrize("with_index", [True, False])
def test_damaged_shards_become_what_was_packed(store: Path, source: Path, with_index: bool) -> None:
    before, reader = file_hashes(store), ImageStore(store)
    shards = [store / entry.name for entry in read_manifest(store).shards]
    assert len(shards) >= 5
    flip_bit(shards[0])
    os.truncate(shards[1], 5 * KIB)
    shards[2].unlink()
    shutil.copy(shards[4], shards[3])
    if not with_index:
        (store / "index.bin").unlink()
    untouched = shards[4].stat().st_ino
    assert repair(store, source) == 0
    assert file_hashes(store) == before
    assert shards[4].stat().st_ino == untouched  # only the damaged ones were written
    assert verify(store, level="deep")[0] == []
    assert len(reader.keys) == 30


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("check", ["decode", "structure"])
def test_faults_that_packing_did_not_look_for_are_not_found_by_repairing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, with_index: bool
) -> None:
    """In older stores of ``structure`` only those JPEGs with faults were encoded anew that the statistics count."""
    monkeypatch.setattr("paws_hpc.packing.plan.Packing", partial(Packing, check=check))
    monkeypatch.setattr("paws_hpc.packing.plan._STATISTICS_IMAGES", 10)
    tile = np.ascontiguousarray(load_sample_images().images[0][:64, :80])
    for number in range(24):
        content = bytearray(simplejpeg.encode_jpeg(tile, quality=90 - number))
        content[-30:-26] = b"\xff\xd0\xff\xd1"  # restart markers where there are none
        path = tmp_path / "source" / "a" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if number % 5 == 2 else content)
    options = PackOptions(shard_bytes=7 * KIB, on_error="skip")
    store = pack(ImageFolder(tmp_path / "source"), tmp_path / "store", options=options).path
    manifest = read_manifest(store)
    assert len(manifest.skipped) == 5
    assert sum(manifest.reencoded.values()) == len(manifest.recovered)
    assert len(manifest.recovered) == 19 if check == "decode" else 4 < len(manifest.recovered) < 10
    before = file_hashes(store)
    for entry in manifest.shards:
        flip_bit(store / entry.name)
    if not with_index:
        (store / "index.bin").unlink()
    assert repair(store, tmp_path / "source") == 0
    assert file_hashes(store) == before


def test_a_store_of_the_version_before_is_read_compared_and_repaired_as_ever(tmp_path: Path) -> None:
    """There every image that was no colour JPEG was made one; no other images come into it now."""
    golden = Path(__file__).parents[1] / "golden" / "store-version-3"
    store = Path(shutil.copytree(golden / "store", tmp_path / "store"))
    before = file_hashes(store)
    assert read_manifest(store).reencoded == {"Gray JPEG": 1, "PNG": 2}
    assert verify(store, level="deep") == ([], 4)
    with ImageStore(store) as opened:
        for key, pixels in zip(opened.keys, opened.images(range(4)), strict=True):
            assert np.abs(pixels.astype(int) - Image.open(golden / "source" / key).convert("RGB")).mean() < 2
    assert not pack(ImageFolder(golden / "source"), store).made
    flip_bit(store / "shard-00000.h5")
    assert repair(store, golden / "source") == 0
    assert file_hashes(store) == before


def test_a_store_without_faults_is_left_alone(store: Path, source: Path) -> None:
    inodes = {path.name: path.stat().st_ino for path in store.iterdir()}
    assert repair(store, source) == 0
    assert {path.name: path.stat().st_ino for path in store.iterdir()} == inodes


def change_an_image(source: Path, key: str) -> str:
    (source / key).write_bytes((source / key).read_bytes()[:-2] + b"\0\xff\xd9")
    return "what the source gives now is not what was packed: its digest is "


def remove_an_image(source: Path, key: str) -> str:
    (source / key).unlink()
    return f"the source has no image '{key}', nor 0 others of this shard"


def spoil_an_image(source: Path, key: str) -> str:
    (source / key).write_bytes(b"")
    return f"image '{key}' cannot be packed"


@pytest.mark.parametrize("change", [change_an_image, remove_an_image, spoil_an_image])
def test_a_shard_whose_source_is_another_is_left_as_it_is_and_the_reason_said(
    store: Path,
    source: Path,
    change: Callable[[Path, str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second, *_ = read_manifest(store).shards
    before = file_hashes(store)
    message = change(source, ImageStore(store).keys[first.count])
    flip_bit(store / first.name)
    flip_bit(store / second.name)
    damaged = file_hash(store / second.name)
    assert repair(store, source) == 1
    output = capsys.readouterr().out
    assert f"NOT REPAIRED {second.name}: " in output
    assert message in output
    assert file_hashes(store) == before | {second.name: damaged}  # the other was repaired
    capsys.readouterr()
    assert repair(store, source, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["repaired"], list(report["refused"]), report["whole"]) == ([], [second.name], False)
    assert [fault["shard"] for fault in report["faults"]] == [second.name]


def test_without_the_index_another_number_of_images_is_refused(
    store: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(store / "shard-00000.h5")
    (store / "index.bin").unlink()
    shutil.copy(source / "a" / "000.jpg", source / "a" / "new.jpg")
    assert repair(store, source) == 1
    assert "the source has 31 images that were not skipped, the store 30" in capsys.readouterr().out


def test_a_damaged_index_needs_no_source(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_hashes(store)
    flip_bit(store / "index.bin")
    assert main(["repair", str(store)]) == 0
    assert "made index.bin anew" in capsys.readouterr().out
    assert file_hashes(store) == before


def test_a_store_of_digits_repairs_itself(tmp_path: Path) -> None:
    source = open_source(SourceConfig(kind="digits", split="test", size=16))
    path = pack(source, tmp_path / "store", options=PackOptions(shard_bytes=30 * KIB)).path
    before = file_hashes(path)
    flip_bit(path / "shard-00002.h5")
    assert main(["repair", str(path)]) == 0
    assert file_hashes(path) == before


def test_a_source_that_is_needed_and_not_named_is_an_error(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(store / "shard-00000.h5")
    assert main(["repair", str(store)]) == 1
    assert "source.root is needed for source.kind='folder'" in capsys.readouterr().err


def test_a_damaged_manifest_is_not_repaired_but_named(
    store: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(store / "manifest.json")
    assert repair(store, source) == 1
    assert "manifest.json" in capsys.readouterr().err
