#!/usr/bin/env bash
# Table 5 of the paper: with and without the prediction head, 10 % of the labels.
# Command:  bash jobs/paper_table_5.sh [FIELD=VALUE ...]
# Needs:    ImageNet packed (jobs/pack_imagenet.sh) and the paper's lists of labels in shards/splits/
# Cost:     4 chains of ResNet-50. Not run here.
# Expected: fine-tuned after 100 / 200 epochs: with 73.9/75.0, without 74.2/75.2.
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Small:    bash jobs/digits_ablations.sh
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/imagenet_1*pct-seed0-prediction_head=*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch -m experiment="${EXPERIMENTS:-imagenet_10pct}" model.prediction_head=true,false pretrain.epochs=100,200 "$@"
