"""Speed and memory, each against what it should be compared with, the contestants taking turns:

    python bench.py --what step,decode --model 130m          # of the parts in --help
    python bench.py --device cuda --model 1b

Prints a table of each part, and last one JSON object on one line. Times are medians; a ratio above 1 is a
gain. The limit of LOST over dense is the ratio of their multiplications."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import copy
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lost import LOSTLinear, apply_lost
from model import MODELS, Llama
from nanolost.budget import count_bytes, peak_flops, peak_memory
from nanolost.checkpoint import load_model
from nanolost.counts import count_flops, count_multiplies
from nanolost.data import SampleOrder, TokenDataset, token_dtype, write_shard
from nanolost.decode import compile_frozen, compile_step, generate
from nanolost.errors import UserError
from nanolost.flags import command, flag, parse
from nanolost.huggingface import config_to_hf
from nanolost.job import Job, pick_device, place
from nanolost.loop import State, update
from nanolost.methods import build_model
from nanolost.settings import DEVICES, autocast, resolve, settle_device
from nanolost.settings import Config as TrainConfig
from nanolost.sparse import PackedLinear, load_kernel, most_columns, pack

# the speed does not depend on the first weights, and these need no SVD
QUICK_START = {"init": "random", "select": "weight"}
# runs of one turn on a GPU: only the first waits for the host to launch its kernels
GPU_RUNS = 5
# of the shard that steps read from
SHARD_TOKENS = 10_000_000
# of the data part: 400 MB, which no cache of a CPU holds
LONG_SHARD_TOKENS = 200_000_000
# updates by the recipe that the data part reads, 131 M tokens
READS = 1000
# tokens before those that decode adds
PROMPT = 32
# a pattern of zeros, beside shares of them
TWO_OF_FOUR = "2:4"
# columns of the sparse part: texts that are decoded at once
COLUMNS = (1, 2, 4, 8, 16)
# weights times columns in one turn of the sparse part
TURN = 1 << 28
# bytes of dense weights in the sparse part: several times the last cache
BEYOND_CACHE = 1 << 27

@dataclass
class Config:
    what: str = flag("init,layer,step,decode,data", "the parts to measure; there is also sparse, products of "
                     "a decode step")
    model: str = flag("130m", "size", list(MODELS))
    device: str = flag("auto", "the best there is", ["auto", *DEVICES])
    dtype: str = flag("bfloat16", "autocast, and the weights in the decode part", ["float32", "bfloat16"])
    compile: bool = flag(True, "torch.compile on every contestant")
    tokens: int = flag(2048, "tokens in a micro-batch, in windows of --seq_len")
    seq_len: int = flag(256, "tokens of a window")
    new_tokens: int = flag(64, "new tokens in the decode part")
    texts: int = flag(1, "texts at once in the decode part")
    zeros: tuple[float, ...] = flag((0.5, 0.7, 0.9), "shares of zeros in the decode and sparse parts")
    ckpt: str | None = flag(None, "the model of this folder in the decode part", path=True)
    n_layer: int | None = flag(None, "blocks (those of the size)")
    rounds: int = flag(7, "how often each contestant takes its turn")
    vocab_size: int = flag(50257, "rows of embedding and head")

# --- taking turns ---

def synchronize(device: torch.device):
    """Wait until the device has done what it was given."""
    # a CPU has, by the time that a call returns
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()

def turn(work: Callable, device: torch.device) -> float:
    """Seconds of one run of work()."""
    runs = GPU_RUNS if device.type == "cuda" else 1
    synchronize(device)
    started = time.perf_counter()
    for _ in range(runs):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / runs

def race(contestants: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function over `rounds` turns, one contestant after the other: a slow minute of
    the machine meets all of them."""
    # the first run compiles, the second may compile once more for other strides
    for _ in range(2):
        for work in contestants.values():
            work()
    # whole rounds, never all turns of one contestant
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            # once untimed: in training a step follows one of the same model, whose memory is in the caches
            work()
            times[name].append(turn(work, device))
    return {name: statistics.median(series) for name, series in times.items()}

