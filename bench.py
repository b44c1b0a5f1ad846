"""Speed and memory, each against what it should be compared with, the contestants taking turns:

    python bench.py --what step,decode --model 130m          # of init, layer, step, decode, data (all)
    python bench.py --device cuda --model 1b

Prints a table and last one JSON object on one line. Contestants take turns and their times are medians; a
ratio above 1 is a gain. The limit of LOST over dense is the ratio of their multiplications."""
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from lost import LOSTLinear, apply_lost
from model import MODELS
from nanolost.counts import count_flops, count_multiplies
from nanolost.data import SampleOrder, TokenDataset, token_dtype, write_shard
from nanolost.decode import compile_step, generate
from nanolost.flags import command, flag, parse
from nanolost.job import pick_device

@dataclass
class Config:
    what: str = flag("init,layer,step,decode,data", "the parts to measure")
    model: str = flag("130m", "size", list(MODELS))
    device: str = flag("auto", "the best there is", ["auto", *train.DEVICES])
    dtype: str = flag("bfloat16", "of autocast, and of the weights that decode", ["float32", "bfloat16"])
    compile: bool = flag(True, "torch.compile on every contestant")
    tokens: int = flag(2048, "of a micro-batch, in windows of --seq_len")
    seq_len: int = flag(256, "tokens of a window")
    new_tokens: int = flag(64, "that decode adds")
    rounds: int = flag(7, "turns of each contestant")
    vocab_size: int = flag(50257, "rows of embedding and head")

