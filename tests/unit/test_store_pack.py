"""Packing keeps every image, is reproducible to the byte, and loses nothing when something is wrong."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from paws_hpc.packing import ArraySource, ImageFolder, PackOptions, pack
from paws_hpc.packing.sources.arrays import digits
from paws_hpc.packing.standard import ImagePolicy, standard_image
from paws_hpc.store import ImageStore, RecordError, StoreError, decode_jpeg
from paws_hpc.store.format import FLAG_PIXELS, FLAG_PNG, FLAG_PROGRESSIVE, FLAG_REENCODED, read_manifest
from paws_hpc.store.shard import read_shard
from tests.pictures import encoded, tile, write_tiles
from tests.stores import file_hashes, noise

KIB = 1 << 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ImageFolder of 24 JPEGs, one of them progressive, in three classes."""
    root = write_tiles(tmp_path / "source", 24, classes=("ant", "bee", "cow"), step=7)
    (root / "cow" / "005.jpg").write_bytes(encoded(tile(9, 5, 61, 83), quality=90, progressive=True))
    return root


@pytest.mark.parametrize("shard_bytes", [10 * KIB, 256 << 20])
def test_digits_come_back_exactly(tmp_path: Path, shard_bytes: int) -> None:
    source = digits(split="test", size=32)
    pack(source, tmp_path / "store", options=PackOptions(shard_bytes=shard_bytes, seed=3))
    store = ImageStore(tmp_path / "store")
    places = store.find(source.keys)
    assert sorted(places.tolist()) == list(range(400))
    assert np.array_equal(store.read_raw(places), source.images)
    assert np.array_equal(store.labels[places], source.labels)
    grey = source.images[:7]
    assert np.array_equal(np.stack(store.images(places[:7])), np.concatenate([grey, grey, grey], axis=-1))


def test_only_shards_and_stores_with_other_images_than_colour_jpegs_are_of_the_new_version(tmp_path: Path) -> None:
    for name, png, versions in (("jpeg", (), {2}), ("mixed", (3,), {2, 3})):
        folder = write_tiles(tmp_path / name, 8, classes=("a", "b"), png=png)
        store = pack(ImageFolder(folder), tmp_path / f"{name}-store", options=PackOptions(shard_bytes=7 * KIB)).path
        manifest = read_manifest(store)
        assert manifest.version == max(versions) + 1
        assert {read_shard(store / entry.name).header.version for entry in manifest.shards} == versions


def test_equal_inputs_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    options = PackOptions(shard_bytes=7 * KIB, seed=7, workers=1)
    pack(ImageFolder(folder), tmp_path / "one", options=options)
    copied = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # other path, other times
    pack(ImageFolder(copied), tmp_path / "two", options=replace(options, workers=4))
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "two")


def test_the_digest_follows_the_sequence_of_images_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    def digest(name: str, *, shard_kib: int = 16, seed: int = 0) -> str:
        options = PackOptions(shard_bytes=shard_kib * KIB, seed=seed)
        return pack(ImageFolder(folder), tmp_path / name, options=options).manifest.digest

    first = digest("a")
    assert digest("b", shard_kib=40) == first
    assert digest("c", seed=1) != first
    (folder / "ant").rename(folder / "aardvark")
    assert digest("d") != first


def test_images_are_shuffled_before_they_are_divided(tmp_path: Path) -> None:
    source = digits(split="train", size=8)
    by_label = np.argsort(source.labels, kind="stable")
    ordered = replace(
        source, images=source.images[by_label], labels=source.labels[by_label], keys=[source.keys[i] for i in by_label]
    )
    pack(ordered, tmp_path / "store", options=PackOptions(shard_bytes=8 * KIB))
    store = ImageStore(tmp_path / "store")
    first_shard = Counter(store.labels[: store.manifest.shards[0].count].tolist())
    assert sum(first_shard.values()) == 128
    assert len(first_shard) == 10
    assert max(first_shard.values()) < 30
    # The order depends on seed and key only, not on how the source lists its images.
    pack(source, tmp_path / "unordered", options=PackOptions(shard_bytes=8 * KIB))
    assert ImageStore(tmp_path / "unordered").digest == store.digest


