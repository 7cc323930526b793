"""The labelled images come into memory once per node without anybody waiting for them, are the same as in the store at
every moment, and never outlive their last user."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paws_hpc.data.images import CachedImages, cached_images
from paws_hpc.data.shared_cache import SharedCache, open_shared_cache
from paws_hpc.packing import ImageFolder, pack
from paws_hpc.store import ImageStore, RecordError

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


def open_cache(store: ImageStore, folder: Path, **changes: int) -> SharedCache:
    cache = open_shared_cache(store, LABELLED, **({"budget_bytes": 10**9} | changes), folders=[folder])
    assert cache is not None
    return cache


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def filled(cache: SharedCache, *, but: int = 0) -> SharedCache:
    until(lambda: cache.absent == but, "the cache is filled")
    return cache


def no_thread_fills() -> bool:
    return not any(thread.name == "cache" for thread in threading.enumerate())


class Gate:
    """Lets through what the filling reads, or not; what training reads passes by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()
        strict = ImageStore.strict

        def gated(store: ImageStore) -> ImageStore:
            view = strict(store)
            for name in ("images", "read_encoded"):
                monkeypatch.setattr(view, name, self._behind(getattr(view, name)), raising=False)
            return view

        monkeypatch.setattr(ImageStore, "strict", gated)

    def _behind(self, read: Callable[[Sequence[int]], list[object]]) -> Callable[[Sequence[int]], list[object]]:
        def later(indices: Sequence[int]) -> list[object]:
            self.waiting.set()
            self.open.wait()
            return read(indices)

        return later


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.mark.parametrize("decoded", [True, False])
def test_what_is_cached_is_what_the_store_holds(store: ImageStore, tmp_path: Path, decoded: bool) -> None:
    cache = open_shared_cache(store, LABELLED, budget_bytes=10**9, decoded=decoded, folders=[tmp_path])
    assert cache is not None
    assert cache.form == ("pixels" if decoded else "bytes")
    images = CachedImages(store, filled(cache))
    asked = np.array([5, 2, 39, 0, 5, 38])  # three are not in the cache, one comes twice
    expected = store.images(asked)
    assert same(images.pixels(asked), expected)
    assert [file.tobytes() for file in images.encoded(asked)] == store.read_encoded(asked)
    handed_out = images.pixels(LABELLED)
    images.close()
    assert files(tmp_path) == []
    assert same(handed_out, store.images(LABELLED)), "what was handed out before stays valid"
    assert same(images.pixels(asked), expected), "now from the store"


def test_the_cache_and_not_the_store_is_read_once_it_is_filled(store: ImageStore, tmp_path: Path) -> None:
    with CachedImages(store, filled(open_cache(store, tmp_path))) as images:
        store.close()
        found = images.pixels(LABELLED)
        assert len(found) == len(LABELLED)
        with pytest.raises(ValueError, match="read-only"):
            found[0][:] = 0


@pytest.mark.parametrize("decoded", [True, False])
def test_nobody_waits_for_the_cache_to_be_filled(store: ImageStore, tmp_path: Path, gate: Gate, decoded: bool) -> None:
    cache = open_shared_cache(store, LABELLED, budget_bytes=10**9, decoded=decoded, folders=[tmp_path])
    assert cache is not None
    assert gate.waiting.wait(60)
    assert cache.absent == len(LABELLED)
    assert same(cache.pixels(LABELLED, store), store.images(LABELLED))
    assert [file.tobytes() for file in cache.encoded(LABELLED, store)] == store.read_encoded(LABELLED)
    gate.open.set()
    filled(cache).close()


