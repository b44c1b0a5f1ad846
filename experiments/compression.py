"""What each way to compress a trained LLaMA costs, in nats above the dense model on the same windows.

    python experiments/compression.py run    --ckpt FOLDER --data_dir data/c4-llama --out_dir out/compression
    python experiments/compression.py table  --out_dir out/compression [--fill docs/compression.md]
    python experiments/compression.py figure --out_dir out/compression

`run` makes what is missing, a row after the other, each by compress.py, eval.py and, where it is healed,
train.py; the same command continues. A row leaves a line in results.jsonl. --rows names some of them."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import shutil
import time
from dataclasses import dataclass

# first of ours: it imports nanolost before torch
from experiments import runs
from experiments.runs import add_line, chosen, drive, read_lines
from experiments.tables import markdown, pyplot, save_figure, show, spread
from nanolost.files import read_json
from nanolost.flags import flag, say

# flags of compress.py
OPEN = {"closed_loop": "false"}
LOW_RANK = {
    "plain SVD": {"method": "plain"},
    "LOST's own start": {"method": "lost"},
    "ASVD": {"method": "asvd"},
    "SVD-LLM": {"method": "svdllm"},
    "two-sided, uniform": {**OPEN, "uniform": "true"},
    "two-sided, global": OPEN,
    "closed loop": {},
    # a report has it that two-sided whitening hurts them
    "two-sided but for q and k": {**OPEN, "one_sided": "q_proj,k_proj"},
    "pinned": {**OPEN, "pinned": "true"},
    "pinned, closed loop": {"pinned": "true"},
}
ZEROS = {
    "magnitude": {"method": "magnitude"},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"method": "sparsegpt"},
    "walk": {"method": "walk"},
    "splitting": {},
    "splitting, closed loop": {"closed_loop": "true"},
    "splitting and directions": {"factors": "true"},
    "OATS": {"method": "oats"},
    "CAP": {"method": "cap"},
}
# the shares that are tried of each form
LOW_RANK_KEPT = (0.8, 0.6, 0.5)
ZEROS_KEPT = (0.6, 0.5, 0.4)
# and of the methods of which fewer tell enough
KEPT = {
    "plain SVD": (0.8, 0.5),
    "LOST's own start": (0.8, 0.5),
    "ASVD": (0.8, 0.5),
    "two-sided but for q and k": (0.8, 0.5),
    "OATS": (0.5,),
    "CAP": (0.8, 0.5),
    "magnitude": (0.6, 0.5),
    "splitting, closed loop": (0.5,),
    "splitting and directions": (0.5,),
}
# with 2:4 and 4:8
IN_PATTERNS = ("Wanda", "SparseGPT", "splitting")
# a few values more than 2:4 has: what they are worth as matrices that stay dense, or as directions
BESIDE = 0.516
BESIDE_PATTERN = {
    "dense matrices": {},
    "directions": {"factors": "true"},
}

def rows() -> dict[str, dict]:
    """Flags of compress.py by the name of the row."""
    found = {}
    forms = ("lost", LOW_RANK, LOW_RANK_KEPT), ("sparse", ZEROS, ZEROS_KEPT)
    for form, methods, kept in forms:
        for name, flags in methods.items():
            for share in KEPT.get(name, kept):
                row = f"{name} {share:.0%}"
                found[row] = {"form": form, "budget": share, **flags}
    # the pattern says the budget
    for pattern in ("2:4", "4:8"):
        for name in IN_PATTERNS:
            row = f"{name} {pattern}"
            found[row] = {"form": "sparse", "pattern": pattern, **ZEROS[name]}
    for name, flags in BESIDE_PATTERN.items():
        row = f"2:4 and {name} {BESIDE:.0%}"
        found[row] = {"form": "sparse", "pattern": "2:4", "budget": BESIDE, **flags}
    return found

ROWS = rows()

# what is trained after it: flags of train.py. The fewer values are left, the more there is to repair
LITTLE = {"steps": 50, "lr": 1e-4}
MUCH = {"steps": 100, "lr": 3e-4}
HEALED = {
    # what training alone does, without anything to repair
    "dense": {"steps": 100, "lr": 5e-5},
    "closed loop 80%": LITTLE,
    "two-sided, global 80%": LITTLE,
    "pinned, closed loop 80%": LITTLE,
    "SVD-LLM 80%": LITTLE,
    "two-sided, global 50%": MUCH,
    "closed loop 50%": MUCH,
    "pinned, closed loop 50%": MUCH,
    "SVD-LLM 50%": MUCH,
}
# of all: a window a step, neither evaluated nor saved before the end
HEALING = {
    "batch_tokens": 512,
    "seq_len": 512,
    "micro_batch": 1,
    "weight_decay": 0,
    "grad_clip": 1,
    "eval_every": 1000,
    "save_every": 1000,
    "keep": 1,
}
# windows of eval.py, as compress.py has them
SEQ_LEN = 512

@dataclass(frozen=True)
class Config:
    ckpt: str = flag("smollm2", "a Hugging Face LLaMA", path=True)
    data_dir: str = flag("data/c4-llama", "token shards of its tokenizer", path=True)
    other_dir: str | None = flag(None, "shards of another domain, whose val split is measured as well",
                                 path=True)
    out_dir: str = flag("out/compression", "folder of results.jsonl, statistics and models", path=True)
    rows: str | None = flag(None, "rows to run or print, separated by / (all)")
    healed: bool = flag(False, "run: train the rows that have a recipe for it")
    tokens: int = flag(65_536, "text for the statistics")
    seed: int = flag(0, "of the calibration text")
    eval_tokens: int = flag(32_768, "validation text")
    threads: int | None = flag(None, "CPU threads (as many as cores are free)")
    keep: bool = flag(False, "run: keep the models")
    fill: str | None = flag(None, "table: put it into this file, between its two markers", path=True)
    drawn: str = flag("closed loop 50%/splitting 50%", "figure: rows of which depth and kind are drawn")

# --- one row ---

def threads(config: Config) -> dict:
    return {} if config.threads is None else {"threads": config.threads}

def compressed(config: Config, row: str, folder: str) -> dict:
    """Make the model of a row in `folder`, unless --keep has left it there: its report."""
    report = os.path.join(folder, "report.json")
    # a folder of compress.py is whole or absent
    if os.path.exists(report):
        return read_json(report)
    statistics = os.path.join(config.out_dir, f"statistics-{config.tokens}-{config.seed}")
    runs.output_of(
        "compress.py",
        ckpt=config.ckpt,
        data_dir=config.data_dir,
        out_dir=folder,
        calibration_tokens=config.tokens,
        gradient_tokens=config.tokens,
        eval_tokens=config.eval_tokens,
        seed=config.seed,
        # collected once for all rows of the seed
        statistics=statistics,
        **threads(config),
        **ROWS[row],
    )
    return read_json(report)

def loss_of(config: Config, folder: str, data_dir: str) -> float:
    return runs.loss_of(folder, data_dir, SEQ_LEN, config.eval_tokens)

def heal(config: Config, row: str, model: str, folder: str) -> float:
    """Train a model by the row's recipe; the seconds that took."""
    # what an interrupted run left is begun again
    shutil.rmtree(folder, ignore_errors=True)
    recipe = {**HEALING, **HEALED[row]}
    started = time.perf_counter()
    runs.output_of(
        "train.py",
        init_from=model,
        data_dir=config.data_dir,
        out_dir=folder,
        warmup=recipe["steps"] // 10,
        # the figure that counts is eval.py's
        eval_tokens=4096,
        # what was not compressed needs no repair
        freeze=["model.embed_tokens.weight", "lm_head.weight"],
        **recipe,
    )
    return time.perf_counter() - started

