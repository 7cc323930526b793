"""Who is labelled depends on the seed and the keys alone, and a list that does not fit the store is an error."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paws_hpc.data.config import LabelsConfig
from paws_hpc.data.splits import Split, folds, labelled_and_validation, load_split
from paws_hpc.packing import ArraySource, ImageFolder, PackOptions, pack
from paws_hpc.store import ImageStore

DRAWN = LabelsConfig(per_class=4, validation_per_class=6)
CLASSES, PER_CLASS = 5, 12


def source() -> ArraySource:
    """60 tiny images of 5 classes, whose keys are positions as CIFAR's are."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(CLASSES), PER_CLASS))
    return ArraySource(
        kind="digits",
        images=random.integers(0, 256, size=(len(labels), 4, 4, 1), dtype=np.uint8),
        labels=labels,
        keys=[f"{position:05d}" for position in range(len(labels))],
        classes=tuple("abcde"),
    )


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(pack(source(), tmp_path / "store").path)


@pytest.fixture
def imagenet(tmp_path: Path) -> ImageStore:
    """Two classes of three JPEGs, named as in ImageNet."""
    for number in range(6):
        synset = ("n01440764", "n01443537")[number % 2]
        path = tmp_path / "images" / synset / f"{synset}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (40 * number, 0, 0)).save(path, "JPEG")
    return ImageStore(pack(ImageFolder(tmp_path / "images"), tmp_path / "imagenet").path)


def listed(folder: Path, name: str, lines: list[str]) -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def classes_of(split: Split, store: ImageStore) -> Counter[int]:
    return Counter(store.labels[split.records(store)].tolist())


def read_from(store: ImageStore, file: str) -> Split:
    return labelled_and_validation(store, LabelsConfig(file=file, validation_per_class=1), seed=0)[0]


def test_a_draw_is_a_function_of_the_seed_however_the_store_was_shuffled(store: ImageStore, tmp_path: Path) -> None:
    shuffled = ImageStore(pack(source(), tmp_path / "other", options=PackOptions(seed=5)).path)
    assert list(shuffled.keys) != list(store.keys)
    draws = [
        [split.keys for split in labelled_and_validation(which, DRAWN, seed=seed)]
        for which, seed in ((store, 3), (shuffled, 3), (store, 4))
    ]
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0]
    assert draws[0][1] != draws[2][1]


@pytest.mark.parametrize(
    ("seed", "labelled", "validation"),
    [
        (0, [51, 22, 46, 13, 38, 17, 26, 41, 52, 8], [3, 40, 10, 53, 25, 0, 18, 14, 37, 42, 44, 4, 20, 9, 23]),
        (11, [11, 40, 45, 19, 17, 5, 15, 12, 50, 6], [22, 3, 21, 24, 32, 0, 38, 1, 54, 48, 49, 44, 56, 36, 8]),
    ],
)
def test_what_a_seed_draws_never_changes(
    store: ImageStore, seed: int, labelled: list[int], validation: list[int]
) -> None:
    """As drawn by the first version of this program: runs of different versions are compared by their seeds."""
    drawn = labelled_and_validation(store, LabelsConfig(per_class=2, validation_per_class=3), seed=seed)
    assert [[int(key) for key in split.keys] for split in drawn] == [labelled, validation]
    assert [classes_of(split, store) for split in drawn] == [dict.fromkeys(range(CLASSES), count) for count in (2, 3)]


def test_a_split_is_kept_beside_the_shards_and_taken_up_again(store: ImageStore) -> None:
    labelled, validation = labelled_and_validation(store, DRAWN, seed=0)
    kept = sorted((store.path / "splits").glob("*.json"))
    assert {load_split(path).digest for path in kept} == {labelled.digest, validation.digest}
    written = [path.stat().st_mtime_ns for path in kept]
    assert labelled_and_validation(store, DRAWN, seed=0) == (labelled, validation)
    assert [path.stat().st_mtime_ns for path in kept] == written


