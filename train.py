"""Train a LLaMA whose linear layers are LOST modules (or dense, low-rank, CoLA) on token shards.

    python train.py                                         # one process, the best device there is
    torchrun --nproc_per_node=8 train.py --model 350m       # eight GPUs
    python train.py --help                                  # every flag

Run the same command again to continue. All randomness is a function of (seed, step, rank), and the samples of
a step are the same for any number of processes: the state is weights, moments and a few counters."""
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lost import SWITCHES, LOSTLinear, apply_lost, diagnose
from model import MODELS, Llama, LlamaConfig
from nanolost import checkpoint
from nanolost.counts import count_flops, count_multiplies, count_parameters
from nanolost.data import SampleOrder, TokenDataset
from nanolost.files import write_atomic
from nanolost.flags import command, flag, parse
from nanolost.job import Report, Watch, on_first, pick_device
from nanolost.tokenizer import Tokenizer

# Per size LOST's rank, and the steps and learning rates that CoLA published (LOST's own are unknown; 13b: as
# 7b). tiny is ours, for a CPU: RESULTS.md says why Muon, and README.md how its learning rate was found.
RECIPES = {
    "tiny": dict(rank=32,   steps=700,     lr=1.2e-2, optimizer="muon", batch_tokens=8192,
                 eval_tokens=200_000, eval_every=100, save_every=100),
    "60m":  dict(rank=128,  steps=10_000,  lr=6e-3),
    "130m": dict(rank=256,  steps=20_000,  lr=3e-3),
    "350m": dict(rank=256,  steps=60_000,  lr=3e-3),
    "1b":   dict(rank=512,  steps=100_000, lr=2e-3),
    "7b":   dict(rank=1024, steps=150_000, lr=1e-3, recompute=True),         # else 97 GB of activations
    "13b":  dict(rank=1280, steps=150_000, lr=1e-3, recompute=True),         # a micro-batch; here 152 GB
}
LINEARS = {                                    # the same layer with other switches; dense: no such layer
    "lost": {}, "dense": {},
    "lowrank": dict(sparsity=0.0, gamma=1.0, init="random", activation="none"),
    "cola": dict(sparsity=0.0, gamma=1.0, init="random", activation="silu"),
}
DEVICES = {                                    # what "auto" means; micro_tokens: the most of a micro-batch
    "cuda": dict(backend="nccl", dtype="bfloat16", compile="true", micro_tokens=16_384),
    "mps": dict(backend="gloo", dtype="float32", compile="false", micro_tokens=4_096),
    "cpu": dict(backend="gloo", dtype="float32", compile="false", micro_tokens=4_096),
}
PEAK_FLOPS = {                                 # a second, dense bf16, from the makers' data sheets
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "L40S": 362e12,
    "4090": 165e12,
}

