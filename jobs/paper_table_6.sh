#!/usr/bin/env bash
# Table 6 of the paper: with and without mean entropy maximisation.
# Command:  bash jobs/paper_table_6.sh [FIELD=VALUE ...]
# Needs:    ImageNet packed (jobs/pack_imagenet.sh) and the paper's lists of labels in shards/splits/
# Cost:     4 chains of 100 epochs of ResNet-50. Not run here.
# Expected: fine-tuned, 1 % / 10 %: with 63.8/73.9, without 52.9/73.6.
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Small:    bash jobs/digits_ablations.sh
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/imagenet_1*pct-seed0-me_max=*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch -m experiment="${EXPERIMENTS:-imagenet_1pct,imagenet_10pct}" objective.me_max=true,false "$@"
