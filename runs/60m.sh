#!/usr/bin/env bash
# LOST 60m on C4 by the whole recipe, 1.3 G tokens, on all GPUs of this machine. The same command continues.
# Name another size, 130m|350m|1b|7b|13b, and it wants more text: its steps × 131,072 tokens. With less, a run reads
# the same text again.
#     bash runs/60m.sh 130m --train_tokens 2.63B
FIRST="60m 130m 350m 1b 7b 13b" source "$(dirname "$0")/setup.sh"
size=${1:-60m} data=data/c4-${1:-60m}
python prepare_c4.py --out_dir "$data" "${@:2}"
torchrun --standalone --nproc_per_node=gpu train.py --model "$size" --data_dir "$data" --out_dir "out/$size"
require_finished "out/$size"
python sample.py --ckpt "out/$size" --prompt "The meaning of life is"
