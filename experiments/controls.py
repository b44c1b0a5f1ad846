"""What each part of LOST is worth: every control at equal tokens and parameters, over seeds.

    python experiments/controls.py run    --data_dir data/controls --out_dir out/controls
    python experiments/controls.py table  --data_dir data/controls --out_dir out/controls
    python experiments/controls.py plot   --data_dir data/controls --out_dir out/controls
    python experiments/controls.py ladder --data_dir data/controls --out_dir out/controls --rows dense/LOST

`run` trains what is missing, --jobs runs at a time, each one `python train.py` on a core of its own: first
seed 0 at each learning rate of a sweep, then all rows and seeds at the best one. Most rows have a sweep of
their own, those that differ little from another (`SWEPT`) take the learning rate that is best there. The same
command continues. `table` reads the metrics.jsonl of the runs and prints Markdown. `ladder` trains its rows
at several widths and fits loss = a · FLOPs^-b to each.

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
import signal
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
from lost import apply_lost, by_module  # noqa: E402
from model import Llama
from nanolost.counts import count_flops, count_parameters  # noqa: E402
from nanolost.flags import command, flag, parse  # noqa: E402
from nanolost.tokenizer import Tokenizer  # noqa: E402

SCRIPT = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(SCRIPT))
NO_SPARSE = {"sparsity": 0, "gamma": 1}
ROWS = {                                       # flags of train.py
    "dense": {"linear": "dense"},
    "dense, half W": {"linear": "dense", "init_std": 0.01},
    "low-rank": {"linear": "lowrank"},
    "CoLA": {"linear": "cola"},
    "CoLA, γ 0.7": {"linear": "cola", "gamma": 0.7},                       # LOST's scale without its path
    "SVD": {**NO_SPARSE, "activation": "none"},
    "SVD + SiLU": NO_SPARSE,
    "SVD + SiLU, γ 0.7": {"sparsity": 0, "gamma": 0.7},
    "random of W's scale + SiLU": {**NO_SPARSE, "layer": "scaled"},
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
    "LOST without SiLU": {"activation": "none"},
    "random start": {"init": "random"},
    "random start, γ 0.5": {"init": "random", "gamma": 0.5},
    "random start, random channels": {"init": "random", "select": "random"},
    "SLTrain": {"layer": "sltrain", "sparsity": 0.03},
    "dense, Muon": {"linear": "dense", "optimizer": "muon"},
    "LOST, Muon": {"optimizer": "muon"},
    "SVD + SiLU, Muon": {**NO_SPARSE, "optimizer": "muon"},
    "random start, Muon": {"init": "random", "optimizer": "muon"},
}
AS_LOST = ("random channels", "channels by weight", "channels by L1", "sparse from residual", "γ 0.5",
           "γ 0.9", "γ learned", "ρ 0.03", "ρ 0.05", "ρ 0.1")
SWEPT = {**{row: row for row in ROWS}, **dict.fromkeys(AS_LOST, "LOST"), "SVD + SiLU, γ 0.7": "SVD + SiLU",
         "random start, γ 0.5": "random start", "random start, random channels": "random start"}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}       # Student's t, both sides, by degrees of freedom

@dataclass(frozen=True)
class Config:
    data_dir: str = flag("data/controls", "folder of token shards")
    out_dir: str = flag("out/controls", "folder of the runs: ROW/lr-seed")
    model: str = flag("tiny", "size", list(train.MODELS))
    width: int | None = flag(None, "another n_embd, with n_embd / 32 heads and layers, rank n_embd / 4")
    widths: tuple[float, ...] = flag((64, 96, 128, 192), "of the ladder")
    steps: int = flag(200, "updates of each run, a tenth of them warm-up")
    lrs: tuple[float, ...] = flag((3e-3, 6e-3, 1.2e-2, 2.4e-2), "learning rates of every sweep")
    seeds: int = flag(3, "seeds of each row at the best learning rate")
    widen: int = flag(4, "learning rates that a sweep may add where its best one is at an end")
    rows: str = flag("", "rows to run or print, separated by / (all)")
    jobs: int = flag(os.cpu_count(), "runs at a time")
    extra: str = flag("", "more flags of train.py, separated by spaces, for what no row sets")

# --- layers that are controls only ---

class SLTrainLinear(nn.Module):
    """x (scale · B A + S)ᵀ with S on a random support of δ·in·out places (Han et al. 2024, arXiv 2406.02214),
    A and S uniform in ±in^-½, scale α / r of their 60M model. Their B starts at 0, ours almost: train.py
    takes a parameter that no gradient reaches (A, then) for a mistake. S, a vector, does not decay."""

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

def linears(model) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}

def apply_sltrain(model, rank, sparsity, **_) -> nn.Module:
    for name, linear in linears(model).items():
        model.set_submodule(name, SLTrainLinear(linear, by_module(rank, name), sparsity))
    return model

def apply_scaled(model, rank, **switches) -> nn.Module:
    """apply_lost with random factors shrunk so that ‖B A‖_F is that of the best rank-r part of W."""
    norms = {} if next(model.parameters()).is_meta else {
        name: torch.linalg.svdvals(linear.weight)[:by_module(rank, name)].norm()
        for name, linear in linears(model).items()}
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

@functools.cache
def extra(config: Config) -> dict:
    given = parse(train.Config, config.extra.split())
    ours = {f.name for f in dataclasses.fields(Config)} | {"lr", "seed"}
    if clash := given.keys() & ours:
        raise ValueError(f"--extra must not set {', '.join(sorted(clash))}: the driver does")
    return given

def build(config: Config, flags: dict) -> Llama:
    """The model of a row, shapes only."""
    layer, flags = flags.get("layer"), {name: value for name, value in flags.items() if name != "layer"}
    full = train.resolve({"model": config.model, **extra(config), **shape(config), **flags})
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
    budget, one = count_parameters(build(config, lost)), count(rank=1)
    rank = 1 + (budget - one) // (count(rank=2) - one)                     # each adds the same
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
    rows = list(dict.fromkeys(config.rows.split("/"))) if config.rows else list(ROWS)
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"--rows {'/'.join(unknown)}: choose from {'/'.join(ROWS)}")
    return rows

def text(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)

# --- runs ---

STARTED = []                                   # processes of train.py
HARMLESS = {"layer", "out_dir", "keep", "save_every", "eval_every"}        # flags that change no result

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

def flags_of(config: Config, row: str, lr: float, seed: int) -> dict:
    """All flags of a run."""
    return {"optimizer": "adamw", "keep": 1, "save_every": config.steps, "eval_every": config.steps,
            "eval_tokens": 200_000, **extra(config), "model": config.model, **shape(config),
            "steps": config.steps, "lr": lr, "seed": seed, "data_dir": os.path.abspath(config.data_dir),
            "out_dir": folder(config, row, lr, seed), **matched(config, row)}

def final(config: Config, row: str, lr: float, seed: int = 0) -> float | None:
    """Loss at the end of a run, infinite if it diverged, None if it is yet to come."""
    path = folder(config, row, lr, seed)
    found = status(path)
    if found["state"] != "finished":
        return math.inf if "FloatingPointError" in found["reason"] else None
    with open(os.path.join(path, "config.json"), encoding="utf-8") as f:
        was = json.load(f)
    for name, value in json.loads(json.dumps(flags_of(config, row, lr, seed))).items():
        if name not in HARMLESS and value not in (was[name], "auto"):
            raise ValueError(f"{path} was trained with --{name} {was[name]}, not {value}: name another "
                             "--out_dir")
    loss = last(lines(path), "val_loss")
    return loss if math.isfinite(loss) else math.inf

def train_one(config: Config, row: str, lr: float, seed: int):
    if final(config, row, lr, seed) is not None:
        return
    path, flags = folder(config, row, lr, seed), flags_of(config, row, lr, seed)
    layer = flags.pop("layer", None)
    script = [SCRIPT, layer, "--resume=never", "--overwrite"] if layer else ["train.py"]
    command = [sys.executable, *script, *(f"--{name}={text(value)}" for name, value in flags.items())]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as started:
        STARTED.append(started)
        error = started.communicate()[1].strip()
    if final(config, row, lr, seed) is None:
        raise ValueError(f"{path}: {(error or 'was stopped').splitlines()[-1]}")
    print(f"{row}, lr {lr:g}, seed {seed}: {final(config, row, lr, seed):.4f}", flush=True)

def sweep(config: Config, row: str) -> dict[float, float | None]:
    """Learning rate → final loss of seed 0. While the best is at an end, the sweep goes on there by factors
    of 2: the same rule for every row."""
    lrs = sorted(config.lrs)
    while True:
        losses = [final(config, row, lr) for lr in lrs]
        best = None if None in losses else losses.index(min(losses))
        if best is None or 0 < best < len(lrs) - 1 or len(lrs) == len(config.lrs) + config.widen:
            return dict(zip(lrs, losses, strict=True))
        lrs = [lrs[0] / 2, *lrs] if best == 0 else [*lrs, lrs[-1] * 2]

def best_lr(config: Config, row: str) -> float | None:
    """Of the sweep that the row goes by; None while that is not through."""
    losses = sweep(config, SWEPT[row])
    return None if None in losses.values() else min(losses, key=losses.get)

def run(config: Config):
    rows = chosen(config)
    swept = list(dict.fromkeys(SWEPT[row] for row in rows))
    for row in {*rows, *swept}:                # before there are threads: `using` is for one alone
        matched(config, row)
    pool = concurrent.futures.ThreadPoolExecutor(config.jobs)
    def all_of(jobs):
        for job in [pool.submit(train_one, config, *job) for job in jobs]:
            job.result()
    try:
        while missing := [(row, lr, 0) for row in swept
                          for lr, loss in sweep(config, row).items() if loss is None]:
            all_of(missing)
        all_of((row, best_lr(config, row), seed) for seed in range(config.seeds) for row in rows)
    finally:                                   # an error or a signal starts no more and stops the others
        pool.shutdown(wait=False, cancel_futures=True)
        for started in STARTED:
            started.terminate()                # of no effect on those that have ended
        pool.shutdown()

# --- what came out ---

def spread(values: list[float], form: str) -> str:
    """mean ± standard deviation."""
    middle = format(statistics.mean(values), form)
    return middle + (f" ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else "")

def markdown(*rows: list) -> None:
    head, *rest = [" | ".join(map(str, row)) for row in rows]
    print(f"| {head} |", "|" + "---|" * len(rows[0]), *(f"| {row} |" for row in rest), "", sep="\n")

def results(config: Config, row: str) -> dict[int, list[dict] | None]:
    """seed → lines of metrics.jsonl at the row's learning rate, None for a seed that diverged there."""
    lr = best_lr(config, row)
    losses = {seed: final(config, row, lr, seed) for seed in range(config.seeds)} if lr else {}
    return {seed: lines(folder(config, row, lr, seed)) if loss < math.inf else None
            for seed, loss in losses.items() if loss is not None}

