"""One JSON line about a run of experiments/gpu.sh.

    python experiments/gpu.py OUT_DIR EXIT_CODE SECONDS FLAGS"""
import json
import os
import statistics
import sys

def read(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]

def summary(out_dir: str, code: str, seconds: str, flags: str) -> dict:
    """What the run's files say: losses to full precision, the median speed after five steps, peak memory."""
    records = read(os.path.join(out_dir, "metrics.jsonl"))
    steps = [record for record in records if record["kind"] == "train"]
    # the first ones compile
    settled = steps[5:] or steps
    found = {"name": os.path.basename(out_dir), "flags": flags, "exit": int(code), "seconds": int(seconds)}
    if steps:
        found |= {
            "losses": [record["loss"] for record in steps],
            "step_ms": statistics.median(record["step_ms"] for record in settled),
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in settled),
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in steps),
            # between the last step before a save and the first after it lies the save
            "times": [record["time"] for record in steps],
        }
    return found

if __name__ == "__main__":
    print(json.dumps(summary(*sys.argv[1:])))
