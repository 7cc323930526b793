#!/usr/bin/env bash
# ImageNet (ILSVRC 2012) from folders of JPEG files, one per class, into shards.
# Command:  IMAGENET=FOLDER bash jobs/pack_imagenet.sh      (FOLDER holds train/ and val/, each with a folder per class)
# Cost:     about 150 GB of disk and, on one process, hours; not run here.
# Expected: 1,281,167 images in shards/imagenet/train, 50,000 in shards/imagenet/val, 1,000 classes.
# Run again after an interruption, it packs what has no manifest.json.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${IMAGENET:?the folder that holds train/ and val/}"
for split in train val; do
  .venv/bin/python -m paws_hpc.shards pack folder --root "$IMAGENET/$split" --to "shards/imagenet/$split"
  .venv/bin/python -m paws_hpc.shards verify --quick "shards/imagenet/$split"
done