@dataclass
class Config:
    """Every setting of a run. None: chosen later, by `resolve` or `run`."""
    # files
    data_dir: str = flag("data/c4", "folder of token shards")
    out_dir: str = flag("out", "where checkpoints, metrics.jsonl, config.json and status.json go")
    tokenizer: str | None = flag(None, "gpt2, byte or a file, for shards that came without a tokenizer.json")
    # model
    model: str = flag("60m", "size; brings its recipe, of which any value can be overridden", list(MODELS))
    n_layer: int | None = flag(None, "blocks (by --model)")
    n_head: int | None = flag(None, "attention heads (by --model)")
    n_kv_head: int | None = flag(None, "heads of keys and values, fewer for grouped-query attention (n_head)")
    n_embd: int | None = flag(None, "width (by --model)")
    n_ffn: int | None = flag(None, "inner width of the MLP (by --model)")
    tie_embeddings: bool = flag(False, "one weight for embedding and head")
    vocab_size: int | None = flag(None, "rows of embedding and head (the tokenizer's)")
    init_std: float = flag(0.02, "standard deviation of the first dense weights, which are decomposed")
    # method
    linear: str = flag("lost", "the linear layers: LOST, dense, plain low-rank or CoLA", list(LINEARS))
    rank: int | dict | None = flag(None, "r; also by module: q_proj=64,default=128 (by --model)")
    sparsity: float | dict = flag(0.01, "ρ, share of input channels on the sparse path; also by module")
    gamma: float = flag(0.7, "γ, weight of the low-rank path; the sparse one has 1 - γ")
    learn_gamma: bool = flag(False, "train γ, one a layer")
    init: str = flag("svd", "start of the factors", SWITCHES["init"])
    select: str = flag("residual", "channels by column norm (residual: L2), or at random", SWITCHES["select"])
    sparse_init: str = flag("weight", "the columns that the sparse path starts from", SWITCHES["sparse_init"])
    activation: str = flag("silu", "between the factors", SWITCHES["activation"])
    # training
    seq_len: int = flag(256, "tokens of a sample")
    batch_tokens: int = flag(131_072, "tokens of an update, over all processes and micro-batches")
    micro_batch: int | None = flag(None, "samples of one forward pass (what suits the device)")
    steps: int | None = flag(None, "updates (by --model)")
    lr: float | None = flag(None, "peak learning rate (by --model)")
    warmup: int | None = flag(None, "updates of linear warm-up (a tenth of --steps)")
    min_lr_ratio: float = flag(0.1, "end of the cosine, as a share of the peak")
    optimizer: str = flag("adamw", "muon (tiny's): for matrices of the blocks, AdamW elsewhere",
                          ["adamw", "muon"])
    weight_decay: float = flag(0.01, "decoupled, on matrices and embeddings")
    betas: tuple[float, float] = flag((0.9, 0.95), "of AdamW")
    grad_clip: float = flag(0.5, "largest norm of the whole gradient, 0 for no clipping")
    spike: float = flag(5.0, "log a gradient norm above this many times the median of the last 100; 0: never")
    skip_spikes: bool = flag(False, "leave out the update of such a step, from step 21 on")
    seed: int = flag(0, "of the first weights and of the order of samples")
    # running
    device: str = flag("auto", "the best there is", ["auto", *DEVICES])
    dtype: str = flag("auto", "of autocast; bfloat16 on CUDA, else float32", ["auto", "float32", "bfloat16"])
    compile: str = flag("auto", "torch.compile; auto is true on CUDA", ["auto", "true", "false"])
    recompute: bool = flag(False, "save memory: compute wide activations again, backward (7b, 13b: true)")
    eval_every: int = flag(1000, "updates between evaluations; one more at the end")
    eval_tokens: int = flag(10_000_000, "validation tokens of an evaluation, always the same ones")
    save_every: int = flag(1000, "updates between checkpoints; one more at the end")
    keep: int = flag(3, "newest checkpoints that are kept")
    log_every: int = flag(10, "updates between lines of the log")
    resume: str = flag("auto", "auto: from the newest good checkpoint of out_dir; never; or a PATH")
    overwrite: bool = flag(False, "with --resume never: delete the run that is in out_dir")
    deterministic: bool = flag(False, "refuse operations whose result varies from run to run")
    timeout: int = flag(600, "seconds within which a job ends when a process hangs; ten times that in a save")
    dry_run: bool = flag(False, "print parameters, memory and tokens, and exit")

METHOD = ("rank", "sparsity", "gamma", "learn_gamma", "init", "select", "sparse_init", "activation")
# A resumed run must agree in these; any other value that changed is printed
FIXED = {*METHOD, "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn", "tie_embeddings", "vocab_size",
         "linear", "seq_len", "optimizer", "init_std", "data", "tokenizer_sha256"}

POSITIVE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn", "seq_len", "batch_tokens", "micro_batch",
            "steps", "eval_every", "eval_tokens", "save_every", "keep", "log_every", "timeout")
LIMITS = {                                     # name → (what its value must do, the test of it)
    **dict.fromkeys(POSITIVE, ("be positive", lambda n: n >= 1)),
    **dict.fromkeys(("lr", "init_std"), ("be positive and finite", lambda x: 0 < x < math.inf)),
    **dict.fromkeys(("weight_decay", "grad_clip"), ("not be negative", lambda x: x >= 0)),
    "min_lr_ratio": ("lie in [0, 1]", lambda x: 0 <= x <= 1),
    "betas": ("lie in [0, 1)", lambda pair: all(0 <= x < 1 for x in pair)),
    "spike": ("be above 1, or 0 for none", lambda x: x == 0 or x > 1),
}

