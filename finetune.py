"""Fine-tune a LLaMA that is trained already, dense or with zeros that stay zeros.

    python finetune.py --ckpt FOLDER --data FILE.jsonl --out_dir OUT                     # LoRA, merged
    python finetune.py --ckpt FOLDER --data DIR --zeros 0.5 --out_dir OUT                # half of it zeros
    python finetune.py --ckpt FOLDER --data DIR --zeros 0.5 --method losa --out_dir OUT  # zeros by stages

Run the same command again to continue. Every checkpoint in OUT is a Hugging Face folder with the update
merged into the weights; what they are the sum of stands beside them, for the resume."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import contextlib
import dataclasses
import os
import sys
from typing import NamedTuple

import torch

from lost import LOSTError
from model import Llama
from nanolost import adapters, checkpoint, out_dir, run, tuning
from nanolost.budget import checkpoint_bytes, count, describe, describe_text
from nanolost.choices import Questions
from nanolost.covariance import linears
from nanolost.data import TokenDataset
from nanolost.errors import UserError, as_user_error
from nanolost.failures import failures_with_their_repair
from nanolost.flags import command, parse
from nanolost.huggingface import travelling_files
from nanolost.job import Job
from nanolost.lines import LineDataset
from nanolost.loop import Report, State, Validation, evaluate
from nanolost.masks import calibration_text
from nanolost.methods import merge_layers, special_layers
from nanolost.plans import Once, carry_out, plan_of
from nanolost.pruning import BY_CHANCE
from nanolost.settings import settle_device, split_batch
from nanolost.source import WINDOW, own_checkpoint
from nanolost.tuning import FIXED, METHODS, Config

# --- data ---

def training_text(config: Config, tokenizer, window: int) -> TokenDataset:
    """Windows of shards, or rows of lines; config.seq_len is what a sample has then."""
    if os.path.isdir(config.data):
        text = TokenDataset(config.data, "train", window)
    else:
        text = LineDataset(config.data, tokenizer, window)
    # rows are as long as the longest line, where that is less
    config.seq_len = text.seq_len
    return text

def validation_text(config: Config, tokenizer, window: int, rows: int) -> Validation | None:
    """The validation split of --eval_dir, or of --data where that is shards; None without either. window: of
    the model, where --data is lines."""
    place = config.eval_dir
    if place is None and os.path.isdir(config.data):
        place = config.data
    if place is None:
        return None
    data = TokenDataset(place, "val", window)
    samples = data.samples_for(config.eval_tokens)
    # as many tokens at a time as in training
    micro = max(1, config.micro_batch * config.seq_len // window)
    return Validation.of(data, samples, micro, tokenizer, rows)

def texts_of(config: Config, tokenizer, model: Llama, world: int) -> run.Texts:
    limit = model.config.max_seq_len
    window = config.seq_len or min(WINDOW, limit)
    if window > limit:
        raise UserError(f"--seq_len {window} is above the {limit} tokens that the model in {config.ckpt} was "
                        f"made for: use {limit} or less")
    train = training_text(config, tokenizer, window)
    if not os.path.isdir(config.data):
        # a resume knows how long the rows were, and nothing else
        window = min(WINDOW, limit)
    tuning.settle_batch(config, train, world)
    config.micro_batch, _ = split_batch(config, world)
    rows = model.config.vocab_size
    validation = validation_text(config, tokenizer, window, rows)
    texts = run.Texts(train, validation, tokenizer, rows, config.seed)
    texts.micro = config.micro_batch
    if config.eval is not None:
        texts.questions = Questions.read(config.eval, tokenizer, limit)
    if config.calibration_dir is not None:
        texts.others = [calibration_text(config, train, limit)]
    return texts

# --- the model ---

def plain_layers(model: Llama) -> list[str]:
    """Names of the blocks' linear layers that have one matrix."""
    return [name for name, layer in linears(model).items() if type(layer) is torch.nn.Linear]

def never_merges(model: Llama) -> bool:
    """Whether a layer has no single matrix."""
    activations = {getattr(layer, "activation", "none") for layer in special_layers(model).values()}
    return bool(activations - {"none"})

def check_layers(model: Llama, config: Config):
    """Merge LOST layers where the method needs matrices. UserError for those that SiLU keeps apart."""
    # such a model is its own update
    if config.method == "lost" and not plain_layers(model):
        tuning.check_no_new_update(config)
    # these two train them as they are
    if config.method in ("full", "lost") or not special_layers(model):
        return
    try:
        merge_layers(model)
    except UserError as e:
        raise UserError("this model is made of low-rank layers: use --method lost, which trains their "
                        f"factors and channels, or full ({e})") from None

def switches(config: Config) -> tuple[float, bool, str]:
    """Of every update: scale, whether it is under a mask, and what stands between its factors."""
    return config.alpha / config.rank, METHODS[config.method].update == "masked", config.activation

