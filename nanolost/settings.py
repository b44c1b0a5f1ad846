"""Every setting of a training run: its flag, its default, its limits, and the recipe of each size."""
import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass

import torch

from lost import SWITCHES
from model import MODELS
from nanolost.errors import UserError
from nanolost.flags import flag
from nanolost.job import pick_device
from nanolost.methods import METHODS
from nanolost.optim import OPTIMIZERS

# Per size LOST's rank, and the steps and learning rates that CoLA published (arXiv 2502.10940): LOST's own
# are unknown, and 13b's are those of 7b. `tiny` is ours, for a CPU.
RECIPES = {
    "tiny": dict(rank=32,   steps=700,     lr=1.2e-2, optimizer="muon", batch_tokens=8192,
                 eval_tokens=200_000, eval_every=100, save_every=100),
    "60m":  dict(rank=128,  steps=10_000,  lr=6e-3),
    "130m": dict(rank=256,  steps=20_000,  lr=3e-3),
    "350m": dict(rank=256,  steps=60_000,  lr=3e-3),
    "1b":   dict(rank=512,  steps=100_000, lr=2e-3),
    # without recompute a micro-batch keeps 97 GB of activations at 7b and 152 GB at 13b
    "7b":   dict(rank=1024, steps=150_000, lr=1e-3, recompute=True),
    "13b":  dict(rank=1280, steps=150_000, lr=1e-3, recompute=True),
}

# shown beside defaults that it does not have
TINY = RECIPES["tiny"]

# Of a run that starts from --init_from: a tenth to a hundredth of the rates above, and batches as small as
# fine-tuning has; no decay, since zero is no better place than where the weights are
FROM_TRAINED = dict(lr=1e-4, batch_tokens=16_384, weight_decay=0.0, grad_clip=1.0)
# such a run warms up for a twentieth of its steps, one from scratch for a tenth
WARMUP = {True: 20, False: 10}
# how trained weights are decomposed: as close to their function as it can be
FAITHFUL = dict(init="svd", sparse_init="residual", activation="none")

# What "auto" means on each device. micro_tokens: the most tokens of a micro-batch without --micro_batch
DEVICES = {
    "cuda": dict(dtype="bfloat16", compile="true", micro_tokens=16_384),
    "mps": dict(dtype="float32", compile="false", micro_tokens=4_096),
    "cpu": dict(dtype="float32", compile="false", micro_tokens=4_096),
}

# --- flags: None is chosen later, by `resolve`, the data or the device ---
# fine-tuning has the last two classes too, under the same names

@dataclass
class FileFlags:
    data_dir: str = flag("data/c4", "folder with token shards (prepare_c4.py makes them)",
                         section="files", path=True)
    out_dir: str = flag("out", "folder for checkpoints, metrics.jsonl, config.json and status.json",
                        path=True)
    tokenizer: str | None = flag(None, "gpt2, byte or a file, for shards that came without a tokenizer.json",
                                 path=True)
    init_from: str | None = flag(None, "start from a Hugging Face folder or one of our checkpoints: its "
                                       "weights, sizes, layers and tokenizer, and a recipe of its own",
                                 path=True)

@dataclass
class ModelFlags:
    model: str = flag("60m", "size; brings its recipe, any value of which can be overridden",
                      list(MODELS), section="model")
    n_layer: int | None = flag(None, "blocks (by --model)")
    n_head: int | None = flag(None, "attention heads (by --model)")
    n_kv_head: int | None = flag(None, "heads of keys and values; fewer: grouped-query (as --n_head)")
    n_embd: int | None = flag(None, "width (by --model)")
    n_ffn: int | None = flag(None, "inner width of the MLP (by --model)")
    tie_embeddings: bool = flag(False, "share one weight between embedding and head")
    vocab_size: int | None = flag(None, "rows of embedding and head (the tokenizer's)")
    init_std: float = flag(0.02, "standard deviation of the blocks' first dense weights")

