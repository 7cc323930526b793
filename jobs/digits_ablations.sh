#!/usr/bin/env bash
# The ablations of the paper's Tables 4, 5 and 6 on digits, five seeds each: support mini-batch, prediction head, me-max.
# Command:  bash jobs/digits_ablations.sh [FIELD=VALUE ...]
# Cost:     45 pre-trainings of 1 to 3 minutes on two CPU cores each.
# Expected: docs/results.md; PAWS-NN and the probes on frozen features, since nothing is fine-tuned.
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes; each table is made of its runs: python -m paws_hpc.report runs/digits-seed*-support=*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
launch() {
  "${PYTHON:-python}" -m paws_hpc.launch -m experiment=digits seed=0,1,2,3,4 \
    'stages=[prepare,pretrain,selection,report]' finetune.min_trials=0 baseline.min_trials=0 \
    pretrain.collapse.action=warn "$@"
}
launch 'pretrain.support={classes:10,images_per_class:4},{classes:10,images_per_class:2},{classes:5,images_per_class:4}' "$@"
launch model.prediction_head=true,false "$@"
launch objective.me_max=true,false labels.per_class=1,4 'pretrain.support.images_per_class=${labels.per_class}' "$@"
