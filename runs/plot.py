"""Validation loss against tokens, one line a run: python runs/plot.py out/a out/b … [--out curve.png]

Prints the table of the last evaluations too. A folder's line is named by its linear layers, learning rate and
seed; of each kind of layer the best learning rate is drawn in full, the others faintly. Where runs have
different tokenizers it draws bits per byte, which their losses a token do not compare. Needs matplotlib (the
extra "plot")."""
import glob
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass

# this file is started by its path, so that Python looks for modules beside it only
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanolost.errors import UserError  # noqa: E402
from nanolost.files import expanded, open_regular, read_json  # noqa: E402
from nanolost.flags import command  # noqa: E402

USAGE = "python runs/plot.py OUT_DIR … [--out curve.png]"
# what is read of config.json and of the kinds of records, with the types that drawing needs
CONFIG = {"linear": str, "optimizer": str, "lr": (int, float), "seed": int, "batch_tokens": int}
FIELDS = {"eval": ("step", "val_loss", "val_ppl"), "train": ("tokens", "loss")}

# --- reading ---

@dataclass
class Run:
    """What is drawn of one out_dir: evaluations and updates as metrics.jsonl has them."""
    # as in the table: "lost, Muon"
    linear: str
    lr: float
    seed: int
    batch_tokens: int
    # rows of the vocabulary, by which tokenizers are told apart
    vocabulary: int | None
    # learning rates of earlier starts, where a resume changed it
    before: list[float]
    evals: list[dict]
    trains: list[dict]

    def label(self) -> str:
        rates = [f"{rate:g}" for rate in (*self.before, self.lr)]
        return f"{self.linear}, lr {', then '.join(rates)}"

    def last_loss(self) -> float:
        return self.evals[-1]["val_loss"]

def read_metrics(path: str) -> list[dict]:
    """The records of a metrics.jsonl. A last line without its end is left out: it is being written, or the
    machine stopped while it was. UserError for any other line that is no record."""
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; give an out_dir of train.py") from None
    records = []
    for number, line in enumerate(lines, 1):
        record = None
        # a run that is killed leaves at most one line without its end: metrics are written line by line
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            pass
        if isinstance(record, dict):
            records.append(record)
        elif number == len(lines) and not line.endswith(b"\n"):
            print(f"{path}: its last line is cut, and left out", file=sys.stderr)
        else:
            raise UserError(f"{path}:{number} is no JSON object: remove the line")
    return records

def numbers_of(records: list[dict], kind: str, path: str) -> list[dict]:
    """The records of one kind. UserError for one that lacks a number that is drawn."""
    # other kinds and fields may be anybody's
    own = [record for record in records if record.get("kind") == kind]
    for record in own:
        for field in FIELDS[kind]:
            if not isinstance(record.get(field), (int, float)):
                shown = json.dumps(record)[:80]
                raise UserError(f"{path}: a record of kind {kind} has no number {field}: {shown}")
    return own

def earlier_rates(folder: str, now: float) -> list[float]:
    """Peak learning rates of the starts before the last, where others: out_dir keeps their files."""
    rates = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "config_before_step_*.json"))):
        rate = read_json(path).get("lr")
        if isinstance(rate, (int, float)) and rate != now and rate not in rates:
            rates.append(rate)
    return rates

