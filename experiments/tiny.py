"""LOST and dense `tiny`, with AdamW and Muon: the same tokens, a sweep of learning rates each, then more
seeds at the best one.

    python experiments/tiny.py run   --data_dir data/tiny --out_dir out/tiny
    python experiments/tiny.py table --data_dir data/tiny --out_dir out/tiny [--fill docs/experiments.md]
    python experiments/tiny.py short --data_dir data/tiny --out_dir out/tiny [--fill README.md]

`run` trains what is missing, as experiments/runs.py says: about two hours on two cores. The same command
continues. `table` prints Markdown, or puts it between the two markers of a document; `short` is what the
first page has of it."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import statistics
from dataclasses import dataclass

# first of ours: it imports nanolost before torch
from experiments import controls
from experiments.runs import Experiment, Key, Rates, Run, Settings, chosen, drive, extra, folder_of, shapes
from experiments.tables import markdown, show, spread
from nanolost.counts import count_flops, count_parameters
from nanolost.flags import flag
from nanolost.settings import RECIPES

# flags of train.py
ROWS = {
    "dense, AdamW": {"linear": "dense", "optimizer": "adamw"},
    "LOST, AdamW": {"linear": "lost", "optimizer": "adamw"},
    "dense, Muon": {"linear": "dense", "optimizer": "muon"},
    "LOST, Muon": {"linear": "lost", "optimizer": "muon"},
}
# Muon's are higher: its update has the size of AdamW's, but every direction of it learns
LRS = {
    "adamw": (1e-3, 3e-3, 6e-3, 1e-2, 2e-2),
    "muon": (3e-3, 6e-3, 1.2e-2, 2.4e-2),
}
COLUMNS = [
    "at its best learning rate", "seeds", "parameters", "without embedding and head",
    "loss", "perplexity", "bits per byte",
]

@dataclass(frozen=True)
class Config(Settings):
    data_dir: str = flag("data/tiny", "folder of token shards", path=True)
    out_dir: str = flag("out/tiny", "folder of the runs: ROW/lr-seed", path=True)
    steps: int = flag(RECIPES["tiny"]["steps"], "updates of each run, a tenth of them warm-up")
    lrs: Rates | None = flag(None, "learning rates of every sweep (each optimizer has its own)")

def run_of(config: Config, key: Key) -> Run:
    flags = {
        # the quickest on one core
        "dtype": "bfloat16",
        "compile": "true",
        "micro_batch": 8,
        # 595 968 tokens of the text that the README's table was made with
        "eval_tokens": 600_000,
        # four points of a curve
        "eval_every": max(1, config.steps // 4),
        "keep": 1,
    }
    flags |= extra(config)
    # the row has the last word
    flags |= ROWS[key.row]
    flags["model"] = "tiny"
    flags["steps"] = config.steps
    flags["lr"] = key.lr
    flags["seed"] = key.seed
    flags["data_dir"] = os.path.abspath(config.data_dir)
    return Run(folder_of(config, key), flags)

def experiment(config: Config) -> Experiment:
    def run(key):
        return run_of(config, key)
    def rates(row):
        optimizer = ROWS[row]["optimizer"]
        return config.lrs or LRS[optimizer]
    # each row has a sweep of its own
    swept = {row: row for row in ROWS}
    return Experiment(config, run, swept, rates)

def train(config: Config):
    experiment(config).train(chosen(config, ROWS))

# --- the table ---

def sizes(config: Config, row: str) -> tuple[str, str]:
    """Parameters, and those of the blocks: embedding and head are most of so small a model."""
    model = shapes(config, {"model": "tiny", **ROWS[row]})
    # once where they are tied
    outer = {model.model["embed_tokens"].weight, model.lm_head.weight}
    outer = sum(p.numel() for p in outer)
    total = count_parameters(model)
    return f"{total:,}", f"{total - outer:,}"

def main_row(config: Config, found: Experiment, row: str) -> list:
    finished = list(found.finished(row).values())
    def all_of(name):
        return [result[name] for result in finished]
    # in the order of COLUMNS
    return [
        f"{row}, {found.best_lr(row):g}",
        len(finished),
        *sizes(config, row),
        spread(all_of("val_loss"), ".3f"),
        spread(all_of("val_ppl"), ".1f"),
        spread(all_of("val_bpb"), ".3f"),
    ]

def tables(config: Config) -> str:
    """A sweep for each optimizer, and the best learning rates over seeds."""
    found = experiment(config)
    rows = chosen(config, ROWS)
    # first of all: it refuses where there is nothing to show
    begun = found.begun(rows)
    parts = []
    for optimizer in LRS:
        own = [row for row in rows if ROWS[row]["optimizer"] == optimizer]
        # their learning rates are not the same ones
        if own:
            parts.append(controls.sweep_table(found, own))
    body = [main_row(config, found, row) for row in begun]
    return "\n".join([*parts, markdown(COLUMNS, body)])

def table(config: Config):
    show(config.fill, "tiny", tables(config))

# --- the table of the first page ---

def short_row(config: Config, found: Experiment, row: str) -> list:
    model = shapes(config, {"model": "tiny", **ROWS[row]})
    finished = list(found.finished(row).values())
    losses = [result["val_loss"] for result in finished]
    speeds = [result["tokens_per_second"] for result in finished]
    return [
        row,
        f"{count_parameters(model):,}",
        f"{count_flops(model) / 1e6:.2f} M",
        spread(losses, ".3f"),
        f"{statistics.median(speeds):,.0f}",
    ]

def short(config: Config):
    found = experiment(config)
    begun = found.begun(chosen(config, ROWS))
    body = [short_row(config, found, row) for row in begun]
    # runs side by side share the machine
    head = [
        "tiny, each at its best learning rate", "parameters", "FLOPs a token",
        f"loss, {config.seeds} seeds", f"tokens/s of {config.jobs} at a time",
    ]
    show(config.fill, "tiny-short", markdown(head, body))

if __name__ == "__main__":
    drive({"run": train, "table": table, "short": short}, Config, __doc__)
