"""The benchmark compares like with like, leaves nobody out in silence, and a contender that fails hurts no other."""

from __future__ import annotations

import importlib.util
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from rich.console import Console

from paws_hpc.bench.__main__ import main
from paws_hpc.bench.contender import Contender, ContenderError
from paws_hpc.bench.figures import Bar, Figure, Measured, measure_groups
from paws_hpc.bench.own import KINDS
from paws_hpc.bench.peers import cut, drawn_boxes
from paws_hpc.bench.photographs import jpegs, write_photographs
from paws_hpc.bench.rounds import Entry, Rates, race, ratio
from paws_hpc.bench.synthetic import repeat_store
from paws_hpc.data.crops import resized_crops
from paws_hpc.packing import ImageFolder, PackOptions, pack
from paws_hpc.store import ImageStore, decode_jpeg


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), 40)


def test_photographs_are_as_large_as_imagenets_and_the_same_every_time(photographs: Path, tmp_path: Path) -> None:
    files = jpegs(str(photographs))
    assert [int(path.stem) for path in files] == list(range(40))
    assert 100_000 < sum(path.stat().st_size for path in files) / 40 < 120_000
    again = jpegs(str(write_photographs(tmp_path, 40)))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]
    assert len({path.read_bytes() for path in files}) == 40


def test_peers_make_the_crops_that_we_make(photographs: Path) -> None:
    boxes = drawn_boxes(str(photographs))
    for number, path in enumerate(jpegs(str(photographs))[:8]):
        jpeg = path.read_bytes()
        theirs = cut(jpeg, number, boxes)
        image = torch.from_numpy(decode_jpeg(jpeg)).permute(2, 0, 1)
        for (crop, _), of_kind, crops in zip(KINDS, boxes, theirs, strict=True):
            mine = resized_crops([image], of_kind[number][None], torch.empty_like(crops)[:, None])[:, 0]
            assert crops.shape == (crop.count, 3, crop.size, crop.size)
            assert (crops.int() - mine.int()).abs().max() <= 1


def test_every_contender_is_in_the_figures_or_the_reason_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = ["reads"]
    arguments = ["store", "--images", "64", "--rounds", "1", "--folder", str(tmp_path), "--only", *groups]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "photographs-64" / "store.json").read_text())
    assert list(found["groups"]) == groups
    assert found["machine"]["cores"] >= 1
    for group in found["groups"].values():
        for name, rates in group["rates"].items():
            assert (rates["failure"] is None) == (len(rates["per_s"]) == 1), name
            assert name in printed
    webdataset = importlib.util.find_spec("webdataset") is not None
    assert ("not installed: pip install webdataset" in printed) != webdataset
    assert (found["machine"]["versions"]["webdataset"] is not None) == webdataset
    reads = found["groups"]["reads"]
    assert {bar["unit"] for bar in reads["bars"]} == {"x"}
    assert [bar["value"] is not None for bar in reads["bars"]] == [True, True, True, webdataset]
    assert reads["rates"]["paws_hpc"]["median"] > 0


def test_a_contender_that_cannot_start_or_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    good = Entry("good", "tests.unit.bench_work:count", {"fail_at": None})
    entries = [
        Entry("no such module", "absent_peer:work", {}, ("absent_peer", "absent-package")),
        Entry("its own fault", "paws_hpc.bench.absent:work", {}, ("absent_peer", "absent-package")),
        Entry("fails at once", "paws_hpc.bench.own:reads", {"store": str(tmp_path / "store"), "check": True}),
        Entry("fails later", "tests.unit.bench_work:count", {"fail_at": 2}),
        good,
    ]
    rates = race(entries, rounds=3, cores=[0], tell=lambda _: None)
    assert rates["no such module"].failure == (
        "not installed: pip install absent-package, or all of them by `make bench`"
    )
    assert rates["its own fault"].failure == "ModuleNotFoundError: No module named 'paws_hpc.bench.absent'"
    assert "is not a complete image store" in str(rates["fails at once"].failure)
    assert rates["fails later"].failure == "ValueError: the disk is gone"
    assert rates["fails later"].per_s == []
    assert rates["good"].failure is None
    assert len(rates["good"].per_s) == 3
    assert ratio(rates["good"], rates["fails later"]) is None


def test_a_group_that_cannot_be_measured_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Measured:
        raise ContenderError("out of memory")

    console = Console(width=120)
    found = Measured({}, [], {}, [Figure("step", 2.0, "ms")])
    with console.status("") as status:
        asked = {"checkpoint": fail, "step": lambda: found}
        assert not measure_groups(console, status, asked, about={}, target=tmp_path / "json")
        assert measure_groups(console, status, {"step": lambda: found}, about={}, target=tmp_path / "alone")
    groups = json.loads((tmp_path / "json").read_text())["groups"]
    assert groups["checkpoint"]["figures"][0]["absent"] == "failed: out of memory"
    assert groups["step"]["figures"][0]["value"] == 2.0
    assert "not measured: failed: out of memory" in capsys.readouterr().out


def test_a_contender_is_bound_to_its_cores() -> None:
    with closing(Contender("tests.unit.bench_work:cores", {}, cores=[0])) as contender:
        assert contender.work()[0] == 1
    with pytest.raises(ContenderError, match="has no attribute"):
        Contender("tests.unit.bench_work:absent", {}, cores=[0])


def test_a_contender_that_hangs_is_ended_with_all_that_it_started_and_said_so() -> None:
    with (
        pytest.raises(ContenderError, match="gave no answer within 2 s"),
        closing(Contender("tests.unit.bench_work:hang", {}, cores=[0], limit_s=2)) as contender,
    ):
        contender.work()


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine was three times as slow in the second round: both were."""
    assert ratio(Rates("a", [300.0, 100.0, 330.0]), Rates("b", [150.0, 50.0, 150.0])) == 2.0
    assert Bar("", 0.95, "x", 0.9).reached
    assert Bar("", 0.89, "x", 0.9).reached is False
    assert Bar("", 2.1, "s", 2.0, at_most=True).reached is False
    assert Bar("", None, "x", 0.9).reached is None


def test_a_store_of_any_size_is_made_of_a_small_one(photographs: Path, tmp_path: Path) -> None:
    pack(ImageFolder(photographs), tmp_path / "store", options=PackOptions(check="structure"))
    store, large = ImageStore.open(tmp_path / "store"), ImageStore.open(
        repeat_store(tmp_path / "store", tmp_path / "large", 1000)
    )  # fmt: skip
    assert len(large) == 1000
    assert large.read([7, 47, 967]) == store.read([7, 7, 7])


def test_wrong_arguments_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["store", "--images", "3"], "3 must be at least 64"),
        (["store", "--only", "speed"], "invalid choice: 'speed'"),
        ([], "required"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert says in capsys.readouterr().err
    assert main(["store", "--images", "64", "--only", "reads", "memory"]) == 1
    assert "--images 64 is too few for the group memory" in capsys.readouterr().err
