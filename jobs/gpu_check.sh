#!/usr/bin/env bash
# All that only a GPU can show: its tests, the speed of the recipes, starts, a kill and a resume, equal bits, memory.
# Command:  bash jobs/gpu_check.sh                             on this machine
#           sbatch [--partition=… --account=…] jobs/gpu_check.sh     on a cluster, submitted from the project's folder
#           DEVICE=cpu STEPS=1 SCALE=10 bash jobs/gpu_check.sh     the same on CPUs, with small sizes: whether the script works
# Needs:    the source tree with its tests and environment (make env), and no data: images are made of photographs that
#           scikit-learn ships, and digits.
# Cost:     3 GB of disk in OUT (bench/gpu_check), and one GPU and 8 cores for 470 s at most, which is the sum of the limits
#           below. They follow from 110 s for compiling the ImageNet recipe (an H200, 16 cores); no GPU has run it as a whole.
# Expected: a table of bars with what was reached; figures in OUT/*.json, logs in OUT/*.log. A part that fails or takes longer
#           than its limit leaves its rows as not measured, and the others run. A second run finds what the first compiled.
#SBATCH --job-name=gpu-check
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=0:15:00
#SBATCH --output=gpu-check-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
DEVICE=${DEVICE:-cuda} STEPS=${STEPS:-20} OUT=$(realpath -m "${OUT:-bench/gpu_check}") SCALE=${SCALE:-1}
PYTHON=.venv/bin/python
mkdir -p "$OUT" && rm -rf "$OUT"/*.json "$OUT"/*.log "$OUT/runs" "$OUT/tests" "$OUT/equal" "$OUT/passed"
export TORCHINDUCTOR_CACHE_DIR=$OUT/compiled # all candidates share it; a run has its own (paws_hpc/engine/compiler_cache.py)

part() { # NAME SECONDS COMMAND…: run it with a limit and say how it ended; SCALE stretches limits for slow machines
  local name=$1 limit=$(($2 * SCALE)) began=$SECONDS status=0; shift 2
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  echo "$name: $([ $status = 0 ] && echo done || echo "failed ($status), see $OUT/$name.log") after $((SECONDS - began)) s"
}

train() { # NAME FIELD=VALUE…: the digits' pre-training, on images that every environment has
  local name=$1; shift
  exec $PYTHON -m paws_hpc.launch name="$name" runs="$OUT/runs" data.train="$OUT/digits/train" data.test="$OUT/digits/test" \
    data.source=digits device="$DEVICE" tracking.wandb=disabled 'stages=[prepare,pretrain]' pretrain.log_every_steps=1 \
    pretrain.checkpoint_every_steps=5 pretrain.epochs=2 optimizer.warmup_epochs=0 "$@"
}

until_steps() { # NAME COUNT PID: wait for so many steps in the log of a run
  until [ "$(grep -c train/loss "$OUT/runs/$1/pretrain/metrics.jsonl" 2>/dev/null)" -ge "$2" ] 2>/dev/null; do
    kill -0 "$3" 2>/dev/null || return 1; sleep 0.1
  done
}

start() { # NAME EXECUTION: seconds from launch to the second step, then SIGKILL; no checkpoint is there yet
  local began=$EPOCHREALTIME; rm -f "$OUT/runs/$1/pretrain/metrics.jsonl"
  (train "$1" pretrain.execution="$2") >&2 & local pid=$!
  until_steps "$1" 2 $pid || return 1
  local ended=$EPOCHREALTIME; kill -9 $pid; wait $pid 2>/dev/null
  $PYTHON -c "print(round($ended - $began, 1))"
}

starts() { # a first start prepares the run; then an eager start and compiled ones, the first of which finds nothing
  local execution=compiled eager cold warm; [ "$DEVICE" = cuda ] && execution=graphed
  start eager eager >/dev/null && eager=$(start eager eager) && cold=$(start compiled $execution) &&
    warm=$(start compiled $execution) && echo "{\"eager\": $eager, \"cold\": $cold, \"warm\": $warm}" >"$OUT/start.json"
}

resume() { # a run that is killed and launched again has the weights of one that is not
  (train whole deterministic=true) & local whole=$!
  until_steps whole 1 $whole || return 1 # it has packed the images, which both need
  (train killed deterministic=true) & local killed=$!
  until_steps killed 12 $killed && kill -9 $killed; wait $killed 2>/dev/null
  (train killed deterministic=true) && wait $whole || return 1
  $PYTHON - "$OUT" <<'PY'
import json, sys
from pathlib import Path
import torch
whole, killed = (
    torch.load(max(Path(sys.argv[1], "runs", name, "pretrain/checkpoints").glob("*.pt")), weights_only=True)["encoder"]
    for name in ("whole", "killed")
)
equal = all(torch.equal(value, killed[name]) for name, value in whole.items())
Path(sys.argv[1], "equal").write_text(json.dumps(equal))
print("equal bits" if equal else "different weights")
PY
}

tests() { # every file with tests of GPUs, each in a process of its own
  local passed=true file
  for file in $(grep -rl needs_gpu tests --include='test_*.py'); do
    MUST_RUN=$([ "$DEVICE" = cuda ] && echo gpu) $PYTHON -m pytest -q -p no:cacheprovider -m needs_gpu "$file" \
      --basetemp "$OUT/tests" || passed=false
  done
  echo $passed >"$OUT/passed"
}

bench() { $PYTHON -m paws_hpc.bench step --device "$DEVICE" --rounds 1 --folder "$OUT" "$@"; }

compile() { # fills the cache, side by side; the deterministic one has images of its own, since no two may make the same
  bench --recipe imagenet --steps 1 --json "$OUT/compile-imagenet.json" &
  bench --recipe cifar --steps 1 --json "$OUT/compile-cifar.json" &
  bench --recipe imagenet --steps 1 --folder "$OUT/deterministic" deterministic=true & wait
}
export -f train until_steps start starts resume tests bench compile
export DEVICE STEPS OUT PYTHON

# Nothing is timed in the first 200 s. The limits inside imagenet and cifar leave time for the rounds of those that are ready.
part compile 200 bash -c "[ $DEVICE = cpu ] || compile" &
part tests 200 bash -c tests &
part memory 200 $PYTHON -m paws_hpc.bench memory --folder "$OUT" &
part resume 200 bash -c resume
wait
part imagenet 120 bash -c "bench --recipe imagenet --from-store --deterministic --steps $STEPS --limit $((100 * SCALE))"
part cifar 70 bash -c "bench --recipe cifar --from-store --baseline --steps $STEPS --limit $((50 * SCALE))"
part starts 80 bash -c starts
{ echo "{"; [ -f "$OUT/equal" ] && echo "\"equal\": $(cat "$OUT/equal")$([ -f "$OUT/passed" ] && echo ,)"
  [ -f "$OUT/passed" ] && echo "\"tests\": $(cat "$OUT/passed")"; echo "}"; } >"$OUT/checks.json"
$PYTHON -m paws_hpc.bench bars --device "$DEVICE" --folder "$OUT"
