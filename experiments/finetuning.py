"""What each way to fine-tune a trained LLaMA ends at: with zeros in nats above the untouched dense model, on
questions by their accuracy.

    python experiments/finetuning.py plan   --ckpt FOLDER --data_dir data/c4-llama
    python experiments/finetuning.py run    --ckpt FOLDER --data_dir data/c4-llama --out_dir out/finetuning
    python experiments/finetuning.py table  --out_dir out/finetuning [--fill docs/finetuning.md]
    python experiments/finetuning.py figure --out_dir out/finetuning

`plan` says what is left to do and about how long it takes. `run` does it, a row after the other: zeros by
compress.py, once for all rows that start from them; then finetune.py at three learning rates, at the best one
with more seeds, and eval.py. --sst2_dir adds the rows on SST-2. `ask` puts lm-eval's questions to dense and
to the best rows. The same command continues; a run leaves a line in results.jsonl."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

# first of ours: it imports nanolost before torch
from experiments import benchmarks, runs, sst2
from experiments.runs import Key, Rates, Settings, chosen, drive, extra, folder_of
from experiments.tables import markdown, pyplot, save_figure, show, spread
from experiments.tuned import ENDS, Tuned, Tuning
from nanolost import estimate, tuning
from nanolost.checkpoint import checkpoint_folder
from nanolost.covariance import linears
from nanolost.errors import UserError
from nanolost.files import read_json, write_atomic
from nanolost.flags import flag, say
from nanolost.threads import use_threads

# learning rates that are tried, three a method, a factor of about 3 apart
RATES = {
    "full": (1.5e-5, 5e-5, 1.5e-4),
    "masked-full": (5e-5, 1.5e-4, 5e-4),
    "masked-lora": (3e-4, 1e-3, 3e-3),
    "refit": (5e-5, 1.5e-4, 5e-4),
    "losa": (3e-4, 1e-3, 3e-3),
}
# shares of zeros; with half of them there is less to repair, so that longer training can be seen to end
SHARES = ("50%", "60%", "70%", "2:4")
LONGER = ("50%",)

class Recipe(NamedTuple):
    """zeros: those of compress.py that it starts from, None for the dense model. flags: of finetune.py."""

    method: str
    zeros: str | None = None
    flags: dict = {}
    shares: tuple = SHARES

# as published
LOSA = {"masks": "wanda"}
RECIPES = {
    "masked LoRA on Wanda": Recipe("masked-lora", "wanda"),
    "masked LoRA on SparseGPT": Recipe("masked-lora", "sparsegpt"),
    "masked LoRA on fisher": Recipe("masked-lora", "fisher"),
    "refit on Wanda": Recipe("refit", "wanda"),
    "refit on fisher": Recipe("refit", "fisher"),
    "masked-full on fisher": Recipe("masked-full", "fisher"),
    "LoSA": Recipe("losa", flags=LOSA),
    "LoSA by fisher": Recipe("losa", flags={"masks": "fisher"}),
    # its three parts, one of them off
    "LoSA, equal rates": Recipe("losa", flags={**LOSA, "rates": "uniform"}, shares=("60%",)),
    "LoSA, equal ranks": Recipe("losa", flags={**LOSA, "ranks": "uniform"}, shares=("60%",)),
    "LoSA, one stage": Recipe("losa", flags={**LOSA, "stages": 1}, shares=("60%",)),
}
# the zeros alone, whose loss is the first one of a row that starts from them
UNTUNED = {
    "Wanda": "masked LoRA on Wanda",
    "SparseGPT": "masked LoRA on SparseGPT",
    "fisher": "masked LoRA on fisher",
}

class Row(NamedTuple):
    """share: of zeros, None for the dense model. longer: whether it has the longer training."""

    label: str
    recipe: Recipe
    share: str | None
    longer: bool

def rows() -> dict[str, Row]:
    dense = Recipe("full")
    found = {
        "dense": Row("dense", dense, None, False),
        "dense, longer": Row("dense", dense, None, True),
    }
    # a share of all methods before the next: what is interrupted compares methods
    for share in SHARES:
        for label, recipe in RECIPES.items():
            if share in recipe.shares:
                found[f"{label} {share}"] = Row(label, recipe, share, share in LONGER)
    return found

ROWS = rows()
LABELS = ("dense", *RECIPES)

# a window an update; what stands around the blocks has no zeros, and needs no repair
COMMON = {**ENDS, "seq_len": 512, "batch_tokens": 512, "micro_batch": 1}
AROUND = ["model.embed_tokens.weight", "lm_head.weight"]

@dataclass(frozen=True)
class Config(Settings):
    ckpt: str = flag("smollm2", "a Hugging Face LLaMA", path=True)
    data_dir: str = flag("data/c4-llama", "token shards of its tokenizer", path=True)
    other_dir: str | None = flag(None, "shards of another domain, whose val split is measured as well",
                                 path=True)
    out_dir: str = flag("out/finetuning", "folder of results.jsonl, zeros and runs", path=True)
    steps: int = flag(30, "updates of a run")
    longer: int = flag(100, "updates with 50 % zeros")
    lrs: Rates | None = flag(None, "learning rates of every sweep (each method has three)")
    widen: int = flag(0, "learning rates that a sweep may add where its best one is at an end")
    seeds: int = flag(1, "seeds of each row at the best learning rate")
    extra: str = flag("", "more flags of finetune.py, separated by spaces, for what no row sets")
    eval_tokens: int = flag(16_384, "validation text")
    tokens: int = flag(65_536, "text for the statistics that zeros are chosen by")
    losa_tokens: int = flag(8192, "text that LoSA looks at in every stage")
    statistics: str | None = flag(None, "folder of such statistics, of seed 0 and --tokens (in --out_dir)",
                                  path=True)
    threads: int | None = flag(None, "CPU threads of compress.py (as many as cores are free); runs have one "
                                     "each")
    keep: bool = flag(False, "run: keep the models of all runs, not those of the best row of a share alone")
    sst2_dir: str | None = flag(None, "folder of SST-2's train.tsv, dev.tsv and test.tsv: adds its rows",
                                path=True)
    sst2_lines: int = flag(2000, "lines that are trained on, once")
    sst2_tokens: int = flag(48, "tokens of a line; longer ones are left out")
    sst2_dev: int = flag(300, "questions that choose a learning rate")
    sst2_test: int = flag(872, "questions of the table")
    tasks_dir: str | None = flag(None, "ask: folder of lm-eval's local tasks, local_NAME.yaml", path=True)
    limit: int | None = flag(None, "ask: questions of a task (all)")
    asked: str = flag("60%", "ask: share of zeros of the models")

# --- what a row starts from ---

def share_of(name: str) -> dict:
    """Of zeros, as compress.py has it."""
    if ":" in name:
        return {"pattern": name}
    zeros = int(name.rstrip("%")) / 100
    # without the last bits of a difference
    return {"budget": round(1 - zeros, 6)}

def statistics_of(config: Config, tokens: int, seed: int) -> str:
    """Where those of so many tokens are kept."""
    if config.statistics and (tokens, seed) == (config.tokens, 0):
        return os.path.abspath(config.statistics)
    return os.path.abspath(os.path.join(config.out_dir, f"statistics-{tokens}-{seed}"))

def compress(config: Config, folder: str, method: str, share: str, tokens: int, seed: int):
    runs.output_of(
        "compress.py",
        ckpt=os.path.abspath(config.ckpt),
        data_dir=os.path.abspath(config.data_dir),
        out_dir=folder,
        form="sparse",
        method=method,
        calibration_tokens=tokens,
        gradient_tokens=tokens,
        eval_tokens=config.eval_tokens,
        seed=seed,
        # collected once for all
        statistics=statistics_of(config, tokens, seed),
        **({} if config.threads is None else {"threads": config.threads}),
        **share_of(share),
    )

def zeros_folder(config: Config, method: str, share: str) -> str:
    """Of the model with such zeros, the same for all seeds of the training."""
    return os.path.abspath(os.path.join(config.out_dir, "zeros", f"{method}-{share.rstrip('%')}"))

def report_of(config: Config, row: str) -> dict | None:
    """What compress.py says of the zeros that a row starts from; None where they are not there."""
    recipe, share = ROWS[row].recipe, ROWS[row].share
    if not recipe.zeros:
        return None
    path = os.path.join(zeros_folder(config, recipe.zeros, share), "report.json")
    return read_json(path) if os.path.exists(path) else None

def prepare(config: Config, row: str):
    """Make what the runs of a row have in common."""
    recipe, share = ROWS[row].recipe, ROWS[row].share
    # a folder of compress.py is whole or absent
    if recipe.zeros and report_of(config, row) is None:
        # of seed 0 for all: the seeds of a row differ in the training alone
        folder = zeros_folder(config, recipe.zeros, share)
        compress(config, folder, recipe.zeros, share, config.tokens, 0)
        say(f"{recipe.zeros}, {share} zeros: {report_of(config, row)['after']['loss']:.4f}")
    if recipe.flags.get("masks") != "fisher":
        return
    # two runs at a time would collect the same ones
    for seed in range(config.seeds):
        place = statistics_of(config, config.losa_tokens, seed)
        if not os.path.exists(os.path.join(place, "statistics.json")):
            # the quickest that collects them
            folder = os.path.join(config.out_dir, "zeros", "statistics")
            compress(config, folder, "wanda", "50%", config.losa_tokens, seed)
            shutil.rmtree(folder)

# --- the runs ---

def steps_of(config: Config, row: str) -> int:
    return config.longer if ROWS[row].longer else config.steps

def source_flags(config: Config, key: Key) -> dict:
    """Which model, and where its zeros come from."""
    recipe, share = ROWS[key.row].recipe, ROWS[key.row].share
    dense = os.path.abspath(config.ckpt)
    # what is zero there stays zero: no share is named
    if recipe.zeros:
        return {"ckpt": zeros_folder(config, recipe.zeros, share)}
    if share is None:
        return {"ckpt": dense}
    zeros = share_of(share)
    # LoSA, which chooses its own
    found = {"ckpt": dense, "calibration_tokens": config.losa_tokens}
    if "budget" in zeros:
        found["zeros"] = round(1 - zeros["budget"], 6)
    else:
        found |= zeros
    if recipe.flags["masks"] == "fisher":
        found["statistics"] = statistics_of(config, config.losa_tokens, key.seed)
    return found

def common(config: Config) -> dict:
    # --extra may change what all rows have alike
    return {**COMMON, **extra(config, tuning.Config)}

def flags_of(config: Config, key: Key) -> dict:
    recipe = ROWS[key.row].recipe
    flags = {**common(config), **source_flags(config, key), **recipe.flags}
    # these are the experiment: nothing else may set them
    flags |= {
        "method": recipe.method,
        "data": os.path.abspath(config.data_dir),
        "eval_tokens": config.eval_tokens,
        "steps": steps_of(config, key.row),
        "lr": key.lr,
        "seed": key.seed,
    }
    method = tuning.METHODS[recipe.method]
    if method.blockwise:
        flags["dense"] = os.path.abspath(config.ckpt)
    elif method.update is None:
        flags["freeze"] = AROUND
    return flags

def experiment(config: Config) -> Tuning:
    def run(key):
        return Tuned(folder_of(config, key), flags_of(config, key))
    def rates(row):
        return config.lrs or RATES[ROWS[row].recipe.method]
    return Tuning(config, run, {row: row for row in ROWS}, rates)

def loss_of(config: Config, folder: str, data_dir: str) -> float:
    """In windows as they are trained on."""
    return runs.loss_of(folder, data_dir, common(config)["seq_len"], config.eval_tokens)

def untouched(config: Config) -> dict:
    """Losses of the dense model as it came, measured once: "dense", and "other_dense" on the other text."""
    path = os.path.join(config.out_dir, "dense.json")
    asked = [config.ckpt, config.data_dir, config.other_dir, config.eval_tokens]
    if os.path.exists(path):
        known = read_json(path)
        if known["asked"] == asked:
            return known["losses"]
    found = {"dense": loss_of(config, config.ckpt, config.data_dir)}
    # how much a method forgets, or never learned
    if config.other_dir:
        found["other_dense"] = loss_of(config, config.ckpt, config.other_dir)
    content = {"asked": asked, "losses": found}
    write_atomic(path, json.dumps(content).encode())
    return found

def look(config: Config, row: str) -> Callable[[str], dict]:
    """What is measured on a chosen model, and what a table has beside it."""
    def measured(folder: str) -> dict:
        found = dict(untouched(config))
        if config.other_dir:
            found["other"] = loss_of(config, folder, config.other_dir)
        report = report_of(config, row)
        if report is not None:
            found["choosing_seconds"] = report["stages"]["compression"]
        return found
    return measured

def peers(row: str) -> list[str]:
    """The rows that compete with one, itself among them."""
    if row in sst2.ROWS:
        return list(sst2.ROWS)
    return [name for name in ROWS if ROWS[name].share == ROWS[row].share]

def run_row(config: Config, row: str):
    """Train and measure what a row lacks."""
    if row in sst2.ROWS:
        sst2.untrained(config)
        found = sst2.experiment(config)
        seen = sst2.look(config, row)
    else:
        prepare(config, row)
        found = experiment(config)
        seen = look(config, row)
    # a row to its end, then the next: its models are too large to wait
    found.train([row])
    found.measure(row, seen)
    say(f"{row}: learning rate {chosen_rate(found, row)}, {found.figure} {found.mean(row):.4f}")
    if not config.keep:
        found.tidy(peers(row))

def known_rows(config: Config) -> dict:
    """All rows that can be run with these flags."""
    return {**ROWS, **(sst2.ROWS if config.sst2_dir else {})}

def run(config: Config):
    os.makedirs(config.out_dir, exist_ok=True)
    for row in chosen(config, known_rows(config)):
        run_row(config, row)

# --- how long ---

# operations of an update over those of a forward pass, 2 a weight and token: backward through the
# activations, and through the weights where they are trained or masked
PASSES = {"full": 3, "masked-full": 3, "refit": 3, "masked-lora": 2.7, "losa": 2.7, "lora": 2.2, "lost": 2.3}

@dataclass
class Clock:
    """Seconds of one thread, counted from the model's sizes and the rate of this machine."""

    model: torch.nn.Module
    rates: estimate.Rates

    def forward(self, tokens: int) -> float:
        weights = sum(layer.weight.numel() for layer in linears(self.model).values())
        return 2 * tokens * (weights + self.model.lm_head.weight.numel()) / self.rates.single

    def zeros(self, method: str, tokens: int, known: bool) -> float:
        """Of compress.py; known: whether its statistics are there."""
        counts = estimate.counts_of(self.model)
        seconds = 0.0
        if not known:
            seconds += estimate.statistics_seconds(self.model, counts, tokens, tokens, self.rates)
        if method in ("sparsegpt", "fisher"):
            seconds += estimate.walk_seconds(counts, self.rates)
        if method == "fisher":
            seconds += estimate.splitting_seconds(counts, self.rates)
        return seconds

    def run(self, config: Config, row: str) -> float:
        """Of one run of a row, with its two evaluations."""
        if row in sst2.ROWS:
            text = sst2.texts(config)
            lines = sst2.BATCH * sst2.updates(config)
            passes = PASSES[sst2.ROWS[row]["method"]]
            # prompts are shorter than the longest
            return self.forward(int(text.seq_len * (passes * lines + 2 * 0.7 * config.sst2_dev)))
        recipe = ROWS[row].recipe
        trained = steps_of(config, row) * common(config)["batch_tokens"]
        seconds = PASSES[recipe.method] * self.forward(trained) + 2 * self.forward(config.eval_tokens)
        if recipe.method == "losa":
            seconds += self.stages(config, recipe.flags)
        return seconds

    def stages(self, config: Config, flags: dict) -> float:
        """Of what LoSA looks at."""
        stages = flags.get("stages", tuning.Config.stages)
        # the dense outputs once; in each stage the similarities, the covariances and the blocks anew
        seconds = (3 * stages + 1) * self.forward(config.losa_tokens)
        if flags["masks"] == "fisher":
            seconds += stages * self.zeros("fisher", 0, True)
        # the loss before there are zeros
        return seconds + self.forward(config.eval_tokens)

