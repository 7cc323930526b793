"""Choose the best trial by the local validation split, then score the test set, once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.config import Config, sweep_config
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.checkpoint import load_tensors
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.probes import Probe
from paws_hpc.engine.tracking import MetricsFile, read_rows
from paws_hpc.files import file_hash, read_json, write_json
from paws_hpc.metrics import Metric
from paws_hpc.models.encoder import Classifier, Encoder, build_classifier, build_encoder
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.gallery import Scored, write_gallery
from paws_hpc.stages.pretrain import NearestNeighbours, load_pretrained, nearest_neighbours
from paws_hpc.stages.probing import backbone_features, fit_probes, tune
from paws_hpc.stages.run_data import RunData, open_data
from paws_hpc.stages.run_folder import (
    RunFolder,
    check_sweep_is_the_scored_one,
    fine_tuned_trials,
    is_done,
    without_pretraining,
)
from paws_hpc.stages.trackers import is_watched, network, watch
from paws_hpc.store import ImageStore
from paws_hpc.trial import Trial

_METHODS = {"finetune": "fine_tuned", "baseline": "baseline"}
METRICS = [
    Metric(f"test/{method}_top1", f"{name} on the test split", "fraction", label=name, higher_is_better=True)
    for method, name in {
        "paws_nn": "PAWS-NN", "linear_probe": "Linear probe", "k_nn": "k nearest neighbours",
        "fine_tuned": "Fine-tuned", "baseline": "Baseline",
    }.items()
]  # fmt: skip
_SHOWN = ("paws_nn", *_METHODS.values())  # in pictures, by the report


@dataclass(frozen=True)
class Choice:
    """The winner of a sweep.

    Attributes:
        trial: the winner; None if no trial has finished and ``min_trials=0`` lets selection go on without this sweep.
        validation_accuracy: its best, on the local validation split.
        missing: trials without a result.
    """

    trial: Trial | None
    validation_accuracy: float | None
    missing: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For ``selected.json``."""
        value: dict[str, Any] = {"missing": self.missing}
        if self.trial is not None:
            value |= {**self.trial.values, "trial": self.trial.name, "validation_accuracy": self.validation_accuracy}
        return value


def choose(config: Config, run: RunFolder, sweep: str) -> Choice:
    """The trial with the best validation accuracy; of equals the first in the sweep's order.

    Raises:
        ValueError: fewer than ``min_trials`` trials have finished; those that are missing are named.
    """
    settings = sweep_config(config, sweep)
    trials = settings.trials()
    finished = [trial for trial in trials if is_done(run.trial(sweep, trial))]
    missing = [trial.name for trial in trials if trial not in finished]
    if len(finished) < settings.min_trials:
        raise ValueError(
            f"{len(finished)} of the {len(trials)} trials under {run.path / sweep} have finished, but "
            f"{sweep}.min_trials={settings.min_trials}. Missing: {'; '.join(missing)}. Launch the stage {sweep!r} of "
            f"this run again, or ask for fewer with {sweep}.min_trials."
        )
    if not finished:
        return Choice(None, None, missing)
    accuracies = {
        trial: read_json(run.trial(sweep, trial) / "result.json")["validation_accuracy"] for trial in finished
    }
    winner = max(finished, key=lambda trial: accuracies[trial])
    return Choice(winner, accuracies[winner], missing)


@dataclass(frozen=True)
class _Pretrained:
    """What is scored of the pre-trained network itself.

    Attributes:
        encoder: as pre-training left it.
        neighbours: by which PAWS-NN is scored: the same, or tuned for that.
        tuning: how that went; None where it was not asked for.
        probes: of the encoder's features, by method.
    """

    encoder: Encoder
    neighbours: Encoder
    tuning: dict[str, Any] | None
    probes: dict[str, Probe]


