"""Sources give the right pixels, labels and keys, and say what is wrong with their files without running them."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from paws_hpc.packing import (
    ImageFolder,
    SourceConfig,
    open_source,
    pack,
    plan_pack,
    planned_listing,
    repair,
)
from paws_hpc.packing.sources.arrays import FASHION_CLASSES, cifar, digits, idx
from paws_hpc.store import ImageStore, StoreError
from tests.pictures import write_idx, write_tiles

FASHION_ROOT = Path("/usr/share/datasets/fashion-mnist")


def tiles(count: int, *, seed: int) -> NDArray[np.uint8]:
    """(count, 32, 32, 3) noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_cifar10(root: Path, batches: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Write tiles the way the original files were written; returns the training labels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    labels = []
    for number, pixels in enumerate(batches, start=1):
        batch_labels = [(number + place) % 10 for place in range(len(pixels))]
        labels += batch_labels
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        name = f"data_batch_{number}" if number <= 5 else "test_batch"
        batch = {b"batch_label": b"one of six", b"labels": batch_labels, b"data": planes, b"filenames": [b"x.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"class {number}".encode() for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    return np.array(labels)


def test_digits_are_divided_for_ever_into_the_same_balanced_halves() -> None:
    train, test = digits(split="train", size=32), digits(split="test", size=32)
    assert (len(train.keys), len(test.keys)) == (1397, 400)
    assert np.bincount(test.labels).tolist() == [40] * 10
    assert sorted([*train.keys, *test.keys]) == [f"{place:05d}" for place in range(1797)]
    # The split is part of published numbers: it may never move.
    assert hashlib.sha256(" ".join(test.keys).encode()).hexdigest()[:16] == "a5dbb5fcb1f6e121"


def test_digits_keep_sklearns_order_labels_and_strokes() -> None:
    source, bunch = digits(split="train", size=32), load_digits()
    places = [int(key) for key in source.keys]
    assert np.array_equal(source.labels, bunch.target[places])
    assert source.images.shape == (1397, 32, 32, 1)
    # Averaging 4 x 4 blocks gives back the original within one of its 16 grey levels: bicubic filters overshoot.
    blocks = source.images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)) / 255 * 16
    assert np.abs(blocks - bunch.images[places]).mean() < 1
    assert (
        digits(split="train", size=8).images[5, ..., 0].tolist()
        == np.rint(bunch.images[places[5]] * 255 / 16).astype(int).tolist()
    )


def test_cifar10_rows_become_images_in_file_order(tmp_path: Path) -> None:
    pixels = tiles(60, seed=0)
    labels = write_cifar10(tmp_path, [pixels[start : start + 10] for start in range(0, 60, 10)])
    train, test = cifar(tmp_path, kind="cifar10", split="train"), cifar(tmp_path, kind="cifar10", split="test")
    assert np.array_equal(train.images, pixels[:50])
    assert np.array_equal(test.images, pixels[50:])
    assert np.array_equal(train.labels, labels[:50])
    assert train.keys[42] == "00042"
    assert train.classes[3] == "class 3"
    inside = cifar(tmp_path / "cifar-10-batches-py", kind="cifar10", split="train")
    assert inside.digest == train.digest != test.digest


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = tiles(4, seed=1)
    batch = {
        b"data": pixels.transpose(0, 3, 1, 2).reshape(4, -1),
        b"fine_labels": [99, 0, 5, 7],
        b"coarse_labels": [1, 2, 3, 4],
    }
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [f"fine {number}".encode() for number in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    source = cifar(tmp_path, kind="cifar100", split="train")
    assert source.labels.tolist() == [99, 0, 5, 7]
    assert np.array_equal(source.images, pixels)


class Malicious:
    """Unpickled by the ordinary pickle module, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_cifar_pickle_is_named_and_does_not_execute(tmp_path: Path, protocol: int) -> None:
    write_cifar10(tmp_path, [tiles(2, seed=0)] * 6)
    trace = tmp_path / "executed"
    attack = pickle.dumps({b"data": Malicious(trace), b"labels": [0]}, protocol=protocol)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(attack)
    with pytest.raises(StoreError, match=r"data_batch_3.*mkdir.*nothing was executed"):
        cifar(tmp_path, kind="cifar10", split="train")
    assert not trace.exists()
    pickle.loads(attack)  # the attack is a real one
    assert trace.exists()


class Pointers:
    """Unpickled with numpy's own class, its bytes are followed as pointers to objects."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((1,), np.dtype(object), b"\0" * 8)


def test_a_cifar_pickle_may_not_make_arrays_of_pointers(tmp_path: Path) -> None:
    write_cifar10(tmp_path, [tiles(2, seed=0)] * 6)
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": Pointers()}
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(StoreError, match=r"data_batch_3.*cannot be read as plain data"):
        cifar(tmp_path, kind="cifar10", split="train")


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path, [tiles(2, seed=0)] * 6)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    whole = batch.read_bytes()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps({b"labels": [1]}), pickle.dumps([1, 2])):
        batch.write_bytes(content)
        with pytest.raises(StoreError, match="data_batch_2"):
            cifar(tmp_path, kind="cifar10", split="train")
    batch.unlink()
    with pytest.raises(StoreError, match="data_batch_2 is missing"):
        cifar(tmp_path, kind="cifar10", split="train")