def race(contestants: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function; two turns to warm up, then `rounds` turns one after the other. Each is
    run once more before its turn, as in training a step follows one of the same model. On a GPU a turn is
    five runs, of which only the first waits for the host."""
    runs, wait = (5, torch.cuda.synchronize) if device.type == "cuda" else (1, lambda: None)
    def turn(work):
        wait()
        started = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
        return (time.perf_counter() - started) / runs
    for work in [*contestants.values()] * 2:
        work()
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            work()
            times[name].append(turn(work))
    return {name: statistics.median(series) for name, series in times.items()}

def table(rows: list[dict]):
    """Aligned columns, numbers with three digits."""
    def text(value):
        if isinstance(value, str):
            return value
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{round(value):,}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[text(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)

class Literal(nn.Module):
    """Equation 7 as it is printed, on the parameters of a LOSTLinear."""

    def __init__(self, layer: LOSTLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        one = self.layer
        low_rank = F.linear(F.silu(F.linear(x, one.A)), one.B)
        return one.gamma * low_rank + (1 - one.gamma) * F.linear(x[..., one.index], one.W_s)

def bench_layer(config: Config, device, autocast) -> list[dict]:
    """One layer forward and backward at the shapes of the size, weights in float32 under autocast."""
    recipe, rows = train.resolve({"model": config.model}), []
    width, inner = recipe.n_embd, recipe.n_ffn
    for m, n in [(width, width), (width, inner), (inner, width)]:
        dense = nn.Linear(m, n, bias=False, device=device)
        lost = LOSTLinear.from_linear(dense, recipe.rank, recipe.sparsity, init="random", select="weight")
        x = torch.randn(config.tokens // config.seq_len, config.seq_len, m, device=device, requires_grad=True)
        out = torch.randn(*x.shape[:2], n, device=device)
        contestants = {"dense": dense, "lost": lost, "literal": Literal(lost)}
        def both(layer, x=x, out=out):
            forward = torch.compile(layer, dynamic=False) if config.compile else layer
            def work():
                with autocast:
                    y = forward(x)
                torch.autograd.grad(y, [x, *layer.parameters()], out.to(y.dtype))
            return work
        seconds = race({name: both(layer) for name, layer in contestants.items()}, config.rounds, device)
        limit = count_multiplies(dense) / count_multiplies(lost)
        gain = seconds["dense"] / seconds["lost"]
        rows.append({"layer": f"{m}→{n}", **{f"{name} ms": 1000 * s for name, s in seconds.items()},
                     "over dense": gain, "limit": limit, "of limit": gain / limit,
                     "over literal": seconds["literal"] / seconds["lost"]})
    return rows

def random_shard(folder: str, config: Config, tokens: int) -> TokenDataset:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens, token_dtype(config.vocab_size))
    write_shard(os.path.join(folder, "train_0.bin"), ids, config.vocab_size)
    return TokenDataset(folder, "train", config.seq_len)

def bench_step(config: Config, device, autocast) -> list[dict]:
    """One update: forward, backward, clipping, optimizer. Of our models and of transformers' LLaMA, all on
    one batch that is there already, and of LOST on batches that are read as in training."""
    with tempfile.TemporaryDirectory() as folder:
        return race_of_steps(config, device, autocast, random_shard(folder, config, 10_000_000))

def race_of_steps(config: Config, device, autocast, data: TokenDataset) -> list[dict]:
    micro, order, count = config.tokens // config.seq_len, SampleOrder(len(data), 0), itertools.count()
    x = torch.randint(config.vocab_size, (micro, config.seq_len), device=device)
    def read():
        return data.batch(order[np.arange(micro) + micro * next(count)], device)
    contestants, rows, kept = {}, [], {}
    for name in ("dense", "lost", "lost, recompute", "transformers"):
        model, run = build(config, "lost" if name.startswith("lost") else "dense", device)
        row = {"step": name, "multiplications": count_multiplies(model), "flops": count_flops(model),
               "bytes": sum(train.count_bytes(model, run.optimizer))}
        model.recompute = name.endswith("recompute")
        if name == "transformers":
            model = as_transformers(model)
        optimizers, gradients = train.build_optimizers(model, run), train.flat_gradients(model)
        if config.compile:
            model.compile(dynamic=False)
        def update(batch=lambda: (x, x), model=model, name=name, optimizers=optimizers, gradients=gradients,
                   clip=run.grad_clip):
            gradients.zero_()
            x, y = batch()
            with autocast:
                loss = model(x, labels=x).loss if name == "transformers" else model(x, y, loss_only=True)[1]
            loss.backward()
            gradients.mul_(min(1.0, clip / gradients.norm().item()))
            for optimizer in optimizers:
                optimizer.step()
        if device.type == "cuda":
            update()
            torch.cuda.reset_peak_memory_stats()
            idle = torch.cuda.memory_allocated()
            update()
            row["peak bytes"] = row["bytes"] + torch.cuda.max_memory_allocated() - idle
        contestants[name], kept[name] = update, (model, optimizers, gradients)
        rows.append(row)
        if name == "lost":
            contestants["lost, reading data"] = lambda update=update: update(read)
            kept["lost, reading data"] = kept[name]
            rows.append({**row, "step": "lost, reading data"})
    seconds = race(contestants, config.rounds, device)
    peak = train.peak_flops(device)
    for row in rows:
        name, flops = row["step"], row.pop("flops")
        model, optimizers, gradients = kept[name]
        held = [*model.parameters(), *model.buffers(), gradients]
        held += [t for o in optimizers for state in o.state.values() for t in state.values()]
        speed, limit = config.tokens / seconds[name], rows[0]["multiplications"] / row["multiplications"]
        gain = seconds["dense"] / seconds[name]
        row |= {"held bytes": sum(t.nbytes for t in held), "ms": 1000 * seconds[name], "tokens/s": speed,
                "mfu": speed * flops / peak if peak else "n/a", "over dense": gain, "limit": limit,
                "of limit": gain / limit}
    return rows

def build(config: Config, linear: str, device):
    """(model, its resolved training config); LOST from a random start, on which the speed does not depend."""
    quick = {"init": "random", "select": "weight"} if linear == "lost" else {}
    run = train.resolve({"model": config.model, "vocab_size": config.vocab_size, "seq_len": config.seq_len,
                         "linear": linear, **quick})
    return train.build_model(run, device), run

def as_transformers(model):
    """transformers' LLaMA with the weights of a dense model."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("no transformers to compare with: pip install -c constraints.txt .[test]") from None
    other = LlamaForCausalLM(LlamaConfig(**model.config.to_hf(), attn_implementation="sdpa"))
    other.load_state_dict(model.state_dict())
    return other.to(model.lm_head.weight.device)

def bench_decode(config: Config, device, autocast) -> list[dict]:
    """One text continued greedily, weights in --dtype. compiled: only the step of one token is."""
    idx, n, contestants = torch.randint(config.vocab_size, (1, 32), device=device), config.new_tokens, {}
    for linear in ("dense", "lost"):
        model = build(config, linear, device)[0].to(getattr(torch, config.dtype))
        contestants[linear] = lambda model=model: generate(model, idx, n, temperature=0)
        if linear == "dense":
            other = as_transformers(model).to(model.lm_head.weight.dtype)
            contestants["transformers"] = lambda other=other: other.generate(
                idx, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        if config.compile:
            step = compile_step(model)
            contestants[f"{linear}, compiled"] = lambda model=model, step=step: generate(model,
                idx, n, temperature=0, step=step)
    seconds = race(contestants, config.rounds, device)
    return [{"decode": name, "tokens/s": n / s, "over dense": seconds["dense"] / s,
             "over transformers": seconds["transformers"] / s} for name, s in seconds.items()]

def bench_init(config: Config, device, autocast) -> list[dict]:
    """The decompositions of a whole model, as at the start of a run."""
    model, settings = build(config, "dense", device)[0], train.resolve({"model": config.model})
    layers = sum(isinstance(m, nn.Linear) for m in model.modules()) - 1
    started = time.perf_counter()
    apply_lost(model, settings.rank, settings.sparsity)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [{"init": config.model, "decompositions": layers, "seconds": time.perf_counter() - started}]

def bench_data(config: Config, device, autocast) -> list[dict]:
    """Samples in the order of training from a shard of 200 M tokens: speed, and growth of resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        data = random_shard(folder, config, 200_000_000)
        order, rows = SampleOrder(len(data), 0), []
        update = 131_072 // config.seq_len     # samples whose order is asked for at once, as in training
        for micro in (8, 64):
            def read(first, micro=micro):
                for samples in order[np.arange(first, first + update)].reshape(-1, micro):
                    data.batch(samples)
            read(0)
            before, started = train.peak_memory(torch.device("cpu")), time.perf_counter()
            for i in range(1, 1000):
                read(i * update)
            speed = 999 * update * config.seq_len / (time.perf_counter() - started)
            rows.append({"data": f"batches of {micro} × {config.seq_len}", "tokens/s": speed,
                         "growth of peak memory": train.peak_memory(torch.device("cpu")) - before})
        return rows

BENCHES = {"init": bench_init, "layer": bench_layer, "step": bench_step, "decode": bench_decode,
           "data": bench_data}

def main(config: Config):
    what = config.what.split(",")
    for name in ("tokens", "seq_len", "new_tokens", "rounds", "vocab_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: must be positive")
    if wrong := set(what) - set(BENCHES):
        raise ValueError(f"--what {', '.join(wrong)}: use {', '.join(BENCHES)}")
    if config.tokens % config.seq_len:
        raise ValueError(f"--tokens {config.tokens} is no multiple of --seq_len {config.seq_len}")
    device = torch.device(pick_device(config.device))
    autocast = torch.autocast(device.type, getattr(torch, config.dtype), enabled=config.dtype != "float32")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    results = {"machine": f"{platform.machine()} {chip}", "torch": torch.__version__, **vars(config)}
    torch.manual_seed(0)
    for name in what:
        results[name] = BENCHES[name](config, device, autocast)
        table(results[name])
        print(flush=True)
    print(json.dumps(results))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
