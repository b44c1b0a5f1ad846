"""A queue of ordinary runs of train.py, which any number of hours can continue, and what came out of them.

An experiment has rows, each with flags of train.py. First seed 0 of a row trains at each learning rate of a
sweep, then all seeds at the best one. Rows that differ little from another may go by that one's sweep. Runs
that have finished are never repeated; each leaves one line in results.jsonl, from which a table can be
printed when the runs are gone."""
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nanolost.cores import usable_cores
from nanolost.errors import UserError
from nanolost.files import claim, read_json, write_atomic
from nanolost.flags import command, flag, parse, say

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# a file may come from anywhere: a run leaves a line of 40 kB at the most
LINES_LIMIT = 1 << 28
# flags that change no result
HARMLESS = {"out_dir", "keep", "save_every", "eval_every", "threads"}

@dataclass(frozen=True)
class Settings:
    """Flags that all experiments share."""
    data_dir: str = flag("data/controls", "folder of token shards")
    out_dir: str = flag("out/controls", "folder of the runs: ROW/lr-seed")
    steps: int = flag(200, "updates of each run, a tenth of them warm-up")
    lrs: tuple[float, ...] | None = flag(None, "learning rates of every sweep")
    widen: int = flag(4, "learning rates that a sweep may add where its best one is at an end")
    seeds: int = flag(3, "seeds of each row at the best learning rate")
    rows: str | None = flag(None, "rows to run or print, separated by / (all)")
    jobs: int = flag(usable_cores(), "runs at a time, a core each")
    extra: str = flag("", "more flags of train.py, separated by spaces, for what no row sets")
    results: str | None = flag(None, "print the table of this file of results, not of the runs in out_dir")
    fill: str | None = flag(None, "put the table between its two markers in this file, not on standard output")

# --- one run ---

def text(value) -> str:
    """A value as the command line of train.py has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)

@dataclass(frozen=True)
class Run:
    """One run: its folder, its flags, and the script that trains it (train.py, or one that registers more
    kinds of layers before)."""
    folder: str
    flags: dict
    script: str = "train.py"

    def status(self) -> dict:
        path = os.path.join(self.folder, "status.json")
        if not os.path.exists(path):
            return {"state": "missing", "reason": ""}
        return read_json(path)

    def diverged(self) -> bool:
        return self.status()["state"] == "failed" and "FloatingPointError" in self.status()["reason"]

    def finished(self) -> bool:
        """Whether it has a result that stands: UserError if the run that is there had other flags."""
        if self.status()["state"] != "finished" and not self.diverged():
            return False
        self.check()
        return True

    def check(self):
        was = read_json(os.path.join(self.folder, "config.json"))
        # through JSON, as the other side has been: lists for tuples
        for name, value in json.loads(json.dumps(self.flags)).items():
            if name not in HARMLESS and value not in (was.get(name), "auto"):
                raise UserError(f"{self.folder} was trained with --{name} {was.get(name)}, not {value}: name "
                                "another --out_dir")

    def records(self, kind: str) -> list[dict]:
        """The lines of metrics.jsonl of one kind, "train" or "eval"."""
        records = read_lines(os.path.join(self.folder, "metrics.jsonl"))
        return [record for record in records if record["kind"] == kind]

    def summary(self) -> dict:
        """What a table needs of a finished run, {"diverged": True} for one whose loss did not stay finite."""
        if self.diverged():
            return {"diverged": True}
        last = self.records("eval")[-1]
        if not math.isfinite(last["val_loss"]):
            return {"diverged": True}
        updates = self.records("train")
        result = {name: last[name] for name in ("val_loss", "val_ppl", "val_bpb")}
        result["tokens"] = updates[-1]["tokens"]
        result["tokens_per_second"] = statistics.median(line["tokens_per_second"] for line in updates)
        layers = last.get("layers")
        if layers:
            result["layers"] = mean_of_layers(list(layers.values()))
        return result

    def command(self) -> list[str]:
        flags = [f"--{name}={text(value)}" for name, value in self.flags.items()]
        return [sys.executable, os.path.join(ROOT, self.script), *flags]

def read_lines(path: str) -> list[dict]:
    """The objects of a file of JSON lines. A last line without its end, as a kill leaves it, is left out."""
    with open(path, encoding="utf-8") as file:
        content = file.read(LINES_LIMIT)
    whole = content[:content.rfind("\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as e:
        raise UserError(f"{path} has a line that is not JSON ({e}): remove it") from None

def mean_of_layers(layers: list[dict]) -> dict:
    """Of each number that `lost.diagnose` has for a layer, the mean over layers."""
    return {name: statistics.mean(layer[name] for layer in layers) for name in layers[0]}

# --- many runs ---

def key_of(result: dict) -> tuple:
    return result["row"], result["lr"], result["seed"]

def revision() -> str | None:
    """The commit of this program, "-dirty" behind it where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

