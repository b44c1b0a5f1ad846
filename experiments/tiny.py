"""LOST and dense `tiny`, with AdamW and Muon: the same tokens, a sweep of learning rates each, then more
seeds at the best one.

    python experiments/tiny.py run   --data_dir data/tiny --out_dir out/tiny
    python experiments/tiny.py table --data_dir data/tiny --out_dir out/tiny [--fill README.md]

`run` trains what is missing, as experiments/runs.py says: about two hours on two cores. The same command
continues. `table` prints Markdown, or puts it between the two markers of a document."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dataclasses import dataclass

# first of ours: it imports nanolost before torch
from experiments import controls
from experiments.runs import Experiment, Run, Settings, chosen, drive
from experiments.tables import fill, markdown, spread
from nanolost.counts import count_parameters
from nanolost.flags import flag, say
from nanolost.methods import build_model
from nanolost.settings import RECIPES, resolve
from nanolost.tokenizer import Tokenizer

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

@dataclass(frozen=True)
class Config(Settings):
    data_dir: str = flag("data/tiny", "folder of token shards")
    out_dir: str = flag("out/tiny", "folder of the runs: ROW/lr-seed")
    steps: int = flag(RECIPES["tiny"]["steps"], "updates of each run, a tenth of them warm-up")
    lrs: tuple[float, ...] | None = flag(None, "learning rates of every sweep (each optimizer has its own)")

def run_of(config: Config, row: str, lr: float, seed: int) -> Run:
    folder = os.path.abspath(os.path.join(config.out_dir, row, f"{lr:g}-{seed}"))
    flags = {
        "dtype": "bfloat16",
        "compile": "true",
        "micro_batch": 8,
        # 595 968 tokens of the text that the README's table was made with
        "eval_tokens": 600_000,
        # four points of a curve
        "eval_every": max(1, config.steps // 4),
        "keep": 1,
    }
    flags |= controls.extra(config)
    flags |= {"model": "tiny", "steps": config.steps, "lr": lr, "seed": seed}
    flags |= ROWS[row]
    flags["data_dir"] = os.path.abspath(config.data_dir)
    flags["out_dir"] = folder
    return Run(folder, flags)

def experiment(config: Config) -> Experiment:
    def run(row, lr, seed):
        return run_of(config, row, lr, seed)
    def lrs(row):
        return config.lrs or LRS[ROWS[row]["optimizer"]]
    return Experiment(config, run, {row: row for row in ROWS}, lrs)

def train(config: Config):
    experiment(config).train(chosen(config, ROWS))

# --- the table ---

def sizes(config: Config, row: str) -> tuple[str, str]:
    """Parameters, and those of the blocks: embedding and head are most of so small a model."""
    settings = resolve({"model": "tiny", **controls.extra(config), **ROWS[row]})
    settings.vocab_size = Tokenizer.load(os.path.join(config.data_dir, "tokenizer.json")).vocab_size
    model = build_model(settings, "meta")
    outer = model.model["embed_tokens"].weight.numel() + model.lm_head.weight.numel()
    total = count_parameters(model)
    return f"{total:,}", f"{total - outer:,}"

def main_row(config: Config, found: Experiment, row: str) -> list:
    finished = list(found.finished(row).values())
    def all_of(name):
        return [result[name] for result in finished]
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
    parts = []
    for optimizer in LRS:
        own = [row for row in rows if ROWS[row]["optimizer"] == optimizer]
        if own:
            parts.append(controls.sweep_table(found, own))
    head = ["at its best learning rate", "seeds", "parameters", "without embedding and head", "loss",
            "perplexity", "bits per byte"]
    body = [main_row(config, found, row) for row in rows if found.finished(row)]
    return "\n".join([*parts, markdown(head, body)])

def table(config: Config):
    """Print the tables, or put them between the markers of a document."""
    if config.fill:
        fill(config.fill, "tiny", tables(config))
    else:
        say(tables(config))

if __name__ == "__main__":
    drive({"run": train, "table": table}, Config, __doc__)