# of report.json, as it stands there
REPORTED = ("kept", "method", "form", "stages", "seconds", "peak_memory_bytes")

def folder_of(config: Config, row: str) -> str:
    """Where the model of a row is made."""
    name = f"{row}-{config.tokens}-{config.seed}"
    plain = str.maketrans(" :", "__", "%,")
    return os.path.join(config.out_dir, name.translate(plain))

def compression_of(config: Config, row: str, folder: str) -> dict:
    """What a row's line has of making the model: figures of the report, and what each layer became."""
    report = compressed(config, row, folder)
    allocation = read_json(os.path.join(folder, "allocation.json"))
    line = {name: report[name] for name in REPORTED}
    line["layers"] = {}
    for name, entry in allocation["layers"].items():
        line["layers"][name] = [entry["values"], entry["damage"]]
    # by the function that eval.py calls
    line["loss"] = report["after"]["loss"]
    line["dense"] = report["before"]["loss"]
    return line

def other_dense(config: Config) -> float:
    """The dense model's loss on the other domain: measured once, one number for all rows."""
    for line in results(config):
        if "other_dense" in line:
            return line["other_dense"]
    return loss_of(config, config.ckpt, config.other_dir)

def measure(config: Config, row: str) -> dict:
    """Make, heal and measure one row: its line of results."""
    line = {
        "row": row,
        "seed": config.seed,
        "tokens": config.tokens,
        "healed": config.healed,
    }
    folder = folder_of(config, row)
    trained = f"{folder}-healed"
    # the one that is measured
    model = config.ckpt
    if row != "dense":
        model = folder
        line |= compression_of(config, row, folder)
    if config.healed:
        line["healing_seconds"] = heal(config, row, model, trained)
        model = trained
        line["loss"] = loss_of(config, model, config.data_dir)
        # of a compressed row the report has told it
        if "dense" not in line:
            line["dense"] = loss_of(config, config.ckpt, config.data_dir)
    if config.other_dir:
        line["other"] = loss_of(config, model, config.other_dir)
        line["other_dense"] = other_dense(config)
    if not config.keep:
        for place in (folder, trained):
            shutil.rmtree(place, ignore_errors=True)
    return line