def resolve(given: dict) -> Config:
    """A whole Config from the values given, the recipe of the size and the switches of the kind of layer."""
    base = Config(**given)                     # for the two names that bring the rest
    config = Config(**{**MODELS[base.model], **RECIPES[base.model], **LINEARS[base.linear], **given})
    config.n_kv_head = config.n_head if config.n_kv_head is None else config.n_kv_head
    config.warmup = config.steps // 10 if config.warmup is None else config.warmup
    for name in METHOD:
        if name in given and config.linear == "dense":
            raise ValueError(f"--{name} means nothing with --linear dense: drop one of them")
    for name, (what, fits) in LIMITS.items():
        if (value := getattr(config, name)) is not None and not fits(value):
            raise ValueError(f"--{name} {value}: must {what}")
    sparse = any(config.sparsity.values()) if isinstance(config.sparsity, dict) else config.sparsity
    if config.linear != "dense" and (config.gamma == 0 or config.gamma == 1 and sparse):
        raise ValueError(f"--gamma {config.gamma}: one of the two paths would never learn; use one "
                         "between 0 and 1, or 1 with --sparsity 0")
    if not 0 <= config.warmup <= config.steps:
        raise ValueError(f"--warmup {config.warmup}: must lie between 0 and --steps {config.steps}")
    return config

def split_batch(config: Config, world: int, micro_tokens: int) -> tuple[int, int]:
    """(samples of a micro-batch, micro-batches of a process for an update); ValueError names valid values."""
    samples, rest = divmod(config.batch_tokens, config.seq_len)
    if rest:
        near = [n * config.seq_len for n in (samples, samples + 1) if n]
        raise ValueError(f"--batch_tokens {config.batch_tokens} is no multiple of --seq_len: use {near}")
    share, rest = divmod(samples, world)
    if rest:
        raise ValueError(f"{samples} samples an update do not divide among {world} processes: start one of "
                         f"{divisors(samples)}, or use --batch_tokens {(share + 1) * world * config.seq_len}")
    fitting = [d for d in divisors(share) if d * config.seq_len <= micro_tokens]
    micro = config.micro_batch or max(fitting, default=1)
    if share % micro:
        raise ValueError(f"--micro_batch {micro} does not divide a process's {share} samples: use one of "
                         f"{divisors(share)}")
    return micro, share // micro

def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

