"""Whatever images and names go in come out again: properties over random folders, and data sets of any class."""

from __future__ import annotations

import io
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from paws_hpc.packing import ArraySource, ImageFolder, PackOptions, SourceConfig, open_source, pack
from paws_hpc.packing.plan import shard_bounds
from paws_hpc.packing.sources.base import SourceChangedError
from paws_hpc.packing.sources.dataset import dataset
from paws_hpc.store import ImageStore, StoreError
from paws_hpc.store.format import FLAG_REENCODED, FLAGS_OF_VERSION_4
from paws_hpc.store.verify import verify
from tests.pictures import encoded, write_idx, write_tiles

CHINA, FLOWER = load_sample_images().images
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 120
)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[str, bytes, NDArray[np.uint8]]:
    """Extension, file, and the pixels that it shows, (H, W, 3) uint8; parts of photographs of any odd size."""
    photo = draw(st.sampled_from([CHINA, FLOWER]))
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    top, left = draw(st.integers(0, 350)), draw(st.integers(0, 550))
    image = Image.fromarray(photo[top : top + height, left : left + width])
    if draw(st.booleans()):  # a plain image, whose file is small beside its pixels
        image = Image.new("RGB", image.size, image.getpixel((0, 0)))
    mode, kind, options = draw(
        st.sampled_from(
            [
                ("RGB", "JPEG", {"quality": 92, "subsampling": 0}),
                ("RGB", "JPEG", {"quality": 92, "progressive": True}),
                ("RGB", "JPEG", {"quality": 92, "comment": b"note"}),
                ("L", "JPEG", {"quality": 97}),
                ("CMYK", "JPEG", {"quality": 97}),
                ("RGB", "PNG", {}),
                ("RGBA", "PNG", {}),
                ("L", "PNG", {}),
                ("LA", "PNG", {}),
                ("I;16", "PNG", {}),
                ("1", "PNG", {}),
                ("P", "GIF", {}),
                ("L", "TIFF", {}),
                ("RGB", "TIFF", {}),
                ("RGB", "PPM", {}),
                ("RGB", "BMP", {}),
                ("RGB", "WEBP", {"lossless": True}),
            ]
        )
    )
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 255)
    content = encoded(image if image.mode == mode else image.convert(mode), kind, **options)
    with Image.open(io.BytesIO(content)) as opened:
        shown = (
            np.rint(np.asarray(opened) / 257) if mode == "I;16" else np.asarray(opened.convert("RGBA").convert("RGB"))
        )
    shown = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=-1)
    extension = draw(st.sampled_from([".jpg", ".JPEG", ".png", ".webp"]))  # of any other format, as often as not
    return extension, content, shown.astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(
    files=st.dictionaries(st.tuples(st.sampled_from(["a", "ü", "猫"]), NAMES), pictures(), min_size=1, max_size=12),
    seed=st.integers(0, (1 << 64) - 1),
    shard_bytes=st.sampled_from([1, 3000, 20_000, 1 << 28]),
)
def test_every_image_comes_out_as_it_went_in(
    files: dict[tuple[str, str], tuple[str, bytes, NDArray[np.uint8]]], seed: int, shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, originals = Path(place) / "source", {}
        for (label, name), (extension, content, shown) in files.items():
            path = root / label / f"{name}{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            originals[f"{label}/{name}{extension}"] = (label, content, shown)
        options = PackOptions(shard_bytes=shard_bytes, seed=seed, workers=1)
        report = pack(ImageFolder(root), Path(place) / "store", options=options)
        assert verify(report.path, level="deep") == ([], len(originals))
        with ImageStore(report.path) as store:
            assert sorted(store.keys) == sorted(originals)
            everything = range(len(store))
            for key, label, image, flags in zip(
                store.keys, store.labels, store.images(everything), store.flags, strict=True
            ):
                name, content, shown = originals[key]
                assert store.classes[label] == name
                assert image.shape == shown.shape
                if flags & FLAGS_OF_VERSION_4:  # it was no colour JPEG
                    assert np.array_equal(image, shown)
                else:
                    assert Image.open(io.BytesIO(content)).format == "JPEG"
                    error = np.abs(image.astype(int) - shown).mean()
                    assert error < (6 if flags & FLAG_REENCODED else 1.5)  # quality 95 of few pixels, or two decoders
            assert store.find(store.keys[:]).tolist() == list(everything)
        changed = sum(report.manifest.reencoded.values()) + sum(report.manifest.rewritten.values())
        metadata_only = report.manifest.rewritten.get("metadata taken out", 0)
        listed = (report.path / "changes.tsv").read_text(encoding="utf-8").splitlines() if report.changes else []
        assert len(listed) == changed - metadata_only
        assert {json.loads(line.partition("\t")[0]) for line in listed} <= set(originals)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=60), shard_bytes=st.integers(1, 120))