def train_own_updates(model: Llama, config: Config):
    """Layers that are low rank and channels already are their own update, to LOST."""
    if METHODS[config.method].update != "channels":
        return
    for layer in special_layers(model).values():
        layer.requires_grad_(True)
        # a whole matrix beside the factors is frozen as any other, with its zeros
        if "weight" in dict(layer.named_parameters(recurse=False)):
            layer.weight.requires_grad_(False)

def make_trained(model: Llama, config: Config):
    """Say which parameters are trained, and give frozen weights their updates, in place."""
    method = METHODS[config.method]
    names = plain_layers(model)
    # all, or only what comes beside them
    model.requires_grad_(method.update is None)
    if method.update is None:
        if method.masks:
            adapters.keep_zeros(model, names)
        return
    share = config.sparsity if method.update == "channels" else 0
    scale, masked, activation = switches(config)
    adapters.put_updates(model, names, config.rank, scale, masked, share, activation)
    # a rank that the model's sizes forbid
    with as_user_error(LOSTError, prefix=f"--method {config.method}: "):
        adapters.draw_updates(model, config.seed)
    train_own_updates(model, config)

def resumed(model: Llama, folder: str, config: Config, job: Job) -> State:
    """The state that the checkpoint `folder` holds; model: the merged one in there."""
    if METHODS[config.method].update is None:
        make_trained(model, config)
    else:
        # as `make_trained`, with the updates that were saved
        model.requires_grad_(False)
        checkpoint.load_parts(folder, model, *switches(config))
        train_own_updates(model, config)
    return State.of(model.to(job.device), config)

# --- the run ---

def prepare_out_dir(config: Config, texts: run.Texts, model: Llama) -> str | None:
    """Rank 0's look at out_dir and at the data before anything is written: the folder of the checkpoint to
    continue from, None for a new run."""
    out_dir.end_overwrite(config.out_dir)
    checkpoint.sweep(config.out_dir)
    # the weights twice, merged and apart, and moments of what is trained
    out_dir.check_space(config.out_dir, config.keep, 2 * checkpoint_bytes(model, config.optimizer))
    texts.check(config)
    return out_dir.choose_checkpoint(config.out_dir, config.resume, config.overwrite)

def warn(config: Config, there: float, beside: float, report: Report):
    """Say what a run will do to the zeros of its folder, before it starts. there: their share of the
    matrices; beside: of those that have factors beside them."""
    if there > BY_CHANCE and not METHODS[config.method].masks:
        report.say(f"warning: the folder's matrices are {there:.1%} zeros, which --method {config.method} "
                   "fills: --method masked-lora keeps them")
    # the others train them all, or merge them
    if beside > BY_CHANCE and config.method != "lost":
        report.say(f"warning: the matrices beside factors are {beside:.1%} zeros, which --method "
                   f"{config.method} fills: --method lost trains the factors alone")

@torch.no_grad()
def say_rounding(state: State, texts: run.Texts, dtype: str, job: Job, report: Report):
    """What the source's dtype costs the merged weights, which a checkpoint holds in float32."""
    if dtype == "float32" or texts.validation is None or report.val_loss is None:
        return
    whole = adapters.merged(state.model)
    tensors = whole.state_dict()
    for name, tensor in tensors.items():
        # channels are whole numbers
        if tensor.is_floating_point():
            tensors[name] = tensor.to(getattr(torch, dtype)).float()
    # new tensors: those without an update are the model's own
    whole.load_state_dict(tensors, assign=True)
    whole.tie_head()
    found = evaluate(whole, texts.validation, state.autocast, job)
    if found is not None:
        report.say(f"rounded to {dtype}, as {report.config.ckpt} has its weights (export.py --save_dtype "
                   f"{dtype}): val loss {found['val_loss']:.4f} ({found['val_loss'] - report.val_loss:+.4f})")

def start(
    source: str, model: Llama, config: Config, texts: run.Texts, plan: Once, job: Job
) -> tuple[State, dict]:
    """State and identity of a new run, before zeros are chosen."""
    plan.check()
    now = run.start(config, texts, job)
    now["stage_steps"] = plan.firsts
    now["source_dtype"] = str(checkpoint.weights_dtype(source)).removeprefix("torch.")
    model.to(job.device)
    make_trained(model, config)
    return State.of(model, config), now

class Opened(NamedTuple):
    """What a run begins with. source: the folder of `model` and its state.json, `saved`; there, beside: its
    shares of zeros, as `warn` takes them."""

    source: str
    model: Llama
    saved: dict
    there: float
    beside: float
    texts: run.Texts
    plan: Once

