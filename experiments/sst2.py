"""SST-2 (Socher et al. 2013), whether a sentence of a film review is positive, as questions: whole, low-rank
and LOST fine-tuning at equal trained parameters. Rows of experiments/finetuning.py.

A sentence stands in lm-eval's own prompt for it, and either answer is a token. Train and dev choose the
learning rate; the test split is asked once, of the models that were chosen."""
import functools
import json
import math
import os
import statistics
from typing import NamedTuple

import torch
import torch.nn as nn

from eval import Config as Asked
from experiments.runs import Key, extra, folder_of
from experiments.tables import markdown, spread
from experiments.tuned import ENDS, Tuned, Tuning
from nanolost import tuning
from nanolost.checkpoint import checkpoint_folder, empty_model, load_with_tokenizer
from nanolost.choices import Questions, accuracy
from nanolost.counts import count_parameters
from nanolost.covariance import linears
from nanolost.documents import Pair
from nanolost.errors import UserError
from nanolost.files import read_json, write_atomic
from nanolost.job import Job
from nanolost.lines import LineDataset
from nanolost.rows import Examples
from nanolost.settings import DEVICES, autocast
from nanolost.threads import use_threads
from nanolost.tokenizer import Tokenizer

PROMPT = "{}\nQuestion: Is this sentence positive or negative?\nAnswer:"
# by the label
CHOICES = [" negative", " positive"]
# lines of an update
BATCH = 16
ROWS = {
    "SST-2, full": {"method": "full"},
    "SST-2, LoRA": {"method": "lora"},
    "SST-2, LOST": {"method": "lost"},
    "SST-2, LOST with SiLU": {"method": "lost", "activation": "silu"},
}
# three each, a factor of 3 apart
RATES = {
    "full": (1e-5, 3e-5, 1e-4),
    "lora": (3e-4, 1e-3, 3e-3),
    "lost": (3e-4, 1e-3, 3e-3),
}
# of LOST's updates; the default of finetune.py first, the others where lora has no rank of that size
RANK = 8
SPARSITIES = (0.01, 0.012, 0.008, 0.015, 0.006, 0.02)
# what trained parameters may differ by
ALIKE = 0.02

# --- the text ---

class Texts(NamedTuple):
    """Files of lines. majority: share of the test lines that have the commonest label. seq_len: of a row."""

    train: str
    dev: str
    test: str
    majority: float
    seq_len: int

def read(folder: str, split: str) -> list[tuple[str, int]]:
    """Sentences with their labels. UserError for a file of another kind."""
    path = os.path.join(folder, f"{split}.tsv")
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                sentence, tab, label = line.rstrip("\n").rpartition("\t")
                if not tab or label not in ("0", "1"):
                    raise UserError(f"{path}: {line[:60]!r} is no sentence, tab and 0 or 1: give SST-2's "
                                    "files by --sst2_dir")
                found.append((sentence, int(label)))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    return found

def lesson(sentence: str, label: int) -> dict:
    return {"prompt": PROMPT.format(sentence), "completion": CHOICES[label]}

def question(sentence: str, label: int) -> dict:
    return {"prompt": PROMPT.format(sentence), "choices": CHOICES, "answer": label}

def fitting(config, tokenizer: Tokenizer) -> list[dict]:
    """The first --sst2_lines of the training split that nothing has to be cut from."""
    encode = Examples(tokenizer, config.sst2_tokens)
    found = []
    for sentence, label in read(config.sst2_dir, "train"):
        line = lesson(sentence, label)
        if len(found) < config.sst2_lines and not encode(Pair(**line)).cut:
            found.append(line)
    # fewer would be read more than once
    if len(found) < config.sst2_lines:
        raise UserError(f"{len(found)} of {config.sst2_lines} lines have at most {config.sst2_tokens} "
                        "tokens: use fewer --sst2_lines or more --sst2_tokens")
    return found

def tokenizer_of(config) -> Tokenizer:
    return Tokenizer.load(os.path.join(checkpoint_folder(config.ckpt), "tokenizer.json"))

@functools.cache
def texts(config) -> Texts:
    """Write the lines that the rows are trained on and asked."""
    tokenizer = tokenizer_of(config)
    dev = read(config.sst2_dir, "dev")[:config.sst2_dev]
    test = read(config.sst2_dir, "test")[:config.sst2_test]
    splits = {
        "train": fitting(config, tokenizer),
        "dev": [question(*line) for line in dev],
        "test": [question(*line) for line in test],
    }
    places = {}
    for split, lines in splits.items():
        folder = os.path.abspath(os.path.join(config.out_dir, "sst2"))
        os.makedirs(folder, exist_ok=True)
        # other amounts are other files: a run is refused another text
        places[split] = os.path.join(folder, f"{split}-{len(lines)}.jsonl")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(places[split], text.encode())
    ones = sum(label for _, label in test) / len(test)
    seq_len = LineDataset(places["train"], tokenizer, config.sst2_tokens).seq_len
    return Texts(**places, majority=max(ones, 1 - ones), seq_len=seq_len)

# --- equal parameters ---

@functools.cache
def shapes(ckpt: str) -> nn.Module:
    folder = checkpoint_folder(ckpt)
    return empty_model(read_json(os.path.join(folder, "config.json")), folder)

def of_updates(model: nn.Module, rank: int, sparsity: float) -> int:
    """Parameters of an update of every linear layer of the blocks, as finetune.py makes them."""
    total = 0
    for layer in linears(model).values():
        total += rank * (layer.in_features + layer.out_features)
        if sparsity:
            total += layer.out_features * max(1, int(sparsity * layer.in_features))
    return total