def test_shards_are_as_full_as_they_can_be(sizes: list[int], shard_bytes: int) -> None:
    bounds = shard_bounds(np.array(sizes), shard_bytes).tolist()
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    for start, stop in pairwise(bounds):
        assert stop > start
        assert sum(sizes[start:stop]) <= shard_bytes or stop == start + 1
        assert stop == len(sizes) or sum(sizes[start : stop + 1]) > shard_bytes


def test_statistics_of_a_sample_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(2_101):
        path = tmp_path / "source" / "a" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(random.integers(0, 256, 3).tolist())
        path.write_bytes(encoded(Image.new("RGB", (2, 2), colour), "PNG"))
    many, one = (
        pack(ImageFolder(tmp_path / "source"), tmp_path / name, options=PackOptions(shard_bytes=size, workers=1))
        for name, size in (("many", 5_000), ("one", 1 << 28))
    )
    assert len(many.manifest.shards) > 20
    assert many.manifest.statistics == one.manifest.statistics
    assert (one.manifest.statistics.method, one.manifest.statistics.images) == ("sample", 1_051)
    store = ImageStore(tmp_path / "one")
    counted = np.stack(store.images(np.arange(0, 2_101, 2))) / 255
    np.testing.assert_allclose(store.mean, counted.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(store.std, counted.std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_channel_that_never_changes_is_centred_and_not_divided(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images[..., 2] = 51
    source = ArraySource("red and green", images, np.zeros(20, np.int64), [str(i) for i in range(20)], ("one",))
    store = ImageStore(pack(source, tmp_path / "store").path)
    assert store.manifest.statistics.std[2] == 0
    assert store.mean[2] == pytest.approx(0.2)
    assert store.std[2] == 1
    assert store.std[:2] == store.manifest.statistics.std[:2]


def test_raw_pixels_are_not_shrunk(tmp_path: Path) -> None:
    source = ArraySource("grey", np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), ["a", "b"], ("one",))
    with pytest.raises(ValueError, match=r"max_short_side=2 does not apply to the grey source"):
        pack(source, tmp_path / "store", options=PackOptions(max_short_side=2))


@pytest.fixture
def one_image(tmp_path: Path) -> Path:
    """A folder with one image, ``a/x.png``."""
    (tmp_path / "source" / "a").mkdir(parents=True)
    Image.fromarray(CHINA[:20, :20]).save(tmp_path / "source" / "a" / "x.png")
    return tmp_path / "source"


def test_a_store_of_older_files_says_that_the_source_is_newer(one_image: Path, tmp_path: Path) -> None:
    pack(ImageFolder(one_image), tmp_path / "store")
    (one_image / "a" / "x.png").write_bytes((one_image / "a" / "x.png").read_bytes())
    report = pack(ImageFolder(one_image), tmp_path / "store")
    assert (report.made, report.newer) == (False, 1)


def test_links_that_lead_back_and_files_that_cannot_be_listed_are_named(one_image: Path) -> None:
    loop = one_image / "a" / "loop"
    loop.symlink_to(one_image / "a")
    with pytest.raises(StoreError, match=r"loop is a link to a folder that was listed already"):
        ImageFolder(one_image)
    loop.unlink()
    (one_image / "a" / "pipe.jpg").symlink_to("/dev/zero")
    with pytest.raises(StoreError, match=r"pipe.jpg is called like an image but is not a file"):
        ImageFolder(one_image)


def test_a_file_that_changes_after_it_was_listed_stops_packing(one_image: Path, tmp_path: Path) -> None:
    source = ImageFolder(one_image)
    (one_image / "a" / "x.png").write_bytes((one_image / "a" / "x.png").read_bytes())
    with pytest.raises(SourceChangedError, match=r"x.png changed since the source was listed"):
        pack(source, tmp_path / "store", options=PackOptions(on_error="skip"))


def test_torchvisions_image_folder_gives_the_files_themselves(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "images", 6, classes=("cat", "dog"))
    source = open_source(SourceConfig("dataset", str(root), dataset="ImageFolder"))
    ours = pack(ImageFolder(root), tmp_path / "ours").manifest
    theirs = pack(source, tmp_path / "theirs").manifest
    assert theirs.digest == ours.digest
    assert theirs.origin.kind == "dataset"
    assert theirs.origin.options == {"class": "torchvision.datasets:ImageFolder", "split": None}


def test_data_sets_that_hide_their_files_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flowers102 lists files and labels apart, below its own folders."""
    scipy_io = pytest.importorskip("scipy.io")
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        Image.fromarray(FLOWER[:40, 10 * number : 10 * number + 50]).save(base / "jpg" / f"image_{number:05d}.jpg")
    scipy_io.savemat(base / "imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 2]]})
    scipy_io.savemat(base / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[4]], "tstid": [[5, 6]]})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    source = dataset("Flowers102", tmp_path, "test")
    assert list(source.keys) == ["image_00005.jpg", "image_00006.jpg"]
    assert source.labels.tolist() == [0, 1]
    assert source.load(1) == (base / "jpg" / "image_00006.jpg").read_bytes()


def test_data_sets_of_equal_small_images_stay_pixels_whatever_the_workers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(30) % 10).astype(np.uint8))
    source = open_source(SourceConfig("dataset", str(tmp_path), split="test", dataset="MNIST"))
    one = pack(source, tmp_path / "one", options=PackOptions(shard_bytes=10_000, workers=1))
    two = pack(source, tmp_path / "two", options=PackOptions(shard_bytes=10_000, workers=2))
    assert one.manifest == two.manifest
    store = ImageStore(tmp_path / "two")
    assert (store.shape, len(store.manifest.shards)) == ((28, 28, 1), 3)
    assert np.array_equal(store.read_raw(store.find([f"{n:05d}" for n in range(30)]))[..., 0], images)
    assert store.classes[3].startswith("3")


class Odd:
    """A data set that is not torchvision's: PIL images of several sizes and modes."""

    def __init__(self, root: str, train: bool = True) -> None:
        self.settings = json.loads((Path(root) / "settings.json").read_text())
        self.train = train

    def __len__(self) -> int:
        return int(self.settings["count"])

    def __getitem__(self, index: int) -> Any:
        image = Image.fromarray(FLOWER[: 40 + index, : 50 + index])
        kind = self.settings.get("kind")
        if kind == "random":
            image = Image.fromarray(np.random.default_rng().integers(0, 256, (9, 9, 3), dtype=np.uint8))
        label = {"text": "cat", "negative": -1}.get(kind, np.int64(index % 2))
        item = (np.zeros((3, 4)) if kind == "float" else image, label)
        return item[0] if kind == "alone" else item


def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> str:
    (tmp_path / "settings.json").write_text(json.dumps({"count": 5} | settings))
    monkeypatch.setattr("paws_hpc.Odd", Odd, raising=False)
    return "paws_hpc:Odd"


def test_images_of_several_sizes_keep_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataset(odd(tmp_path, monkeypatch), tmp_path, "train")
    report = pack(source, tmp_path / "store", options=PackOptions(workers=1))
    assert report.manifest.rewritten == {"pixels of a data set": 5}
    store = ImageStore(tmp_path / "store")
    for key, image in zip(store.keys, store.images(range(5)), strict=True):
        place = int(key)
        assert np.array_equal(image, FLOWER[: 40 + place, : 50 + place])


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({}, None, r"has the splits train and test, not None"),
        ({}, "val", r"has the splits train and test, not 'val'"),
        ({"count": 0}, "train", "has no items"),
        ({"kind": "text"}, "train", r"gives label 'cat' in item 0"),
        ({"kind": "negative"}, "train", r"gives label -1 in item 0"),
        ({"kind": "float"}, "train", r"gives ndarray in item 0; PIL images are needed"),
        ({"kind": "alone"}, "train", r"gives Image as item 0, not \(image, label\)"),
    ],
)
def test_data_sets_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], split: str | None, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        dataset(odd(tmp_path, monkeypatch, **settings), tmp_path, split)


def test_a_random_data_set_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataset(odd(tmp_path, monkeypatch, kind="random"), tmp_path, "test")
    with pytest.raises(SourceChangedError, match=r"gives other pixels for item .* than before"):
        pack(source, tmp_path / "store", options=PackOptions(workers=1))


def test_classes_that_are_not_there_and_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("NoSuch", "no.such.module:Thing", "torchvision.datasets:utils"):
        with pytest.raises(StoreError, match=r"cannot be imported|cannot be opened"):
            dataset(name, tmp_path, None)
    with pytest.raises(StoreError, match=r"cannot be opened at .*download"):
        dataset("CIFAR10", tmp_path, "train")  # torchvision's own message; nothing was downloaded
    assert list(tmp_path.iterdir()) == []
