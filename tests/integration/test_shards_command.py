"""The shards command, and the store under conditions only processes have: forks, kills, full disks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paws_hpc.shards import main
from paws_hpc.store import ImageStore
from paws_hpc.store.format import read_manifest
from tests.pictures import write_tiles


def run_python(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter."""
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """An ImageFolder of 40 parts of photographs: JPEG, and one PNG."""
    return write_tiles(tmp_path / "photographs", 40, classes=("china", "flower"), png=(7,), step=8)


def test_pack_info_and_verify_a_folder(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    pack = ["pack", "folder", "--root", str(photographs), "--to", str(store), "--shard-mib", "0.05"]
    assert main(pack) == 0
    printed = capsys.readouterr().out
    assert "40 images of 2 classes" in printed
    assert "1 images: PNG, pixels unchanged" in printed
    assert main(pack) == 0
    assert "Nothing was done" in capsys.readouterr().out
    assert main(["info", str(store)]) == 0
    table = capsys.readouterr().out
    assert ImageStore(store).digest in table
    assert "flower" in table
    assert main(["info", "--json", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)["class_counts"] == [20, 20]
    for level in ("--quick", "--full", "--deep"):
        assert main(["verify", level, str(store)]) == 0
    damaged = store / "shard-00001.h5"
    content = bytearray(damaged.read_bytes())
    content[read_manifest(store).shards[1].data_offset + 500] ^= 16
    damaged.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", "--quick", str(store)]) == 0
    assert main(["verify", str(store)]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAULT")]
    assert len(faults) == 1
    key = next(key for key in ImageStore(store).keys if f"'{key}'" in faults[0])
    assert faults[0] == f"FAULT shard-00001.h5 record {key!r} is damaged: its CRC32C differs from the index"


def test_skipped_images_are_all_printed(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        (photographs / "china" / f"bad-{number}.jpg").write_bytes(b"nothing")
    pack = ["pack", "folder", "--root", str(photographs), "--to", str(tmp_path / "store")]
    assert main(pack) == 1
    assert "error: image 'china/bad-" in capsys.readouterr().err
    assert main([*pack, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "30 images LEFT OUT" in printed
    assert all(f"china/bad-{number}.jpg: " in printed for number in range(30))


def test_errors_are_one_line_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "folder", "--root", str(tmp_path), "--to", str(tmp_path / "store")]) == 1
    assert main(["info", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paws_hpc.shards", "pack", "digits", "--split", "test", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(ImageStore(tmp_path)) == 400
    wrong = subprocess.run([*command[:-2]], capture_output=True, text=True, timeout=120, check=False)
    assert wrong.returncode == 2
    assert "--to" in wrong.stderr


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="hdf5-tools are not installed")
def test_site_tools_read_the_shards(photographs: Path, tmp_path: Path) -> None:
    assert main(["pack", "folder", "--root", str(photographs), "--to", str(tmp_path / "store")]) == 0
    command = ["h5dump", "-d", "/index/length", "-y", "-w", "0", str(tmp_path / "store" / "shard-00000.h5")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lengths = [len(payload) for payload in ImageStore(tmp_path / "store").read_encoded(range(40))]
    assert ", ".join(map(str, lengths)) in " ".join(printed.split())


FORK = """
import hashlib, os, sys, threading
import numpy as np
from paws_hpc.store import ImageStore

store = ImageStore(sys.argv[1])
indices = np.arange(2000) * 7919 % len(store)

def checksum():
    digest = hashlib.sha256()
    for start in range(0, len(indices), 50):
        for image in store.images(indices[start : start + 50]):
            digest.update(image)
    return digest.hexdigest()

expected = checksum()
stop = threading.Event()
def keep_reading():
    while not stop.is_set():
        assert checksum() == expected
readers = [threading.Thread(target=keep_reading) for _ in range(2)]
for reader in readers:
    reader.start()
children = []
for _ in range(4):
    child = os.fork()  # while threads of the parent are in the middle of reading
    if not child:
        os._exit(0 if checksum() == expected else 1)
    children.append(child)
assert checksum() == expected
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
stop.set()
for reader in readers:
    reader.join()
print("equal")
"""


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_forked_processes_and_threads_read_the_same_at_once(kind: str, photographs: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    if kind == "raw":
        assert main(["pack", "digits", "--split", "test", "--to", store, "--shard-mib", "0.1"]) == 0
    else:
        assert main(["pack", "folder", "--root", str(photographs), "--to", store, "--shard-mib", "0.05"]) == 0
    done = run_python(FORK, store)
    assert done.stdout == "equal\n", done.stderr


PACK_NOISE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from paws_hpc.packing import ArraySource, PackOptions, pack

if len(sys.argv) > 2:  # no file may grow beyond this: the write fails as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
images = np.random.default_rng(0).integers(0, 256, (3000, 16, 16, 3), dtype=np.uint8)
source = ArraySource("noise", images, np.zeros(3000, np.int64), [f"{i:04d}" for i in range(3000)], ("noise",))
try:
    pack(source, Path(sys.argv[1]), options=PackOptions(shard_bytes=200_000))
except OSError as error:
    print(error.strerror, flush=True)
"""


@pytest.mark.parametrize("limit", [150_000, 10_000, 0])
def test_a_write_that_fails_leaves_no_file_behind(tmp_path: Path, limit: int) -> None:
    store = tmp_path / "store"
    done = run_python(PACK_NOISE, store, limit)
    name = r"shard-0000\d.h5" if limit else r"\.pack\.json\..*\.tmp"
    assert re.fullmatch(rf"cannot write {store}/.packing/{name}: File too large\n", done.stdout)
    assert done.stderr == ""
    assert [path.name for path in store.rglob("*")] == [".packing", "pack.json"][: 2 if limit else 1]


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "--map-root-user", "true"]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a private mount, which this system does not allow")
def test_a_full_disk_is_named_and_keeps_the_finished_shards(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    pack = f"{sys.executable} -c '{PACK_NOISE}' {disk}/store"
    script = f"mount -t tmpfs -o size=1100k tmpfs {disk} && {pack}; ls -A {disk}/store/.packing"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    failure, *left = done.stdout.splitlines()
    assert failure.endswith(": No space left on device")
    assert "pack.json" in left
    assert not any(name.endswith(".tmp") for name in left)
    assert sum(name.endswith(".h5") for name in left) >= 3