def rates_of_a_core() -> estimate.Rates:
    """At which one core multiplies, whoever else computes on it now."""
    use_threads(1)
    wall = time.perf_counter()
    own = time.process_time()
    found = estimate.rates(torch.device("cpu"))
    share = (time.process_time() - own) / (time.perf_counter() - wall)
    return estimate.Rates(*(rate / share for rate in found))

def left_of(config: Config, row: str) -> int:
    """Runs that a row has yet to do."""
    found = sst2.experiment(config) if row in sst2.ROWS else experiment(config)
    missing = sum(loss is None for loss in found.sweep(row).values())
    # the first is one of the sweep
    others = max(0, config.seeds - max(1, len(found.results(row))))
    return missing + others

def zeros_left(config: Config, rows: list[str]) -> dict[str, tuple[str, bool]]:
    """The rows that make zeros for themselves and others, with the method, and whether its statistics are
    there."""
    place = statistics_of(config, config.tokens, 0)
    collected = os.path.exists(os.path.join(place, "statistics.json"))
    found = {}
    made = set()
    for row in rows:
        # rows on SST-2 have none
        recipe = ROWS[row].recipe if row in ROWS else None
        if recipe is None or not recipe.zeros or report_of(config, row) is not None:
            continue
        folder = zeros_folder(config, recipe.zeros, ROWS[row].share)
        if folder not in made:
            made.add(folder)
            found[row] = (recipe.zeros, collected)
            collected = True
    return found

