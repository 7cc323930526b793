#!/usr/bin/env bash
# Handwritten digits with one label per class: the whole chain on this machine.
# Command:  bash jobs/digits_one_label.sh [FIELD=VALUE ...]
# Cost:     1 to 3 minutes on two CPU cores.
# Expected: PAWS-NN 80 to 95 %, mean 90.2 %, on 400 test images over seeds 5 to 9 (docs/results.md).
# Slurm:    add hydra/launcher=slurm_cpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes.
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
exec "${PYTHON:-python}" -m paws_hpc.launch experiment=digits_one_label "$@"
