"""The benchmark compares like with like, leaves no candidate out in silence, and one that fails stops no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from paws_hpc.bench.__main__ import main
from paws_hpc.bench.data_path import crops, reads
from paws_hpc.bench.figures import Figure, Measured, Race, measure_groups
from paws_hpc.bench.images import jpegs, repeat_store, write_photographs
from paws_hpc.bench.rounds import CandidateError, Rates, race, ratio, run_once, started
from paws_hpc.packing import ImageFolder, pack
from paws_hpc.store import ImageStore
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


def test_every_candidate_is_in_the_figures_or_the_reason_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "--images", "64", "--rounds", "1", "--folder", str(tmp_path), "--only", "reads"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "photographs-64" / "store.json").read_text())
    assert list(found["groups"]) == ["reads"]
    reads = found["groups"]["reads"]
    for name, rates in reads["rates"].items():
        assert (rates["failure"] is None) == (len(rates["rounds"]) == 1), name
        assert name in printed
    assert {figure["unit"] for figure in reads["figures"]} == {"x"}
    assert all(figure["value"] is not None for figure in reads["figures"])
    assert reads["rates"]["paws_hpc"]["median"] > 0


def test_a_candidate_that_cannot_start_or_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    candidates = {
        "its own fault": partial(bench_work.imported, "absent_library"),
        "fails at once": partial(reads, str(tmp_path / "store"), check=True),
        "fails later": partial(bench_work.count, fail_at=2),
        "good": partial(bench_work.count, fail_at=None),
    }
    rates = race(candidates, rounds=3, cores=1, progress=lambda _: None)
    assert rates["its own fault"].failure == "ModuleNotFoundError: No module named 'absent_library'"
    assert "is not a complete image store" in str(rates["fails at once"].failure)
    assert rates["fails later"] == Rates(failure="ValueError: the disk is gone")
    assert rates["good"].failure is None
    assert len(rates["good"].per_s) == 3
    assert ratio(rates["good"], rates["fails later"]) is None


def test_what_is_ready_in_time_is_measured_though_another_candidate_is_not() -> None:
    """Such as one whose compiler takes minutes."""
    candidates = {"good": partial(bench_work.count, fail_at=None), "slow": bench_work.hang}
    rates = race(candidates, rounds=1, cores=1, limit_s=20, progress=lambda _: None)
    assert "no answer within" in str(rates["slow"].failure)
    assert rates["good"].failure is None
    assert len(rates["good"].per_s) == 1


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
    with started(bench_work.usable_cores, cores=[0]) as work:
        assert work().done == 1


def test_a_candidate_that_hangs_is_killed_with_all_that_it_started() -> None:
    with (
        pytest.raises(CandidateError, match="no answer within 3 s"),
        started(bench_work.hang, cores=[0], limit_s=3) as work,
    ):
        work()


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


def test_a_store_of_any_size_is_made_of_a_small_one(photographs: Path, tmp_path: Path) -> None:
    pack(ImageFolder(photographs), tmp_path / "store")
    repeat_store(tmp_path / "store", tmp_path / "large", 1000)
    store, large = ImageStore(tmp_path / "store"), ImageStore(tmp_path / "large")
    assert len(large) == 1000
    assert large.read_encoded([7, 47, 967]) == store.read_encoded([7, 7, 7])
    assert run_once(partial(crops, str(tmp_path / "store"), threads=2)).done == 0, "of less than a batch"


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
