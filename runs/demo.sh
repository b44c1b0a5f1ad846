#!/usr/bin/env bash
# From a fresh checkout to text: install, prepare the text inside Python's library, train a tiny LOST model on it
# for a minute on two CPU cores, sample. Needs the package index, and no other network.
source "$(dirname "$0")/setup.sh"
python prepare_c4.py --input builtin --tokenizer train:1024 --out_dir data/builtin
python train.py --model tiny --data_dir data/builtin --out_dir out/demo --steps 150 --eval_every 50
require_finished out/demo
python sample.py --ckpt out/demo --prompt "The statement" --max_new_tokens 200 --temperature 0.6