@dataclass(frozen=True)
class _Chosen:
    """All that is decided before the test split is read; without pre-training the baseline alone is.

    Attributes:
        sweeps: the winner of each.
        pretrained: None without pre-training.
    """

    sweeps: dict[str, Choice]
    pretrained: _Pretrained | None

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What was chosen for each method that has a choice."""
        probes = {} if self.pretrained is None else self.pretrained.probes
        settings = {method: dict(probe.setting) for method, probe in probes.items()}
        return settings | {
            _METHODS[sweep]: dict(choice.trial.values)
            for sweep, choice in self.sweeps.items()
            if choice.trial is not None
        }

    def as_dict(self, trials: list[str]) -> dict[str, Any]:
        """``selected.json``, where ``trials`` names those of fine-tuning that there were to choose from."""
        value = self.sweeps["finetune"].as_dict() | {"trials": trials, "baseline": self.sweeps["baseline"].as_dict()}
        if self.pretrained is None:
            return value | {"suncet": None}
        value["suncet"] = self.pretrained.tuning
        return value | {method: probe.as_dict() for method, probe in self.pretrained.probes.items()}


def run(context: TorchContext) -> None:
    """Write ``selected.json``, pictures for the report and ``result.json``; once the latter is there, nothing more.

    Where pre-training neither was asked for nor ever began, the supervised baseline is all that is scored.

    Raises:
        ValueError: too few trials have finished, or the result that is there is of another sweep.
        FileNotFoundError: pre-training has begun and not finished.
    """
    config, run, device, control = context.config, context.run, context.device, context.control
    if run.result.exists():
        check_sweep_is_the_scored_one(config, run)
        published = run.selection / "metrics.jsonl"  # a job that is killed right after scoring leaves it to the next
        if distributed.is_main() and not (published.exists() and read_rows(published)):
            publish_scores(config, run)
        return
    data = open_data(config)
    chosen = _decide(config, run, data, device, control)
    control.fence()
    if distributed.is_main():
        write_json(run.selected, chosen.as_dict(fine_tuned_trials(config, run)))
    # Only now, with everything chosen, are test images and test labels read (law 7).
    test_store = ImageStore.open(Path(config.data.test))
    test = data.images(config, test_store, np.arange(len(test_store)))
    predictions, nearest = _predict(config, run, data, test, chosen, device=device, control=control)
    control.fence()
    if distributed.is_main():
        shown = {method: values for method, values in predictions.items() if method in _SHOWN}
        write_gallery(run.selection, Scored(test, data.labelled_images(config), nearest, shown))
        scored = {method: score(values, test.labels).as_dict() for method, values in predictions.items()}
        write_json(run.result, _result(config, data, test, chosen, scored))
        publish_scores(config, run)  # last: it may take minutes, and what was scored must not wait for a server


def _decide(config: Config, run: RunFolder, data: RunData, device: torch.device, control: JobControl) -> _Chosen:
    """Choose by the local validation split alone."""
    baseline = choose(config, run, "baseline")
    if without_pretraining(config, run):
        if baseline.trial is None:
            raise ValueError(
                f"{run.path} has nothing to score: neither pre-training nor any trial of the baseline. Launch its "
                "stages first, such as stages=[baseline,selection,report]."
            )
        return _Chosen({"finetune": Choice(None, None, []), "baseline": baseline}, None)
    winner = choose(config, run, "finetune")
    encoder, _ = load_pretrained(config, run, data, device)
    probes = fit_probes(encoder, data, config, device, control)
    neighbours, tuning = encoder, None
    if config.suncet.steps:
        neighbours = copy.deepcopy(encoder)
        tuning = tune(neighbours, data, config, device, control=control, weights=run.tuned)
    return _Chosen({"finetune": winner, "baseline": baseline}, _Pretrained(encoder, neighbours, tuning, probes))


def _predict(
    config: Config,
    run: RunFolder,
    data: RunData,
    test: EvaluationSet,
    chosen: _Chosen,
    *,
    device: torch.device,
    control: JobControl,
) -> tuple[dict[str, Tensor], NearestNeighbours | None]:
    """(N, K) scores of the test images by every method that there is, and PAWS-NN's neighbours if it is among them."""
    predictions: dict[str, Tensor] = {}
    nearest, pretrained = None, chosen.pretrained
    if pretrained is not None:
        nearest = nearest_neighbours(pretrained.neighbours, data, test, config, device)
        predictions["paws_nn"] = nearest.predictions
    for sweep, choice in chosen.sweeps.items():
        if choice.trial is not None:
            classifier, _ = _load_trial(config, run, len(data.classes), device, sweep=sweep, trial=choice.trial)
            predictions[_METHODS[sweep]] = forward_set(classifier, test, device).cpu()
    if pretrained is not None:
        features = backbone_features(pretrained.encoder, test, device, control)
        predictions |= {method: probe.predict(features).cpu() for method, probe in pretrained.probes.items()}
    return predictions, nearest


