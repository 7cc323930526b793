"""A node's copy of a store is whole before anybody reads it, and nobody evicts it meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from paws_hpc.files import exclusive
from paws_hpc.packing import PackOptions, pack
from paws_hpc.shards import main
from paws_hpc.store import ImageStore, RecordError, StoreError
from paws_hpc.store.format import USERS_NAME, read_manifest
from paws_hpc.store.local_copy import CopyStoppedError, _evict, copy_store, open_copy
from paws_hpc.store.verify import verify
from tests.stores import files_of_at_most, noise, wait_until

KIB, MIB = 1 << 10, 1 << 20
IMAGES = 120


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.4 MiB of noise in eight shards."""
    return pack(
        noise(IMAGES, (64, 64, 3)),
        tmp_path_factory.mktemp("packed") / "store",
        options=PackOptions(shard_bytes=190 * KIB),
    ).path


@pytest.fixture
def shared(packed: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "shared"))


def contents(store: ImageStore) -> list[bytes]:
    return [image.tobytes() for image in store.read_raw(range(IMAGES))]


def shards(folder: Path) -> set[Path]:
    return set(folder.glob("*/shard-*.h5"))


def test_a_copy_is_a_store_of_its_own_and_a_later_job_finds_it(shared: Path, tmp_path: Path) -> None:
    first = copy_store(shared, tmp_path / "local")
    assert (first.copied, first.present) == (8, 0)
    assert verify(first.path, level="full")[0] == []
    expected = contents(ImageStore(shared))
    again = copy_store(shared, tmp_path / "local")
    assert (again.copied, again.present) == (0, 8)
    for path in shared.glob("*.h5"):
        path.unlink()  # only the copy is read
    assert contents(open_copy(shared, tmp_path / "local")) == expected


@pytest.mark.parametrize("damage", ["cut", "removed", "a temporary file", "no manifest"])
def test_what_an_interrupted_copy_lacks_is_made_up_for(shared: Path, tmp_path: Path, damage: str) -> None:
    copy = copy_store(shared, tmp_path / "local").path
    match damage:
        case "cut":
            os.truncate(copy / "shard-00002.h5", 100 * KIB)
        case "removed":
            (copy / "shard-00002.h5").unlink()
        case "a temporary file":
            (copy / ".shard-00002.h5.1.tmp").touch()
    if damage != "a temporary file":
        (copy / "manifest.json").unlink()
    report = copy_store(shared, tmp_path / "local")
    assert report.copied == (1 if damage in ("cut", "removed") else 0)
    assert verify(copy, level="full")[0] == []
    assert not list(copy.glob(".*.tmp"))


def test_a_record_damaged_in_the_copy_is_named_with_the_remedy(shared: Path, tmp_path: Path) -> None:
    store = open_copy(shared, tmp_path / "local")
    copy, entry = store.path, store.manifest.shards[2]
    with open(copy / entry.name, "r+b") as file:  # under the open descriptor
        file.seek((entry.data_offset or 0) + 1000)
        file.write(b"damage")
    with pytest.raises(RecordError, match=rf"in {copy / entry.name} is damaged: .* Remove {copy}: this copy .* anew"):
        contents(store)


_COPIES_SLOWLY = """
import sys, time; from pathlib import Path; from paws_hpc.store import local_copy
copy = local_copy._copy_shard
def slowly(*args): copy(*args); time.sleep(0.3)
local_copy._copy_shard = slowly
local_copy.copy_store(Path(sys.argv[1]), Path(sys.argv[2]), workers=1)
"""


