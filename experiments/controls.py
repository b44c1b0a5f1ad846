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
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import dataclasses
import functools
import itertools
import math
import statistics
from dataclasses import dataclass

# first of ours: it imports nanolost before torch, and registers kinds before --linear lists them
from experiments import layers  # noqa: F401
from experiments.runs import Experiment, Run, Settings, chosen, drive
from experiments.tables import fill, markdown, pyplot, save_figure, spread
from model import MODELS, Llama
from nanolost.counts import count_flops, count_parameters
from nanolost.errors import UserError
from nanolost.flags import flag, parse, say
from nanolost.methods import build_model
from nanolost.settings import Config as TrainConfig
from nanolost.settings import resolve
from nanolost.tokenizer import Tokenizer

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

# what `lost.diagnose` says of a layer
INSIDE = ("low_rank_share", "cosine", "effective_rank", "norm_A", "norm_B", "gamma")

@dataclass(frozen=True)
class Config(Settings):
    lrs: tuple[float, ...] = flag((3e-3, 6e-3, 1.2e-2, 2.4e-2), "learning rates of every sweep")
    model: str = flag("tiny", "size", list(MODELS))
    width: int | None = flag(None, "another n_embd, with n_embd / 32 heads and layers, rank n_embd / 4")

# --- what a row is ---

def shape(config: Config) -> dict:
    """Sizes of a model of --width; the MLP's is 8/3 of it, in eights as LLaMA's are."""
    if config.width is None:
        return {}
    # a head has 32 features at every width, as `tiny` has
    count = config.width // 32
    inner = 8 * math.ceil(config.width / 3)
    return {"n_embd": config.width, "n_ffn": inner, "n_head": count, "n_layer": count}

@functools.cache
def extra(config: Settings) -> dict:
    """The flags in --extra. UserError for one that the driver sets itself."""
    given = parse(TrainConfig, config.extra.split())
    ours = {f.name for f in dataclasses.fields(config)} | {"lr", "seed"}
    clash = sorted(given.keys() & ours)
    if clash:
        raise UserError(f"--extra must not set {', '.join(clash)}: the driver does")
    return given

def build(config: Config, flags: dict) -> Llama:
    """The model of a row, shapes only."""
    full = resolve({"model": config.model, **extra(config), **shape(config), **flags})
    full.vocab_size = Tokenizer.load(os.path.join(config.data_dir, "tokenizer.json")).vocab_size
    return build_model(full, "meta")

