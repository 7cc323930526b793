"""SuNCEt fine-tuning of a pre-trained encoder for nearest neighbours, as the paper does it for CIFAR10 (Appendix C).

Legend: K classes, c images of each per step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from paws_hpc import distributed
from paws_hpc.data.samplers import SupportSampler
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.config import SuncetConfig
from paws_hpc.engine.parallel import replicate
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective.labels import class_labels
from paws_hpc.objective.nce import supervised_nce


def fine_tune_with_suncet(
    encoder: Encoder,
    labelled: EvaluationSet,
    config: SuncetConfig,
    *,
    temperature: float,
    seed: int,
    device: torch.device,
    control: JobControl = UNATTENDED,
) -> list[float]:
    """Train backbone and projection head, in place, so that labelled images are neighbours of their class.

    Batch normalisation keeps its statistics; its gains and biases train. Nothing is random but the draw of images,
    which is a function of seed and step, so an interrupted one is repeated from the pre-trained weights.

    The encoder is on ``device`` and is left in evaluation mode. Returns the loss before each step, in nats.

    Raises:
        ValueError: a class has a single labelled image, or the images of a step do not divide by the ranks.
        Interrupted: by ``control``, before a step.
    """
    classes = labelled.store.labels[labelled.records]
    counts = np.unique(classes, return_counts=True)[1]
    per_class = min(config.images_per_class, int(counts.min()))
    if per_class < 2:
        raise ValueError(
            f"suncet.steps={config.steps} needs two labelled images of every class, and one class has 1. "
            "Label more, or set suncet.steps=0."
        )
    distributed.check_divides(
        len(counts) * per_class, distributed.world_size(), name="classes * suncet.images_per_class"
    )
    order = SupportSampler(labelled.records, classes, num_classes=len(counts), images_per_class=per_class, seed=seed)
    network = nn.Sequential(encoder.backbone, encoder.projection)
    encoder.eval()
    dtype = next(network.parameters()).dtype
    replica = replicate(network, device)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate, momentum=0.9)
    losses = []
    for step in range(config.steps):
        control.check()
        drawn = order.draw(step)
        images = torch.cat(list(replace(labelled, records=drawn.records).batches(device, dtype)))
        labels = class_labels(torch.from_numpy(drawn.class_indices), len(counts), smoothing=0.0, device=device)
        lr = warmup_cosine(step, peak=config.learning_rate, final=0.0, total_steps=config.steps)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss = supervised_nce(distributed.gather_rows(replica(images)), labels, temperature=temperature)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []
