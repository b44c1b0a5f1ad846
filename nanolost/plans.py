"""How a fine-tuning is cut into stages: what begins each, and which function makes an update.

    Once      one stage; zeros are chosen before its first step, where the folder lacks some
    Halves    one for each half of each block (refit.py)
    Stages    LoSA's (losa.py decides, staging.py looks)

A stage begins with fresh optimizers and a warm-up of its own. Which one a checkpoint is in is told by the
step at which its optimizers began: nothing else is kept."""
import dataclasses
import os

import numpy as np

from model import Llama, generator_of
from nanolost import adapters, checkpoint, losa, masks, pruning, run, staging, tuning
from nanolost.calibration import key_of, statistics_of, temporary_folder
from nanolost.covariance import linears, place_of
from nanolost.errors import UserError
from nanolost.files import read_json
from nanolost.job import Job
from nanolost.loop import Report, State, evaluate, update
from nanolost.methods import merge_layers
from nanolost.refit import Refit, parts_of
from nanolost.settings import split_batch
from nanolost.tuning import METHODS, Config

# M of --pattern mixed:8
MIXED = 8

# --- the model that is aimed at ---

def load_dense(config: Config) -> tuple[Llama, str]:
    """The model whose outputs are aimed at, its layers plain, and its folder."""
    folder = checkpoint.checkpoint_folder(config.ckpt)
    place = config.dense
    if place is None:
        # what compress.py made it of
        report = os.path.join(folder, "report.json")
        place = read_json(report).get("ckpt", folder) if os.path.exists(report) else folder
    folder = checkpoint.checkpoint_folder(place)
    model, _ = checkpoint.load_folder(folder)
    merge_layers(model)
    return model.requires_grad_(False), folder

def check_alike(dense: Llama, model: Llama, config: Config):
    """UserError for a --dense of other sizes."""
    if dense.config != model.config:
        raise UserError(f"the model to aim at has other sizes than {config.ckpt}: name another by --dense")

# --- plans ---

class Once:
    """firsts: the first step of each stage. steps: of all stages. there: the share of zeros that the folder
    has. at_end: for what must last as long as the run."""

    firsts = [0]
    update = staticmethod(update)

    def __init__(self, config: Config, texts: run.Texts, job: Job, there: float, at_end):
        self.config = config
        self.texts = texts
        self.job = job
        self.there = there
        self.at_end = at_end
        self.steps = config.steps

    def enter(self, number: int, state: State) -> dict:
        """Begin the stage `number`, from 0; what metrics.jsonl is to say of it."""
        method = METHODS[self.config.method]
        if not method.masks:
            return {"zeros": self.there}
        if self.config.zeros <= self.there + tuning.NEAR and self.config.pattern == "unstructured":
            return {"zeros": self.there}
        found = self.before(state)
        self.choose(state)
        return {**found, "zeros": adapters.share_of_zeros(state.model)}

    def reenter(self, number: int, state: State):
        """The same of a state that has begun the stage already."""

    def before(self, state: State) -> dict:
        """The loss of the model without the zeros that are about to come."""
        if self.texts.validation is None:
            return {}
        found = evaluate(state.model, self.texts.validation, state.autocast, self.job)
        if found is None:
            return {}
        self.job.say(f"before zeros | val loss {found['val_loss']:.4f} | perplexity {found['val_ppl']:.2f}")
        return {"dense_loss": found["val_loss"]}

    def choose(self, state: State):
        model = state.model
        text = masks.calibration_text(self.config, self.texts.train, model.config.max_seq_len)
        folder = checkpoint.checkpoint_folder(self.config.ckpt)
        def put():
            masks.put_zeros(model, self.config, folder, text, self.job.device, state.autocast)
        self.job.first(put)
        for layer in linears(model).values():
            self.job.broadcast(layer.weight.data, 0)

