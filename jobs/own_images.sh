#!/usr/bin/env bash
# Your own images, in a folder: packs them, derives a recipe and runs it.
# Command:  bash jobs/own_images.sh data.root=PHOTOS [FIELD=VALUE ...]
# Cost:     minutes on two CPU cores; hours on a GPU.
# Expected: depends on the images (docs/own_images.md).
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch "$@"