def plan(config: Config):
    """Print what `run` would do, in core-minutes."""
    clock = Clock(sst2.shapes(config.ckpt), rates_of_a_core())
    rows = chosen(config, known_rows(config))
    making = zeros_left(config, rows)
    lines = []
    total = 0.0
    for row in rows:
        zeros = 0.0
        if row in making:
            method, collected = making[row]
            zeros = clock.zeros(method, config.tokens, collected)
        count = left_of(config, row)
        each = clock.run(config, row)
        seconds = zeros + count * each
        total += seconds
        minutes = [f"{value / 60:.1f}" for value in (zeros, each, seconds)]
        lines.append([row, minutes[0], count, *minutes[1:]])
    head = ["row", "zeros, minutes", "runs left", "of a run", "core-minutes"]
    say(markdown(head, lines))
    say(f"about {total / 3600:.1f} core-hours, without eval.py's and the test questions")

# --- questions of lm-eval ---

def ask(config: Config):
    """Ask the dense model, and of a share the best before and after tuning."""
    if not config.tasks_dir:
        raise UserError("give --tasks_dir, the folder of the tasks")
    found = experiment(config)
    # they compete at one share
    rows = [row for row in ROWS if ROWS[row].share == config.asked]
    if not rows:
        raise UserError(f"--asked {config.asked}: choose from {', '.join(SHARES)}")
    best = found.best([row for row in rows if found.best_lr(row)] or rows)
    if best is None or not best[1].has_model():
        raise UserError(f"--asked {config.asked}: no tuned model is there: run first")
    models = {"dense": os.path.abspath(config.ckpt)}
    made = {}
    for name in rows:
        report = report_of(config, name)
        if report is not None:
            made[ROWS[name].recipe.zeros] = report["after"]["loss"]
    if made:
        # by the loss, which says more than any task
        zeros = min(made, key=made.get)
        models[f"{zeros} {config.asked}"] = zeros_folder(config, zeros, config.asked)
    row, run = best
    models[row] = checkpoint_folder(run.folder)
    benchmarks.run(config, models)