def test_what_is_cached_is_seen_whole_or_not_at_all(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads write records piece by piece, and between any two pieces two users compare all images."""
    pwrite, allowed, written = os.pwrite, threading.Semaphore(0), threading.Semaphore(0)

    def dribble(descriptor: int, content: memoryview, offset: int) -> int:
        allowed.acquire()
        done = pwrite(descriptor, content[:500], offset)
        written.release()
        return done

    monkeypatch.setattr(os, "pwrite", dribble)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))  # of which three fill
    expected = store.images(LABELLED)
    caches = [open_cache(store, tmp_path) for _ in range(2)]
    pieces = sum(-(-image.nbytes // 500) + 1 for image in expected)  # and the byte that declares it present
    seen = set()
    for _ in range(pieces):
        allowed.release()
        assert written.acquire(timeout=60)
        seen.add(caches[0].absent)
        for cache in caches:
            assert same(cache.pixels(LABELLED, store), expected)
    assert seen == set(range(len(LABELLED) + 1))
    for cache in caches:
        cache.close()


def test_closing_does_not_wait_for_a_file_system(store: ImageStore, tmp_path: Path, gate: Gate) -> None:
    cache = open_cache(store, tmp_path)
    assert gate.waiting.wait(60)
    closing = threading.Thread(target=cache.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive(), "closed while the thread that fills still waits for what it reads"
    assert files(tmp_path) == []
    other = open_cache(store, tmp_path)
    gate.open.set()  # the first cache's thread goes on, and must not spoil the second one's file
    assert same(filled(other).pixels(LABELLED, store), store.images(LABELLED))
    other.close()


def test_the_next_user_goes_on_where_a_leader_that_leaves_has_stopped(
    store: ImageStore, tmp_path: Path, gate: Gate
) -> None:
    leader = open_cache(store, tmp_path)
    assert gate.waiting.wait(60)
    other = open_cache(store, tmp_path)
    leader.close()
    gate.open.set()
    filled(other)
    store.close()
    assert len(other.pixels(LABELLED, store)) == len(LABELLED)
    other.close()
    assert files(tmp_path) == []


def test_a_store_that_is_closed_ends_the_filling(
    store: ImageStore, tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(store, tmp_path)
    assert gate.waiting.wait(60)
    store.close()
    gate.open.set()
    until(no_thread_fills, "the threads end")
    assert cache.absent
    assert "in memory" not in caplog.text
    cache.close()


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


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KB, where this process may mount one."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    until(no_thread_fills, "the threads end")  # a moment after closing, if they were held up
    gc.collect()  # mappings
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_is_not_filled_beyond_half_of_what_is_free(store: ImageStore, small: Path) -> None:
    everything = np.arange(COUNT)
    assert int((store.heights * store.widths).sum()) * 3 > 128 * 1024
    assert open_shared_cache(store, everything, budget_bytes=10**9, folders=[small]) is None
    cache = open_shared_cache(store, everything[:3], budget_bytes=10**9, folders=[small])
    assert cache is not None
    cache.close()


def test_what_other_caches_will_still_take_is_not_free(store: ImageStore, small: Path, gate: Gate) -> None:
    sizes = np.cumsum(store.heights * store.widths * 3)
    half = np.arange(np.searchsorted(sizes, 120 * 1024))
    caches = [
        open_shared_cache(store, part, budget_bytes=10**9, folders=[small]) for part in (half, half[:-1], half[:2])
    ]
    assert gate.waiting.wait(60)
    assert [cache is not None for cache in caches] == [True, False, True]
    for cache in (caches[0], caches[2]):
        assert cache is not None
        cache.close()


def test_a_full_file_system_ends_the_filling_and_nothing_else(
    store: ImageStore, small: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    asked = np.arange(12)
    cache = open_shared_cache(store, asked, budget_bytes=10**9, folders=[small])
    assert cache is not None
    (small / "others").write_bytes(bytes(256 * 1024 - 40 * 1024))
    gate.open.set()
    until(lambda: "there is no more room" in caplog.text, "filling ends")
    assert f"of 12 labelled images are in memory, the others are read from {store.path} again" in caplog.text
    assert f"({small}: No space left on device)" in caplog.text
    assert 0 < cache.absent < 12
    assert same(cache.pixels(asked, store), store.images(asked))
    cache.close()


def damage(path: Path, positions: Sequence[int]) -> None:
    """Flip one bit of each of these records of a store of one shard."""
    store = ImageStore.open(path)
    [shard] = store.manifest.shards
    content = bytearray((path / shard.name).read_bytes())
    starts = (shard.data_offset or 0) + np.cumsum([0, *store.lengths(range(len(store)))])
    for position in positions:
        content[(starts[position] + starts[position + 1]) // 2] ^= 1
    (path / shard.name).write_bytes(content)


BAD = 7


@pytest.fixture
def damaged(path: Path, tmp_path: Path) -> Path:
    """The store with one damaged record."""
    copy = Path(shutil.copytree(path, tmp_path / "store"))
    damage(copy, [BAD])
    return copy


@pytest.mark.parametrize("decoded", [True, False])
def test_a_damaged_record_is_an_error_for_whoever_asks_for_it_and_for_nobody_else(
    damaged: Path, tmp_path: Path, decoded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, everything = ImageStore.open(damaged), np.arange(COUNT)
    others = np.delete(everything, BAD)
    with caplog.at_level("INFO"):
        cache = open_shared_cache(store, everything, budget_bytes=10**9, decoded=decoded, folders=[tmp_path])
        assert cache is not None
        filled(cache, but=1)
        until(lambda: "39 of 40 labelled images are in memory, the others cannot be read" in caplog.text, "it is said")
    assert same(cache.pixels(others, store), store.images(others))
    with pytest.raises(RecordError, match=f"record '{store.keys[BAD]}' .* damaged"):
        cache.pixels(everything, store)
    cache.close()
    assert files(tmp_path) == []


@pytest.mark.parametrize("decoded", [True, False])
def test_substitutes_are_those_of_the_store_and_nobody_else_s(damaged: Path, tmp_path: Path, decoded: bool) -> None:
    """A run that allows none must not find one in the cache of a run that does."""
    everything, lenient = np.arange(COUNT), ImageStore.open(damaged, max_substitutes=1)
    expected = ImageStore.open(damaged, max_substitutes=1).images(everything)
    caches = []
    for store in (lenient, ImageStore.open(damaged)):
        cache = open_shared_cache(store, everything, budget_bytes=10**9, decoded=decoded, folders=[tmp_path])
        assert cache is not None
        caches.append(CachedImages(store, cache))
        filled(cache, but=1)
    assert len(files(tmp_path)) == 1
    assert lenient.substitutes == {}, "filling replaced nothing"
    assert same(caches[0].pixels(everything), expected)
    assert list(lenient.substitutes) == [BAD]
    with pytest.raises(RecordError, match="damaged"):
        caches[1].pixels(everything)
    for images in caches:
        images.close()


def test_damage_that_nobody_asks_for_does_not_count_as_replaced(damaged: Path, tmp_path: Path) -> None:
    damage(damaged, [BAD + 8])
    store, everything = ImageStore.open(damaged, max_substitutes=1), np.arange(COUNT)
    cache = open_shared_cache(store, everything, budget_bytes=10**9, folders=[tmp_path])
    assert cache is not None
    filled(cache, but=2)
    asked = np.delete(everything, BAD)
    expected = ImageStore.open(damaged, max_substitutes=1).images(asked)
    assert same(cache.pixels(asked, store), expected)
    cache.close()


def test_what_a_store_has_replaced_stays_replaced(damaged: Path, tmp_path: Path) -> None:
    """The layout follows the index, not the size of what stood in for a record before; and a record that this process
    could not read is not taken from the cache, should another process have been able to."""
    everything, replacing = np.arange(COUNT), ImageStore.open(damaged, max_substitutes=1)
    expected = replacing.images(everything)
    damage(damaged, [BAD])  # the same bit again, which mends it
    mended = ImageStore.open(damaged)
    assert not same(expected, mended.images(everything))
    caches = []
    for store in (replacing, mended):
        cache = open_shared_cache(store, everything, budget_bytes=10**9, folders=[tmp_path])
        assert cache is not None
        caches.append(filled(cache))
    assert len(files(tmp_path)) == 1
    assert same(caches[0].pixels(everything, replacing), expected)
    assert same(caches[1].pixels(everything, mended), mended.images(everything))
    for cache in caches:
        cache.close()


def test_a_file_that_somebody_else_put_there_is_not_trusted(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(store, tmp_path)
    theirs = cache.path
    cache.close()
    theirs.symlink_to(tmp_path / "elsewhere")
    assert open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[tmp_path]) is None
    theirs.unlink()
    theirs.write_bytes(bytes(100))
    assert open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[tmp_path]) is None
    assert "has 100 bytes instead of" in caplog.text
    assert files(tmp_path) == [], "nobody holds it"
    if os.geteuid() == 0:
        theirs.write_bytes(bytes(10**6))
        os.chown(theirs, 12345, 12345)
        assert open_shared_cache(store, LABELLED, budget_bytes=10**9, folders=[tmp_path]) is None


def test_a_fork_that_ends_leaves_the_cache_and_its_filling_to_its_parent(
    store: ImageStore, tmp_path: Path, gate: Gate
) -> None:
    cache = open_cache(store, tmp_path)
    assert gate.waiting.wait(60)
    child = os.fork()
    if child == 0:
        cache.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.path.exists()
    gate.open.set()
    filled(cache)
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

    def opened(self) -> tuple[str, str]:
        """Path and inode."""
        word, path, inode = self.line()
        assert word == "open"
        return path, inode

    def ask(self, command: str) -> list[str]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self.line()

    def close(self) -> None:
        assert self.ask("close") == ["closed"]
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


def checksum(store: ImageStore) -> list[str]:
    """What a user says of all images."""
    value = 0
    for image in store.images(np.arange(COUNT)):
        value = zlib.crc32(image, value)
    return ["read", str(value)]


def test_processes_share_one_file_which_the_last_one_removes(store: ImageStore, tmp_path: Path, start: Start) -> None:
    users = [start() for _ in range(3)]
    assert len({user.opened() for user in users}) == 1
    assert [user.ask("read") for user in users] == [checksum(store)] * 3
    assert [user.ask("full") for user in users] == [["full"]] * 3
    assert [user.ask("read") for user in users] == [checksum(store)] * 3
    users[0].close()
    users[1].kill()
    assert len(files(tmp_path)) == 1
    users[2].close()
    assert files(tmp_path) == []


def test_a_leader_that_is_killed_is_replaced_and_what_it_did_is_kept(
    store: ImageStore, tmp_path: Path, start: Start
) -> None:
    leader = start("stops-after", "15")
    opened = leader.opened()
    others = [start() for _ in range(2)]
    assert [other.opened() for other in others] == [opened] * 2
    cache = open_shared_cache(store, np.arange(COUNT), budget_bytes=10**9, folders=[tmp_path])
    assert cache is not None
    until(lambda: cache.absent == COUNT - 15, "the leader put so many there")
    assert [other.ask("read") for other in others] == [checksum(store)] * 2, "nobody waits for the leader"
    leader.kill()
    assert [other.ask("full") for other in others] == [["full"]] * 2
    assert cache.absent == 0
    assert [other.ask("read") for other in others] == [checksum(store)] * 2
    cache.close()
    for user in others:
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
