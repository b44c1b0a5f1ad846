"""A run from its start to its end: what train.py and finetune.py share.

A command says which model and which texts; here stand how a run that goes on is told from another one, the
loop over updates, and what is written when."""
import contextlib
import dataclasses

import numpy as np

from model import shown
from nanolost import checkpoint, out_dir
from nanolost.choices import accuracy
from nanolost.data import SampleOrder, TokenDataset
from nanolost.errors import UserError
from nanolost.job import Job
from nanolost.loop import Report, State, Validation, evaluate, identity, measure, update
from nanolost.settings import saved_value, split_batch
from nanolost.threads import use_threads
from nanolost.tokenizer import Tokenizer

# --- the texts ---

class Texts:
    """What a run reads: training samples in their order, and the text of an evaluation, None for none. rows:
    words of the model's table. others: texts that are looked at before. questions: what else an evaluation
    asks, None for nothing."""

    others = ()
    questions = None
    # of those, so many at a time
    micro = 1

    def __init__(
        self,
        train: TokenDataset,
        validation: Validation | None,
        tokenizer: Tokenizer,
        rows: int,
        seed: int,
    ):
        self.train = train
        self.validation = validation
        self.tokenizer = tokenizer
        self.rows = rows
        self.digest = tokenizer.identity()
        self.order = SampleOrder(len(train), seed)

    def splits(self) -> list[TokenDataset]:
        if self.validation is None:
            return [self.train]
        return [self.train, self.validation.data]

    def check(self, config):
        """Read every token once: UserError for shards of another tokenizer."""
        for data in [*self.splits(), *self.others]:
            known = data.tokenizer_sha256
            if known is not None and not self.tokenizer.matches(known):
                raise UserError(f"{config.tokenizer} is not the tokenizer that {data.path} was made with: "
                                "use its tokenizer.json as it was, or prepare the text again")
            data.check_ids(min(self.tokenizer.vocab_size, self.rows))

    def samples(self, state: State, shape: tuple[int, int, int]) -> np.ndarray:
        """Numbers of the samples of the next update, (micro-batches, processes, samples)."""
        micro_batches, processes, samples = shape
        count = micro_batches * processes * samples
        # where the data are read next is a function of the samples read so far, so nothing is replayed
        return self.order[np.arange(count) + state.samples].reshape(shape)

# --- one run by several processes ---

# where something lies, and what does the work, each machine may say for itself
LOCAL = ("data_dir", "data", "eval_dir", "eval", "calibration_dir", "out_dir", "init_from", "ckpt", "dense",
         "tokenizer", "allocation", "statistics", "device", "threads")

def check_alike(config, job: Job):
    """UserError on all processes where one was started with other flags."""
    configs = job.gather({name: value for name, value in vars(config).items() if name not in LOCAL})
    for rank, other in enumerate(configs):
        for name, value in other.items():
            first = configs[0][name]
            if value != first:
                raise UserError(f"process {rank} has --{name} {shown(value)}, and process 0 {shown(first)}: "
                                "start all of them with the same flags")

# --- a run that goes on ---

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

def check_same_run(saved: dict, now: dict, fixed: set[str], say):
    """Refuse a change of a setting in `fixed`, such as the architecture or the data set, print any other."""
    for name, value in now.items():
        # how a run is started says nothing of the run; what an old checkpoint lacks cannot have changed
        if name in ("resume", "overwrite", "world_size", "gpu_memory") or name not in saved:
            continue
        before = saved[name]
        if before == value:
            continue
        if name in fixed:
            name, before, value = unlike(name, before, value)
            raise UserError(f"{name} was {before} when this run began and is {value} now: give the old "
                            "value, or use another --out_dir")
        # the steps done had the rates of the old cosine
        rest = ", and from here on the learning rates are those of a run so long" if name == "steps" else ""
        say(f"changed: {name} {before} → {value}{rest}")