def go_on(folder: str, found: Opened, config: Config, job: Job, report: Report) -> tuple:
    """State and identity of the run that the checkpoint `folder` belongs to, and the number of its stage."""
    source, model, saved, _, _, texts, plan = found
    # a run of train.py, or one that has saved since
    if folder != source:
        model, saved = checkpoint.load_folder(folder)
    if "config" not in saved:
        raise UserError(f"{folder} has no training state to continue from: it is a model alone")
    if "stage_steps" not in saved["config"]:
        raise UserError(f"{folder} belongs to a run of train.py: use another --out_dir, and give this one to "
                        "--ckpt")
    now = run.go_on(saved["config"], config, texts, FIXED, job, report)
    for name in ("stage_steps", "source_dtype"):
        now[name] = saved["config"][name]
    plan.keep(now["stage_steps"])
    report.say(f"continuing from {folder}")
    state = resumed(model, folder, config, job)
    number = plan.firsts.index(saved["began"])
    plan.reenter(number, state)
    checkpoint.load_optimizer(folder, state.model, state.optimizers)
    state.restore(saved)
    return state, now, number

def begun(config: Config, job: Job) -> tuple[str | None, dict]:
    """The newest good checkpoint of the run in out_dir, and its settings; (None, {}) where none has begun."""
    own, _ = own_checkpoint(config.out_dir, config.resume, "ckpt")
    if own is None:
        return None, {}
    home = config.out_dir if config.resume == "auto" else config.resume
    # a damaged one is passed over before anything is read from it
    good = job.first(lambda: checkpoint.checkpoint_folder(home))
    return own_checkpoint(config.out_dir, good, "ckpt")

def opened(config: Config, job: Job, at_end: contextlib.ExitStack) -> Opened:
    """Read model and texts, and choose what depends on them. UserError for all that does not go together."""
    tuning.settle_paths(config)
    # a run that goes on knows what it chose, and has its model
    own, before = begun(config, job)
    tuning.remember(config, before)
    source = own or checkpoint.checkpoint_folder(config.ckpt)
    model, tokenizer, saved = checkpoint.load_with_tokenizer(source)
    there = adapters.share_of_zeros(model)
    # before they may be merged
    beside = adapters.share_beside_factors(model)
    if own is None:
        tuning.settle_zeros(config, there, never_merges(model))
    check_layers(model, config)
    texts = texts_of(config, tokenizer, model, job.world)
    plan = plan_of(config, model, texts, job, there, at_end)
    return Opened(source, model, saved, there, beside, texts, plan)

def describe_run(model: Llama, config: Config, texts: run.Texts, plan: Once, job: Job) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _, accumulation = split_batch(config, job.world)
    whole = dataclasses.replace(config, steps=plan.steps)
    lines = describe(model, whole, job.world, accumulation)
    lines.append(f"trained     {trained:,} parameters, by --method {config.method}")
    if METHODS[config.method].masks:
        stages = count(len(plan.firsts), "stage", "stages")
        lines.append(f"zeros       {config.zeros:.2%} of the blocks' matrices, in {stages}")
    lines.append(describe_text(config, len(texts.train)))
    train = texts.train
    if isinstance(train, LineDataset):
        lines.append(f"lines       rows of {train.seq_len} tokens; {train.cut:,} prompts lost their "
                     f"beginning, {train.unfinished:,} completions their end")
    return "\n".join(lines)

def main(config: Config):
    """Fine-tune as `config` (from `tuning.resolve`) says. Returns when the run is finished, or stopped by a
    signal."""
    config = settle_device(config)
    with (
        Job.start(config) as job,
        contextlib.ExitStack() as at_end,
        Report(config, job) as report,
        failures_with_their_repair(),
    ):
        run.check_alike(config, job)
        found = opened(config, job, at_end)
        source, model, _, there, beside, texts, plan = found
        # what was chosen, and steps of all stages
        report.config = dataclasses.replace(config, steps=plan.steps)
        if config.dry_run:
            make_trained(model, config)
            return report.say(describe_run(model, config, texts, plan, job))
        # read now: --overwrite may delete what the model comes from
        travelling = travelling_files(source)
        job.claim(config.out_dir)
        out_dir.check_shared(config.out_dir, job)
        folder = job.first(lambda: prepare_out_dir(config, texts, model))

        if folder:
            state, now, number = go_on(folder, found, config, job, report)
        else:
            state, now = start(source, model, config, texts, plan, job)
            number = -1
            warn(config, there, beside, report)
        report.say(describe_run(state.model, config, texts, plan, job))
        if config.compile == "true":
            state.model.compile()

        run.begin(state, folder, config, job, report, at_end)
        save = run.saver(state, now, texts, travelling, config, job, report)
        stopped = carry_out(plan, state, number, report, save)
        if not stopped:
            say_rounding(state, texts, now["source_dtype"], job, report)
        report.end(stopped)
        if not stopped:
            folder = checkpoint.checkpoints(config.out_dir)[-1]
            report.say(f"transformers loads {folder}; python export.py --ckpt {config.out_dir} --out_dir "
                       "MODEL makes a folder to hand on")

if __name__ == "__main__":
    command(lambda: main(tuning.resolve(parse(Config, sys.argv[1:], __doc__))))