def trained(run: list[dict]) -> list[dict]:
    return [line for line in run if line["kind"] == "train"]

def last(run: list[dict], name: str) -> float:
    return [line for line in run if line["kind"] == "eval"][-1][name]

def table(config: Config):
    rows = chosen(config)
    print(f"{config.model}, {config.steps} steps. Validation loss of seed 0 at each learning rate\n")
    sweeps = {row: sweep(config, row) for row in dict.fromkeys(SWEPT[row] for row in rows)}
    lrs = sorted({lr for losses in sweeps.values() for lr in losses})
    def shown(row, lr):
        loss = sweeps[row].get(lr)
        text = "" if loss is None else f"{loss:.3f}" if loss < math.inf else "diverged"
        return f"**{text}**" if lr == best_lr(config, row) else text
    markdown(["", *(f"{lr:g}" for lr in lrs)], *([row, *(shown(row, lr) for lr in lrs)] for row in sweeps))
    lost, body, inside = results(config, "LOST"), [], []
    for row in rows:
        found, model = results(config, row), build(config, matched(config, row))
        runs = {seed: run for seed, run in found.items() if run}
        count = f"{len(runs)}" + (f", {len(found) - len(runs)} diverged" if len(runs) < len(found) else "")
        if not runs:
            continue
        loss = {seed: last(run, "val_loss") for seed, run in runs.items()}
        pairs = [loss[seed] - last(lost[seed], "val_loss") for seed in loss if lost.get(seed)]
        speed = [line["tokens_per_second"] for run in runs.values() for line in trained(run)]
        body.append([
            row, f"{best_lr(config, row):g}", count, spread(list(loss.values()), ".3f"),
            spread(pairs, "+.3f") if pairs and row != "LOST" else "",
            spread([last(run, "val_ppl") for run in runs.values()], ".1f"),
            spread([last(run, "val_bpb") for run in runs.values()], ".3f"), f"{count_parameters(model):,}",
            f"{count_flops(multiplied(config, row)) / 1e6:.2f} M", f"{statistics.median(speed):,.0f}"])
        if ROWS[row].get("linear") != "dense" and row != "SLTrain":
            layers = [layer for run in runs.values() for layer in last(run, "layers").values()]
            inside.append([row, *(f"{statistics.mean(layer[n] for layer in layers):.3f}" for n in INSIDE)])
    print("Mean ± standard deviation over seeds, at the best learning rate of the row that was swept\n")
    markdown(["", "lr", "seeds", "loss", "loss − LOST's, in pairs", "perplexity", "bits per byte",
              "parameters", "FLOPs a token", f"tokens/s of {config.jobs} at a time"], *body)
    print("Inside the layers at the end, mean over layers and seeds\n")
    markdown(["", *INSIDE], *inside)

