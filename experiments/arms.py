"""The arms of experiments/isoflop.py: which models are held against which dense one, at which length, and
what a run of them is.

An arm gets the training FLOPs of the dense row of its size: those of a token, counted from the modules, times
tokens. So an arm that costs less a token makes more updates. A *length* is the number of updates of the dense
row; with it, rates, decay, momentum, batch and seed make a trial."""
import functools
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

# first of ours: it imports nanolost before torch, and registers kinds and optimizers that experiments know
from experiments import layers
from experiments.runs import Run, extra
from model import Llama
from nanolost.cores import usable_cores
from nanolost.counts import count_flops, count_parameters
from nanolost.errors import UserError
from nanolost.flags import flag
from nanolost.methods import build_model
from nanolost.settings import RECIPES, resolve

# --- rows: flags of train.py ---

def sizes(width: int, heads: int, inner: int) -> dict:
    return {"n_embd": width, "n_head": heads, "n_ffn": inner}

DENSE = {"linear": "dense"}
# the width at which rank is 0.42 of it: what a replication of a related method found best
WIDE = {**sizes(144, 4, 384), "rank": 60}

MAIN = {
    "dense": DENSE,
    "LOST 128 r 32": {"rank": 32},
    "LOST 144 r 60": WIDE,
    "LOST 160 r 44": {**sizes(160, 5, 432), "rank": 44},
    "LOST 128 r 80": {"rank": 80},
    # what a smaller dense model makes of the FLOPs of "LOST 128 r 32"
    "dense 96": {**DENSE, **sizes(96, 3, 320)},
}
FULL_RANK = {"full rank": {**WIDE, "linear": "fullrank"}}
DENSE_START = {"dense start": {**WIDE, "dense_start": 0.15}}
PRODUCT = {"product Muon": {**WIDE, "optimizer": "product"}}
# whether the best rate is that of another rank: at the first length only
TRANSFER = {
    "LOST 128 r 16": {"rank": 16},
    "LOST 128 r 64": {"rank": 64},
    "product Muon r 16": {"rank": 16, "optimizer": "product"},
    "product Muon r 32": {"rank": 32, "optimizer": "product"},
    "product Muon r 64": {"rank": 64, "optimizer": "product"},
}
# half and three times the parameters, with the shape of "LOST 144 r 60" beside each
SMALL = {
    "dense 80": {**DENSE, **sizes(80, 4, 216)},
    "LOST 88 r 36": {**sizes(88, 4, 240), "rank": 36},
}
LARGE = {
    "dense 256": {**DENSE, **sizes(256, 8, 688)},
    "LOST 288 r 132": {**sizes(288, 8, 768), "rank": 132},
}
ADAMW = {
    "dense, AdamW": {**DENSE, "optimizer": "adamw"},
    "LOST 128 r 32, AdamW": {"rank": 32, "optimizer": "adamw"},
}
VARIANTS = {**FULL_RANK, **DENSE_START, **PRODUCT}
ROWS = {**MAIN, **VARIANTS, **TRANSFER, **SMALL, **LARGE, **ADAMW}

# row → the dense one that it is held against, "dense" for the others
AGAINST = {**dict.fromkeys(SMALL, "dense 80"), **dict.fromkeys(LARGE, "dense 256")}
AGAINST |= dict.fromkeys(ADAMW, "dense, AdamW")
# these see the tokens of their dense row, as the table of the first page has it
EQUAL_TOKENS = {*ADAMW, *TRANSFER}

# --- flags of the driver ---

@dataclass(frozen=True)
class Config:
    data_dir: str = flag("data/tiny", "folder of token shards, of a vocabulary of 4096", path=True)
    out_dir: str = flag("out/isoflop", "folder of the runs: ROW/TRIAL, and of the figure", path=True)
    results: str = flag("experiments/results/isoflop.jsonl", "a line for each finished run", path=True)
    lengths: tuple[float, ...] = flag((200, 800, 3200), "updates of the dense row; the last is not swept")
    trials: int = flag(12, "pairs of lr and aux_lr that each row tries at each length but the last")
    seeds: int = flag(4, "seeds of the comparison, from 1; seed 0 chooses the rates")
    batch_tokens: int = flag(RECIPES["tiny"]["batch_tokens"], "tokens of an update")
    rows: str | None = flag(None, "rows of the experiment, separated by / (all)")
    only: str | None = flag(None, "those of them that are trained here, for machines without a common disk")
    until: str | None = flag(None, "the stage with which the queue ends, as plan names them (the last)")
    jobs: int = flag(usable_cores(), "runs at a time, a core each")
    wait: float = flag(20, "seconds until the queue is looked at again where others train what is missing")
    extra: str = flag("", "more flags of train.py, separated by spaces, for what no row sets")
    fill: str | None = flag(None, "put the table into this file, between its two markers", path=True)

