#!/usr/bin/env bash
# ImageNet with 10 % of the labels, ViT-S/16 and AdamW, beyond the paper.
# Command:  bash jobs/imagenet_10pct_vit.sh [FIELD=VALUE ...]
# Cost:     100 epochs of 1,251 steps at a global batch of 1,024; not run yet.
# Expected: unknown until it is run; the paper has no figure for this network.
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Here:     add resources.pretrain.tasks_per_node=8 (and finetune, baseline) to use eight GPUs of this machine.
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch experiment=imagenet_10pct_vit "$@"
