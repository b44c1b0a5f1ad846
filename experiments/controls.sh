#!/usr/bin/env bash
# What each part of LOST is worth (a section of docs/experiments.md), on any text:
# Give two patterns of files, each in quotes: of the training text and of the validation text.
#     bash experiments/controls.sh 'corpus-train*.json.gz' 'corpus-validation*.json.gz' [--steps 200 --seeds 3 …]
# As many runs at a time as there are cores, about 2½ hours on two. The same command continues; finished runs are
# not repeated. Another size, or more steps: name another --out_dir too.
caller=$PWD
NEEDS=2 EXTRAS=plot source "$(dirname "$0")/../runs/setup.sh"
root=$PWD
(cd "$caller" && python "$root/prepare_c4.py" --input "$1" --val_input "$2" --tokenizer train:1024 --out_dir "$root/data/controls")
flags=("--extra=--dtype=bfloat16 --micro_batch=16" "${@:3}")
for what in run table plot; do python experiments/controls.py "$what" "${flags[@]}"; done