@dataclass
class MethodFlags:
    linear: str = flag("lost", "kind of linear layer; lowrank is plain low rank",
                       METHODS, section="linear layers")
    allocation: str | dict | None = flag(None, "compress.py's allocation.json: kind, rank and channels of "
                                               "each layer, in place of --rank and --sparsity; γ also "
                                               "scales a layer without channels", path=True)
    rank: int | dict | None = flag(None, "r, one for all layers or by module: q_proj=64,default=128 "
                                         "(by --model)")
    sparsity: float | dict | None = flag(0.01, "ρ, share of input channels kept in the sparse path; one for "
                                               "all layers or by module: down_proj=0.02,default=0.01")
    gamma: float = flag(0.7, "γ, weight of the low-rank path; the sparse path has 1 - γ")
    learn_gamma: bool = flag(False, "train γ, one for each layer, in [0, 1]")
    init: str = flag("svd", "first factors: from the weight's SVD, or random as CoLA's", SWITCHES["init"])
    select: str = flag("residual", "how channels are chosen: by the columns' L2 norm in the residual "
                                     "W - B A or in the weight W, by their L1 norm in the residual, or at "
                                     "random", SWITCHES["select"])
    sparse_init: str = flag("weight", "whose columns the sparse path starts from: W's or the residual's",
                            SWITCHES["sparse_init"])
    activation: str = flag("silu", "function between the factors", SWITCHES["activation"])
    dense_start: float = flag(0.0, "share of --steps for which the weights train dense, before they are "
                                   "decomposed as trained ones")

@dataclass
class TrainingFlags:
    seq_len: int = flag(256, "tokens of a training window", section="training")
    batch_tokens: int = flag(131_072, "tokens of an update, over all processes and micro-batches; "
                                      f"tiny: {TINY['batch_tokens']:_}")
    micro_batch: int | None = flag(None, "windows of a forward pass (by device; lower it if memory runs out)")
    steps: int | None = flag(None, "updates (by --model)")
    lr: float | None = flag(None, "peak learning rate of the blocks' matrices (by --model)")
    aux_lr: float | None = flag(None, "peak learning rate of embedding, head, vectors and γ (as --lr)")
    warmup: int | None = flag(None, "updates of linear warm-up (a tenth of --steps)")
    min_lr_ratio: float = flag(0.1, "end of the cosine, as a share of the peak")
    optimizer: str = flag("adamw", "adamw, or muon for the blocks' matrices and AdamW elsewhere; tiny: "
                          f"{TINY['optimizer']}",
                          OPTIMIZERS)
    weight_decay: float = flag(0.01, "decoupled weight decay, on matrices and embeddings")
    betas: tuple[float, float] = flag((0.9, 0.95), "AdamW's β₁, β₂")
    momentum: float = flag(0.95, "Muon's momentum")
    grad_clip: float = flag(0.5, "largest norm of the whole gradient; 0 for no clipping")
    spike: float = flag(5.0, "log a gradient norm above this many times the median of the last 100; 0: never")
    skip_spikes: bool = flag(False, "leave out the update of a step that --spike would log, from step 21 on")
    freeze: list[str] | None = flag(None, "patterns of names of parameters that stay as they are: "
                                          "model.embed_tokens.* '*norm*'")
    seed: int = flag(0, "seed of the first weights and of the order of samples")

