#!/usr/bin/env bash
# Unlabelled images of classes that nobody labelled: digits 0 to 2 (KNOWN=3) with four labels each, five seeds.
# Command:  [KNOWN=5] bash jobs/digits_open_set.sh [FIELD=VALUE ...]
# Cost:     15 pre-trainings of 1 to 2 minutes on two CPU cores each.
# Expected: docs/results.md; alone: unlabelled images of the known classes only, strangers: of all ten,
#           ropaws: of all ten with objective=ropaws.
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes; any of them side by side: python -m paws_hpc.report runs/digits-open_set-*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
known=${KNOWN:-3}
some=shards/digits_0_$((known - 1))
for split in train test; do
  "${PYTHON:-python}" -m paws_hpc.shards pack digits --split $split --classes $(seq 0 $((known - 1))) --to "$some/$split"
done
"${PYTHON:-python}" -m paws_hpc.shards pack digits --split train --to shards/digits/train
launch() {
  local name=$1 unlabelled=$2
  shift 2
  "${PYTHON:-python}" -m paws_hpc.launch -m experiment=digits "name=digits-open_set-$known-$name-seed\${seed}" \
    seed=10,11,12,13,14 "data.classes=$known" "pretrain.support.classes=$known" \
    "data.train=$unlabelled" "data.labelled=$some/train" "data.test=$some/test" \
    'stages=[prepare,pretrain,selection,report]' finetune.min_trials=0 baseline.min_trials=0 "$@"
}
launch alone "$some/train" "$@"
launch strangers shards/digits/train "$@"
launch ropaws shards/digits/train objective=ropaws "$@"