def results(config: Config) -> list[dict]:
    path = os.path.join(config.out_dir, "results.jsonl")
    return read_lines(path) if os.path.exists(path) else []

# what makes two lines the same one, whatever they measured
KEY = ("row", "seed", "tokens", "healed")

def is_done(config: Config, row: str) -> bool:
    wanted = (row, config.seed, config.tokens, config.healed)
    return any(tuple(line[name] for name in KEY) == wanted for line in results(config))

def run(config: Config):
    """Measure what has no line yet."""
    os.makedirs(config.out_dir, exist_ok=True)
    path = os.path.join(config.out_dir, "results.jsonl")
    known = HEALED if config.healed else ROWS
    for row in chosen(config, known):
        if is_done(config, row):
            continue
        line = measure(config, row)
        add_line(path, line)
        gap = line["loss"] - line["dense"]
        say(f"{row}: {gap:+.3f} nats")

# --- tables ---

COLUMNS = ("80%", "60%", "52%", "50%", "40%", "2:4", "4:8")

def parts(row: str) -> tuple[str, str]:
    """The method and the share of a row's name."""
    name, _, share = row.rpartition(" ")
    if share in COLUMNS:
        return name, share
    # the dense model has none
    return row, ""

def spaced(text: str) -> str:
    return text.replace("%", " %")

def gaps(lines: list[dict], name: str, base: str) -> str:
    """Nats above dense over the seeds, "" for none."""
    # lines without another domain lack its two
    values = [line[name] - line[base] for line in lines if name in line]
    return spread(values, "+.3f") if values else ""