@dataclass
class RunFlags:
    device: str = flag("auto", "cuda, mps or cpu; auto is the best there is",
                       ["auto", *DEVICES], section="running")
    dtype: str = flag("auto", "autocast; auto is bfloat16 on CUDA, else float32",
                      ["auto", "float32", "bfloat16"])
    compile: str = flag("auto", "torch.compile; auto is true on CUDA", ["auto", "true", "false"])
    threads: int | None = flag(None, "CPU threads of a process (as many as cores are free at the "
                                     "start; a resume keeps the number)")
    recompute: bool = flag(False, "save memory: compute wide activations again in backward (7b, 13b: true)")
    eval_every: int = flag(1000, "updates between evaluations; one more at the end; "
                                 f"tiny: {TINY['eval_every']}")
    eval_tokens: int = flag(10_000_000, "validation tokens of an evaluation, always the same ones; "
                                         f"tiny: {TINY['eval_tokens']:_}")
    paper_batch: int | None = flag(None, "print beside perplexity the one that the evaluator of GaLore and "
                                         "CoLA would, with batches of N rows (they: 256): it divides by "
                                         "one batch too many")
    save_every: int = flag(1000, "updates between checkpoints; one more at the end; "
                                 f"tiny: {TINY['save_every']}")
    keep: int = flag(3, "newest checkpoints that are kept")
    log_every: int = flag(10, "updates between lines of the log")
    resume: str = flag("auto", "auto: from the newest good checkpoint; never; or a checkpoint's PATH",
                       path=True)
    overwrite: bool = flag(False, "with --resume never or PATH: delete the run that is in out_dir")
    deterministic: bool = flag(False, "refuse operations whose result varies from run to run")
    timeout: int = flag(600, "seconds until a job ends when a process hangs; ten times that in a save")
    dry_run: bool = flag(False, "print parameters, memory and tokens, and exit")

@dataclass
class ShardFlags:
    shard: int = flag(1, "processes that hold one copy of weights, gradients and moments together, split by "
                         "rows: 1, or a number that divides them", section="many GPUs")
    world_size: int | None = flag(None, "with --dry_run: what fits so many processes (by the launcher)")
    gpu_memory: float | None = flag(None, "with --dry_run: GB of a GPU; also says the smallest --shard and "
                                          "--micro_batch that fit it")

