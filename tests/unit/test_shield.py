"""No signal ends a rank, and none is lost, from its first instruction on; and it runs the frozen code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import paws_hpc
from paws_hpc.cluster.snapshot import plan_snapshot, shield, take_snapshot
from tests.pictures import write_tiles
from tests.ranks import ROOT

STARTING = """
import signal, subprocess, sys, time
print("up", flush=True)
sys.stdin.readline()                       # signals come now, while nothing of ours is imported
from paws_hpc.cluster.signals import StopRequests
stops = StopRequests(patience_s={patience}, overdue=lambda: (print("overdue", flush=True), __import__("os")._exit(3)))
stops.listen()
deadline = time.monotonic() + 20
while not stops.requested() and time.monotonic() < deadline: time.sleep(0.01)
subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15); print('lives')"])
print("requested", stops.requested(), flush=True)
if {patience} > 1: stops.answered()
else: time.sleep(30)
"""


def signalled(*numbers: signal.Signals, patience: float) -> tuple[int, str]:
    """Exit status and output of a rank that gets signals while it starts."""
    script = shield(Path(paws_hpc.__file__).parents[1])
    command = [sys.executable, "-I", "-S", str(script), sys.executable, "-c", STARTING.format(patience=patience)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    for number in numbers:
        process.send_signal(number)
    out, _ = process.communicate("go\n", timeout=30)
    return process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_signals_during_start_up_wait_and_children_do_not_die_of_them(number: signal.Signals) -> None:
    assert signalled(number, signal.SIGTERM, patience=20) == (0, "lives\nrequested True\n")


def test_a_job_that_reaches_no_place_to_stop_goes_back_on_its_own() -> None:
    status, out = signalled(signal.SIGUSR2, patience=0.2)
    assert status == 3
    assert "overdue\n" in out


def test_jobs_run_the_copy_whatever_is_edited_or_lies_in_their_folder(tmp_path: Path) -> None:
    snapshot = take_snapshot(tmp_path)
    assert take_snapshot(tmp_path) == snapshot == plan_snapshot(tmp_path)
    (snapshot / "paws_hpc" / "__init__.py").write_text("WHICH = 'the copy'\n")
    ask = "import paws_hpc; print(getattr(paws_hpc, 'WHICH', 'the checkout'))"
    told = subprocess.run(
        [sys.executable, "-I", "-S", str(shield(snapshot)), sys.executable, "-c", ask],
        cwd=ROOT,  # where `import paws_hpc` would find the checkout
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "the copy\n"


def test_a_snapshot_that_is_damaged_is_not_trusted_by_its_name(tmp_path: Path) -> None:
    snapshot = take_snapshot(tmp_path)
    with open(snapshot / "paws_hpc" / "launch.py", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=f"{snapshot} is damaged or was edited"):
        take_snapshot(tmp_path)


def test_a_changed_file_makes_another_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "paws_hpc"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(paws_hpc, "__file__", str(package / "__init__.py"))
    before = plan_snapshot(tmp_path)
    (package / "__init__.py").write_text("x = 1\n")
    assert plan_snapshot(tmp_path) != before
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"")
    again = plan_snapshot(tmp_path)
    (package / "new.py").write_text("")
    assert plan_snapshot(tmp_path) != again
    (package / ".#new.py").symlink_to("somebody@a.host")  # an editor's, of a file that is open
    assert sorted(path.name for path in take_snapshot(tmp_path).rglob("*.py")) == ["__init__.py", "new.py"]


def test_a_snapshot_and_a_wheel_have_the_recipes_and_a_wheel_the_job_scripts(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    recipes = {path.relative_to(root) for path in (root / "conf").rglob("*.yaml")}
    snapshot = take_snapshot(tmp_path)
    assert all((snapshot / "paws_hpc" / recipe).is_file() for recipe in recipes)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    shutil.copytree(root / "paws_hpc", tmp_path / "source" / "paws_hpc", symlinks=True)
    for name in ("conf", "jobs"):
        shutil.copytree(root / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / "source")
    pytest.importorskip("setuptools")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build], cwd=tmp_path / "source", check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"paws_hpc-{paws_hpc.__version__}-")
    packed = zipfile.ZipFile(wheel)
    assert {f"paws_hpc/{path}" for path in recipes} <= set(packed.namelist())
    (scripts,) = (name for name in packed.namelist() if name.endswith("entry_points.txt"))
    assert "paws = paws_hpc.__main__:main" in packed.read(scripts).decode()
    packed.extractall(tmp_path / "installed")
    for folder in tmp_path.glob("installed/*.data/data/*"):
        folder.rename(tmp_path / "installed" / folder.name)  # as pip does
    jobs = tmp_path / "installed/share/paws_hpc/jobs"
    assert {path.name for path in jobs.iterdir()} == {path.name for path in (root / "jobs").iterdir()}
    write_tiles(tmp_path / "work/photos", 12, classes=("cat", "dog"))
    own = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "installed"), "PATH": os.environ["PATH"]}
    for script, arguments, answer in (
        ("own_images.sh", ["data.root=photos", "device=cpu"], "runs/photos-seed0 would run prepare, pretrain"),
        ("digits.sh", ["seed=1"], "runs/digits-seed1 would run prepare, pretrain"),
    ):
        command = ["bash", str(jobs / script), *arguments, "dry_run=true"]
        done = subprocess.run(command, cwd=tmp_path / "work", env=own, capture_output=True, text=True, check=True)
        assert answer in done.stdout
    ask = [sys.executable, "-c", "import paws_hpc; print(paws_hpc.__file__)"]
    which = subprocess.run(ask, cwd=tmp_path / "work", env=own, capture_output=True, text=True, check=True).stdout
    assert which.startswith(str(tmp_path / "installed"))
