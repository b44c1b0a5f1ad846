"""Every setting of a fine-tuning: its flag, its default, its limits, and what each method trains."""
import dataclasses
import math
import os
from dataclasses import dataclass

from lost import SWITCHES
from nanolost import pruning, settings
from nanolost.errors import UserError
from nanolost.flags import flag
from nanolost.optim import OPTIMIZERS
from nanolost.settings import FROM_TRAINED, RunFlags, TrainingFlags, check_limits, saved_value

# --- methods ---

@dataclass(frozen=True)
class Method:
    """update: what is trained beside frozen weights, "plain", "masked" or "channels"; None: the weights
    themselves. masks: whether zeros are chosen, and stay. staged: whether they grow over several stages.
    blockwise: whether each half of a block is trained by itself. lr: the peak rate."""

    lr: float
    update: str | None = None
    masks: bool = False
    staged: bool = False
    blockwise: bool = False

METHODS = {
    "full": Method(lr=5e-5),
    "lora": Method(lr=1e-3, update="plain"),
    "lost": Method(lr=1e-3, update="channels"),
    # best of those tried at 50 and 60 % zeros: docs/finetuning.md
    "masked-lora": Method(lr=3e-3, update="masked", masks=True),
    "masked-full": Method(lr=5e-5, masks=True),
    "refit": Method(lr=1e-4, masks=True, blockwise=True),
    "losa": Method(lr=1e-3, update="masked", masks=True, staged=True),
}
# the best recipes known, by whether there are zeros: docs/finetuning.md has the table that says so
BEST = {True: "masked-lora", False: "lora"}

# of --masks: those of compress.py --form sparse that leave plain weights and look at the text
MASKS = ("fisher", "walk", "wanda", "sparsegpt")

# --- flags ---

# lines of an update, and how often they are read, where nothing is typed: few hundred lines are the rule
LINES = 16
PASSES = 3
MOST_STEPS = 1000

@dataclass
class TuneFlags:
    ckpt: str = flag("", "a Hugging Face LLaMA, or an out_dir or checkpoint folder of ours; dense, with "
                         "zeros, or of LOST layers", section="what", path=True)
    data: str = flag("", "JSON lines with prompt and completion, or with text; or a folder of token shards",
                     path=True)
    out_dir: str = flag("tuned", "folder for checkpoints, metrics.jsonl, config.json and status.json",
                        path=True)
    method: str | None = flag(None, "what is trained (with zeros the best recipe known, "
                                    f"{BEST[True]}; else {BEST[False]})", list(METHODS))
    eval_dir: str | None = flag(None, "shards whose validation split is evaluated (--data, if it is shards)",
                                path=True)
    eval: str | None = flag(None, "JSON lines with prompt, choices and answer: accuracy by likelihood",
                            path=True)
    zeros: float | None = flag(None, "share of zeros in the blocks' matrices of the result (those that the "
                                     "folder has, or the pattern's)", section="zeros")
    masks: str = flag("fisher", "how zeros are chosen; all but wanda bring new values with them", MASKS)
    pattern: str = flag("unstructured", "N values stay of every M of a row; mixed: each matrix has its own N",
                        list(pruning.PATTERNS))
    stages: int = flag(5, "losa: times that zeros are chosen, each followed by training")
    rates: str = flag("cka", "losa: share of zeros of a block, by how unlike its input is to the others', or "
                             "the same for all", ["cka", "uniform"])
    ranks: str = flag("error", "losa: rank of a block's updates, by the error of its output, or the same for "
                               "all", ["error", "uniform"])
    dense: str | None = flag(None, "refit, losa: the model whose outputs are aimed at (what the zeros were "
                                   "put into, by the folder's report.json; else --ckpt)", path=True)
    calibration_dir: str | None = flag(None, "shards whose training split is looked at to choose zeros "
                                             "(--data)", path=True)
    calibration_tokens: int = flag(65_536, "text for the covariance of inputs")
    gradient_tokens: int | None = flag(None, "text for that of output gradients (as many)")
    statistics: str | None = flag(None, "keep the statistics in this folder, and use those that are there",
                                  path=True)
    rank: int = flag(8, "r of an update", section="updates")
    alpha: float = flag(16.0, "an update is scaled by alpha / rank")
    sparsity: float = flag(0.01, "lost: share of input channels that are trained directly")
    activation: str = flag("none", "lost: function between an update's factors; with silu it never merges",
                           SWITCHES["activation"])

