"""How a fine-tuning is cut into stages: what begins each, and which function makes an update.

    Once      one stage; zeros are chosen before its first step, where the folder lacks some
    Halves    one for each half of each block (refit.py)
    Stages    LoSA's (losa.py decides, staging.py looks)

A stage begins with fresh optimizers and a warm-up of its own. Which one a checkpoint is in is told by the
step at which its optimizers began: nothing else is kept."""
import dataclasses
import math
import os

import numpy as np

from model import Llama, generator_of
from nanolost import adapters, checkpoint, losa, masks, pruning, run, staging, tuning
from nanolost.calibration import calibration_windows, key_of, statistics_of, temporary_folder
from nanolost.covariance import linears, place_of
from nanolost.errors import UserError
from nanolost.files import read_json
from nanolost.job import Job, Stopped
from nanolost.loop import Report, State, evaluate, update
from nanolost.methods import merge_layers
from nanolost.refit import Refit, parts_of
from nanolost.settings import split_batch
from nanolost.tuning import METHODS, Config

# M of --pattern mixed:8
MIXED = 8

# --- the model that is aimed at ---

def dense_folder(config: Config) -> str:
    """Folder of the model whose outputs are aimed at: --dense, else what compress.py made --ckpt of, else
    --ckpt itself."""
    folder = checkpoint.checkpoint_folder(config.ckpt)
    if config.dense is not None:
        return checkpoint.checkpoint_folder(config.dense)
    report = os.path.join(folder, "report.json")
    if not os.path.exists(report):
        return folder
    place = read_json(report).get("ckpt")
    if not isinstance(place, str) or not os.path.isdir(place):
        raise UserError(f"{report} says that the model was made of {place!r:.80}, which is not here: name "
                        "the dense model by --dense")
    return checkpoint.checkpoint_folder(place)

def load_dense(config: Config, model: Llama) -> tuple[Llama, str]:
    """The model that is aimed at, its layers plain, and its folder. UserError for one that is not of the
    sizes of `model`."""
    folder = dense_folder(config)
    dense, _ = checkpoint.load_folder(folder)
    if dense.config != model.config:
        raise UserError(f"{folder} has other sizes than {config.ckpt}: name the dense model by --dense")
    merge_layers(dense)
    return dense.requires_grad_(False), folder

# --- plans ---

class Once:
    """firsts: the first step of each stage. steps: of all stages. update: makes one. there: the share of
    zeros that the folder has. at_end: for what must last as long as the run."""

    firsts = [0]
    update = staticmethod(update)

    def __init__(self, config: Config, texts: run.Texts, job: Job, there: float, at_end):
        self.config = config
        self.texts = texts
        self.job = job
        self.there = there
        self.at_end = at_end
        self.steps = config.steps

    def keep(self, firsts: list[int]):
        """Have the stages that an earlier start made: a longer run has a longer last one. UserError for a run
        that would end before that."""
        last = firsts[-1]
        if self.steps <= last:
            raise UserError(f"--steps {self.config.steps}: the last of this run's {len(firsts)} stages "
                            f"begins after step {last}; use {last + 1} or more")
        self.firsts = firsts

    def enter(self, number: int, state: State) -> dict:
        """Begin the stage `number`, from 0; what metrics.jsonl is to say of it."""
        found = {}
        if self.lacks():
            found = self.before(state)
            self.choose(state)
        share = adapters.share_of_zeros(state.model)
        return {**found, "zeros": share}

    def lacks(self) -> bool:
        """Whether zeros are to be chosen."""
        config = self.config
        if not METHODS[config.method].masks:
            return False
        # whether the zeros that are there have the pattern is for the choice to see
        return config.pattern != "unstructured" or config.zeros > self.there + tuning.NEAR

    def check(self):
        """UserError for what a first stage would refuse, before out_dir is touched."""

    def reenter(self, number: int, state: State):
        """The same of a state that has begun the stage already."""

    def before(self, state: State) -> dict:
        """The loss of the model without the zeros that are about to come."""
        if self.texts.validation is None:
            return {}
        found = evaluate(state.model, self.texts.validation, state.autocast, self.job)
        # asked to stop: the loop will see to that
        if found is None:
            return {}
        self.job.say(f"before new zeros | val loss {found['val_loss']:.4f} | perplexity "
                     f"{found['val_ppl']:.2f}")
        return {"dense_loss": found["val_loss"]}

    def choose(self, state: State):
        """By process 0; the others get what it has found."""
        model = state.model
        text = masks.calibration_text(self.config, self.texts.train, model.config.max_seq_len)
        folder = checkpoint.checkpoint_folder(self.config.ckpt)
        def put():
            masks.put_zeros(model, self.config, folder, text, self.job.device, state.autocast)
        # minutes, in which nothing is trained that could be lost
        self.job.first(put, at_once=True)
        for layer in linears(model).values():
            self.job.broadcast(layer.weight.data, 0)

