#!/usr/bin/env bash
# ImageNet (ILSVRC 2012) into shards, on this machine, with one process per core.
# Command:  IMAGENET=FOLDER bash jobs/pack_imagenet.sh
#           FOLDER holds train/ and val/ with a folder of JPEG files per class; or ILSVRC2012_img_train.tar as it is
#           distributed, which is read without unpacking, and val/.
# Cost:     about 150 GB of disk, once; about 1.5 core hours of decoding, if the disk keeps up; not run here.
# Expected: 1,281,167 images in shards/imagenet/train, 50,000 in shards/imagenet/val, 1,000 classes. 22 images of train are
#           CMYK and one is a PNG: they are encoded anew and listed. Both sources of train give the same digest.
# Run again after an interruption, it goes on. On a cluster: jobs/pack_imagenet_slurm.sh.
set -euo pipefail
: "${IMAGENET:?the folder that holds train/ or ILSVRC2012_img_train.tar, and val/}"
IMAGENET=$(realpath "$IMAGENET")
PATH=$(dirname "$(realpath "$0")")/../.venv/bin:$PATH # the environment of the source tree, where this is in one
for split in train val; do
  source=(folder --root "$IMAGENET/$split")
  if [[ $split == train && -f $IMAGENET/ILSVRC2012_img_train.tar ]]; then
    source=(tar --root "$IMAGENET/ILSVRC2012_img_train.tar")
  fi
  "${PYTHON:-python}" -m paws_hpc.shards pack "${source[@]}" --to "shards/imagenet/$split" "$@"
  "${PYTHON:-python}" -m paws_hpc.shards verify --quick "shards/imagenet/$split"
done
