"""Make a trained LLaMA smaller: low rank, or zeros, under one budget for the whole model.

    python compress.py --ckpt FOLDER --data_dir DIR --budget 0.8 --out_dir OUT            # low rank
    python compress.py --ckpt FOLDER --data_dir DIR --budget 0.5 --form sparse --out_dir OUT
    python compress.py --ckpt FOLDER --data_dir DIR --budget 0.5 --dry_run true           # what it takes

The budget is the share of the values of the blocks' matrices that are kept; embedding, head and norms stay as
they are. OUT is a checkpoint folder: it samples, trains on (train.py --init_from OUT), evaluates and exports
as any other. It is whole or absent."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, fields

import torch

from model import Llama
from nanolost import lowrank, pruning
from nanolost.budget import peak_memory, size
from nanolost.calibration import (
    WINDOW,
    calibration_windows,
    key_of,
    micro_batch,
    statistics_of,
    temporary_folder,
)
from nanolost.checkpoint import (
    SAVE_DTYPES,
    check_free,
    check_range,
    checkpoint_folder,
    load_with_tokenizer,
    saved_dtype,
    write_json,
    write_model,
    write_whole,
)
from nanolost.compression import Task
from nanolost.covariance import (
    GROUP_OF,
    Batch,
    Statistics,
    covariance_bytes,
    linears,
    place_of,
    spool_bytes,
)
from nanolost.data import TokenDataset
from nanolost.errors import UserError
from nanolost.estimate import duration, rates, seconds_of
from nanolost.factored_layers import ALWAYS_FACTORED, FACTORED, to_factors
from nanolost.failures import failures_with_their_repair
from nanolost.files import ended_by_signals
from nanolost.flags import command, flag, parse, say
from nanolost.huggingface import travelling_files
from nanolost.job import Job, pick_device, place
from nanolost.loop import Validation, evaluate, require_finite
from nanolost.low_rank_layers import to_low_rank
from nanolost.methods import merge_layers
from nanolost.settings import DEVICES, autocast
from nanolost.sparse_layers import to_sparse
from nanolost.splitting import split_bytes
from nanolost.threads import use_threads
from nanolost.tokenizer import Tokenizer

FORMS = {"lost": lowrank.METHODS, "sparse": pruning.METHODS}
# tokens of statistics, where none are asked for
TOKENS = {"lost": 16_384, "sparse": 65_536}
# and of the closed loop: at half of the values twice as many are worth 0.014 nats to low rank
LOOP_TOKENS = {"lost": 32_768, "sparse": 16_384}
# of linear layers
KINDS = {name.rpartition(".")[2] for name in GROUP_OF}
# the methods that need no statistics
BLIND = ("plain", "lost", "magnitude", "cap")

@dataclass
class Config:
    ckpt: str = flag("out", "a Hugging Face LLaMA, or an out_dir or checkpoint folder of ours",
                     section="what", path=True)
    data_dir: str = flag("data/c4", "token shards of the model's own tokenizer: statistics from their "
                                    "train split, loss before and after from their val split", path=True)
    budget: float | None = flag(None, "share of the values of the blocks' matrices to keep")
    out_dir: str = flag("compressed", "folder to make; it must not exist, or be empty", path=True)
    form: str = flag("lost", "low-rank layers, or dense ones with zeros", list(FORMS), section="how")
    method: str = flag("fisher", f"for lost {', '.join(FORMS['lost'])}; for sparse "
                                 f"{', '.join(FORMS['sparse'])}",
                       sorted({*FORMS["lost"], *FORMS["sparse"]}))
    uniform: bool | None = flag(None, "the same share of every matrix (false for fisher and walk, and else "
                                      "true, as these methods were published)")
    pinned: bool = flag(False, "lost: r input channels enter a layer of rank r as they are: r² values less")
    channels: tuple[float, ...] | None = flag(None, "lost: shares of input channels to offer each layer "
                                                    "beside its ranks, such as 0.014,0.06")
    one_sided: str | None = flag(None, "lost: kinds of layers, such as q_proj,k_proj, that fisher cuts by "
                                       "their inputs alone, at the ranks it chose")
    closed_loop: bool | None = flag(None, "each block is fitted to what the compressed ones before it give "
                                          "(true for fisher's low rank)")
    pattern: str = flag("unstructured", "sparse: N values stay of every M of a row; mixed: each matrix has "
                                        "its own N", list(pruning.PATTERNS))
    factors: bool | None = flag(None, "sparse: a low-rank part beside the zeros (true for oats and cap; with "
                                      "fisher directions and entries compete)")
    calibration_tokens: int | None = flag(None, "text for the covariance of inputs (lost "
                                                f"{TOKENS['lost']}, sparse {TOKENS['sparse']})",
                                          section="text")
    gradient_tokens: int | None = flag(None, "text for that of output gradients (as many)")
    loop_tokens: int | None = flag(None, "further text, for the closed loop and for cap's losses (lost "
                                         f"{LOOP_TOKENS['lost']}, sparse {LOOP_TOKENS['sparse']})")
    eval_tokens: int = flag(16_384, "validation text for the loss before and after")
    seq_len: int | None = flag(None, f"tokens of a window, of all of these ({WINDOW}, or the model's limit "
                                     "where that is less)")
    statistics: str | None = flag(None, "keep the statistics in this folder, and use those that are there",
                                  path=True)
    seed: int = flag(0, "which windows, and which labels the model draws")
    device: str = flag("auto", "cuda, mps or cpu; auto is the best there is", ["auto", *DEVICES],
                       section="running")
    dtype: str = flag("auto", "autocast; statistics and factors are float32 and float64 whatever it is",
                      ["auto", "float32", "bfloat16"])
    threads: int | None = flag(None, "CPU threads (as many as cores are free at the start)")
    save_dtype: str = flag("auto", "of the weights; auto is what the folder has them in", SAVE_DTYPES)
    dry_run: bool = flag(False, "print memory, disk and time, and exit")

# --- what is asked ---

def refuse_elsewhere(config: Config, form: str, names: tuple[str, ...]):
    """UserError for flags of `form` that were typed for the other one."""
    # a flag that says what is so anyhow is no mistake
    defaults = {f.name: f.default for f in fields(Config)}
    for name in names:
        if config.form != form and getattr(config, name) != defaults[name]:
            raise UserError(f"--{name} is of --form {form}, not of {config.form}: leave it out")

def check_place(config: Config):
    """UserError for statistics in a folder that is for something else."""
    statistics = os.path.realpath(config.statistics)
    ours = os.path.realpath(config.out_dir)
    if os.path.commonpath((ours, statistics)) == ours:
        raise UserError(f"--statistics {config.statistics} is in --out_dir, which has to be empty: use "
                        "another")
    if statistics == os.path.realpath(config.ckpt):
        raise UserError(f"--statistics {config.statistics} is the model's own folder: name another one")

def check(config: Config):
    """UserError for flags that cannot be, before anything is read."""
    if config.method not in FORMS[config.form]:
        raise UserError(f"--method {config.method} is not of --form {config.form}: choose one of "
                        f"{', '.join(FORMS[config.form])}")
    refuse_elsewhere(config, "lost", ("pinned", "channels", "one_sided"))
    refuse_elsewhere(config, "sparse", ("pattern", "factors"))
    for name in ("calibration_tokens", "gradient_tokens", "loop_tokens", "eval_tokens", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be positive")
    if config.seq_len is not None and config.seq_len < 2:
        raise UserError(f"--seq_len {config.seq_len}: a window needs 2 tokens")
    unknown = set((config.one_sided or "").split(",")) - {*KINDS, ""}
    if unknown:
        raise UserError(f"--one_sided {', '.join(sorted(unknown))}: choose from {', '.join(sorted(KINDS))}")
    if config.one_sided and config.method != "fisher":
        raise UserError(f"--one_sided: --method {config.method} looks at no outputs; leave it out")
    for share in config.channels or ():
        if not 0 < share < 1:
            raise UserError(f"--channels {share}: a share must lie between 0 and 1")
    if not -2**63 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must have at most 63 bits")
    if config.statistics:
        check_place(config)
    if place()[1] > 1:
        raise UserError("compress.py runs in one process: start it without torchrun")
    check_free(config.out_dir)

def settle(config: Config):
    """Fill in what depends on the form and the method. UserError for what does not go together."""
    # n:m is a budget too
    known = pruning.pattern_of(config.pattern)
    if config.budget is None and known:
        config.budget = known[0] / known[1]
    # who names a pair that cannot be is not asked for more first
    check_sparse(config)
    if config.budget is None:
        raise UserError("give --budget, the share of the values to keep, such as 0.8")
    # NaN fails both comparisons
    if not 0 < config.budget <= 1:
        raise UserError(f"--budget {config.budget}: must be above 0 and at most 1")
    # who names one of the two gets the other to fit
    tokens = TOKENS[config.form]
    if config.loop_tokens is None:
        config.loop_tokens = LOOP_TOKENS[config.form]
    if config.calibration_tokens is None:
        config.calibration_tokens = max(tokens, config.gradient_tokens or 0)
    if config.gradient_tokens is None:
        config.gradient_tokens = min(tokens, config.calibration_tokens)
    if config.gradient_tokens > config.calibration_tokens:
        raise UserError(f"--gradient_tokens {config.gradient_tokens}: gradients are taken of windows of the "
                        f"{config.calibration_tokens} --calibration_tokens: use as many or less")
    # the loop has its own covariance of inputs, which these two methods cut by
    if config.closed_loop is None:
        config.closed_loop = config.method == "fisher" and config.form == "lost"
    if config.closed_loop and config.method not in ("fisher", "svdllm"):
        raise UserError(f"--closed_loop true: --method {config.method} has no metric that a loop could "
                        "change; use fisher or svdllm")

def check_sparse(config: Config):
    """UserError for a share or a pattern that the method does not choose."""
    # the methods that know what each matrix needs
    alone = config.method in ("fisher", "walk")
    if config.form == "sparse" and config.uniform is False and not alone:
        raise UserError(f"--uniform false: --method {config.method} has no unit that matrices share; use "
                        "fisher or walk")
    check_factors(config)
    known = pruning.pattern_of(config.pattern)
    if config.pattern != "unstructured" and config.method in ALWAYS_FACTORED:
        raise UserError(f"--pattern {config.pattern}: --method {config.method} has none")
    if config.pattern != "unstructured" and config.uniform:
        raise UserError(f"--uniform true: --pattern {config.pattern} is the same share of every matrix")
    exact = known and config.budget != known[0] / known[1]
    if exact and not alone:
        raise UserError(f"--budget {config.budget}: --method {config.method} keeps what --pattern "
                        f"{config.pattern} does, {known[0] / known[1]}; fisher and walk leave matrices dense")
    if config.pattern == "mixed:8" and not alone:
        raise UserError("--pattern mixed:8: use --method fisher or walk, which know what each matrix needs")

def check_factors(config: Config):
    """UserError for a low-rank part that the method lacks, or cannot be without."""
    if config.factors is None:
        config.factors = config.method in ALWAYS_FACTORED
    if not config.factors and config.method in ALWAYS_FACTORED:
        raise UserError(f"--factors false: the two parts of {config.method} together are dense again")
    if not config.factors:
        return
    if config.method not in FACTORED:
        raise UserError(f"--factors true: --method {config.method} has no low-rank part; use "
                        f"{', '.join(FACTORED)}")
    for name in ("uniform", "closed_loop"):
        if config.method == "fisher" and getattr(config, name):
            raise UserError(f"--{name} true: --factors true lets all matrices share one budget, once; leave "
                            "one of the two out")
    if config.pattern == "mixed:8":
        raise UserError("--pattern mixed:8: --factors true takes a pattern that is the same for all, such as "
                        "2:4")

# --- the text ---

class Texts:
    """The windows of a run: of the statistics, of the closed loop, and of the evaluation."""

    def __init__(self, config: Config, model: Llama, tokenizer: Tokenizer, device):
        limit = model.config.max_seq_len
        if config.seq_len is None:
            config.seq_len = min(WINDOW, limit)
        if config.seq_len > limit:
            raise UserError(f"--seq_len {config.seq_len} is above the {limit} tokens that the model was made "
                            f"for: use {limit} or less")
        self.train = TokenDataset(config.data_dir, "train", config.seq_len)
        self.val = TokenDataset(config.data_dir, "val", config.seq_len)
        # a table may have more rows than the tokenizer has words
        rows = model.config.vocab_size
        for data in (self.train, self.val):
            data.check_tokenizer(tokenizer, config.data_dir, config.ckpt)
            data.check_ids(min(tokenizer.vocab_size, rows))
        samples = max(1, self.val.samples_for(config.eval_tokens))
        micro = micro_batch(self.val, device)
        self.validation = Validation.of(self.val, samples, micro, tokenizer, rows)

    def calibration(self, config: Config, device) -> list[Batch]:
        tokens, gradients = config.calibration_tokens, config.gradient_tokens
        return calibration_windows(self.train, config.seed, tokens, gradients, device)

    def loop(self, config: Config, device) -> list[Batch]:
        """Windows behind those of the statistics; of a short text the same ones."""
        first = min(max(1, config.calibration_tokens // self.train.seq_len), len(self.train))
        return calibration_windows(self.train, config.seed, config.loop_tokens, 0, device, first)

# --- what it costs ---

def dry_run(config: Config, model: Llama, texts: Texts, device):
    """Print memory, disk and time."""
    tokens = config.calibration_tokens
    # float32, whatever the folder has
    weights = 4 * sum(p.numel() for p in model.parameters())
    values = sum(linear.weight.numel() for linear in linears(model).values())
    block = covariance_bytes(model)
    lines = [
        f"matrices    {len(linears(model))} with {values:,} values, of which {config.budget * values:,.0f} "
        "are kept",
        f"statistics  {tokens:,} tokens of inputs, {config.gradient_tokens:,} of gradients, in windows of "
        f"{config.seq_len}; {len(texts.train):,} windows are there",
        f"memory      {size(weights + block)} = model {size(weights)} + a block's covariances {size(block)}; "
        "activations of a micro-batch come on top",
        f"disk        {size(disk_bytes(config, model))} in {tempfile.gettempdir()}",
    ]
    use_threads(config.threads)
    seconds = seconds_of(config, model, rates(device))
    if seconds:
        told = ", ".join(f"{part} {duration(value)}" for part, value in seconds.items())
        lines.append(f"time        about {told}, as fast as this machine multiplies now")
    say("\n".join(lines))

def disk_bytes(config: Config, model: Llama) -> int:
    """What is kept in files meanwhile."""
    need = spool_bytes(model, config.calibration_tokens)
    if config.method == "fisher" and config.form == "sparse":
        values = sum(linear.weight.numel() for linear in linears(model).values())
        need += split_bytes(model)
        # the best entries so far, while directions are tried
        need += 4 * values if config.factors else 0
    return need

# --- what is said ---

def cell(entry: dict, values: int) -> str:
    """What a layer became, in eight characters."""
    rank = entry["rank"]
    if entry["kind"] == "dense":
        return "dense"
    if entry["kind"] == "sparse":
        # of the entries; directions beside them come first
        stays = f"{entry['nonzeros'] / values:.0%}"
        return f"{rank}+{stays}" if rank else stays
    channels = entry["channels"]
    return f"{rank}+{channels}" if channels else str(rank)

def table(entries: dict[str, dict], sizes: dict[str, int]) -> list[str]:
    """What each layer became, a block a line."""
    # cells by block and kind, such as q or down
    rows = {}
    for name, entry in entries.items():
        block, inner = place_of(name)
        kind = inner.rpartition(".")[2].removesuffix("_proj")
        rows.setdefault(block, {})[kind] = cell(entry, sizes[name])
    # all blocks have the same
    kinds = next(iter(rows.values()))
    lines = ["rank (and channels), or the share of the entries that stay:", ""]
    lines.append("block " + "".join(f"{kind:>9}" for kind in kinds))
    for block, cells in rows.items():
        lines.append(f"{block:>5} " + "".join(f"{text:>9}" for text in cells.values()))
    return [*lines, ""]

def poor(statistics: Statistics | None, model: Llama) -> dict[str, str]:
    """The matrices whose covariance says less than it could: why, by their names."""
    found = {}
    if statistics is None:
        return found
    # from fewer tokens than it has rows a covariance has no full rank
    for name, linear in linears(model).items():
        dead = int((statistics.sizes(name) == 0).sum())
        if statistics.tokens[0] < linear.in_features:
            found[name] = f"{statistics.tokens[0]} tokens for {linear.in_features} inputs"
        elif statistics.tokens[1] < linear.out_features:
            found[name] = f"{statistics.tokens[1]} tokens for {linear.out_features} outputs"
        elif dead:
            found[name] = f"{dead} inputs that are always zero"
    return found

def measured(model: Llama, texts: Texts, config: Config, job: Job, name: str) -> dict[str, float]:
    found = evaluate(model, texts.validation, autocast(config), job)
    require_finite(found, name, config.dtype)
    return {"loss": found["val_loss"], "perplexity": found["val_ppl"], "tokens": found["val_tokens"]}

def summary(report: dict) -> str:
    before, after = report["before"], report["after"]
    gap = after["loss"] - before["loss"]
    return (f"{report['out_dir']}: {report['kept']:.2%} of {report['matrix_values']:,} values kept, loss "
            f"{before['loss']:.4f} → {after['loss']:.4f} ({gap:+.4f}), perplexity "
            f"{before['perplexity']:.2f} → {after['perplexity']:.2f} on {after['tokens']:,} tokens, "
            f"{report['seconds']:.0f} s, {size(report['peak_memory_bytes'])} of memory")

# --- the command ---

def replace_layers(task: Task) -> dict[str, dict]:
    """Replace the model's layers by those of the form; what each became, as in allocation.json."""
    if task.config.form == "lost":
        return to_low_rank(task)
    # a budget of 1 leaves every matrix dense
    if task.config.factors and task.config.budget < 1:
        return to_factors(task)
    return to_sparse(task)