class Halves(Once):
    def __init__(self, *given):
        super().__init__(*given)
        self.refit = None

    def cut(self, model: Llama):
        """Into as many stages as the model has halves, of --steps updates each."""
        steps = self.config.steps
        parts = parts_of(model)
        self.firsts = [part * steps for part in range(parts)]
        self.steps = parts * steps

    def keep(self, firsts: list[int]):
        """As `Once.keep`; but what a half was trained with, the next one has looked at."""
        if firsts != self.firsts:
            raise UserError(f"--steps was {firsts[1]} for each half of a block when this run began, and is "
                            f"{self.config.steps} now: give the old value, or use another --out_dir")

    def check(self):
        """UserError where the model would be its own aim, too."""
        super().check()
        config = self.config
        own = checkpoint.checkpoint_folder(config.ckpt)
        if dense_folder(config) == own and not self.lacks():
            raise UserError(f"--method refit: {config.ckpt} has its zeros already, and nothing says which "
                            "dense model to aim at: name it by --dense")

    def begin(self, state: State):
        """Before the first half."""
        config, job = self.config, self.job
        dense, _ = load_dense(config, state.model)
        dense.to(job.device)
        windows = self.windows()[:, :, job.rank]
        self.refit = Refit(state.model, dense, self.texts.train, windows, state.autocast, job.device)
        self.update = self.refit.update

    def windows(self) -> np.ndarray:
        """Numbers of the samples that each half reads, (steps, micro-batches, processes, samples)."""
        _, accumulation = split_batch(self.config, self.job.world)
        shape = (self.config.steps, accumulation, self.job.world, self.config.micro_batch)
        every = np.arange(math.prod(shape))
        return self.texts.order[every].reshape(shape)

    def enter(self, number: int, state: State) -> dict:
        found = {}
        if number == 0:
            found = super().enter(number, state)
            self.begin(state)
        self.refit.advance()
        state.restart(self.config)
        return found

    def reenter(self, number: int, state: State):
        self.begin(state)
        # through the halves that are done
        for _ in range(number + 1):
            self.refit.advance()
        state.restart(self.config)

