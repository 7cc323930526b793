#!/usr/bin/env bash
# CIFAR10 with 4,000 labels over five splits: mean and standard deviation (Appendix C, Fig. 7a).
# Command:  CIFAR=FOLDER bash jobs/cifar10_splits.sh [FIELD=VALUE ...]
#           Seeds 0 to 4 draw five splits. SPLITS=FOLDER takes those of the reference instead, one index into the training
#           images per line: cifar10_subsets/spc.4000_split.{73,91,152,321,401}.txt there; their numbers are the seeds.
#           Validation images are drawn from the rest. For PAWS-NN alone, as in the paper, add
#           stages=[prepare,pretrain,selection,report] finetune.min_trials=0 baseline.min_trials=0
# Cost:     5 chains of 600 epochs of 195 steps; one V100 each in the paper, not run here.
# Expected: PAWS-NN 96.0 ± 0.2 % (paper).
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/cifar10_4000-seed*, or -listed-seed*
set -euo pipefail
cifar=$(realpath "${CIFAR:?the folder that holds cifar-10-batches-py}")
splits=(seed=0,1,2,3,4)
if [[ -n ${SPLITS:-} ]]; then
  splits=(seed=73,91,152,321,401 labels.per_class=null "labels.file='$(realpath "$SPLITS")/spc.4000_split.{seed}.txt'"
    'name=cifar10_4000-listed-seed${seed}')
fi
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch -m experiment=cifar10_4000 data.source_path="$cifar" "${splits[@]}" "$@"
