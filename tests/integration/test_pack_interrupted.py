"""Packing survives being killed, divides among processes and jobs, and gives the same bytes however it was done."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from paws_hpc.packing import ImageFolder, PackOptions, pack, packer
from paws_hpc.packing.job import PackJob
from paws_hpc.packing.plan import packing_order
from paws_hpc.shards import main
from paws_hpc.store import ImageStore, RecordError, StoreError
from paws_hpc.store.verify import verify
from tests.pictures import PHOTOS, encoded, write_tiles
from tests.stores import file_hashes, flip_bit, wait_until

IMAGES = 120
OPTIONS = PackOptions(shard_bytes=30_000, workers=1)
FORCED = replace(OPTIONS, force=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of parts of photographs, two of them PNG."""
    return write_tiles(tmp_path_factory.mktemp("images"), IMAGES, classes=("c0", "c1", "c2", "c3", "c4"), png=(7, 70))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name → hash of the files of a store that was packed in one go by one process."""
    report = pack(ImageFolder(folder), tmp_path_factory.mktemp("expected") / "store", options=OPTIONS)
    assert len(report.manifest.shards) > 10
    return file_hashes(report.path)


def command(folder: Path, store: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "paws_hpc.shards", "pack", "folder", "--root", str(folder), "--to", str(store)]
    return [*start, "--shard-mib", str(OPTIONS.shard_bytes / (1 << 20)), *more]


def children(pid: int) -> set[int]:
    """Processes that ``pid`` started."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {int(child) for child in listing.split()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_again_and_again_it_goes_on_and_gives_the_same_bytes(
    folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """SIGKILL at random moments, with SIGTERM blocked as a job may do; the workers end, finished shards stay."""
    store, chance = tmp_path / "store", random.Random(0)
    block = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2]); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    kept: dict[Path, int] = {}
    kills = 0
    while not (store / "manifest.json").exists() or (store / ".packing").exists():
        packer = subprocess.Popen([sys.executable, "-c", block, *command(folder, store, "--workers", "2")])
        before = len(list(store.glob(".packing/shard-*.json")))
        wait_until(
            lambda before=before, packer=packer: (
                len(list(store.glob(".packing/shard-*.json"))) > before or packer.poll() is not None
            )
        )
        time.sleep(chance.random() * 0.01)
        workers = children(packer.pid) if packer.poll() is None else set()
        packer.kill()
        packer.wait()
        kills += bool(workers)
        wait_until(lambda workers=workers: not any(map(alive, workers)), timeout_s=10)
        for path, stamp in kept.items():
            assert not path.exists() or path.stat().st_mtime_ns == stamp, "a finished shard was packed again"
        finished = [path.with_suffix(".h5") for path in store.glob(".packing/shard-*.json")]
        kept = {path: path.stat().st_mtime_ns for path in finished}
        if kept:
            with pytest.raises(StoreError, match="not a complete image store"):
                ImageStore(store)
    assert kills >= 2
    assert file_hashes(store) == expected


class Killed(BaseException):
    """Ends a process, as far as its own code sees."""


def kill(*_: object) -> None:
    raise Killed


