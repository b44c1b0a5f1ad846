"""LOST and dense at equal training FLOPs: tuned on both sides, paired seeds, three lengths.

    python experiments/isoflop.py plan      # what is still to be trained, in core-minutes
    python experiments/isoflop.py run       # trains it
    python experiments/isoflop.py table     # [--fill docs/experiments.md]
    python experiments/isoflop.py figure    # the gap to dense against updates
    python experiments/isoflop.py fit       # loss against FLOPs of both kinds [--fill docs/experiments.md]

`run` goes on from what --results and the runs' folders hold, and any number of processes may share it: each
run is locked while it trains, and on a common disk they take what the others leave. Machines without one take
different --only, and their lines are put together. experiments/arms.py has the arms, experiments/stages.py
the order of the runs, experiments/gaps.py the rule by which a difference counts, experiments/answers.py the
tables."""
import os
import sys

# this file is started by its path, so that Python looks for modules beside it only
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import importlib.metadata
import json
import math
import statistics
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

# first of ours: it imports nanolost before torch
from experiments import answers, arms
from experiments.arms import ROWS, Config, Trial, name_of
from experiments.gaps import Results, losses, results, trial_of
from experiments.runs import Processes, drive, revision, some
from experiments.stages import Stages, check
from experiments.tables import markdown
from nanolost.errors import UserError
from nanolost.files import claim, read_json, write_atomic
from nanolost.flags import say

# FLOPs a second of one core, before a run has told
SPEED = 0.14e12

# --- what a run leaves ---

def epochs(config: Config, tokens: int) -> float | None:
    """How often a run has read its text; None for shards without a manifest."""
    path = os.path.join(config.data_dir, "manifest.json")
    if not os.path.exists(path):
        return None
    total = 0
    for shard in read_json(path)["shards"]:
        if shard["split"] == "train":
            total += shard["tokens"]
    return tokens / total

def line_of(config: Config, trial: Trial, commit: str | None) -> dict:
    """All that tables and figures need of a finished run, for good."""
    run = arms.run_of(config, trial)
    line = {
        **trial._asdict(),
        "commit": commit,
        "torch": importlib.metadata.version("torch"),
        "updates": arms.updates(config, trial),
        "flops": arms.total_flops(config, trial),
        **run.summary(),
    }
    # means over layers, which no table here has
    line.pop("layers", None)
    if "diverged" in line:
        return line
    # at the median speed: without the start, the evaluations and what a kill cost
    line["seconds"] = line["tokens"] / line["tokens_per_second"]
    line["epochs"] = epochs(config, line["tokens"])
    line["curve"] = [[entry["step"], entry["val_loss"]] for entry in run.records("eval")]
    return line

def keep(config: Config, line: dict):
    """Add a line to --results, which several processes may want to do at once."""
    folder = os.path.dirname(os.path.abspath(config.results))
    os.makedirs(folder, exist_ok=True)
    with patient_claim(os.path.join(config.out_dir, "locks", "results")):
        found = results(config)
        found[trial_of(line)] = line
        lines = [json.dumps(one, ensure_ascii=False) for one in found.values()]
        write_atomic(config.results, ("\n".join(lines) + "\n").encode())

def patient_claim(folder: str):
    """`claim` that waits for a lock which nobody keeps for long."""
    while True:
        try:
            return claim(folder, "writes results")
        except UserError:
            time.sleep(0.05)

# --- the queue ---