def test_a_store_that_cannot_be_written_gives_the_same_split_at_every_start(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise OSError(errno.EROFS, f"cannot write {path}: Read-only file system", str(path))

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr("paws_hpc.data.splits.write_record", refuse)
        first, again = (labelled_and_validation(store, DRAWN, seed=0) for _ in range(2))
    assert first == again
    assert "cannot be written, so the split" in caplog.text
    assert first == labelled_and_validation(store, DRAWN, seed=0)


def test_an_edited_split_is_noticed(store: ImageStore) -> None:
    labelled, _ = labelled_and_validation(store, DRAWN, seed=0)
    path = store.path / "splits" / f"{labelled.name}.json"
    value = json.loads(path.read_text())
    value["keys"][0] = next(key for key in store.keys if key not in value["keys"])
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"{path} is damaged or was edited"):
        labelled_and_validation(store, DRAWN, seed=0)
    del value["checksum"]  # as in stores whose splits an older version wrote
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"{path} does not fit its digest"):
        labelled_and_validation(store, DRAWN, seed=0)
    del value["keys"]
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"{path} is not a split"):
        labelled_and_validation(store, DRAWN, seed=0)


def test_a_split_of_other_data_or_of_a_list_that_has_changed_is_refused(store: ImageStore, tmp_path: Path) -> None:
    file = listed(tmp_path, "list.txt", ["1", "2"])
    read_from(store, file)
    listed(tmp_path, "list.txt", ["1", "3"])
    with pytest.raises(ValueError, match=r"labelled-list\.json was made for .* but this run needs"):
        read_from(store, file)
    labelled_and_validation(store, DRAWN, seed=0)
    other = ImageStore(pack(source(), tmp_path / "other", options=PackOptions(seed=5)).path)
    shutil.copytree(store.path / "splits", other.path / "splits")
    with pytest.raises(ValueError, match=f"was drawn from other images than {other.path} has now"):
        labelled_and_validation(other, DRAWN, seed=0)


def test_a_list_of_keys_is_taken_as_it_is_sorted_by_class(store: ImageStore, tmp_path: Path) -> None:
    lines = [store.keys[position] for position in (50, 3, 17, 20)]
    split = read_from(store, listed(tmp_path, "mine.txt", ["", *lines, "  "]))
    assert set(split.keys) == set(lines)
    labels = store.labels[split.records(store)]
    assert np.array_equal(labels, np.sort(labels))


def test_imagenets_lists_name_files_and_the_class_is_before_the_underscore(
    imagenet: ImageStore, tmp_path: Path
) -> None:
    split = read_from(imagenet, listed(tmp_path, "1percent.txt", ["n01443537_3.JPEG", "n01440764_0.JPEG"]))
    assert split.keys == ("n01440764/n01440764_0.JPEG", "n01443537/n01443537_3.JPEG")
    assert [imagenet.classes[label] for label in imagenet.labels[split.records(imagenet)]] == ["n01440764", "n01443537"]


