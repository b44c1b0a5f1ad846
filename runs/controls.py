"""What each part of LOST is worth: every control at equal tokens and parameters, over seeds.

    python runs/controls.py run    --data_dir data/controls --out_dir out/controls
    python runs/controls.py table  --data_dir data/controls --out_dir out/controls
    python runs/controls.py plot   --data_dir data/controls --out_dir out/controls
    python runs/controls.py ladder --data_dir data/controls --out_dir out/controls --rows dense/LOST

`run` trains what is missing, as many runs at a time as there are cores, each one `python train.py` on a core
of its own: first every family of rows at each learning rate, then all its rows at its best, with more seeds.
The same command continues. `table` reads the metrics.jsonl of the runs and prints Markdown. `ladder` trains
its rows at four widths and fits loss = a · FLOPs^-b to each.

Parameters: the budget is that of LOST by the recipe. Every other row but dense gets the largest rank r that
fits everywhere, and r + 1 in as many modules, the first of a shape, as bring it nearest to the budget."""
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train  # noqa: E402
from data import Tokenizer  # noqa: E402
from flags import command, flag, parse  # noqa: E402
from lost import apply_lost, by_module  # noqa: E402
from model import Llama, count_flops, count_parameters  # noqa: E402

SCRIPT = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(SCRIPT))
NO_SPARSE = {"sparsity": 0, "gamma": 1}
FAMILIES = {                                   # row: flags of train.py. A family shares its first row's sweep
    "dense": {"dense": {"linear": "dense"}},
    "dense, half W": {"dense, half W": {"linear": "dense", "init_std": 0.01}},
    "low-rank": {"low-rank": {"linear": "lowrank"}},
    "CoLA": {"CoLA": {"linear": "cola"}},
    "CoLA, γ 0.7": {"CoLA, γ 0.7": {"linear": "cola", "gamma": 0.7}},      # LOST's scale without its path
    "SVD": {"SVD": {**NO_SPARSE, "activation": "none"}},
    "SVD + SiLU": {
        "SVD + SiLU": NO_SPARSE,
        "SVD + SiLU, γ 0.7": {"sparsity": 0, "gamma": 0.7},
    },
    "random of W's scale + SiLU": {"random of W's scale + SiLU": {**NO_SPARSE, "layer": "scaled"}},
    "LOST": {
        "LOST": {},
        "random channels": {"select": "random"},
        "channels by weight": {"select": "weight"},
        "channels by L1": {"select": "residual_l1"},
        "sparse from residual": {"sparse_init": "residual"},
        "γ 0.5": {"gamma": 0.5},
        "γ 0.9": {"gamma": 0.9},
        "γ learned": {"learn_gamma": True},
        "ρ 0.03": {"sparsity": 0.03},
        "ρ 0.05": {"sparsity": 0.05},
        "ρ 0.1": {"sparsity": 0.1},
    },
    "LOST without SiLU": {"LOST without SiLU": {"activation": "none"}},
    "random start": {
        "random start": {"init": "random"},
        "random start, γ 0.5": {"init": "random", "gamma": 0.5},
        "random start, random channels": {"init": "random", "select": "random"},
    },
    "SLTrain": {"SLTrain": {"layer": "sltrain", "sparsity": 0.03}},
    "dense, Muon": {"dense, Muon": {"linear": "dense", "optimizer": "muon"}},
    "LOST, Muon": {"LOST, Muon": {"optimizer": "muon"}},
    "SVD + SiLU, Muon": {"SVD + SiLU, Muon": {**NO_SPARSE, "optimizer": "muon"}},
    "random start, Muon": {"random start, Muon": {"init": "random", "optimizer": "muon"}},
}

ROWS = {row: flags for rows in FAMILIES.values() for row, flags in rows.items()}
FAMILY = {row: family for family, rows in FAMILIES.items() for row in rows}

