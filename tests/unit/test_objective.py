"""Labels, configuration, the support warm-up, diagnostics and the collapse monitor; errors for bad input."""

from __future__ import annotations

import math

import pytest
import torch

from paws_hpc.cluster.compose import CONF
from paws_hpc.objective.config import OBJECTIVES, PawsConfig
from paws_hpc.objective.labels import smooth_labels
from paws_hpc.objective.nce import supervised_nce
from paws_hpc.objective.paws import Paws, paws_targets, support_warmup_weight
from tests.objective import labels_for

# --- labels ---------------------------------------------------------------------------------------------------------


def test_smoothed_labels_of_two_classes() -> None:
    labels = smooth_labels(torch.tensor([1, 0, 1], dtype=torch.int32), 2, smoothing=0.1)
    torch.testing.assert_close(labels, torch.tensor([[0.05, 0.95], [0.95, 0.05], [0.05, 0.95]]))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_outside_the_support_set_is_an_error(wrong: int) -> None:
    """Classes are numbered within the sample; a data set's class number must not pass as a row without a label."""
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        smooth_labels(torch.tensor([0, wrong]), 3, smoothing=0.1)
    with pytest.raises(AssertionError, match="numbered within the sampled support set"):
        labels_for(torch.tensor([0, wrong]), 3, 0.1)


def rows(count: int, features: int = 4) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(count))


LABELS = labels_for(torch.arange(3).repeat(2), 3, 0.1)


def test_a_class_with_a_single_row_has_an_infinite_nce_rather_than_a_wrong_one() -> None:
    classes = torch.tensor([0, 0, 1, 1, 2])
    assert supervised_nce(rows(5), labels_for(classes, 3, 0.0), temperature=0.1) == math.inf
    assert supervised_nce(rows(5), labels_for(classes, 3, 0.1), temperature=0.1).isfinite()


# --- configuration --------------------------------------------------------------------------------------------------


def test_default_objective_is_the_papers() -> None:
    config = PawsConfig()
    assert (config.temperature, config.sharpening, config.label_smoothing, config.me_max) == (0.1, 0.25, 0.1, True)
    assert config.support_warmup_fraction == 0  # ours, so it is asked for


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("sharpening", 0.0),
        ("sharpening", 4.0),
        ("label_smoothing", 1.0),
        ("label_smoothing", math.nan),
        ("support_warmup_fraction", 1.5),
        ("support_warmup_fraction", -0.5),
    ],
)
def test_an_impossible_objective_names_its_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{field}={value}"):
        PawsConfig(**{field: value})


def test_support_warmup_falls_linearly_to_zero() -> None:
    weights = [support_warmup_weight(step, total_steps=40, fraction=0.25) for step in range(40)]
    assert weights[:11] == pytest.approx([1.0 - 0.1 * step for step in range(11)])
    assert not any(weights[10:])


def test_support_warmup_can_be_off() -> None:
    assert support_warmup_weight(0, total_steps=40, fraction=0.0) == 0
    assert support_warmup_weight(0, total_steps=0, fraction=0.5) == 0


def test_targets_of_an_image_that_resembles_all_supports_alike_are_uniform() -> None:
    targets = paws_targets(torch.zeros(4, 4), rows(6), LABELS, temperature=0.1, sharpening=0.25)
    torch.testing.assert_close(targets, torch.full((4, 3), 1 / 3))


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
    paws = Paws(PawsConfig(), num_classes=10, total_steps=1)
    assert paws.collapsed({"train/loss_consistency": consistency, "train/loss_me_max": me_max}) is collapsed


def test_without_me_max_its_term_says_nothing_about_collapse() -> None:
    paws = Paws(PawsConfig(me_max=False), num_classes=10, total_steps=1)
    assert paws.collapsed({"train/loss_consistency": LOG_K})


def test_every_objective_has_a_config_group_an_object_and_metrics() -> None:
    assert {path.stem for path in CONF.glob("objective/*.yaml")} == OBJECTIVES.keys()
    for name, config in OBJECTIVES.items():
        objective = config().build(num_classes=3, total_steps=1)
        assert type(objective).__module__ == f"paws_hpc.objective.{name}"
        assert "METRICS" in vars(config)
