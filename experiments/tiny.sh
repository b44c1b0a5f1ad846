#!/usr/bin/env bash
# The table of the README: LOST and dense, AdamW and Muon, the same tokens, a sweep of learning rates each, then more
# seeds at the best one.
#     bash experiments/tiny.sh 'corpus-train*.json.gz' 'corpus-validation*.json.gz'
# Two runs at a time, a core each, about two hours. The same command continues; finished runs are not repeated.
caller=$PWD
EXTRAS=plot source "$(dirname "$0")/setup.sh"
root=$PWD
(cd "$caller" && python "$root/prepare_c4.py" --input "$1" --val_input "$2" --tokenizer train:4096 --out_dir "$root/data/tiny")
run() { # linear optimizer lr seed
    OMP_NUM_THREADS=1 python train.py --model tiny --linear "$1" --optimizer "$2" --lr "$3" --seed "$4" \
        --data_dir data/tiny --out_dir "out/tiny/$1-$2-$3-$4" --dtype bfloat16 --compile true --micro_batch 8 \
        --eval_tokens 600000 --eval_every 175 --keep 1 | tail -n 3 || true
    grep -q '"finished"\|FloatingPointError' "out/tiny/$1-$2-$3-$4/status.json"      # or it was stopped
}
sweep() { # linear optimizer best-lr lr…
    for lr in "${@:4}"; do run "$1" "$2" "$lr" 0; done
    for seed in 1 2; do run "$1" "$2" "$3" "$seed"; done
}
both() { # linear best-lr-of-adamw best-lr-of-muon
    sweep "$1" adamw "$2" 1e-3 3e-3 6e-3 1e-2 2e-2
    sweep "$1" muon "$3" 3e-3 6e-3 1.2e-2 2.4e-2
}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
both lost 1e-2 1.2e-2 & lost=$!; both dense 6e-3 6e-3 & dense=$!; wait $lost; wait $dense
python runs/plot.py out/tiny/*/