@dataclass
class Config(RunFlags, TrainingFlags, TuneFlags):
    """Every setting of a fine-tuning; the trainer's own under the trainer's names."""

    seq_len: int | None = flag(None, "tokens of a window, or at most of a line (1024, or the model's limit "
                                     "where that is less)", section="training")
    batch_tokens: int | None = flag(None, "tokens of an update, over all processes and micro-batches (about "
                                          f"{FROM_TRAINED['batch_tokens']:_}; of lines {LINES})")
    steps: int | None = flag(None, "updates; refit: of each half of a block (one pass over shards, "
                                   f"{PASSES} over lines, at most {MOST_STEPS})")
    lr: float | None = flag(None, "peak learning rate (by --method)")
    aux_lr: float | None = flag(None, "peak learning rate of embedding, head and vectors (as --lr)")
    warmup: int | None = flag(None, "updates of linear warm-up, of a stage (a tenth)")
    optimizer: str = flag("adamw", "adamw, or muon for matrices that are trained without a mask", OPTIMIZERS)
    weight_decay: float = flag(0.0, "decoupled weight decay, on what is trained")
    grad_clip: float = flag(1.0, "largest norm of the whole gradient; 0 for no clipping")
    eval_every: int = flag(100, "updates between evaluations; one more at the start and at the end")
    eval_tokens: int = flag(100_000, "validation tokens of an evaluation, always the same ones")
    save_every: int = flag(100, "updates between checkpoints; one more at the end")

    # what messages of the trainer name
    @property
    def data_dir(self) -> str:
        return self.data

    @property
    def tokenizer(self) -> str:
        return self.ckpt

    def settle_schedule(self, saved: dict):
        """Nothing is chosen for the whole run: a stage has a warm-up of its own, `ramp`."""

    def ramp(self, steps: int) -> int:
        """Updates of warm-up in a stage of so many."""
        if self.warmup is not None:
            return min(self.warmup, steps)
        return steps // 10

# a resume must agree in these; any other value that changed is printed
FIXED = {"seq_len", "seed", "optimizer", "freeze", "tokenizer_sha256"}
FIXED |= {f.name for f in dataclasses.fields(TuneFlags)}
# where these lie is told by what is in them
FIXED -= {"out_dir", "eval_dir", "eval", "statistics"}

LIMITS = {
    **settings.LIMITS,
    "zeros": ("be a share between 0 and 1, such as 0.5", lambda x: 0 < x < 1),
    "stages": ("be positive", lambda n: n >= 1),
    "rank": ("be positive", lambda n: n >= 1),
    "alpha": ("be positive and finite", lambda x: 0 < x < math.inf),
    "sparsity": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "calibration_tokens": ("be positive", lambda n: n >= 1),
    "gradient_tokens": ("be positive", lambda n: n >= 1),
}
# of --pattern mixed:8
MOST_MIXED = 7 / 8
# flags that mean something with some methods alone
ONLY = {
    "stages": lambda method: method.staged,
    "rates": lambda method: method.staged,
    "ranks": lambda method: method.staged,
    "dense": lambda method: method.staged or method.blockwise,
    "rank": lambda method: method.update is not None,
    "alpha": lambda method: method.update is not None,
    "sparsity": lambda method: method.update == "channels",
    "activation": lambda method: method.update == "channels",
    **dict.fromkeys(("zeros", "masks", "pattern", "calibration_dir", "calibration_tokens",
                     "gradient_tokens", "statistics"), lambda method: method.masks),
}

def resolve(given: dict) -> Config:
    """A Config from what was typed; what depends on the model and the text is chosen by `settle`."""
    for name in ("ckpt", "data"):
        if not given.get(name):
            raise UserError(f"give --{name}: python finetune.py --ckpt FOLDER --data FILE.jsonl|DIR")
    config = Config(**given)
    check_limits(config, LIMITS)
    if config.gradient_tokens is None:
        config.gradient_tokens = config.calibration_tokens
    if config.gradient_tokens > config.calibration_tokens:
        raise UserError(f"--gradient_tokens {config.gradient_tokens}: gradients are taken of windows of the "
                        f"{config.calibration_tokens} --calibration_tokens: use as many or less")
    known = pruning.pattern_of(config.pattern)
    if known and config.zeros not in (None, 1 - known[0] / known[1]):
        raise UserError(f"--zeros {config.zeros}: --pattern {config.pattern} has {1 - known[0] / known[1]}; "
                        "leave --zeros out")
    if config.pattern == "mixed:8" and config.zeros is not None and config.zeros > MOST_MIXED:
        raise UserError(f"--zeros {config.zeros}: --pattern mixed:8 keeps one value of eight at the least; "
                        f"use {MOST_MIXED} or less")
    if config.pattern == "mixed:8" and config.masks not in ("fisher", "walk") and config.method != "losa":
        raise UserError("--pattern mixed:8: use --masks fisher or walk, which know what each matrix needs")
    if config.method is not None:
        check_method(config, given)
    return config