class Experiment:
    """Rows of runs.

    run_of: (row, learning rate, seed) → Run. swept: row → the row by whose sweep its learning rate is chosen.
    lrs_of: row → learning rates that its sweep begins with."""

    def __init__(self, config: Settings, run_of: Callable, swept: dict[str, str], lrs_of: Callable):
        self.config = config
        self.run_of = run_of
        self.swept = swept
        self.lrs_of = lrs_of
        self.started = []
        self.stopping = False
        self.lock = threading.Lock()
        self.file = os.path.join(config.out_dir, "results.jsonl")
        self.given = None
        if config.results:
            self.given = {key_of(result): result for result in read_lines(config.results)}

    # --- results ---

    def result(self, row: str, lr: float, seed: int) -> dict | None:
        """`Run.summary` of one run, None while it has yet to come."""
        if self.given is not None:
            return self.given.get((row, lr, seed))
        run = self.run_of(row, lr, seed)
        return run.summary() if run.finished() else None

    def loss(self, row: str, lr: float, seed: int = 0) -> float | None:
        """Validation loss at the end, infinite if the run diverged, None while it has yet to come."""
        result = self.result(row, lr, seed)
        if result is None:
            return None
        return result.get("val_loss", math.inf)

    def sweep(self, row: str) -> dict[float, float | None]:
        """Learning rate → loss of seed 0. While the best is at an end, the sweep goes on there by factors of
        2: the same rule for every row."""
        lrs = sorted(self.lrs_of(row))
        most = len(lrs) + self.config.widen
        while True:
            losses = [self.loss(row, lr) for lr in lrs]
            if None in losses or len(lrs) == most:
                break
            best = losses.index(min(losses))
            if best == 0:
                lrs.insert(0, lrs[0] / 2)
            elif best == len(lrs) - 1:
                lrs.append(lrs[-1] * 2)
            else:
                break
        return dict(zip(lrs, losses, strict=True))

    def best_lr(self, row: str) -> float | None:
        """Of the sweep that the row goes by; None while that is not through."""
        losses = self.sweep(self.swept[row])
        if None in losses.values():
            return None
        return min(losses, key=losses.get)

    def results(self, row: str) -> dict[int, dict]:
        """Seed → result at the row's learning rate, of the runs that have one."""
        lr = self.best_lr(row)
        found = {}
        for seed in range(self.config.seeds):
            result = None if lr is None else self.result(row, lr, seed)
            if result is not None:
                found[seed] = result
        return found

    def finished(self, row: str) -> dict[int, dict]:
        """`results` without those that diverged."""
        return {seed: result for seed, result in self.results(row).items() if "val_loss" in result}

    def sweeps(self, rows: list[str]) -> list[str]:
        """The rows by whose sweeps `rows` go, each once."""
        return list(dict.fromkeys(self.swept[row] for row in rows))

    # --- training ---

    def train(self, rows: list[str]):
        """Train what is missing, `jobs` runs at a time. An error or a signal starts no more and stops those
        that train; called again it goes on with them."""
        with claim(self.config.out_dir, "queues runs"), ThreadPoolExecutor(self.config.jobs) as pool:
            try:
                self.train_sweeps(rows, pool)
                seeds = range(self.config.seeds)
                self.train_all([(row, self.best_lr(row), seed) for seed in seeds for row in rows], pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()

    def stop(self):
        with self.lock:
            self.stopping = True
        for process in self.started:
            # of no effect on those that have ended
            process.terminate()

    def train_sweeps(self, rows: list[str], pool: ThreadPoolExecutor):
        while True:
            missing = []
            for row in self.sweeps(rows):
                missing += [(row, lr, 0) for lr, loss in self.sweep(row).items() if loss is None]
            if not missing:
                return
            self.train_all(missing, pool)

    def train_all(self, jobs: list[tuple], pool: ThreadPoolExecutor):
        futures = [pool.submit(self.train_one, *job) for job in jobs]
        for future in futures:
            future.result()

    def train_one(self, row: str, lr: float, seed: int):
        run = self.run_of(row, lr, seed)
        if run.finished():
            return
        commit = revision()
        self.start(run)
        if not self.stopping:
            self.note(row, lr, seed, commit)
            say(f"{row}, lr {lr:g}, seed {seed}: {self.loss(row, lr, seed):.4f}")

    def start(self, run: Run):
        """One process, to its end. OSError or UserError with its last words where it left no result."""
        # one thread: as many runs as cores are quicker than one on all of them, and sums are alike everywhere
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with self.lock:
            # a thread may be on its way here when the others are told to stop
            if self.stopping:
                return
            process = subprocess.Popen(run.command(), cwd=ROOT, env=environment, **pipes)
            self.started.append(process)
        words = process.communicate()[1].strip().splitlines()
        if run.finished():
            return
        reason = words[-1] if words else "it was stopped: the same command continues"
        if process.returncode == 2:
            raise UserError(f"{run.folder}: {reason}")
        raise ChildProcessError(f"{run.folder}: {reason}")

    def note(self, row: str, lr: float, seed: int, commit: str | None):
        """Keep the result in results.jsonl, in the place of an earlier one of the same run."""
        result = self.result(row, lr, seed)
        new = {"row": row, "lr": lr, "seed": seed, "steps": self.config.steps, "commit": commit, **result}
        with self.lock:
            kept = []
            with contextlib.suppress(FileNotFoundError):
                kept = [old for old in read_lines(self.file) if key_of(old) != key_of(new)]
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in [*kept, new]]
            write_atomic(self.file, "".join(lines).encode())

