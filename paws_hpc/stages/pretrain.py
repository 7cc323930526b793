"""The stage that pre-trains the encoder: frozen config → ``pretrain/`` with its last checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.config import Config, Identity, identity
from paws_hpc.data.samplers import Positions
from paws_hpc.data.streams import EvaluationSet, PawsStream, StreamOptions
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.evaluate import Representation, Scores, forward_set, paws_nn, score
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.engine.pretrain_loop import pretrain
from paws_hpc.engine.tracking import Row
from paws_hpc.files import file_hash, read_json, write_json
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.crop_grid import write_crop_grid
from paws_hpc.stages.run_data import RunData, open_data, order_identity, stream_options
from paws_hpc.stages.run_folder import RunFolder, is_done, mark_done
from paws_hpc.stages.start import start_identity, starting_encoder
from paws_hpc.stages.trackers import open_trackers
from paws_hpc.store import ImageStore


def run(context: TorchContext) -> None:
    """Pre-train, or continue from the newest valid checkpoint, or return at once if it is done.

    Raises:
        PreemptedError: it was asked to stop, and the state is saved.
    """
    config, run, device, control = context.config, context.run, context.device, context.control
    if is_done(run.pretrain):
        return
    data = open_data(config, control=control)
    options = stream_options(config, data, device)
    with data.caching() as cached:
        _train(config, run, cached, options, control=control)


def _train(config: Config, run: RunFolder, data: RunData, options: StreamOptions, *, control: JobControl) -> None:
    stream, device = open_stream(config, data, options), options.device
    training = make_training(config, stream)
    checkpoints = checkpoint_folder(config, run, data, control)
    start = checkpoints.resume(training, device)
    if distributed.is_main() and not (run.pretrain / "crops.png").exists():
        write_crop_grid(run.pretrain / "crops.png", stream)

    def validate() -> Row:
        scores = score_nearest_neighbours(
            training.result, data, data.validation_images(config), config, device, control=control
        )
        return {"val/paws_nn_top1": scores.top1}

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
    with job as tracker:
        summary = pretrain(
            training,
            checkpoints=checkpoints,
            tracker=tracker,
            start=start,
            validate=validate,
            describe=lambda records: names(data.train, records),
            control=control,
        )
    control.fence()
    if distributed.is_main():
        write_json(run.pretrain / "summary.json", asdict(summary) | {"digests": data.digests})
        mark_done(run.pretrain, steps=summary.steps)


def open_stream(config: Config, data: RunData, options: StreamOptions) -> PawsStream:
    """The stream that pre-training takes its steps' images from."""
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
        options=replace(options, compile_augmentation=config.pretrain.compile),
    )


def make_training(config: Config, stream: PawsStream) -> Pretraining:
    """Pre-training before its first step, on the stream's device."""
    return Pretraining(
        starting_encoder(config),
        objective=config.objective,
        optimizer=config.optimizer,
        config=config.pretrain,
        stream=stream,
        device=stream.options.device,
    )


def names(store: ImageStore, records: Positions) -> list[str]:
    """Keys of records, for messages."""
    return [store.keys[int(record)] for record in records]


def checkpoint_folder(
    config: Config, run: RunFolder, data: RunData, control: JobControl = UNATTENDED
) -> CheckpointFolder:
    """The checkpoints of a run's pre-training, bound to what determines them."""
    determined: Identity = identity(config, "seed", "views", "model", "objective", "optimizer", "pretrain")
    determined |= order_identity(config, data) | start_identity(config)
    determined |= {f"digest.{name}": digest for name, digest in data.digests.items() if name != "validation"}
    return CheckpointFolder(
        run.checkpoints,
        identity=determined,
        keep=config.pretrain.keep_checkpoints,
        accept_changes=tuple(config.accept_changes),
        fence=control.fence,
    )


def load_pretrained(config: Config, run: RunFolder, data: RunData, device: torch.device) -> tuple[Encoder, str]:
    """What a finished pre-training left, and the checksum of its checkpoint.

    With ``pretrain.ema`` it is the average of the encoder's weights, otherwise the encoder as it was last.

    Raises:
        FileNotFoundError: pre-training has not finished.
    """
    if not is_done(run.pretrain):
        raise FileNotFoundError(f"{run.pretrain} is not done: run the stage 'pretrain' of this run first.")
    checkpoint = checkpoint_folder(config, run, data).newest(device)
    steps = read_json(run.pretrain / "DONE")["steps"]
    if checkpoint is None or checkpoint.step != steps:
        raise FileNotFoundError(
            f"{run.checkpoints} holds no valid checkpoint of step {steps}, where pre-training ended. Remove "
            f"{run.pretrain / 'DONE'} and launch again to train from the newest valid one."
        )
    encoder = build_encoder(config.model, seed=config.seed)
    encoder.load_state_dict(checkpoint.state["encoder" if config.pretrain.ema is None else "average"])
    return encoder.to(device, torch.float32), file_hash(run.checkpoint(checkpoint.step))


@dataclass(frozen=True)
class NearestNeighbours:
    """PAWS-NN of N images with the M labelled images as support, in the CPU's memory.

    Attributes:
        predictions: (N, K) probabilities.
        queries: (N, D) representations of the images.
        supports: (M, D) of the labelled images.
    """

    predictions: Tensor
    queries: Tensor
    supports: Tensor


def nearest_neighbours(
    encoder: Encoder,
    data: RunData,
    images: EvaluationSet,
    config: Config,
    device: torch.device,
    *,
    control: JobControl = UNATTENDED,
) -> NearestNeighbours:
    """PAWS-NN on ``images``, with the labelled images as support; ``control`` may interrupt."""
    network, labelled = Representation(encoder), data.labelled_images(config)
    queries = forward_set(network, images, device, control)
    supports = forward_set(network, labelled, device, control)
    predictions = paws_nn(
        queries,
        supports,
        labelled.labels.to(device),
        num_classes=len(data.classes),
        temperature=config.objective.temperature,
    )
    return NearestNeighbours(predictions.cpu(), queries.cpu(), supports.cpu())


def score_nearest_neighbours(
    encoder: Encoder,
    data: RunData,
    images: EvaluationSet,
    config: Config,
    device: torch.device,
    *,
    control: JobControl = UNATTENDED,
) -> Scores:
    """How well PAWS-NN classifies ``images``; see :func:`nearest_neighbours`."""
    nearest = nearest_neighbours(encoder, data, images, config, device, control=control)
    return score(nearest.predictions, images.labels)
