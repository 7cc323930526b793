"""Wherever decoding and cropping run, the crops are the same; and what cannot work says so before training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from paws_hpc.data.batches import PawsBatch, StreamOptions
from paws_hpc.data.config import PLACEMENTS, AugmentConfig, CropConfig, Placement, ViewsConfig
from paws_hpc.data.images import cached_images
from paws_hpc.data.pixels import Encoded
from paws_hpc.data.placement import Rates, candidates, check_possible, choose, preferred, resident_bytes
from paws_hpc.data.streams import ClassifierStream, PawsStream
from paws_hpc.packing import ArraySource, ImageFolder, PackOptions, pack
from paws_hpc.store import ImageStore
from tests.conftest import Stores

CPU = torch.device("cpu")
VIEWS = ViewsConfig(
    large=CropConfig(size=32, count=2, scale=[0.14, 1.0]),
    small=CropConfig(size=16, count=3, scale=[0.05, 0.14]),
    support_views=2,
)
KINDS = ("supports", "large", "small")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Parts of two photographs, from strips of 8 pixels to all of them."""
    folder, random = tmp_path_factory.mktemp("placement"), np.random.default_rng(0)
    for number in range(40):
        photo = load_sample_images().images[number % 2]
        height, width = random.integers(8, 427), random.integers(8, 640)
        file = folder / "images" / "ab"[number % 2] / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[:height, :width]).save(file, "JPEG", quality=90)
    return ImageStore.open(pack(ImageFolder(folder / "images"), folder / "store").path)


@pytest.fixture(scope="module")
def digits(digits_stores: Stores) -> ImageStore:
    return ImageStore.open(digits_stores.train)


def stream(store: ImageStore, placement: Placement, *, threads: int = 1, device: torch.device = CPU) -> PawsStream:
    labelled = np.concatenate([np.flatnonzero(store.labels == label)[:5] for label in range(len(store.classes))])
    return PawsStream(
        store,
        labelled,
        views=VIEWS,
        batch_size=24,
        support_classes=len(store.classes),
        images_per_class=4,
        seed=3,
        threads=threads,
        options=StreamOptions(placement=placement, device=device),
    )


def levels_apart(first: PawsBatch, second: PawsBatch) -> tuple[int, float]:
    """Greatest difference of two batches' crops, in levels, and the share of pixels that differ."""
    greatest, share = 0, 0.0
    for kind in KINDS:
        one, other = getattr(first.micro_batches[0], kind), getattr(second.micro_batches[0], kind)
        assert torch.equal(one.parameters.jitter, other.parameters.jitter)
        difference = (one.images.int() - other.images.int()).abs()
        greatest = max(greatest, int(difference.max()))
        share = max(share, float((difference > 0).float().mean()))
    return greatest, share


def test_decoded_images_give_the_same_crops_on_the_device_to_one_level(photographs: ImageStore) -> None:
    for step in range(2):
        here, there = (stream(photographs, placement).batch(step) for placement in ("cpu-crop", "cpu-decode"))
        greatest, share = levels_apart(here, there)
        assert greatest <= 1
        assert share < 0.1, "only values that lie between two levels may differ"
        assert there.micro_batches[0].large.pixels.held is there.micro_batches[0].small.pixels.held, (
            "both kinds are cut from one decoded image"
        )
        assert not isinstance(there.micro_batches[0].large.pixels, type(here.micro_batches[0].large.pixels))


def test_files_that_the_device_decodes_give_the_same_crops(photographs: ImageStore) -> None:
    """The path of ``nvjpeg`` with torchvision's decoder for the CPU in nvJPEG's place: all but nvJPEG itself."""
    here, there = (stream(photographs, placement).batch(1) for placement in ("cpu-crop", "nvjpeg"))
    greatest, share = levels_apart(here, there)
    assert greatest <= 1
    assert share < 0.1
    everything = photographs.read_encoded(here.records)
    assert sum(map(len, everything)) < there.nbytes < 0.5 * photographs.sizes(here.records)[0].sum() * 640
    assert there.micro_batches[0].large.pixels.held is there.micro_batches[0].small.pixels.held


def test_a_file_that_the_device_cannot_decode_is_named_with_the_remedy(photographs: ImageStore) -> None:
    whole = photographs.read_encoded([0, 1])
    files = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in (whole[0], whole[1][:-200])]
    with pytest.raises(ValueError, match=r"record 1 cannot be decoded on cpu: .*data\.placement=cpu-decode"):
        Encoded(files, "record {}".format).cut(np.array([[0, 0, 8, 8]] * 2), 8, CPU)


@pytest.mark.parametrize("placement", ["cpu-decode", "resident"])
def test_raw_stores_give_the_same_bits_everywhere_on_a_cpu(digits: ImageStore, placement: Placement) -> None:
    for step in (0, 70):
        assert levels_apart(stream(digits, "cpu-crop").batch(step), stream(digits, placement).batch(step)) == (0, 0.0)