# --- the command line of a driver ---

def chosen(config: Settings, rows: dict) -> list[str]:
    """The rows that --rows names, all of `rows` without it."""
    if not config.rows:
        return list(rows)
    names = list(dict.fromkeys(config.rows.split("/")))
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise UserError(f"--rows {'/'.join(unknown)}: choose from {'/'.join(rows)}")
    return names

def check(config: Settings):
    """UserError for numbers with which nothing would run."""
    for name in ("steps", "seeds", "jobs"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be positive")
    if config.widen < 0:
        raise UserError(f"--widen {config.widen}: must not be negative")
    if not all(0 < lr < math.inf for lr in config.lrs or ()):
        raise UserError(f"--lrs {text(config.lrs)}: must be positive and finite")

def drive(verbs: dict[str, Callable], cls, doc: str):
    """The program `DRIVER.py VERB [--FLAG VALUE …]`: verbs[VERB] gets the flags as a `cls`."""
    def main():
        verb, *rest = sys.argv[1:] or ["--help"]
        if verb in ("--help", "-h"):
            parse(cls, ["--help"], doc)
        if verb not in verbs:
            raise UserError(f"unknown {verb}: use {', '.join(verbs)} or --help")
        # ends as Ctrl-C does, through `finally`: the runs are stopped, and continue another time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        config = cls(**parse(cls, rest, doc))
        check(config)
        verbs[verb](config)

    command(main)
