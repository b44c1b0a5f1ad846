"""The losses of four reference runs to the last digit: LOST and dense `tiny`, AdamW and Muon, seed 0.

    python experiments/golden.py > before.json
    python experiments/golden.py --compare before.json

Two revisions of the code that compute the same print the same, on one machine: other processors and other
versions of torch round differently. `tests/golden.json` is what one machine printed; a test compares with it
to a tolerance."""
import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = [(linear, optimizer) for linear in ("lost", "dense") for optimizer in ("adamw", "muon")]
STEPS = 50

def flags(linear: str, optimizer: str, data_dir: str, out_dir: str, steps: int) -> list[str]:
    """The command line of one run."""
    return [
        "--model=tiny",
        f"--linear={linear}",
        f"--optimizer={optimizer}",
        "--lr=6e-3",
        "--warmup=5",
        "--seed=0",
        f"--steps={steps}",
        "--log_every=1",
        f"--eval_every={steps}",
        f"--save_every={steps}",
        "--eval_tokens=20000",
        "--device=cpu",
        "--dtype=float32",
        "--compile=false",
        # the order of a sum depends on their number
        "--threads=1",
        f"--data_dir={data_dir}",
        f"--out_dir={out_dir}",
    ]

def prepare(data_dir: str) -> list[str]:
    """The command line of prepare_c4.py for the text that all runs read."""
    return ["--input", "builtin", "--tokenizer", "train:1024", "--out_dir", data_dir]

def run(command: str, arguments: list[str]):
    path = os.path.join(ROOT, command)
    subprocess.run([sys.executable, path, *arguments], check=True, stdout=subprocess.DEVNULL)

def losses(linear: str, optimizer: str, data_dir: str, steps: int = STEPS) -> list[float]:
    """The loss of each update, and last the validation loss."""
    with tempfile.TemporaryDirectory() as out_dir:
        run("train.py", flags(linear, optimizer, data_dir, out_dir, steps))
        with open(os.path.join(out_dir, "metrics.jsonl"), encoding="utf-8") as f:
            entries = [json.loads(line) for line in f]
    train = [entry["loss"] for entry in entries if entry["kind"] == "train"]
    return train + [entry["val_loss"] for entry in entries if entry["kind"] == "eval"]

def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--compare", help="a file that this program printed: exit code 1 where it differs")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        run("prepare_c4.py", prepare(data_dir))
        found = {" ".join(pair): losses(*pair, data_dir, given.steps) for pair in RUNS}
    print(json.dumps(found, indent=1))
    if given.compare:
        with open(given.compare, encoding="utf-8") as f:
            before = json.load(f)
        for name, series in found.items():
            print(name, "same" if before[name] == series else "DIFFERS", file=sys.stderr)
        sys.exit(found != before)

if __name__ == "__main__":
    main()
