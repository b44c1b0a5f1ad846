"""The rows of experiments/finetuning.py: which ways to fine-tune a trained LLaMA are held against each other,
at which shares of zeros, what each starts from, and what a run of one is."""
import os
import shutil
from dataclasses import dataclass
from typing import NamedTuple

# first of ours: it imports nanolost before torch
from experiments import runs, sst2
from experiments.runs import Key, Rates, Settings, extra, folder_of
from experiments.tuned import ENDS, Tuned, Tuning
from nanolost import tuning
from nanolost.files import read_json
from nanolost.flags import flag, say

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
    widen: int = flag(1, "learning rates that a sweep may add where its best one is at an end")
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

def known_rows(config: Config) -> dict:
    """All rows that can be run with these flags."""
    return {**ROWS, **(sst2.ROWS if config.sst2_dir else {})}

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
