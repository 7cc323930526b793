#!/usr/bin/env bash
# Tables 1, 2 and 3 of the paper: ResNet-50 1x, 2x and 4x after 100, 200 and 300 epochs, 1 % and 10 % of the labels.
# Command:  bash jobs/paper_tables_1_to_3.sh [FIELD=VALUE ...]
# Needs:    ImageNet packed (jobs/pack_imagenet.sh) and the paper's lists of labels in shards/splits/
# Cost:     18 chains; the first, ResNet-50 for 100 epochs, took 8.2 h on 64 V100 in the paper. Not run here.
# Expected: fine-tuned, 1 % / 10 % of labels, 100, 200, 300 epochs: 1x 63.8/73.9, 66.1/75.0, 66.5/75.5; 2x 68.2/77.0, 69.6/77.8,
#           69.6/77.7; 4x 69.8/78.5, 69.9/79.0, not in the paper. PAWS-NN 1x: 61.5/71.0, 63.2/71.9, 64.2/73.1 (1 % as corrected).
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Small:    bash jobs/digits_labels.sh
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/imagenet_1*pct-seed0-model=*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch -m experiment="${EXPERIMENTS:-imagenet_1pct,imagenet_10pct}" model=resnet50,resnet50_2x,resnet50_4x pretrain.epochs=100,200,300 "$@"