def compress(config: Config, model: Llama, texts: Texts, key: dict, job: Job) -> tuple[dict, dict]:
    """Replace the model's layers. Returns entries of allocation.json and what the report has of them."""
    device = job.device
    seconds = {}
    with temporary_folder(disk_bytes(config, model)) as spool:
        started = time.perf_counter()
        statistics = None
        if config.method not in BLIND:
            windows = texts.calibration(config, device)
            context = autocast(config)
            statistics = statistics_of(model, windows, config.statistics, key, spool, context)
        seconds["statistics"] = time.perf_counter() - started
        # further text, for those that look at the compressed model
        reads = config.closed_loop or config.method == "cap"
        loop = texts.loop(config, device) if reads else []
        # before the layers are replaced, whose sizes it reads
        regularised = poor(statistics, model)
        task = Task(model, config, statistics, loop, spool, device, autocast(config))
        started = time.perf_counter()
        entries = replace_layers(task)
        seconds["compression"] = time.perf_counter() - started
    kept = sum(entry["values"] for entry in entries.values())
    total = sum(task.sizes.values())
    say("\n".join(table(entries, task.sizes)))
    found = {
        "kept": kept / total,
        "matrix_values": total,
        "kept_values": kept,
        "index_bytes": index_bytes(model),
        "regularised": regularised,
        "stages": seconds,
    }
    return entries, found

