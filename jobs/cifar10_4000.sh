#!/usr/bin/env bash
# CIFAR10 with 4,000 labels, WideResNet-28-2 (Appendix C).
# Command:  CIFAR=FOLDER GPUS=1 bash jobs/cifar10_4000.sh [FIELD=VALUE ...]
# Cost:     600 epochs of 195 steps; one V100 in the paper, not run here.
# Expected: PAWS-NN 96.0 % (paper; with the supervised NCE steps that this chain does not have yet).
# Run again, it resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m paws_hpc.launch experiment=cifar10_4000 data.source_path="${CIFAR:?the folder that holds cifar-10-batches-py}" \
  resources.pretrain.tasks_per_node="${GPUS:-1}" resources.finetune.tasks_per_node="${GPUS:-1}" resources.baseline.tasks_per_node="${GPUS:-1}" "$@"
