#!/usr/bin/env bash
# Fashion-MNIST with 4,000 labels, WideResNet-28-2.
# Command:  bash jobs/fashion_mnist_4000.sh [FIELD=VALUE ...]
# Cost:     600 epochs of 234 steps; meant for a GPU, not run yet.
# Expected: unknown until it is run; the paper has no figure for this data set.
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Here:     add resources.pretrain.tasks_per_node=8 (and finetune, baseline) to use eight GPUs of this machine.
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch experiment=fashion_mnist_4000 "$@"
