#!/usr/bin/env bash
# Supervised training without pre-training (Appendix B): on an experiment's labelled images, and on all labels.
# Command:  EXPERIMENT=imagenet_10pct bash jobs/supervised.sh [FIELD=VALUE ...]     without EXPERIMENT: digits
# Needs:    the images and lists of the experiment
# Cost:     two runs of the experiment's baseline.sweep; with all labels, an epoch is one pass
#           over all images but those for validation: for digits 9 minutes of one CPU core.
# Expected: all labels: CIFAR10 94.9 ± 0.2 % after 1,000 epochs (paper, Fig. 7a); ImageNet as in Fig. 6, which has no figures
#           in its text: PAWS with 10 % of the labels is below it with ResNet-50, and equals it with 2x and 4x.
#           Those two were best with colours too: model=resnet50_2x 'baseline.augment={brightness:0.8,contrast:0.8,
#           saturation:0.8,hue:0.2,jitter_probability:0.8,grayscale_probability:0.2}', in one line.
# Slurm:    add hydra/launcher=slurm_8gpu, or a copy of it that fits your cluster (conf/hydra/launcher/).
# Run again, it resumes; the table is made of the runs: python -m paws_hpc.report runs/NAME-supervised-*
set -euo pipefail
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
experiment=${EXPERIMENT:-digits}
launch() {
  "${PYTHON:-python}" -m paws_hpc.launch -m experiment="$experiment" "name=$experiment-supervised-$1-seed\${seed}" \
    'stages=[prepare,baseline,selection,report]' "${@:2}"
}
launch subset "$@"
launch all labels.all=true labels.per_class=null labels.file=null "$@"
