#!/usr/bin/env bash
# Uploads what runs kept offline for Weights & Biases, as a job on a node that has a connection.
# Command:  bash jobs/sync_wandb.sh [SBATCH OPTION ...]     such as --partition=transfer --account=me
#           RUN=digits-seed0 uploads one run instead of all; `wandb login` once before, or WANDB_API_KEY in the environment.
# Cost:     one core; moments per run, of which most is waiting for the server.
# Expected: in runs/sync-JOB.log a line per stage, "all of N rows are online"; the job fails if something is left.
# Run again, it uploads what is left and repeats nothing. Without Slurm: python -m paws_hpc.sync --all
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
python=$(command -v "${PYTHON:-python}") # of a path that the nodes see, too
mkdir -p runs
sbatch --job-name=sync-wandb --cpus-per-task=1 --time=4:00:00 --output=runs/sync-%j.log "$@" \
  --wrap="exec $(printf '%q' "$python") -m paws_hpc.sync $(printf '%q' "${RUN:---all}")"
