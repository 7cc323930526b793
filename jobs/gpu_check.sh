#!/usr/bin/env bash
# All that only a GPU can show: its tests, the speed of the recipes, starts, a kill and a resume, equal bits, memory.
# Command:  bash jobs/gpu_check.sh                             on this machine
#           sbatch [--partition=… --account=…] jobs/gpu_check.sh     on a cluster, submitted from the project's folder
#           DEVICE=cpu STEPS=1 bash jobs/gpu_check.sh          the same on CPUs, with small sizes: whether the script works
# Needs:    nothing but the environment (make env): images are made of photographs that scikit-learn ships, and digits.
# Cost:     2 GB of disk in OUT (bench/gpu_check), at most 8 minutes of one GPU and 8 cores (not run on one yet).
# Expected: a table of bars with what was reached; figures in OUT/*.json, logs in OUT/*.log. A part that fails or takes longer
#           than its limit leaves its rows as not measured, and the others run.
#SBATCH --job-name=gpu-check
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=0:15:00
#SBATCH --output=gpu-check-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
DEVICE=${DEVICE:-cuda} STEPS=${STEPS:-20} OUT=${OUT:-bench/gpu_check} SCALE=${SCALE:-1}
PYTHON=.venv/bin/python
mkdir -p "$OUT" && rm -rf "$OUT"/*.json "$OUT"/*.log "$OUT/runs" "$OUT/tests"

part() { # NAME SECONDS COMMAND…: run it with a limit and say how it ended; SCALE stretches limits for slow machines
  local name=$1 limit=$(($2 * SCALE)) began=$SECONDS status=0; shift 2
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  echo "$name: $([ $status = 0 ] && echo done || echo "failed ($status), see $OUT/$name.log") after $((SECONDS - began)) s"
}

train() { # NAME FIELD=VALUE…: the digits' pre-training, on images that every environment has
  local name=$1; shift
  exec $PYTHON -m paws_hpc.launch name="$name" runs="$OUT/runs" data.train="$OUT/digits/train" data.test="$OUT/digits/test" \
    device="$DEVICE" tracking.wandb=disabled 'stages=[prepare,pretrain]' pretrain.log_every_steps=1 \
    pretrain.checkpoint_every_steps=5 pretrain.epochs=2 optimizer.warmup_epochs=0 "$@"
}

until_steps() { # NAME COUNT PID: wait for so many steps in the log of a run
  until [ "$(grep -c train/loss "$OUT/runs/$1/pretrain/metrics.jsonl" 2>/dev/null || true)" -ge "$2" ] 2>/dev/null; do
    kill -0 "$3" 2>/dev/null || return 1; sleep 0.1
  done
}

start() { # NAME EXECUTION: seconds from launch to the second step, then SIGKILL
  local began=$EPOCHREALTIME before; before=$(grep -c train/loss "$OUT/runs/$1/pretrain/metrics.jsonl" 2>/dev/null || true)
  (train "$1" pretrain.execution="$2") >&2 & local pid=$!
  until_steps "$1" $((${before:-0} + 2)) $pid || return 1
  kill -9 $pid; wait $pid 2>/dev/null
  $PYTHON -c "print(round($EPOCHREALTIME - $began, 1))"
}

starts() { # an eager start, a compiled one, and the same run again after its kill
  local execution=compiled eager cold warm; [ "$DEVICE" = cuda ] && execution=graphed
  eager=$(start eager eager) && cold=$(start compiled $execution) && warm=$(start compiled $execution) &&
    echo "{\"eager\": $eager, \"cold\": $cold, \"warm\": $warm}" >"$OUT/start.json"
}

resume() { # a run that is killed and launched again has the weights of one that is not
  (train whole deterministic=true) || return 1
  (train killed deterministic=true) & local pid=$!
  until_steps killed 12 $pid && kill -9 $pid; wait $pid 2>/dev/null
  (train killed deterministic=true) || return 1
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

bench() { $PYTHON -m paws_hpc.bench "$@" --device "$DEVICE" --steps "$STEPS" --rounds 1 --folder "$OUT"; }
export -f train until_steps start starts resume tests bench
export DEVICE STEPS OUT PYTHON
rm -f "$OUT/equal" "$OUT/passed"

part imagenet 150 bash -c "bench step --recipe imagenet --from-store --deterministic"
part cifar 90 bash -c "bench step --recipe cifar --from-store --baseline"
part digits 40 bash -c "bench step --recipe digits"
part starts 90 bash -c starts
part tests 100 bash -c tests & # nothing is timed from here on
part resume 60 bash -c resume
part memory 30 $PYTHON -m paws_hpc.bench memory --folder "$OUT"
wait
{ echo "{"; [ -f "$OUT/equal" ] && echo "\"equal\": $(cat "$OUT/equal")$([ -f "$OUT/passed" ] && echo ,)"
  [ -f "$OUT/passed" ] && echo "\"tests\": $(cat "$OUT/passed")"; echo "}"; } >"$OUT/checks.json"
$PYTHON -m paws_hpc.bench bars --device "$DEVICE" --folder "$OUT"
