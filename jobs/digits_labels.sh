#!/usr/bin/env bash
# Digits with 1, 2, 4 and 10 labels per class, five seeds each: what few labels are worth.
# Command:  bash jobs/digits_labels.sh [FIELD=VALUE ...]
# Cost:     20 chains of 1 to 3 minutes on two CPU cores each.
# Expected: docs/results.md.
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/digits-seed*-per_class=*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch -m experiment=digits seed=0,1,2,3,4 labels.per_class=1,2,4,10 \
  'pretrain.support.images_per_class=${labels.per_class}' "$@"
