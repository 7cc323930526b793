#!/usr/bin/env bash
# All benchmarks of training on one GPU: ImageNet, CIFAR and digits recipes at the sizes of one GPU of the paper.
# Command:  bash jobs/bench_gpu.sh                             on this machine
#           sbatch [--partition=… --account=…] jobs/bench_gpu.sh     on a cluster, submitted from the project's folder
# Needs:    nothing but the environment (make env): images are made of photographs that scikit-learn ships.
# Cost:     2 GB of disk in bench/, about half an hour of one GPU and 16 cores (not run here yet).
# Expected: on one H100: ImageNet step at least 0.90 of plain ResNet-50's rate / 4.74, from the store at least 0.95 of the step,
#           CIFAR from the store at least 10 times the DataLoader with a data wait of at most 2 %, loss + gather + LARS at
#           most 3 % of the ImageNet step, checkpoints at most 1 % of training. Tables in the log, figures in bench/*.json.
#SBATCH --job-name=bench-gpu
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=1:30:00
#SBATCH --output=bench-gpu-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
for recipe in imagenet cifar digits; do
  .venv/bin/python -m paws_hpc.bench all --device cuda --recipe "$recipe" "$@"
done
