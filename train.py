"""Train a LLaMA whose linear layers are LOST modules (or dense, low-rank, CoLA) on token shards.

    python train.py                                         # one process, the best device there is
    torchrun --nproc_per_node=8 train.py --model 350m       # eight GPUs
    python train.py --init_from FOLDER --steps 1000         # a trained LLaMA, further
    python train.py --help                                  # every flag

Run the same command again to continue. The samples of a step are a function of the seed, the same for any
number of processes: the state of a run is weights, moments and a few counters."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import contextlib
import os
import sys

import torch

from model import Llama, LlamaConfig
from nanolost import checkpoint, dense_start, out_dir, run, shard, start
from nanolost.allocation import settle_allocation
from nanolost.budget import checkpoint_bytes, describe, describe_dense, describe_text
from nanolost.data import TokenDataset
from nanolost.errors import UserError
from nanolost.failures import failures_with_their_repair
from nanolost.flags import command, parse, say
from nanolost.job import Job, place
from nanolost.loop import Report, State, Validation
from nanolost.memory import describe_memory
from nanolost.methods import build_model
from nanolost.optim import freeze
from nanolost.settings import FIXED, Config, resolve, settle_device, split_batch
from nanolost.source import Source, remembered
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

def texts_of(config: Config, tokenizer: Tokenizer) -> run.Texts:
    """The training split in its order, and the validation text."""
    train = TokenDataset(config.data_dir, "train", config.seq_len)
    val = TokenDataset(config.data_dir, "val", config.seq_len)
    samples = val.samples_for(config.eval_tokens)
    validation = Validation.of(val, samples, config.micro_batch, tokenizer, config.vocab_size)
    if config.paper_batch:
        validation.paper = (config.paper_batch, config.eval_tokens)
    return run.Texts(train, validation, tokenizer, config.vocab_size, config.seed)

# --- a new run, or one that goes on ---

def first_shapes(config: Config, source: Source | None) -> Llama:
    """The model of step 0, on the meta device."""
    model = build_model(config, "meta") if source is None else source.build(config)
    freeze(model, config.freeze)
    return model

def settle_memory(model: Llama, config: Config, job: Job) -> Llama:
    """Give a model of shapes alone memory on this process's device, of --shard processes each a part."""
    if config.shard > 1:
        freeze(model, config.freeze)
        shard.split_model(model, shard.mesh_of(job, config.shard), getattr(torch, config.dtype))
    shard.make_room(model, job.device)
    return model

def prepare_out_dir(config: Config, texts: run.Texts, source: Source | None) -> str | None:
    """Rank 0's look at out_dir and at the data before anything is written: the folder of the checkpoint to
    continue from, None for a new run."""
    # what a killed run was to overwrite, and what a killed save left behind, which takes room
    out_dir.end_overwrite(config.out_dir)
    checkpoint.sweep(config.out_dir)
    shapes = first_shapes(config, source)
    out_dir.check_space(config.out_dir, config.keep, checkpoint_bytes(shapes, config.optimizer))
    texts.check(config)
    return out_dir.choose_checkpoint(config.out_dir, config.resume, config.overwrite)

def fresh(config: Config, job: Job, source: Source | None = None) -> State:
    """Step 0."""
    if source is not None and not source.converts:
        # each process reads what it holds
        model, _ = checkpoint.load_folder(source.folder, lambda model: settle_memory(model, config, job))
        return State.of(model, config)
    model = settle_memory(first_shapes(config, source), config, job)
    start.fill(model, source, config, job)
    return State.of(model, config)

def resumed(config: Config, job: Job, texts: run.Texts, folder: str, report: Report) -> tuple[State, dict]:
    """The state that the checkpoint `folder` holds, and what the run is now."""
    model, saved = checkpoint.load_folder(folder, lambda model: settle_memory(model, config, job))
    if "config" not in saved:
        raise UserError(f"{folder} has no training state to continue from: it is a model alone")
    now = run.go_on(saved["config"], config, texts, FIXED, job, report)
    report.say(f"continuing from {folder}")
    state = State.of(model, config)
    checkpoint.load_optimizer(folder, model, state.optimizers)
    state.restore(saved)
    return state, now

# --- the run ---

def dry_run(config: Config):
    """Print what the run would cost."""
    rank, world = place()
    world = config.world_size or world
    shard.check_shards(config.shard, world)
    source = Source.of(config)
    tokenizer = vocabulary(config)
    settle_allocation(config, source)
    config.micro_batch, accumulation = split_batch(config, world)
    # shapes only: 7b needs no memory either
    model = first_shapes(config, source)
    lines = describe(model, config, world, accumulation)
    # where the text is there, it must be one that the run itself would take
    if tokenizer is not None and os.path.isdir(config.data_dir):
        lines.append(describe_text(config, len(texts_of(config, tokenizer).train)))
    if config.linear != "dense":
        lines += describe_dense(model, config)
    if config.world_size or config.gpu_memory or config.shard > 1:
        lines += describe_memory(model, config, world)
    if rank == 0:
        say("\n".join(lines))

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
        job.exchanges(),
    ):
        run.check_alike(config, job)
        shard.check_shards(config.shard, job.world)
        source = Source.of(config)
        # read now: --overwrite may delete what the model comes from
        travelling = source.travelling() if source else {}
        config.micro_batch, accumulation = split_batch(config, job.world)
        # everything that can be refused is looked at before anything is written
        texts = texts_of(config, vocabulary(config))
        settle_allocation(config, source)
        job.claim(config.out_dir)
        out_dir.check_shared(config.out_dir, job)
        folder = job.first(lambda: prepare_out_dir(config, texts, source))

        if folder:
            state, now = resumed(config, job, texts, folder, report)
        else:
            now = run.start(config, texts, job)
            state = fresh(config, job, source)
        report.say("\n".join(describe(state.model, config, job.world, accumulation)))
        report.say(describe_text(config, len(texts.train)))
        if config.compile == "true":
            shard.compile_model(state.model)

        run.begin(state, folder, config, job, report, at_end)
        save = run.saver(state, now, texts, travelling, config, job, report)
        update = dense_start.updating(config, report)
        report.end(run.train(state, texts, config, job, report, save, update))

if __name__ == "__main__":
    command(lambda: main(resolve(remembered(parse(Config, sys.argv[1:], __doc__)))))