class Stages(Once):
    """More zeros at the start of each stage, and ranks of the updates with them."""

    def __init__(self, *given):
        super().__init__(*given)
        config = self.config
        self.firsts = losa.stage_steps(config.steps, config.stages)
        self.shares = losa.stage_zeros(config.zeros, config.stages)
        self.means = losa.stage_ranks(config.rank, config.stages)
        # what rank 0 looks at, once it is needed
        self.masking = None

    def look(self, state: State) -> staging.Masking:
        """The dense model's outputs, and its statistics where they weigh zeros; kept until the run ends."""
        config, device = self.config, self.job.device
        text = masks.calibration_text(config, self.texts.train, state.model.config.max_seq_len)
        dense, folder = load_dense(config, state.model)
        dense.to(device)
        # the other methods look at inputs alone
        gradients = config.gradient_tokens if config.masks in staging.TOGETHER else 0
        windows = calibration_windows(text, config.seed, config.calibration_tokens, gradients, device)
        need = masks.spooled(windows, dense) + staging.dense_bytes(dense, windows)
        home = self.at_end.enter_context(temporary_folder(need))
        statistics = None
        if gradients:
            key = key_of(config, folder, text)
            statistics = statistics_of(dense, windows, config.statistics, key, home, state.autocast)
        outputs = staging.dense_outputs(dense, windows, home, state.autocast)
        return staging.Masking(
            model=state.model,
            method=config.masks,
            texts=windows,
            dense=outputs,
            statistics=statistics,
            folder=home,
            device=device,
            context=state.autocast,
            effective_of=adapters.Update.effective,
            put=adapters.Update.rebase,
        )

    def rates(
        self, importances: list[float], target: float, floors: list[float], model: Llama
    ) -> list[float]:
        """The share of zeros of each block, which has a share of `floors` already."""
        sizes = staging.sizes_of(model)
        if self.config.rates == "cka":
            return losa.rates(importances, target, floors, sizes)
        share = losa.level(target, floors, sizes)
        return [max(floor, share) for floor in floors]

    def stage(self, number: int, state: State) -> list[int]:
        """Choose the zeros of a stage; the rank of each block's updates."""
        if self.masking is None:
            self.masking = self.look(state)
        model, config = state.model, self.config
        grams = staging.similarities(model, self.masking.texts, state.autocast)
        importances = losa.importances(losa.cka(grams))
        target = self.shares[number]
        floors = staging.zeros_of(model, adapters.Update.effective)
        rates = self.rates(importances, target, floors, model)
        patterns = self.patterns(importances, target, floors)
        _, errors = staging.choose_zeros(self.masking, rates, patterns)
        if config.ranks == "uniform":
            errors = [1.0] * len(errors)
        mean = self.means[number]
        # the paper's 16 at a mean of 8; many stages end above twice a small --rank
        most = max(2 * config.rank, math.ceil(mean))
        return losa.ranks(errors, mean, most)

    def patterns(
        self, importances: list[float], target: float, floors: list[float]
    ) -> list[pruning.Pattern] | None:
        """N:M of each block, None without a pattern."""
        blocks = len(importances)
        known = pruning.pattern_of(self.config.pattern)
        if known:
            return [known] * blocks
        if self.config.pattern == "unstructured":
            return None
        # N of a block can only fall: what its zeros allow
        most = [round(MIXED * (1 - floor)) for floor in floors]
        chosen = losa.patterns_mixed(importances, MIXED, target, most)
        return [(n, MIXED) for n in chosen]

    def enter(self, number: int, state: State) -> dict:
        found = {}
        if number == 0:
            found = self.before(state)
        # later ones would lose what is trained
        ranks = self.job.first(lambda: self.stage(number, state), at_once=number == 0)
        for name, layer in adapters.updates(state.model).items():
            self.job.broadcast(layer.weight.data, 0)
            block, _ = place_of(name)
            layer.to_rank(ranks[block], generator_of(self.config.seed, f"{name} {number}"))
        state.restart(self.config)
        return {**found, "zeros": adapters.share_of_zeros(state.model), "ranks": ranks}

# --- the run ---

def plan_of(config: Config, model: Llama, *given) -> Once:
    method = METHODS[config.method]
    if method.staged:
        return Stages(config, *given)
    if method.blockwise:
        plan = Halves(config, *given)
        plan.cut(model)
        return plan
    return Once(config, *given)

def carry_out(plan: Once, state: State, number: int, report: Report, save) -> str:
    """Stage after stage, from the one after `number` on, -1 for the first, which the state has begun; until
    the last step or a signal, as `run.train`."""
    config, texts, job = plan.config, plan.texts, plan.job
    ends = [*plan.firsts[1:], plan.steps]
    while True:
        if number >= 0:
            steps = ends[number] - plan.firsts[number]
            stage = dataclasses.replace(config, steps=steps, warmup=config.ramp(steps))
            stopped = run.train(state, texts, stage, job, report, save, plan.update, plan.steps)
            if stopped or state.step >= plan.steps:
                return stopped
        number += 1
        try:
            found = plan.enter(number, state)
        except Stopped as signal:
            return str(signal)
        if found:
            report.record("stage", stage=number + 1, **found)
        if found and METHODS[config.method].masks:
            report.say(f"zeros       {found['zeros']:.2%} of the blocks' matrices from here on")
        # what the zeros alone cost
        if number == 0 and not run.assess(state, texts, job, report):
            return job.stop_reason()
