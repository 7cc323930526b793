"""The stage that pre-trains the encoder: frozen config → ``pretrain/`` with its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext

import torch

from paws_hpc import distributed
from paws_hpc.config import Config
from paws_hpc.data.streams import PawsStream
from paws_hpc.engine.loop import train
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.engine.tracking import Row
from paws_hpc.files import write_record
from paws_hpc.progress import doing
from paws_hpc.provenance import processor
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.crop_grid import write_crop_grid
from paws_hpc.stages.networks import checkpoint_folder, starting_encoder
from paws_hpc.stages.probing import validation_accuracy
from paws_hpc.stages.run_data import RunData, open_data, order_window
from paws_hpc.stages.run_folder import RunFolder, is_done, mark_done
from paws_hpc.stages.trackers import open_trackers


def run(context: TorchContext) -> None:
    """Pre-train, or continue from the newest valid checkpoint, or return at once if it is done.

    Raises:
        PreemptedError: the job must stop, and the state is saved.
    """
    run, control = context.run, context.control
    if is_done(run.pretrain):
        return
    data = open_data(context.config, control=control)
    with data.caching() as cached, _compiler_cache(run, context.config, context.device) as keep:
        _train(run, cached, context.device, control, begun=keep)


def _compiler_cache(run: RunFolder, config: Config, device: torch.device) -> AbstractContextManager[Callable[[], None]]:
    if config.pretrain.execution_on(device.type) == "eager":
        return nullcontext(lambda: None)
    from paws_hpc.engine.compiler_cache import compiler_cache  # noqa: PLC0415 - loads the compiler, which takes seconds

    return compiler_cache(run.compiled, device)


def _train(
    run: RunFolder, data: RunData, device: torch.device, control: JobControl, *, begun: Callable[[], None]
) -> None:
    config, stream, began = data.config, open_stream(data, device), time.monotonic()
    doing("building the network")
    training = make_training(config, stream)
    checkpoints = checkpoint_folder(run, data, control)
    start = checkpoints.resume(training.load_state_dict, device)
    if distributed.is_main() and not (run.pretrain / "crops.png").exists():
        write_crop_grid(run.pretrain / "crops.png", stream)
    job = open_trackers(
        config,
        run,
        run.pretrain,
        job="pretrain",
        start=start,
        total_steps=training.total_steps,
        awaits_validation=training.awaits_validation(start),
        made=run.checkpoint(training.total_steps),
    )

    def validate() -> Row:
        accuracy = validation_accuracy(training.result, data, device, control)
        return {} if accuracy is None else {"val/paws_nn_top1": accuracy}

    with closing(training), job as tracker:
        if config.pretrain.execution_on(device.type) != "eager":
            doing("first step, which is compiled: minutes at the first start, seconds later")
        train(
            training,
            checkpoints=checkpoints,
            tracker=tracker,
            start=start,
            validate=validate,
            describe=lambda records: [data.train.keys[int(record)] for record in records],
            control=control,
            begun=begun,
        )
    control.fence()
    if distributed.is_main():
        summary = {
            "steps": training.total_steps,
            "collapsed": training.collapsed,
            "seconds": time.monotonic() - began,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "digests": data.digests,
        }
        write_record(run.pretrain / "summary.json", summary)
        mark_done(run.pretrain, steps=training.total_steps)


def open_stream(data: RunData, device: torch.device) -> PawsStream:
    """The stream that pre-training takes its steps' images from."""
    config = data.config
    return PawsStream(
        data.train,
        data.labelled,
        views=config.views,
        batch_size=config.pretrain.batch_size,
        support_classes=config.pretrain.support.classes,
        images_per_class=config.pretrain.support.images_per_class,
        seed=config.seed,
        threads=config.data.threads,
        accumulate_steps=config.pretrain.accumulate_steps,
        supports=data.supports,
        window=order_window(data),
        balanced_support=config.data.support_order == "balanced",
        device=device,
        compile_augmentation=config.pretrain.execution_on(device.type) != "eager",
    )


def make_training(config: Config, stream: PawsStream) -> Pretraining:
    """Pre-training before its first step, on the stream's device."""
    return Pretraining(
        starting_encoder(config),
        objective=config.objective,
        optimizer=config.optimizer,
        config=config.pretrain,
        stream=stream,
        device=stream.device,
    )
