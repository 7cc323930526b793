"""Labels, configuration, the support warm-up, diagnostics and the collapse monitor; what bad input is told."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from paws_hpc.objective.config import ObjectiveConfig
from paws_hpc.objective.diagnostics import CollapseMonitor, diagnose
from paws_hpc.objective.labels import class_labels, smooth_labels
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import sharpen, soft_nearest_neighbours
from paws_hpc.objective.paws import paws_loss, support_warmup_weight

# --- labels ---------------------------------------------------------------------------------------------------------


def test_smoothed_labels_of_two_classes() -> None:
    labels = smooth_labels(torch.tensor([1, 0, 1], dtype=torch.int32), 2, smoothing=0.1)
    torch.testing.assert_close(labels, torch.tensor([[0.05, 0.95], [0.95, 0.05], [0.05, 0.95]]))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_out_of_range_is_an_error(smoothing: float) -> None:
    for labels in (smooth_labels, partial(class_labels, device=torch.device("cpu"))):
        with pytest.raises(ValueError, match="smoothing"):
            labels(torch.tensor([0]), 2, smoothing=smoothing)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_outside_the_support_set_is_an_error(wrong: int) -> None:
    """Classes are numbered within the sample; a data set's class number must not pass as a row without a label."""
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        smooth_labels(torch.tensor([0, wrong]), 3, smoothing=0.1)
    with pytest.raises(ValueError, match=f"entry {wrong}, out of bounds for num_classes=3"):
        class_labels(torch.tensor([0, wrong]), 3, smoothing=0.1, device=torch.device("cpu"))


# --- bad shapes -----------------------------------------------------------------------------------------------------


def rows(count: int, features: int = 4) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(count))


LABELS = smooth_labels(torch.arange(3).repeat(2), 3, smoothing=0.1)


