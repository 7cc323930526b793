"""What the measurements of docs/results.md share that train a small network on images of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paws_hpc.data.config import CenterCropConfig, ViewsConfig
from paws_hpc.data.streams import EvaluationSet, PawsStream
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.engine.evaluate import Representation, forward_set, paws_nn, score
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.objective.config import OBJECTIVES
from paws_hpc.store import ImageStore

CPU, LABELS = torch.device("cpu"), 4


def accuracies(
    train: ImageStore, scored: Sequence[ImageStore], *, objective: str = "paws", views: ViewsConfig, classes: int,
    batch_size: int, epochs: int, seed: int,
) -> list[float]:  # fmt: skip
    """PAWS-NN on stores after pre-training on ``train``, with four labelled images of each of the first classes."""
    random = np.random.default_rng(seed)
    supports = np.concatenate(
        [random.permutation(np.flatnonzero(train.labels == label))[:LABELS] for label in range(classes)]
    )
    stream = PawsStream(
        train, supports, views=views, batch_size=batch_size, support_classes=classes, images_per_class=LABELS,
        seed=seed, threads=1,
    )  # fmt: skip
    training = Pretraining(
        build_encoder(ModelConfig("small_resnet", channels=[16, 32, 64], projection_dim=64), seed=seed),
        objective=OBJECTIVES[objective](support_warmup_fraction=0.33),  # type: ignore[call-arg]
        optimizer=OptimizerConfig("sgd", nesterov=True, start_lr=0.01, peak_lr=0.1, final_lr=0.001, warmup_epochs=1),
        config=PretrainConfig(
            batch_size=batch_size, epochs=epochs, support=SupportConfig(classes, LABELS), precision="fp32",
            log_every_steps=1000,
        ),
        stream=stream, device=CPU,
    )  # fmt: skip
    for step in range(training.total_steps):
        training.step(stream.batch(step))
    encoder, crop = Representation(training.encoder), CenterCropConfig(views.large.size, views.large.size)
    h = forward_set(encoder, EvaluationSet(train, supports, crop, train), CPU)
    labels, results = torch.from_numpy(train.labels[supports]), []
    for store in scored:
        queries = forward_set(encoder, EvaluationSet(store, np.arange(len(store)), crop, train), CPU)
        predictions = paws_nn(queries, h, labels, num_classes=classes, temperature=0.1)
        results.append(score(predictions, torch.tensor(store.labels)).top1)
    return results