def _result(
    config: Config, data: RunData, test: EvaluationSet, chosen: _Chosen, scored: dict[str, Any]
) -> dict[str, Any]:
    """``result.json``."""
    settings = chosen.settings
    return {
        "labels": len(data.labelled),
        "validation_labels": len(data.validation_split.keys),
        "classes": list(data.classes),
        "seed": config.seed,
        "pretrained": chosen.pretrained is not None,
        "missing": {sweep: choice.missing for sweep, choice in chosen.sweeps.items()},
        "test": {"count": len(test)} | {method: scores | settings.get(method, {}) for method, scores in scored.items()},
        "digests": data.digests | {"test": test.store.digest},
    }


def publish_scores(config: Config, run: RunFolder) -> None:
    """Show the test scores of ``result.json`` in Weights & Biases, as a run like those of the other stages."""
    if not is_watched(config):
        return
    test, selected = read_json(run.result)["test"], read_json(run.selected)
    row = {f"test/{method}_top1": scores["top1"] for method, scores in test.items() if method != "count"}
    used = None
    if (name := selected.get("trial")) is not None:
        best = run.trial("finetune", Trial.parse(name)) / "best.pt"
        used = network(run, f"finetune/{name}", best.name, file_hash(best))
    with (
        MetricsFile(run.selection / "metrics.jsonl", resume_step=0) as file,
        watch(config, run, run.selection, job="selection", used=used),
    ):
        file.log(0, row)


def load_neighbours(config: Config, run: RunFolder, data: RunData, device: torch.device) -> tuple[Encoder, bool]:
    """The encoder by which PAWS-NN is scored, and whether it was tuned for that after pre-training.

    Raises:
        FileNotFoundError: pre-training or, where the config asks for it, tuning has not finished.
    """
    encoder, _ = load_pretrained(config, run, data, device)
    if not config.suncet.steps:
        return encoder, False
    if not run.tuned.exists():
        raise FileNotFoundError(f"{run.tuned} is missing: run the stage 'selection' of this run first, which tunes.")
    encoder.load_state_dict(load_tensors(run.tuned, device))
    return encoder, True


def load_winner(config: Config, run: RunFolder, num_classes: int, device: torch.device) -> tuple[Classifier, Path]:
    """The fine-tuned network that selection chose, and the file that holds its weights.

    Raises:
        FileNotFoundError: none is chosen yet.
        ValueError: selection went on without fine-tuned networks.
    """
    if not run.selected.exists():
        raise FileNotFoundError(
            f"{run.selected} is missing: no fine-tuned network is chosen yet. Run the stage 'selection' of this run "
            "first."
        )
    selected = read_json(run.selected)
    if "trial" not in selected:
        raise ValueError(
            f"{run.selected} names no fine-tuned network: selection went on without one, as finetune.min_trials=0 "
            "allowed or without pre-training."
        )
    trial = Trial.parse(selected["trial"])
    return _load_trial(config, run, num_classes, device, sweep="finetune", trial=trial)


def _load_trial(
    config: Config, run: RunFolder, num_classes: int, device: torch.device, *, sweep: str, trial: Trial
) -> tuple[Classifier, Path]:
    classifier = build_classifier(build_encoder(config.model, seed=config.seed), num_classes).to(device)
    best = run.trial(sweep, trial) / "best.pt"
    classifier.load_state_dict(load_tensors(best, device))
    return classifier, best
