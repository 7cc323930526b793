#!/usr/bin/env bash
# Table 4 of the paper: which classes and how many images of each make the support mini-batch.
# Command:  bash jobs/paper_table_4.sh [FIELD=VALUE ...]
# Needs:    ImageNet packed (jobs/pack_imagenet.sh) and the paper's lists of labels in shards/splits/
# Cost:     8 chains of 100 epochs of ResNet-50, one of which is refused. Not run here.
# Expected: fine-tuned, 1 % / 10 %: 1000x16 -/74.5 (1 % has 12 or 13 images of a class: a clear error), 960x7 63.8/73.9,
#           960x4 63.7/72.0, 448x8 61.8/70.1.
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Small:    bash jobs/digits_ablations.sh
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/imagenet_1*pct-seed0-support=*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch -m experiment="${EXPERIMENTS:-imagenet_1pct,imagenet_10pct}" 'pretrain.support={classes:1000,images_per_class:16},{classes:960,images_per_class:7},{classes:960,images_per_class:4},{classes:448,images_per_class:8}' "$@"
