"""Points of a sweep: names, and what they set."""

from __future__ import annotations

import random

import pytest

from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.trial import Trial, axes, number, trials


def test_every_trial_is_known_by_its_name() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        values = {"learning_rate": 10 ** rng.uniform(-9, 9), "epochs": rng.randint(1, 10**6), "crop.size": rng.random()}
        trial = Trial({field: values[field] for field in rng.sample(sorted(values), rng.randint(1, 3))})
        found = Trial.parse(trial.name)
        assert found == trial
        assert found.name == trial.name
        assert not set(trial.name) & set("/\\ ;:*?\"'")


def test_equal_values_have_one_name() -> None:
    assert Trial({"learning_rate": 5e-2, "epochs": 30.0}).name == "lr=0.05,epochs=30"
    assert Trial.parse("lr=5e-2,epochs=030") == Trial({"learning_rate": 0.05, "epochs": 30})
    assert [number(value) for value in (1, 1.0, 1e-5, 0.1 + 0.2)] == ["1", "1", "1e-05", "0.30000000000000004"]


@pytest.mark.parametrize("name", ["logs", "", "lr=x,epochs=3", "lr=0.1,,", "=3", "lr=nan", "lr=inf"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not the name of a trial, such as 'lr=0.05,epochs=30'"):
        Trial.parse(name)


def test_a_sweep_over_any_field_is_in_the_order_of_the_config_and_sets_it() -> None:
    sweep = {"weight_decay": [0, 1e-4], "crop.size": [16, 32], "learning_rate": [0.1]}
    config = ClassifierConfig(sweep, epochs=7)
    config.check("finetune")
    points = config.trials()
    assert points == trials(config.sweep)
    assert [point.name for point in points[:2]] == [
        "lr=0.1,weight_decay=0,crop.size=16", "lr=0.1,weight_decay=0,crop.size=32",
    ]  # fmt: skip
    assert axes(points) == {"learning_rate": [0.1], "weight_decay": [0, 1e-4], "crop.size": [16, 32]}
    own = config.of_trial(points[-1])
    assert (own.learning_rate, own.epochs, own.weight_decay, own.crop.size) == (0.1, 7, 1e-4, 32)
    assert config.crop.size == 224, "the config itself stays as it is"


def test_null_takes_a_field_out_of_the_sweep() -> None:
    config = ClassifierConfig({"learning_rate": [0.1, 0.2], "epochs": None}, epochs=7)
    config.check("finetune")
    assert [trial.name for trial in config.trials()] == ["lr=0.1", "lr=0.2"]