def test_what_is_drawn_keeps_away_from_what_is_listed(store: ImageStore, tmp_path: Path) -> None:
    """Each class has 12 images, of which 8 are listed: the 4 others are the only ones that may be drawn."""
    chosen = [key for label in range(CLASSES) for key in np.array(store.keys)[store.labels == label][:8].tolist()]
    file = listed(tmp_path, "list.txt", chosen)
    others = set(store.keys) - set(chosen)
    labelled, validation = labelled_and_validation(store, LabelsConfig(per_class=4, validation_file=file), seed=0)
    assert (set(labelled.keys), set(validation.keys)) == (others, set(chosen))
    labelled, validation = labelled_and_validation(store, LabelsConfig(file=file, validation_per_class=4), seed=0)
    assert (set(labelled.keys), set(validation.keys)) == (set(chosen), others)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["00000", "00060", "00061"], r"list\.txt lists 2 images that are not in .*store; the first is '00060'"),
        (["cat.png"], r"list\.txt, line 1: 'cat\.png' is not an image of .*store .*keys look like '000"),
        (["n01440764_1.JPEG"], r"list\.txt, line 1: 'n01440764_1\.JPEG' is not an image"),
        (["00001", "00002", "00001"], r"list\.txt lists '00001' more than once"),
        (["1", "2", "01"], r"list\.txt lists '00001' more than once"),
        ([], r"list\.txt lists no images"),
    ],
)
def test_a_list_that_does_not_fit_is_an_error(
    store: ImageStore, tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_from(store, listed(tmp_path, "list.txt", lines))
    assert not (store.path / "splits").exists(), "nothing was drawn in its place"


def test_too_few_images_of_a_class_say_which_and_the_number_that_suits(store: ImageStore) -> None:
    few = r"13 images of each class .* class 'a' of .*store has only 12, of which 1 are for validation\. .*at most 11"
    with pytest.raises(ValueError, match=few):
        labelled_and_validation(store, LabelsConfig(per_class=13, validation_per_class=1), seed=0)
    labelled_and_validation(store, LabelsConfig(per_class=11, validation_per_class=1), seed=0)
    with pytest.raises(ValueError, match=r"9 images of each class .* class 'a' .* only 8 others\. .*at most 8"):
        labelled_and_validation(store, LabelsConfig(per_class=4, validation_per_class=9), seed=0)
    labelled_and_validation(store, LabelsConfig(per_class=4, validation_per_class=8), seed=0)


def test_an_image_may_not_both_train_and_validate(store: ImageStore, tmp_path: Path) -> None:
    both = LabelsConfig(
        file=listed(tmp_path, "train.txt", ["1", "2", "3"]), validation_file=listed(tmp_path, "val.txt", ["3", "4"])
    )
    with pytest.raises(ValueError, match=r"1 images are both labelled and for validation, '00003' among them"):
        labelled_and_validation(store, both, seed=0)


def test_all_labels_are_all_images_but_those_for_validation(store: ImageStore, tmp_path: Path) -> None:
    file = listed(tmp_path, "list.txt", ["00000", "00001"])
    for config in (LabelsConfig(all=True, validation_per_class=2), LabelsConfig(all=True, validation_file=file)):
        labelled, validation = labelled_and_validation(store, config, seed=0)
        assert set(labelled.keys) == set(store.keys) - set(validation.keys)
        assert len(labelled.keys) == len(store) - len(validation.keys)
        labels = store.labels[labelled.records(store)]
        assert np.array_equal(labels, np.sort(labels))
        assert labelled_and_validation(store, config, seed=0) == (labelled, validation)


def test_several_lists_are_several_seeds_of_one_setting(store: ImageStore, tmp_path: Path) -> None:
    """As the reference's five of CIFAR10: one index per line, validation drawn from the rest."""
    of_seed = {73: ["59", "0", "7"], 91: ["1", "2"]}
    for seed, lines in of_seed.items():
        listed(tmp_path, f"split.{seed}.txt", lines)
    config = LabelsConfig(file=str(tmp_path / "split.{seed}.txt"), validation_per_class=3)
    for seed, lines in of_seed.items():
        labelled, validation = labelled_and_validation(store, config, seed=seed)
        assert set(labelled.keys) == {line.zfill(5) for line in lines}
        assert not set(labelled.keys) & set(validation.keys)
    with pytest.raises(FileNotFoundError, match=r"split\.5\.txt does not exist.*never drawn"):
        labelled_and_validation(store, config, seed=5)


NAMES = ["cat", "rabbit", "dog", "eel", "fox", "gnu", "hen", "ibis"]


def test_without_validation_each_label_is_held_out_once_and_every_class_is_spread_evenly() -> None:
    labels = np.repeat([0, 2, 5], [9, 8, 5])
    masks = folds(labels, NAMES, seed=3)
    assert len(masks) == 4
    assert (sum(mask.astype(int) for mask in masks) == 1).all()
    for label in (0, 2, 5):
        sizes = [int(mask[labels == label].sum()) for mask in masks]
        assert max(sizes) - min(sizes) <= 1
    assert all((a == b).all() for a, b in zip(masks, folds(labels, NAMES, seed=3), strict=True))
    assert any((a != b).any() for a, b in zip(masks, folds(labels, NAMES, seed=4), strict=True))
    assert [int(mask.sum()) for mask in folds(np.repeat(np.arange(8), 5), NAMES, seed=0)] == [10] * 4, "folds are even"
    assert len(folds(np.array([0, 0, 1, 1, 1]), NAMES, seed=0)) == 2, "as many as the labels of the smallest class"
    with pytest.raises(ValueError, match=r"class 'rabbit' has one labelled image.*labels.validation_per_class"):
        folds(np.array([0, 0, 1]), NAMES, seed=0)


def test_nothing_is_held_out_where_no_validation_is_asked_for(store: ImageStore) -> None:
    labelled, validation = labelled_and_validation(store, LabelsConfig(all=True), seed=0)
    assert validation is None
    assert len(labelled.keys) == CLASSES * PER_CLASS