def test_a_store_is_plain_hdf5_with_the_files_in_aligned_contiguous_data(folder: Path, tmp_path: Path) -> None:
    report = pack(ImageFolder(folder), tmp_path / "store", options=PackOptions(shard_bytes=7 * KIB))
    assert len(report.manifest.shards) > 3
    seen = []
    for entry in report.manifest.shards:
        with h5py.File(tmp_path / "store" / entry.name, "r", locking=False) as file:
            assert file["data"].chunks is None
            assert file["data"].id.get_offset() == entry.data_offset
            assert entry.data_offset is not None
            assert entry.data_offset % 4096 == 0
            for record in range(file.attrs["count"]):
                start, stop = file["keys/offset"][record : record + 2].tolist()
                key = file["keys/blob"][start:stop].tobytes().decode()
                offset, length = int(file["index/offset"][record]), int(file["index/length"][record])
                assert file["data"][offset : offset + length].tobytes() == (folder / key).read_bytes()
                assert report.manifest.classes[file["index/label"][record]] == key.split("/")[0]
                with Image.open(folder / key) as image:
                    assert image.size == (file["index/width"][record], file["index/height"][record])
                assert file["index/flags"][record] == (FLAG_PROGRESSIVE if key == "cow/005.jpg" else 0)
                seen.append(key)
    assert sorted(seen) == sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    assert not report.manifest.reencoded


def test_data_of_four_mib_and_more_is_aligned_to_stripes(tmp_path: Path) -> None:
    source = noise(80, (256, 256, 1))
    entry = pack(source, tmp_path / "store").manifest.shards[0]
    assert entry.data_bytes == 80 << 16
    assert entry.data_offset is not None
    assert entry.data_offset % (4 << 20) == 0
    store = ImageStore(tmp_path / "store")
    assert np.array_equal(store.read_raw(store.find(source.keys)), source.images)