def by_method(lines: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Lines over the seeds by method and share, in the order of the file."""
    found = {}
    for line in lines:
        method, share = parts(line["row"])
        shares = found.setdefault(method, {})
        shares.setdefault(share, []).append(line)
    return found

def unhealed(lines: list[dict]) -> str:
    """A method a line, a share a column."""
    table = []
    for method, shares in by_method(lines).items():
        cells = [gaps(shares.get(share, []), "loss", "dense") for share in COLUMNS]
        table.append([method, *cells])
    return markdown(["", *map(spaced, COLUMNS)], table)

def costs(lines: list[dict]) -> str:
    """A method a line: text of another domain, time and memory at one share."""
    table = []
    for method, shares in by_method(lines).items():
        half = shares.get("50%")
        if not half:
            continue
        other = gaps(half, "other", "other_dense")
        # of equal work the run that had to share its core the least
        seconds = min(line["stages"]["compression"] for line in half)
        memory = max(line["peak_memory_bytes"] for line in half) / 1e9
        table.append([method, other, f"{seconds:.0f}", f"{memory:.1f}"])
    return markdown(["at 50 %", "other text", "seconds", "GB"], table)

def healed(lines: list[dict]) -> str:
    """A healed row a line, beside what it was before over the seeds."""
    table = []
    for line in lines:
        if not line["healed"]:
            continue
        row = line["row"]
        before = [other for other in lines if not other["healed"] and other["row"] == row]
        table.append([
            spaced(row),
            gaps(before, "loss", "dense"),
            HEALED[row]["steps"],
            gaps([line], "loss", "dense"),
            gaps([line], "other", "other_dense"),
        ])
    head = ["", "before", "steps", "after", "other text"]
    return markdown(head, table)

def table(config: Config):
    """Print the tables, or put them into --fill."""
    order = list(ROWS)
    # of one amount of text, in the order of the rows; "dense" is none of them
    lines = [line for line in results(config) if line["tokens"] == config.tokens]
    lines.sort(key=lambda line: order.index(line["row"]) if line["row"] in order else -1)
    plain = [line for line in lines if not line["healed"]]
    texts = {"compression": unhealed(plain), "compression-costs": costs(plain), "healing": healed(lines)}
    for name, text in texts.items():
        show(config.fill, name, text)

# --- figures ---

def points_of(lines: list[dict], method: str) -> list[tuple[float, float]]:
    """The share that is kept and nats above dense, of a method's rows without a pattern."""
    found = []
    for line in lines:
        name, share = parts(line["row"])
        # a pattern is one point, and no curve
        if name == method and ":" not in share:
            found.append((line["kept"], line["loss"] - line["dense"]))
    return sorted(found)

def figure(config: Config):
    """Loss against the share that is kept, and what each matrix keeps by depth."""
    plt = pyplot()
    lines = [line for line in results(config) if not line["healed"]]
    drawn, axes = plt.subplots(figsize=(8, 4.5))
    # as many colours as there are methods
    colours = iter(plt.colormaps["tab20"].colors)
    for method in by_method(lines):
        points = points_of(lines, method)
        if points:
            shares, losses = zip(*points, strict=True)
            # zeros are dashed
            style = "--" if method in ZEROS else "-"
            axes.plot(shares, losses, style, marker="o", markersize=4, color=next(colours), label=method)
    axes.set(xlabel="share of the values kept", ylabel="nats above dense", yscale="log")
    axes.grid(alpha=0.3)
    # beside it: there are up to twenty lines
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(drawn, config.out_dir, "compression.png")
    by_depth(config, plt)

def by_kind(line: dict) -> dict[str, list[list]]:
    """Values and damage of each block, by the kind of layer."""
    found = {}
    for layer, entry in line["layers"].items():
        _, _, kind = layer.rpartition(".")
        found.setdefault(kind, []).append(entry)
    return found

def by_depth(config: Config, plt):
    """What each matrix keeps and loses over the blocks: a row of --drawn a column."""
    lines = results(config)
    measured = {line["row"] for line in lines}
    names = [name for name in config.drawn.split("/") if name in measured]
    # a figure without rows is empty, not an error
    width = max(1, len(names))
    size = (5.5 * width, 6)
    drawn, axes = plt.subplots(2, width, figsize=size, squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        line = next(line for line in lines if line["row"] == name and "layers" in line)
        upper, lower = axes[:, column]
        for kind, entries in by_kind(line).items():
            # kinds differ in size: of the largest of its own
            most = max(values for values, _ in entries)
            upper.plot([values / most for values, _ in entries], label=kind)
            # what stays dense has none
            lower.plot([damage or 0 for _, damage in entries])
        upper.set(title=name, ylabel="values, the most of its kind = 1")
        lower.set(xlabel="block", ylabel="predicted damage in nats")
    # one for all: the kinds have the same colours everywhere
    axes[0, 0].legend(fontsize=7, ncols=2)
    save_figure(drawn, config.out_dir, "compression-depth.png")

if __name__ == "__main__":
    drive({"run": run, "table": table, "figure": figure}, Config, __doc__)
