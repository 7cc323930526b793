"""Choose the best trial by the local validation split, then score the test set, once."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.config import Config, sweep_config
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.probes import Probe
from paws_hpc.engine.tracking import MetricsFile, read_rows
from paws_hpc.files import file_hash, read_json, write_json
from paws_hpc.models.encoder import Encoder
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.gallery import write_gallery
from paws_hpc.stages.networks import load_pretrained, load_trial
from paws_hpc.stages.probing import NearestNeighbours, fit_probes, nearest_neighbours, tune
from paws_hpc.stages.run_data import RunData, open_data
from paws_hpc.stages.run_folder import (
    RunFolder,
    check_sweep_is_the_scored_one,
    fine_tuned_trials,
    is_done,
    without_pretraining,
)
from paws_hpc.stages.trackers import is_watched, network, watch
from paws_hpc.trial import Trial

_METHODS = {"finetune": "fine_tuned", "baseline": "baseline"}
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
    results = {trial: read_json(run.trial(sweep, trial) / "result.json") for trial in finished}
    accuracies = {trial: result["validation_accuracy"] for trial, result in results.items()}
    winner = max(finished, key=lambda trial: accuracies[trial])
    return Choice(winner, accuracies[winner], missing)


@dataclass(frozen=True)
class _Pretrained:
    """What is scored of the pre-trained network itself.

    Attributes:
        encoder: after pre-training.
        neighbours: by which PAWS-NN is scored: the same one, or a copy after SuNCEt fine-tuning.
        tuning: losses and accuracies of that fine-tuning; None without it.
        probes: of the encoder's features, by method.
    """

    encoder: Encoder
    neighbours: Encoder
    tuning: dict[str, Any] | None
    probes: dict[str, Probe]


def run(context: TorchContext) -> None:
    """Write ``selected.json``, pictures for the report and ``result.json``; once the latter is there, nothing more.

    In a run without pre-training the supervised baseline is all that is scored.

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
    choices = _choices(config, run)
    pretrained = None if without_pretraining(config, run) else _pretrained(run, data, device, control)
    control.fence()
    if distributed.is_main():
        write_json(run.selected, _selected(choices, pretrained, fine_tuned_trials(config, run)))
    # Test images and test labels are read only here, when everything is chosen.
    test = data.test_images()
    predictions, nearest = _predict(run, data, test, choices, pretrained, device=device, control=control)
    control.fence()
    if distributed.is_main():
        shown = {method: values for method, values in predictions.items() if method in _SHOWN}
        write_gallery(run.selection, test, data.labelled_images(), nearest, shown)
        write_json(run.result, _result(data, test, choices, pretrained, predictions))
        publish_scores(config, run)  # last: it may take minutes, and what was scored must not wait for a server


def _choices(config: Config, run: RunFolder) -> dict[str, Choice]:
    baseline = choose(config, run, "baseline")
    if not without_pretraining(config, run):
        return {"finetune": choose(config, run, "finetune"), "baseline": baseline}
    if baseline.trial is None:
        raise ValueError(
            f"{run.path} has nothing to score: neither pre-training nor any trial of the baseline. Launch its "
            "stages first, such as stages=[baseline,selection,report]."
        )
    return {"finetune": Choice(None, None, []), "baseline": baseline}


def _pretrained(run: RunFolder, data: RunData, device: torch.device, control: JobControl) -> _Pretrained:
    encoder, _ = load_pretrained(run, data, device)
    probes = fit_probes(encoder, data, device, control)
    if not data.config.suncet.steps:
        return _Pretrained(encoder, encoder, None, probes)
    neighbours = copy.deepcopy(encoder)
    return _Pretrained(encoder, neighbours, tune(neighbours, data, device, control, weights=run.tuned), probes)


def _selected(choices: dict[str, Choice], pretrained: _Pretrained | None, trials: list[str]) -> dict[str, Any]:
    """``selected.json``; ``trials`` are those of fine-tuning that could have been chosen."""
    value = choices["finetune"].as_dict() | {"trials": trials, "baseline": choices["baseline"].as_dict()}
    if pretrained is None:
        return value | {"suncet": None}
    probes = {method: probe.as_dict() for method, probe in pretrained.probes.items()}
    return value | {"suncet": pretrained.tuning} | probes


def _predict(
    run: RunFolder,
    data: RunData,
    test: EvaluationSet,
    choices: dict[str, Choice],
    pretrained: _Pretrained | None,
    *,
    device: torch.device,
    control: JobControl,
) -> tuple[dict[str, Tensor], NearestNeighbours | None]:
    """(N, K) scores of the test images by every method that there is, and PAWS-NN's neighbours if it is among them."""
    predictions: dict[str, Tensor] = {}
    nearest = None
    if pretrained is not None:
        nearest = nearest_neighbours(pretrained.neighbours, data, test, device)
        predictions["paws_nn"] = nearest.predictions
    for sweep, choice in choices.items():
        if choice.trial is not None:
            classifier, _ = load_trial(run, data, device, sweep=sweep, trial=choice.trial)
            predictions[_METHODS[sweep]] = forward_set(classifier, test, device).cpu()
    if pretrained is not None:
        features = forward_set(pretrained.encoder.backbone, test, device, control)
        predictions |= {method: probe.predict(features).cpu() for method, probe in pretrained.probes.items()}
    return predictions, nearest


def _result(
    data: RunData,
    test: EvaluationSet,
    choices: dict[str, Choice],
    pretrained: _Pretrained | None,
    predictions: dict[str, Tensor],
) -> dict[str, Any]:
    """``result.json``: of each method its scores and the setting that validation chose."""
    scores = {method: asdict(score(values, test.labels)) for method, values in predictions.items()}
    for sweep, choice in choices.items():
        if choice.trial is not None:
            scores[_METHODS[sweep]] |= choice.trial.values
    for method, probe in ({} if pretrained is None else pretrained.probes).items():
        scores[method] |= probe.setting
    return {
        "labels": len(data.labelled),
        "validation_labels": len(data.validation_split.keys),
        "classes": list(data.classes),
        "seed": data.config.seed,
        "pretrained": pretrained is not None,
        "missing": {sweep: choice.missing for sweep, choice in choices.items()},
        "test": {"count": len(test)} | scores,
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
