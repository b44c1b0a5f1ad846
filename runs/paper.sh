#!/usr/bin/env bash
# The protocol of GaLore, CoLA, SLTrain and LOST: T5's tokenizer, one document of C4 a row of 256 tokens, 512 rows an
# update. Beside our perplexity stands the one that their evaluator would print, to be put beside their tables:
#     bash runs/paper.sh 60m                                    # LOST, in its paper 32.25
#     OUT=out/dense bash runs/paper.sh 60m --linear dense       # the dense row of all of them, 34.06
#     bash runs/paper.sh 60m --dry_run                          # what it costs
# The real one needs GPUs, and from the hub 5 GB of C4 for 60m (10, 30 and 50 for 130m, 350m and 1b). A look at it on
# a CPU, with text of your own and T5's tokenizer.json in a folder:
#     INPUT='my/*.json.gz' T5=FOLDER bash runs/paper.sh tiny --steps 50 --eval_tokens 100K
FIRST="tiny 60m 130m 350m 1b 7b 13b" EXTRAS=hf source "$(dirname "$0")/setup.sh"
size=${1:-60m} data=${DATA:-data/paper-${1:-60m}} out=${OUT:-out/paper-${1:-60m}} t5=${T5:-data/t5}
# their models have 32 000 words: the 100 ids that follow in T5's file stand in no text
train=(train.py --model "$size" --data_dir "$data" --out_dir "$out" --vocab_size 32000 --seq_len 256
       --paper_batch 256 "${@:2}")
if [[ " $* " == *" --dry_run"* ]]; then exec python "${train[@]}"; fi

[ -e "$t5/tokenizer.json" ] || hf download google-t5/t5-base tokenizer.json tokenizer_config.json --local-dir "$t5"
# one epoch: 131 072 positions an update, padding included
steps=$(python -c "from nanolost.settings import RECIPES; print(RECIPES['$size']['steps'])")
set -f                                         # patterns as they were typed: prepare_c4.py expands them
python prepare_c4.py --tokenizer "$t5" --rows 256 --train_tokens $((steps * 131072)) --out_dir "$data" \
    ${INPUT:+--input $INPUT} ${VAL_INPUT:+--val_input $VAL_INPUT}

launch=(torchrun --standalone --nproc_per_node=gpu)
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "no GPU here: $size by this protocol is a matter of GPUs, a CPU shows only that it runs" >&2
    launch=(python)
fi
"${launch[@]}" "${train[@]}"
require_finished "$out"
