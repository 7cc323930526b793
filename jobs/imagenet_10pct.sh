#!/usr/bin/env bash
# ImageNet with 10 % of the labels, ResNet-50.
# Command:  bash jobs/imagenet_10pct.sh [FIELD=VALUE ...]
# Cost:     100 epochs of 312 steps at a global batch of 4,096; 8.2 h on 64 V100 in the paper, not run here.
# Expected: PAWS-NN 71.0 %, fine-tuned 73.9 % (paper).
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Here:     add resources.pretrain.tasks_per_node=8 (and finetune, baseline) to use eight GPUs of this machine.
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch experiment=imagenet_10pct "$@"