@functools.cache
def sizes(ckpt: str) -> dict[str, dict]:
    """Flags of lora and lost with which as many parameters are trained, to 2 %. UserError where there are
    none."""
    model = shapes(ckpt)
    a_rank = of_updates(model, 1, 0)
    for sparsity in SPARSITIES:
        wanted = of_updates(model, RANK, sparsity)
        low = round(wanted / a_rank)
        if abs(low * a_rank / wanted - 1) <= ALIKE:
            return {"lora": {"rank": low}, "lost": {"rank": RANK, "sparsity": sparsity}}
    raise UserError(f"{ckpt}: no rank of lora has as many parameters as lost with a rank of {RANK}")

def trained(config, row: str) -> int:
    """Parameters that a row trains."""
    model = shapes(config.ckpt)
    method = ROWS[row]["method"]
    if method == "full":
        return count_parameters(model)
    size = sizes(config.ckpt)[method]
    return of_updates(model, size["rank"], size.get("sparsity", 0))

# --- the runs ---

def updates(config) -> int:
    """Of one pass over the lines."""
    return max(1, config.sst2_lines // BATCH)

def flags_of(config, key: Key) -> dict:
    text = texts(config)
    flags = {**ENDS, **extra(config, tuning.Config), **ROWS[key.row]}
    flags |= {
        "ckpt": os.path.abspath(config.ckpt),
        "data": text.train,
        "eval": text.dev,
        "seq_len": text.seq_len,
        "batch_tokens": BATCH * text.seq_len,
        "micro_batch": BATCH,
        "steps": updates(config),
        "lr": key.lr,
        "seed": key.seed,
    }
    method = flags["method"]
    if method != "full":
        flags |= sizes(config.ckpt)[method]
        # scaled by 2, whatever the rank
        flags["alpha"] = 2.0 * flags["rank"]
    return flags

class Answers(Tuned):
    """A run that is measured by its answers."""

    def ends(self) -> dict:
        *_, last = self.records("accuracy")
        return {"dev_error": 1 - last["accuracy"], "dev_stderr": last["stderr"]}

class Asking(Tuning):
    figure = "dev_error"

def experiment(config) -> Asking:
    def run(key):
        return Answers(folder_of(config, key), flags_of(config, key))
    def rates(row):
        return config.lrs or RATES[ROWS[row]["method"]]
    return Asking(config, run, {row: row for row in ROWS}, rates)

def accuracy_of(folder: str, path: str) -> dict:
    """Of the model in a folder on the questions of a file, as finetune.py measures it."""
    asked = Asked(ckpt=folder)
    with Job.start(asked) as job:
        use_threads()
        asked.device = job.device.type
        asked.dtype = DEVICES[asked.device]["dtype"]
        model, tokenizer, _ = load_with_tokenizer(checkpoint_folder(folder))
        questions = Questions.read(path, tokenizer, model.config.max_seq_len)
        with torch.no_grad():
            found = accuracy(model.to(job.device), questions, BATCH, autocast(asked), job)
    # a share of the answers would be another number
    if found is None:
        raise KeyboardInterrupt
    return found

def look(config, row: str):
    """What is measured on a chosen model: its answers to the test questions."""
    def measured(folder: str) -> dict:
        return {"trained": trained(config, row), "test": accuracy_of(folder, texts(config).test)}
    return measured

def path_of(config) -> str:
    return os.path.join(config.out_dir, "sst2", f"untrained-{config.sst2_test}.json")

def untrained(config):
    """Measure, once, how often the commonest label is right, and the model as it came."""
    path = path_of(config)
    if not os.path.exists(path):
        text = texts(config)
        found = {"majority": text.majority, "test": accuracy_of(config.ckpt, text.test)}
        write_atomic(path, json.dumps(found).encode())

# --- the table ---

def percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} ± {100 * error:.1f}"

def error_of(share: float, questions: int) -> float:
    """The standard error of a share of right answers."""
    return math.sqrt(share * (1 - share) / (questions - 1))

def before_training(config) -> list[list]:
    """Lines of what any row is beside."""
    path = path_of(config)
    if not os.path.exists(path):
        return []
    found = read_json(path)
    majority = found["majority"]
    known = percent(majority, error_of(majority, found["test"]["questions"]))
    asked = percent(found["test"]["accuracy"], found["test"]["stderr"])
    return [["the commonest label", "", "", "", known, ""], ["untrained", "", "", "", asked, ""]]

def line(found: Asking, row: str) -> list | None:
    """Of a row, None while it has no answers."""
    results = [result for result in found.finished(row).values() if "test" in result]
    if not results:
        return None
    right = [result["test"]["accuracy"] for result in results]
    mean = statistics.mean(right)
    # seeds have the questions in common: more of them say no more of other questions
    error = error_of(mean, results[0]["test"]["questions"])
    seeds = spread([100 * value for value in right], ".1f") if len(right) > 1 else ""
    trained = f"{results[0]['trained']:,}"
    name = row.removeprefix("SST-2, ")
    return [name, trained, f"{found.best_lr(row):g}", len(right), percent(mean, error), seeds]

def table(config, found: Asking) -> str:
    """A row a line, beside the commonest label and the model as it came; "" without any."""
    lines = [line(found, row) for row in ROWS]
    lines = [cells for cells in lines if cells]
    head = ["", "trained", "learning rate", "seeds", "accuracy ± standard error, %", "± over seeds"]
    return markdown(head, before_training(config) + lines) if lines else ""