@pytest.mark.parametrize("lossless", [True, False])
def test_other_formats_keep_their_pixels_or_become_colour_jpegs(lossless: bool) -> None:
    photo = tile(200, 100, 133, 90, photo=1)
    palette = photo.quantize(64)
    palette.info["transparency"] = bytes(range(64))
    for content, reason in (
        (encoded(photo, "PNG"), "PNG"),
        (encoded(photo.convert("RGBA"), "PNG"), "PNG"),
        (encoded(palette, "PNG"), "PNG"),
        (encoded(photo.convert("L"), "JPEG", quality=95), "Gray JPEG"),
        (encoded(photo.convert("CMYK"), "JPEG", quality=95), "CMYK JPEG"),
        (encoded(photo, "WEBP", lossless=True), "WEBP"),
        (encoded(photo.convert("1"), "TIFF"), "TIFF"),
    ):
        image = standard_image(content, ImagePolicy(lossless=lossless))
        if lossless and reason != "CMYK JPEG":
            assert not image.flags & FLAG_REENCODED
            assert image.pixels is not None
            assert np.array_equal(image.pixels, Image.open(io.BytesIO(content)).convert("RGBA").convert("RGB"))
            assert image.payload == content or image.flags & (FLAG_PIXELS | FLAG_PNG)
            continue
        assert image.changed == reason
        assert image.flags == FLAG_REENCODED
        with Image.open(io.BytesIO(image.payload)) as stored, Image.open(io.BytesIO(content)) as original:
            assert (stored.mode, stored.layer[0][1:3]) == ("RGB", (1, 1))  # no chroma subsampling
            rgb = np.asarray(original.convert("RGBA").convert("RGB")).astype(int)
        error = np.abs(decode_jpeg(image.payload).astype(int) - rgb)
        assert error.mean() < 4, reason  # dithering costs most; a wrong conversion is off by tens


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a but no image",
        encoded(tile(0, 0, 61, 83))[:700],
        encoded(tile(0, 0, 61, 83))[:60],
        encoded(Image.new("F", (8, 8)), "TIFF"),
        encoded(Image.new("RGB", (64, 64), "red"), "PNG")[:90],
        None,
    ],
    ids=["empty", "no image", "truncated JPEG", "truncated header", "32 bit", "truncated PNG", "missing"],
)
def test_an_unreadable_image_stops_packing_and_is_named(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    path = folder / "bee" / "broken.jpg"
    path.write_bytes(content or b"")
    source = ImageFolder(folder)
    if content is None:
        path.unlink()
    options = PackOptions(shard_bytes=7 * KIB, workers=2)
    with pytest.raises(RecordError, match=r"'bee/broken.jpg' cannot be packed: .*--on-error skip") as caught:
        pack(source, tmp_path / "store", options=options)
    assert caught.value.key == "bee/broken.jpg"
    assert not (tmp_path / "store" / "manifest.json").exists()
    done = len(list(tmp_path.glob("store/.packing/shard-*.json")))
    report = pack(source, tmp_path / "store", options=replace(options, on_error="skip"))
    assert report.kept == done
    assert [omission.key for omission in report.manifest.skipped] == ["bee/broken.jpg"]
    assert content is not None or report.manifest.skipped[0].reason == "it cannot be read: No such file or directory"
    assert sorted(ImageStore(tmp_path / "store").keys) == sorted(set(source.keys) - {"bee/broken.jpg"})


def test_duplicate_and_unstorable_keys_are_refused(tmp_path: Path) -> None:
    images = np.zeros((3, 2, 2, 1), np.uint8)
    for keys, message in (
        (["a", "b", "a"], "key 'a' occurs 2 times"),
        (["a", "b", ""], "cannot be stored"),
        (["a", "b", "x\udcff"], "is not UTF-8"),
    ):
        with pytest.raises(StoreError, match=message):
            pack(ArraySource("test", images, np.zeros(3, np.int64), keys, ("one",)), tmp_path / "store")


def test_packing_again_does_nothing_and_leftovers_are_replaced(folder: Path, tmp_path: Path) -> None:
    destination, options = tmp_path / "store", PackOptions(shard_bytes=7 * KIB)
    assert pack(ImageFolder(folder), destination, options=options).packed
    before = file_hashes(destination)
    assert not pack(ImageFolder(folder), destination, options=options).packed
    # An interrupted run: no manifest, one shard half written, one that the complete store does not have.
    (destination / "manifest.json").unlink()
    (destination / "shard-00001.h5").write_bytes(b"half")
    (destination / "shard-00099.h5").write_bytes(b"stale")
    for name in (".shard-00002.h5.123.tmp", ".index.bin.123-ab.tmp"):
        (destination / name).write_bytes(b"cut off")
        os.utime(destination / name, (0, 0))  # a living process writes to its file
    (destination / "splits").mkdir()
    (destination / "splits" / "mine.json").write_text("[]")
    with pytest.raises(StoreError, match="has no manifest"):
        ImageStore(destination)
    assert pack(ImageFolder(folder), destination, options=options).packed
    assert (destination / "splits" / "mine.json").read_text() == "[]"
    shutil.rmtree(destination / "splits")
    assert file_hashes(destination) == before


def test_another_store_is_only_replaced_by_force(folder: Path, tmp_path: Path) -> None:
    destination = tmp_path / "store"
    pack(ImageFolder(folder), destination)
    before = file_hashes(destination)
    with pytest.raises(StoreError, match=r"already holds another store: seed=0 \(wanted 1\).*--force"):
        pack(ImageFolder(folder), destination, options=PackOptions(seed=1))
    with pytest.raises(StoreError, match=r"kind='folder' \(wanted 'digits'\)"):
        pack(digits(split="test", size=8), destination)
    assert file_hashes(destination) == before
    assert pack(digits(split="test", size=8), destination, options=PackOptions(force=True)).packed
    assert len(ImageStore(destination)) == 400


def test_packing_again_notices_that_the_store_was_truncated(folder: Path, tmp_path: Path) -> None:
    destination = tmp_path / "store"
    entry = pack(ImageFolder(folder), destination).manifest.shards[0]
    with open(destination / entry.name, "r+b") as file:
        file.truncate(entry.bytes - 1000)
    with pytest.raises(StoreError, match=r"shard-00000.h5 .*bytes instead of"):
        pack(ImageFolder(folder), destination)
    pack(ImageFolder(folder), destination, options=PackOptions(force=True))
    ImageStore(destination)


def test_statistics_equal_numpys_over_all_pixels(folder: Path, tmp_path: Path) -> None:
    pack(ImageFolder(folder), tmp_path / "store")
    store = ImageStore(tmp_path / "store")
    pixels = np.concatenate([image.reshape(-1, 3) for image in store.images(range(24))]) / 255
    assert store.manifest.statistics.method == "exact"
    np.testing.assert_allclose(store.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(store.std, pixels.std(axis=0), rtol=1e-12)


@pytest.mark.parametrize(("field", "value"), [("shard_bytes", 0), ("seed", -1), ("on_error", "ignore"), ("workers", 0)])
def test_options_that_make_no_sense_are_refused_with_their_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"pack.{field}="):
        PackOptions(**{field: value})  # type: ignore[arg-type]
