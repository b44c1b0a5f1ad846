#!/usr/bin/env bash
# The tables of docs/experiments.md and the README: LOST and dense, AdamW and Muon, the same tokens, a sweep of learning
# rates each, then more seeds at the best one.
# Give two patterns of files, each in quotes: of the training text and of the validation text.
#     bash experiments/tiny.sh 'corpus-train*.json.gz' 'corpus-validation*.json.gz' [--seeds 3 …]
# As many runs at a time as there are cores, about two hours on two. The same command continues; finished runs are not
# repeated.
caller=$PWD
NEEDS=2 EXTRAS=plot source "$(dirname "$0")/../runs/setup.sh"
root=$PWD
(cd "$caller" && python "$root/prepare_c4.py" --input "$1" --val_input "$2" --tokenizer train:4096 --out_dir "$root/data/tiny")
for what in run table; do python experiments/tiny.py "$what" "${@:3}"; done
python runs/plot.py out/tiny/*/*/
