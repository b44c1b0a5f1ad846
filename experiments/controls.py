"""What each part of LOST is worth: every control at equal tokens and parameters, over seeds.

    python experiments/controls.py run   --data_dir data/controls --out_dir out/controls
    python experiments/controls.py table --data_dir data/controls --out_dir out/controls
    python experiments/controls.py plot  --data_dir data/controls --out_dir out/controls

`run` trains what is missing, as experiments/runs.py says; the same command continues. Most rows have a sweep
of their own, those that differ little from another (`SWEPT`) take the learning rate that is best there.
`table` prints Markdown from what the runs wrote, `plot` draws the curves of the rows that have a sweep.

Parameters: the budget is that of LOST by the recipe. Every other row but dense gets the largest rank r that
fits everywhere, and r + 1 in as many modules, the first of a shape, as bring it nearest to the budget."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import functools
import itertools
import math
import statistics
from dataclasses import dataclass

import numpy as np

# first of ours: it imports nanolost before torch, and registers kinds before --linear lists them
from experiments import layers
from experiments.runs import Experiment, Key, Rates, Run, Settings, chosen, drive, extra, folder_of, shapes
from experiments.tables import markdown, pyplot, save_figure, show, spread
from model import MODELS, Llama
from nanolost.counts import count_flops, count_parameters
from nanolost.flags import flag

# a budget that is spent on rank alone, at CoLA's scale
NO_SPARSE = {"sparsity": 0, "gamma": 1}

# flags of train.py
ROWS = {
    "dense": {"linear": "dense"},
    "dense, half W": {"linear": "dense", "init_std": 0.01},
    "low-rank": {"linear": "lowrank"},
    "CoLA": {"linear": "cola"},
    # LOST's scale without its path
    "CoLA, γ 0.7": {"linear": "cola", "gamma": 0.7},
    "SVD": {**NO_SPARSE, "activation": "none"},
    "SVD + SiLU": NO_SPARSE,
    "SVD + SiLU, γ 0.7": {"sparsity": 0, "gamma": 0.7},
    "random of W's scale + SiLU": {**NO_SPARSE, "linear": "scaled"},
    "LOST": {},
    "random channels": {"select": "random"},
    "channels by weight": {"select": "weight"},
    "channels by L1": {"select": "residual_l1"},
    "sparse from residual": {"sparse_init": "residual"},
    "γ 0.5": {"gamma": 0.5},
    "γ 0.9": {"gamma": 0.9},
    "γ learned": {"learn_gamma": True},
    # γ at a quarter of the matrices' rate. --aux_lr moves embedding, head and norms too: hence a row that
    # differs from it in the learned γ alone
    "aux_lr 0.003": {"aux_lr": 3e-3},
    "γ learned, aux_lr 0.003": {"learn_gamma": True, "aux_lr": 3e-3},
    "ρ 0.03": {"sparsity": 0.03},
    "ρ 0.05": {"sparsity": 0.05},
    "ρ 0.1": {"sparsity": 0.1},
    "LOST without SiLU": {"activation": "none"},
    "random start": {"init": "random"},
    "random start, γ 0.5": {"init": "random", "gamma": 0.5},
    "random start, random channels": {"init": "random", "select": "random"},
    # δ = 0.03 as published
    "SLTrain": {"linear": "sltrain", "sparsity": 0.03},
    "dense, Muon": {"linear": "dense", "optimizer": "muon"},
    "LOST, Muon": {"optimizer": "muon"},
    "SVD + SiLU, Muon": {**NO_SPARSE, "optimizer": "muon"},
    "random start, Muon": {"init": "random", "optimizer": "muon"},
}

# row → the one by whose sweep it goes, where that is another
SWEPT = {row: row for row in ROWS}
SWEPT |= dict.fromkeys((
    "random channels", "channels by weight", "channels by L1", "sparse from residual",
    "γ 0.5", "γ 0.9", "γ learned", "aux_lr 0.003", "γ learned, aux_lr 0.003",
    "ρ 0.03", "ρ 0.05", "ρ 0.1",
), "LOST")
SWEPT["SVD + SiLU, γ 0.7"] = "SVD + SiLU"
SWEPT["random start, γ 0.5"] = "random start"
SWEPT["random start, random channels"] = "random start"

# row → the one that it is held against, LOST for the others
AGAINST = {"γ learned, aux_lr 0.003": "aux_lr 0.003"}

# two tables, as one of ten columns fits no page
COLUMNS = ("", "lr", "seeds", "loss", "loss − LOST's, in pairs")
MORE_COLUMNS = ("", "perplexity", "bits per byte", "parameters", "FLOPs a token")
# what `lost.diagnose` says of a layer
INSIDE = ("low_rank_share", "cosine", "effective_rank", "norm_A", "norm_B", "gamma")

@dataclass(frozen=True)
class Config(Settings):
    # factors of 2 around the best of most rows
    lrs: Rates = flag((3e-3, 6e-3, 1.2e-2, 2.4e-2), "learning rates of every sweep")
    model: str = flag("tiny", "size", list(MODELS))
    width: int | None = flag(None, "another n_embd, with n_embd / 32 heads and layers, rank n_embd / 4")

# --- what a row is ---

def shape(config: Config) -> dict:
    """Sizes of a model of --width; the MLP's is 8/3 of it, in eights as LLaMA's are."""
    if config.width is None:
        return {}
    # a head has 32 features at every width, as `tiny` has
    count = config.width // 32
    return {
        "n_embd": config.width,
        "n_ffn": 8 * math.ceil(config.width / 3),
        "n_head": count,
        "n_layer": count,
    }

def build(config: Config, flags: dict) -> Llama:
    """The model of a row, shapes only."""
    # what a row says of its size comes last, as on its command line
    sizes = shape(config)
    return shapes(config, {"model": config.model, **sizes, **flags})

def modules_by_price(model: Llama) -> dict[int, list[str]]:
    """Parameters that one more rank costs in a module (in + out) → the modules of that price."""
    found = {}
    for name, module in model.named_modules():
        # the factors, in every kind of layer that has them
        if hasattr(module, "A"):
            inputs = module.A.shape[1]
            outputs = module.B.shape[0]
            found.setdefault(inputs + outputs, []).append(name)
    return found

def raised(modules: dict[int, list[str]], rest: int) -> list[str]:
    """Modules that get one more rank: as many of each price, the first ones, as bring the sum nearest to
    `rest`, never above it."""
    def total(counts):
        each = zip(counts, modules, strict=True)
        return sum(count * price for count, price in each)
    # a model has few shapes, so that all choices are few
    numbers = [range(len(names) + 1) for names in modules.values()]
    choices = itertools.product(*numbers)
    best = max(filter(lambda counts: total(counts) <= rest, choices), key=total)
    more = []
    for count, names in zip(best, modules.values(), strict=True):
        more += names[:count]
    return more

@functools.cache
def matched(config: Config, row: str) -> dict:
    """The flags of a row with the rank that meets the budget."""
    flags = ROWS[row]
    if flags.get("linear") == "dense":
        return flags
    # counted, not computed: kinds of layers differ in what they hold
    def count(rank):
        return count_parameters(build(config, {**flags, "rank": rank}))
    # `tiny` has width 128 and rank 32
    lost = {"rank": config.width // 4} if config.width else {}
    budget = count_parameters(build(config, lost))
    # each rank more costs the same
    one = count(1)
    rank = 1 + (budget - one) // (count(2) - one)
    model = build(config, {**flags, "rank": rank})
    rest = budget - count_parameters(model)
    more = raised(modules_by_price(model), rest)
    if not more:
        return {**flags, "rank": rank}
    # as --rank reads it: a number for some modules, another for all others
    by_module = dict.fromkeys(more, rank + 1)
    by_module["default"] = rank
    return {**flags, "rank": by_module}

def flops(config: Config, row: str) -> int:
    """FLOPs of training on one token. SLTrain makes the products of a whole W, as dense does."""
    flags = ROWS["dense"] if row == "SLTrain" else matched(config, row)
    return count_flops(build(config, flags))

# --- its runs ---

def flags_of(config: Config, key: Key) -> dict:
    """All flags of a run, but out_dir."""
    flags = {
        # whatever the size's recipe says: a row that wants Muon says so
        "optimizer": "adamw",
        # one checkpoint and one evaluation, at the end
        "keep": 1,
        "save_every": config.steps,
        "eval_every": config.steps,
        "eval_tokens": 200_000,
    }
    flags |= extra(config)
    flags["model"] = config.model
    flags["steps"] = config.steps
    flags["lr"] = key.lr
    flags["seed"] = key.seed
    flags["data_dir"] = os.path.abspath(config.data_dir)
    # the row has the last word, and its size
    flags |= shape(config)
    return flags | matched(config, key.row)

def run_of(config: Config, key: Key) -> Run:
    flags = flags_of(config, key)
    folder = folder_of(config, key)
    if flags.get("linear") in layers.NAMES:
        return Run(folder, flags, "experiments/layers.py")
    return Run(folder, flags)

def experiment(config: Config) -> Experiment:
    def run(key):
        return run_of(config, key)
    def rates(row):
        return config.lrs
    return Experiment(config, run, SWEPT, rates)

def train(config: Config):
    """Train what is missing of the chosen rows, and of the sweeps that they go by."""
    experiment(config).train(chosen(config, ROWS))

# --- the tables ---

def sweep_table(found: Experiment, rows: list[str]) -> str:
    """Losses of seed 0, rows by learning rates, the best of each in bold."""
    sweeps = found.sweeps(rows)
    # some have gone on where others ended
    rates = sorted(set().union(*sweeps.values()))
    body = []
    for row, losses in sweeps.items():
        best = found.best_lr(row)
        cells = [sweep_cell(losses.get(lr), lr == best) for lr in rates]
        body.append([row, *cells])
    head = [f"{lr:g}" for lr in rates]
    return markdown(["", *head], body)

def sweep_cell(loss: float | None, best: bool) -> str:
    # where another row's sweep has gone on, or this one has not been yet
    if loss is None:
        return ""
    shown = f"{loss:.3f}" if loss < math.inf else "diverged"
    return f"**{shown}**" if best else shown

def difference(found: Experiment, row: str) -> str:
    """Of the losses to those of the row that it is held against, seed by seed: the same first weights before
    the decomposition, and the same batches."""
    against = AGAINST.get(row, "LOST")
    # to itself there is none
    if row == against:
        return ""
    others = found.finished(against)
    own = found.finished(row)
    pairs = []
    for seed in own.keys() & others.keys():
        pairs.append(own[seed]["val_loss"] - others[seed]["val_loss"])
    if not pairs:
        return ""
    shown = spread(pairs, "+.3f")
    return shown if against == "LOST" else f"{shown} ({against})"

def main_row(found: Experiment, row: str) -> list:
    finished = list(found.finished(row).values())
    count = str(len(finished))
    diverged = len(found.results(row)) - len(finished)
    if diverged:
        count += f", {diverged} diverged"
    losses = [result["val_loss"] for result in finished]
    # in the order of COLUMNS
    return [
        row,
        f"{found.best_lr(row):g}",
        count,
        spread(losses, ".3f"),
        difference(found, row),
    ]

def more_row(config: Config, found: Experiment, row: str) -> list:
    finished = list(found.finished(row).values())
    def all_of(name):
        return [result[name] for result in finished]
    # in the order of MORE_COLUMNS, and the speed
    return [
        row,
        spread(all_of("val_ppl"), ".1f"),
        spread(all_of("val_bpb"), ".3f"),
        f"{count_parameters(build(config, matched(config, row))):,}",
        f"{flops(config, row) / 1e6:.2f} M",
        f"{statistics.median(all_of('tokens_per_second')):,.0f}",
    ]

def inside_row(found: Experiment, row: str) -> list | None:
    """Of what the layers do at the end the mean over seeds, None for a row without layers that say it."""
    results = found.finished(row).values()
    # dense has none, and SLTrain's say nothing
    seen = [result["layers"] for result in results if "layers" in result]
    if not seen:
        return None
    cells = [row]
    for name in INSIDE:
        mean = statistics.mean(one[name] for one in seen)
        cells.append(f"{mean:.3f}")
    return cells

def tables(config: Config) -> str:
    """The four tables as Markdown."""
    found = experiment(config)
    rows = chosen(config, ROWS)
    begun = found.begun(rows)
    body = [main_row(found, row) for row in begun]
    more = [more_row(config, found, row) for row in begun]
    inside = [inside_row(found, row) for row in begun]
    inside = [cells for cells in inside if cells]
    # runs side by side share the machine: their speed is no benchmark
    more_head = [*MORE_COLUMNS, f"tokens/s of {config.jobs} at a time"]
    return "\n".join([
        f"{config.model}, {config.steps} steps. Validation loss of seed 0 at each learning rate\n",
        sweep_table(found, rows),
        "Mean ± standard deviation over seeds, at the best learning rate of the row that was swept\n",
        markdown(COLUMNS, body),
        "The same runs: what they reach in other units, and what they cost\n",
        markdown(more_head, more),
        "Inside the layers at the end, mean over layers and seeds\n",
        markdown(["", *INSIDE], inside),
    ])

def table(config: Config):
    """Print the tables, or put them between the markers of a document."""
    show(config.fill, "controls", tables(config))

# --- the figure ---

def mean_curve(runs: list[list[dict]]) -> tuple[list, list]:
    """(tokens, loss) of the updates of several runs, the loss as mean over runs."""
    tokens = [line["tokens"] for line in runs[0]]
    losses = []
    # an update of all seeds at a time
    for lines in zip(*runs, strict=True):
        mean = statistics.mean(line["loss"] for line in lines)
        losses.append(mean)
    return tokens, losses

def plot(config: Config):
    """Training loss against tokens and FLOPs, mean over seeds, of each row with a sweep of its own."""
    found = experiment(config)
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 5), sharey=True)
    by_tokens, by_flops = axes
    for row in chosen(config, ROWS):
        finished = found.finished(row)
        # rows without a sweep of their own lie on that of another
        if SWEPT[row] != row or not finished:
            continue
        keys = [Key(row, found.best_lr(row), seed) for seed in finished]
        runs = [run_of(config, key).records("train") for key in keys]
        tokens, losses = mean_curve(runs)
        tokens = np.array(tokens)
        compute = tokens * flops(config, row)
        by_tokens.plot(tokens / 1e6, losses, label=row)
        by_flops.plot(compute / 1e12, losses, label=row)
    by_tokens.set_xlabel("training tokens, millions")
    by_tokens.set_ylabel("training loss (nats a token)")
    by_flops.set_xlabel("training compute, 10¹² FLOPs")
    # above it lies the start of every run, which would press what differs into a corner
    by_tokens.set_ylim(top=6)
    for axes in (by_tokens, by_flops):
        axes.grid(alpha=0.3)
    # beside it: there are up to 20 lines
    by_flops.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{config.model}, {config.steps} steps, each at its best learning rate")
    return save_figure(figure, config.out_dir, "controls.png")

if __name__ == "__main__":
    verbs = {"run": train, "table": table, "plot": plot}
    drive(verbs, Config, __doc__)
