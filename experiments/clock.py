"""How long the rows of experiments/finetuning.py will take, before any is run."""
import os
import time
from dataclasses import dataclass

import torch

from experiments import recipes, sst2
from experiments.recipes import ROWS, Config, experiment
from experiments.runs import chosen
from experiments.tables import markdown
from nanolost import estimate, tuning
from nanolost.covariance import linears
from nanolost.flags import say
from nanolost.threads import use_threads

# operations of an update over those of a forward pass, 2 a weight and token: backward through the
# activations, and through the weights where they are trained or masked
PASSES = {"full": 3, "masked-full": 3, "refit": 3, "masked-lora": 2.7, "losa": 2.7, "lora": 2.2, "lost": 2.3}

@dataclass
class Clock:
    """Seconds of one thread, counted from the model's sizes and the rate of this machine."""

    model: torch.nn.Module
    rates: estimate.Rates

    def forward(self, tokens: int) -> float:
        weights = sum(layer.weight.numel() for layer in linears(self.model).values())
        return 2 * tokens * (weights + self.model.lm_head.weight.numel()) / self.rates.single

    def zeros(self, method: str, tokens: int, known: bool) -> float:
        """Of compress.py; known: whether its statistics are there."""
        counts = estimate.counts_of(self.model)
        seconds = 0.0
        if not known:
            seconds += estimate.statistics_seconds(self.model, counts, tokens, tokens, self.rates)
        if method in ("sparsegpt", "fisher"):
            seconds += estimate.walk_seconds(counts, self.rates)
        if method == "fisher":
            seconds += estimate.splitting_seconds(counts, self.rates)
        return seconds

    def run(self, config: Config, row: str) -> float:
        """Of one run of a row, with its two evaluations."""
        if row in sst2.ROWS:
            text = sst2.texts(config)
            lines = sst2.BATCH * sst2.updates(config)
            passes = PASSES[sst2.ROWS[row]["method"]]
            # prompts are shorter than the longest
            return self.forward(int(text.seq_len * (passes * lines + 2 * 0.7 * config.sst2_dev)))
        recipe = ROWS[row].recipe
        trained = recipes.steps_of(config, row) * recipes.common(config)["batch_tokens"]
        seconds = PASSES[recipe.method] * self.forward(trained) + 2 * self.forward(config.eval_tokens)
        if recipe.method == "losa":
            seconds += self.stages(config, recipe.flags)
        return seconds

    def stages(self, config: Config, flags: dict) -> float:
        """Of what LoSA looks at."""
        stages = flags.get("stages", tuning.Config.stages)
        # the dense outputs once; in each stage the similarities, the covariances and the blocks anew
        seconds = (3 * stages + 1) * self.forward(config.losa_tokens)
        if flags["masks"] == "fisher":
            seconds += stages * self.zeros("fisher", 0, True)
        # the loss before there are zeros
        return seconds + self.forward(config.eval_tokens)

def rates_of_a_core() -> estimate.Rates:
    """At which one core multiplies, whoever else computes on it now."""
    use_threads(1)
    wall = time.perf_counter()
    own = time.process_time()
    found = estimate.rates(torch.device("cpu"))
    share = (time.process_time() - own) / (time.perf_counter() - wall)
    return estimate.Rates(*(rate / share for rate in found))

def left_of(config: Config, row: str) -> int:
    """Runs that a row has yet to do."""
    found = sst2.experiment(config) if row in sst2.ROWS else experiment(config)
    missing = sum(loss is None for loss in found.sweep(row).values())
    # the first is one of the sweep
    others = max(0, config.seeds - max(1, len(found.results(row))))
    return missing + others

def zeros_left(config: Config, rows: list[str]) -> dict[str, tuple[str, bool]]:
    """The rows that make zeros for themselves and others, with the method, and whether its statistics are
    there."""
    place = recipes.statistics_of(config, config.tokens, 0)
    collected = os.path.exists(os.path.join(place, "statistics.json"))
    found = {}
    made = set()
    for row in rows:
        # rows on SST-2 have none
        recipe = ROWS[row].recipe if row in ROWS else None
        if recipe is None or not recipe.zeros or recipes.report_of(config, row) is not None:
            continue
        folder = recipes.zeros_folder(config, recipe.zeros, ROWS[row].share)
        if folder not in made:
            made.add(folder)
            found[row] = (recipe.zeros, collected)
            collected = True
    return found

def plan(config: Config):
    """Print what `run` would do, in core-minutes."""
    clock = Clock(sst2.shapes(config.ckpt), rates_of_a_core())
    rows = chosen(config, recipes.known_rows(config))
    making = zeros_left(config, rows)
    lines = []
    total = 0.0
    for row in rows:
        zeros = 0.0
        if row in making:
            method, collected = making[row]
            zeros = clock.zeros(method, config.tokens, collected)
        count = left_of(config, row)
        each = clock.run(config, row)
        seconds = zeros + count * each
        total += seconds
        minutes = [f"{value / 60:.1f}" for value in (zeros, each, seconds)]
        lines.append([row, minutes[0], count, *minutes[1:]])
    head = ["row", "zeros, minutes", "runs left", "of a run", "core-minutes"]
    say(markdown(head, lines))
    say(f"about {total / 3600:.1f} core-hours, without eval.py's and the test questions")
