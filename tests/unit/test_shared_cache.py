"""The labelled images are in memory once per node, are the same as in the store, and never outlive their last user."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paws_hpc.data.images import CachedImages, cached_images
from paws_hpc.data.shared_cache import SharedCache, open_shared_cache
from paws_hpc.store import ImageFolder, ImageStore, RecordError, pack

ROOT = Path(__file__).parents[2]
COUNT, LABELLED = 40, np.array([31, 4, 18, 5, 0, 39])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of many sizes."""
    folder, random = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    for number in range(COUNT):
        height, width = random.integers(20, 90, size=2)
        file = folder / "images" / "ab"[number % 2] / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(file, "JPEG", quality=90)
    return pack(ImageFolder(folder / "images"), folder / "store").path


@pytest.fixture
def store(path: Path) -> ImageStore:
    return ImageStore.open(path)


def files(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("paws-hpc-*")]


def same(images: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(images, others, strict=True))


@pytest.mark.parametrize("decoded", [True, False])
def test_what_is_cached_is_what_the_store_holds(store: ImageStore, tmp_path: Path, decoded: bool) -> None:
    cache = open_shared_cache(store, LABELLED, budget_bytes=10**9, decoded=decoded, folders=[tmp_path])
    assert cache is not None
    assert cache.form == ("pixels" if decoded else "bytes")
    images = CachedImages(store, cache)
    asked = np.array([5, 2, 39, 0, 5, 38])  # three are not in the cache, one comes twice
    expected = store.images(asked)
    assert same(images.pixels(asked), expected)
    assert [file.tobytes() for file in images.encoded(asked)] == store.read_encoded(asked)
    handed_out = images.pixels(LABELLED)
    images.close()
    assert files(tmp_path) == []
    assert same(handed_out, store.images(LABELLED)), "what was handed out before stays valid"


def test_the_cache_and_not_the_store_is_read(store: ImageStore, tmp_path: Path) -> None:
    with CachedImages(store, open_cache(store, tmp_path)) as images:
        store.close()
        assert len(images.pixels(LABELLED)) == len(LABELLED)


def open_cache(store: ImageStore, folder: Path, **changes: int) -> SharedCache:
    cache = open_shared_cache(store, LABELLED, **({"budget_bytes": 10**9} | changes), folders=[folder])
    assert cache is not None
    return cache