def test_the_next_process_goes_on_when_the_one_that_copies_is_killed(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    leader = subprocess.Popen([sys.executable, "-c", _COPIES_SLOWLY, shared, folder])
    wait_until(lambda: len(shards(folder)) >= 2)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(copy_store, shared, folder)
        time.sleep(0.3)
        assert not follower.done(), "one process of the node copies"
        leader.kill()
        assert leader.wait(10) == -signal.SIGKILL
        report = follower.result(timeout=30)
    assert report.present >= 2
    assert report.present + report.copied == 8
    assert contents(ImageStore(report.path)) == contents(ImageStore(shared))


def test_copying_stops_when_the_job_is_to_stop_also_while_another_copies(shared: Path, tmp_path: Path) -> None:
    calls = itertools.count()
    with pytest.raises(CopyStoppedError):
        open_copy(shared, tmp_path / "local", stop=lambda: next(calls) >= 5)  # once for each shard
    assert 0 < len(shards(tmp_path / "local")) < 8, "what is complete stays"
    with exclusive(tmp_path / "local" / ".leader"), pytest.raises(CopyStoppedError):
        open_copy(shared, tmp_path / "local", stop=lambda: True)


def disk(monkeypatch: pytest.MonkeyPatch, local: Path, size: float) -> None:
    """A disk of so many MiB beside the 256 that stay free."""

    def disk_usage(path: Path) -> SimpleNamespace:
        used = sum(file.stat().st_size for file in local.rglob("*.h5"))
        return SimpleNamespace(free=256 * MIB + int(size * MIB) - used)

    monkeypatch.setattr("paws_hpc.store.local_copy.shutil.disk_usage", disk_usage)


def test_copies_in_use_are_never_evicted_and_others_are(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local, stores = tmp_path / "local", []
    for seed in (1, 2, 3):
        stores.append(
            pack(
                noise(IMAGES, (64, 64, 3), seed=seed),
                tmp_path / f"other{seed}",
                options=PackOptions(shard_bytes=500 * KIB),
            ).path
        )
        copy_store(stores[-1], local)
    used = open_copy(stores[0], local)
    again = pickle.loads(pickle.dumps(used))
    used.close()  # the other process's still counts
    open_copy(stores[1], local).close()  # used last, by nobody now
    copies = [local / read_manifest(store).checksum[:32] for store in stores]
    disk(monkeypatch, local, 5.1)  # three copies fit, not four
    assert copy_store(shared, local).evicted == (copies[2],)
    assert [copy.exists() for copy in copies] == [True, True, False]
    disk(monkeypatch, local, 2.0)
    assert main(["copy", str(stores[2]), "--to", str(local)]) == 1
    assert "MiB free, the copy needs 257 MiB (256 MiB of them stay free). Make room" in capsys.readouterr().err
    assert [copy.exists() for copy in copies[:2]] == [True, False]
    assert not list(copies[2].glob("*.h5")), "nothing is written where it does not fit"
    assert contents(again) == contents(ImageStore(stores[0]))


def test_only_copies_that_this_user_made_are_removed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write beside the copies must not make others remove what is not one."""
    local = tmp_path / "local"
    copy = copy_store(pack(noise(IMAGES, (64, 64, 3), seed=1), tmp_path / "other", options=PackOptions()).path, local)
    (tmp_path / "elsewhere").mkdir()
    planted = {
        "photos": local / "photos" / "a.jpg",  # no copy's name
        "notes": local / ("0" * 32) / "thesis.txt",  # no store's file
        "nested": local / ("1" * 32) / "splits" / "deeper" / "a.json",
        "linked": tmp_path / "elsewhere" / "shard-00000.h5",
    }
    for path in planted.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        folder = local / path.relative_to(local).parts[0] if local in path.parents else path.parent
        (folder / USERS_NAME).touch()
    (local / ("2" * 32)).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for users in local.glob(f"*/{USERS_NAME}"):
        os.utime(users, (0, 0))
    disk(monkeypatch, local, 2.0)
    assert copy_store(shared, local).evicted == (copy.path,), "though it was used last"
    assert all(path.read_text() == "mine" for path in planted.values())


@pytest.mark.parametrize("planted", ["link", "link to nothing", "file", "folder of other things"])
def test_what_others_put_where_a_copy_would_lie_is_neither_read_nor_written(
    shared: Path, tmp_path: Path, planted: str
) -> None:
    place, precious = tmp_path / "local" / read_manifest(shared).checksum[:32], tmp_path / "precious"
    place.parent.mkdir()
    precious.mkdir()
    (precious / ".draft.tmp").write_text("mine")
    match planted:
        case "link":
            place.symlink_to(precious)
        case "link to nothing":
            place.symlink_to(tmp_path / "nowhere")
        case "file":
            place.write_text("mine")
        case _:
            shutil.copytree(precious, place)
            (place / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="is no copy that this user made"):
        copy_store(shared, tmp_path / "local")
    assert [path.name for path in precious.iterdir()] == [".draft.tmp"]
    assert not (tmp_path / "nowhere").exists()


def test_copies_of_other_users_are_left_alone(packed: Path) -> None:
    """As a shared /local is used: what may not be removed is no reason not to copy."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the path to pytest's own is root's alone
        local = Path(folder) / "local"
        copy = copy_store(packed, local).path
        for path in (Path(folder), local):
            path.chmod(0o1777)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(int(_evict(copy)))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert verify(copy, level="full")[0] == []


def test_a_damaged_or_missing_shard_ends_copying_and_is_named(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, message in (("shard-00003.h5", "is not the file that was"), ("shard-00004.h5", "cannot be read")):
        content, local = (shared / name).read_bytes(), tmp_path / name
        if "read" in message:
            (shared / name).unlink()
        else:
            (shared / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(["copy", str(shared), "--to", str(local)]) == 1
        assert f"{shared / name} {message}" in capsys.readouterr().err
        assert not list(local.glob("*/manifest.json"))
        (shared / name).write_bytes(content)
    assert main(["copy", str(shared), "--to", str(local), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["copied"] + report["present"] == 8


def test_a_disk_that_fills_up_is_named_and_what_is_complete_stays(shared: Path, tmp_path: Path) -> None:
    copy = copy_store(shared, tmp_path / "local").path
    (copy / "shard-00005.h5").unlink()
    with files_of_at_most(100 * KIB), pytest.raises(OSError, match=r"cannot write .*shard-00005.h5: File too large"):
        copy_store(shared, tmp_path / "local")
    assert len(shards(tmp_path / "local")) == 7
    assert not list(copy.glob(".*.tmp"))


def test_a_folder_that_cannot_be_used_is_named(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/below cannot hold copies of stores: .*without data.copy_to"):
        open_copy(shared, tmp_path / "file" / "below")