class Halves(Once):
    def __init__(self, *given):
        super().__init__(*given)
        self.refit = None

    def cut(self, model: Llama):
        """Into as many stages as the model has halves."""
        steps = self.config.steps
        parts = parts_of(model)
        self.firsts = [part * steps for part in range(parts)]
        self.steps = parts * steps

    def begin(self, state: State):
        dense, _ = load_dense(self.config)
        dense.to(self.job.device)
        check_alike(dense, state.model, self.config)
        _, accumulation = split_batch(self.config, self.job.world)
        shape = (self.config.steps, accumulation, self.job.world, self.config.micro_batch)
        windows = self.texts.order[np.arange(int(np.prod(shape)))].reshape(shape)
        mine = windows[:, :, self.job.rank]
        self.refit = Refit(state.model, dense, self.texts.train, mine, state.autocast, self.job.device)
        self.update = self.refit.update

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
        # N of each block's pattern so far
        self.most = ()

    def look(self, state: State) -> staging.Masking:
        """The dense model's outputs, and its statistics where they weigh zeros; kept until the run ends."""
        config, device = self.config, self.job.device
        text = masks.calibration_text(config, self.texts.train, state.model.config.max_seq_len)
        dense, folder = load_dense(config)
        dense.to(device)
        check_alike(dense, state.model, config)
        gradients = config.gradient_tokens
        if config.masks in staging.ALONE:
            gradients = 0
        windows = masks.windows_of(text, config, config.calibration_tokens, gradients, device)
        need = masks.spooled(config, dense) + staging.dense_bytes(dense, windows)
        home = self.at_end.enter_context(temporary_folder(need))
        statistics = None
        if gradients:
            key = key_of(config, folder, text)
            statistics = statistics_of(dense, windows, config.statistics, key, home, state.autocast)
        outputs = staging.dense_outputs(dense, windows, home, state.autocast)
        return staging.Masking(state.model, config.masks, windows, outputs, statistics, home, device,
                               state.autocast, adapters.Update.effective, adapters.Update.rebase)

    def stage(self, number: int, state: State) -> list[int]:
        """Choose the zeros of a stage; the rank of each block's updates."""
        if self.masking is None:
            self.masking = self.look(state)
        model, config = state.model, self.config
        importances = [1.0] * model.config.n_layer
        if config.rates == "cka":
            grams = staging.similarities(model, self.masking.texts, state.autocast)
            importances = losa.importances(losa.cka(grams))
        floors = staging.zeros_of(model, adapters.Update.effective)
        sizes = staging.sizes_of(model)
        target = self.shares[number]
        rates = losa.rates(importances, target, floors, sizes)
        if config.rates == "uniform":
            share = losa.level(target, floors, sizes)
            rates = [max(floor, share) for floor in floors]
        _, errors = staging.choose_zeros(self.masking, rates, self.patterns(importances, target))
        if config.ranks == "uniform":
            errors = [1.0] * len(errors)
        return losa.ranks(errors, self.means[number], 2 * config.rank)

    def patterns(self, importances: list[float], target: float) -> list[pruning.Pattern] | None:
        """N:M of each block, None without a pattern."""
        blocks = len(importances)
        known = pruning.pattern_of(self.config.pattern)
        if known:
            return [known] * blocks
        if self.config.pattern == "unstructured":
            return None
        # N of a block can only fall
        self.most = losa.patterns_mixed(importances, MIXED, target, self.most)
        return [(n, MIXED) for n in self.most]

    def enter(self, number: int, state: State) -> dict:
        found = self.before(state) if number == 0 else {}
        ranks = self.job.first(lambda: self.stage(number, state))
        for name, layer in adapters.updates(state.model).items():
            for tensor in (layer.weight, layer.A, layer.B):
                self.job.broadcast(tensor.data, 0)
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
        found = plan.enter(number, state)
        if found:
            report.record("stage", stage=number + 1, **found)
        # what the zeros alone cost
        if number == 0 and not run.assess(state, texts, job, report):
            return job.stop_reason()
