"""Train a LLaMA whose linear layers are LOST modules (or dense, low-rank, CoLA) on token shards.

    python train.py                                         # one process, the best device there is
    torchrun --nproc_per_node=8 train.py --model 350m       # eight GPUs
    python train.py --init_from FOLDER --steps 1000         # a trained LLaMA, further
    python train.py --help                                  # every flag

Run the same command again to continue. The samples of a step are a function of the seed, the same for any
number of processes: the state of a run is weights, moments and a few counters."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import contextlib
import dataclasses
import os
import sys

import numpy as np

from model import Llama, LlamaConfig, shown
from nanolost import checkpoint, out_dir
from nanolost.allocation import settle_allocation
from nanolost.budget import checkpoint_bytes, describe, describe_dense, describe_text
from nanolost.data import SampleOrder, TokenDataset
from nanolost.errors import UserError
from nanolost.failures import failures_with_their_repair
from nanolost.flags import command, parse, say
from nanolost.job import Job, place
from nanolost.loop import Report, State, Validation, evaluate, identity, measure, update
from nanolost.methods import build_model, owners
from nanolost.optim import freeze
from nanolost.settings import (
    FIXED,
    Config,
    resolve,
    saved_value,
    settle_device,
    settle_schedule,
    split_batch,
)
from nanolost.source import Source, remembered
from nanolost.threads import use_threads
from nanolost.tokenizer import Tokenizer

# --- data ---

def vocabulary(config: Config) -> Tokenizer | None:
    """The tokenizer of the shards; it decides config.vocab_size. A dry run can do without one."""
    beside = os.path.join(config.data_dir, "tokenizer.json")
    if config.tokenizer is None and not os.path.exists(beside):
        if not config.dry_run:
            # what is wrong with the shards comes first: nanoGPT's need more than a tokenizer
            TokenDataset(config.data_dir, "train", config.seq_len)
            raise UserError(f"no {beside}: run prepare_c4.py --out_dir {config.data_dir} first, or, for "
                            "ready-made shards, say --tokenizer gpt2")
        # GPT-2's size, so that a model can be counted before any text is there
        config.vocab_size = config.vocab_size or LlamaConfig.vocab_size
        return None
    config.tokenizer = config.tokenizer or beside
    tokenizer = Tokenizer.named(config.tokenizer)
    config.vocab_size = config.vocab_size or tokenizer.vocab_size
    # more rows than ids is fine: kernels like multiples of 64; fewer only where no text has an id above
    needed = tokenizer.rows_needed()
    if config.vocab_size < needed:
        raise UserError(f"--vocab_size {config.vocab_size} is below the tokenizer's {needed}")
    return tokenizer

class Texts:
    """What a run reads: the training split in its order, and the validation text."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokenizer_file = config.tokenizer
        self.digest = tokenizer.identity()
        self.train = TokenDataset(config.data_dir, "train", config.seq_len)
        self.order = SampleOrder(len(self.train), config.seed)
        val = TokenDataset(config.data_dir, "val", config.seq_len)
        self.rows = config.vocab_size
        samples = val.samples_for(config.eval_tokens)
        self.validation = Validation.of(val, samples, config.micro_batch, tokenizer, self.rows)
        if config.paper_batch:
            self.validation.paper = (config.paper_batch, config.eval_tokens)

    def splits(self) -> list[TokenDataset]:
        return [self.train, self.validation.data]

    def check(self, data_dir: str):
        """Read every token once: UserError for shards of another tokenizer."""
        for data in self.splits():
            known = data.tokenizer_sha256
            if known is not None and not self.tokenizer.matches(known):
                raise UserError(f"{self.tokenizer_file} is not the tokenizer that {data_dir} was made with: "
                                "use its tokenizer.json as it was, or prepare the text again")
            data.check_ids(min(self.tokenizer.vocab_size, self.rows))

    def samples(self, state: State, shape: tuple[int, int, int]) -> np.ndarray:
        """Numbers of the samples of the next update, (micro-batches, processes, samples)."""
        micro_batches, processes, samples = shape
        count = micro_batches * processes * samples
        # where the data are read next is a function of the samples read so far, so nothing is replayed
        return self.order[np.arange(count) + state.samples].reshape(shape)