def read(folder: str) -> Run:
    """An out_dir of train.py. UserError where its config.json or metrics.jsonl is missing or damaged."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    for name, kind in CONFIG.items():
        if not isinstance(config.get(name), kind):
            raise UserError(f"{path} has no sound {name}: give an out_dir of train.py")
    path = os.path.join(folder, "metrics.jsonl")
    records = read_metrics(path)
    # AdamW is what the method's paper uses, and goes without saying
    note = ", Muon" if config["optimizer"] == "muon" else ""
    return Run(
        linear=config["linear"] + note,
        lr=config["lr"],
        seed=config["seed"],
        batch_tokens=config["batch_tokens"],
        vocabulary=config.get("vocab_size"),
        before=earlier_rates(folder, config["lr"]),
        # a file that two starts wrote in turn has them in two pieces
        evals=sorted(numbers_of(records, "eval", path), key=lambda record: record["step"]),
        trains=numbers_of(records, "train", path),
    )

# --- output ---

def print_table(runs: list[Run]):
    print(f"{'linear':12} {'lr':>8} {'seed':>4} {'loss':>8} {'perplexity':>10} {'bits/byte':>9} {'tok/s':>8}")
    for run in runs:
        last = run.evals[-1]
        # ready-made shards do not say how many bytes of text they hold
        bits = last.get("val_bpb")
        bits = "n/a" if bits is None else f"{bits:.4f}"
        # the median: the first updates compile and warm up
        speeds = [record["tokens_per_second"] for record in run.trains if record.get("tokens_per_second")]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "n/a"
        print(f"{run.linear:12} {run.lr:8.1e} {run.seed:4} {last['val_loss']:8.4f} {last['val_ppl']:10.2f} "
              f"{bits:>9} {speed:>8}")

def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib, or .[plot]") from None
    # draw into files alone: a server has no screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt

def draw(runs: list[Run], out: str):
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    kinds = figure.canvas.get_supported_filetypes()
    if os.path.splitext(out)[1].removeprefix(".") not in kinds:
        raise UserError(f"--out {out}: the name must end with one of .{', .'.join(sorted(kinds))}")
    # one colour a kind of layers, in the order of the table; ten are told apart
    layers = list(dict.fromkeys(run.linear for run in runs))
    bits = needs_bits(runs)
    for i, linear in enumerate(layers):
        own = [run for run in runs if run.linear == linear]
        draw_group(axes, own, plt.cm.tab10.colors[i % 10], bits)
    axes.set_xlabel("training tokens")
    if bits:
        axes.set_ylabel("bits per byte")
        axes.set_title("Validation; faint: other learning rates and seeds")
    else:
        axes.set_ylabel("loss (nats a token)")
        axes.set_title("Validation loss; faint: training loss, other learning rates and seeds")
    axes.set_ylim(top=highest(runs, bits))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150, bbox_inches="tight")
    plt.close(figure)

def needs_bits(runs: list[Run]) -> bool:
    """Whether losses a token say nothing, as tokens are not the same ones. UserError where bits per byte do
    not stand in each run either."""
    vocabularies = {run.vocabulary for run in runs}
    if len(vocabularies) < 2:
        return False
    if any(record.get("val_bpb") is None for run in runs for record in run.evals):
        raise UserError(f"the runs have vocabularies of {', '.join(map(str, sorted(vocabularies, key=str)))} "
                        "and not all have bits per byte: draw those of one tokenizer at a time")
    return True

def value(record: dict, bits: bool) -> float:
    return record["val_bpb"] if bits else record["val_loss"]

def highest(runs: list[Run], bits: bool) -> float:
    """Upper end of the axis: the start of every run would press what differs into a corner."""
    after = []
    for run in runs:
        # a tenth of a run is warm-up by the recipe; of a single evaluation there is no later one
        start = run.evals[-1]["step"] / 10
        after += [value(record, bits) for record in run.evals if record["step"] > start]
    finite = [number for number in after if math.isfinite(number)]
    return max(finite, default=1.0) * 1.05

def draw_group(axes, runs: list[Run], color, bits: bool):
    """The runs of one kind of layers in one colour: the best in full, with its training loss."""
    # seed 0 is the one that learning rates were swept with
    swept = [run for run in runs if run.seed == 0]
    best = min(swept or runs, key=Run.last_loss)
    tokens = [record["tokens"] for record in best.trains]
    losses = [record["loss"] for record in best.trains]
    # of a batch nobody counts the bytes
    if not bits:
        axes.plot(tokens, losses, color=color, alpha=0.25, lw=0.8)
    for run in runs:
        style = {"alpha": 0.35, "lw": 1}
        if run is best:
            style = {"label": run.label(), "lw": 2}
        tokens = [record["step"] * run.batch_tokens for record in run.evals]
        losses = [value(record, bits) for record in run.evals]
        axes.plot(tokens, losses, "o-", ms=3, color=color, **style)

# --- the command ---

def arguments(argv: list[str]) -> tuple[list[str], str]:
    """Folders and the file to draw."""
    folders = []
    out = "curve.png"
    # by hand: nanolost.flags knows flags only, and folders come first here, as in `ls out/*`
    rest = iter(argv)
    for word in rest:
        if word == "--out":
            out = next(rest, "")
        elif word.startswith("--out="):
            out = word.removeprefix("--out=")
        elif word.startswith("-"):
            raise UserError(f"unknown flag {word}: {USAGE}")
        else:
            folders.append(expanded(word))
    if not folders or not out:
        raise UserError(f"{'--out needs a name' if folders else 'no folder is given'}: {USAGE}")
    # a shell leaves the ~ of --out=~/x alone
    return folders, expanded(out)

def main(argv: list[str]):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    folders, out = arguments(argv)
    # all are read before anything is printed, so that an error stands alone
    runs = [read(folder) for folder in folders]
    # one that diverged early has none
    runs = [run for run in runs if run.evals]
    if not runs:
        raise UserError(f"no evaluation yet in {', '.join(folders)}: train longer, or lower --eval_every")
    runs.sort(key=lambda run: (run.linear, run.lr, run.seed))
    # the table first: it needs no matplotlib
    print_table(runs)
    draw(runs, out)
    print(f"drawn in {out}")

if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
