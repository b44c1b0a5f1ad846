"""How fast models are that lie in folders, against the first of them.

    python experiments/speed.py run --models smollm2,out/small,out/pinned [--fill docs/compression.md]

All in one process, in turn: prefill of 512 tokens, and the compiled decode step for one text and for several.
Weights are in --dtype; bytes are those that a decode step reads."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import race
from experiments.runs import drive
from experiments.tables import markdown, show
from model import Llama
from nanolost.checkpoint import load_model
from nanolost.decode import compile_step, generate
from nanolost.errors import UserError
from nanolost.flags import flag
from nanolost.threads import use_threads

PROMPT = 512

@dataclass(frozen=True)
class Config:
    models: str = flag("smollm2", "model folders, separated by commas; the first one is the measure")
    dtype: str = flag("float32", "of the weights", ["float32", "bfloat16"])
    batches: str = flag("1,8", "texts at once in a decode step, separated by commas")
    new_tokens: int = flag(32, "tokens of a turn of decoding")
    rounds: int = flag(5, "turns of each model, of which the median counts")
    threads: int | None = flag(None, "CPU threads (as many as cores are free)")
    fill: str | None = flag(None, "put the table into this file, between its two markers", path=True)

def prefill(model: Llama, ids: torch.Tensor) -> Callable:
    @torch.inference_mode()
    def work():
        model(ids)
    return work

def decoding(model: Llama, rows: int, new_tokens: int) -> Callable:
    """A short text continued: nearly all of it decode steps."""
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    step = compile_step(model)
    def work():
        generate(model, ids, new_tokens, temperature=0, step=step)
    return work

def read_bytes(model: Llama) -> int:
    """What a decode step reads: every weight once, of the embedding a row."""
    # a tied head is the embedding itself, under two names
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    total = sum(tensors.values())
    if model.config.tie_embeddings:
        return total
    return total - model.model["embed_tokens"].weight.nbytes

def measured(models: dict[str, Llama], build: Callable, tokens: int, rounds: int) -> dict[str, float]:
    """Tokens a second of each model; build(model) → work() of so many tokens."""
    works = {name: build(model) for name, model in models.items()}
    seconds = race(works, rounds, torch.device("cpu"))
    return {name: tokens / taken for name, taken in seconds.items()}

def columns(config: Config, models: dict[str, Llama]) -> dict[str, dict[str, float]]:
    ids = torch.randint(next(iter(models.values())).config.vocab_size, (1, PROMPT))
    found = {"prefill": measured(models, lambda model: prefill(model, ids), PROMPT, config.rounds)}
    for rows in map(int, config.batches.split(",")):
        def build(model, rows=rows):
            return decoding(model, rows, config.new_tokens)
        found[f"decode, batch {rows}"] = measured(models, build, rows * config.new_tokens, config.rounds)
    return found

def run(config: Config):
    folders = config.models.split(",")
    if len(folders) < 2:
        raise UserError("--models: name two folders or more, such as --models smollm2,out/small")
    use_threads(config.threads)
    models = {}
    for folder in folders:
        model = load_model(folder)[0].to(getattr(torch, config.dtype))
        models[folder] = model.requires_grad_(False)
    found = columns(config, models)
    first = next(iter(models))
    table = []
    for name, model in models.items():
        cells = []
        for speeds in found.values():
            cells.append(f"{speeds[name]:.1f} ({speeds[name] / speeds[first]:.2f})")
        parameters = sum(p.numel() for p in model.parameters())
        label = os.path.basename(os.path.normpath(name))
        table.append([label, f"{parameters:,}", f"{read_bytes(model):,}", *cells])
    head = ["", "parameters", "bytes a step reads", *found]
    text = markdown(head, table)
    show(config.fill, "compression-speed", text)

if __name__ == "__main__":
    drive({"run": run}, Config, __doc__)
