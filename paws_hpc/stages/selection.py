"""Choose the best trial by the local validation split, then score the test set, once."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.config import Config, sweep_config
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.probes import Probe
from paws_hpc.engine.tracking import MetricsFile, read_rows
from paws_hpc.files import file_hash, read_record, sealed_write, write_record
from paws_hpc.models.encoder import Encoder
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.gallery import write_gallery
from paws_hpc.stages.networks import load_pretrained, load_trial
from paws_hpc.stages.probing import fit_probes, nearest_neighbours, tune
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


Choice = tuple[Trial | None, dict[str, Any]]
"""The winner of a sweep, None without one, and what ``selected.json`` says of it."""


def choose(config: Config, run: RunFolder, sweep: str) -> Choice:
    """The trial with the best validation accuracy; of equals the first in the sweep's order.

    None if no trial has finished and ``min_trials=0`` lets selection go on without this sweep.

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
        return None, {"missing": missing}
    accuracies = {
        trial: read_record(run.trial(sweep, trial) / "result.json")["validation_accuracy"] for trial in finished
    }
    winner = max(finished, key=lambda trial: accuracies[trial])
    summary = {"trial": winner.name, "validation_accuracy": accuracies[winner]}
    return winner, {"missing": missing, **winner.values, **summary}


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
    selected = choices["finetune"][1] | {"trials": fine_tuned_trials(config, run), "baseline": choices["baseline"][1]}
    selected["suncet"] = None
    encoder, neighbours, probes = None, None, {}
    if not without_pretraining(config, run):
        encoder, _ = load_pretrained(run, data, device)
        probes = fit_probes(encoder, data, device, control)
        neighbours = encoder
        if config.suncet.steps:
            neighbours = copy.deepcopy(encoder)
            selected["suncet"] = tune(neighbours, data, device, control, weights=run.tuned)
        selected |= {method: probe.as_dict() for method, probe in probes.items()}
    control.fence()
    if distributed.is_main():
        write_record(run.selected, selected)
    test, validation = data.test_images(), data.validation_split
    scores = {} if test is None else _score(context, data, test, choices, encoder, neighbours=neighbours, probes=probes)
    control.fence()
    if distributed.is_main():
        result = {
            "labels": len(data.labelled),
            "validation_labels": 0 if validation is None else len(validation.keys),
            "folds": len(data.folds()) if validation is None else None,  # of the cross-validation
            "classes": list(data.classes),
            "seed": config.seed,
            "pretrained": encoder is not None,
            "missing": {sweep: summary["missing"] for sweep, (_, summary) in choices.items()},
            "test": {"count": 0 if test is None else len(test)} | scores,
            "digests": data.digests | ({} if test is None else {"test": test.store.digest}),
        }
        write_record(run.result, result)
        publish_scores(config, run)  # last: it may take minutes, and what was scored must not wait for a server


def _score(
    context: TorchContext,
    data: RunData,
    test: EvaluationSet,
    choices: dict[str, Choice],
    encoder: Encoder | None,
    *,
    neighbours: Encoder | None,
    probes: dict[str, Probe],
) -> dict[str, Any]:
    """Score the test set by everything that is chosen: test images and test labels are read only here.

    ``encoder``, whose features ``probes`` take, and ``neighbours``, for PAWS-NN, are None without pre-training.

    Returns:
        Scores and chosen settings by method.
    """
    run, device, control, nearest = context.run, context.device, context.control, None
    predictions: dict[str, Tensor] = {}  # (N, K) scores by method
    settings: dict[str, Mapping[str, float]] = {method: probe.setting for method, probe in probes.items()}
    if neighbours is not None:
        nearest = nearest_neighbours(neighbours, data, test, device)
        predictions["paws_nn"] = nearest.predictions
    for sweep, (trial, _) in choices.items():
        if trial is not None:
            classifier, _ = load_trial(run, data, device, sweep=sweep, trial=trial)
            method = _METHODS[sweep]
            predictions[method], settings[method] = forward_set(classifier, test, device).cpu(), trial.values
    if encoder is not None:
        features = forward_set(encoder.backbone, test, device, control)
        predictions |= {method: probe.predict(features).cpu() for method, probe in probes.items()}
    control.fence()
    if distributed.is_main():
        shown = {method: predictions[method] for method in _SHOWN if method in predictions}
        shown |= {method: values.softmax(dim=1) for method, values in shown.items() if method != "paws_nn"}
        write_gallery(run.selection, test, data.labelled_images(), nearest, shown)
        kind = np.min_scalar_type(len(data.classes))
        guesses: dict[str, Any] = {
            method: values.argmax(dim=1).numpy().astype(kind) for method, values in predictions.items()
        }
        content = io.BytesIO()
        np.savez_compressed(content, labels=test.labels.numpy().astype(kind), **guesses)  # in the test store's order
        with sealed_write(run.selection / "predictions.npz") as file:
            file.write(content.getvalue())
    return {
        method: {**asdict(score(values, test.labels)), **settings.get(method, {})}
        for method, values in predictions.items()
    }


def _choices(config: Config, run: RunFolder) -> dict[str, Choice]:
    baseline = choose(config, run, "baseline")
    if not without_pretraining(config, run):
        return {"finetune": choose(config, run, "finetune"), "baseline": baseline}
    if baseline[0] is None:
        raise ValueError(
            f"{run.path} has nothing to score: neither pre-training nor any trial of the baseline. Launch its "
            "stages first, such as stages=[baseline,selection,report]."
        )
    return {"finetune": (None, {"missing": []}), "baseline": baseline}


def publish_scores(config: Config, run: RunFolder) -> None:
    """Show the test scores of ``result.json`` in Weights & Biases, as a run like those of the other stages."""
    if not is_watched(config):
        return
    test, selected = read_record(run.result)["test"], read_record(run.selected)
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