def test_a_classifier_s_crops_are_the_same_in_every_placement(digits: ImageStore) -> None:
    def crops(placement: Placement) -> torch.Tensor:
        source = ClassifierStream(
            digits,
            np.arange(50, 90),
            crop=CropConfig(size=16),
            augment=AugmentConfig(),
            batch_size=8,
            seed=1,
            threads=1,
            options=StreamOptions(placement=placement),
        )
        return source.augment(source.batch(7), CPU, torch.float32)

    assert torch.equal(crops("cpu-crop"), crops("resident"))
    assert torch.equal(crops("cpu-crop"), crops("cpu-decode"))


@pytest.mark.parametrize("placement", ["cpu-crop", "cpu-decode"])
def test_neither_threads_nor_the_cache_change_a_bit(photographs: ImageStore, placement: Placement) -> None:
    plain = stream(photographs, placement).batch(1)
    assert levels_apart(plain, stream(photographs, placement, threads=3).batch(1)) == (0, 0.0)
    labelled = np.concatenate([np.flatnonzero(photographs.labels == label)[:5] for label in range(2)])
    with cached_images(photographs, labelled) as supports:
        assert type(supports).__name__ == "CachedImages"
        cached = PawsStream(
            photographs, labelled, views=VIEWS, batch_size=24, support_classes=2, images_per_class=4, seed=3,
            threads=1, supports=supports, options=StreamOptions(placement=placement),
        )  # fmt: skip
        assert levels_apart(plain, cached.batch(1)) == (0, 0.0)


def test_a_batch_knows_how_much_memory_it_holds(photographs: ImageStore) -> None:
    cut, uncut = (stream(photographs, placement).batch(0) for placement in ("cpu-crop", "cpu-decode"))
    assert cut.nbytes == sum(getattr(cut.micro_batches[0], kind).images.nbytes for kind in KINDS)
    sizes = photographs.heights * photographs.widths * 3
    assert sizes[cut.records].sum() < uncut.nbytes < sizes[cut.records].sum() + 8 * sizes.max() + 1, "images once"


