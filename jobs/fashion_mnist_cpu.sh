#!/usr/bin/env bash
# Fashion-MNIST with 4,000 and with 600 labels on two CPU cores, with the demo's small network.
# Command:  bash jobs/fashion_mnist_cpu.sh [FIELD=VALUE ...]
# Needs:    apt-get install dataset-fashion-mnist
# Cost:     about two hours on two cores (docs/results.md).
# Expected: docs/results.md has what was measured.
# Run again, it resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m paws_hpc.launch -m experiment=fashion_mnist_cpu labels=four_hundred_per_class,sixty_per_class "$@"
