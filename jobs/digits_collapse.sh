#!/usr/bin/env bash
# Collapse with 1, 2, 4 and 10 labels per class on digits, five seeds each: what fails without help, and what helps.
# Command:  bash jobs/digits_collapse.sh [FIELD=VALUE ...]
# Cost:     70 pre-trainings of 1 to 3 minutes on two CPU cores each.
# Expected: docs/results.md; a run that collapses says so and goes on to its end.
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes; any of them side by side: python -m paws_hpc.report runs/digits-no_warmup-*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
launch() {
  local name=$1 labels=$2
  shift 2
  "${PYTHON:-python}" -m paws_hpc.launch -m experiment=digits "name=digits-$name-labels\${labels.per_class}-seed\${seed}" \
    seed=0,1,2,3,4 "labels.per_class=$labels" 'pretrain.support.images_per_class=${labels.per_class}' \
    'stages=[prepare,pretrain,selection,report]' finetune.min_trials=0 baseline.min_trials=0 \
    pretrain.collapse.action=warn "$@"
}
LARS=optimizer=lars_small
ALONE=objective.support_warmup_fraction=0
launch no_warmup 1,2,4 $ALONE "$@"
launch lars_no_warmup 1,4 $LARS $ALONE "$@"
launch lars 1,2,4,10 $LARS "$@"
launch d1 1 $ALONE objective.true_label_targets=true "$@"
launch d2 1 $ALONE objective.entropy_weight=0.1 "$@"
launch lars_d1 1 $LARS $ALONE objective.true_label_targets=true "$@"
launch lars_d2 1 $LARS $ALONE objective.entropy_weight=0.1 "$@"
launch strong_crops 1 'views.large.scale=[0.3,1.0]' 'views.small.scale=[0.1,0.3]' "$@"
