#!/usr/bin/env bash
# Fashion-MNIST with 600 labels at the size of two CPU cores, with the demo's small network.
# Command:  bash jobs/fashion_mnist_600_cpu.sh [FIELD=VALUE ...]
# Needs:    apt-get install dataset-fashion-mnist
# Cost:     less than an hour of one CPU core.
# Expected: PAWS-NN and fine-tuned 84 %, the supervised baseline 80 % (docs/results.md).
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch experiment=fashion_mnist_600_cpu "$@"