def prices(model: Llama) -> dict[int, list[str]]:
    """Parameters that one more rank costs in a module (in + out) → the modules of that price."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "A"):
            price = module.A.shape[1] + module.B.shape[0]
            found.setdefault(price, []).append(name)
    return found

def raised(modules: dict[int, list[str]], rest: int) -> list[str]:
    """Modules that get one more rank: as many of each price, the first ones, as bring the sum nearest to
    `rest`, never above it."""
    def total(counts):
        return sum(count * price for count, price in zip(counts, modules, strict=True))
    # a model has few shapes, so that all choices are few
    choices = itertools.product(*(range(len(names) + 1) for names in modules.values()))
    best = max((counts for counts in choices if total(counts) <= rest), key=total)
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
    def count(rank):
        return count_parameters(build(config, {**flags, "rank": rank}))
    lost = {"rank": config.width // 4} if config.width else {}
    budget = count_parameters(build(config, lost))
    # each rank more costs the same
    one = count(1)
    rank = 1 + (budget - one) // (count(2) - one)
    model = build(config, {**flags, "rank": rank})
    more = raised(prices(model), budget - count_parameters(model))
    if not more:
        return {**flags, "rank": rank}
    by_module = dict.fromkeys(more, rank + 1)
    by_module["default"] = rank
    return {**flags, "rank": by_module}

def flops(config: Config, row: str) -> int:
    """FLOPs of training on one token. SLTrain makes the products of a whole W, as dense does."""
    flags = ROWS["dense"] if row == "SLTrain" else matched(config, row)
    return count_flops(build(config, flags))

# --- its runs ---

def flags_of(config: Config, row: str, lr: float, seed: int) -> dict:
    """All flags of a run, but out_dir."""
    flags = {
        # whatever the size's recipe says: a row that wants Muon says so
        "optimizer": "adamw",
        "keep": 1,
        "save_every": config.steps,
        "eval_every": config.steps,
        "eval_tokens": 200_000,
    }
    flags |= extra(config)
    flags |= {"model": config.model, "steps": config.steps, "lr": lr, "seed": seed}
    flags["data_dir"] = os.path.abspath(config.data_dir)
    # the row has the last word, and its size
    return {**flags, **shape(config), **matched(config, row)}

def run_of(config: Config, row: str, lr: float, seed: int) -> Run:
    folder = os.path.abspath(os.path.join(config.out_dir, row, f"{lr:g}-{seed}"))
    flags = {**flags_of(config, row, lr, seed), "out_dir": folder}
    ours = flags.get("linear") in ("sltrain", "scaled")
    return Run(folder, flags, "experiments/layers.py" if ours else "train.py")

def experiment(config: Config) -> Experiment:
    def run(row, lr, seed):
        return run_of(config, row, lr, seed)
    return Experiment(config, run, SWEPT, lambda row: config.lrs)

def train(config: Config):
    """Train what is missing of the chosen rows, and of the sweeps that they go by."""
    experiment(config).train(chosen(config, ROWS))

# --- the tables ---

def sweep_table(found: Experiment, rows: list[str]) -> str:
    """Losses of seed 0, rows by learning rates, the best of each in bold."""
    sweeps = {row: found.sweep(row) for row in found.sweeps(rows)}
    lrs = sorted({lr for losses in sweeps.values() for lr in losses})
    body = []
    for row, losses in sweeps.items():
        best = found.best_lr(row)
        body.append([row, *(sweep_cell(losses.get(lr), lr == best) for lr in lrs)])
    return markdown(["", *(f"{lr:g}" for lr in lrs)], body)

def sweep_cell(loss: float | None, best: bool) -> str:
    if loss is None:
        return ""
    shown = f"{loss:.3f}" if loss < math.inf else "diverged"
    return f"**{shown}**" if best else shown

def difference(found: Experiment, row: str) -> str:
    """Of the losses to those of the row that it is held against, seed by seed: the same first weights before
    the decomposition, and the same batches."""
    against = AGAINST.get(row, "LOST")
    if row == against:
        return ""
    others = found.finished(against)
    own = found.finished(row)
    pairs = [own[seed]["val_loss"] - others[seed]["val_loss"] for seed in own if seed in others]
    if not pairs:
        return ""
    shown = spread(pairs, "+.3f")
    return shown if against == "LOST" else f"{shown} ({against})"

def main_row(config: Config, found: Experiment, row: str) -> list:
    finished = list(found.finished(row).values())
    diverged = len(found.results(row)) - len(finished)
    count = f"{len(finished)}, {diverged} diverged" if diverged else f"{len(finished)}"
    def all_of(name):
        return [result[name] for result in finished]
    return [
        row,
        f"{found.best_lr(row):g}",
        count,
        spread(all_of("val_loss"), ".3f"),
        difference(found, row),
        spread(all_of("val_ppl"), ".1f"),
        spread(all_of("val_bpb"), ".3f"),
        f"{count_parameters(build(config, matched(config, row))):,}",
        f"{flops(config, row) / 1e6:.2f} M",
        f"{statistics.median(all_of('tokens_per_second')):,.0f}",
    ]

def inside_row(found: Experiment, row: str) -> list | None:
    """Of what the layers do at the end the mean over seeds, None for a row without layers that say it."""
    seen = [result["layers"] for result in found.finished(row).values() if "layers" in result]
    if not seen:
        return None
    return [row, *(f"{statistics.mean(one[name] for one in seen):.3f}" for name in INSIDE)]

def tables(config: Config) -> str:
    """The three tables as Markdown."""
    found = experiment(config)
    rows = chosen(config, ROWS)
    # of a row that has not begun there is nothing to say
    begun = [row for row in rows if found.finished(row)]
    inside = [inside_row(found, row) for row in begun]
    head = ["", "lr", "seeds", "loss", "loss − LOST's, in pairs", "perplexity", "bits per byte", "parameters",
            "FLOPs a token", f"tokens/s of {config.jobs} at a time"]
    return "\n".join([
        f"{config.model}, {config.steps} steps. Validation loss of seed 0 at each learning rate\n",
        sweep_table(found, rows),
        "Mean ± standard deviation over seeds, at the best learning rate of the row that was swept\n",
        markdown(head, [main_row(config, found, row) for row in begun]),
        "Inside the layers at the end, mean over layers and seeds\n",
        markdown(["", *INSIDE], [cells for cells in inside if cells]),
    ])

def table(config: Config):
    """Print the tables, or put them between the markers of a document."""
    if config.fill:
        fill(config.fill, "controls", tables(config))
    else:
        say(tables(config))

# --- the figure ---

def mean_curve(runs: list[list[dict]]) -> tuple[list[int], list[float]]:
    """(tokens, loss) of the updates of several runs, the loss as mean over runs."""
    tokens = [line["tokens"] for line in runs[0]]
    losses = [statistics.mean(line["loss"] for line in lines) for lines in zip(*runs, strict=True)]
    return tokens, losses

def plot(config: Config):
    """Training loss against tokens and FLOPs, mean over seeds, of each row with a sweep of its own."""
    found = experiment(config)
    figure, (by_tokens, by_flops) = pyplot().subplots(1, 2, figsize=(12, 5), sharey=True)
    for row in chosen(config, ROWS):
        finished = found.finished(row)
        if SWEPT[row] != row or not finished:
            continue
        runs = [run_of(config, row, found.best_lr(row), seed).records("train") for seed in finished]
        tokens, losses = mean_curve(runs)
        cost = flops(config, row)
        by_tokens.plot([n / 1e6 for n in tokens], losses, label=row)
        by_flops.plot([n * cost / 1e12 for n in tokens], losses, label=row)
    # above 6 lies the start of every run, which would press what differs into a corner
    by_tokens.set(xlabel="training tokens, millions", ylabel="training loss (nats a token)", ylim=(None, 6))
    by_flops.set(xlabel="training compute, 10¹² FLOPs")
    for axes in (by_tokens, by_flops):
        axes.grid(alpha=0.3)
    by_flops.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{config.model}, {config.steps} steps, each at its best learning rate")
    return save_figure(figure, config.out_dir, "controls.png")

if __name__ == "__main__":
    drive({"run": train, "table": table, "plot": plot}, Config, __doc__)