def test_on_a_cpu_auto_crops_there_and_tells_what_limits(
    photographs: ImageStore, digits: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for store in (photographs, digits):
        caplog.clear()
        assert choose("auto", [store, store], views=VIEWS, threads=1, device=CPU) == "cpu-crop"
        assert "data.placement=auto: cpu-crop; this rank can prepare about" in caplog.text
        assert "limited by decoding and cropping on the CPU" in caplog.text


def test_auto_does_without_nvjpeg_where_that_does_not_work_and_says_why(
    photographs: ImageStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without the driver's video part; a placement that was asked for by name is not replaced."""

    def refuse(*_: object) -> None:
        raise RuntimeError("NVJPEG_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr("paws_hpc.data.pixels.decode_files", refuse)
    monkeypatch.setattr("paws_hpc.data.placement.candidates", lambda *_: ["cpu-crop", "cpu-decode", "nvjpeg"])
    assert choose("auto", [photographs, photographs], views=VIEWS, threads=1, device=CPU) in ("cpu-crop", "cpu-decode")
    assert "data.placement=auto does without nvjpeg" in caplog.text
    assert "NVJPEG_STATUS_NOT_INITIALIZED" in caplog.text
    with pytest.raises(ValueError, match="NVJPEG_STATUS_NOT_INITIALIZED"):
        stream(photographs, "nvjpeg").batch(0).micro_batches[0].large.images  # noqa: B018 - decoded when asked for


def test_auto_takes_from_the_gpu_only_what_clearly_pays() -> None:
    """Images/s of 16 cores beside a fast GPU, of 4 cores, and of a GPU whose own stage is the slow one."""

    def rates(placement: Placement, host: float, device: float) -> Rates:
        return Rates(placement, {"reading": 1e5, "host": host} | ({"the device": device} if device else {}))

    crop, decode, nvjpeg = rates("cpu-crop", 1000, 0), rates("cpu-decode", 1400, 9000), rates("nvjpeg", 9000, 1450)
    assert preferred([crop, decode, nvjpeg]) is crop, "1.45 times as fast is not worth the device's time"
    assert preferred([rates("cpu-crop", 900, 0), decode, nvjpeg]).placement == "cpu-decode"
    fast = rates("nvjpeg", 9000, 2200)
    assert preferred([rates("cpu-crop", 900, 0), decode, fast]) is fast
    assert fast.limit == "the device"
    assert preferred([rates("cpu-crop", 900, 0), rates("cpu-decode", 5000, 800)]).placement == "cpu-crop"


def test_auto_looks_only_at_what_can_work(photographs: ImageStore, digits: ImageStore, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    assert candidates([photographs, photographs], CPU) == ["cpu-crop"]
    assert candidates([photographs, photographs], cuda) == ["cpu-crop", "cpu-decode", "nvjpeg"]
    assert candidates([photographs, digits], cuda) == ["cpu-crop", "cpu-decode"], "nvJPEG cannot read raw pixels"
    unchecked = pack(ImageFolder(photographs.path.parent / "images"), tmp_path, options=PackOptions(check="structure"))
    assert candidates([ImageStore.open(unchecked.path)], cuda) == ["cpu-crop", "cpu-decode"]


@pytest.mark.parametrize(("free", "expected"), [(4, "resident"), (3.9, "cpu-decode")])
def test_a_raw_store_is_resident_where_it_takes_a_quarter_of_the_memory(
    digits: ImageStore, monkeypatch: pytest.MonkeyPatch, free: float, expected: Placement
) -> None:
    monkeypatch.setattr("paws_hpc.data.placement.free_bytes", lambda _: int(free * resident_bytes([digits])))
    assert candidates([digits, digits], torch.device("cuda")) == [expected]


def test_what_cannot_work_is_an_error_with_a_remedy(
    photographs: ImageStore, digits: ImageStore, tmp_path: Path
) -> None:
    for placement, stores, problem in (
        ("nvjpeg", [photographs], "decodes on a GPU, but training runs on cpu"),
        ("resident", [photographs], "holds JPEG files"),
        ("resident", [digits, photographs], "holds JPEG files"),
        ("elsewhere", [digits], "must be auto or one of cpu-crop"),
    ):
        with pytest.raises(ValueError, match=problem):
            choose(placement, stores, views=VIEWS, threads=1, device=CPU)
    with pytest.raises(ValueError, match="holds raw pixels"):
        check_possible("nvjpeg", [digits], torch.device("cuda"))
    unchecked = pack(ImageFolder(photographs.path.parent / "images"), tmp_path, options=PackOptions(check="structure"))
    with pytest.raises(ValueError, match=r"takes damaged JPEG files for whole ones.*data\.placement=cpu-decode"):
        check_possible("nvjpeg", [ImageStore.open(unchecked.path)], torch.device("cuda"))


def test_a_resident_store_must_fit(tmp_path: Path, digits: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resident_bytes([digits, digits]) == len(digits) * 16 * 16
    monkeypatch.setattr("paws_hpc.data.placement.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"needs 0\.00 GB on cpu"):
        choose("resident", [digits, digits], views=VIEWS, threads=1, device=CPU)


def test_labels_from_a_grey_store_and_images_from_a_colour_one(photographs: ImageStore, tmp_path: Path) -> None:
    """The two stores need not be alike, not even in encoding."""
    random = np.random.default_rng(0)
    source = ArraySource(
        "digits",
        random.integers(0, 256, (12, 20, 20, 1), np.uint8),
        np.arange(12) % 3,
        [str(n) for n in range(12)],
        ("x", "y", "z"),
    )
    labels = ImageStore.open(pack(source, tmp_path / "labels").path)
    for placement in ("cpu-crop", "cpu-decode"):
        mixed = PawsStream(
            photographs, np.arange(12), views=VIEWS, batch_size=8, support_classes=3, images_per_class=2, seed=0,
            threads=1, supports=cached_images(labels, np.arange(12)),
            options=StreamOptions(placement=placement),
        )  # fmt: skip
        supports, large, _ = mixed.augment(mixed.batch(0).micro_batches[0], CPU, torch.float32)
        assert supports.shape == (2 * 6, 3, 32, 32)
        assert large.shape == (2 * 8, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", [placement for placement in PLACEMENTS if placement != "cpu-crop"])
def test_a_gpu_gives_the_crops_of_the_cpu(photographs: ImageStore, digits: ImageStore, placement: Placement) -> None:
    store = digits if placement == "resident" else photographs
    cuda = torch.device("cuda")
    here, there = (
        source.batch(0).micro_batches[0]
        for source in (stream(store, "cpu-crop"), stream(store, placement, device=cuda))
    )
    busy = torch.randn(4096, 4096, device=cuda)
    for _ in range(20):  # what is cut and decoded next is queued behind this
        busy = busy @ busy / 64
    found = {kind: getattr(there, kind).pixels.on(cuda) for kind in KINDS}
    for kind, crops in found.items():
        difference = (getattr(here, kind).images.int() - crops.cpu().int()).abs().float()
        if placement == "nvjpeg":  # which has its own inverse transform and interpolates colour in its own way
            assert difference.mean() < 2
        else:
            assert difference.max() <= 1
    views = stream(store, placement, device=cuda).augment(there, cuda, torch.float32)
    assert all(view.is_cuda and view.isfinite().all() for view in views)