@dataclass
class Config(ShardFlags, RunFlags, TrainingFlags, MethodFlags, ModelFlags, FileFlags):
    """Every setting of a run, in the order of its base classes from the last."""

    def settle_schedule(self, saved: dict):
        """Choose what is chosen once for a run: a resume keeps the warm-up that `saved`, the settings of its
        checkpoint, began with, so that a longer --steps does not put the rate back onto the ramp."""
        if self.warmup is None:
            trained = self.init_from is not None
            self.warmup = saved_value(saved, "warmup", self.steps // WARMUP[trained])
        check_warmup(self)

# Architecture and data of a run: a resume must agree in these. Any other value that changed is printed.
# Another seed is another order of the data: some would come twice and some never
FIXED = {"seq_len", "seed", "optimizer", "freeze", "init_from", "data", "tokenizer_sha256"}
FIXED |= {f.name for f in dataclasses.fields(MethodFlags)}
FIXED |= {f.name for f in dataclasses.fields(ModelFlags)}
# a name for sizes that are compared one by one
FIXED -= {"model"}

# --- limits ---

POSITIVE = (
    "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn",
    "seq_len", "batch_tokens", "micro_batch", "steps",
    "eval_every", "eval_tokens", "paper_batch", "save_every", "keep", "log_every",
)
FINITE = ("lr", "aux_lr", "init_std", "gpu_memory")

# OpenMP does not refuse what the system cannot start: it crashes
MOST_THREADS = max(1024, 4 * (os.cpu_count() or 1))
# seconds: three years. C++ counts ten times as many in nanoseconds, of 64 bits
LONGEST = 10**8

# ten times the largest machines
MOST_PROCESSES = 10**6

# name → (what its value must do, the test of it)
LIMITS = {
    **dict.fromkeys(POSITIVE, ("be positive", lambda n: n >= 1)),
    **dict.fromkeys(FINITE, ("be positive and finite", lambda x: 0 < x < math.inf)),
    "threads": (f"lie between 1 and {MOST_THREADS}", lambda n: 1 <= n <= MOST_THREADS),
    "shard": (f"lie between 1 and {MOST_PROCESSES}", lambda n: 1 <= n <= MOST_PROCESSES),
    "world_size": (f"lie between 1 and {MOST_PROCESSES}", lambda n: 1 <= n <= MOST_PROCESSES),
    "timeout": (f"be positive and at most {LONGEST}", lambda n: 1 <= n <= LONGEST),
    "weight_decay": ("be finite and not negative", lambda x: 0 <= x < math.inf),
    "grad_clip": ("not be negative", lambda x: x >= 0),
    "warmup": ("not be negative", lambda n: n >= 0),
    "min_lr_ratio": ("lie in [0, 1]", lambda x: 0 <= x <= 1),
    "dense_start": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "momentum": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "betas": ("lie in [0, 1)", lambda pair: all(0 <= x < 1 for x in pair)),
    "spike": ("be above 1, or 0 for none", lambda x: x == 0 or x > 1),
}

def check_limits(config, limits: dict = LIMITS):
    """UserError for the first value of a dataclass of flags that is out of its range."""
    for name, (must, fits) in limits.items():
        value = getattr(config, name, None)
        if value is not None and not fits(value):
            raise UserError(f"--{name} {value}: must {must}")

def has_type(value, hint) -> bool:
    """Whether a value of JSON, other than null, is one for an annotation of a flag."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    # True is an int in Python, and 1 is a float in JSON
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return any(isinstance(value, typing.get_origin(kind) or kind) for kind in kinds if kind is not type(None))

def saved_value(saved: dict, name: str, default=None, cls=None, limits=LIMITS):
    """A setting that goes on as a checkpoint holds it, in `saved`; `default` where it is not there. UserError
    for one that nobody could have typed: the file was edited, or is another program's. cls: the dataclass of
    the flags (Config)."""
    if name not in saved:
        return default
    value = saved[name]
    cls = cls or Config
    choices = cls.__dataclass_fields__[name].metadata["choices"]
    must, fits = limits.get(name, ("be one of the flag's values", lambda value: True))
    good = has_type(value, typing.get_type_hints(cls)[name])
    if not good or (choices and value not in choices) or not fits(value):
        raise UserError(f"{name} is {value!r:.40} in the checkpoint's state.json, and must {must}: restore "
                        "the checkpoint, or use another one")
    return value

def check_gamma(gamma: float, sparse: bool):
    """UserError for a γ that leaves out a path; sparse: whether any layer has channels."""
    if gamma == 0 or (gamma == 1 and sparse):
        raise UserError(f"--gamma {gamma}: one of the two paths would never learn; use one "
                        "between 0 and 1, or 1 with --sparsity 0 or an --allocation without channels")

def check_method(config: Config, given: dict):
    """UserError for switches that mean nothing, or that leave a path which never learns."""
    method = METHODS[config.linear]
    for field in dataclasses.fields(MethodFlags):
        if field.name in given and field.name not in (*method.uses, "linear"):
            raise UserError(f"--{field.name} means nothing with --linear {config.linear}: drop one of them")
    if config.dense_start and config.freeze:
        raise UserError("--freeze means nothing with --dense_start, whose parameters change their names: "
                        "drop one of them")
    # a file says both for each layer
    if config.allocation is not None:
        for name in ("rank", "sparsity"):
            if name in given:
                raise UserError(f"--{name} stands in the file of --allocation: drop one of them")
    # whether that has channels is known once it is read
    elif "gamma" in method.uses:
        sparse = config.sparsity
        check_gamma(config.gamma, any(sparse.values()) if isinstance(sparse, dict) else bool(sparse))

# --- from what was typed to what is meant ---

def resolve_trained(given: dict) -> Config:
    """`resolve` beside --init_from. Sizes, and what was not typed of the layers, stay None until the folder
    is read (source.py)."""
    # one that is typed beside it would be a second answer
    for name in ("tokenizer", *(f.name for f in dataclasses.fields(ModelFlags))):
        if name in given:
            raise UserError(f"--{name} stands in the folder of --init_from: drop one of them")
    if given.get("dense_start"):
        raise UserError("--dense_start means nothing beside --init_from: the weights are trained already")
    if "steps" not in given:
        raise UserError("--init_from needs --steps: how long it pays depends on your text")
    values = dict.fromkeys(("model", "linear", "seq_len"))
    values |= FROM_TRAINED
    if "linear" in given:
        method = METHODS[given["linear"]]
        values |= method.switches
        values |= {name: value for name, value in FAITHFUL.items() if name in method.uses}
    config = Config(**{**values, **given})
    check_limits(config)
    if config.linear is not None:
        check_method(config, given)
    for field in dataclasses.fields(MethodFlags):
        if config.linear is None and field.name in given:
            raise UserError(f"--{field.name} means nothing without --linear: the layers of a folder stay "
                            "what they are")
    check_warmup(config)
    check_shard(config)
    return config

def resolve(given: dict) -> Config:
    """A whole Config from the values given, the recipe of the size and the switches of the kind of layer."""
    if given.get("init_from") is not None:
        return resolve_trained(given)
    # for the two names that bring the rest
    base = Config(**given)
    values = dict(MODELS[base.model])
    values |= RECIPES[base.model]
    values |= METHODS[base.linear].switches
    # what was typed wins
    values |= given
    config = Config(**values)
    check_limits(config)
    check_method(config, given)
    if config.n_kv_head is None:
        config.n_kv_head = config.n_head
    check_warmup(config)
    check_shard(config)
    return config

def check_shard(config: Config):
    """UserError for what only a dry run can say."""
    instead = {"world_size": "start so many processes by torchrun", "gpu_memory": "leave it out"}
    for name, repair in instead.items():
        if getattr(config, name) is not None and not config.dry_run:
            raise UserError(f"--{name} means nothing without --dry_run: {repair}")
    if config.shard > 1 and config.dense_start:
        raise UserError("--dense_start needs whole matrices, and --shard splits them: drop one of them")

def check_warmup(config: Config):
    if config.warmup is not None and config.warmup > config.steps:
        raise UserError(f"--warmup {config.warmup}: must lie between 0 and --steps {config.steps}")

def settle_device(config: Config) -> Config:
    """A copy in which no value is "auto" any more."""
    kind = config.device
    # what fits a cluster is asked where no GPU is
    elsewhere = any(getattr(config, name, None) is not None for name in ("world_size", "gpu_memory"))
    kind = "cuda" if elsewhere and kind == "auto" else pick_device(kind)
    auto = DEVICES[kind]
    config = dataclasses.replace(config, device=kind)
    if config.dtype == "auto":
        config.dtype = auto["dtype"]
    if config.compile == "auto":
        config.compile = auto["compile"]
    return config

def autocast(config) -> torch.autocast:
    """The one autocast context of a run, for training and evaluation alike."""
    dtype = getattr(torch, config.dtype)
    return torch.autocast(config.device, dtype, enabled=dtype != torch.float32)

# --- batches ---

def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

def split_batch(config, world: int) -> tuple[int, int]:
    """(samples of a micro-batch, micro-batches of a process for an update); UserError names valid values."""
    samples, rest = divmod(config.batch_tokens, config.seq_len)
    if rest:
        # the two multiples around it, unless one is 0
        near = [n * config.seq_len for n in (samples, samples + 1) if n]
        raise UserError(f"--batch_tokens {config.batch_tokens} is no multiple of --seq_len: use {near}")
    # every process has the same share of an update
    share, rest = divmod(samples, world)
    if rest:
        raise UserError(f"{samples} samples an update do not divide among {world} processes: start one of "
                        f"{divisors(samples)}, or use --batch_tokens {(share + 1) * world * config.seq_len}")
    micro = config.micro_batch
    if micro is None:
        # the largest that suits the device
        most = DEVICES[config.device]["micro_tokens"] // config.seq_len
        micro = max((d for d in divisors(share) if d <= most), default=1)
    if share % micro:
        raise UserError(f"--micro_batch {micro} does not divide a process's {share} samples: use one of "
                        f"{divisors(share)}")
    return micro, share // micro