def check_method(config: Config, given: dict):
    """UserError for flags that mean nothing with the method, or would break what it promises."""
    method = METHODS[config.method]
    for name, means in ONLY.items():
        if name in given and not means(method):
            raise UserError(f"--{name} means nothing with --method {config.method}: drop one of them")
    if config.optimizer == "muon" and method.masks and method.update is None:
        raise UserError(f"--optimizer muon would fill the zeros of --method {config.method}: use adamw")

# --- what depends on the model ---

# chosen once for a run, where nothing is typed
CHOSEN = ("method", "zeros", "seq_len", "batch_tokens", "steps", "lr")

def remember(config: Config, saved: dict):
    """Fill in what an earlier start of this run chose; `saved` is the config of its checkpoint."""
    for name in CHOSEN:
        # what never was chosen, such as zeros of a method without, stays open
        if getattr(config, name) is None and saved.get(name) is not None:
            setattr(config, name, saved_value(saved, name, None, Config, LIMITS))

def typed(config: Config) -> dict:
    """The flags of a fine-tuning that are not at their defaults."""
    found = {}
    for field in dataclasses.fields(TuneFlags):
        value = getattr(config, field.name)
        if value != field.default:
            found[field.name] = value
    # `resolve` has filled it in
    if config.gradient_tokens == config.calibration_tokens:
        del found["gradient_tokens"]
    return found

def check_no_new_update(config: Config):
    """UserError for flags of an update that a model of LOST layers does not get."""
    for name in typed(config).keys() & {"rank", "alpha", "sparsity", "activation"}:
        raise UserError(f"--{name} means nothing here: all layers of {config.ckpt} are low-rank, and "
                        "--method lost trains their own factors and channels")

# what a share may be off by where it was asked for
NEAR = 1e-3

def settle_zeros(config: Config, there: float, factored: bool = False):
    """Fill in the method and the share of zeros of the result, for a model with a share `there` of them.
    factored: whether its layers have no single matrix. UserError for fewer zeros than it has."""
    if there < pruning.BY_CHANCE:
        there = 0.0
    known = pruning.pattern_of(config.pattern)
    if known:
        config.zeros = 1 - known[0] / known[1]
    if config.method is None:
        # a mixed pattern says that there are to be zeros, not how many
        wanted = config.zeros or there or config.pattern != "unstructured"
        config.method = BEST[bool(wanted)]
        if factored and not wanted:
            # such layers are their own update
            config.method = "lost"
        check_method(config, typed(config))
    if not METHODS[config.method].masks:
        return
    if config.zeros is None:
        config.zeros = there
    if not config.zeros:
        raise UserError(f"--method {config.method} needs zeros, and {config.ckpt} has none: give --zeros, "
                        "the share of the matrices that is to be zero, such as 0.5")
    if config.zeros < there - NEAR:
        raise UserError(f"--zeros {config.zeros}: {config.ckpt} has {there:.4f} already; give as many or "
                        "more, or leave it out")

def settle_batch(config: Config, text, world: int):
    """Fill in what depends on the training text, whose samples have config.seq_len tokens."""
    samples = FROM_TRAINED["batch_tokens"] // config.seq_len
    passes = 1
    if text.row:
        samples, passes = LINES, PASSES
    if config.batch_tokens is None:
        # every process has the same share
        samples = max(1, samples // world) * world
        config.batch_tokens = samples * config.seq_len
    if config.steps is None:
        tokens = passes * len(text) * config.seq_len
        config.steps = min(math.ceil(tokens / config.batch_tokens), MOST_STEPS)
    if config.lr is None:
        config.lr = METHODS[config.method].lr
    if METHODS[config.method].staged and config.steps < config.stages:
        raise UserError(f"--steps {config.steps}: --stages {config.stages} need a step each; use more steps "
                        "or fewer stages")

def settle_paths(config: Config):
    """One name for each folder, whatever folder the command is typed in. UserError for those not there."""
    for name in ("ckpt", "data", "dense", "calibration_dir", "eval_dir", "eval"):
        value = getattr(config, name)
        if value is None:
            continue
        if name != "ckpt" and not os.path.exists(value):
            raise UserError(f"--{name} {value}: there is no such file or folder")
        setattr(config, name, os.path.abspath(value))
    if os.path.realpath(config.out_dir) == os.path.realpath(config.ckpt):
        raise UserError(f"--out_dir {config.out_dir} is the folder of --ckpt: name another one")