def settle(config, saved: dict):
    """Choose what is chosen once for a run; `saved` is the config of its checkpoint."""
    config.settle_schedule(saved)
    # bit for bit holds for equal threads only
    if config.threads is None and saved.get("threads") is not None:
        config.threads = saved_value(saved, "threads")
    config.threads = use_threads(config.threads)

def start(config, texts: Texts, job: Job) -> dict:
    """Settle a new run; its identity, which its checkpoints keep."""
    settle(config, {})
    return identity(config, texts.splits(), texts.digest, job.world)

def go_on(saved: dict, config, texts: Texts, fixed: set[str], job: Job, report: Report) -> dict:
    """Settle a run that has a checkpoint, whose settings are `saved`; its identity now."""
    settle(config, saved)
    now = identity(config, texts.splits(), texts.digest, job.world)
    before = saved.get("tokenizer_sha256")
    # earlier versions named the file, not the vocabulary
    if before is not None and texts.tokenizer.matches(before):
        saved["tokenizer_sha256"] = texts.digest
    job.first(lambda: check_same_run(saved, now, fixed, report.say))
    return now

def begin(state: State, folder: str | None, config, job: Job, report: Report, at_end: contextlib.ExitStack):
    """Make out_dir this run's, now that nothing can refuse any more. folder: the checkpoint that it continues
    from."""
    # a run that gives way is deleted once this one has saved
    if job.rank == 0:
        at_end.enter_context(out_dir.overwriting(config.out_dir))
    job.first(lambda: out_dir.make_way(config.out_dir, folder, config.resume, config.overwrite))
    report.begin(state)
    job.first(lambda: out_dir.write_config(config.out_dir, dataclasses.asdict(config)))

# --- the loop ---

def assess(state: State, texts: Texts, job: Job, report: Report) -> bool:
    """Evaluate, and report it; False if a process was asked to stop meanwhile."""
    found = {}
    if texts.validation is not None:
        found["loss"] = evaluate(state.model, texts.validation, state.autocast, job)
    if texts.questions is not None:
        found["accuracy"] = accuracy(state.model, texts.questions, texts.micro, state.autocast, job)
    # said together, or made up later together
    if None in found.values():
        return False
    state.evaluated = state.step
    if "loss" in found:
        report.evaluation(found["loss"], measure(state, texts.validation, job))
    if "accuracy" in found:
        report.accuracy(found["accuracy"])
    return True

def train(
    state: State, texts: Texts, config, job: Job, report: Report, save, make=None, total: int = 0
) -> str:
    """Update, evaluate and save for as many steps as `config` says from where the optimizers began, or until
    a signal: returns its name, "" at the end. make: makes an update (loop.update). total: steps of the run,
    where this is one of its stages."""
    saved = state.counters()
    stopped = ""
    _, accumulation = split_batch(config, job.world)
    shape = (accumulation, job.world, config.micro_batch)
    last = state.began + config.steps
    total = total or last
    while True:
        done = state.step >= total
        due = done or state.step % config.eval_every == 0
        # a resumed run may have an evaluation to make up; one that was asked to stop makes it up later
        if due and state.step > state.evaluated and not stopped and not assess(state, texts, job, report):
            stopped = job.stop_reason()
        due = done or stopped or state.step % config.save_every == 0
        # a run that is finished already has nothing to save
        if due and state.counters() != saved:
            save()
            saved = state.counters()
        if state.step >= last or stopped:
            return stopped
        figures = (make or update)(state, texts.train, texts.samples(state, shape), config, job)
        report.update(figures)
        if figures.asked:
            stopped = job.stop_reason()

def saver(state: State, now: dict, texts: Texts, travelling: dict, config, job: Job, report: Report):
    """A function that saves a checkpoint of the run. now: its identity; travelling: files of its source."""
    def save():
        report.sync()
        checkpoint.save_checkpoint(
            config.out_dir, state.step, state.model, state.optimizers,
            {**state.counters(), "config": now}, texts.tokenizer, config.keep, travelling, job)
        job.first(lambda: out_dir.end_overwrite(config.out_dir))
    return save
