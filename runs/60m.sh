#!/usr/bin/env bash
# LOST 60m on C4 by the whole recipe, on the GPUs of this machine: 1.3 G tokens. Again to continue.
# For another size: bash runs/60m.sh 130m|350m|1b|7b|13b, and more --train_tokens (steps × 131 072).
source "$(dirname "$0")/setup.sh"
size=${1:-60m}
python prepare_c4.py
torchrun --standalone --nproc_per_node=gpu train.py --model "$size" --out_dir "out/$size"
python sample.py --ckpt "out/$size" --prompt "The meaning of life is"
