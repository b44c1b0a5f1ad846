"""What each way to fine-tune a trained LLaMA ends at: with zeros in nats above the untouched dense model, on
questions by their accuracy.

    python experiments/finetuning.py plan   --ckpt FOLDER --data_dir data/c4-llama
    python experiments/finetuning.py run    --ckpt FOLDER --data_dir data/c4-llama --out_dir out/finetuning
    python experiments/finetuning.py table  --out_dir out/finetuning [--fill docs/finetuning.md]
    python experiments/finetuning.py figure --out_dir out/finetuning

`plan` says what is left to do and about how long it takes. `run` does it, a row after the other: zeros by
compress.py, once for all rows that start from them; then finetune.py at three learning rates, at the best one
with more seeds, and eval.py. --sst2_dir adds the rows on SST-2. `ask` puts lm-eval's questions to dense and
to the best rows. The same command continues; a run leaves a line in results.jsonl. experiments/recipes.py
has the rows, experiments/sst2.py those on SST-2, experiments/clock.py the plan."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import dataclasses
import json
import statistics
from collections.abc import Callable

# first of ours: it imports nanolost before torch
from experiments import benchmarks, recipes, runs, sst2
from experiments.clock import plan
from experiments.recipes import LABELS, ROWS, SHARES, UNTUNED, Config, experiment
from experiments.runs import chosen, drive
from experiments.tables import markdown, pyplot, save_figure, show, spread
from experiments.tuned import Tuning
from nanolost.checkpoint import checkpoint_folder
from nanolost.errors import UserError
from nanolost.files import read_json, write_atomic
from nanolost.flags import say

# --- the runs ---

def loss_of(config: Config, folder: str, data_dir: str) -> float:
    """In windows as they are trained on."""
    return runs.loss_of(folder, data_dir, recipes.common(config)["seq_len"], config.eval_tokens)

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
        report = recipes.report_of(config, row)
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
        recipes.prepare(config, row)
        found = experiment(config)
        seen = look(config, row)
    # a row to its end, then the next: its models are too large to wait
    found.train([row])
    found.measure(row, seen)
    say(f"{row}: learning rate {chosen_rate(found, row)}, {found.figure} {found.mean(row):.4f}")
    if not config.keep:
        found.tidy(peers(row))

def run(config: Config):
    os.makedirs(config.out_dir, exist_ok=True)
    for row in chosen(config, recipes.known_rows(config)):
        run_row(config, row)

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
        report = recipes.report_of(config, name)
        if report is not None:
            made[ROWS[name].recipe.zeros] = report["after"]["loss"]
    if made:
        # by the loss, which says more than any task
        zeros = min(made, key=made.get)
        models[f"{zeros} {config.asked}"] = recipes.zeros_folder(config, zeros, config.asked)
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
        if row.label == label and row.share in (share, None) and row.longer == (share in recipes.LONGER):
            return name
    return None

def by_share(config: Config, cell: Callable[[str], str]) -> list[list[str]]:
    """A label a line, a share a column, with what `cell` says of a row; without lines of nothing."""
    wanted = chosen(config, recipes.known_rows(config))
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