@contextmanager
def acting_from(change: int, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` before each rename and removal of a file from the given one on."""
    remaining = iter(range(change))

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if next(remaining, None) is None:
                action()
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in ("replace", "unlink", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        yield


def test_killed_at_every_step_of_the_end_it_is_finished_by_the_next(
    folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """The end moves shards and writes files: stop at each system call that changes something, then go on."""
    template = tmp_path / "template"
    pack(ImageFolder(folder), template, options=PackOptions(shard_bytes=60_000, workers=1, seed=9))  # a former store
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(PackJob, "finish", kill)
        with pytest.raises(Killed):
            pack(ImageFolder(folder), template, options=FORCED)
    assert ImageStore(template).manifest.packing.seed == 9  # the old store is whole until the new one is
    seeds, refusals, done = set(), [], False
    for calls in range(0, 200, 5):
        store = shutil.copytree(template, tmp_path / f"after-{calls}")
        with suppress(Killed), acting_from(calls, kill):
            pack(ImageFolder(folder), store, options=FORCED)
            done = True
        try:
            seeds.add(ImageStore(store).manifest.packing.seed)
        except StoreError as error:
            refusals.append(str(error))
        else:
            assert verify(store, level="quick")[0] == []  # the old store or the new one, never a mixture
        pack(ImageFolder(folder), store, options=FORCED)
        assert file_hashes(store) == expected
        shutil.rmtree(store)
        if done:
            break
    assert done
    assert calls > 20
    assert seeds == {0, 9}
    assert refusals
    assert all("is not a complete image store" in refusal for refusal in refusals)


def test_a_process_that_lags_behind_another_at_the_end_takes_nothing_away(
    folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """At every rename and removal of one process, another makes the whole store; the first goes on from there."""
    template = tmp_path / "template"
    for part in (1, 2):
        pack(ImageFolder(folder), template, task=(part, 3), options=OPTIONS)
    for turn in range(0, 200, 3):
        store, met = shutil.copytree(template, tmp_path / f"at-{turn}"), []

        def overtake(store: Path = store, met: list[bool] = met) -> None:
            if not met:
                met.append(True)
                pack(ImageFolder(folder), store, options=OPTIONS)

        with acting_from(turn, overtake):
            pack(ImageFolder(folder), store, options=OPTIONS)
        assert file_hashes(store) == expected, f"overtaken at {turn}"
        shutil.rmtree(store)
        if not met:
            break
    assert not met
    assert turn > 20


def test_a_plain_pack_leaves_a_forced_one_alone_that_has_just_begun(
    folder: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, original = tmp_path / "store", packer.build_shards
    pack(ImageFolder(folder), store, options=OPTIONS)

    def met(*arguments: object, **named: object) -> object:
        monkeypatch.setattr(packer, "build_shards", original)
        assert not pack(ImageFolder(folder), store, options=OPTIONS).packed
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(packer, "build_shards", met)
    assert pack(ImageFolder(folder), store, options=FORCED).made
    assert file_hashes(store) == expected


def test_a_forced_pack_of_nothing_that_can_be_read_fails_and_the_former_store_stays(
    folder: Path, tmp_path: Path
) -> None:
    source, store = shutil.copytree(folder, tmp_path / "source"), tmp_path / "store"
    pack(ImageFolder(source), store, options=PackOptions(workers=1, on_error="skip"))
    before = file_hashes(store)
    for path in source.rglob("*.*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match="none of the 120 images could be read"):
        pack(ImageFolder(source), store, options=PackOptions(workers=1, on_error="skip", force=True))
    assert file_hashes(store) == before


def test_a_part_that_begins_when_all_is_done_meanwhile_leaves_nothing(
    folder: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, original = tmp_path / "store", PackJob.begin

    def late(self: PackJob, identity: object, *, force: bool) -> None:
        monkeypatch.setattr(PackJob, "begin", original)
        pack(ImageFolder(folder), store, options=OPTIONS)
        original(self, identity, force=force)  # type: ignore[arg-type]

    monkeypatch.setattr(PackJob, "begin", late)
    report = pack(ImageFolder(folder), store, task=(2, 3), options=OPTIONS)
    assert report.manifest is not None
    assert report.manifest.count == IMAGES
    assert file_hashes(store) == expected


def test_a_full_disk_at_the_end_of_a_forced_pack_is_not_taken_for_success(
    folder: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    pack(ImageFolder(folder), store, options=OPTIONS)

    def full(*_: object) -> None:
        raise StoreError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("paws_hpc.packing.job.build_index", full)
        with pytest.raises(StoreError, match="no space left"):
            pack(ImageFolder(folder), store, options=FORCED)
    assert file_hashes(store) == expected | {".packing": "folder"}
    assert pack(ImageFolder(folder), store, options=FORCED).kept == sum(name.endswith(".h5") for name in expected)
    assert file_hashes(store) == expected


def test_finished_shards_that_were_damaged_are_packed_again(
    folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    store = tmp_path / "store"
    for part in (1, 2):
        pack(ImageFolder(folder), store, task=(part, 3), options=OPTIONS)
    first, second, third, fourth = sorted(store.glob(".packing/shard-*.h5"))[:4]
    os.truncate(first, first.stat().st_size - 1)
    second.unlink()
    third.with_suffix(".json").write_text("{}")
    result = json.loads(fourth.with_suffix(".json").read_text())
    result["histogram"][0][0] += 1
    fourth.with_suffix(".json").write_text(json.dumps(result))
    report = pack(ImageFolder(folder), store, options=OPTIONS)
    of_both_parts = sum(number % 3 < 2 for number in range(len(report.manifest.shards)))
    assert report.kept == of_both_parts - 4
    assert file_hashes(store) == expected


def test_parts_in_any_order_and_twice_at_once_make_the_store(
    folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Four parts as jobs of an array, one of them started twice; the last to end makes the store."""
    store = tmp_path / "store"
    assert main([*command(folder, store, "--plan-only")[3:]]) == 0
    jobs = [
        subprocess.Popen(
            command(folder, store, "--part", f"{part}/4", "--workers", "1"), stdout=subprocess.PIPE, text=True
        )
        for part in (3, 1, 4, 2, 2)
    ]
    printed = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 5, printed
    assert any("packed " in text and "images of 5 classes" in text for text in printed)
    assert file_hashes(store) == expected
    again = subprocess.run(command(folder, store, "--part", "1/4"), capture_output=True, text=True, check=True)
    assert "already holds this store" in again.stdout
    assert file_hashes(store) == expected


def test_parts_do_not_list_the_source_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do they use a damaged list of it."""
    store = tmp_path / "store"
    arguments = command(folder, store)[3:]
    assert main([*arguments, "--plan-only"]) == 0

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the source was listed again")

    monkeypatch.setattr(os, "walk", refuse)
    listing = store / ".packing" / "listing.bin"
    for place in (0, listing.stat().st_size // 2, listing.stat().st_size - 1):
        flip_bit(listing, place)
        assert main([*arguments, "--part", "1/2"]) == 1
        assert "listing.bin is damaged. Remove it" in capsys.readouterr().err
        flip_bit(listing, place)
    for part in ("1/2", "2/2"):
        assert main([*arguments, "--part", part, "--workers", "1"]) == 0
    assert len(ImageStore(store)) == IMAGES


def test_a_part_alone_makes_no_store_and_says_what_is_missing(
    folder: Path, tmp_path: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    report = pack(ImageFolder(folder), store, task=(2, 2), options=OPTIONS)
    shards = sum(name.endswith(".h5") for name in expected)
    assert (report.packed, report.missing, report.manifest) == (shards // 2, shards - shards // 2, None)
    assert not (store / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"--force"):
        pack(ImageFolder(folder), store, task=(1, 2), options=PackOptions(force=True))
    for wrong in ("0/2", "3/2", "x", "1/0", "1"):
        with pytest.raises(SystemExit):
            main([*command(folder, store)[3:], "--part", wrong])
    assert "parts are numbered from 1/2 to 2/2" in capsys.readouterr().err


def test_another_source_or_option_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pack(ImageFolder(folder), store, task=(1, 2), options=OPTIONS)
    before = sorted(path.name for path in store.rglob("*"))
    with pytest.raises(StoreError, match=r"unfinished pack.*seed=0 \(wanted 3\).*--force"):
        pack(ImageFolder(folder), store, options=PackOptions(shard_bytes=30_000, seed=3))
    with pytest.raises(StoreError, match=r"shard_bytes=30000 \(wanted 268435456\)"):
        pack(ImageFolder(folder), store)
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "c1" / "001.jpg").unlink()
    with pytest.raises(StoreError, match=r"digest="):
        pack(ImageFolder(changed), store, options=OPTIONS)
    assert sorted(path.name for path in store.rglob("*")) == before
    assert pack(ImageFolder(changed), store, options=PackOptions(force=True)).manifest.count == IMAGES - 1
    assert not (store / ".packing").exists()


def test_a_source_that_changed_between_two_runs_is_not_mixed(folder: Path, tmp_path: Path) -> None:
    """Same name, same size, other contents: the finished shard that holds it is packed again."""
    source = shutil.copytree(folder, tmp_path / "source")
    store = tmp_path / "store"
    for part in range(1, 4):
        pack(ImageFolder(source), store, task=(part, 4), options=OPTIONS)
    first = ImageFolder(source)
    path = source / first.keys[packing_order(first.keys, seed=0)[0]]  # in the first shard, which is done
    assert (store / ".packing" / "shard-00000.json").exists()
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    report = pack(ImageFolder(source), store, options=PackOptions(shard_bytes=30_000, on_error="skip"))
    whole = pack(ImageFolder(source), tmp_path / "whole", options=PackOptions(shard_bytes=30_000, on_error="skip"))
    assert report.manifest == whole.manifest


def test_an_image_that_was_left_out_stops_a_run_that_was_not_asked_to(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    for label in range(5):
        (source / f"c{label}" / "bad.jpg").write_bytes(b"nothing")
    skipping = PackOptions(shard_bytes=30_000, workers=1, on_error="skip")
    for part in (1, 2):
        pack(ImageFolder(source), tmp_path / "store", task=(part, 3), options=skipping)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("store/.packing/shard-*.json"))]
    left_out = next(result for result in results if result["skipped"])
    with pytest.raises(RecordError) as caught:
        pack(ImageFolder(source), tmp_path / "store", task=(left_out["number"] % 3 + 1, 3), options=OPTIONS)
    assert caught.value.key == left_out["skipped"][0]["key"]


FATAL = """
import signal, sys, time
from pathlib import Path
from paws_hpc.packing import ImageFolder, PackOptions, pack

class Fatal(ImageFolder):
    "Loading an image kills the process, as a decoder with a fault would, or takes for ever, as from a disk that hangs."
    def load(self, index):
        if sys.argv[3] == "slow":
            time.sleep(1000)
        if self.keys[index] == "c1/001.jpg":
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a fault would be
        return super().load(index)
    def select(self, indices):
        return Fatal(self.root, self.listing.take(indices))

if __name__ == "__main__":
    import fatal
    try:
        pack(fatal.Fatal(Path(sys.argv[1])), Path(sys.argv[2]), options=PackOptions(shard_bytes=30_000, workers=2))
    except ValueError as error:
        print(error)
"""


def start_fatal(folder: Path, tmp_path: Path, how: str) -> subprocess.Popen[str]:
    (tmp_path / "fatal.py").write_text(FATAL)
    arguments = [sys.executable, str(tmp_path / "fatal.py"), str(folder), str(tmp_path / "store"), how]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_the_shard_of_an_image_that_kills_a_worker_is_named(folder: Path, tmp_path: Path) -> None:
    printed, _ = start_fatal(folder, tmp_path, "dying").communicate(timeout=120)
    assert re.search(r"the process that packed shard-\d+\.h5 ended with status -11\. .*, breaks the decoder", printed)
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_workers_end_with_their_parent_in_the_middle_of_an_image(folder: Path, tmp_path: Path) -> None:
    packer = start_fatal(folder, tmp_path, "slow")
    wait_until(lambda: len(list(tmp_path.glob("store/.packing/.shard-*.tmp"))) == 2)  # both are at work
    workers = children(packer.pid)
    assert len(workers) >= 2
    packer.kill()
    packer.communicate()
    wait_until(lambda: not any(map(alive, workers)), timeout_s=5)


def test_an_interrupt_ends_the_workers_and_leaves_no_half_shards(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    packer = subprocess.Popen(
        command(folder, store, "--workers", "2"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: list(store.glob(".packing/shard-*.json")))
    workers = children(packer.pid)
    os.killpg(packer.pid, signal.SIGINT)
    _, printed = packer.communicate(timeout=60)
    if packer.returncode != 0:  # it was not done already
        assert packer.returncode == 130
        assert printed.splitlines() == ["interrupted: what is complete stays, the same command goes on or begins anew"]
    wait_until(lambda: not any(map(alive, workers)), timeout_s=5)
    assert not list(store.rglob("*.tmp"))


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """A shard of 120 MB in a process that may have 80 MiB more than it needs to start."""
    with Image.open(PHOTOS[0]) as photo:
        content = encoded(photo.resize((1600, 1200)), quality=97)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(120 * 10**6 // len(content)):
        (tmp_path / "images" / "a" / f"{number}.jpg").write_bytes(content)
    script = (
        "import sys; from pathlib import Path\n"
        "from paws_hpc.packing import ImageFolder, PackOptions, pack\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "before = peak()\n"
        "pack(ImageFolder(Path(sys.argv[1])), Path(sys.argv[2]), options=PackOptions(workers=1))\n"
        "print((peak() - before) // 1024)\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "images"), str(tmp_path / "store")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=True)
    assert (tmp_path / "store" / "shard-00000.h5").stat().st_size > 110 << 20
    assert int(done.stdout) < 80