INSIDE = ("low_rank_share", "cosine", "effective_rank", "norm_A", "norm_B", "gamma")

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = plt.cycler(linestyle=["-", "--", ":"]) * plt.cycler(color=plt.cm.tab10.colors)
    plt.rcParams["axes.prop_cycle"] = lines    # ten colours, then again with another line
    return plt

def save(figure, config: Config, name: str):
    path = os.path.join(config.out_dir, name)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(f"drawn in {path}")
    return figure

def plot(config: Config):
    """Training loss against tokens and FLOPs, mean over seeds, of each row with a sweep of its own."""
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 5), sharey=True)
    for row in (row for row in chosen(config) if SWEPT[row] == row):
        runs = [trained(run) for run in results(config, row).values() if run]
        if runs:
            flops, tokens = count_flops(multiplied(config, row)), [line["tokens"] for line in runs[0]]
            loss = [statistics.mean(line["loss"] for line in step) for step in zip(*runs, strict=True)]
            axes[0].plot([t / 1e6 for t in tokens], loss, label=row)
            axes[1].plot([t * flops / 1e12 for t in tokens], loss, label=row)
    axes[0].set(xlabel="training tokens, millions", ylabel="training loss (nats a token)", ylim=(None, 6))
    axes[1].set(xlabel="training compute, 10¹² FLOPs")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{config.model}, {config.steps} steps, each at its best learning rate")
    return save(figure, config, "controls.png")

