"""One rank of the run that test_training_ranks compares.

    python -m tests.equivalence.train_as_rank FOLDER RANK WORLD DTYPE ACCUMULATE_STEPS RECIPE

Writes ``FOLDER/world-WORLD-DTYPE-ACCUMULATE_STEPS-RECIPE.pt`` from rank 0: ten losses, the weights after ten steps and
their average, and what is communicated in one more step.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from paws_hpc import distributed
from paws_hpc.cluster.rank import join
from paws_hpc.data.config import AugmentConfig
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.models.config import ModelConfig
from paws_hpc.objective.config import PawsConfig
from tests.ranks import Collectives
from tests.tiny import small_vit, tiny_config, training_of

STEPS = 10

RECIPES = {
    "resnet": (
        ModelConfig(name="small_resnet", channels=[8, 16], prediction_head=True),
        OptimizerConfig(name="sgd", start_lr=0.001, peak_lr=0.002, warmup_epochs=0.1),
        PawsConfig(support_warmup_fraction=0.116),
    ),
    "vit": (
        ModelConfig(name="vit_s16"),
        OptimizerConfig(
            name="adamw", start_lr=1e-4, peak_lr=2e-4, warmup_epochs=0.1, weight_decay=0.04, final_weight_decay=0.4
        ),
        PawsConfig(support_warmup_fraction=0.116, true_label_targets=True, entropy_weight=0.5),
    ),
}


def main(folder: Path, rank: int, world: int, dtype: str, accumulate_steps: int, *, recipe: str) -> None:
    """Train ten steps. 40 supports on 4 ranks are 10 each, so that ranks share classes; views are two per support.

    The learning rate is small because ReLU has kinks: in exact arithmetic (fp64), moving the initial weights by one
    part in 2**24 moves the loss by 1e-2 within ten steps at a rate of 0.005, and by 5e-5 at 0.001. At the first rate no
    two orders of summation in fp32 could agree better than that, whatever the number of ranks.
    """
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    if world > 1:
        join(
            folder, start=f"{world}-{dtype}-{accumulate_steps}-{recipe}", rank=rank, world_size=world,
            one_node=True, device=cpu, timeout_s=120,
        )  # fmt: skip
    config = tiny_config(folder / "store", folder / "store", folder)
    config.seed, (config.model, config.optimizer, config.objective) = 3, RECIPES[recipe]
    grey = AugmentConfig(saturation=0.0, hue=0.0, grayscale_probability=0.0, blur_probability=0.0, flip_probability=0.0)
    config.views.large.scale, config.views.augment = [0.5, 1.0], grey
    config.pretrain = PretrainConfig(
        batch_size=32, epochs=1, support=SupportConfig(10, 4), precision=dtype, accumulate_steps=accumulate_steps,
        ema=0.8,
    )  # fmt: skip
    with small_vit():
        training = training_of(config, folder / "store", labels_per_class=6)
    stream = training.stream
    losses: dict[str, list[torch.Tensor]] = {}
    for step in range(STEPS):
        for name, value in training.step(stream.batch(step)).items():
            losses.setdefault(name, []).append(distributed.mean_over_ranks(value))
    if distributed.is_main():
        compared = (
            "train/loss",
            "train/loss_consistency",
            "train/loss_me_max",
            "train/loss_support_nce",
            "train/grad_norm",
        )
        curves = {name: torch.stack(losses[name]).double() for name in compared}
        assert training.average is not None
        weights = {name: value.clone() for name, value in training.encoder.state_dict().items()}
        average = {f"average.{name}": value.clone() for name, value in training.result.state_dict().items()}
    with Collectives() as collectives:
        training.step(stream.batch(STEPS))
    if distributed.is_main():
        results = {"losses": curves, "weights": weights | average, "collectives": dict(collectives.counts)}
        torch.save(results, folder / f"world-{world}-{dtype}-{accumulate_steps}-{recipe}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), recipe=sys.argv[6])
