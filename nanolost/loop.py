"""The loop that all training shares: a state, one update, one evaluation, and what is said of them.

`update` is what bench.py times and what a test takes one step of; `evaluate` is the only place that averages
losses over a text. To add a metric, write a function like `look_inside` and add a line to `METRICS`."""
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from model import Llama
from nanolost import methods
from nanolost.budget import peak_flops, peak_memory
from nanolost.counts import count_flops
from nanolost.data import TokenDataset
from nanolost.errors import UserError
from nanolost.files import open_regular, write_atomic
from nanolost.loss import head_loss
from nanolost.optim import build_optimizers, clip, flat_gradients, freeze, set_rates
from nanolost.settings import autocast

# --- the state of a run ---

# the last whole number before which JSON's readers, of which some have float64 alone, lose none
MOST = 2**53

# what state.json keeps beside the tensors: name → (type, least, most); of a list those of its entries
COUNTERS = {
    "step": (int, 0, MOST),
    "samples": (int, 0, MOST),
    "tokens": (int, 0, MOST),
    "evaluated": (int, 0, MOST),
    "began": (int, 0, MOST),
    "norms": (list[float], 0.0, sys.float_info.max),
}

def check_counter(name: str, value):
    """UserError for a value that no run has written."""
    kind, least, most = COUNTERS[name]
    values = [value]
    words = "a whole number"
    fits = type(value) is int
    if kind is not int:
        words = "a list of numbers"
        fits = type(value) is list and all(type(x) in (int, float) for x in value)
        values = value
    # NaN is in no range
    if not fits or not all(least <= x <= most for x in values):
        raise UserError(f'"{name}" of its state.json is {value!r:.40}, not {words} from {least} to {most:g}: '
                        "use an earlier checkpoint")

@dataclass
class State:
    """All that an update changes. gradients: the flat vector of which every p.grad is a view. samples,
    tokens: read so far. evaluated: step of the last evaluation. began: the step at which the optimizers did,
    and their schedule with them. norms: the last 100 gradient norms."""

    model: Llama
    optimizers: list[torch.optim.Optimizer]
    gradients: torch.Tensor
    autocast: torch.autocast
    step: int = 0
    samples: int = 0
    tokens: int = 0
    evaluated: int = 0
    began: int = 0
    norms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: Llama, config) -> "State":
        """Step 0 of a model that is on its device already."""
        model.recompute = config.recompute
        # before anything counts what is trained
        freeze(model, config.freeze)
        return cls(model, build_optimizers(model, config), flat_gradients(model), autocast(config))

    def restart(self, config):
        """Begin a stage: fresh optimizers, of what is trained from here on."""
        for p in self.model.parameters():
            # views of a vector that goes
            p.grad = None
        freeze(self.model, config.freeze)
        self.optimizers = build_optimizers(self.model, config)
        self.gradients = flat_gradients(self.model)
        self.began = self.step

    def counters(self) -> dict:
        """What state.json keeps beside the tensors."""
        return {name: getattr(self, name) for name in COUNTERS}

    def restore(self, saved: dict):
        """Take the counters of a state.json; those that an old one lacks stay at zero. UserError for values
        that no run has written."""
        for name in COUNTERS:
            if name in saved:
                check_counter(name, saved[name])
                setattr(self, name, saved[name])
        # it would not be evaluated again before that step
        for name in ("evaluated", "began"):
            value = getattr(self, name)
            if value > self.step:
                raise UserError(f'"{name}" of its state.json is {value}, after its "step" {self.step}: use '
                                "an earlier checkpoint")

# --- one update ---

@dataclass
class Figures:
    """What an update says. norm: of the gradient before clipping. median: of the norms before it, infinite
    while they are few. asked: whether a process was asked to stop. seconds: wall-clock time."""

    loss: float
    norm: float
    lr: float
    median: float
    spike: bool
    skipped: bool
    asked: bool
    seconds: float