def index_bytes(model: Llama) -> int:
    """Of the numbers of channels, which are no values, as the file has them."""
    tensors = model.state_dict().values()
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_floating_point())

def main(config: Config) -> dict:
    """Compress as `config` says; returns the report."""
    started = time.perf_counter()
    check(config)
    settle(config)
    # what "auto" is stands in the report
    kind = pick_device(config.device)
    config.device = kind
    if config.dtype == "auto":
        config.dtype = DEVICES[kind]["dtype"]
    folder = checkpoint_folder(config.ckpt)
    dtype = saved_dtype(folder, config.save_dtype)
    model, tokenizer, _ = load_with_tokenizer(folder)
    # what is compressed is a matrix; SiLU leaves none
    merge_layers(model)
    check_values(model, folder)
    job = Job(kind)
    texts = Texts(config, model, tokenizer, job.device)
    if config.dry_run:
        return dry_run(config, model, texts, job.device)
    config.threads = use_threads(config.threads)
    travelling = travelling_files(folder)
    model.to(job.device).requires_grad_(False)
    with ended_by_signals(), failures_with_their_repair(), beyond_numbers():
        before = measured(model, texts, config, job, folder)
        entries, found = compress(config, model, texts, key_of(config, folder, texts.train), job)
        # the compressed one, on the same windows
        after = measured(model, texts, config, job, "the compressed model")
        report = {
            "out_dir": config.out_dir,
            "ckpt": folder,
            "form": config.form,
            "method": config.method,
            "budget": config.budget,
            **found,
            "before": before,
            "after": after,
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(job.device),
            # every flag, as it was settled
            "config": {f.name: getattr(config, f.name) for f in fields(Config)},
        }
        write(config, model.to("cpu"), tokenizer, travelling, dtype, entries, report)
    say(summary(report))
    return report

@contextlib.contextmanager
def beyond_numbers():
    """Covariances that float64 cannot factorise, in one line."""
    try:
        yield
    except torch.linalg.LinAlgError as e:
        line = str(e).partition("\n")[0]
        raise UserError(f"a matrix of this model is beyond float64 ({line}): use more --calibration_tokens, "
                        "or an earlier checkpoint") from e

def check_values(model: Llama, folder: str):
    """UserError for weights that are no numbers: every product of theirs would be none."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{folder}: {name} has NaN or infinite elements: use an earlier checkpoint")

def write(config: Config, model: Llama, tokenizer, travelling, dtype, entries: dict, report: dict):
    check_range(model, dtype)
    allocation = {"budget": config.budget, "kept": report["kept"], "layers": entries}
    # whole or absent: all three or none
    def files(place: str):
        write_model(place, model, tokenizer, travelling, dtype)
        write_json(place, "allocation.json", allocation)
        write_json(place, "report.json", report)
    write_whole(config.out_dir, files)

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