class Trial(NamedTuple):
    """One run. length: updates of the dense row at the usual batch. batch: tokens of an update."""

    row: str
    length: int
    lr: float
    aux_lr: float
    weight_decay: float
    momentum: float
    batch: int
    seed: int

def check_numbers(config: Config):
    """UserError for numbers with which nothing would run."""
    for name in ("trials", "seeds", "batch_tokens", "jobs", "wait"):
        value = getattr(config, name)
        if value <= 0:
            raise UserError(f"--{name} {value}: must be positive")
    # each length starts where the one before ended
    rising = list(config.lengths) == sorted(set(config.lengths))
    whole = all(length >= 1 and length == int(length) for length in config.lengths)
    if not whole or not rising:
        raise UserError(f"--lengths {config.lengths}: must be whole positive numbers in ascending order")
    ours = {"steps", "optimizer", *Trial._fields}
    clash = sorted(extra(config).keys() & ours)
    if clash:
        raise UserError(f"--extra must not set {', '.join(clash)}: the driver does")

def lengths(config: Config) -> list[int]:
    return [int(length) for length in config.lengths]

# --- what they cost ---

def settings(config: Config, row: str) -> dict:
    """Flags of a row that say what its model is."""
    usual = {"optimizer": "muon", "vocab_size": 4096}
    return {**usual, **extra(config), **ROWS[row], "model": "tiny"}

def shapes(config: Config, flags: dict) -> Llama:
    return build_model(resolve(flags), "meta")

@functools.cache
def parameters(config: Config, row: str) -> int:
    """At the end of a run."""
    flags = settings(config, row)
    flags.pop("dense_start", None)
    return count_parameters(shapes(config, flags))

@functools.cache
def flops(config: Config, row: str) -> float:
    """Of training on a token, the mean over a run."""
    flags = settings(config, row)
    dense = flags.pop("dense_start", 0.0)
    own = count_flops(shapes(config, flags))
    if not dense:
        return own
    # of the same width: dearer than the row that the arm is held against
    flags = {**flags, "linear": "dense"}
    flags.pop("rank")
    return dense * count_flops(shapes(config, flags)) + (1 - dense) * own

def against(row: str) -> str:
    return AGAINST.get(row, "dense")

def updates(config: Config, trial: Trial) -> int:
    """As many as bring the FLOPs of the dense row, to the nearest."""
    ratio = 1.0
    if trial.row not in EQUAL_TOKENS:
        ratio = flops(config, against(trial.row)) / flops(config, trial.row)
    return max(1, round(trial.length * ratio * config.batch_tokens / trial.batch))

def total_flops(config: Config, trial: Trial) -> float:
    return updates(config, trial) * trial.batch * flops(config, trial.row)

# --- a run ---

# of validation, 24 updates' worth of time each: only the last one for the shortest runs
EVAL_EVERY = 200
EVAL_TOKENS = 600_000

def flags_of(config: Config, trial: Trial) -> dict:
    """All flags of a run, but out_dir."""
    steps = updates(config, trial)
    flags = {
        # the quickest on one core
        "dtype": "bfloat16",
        "compile": "true",
        "micro_batch": 8,
        "eval_tokens": EVAL_TOKENS,
        # four points of a curve; a dense start ends before the first
        "eval_every": max(EVAL_EVERY, math.ceil(steps / 4)),
        # what a kill may cost
        "save_every": 200,
        "keep": 1,
    }
    # the row has the last word
    flags |= settings(config, trial.row)
    flags["steps"] = steps
    flags["batch_tokens"] = trial.batch
    for name in ("lr", "aux_lr", "weight_decay", "momentum", "seed"):
        flags[name] = getattr(trial, name)
    # AdamW has betas in its place
    if flags["optimizer"] == "adamw":
        del flags["momentum"]
    flags["data_dir"] = os.path.abspath(config.data_dir)
    return flags

def name_of(trial: Trial) -> str:
    """One name a trial, below its row's."""
    return "-".join(f"{value:g}" for value in trial[1:])

def run_of(config: Config, trial: Trial) -> Run:
    # whole, because train.py starts in the project's folder
    folder = os.path.abspath(os.path.join(config.out_dir, trial.row, name_of(trial)))
    flags = flags_of(config, trial)
    return Run(folder, flags, layers.script_of(flags))