# --- tables ---

def of_file(config: Config) -> Config:
    """The same settings, with the results of a file: models and runs may be gone."""
    path = config.results or os.path.join(config.out_dir, "results.jsonl")
    return dataclasses.replace(config, results=path)

def chosen_rate(found: Tuning, row: str) -> str:
    """The learning rate of a row, and whether there was a worse one on either side."""
    lr = found.best_lr(row)
    # a best one at an end may hide a better one beyond it
    tried = sorted(found.sweep(row))
    if lr == tried[0] and len(tried) > 1:
        return f"{lr:g}, the smallest"
    if lr == tried[-1] and len(tried) > 1:
        return f"{lr:g}, the largest"
    return f"{lr:g}"

def row_of(label: str, share: str) -> str | None:
    """The row of a label in the column of a share: of dense the one that was tuned as long."""
    for name, row in ROWS.items():
        if row.label == label and row.share in (share, None) and row.longer == (share in LONGER):
            return name
    return None

def by_share(config: Config, cell: Callable[[str], str]) -> list[list[str]]:
    """A label a line, a share a column, with what `cell` says of a row; without lines of nothing."""
    wanted = chosen(config, known_rows(config))
    lines = []
    for label in LABELS:
        names = [row_of(label, share) for share in SHARES]
        cells = [cell(name) if name in wanted else "" for name in names]
        if any(cells):
            lines.append([label, *cells])
    return lines