class Queue(Processes):
    """Several threads, each of which takes the first run that nobody has."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # whose runs are trained here
        self.own = some(config.only, ROWS, "--only")

    def pending(self) -> list[Trial]:
        found = losses(results(self.config))
        todo = []
        for trials in Stages(self.config, found).pending().values():
            todo += [trial for trial in trials if trial.row in self.own]
        return todo

    def train(self):
        # that a folder cannot be written must not pass for another queue's lock
        claim(self.lock_of(f"queue-{os.getpid()}"), "queues runs").close()
        with ThreadPoolExecutor(self.config.jobs) as pool:
            try:
                workers = [pool.submit(self.work) for _ in range(self.config.jobs)]
                done, _ = wait(workers, return_when=FIRST_EXCEPTION)
                for worker in done:
                    # raises what was raised there
                    worker.result()
            finally:
                self.stop()

    def work(self):
        """Train until nothing is left."""
        while not self.stopping:
            todo = self.pending()
            if not todo:
                return
            if not any(self.take(trial) for trial in todo):
                # what comes next depends on runs of others
                time.sleep(self.config.wait)

    def lock_of(self, *names: str) -> str:
        # beside the runs: each has a lock of train.py in its own folder
        return os.path.join(self.config.out_dir, "locks", *names)

    def take(self, trial: Trial) -> bool:
        """Train one run, unless somebody else does."""
        try:
            lock = claim(self.lock_of(trial.row, name_of(trial)), "trains")
        except UserError:
            return False
        with lock:
            # it may have ended since the queue was looked at
            if trial not in results(self.config):
                self.train_one(trial)
        return True

    def train_one(self, trial: Trial):
        run = arms.run_of(self.config, trial)
        # before it, because files may change while it trains
        commit = revision()
        # one that has ended may have lost its line
        if not run.finished():
            self.start(run)
        if self.stopping:
            return
        line = line_of(self.config, trial, commit)
        keep(self.config, line)
        loss = line.get("val_loss", math.inf)
        say(f"{trial.row}, {name_of(trial)}: {loss:.4f}")

def run(config: Config):
    """Train what is missing. An error or a signal starts no more and stops those that train."""
    check(config)
    Queue(config).train()

# --- what it costs ---

def speed(found: Results) -> float:
    """FLOPs a second of a core, the median of the runs that there are."""
    known = []
    for line in found.values():
        # one that diverged has none
        if "seconds" in line:
            known.append(line["flops"] / line["seconds"])
    return statistics.median(known) if known else SPEED

def minutes(config: Config, trial: Trial, rate: float) -> float:
    """Of a core at `rate` FLOPs a second, with the evaluations."""
    flags = arms.flags_of(config, trial)
    evaluations = math.ceil(flags["steps"] / flags["eval_every"])
    # forward alone is a third of an update
    evaluated = evaluations * flags["eval_tokens"] * arms.flops(config, trial.row) / 3
    return (arms.total_flops(config, trial) + evaluated) / rate / 60

def foreseen(config: Config, found: Results) -> dict[str, list[Trial]]:
    """Stage → all of its trials that are not done, as if no loss yet to come told one rate from another:
    their number is the same for any."""
    known = losses(found)
    stages = {}
    while True:
        pending = Stages(config, known).pending()
        if not any(pending.values()):
            return stages
        for stage, trials in pending.items():
            stages.setdefault(stage, []).extend(trials)
            known |= dict.fromkeys(trials, 10.0)

def plan(config: Config):
    """Print the runs that are to come and their core-minutes, in the order in which they would be made."""
    check(config)
    found = results(config)
    rate = speed(found)
    body = []
    total = 0.0
    for stage, trials in foreseen(config, found).items():
        own = sum(minutes(config, trial, rate) for trial in trials)
        total += own
        by_length = {}
        for trial in trials:
            by_length[trial.length] = by_length.get(trial.length, 0) + 1
        runs = [f"{count} of {length}" for length, count in sorted(by_length.items())]
        body.append([stage, len(trials), ", ".join(runs), f"{own:,.0f}", f"{total:,.0f}"])
    say(markdown(["stage", "runs", "updates of dense", "core-minutes", "up to here"], body))
    say(f"at {rate / 1e12:.3f} TFLOP a second of a core; {len(found)} runs are done")

if __name__ == "__main__":
    verbs = {
        "plan": plan,
        "run": run,
        "table": answers.table,
        "figure": answers.figure,
        "fit": answers.fit,
    }
    drive(verbs, Config, __doc__)