def lr_at(step: int, config: Config) -> float:
    """Learning rate of update `step`, from 1: linear warm-up, then a cosine to min_lr_ratio of the peak."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

def build_model(config: Config, device, part: tuple[int, int] = (0, 1)) -> Llama:
    """The model of step 0, decomposed on `device`; on the meta device shapes only. part: of `apply_lost`."""
    torch.manual_seed(config.seed)             # the weights are drawn on the CPU: the same for every device
    names = [f.name for f in dataclasses.fields(LlamaConfig) if hasattr(config, f.name)]
    with torch.device("meta" if device == "meta" else "cpu"):
        model = Llama(LlamaConfig(**{name: getattr(config, name) for name in names}))
    model.to(device)
    if config.linear != "dense":
        apply_lost(model, part=part, **{name: getattr(config, name) for name in METHOD})
    return model

def share_weights(model: Llama, world: int):
    """Give all processes the same bits: the i-th of every `world` layers from process i, which decomposed it,
    the rest from the first."""
    layers = [name for name, m in model.named_modules() if isinstance(m, LOSTLinear)]
    owner = {name: i % world for i, name in enumerate(layers)}
    for name, tensor in model.state_dict().items():
        dist.broadcast(tensor, owner.get(name.rpartition(".")[0], 0))

def build_optimizers(model: Llama, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW, with Muon beside it where that is asked for. Matrices decay, vectors and scalars do not."""
    groups = {"muon": [], "matrices": [], "vectors": []}
    for name, p in model.named_parameters():
        inner = config.optimizer == "muon" and name.startswith("model.layers.")
        groups["vectors" if p.dim() < 2 else "muon" if inner else "matrices"].append(p)
    assert sum(map(len, groups.values())) == len(list(model.parameters())), "a parameter is in no group"
    decay = {"lr": config.lr, "weight_decay": config.weight_decay}
    adamw = [dict(params=groups["matrices"]), dict(params=groups["vectors"], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(adamw, betas=config.betas, fused=True, **decay)]
    if groups["muon"]:                         # match_rms_adamw: updates of AdamW's size, one lr for both
        optimizers.append(torch.optim.Muon(groups["muon"], adjust_lr_fn="match_rms_adamw", **decay))
    return optimizers

def flat_gradients(model: Llama) -> torch.Tensor:
    """One vector of which all gradients are views: one reduction, one norm, one scaling. Its layout never
    changes, so sums over processes round alike before and after a restart; DistributedDataParallel rearranges
    its buckets after the first step, which for three or more processes changes the last bits."""
    parameters = list(model.parameters())
    flat = torch.zeros(count_parameters(model), device=parameters[0].device)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
    return flat

@torch.no_grad()
def evaluate(model, data: TokenDataset, samples, micro, token_bytes, autocast, device, rank=0, world=1,
             asked=()):
    """Loss over the first `samples` windows of the validation split: every token weighs the same for any
    micro-batch and number of processes. Bits per byte: those of all tokens, also end-of-text, over the bytes
    of text. None if a process was `asked` to stop meanwhile."""
    sums = torch.zeros(4, dtype=torch.float64)                             # nats, tokens, bytes, stops
    for first in range(rank * micro, samples, world * micro):
        if asked:
            break
        x, y = data.batch(np.arange(first, min(first + micro, samples)))
        sums[1:3] += torch.tensor([y.numel(), token_bytes[y].sum()])
        count, fill = y.numel(), (0, 0, 0, micro - len(y))             # another shape would compile again
        with autocast:
            loss = model(F.pad(x, fill).to(device), F.pad(y, fill, value=-1).to(device), loss_only=True)[1]
        sums[0] += loss.item() * count
    sums[3] = len(asked)
    if world > 1:
        sums = sums.to(device)                 # nccl reduces nothing on the CPU
        dist.all_reduce(sums)
    nats, tokens, text_bytes, stops = sums.tolist()
    return None if stops else {"val_loss": nats / tokens, "val_ppl": math.exp(min(nats / tokens, 700)),
            "val_bpb": nats / math.log(2) / max(text_bytes, 1), "val_tokens": int(tokens)}

@torch.no_grad()
def look_inside(model, data: TokenDataset, autocast, device, rank=0, world=1, group=None) -> dict:
    """`diagnose` of the LOST layers on the first windows of the validation split, each process its share of
    them; nothing without any."""
    (idx, _), layers = data.batch(np.arange(min(4, len(data))), device), {}
    try:
        with autocast:
            layers = diagnose(model, lambda: model.forward(idx), (rank, world))    # never the compiled one
    except RuntimeError as e:                  # of a solver or of too little memory: no reason to end a run
        print(f"WARNING: no look inside the layers: {e}", file=sys.stderr, flush=True)
    if group:
        shares = [None] * world
        dist.all_gather_object(shares, layers, group=group)
        found = {name: numbers for share in shares for name, numbers in share.items()}
        layers = {name: found[name] for name, _ in model.named_modules() if name in found}
    return {"layers": layers} if layers else {}

def median_norm(norms: list[float]) -> float:
    """Of the last gradient norms; infinite while they are too few to tell a spike."""
    return statistics.median(norms) if len(norms) >= 20 else math.inf

def count_bytes(model: Llama, optimizer: str) -> tuple[int, int, int]:
    """Bytes of weights (buffers included), of gradients, and of the optimizer's moments."""
    total = count_parameters(model)
    inner = sum(p.numel() for p in model.model["layers"].parameters() if p.dim() == 2)
    moments = 2 * total - (inner if optimizer == "muon" else 0)            # Muon keeps one, AdamW two
    return 4 * total + sum(b.numel() * b.element_size() for b in model.buffers()), 4 * total, 4 * moments

def describe(config: Config, model: Llama, world: int, micro: int, accumulation: int) -> str:
    """Sizes of a run, counted from the modules present."""
    def of(*ends):
        return sum(p.numel() for name, p in model.named_parameters() if name.endswith(ends))
    total, low_rank, sparse = of(""), of(".A", ".B"), of(".W_s")
    weights, gradients, moments = count_bytes(model, config.optimizer)
    return (f"parameters  {total:,} = low-rank {low_rank:,} + sparse {sparse:,} + dense "
            f"{total - low_rank - sparse:,}\n"
            f"device      {config.device}, {config.dtype}, compile {config.compile}\n"
            f"compute     {count_multiplies(model):,} multiplications a token forward, "
            f"{count_flops(model):,} FLOPs a token of training\n"
            f"memory      weights {weights:,} + gradients {gradients:,} + optimizer {moments:,} bytes, and "
            f"activations\ncheckpoint  {weights + moments:,} bytes, the newest {config.keep} are kept\n"
            f"tokens      {config.steps * config.batch_tokens:,} = {config.steps:,} steps × {world} "
            f"processes × {accumulation} micro-batches × {micro} samples × {config.seq_len}")

# --- out_dir ---

def check_space(config: Config):
    """Refuse a disk without room for `keep` checkpoints, and for the next while it is written."""
    weights, _, moments = count_bytes(build_model(config, "meta"), config.optimizer)
    more = max(1, config.keep + 1 - len(checkpoint.checkpoints(config.out_dir)))
    free = shutil.disk_usage(config.out_dir).free
    if free < more * (weights + moments):
        raise ValueError(f"{config.out_dir} has {free:,} bytes free for {more} more checkpoints of "
                         f"{weights + moments:,}: make room, lower --keep or use another --out_dir")

def choose_checkpoint(config: Config) -> str | None:
    """Folder to continue from, or None for a new run. For that out_dir must be empty, and to continue from
    elsewhere it must have no checkpoints, or it is emptied."""
    if config.resume == "auto":
        return checkpoint.newest_checkpoint(config.out_dir)
    folder, old = None, set(os.listdir(config.out_dir)) - {".lock"}
    if config.resume != "never":
        folder = checkpoint.checkpoint_folder(config.resume)
        inside = os.path.realpath(folder).startswith(os.path.realpath(config.out_dir) + os.sep)
        if inside or not checkpoint.checkpoints(config.out_dir):
            return folder
    if old and not config.overwrite:
        raise ValueError(f"{config.out_dir} is not empty: continue with --resume auto, delete its run with "
                         "--overwrite, or use another --out_dir")
    shutil.rmtree(os.path.join(config.out_dir, "checkpoints"), ignore_errors=True)
    for name in old & {"metrics.jsonl", "config.json", "status.json"}:
        os.remove(os.path.join(config.out_dir, name))
    return folder

def check_same_run(saved: dict, now: dict, say):
    """Refuse a changed architecture or data set, print any other change."""
    for name in [n for n in now if n in saved and saved[n] != now[n] and n not in ("resume", "overwrite")]:
        if name in FIXED:
            raise ValueError(f"{name} was {saved[name]} when this run began and is {now[name]} now: go back, "
                             "or use another --out_dir")
        say(f"changed: {name} {saved[name]} → {now[name]}")

def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second of one device at the most, None where unknown."""
    words = torch.cuda.get_device_name(device).replace("-", " ").split() if device.type == "cuda" else []
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)

def peak_memory(device: torch.device) -> int:
    """Bytes at the most so far: of the GPU's allocator, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

# --- the run ---

def main(config: Config):
    """Train as `config` (from `resolve`) says. Returns when the run is finished, or stopped by a signal."""
    with contextlib.ExitStack() as stack:      # what run() opens is closed in reverse order, however it ends
        try:
            run(config, stack)
        except torch.OutOfMemoryError as e:
            raise MemoryError(f"{str(e).partition(' Of the allocated')[0]} With a smaller --micro_batch or "
                              "--recompute true the same command continues, with the same samples") from e

def run(config: Config, stack: contextlib.ExitStack):
    # where: this process among the others, its device, its share of a batch
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = pick_device(config.device)
    auto, cuda = DEVICES[kind], kind == "cuda"
    config = dataclasses.replace(config, device=kind)      # from here on no value is "auto"
    for name in ("dtype", "compile"):
        setattr(config, name, auto[name] if getattr(config, name) == "auto" else getattr(config, name))
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if cuda else None)
    autocast = torch.autocast(kind, getattr(torch, config.dtype), enabled=config.dtype != "float32")
    micro, accumulation = split_batch(config, world, auto["micro_tokens"])
    config.micro_batch = micro
    batch = world * accumulation * micro       # samples of an update

    # what: the vocabulary is the last of the model's sizes; a dry run can do without data
    file = config.tokenizer or os.path.join(config.data_dir, "tokenizer.json")
    tokenizer = Tokenizer.named(file) if config.tokenizer or os.path.exists(file) else None
    if not tokenizer and not config.dry_run:
        raise ValueError(f"no {file}: run prepare_c4.py --out_dir {config.data_dir} first, or, for ready-"
                         "made shards, say --tokenizer gpt2")
    config.tokenizer = file
    known = tokenizer.vocab_size if tokenizer else LlamaConfig.vocab_size
    config.vocab_size = config.vocab_size or known
    if config.dry_run:                         # on the meta device: for 7b no 27 GB either
        if rank == 0:
            print(describe(config, build_model(config, "meta"), world, micro, accumulation), flush=True)
        return
    if config.vocab_size < known:
        raise ValueError(f"--vocab_size {config.vocab_size} is below the tokenizer's {known}")
    digest = hashlib.sha256(tokenizer.to_json()).hexdigest()
    token_bytes = F.pad(torch.from_numpy(tokenizer.token_bytes()), (0, config.vocab_size - known))
    train_data = TokenDataset(config.data_dir, "train", config.seq_len)
    val_data = TokenDataset(config.data_dir, "val", config.seq_len)
    order = SampleOrder(len(train_data), config.seed)
    eval_samples = min(len(val_data), max(1, config.eval_tokens // config.seq_len))

    # a signal asks for a stop, on which all processes agree at the end of a step; a second Ctrl-C kills
    asked = []
    def ask(number, frame):
        asked.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    def asker():
        return asked[0] if asked else "a signal to another process"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        stack.callback(signal.signal, number, signal.signal(number, ask))
    if cuda:
        torch.cuda.set_device(device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)

    # files: only the first process writes, and only after it has claimed out_dir
    state = {"step": 0, "samples": 0, "tokens": 0, "evaluated": 0, "best_val_loss": None, "norms": []}
    report, files = stack.enter_context(Report(config.out_dir, rank, state)), None
    def where():
        return f"step {state['step']:>6}/{config.steps}"
    if world > 1:
        timeout = datetime.timedelta(seconds=config.timeout)
        report.watch = Watch(rank, world, config.timeout, report.give_up)  # from here on, also over this
        dist.init_process_group(auto["backend"], timeout=timeout)
        files = dist.new_group(backend="gloo", timeout=10 * timeout)       # waits while the first one saves

    # the first process alone looks after out_dir, and reads every shard once
    def prepare():
        report.claim()
        checkpoint.sweep(config.out_dir)
        check_space(config)
        for data in (train_data, val_data):
            if data.tokenizer_sha256 not in (None, digest):
                raise ValueError(f"{file} is not the tokenizer that {config.data_dir} was made with: use its "
                                 "tokenizer.json as it was, or prepare the text again")
            data.check_ids(known)
        return choose_checkpoint(config)
    folder = on_first(rank, files, prepare)

    # model and optimizer: of step 0, or as they were
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    identity = {**values, "data": [train_data.fingerprint, val_data.fingerprint],
                "tokenizer_sha256": digest,
                # of these the last bits of a sum depend: a change is allowed, and said
                "processes": world, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if folder:
        model, found = checkpoint.load_folder(folder)
        if "config" not in found:
            raise ValueError(f"{folder} has no training state to continue from: it is a model alone")
        on_first(rank, files, lambda: check_same_run(found["config"], identity, report.say))
        state.update({name: found[name] for name in state if name in found})
        report.say(f"continuing from {folder}")
    else:
        drawn = config.init == "random" or config.select == "random"       # every process draws all then
        model = build_model(config, device, (0, 1) if drawn else (rank, world))
    model.to(device)
    if world > 1:
        share_weights(model, world)
    optimizers = build_optimizers(model, config)
    if folder:
        checkpoint.load_optimizer(folder, model, optimizers)
    gradients, model.recompute = flat_gradients(model), config.recompute
    if config.compile == "true":
        model.compile()                        # in place: parameters keep their names
    report.say(describe(config, model, world, micro, accumulation))
    flops, peak = count_flops(model), peak_flops(device)

    if rank == 0:
        report.open_metrics()
        write_atomic(os.path.join(config.out_dir, "config.json"), json.dumps(values, indent=1).encode())
    report.status("running")

    saved, begun, stop, timed, started = dict(state), state["step"], "", 0, time.perf_counter()
    while True:
        # evaluate and save where this step asks for it; a resumed run may have an evaluation to make up
        step, paused = state["step"], time.perf_counter()
        done = step >= config.steps
        if step > state["evaluated"] and (done or step % config.eval_every == 0) and not stop:
            val = evaluate(model, val_data, eval_samples, micro, token_bytes, autocast, device, rank, world,
                           asked)
            stop = "" if val else asker()
            if val:
                inside = look_inside(model, val_data, autocast, device, rank, world, files)
                report.record("eval", **val, **inside)
                report.say(f"{where()} | val loss {val['val_loss']:.4f} | perplexity {val['val_ppl']:.2f} | "
                           f"{val['val_bpb']:.4f} bits per byte | {val['val_tokens']:,} tokens")
                state["evaluated"] = step
                state["best_val_loss"] = min(val["val_loss"], state["best_val_loss"] or math.inf)
        if state != saved and (done or stop or step % config.save_every == 0):
            if rank == 0:
                os.fsync(report.metrics.fileno())      # its lines are on disk before the checkpoint is
            on_first(rank, files, lambda: checkpoint.save_checkpoint(
                config.out_dir, state["step"], model, optimizers, {**state, "config": identity}, tokenizer,
                config.keep))
            saved = dict(state)
        if done or stop:
            break
        started += time.perf_counter() - paused                            # speed is that of training alone

        # one update
        step += 1
        lr = lr_at(step, config)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr

        # gradient of the mean loss over batch_tokens: micro-batches add up here, processes in one reduction
        gradients.zero_()
        loss = torch.zeros((), device=device)
        samples = order[np.arange(batch) + state["samples"]]
        for mine in samples.reshape(accumulation, world, micro)[:, rank]:
            x, y = train_data.batch(mine, device)
            with autocast:
                part = model(x, y, loss_only=True)[1]
            part = part / (accumulation * world)
            part.backward()
            loss += part.detach()
        sums = torch.stack((loss, torch.tensor(float(bool(asked)), device=device)))
        if world > 1:
            dist.all_reduce(gradients)
            dist.all_reduce(sums)
        loss, stops, norm = torch.cat((sums, gradients.norm()[None])).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}, in samples {state['samples']} to "
                f"{state['samples'] + batch - 1} of the order. Nothing was updated, the last checkpoint is "
                "good: lower --lr, or look at the data")
        if step == 1:                          # a parameter that learns nothing is a mistake in the model
            dead = [name for name, p in model.named_parameters() if not p.grad.any()]
            assert not dead, f"no gradient reaches {dead}"
        median = median_norm(state["norms"])
        spike = config.spike > 0 and norm > config.spike * median          # alike for all: so is the gradient
        skipped = spike and config.skip_spikes
        if config.grad_clip and norm > config.grad_clip:
            gradients.mul_(config.grad_clip / norm)
        if not skipped:
            for optimizer in optimizers:
                optimizer.step()
        stop = asker() if stops else ""
        state.update(step=step, samples=state["samples"] + batch, norms=[*state["norms"][-99:], norm],
                     tokens=state["tokens"] + config.batch_tokens)
        if spike:
            report.record("spike", grad_norm=norm, median=median, skipped=skipped)
            report.say(f"{where()} | spike: gradient norm {norm:.2f}, the median of the last is {median:.2f}"
                       f"{', update skipped' if skipped else ''}")

        timed += 1
        logs = step % config.log_every == 0 or step == config.steps
        if logs:
            seconds = (time.perf_counter() - started) / timed
            speed, memory = config.batch_tokens / seconds, peak_memory(device)
            mfu = speed * flops / (peak * world) if peak else None
            report.record("train", loss=loss, lr=lr, grad_norm=norm, tokens=state["tokens"], mfu=mfu,
                          tokens_per_second=speed, step_ms=1000 * seconds, peak_memory_bytes=memory)
            left = datetime.timedelta(seconds=round(seconds * (config.steps - step)))
            report.say(f"{where()} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed:,.0f} tok/s | "
                       f"mfu {f'{mfu:.1%}' if mfu else 'n/a'} | {memory / 1e9:.2f} GB | {left} left")
        if logs or step == begun + 1:          # the first step compiles: it says nothing of the speed
            timed, started = 0, time.perf_counter()
    if world > 1:
        report.watch.over.set()
        dist.barrier()                         # nobody leaves while another still listens
    report.status("stopped" if stop else "finished", stop)
    report.say(f"stopped at step {state['step']} by {stop}: the same command continues" if stop else
               f"finished: python sample.py --ckpt {config.out_dir}")

if __name__ == "__main__":
    command(lambda: main(resolve(parse(Config, sys.argv[1:], __doc__))))