# --- a new run, or one that goes on ---

def first_model(config: Config, source: Source | None, device, part: tuple[int, int] = (0, 1)) -> Llama:
    """The model of step 0: drawn, or that of --init_from. Of n processes the i-th fills `part` (i, n)."""
    if source is None:
        return build_model(config, device, part)
    return source.build(config, device, part)

def prepare_out_dir(config: Config, texts: Texts, source: Source | None) -> str | None:
    """Rank 0's look at out_dir and at the data before anything is written: the folder of the checkpoint to
    continue from, None for a new run."""
    # what a killed run was to overwrite, and what a killed save left behind, which takes room
    out_dir.end_overwrite(config.out_dir)
    checkpoint.sweep(config.out_dir)
    shapes = first_model(config, source, "meta")
    freeze(shapes, config.freeze)
    out_dir.check_space(config.out_dir, config.keep, checkpoint_bytes(shapes, config.optimizer))
    texts.check(config.data_dir)
    return out_dir.choose_checkpoint(config.out_dir, config.resume, config.overwrite)

def fresh(config: Config, job: Job, source: Source | None = None) -> State:
    """Step 0. Each process decomposes its share of the layers and sends them to the others."""
    model = first_model(config, source, job.device, (job.rank, job.world))
    owner = owners(model, job.world)
    for name, tensor in model.state_dict().items():
        # also what all drew alike: two kinds of GPU may round a decomposition differently
        layer = name.rpartition(".")[0]
        job.broadcast(tensor, owner.get(layer, 0))
    return State.of(model, config)

