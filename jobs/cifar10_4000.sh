#!/usr/bin/env bash
# CIFAR10 with 4,000 labels, WideResNet-28-2 (Appendix C).
# Command:  CIFAR=FOLDER bash jobs/cifar10_4000.sh [FIELD=VALUE ...]
# Cost:     600 epochs of 195 steps; one V100 in the paper, not run here.
# Expected: PAWS-NN 96.0 % (paper).
# Five splits: jobs/cifar10_splits.sh
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Here:     add resources.pretrain.tasks_per_node=8 (and finetune, baseline) to use eight GPUs of this machine.
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch experiment=cifar10_4000 data.source_path="${CIFAR:?the folder that holds cifar-10-batches-py}" "$@"