@contextlib.contextmanager
def every_parameter_gets_a_gradient(model: torch.nn.Module):
    """AssertionError if a backward pass inside does not reach some trained parameter: a mistake in the model.
    A gradient of zeros is none: projections that start at zero send nothing back in the first step."""
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    missing = dict(trained)
    def reached(p):
        missing.pop(p, None)
    hooks = [p.register_post_accumulate_grad_hook(reached) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not missing, f"no gradient reaches {', '.join(missing.values())}"

def shares(targets: np.ndarray) -> np.ndarray:
    """What each micro-batch's mean loss is divided by, so that the sum of all is the mean over all targets.
    targets: of each sample, (micro-batches, processes, samples). Returns (micro-batches, processes)."""
    counts = targets.sum(2)
    # each process counts the whole update by itself, which costs less than to ask the others
    total = counts.sum()
    # without masks the number of micro-batches, exactly; one without a target adds nothing
    return np.divide(total, counts, out=np.full(counts.shape, np.inf), where=counts > 0)

def accumulate(
    state: State,
    data: TokenDataset,
    mine: np.ndarray,
    divisors: np.ndarray,
    device,
) -> torch.Tensor:
    """Add up the gradients of the loss over `mine`, (micro-batches, samples): of the mean of each, divided by
    its entry in `divisors`, (micro-batches,). Returns the sum of the losses, ()."""
    loss = torch.zeros((), device=device)
    for samples, divisor in zip(mine, divisors.tolist(), strict=True):
        x, y = data.batch(samples, device)
        with state.autocast:
            part = state.model(x, y, loss_only=True)[1]
        # micro-batches add up here, processes in one reduction after them
        part = part / divisor
        part.backward()
        loss += part.detach()
    return loss

def median_norm(norms: list[float]) -> float:
    """Of the last gradient norms; infinite while they are too few to tell a spike."""
    return statistics.median(norms) if len(norms) >= 20 else math.inf

def check_finite(state: State, loss: float, norm: float, count: int):
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise FloatingPointError(
        f"step {state.step + 1}: loss {loss}, gradient norm {norm}, in samples {state.samples} to "
        f"{state.samples + count - 1} of the order. Nothing was updated: lower --lr, or look at "
        "the data")

def take_step(
    state: State,
    loss: torch.Tensor,
    count: int,
    started: float,
    config,
    job,
) -> Figures:
    """Update by the gradients that the processes have gathered, of `count` samples of the whole job. loss:
    this process's share of it, (); started: when the update began. Raises as `update` does."""
    asked = torch.tensor(float(bool(job.asked)), device=job.device)
    sums = torch.stack((loss, asked))
    # clipping comes after the reduction: it is the norm of the whole batch's gradient that counts
    job.sum(state.gradients)
    job.sum(sums)
    # all three in one copy: a GPU is waited for once a step
    loss, asked, norm = torch.cat((sums, state.gradients.norm()[None])).tolist()
    check_finite(state, loss, norm, count)

    # Chowdhery et al. 2022 (arXiv 2204.02311, 5.1) restart before a spike; here it is noted or left out
    median = median_norm(state.norms)
    # alike on all processes, as the gradient is
    spike = config.spike > 0 and norm > config.spike * median
    skipped = spike and config.skip_spikes
    clip(state.gradients, norm, config.grad_clip)
    set_rates(state.optimizers, state.step + 1 - state.began, config)
    if not skipped:
        for optimizer in state.optimizers:
            optimizer.step()
    state.step += 1
    state.samples += count
    state.tokens += config.batch_tokens
    state.norms = [*state.norms[-99:], norm]
    rate = state.optimizers[-1].param_groups[0]["lr"]
    return Figures(loss, norm, rate, median, spike, skipped, bool(asked), time.perf_counter() - started)

def update(state: State, data: TokenDataset, samples: np.ndarray, config, job) -> Figures:
    """One optimizer step on `samples`, (micro-batches, processes, samples): those of the whole job. Raises
    FloatingPointError on all processes, before anything is updated, where loss or norm is not finite."""
    started = time.perf_counter()
    state.gradients.zero_()
    # looked at once: which parameters a loss reaches does not change
    check = contextlib.nullcontext()
    if state.step == 0:
        check = every_parameter_gets_a_gradient(state.model)
    # where targets are masked, micro-batches and processes have different numbers of them
    divisors = shares(data.targets(samples))
    with check:
        loss = accumulate(state, data, samples[:, job.rank], divisors[:, job.rank], job.device)
    return take_step(state, loss, samples.size, started, config, job)

# --- one evaluation ---

def require_target(data: TokenDataset, samples: int, micro: int):
    """UserError where the first `samples` have no target at all: rows may be all prompt."""
    # the first batch nearly always has one
    for first in range(0, samples, micro):
        last = min(first + micro, samples)
        _, y = data.batch(np.arange(first, last))
        if (y >= 0).any():
            return
    raise UserError(f"the first {samples} samples of the validation text, all that is read of it, have no "
                    "target: use a larger --eval_tokens, or rows with longer answers")

@dataclass
class Validation:
    """The text of an evaluation: the first `samples` windows of `data`, `micro` at a time. token_bytes:
    UTF-8 bytes behind each id, (vocab_size,). paper: (rows of a batch, tokens) of `paper_perplexity`."""

    data: TokenDataset
    samples: int
    micro: int
    token_bytes: torch.Tensor
    paper: tuple[int, int] | None = None

    @classmethod
    def of(cls, data: TokenDataset, samples: int | None, micro: int, tokenizer, rows: int) -> "Validation":
        """The first windows of `data`, None for all, for a model with `rows` words."""
        if samples is None:
            samples = len(data)
        # a text may be shorter than what is asked for, but is never nothing
        samples = max(1, min(samples, len(data)))
        require_target(data, samples, micro)
        # ids of a padded vocabulary stand for no text, and none of a text is above a smaller one's
        padding = (0, rows - tokenizer.vocab_size)
        token_bytes = F.pad(torch.from_numpy(tokenizer.token_bytes()), padding)
        return cls(data, samples, micro, token_bytes)

def window_losses(model: Llama, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss that the model's forward gives, bit for bit, and the sum over each window, (B,)."""
    nats = torch.zeros(y.numel(), device=y.device)
    hidden = model.hidden(x).flatten(0, 1)
    loss = head_loss(model.lm_head, hidden, y.flatten(), nats)
    # MPS has no float64
    return loss, nats.view(y.shape).cpu().double().sum(1)

def in_order(parts: list[list], micro: int) -> list:
    """The windows that each process has read, every n-th micro-batch of them, as one list."""
    turns = range(0, len(parts[0]), micro)
    return [window for first in turns for part in parts for window in part[first:first + micro]]

def paper_perplexity(windows: list[tuple], batch: int, tokens: int) -> float:
    """The perplexity that evaluators of this line of papers print (GaLore, torchrun_main.py, of which CoLA's
    and SLTrain's are copies): the unweighted mean of batches, of which n are counted as n + 1, up to the
    first that passes so many `tokens` that are no padding. windows: (nats, targets, …) of each, in order.

    About 2 % too low, by the count; a mean over tokens is what `evaluate` gives."""
    total = 0.0
    # theirs begins at 1 and is divided by
    batches = 1
    read = 0
    for first in range(0, len(windows), batch):
        if read > tokens:
            break
        part = windows[first:first + batch]
        targets = sum(window[1] for window in part)
        # a batch with few targets weighs as much as any other
        total += sum(window[0] for window in part) / max(targets, 1)
        batches += 1
        # a row's first token is no target, and no padding
        read += targets + len(part)
    return math.exp(min(total / batches, 700))

@torch.no_grad()
def evaluate(model: Llama, text: Validation, context, job, windows: list | None = None) -> dict | None:
    """Mean loss over a text: every token weighs the same for any micro-batch and number of processes. Bits
    per byte: the bits of all tokens, end-of-text too, over the bytes of text. context: the autocast of the
    run. windows: takes (nats, targets, bytes) of each window that this process reads. None if a process was
    asked to stop meanwhile."""
    nats, tokens, text_bytes = 0.0, 0, 0
    # whole batches of theirs may lie across ours, and across processes
    if windows is None and text.paper:
        windows = []
    # each process takes every world-th micro-batch
    mine = range(job.rank * text.micro, text.samples, job.world * text.micro)
    for first in mine:
        if job.asked:
            break
        last = min(first + text.micro, text.samples)
        x, y = text.data.batch(np.arange(first, last))
        # a target below 0 is none
        known = y >= 0
        counts = known.sum(1)
        sizes = (text.token_bytes[y.clamp(min=0)] * known).sum(1)
        count = counts.sum().item()
        text_bytes += sizes.sum().item()
        # filled up to a whole micro-batch, as another shape would compile again; -1 is no target
        fill = (0, 0, 0, text.micro - len(y))
        x = F.pad(x, fill).to(job.device)
        y = F.pad(y, fill, value=-1).to(job.device)
        with context:
            if windows is None:
                loss = model(x, y, loss_only=True)[1]
            else:
                loss, nats_of = window_losses(model, x, y)
                # without the windows that fill up
                rows = nats_of[:len(counts)].tolist()
                windows += zip(rows, counts.tolist(), sizes.tolist(), strict=True)
        # back to a sum, so that a last micro-batch that is not full weighs no more than its tokens
        nats += loss.item() * count
        tokens += count
    sums = torch.tensor([nats, tokens, text_bytes, len(job.asked)], dtype=torch.float64)
    # nccl reduces nothing on the CPU, MPS has no float64
    if job.device.type == "cuda":
        sums = sums.to(job.device)
    nats, tokens, text_bytes, stops = job.sum(sums).tolist()
    if stops:
        return None
    mean = nats / tokens
    bits = nats / math.log(2)
    found = {
        "val_loss": mean,
        # e to the 700 is near the largest float64
        "val_ppl": math.exp(min(mean, 700)),
        "val_bpb": bits / max(text_bytes, 1),
        "val_tokens": int(tokens),
    }
    if text.paper:
        found["paper_ppl"] = paper_perplexity(in_order(job.gather(windows), text.micro), *text.paper)
    return found

def require_finite(found: dict, name: str, dtype: str):
    """UserError where the model `name` was evaluated, in `dtype`, and its loss is no finite number."""
    loss = found["val_loss"]
    if not math.isfinite(loss):
        raise UserError(f"{name}: the loss is {loss}: its weights, or what they compute in {dtype}, are no "
                        "finite numbers; use another checkpoint or --dtype")

def without_padding(data: TokenDataset) -> torch.Tensor:
    """Inputs of four samples, cut to where the shortest ends: of rows the fullest of the first 64."""
    x, y = data.batch(np.arange(min(64, len(data))))
    # padding begins behind the last target
    places = torch.arange(1, y.shape[1] + 1)
    lengths = ((y >= 0) * places).amax(1)
    fullest = lengths.argsort(descending=True, stable=True)[:4]
    return x[fullest, :lengths[fullest].min().clamp(min=1)]

@torch.no_grad()
def look_inside(model: Llama, text: Validation, context, job) -> dict:
    """{"layers": what each special layer does with the first windows of the text}, each process its share
    of the layers; nothing without any."""
    idx = without_padding(text.data).to(job.device)
    layers = {}
    try:
        with context:
            # never the compiled forward: it has no modules to look into
            layers = methods.look_inside(model, lambda: model.forward(idx), (job.rank, job.world))
    except RuntimeError as e:
        # of a solver or of too little memory: no reason to end a run
        print(f"WARNING: no look inside the layers: {e}", file=sys.stderr, flush=True)
    found = {}
    for share in job.gather(layers):
        found |= share
    layers = {name: found[name] for name, _ in model.named_modules() if name in found}
    return {"layers": layers} if layers else {}

# what an evaluation records beside the loss: (model, text, autocast, job) → entries of its JSON line
METRICS = [look_inside]
# entries that the line has already, by `Report.record` and `evaluate`
RESERVED = ("kind", "step", "time", "val_loss", "val_ppl", "val_bpb", "val_tokens", "paper_ppl")

def measure(state: State, text: Validation, job) -> dict:
    """What all METRICS say. AssertionError for a name that another entry of the line has."""
    found = {}
    for metric in METRICS:
        entries = metric(state.model, text, state.autocast, job)
        taken = entries.keys() & {*RESERVED, *found}
        who = getattr(metric, "__name__", metric)
        assert not taken, f"metric {who}: the line has {', '.join(sorted(taken))} already, use other names"
        found |= entries
    return found

# --- what is said ---

def comes_again(line: bytes, state: State) -> bool:
    """Whether a run that goes on from `state` will write this line of a metrics.jsonl again."""
    last = {
        "train": state.step,
        "spike": state.step,
        "eval": state.evaluated,
        "accuracy": state.evaluated,
        # the line stands at the stage's first step
        "stage": state.began,
    }
    # whatever is no JSON object with a kind and a step is somebody else's
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        entry = json.loads(line)
        # of a run that begins nothing was said yet
        return entry["step"] > last[entry["kind"]] or state.step == 0
    return False

def is_whole(line: bytes) -> bool:
    """Whether a line that lacks its end is JSON: a part of one that a kill left is not."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True

def kept_lines(path: str, state: State) -> list[bytes]:
    """The lines of a metrics.jsonl, byte for byte, that a run which goes on from `state` will not write
    again; without the half line that a kill left."""
    kept = []
    with contextlib.suppress(FileNotFoundError), open_regular(path) as f:
        for line in f:
            if comes_again(line, state):
                continue
            if line.endswith(b"\n"):
                kept.append(line)
            elif is_whole(line):
                kept.append(line + b"\n")
    return kept

def time_left(seconds: float) -> str:
    """As a person says it: 2 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 90 else f"{round(seconds)} s"

def as_json(value):
    """What json asks for values that it does not know: numbers of torch and numpy, of any shape."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}: metrics.jsonl takes numbers, text, lists "
                    "and dicts")

class Report:
    """What a run says, by rank 0 alone: lines on stdout and, from `begin` on, status.json and metrics.jsonl
    in out_dir. As a context it notes the error that ends a run."""

    def __init__(self, config, job):
        self.config = config
        self.job = job
        self.state = self.metrics = None
        # updates since the last line of the log, and their seconds
        self.timed = 0
        self.seconds = 0.0
        self.first = True
        # of the last evaluation
        self.val_loss = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # a refused command leaves status.json as it was
        if error is not None and self.state is not None:
            reason = self.job.first_fault(f"{kind.__name__}: {error}")
            with contextlib.suppress(OSError):
                self.status("failed", reason)
        if self.metrics is not None:
            self.metrics.close()

    def say(self, text: str):
        self.job.say(text)

    def status(self, word: str, reason: str = ""):
        if self.job.rank == 0:
            content = {"state": word, "step": self.state.step, "reason": reason}
            path = os.path.join(self.config.out_dir, "status.json")
            write_atomic(path, json.dumps(content).encode())

    def begin(self, state: State):
        """Continue metrics.jsonl where `state` is: lines after it come again and are dropped."""
        self.state = state
        self.flops = count_flops(state.model, self.config.seq_len)
        self.peak = peak_flops(self.job.device)
        if self.job.rank == 0:
            # of a link to another disk the file there, so that it stays a link
            path = os.path.realpath(os.path.join(self.config.out_dir, "metrics.jsonl"))
            write_atomic(path, b"".join(kept_lines(path, state)))
            self.metrics = open(path, "a", encoding="utf-8")
        self.status("running")

    def record(self, kind: str, **fields):
        """One line of metrics.jsonl. time: seconds since 1970."""
        if self.metrics is not None:
            line = {"kind": kind, "step": self.state.step, "time": round(time.time(), 3), **fields}
            print(json.dumps(line, default=as_json), file=self.metrics, flush=True)

    def sync(self):
        """The lines so far are on the disk for certain when it returns."""
        if self.metrics is not None:
            os.fsync(self.metrics.fileno())

    def where(self) -> str:
        return f"step {self.state.step:>6}/{self.config.steps}"

    def update(self, figures: Figures):
        """Log an update, every log_every of them and the last one."""
        if figures.spike:
            self.record("spike", grad_norm=figures.norm, median=figures.median, skipped=figures.skipped)
            what = ", update skipped" if figures.skipped else ""
            self.say(f"{self.where()} | spike: gradient norm {figures.norm:.2f}, the median of the last is "
                     f"{figures.median:.2f}{what}")
        self.timed += 1
        self.seconds += figures.seconds
        step = self.state.step
        logs = step % self.config.log_every == 0 or step == self.config.steps
        if logs:
            self.line(figures)
        # the first update compiles: it says nothing of the speed
        if logs or self.first:
            self.timed = 0
            self.seconds = 0.0
            self.first = False

    def line(self, figures: Figures):
        config = self.config
        seconds = self.seconds / self.timed
        speed = config.batch_tokens / seconds
        memory = peak_memory(self.job.device)
        mfu, share = None, "n/a"
        if self.peak:
            mfu = speed * self.flops / (self.peak * self.job.world)
            share = f"{mfu:.1%}"
        self.record(
            "train",
            loss=figures.loss,
            lr=figures.lr,
            grad_norm=figures.norm,
            tokens=self.state.tokens,
            tokens_per_second=speed,
            step_ms=1000 * seconds,
            mfu=mfu,
            peak_memory_bytes=memory,
        )
        left = time_left(seconds * (config.steps - self.state.step))
        self.say(f"{self.where()} | loss {figures.loss:.4f} | lr {figures.lr:.2e} | "
                 f"norm {figures.norm:.2f} | {speed:,.0f} tok/s | mfu {share} | "
                 f"{memory / 1e9:.2f} GB | {left} left")

    def evaluation(self, val: dict, more: dict):
        self.record("eval", **val, **more)
        self.val_loss = val["val_loss"]
        paper = ""
        if "paper_ppl" in val:
            paper = f" (the papers' evaluator: {val['paper_ppl']:.2f})"
        self.say(f"{self.where()} | val loss {val['val_loss']:.4f} | "
                 f"perplexity {val['val_ppl']:.2f}{paper} | {val['val_bpb']:.4f} bits per byte | "
                 f"{val['val_tokens']:,} tokens")

    def accuracy(self, found: dict):
        self.record("accuracy", **found)
        # one question alone has none
        error = found["stderr"] or 0.0
        self.say(f"{self.where()} | accuracy {found['accuracy']:.3f} ± {error:.3f} | by length "
                 f"{found['accuracy_norm']:.3f} | {found['questions']:,} questions")

    def end(self, stopped: str):
        """stopped: by which signal, "" where the run is finished."""
        self.status("stopped" if stopped else "finished", stopped)
        if stopped:
            self.say(f"stopped at step {self.state.step} by {stopped}: the same command continues")
        else:
            self.say(f"finished: python sample.py --ckpt {self.config.out_dir}")

def identity(config, data: list[TokenDataset], tokenizer_sha256: str, world: int) -> dict:
    """What a resumed run is compared with: every setting, the data, and what the last bits of a sum depend
    on (a change of those is allowed, and said)."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    return {**settings, "data": [split.fingerprint for split in data], "tokenizer_sha256": tokenizer_sha256,
            "processes": world, "torch": torch.__version__}
