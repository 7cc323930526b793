#!/usr/bin/env bash
# ImageNet (ILSVRC 2012) into shards, by a Slurm array: every task packs a part, the last to end makes the store.
# Command:  IMAGENET=FOLDER bash jobs/pack_imagenet_slurm.sh [SBATCH OPTION ...]     such as --partition=cpu --account=me
#           FOLDER holds train/ and val/ with a folder per class, or ILSVRC2012_img_train.tar and val/ (see pack_imagenet.sh).
#           A process needs about 0.5 GB; add --mem-per-cpu=1G where less is usual.
#           PARTS=16 and CORES=8 (of each task) may be changed; the shards are the same whatever they are.
# Cost:     about 150 GB of disk on a shared file system, once; 16 tasks of 8 cores, each a few minutes; not run here.
# Expected: 1,281,167 images in shards/imagenet/train, 50,000 in shards/imagenet/val, 1,000 classes.
# The sources are listed once, here; tasks may run in any order, fail, be preempted and be run again. For each split a last
# job packs whatever is still missing and verifies. Run again, it goes on.
set -euo pipefail
: "${IMAGENET:?the folder that holds train/ or ILSVRC2012_img_train.tar, and val/}"
IMAGENET=$(realpath "$IMAGENET")
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
python=$(command -v "${PYTHON:-python}") # of a path that the nodes see, too
parts=${PARTS:-16}
cores=${CORES:-8}
mkdir -p shards/imagenet/logs
for split in train val; do
  source=(folder --root "$IMAGENET/$split")
  if [[ $split == train && -f $IMAGENET/ILSVRC2012_img_train.tar ]]; then
    source=(tar --root "$IMAGENET/ILSVRC2012_img_train.tar")
  fi
  pack=("$python" -m paws_hpc.shards pack "${source[@]}" --to "shards/imagenet/$split")
  "${pack[@]}" --plan-only
  job=$(sbatch --parsable --job-name="pack-$split" --array="1-$parts" --requeue --cpus-per-task="$cores" \
    --time=4:00:00 --open-mode=append --output="shards/imagenet/logs/$split-%a.log" "$@" \
    --wrap="exec $(printf '%q ' "${pack[@]}") --part \$SLURM_ARRAY_TASK_ID/$parts")
  last=$(sbatch --parsable --job-name="verify-$split" --dependency="afterany:${job%%;*}" --requeue \
    --cpus-per-task="$cores" --time=8:00:00 --open-mode=append \
    --output="shards/imagenet/logs/$split-verify.log" "$@" \
    --wrap="$(printf '%q ' "${pack[@]}") --part 1/1 && exec $(printf '%q' "$python") -m paws_hpc.shards verify --full shards/imagenet/$split")
  echo "$split: array ${job%%;*} packs $parts parts, job ${last%%;*} verifies; logs in shards/imagenet/logs"
done