def gaps(results: list[dict], name: str, base: str) -> str:
    """Nats above dense over the seeds, "" for none."""
    # without another text they lack its two
    values = [result[name] - result[base] for result in results if name in result and base in result]
    return spread(values, "+.3f") if values else ""

def shown(share: str) -> str:
    return share.replace("%", " %")

def of_shares(corner: str, lines: list[list[str]]) -> str:
    """A table with the shares as its columns, "" without lines."""
    return markdown([corner, *map(shown, SHARES)], lines) if lines else ""

def results_of(found: Tuning, row: str | None) -> list[dict]:
    """Over the seeds."""
    return [*found.finished(row).values()] if row else []

def losses_table(config: Config, found: Tuning) -> str:
    """Nats above the untouched model after tuning, and of the zeros alone."""
    lines = []
    for label, source in UNTUNED.items():
        # zeros are of one seed, whatever seeds the training has
        results = [results_of(found, row_of(source, share))[:1] for share in SHARES]
        cells = [gaps(one, "first", "dense") for one in results]
        if any(cells):
            lines.append([f"{label}, untuned", *cells])
    tuned = by_share(config, lambda row: gaps(results_of(found, row), "val_loss", "dense"))
    return of_shares("", lines + tuned)

def other_table(config: Config, found: Tuning) -> str:
    lines = by_share(config, lambda row: gaps(results_of(found, row), "other", "other_dense"))
    return of_shares("other text", lines)

