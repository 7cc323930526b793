"""The model of scaling prints what its page says, and what a user measured takes the place of its constants."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from paws_hpc.bench import scaling
from paws_hpc.bench.__main__ import main
from paws_hpc.bench.dry_run import BATCH_NORM, GRADIENTS, LOSS, Collective, dry_run
from paws_hpc.bench.scaling import (
    Constants,
    collective_s,
    in_micro_batches,
    on_more_gpus,
    predict,
    read_constants,
)
from tests.ranks import ROOT
from tests.tiny import tiny_config


def test_the_page_has_the_tables_that_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--folder", str(tmp_path)]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2
    assert all(table.strip() in page for table in tables), tables
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert written["constants"] == vars(Constants())
    assert list(written["steps"]) == ["8", "8, accumulate_steps=8", "64", "512", "1024"]


def test_a_collective_takes_its_launch_its_hops_and_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    only = scaling.Protocol(1, ring_s=(10, 100), tree_s=(10, 1000), most=(8, 4))
    monkeypatch.setattr(scaling, "PROTOCOLS", {"only": only})
    monkeypatch.setattr(scaling, "_POST_S", 20)
    constants = Constants(call_s=0.5)
    gather, total = Collective(BATCH_NORM, "allgather_base", 64), Collective(BATCH_NORM, "allreduce", 64)
    assert collective_s(gather, 8, constants) == 1.5 + 7 * 10 + 64 * 7 / 8 / 8
    assert collective_s(total, 8, constants) == 1.5 + 2 * 7 * 10 + 2 * 64 * 7 / 8 / 8
    assert collective_s(gather, 16, constants) == 1.5 + 14 * 20 + 100 + 64 * 15 / 16 / 4
    assert collective_s(total, 1024, constants) == 1.5 + 2 * (7 * 10 + 7 * 1000) + 2 * 64 * 1023 / 1024 / 4


@pytest.mark.parametrize(("port", "bandwidth"), [(50e9, 331e9), (25e9, 200e9)])
def test_large_messages_use_all_network_ports_of_a_node_up_to_what_its_gpus_can_send(
    port: float, bandwidth: float
) -> None:
    one, two = (
        collective_s(Collective(LOSS, "allgather_base", size), 64, Constants(network_bandwidth=port))
        for size in (10**9, 2 * 10**9)
    )
    assert two - one == pytest.approx(10**9 * 63 / 64 / bandwidth)


def test_nothing_overlaps_and_micro_batches_run_without_a_graph() -> None:
    bucket, constants = Collective(GRADIENTS, "allreduce", 1 << 20), Constants(step_s=3, compiled_s=6)
    found = predict([bucket] * 5, gpus=64, constants=constants)
    assert found.gradients_s == pytest.approx(5 * collective_s(bucket, 64, constants))
    assert found.step_s == pytest.approx(3 + found.gradients_s)
    divided = predict([bucket] * 5, gpus=64, constants=constants, accumulate_steps=4)
    assert divided.compute_s == pytest.approx(4 * (6 + 2)), "each micro-batch goes forward once more"


def test_on_more_gpus_what_is_gathered_grows() -> None:
    gather, total = Collective(BATCH_NORM, "allgather_base", 64), Collective(BATCH_NORM, "allreduce", 64)
    grown = on_more_gpus([gather, total], gpus=8, more=32)
    assert [each.bytes for each in grown] == [256, 64]


def test_micro_batches_communicate_what_the_dry_run_says(tmp_path: Path) -> None:
    """Four of them on 4 ranks, from one of the same size on 2 ranks."""
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    config.labels.per_class = 16
    config.pretrain.batch_size, config.pretrain.support.images_per_class = 8, 2
    _, one = dry_run(config, ranks=2)
    config.pretrain.batch_size, config.pretrain.support.images_per_class = 64, 16
    config.pretrain.accumulate_steps = 4
    _, expected = dry_run(config, ranks=4)
    assert in_micro_batches(one, 1) == one
    assert Counter(in_micro_batches(on_more_gpus(one, gpus=2, more=4), 4)) == Counter(expected)


def test_measured_constants_replace_the_models(tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text('{"step_s": 0.5, "call_s": 1e-5}')
    assert read_constants(file) == Constants(step_s=0.5, call_s=1e-5)
    figures = [("small all-reduce", 0.02), ("bandwidth of an all-reduce", 300.0), ("batch normalisation", 1.0)]
    measured = {"groups": {"collectives": {"figures": [{"name": name, "value": value} for name, value in figures]}}}
    file.write_text(json.dumps(measured | {"machine": {"gpus": ["H100"] * 4}}))
    found = read_constants(file)
    assert (found.gpus_per_node, found.node_bandwidth) == (4, 300e9)
    assert collective_s(Collective(LOSS, "allreduce", 4), 4, found) == pytest.approx(2e-5), "hops are not added again"
    file.write_text(json.dumps(measured | {"machine": {"gpus": []}}))
    with pytest.raises(ValueError, match="no collectives of GPUs"):
        read_constants(file)
    file.write_text('{"latency": 1}')
    with pytest.raises(ValueError, match="'latency' is no constant of the model"):
        read_constants(file)
