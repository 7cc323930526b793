"""The benchmark compares like with like, leaves no candidate out in silence, and one that fails stops no other."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paws_hpc.bench.__main__ import main
from paws_hpc.bench.data_path import CROP_GROUPS, crops_by_processes, reads
from paws_hpc.bench.figures import Figure, Measured, Race, measure_groups
from paws_hpc.bench.images import jpegs, repeat_store, write_photographs
from paws_hpc.bench.peers.loaders import cut, drawn_boxes
from paws_hpc.bench.rounds import Candidate, CandidateError, Rates, Round, race, ratio, run_once, started
from paws_hpc.data.crops import resized_crops
from paws_hpc.packing import ImageFolder, PackOptions, pack
from paws_hpc.store import ImageStore, decode_jpeg
from tests.unit import bench_work


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), 40)


def test_photographs_are_as_large_as_imagenets_and_the_same_every_time(photographs: Path, tmp_path: Path) -> None:
    files = jpegs(photographs)
    assert [int(path.stem) for path in files] == list(range(40))
    assert 100_000 < sum(path.stat().st_size for path in files) / 40 < 120_000
    again = jpegs(write_photographs(tmp_path, 40))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]
    assert len({path.read_bytes() for path in files}) == 40


def test_peers_make_the_crops_that_we_make(photographs: Path) -> None:
    boxes = drawn_boxes(str(photographs))
    for number, path in enumerate(jpegs(photographs)[:8]):
        jpeg = path.read_bytes()
        theirs = cut(jpeg, number, boxes)
        image = torch.from_numpy(decode_jpeg(jpeg)).permute(2, 0, 1)
        for (crop, _), of_group, crops in zip(CROP_GROUPS, boxes, theirs, strict=True):
            mine = resized_crops([image], of_group[number][None], torch.empty_like(crops)[:, None])[:, 0]
            assert crops.shape == (crop.count, 3, crop.size, crop.size)
            assert (crops.int() - mine.int()).abs().max() <= 1


def test_every_candidate_is_in_the_figures_or_the_reason_why_not(
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
            assert (rates["failure"] is None) == (len(rates["rounds"]) == 1), name
            assert name in printed
    webdataset = importlib.util.find_spec("webdataset") is not None
    assert ("not installed: pip install webdataset" in printed) != webdataset
    assert (found["machine"]["versions"]["webdataset"] is not None) == webdataset
    reads = found["groups"]["reads"]
    assert {figure["unit"] for figure in reads["figures"]} == {"x"}
    assert [figure["value"] is not None for figure in reads["figures"]] == [True, True, True, webdataset]
    assert reads["rates"]["paws_hpc"]["median"] > 0


def test_a_candidate_that_cannot_start_or_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    needs = ("absent_peer", "absent-package")
    (tmp_path / "store").mkdir()
    candidates = [
        Candidate("absent", bench_work.absent_peer, needs=needs),
        Candidate("its own fault", bench_work.absent_peer, needs=("other", "other")),
        Candidate("fails at once", reads, {"store": str(tmp_path / "store"), "check": True}),
        Candidate("fails later", bench_work.count, {"fail_at": 2}),
        Candidate("good", bench_work.count, {"fail_at": None}),
    ]
    rates = race(*candidates, rounds=3, cores=1, progress=lambda _: None)
    assert rates["absent"].failure == "not installed: pip install absent-package, or all of them by `make bench`"
    assert rates["its own fault"].failure == "ModuleNotFoundError: No module named 'absent_peer'"
    assert "is not a complete image store" in str(rates["fails at once"].failure)
    assert rates["fails later"].failure == "ValueError: the disk is gone"
    assert rates["fails later"].rounds == []
    assert rates["good"].failure is None
    assert len(rates["good"].per_s) == 3
    assert ratio(rates["good"], rates["fails later"]) is None


def test_a_group_that_cannot_be_measured_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(race: Race) -> Measured:
        raise CandidateError("out of memory")

    def measure(file: str, **groups: Callable[[Race], Measured]) -> int:
        return measure_groups("title", groups, prepare=lambda: None, rounds=1, about={}, file=tmp_path / file)

    def good(race: Race) -> Measured:
        return {}, [Figure("step", 2.0, "ms")]

    assert measure("json", checkpoint=fail, step=good) == 1
    assert measure("alone", step=good) == 0
    written = json.loads((tmp_path / "json").read_text())["groups"]
    assert written["checkpoint"]["figures"][0]["absent"] == "failed: out of memory"
    assert written["step"]["figures"][0]["value"] == 2.0
    assert "not measured: failed: out of memory" in capsys.readouterr().out


def test_a_candidate_is_bound_to_its_cores() -> None:
    with started(Candidate("cores", bench_work.usable_cores), cores=[0]) as work:
        assert work().done == 1
    assert run_once(bench_work.usable_cores).done >= 1


def test_a_candidate_that_hangs_is_killed_with_all_that_it_started() -> None:
    with (
        pytest.raises(CandidateError, match="gave no answer within 3 s"),
        started(Candidate("hang", bench_work.hang), cores=[0], limit_s=3) as work,
    ):
        work()


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine was three times as slow in the second round: both were."""

    def rates(*per_s: float) -> Rates:
        return Rates("", rounds=[Round(each, 1.0) for each in per_s])

    assert ratio(rates(300, 100, 330), rates(150, 50, 150)) == 2.0


@pytest.mark.parametrize(
    ("value", "at_most", "only_on", "reached"),
    [
        (0.95, False, None, True),
        (0.89, False, None, False),
        (0.95, True, None, False),
        (None, False, None, None),
        (0.95, False, "one H100", None),
    ],
)
def test_a_target_is_reached_missed_or_not_measured(
    value: float | None, at_most: bool, only_on: str | None, reached: bool | None
) -> None:
    assert Figure("", value, "x", 0.9, at_most=at_most, only_on=only_on).reached is reached


def test_processes_of_a_candidate_work_together(photographs: Path, tmp_path: Path) -> None:
    pack(ImageFolder(photographs), tmp_path / "store", options=PackOptions(check="structure"))
    assert run_once(crops_by_processes, store=str(tmp_path / "store"), processes=2).done == 0  # of less than a batch


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
