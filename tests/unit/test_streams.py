"""Batches are pure functions of the step, laid out as the objective expects, and the same whatever divides the work."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data import multicrop
from paws_hpc.data.config import FIRST_SMALL_VIEW, AugmentConfig, CenterCropConfig, CropConfig, ViewsConfig
from paws_hpc.data.crops import draw_boxes
from paws_hpc.data.images import StoreImages
from paws_hpc.data.multicrop import Crops
from paws_hpc.data.samplers import Window
from paws_hpc.data.streams import ClassifierStream, EvaluationSet, PawsBatch, PawsStream
from paws_hpc.packing import ArraySource, ImageFolder, pack
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.pictures import array_source, encoded, tile, write_tiles
from tests.tiny import STILL

N, K, PER_CLASS, VIEWS, SMALL = 24, 6, 4, 2, 3
CPU, F32 = torch.device("cpu"), torch.float32


def views(**changes: Any) -> ViewsConfig:
    config = ViewsConfig(
        large=CropConfig(size=16, count=2, scale=[0.3, 1.0]),
        small=CropConfig(size=8, count=SMALL, scale=[0.1, 0.3]),
        support_views=VIEWS,
        evaluation=CenterCropConfig(resize=16, size=16),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def labelled(store: ImageStore, per_class: int = 5) -> np.ndarray:
    """Positions of the first few images of every class."""
    return np.concatenate([np.flatnonzero(store.labels == label)[:per_class] for label in range(len(store.classes))])


def stream(store: ImageStore, records: np.ndarray | None = None, **changes: Any) -> PawsStream:
    """A stream whose arguments, or views, have these changes."""
    arguments = {"batch_size": N, "support_classes": min(K, len(store.classes)), "images_per_class": PER_CLASS}
    arguments |= {"seed": 3, "threads": 1}
    of_views = {name: changes.pop(name) for name in ("large", "small", "augment") if name in changes}
    records = labelled(store) if records is None else records
    return PawsStream(store, records, views=views(**of_views), **arguments | changes)


def flat(value: Any) -> list[Any]:
    """Arrays and numbers of nested dataclasses and tuples, in order."""
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in flat(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [leaf for field in fields(value) for leaf in flat(getattr(value, field.name))]
    return [value]


def assert_same(first: Any, second: Any) -> None:
    for one, other in zip(flat(first), flat(second), strict=True):
        equal = torch.equal(one, other) if isinstance(one, Tensor) else np.array_equal(one, other)
        assert equal


T = TypeVar("T")
OnRanks = Callable[[int, Callable[[], T]], list[T]]


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> OnRanks:
    """Calls a function as each of several ranks, and gives their results."""

    def call(world: int, function: Callable[[], T]) -> list[T]:
        results = []
        for rank in range(world):
            with monkeypatch.context() as patch:
                patch.setattr(distributed, "rank", lambda rank=rank: rank)
                patch.setattr(distributed, "world_size", lambda: world)
                results.append(function())
        return results

    return call


@pytest.fixture
def digits(digits_stores: Stores) -> ImageStore:
    return ImageStore(digits_stores.train)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG store of parts of two photographs, of many sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(36):
        height, width, top, left = *random.integers(20, 200, size=2).tolist(), *random.integers(0, 200, size=2).tolist()
        path = folder / "images" / f"{'ab'[number % 2]}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile(left, top, width, height, photo=number % 2).save(path, quality=95)
    return pack(ImageFolder(folder / "images"), folder / "store").path


def test_a_batch_is_a_function_of_its_step_alone(digits: ImageStore) -> None:
    one, other = stream(digits), stream(digits)
    steps = [0, 70, 3]  # 70 is in the second epoch
    forward = {step: one.batch(step) for step in steps}
    for step in reversed(steps):
        assert_same(other.batch(step), forward[step])
    with pytest.raises(AssertionError):
        assert_same(forward[0].micro_batches, forward[70].micro_batches)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_threads_change_nothing(kind: str, digits: ImageStore, photographs: Path) -> None:
    store = digits if kind == "raw" else ImageStore(photographs)
    alone, several = stream(store), stream(store, threads=3)
    for step in range(3):
        assert_same(several.batch(step), alone.batch(step))


def by_view(crops: Crops, count: int) -> list[Tensor]:
    """Pixels and parameters, as (views, rows, ...)."""
    return [leaf.unflatten(0, (count, -1)) for leaf in (crops.images, crops.parameters)]


def assert_crops_of_ranks(of_ranks: Sequence[PawsBatch], whole: PawsBatch) -> None:
    """The ranks' crops of every view, one rank after the other, are those of the whole batch; all know its classes."""
    assert np.array_equal(np.concatenate([batch.records for batch in of_ranks]), whole.records)
    for name, count in (("large", 2), ("small", SMALL), ("supports", VIEWS)):
        pieces = [by_view(getattr(batch.micro_batches[0], name), count) for batch in of_ranks]
        expected = by_view(getattr(whole.micro_batches[0], name), count)
        for together, leaf in zip(zip(*pieces, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(together, dim=1), leaf), name
    world, rows = len(of_ranks), whole.num_support_rows // VIEWS // len(of_ranks)
    for batch in of_ranks:  # gathering puts rank after rank, each with its views one after the other
        assert batch.num_support_rows == VIEWS * rows
        by_rank = batch.support_classes.view(world, VIEWS, rows).transpose(0, 1).reshape(-1)
        assert torch.equal(by_rank, whole.support_classes)


@pytest.mark.parametrize("window", [None, Window(block_records=50, blocks=4)])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_run_that_goes_on_at_other_numbers_of_ranks_sees_the_same_batches(
    digits: ImageStore, on_ranks: OnRanks, window: Window | None, balanced: bool
) -> None:
    """1 rank, then 2, 4 and 1: all that goes from one to the next is the step."""
    make = partial(stream, digits, window=window, balanced_support=balanced)
    first = len(digits) // N - 2
    for step, world in enumerate((1, 2, 4, 1), start=first):  # over the end of an epoch
        assert_crops_of_ranks(on_ranks(world, lambda step=step: make().batch(step)), make().batch(step))


def whole_images(store: ImageStore, records: Sequence[int], size: int) -> Tensor:
    """(n, 1, size, size): each image as a crop that covers all of it."""
    pictures = [Image.fromarray(pixels[:, :, 0]) for pixels in store.read_raw(records)]
    resized = [np.array(picture.resize((size, size), Image.Resampling.BILINEAR)) for picture in pictures]
    return torch.from_numpy(np.stack(resized))[:, None]


def test_rows_of_every_view_are_the_same_images_in_the_same_order(digits: ImageStore) -> None:
    """With crops that cover the whole image, every view of an image is that image."""
    everything = {
        "large": CropConfig(size=16, count=2, scale=[1.0, 1.0]),
        "small": CropConfig(size=8, count=SMALL, scale=[1.0, 1.0]),
    }
    batch = stream(digits, **everything).batch(4)
    assert torch.equal(batch.micro_batches[0].large.images, whole_images(digits, batch.records, 16).repeat(2, 1, 1, 1))
    small = whole_images(digits, batch.records, 8).repeat(SMALL, 1, 1, 1)
    assert (batch.micro_batches[0].small.images.int() - small.int()).abs().max() <= 1
    # Supports: views one after the other, inside a view class after class.
    first, second = batch.micro_batches[0].supports.images.chunk(2)
    assert torch.equal(first, second)
    keys = {digits.read_raw([record])[0].tobytes(): record for record in labelled(digits)}
    drawn = np.array([keys[row.numpy().tobytes()] for row in first])
    classes = digits.labels[drawn].reshape(K, PER_CLASS)
    assert np.all(classes == classes[:, :1])
    assert len(np.unique(classes[:, 0])) == K
    assert len(np.unique(drawn)) == K * PER_CLASS
    indices = torch.arange(K).repeat_interleave(PER_CLASS)
    assert torch.equal(batch.support_classes, indices.repeat(VIEWS))


ALWAYS_JITTER = AugmentConfig(jitter_probability=1.0)


def distinct(rows: Tensor) -> int:
    return len({row.numpy().tobytes() for row in rows})


def test_no_two_crops_share_a_draw_not_even_of_an_image_in_other_steps(digits: ImageStore) -> None:
    """Views of an image, an image in two epochs, and a support in two steps, of which each draws all labels."""
    source = stream(
        digits, labelled(digits, PER_CLASS), batch_size=len(digits), support_classes=len(digits.classes),
        augment=ALWAYS_JITTER,
    )  # fmt: skip
    groups = [crops for step in (0, 1) for crops in source.batch(step).micro_batches[0].crop_groups]
    rows = 2 * ((2 + SMALL) * len(digits) + VIEWS * len(digits.classes) * PER_CLASS)
    assert distinct(torch.cat([crops.parameters for crops in groups])) == rows
    large = torch.cat([crops.images for crops in groups if crops.images.shape[-1] == 16])
    assert distinct(large) > 0.9 * len(large)


def test_small_crops_can_be_turned_off(digits: ImageStore) -> None:
    without = stream(digits, small=CropConfig(size=8, count=0))
    batch = without.batch(0)
    assert batch.micro_batches[0].small is None
    assert [len(view) for view in without.augment(batch.micro_batches[0], CPU, F32)] == [VIEWS * K * PER_CLASS, 2 * N]


def test_views_arrive_augmented_normalised_and_in_three_channels(digits: ImageStore) -> None:
    plain = stream(digits, augment=STILL)
    batch = plain.batch(0)
    supports, large, small = plain.augment(batch.micro_batches[0], CPU, torch.float64)
    assert supports.shape == (VIEWS * K * PER_CLASS, 3, 16, 16)
    assert small.shape == (SMALL * N, 3, 8, 8)
    assert large.dtype == torch.float64
    expected = (batch.micro_batches[0].large.images / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(large, expected.expand(-1, 3, -1, -1).double(), rtol=1e-5, atol=1e-5)
    augmented = stream(digits)
    assert not torch.allclose(augmented.augment(augmented.batch(0).micro_batches[0], CPU, torch.float64)[1], large)


def test_an_indivisible_size_names_those_that_fit(digits: ImageStore, on_ranks: OnRanks) -> None:
    with pytest.raises(ValueError, match=r"pretrain\.batch_size=130 .* 4 ranks.*pretrain\.batch_size=128 or 132"):
        on_ranks(4, lambda: stream(digits, batch_size=130))
    with pytest.raises(ValueError, match=r"pretrain\.support\.images_per_class=24 .* 16 ranks.*=16 or 32 would fit"):
        on_ranks(16, lambda: stream(digits, batch_size=128))


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_prefetching_gives_the_same_batches_with_the_bits_of_views_made_later(
    digits: ImageStore, dtype: torch.dtype
) -> None:
    source = stream(digits)
    with source.prefetch(5, 8, dtype) as batches:
        for step, batch in zip(range(5, 8), batches, strict=True):
            assert batch.prefetched is not None
            now = source.batch(step)
            assert_same(replace(batch, prefetched=None), now)
            for made, expected in zip(
                batch.prefetched.take(), source.augment(now.micro_batches[0], CPU, dtype), strict=True
            ):
                assert made.dtype == dtype
                assert torch.equal(made, expected)


def test_large_batches_are_made_ahead_one_at_a_time(digits: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made, source = [], stream(digits)
    rows = [len(crops) * crops.images.shape[-1] ** 2 for crops in source.batch(0).micro_batches[0].crop_groups]
    views = sum(rows) * 3 * (1 + 4)  # uint8 and float32
    monkeypatch.setattr("paws_hpc.data.streams.Prefetch", lambda *_, ahead, **__: made.append(ahead))
    for limit in (1, views, 2 * views, 10 * views):
        monkeypatch.setattr("paws_hpc.data.streams._AHEAD_BYTES", limit)
        source.prefetch(0, 1, F32)
    assert made == [1, 1, 2, 3]


@pytest.mark.parametrize("read", ["images", "read_raw"])
@pytest.mark.parametrize("what", ["leaving early", "a fault while reading", "a fault while drawing"])
def test_when_prefetching_ends_no_thread_reads_any_more(
    read: str,
    what: str,
    photographs: Path,
    digits: ImageStore,
    *,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However it ends, with micro-batches and supports begun that nobody waited for: the store may be closed now."""
    really_read, draw, lock = getattr(ImageStore, read), multicrop.draw_parameters, threading.Lock()
    count = {"reading": 0, "reads": 0, "draws": 0}

    def add(name: str, number: int) -> int:
        with lock:
            count[name] += number
            return count[name]

    def slow_read(store: ImageStore, records: np.ndarray) -> Any:
        add("reading", 1)
        try:
            time.sleep(0.02)
            if add("reads", 1) == 9 and what == "a fault while reading":
                raise ValueError("the ninth")
            return really_read(store, records)
        finally:
            add("reading", -1)

    def drawn(*arguments: Any, **named: Any) -> Any:
        if add("draws", 1) == 11 and what == "a fault while drawing":
            raise ValueError("the eleventh")
        return draw(*arguments, **named)

    monkeypatch.setattr(ImageStore, read, slow_read)
    monkeypatch.setattr(multicrop, "draw_parameters", drawn)
    store = digits if read == "read_raw" else ImageStore(photographs)
    source = stream(
        store, support_classes=len(store.classes), threads=2, accumulate_steps=2, supports=StoreImages(store)
    )

    def consume() -> None:
        with source.prefetch(0, 100) as batches:
            for _ in batches:
                if what == "leaving early":
                    break

    if what == "leaving early":
        consume()
    else:
        with pytest.raises(ValueError, match=r"the (ninth|eleventh)"):
            consume()
    assert count["reading"] == 0
    reads = count["reads"]
    time.sleep(0.1)
    assert count["reads"] == reads
    assert source.batch(0).records.shape == (N,), "it can be used again"


def test_batches_may_be_made_while_others_are_made_ahead(digits: ImageStore) -> None:
    """What one thread gives up when its block ends, another waits for; memory is shared out without mixing batches."""
    source, expected = stream(digits, threads=2), [stream(digits).batch(step) for step in range(8)]
    for _ in range(5):
        with source.prefetch(0, 8, F32) as batches, source.prefetch(0, 3) as others:
            for step, batch in enumerate(batches):
                assert_same(source.batch(step), expected[step])
                assert_same(replace(batch, prefetched=None), expected[step])
                if step < 2:
                    assert_same(next(others), expected[step])


def pil_crop(pixels: np.ndarray, box: Sequence[int], size: int) -> Tensor:
    top, left, height, width = box
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(crop.resize((size, size), Image.Resampling.BILINEAR))).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG, colour", "PNG, grey"])
def test_images_of_any_size_are_cropped(photographs: Path, tmp_path: Path, kind: str) -> None:
    """The fourth small crop of every image of a batch is what PIL cuts from the decoded file, within one level."""
    store = ImageStore(photographs)
    if kind != "JPEG":
        for key, pixels in zip(store.keys, store.images(range(len(store))), strict=True):
            path = tmp_path / "images" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.fromarray(pixels).convert("L" if kind.endswith("grey") else "RGB"), "PNG"))
        store = ImageStore(pack(ImageFolder(tmp_path / "images"), tmp_path / "store").path)
    assert len({(int(h), int(w)) for h, w in zip(*store.sizes(range(len(store))), strict=True)}) > 30
    several = stream(store, small=CropConfig(size=8, count=4, scale=[0.1, 0.9]))
    batch = several.batch(0)
    assert batch.micro_batches[0].large.images.shape == (2 * N, 3, 16, 16)
    heights, widths = store.sizes(batch.records)
    boxes = draw_boxes(
        several.views.small, seed=3, epoch=0, samples=batch.records, view=FIRST_SMALL_VIEW + 3, heights=heights,
        widths=widths,
    )  # fmt: skip
    for row, box, record in zip(
        batch.micro_batches[0].small.images[3 * N :], boxes.tolist(), batch.records, strict=True
    ):
        file = store.read_encoded([record])[0] if kind == "JPEG" else tmp_path / "images" / store.keys[record]
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file).convert("RGB")
        assert (row.int() - pil_crop(np.array(image), box, 8).int()).abs().max() <= 1


def test_jpeg_and_raw_stores_of_the_same_pixels_give_the_same_crops(tmp_path: Path) -> None:
    """Two ways to resize, one per encoding: they differ by one of 255 levels at most, where rounding differs."""
    write_tiles(tmp_path / "images", 30, classes=("a", "b"))
    jpeg = ImageStore(pack(ImageFolder(tmp_path / "images"), tmp_path / "jpeg").path)
    everything = np.arange(len(jpeg))
    source = ArraySource("digits", np.stack(jpeg.images(everything)), jpeg.labels, list(jpeg.keys), jpeg.classes)
    raw = ImageStore(pack(source, tmp_path / "raw").path)
    assert list(raw.keys) == list(jpeg.keys)
    from_jpeg, from_raw = stream(jpeg).batch(0), stream(raw).batch(0)
    assert np.array_equal(from_jpeg.records, from_raw.records)
    for name in ("large", "small", "supports"):
        difference = (
            getattr(from_jpeg.micro_batches[0], name).images.int()
            - getattr(from_raw.micro_batches[0], name).images.int()
        )
        assert difference.abs().max() <= 1
        assert (difference == 0).float().mean() > 0.8
    evaluations = [
        torch.cat(list(EvaluationSet(store, everything, CenterCropConfig(20, 16), store).batches(CPU, F32)))
        for store in (jpeg, raw)
    ]
    torch.testing.assert_close(*evaluations, rtol=1e-4, atol=1e-4)


def classifier_stream(store: ImageStore, batch_size: int, records: np.ndarray) -> ClassifierStream:
    crop, augment = CropConfig(size=16, scale=[0.4, 1.0]), AugmentConfig()
    return ClassifierStream(store, records, crop=crop, augment=augment, batch_size=batch_size, seed=1, threads=1)


def test_an_epoch_of_the_classifier_meets_every_labelled_image_once(digits: ImageStore) -> None:
    records = labelled(digits)
    source = classifier_stream(digits, 10, records)
    assert source.steps_per_epoch == 5
    batches = [source.batch(step) for step in range(10)]
    for epoch in (batches[:5], batches[5:]):
        assert set(np.concatenate([batch.records for batch in epoch])) == set(records)
    for batch in batches:
        assert np.array_equal(batch.labels, digits.labels[batch.records])
        assert batch.crops.images.shape == (10, 1, 16, 16)
    assert_same(classifier_stream(digits, 10, records).batch(7), batches[7])
    small = classifier_stream(digits, 1024, records)
    assert (small.steps_per_epoch, small.batch_size) == (1, len(records))


def test_ranks_share_a_labelled_batch_even_if_it_does_not_divide(digits: ImageStore, on_ranks: OnRanks) -> None:
    records = labelled(digits)
    whole = classifier_stream(digits, 10, records).batch(3)
    shares = on_ranks(3, lambda: classifier_stream(digits, 10, records).batch(3))
    assert [len(share.records) for share in shares] == [4, 3, 3]
    assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
    assert torch.equal(torch.cat([share.crops.images for share in shares]), whole.crops.images)
    with pytest.raises(ValueError, match="A step of 50 labelled images leaves some of 64 ranks without one"):
        on_ranks(64, lambda: classifier_stream(digits, 1024, records))


def test_evaluation_crops_the_centre_in_the_given_order_and_normalises_as_for_training(
    digits: ImageStore, photographs: Path, on_ranks: OnRanks
) -> None:
    records = np.random.default_rng(0).permutation(len(digits))[:300]  # more than one batch
    training = ImageStore(photographs)
    images = EvaluationSet(digits, records, CenterCropConfig(16, 10), training)
    whole = torch.cat(list(images.batches(CPU, F32)))
    pixels = torch.from_numpy(digits.read_raw(records)[:, None, 3:13, 3:13, 0]) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (training.mean, training.std))
    torch.testing.assert_close(whole, (pixels - mean) / std)
    assert np.array_equal(images.labels, digits.labels[records])
    shares = on_ranks(4, lambda: torch.cat(list(images.batches(CPU, F32))))
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 12, 13])
def test_every_rank_has_equally_many_evaluation_batches(
    digits: ImageStore, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Shares of 13 among 3 are 5, 4 and 4: in batches of 4 one rank needs a second batch, so the others get one too."""
    monkeypatch.setattr("paws_hpc.data.streams._EVALUATION_BATCH", 4)
    images = EvaluationSet(digits, np.arange(count), CenterCropConfig(16, 10), digits, threads=3)
    whole = torch.cat(list(images.batches(CPU, F32)))
    assert len(whole) == count
    shares = on_ranks(3, lambda: list(images.batches(CPU, F32)))
    assert {len(share) for share in shares} == {2 if count == 13 else 1}
    assert torch.equal(torch.cat([batch for share in shares for batch in share]), whole)


def test_one_label_per_class_is_seen_in_as_many_crops_as_a_step_asks_for(digits: ImageStore, on_ranks: OnRanks) -> None:
    make = partial(stream, digits, labelled(digits, 1), augment=ALWAYS_JITTER)
    with pytest.raises(ValueError, match=r"has only 1 labelled images.*support_order=balanced"):
        make()
    batch = make(balanced_support=True).batch(2)
    assert batch.num_support_rows == VIEWS * K * PER_CLASS
    supports = batch.micro_batches[0].supports
    assert distinct(supports.parameters) == VIEWS * K * PER_CLASS, "no two are alike, though only K images are there"
    assert distinct(supports.images.view(VIEWS, K, PER_CLASS, -1)[:, 0].flatten(0, 1)) > VIEWS * PER_CLASS // 2
    assert_crops_of_ranks(on_ranks(2, lambda: make(balanced_support=True).batch(2)), batch)
    with pytest.raises(ValueError, match=r"600 repeats of an image.*lower pretrain.support.images_per_class"):
        make(images_per_class=600, balanced_support=True)


def test_a_batch_knows_its_own_labelled_images_where_their_class_is_drawn(
    digits: ImageStore, on_ranks: OnRanks
) -> None:
    """Against the labels themselves, and on two ranks; unlabelled images' labels stay unknown."""
    chosen, source, met = set(labelled(digits).tolist()), stream(digits, batch_size=96), 0
    for step in range(6):
        batch = source.batch(step)
        supports = source._support_sampler.draw(step)
        place_of = {int(digits.labels[record]): int(place) for record, place in zip(*supports[:2], strict=True)}
        assert len(place_of) == K < len(digits.classes)
        for record, known, place in zip(batch.records, batch.known, batch.known_classes, strict=True):
            label = int(digits.labels[record])
            assert bool(known) == (int(record) in chosen and label in place_of)
            assert int(place) == (place_of[label] if known else 0)
        met += int(batch.known.sum())
        shares = on_ranks(2, lambda step=step: stream(digits, batch_size=96).batch(step))
        for name in ("known", "known_classes"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(batch, name))
    assert met > 5, "an epoch of 15 steps meets 50 labelled images, six tenths of them in a step with their class"


def test_labelled_images_may_come_from_another_store(digits: ImageStore, tmp_path: Path) -> None:
    """Its labels count, and the unlabelled store's are never read; its images are normalised as the others are."""
    records = np.flatnonzero(digits.labels < 3)[:30]
    pixels = digits.read_raw(records) // 2
    labels = 2 - digits.labels[records]  # other names for the classes
    names = [f"other {record}" for record in records]
    other = ImageStore(pack(ArraySource("digits", pixels, labels, names, ("c", "b", "a")), tmp_path / "a").path)
    unlabelled = ImageStore(digits.path)
    unlabelled._labels = None  # type: ignore[assignment]
    whole = CropConfig(size=16, count=2, scale=[1.0, 1.0])
    source = stream(
        unlabelled, np.arange(30), support_classes=3, supports=StoreImages(other), large=whole, augment=STILL
    )
    batch = source.batch(0)
    assert not batch.known.any(), "positions in one store say nothing about the other"
    known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    classes = np.array([known[row.numpy().tobytes()] for row in batch.micro_batches[0].supports.images])
    assert len(np.unique(classes[:12].reshape(3, 4), axis=1).flatten()) == 3
    rows = source.augment(batch.micro_batches[0], CPU, F32)[0]
    expected = (batch.micro_batches[0].supports.images / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(rows, expected.expand(-1, 3, -1, -1))


def test_labels_from_a_grey_store_and_images_from_a_colour_one(photographs: Path, tmp_path: Path) -> None:
    """The two stores need not be alike, not even in encoding."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 1), np.uint8)
    labels = ImageStore(pack(array_source(pixels, "xyz"), tmp_path / "labels").path)
    mixed = stream(
        ImageStore(photographs), np.arange(12), batch_size=8, support_classes=3, images_per_class=2,
        supports=StoreImages(labels),
    )  # fmt: skip
    supports, large, _ = mixed.augment(mixed.batch(0).micro_batches[0], CPU, F32)
    assert supports.shape == (VIEWS * 6, 3, 16, 16)
    assert large.shape == (2 * 8, 3, 16, 16)