@dataclass(frozen=True)
class Config:
    data_dir: str = flag("data/controls", "folder of token shards")
    out_dir: str = flag("out/controls", "folder of the runs: ROW/lr-seed")
    model: str = flag("tiny", "size", list(train.MODELS))
    width: int | None = flag(None, "another n_embd, with n_embd / 32 heads and layers, rank n_embd / 4")
    widths: tuple[float, ...] = flag((64, 96, 128, 192), "of the ladder")
    steps: int = flag(200, "updates of each run, a tenth of them warm-up")
    lrs: tuple[float, ...] = flag((3e-3, 6e-3, 1.2e-2, 2.4e-2), "learning rates of every family's sweep")
    seeds: int = flag(3, "seeds of each row at its family's best learning rate")
    widen: int = flag(4, "learning rates that a sweep may add where its best one is at an end")
    rows: str = flag("", "rows to run or print, separated by / (all)")
    jobs: int = flag(os.cpu_count(), "runs at a time")
    extra: str = flag("", "more flags of train.py for every run, with spaces")

# --- layers that are controls only ---

class SLTrainLinear(nn.Module):
    """x (scale · B A + S)ᵀ with S on a random support of δ·in·out places (Han et al. 2024, arXiv 2406.02214),
    A and S uniform in ±in^-½, scale α / r of their 60M model. Their B starts at 0, ours almost: train.py
    takes a parameter that no gradient reaches (A, then) for a mistake."""

    def __init__(self, linear: nn.Linear, rank: int, density: float, scale: float = 0.25):
        super().__init__()
        (out, n), device = linear.weight.shape, linear.weight.device
        self.scale, self.shape = scale, (out, n)
        self.A = nn.Parameter(torch.empty(rank, n, device=device).uniform_(-n ** -0.5, n ** -0.5))
        self.B = nn.Parameter(torch.empty(out, rank, device=device).normal_(std=1e-4))
        count = int(density * out * n)
        support = torch.randperm(out * n, device=device)[:count].sort().values
        self.values = nn.Parameter(torch.empty(count, device=device).uniform_(-n ** -0.5, n ** -0.5))
        self.register_buffer("support", support)

    def forward(self, x):
        W = (self.scale * (self.B @ self.A)).flatten()                     # bfloat16 under autocast
        return F.linear(x, W.index_add(0, self.support, self.values.to(W.dtype)).view(self.shape))

def apply_sltrain(model, rank, sparsity, **_) -> nn.Module:
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            density = sparsity
            model.set_submodule(name, SLTrainLinear(linear, by_module(rank, name), density))
    return model

def apply_scaled(model, rank, **switches) -> nn.Module:
    """apply_lost with random factors shrunk so that ‖B A‖_F is that of the best rank-r part of W."""
    norms = {} if next(model.parameters()).is_meta else {
        name: torch.linalg.svdvals(linear.weight)[:by_module(rank, name)].norm()
        for name, linear in model.named_modules() if isinstance(linear, nn.Linear) and name != "lm_head"}
    apply_lost(model, rank, **{**switches, "init": "random"})
    with torch.no_grad():
        for name, norm in norms.items():
            layer = model.get_submodule(name)
            shrink = (norm / (layer.B @ layer.A).norm()).sqrt()
            layer.A *= shrink
            layer.B *= shrink
    return model

LAYERS = {"sltrain": apply_sltrain, "scaled": apply_scaled}                # in the place of lost.apply_lost

# --- what a row is ---

