#!/usr/bin/env bash
# The table of the README: LOST and dense, the same tokens, the same learning rates, then seeds at the best one; and
# both with Muon, at the learning rate that runs/controls.sh found for it.
#     bash runs/tiny.sh 'corpus-train*.json.gz' 'corpus-validation*.json.gz'
# Two runs at a time, a core each, under two hours. The same command continues; finished runs are not repeated.
caller=$PWD
EXTRAS=plot source "$(dirname "$0")/setup.sh"
root=$PWD
(cd "$caller" && python "$root/prepare_c4.py" --input "$1" --val_input "$2" --tokenizer train:4096 --out_dir "$root/data/tiny")
run() { # linear lr seed [optimizer]
    OMP_NUM_THREADS=1 python train.py --model tiny --linear "$1" --lr "$2" --seed "$3" --data_dir data/tiny \
        --out_dir "out/tiny/$1-$2-$3${4:+-$4}" --optimizer "${4:-adamw}" --dtype bfloat16 --compile true --micro_batch 8 --eval_tokens 600000 \
        --eval_every 175 --keep 1 | tail -n 3
}
sweep() { # linear best-lr
    for lr in 1e-3 3e-3 6e-3 1e-2 2e-2; do run "$1" "$lr" 0; done
    for seed in 1 2; do run "$1" "$2" "$seed"; done
    for seed in 0 1 2; do run "$1" 2.4e-2 "$seed" muon; done
}
sweep lost 1e-2 & sweep dense 6e-3 & wait
python runs/plot.py out/tiny/*/