# --- what is built for several parts ---

def held_bytes(model: nn.Module) -> int:
    """Of weights, packed or not."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])

def train_config(config: Config, linear: str, **given) -> TrainConfig:
    """The settings of a training run by the recipe of the size, one micro-batch an update."""
    if linear == "lost":
        given |= QUICK_START
    settings = resolve({
        "model": config.model,
        "linear": linear,
        "vocab_size": config.vocab_size,
        "seq_len": config.seq_len,
        **({"n_layer": config.n_layer} if config.n_layer else {}),
        "batch_tokens": config.tokens,
        "micro_batch": config.tokens // config.seq_len,
        "device": config.device,
        "dtype": config.dtype,
        **given,
    })
    settings = settle_device(settings)
    # the warm-up of a new run: `update` sets a learning rate
    settings.settle_schedule({})
    return settings

def transformers_llama():
    """The module `transformers`, where it is installed."""
    try:
        import transformers
    except ImportError:
        raise UserError("no transformers to compare with: pip install -c constraints.txt .[test]") from None
    return transformers

def as_transformers(model: Llama, cls=None) -> nn.Module:
    """transformers' LLaMA, or a subclass `cls` of it, with the weights of a dense model."""
    transformers = transformers_llama()
    sizes = transformers.LlamaConfig(**config_to_hf(model.config), attn_implementation="sdpa")
    other = (cls or transformers.LlamaForCausalLM)(sizes)
    # names and shapes are the same: both compute the same numbers
    other.load_state_dict(model.state_dict())
    # in bfloat16 where ours decodes in it
    weight = model.lm_head.weight
    return other.to(weight.device, weight.dtype)

def as_trainable(model: Llama) -> nn.Module:
    """transformers' LLaMA that is called as ours in training, so that one update serves both."""
    class CalledAsOurs(transformers_llama().LlamaForCausalLM):
        def forward(self, idx, targets, loss_only=True):
            # shift_labels: the targets are the next tokens already
            return None, super().forward(idx, labels=targets, shift_labels=targets).loss

    return as_transformers(model, CalledAsOurs)

def random_shard(folder: str, config: Config, tokens: int) -> TokenDataset:
    """A training split of random ids."""
    dtype = token_dtype(config.vocab_size)
    # their values do not matter to the speed, only their number
    ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens, dtype)
    write_shard(os.path.join(folder, "train_0.bin"), ids, config.vocab_size)
    return TokenDataset(folder, "train", config.seq_len)

# --- init: the start of a run ---

def bench_init(config: Config, device: torch.device) -> list[dict]:
    """The decompositions of a whole model, as at the start of a run."""
    # LOST by the recipe: the whole SVD of each weight, no quick start
    settings = resolve({"model": config.model})
    model = build_model(train_config(config, "dense"), device)
    # all but the head
    layers = sum(isinstance(m, nn.Linear) for m in model.modules()) - 1
    started = time.perf_counter()
    apply_lost(model, settings.rank, settings.sparsity)
    synchronize(device)
    seconds = time.perf_counter() - started
    return [{"init": config.model, "decompositions": layers, "seconds": seconds}]

# --- layer: one layer, forward and backward ---