def shape(config: Config) -> dict:
    n = config.width
    return dict(n_embd=n, n_ffn=8 * math.ceil(n / 3), n_head=n // 32, n_layer=n // 32) if n else {}

def build(config: Config, flags: dict) -> Llama:
    """The model of a row, shapes only."""
    layer, flags = flags.get("layer"), {name: value for name, value in flags.items() if name != "layer"}
    full = train.resolve({"model": config.model, **shape(config), **flags})
    full.vocab_size = Tokenizer.load(os.path.join(config.data_dir, "tokenizer.json")).vocab_size
    with using(layer):
        return train.build_model(full, "meta")

@contextlib.contextmanager
def using(layer: str | None):
    """train.py with another layer in the place of LOST's."""
    before, train.apply_lost = train.apply_lost, LAYERS[layer] if layer else train.apply_lost
    try:
        yield
    finally:
        train.apply_lost = before

@functools.cache
def matched(config: Config, row: str) -> dict:
    """The flags of a row with the rank that meets the budget."""
    flags, count = ROWS[row], lambda **given: count_parameters(build(config, {**ROWS[row], **given}))
    if flags.get("linear") == "dense":
        return flags
    lost = {"rank": config.width // 4} if config.width else {}
    budget, rank = count_parameters(build(config, lost)), 1
    while count(rank=rank + 1) <= budget:
        rank += 1
    model = build(config, {**flags, "rank": rank})
    cost, rest = {}, budget - count_parameters(model)  # one more rank costs in + out of the module
    for name, module in model.named_modules():
        if hasattr(module, "A"):
            cost.setdefault(module.A.shape[1] + module.B.shape[0], []).append(name)
    def price(more):                           # of a rank more in so many modules of each price
        return sum(n * each for n, each in zip(more, cost, strict=True))
    choices = itertools.product(*(range(len(names) + 1) for names in cost.values()))
    best = max((more for more in choices if price(more) <= rest), key=price)
    raised = [name for names, n in zip(cost.values(), best, strict=True) for name in names[:n]]
    return {**flags, "rank": {**dict.fromkeys(raised, rank + 1), "default": rank} if raised else rank}

def multiplied(config: Config, row: str) -> Llama:
    """The model whose products a row computes: SLTrain's those of a whole W, as dense does."""
    return build(config, ROWS["dense"] if row == "SLTrain" else matched(config, row))

def chosen(config: Config) -> list[str]:
    rows = config.rows.split("/") if config.rows else list(ROWS)
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"--rows {'/'.join(unknown)}: choose from {'/'.join(ROWS)}")
    return rows

def text(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)

# --- runs ---

def folder(config: Config, row: str, lr: float, seed: int) -> str:
    return os.path.abspath(os.path.join(config.out_dir, row, f"{lr:g}-{seed}"))

def lines(path: str) -> list[dict]:
    with open(os.path.join(path, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]

def status(path: str) -> dict:
    try:
        with open(os.path.join(path, "status.json"), encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return {"state": "missing", "reason": ""}

def final(config: Config, row: str, lr: float, seed: int = 0) -> float | None:
    """Loss at the end of a run, infinite if it diverged, None if it is yet to come."""
    path = folder(config, row, lr, seed)
    if status(path)["state"] == "finished":
        return last(lines(path), "val_loss")
    return math.inf if "FloatingPointError" in status(path)["reason"] else None

def train_one(config: Config, row: str, lr: float, seed: int):
    if final(config, row, lr, seed) is not None:
        return
    path, flags = folder(config, row, lr, seed), dict(matched(config, row))
    layer = flags.pop("layer", None)
    script = [SCRIPT, layer, "--resume=never", "--overwrite"] if layer else ["train.py"]
    flags = {"model": config.model, **shape(config), "data_dir": os.path.abspath(config.data_dir),
             "out_dir": path, "steps": config.steps, "warmup": config.steps // 10, "keep": 1,
             "save_every": config.steps, "eval_every": config.steps, "eval_tokens": 200_000,
             "lr": lr, "seed": seed, **flags}
    command = [sys.executable, *script, *(f"--{name}={text(value)}" for name, value in flags.items())]
    done = subprocess.run([*command, *config.extra.split()], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if final(config, row, lr, seed) is None:
        raise ValueError(f"{path}: {(done.stderr.strip() or 'was stopped').splitlines()[-1]}")
    print(f"{row}, lr {lr:g}, seed {seed}: {final(config, row, lr, seed):.4f}", flush=True)

def sweep(config: Config, family: str) -> dict[float, float | None]:
    """Learning rate → final loss of the family's first row. While the best is at an end, the sweep goes on
    there by factors of 2: the same rule for every family."""
    lrs, row = sorted(config.lrs), next(iter(FAMILIES[family]))
    while True:
        losses = [final(config, row, lr) for lr in lrs]
        best = None if None in losses else losses.index(min(losses))
        if best is None or 0 < best < len(lrs) - 1 or len(lrs) == len(config.lrs) + config.widen:
            return dict(zip(lrs, losses, strict=True))
        lrs = [lrs[0] / 2, *lrs] if best == 0 else [*lrs, lrs[-1] * 2]

def best_lr(config: Config, family: str) -> float:
    losses = sweep(config, family)
    return min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])

def run(config: Config):
    rows = chosen(config)
    families = dict.fromkeys(FAMILY[row] for row in rows)
    for row in rows:                           # before there are threads: `using` is for one alone
        matched(config, row)
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        def all_of(jobs):
            for job in [pool.submit(train_one, config, *job) for job in jobs]:
                job.result()
        while sweeps := [(next(iter(FAMILIES[family])), lr, 0) for family in families
                         for lr, loss in sweep(config, family).items() if loss is None]:
            all_of(sweeps)
        all_of((row, best_lr(config, FAMILY[row]), seed) for seed in range(config.seeds) for row in rows)

# --- what came out ---

def spread(values: list[float], form: str) -> str:
    """mean ± standard deviation."""
    middle = format(statistics.mean(values), form)
    return middle + (f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else "")

def markdown(*rows: list) -> None:
    head, *rest = [" | ".join(map(str, row)) for row in rows]
    print(f"| {head} |", "|" + "---|" * len(rows[0]), *(f"| {row} |" for row in rest), "", sep="\n")

def results(config: Config, row: str) -> dict[int, list[dict]]:
    """seed → lines of metrics.jsonl, of the finished runs of a row at its family's learning rate."""
    lr = best_lr(config, FAMILY[row])
    paths = {seed: folder(config, row, lr, seed) for seed in range(config.seeds)}
    return {seed: lines(path) for seed, path in paths.items() if status(path)["state"] == "finished"}

def last(run: list[dict], name: str) -> float:
    return [line for line in run if line["kind"] == "eval"][-1][name]

def table(config: Config):
    rows = chosen(config)
    families = dict.fromkeys(FAMILY[row] for row in rows)
    print(f"{config.model}, {config.steps} steps. Validation loss of seed 0 at each learning rate\n")
    sweeps = {family: sweep(config, family) for family in families}
    lrs = sorted({lr for losses in sweeps.values() for lr in losses})
    def shown(family, lr):
        loss = sweeps[family].get(lr)
        return "" if loss is None else f"**{loss:.3f}**" if lr == best_lr(config, family) else f"{loss:.3f}"
    markdown(["", *(f"{lr:g}" for lr in lrs)], *([f, *(shown(f, lr) for lr in lrs)] for f in families))
    lost, body = results(config, "LOST"), []
    for row in rows:
        runs, model = results(config, row), build(config, matched(config, row))
        if not runs:
            continue
        loss = {seed: last(run, "val_loss") for seed, run in runs.items()}
        pairs = [loss[seed] - last(lost[seed], "val_loss") for seed in loss if seed in lost]
        speed = [line["tokens_per_second"] for r in runs.values() for line in r if line["kind"] == "train"]
        body.append([
            row, f"{best_lr(config, FAMILY[row]):g}", len(runs), spread(list(loss.values()), ".3f"),
            spread(pairs, "+.3f") if pairs and row != "LOST" else "",
            spread([last(run, "val_ppl") for run in runs.values()], ".1f"),
            spread([last(run, "val_bpb") for run in runs.values()], ".3f"), f"{count_parameters(model):,}",
            f"{count_flops(multiplied(config, row)) / 1e6:.2f} M",
            f"{statistics.median(speed):,.0f}"])
    print("At the best learning rate, mean ± standard deviation over seeds\n")
    markdown(["", "lr", "seeds", "loss", "loss − LOST's, paired", "perplexity", "bits per byte", "parameters",
              "FLOPs a token", "tokens/s"], *body)
    print("LOST layers at the end, mean over layers and seeds\n")
    names = ("low_rank_share", "cosine", "effective_rank", "norm_A", "norm_B", "gamma")
    inside = {row: [layer for run in results(config, row).values() for layer in last(run, "layers").values()]
              for row in rows if ROWS[row].get("linear") != "dense" and row != "SLTrain"}
    markdown(["", *names], *(
        [row, *(f"{statistics.mean(layer[name] for layer in layers):.3f}" for name in names)]
        for row, layers in inside.items() if layers))

def plot(config: Config):
    """Training loss against tokens and FLOPs, mean over seeds, of the first row of each family."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for row in (next(iter(rows)) for rows in FAMILIES.values()):
        runs = [[line for line in run if line["kind"] == "train"] for run in results(config, row).values()]
        if runs:
            flops = count_flops(multiplied(config, row))
            tokens = [line["tokens"] for line in runs[0]]
            loss = [statistics.mean(line["loss"] for line in step) for step in zip(*runs, strict=True)]
            axes[0].plot([t / 1e6 for t in tokens], loss, label=row)
            axes[1].plot([t * flops / 1e12 for t in tokens], loss, label=row)
    axes[0].set(xlabel="training tokens, millions", ylabel="training loss (nats a token)", ylim=(None, 6))
    axes[1].set(xlabel="training compute, 10¹² FLOPs")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[1].legend()
    figure.suptitle(f"{config.model}, {config.steps} steps, each at its best learning rate")
    figure.savefig(path := os.path.join(config.out_dir, "controls.png"), dpi=130, bbox_inches="tight")
    print(f"drawn in {path}")

def ladder(config: Config):
    """Trains the rows at each width, prints their losses and the fit, draws them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sizes = [config if w == train.MODELS[config.model]["n_embd"] else dataclasses.replace(
        config, width=int(w), out_dir=os.path.join(config.out_dir, f"width-{w:g}")) for w in config.widths]
    for size in sizes:
        run(size)
    rows, body, fits = chosen(config), [], []
    figure, ax = plt.subplots(figsize=(6.5, 4.5))
    for row, color in zip(rows, plt.cm.tab10.colors, strict=False):
        points = []                            # (log FLOPs of a run, log loss), per size the seeds
        for size, width in zip(sizes, config.widths, strict=True):
            flops = count_flops(multiplied(size, row))
            losses = [last(r, "val_loss") for r in results(size, row).values()]
            total = flops * [line["tokens"] for line in next(iter(results(size, row).values()))
                             if line["kind"] == "train"][-1]
            points.append([(math.log(total), math.log(loss)) for loss in losses])
            body.append([row, f"{width:g}", f"{best_lr(size, FAMILY[row]):g}",
                         f"{count_parameters(build(size, matched(size, row))):,}", f"{total / 1e12:.2f}",
                         spread(losses, ".3f")])
        slope, fixed, low, high = fit(points)
        fits.append([row, f"{-slope:.4f}", f"[{-high:.4f}, {-low:.4f}]", f"{math.exp(fixed):.2f}"])
        x, y = zip(*(p for size in points for p in size), strict=True)
        ax.loglog([math.exp(v) for v in x], [math.exp(v) for v in y], "o", ms=4, color=color, label=row)
        ends = [min(x), max(x)]
        ax.loglog([math.exp(v) for v in ends], [math.exp(fixed + slope * v) for v in ends], color=color)
    markdown(["", "width", "lr", "parameters", "10¹² FLOPs", "loss"], *body)
    print("loss = a · FLOPs^-b, b with its 95 % interval by bootstrap over the seeds of each size\n")
    markdown(["", "b", "95 %", "a"], *fits)
    ax.set(xlabel="training compute, FLOPs", ylabel="validation loss (nats a token)",
           title=f"{len(sizes)} sizes, {config.steps} steps each")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    figure.savefig(path := os.path.join(config.out_dir, "ladder.png"), dpi=130, bbox_inches="tight")
    print(f"drawn in {path}")

def fit(points: list[list[tuple[float, float]]], draws: int = 2000) -> tuple[float, float, float, float]:
    """Slope, constant and 95 % interval of the slope of a line through the points, each size resampled."""
    random = np.random.default_rng(0)
    def line(groups):
        return np.polyfit(*zip(*(p for group in groups for p in group), strict=True), 1)
    slopes = [line([[g[i] for i in random.integers(len(g), size=len(g))] for g in points])[0]
              for _ in range(draws)]
    return (*line(points), *np.quantile(slopes, (0.025, 0.975)))

if __name__ == "__main__":
    what, rest = (sys.argv[1:] + ["--help"])[0], sys.argv[2:]
    if what in LAYERS:
        with using(what):
            command(lambda: train.main(train.resolve(parse(train.Config, rest))))
    elif what in (does := {"run": run, "table": table, "plot": plot, "ladder": ladder}):
        command(lambda: does[what](Config(**parse(Config, rest))))
    else:
        print(__doc__)
        parse(Config, ["--help"])
