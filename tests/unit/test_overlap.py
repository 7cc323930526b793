"""Test images among the training images are found by what they show, whatever their files and names."""

from __future__ import annotations

import errno
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from paws_hpc.data import overlap
from paws_hpc.data.overlap import NEAR_BITS, fingerprints, near_images, same_images
from paws_hpc.exhibits import read_exhibits
from paws_hpc.packing import ImageFolder, pack
from paws_hpc.stages import prepare
from paws_hpc.stages.context import StageContext
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.pictures import tile, write_tiles
from tests.stores import flip_bit
from tests.tiny import tiny_config


def packed(folder: Path) -> ImageStore:
    return ImageStore(pack(ImageFolder(folder), folder.parent / f"{folder.name}-store").path)


@pytest.fixture
def train(tmp_path: Path) -> ImageStore:
    """Tiles of two photographs as JPEG."""
    return packed(write_tiles(tmp_path / "train", 20, classes=("a", "b"), step=15))


def test_equal_pixels_are_found_in_other_files_and_near_ones_are_not_taken_for_equal(
    train: ImageStore, tmp_path: Path
) -> None:
    number = int(train.find(["b/011.jpg"])[0])
    for name in ("as-png.png", "smaller.png", "once-more.jpg", "other.png"):
        (tmp_path / "test" / "a").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(train.images([number])[0])
        image = {"smaller.png": image.resize((67, 53)), "other.png": tile(330, 300, 100, 80)}.get(name, image)
        image.save(tmp_path / "test" / "a" / name, **({"quality": 60} if name.endswith("jpg") else {}))
    test = packed(tmp_path / "test")
    ours, theirs = fingerprints(test, tmp_path), fingerprints(train, tmp_path)
    same = dict(zip(test.keys, same_images(ours, theirs).tolist(), strict=True))
    near = dict(zip(test.keys, near_images(ours, theirs).tolist(), strict=True))
    assert same == {"a/as-png.png": number, "a/smaller.png": -1, "a/once-more.jpg": -1, "a/other.png": -1}
    assert near == {"a/as-png.png": number, "a/smaller.png": number, "a/once-more.jpg": number, "a/other.png": -1}


def test_the_nearest_of_many_is_found_across_blocks() -> None:
    random = np.random.default_rng(0)
    kind = np.dtype([("pixels", "<u8"), ("across", "<u8"), ("down", "<u8")])
    others = random.integers(0, 256, (9_000, 24), np.uint8).view(kind)[:, 0]
    these = others[random.integers(0, 9_000, 150)].copy()
    flipped = np.arange(150) % 7
    for row, bits in enumerate(flipped):
        for bit in random.choice(128, bits, replace=False):
            these[("across", "down")[bit // 64]][row] ^= np.uint64(1) << np.uint64(bit % 64)
    distances = sum(np.bitwise_count(these[name][:, None] ^ others[name]).astype(int) for name in ("across", "down"))
    expected = np.where(distances.min(axis=1) <= NEAR_BITS, distances.argmin(axis=1), -1)
    assert np.array_equal(near_images(these, others), expected)
    assert np.array_equal(expected >= 0, flipped <= NEAR_BITS)


def test_fingerprints_are_kept_until_the_store_changes(
    train: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprints(train, tmp_path)
    (kept,) = train.path.glob("fingerprints-*.bin")
    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "images", None)  # whoever reads images fails
        assert np.array_equal(fingerprints(train, tmp_path), first)
    flip_bit(kept)
    assert np.array_equal(fingerprints(train, tmp_path), first), "damage is noticed, and mended"
    kept.unlink()
    write = overlap.atomic_write

    def refuse(path: Path) -> AbstractContextManager[BinaryIO]:
        if path.parent == train.path:  # as NFS does, which says before that it may be written
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return write(path)

    monkeypatch.setattr(overlap, "atomic_write", refuse)
    assert np.array_equal(fingerprints(train, tmp_path), first)
    assert [path.name for path in tmp_path.glob("fingerprints-*.bin")] == [kept.name]
    assert not kept.exists()
    monkeypatch.setattr(ImageStore, "images", None)
    assert np.array_equal(fingerprints(train, tmp_path), first), "found there, too"


def test_a_run_whose_test_images_are_training_images_is_refused_unless_it_is_meant(
    digits_stores: Stores, tmp_path: Path
) -> None:
    config = tiny_config(digits_stores.train, digits_stores.train, tmp_path / "runs")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"1,397 of 1,397 test images .* equal pixels .'\d{5}' is .* data.allow_overlap"
    ) as told:
        prepare.run(StageContext(config, run, "prepare"))
    assert "\n" not in str(told.value)
    lines = [
        tuple(map(json.loads, line.split("\t"))) for line in (run.prepare / "overlap.tsv").read_text().splitlines()
    ]
    assert len(lines) == 1_397
    assert all(kind == "same" and mine == other for kind, mine, _, other in lines)
    assert not (run.prepare / "DONE").exists()
    meant = replace(config, data=replace(config.data, allow_overlap=True))
    prepare.run(StageContext(meant, run, "prepare"))
    (exhibit,) = read_exhibits(run.prepare)
    assert "1,397 of 1,397 test images are among the others by equal pixels" in exhibit["text"]


def test_near_duplicates_are_counted_and_shown_and_hinder_nobody(digits_stores: Stores, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    prepare.run(StageContext(tiny_config(*digits_stores, tmp_path / "runs"), run, "prepare"))
    (exhibit,) = read_exhibits(run.prepare)
    assert exhibit["text"].startswith("0 of 400 test images are among the others by equal pixels; ")
    near = [line for line in (run.prepare / "overlap.tsv").read_text().splitlines() if line.startswith('"near"')]
    assert 0 < len(near) < 40
    assert f"{len(near)} of 400 test images are among the others by at least 124 equal bits" in exhibit["text"]
    _, mine, field, other = map(json.loads, near[0].split("\t"))
    assert f"{mine!r} is {field}'s {other!r}" in exhibit["text"]