class Literal(nn.Module):
    """Equation 7 as it is printed, on the parameters of a LOSTLinear."""

    def __init__(self, layer: LOSTLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        inner = F.silu(F.linear(x, layer.A))
        low_rank = F.linear(inner, layer.B)
        sparse = F.linear(x[..., layer.index], layer.W_s)
        return layer.gamma * low_rank + (1 - layer.gamma) * sparse

def forward_and_backward(layer: nn.Module, x, out_grad, context, compiled: bool) -> Callable:
    """work() for `race`: all gradients of one layer under the autocast `context`."""
    forward = torch.compile(layer, dynamic=False) if compiled else layer
    inputs = [x, *layer.parameters()]
    def work():
        with context:
            y = forward(x)
        # nothing is accumulated, so that a run leaves no trace for the next
        torch.autograd.grad(y, inputs, out_grad.to(y.dtype))
    return work

def race_of_layers(config: Config, device: torch.device, m: int, n: int) -> dict:
    """A row of the table: a layer from m to n features, weights in float32 under autocast."""
    settings = train_config(config, "dense")
    recipe = resolve({"model": config.model})
    dense = nn.Linear(m, n, bias=False, device=device)
    lost = LOSTLinear.from_linear(dense, recipe.rank, recipe.sparsity, **QUICK_START)
    shape = (config.tokens // config.seq_len, config.seq_len)
    # inside a model the input needs a gradient too
    x = torch.randn(*shape, m, device=device, requires_grad=True)
    out_grad = torch.randn(*shape, n, device=device)
    contestants = {}
    for name, layer in {"dense": dense, "lost": lost, "literal": Literal(lost)}.items():
        context = autocast(settings)
        contestants[name] = forward_and_backward(layer, x, out_grad, context, config.compile)
    seconds = race(contestants, config.rounds, device)
    row = {"layer": f"{m}→{n}"}
    # milliseconds, as all times in tables
    for name in contestants:
        row[f"{name} ms"] = 1000 * seconds[name]
    gain = seconds["dense"] / seconds["lost"]
    # all layers' time in matrix products, each at the same speed
    limit = count_multiplies(dense) / count_multiplies(lost)
    row["over dense"] = gain
    row["limit"] = limit
    row["of limit"] = gain / limit
    row["over literal"] = seconds["literal"] / seconds["lost"]
    return row

def bench_layer(config: Config, device: torch.device) -> list[dict]:
    """The three shapes of the layers of a size."""
    sizes = MODELS[config.model]
    width = sizes["n_embd"]
    inner = sizes["n_ffn"]
    shapes = [(width, width), (width, inner), (inner, width)]
    return [race_of_layers(config, device, m, n) for m, n in shapes]

# --- step: one update ---

class ReadyBatch:
    """Stands for a TokenDataset whose one batch is on the device already."""

    def __init__(self, config: Config, device: torch.device):
        shape = (config.tokens // config.seq_len, config.seq_len)
        self.x = torch.randint(config.vocab_size, shape, device=device)

    def targets(self, samples):
        return np.full(samples.shape, self.x.shape[1])

    def batch(self, samples, device):
        return self.x, self.x

class Trainee:
    """A model in training: `step()` is the update of train.py, on a batch that is there already or on one
    that is read."""

    def __init__(self, name: str, config: Config, device: torch.device, ready: ReadyBatch):
        linear = "lost" if name.startswith("lost") else "dense"
        # by the recipe 7b and 13b recompute always
        settings = train_config(config, linear, recompute=name.endswith("recompute"))
        model = build_model(settings, device)
        # counted on ours also for transformers: their shapes are the same
        self.row = {
            "step": name,
            "multiplications": count_multiplies(model),
            "flops": count_flops(model, config.seq_len),
            "bytes": sum(count_bytes(model, settings.optimizer)),
        }
        if name == "transformers":
            model = as_trainable(model)
        self.config = settings
        self.ready = ready
        # never started: a bench needs no handler of signals and no other process
        self.job = Job(device.type)
        self.state = State.of(model, settings)
        if config.compile:
            # in place: parameters keep their names
            model.compile(dynamic=False)

    def step(self, data=None, order=None):
        # the next ones, as in training: a page is read once
        numbers = np.arange(self.config.micro_batch) + self.state.samples
        if order is not None:
            numbers = order[numbers]
        # one micro-batch on one process
        numbers = numbers[None, None]
        update(self.state, data or self.ready, numbers, self.config, self.job)

    def held_bytes(self) -> int:
        """Of what stays in memory between two updates."""
        model = self.state.model
        held = [*model.parameters(), *model.buffers(), self.state.gradients]
        for optimizer in self.state.optimizers:
            for kept in optimizer.state.values():
                held += kept.values()
        return sum(tensor.nbytes for tensor in held)

    def measure_peak(self):
        """Activations come on top of what is held: known on a GPU alone."""
        if self.job.device.type != "cuda":
            return
        # the first update makes the optimizer state
        self.step()
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        self.step()
        # over what other contestants hold meanwhile
        self.row["peak bytes"] = self.row["bytes"] + torch.cuda.max_memory_allocated() - idle

def bench_step(config: Config, device: torch.device) -> list[dict]:
    """One update: forward, backward, clipping, optimizer. Of our models and of transformers' LLaMA, all on
    one batch that is there already, and of LOST on batches that are read as in training."""
    ready = ReadyBatch(config, device)
    trainees = {}
    for name in ("dense", "lost", "lost, reading data", "lost, recompute", "transformers"):
        if name == "lost, reading data":
            # the same model: a second one would take the caches from the first
            trainees[name] = trainees["lost"]
            continue
        # all are held at once, as they take turns
        trainees[name] = Trainee(name, config, device, ready)
        trainees[name].measure_peak()
    with tempfile.TemporaryDirectory() as folder:
        data = random_shard(folder, config, SHARD_TOKENS)
        order = SampleOrder(len(data), 0)
        contestants = {name: trainee.step for name, trainee in trainees.items()}
        contestants["lost, reading data"] = lambda: trainees["lost"].step(data, order)
        seconds = race(contestants, config.rounds, device)
    return step_rows(trainees, seconds, config.tokens, peak_flops(device))

def step_rows(trainees: dict[str, Trainee], seconds: dict, tokens: int, peak: float | None) -> list[dict]:
    """peak: FLOPs a second of the device, None where unknown."""
    dense = trainees["dense"].row["multiplications"]
    rows = []
    for name, trainee in trainees.items():
        row = {**trainee.row, "step": name}
        flops = row.pop("flops")
        speed = tokens / seconds[name]
        gain = seconds["dense"] / seconds[name]
        limit = dense / row["multiplications"]
        # what --dry_run counts is `bytes`; what is really there must agree
        row["held bytes"] = trainee.held_bytes()
        row["ms"] = 1000 * seconds[name]
        row["tokens/s"] = speed
        row["mfu"] = speed * flops / peak if peak else "n/a"
        row["over dense"] = gain
        row["limit"] = limit
        row["of limit"] = gain / limit
        rows.append(row)
    return rows

# --- decode: one text, token by token ---

def continuation(model: Llama, idx: torch.Tensor, new_tokens: int, step=None) -> Callable:
    """work() for `race`. step: a compiled decode step."""
    def work():
        generate(model, idx, new_tokens, temperature=0, step=step)
    return work

def continuation_by_transformers(model: Llama, idx: torch.Tensor, new_tokens: int) -> Callable:
    other = as_transformers(model)
    def work():
        other.generate(
            idx,
            max_new_tokens=new_tokens,
            # as many as ours, whatever end of text it meets
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return work

def with_zeros(model: nn.Module, share: float | str) -> nn.Module:
    """The same with so many of the weights of its blocks set to zero, anywhere, or two of every four."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        drawn = torch.rand(module.weight.shape, generator=generator)
        if share == TWO_OF_FOUR:
            order = drawn.view(-1, 4).argsort(1)
            drop = (order < 2).view_as(drawn)
        else:
            drop = drawn < share
        drop = drop.to(module.weight.device)
        module.weight.data.masked_fill_(drop, 0)
    return model

def decoders(config: Config, device: torch.device):
    """The models of the decode part, by name; the first is dense."""
    def build(linear):
        if config.ckpt:
            return load_model(config.ckpt)[0].to(device)
        return build_model(train_config(config, linear), device)
    # no autocast: it would cast every weight again for each token
    dtype = getattr(torch, config.dtype)
    # without zeros a model is as fast, so that one dense model stands for all shares
    yield "dense", build("dense").to(dtype)
    if not config.ckpt:
        yield "lost", build("lost").to(dtype)
    # a GPU has kernels for one pattern alone
    shares = config.zeros if device.type == "cpu" else (TWO_OF_FOUR,)
    for share in shares:
        model = with_zeros(build("dense").to(dtype), share)
        name = share if share == TWO_OF_FOUR else f"{share:.0%}"
        yield f"{name} zeros", pack(model, config.texts)

def bench_decode(config: Config, device: torch.device) -> list[dict]:
    """Texts continued greedily, weights in --dtype. compiled: only the decode step is, never the prefill."""
    # by default one row: what a person who waits for an answer has
    idx = torch.randint(config.vocab_size, (config.texts, PROMPT), device=device)
    new = config.new_tokens
    contestants = {}
    sizes = {}
    for name, model in decoders(config, device):
        contestants[name] = continuation(model, idx, new)
        sizes[name] = held_bytes(model)
        if name == "dense" and not config.ckpt:
            contestants["transformers"] = continuation_by_transformers(model, idx, new)
            sizes["transformers"] = sizes[name]
        if config.compile:
            contestants[f"{name}, compiled"] = continuation(model, idx, new, compile_step(model))
            sizes[f"{name}, compiled"] = sizes[name]
    seconds = race(contestants, config.rounds, device)
    rows = []
    for name in contestants:
        alike = "dense, compiled" if name.endswith("compiled") else "dense"
        row = {
            "decode": name,
            "bytes": sizes[name],
            "tokens/s": config.texts * new / seconds[name],
            "over dense": seconds["dense"] / seconds[name],
            "over dense alike": seconds[alike] / seconds[name],
        }
        if "transformers" in seconds:
            row["over transformers"] = seconds["transformers"] / seconds[name]
        rows.append(row)
    return rows

# --- sparse: products of a decode step, weights with zeros ---

def repeated(layers: list[Callable], x: torch.Tensor, times: int) -> Callable:
    def work():
        with torch.inference_mode():
            for _ in range(times):
                for layer in layers:
                    layer(x)
    return work

def race_of_products(config: Config, linear: nn.Linear, share: float) -> list[dict]:
    """Dense and packed, a row for each number of columns. best: the faster one of dense, compiled or not."""
    device = linear.weight.device
    # as many as no cache holds: a decode step meets each weight once
    copies = math.ceil(BEYOND_CACHE / linear.weight.nbytes)
    dense = [copy.deepcopy(linear) for _ in range(copies)]
    packed = [PackedLinear(one, max(COLUMNS)) for one in dense]
    rows = []
    for columns in COLUMNS:
        x = torch.randn(1, columns, linear.in_features, dtype=linear.weight.dtype)
        # a turn is about a tenth of a second: a timer knows it well
        times = max(1, TURN // (linear.weight.numel() * columns * copies))
        contestants = {"dense": repeated(dense, x, times), "packed": repeated(packed, x, times)}
        if config.compile:
            step = compile_frozen(lambda x: [one(x) for one in dense], [x])
            contestants["compiled"] = repeated([lambda x, step=step: step(x)], x, times)
        seconds = race(contestants, config.rounds, device)
        ms = {name: 1000 * one / (times * copies) for name, one in seconds.items()}
        best = min(ms["dense"], ms.get("compiled", ms["dense"]))
        rows.append({
            "sparse": f"{linear.in_features}→{linear.out_features}, {share:.0%}",
            "columns": columns,
            **{f"{name}, ms": one for name, one in ms.items()},
            "over dense": ms["dense"] / ms["packed"],
            "over best": best / ms["packed"],
            "bytes": held_bytes(packed[0]) / held_bytes(linear),
            "used": "packed" if columns <= most_columns(PackedLinear, x.dtype, share) else "dense",
        })
    return rows

def bench_sparse(config: Config, device: torch.device) -> list[dict]:
    """The products of a decode step in the shapes of a size, in --dtype, whether or not they are used."""
    if device.type != "cpu" or getattr(torch, config.dtype) not in load_kernel():
        raise UserError(f"--what sparse measures a kernel for CPUs, which {device.type} has none of here")
    sizes = MODELS[config.model]
    width = sizes["n_embd"]
    inner = sizes["n_ffn"]
    rows = []
    for m, n in [(width, width), (width, inner), (inner, width)]:
        for share in config.zeros:
            linear = nn.Linear(m, n, bias=False).to(getattr(torch, config.dtype)).requires_grad_(False)
            rows += race_of_products(config, with_zeros(linear, share), share)
    return rows

# --- data: reading samples ---

def bench_data(config: Config, device: torch.device) -> list[dict]:
    """Samples in the order of training from a long shard: speed, and growth of resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        data = random_shard(folder, config, LONG_SHARD_TOKENS)
        return [read_samples(config, data, micro) for micro in (8, 64)]

def read_samples(config: Config, data: TokenDataset, micro: int) -> dict:
    """A row of the table: micro-batches of `micro` samples."""
    order = SampleOrder(len(data), 0)
    # of one update by the recipe, whose order is asked for at once; whole micro-batches
    samples = TrainConfig.batch_tokens // config.seq_len
    samples = micro * math.ceil(samples / micro)
    def read(first):
        for one in order[np.arange(first, first + samples)].reshape(-1, micro):
            data.batch(one)
    cpu = torch.device("cpu")
    # the first update opens the shard
    read(0)
    before = peak_memory(cpu)
    started = time.perf_counter()
    for i in range(1, READS):
        read(i * samples)
    seconds = time.perf_counter() - started
    return {
        "data": f"batches of {micro} × {config.seq_len}",
        "tokens/s": (READS - 1) * samples * config.seq_len / seconds,
        "growth of peak memory": peak_memory(cpu) - before,
    }

# --- what is printed ---

def cell(value) -> str:
    if isinstance(value, str):
        return value
    # three digits of a ratio, every digit of a count
    # (times above a second and bytes are read as counts)
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{round(value):,}"

def table(rows: list[dict]):
    """Aligned columns, numbers with three digits."""
    # in the order of first appearance: not every row has every column
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        values = [row.get(name, "") for name in names]
        lines.append([cell(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join(padded), flush=True)

BENCHES = {
    "init": bench_init,
    "layer": bench_layer,
    "step": bench_step,
    "decode": bench_decode,
    "sparse": bench_sparse,
    "data": bench_data,
}

def check(config: Config):
    """UserError for flags that cannot be measured."""
    # all that counts something
    for name in ("tokens", "seq_len", "new_tokens", "texts", "rounds", "vocab_size"):
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"--{name} {value}: must be positive")
    if config.n_layer is not None and config.n_layer < 1:
        raise UserError(f"--n_layer {config.n_layer}: must be positive")
    for share in config.zeros:
        # NaN compares as false
        if not 0 < share < 1:
            raise UserError(f"--zeros {share}: must lie between 0 and 1")
    wrong = set(config.what.split(",")) - set(BENCHES)
    if wrong:
        raise UserError(f"--what {', '.join(sorted(wrong))}: use {', '.join(BENCHES)}")
    if config.tokens % config.seq_len:
        near = config.seq_len * math.ceil(config.tokens / config.seq_len)
        raise UserError(f"--tokens {config.tokens} is no multiple of --seq_len {config.seq_len}: use {near}")
    # several processes would measure how they disturb one another
    _, world = place()
    if world > 1:
        raise UserError("bench.py measures one process: start it without torchrun")

def main(config: Config):
    """Measure what `config` says, print tables and last the JSON line."""
    check(config)
    device = torch.device(pick_device(config.device))
    # what the speed depends on
    if device.type == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        chip = f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()} {chip}"
    # every flag too, so that the line says how it was made
    results = {
        "machine": machine,
        "torch": torch.__version__,
        **vars(config),
    }
    # for what is drawn beside the models, which have a seed of their own
    torch.manual_seed(0)
    for name in config.what.split(","):
        results[name] = BENCHES[name](config, device)
        table(results[name])
        print(flush=True)
    print(json.dumps(results))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