def unlike(name: str, before, now) -> tuple:
    """Name and values of a changed setting, for one line: of two by layer those of the first that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for layer in {**before, **now}:
            old = before.get(layer)
            new = now.get(layer)
            if old != new:
                return f"{name} of {layer}", old, new
    # one alone may have hundreds of layers
    if isinstance(before, dict):
        before = shown(before)
    if isinstance(now, dict):
        now = shown(now)
    return name, before, now

def check_same_run(saved: dict, now: dict, say):
    """Refuse a changed architecture or data set, print any other change."""
    for name, value in now.items():
        # how a run is started says nothing of the run; what an old checkpoint lacks cannot have changed
        if name in ("resume", "overwrite") or name not in saved:
            continue
        before = saved[name]
        if before == value:
            continue
        if name in FIXED:
            name, before, value = unlike(name, before, value)
            raise UserError(f"{name} was {before} when this run began and is {value} now: give the old "
                            "value, or use another --out_dir")
        # the steps done had the rates of the old cosine
        rest = ", and from here on the learning rates are those of a run so long" if name == "steps" else ""
        say(f"changed: {name} {before} → {value}{rest}")

def settle(config: Config, saved: dict):
    """Choose what is chosen once for a run; `saved` is the config of its checkpoint."""
    settle_schedule(config, saved)
    # bit for bit holds for equal threads only
    if config.threads is None and saved.get("threads") is not None:
        config.threads = saved_value(saved, "threads")
    config.threads = use_threads(config.threads)

def resumed(config: Config, job: Job, texts: Texts, folder: str, report: Report) -> tuple[State, dict]:
    """The state that the checkpoint `folder` holds, and what the run is now."""
    model, saved = checkpoint.load_folder(folder)
    if "config" not in saved:
        raise UserError(f"{folder} has no training state to continue from: it is a model alone")
    settle(config, saved["config"])
    now = identity(config, texts.splits(), texts.digest, job.world)
    before = saved["config"].get("tokenizer_sha256")
    # earlier versions named the file, not the vocabulary
    if before is not None and texts.tokenizer.matches(before):
        saved["config"]["tokenizer_sha256"] = texts.digest
    job.first(lambda: check_same_run(saved["config"], now, report.say))
    report.say(f"continuing from {folder}")
    state = State.of(model.to(job.device), config)
    checkpoint.load_optimizer(folder, model, state.optimizers)
    state.restore(saved)
    return state, now

# --- the run ---

def dry_run(config: Config):
    """Print what the run would cost."""
    rank, world = place()
    source = Source.of(config)
    tokenizer = vocabulary(config)
    settle_allocation(config, source)
    config.micro_batch, accumulation = split_batch(config, world)
    # shapes only: 7b needs no memory either
    model = first_model(config, source, "meta")
    freeze(model, config.freeze)
    lines = describe(model, config, world, accumulation)
    # where the text is there, it must be one that the run itself would take
    if tokenizer is not None and os.path.isdir(config.data_dir):
        lines.append(describe_text(config, len(Texts(config, tokenizer).train)))
    if config.linear != "dense":
        lines += describe_dense(model, config)
    if rank == 0:
        say("\n".join(lines))

def train(state: State, texts: Texts, config: Config, job: Job, report: Report, save) -> str:
    """Update, evaluate and save until the last step, or until a signal: returns its name, "" at the end."""
    saved = state.counters()
    stopped = ""
    _, accumulation = split_batch(config, job.world)
    shape = (accumulation, job.world, config.micro_batch)
    while True:
        done = state.step >= config.steps
        due = done or state.step % config.eval_every == 0
        # a resumed run may have an evaluation to make up; one that was asked to stop makes it up later
        if due and state.step > state.evaluated and not stopped:
            figures = evaluate(state.model, texts.validation, state.autocast, job)
            if figures is None:
                stopped = job.stop_reason()
            else:
                state.evaluated = state.step
                report.evaluation(figures, measure(state, texts.validation, job))
        due = done or stopped or state.step % config.save_every == 0
        # a run that is finished already has nothing to save
        if due and state.counters() != saved:
            save()
            saved = state.counters()
        if done or stopped:
            return stopped
        figures = update(state, texts.train, texts.samples(state, shape), config, job)
        report.update(figures)
        if figures.asked:
            stopped = job.stop_reason()

def main(config: Config):
    """Train as `config` (from `resolve`) says. Returns when the run is finished, or stopped by a signal."""
    config = settle_device(config)
    if config.dry_run:
        with failures_with_their_repair():
            return dry_run(config)
    with (
        Job.start(config) as job,
        contextlib.ExitStack() as at_end,
        Report(config, job) as report,
        failures_with_their_repair(),
    ):
        source = Source.of(config)
        # read now: --overwrite may delete what the model comes from
        travelling = source.travelling() if source else {}
        config.micro_batch, accumulation = split_batch(config, job.world)
        # everything that can be refused is looked at before anything is written
        texts = Texts(config, vocabulary(config))
        settle_allocation(config, source)
        job.claim(config.out_dir)
        folder = job.first(lambda: prepare_out_dir(config, texts, source))

        if folder:
            state, now = resumed(config, job, texts, folder, report)
        else:
            settle(config, {})
            now = identity(config, texts.splits(), texts.digest, job.world)
            state = fresh(config, job, source)
        report.say("\n".join(describe(state.model, config, job.world, accumulation)))
        report.say(describe_text(config, len(texts.train)))
        if config.compile == "true":
            # in place: parameters keep their names
            state.model.compile()

        # nothing can refuse any more: now a run gives way, to be deleted once this one has saved
        if job.rank == 0:
            at_end.enter_context(out_dir.overwriting(config.out_dir))
        job.first(lambda: out_dir.make_way(config.out_dir, folder, config.resume, config.overwrite))
        report.begin(state)
        job.first(lambda: out_dir.write_config(config.out_dir, dataclasses.asdict(config)))
        def write():
            checkpoint.save_checkpoint(
                config.out_dir, state.step, state.model, state.optimizers,
                {**state.counters(), "config": now}, texts.tokenizer, config.keep, travelling)
            out_dir.end_overwrite(config.out_dir)
        def save():
            report.sync()
            job.first(write)
        report.end(train(state, texts, config, job, report, save))

if __name__ == "__main__":
    command(lambda: main(resolve(remembered(parse(Config, sys.argv[1:], __doc__)))))