def ladder(config: Config):
    """Trains the rows at each width, prints their losses and the fit, draws them."""
    if config.width:
        raise ValueError("--width means nothing to a ladder: give its --widths")
    sizes = [config if w == train.MODELS[config.model]["n_embd"] else dataclasses.replace(
        config, width=int(w), out_dir=os.path.join(config.out_dir, f"width-{w:g}")) for w in config.widths]
    for size in sizes:
        run(size)
    body, fits = [], []
    figure, ax = pyplot().subplots(figsize=(6.5, 4.5))
    for row in chosen(config):
        x, y, noise = [], [], []               # log FLOPs, log mean loss and deviation of each size
        for size, width in zip(sizes, config.widths, strict=True):
            found = results(size, row)
            if not all(found.values()):
                raise ValueError(f"{row} diverged at width {width:g}: give other --lrs, or --rows without it")
            losses = [last(run, "val_loss") for run in found.values()]
            total = count_flops(multiplied(size, row)) * trained(found[0])[-1]["tokens"]
            x, y = [*x, math.log(total)], [*y, math.log(statistics.mean(losses))]
            noise.append(statistics.stdev(losses) if len(losses) > 1 else 0)
            body.append([row, f"{width:g}", f"{best_lr(size, row):g}",
                         f"{count_parameters(build(size, matched(size, row))):,}", f"{total / 1e12:.3g}",
                         spread(losses, ".3f")])
        slope, fixed, half = fit(x, y)
        fits.append([row, f"{-slope:.4f} ± {half:.4f}", f"{math.exp(fixed):.2f}"])
        line, = ax.loglog(np.exp(x) / 1e12, np.exp(fixed + slope * np.array(x)), label=row)
        ax.errorbar(np.exp(x) / 1e12, np.exp(y), noise, fmt="o", capsize=3, color=line.get_color())
    markdown(["", "width", "lr", "parameters", "10¹² FLOPs", "loss"], *body)
    print("loss = a · FLOPs^-b through the means of the sizes, b with its 95 % interval\n")
    markdown(["", "b", "a"], *fits)
    ax.set(xlabel="training compute, 10¹² FLOPs", ylabel="validation loss (nats a token)",
           title=f"{len(sizes)} sizes, {config.steps} steps each")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    return save(figure, config, "ladder.png")

def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope and constant of the line of least squares, and half the 95 % interval of the slope."""
    slope, fixed = np.polyfit(x, y, 1)
    free = len(x) - 2
    error = np.square(np.array(y) - fixed - slope * np.array(x)).sum() / max(free, 1) / (len(x) * np.var(x))
    return slope, fixed, T_95[min(free, 4)] * math.sqrt(error) if free else math.inf

if __name__ == "__main__":
    what, rest = (sys.argv[1:] + ["--help"])[0], sys.argv[2:]
    if what in LAYERS:
        with using(what):
            command(lambda: train.main(train.resolve(parse(train.Config, rest))))
    elif what in (does := {"run": run, "table": table, "plot": plot, "ladder": ladder}):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))            # as Ctrl-C: through `finally`
        command(lambda: does[what](Config(**parse(Config, rest))))
    else:
        print(__doc__)
        parse(Config, ["--help"])
