#!/usr/bin/env bash
# Fashion-MNIST with 4,000 labels, WideResNet-28-2.
# Command:  GPUS=1 bash jobs/fashion_mnist_4000.sh [FIELD=VALUE ...]
# Cost:     600 epochs of 234 steps; meant for a GPU, not run yet.
# Expected: unknown until it is run; the paper has no figure for this data set.
# Run again, it resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m paws_hpc.launch experiment=fashion_mnist_4000 \
  resources.pretrain.tasks_per_node="${GPUS:-1}" resources.finetune.tasks_per_node="${GPUS:-1}" resources.baseline.tasks_per_node="${GPUS:-1}" "$@"