def rates_table(config: Config, found: Tuning) -> str:
    lines = by_share(config, lambda row: chosen_rate(found, row) if found.finished(row) else "")
    return of_shares("learning rate", lines)

def costs_table(found: Tuning, share: str = "60%") -> str:
    """Time and memory at one share, and how exactly it was met."""
    lines = []
    for label in LABELS:
        row = row_of(label, share)
        results = results_of(found, row)
        if not results:
            continue
        first = results[0]
        zeros = f"{100 * first['zeros']:.2f} %" if ROWS[row].share else ""
        choosing = first.get("choosing_seconds")
        # a run that was cut has no time
        timed = [result["seconds"] for result in results if result["seconds"] is not None]
        memory = max(result["peak_memory_bytes"] for result in results)
        lines.append([
            label,
            zeros,
            "" if choosing is None else f"{choosing:.0f}",
            f"{statistics.median(timed):.0f}" if timed else "",
            f"{memory / 1e9:.1f}",
        ])
    head = [f"at {shown(share)}", "zeros", "choosing them, s", "tuning, s", "GB"]
    return markdown(head, lines) if lines else ""

def tables(config: Config) -> dict[str, str]:
    """The tables of which there is something to say, by the names of their markers."""
    given = of_file(config)
    found = {"zero-shot": benchmarks.table(config)}
    # before the first run there may be answers of lm-eval alone
    if os.path.exists(given.results):
        zeros = experiment(given)
        found["finetuning"] = losses_table(given, zeros)
        found["finetuning-other"] = other_table(given, zeros)
        found["finetuning-rates"] = rates_table(given, zeros)
        found["finetuning-costs"] = costs_table(zeros)
        found["sst2"] = sst2.table(config, sst2.experiment(given))
    return {name: text for name, text in found.items() if text}

def table(config: Config):
    """Print the tables, or put them into --fill."""
    found = tables(config)
    if not found:
        raise UserError(f"nothing is measured in {config.out_dir}: run first, with the same flags")
    for name, text in found.items():
        show(config.fill, name, text)

# --- figure ---

def curve(found: Tuning, label: str, name: str) -> list[tuple[int, float]]:
    """Share of zeros and nats above dense, without patterns. name: of the loss."""
    points = []
    for share in SHARES:
        row = row_of(label, share)
        # what is not measured to its end has no dense loss
        results = [result for result in results_of(found, row) if "dense" in result]
        values = [result[name] - result["dense"] for result in results]
        if values and share.endswith("%"):
            points.append((int(share.rstrip("%")), statistics.mean(values)))
    return points

def figure(config: Config):
    """Loss above dense against the share of zeros: a line a method, dashed before tuning."""
    plt = pyplot()
    found = experiment(of_file(config))
    drawn, axes = plt.subplots(figsize=(8, 4.5))
    colours = iter(plt.colormaps["tab20"].colors)
    lines = [(label, label, "val_loss", "-") for label in LABELS]
    lines += [(f"{name}, untuned", source, "first", "--") for name, source in UNTUNED.items()]
    for name, label, loss, style in lines:
        points = curve(found, label, loss)
        # a label that is not measured has no line
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=next(colours),
                      label=name)
    axes.set(xlabel="zeros, %", ylabel="nats above the untouched dense model")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(drawn, config.out_dir, "finetuning.png")

if __name__ == "__main__":
    drive({"plan": plan, "run": run, "ask": ask, "table": table, "figure": figure}, Config, __doc__)
