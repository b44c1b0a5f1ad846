#!/usr/bin/env bash
# The tables of docs/speed.md: bash runs/bench.sh cpu, about 20 minutes on two cores, or cuda, one GPU of 140 GB.
# They go to the terminal; each part leaves its JSON line in the folder OUT (default: bench_results).
FIRST="cpu cuda" EXTRAS=test source "$(dirname "$0")/setup.sh"
device=${1:-cpu}; out=${OUT:-bench_results}; mkdir -p "$out"
part() {                                       # name, flags of bench.py
    echo "== $*"
    python bench.py --device "$device" "${@:2}" | tee "$out/last" | head -n -1
    tail -n 1 "$out/last" > "$out/$device-$1.json"; rm "$out/last"
}
part init --what init --model 1b
if [ "$device" = cuda ]; then                  # with fewer tokens a GPU waits for the host to launch kernels
    part layer --what layer --model 1b --tokens 65536
    part step-1b --what step --model 1b --tokens 16384
    part step-130m --what step --model 130m --tokens 16384
    part step-130m-65536 --what step --model 130m --tokens 65536
else
    part layer --what layer --model 1b
    part step-130m --what step --model 130m
fi
part decode-350m --what decode --model 350m
part decode-350m-float32 --what decode --model 350m --dtype float32
part decode-130m --what decode --model 130m
part data --what data