def test_bytes_are_kept_where_pixels_do_not_fit_and_nothing_where_they_do_not_either(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = int((store.heights[LABELLED] * store.widths[LABELLED]).sum()) * 3
    cache = open_cache(store, tmp_path, budget_bytes=pixels)
    assert cache.form == "bytes"
    assert cache.path.stat().st_size < pixels
    cache.close()
    assert open_shared_cache(store, LABELLED, budget_bytes=5000, folders=[tmp_path]) is None
    assert "more than data.cache_gb=5e-06 allows" in caplog.text
    assert files(tmp_path) == []
    assert type(cached_images(store, LABELLED, cache_gb=0)).__name__ == "StoreImages"


def test_a_folder_without_room_is_passed_over_and_nothing_is_left_there(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent, small, large = tmp_path / "absent", tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writing fails half-way, as on a full disk
    try:
        assert open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[absent, small]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{absent}: No such file" in caplog.text
    assert f"{small}: File too large" in caplog.text
    assert files(small) == []
    cache = open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[absent, large])
    assert cache is not None
    assert cache.path.parent == large
    cache.close()


def test_a_folder_is_not_filled_beyond_half_of_what_is_free(store: ImageStore, tmp_path: Path) -> None:
    """A real file system of 256 KB, where this process may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        everything = np.arange(COUNT)
        assert int((store.heights * store.widths).sum()) * 3 > 128 * 1024
        assert open_shared_cache(store, everything, budget_bytes=10**9, folders=[tmp_path]) is None
        cache = open_shared_cache(store, everything[:3], budget_bytes=10**9, folders=[tmp_path])
        assert cache is not None
        cache.close()
        del cache  # and with it the mapping
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def damaged(path: Path, tmp_path: Path) -> Path:
    """The store with one flipped bit in the middle of its data."""
    shutil.copytree(path, tmp_path / "store")
    [shard] = ImageStore.open(path).manifest.shards
    content = bytearray((path / shard.name).read_bytes())
    content[(shard.data_offset or 0) + shard.data_bytes // 2] ^= 1
    (tmp_path / "store" / shard.name).write_bytes(content)
    return tmp_path / "store"


def test_a_damaged_record_is_named_and_leaves_no_cache(damaged: Path, tmp_path: Path) -> None:
    store = ImageStore.open(damaged)
    with pytest.raises(RecordError, match="damaged"):
        open_shared_cache(store, np.arange(COUNT), budget_bytes=10**9, folders=[tmp_path])
    assert files(tmp_path) == []


@pytest.mark.parametrize("decoded", [True, False])
def test_a_substitute_is_nobody_else_s(damaged: Path, tmp_path: Path, decoded: bool) -> None:
    """A run that allows none must not find one in the cache of a run that does."""
    everything, lenient = np.arange(COUNT), ImageStore.open(damaged, max_substitutes=1)
    expected = ImageStore.open(damaged, max_substitutes=1).images(everything)
    caches = []
    for store in (lenient, ImageStore.open(damaged)):
        cache = open_shared_cache(store, everything, budget_bytes=10**9, decoded=decoded, folders=[tmp_path])
        assert cache is not None
        caches.append(CachedImages(store, cache))
    assert len(files(tmp_path)) == 1
    assert same(caches[0].pixels(everything), expected)
    with pytest.raises(RecordError, match="damaged"):
        caches[1].pixels(everything)
    for images in caches:
        images.close()


def test_a_file_that_somebody_else_put_there_is_not_trusted(store: ImageStore, tmp_path: Path) -> None:
    cache = open_cache(store, tmp_path)
    theirs = cache.path
    cache.close()
    theirs.symlink_to(tmp_path / "elsewhere")
    assert open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[tmp_path]) is None
    theirs.unlink()
    if os.geteuid() == 0:
        theirs.write_bytes(b"paws-hpc cache 1\n" + bytes(10**6))
        os.chown(theirs, 12345, 12345)
        assert open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[tmp_path]) is None


def test_a_fork_that_ends_leaves_the_cache_to_its_parent(store: ImageStore, tmp_path: Path) -> None:
    cache = open_cache(store, tmp_path)
    child = os.fork()
    if child == 0:
        cache.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert cache.path.exists()
    other = open_cache(store, tmp_path)
    cache.close()
    assert other.path.exists(), "the parent still held its lock, so that the second user was not the last"
    other.close()
    assert files(tmp_path) == []


class User:
    """Another process with the cache of all records."""

    def __init__(self, store: Path, folder: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.cache_user", str(store), str(folder), *options],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def opened(self) -> tuple[str, str, str]:
        """Path, inode and checksum."""
        while (line := self.line())[:1] == ["filling"]:
            pass
        assert line[0] == "open"
        return line[1], line[2], line[3]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("close\n")
        self._process.stdin.flush()
        assert self.line() == ["closed"]
        self.end()

    def kill(self) -> None:
        self._process.kill()
        self.end()

    def end(self) -> None:
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


Start = Callable[..., User]


@pytest.fixture
def start(path: Path, tmp_path: Path) -> Iterator[Start]:
    users: list[User] = []

    def one(*options: str) -> User:
        users.append(User(path, tmp_path, *options))
        return users[-1]

    yield one
    for user in users:
        user._process.kill()
        user.end()


def test_processes_share_one_file_which_the_last_one_removes(store: ImageStore, tmp_path: Path, start: Start) -> None:
    users = [start() for _ in range(3)]
    opened = [user.opened() for user in users]
    assert len(set(opened)) == 1, "one file and one content"
    checksum = 0
    for image in store.images(np.arange(COUNT)):
        checksum = zlib.crc32(image, checksum)
    assert int(opened[0][2]) == checksum
    users[0].close()
    users[1].kill()
    assert len(files(tmp_path)) == 1
    users[2].close()
    assert files(tmp_path) == []


def test_a_leader_that_is_killed_is_replaced_by_one_that_waits(tmp_path: Path, start: Start) -> None:
    leader = start("slow")
    assert leader.line() == ["filling"]
    waiting = [start(), start()]
    [name] = files(tmp_path)
    inode = str((tmp_path / name).stat().st_ino)
    deadline = time.monotonic() + 60
    while sum("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, "both wait for the leader"
        time.sleep(0.01)
    leader.kill()
    opened = [user.opened() for user in waiting]
    assert opened[0] == opened[1]
    for user in waiting:
        user.close()
    assert files(tmp_path) == []


def test_what_killed_processes_left_is_removed_by_the_next_start(
    store: ImageStore, tmp_path: Path, start: Start
) -> None:
    killed, alive = start(), None
    killed.opened()
    killed.kill()
    [left] = files(tmp_path)
    cache = open_cache(store, tmp_path)  # of other records, so it is not the file that was left
    assert files(tmp_path) == [cache.path.name] != [left]
    alive = start()
    alive.opened()
    assert len(files(tmp_path)) == 2, "a file in use stays, whoever starts"
    alive.close()
    cache.close()
    assert files(tmp_path) == []
