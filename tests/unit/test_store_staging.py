"""Training reads a store's local copy as it grows, always the right bytes; one process per node makes it."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from paws_hpc.packing import ArraySource, ImageFolder, PackOptions, pack
from paws_hpc.shards import main
from paws_hpc.store import ImageStore, RecordError, StoreError, stage, start_staging, verify
from paws_hpc.store.format import read_manifest
from paws_hpc.store.local import LocalFolder, evict_unused

KIB, MIB = 1 << 10, 1 << 20
IMAGES = 120


def noise(seed: int) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (IMAGES, 64, 64, 3), dtype=np.uint8)
    labels = np.arange(IMAGES, dtype=np.int64) % 4
    return ArraySource(f"noise{seed}", images, labels, [f"{place:05d}" for place in range(IMAGES)], tuple("abcd"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.4 MiB of noise in eight shards."""
    return pack(noise(0), tmp_path_factory.mktemp("packed") / "store", options=PackOptions(shard_bytes=190 * KIB)).path


@pytest.fixture
def shared(packed: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "shared"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers look for new copies all the time."""
    monkeypatch.setattr("paws_hpc.store.shardset._LOOK_INTERVAL_S", 0.0)


def contents(path: Path) -> list[bytes]:
    return [image.tobytes() for image in ImageStore.open(path).read(range(IMAGES))]


def read_all(store: ImageStore) -> list[bytes]:
    return [image.tobytes() for image in store.read(range(IMAGES))]


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def markers(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.ok"))


def descriptors(folder: Path) -> int:
    """Open files of this process below ``folder``."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            continue
    return sum(link.startswith(str(folder)) and ".h5" in link for link in links)


def test_a_staged_copy_is_a_store_of_its_own_and_staging_again_copies_nothing(shared: Path, tmp_path: Path) -> None:
    first = stage(shared, tmp_path / "local")
    assert (first.copied, first.present, first.complete) == (8, 0, True)
    assert verify(first.path, level="full")[0] == []
    assert contents(first.path) == contents(shared)
    again = stage(shared, tmp_path / "local")
    assert (again.copied, again.present, again.complete) == (0, 8, True)


@pytest.mark.usefixtures("impatient")
def test_threads_read_the_right_bytes_while_every_shard_is_switched(shared: Path, tmp_path: Path) -> None:
    expected = contents(shared)
    store = ImageStore.open(shared, copy_to=tmp_path / "local")
    wrong: list[str] = []
    seen: set[int] = set()
    done = threading.Event()

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not done.is_set():
            places = random.integers(IMAGES, size=16)
            images = store.read(places)
            seen.add(store.shards.local)
            if [image.tobytes() for image in images] != [expected[place] for place in places]:
                wrong.append("other bytes")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    stage(shared, tmp_path / "local", workers=1, mib_per_s=2)
    wait_for(lambda: store.shards.local == 8)
    for path in shared.glob("*.h5"):
        path.unlink()  # nobody reads these any more
    time.sleep(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(seen) > 3  # it went shard by shard
    assert read_all(store) == expected
    assert (descriptors(shared), descriptors(tmp_path / "local")) == (0, 8)
    assert store.shards.fallbacks == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed before it was opened", "other size"])
def test_a_local_copy_that_fails_is_replaced_by_the_store_and_counted(
    shared: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = stage(shared, tmp_path / "local").path / "shard-00002.h5"
    store = ImageStore.open(shared, copy_to=tmp_path / "local")
    if damage == "flipped":
        content = bytearray(copy.read_bytes())
        content[len(content) // 2] ^= 8
        with open(copy, "r+b") as file:  # in place, under the open descriptor
            file.write(content)
    elif damage == "cut":
        os.truncate(copy, 100 * KIB)
    else:
        if damage == "other size":
            copy.write_bytes(b"short")
        else:
            copy.unlink()
        store = ImageStore.open(shared, copy_to=tmp_path / "local")
    with caplog.at_level(logging.WARNING):
        assert read_all(store) == contents(shared)
        assert read_all(store) == contents(shared)
    assert (store.shards.local, store.shards.fallbacks) == (7, 1)
    assert not copy.with_name(copy.name + ".ok").exists()
    if damage in ("flipped", "cut"):
        assert [f"local copy {copy}" in record.message for record in caplog.records] == [True]
    repaired = stage(shared, tmp_path / "local")
    assert (repaired.copied, repaired.present) == (1, 7)
    assert read_all(store) == contents(shared)
    assert store.shards.local == 8


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("decode", [True, False])
def test_jpegs_come_from_the_store_too_when_their_copy_is_damaged(tmp_path: Path, decode: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 50, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "source" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(image))
    shared = pack(ImageFolder(tmp_path / "source"), tmp_path / "shared", options=PackOptions(shard_bytes=8 * KIB)).path
    expected, encoded = ImageStore.open(shared).images(range(12)), ImageStore.open(shared).read_encoded(range(12))
    store = ImageStore.open(shared, copy_to=tmp_path / "local")
    local, shards = stage(shared, tmp_path / "local").path, read_manifest(shared).shards
    for shard in shards:
        assert shard.data_offset is not None
        with open(local / shard.name, "r+b") as file:
            file.seek(shard.data_offset)
            file.write(bytes(100))  # the beginning of the first record
    if decode:
        assert all(map(np.array_equal, store.images(range(12)), expected))
    else:
        assert store.read_encoded(range(12)) == encoded
    assert store.shards.fallbacks == len(shards) > 2


@pytest.mark.usefixtures("impatient")
def test_a_copy_that_vanishes_under_a_reader_is_still_read(shared: Path, tmp_path: Path) -> None:
    copy = stage(shared, tmp_path / "local").path
    store = ImageStore.open(shared, copy_to=tmp_path / "local")
    shutil.rmtree(copy)
    assert read_all(store) == contents(shared)
    assert read_all(ImageStore.open(shared, copy_to=tmp_path / "local")) == contents(shared)


@pytest.mark.usefixtures("impatient")
def test_a_record_damaged_in_the_copy_and_in_the_store_is_an_error_and_a_lost_store_too(
    shared: Path, tmp_path: Path
) -> None:
    copy = stage(shared, tmp_path / "local").path / "shard-00000.h5"
    store = ImageStore.open(shared, copy_to=tmp_path / "local")
    for path in (copy, shared / copy.name):
        os.truncate(path, 5 * KIB)
    with pytest.raises(RecordError, match=rf"record '{store.keys[0]}' in {shared / copy.name} is cut off"):
        store.read([0])
    other = copy.with_name("shard-00001.h5")
    os.truncate(other, 5 * KIB)
    (shared / other.name).unlink()
    with pytest.raises(StoreError, match=rf"{shared / other.name} cannot be opened .* local copy {other}"):
        store.read(range(IMAGES)[20:25])


def test_the_marker_of_another_pack_is_passed_over(shared: Path, tmp_path: Path) -> None:
    local = LocalFolder(tmp_path / "local", read_manifest(shared))
    local.path.mkdir(parents=True)
    other = pack(noise(1), tmp_path / "other", options=PackOptions(shard_bytes=190 * KIB)).path
    for path in other.glob("*.h5"):
        shutil.copy(path, local.path)
    for entry in read_manifest(other).shards:
        local.mark(entry)
    store = ImageStore.open(shared, copy_to=tmp_path / "local")
    assert store.shards.local == 0
    assert read_all(store) == contents(shared)
    assert stage(shared, tmp_path / "local").copied == 8


def test_the_next_process_goes_on_when_the_one_that_copies_is_killed(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    with start_staging([shared], folder, mib_per_s=0.3, workers=2) as leader:
        wait_for(lambda: len(markers(folder)) >= 2)
        with start_staging([shared], folder) as follower:
            time.sleep(0.5)
            assert follower.running
            leader._process.send_signal(signal.SIGKILL)
            assert leader.wait(10) == -signal.SIGKILL
            kept = {path: path.stat().st_mtime_ns for path in markers(folder)}
            assert follower.wait(30) == 0
    assert len(kept) < len(markers(folder)) == 8
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in markers(folder)}.items()
    assert not list(folder.glob("*/.*.tmp"))
    assert contents(next(folder.glob("*/"))) == contents(shared)


def test_of_two_that_stage_at_the_same_time_one_copies(shared: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(stage, shared, tmp_path / "local", mib_per_s=4) for _ in range(2)]
        reports = sorted((future.result() for future in both), key=lambda report: report.copied)
    assert [(report.copied, report.present) for report in reports] == [(0, 8), (8, 0)]


def test_staging_ends_with_the_process_that_started_it(shared: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from paws_hpc.store import start_staging\n"
        "staging = start_staging([Path(sys.argv[1])], Path(sys.argv[2]), mib_per_s=0.01)\n"
        "print(staging._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, shared, tmp_path / "local"], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for(lambda: bool(list((tmp_path / "local").glob(".leader"))))
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z (zombie)" in Path(f"/proc/{child}/status").read_text())


def test_copying_keeps_to_its_rate(shared: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    report = stage(shared, tmp_path / "local", workers=4, mib_per_s=2)
    assert report.bytes > 1.3 * MIB
    assert time.monotonic() - started > 0.45  # the last of 1.4 MiB starts after 1.2 MiB


def test_copies_in_use_are_never_evicted_and_others_are(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local, stores = tmp_path / "local", []
    for seed in (1, 2, 3):
        stores.append(pack(noise(seed), tmp_path / f"other{seed}", options=PackOptions(shard_bytes=500 * KIB)).path)
        stage(stores[-1], local)
    used = ImageStore.open(stores[0], copy_to=local)
    again = pickle.loads(pickle.dumps(used))
    used.close()  # the other process's still counts
    ImageStore.open(stores[1], copy_to=local).close()  # used last, by nobody now
    copies = [LocalFolder(local, read_manifest(store)).path for store in stores]

    class Usage(namedtuple("Usage", "free")):
        pass

    def disk_usage(path: Path) -> Usage:
        """A disk of 5.1 MiB, of which 256 stay free: three copies fit, not four."""
        return Usage(256 * MIB + int(5.1 * MIB) - sum(file.stat().st_size for file in local.rglob("*.h5")))

    monkeypatch.setattr("paws_hpc.store.local_copy.shutil.disk_usage", disk_usage)
    report = stage(shared, local)
    assert report.evicted == [copies[2]]
    assert [copy.exists() for copy in copies] == [True, True, False]
    assert verify(copies[0], level="full")[0] == []
    # No room at all: nothing is written unless what fits was asked for.
    monkeypatch.setattr("paws_hpc.store.local_copy.shutil.disk_usage", lambda path: Usage(256 * MIB + 400 * KIB))
    with pytest.raises(StoreError, match=r"has 256 MiB free, the copy needs 257 MiB .*--partial"):
        stage(stores[2], local)
    assert not list(copies[2].iterdir())
    assert not copies[1].exists()
    assert copies[0].exists()
    monkeypatch.setattr("paws_hpc.store.local_copy.shutil.disk_usage", lambda path: Usage(256 * MIB + 600 * KIB))
    assert main(["stage", str(stores[2]), "--to", str(local), "--partial", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["copied"], told["left_out"]) == (1, 2)
    assert copies[0].exists()
    assert read_all(again) == contents(stores[0])


def test_two_stores_that_are_staged_at_once_do_not_both_fill_the_same_room(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, other = tmp_path / "local", pack(noise(1), tmp_path / "other").path

    class Usage(namedtuple("Usage", "free")):
        pass

    def disk_usage(path: Path) -> Usage:
        return Usage(256 * MIB + 2 * MIB - sum(file.stat().st_size for file in local.rglob("*.h5")))

    monkeypatch.setattr("paws_hpc.store.local_copy.shutil.disk_usage", disk_usage)
    readers = [ImageStore.open(store, copy_to=local) for store in (shared, other)]  # so that neither is evicted
    with ThreadPoolExecutor(2) as pool, closing(readers[0]), closing(readers[1]):
        both = [pool.submit(stage, store, local, mib_per_s=8, partial=True) for store in (shared, other)]
        reports = [future.result() for future in both]
    assert sum(report.bytes for report in reports) < 2 * MIB
    assert sum(report.left_out for report in reports) > 0


def test_copies_of_other_users_are_left_alone(packed: Path) -> None:
    """As a shared /local is used: what may not be removed is no reason not to copy."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the path to pytest's own is root's alone
        local = Path(folder) / "local"
        stage(packed, local)
        for path in (Path(folder), local):
            path.chmod(0o1777)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(len(list(evict_unused(local, keep=local / "mine", needed=1))))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert LocalFolder(local, read_manifest(packed)).path.exists()


def test_a_local_disk_that_fails_leaves_the_store_itself(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    listdir, local = os.listdir, tmp_path / "local"

    def fails(path: Path) -> list[str]:
        if local in Path(path).parents:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fails)
    store = ImageStore.open(shared, copy_to=local)
    assert read_all(store) == contents(shared)
    assert caplog.text.count("cannot be looked for: [Errno 5]") == 1


def test_a_damaged_index_in_the_copy_is_not_used_however_large_it_is(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    monkeypatch.setattr("paws_hpc.store.index._IN_MEMORY_BYTES", 0)  # as for more than three million records
    index = stage(shared, local).path / "index.bin"
    content = bytearray(index.read_bytes())
    content[100] ^= 1
    index.write_bytes(content)
    assert read_all(ImageStore.open(shared, copy_to=local)) == contents(shared)


def test_a_damaged_shard_is_not_copied_and_the_others_are(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((shared / "shard-00003.h5").read_bytes())
    content[-1] ^= 1
    (shared / "shard-00003.h5").write_bytes(content)
    (shared / "shard-00004.h5").unlink()
    assert main(["stage", str(shared), "--to", str(tmp_path / "local")]) == 1
    output = capsys.readouterr()
    assert "6 shards copied" in output.out
    assert f"{shared / 'shard-00003.h5'} is not the file that was packed" in output.err
    assert f"{shared / 'shard-00004.h5'} cannot be opened" in output.err
    assert len(markers(tmp_path / "local")) == 6


def test_a_disk_that_fills_up_is_named_and_what_is_complete_stays(shared: Path, tmp_path: Path) -> None:
    stage(shared, tmp_path / "local")
    copy = LocalFolder(tmp_path / "local", read_manifest(shared)).path
    for name in ("shard-00005.h5", "shard-00005.h5.ok"):
        (copy / name).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KIB, hard))  # the nearest to a full disk without being root
    try:
        with pytest.raises(OSError, match=r"cannot write .*shard-00005.h5: File too large"):
            stage(shared, tmp_path / "local")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(markers(tmp_path / "local")) == 7
    assert not list(copy.glob(".*.tmp"))


def test_a_folder_that_cannot_be_used_is_named(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"copy_to=.*file/below cannot be used: .*leave staging out"):
        ImageStore.open(shared, copy_to=tmp_path / "file" / "below")
