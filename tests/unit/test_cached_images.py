"""Labelled images are decoded once per node, give the store's pixels or a named error, and leave no memory behind."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from paws_hpc.data.images import CachedImages, StoreImages, cached_images
from paws_hpc.packing import ImageFolder, pack
from paws_hpc.store import ImageStore, RecordError
from tests.pictures import write_noise
from tests.stores import files_of_at_most, flip_bit, place_in_file

COUNT, LABELLED = 40, np.array([31, 4, 18, 5, 0, 39])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    return pack(ImageFolder(write_noise(folder / "images", COUNT)), folder / "store").path


@pytest.fixture
def store(path: Path) -> ImageStore:
    return ImageStore(path)


def files(folder: Path) -> list[Path]:
    return [*folder.glob("paws-hpc-*/*.pixels"), *folder.glob("paws-hpc-*/.*.tmp")]


def same(images: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(images, others, strict=True))


def open_cache(store: ImageStore, folder: Path, records: np.ndarray = LABELLED) -> CachedImages:
    cache = cached_images(store, records, folders=[folder])
    assert isinstance(cache, CachedImages)
    return cache


def test_cached_images_are_those_of_the_store(store: ImageStore, tmp_path: Path) -> None:
    asked = np.array([5, 2, 39, 0, 5, 38])  # three are not in the cache, one comes twice
    expected, labelled = store.images(asked), store.images(LABELLED)
    with open_cache(store, tmp_path) as cache:
        assert same(cache.pixels(asked), expected)
        handed_out = cache.pixels(LABELLED)
        with pytest.raises(ValueError, match="read-only"):
            handed_out[0][:] = 0
    assert files(tmp_path) == []
    assert same(handed_out, labelled), "what was handed out before stays valid"
    assert same(cache.pixels(asked), expected), "now from the store"


def test_no_image_is_decoded_twice(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cache(store, tmp_path) as cache, open_cache(store, tmp_path) as other:
        expected = store.images(LABELLED)
        monkeypatch.setattr("paws_hpc.store.reader.decode_record", None)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: same(cache.pixels(LABELLED), expected), range(50)))
        assert same(other.pixels(LABELLED), expected)
        assert len(files(tmp_path)) == 1


def test_none_of_200_flipped_bits_passes_in_silence(store: ImageStore, tmp_path: Path) -> None:
    expected = store.images(LABELLED)
    with open_cache(store, tmp_path) as cache:
        content, random = cache.path.read_bytes(), np.random.default_rng(0)
        message = rf"is damaged in {cache.path}: its CRC32C differs. Start again"
        places = [*random.integers(len(content), size=190), *range(-10, 0)]  # the sums too
        for number, place in enumerate(places):
            damaged = bytearray(content)
            damaged[place] ^= 1 << number % 8
            with open(cache.path, "r+b") as file:  # in place, as memory is damaged
                file.write(damaged)
            with pytest.raises(RecordError, match=message), open_cache(store, tmp_path) as damaged_cache:
                damaged_cache.pixels(LABELLED)
            with open(cache.path, "r+b") as file:
                file.write(content)
        assert same(cache.pixels(LABELLED), expected)


def test_a_damaged_record_of_the_store_is_named_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "store"))
    store = ImageStore(copy)
    file, offset, _ = place_in_file(copy, 4)
    flip_bit(file, offset + 300)
    with pytest.raises(RecordError, match=f"record '{store.keys[4]}' .* is damaged"):
        cached_images(ImageStore(copy), LABELLED, folders=[tmp_path])
    assert files(tmp_path) == []


def test_without_room_the_store_is_read_and_that_is_said(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent, small, large = (tmp_path / name for name in ("absent", "small", "large"))
    small.mkdir()
    large.mkdir()
    with files_of_at_most(20_000):
        assert type(cached_images(store, LABELLED, folders=[absent, small])) is StoreImages
    assert "6 labelled images are decoded anew in every step" in caplog.text
    assert "absent" in caplog.text
    assert "File too large" in caplog.text
    assert files(small) == []
    with cached_images(store, LABELLED, folders=[absent, large]) as cache:
        assert files(large)
        assert same(cache.pixels(LABELLED), store.images(LABELLED))
    caplog.clear()
    assert type(cached_images(store, LABELLED, folders=[large], limit_bytes=5000)) is StoreImages
    assert "is more than a quarter of the memory" in caplog.text


def test_a_folder_is_not_filled_beyond_half_of_what_is_free(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights, widths = store.sizes(range(COUNT))
    size = int((heights * widths).sum()) * 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("paws_hpc.data.images.shutil.disk_usage", lambda _: usage._replace(free=size))
    assert type(cached_images(store, np.arange(COUNT), folders=[tmp_path])) is StoreImages
    with open_cache(store, tmp_path):
        pass


_USER = """
import sys, time, zlib
from pathlib import Path
import numpy as np
from paws_hpc.data.images import cached_images
from paws_hpc.store import ImageStore

store = ImageStore(sys.argv[1])
if sys.argv[3] == "stuck":
    images, store.images = store.images, lambda records: images(records) if records[0] < 15 else time.sleep(60)
with cached_images(store, np.arange(len(store)), folders=[Path(sys.argv[2])]) as cache:
    checksum = 0
    for image in cache.pixels(np.arange(len(store))):
        checksum = zlib.crc32(image, checksum)
    print(type(cache).__name__, checksum, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start(path: Path, tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts processes that use a cache of all images until a line comes."""

    def start(manner: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _USER, str(path), str(tmp_path), manner]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    return start


def read_line(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def expected_line(store: ImageStore) -> str:
    checksum = 0
    for image in store.images(np.arange(COUNT)):
        checksum = zlib.crc32(image, checksum)
    return f"CachedImages {checksum}"


def test_processes_share_one_file_which_the_last_one_removes(
    store: ImageStore, tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    users = [start() for _ in range(3)]
    assert [read_line(user) for user in users] == [expected_line(store)] * 3
    assert len(files(tmp_path)) == 1
    users[0].communicate("\n", timeout=30)
    users[1].kill()
    users[1].communicate()
    assert len(files(tmp_path)) == 1
    users[2].communicate("\n", timeout=30)
    assert files(tmp_path) == []


def test_what_killed_processes_left_is_removed_by_the_next(
    store: ImageStore,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = start(), None
    read_line(reader)
    with open_cache(store, tmp_path):
        assert len(files(tmp_path)) == 2, "a file in use stays, whoever starts"
    reader.kill()
    reader.communicate()
    assert len(files(tmp_path)) == 1
    writer = start("stuck")
    while not any(file.suffix == ".tmp" for file in files(tmp_path)):
        assert writer.poll() is None
    writer.kill()
    writer.communicate()
    next_one = start()
    assert read_line(next_one) == expected_line(store)
    assert [file.suffix for file in files(tmp_path)] == [".pixels"]
    next_one.communicate("\n", timeout=30)
    assert files(tmp_path) == []