@pytest.mark.parametrize(
    ("anchors", "targets", "small", "message"),
    [
        (rows(9), rows(4), 2, "9 anchor rows are not 2 large and num_small_crops=2"),
        (rows(0), rows(0), 2, "0 anchor rows"),
        (rows(8), rows(8), 2, "8 target rows: 8 anchor rows with num_small_crops=2 need 4"),
        (rows(8), rows(4), -1, "num_small_crops=-1 is negative"),
    ],
)
def test_rows_that_are_not_views_of_images(
    anchors: torch.Tensor, targets: torch.Tensor, small: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paws_loss(anchors, rows(6), targets, rows(6), LABELS, num_small_crops=small)


def test_supports_and_labels_must_go_together() -> None:
    with pytest.raises(ValueError, match="one row for each of the 5 supports"):
        soft_nearest_neighbours(rows(2), rows(5), LABELS, temperature=0.1)
    classes = class_labels(torch.arange(3).repeat(2), 3, smoothing=0.1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"support_labels \(6, 3\) must be .* one row for each of the 5 supports"):
        soft_nearest_neighbours(rows(2), rows(5), classes, temperature=0.1)
    with pytest.raises(ValueError, match="of one D"):
        soft_nearest_neighbours(rows(2, 3), rows(6), LABELS, temperature=0.1)
    with pytest.raises(ValueError, match="at least"):
        soft_nearest_neighbours(rows(2), rows(0), LABELS[:0], temperature=0.1)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.* is not a positive number"):
        soft_nearest_neighbours(rows(2), rows(6), LABELS, temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature=.* is not a positive number"):
        sharpen(LABELS, temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature=.* is not a positive number"):
        nt_xent(rows(4), temperature=temperature)


def test_contrastive_losses_need_something_to_contrast_with() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        supervised_nce(rows(1), LABELS[:1], temperature=0.1)
    with pytest.raises(ValueError, match="2n"):
        nt_xent(rows(5), temperature=0.1)


def test_a_class_with_a_single_row_has_an_infinite_nce_rather_than_a_wrong_one() -> None:
    classes = torch.tensor([0, 0, 1, 1, 2])
    assert supervised_nce(rows(5), smooth_labels(classes, 3, smoothing=0.0), temperature=0.1) == math.inf
    assert supervised_nce(rows(5), smooth_labels(classes, 3, smoothing=0.1), temperature=0.1).isfinite()


# --- configuration --------------------------------------------------------------------------------------------------


def test_default_objective_is_the_papers() -> None:
    config = ObjectiveConfig()
    assert (config.temperature, config.sharpening, config.label_smoothing, config.me_max) == (0.1, 0.25, 0.1, True)
    assert config.support_warmup_fraction == 0  # ours, so it is asked for


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("sharpening", 0.0),
        ("sharpening", 4.0),
        ("target_floor", -1e-4),
        ("target_floor", 1.0),
        ("label_smoothing", 1.0),
        ("label_smoothing", math.nan),
        ("support_warmup_fraction", 1.5),
        ("support_warmup_fraction", -0.5),
        ("support_warmup_weight", -1.0),
    ],
)
def test_an_impossible_objective_names_its_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{field}={value}"):
        ObjectiveConfig(**{field: value})


def test_support_warmup_falls_linearly_to_zero() -> None:
    weights = [support_warmup_weight(step, total_steps=40, fraction=0.25, weight=2.0) for step in range(40)]
    assert weights[:11] == pytest.approx([2.0 - 0.2 * step for step in range(11)])
    assert not any(weights[10:])


def test_support_warmup_can_be_off() -> None:
    assert support_warmup_weight(0, total_steps=40, fraction=0.0, weight=2.0) == 0
    assert support_warmup_weight(0, total_steps=0, fraction=0.5, weight=2.0) == 0


# --- diagnostics ----------------------------------------------------------------------------------------------------


def test_diagnostics_are_the_named_losses_and_train_nothing() -> None:
    z, h = rows(6 + 16).requires_grad_(), rows(23)[1:]
    objective = ObjectiveConfig(temperature=0.2)
    loss = paws_loss(z[6:], z[:6], h[6:14], h[:6], LABELS, num_small_crops=2, temperature=0.2)
    measured = diagnose(z[6:14], z[:6], LABELS, loss, objective)
    assert not any(value.requires_grad for value in measured.values())
    expected = nt_xent(z[6:14], temperature=0.2).detach()
    assert measured["train/instance_discrimination"] == expected
    expected = supervised_nce(z[:6], LABELS, temperature=0.2).detach()
    assert measured["train/support_classification"] == expected
    assert 1 / 3 < measured["train/confidence"] <= 1


def test_confidence_is_that_of_sharpened_targets() -> None:
    z = torch.eye(4).repeat(2, 1)[:6]
    labels = smooth_labels(torch.tensor([0, 1, 0, 1, 0, 1]), 2, smoothing=0.1)
    loss = paws_loss(rows(4), z, torch.zeros(4, 4), z, labels, num_small_crops=0)
    assert loss.confidence == pytest.approx(0.5)  # a zero vector resembles every support alike


LOG_K = math.log(10)


@pytest.mark.parametrize(
    ("consistency", "me_max", "collapsed"),
    [
        (LOG_K, -LOG_K, True),
        (0.985 * LOG_K, -0.985 * LOG_K, True),
        (1.5 * LOG_K, -LOG_K, True),
        (0.97 * LOG_K, -LOG_K, False),  # predictions are not uniform
        (LOG_K, -0.97 * LOG_K, False),  # all predictions favour one class
        (0.1, -LOG_K, False),  # what training should reach
        (math.nan, math.nan, False),
    ],
)
def test_what_counts_as_collapse(consistency: float, me_max: float, collapsed: bool) -> None:
    assert CollapseMonitor(10, patience=1).update(consistency, me_max) is collapsed


def test_collapse_needs_consecutive_steps() -> None:
    monitor = CollapseMonitor(10, patience=3)
    verdicts = [monitor.update(c * LOG_K, -LOG_K) for c in (1, 1, 0.5, 1, 1, 1, 1, 0.5)]
    assert verdicts == [False, False, False, False, False, True, True, False]


def test_collapse_monitor_continues_after_a_restart() -> None:
    before, after = CollapseMonitor(10, patience=3), CollapseMonitor(10, patience=3)
    before.update(LOG_K, -LOG_K)
    before.update(LOG_K, -LOG_K)
    after.load_state_dict(before.state_dict())
    assert after.update(LOG_K, -LOG_K)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_classes": 10, "tolerance": 1.0}, r"tolerance=1\.0"),
        ({"num_classes": 10, "patience": 0}, "patience=0"),
    ],
)
def test_an_impossible_monitor_is_an_error(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CollapseMonitor(**arguments)
