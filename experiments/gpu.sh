#!/usr/bin/env bash
# What only GPUs can show of --shard (docs/sharding.md): one JSON line a question. Needs two or more GPUs, the project's
# environment and prepared text; about ten minutes. GPUS=2 tries it with two processes on a CPU.
#     bash experiments/gpu.sh [MODEL] [DATA_DIR] > gpu.jsonl
set -u
model=${1:-1b}
data=${2:-data/c4}
gpus=${GPUS:-$(python -c "import torch; print(torch.cuda.device_count())")}
home=$(mktemp -d)
cd "$(dirname "$0")/.." || exit 1

# run NAME PROCESSES FLAG …: 20 steps of training
run() {
    name=$1; processes=$2; shift 2
    begun=$(date +%s)
    torchrun --standalone --nproc_per_node="$processes" "${script:-train.py}" --data_dir "$data" --model "$model" \
        --out_dir "$home/$name" --steps 20 --warmup 5 --eval_every 20 --eval_tokens 100000 --save_every 10 --log_every 1 \
        "$@" > "$home/$name.log" 2>&1
    code=$?
    python experiments/gpu.py "$home/$name" "$code" "$(($(date +%s) - begun))" "$*"
}

# the same losses split and whole, speed and memory beside the estimate of a dry run
run whole "$gpus"
run split "$gpus" --shard "$gpus"
run hsdp "$gpus" --shard $((gpus / 2 > 1 ? gpus / 2 : gpus))
run dense "$gpus" --shard "$gpus" --linear dense
run eager "$gpus" --shard "$gpus" --compile false
run narrow "$gpus" --shard "$gpus" --recompute true
python train.py --dry_run true --model "$model" --data_dir "$data" --world_size "$gpus" --shard "$gpus" --gpu_memory 80 \
    | python -c 'import json, sys; print(json.dumps({"name": "dry run", "says": sys.stdin.read().splitlines()[-3:]}))'

# do sums of nccl vary from run to run, and from a resume: "losses" of the three must be equal
run again1 "$gpus" --shard "$gpus" --deterministic true
run again2 "$gpus" --shard "$gpus" --deterministic true
rm -r "$home"/again2/checkpoints/step_00000020
run again2 "$gpus" --shard "$gpus" --deterministic true

# Muon: all compute, or one computes and sends
run muon "$gpus" --shard "$gpus" --optimizer muon
cat > "$home/owner.py" <<'PY'
import runpy, sys
sys.path.insert(0, ".")
import nanolost
from nanolost import shard
shard.Muon.owner = True
runpy.run_path("train.py", run_name="__main__")
PY
script=$home/owner.py run owner "$gpus" --shard "$gpus" --optimizer muon

# a process that fails, and one that hangs, in its tenth step: the job must end, non-zero, within --timeout
export FAULT
for FAULT in raise:1:10 sleep:1:10; do
    script=tests/faulty.py run "${FAULT%%:*}" "$gpus" --shard "$gpus" --timeout 60
done
rm -r "$home"
