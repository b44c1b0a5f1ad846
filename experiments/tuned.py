"""Runs of finetune.py: what a table has of one, what is measured on the best of a sweep, and which of the
models stay."""
import glob
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from experiments.runs import Experiment, Key, Run, revision
from nanolost.checkpoint import checkpoints
from nanolost.files import read_json, write_atomic

# updates that no run has
NEVER = 1_000_000
# evaluated and saved at the ends alone; sums on one core are alike everywhere
ENDS = {"eval_every": NEVER, "save_every": NEVER, "keep": 1, "threads": 1}
# of metrics.jsonl, written after an evaluation
EVALUATIONS = ("eval", "accuracy")

def seconds_of(records: list[dict], started: float) -> float | None:
    """Of choosing zeros and of updates, without the evaluations between them; None for a run that was cut.
    records: of metrics.jsonl. started: when the model was loaded."""
    if started > records[0]["time"]:
        return None
    last = max(i for i, line in enumerate(records) if line["kind"] == "train")
    seconds = records[last]["time"] - started
    evaluations = []
    before = started
    for line in records[:last]:
        if line["kind"] in EVALUATIONS:
            evaluations.append(line["time"] - before)
        before = line["time"]
    # one before there were zeros has no line of its own
    hidden = sum("dense_loss" in line for line in records)
    if hidden and evaluations:
        seconds -= hidden * statistics.mean(evaluations)
    return seconds - sum(evaluations)

# nothing is kept in memory, as in a Run
@dataclass(frozen=True)
class Tuned(Run):
    """A run of finetune.py."""

    script: str = "finetune.py"

    def measured(self) -> dict:
        """What `measure` was given, {} for nothing."""
        path = self.path("measured.json")
        return read_json(path) if os.path.exists(path) else {}

    def measure(self, found: dict):
        """Keep what was found out about the result after the run."""
        write_atomic(self.path("measured.json"), json.dumps(found).encode())

    def has_model(self) -> bool:
        return bool(checkpoints(self.folder))

    def ends(self) -> dict:
        """Losses before the first update and after the last."""
        first, *_, last = self.records("eval")
        return {"first": first["val_loss"], "val_loss": last["val_loss"]}

    def summary(self) -> dict:
        """What a table needs of a finished run, {"diverged": True} for one whose loss did not stay finite."""
        if self.diverged():
            return {"diverged": True}
        ends = self.ends()
        if not all(map(math.isfinite, ends.values())):
            return {"diverged": True}
        records = [line for kind in ("stage", "train", *EVALUATIONS) for line in self.records(kind)]
        # the order of the file
        records.sort(key=lambda line: line["time"])
        updates = self.records("train")
        started = os.path.getmtime(self.path("config.json"))
        return {
            **ends,
            "steps": updates[-1]["step"],
            "tokens": updates[-1]["tokens"],
            "seconds": seconds_of(records, started),
            "peak_memory_bytes": max(line["peak_memory_bytes"] for line in updates),
            "zeros": self.records("stage")[-1]["zeros"],
            **self.measured(),
        }

class Tuning(Experiment):
    """Rows of such runs, of which a model is measured further, and kept, for the best ones alone."""

    def runs(self, row: str) -> dict[int, Run]:
        """Seed → run at the row's learning rate, of those that have a result."""
        lr = self.best_lr(row)
        return {seed: self.run_of(Key(row, lr, seed)) for seed in self.finished(row)}

    def measure(self, row: str, look: Callable[[str], dict]):
        """Let `look` see the model of each seed, once: what it finds becomes part of the result."""
        for seed, run in self.runs(row).items():
            if run.measured() or not run.has_model():
                continue
            run.measure(look(run.folder))
            self.note(Key(row, self.best_lr(row), seed), revision())

    def mean(self, row: str) -> float:
        """Of `figure` over the seeds, infinite without any."""
        found = [result[self.figure] for result in self.finished(row).values()]
        return statistics.mean(found) if found else math.inf

    def best(self, rows: list[str]) -> tuple[str, Run] | None:
        """The best of the rows, and its run of the smallest seed."""
        row = min(rows, key=self.mean)
        runs = self.runs(row)
        return (row, runs[min(runs)]) if runs else None

    def tidy(self, rows: list[str]):
        """Delete the models of these rows but that of the best one: each takes a gigabyte or two. Their
        results stay."""
        found = self.best(rows)
        for row in rows:
            # while it is swept, none is the best
            if self.best_lr(row) is None:
                continue
            for place in glob.glob(os.path.join(glob.escape(self.config.out_dir), glob.escape(row), "*")):
                if found is None or os.path.abspath(place) != found[1].folder:
                    shutil.rmtree(os.path.join(place, "checkpoints"), ignore_errors=True)