@pytest.mark.parametrize(
    ("images_name", "labels_name"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    ],
)
def test_idx_files_give_images_and_labels_in_file_order(tmp_path: Path, images_name: str, labels_name: str) -> None:
    images, labels = load_digits().images[:30].astype(np.uint8), load_digits().target[:30].astype(np.uint8)
    write_idx(tmp_path / images_name, images)
    write_idx(tmp_path / labels_name, labels)
    source = idx(tmp_path, split="train")
    assert np.array_equal(source.images[..., 0], images)
    assert np.array_equal(source.labels, labels)
    assert (source.keys[7], source.classes[9]) == ("00007", "9")


def test_idx_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte.gz"
    with pytest.raises(StoreError, match="has no t10k-images-idx3-ubyte"):
        idx(tmp_path, split="test")
    write_idx(images, np.zeros((3, 4, 4), np.uint8))
    write_idx(labels, np.zeros(2, np.uint8))
    with pytest.raises(StoreError, match=r"3 images but .* 2 labels"):
        idx(tmp_path, split="test")
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"t10k-labels-idx1-ubyte.gz cannot be read"):
        idx(tmp_path, split="test")
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(StoreError, match="has 47 values, its header says 48"):
        idx(tmp_path, split="test")
    images.write_bytes(b"not idx at all")
    with pytest.raises(StoreError, match="is not an idx file"):
        idx(tmp_path, split="test")


@pytest.mark.skipif(not FASHION_ROOT.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_the_published_one() -> None:
    source = open_source(SourceConfig(kind="fashion_mnist", split="test"))
    assert source.classes == FASHION_CLASSES
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert [FASHION_CLASSES[label] for label in source.labels[:3]] == ["Ankle boot", "Pullover", "Trouser"]


def test_a_folder_is_listed_by_class_with_keys_below_its_root(tmp_path: Path) -> None:
    for place in ("dog/a.JPEG", "dog/deep/er/b.png", "cat/z.jpg", "cat/ä ö.jpg", "cat/notes.txt", ".cache/c.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(place.encode())
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.keys == ["cat/z.jpg", "cat/ä ö.jpg", "dog/a.JPEG", "dog/deep/er/b.png"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.load(3) == b"dog/deep/er/b.png"
    before = source.digest
    (tmp_path / "dog/a.JPEG").write_bytes(b"longer than it was")
    assert ImageFolder(tmp_path).digest != before


def test_folders_without_images_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a folder"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(StoreError, match="has neither class folders nor images"):
        ImageFolder(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(StoreError, match=r"only 1 images beside each other.*one folder per class"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "readme.txt").touch()
    with pytest.raises(StoreError, match=r"class folder .*cat has no images"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cifar"}, r"source.kind='cifar'.*Did you mean 'cifar10'"),
        ({"kind": "folder"}, r"source.root is needed"),
        ({"kind": "digits"}, r"source.split=None.*train or test"),
        ({"kind": "digits", "split": "val"}, r"source.split='val'"),
        ({"kind": "folder", "root": "x", "split": "train"}, r"source.split='train' does not apply"),
        ({"kind": "digits", "split": "train", "size": 4}, r"source.size=4"),
        ({"kind": "folder", "root": "x", "labels": "l"}, r"source.labels='l' does not apply"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused_with_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)


@pytest.mark.parametrize("options", [{"kind": "digits", "split": "train"}, {"kind": "folder", "root": "photographs"}])
def test_some_classes_are_the_same_images_under_the_same_keys(options: dict[str, Any], tmp_path: Path) -> None:
    """Packed whole or in parts, and again after damage, from files and from an array."""
    names = ["0", "1", "2"] if options["kind"] == "digits" else ["cat", "dög", "鰻"]
    if "root" in options:
        options = options | {"root": str(write_tiles(tmp_path / options["root"], 9, classes=tuple(names)))}
    chosen = [names[2], names[0]]
    whole = ImageStore(pack(open_source(SourceConfig(**options)), tmp_path / "whole").path)
    source = open_source(SourceConfig(**options, classes=chosen))
    part = ImageStore(pack(source, tmp_path / "part").path)
    assert part.classes == tuple(chosen)
    expected = {key: whole.classes[label] for key, label in zip(whole.keys, whole.labels, strict=True)}
    expected = {key: name for key, name in expected.items() if name in chosen}
    assert {key: part.classes[label] for key, label in zip(part.keys, part.labels, strict=True)} == expected
    of_both = [store.images(store.find(sorted(expected))) for store in (part, whole)]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(*of_both, strict=True))

    plan_pack(source, tmp_path / "by_part")
    listing = planned_listing(tmp_path / "by_part", options["kind"])
    assert (listing is not None) == ("root" in options)
    again = open_source(SourceConfig(**options, classes=chosen), listing)
    pack(again, tmp_path / "by_part", task=(1, 1))
    assert ImageStore(tmp_path / "by_part").digest == part.digest
    (shard,) = (tmp_path / "by_part").glob("*.h5")
    intact = shard.read_bytes()
    shard.write_bytes(intact[: len(intact) // 2])
    assert repair(tmp_path / "by_part", options.get("root")).whole
    assert shard.read_bytes() == intact


@pytest.mark.parametrize(
    ("classes", "said"),
    [(["3", "cat"], r"\['cat'\] are not among the 10 of the digits source, .*'0', '1'"), (["3", "3"], "one twice")],
)
def test_a_class_that_is_not_there_is_named(classes: list[str], said: str) -> None:
    with pytest.raises(StoreError, match=said):
        open_source(SourceConfig("digits", split="train", classes=classes))
    with pytest.raises(ValueError, match=r"classes=\[\] leaves no image"):
        SourceConfig("digits", split="train", classes=[])
